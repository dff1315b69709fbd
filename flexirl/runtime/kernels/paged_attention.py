"""Paged attention over one flattened batch of mixed prefill chunks and decodes.

The Triton version works off a plan's items (`work_list.py`) in one launch: a program takes one query tile, whose rows
are the query heads of one KV head for some tokens, against one range of the sequence's context. Ranges of one context
leave partial results, which a second kernel merges by their log-sum-exp (Flash-Decoding, Dao et al. 2023). The running
softmax is FlashAttention's (Dao 2023), in base 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexirl.errors import UserError
from flexirl.runtime.kernels.batch import AttentionBatch
from flexirl.runtime.kernels.launch import Launch, choose_launch
from flexirl.runtime.kernels.optional_triton import jit, power_of_two, runs_triton, tl
from flexirl.runtime.kernels.work_list import SPLIT_ALIGN, tile_rows


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
    contiguous, num_heads a multiple of num_kv_heads; scale: factor on query-key products, above 0. A token at position
    p sees positions up to p, and with a sliding window only those above p - sliding_window (as Mistral's in
    Transformers). softcap: scores s become softcap * tanh(s / softcap) (as Gemma 2's). Returns (T, num_heads,
    head_dim).
    """
    attention = paged_attention_triton if runs_triton(query) else paged_attention_reference
    return attention(query, key_cache, value_cache, batch, scale, sliding_window, softcap)


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
        sequences, query_len = group.sequences, len(group.tokens) // group.sequences
        shape = (sequences, group.padded_len, num_kv_heads, head_dim)
        gathered = [buffer[: len(group.blocks)] for buffer in batch.gather_buffers(key_cache)]
        torch.index_select(key_cache, 0, group.blocks, out=gathered[0])
        torch.index_select(value_cache, 0, group.blocks, out=gathered[1])
        keys, values = (
            tensor.flatten(0, 1).index_fill_(0, group.stale, 0).view(shape).transpose(1, 2) for tensor in gathered
        )
        # A decode's query heads of one KV head become rows, so that they share its keys.
        rows = (sequences, num_kv_heads, -1, head_dim) if query_len == 1 else (sequences, query_len, -1, head_dim)
        queries = query[group.tokens].view(rows)
        if query_len > 1:
            queries = queries.transpose(1, 2)
        mask = None if group.is_plain_causal and sliding_window is None else group.mask(sliding_window)
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


