"""Fused kernels inside models: what matches is replaced and gives the same, what does not stays as it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_toys import Constant, LiveRun
from model_toys import FAMILIES, CheckedExecutor, generate_alone
from transformers import AutoConfig, AutoModelForCausalLM

from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models import fusing
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import build

KERNELS = ("rms_norm", "silu_mul", "rotary")


def replaced(model: LoadedModel) -> list[str]:
    """The kinds of modules that have another `forward` than their own, each as often as it has."""
    return sorted(type(module).__name__ for module in model.model.modules() if "forward" in module.__dict__)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_says_the_same(
    tmp_path: Path, family: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(FAMILIES[family], tmp_path, seed=1)
    plain = load_model(tmp_path)
    launched = set()
    if kernels == "triton":
        pytest.importorskip("triton")
        for name in KERNELS:

            def launches(tensor: torch.Tensor, name: str = name) -> bool:
                launched.add(name)
                return True

            monkeypatch.setattr(sys.modules[f"flexirl.runtime.kernels.{name}"], "runs_triton", launches)
    fused = load_model(tmp_path, fused=True)
    name = family.capitalize()
    norms = 7 + 6 * (family == "qwen3")  # two a layer and a last one; Qwen3 also has one for queries, one for keys
    assert replaced(plain) == []
    assert replaced(fused) == sorted([f"{name}RMSNorm"] * norms + [f"{name}MLP"] * 3 + [f"{name}Attention"] * 3)

    rng = np.random.default_rng(0)
    requests = [Request(f"{i}", rng.integers(0, 256, 12 + 9 * i).tolist(), 6, i % 2) for i in range(3)]
    sampling = Sampling(logprobs=3)
    completions = []
    for model in (plain, fused):
        run = LiveRun(CheckedExecutor(model), Constant())
        for request in requests:
            run.engine.add_request(Request(request.id, request.prompt, 6, request.request_class, sampling))
        run.drain()
        completions.append(run.completions)
    for request in requests:
        one, other = (each[request.id] for each in completions)
        assert one.token_ids == other.token_ids == generate_alone(plain, request)
        np.testing.assert_allclose(
            [each.token for each in one.logprobs], [each.token for each in other.logprobs], atol=1e-4
        )
    # With another attention than ours its layers rotate by themselves.
    assert generate_alone(fused, requests[0]) == generate_alone(plain, requests[0])
    assert launched == (set(KERNELS) if kernels == "triton" else set())


GQA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "kinds"),
    [
        ("gemma2", {"head_dim": 8, "sliding_window": 16}, {"Gemma2Attention"}),  # weights from zero, GELU
        ("phi", {"partial_rotary_factor": 0.5}, set()),  # it rotates half of each head
        ("cohere", {}, {"CohereMLP"}),  # rotates neighbours against each other
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
         {"Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"}),
        ("gpt2", {"n_positions": 64}, set()),
    ],
)  # fmt: skip
def test_what_does_not_match_stays(tmp_path: Path, kind: str, settings: dict[str, Any], kinds: set[str]) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**GQA, **settings})).save_pretrained(tmp_path)
    assert set(replaced(load_model(tmp_path, fused=True))) == kinds


def test_a_replacement_that_changes_the_model_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(FAMILIES["llama"], tmp_path, seed=1)

    def wrong(model: Any) -> Any:
        for module in model.modules():
            if type(module).__name__ == "LlamaMLP":
                yield module, torch.zeros_like

    monkeypatch.setattr(fusing, "_gated_layers", wrong)
    assert set(replaced(load_model(tmp_path, fused=True))) == {"LlamaRMSNorm", "LlamaAttention"}
