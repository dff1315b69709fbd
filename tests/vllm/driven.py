"""A vLLM scheduler without a device: model outputs are made up, two steps may be on their way at once, as in vLLM."""

from __future__ import annotations

import tempfile
from collections import deque
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE = 16


@cache
def tiny_llama() -> str:
    """The folder of a Llama of two layers with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    LlamaForCausalLM(config).save_pretrained(folder)
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
    """A scheduler with a cache of so many blocks of 16 tokens; settings: the plug-in's."""
    model = ModelConfig(model=tiny_llama(), skip_tokenizer_init=True, dtype="float32", max_model_len=2048)
    config = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_num_seqs=seats, max_num_batched_tokens=tokens, max_model_len=2048, is_encoder_decoder=False,
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
    """Plays the engine around a scheduler: schedules, and hands in outputs a step later.

    made: output tokens by request. depth: steps on their way at once.
    """

    def __init__(self, scheduler: AsyncScheduler, depth: int = 2) -> None:
        self.scheduler = scheduler
        self.made: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.on_their_way: deque[tuple[SchedulerOutput, dict[str, bool]]] = deque()
        self.depth = depth

    def step(self) -> SchedulerOutput:
        """Schedules a step, then hears of the oldest one if as many as can be are on their way."""
        output = self.scheduler.schedule()
        samples = {r: not self.scheduler.requests[r].is_prefill_chunk for r in output.num_scheduled_tokens}
        self.on_their_way.append((output, samples))
        while len(self.on_their_way) >= self.depth or (self.on_their_way and not output.num_scheduled_tokens):
            self.hear()
        return output

    def hear(self) -> None:
        """The oldest step has ended."""
        output, samples = self.on_their_way.popleft()
        ids = list(output.num_scheduled_tokens)
        tokens = [[7 + len(self.made.get(r, [])) % 100] if samples[r] else [] for r in ids]
        result = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=tokens
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.made.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)

    def drain(self, steps: int) -> None:
        """Steps until nothing is left; fails if that takes more than so many."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests() and not self.on_their_way:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.get_num_unfinished_requests()} requests are stuck")


def check(scheduler: AsyncScheduler) -> None:
    """What must hold of vLLM's scheduler between two steps, whoever decides."""
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    assert len(set(running)) == len(running) and len(set(waiting)) == len(waiting)
    assert not set(running) & set(waiting)
    assert len(running) <= scheduler.max_num_running_reqs
    assert all(request.status == RequestStatus.RUNNING for request in running)
    assert set(running) | set(waiting) == set(scheduler.requests.values())
    manager = scheduler.kv_cache_manager
    for request in waiting:
        assert not manager.get_blocks(request.request_id).blocks[0]


def check_empty(scheduler: AsyncScheduler) -> None:
    """No request and no block is left behind."""
    assert not scheduler.requests and not scheduler.running and not len(scheduler.waiting)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