def paged_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """`paged_attention` in Triton, for a batch with a work list; `launch`: None for the one that fits the batch.

    Nothing here waits for the device or depends on values there, so it can be captured in a CUDA graph (`batch.py`).
    """
    work = batch.work
    if work is None:
        raise UserError(f"The batch was planned for {batch.block_table.device}; plan it for {query.device}.")
    tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    head_tile = power_of_two(head_dim)
    row_bytes = head_tile * key_cache.element_size()
    if query.stride(2) != 1:
        query = query.contiguous()
    output = query.new_empty(tokens, num_heads, head_dim)
    partial = query.new_empty(work.partial_rows, num_heads, head_dim, dtype=torch.float32)
    log_sums = query.new_empty(work.partial_rows, num_heads, dtype=torch.float32)
    launch = launch or choose_launch(work.long)
    short_rows, long_rows = tile_rows(group)
    _attention_kernel[(num_kv_heads, len(work.items))](
        query, key_cache, value_cache, output, partial, log_sums, work.items, batch.block_table,
        batch.block_table.stride(0), query.stride(0), query.stride(1), num_heads, num_kv_heads * head_dim,
        scale / math.log(2.0), 0 if sliding_window is None else sliding_window,
        0.0 if softcap is None else scale / softcap,
        GROUP=group, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, HEAD_TILE=head_tile,
        SHORT_ROWS=short_rows, LONG_ROWS=long_rows,
        SHORT_KV=_kv_tile(launch.short_bytes, row_bytes), LONG_KV=_kv_tile(launch.long_bytes, row_bytes),
        STAGES=launch.stages, SHORT=work.short, LONG=work.long,
        WINDOWED=sliding_window is not None, SOFTCAPPED=softcap is not None,
        num_warps=launch.warps, maxnreg=launch.max_registers,
    )  # fmt: skip
    if len(work.merges):
        heads = math.gcd(num_heads, 4)
        _merge_kernel[(len(work.merges), num_heads // heads)](
            partial, log_sums, output, work.merges, num_heads,
            HEAD_DIM=head_dim, HEAD_TILE=head_tile, HEADS=heads, SPLITS=8, num_warps=4,
        )  # fmt: skip
    return output


def _kv_tile(tile_bytes: int, row_bytes: int) -> int:
    """Positions of a KV tile: at least what a tensor-core product needs, at most what ranges are aligned to."""
    return min(max(tile_bytes // row_bytes, 16), SPLIT_ALIGN)


@jit(do_not_specialize=["table_stride", "window"])
def _attention_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, partial_ptr, log_sum_ptr, items_ptr, table_ptr,
    table_stride, query_token_stride, query_head_stride, num_heads, kv_stride, log2_scale, window, scale_over_cap,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr,
    SHORT_ROWS: tl.constexpr, LONG_ROWS: tl.constexpr, SHORT_KV: tl.constexpr, LONG_KV: tl.constexpr,
    STAGES: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr,
):  # fmt: skip
    """One item for one KV head; program axes: KV heads, so that neighbours read neighbouring memory, and items."""
    kv_head = tl.program_id(0)
    item_ptr = items_ptr + tl.program_id(1) * 8
    sequence = tl.load(item_ptr)
    first_token = tl.load(item_ptr + 1)
    tokens = tl.load(item_ptr + 2)
    first_position = tl.load(item_ptr + 3)
    kv_begin = tl.load(item_ptr + 4)
    kv_end = tl.load(item_ptr + 5)
    partial_row = tl.load(item_ptr + 6)
    if tokens == 0:
        return
    table_ptr += sequence.to(tl.int64) * table_stride
    # Both kinds stand in one kernel, so that their programs share multiprocessors in one launch.
    if SHORT:
        if tokens * GROUP <= SHORT_ROWS:
            _attend(
                query_ptr, key_ptr, value_ptr, output_ptr, partial_ptr, log_sum_ptr, table_ptr, kv_head, first_token,
                tokens, first_position, kv_begin, kv_end, partial_row, query_token_stride, query_head_stride,
                num_heads, kv_stride, log2_scale, window, scale_over_cap,
                SHORT_ROWS, SHORT_KV, GROUP, BLOCK_SIZE, HEAD_DIM, HEAD_TILE, STAGES, False, WINDOWED, SOFTCAPPED,
            )  # fmt: skip
    if LONG:
        if tokens * GROUP > SHORT_ROWS:
            _attend(
                query_ptr, key_ptr, value_ptr, output_ptr, partial_ptr, log_sum_ptr, table_ptr, kv_head, first_token,
                tokens, first_position, kv_begin, kv_end, partial_row, query_token_stride, query_head_stride,
                num_heads, kv_stride, log2_scale, window, scale_over_cap,
                LONG_ROWS, LONG_KV, GROUP, BLOCK_SIZE, HEAD_DIM, HEAD_TILE, STAGES, not WINDOWED, WINDOWED, SOFTCAPPED,
            )  # fmt: skip


@jit
def _attend(
    query_ptr, key_ptr, value_ptr, output_ptr, partial_ptr, log_sum_ptr, table_ptr, kv_head, first_token,
    tokens, first_position, kv_begin, kv_end, partial_row, query_token_stride, query_head_stride,
    num_heads, kv_stride, log2_scale, window, scale_over_cap,
    ROWS: tl.constexpr, KV_TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr, STAGES: tl.constexpr, UNMASKED: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr,
):  # fmt: skip
    """A query tile against its range; UNMASKED: tiles that every row sees whole are worth a loop of their own."""
    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_TILE)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    is_row = row < tokens * GROUP
    is_element = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    query_offset = (first_token + token).to(tl.int64) * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + query_offset[:, None] + dim[None, :], mask=is_element, other=0.0)
    position = first_position + token
    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM
    if WINDOWED:
        kv_begin = tl.maximum(kv_begin, (first_position - window + 1) // KV_TILE * KV_TILE)

    output = tl.zeros([ROWS, HEAD_TILE], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    masked_begin = kv_begin
    if UNMASKED:
        masked_begin = tl.maximum(kv_begin, tl.minimum(kv_end, first_position + 1) // KV_TILE * KV_TILE)
        output, row_max, row_sum = _attend_range(
            query, output, row_max, row_sum, key_ptr, value_ptr, table_ptr, position, kv_begin, masked_begin,
            kv_stride, log2_scale, window, scale_over_cap,
            KV_TILE, BLOCK_SIZE, HEAD_DIM, HEAD_TILE, STAGES, False, WINDOWED, SOFTCAPPED,
        )  # fmt: skip
    output, row_max, row_sum = _attend_range(
        query, output, row_max, row_sum, key_ptr, value_ptr, table_ptr, position, masked_begin, kv_end,
        kv_stride, log2_scale, window, scale_over_cap,
        KV_TILE, BLOCK_SIZE, HEAD_DIM, HEAD_TILE, STAGES, True, WINDOWED, SOFTCAPPED,
    )  # fmt: skip

    # A row whose window lies outside the range has seen nothing: its partial result is zero with weight zero.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    output /= row_sum[:, None]
    if partial_row < 0:
        out_row = (first_token + token).to(tl.int64) * num_heads + head
        tl.store(output_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], output, mask=is_element)
    else:
        out_row = (partial_row + token).to(tl.int64) * num_heads + head
        tl.store(partial_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], output, mask=is_element)
        tl.store(log_sum_ptr + out_row, row_max + tl.log2(row_sum), mask=is_row)


@jit
def _attend_range(
    query, output, row_max, row_sum, key_ptr, value_ptr, table_ptr, position, begin, end,
    kv_stride, log2_scale, window, scale_over_cap,
    KV_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr,
):  # fmt: skip
    """The running softmax over positions [begin, end); not MASKED: every row sees all of them, in whole tiles."""
    dim = tl.arange(0, HEAD_TILE)
    kv = begin + tl.arange(0, KV_TILE)
    # Blocks are looked up one tile ahead: inside the loop the look-up would take half of the pipeline's stages.
    block = tl.load(table_ptr + kv // BLOCK_SIZE, mask=kv < end, other=0)
    for start in tl.range(begin, end, KV_TILE, num_stages=STAGES):
        kv = start + tl.arange(0, KV_TILE)
        slot = block.to(tl.int64) * BLOCK_SIZE + kv % BLOCK_SIZE
        offset = slot[:, None] * kv_stride + dim[None, :]
        is_loaded = dim[None, :] < HEAD_DIM
        if MASKED:
            is_loaded = is_loaded & (kv < end)[:, None]
        key = tl.load(key_ptr + offset, mask=is_loaded, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if SOFTCAPPED:
            # tanh by exp2; the result is divided by the scale that follows.
            score = 1.0 - 2.0 / (tl.exp2(score * (scale_over_cap * 2.8853900817779268)) + 1.0)
            score /= scale_over_cap
        if MASKED:
            is_seen = kv[None, :] <= position[:, None]
            if WINDOWED:
                is_seen = is_seen & (kv[None, :] > position[:, None] - window)
            score = tl.where(is_seen, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1) * log2_scale)
        shift = new_max
        if MASKED:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(score * log2_scale - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weight, 1)
        row_max = new_max
        value = tl.load(value_ptr + offset, mask=is_loaded, other=0.0)
        output = tl.dot(weight.to(value.dtype), value, output * decay[:, None], input_precision="ieee")
        kv += KV_TILE
        block = tl.load(table_ptr + kv // BLOCK_SIZE, mask=kv < end, other=0)
    return output, row_max, row_sum


@jit
def _merge_kernel(
    partial_ptr, log_sum_ptr, output_ptr, merges_ptr, num_heads,
    HEAD_DIM: tl.constexpr, HEAD_TILE: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One token's partial results, for HEADS of its heads, SPLITS of them at a time; axes: tokens, heads."""
    merge_ptr = merges_ptr + tl.program_id(0) * 4
    token = tl.load(merge_ptr)
    first_row = tl.load(merge_ptr + 1)
    row_stride = tl.load(merge_ptr + 2)
    splits = tl.load(merge_ptr + 3)
    if splits == 0:
        return
    head, dim = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HEAD_TILE)
    output = tl.zeros([HEADS, HEAD_TILE], tl.float32)
    running_max = tl.full([HEADS], float("-inf"), tl.float32)
    running_sum = tl.zeros([HEADS], tl.float32)
    for begin in range(0, splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        row = (first_row + split * row_stride).to(tl.int64)[:, None] * num_heads + head[None, :]
        is_element = (split < splits)[:, None, None] & (dim < HEAD_DIM)[None, None, :]
        log_sum = tl.load(log_sum_ptr + row, mask=(split < splits)[:, None], other=float("-inf"))
        partial = tl.load(partial_ptr + row[:, :, None] * HEAD_DIM + dim[None, None, :], mask=is_element, other=0.0)
        new_max = tl.maximum(running_max, tl.max(log_sum, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(log_sum - shift[None, :])
        decay = tl.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weight, 0)
        output = output * decay[:, None] + tl.sum(weight[:, :, None] * partial, 0)
        running_max = new_max
    out_offset = (token.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(output_ptr + out_offset, output / running_sum[:, None], mask=(dim < HEAD_DIM)[None, :])
