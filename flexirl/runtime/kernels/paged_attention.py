"""Paged attention over one flattened batch of mixed prefill chunks and decodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexirl.runtime.kernels.batch import AttentionBatch


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of every token to its sequence's cache, which already holds this batch's keys and values.

    query: (T, num_heads, head_dim); key_cache, value_cache: (num_blocks, block_size, num_kv_heads, head_dim),
    contiguous, num_heads a multiple of num_kv_heads; scale: factor on query-key products. A token at position p sees
    positions up to p, and with a sliding window only those above p - sliding_window (as Mistral's in Transformers).
    softcap: scores s become softcap * tanh(s / softcap) (as Gemma 2's). Returns (T, num_heads, head_dim).
    """
    return paged_attention_reference(query, key_cache, value_cache, batch, scale, sliding_window, softcap)


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`paged_attention` in PyTorch: one gather and one attention call per group of sequences."""
    num_kv_heads, head_dim = key_cache.shape[2:]
    output = torch.empty_like(query)
    for group in batch.groups:
        sequences, query_len = group.positions.shape
        shape = (sequences, group.padded_len, num_kv_heads, head_dim)
        keys, values = (
            cache.index_select(0, group.blocks).flatten(0, 1).index_fill_(0, group.stale, 0).view(shape).transpose(1, 2)
            for cache in (key_cache, value_cache)
        )
        # A decode's query heads of one KV head become rows, so that they share its keys.
        rows = (sequences, num_kv_heads, -1, head_dim) if query_len == 1 else (sequences, query_len, -1, head_dim)
        queries = query[group.tokens].view(rows)
        if query_len > 1:
            queries = queries.transpose(1, 2)
        mask = None if group.causal_from_zero and sliding_window is None else group.mask(sliding_window)
        if softcap is None:
            attended = F.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        else:
            attended = _softcapped_attention(queries, keys, values, group.mask(sliding_window), scale, softcap)
        if query_len > 1:
            attended = attended.transpose(1, 2)
        output[group.tokens] = attended.reshape(len(group.tokens), *query.shape[1:])
    return output


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """(n, heads, rows, head_dim) as in `scaled_dot_product_attention`, which has no softcap."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * (scale / softcap))
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.float()).to(query.dtype)
