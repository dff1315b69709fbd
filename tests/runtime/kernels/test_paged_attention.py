"""Paged attention against scaled_dot_product_attention in fp64, sequence by sequence on contiguous keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paged import DEVICE, DTYPES, Paged, assert_near, needs_gpu

from flexirl.errors import UserError
from flexirl.runtime.kernels import paged_attention, plan_attention
from flexirl.runtime.kernels.paged_attention import paged_attention_reference, paged_attention_triton

# (query tokens, context): decodes and chunks, first chunks and later ones, at the edges of blocks and of KV tiles.
MIXED = [(1, 1), (5, 5), (1, 16), (1, 17), (33, 48), (1, 300), (21, 290), (2, 64), (1, 129)]
DECODES = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 127), (1, 128), (1, 129), (1, 600), (1, 255), (1, 257)]
CHUNKS = [(16, 16), (7, 7), (130, 300), (64, 128), (65, 65)]
BATCHES = {"mixed": MIXED, "decodes": DECODES, "chunks": CHUNKS, "one decode": [(1, 1)], "one chunk": [(3, 3)]}
SLOTS = 64.0  # programs at once: enough of them that contexts of 300 are split
GROUPS = [1, 4, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_triton_heads(head_dim: int, group: int, dtype: torch.dtype) -> None:
    paged = Paged(MIXED, heads=group * 2, kv_heads=2, head_dim=head_dim, dtype=dtype)
    batch = paged.plan(SLOTS)
    assert batch.work is not None and len(batch.work.merges) > 0, "nothing was split"
    output = paged_attention_triton(paged.query, paged.key_cache, paged.value_cache, batch, paged.scale)
    assert output.dtype == dtype
    assert_near(output, paged.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("name", BATCHES)
def test_triton_batches(name: str, block_size: int, dtype: torch.dtype) -> None:
    paged = Paged(BATCHES[name], block_size=block_size, dtype=dtype)
    output = paged_attention_triton(paged.query, paged.key_cache, paged.value_cache, paged.plan(SLOTS), paged.scale)
    assert_near(output, paged.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window, softcap", [(1, None), (5, None), (70, 2.0), (1000, None), (None, 2.0)])
def test_triton_window_and_softcap(sliding_window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    paged = Paged(MIXED, dtype=dtype)
    output = paged_attention_triton(
        paged.query, paged.key_cache, paged.value_cache, paged.plan(SLOTS), paged.scale, sliding_window, softcap
    )
    assert_near(output, paged.expected(sliding_window, softcap), dtype)


def test_triton_splits_change_nothing_but_rounding() -> None:
    paged = Paged([(1, 2700), (9, 400)], heads=4, kv_heads=1)
    whole, split = paged.plan(1e-9), paged.plan(1000.0)
    assert whole.work is not None and split.work is not None
    assert len(whole.work.merges) == 0 and split.work.merges[:, 3].max() > 8
    results = [
        paged_attention_triton(paged.query, paged.key_cache, paged.value_cache, batch, paged.scale)
        for batch in (whole, split)
    ]
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_triton_takes_strided_queries() -> None:
    paged = Paged(MIXED)
    strided = torch.empty(paged.heads, len(paged.query), 64, device=DEVICE).transpose(0, 1)
    strided.copy_(paged.query)
    output = paged_attention_triton(strided, paged.key_cache, paged.value_cache, paged.plan(SLOTS), paged.scale)
    assert_near(output, paged.expected(), torch.float32)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("sliding_window, softcap", [(None, None), (1, None), (70, None), (None, 2.0), (70, 2.0)])
def test_reference(name: str, group: int, sliding_window: int | None, softcap: float | None) -> None:
    paged = Paged(BATCHES[name], heads=group * 2, kv_heads=2, head_dim=80, device="cpu")
    output = paged_attention_reference(
        paged.query, paged.key_cache, paged.value_cache, paged.plan(), paged.scale, sliding_window, softcap
    )
    assert_near(output, paged.expected(sliding_window, softcap), torch.float32)


def test_reference_groups_take_every_token_once() -> None:
    rng = np.random.default_rng(0)
    contexts = np.concatenate([rng.integers(1, 3000, 100), [9000, 40]])
    paged = Paged([(1, context) for context in contexts] + [(30, 50)], heads=1, kv_heads=1, head_dim=8, device="cpu")
    groups = paged.plan().groups
    assert len(groups) < 60
    assert torch.cat([group.tokens for group in groups]).sort().values.tolist() == list(range(len(paged.query)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_function_picks_by_device(dtype: torch.dtype) -> None:
    paged = Paged(MIXED, dtype=dtype)
    output = paged_attention(paged.query, paged.key_cache, paged.value_cache, paged.plan(), paged.scale)
    assert_near(output, paged.expected(), dtype)


def test_a_batch_planned_for_the_cpu_is_refused() -> None:
    paged = Paged(MIXED, device="cpu")
    with pytest.raises(UserError, match="planned for cpu"):
        paged_attention_triton(paged.query, paged.key_cache, paged.value_cache, paged.plan(), paged.scale)


@needs_gpu
def test_captured_graph_serves_other_decodes() -> None:
    plans = []
    for seed, contexts in enumerate([[900, 20, 300, 1], [5, 1000, 1, 77], [64, 65, 1024, 1023]]):
        paged = Paged([(1, context) for context in contexts], heads=8, kv_heads=2, dtype=torch.bfloat16, seed=seed)
        table = np.zeros((4, 64 + 2), np.int32)
        table[:, : paged.table.shape[1]] = paged.table
        batch = plan_attention(
            paged.query_lens, paged.context_lens, table, "cuda",
            num_heads=8, num_kv_heads=2, block_size=16, graph_context=1024,
        )  # fmt: skip
        plans.append((paged, batch))
    cache_blocks = max(len(paged.key_cache) for paged, _ in plans)
    query = torch.empty_like(plans[0][0].query)
    caches = query.new_zeros(2, cache_blocks, *plans[0][0].key_cache.shape[1:])
    batch = plan_attention(
        np.ones(4), np.ones(4), np.zeros((4, 66)), "cuda",
        num_heads=8, num_kv_heads=2, block_size=16, graph_context=1024,
    )  # fmt: skip
    paged_attention(query, caches[0], caches[1], batch, plans[0][0].scale)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = paged_attention(query, caches[0], caches[1], batch, plans[0][0].scale)
    for paged, fresh in plans:
        query.copy_(paged.query)
        caches[0, : len(paged.key_cache)] = paged.key_cache
        caches[1, : len(paged.value_cache)] = paged.value_cache
        batch.copy_(fresh)
        graph.replay()
        assert_near(output, paged.expected(), torch.bfloat16)
