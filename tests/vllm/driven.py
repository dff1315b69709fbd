"""A vLLM scheduler without a device, as in the bench, with a model for the tests that need one, and what must hold."""

from __future__ import annotations

import tempfile
from functools import cache

import torch
from transformers import LlamaForCausalLM
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from flexirl.benches.vllm import BLOCK_SIZE, Driver, llama_config, new_request, new_scheduler

__all__ = ["BLOCK_SIZE", "Driver", "check", "check_empty", "new_request", "new_scheduler", "tiny_llama"]


@cache
def tiny_llama() -> str:
    """The folder of a Llama of two layers with random weights, the same ones every time."""
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    return folder


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
