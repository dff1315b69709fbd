"""Iteration times composed from operator tables: by hand on a tiny table, and exact on the measured points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.runtime.fitting.operators import OperatorTables, fit_profile, model_layers, read_lengths, sample_iterations

RECORDED = Path(__file__).parents[4] / "shared" / "real_vllm" / "rtx4090-llama-3.1-8b"
recorded = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded run is not beside the repository")

DENSE = {
    "embedding": (1.0, 0.0),
    "final_layernorm": (2.0, 0.0),
    "layernorm": (3.0, 0.0),
    "qkv_proj": (10.0, 0.1),
    "o_proj": (5.0, 0.1),
    "gate_up_proj": (20.0, 0.2),
    "down_proj": (15.0, 0.1),
}
META: dict[str, Any] = {
    "model": "some/unknown-model",
    "layers": 3,
    "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 200},
    "kv_cache": {"num_gpu_blocks": 40, "block_size": 16, "enable_prefix_caching": True},
    "resolved_config": {"compilation_config": {"cudagraph_capture_sizes": [8, 16, 32]}},
}


def attention(chunk: float, computed: float, decodes: float, context: float) -> float:
    return 4.0 + 0.01 * chunk * computed + 0.02 * decodes * context + 0.1 * chunk + (1.0 if chunk and decodes else 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    operators = tmp_path / "operators"
    operators.mkdir()
    (tmp_path / "meta.json").write_text(json.dumps(META))
    lines = [json.dumps({"input_toks": 10 + at, "output_toks": 5 + at % 7}) for at in range(40)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"{name},{size},{a + b * size}" for name, (a, b) in DENSE.items() for size in (1, 16, 64)]
    (operators / "dense.csv").write_text("layer,tokens,time_us\n" + "\n".join(rows) + "\n")
    rows = [f"{name},{size},{7 + size}" for name in ("lm_head", "sampler") for size in (1, 8)]
    (operators / "per_sequence.csv").write_text("layer,sequences,time_us\n" + "\n".join(rows) + "\n")
    rows = []
    for chunk in (0, 16, 64):
        for decodes in (0, 1, 4, 8) if chunk < 64 else (0, 1, 4):  # the largest chunk leaves no room for 8 decodes
            for computed in (0, 64) if chunk else (0,):
                for context in (16, 128) if decodes else (0,):
                    if chunk or decodes:
                        time = attention(chunk, computed, decodes, context)
                        rows.append(f"{chunk},{computed},{decodes},{context},{time}")
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    (operators / "attention.csv").write_text(header + "\n".join(rows) + "\n")
    return tmp_path


def dense_us(tokens: float) -> float:
    layer = {name: a + b * tokens for name, (a, b) in DENSE.items() if name not in ("embedding", "final_layernorm")}
    return 3.0 + 3 * (sum(layer.values()) + layer["layernorm"])


def test_decodes_alone_by_hand(folder: Path) -> None:
    # 3 decodes are padded to 8 captured tokens; their mean context is 60.
    expected = dense_us(8) + 3 * attention(0, 0, 3, 60) + 2 * (7 + 3)
    composed = OperatorTables.read(folder).iteration_time_s([], [20, 60, 100])
    assert composed == pytest.approx(expected * 1e-6, rel=1e-12)


def test_several_chunks_beside_decodes_by_hand(folder: Path) -> None:
    # 40 + 20 + 2 tokens are beyond the captured sizes. The chunk of 40 does most work; the other adds its time
    # alone, less that of the smallest measured chunk. Only the decodes and one chunk sample.
    extra = attention(20, 8, 0, 0) - attention(16, 0, 0, 0)
    expected = dense_us(62) + 3 * (attention(40, 32, 2, 50) + extra) + 2 * (7 + 3)
    composed = OperatorTables.read(folder).iteration_time_s([(20, 8), (40, 32)], [40, 60], sampled=3)
    assert composed == pytest.approx(expected * 1e-6, rel=1e-12)


def test_beyond_the_grid_the_last_line_goes_on_and_below_it_the_smallest_size_counts(folder: Path) -> None:
    tables = OperatorTables.read(folder)
    assert tables.attention_us([], [400, 400]) == pytest.approx(attention(0, 0, 2, 400))
    assert tables.attention_us([(2, 0)], []) == pytest.approx(attention(16, 0, 0, 0))
    # 8 decodes beside 64 tokens were not measured; the line through 1 and 4 decodes goes on.
    assert tables.attention_us([(64, 64)], np.full(8, 128)) == pytest.approx(attention(64, 64, 8, 128))


def test_an_eager_engine_is_not_padded(folder: Path) -> None:
    eager = META | {"resolved_config": META["resolved_config"] | {"model_config": {"enforce_eager": True}}}
    (folder / "meta.json").write_text(json.dumps(eager))
    composed = OperatorTables.read(folder).iteration_time_s([], [60, 60, 60])
    assert composed == pytest.approx((dense_us(3) + 3 * attention(0, 0, 3, 60) + 20) * 1e-6)


def test_sampled_iterations_respect_the_engine(folder: Path) -> None:
    lengths = read_lengths(folder)
    iterations = sample_iterations(lengths, kv_tokens=640, max_tokens=64, max_sequences=8, count=300)
    for chunks, contexts, sampled in iterations:
        assert 0 < sum(chunk for chunk, _ in chunks) + len(contexts) <= 64
        assert len(chunks) + len(contexts) <= 8
        assert np.sum(contexts) <= 640
        assert len(contexts) <= sampled <= len(chunks) + len(contexts)


def test_profile_takes_the_settings_and_is_deterministic(folder: Path) -> None:
    profile, again = fit_profile(folder, count=400), fit_profile(folder, count=400)
    assert profile.values == again.values
    assert (profile.values["kv_blocks"], profile.values["max_running"], profile.values["prefix_caching"]) == (39, 8, 1)
    assert profile.fit["mape"] < 0.1


def test_layers_of_known_models() -> None:
    assert model_layers({"model": "meta-llama/Llama-3.1-8B"}) == 32
    assert model_layers({"model": "meta-llama/Meta-Llama-3-8B-Instruct"}) == 32
    assert model_layers({"model": "Qwen/Qwen3-32B"}) == 64
    assert model_layers({"model": "x", "layers": 5}) == 5
    with pytest.raises(UserError, match="layers"):
        model_layers({"model": "Qwen/Qwen3-3B2"})


@pytest.mark.parametrize("name", ["meta.json", "requests.jsonl", "dense.csv", "per_sequence.csv", "attention.csv"])
@pytest.mark.parametrize("text", [None, "", "layer,tokens\n1,2\n", "[]"])
def test_missing_and_malformed_files_are_named(folder: Path, name: str, text: str | None) -> None:
    path = folder / name if name.endswith(("json", "jsonl")) else folder / "operators" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        fit_profile(folder)


@recorded
def test_measured_points_are_hit_exactly() -> None:
    tables = OperatorTables.read(RECORDED)
    rows = np.loadtxt(RECORDED / "operators" / "attention.csv", delimiter=",", skiprows=1)
    for chunk, computed, decodes, context, time_us in rows[:: len(rows) // 400]:
        chunks = [(int(chunk), int(computed))] if chunk else []
        assert tables.attention_us(chunks, np.full(int(decodes), context)) == pytest.approx(time_us, rel=1e-9)


@recorded
def test_profile_follows_the_composed_iterations() -> None:
    tables, profile = OperatorTables.read(RECORDED), fit_profile(RECORDED)
    assert profile.fit["mape"] < 0.02
    assert profile.fit["decode_mape"] < 0.01
    assert abs(profile.fit["decode_bias"]) < 0.002 and abs(profile.fit["mixed_bias"]) < 0.01
    assert tables.layers == 32 and profile.values["kv_blocks"] == 2587
