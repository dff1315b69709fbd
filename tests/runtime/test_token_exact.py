"""Whatever the schedule, a request's greedy output is what `model.generate` gives for it alone: fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from live_toys import LiveRun, RandomPolicy
from toys import toy_engine

from flexirl.runtime.executor import Batch, ModelExecutor, Outcome
from flexirl.runtime.host_cache import HostCache
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import SHAPES, build
from flexirl.runtime.requests import Request
from flexirl.runtime.sampling import Sampling
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

# Smaller than the tiny models, with the same proportions; Mistral's window is shorter than most sequences.
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {"llama": {}, "qwen3": {}, "mistral": {"sliding_window": 11}}
ENGINE: dict[str, float] = {
    "kv_blocks": 40, "host_kv_blocks": 30, "block_size": 4, "max_running": 8, "max_tokens_per_step": 24,
    "max_model_len": 100, "prefix_caching": 1,
}  # fmt: skip


class CheckedExecutor(ModelExecutor):
    """The model executor, with a place to interfere between layers and its host cache open to checks."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model, toy_engine(**ENGINE))
        self.host: HostCache = self._host
        self.between_layers = lambda: None

    def execute(self, batch: Batch, sampling: Any, interrupted: Any) -> Outcome:
        """Interferes after every layer but the last, when the cache is half written."""

        def ask() -> bool:
            self.between_layers()
            return interrupted is not None and interrupted()

        return super().execute(batch, sampling, ask)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    build({**SHAPES["tiny"], "model_type": request.param, **SMALL, **FAMILIES[request.param]}, folder, seed=1)
    return load_model(folder)


def generate_alone(model: LoadedModel, request: Request) -> list[int]:
    """What Transformers generates with its own attention and cache."""
    own = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        prompt = torch.tensor([request.prompt])
        stop = {"eos_token_id": None} if request.sampling.ignore_eos else {}
        tokens = model.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
            pad_token_id=0, **stop,
        )[0]  # fmt: skip
    model.model.set_attn_implementation(own)
    return tokens[len(request.prompt) :].tolist()


def test_no_schedule_changes_a_token(model: LoadedModel) -> None:
    rng = np.random.default_rng(3)
    executor = CheckedExecutor(model)
    run = LiveRun(executor, RandomPolicy(5, 24), save_blocks=2)
    requests: dict[str, Request] = {}

    def add() -> None:
        if len(requests) < 40:
            request = Request(
                id=f"r{len(requests)}",
                prompt=rng.integers(0, 256, rng.integers(1, 60)).tolist(),
                max_tokens=int(rng.integers(1, 40)),
                request_class=int(rng.choice([IMMEDIATE, DEFERRED])),
                sampling=Sampling(ignore_eos=bool(rng.random() < 0.5)),
                window_s=np.inf,
            )
            requests[request.id] = request
            run.engine.add_request(request)

    executor.between_layers = lambda: add() if rng.random() < 0.02 else None
    step = 0
    while len(requests) < 40 or run.engine.unfinished:
        add()
        if step % 20 == 5:
            run.engine.cancel(f"r{rng.integers(len(requests))}")
        if step % 30 == 0:
            run.engine.swap_policy(RandomPolicy(step, 24))
        run.step(int(rng.integers(1, 7)))
        step += 1
    metrics = run.engine.metrics()
    assert metrics["preemptions"] > 20 and metrics["swapped_tokens"] > 200 and metrics["recomputed_tokens"] > 200
    assert metrics["abandoned_iterations"] > 0 and metrics["policy_swaps"] > 2
    whole = 0
    for name, completion in run.completions.items():
        expected = generate_alone(model, requests[name])
        whole += completion.finish_reason in ("stop", "length")
        if completion.finish_reason in ("stop", "length"):
            assert completion.token_ids == expected
        else:
            assert completion.token_ids == expected[: len(completion.token_ids)]
    assert whole > 25 and len({token for c in run.completions.values() for token in c.token_ids}) > 100
