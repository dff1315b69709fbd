"""Models load from local folders or are refused with the reason; the tiny ones are the same on every machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flexirl.errors import UserError
from flexirl.runtime.models import loading
from flexirl.runtime.models.executor import ModelExecutor, fit_profile
from flexirl.runtime.models.loading import Geometry, load_model
from flexirl.runtime.models.tiny import SHAPES, build
from flexirl.runtime.profile.engine import load_profile

SMALL: dict[str, Any] = {
    **SHAPES["tiny"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama."""
    folder = tmp_path_factory.mktemp("small")
    build(SMALL, folder, seed=0)
    return folder


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(small, tmp_path / "model"))


def refusal(folder: Path | str, **options: Any) -> str:
    """The one sentence that says why a model is not loaded."""
    with pytest.raises(UserError) as error:
        load_model(folder, **options)
    message = str(error.value)
    assert message.endswith((".", "!", "?")) and "\n" not in message
    return message


def random_model(folder: Path, kind: str, **settings: Any) -> Path:
    """A model of another family with random weights."""
    config = AutoConfig.for_model(kind, vocab_size=300, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**COMMON, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", GPT2),
        ("gpt_neox", COMMON),
        ("gemma2", {**GQA, "head_dim": 8, "sliding_window": 16}),
        ("qwen2", {**GQA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("mixtral", {**GQA, "num_local_experts": 4}),
        ("phi", COMMON),
    ],
)
def test_many_families_run(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    # `load_model` itself compares paged attention with the model's own on a sequence longer than the windows above.
    model = load_model(random_model(tmp_path, kind, **settings))
    assert model.geometry.layers == 2 and model.geometry.heads == 4 and model.tokenizer is None


def test_what_is_loaded_describes_itself(small: Path) -> None:
    model = load_model(small)
    assert model.geometry == Geometry(2, 4, 2, 8) and model.vocab_size == 258 and model.max_len == 128
    assert model.end_tokens == (257,) and model.dtype == torch.float32 and model.name == small.name
    assert load_model(small, dtype="bfloat16").dtype == torch.bfloat16


def test_the_tiny_model_is_made_once_and_always_the_same(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    model = load_model("tiny")
    (made,) = (tmp_path / "flexirl" / "models").iterdir()
    before = (made / "model.safetensors").stat().st_mtime_ns
    again = load_model("tiny")
    assert (made / "model.safetensors").stat().st_mtime_ns == before and again.name == "tiny"
    expected = load_file(small / "model.safetensors")  # built in another folder, with other random numbers before
    for name, weights in model.model.state_dict().items():
        assert torch.equal(weights, expected[name])


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt_oss", {**GQA, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
        ("deepseek_v3",
         {**COMMON, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
          "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
         "latent attention"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "attention interface"),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention interface"),
        ("bert", {**COMMON, "is_decoder": False}, "its attention is not plain"),
    ],
)  # fmt: skip
def test_attention_that_is_not_ours_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], reason: str
) -> None:
    random_model(tmp_path, kind, **settings)
    with pytest.raises(UserError, match=f"cannot be run: .*({reason})"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rotary embedding"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "no_such_model"}, "no usable config.json"),
        ({"model_type": "clip"}, "text"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "custom_thing"}, "no usable config.json"),
    ],
)
def test_configurations_that_cannot_run_are_refused(folder: Path, change: dict[str, Any], reason: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert reason in refusal(folder)


def test_bad_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "neither a folder nor one of tiny" in refusal(tmp_path / "nowhere")
    assert "no usable config.json" in refusal(tmp_path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "model.safetensors is not a readable safetensors file" in refusal(folder)
    weights.write_bytes(b"\x80\x04\x95 a pickle")
    assert "model.safetensors is not a readable safetensors file" in refusal(folder)
    weights.unlink()
    assert "has no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04\x95 a pickle")
    assert "pickled weights (pytorch_model.bin)" in refusal(folder)


def test_only_weights_that_are_loaded_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (size,) = {sum(tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values())}
    monkeypatch.setattr(loading, "total_memory", lambda device: size)
    save_file({"x": torch.zeros(size)}, folder / "consolidated.safetensors", {"format": "pt"})
    (folder / "other.safetensors").write_bytes(b"no such thing")
    assert load_model(folder).vocab_size == 258
    model = load_model(folder).model
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and load_model(folder).vocab_size == 258
    next(folder.glob("model-*.safetensors")).unlink()
    assert "is not a readable safetensors file" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "is no index" in refusal(folder)


@pytest.mark.parametrize("terabytes", [1, 8])
def test_a_file_larger_than_the_memory_is_one_sentence(folder: Path, terabytes: int) -> None:
    size = terabytes << 40
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # takes no room on the disk
    assert "GiB" in refusal(folder)


def test_incomplete_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "no fitting weights for model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert "no usable tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"device": "tpu"}, "device=tpu"), ({"dtype": "int3"}, "dtype=int3"), ({"device": "mps"}, "mps")],
)
def test_unknown_devices_and_types_are_refused(small: Path, options: dict[str, str], reason: str) -> None:
    assert reason in refusal(small, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(small: Path) -> None:
    assert "device=cuda" in refusal(small, device="cuda")


def test_models_beyond_the_memory_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "total_memory", lambda device: 1000)
    assert "GiB" in refusal(small)


def test_the_cache_is_sized_for_model_and_memory(small: Path) -> None:
    model = load_model(small)
    profile = load_profile("cpu-tiny")
    fitted = fit_profile(model, profile)
    assert fitted.values["max_model_len"] == 128  # the model's
    assert fitted.values["kv_blocks"] == 32 * 8  # as much as 32 seats of 128 tokens can use
    assert fit_profile(model, profile, kv_blocks=3).values["max_model_len"] == 48
    with pytest.raises(UserError, match=r"engine\.kv_blocks=1000000000 does not fit"):
        fit_profile(model, profile, kv_blocks=1_000_000_000)


def test_memory_that_cannot_be_had_is_one_sentence(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(small)

    def no_memory(*args: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(UserError, match=r"engine\.kv_blocks=7"):
        ModelExecutor(model, load_profile("cpu-tiny").replace(kv_blocks=7))
