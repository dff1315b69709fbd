"""Engine profiles: the packaged ones are plausible, files round-trip, bad files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.runtime.fitting.profiles_from_data import A100, A100X2, H100, H200, LLAMA_2_70B, LLAMA_31_8B, QWEN_25_VL_7B
from flexirl.runtime.profile.engine import ENGINE, UNITS, load_profile, profile_names, save_profile
from flexirl.runtime.profile.step_time import BATCH, step_time

MEASURED = {
    "h200-llama-3.1-8b": (LLAMA_31_8B, H200),
    "h100-llama-3.1-8b": (LLAMA_31_8B, H100),
    "a100-llama-3.1-8b": (LLAMA_31_8B, A100),
    "a100x2-llama-2-70b": (LLAMA_2_70B, A100X2),
}
NAMES = sorted([*MEASURED, "h100-qwen2.5-vl-7b", "cpu-tiny"])


def seconds(name: str, prefill: int = 0, decodes: int = 0, context: float = 0.0) -> float:
    batch = np.zeros((), dtype=BATCH)
    batch["prefill_tokens"], batch["decode_sequences"], batch["sampled_sequences"] = prefill, decodes, decodes
    batch["decode_context"], batch["chunk_context"] = context, prefill**2 / 2
    return step_time(load_profile(name).values, batch[()])


def test_every_profile_is_packaged_and_states_every_origin() -> None:
    assert profile_names() == NAMES
    assert set(UNITS) == set(ENGINE.names or ())
    for name in NAMES:
        profile = load_profile(name)
        assert profile.name == name
        assert profile.values.dtype == ENGINE
        assert all(len(profile.origin[field]) > 8 for field in UNITS)
        assert ("estimated, not measured" in profile.origin["base_s"]) == (name not in MEASURED)


@pytest.mark.parametrize("name", NAMES)
def test_packaged_profiles_are_monotone(name: str) -> None:
    for times in (
        [seconds(name, decodes=count, context=512.0 * count) for count in range(1, 257)],
        [seconds(name, prefill=tokens) for tokens in range(1, 2049, 8)],
        [seconds(name, decodes=32, context=float(context)) for context in range(0, 100_000, 5000)],
    ):
        assert (np.diff(times) > 0).all()


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_measured_profiles_respect_the_roofline(name: str) -> None:
    model, chip = MEASURED[name]
    bandwidth, flops = chip.bandwidth * chip.count, chip.flops * chip.count
    for decodes, context in ((1, 128), (32, 1000), (128, 2000)):
        moved = model.decoder_params * model.dtype_bytes + decodes * context * model.kv_bytes_per_token
        assert 1.0 < seconds(name, decodes=decodes, context=decodes * context) / (moved / bandwidth) < 2.5
    assert 1.0 < seconds(name, prefill=2048) / (2 * model.decoder_params * 2048 / flops) < 2.5


def test_memory_of_the_vision_engine_holds_weights_and_cache() -> None:
    values = load_profile("h100-qwen2.5-vl-7b").values
    cache = int(values["kv_blocks"]) * int(values["block_size"]) * QWEN_25_VL_7B.kv_bytes_per_token
    assert 0.8 * H100.memory_bytes < cache + QWEN_25_VL_7B.weight_bytes < 0.9 * H100.memory_bytes
    assert values["per_image_token_s"] > 0


def test_profiles_round_trip_exactly(tmp_path: Path) -> None:
    profile = load_profile("h100-llama-3.1-8b").replace(base_s=0.1 + 0.2, kv_blocks=4321)
    save_profile(profile, tmp_path / "deep" / "engine.json")
    again = load_profile(tmp_path / "deep" / "engine.json")
    assert again.values == profile.values
    assert (again.name, again.origin, again.fit) == (profile.name, profile.origin, profile.fit)
    assert again.origin["kv_blocks"] == "set by the user"


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"h900.*cpu-tiny.*h200-llama-3\.1-8b"):
        load_profile("h900")
    with pytest.raises(UserError, match="does not exist"):
        load_profile("nowhere.json")


@pytest.mark.parametrize(
    "field, value",
    [
        ("base_s", -1.0),
        ("base_s", float("nan")),
        ("base_s", float("inf")),
        ("per_token_s", "fast"),
        ("per_token_s", None),
        ("per_token_s", True),
        ("kv_blocks", 0),
        ("kv_blocks", 12.5),
        ("kv_blocks", 2**40),
        ("kv_blocks", 3),
        ("max_running", "many"),
        ("prefix_caching", 2),
        ("host_s", "missing"),
        ("host_z", 1.0),
    ],
)
def test_bad_figures_are_named(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    save_profile(load_profile("cpu-tiny"), path)
    document = json.loads(path.read_text())
    if value == "missing":
        del document["values"][field]
    else:
        document["values"][field] = {"value": value, "unit": "s", "origin": "test"}
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=field):
        load_profile(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "name": "x"}', '{"schema": 1, "values": {}}']
)
def test_malformed_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"engine\.json"):
        load_profile(path)
