"""Program: what the plug-in costs vLLM's scheduler: `python -m flexirl.benches.vllm [--quick] [--output FILE.json]`.

vLLM's scheduler, with the plug-in and without, between made-up model outputs; needs vLLM, but no device and no weights.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from flexirl.benches.figures import Row, report
from flexirl.policies.registry import PRETRAINED
from flexirl.vllm import Scheduler

BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
RUNNING = (64, 256)
_PROMPT_TOKENS = 100


def llama_config() -> LlamaConfig:
    """Of a Llama so small that it runs anywhere."""
    return LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=MAX_MODEL_LEN, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@cache
def _model_folder() -> str:
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    llama_config().save_pretrained(folder)
    return folder


def new_scheduler(
    scheduler_class: type[AsyncScheduler],
    settings: dict[str, Any] | None = None,
    *,
    blocks: int = 10_000,
    seats: int = 16,
    tokens: int = 512,
    caching: bool = True,
    order: str = "fcfs",
) -> AsyncScheduler:
    """A scheduler without a device. settings: the plug-in's; blocks: of cache, of 16 tokens each, the first of no use;
    seats, tokens: of a step; order: vLLM's own, fcfs or priority.
    """
    model = ModelConfig(model=_model_folder(), skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_MODEL_LEN)
    config = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_num_seqs=seats, max_num_batched_tokens=tokens, max_model_len=MAX_MODEL_LEN, is_encoder_decoder=False,
            enable_chunked_prefill=True, async_scheduling=True, policy=order,
        ),
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=caching),
        additional_config={"flexirl": settings or {}},
    )  # fmt: skip
    config.cache_config.num_gpu_blocks = blocks
    group = KVCacheGroupSpec(
        ["layer"], FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    )
    with set_current_vllm_config(config):
        return scheduler_class(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )


def new_request(
    name: str, prompt: list[int], max_tokens: int, priority: int = 0, extra: dict[str, Any] | None = None
) -> Request:
    """A request that makes all its tokens."""
    init_none_hash(sha256)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    return Request(
        request_id=name, prompt_token_ids=prompt, sampling_params=params, pooling_params=None, priority=priority,
        block_hasher=hasher,
    )  # fmt: skip


class Driver:
    """Plays the engine around a scheduler: schedules, and hands in made-up outputs when so many steps are on their way.

    made: output tokens by request; finished: requests; schedule_s, update_s: what each step took of either.
    """

    def __init__(self, scheduler: AsyncScheduler, depth: int = 2) -> None:
        self.scheduler = scheduler
        self.made: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.schedule_s: list[float] = []
        self.update_s: list[float] = []
        self._on_their_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._depth = depth

    def step(self) -> SchedulerOutput:
        """Schedules a step, then hears of the oldest one if as many as can be are on their way."""
        began_s = time.perf_counter()
        output = self.scheduler.schedule()
        self.schedule_s.append(time.perf_counter() - began_s)
        names = list(output.num_scheduled_tokens)
        tokens = [[] if self.scheduler.requests[name].is_prefill_chunk else [7] for name in names]
        places = {name: i for i, name in enumerate(names)}
        result = ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens)
        self._on_their_way.append((output, result))
        while len(self._on_their_way) >= self._depth or (self._on_their_way and not names):
            self.hear()
        return output

    def hear(self) -> None:
        """The oldest step has ended."""
        output, result = self._on_their_way.popleft()
        began_s = time.perf_counter()
        told = self.scheduler.update_from_output(output, result)
        self.update_s.append(time.perf_counter() - began_s)
        for outputs in told.values():
            for one in outputs.outputs:
                self.made.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)

    def drain(self, steps: int) -> None:
        """Steps until nothing is left; raises AssertionError if that takes more than so many."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests() and not self._on_their_way:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.get_num_unfinished_requests()} requests are stuck")


def _decoding(scheduler_class: type[AsyncScheduler], settings: dict[str, Any], running: int) -> Driver:
    """A driver whose scheduler runs so many requests, half of them deferred, all of them decoding."""
    scheduler = new_scheduler(scheduler_class, settings, seats=running, tokens=8192, blocks=40_000)
    driver = Driver(scheduler)
    rng = np.random.default_rng(0)
    for i in range(running):
        prompt = rng.integers(3, 250, _PROMPT_TOKENS).tolist()
        scheduler.add_request(new_request(str(i), prompt, MAX_MODEL_LEN - _PROMPT_TOKENS, i % 2))
    while any(len(driver.made.get(str(i), [])) < 2 for i in range(running)):
        driver.step()
    return driver


def costs(repeats: int) -> Iterator[Row]:
    """Seconds per step in `schedule` and in `update_from_output`; medians, taken in turns, so that whatever else the
    machine does hits both alike. The promise is so wide that nobody pauses.
    """
    wide = {"ttft_s": 1e6, "tpot_s": 1e6}
    for running in RUNNING:
        drivers = {"vllm": _decoding(AsyncScheduler, {}, running)}
        for policy in (PRETRAINED, "qoserve"):
            drivers[policy] = _decoding(Scheduler, {"policy": policy, **wide}, running)
        for driver in drivers.values():
            driver.schedule_s, driver.update_s = [], []
        gc.collect()
        gc.disable()
        for _ in range(repeats):
            for driver in drivers.values():
                for _ in range(10):
                    driver.step()
        gc.enable()
        alone_s = 0.0
        for name, driver in drivers.items():
            schedule_s, update_s = float(np.median(driver.schedule_s)), float(np.median(driver.update_s))
            yield Row(f"{name}_schedule_{running}_s", schedule_s, "s")
            yield Row(f"{name}_update_{running}_s", update_s, "s")
            alone_s = alone_s or schedule_s + update_s
            if name != "vllm":
                yield Row(f"{name}_added_{running}_s", schedule_s + update_s - alone_s, "s")
                yield Row(f"{name}_ratio_{running}", (schedule_s + update_s) / alone_s, "of vLLM's own time")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the bench."""
    parser = argparse.ArgumentParser(description="What the plug-in costs vLLM's scheduler.")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_vllm.json"))
    options = parser.parse_args(arguments)
    report(costs(10 if options.quick else 80), options.output)


if __name__ == "__main__":
    main()
