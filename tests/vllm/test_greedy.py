"""The real engine on a tiny model: whoever schedules, and however often they are evicted, the outputs are the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vLLM is not installed here; `make test-vllm` has it")

from driven import check_empty, tiny_llama
from vllm import LLM, SamplingParams

from flexirl.vllm.scheduler import Scheduler

BLOCKS = 17  # of 32 tokens: three of the longest requests at most


@contextmanager
def engine(caching: bool, settings: dict[str, Any] | None) -> Iterator[LLM]:
    """vLLM with a tiny cache; settings: the plug-in's, None for vLLM's own scheduler."""
    plugged = {} if settings is None else {"scheduler_cls": Scheduler, "additional_config": {"flexirl": settings}}
    llm = LLM(
        tiny_llama(), dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8, block_size=32,
        num_gpu_blocks_override=BLOCKS, enable_prefix_caching=caching, skip_tokenizer_init=True, **plugged,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def outputs(llm: LLM) -> list[list[int]]:
    """Of twenty requests of both classes, some of which begin alike."""
    rng = random.Random(0)
    shared = [rng.randrange(3, 250) for _ in range(64)]
    prompts, params, priorities = [], [], []
    for i in range(20):
        own = [rng.randrange(3, 250) for _ in range(rng.randrange(5, 90))]
        prompts.append({"prompt_token_ids": (shared if i % 3 == 0 else []) + own})
        extra = {"flexirl": {"class": "deferred", "window_s": 60}} if i % 4 == 1 else None
        tokens = rng.randrange(20, 90)
        params.append(
            SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
        )
        priorities.append(i % 2)
    results = llm.generate(prompts, params, use_tqdm=False, priority=priorities)
    return [list(result.outputs[0].token_ids) for result in results]


@pytest.mark.parametrize("caching", [True, False])
def test_outputs_are_those_of_vllm_itself(caching: bool) -> None:
    with engine(caching, None) as llm:
        expected = outputs(llm)
    for policy in ("qoserve", "pretrained"):
        with engine(caching, {"policy": policy, "interval_s": 0.01, "ttft_s": 0.3, "tpot_s": 0.01}) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            assert outputs(llm) == expected, policy
            assert scheduler.failures.counts == {}
            assert int(scheduler.mirror.state.classes["preemptions"].sum()) > 5
            assert scheduler.fit.steps > 0
            scheduler.schedule()
            check_empty(scheduler)
