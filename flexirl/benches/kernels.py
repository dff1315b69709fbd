"""Program: how fast the kernels are on a GPU, as a table and as JSON: `python -m flexirl.bench kernels [--quick]`.

Attention has the shape of Llama-3.1-8B in bf16. Every time is the device's own: the median of replays of a CUDA graph,
so that nobody waits for Python. `--tune` measures ways to compile the attention kernel instead (`kernels/launch.py`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flexirl.benches.figures import Row, report
from flexirl.runtime.kernels import AttentionBatch, plan_attention, swap
from flexirl.runtime.kernels.kv_write import write_kv_triton
from flexirl.runtime.kernels.launch import DECODES, WITH_CHUNKS, Launch, programs_at_once
from flexirl.runtime.kernels.paged_attention import paged_attention_reference, paged_attention_triton
from flexirl.runtime.kernels.rms_norm import rms_norm_reference, rms_norm_triton
from flexirl.runtime.kernels.rotary import rotary_write_kv_triton, rotate
from flexirl.runtime.kernels.silu_mul import silu_mul_reference, silu_mul_triton
from flexirl.runtime.kernels.work_list import plan_work

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, BLOCK_SIZE = 32, 8, 128, 4096, 14336, 16
SCALE = HEAD_DIM**-0.5
RAGGED = "ragged"  # contexts drawn evenly from 1k to 32k
# Decodes and the context of each; tokens of the chunk beside them, and its context.
DECODE_CASES: list[tuple[int, int | str]] = [
    (64, 1024),
    (256, 1024),
    (64, 8192),
    (128, RAGGED),
    (16, 32768),
    (1, 32768),
]
MIXED_CASES: list[tuple[int, int | str, int, int]] = [
    (64, 1024, 512, 512),
    (64, 1024, 2048, 2048),
    (64, 4096, 2048, 8192),
    (256, 1024, 2048, 16384),
    (128, 8192, 512, 8192),
    (128, RAGGED, 2048, 8192),
    (64, 32768, 2048, 2048),
]
FLEX_CASES = MIXED_CASES[1:4]  # compiling it takes long
TUNE_DECODES, TUNE_MIXED = DECODE_CASES[2], MIXED_CASES[2]


def measure(call: Callable[[], object], seconds: float = 0.1, replays: int = 7) -> float:
    """Median seconds of one `call` on the device, from replays of a CUDA graph that holds about `seconds` of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator
            call()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        stream.synchronize()
        calls = max(1, min(200, int(1e3 * seconds / max(began.elapsed_time(ended), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        times_ms = []
        for _ in range(replays + 1):
            began.record()
            graph.replay()
            ended.record()
            stream.synchronize()
            times_ms.append(began.elapsed_time(ended))
    return float(np.median(times_ms[1:])) / calls / 1e3


class Case:
    """A batch of decodes, and a prefill chunk if there is one, over a cache of random blocks in random order."""

    def __init__(self, decodes: int, context: int | str, chunk: int = 0, chunk_context: int = 0) -> None:
        rng = np.random.default_rng(0)
        contexts = rng.integers(1024, 32769, decodes) if context == RAGGED else np.full(decodes, context)
        self.chunk = chunk
        self.query_lens = np.ones(decodes, np.int64)
        self.context_lens = contexts.astype(np.int64)
        if chunk:
            self.query_lens = np.append(self.query_lens, chunk)
            self.context_lens = np.append(self.context_lens, chunk_context)
        blocks = -(-self.context_lens // BLOCK_SIZE)
        order = rng.permutation(blocks.sum()).astype(np.int32)
        self.table = np.zeros((len(blocks), blocks.max()), np.int32)
        for row, part in zip(self.table, np.split(order, np.cumsum(blocks)[:-1]), strict=True):
            row[: len(part)] = part
        shape = (len(order), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.key_cache, self.value_cache = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.query = torch.randn(int(self.query_lens.sum()), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.label = f"{decodes}x{context}" + (f"_chunk{chunk}of{chunk_context}" if chunk else "")

    def plan(self, rows: slice = slice(None)) -> AttentionBatch:
        """The plan of some of the sequences."""
        return plan_attention(
            self.query_lens[rows], self.context_lens[rows], self.table[rows], "cuda",
            num_heads=HEADS, num_kv_heads=KV_HEADS, block_size=BLOCK_SIZE,
        )  # fmt: skip

    def attend(self, batch: AttentionBatch, query: Tensor, launch: Launch | None = None) -> Tensor:
        """Our attention."""
        return paged_attention_triton(query, self.key_cache, self.value_cache, batch, SCALE, launch=launch)

    @property
    def decode_bytes(self) -> int:
        """Bytes of keys and values that the decodes read."""
        return int(self.context_lens[self.query_lens == 1].sum()) * 2 * KV_HEADS * HEAD_DIM * 2

    def contiguous(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values (n, kv heads, longest context, head_dim) of some sequences, as other attentions want them."""
        table = torch.from_numpy(self.table[rows, : -(-self.context_lens[rows].max() // BLOCK_SIZE)]).cuda().long()
        return tuple(  # type: ignore[return-value]
            cache[table].flatten(1, 2).transpose(1, 2).contiguous() for cache in (self.key_cache, self.value_cache)
        )


def check() -> None:
    """Raises if attention on this device is wrong: no time is worth anything then."""
    case = Case(decodes=40, context=700, chunk=300, chunk_context=900)
    output = case.attend(case.plan(), case.query)
    query, keys, values = (tensor.float() for tensor in (case.query, case.key_cache, case.value_cache))
    expected = paged_attention_reference(query, keys, values, case.plan(), SCALE)
    error = float((output.float() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise RuntimeError(f"paged attention is wrong on this device: relative error {error}")


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 4 GiB on the device, read and written."""
    source = torch.randint(0, 255, (4 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source))


def decode_attention(quick: bool, bandwidth: float) -> Iterator[Row]:
    """Batches of decodes: seconds, and bytes of keys and values per second as a share of the copy bandwidth."""
    for decodes, context in DECODE_CASES[:1] if quick else DECODE_CASES:
        case = Case(decodes, context)
        seconds = measure(attend_calls(case))
        yield Row(f"decode_{case.label}_s", seconds, "s")
        yield Row(f"decode_{case.label}_share_of_copy", case.decode_bytes / seconds / bandwidth, "share")


def mixed_attention(quick: bool) -> Iterator[Row]:
    """One launch for a chunk and decodes, against other ways to do the same; above 1: ours is faster.

    two_launches: our kernel for the chunk, then for the decodes, each planned for itself. flex, sdpa: FlexAttention and
    scaled_dot_product_attention on contiguous keys and values, chunk and decodes in a call each, since neither can
    express both in one; sdpa only where all decodes have the same context, which its fast path needs.
    """
    for shape in MIXED_CASES[:1] if quick else MIXED_CASES:
        case = Case(*shape)
        ours = measure(attend_calls(case))
        yield Row(f"mixed_{case.label}_s", ours, "s")
        others = {"two_launches": two_launches}
        if shape[1] != RAGGED:
            others["sdpa"] = sdpa_calls
        if shape in FLEX_CASES:
            others["flex"] = flex_calls
        for name, prepare in others.items():
            seconds = attempt(f"{name}, {case.label}", prepare, case)
            if seconds is not None:
                yield Row(f"mixed_{case.label}_{name}_s", seconds, "s")
                yield Row(f"mixed_{case.label}_speedup_over_{name}", seconds / ours, "times")


def attempt(name: str, prepare: Callable[[Case], Callable[[], object]], case: Case) -> float | None:
    """Seconds of what `prepare` returns; None, with the reason printed, where it cannot run."""
    try:
        return measure(prepare(case))
    except Exception as error:  # whatever a compiler or a library raises must not end an unattended run
        reason = str(error).strip().partition("\n")[0]
        print(f"not measured: {name}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        return None


def attend_calls(case: Case, launch: Launch | None = None) -> Callable[[], object]:
    """Our attention of the whole batch in one launch."""
    batch = case.plan()
    if launch is not None:
        slots = programs_at_once(case.query.device, launch) / KV_HEADS
        work = plan_work(case.query_lens, case.context_lens, HEADS // KV_HEADS, slots)
        batch = replace(batch, work=replace(work, items=work.items.cuda(), merges=work.merges.cuda()))
    return lambda: case.attend(batch, case.query, launch)


def two_launches(case: Case) -> Callable[[], object]:
    """The chunk's attention, then the decodes'."""
    decodes = slice(0, len(case.query_lens) - 1)
    decode_batch, chunk_batch = case.plan(decodes), case.plan(slice(decodes.stop, None))
    queries = case.query.split([decodes.stop, case.chunk])
    return lambda: (case.attend(chunk_batch, queries[1]), case.attend(decode_batch, queries[0]))


def sdpa_calls(case: Case) -> Callable[[], object]:
    """The chunk's and the decodes' attention by scaled_dot_product_attention."""
    decodes = len(case.query_lens) - 1
    keys, values = case.contiguous(slice(0, decodes))
    chunk_keys, chunk_values = case.contiguous(slice(decodes, None))
    query, chunk_query = case.query[:decodes, :, None], case.query[None, decodes:].transpose(1, 2)
    bias: Any = causal_lower_right(case.chunk, chunk_keys.shape[2])
    return lambda: (
        F.scaled_dot_product_attention(chunk_query, chunk_keys, chunk_values, bias, scale=SCALE, enable_gqa=True),
        F.scaled_dot_product_attention(query, keys, values, scale=SCALE, enable_gqa=True),
    )


def flex_calls(case: Case) -> Callable[[], object]:
    """The chunk's and the decodes' attention by compiled FlexAttention."""
    torch.compiler.reset()  # past a few shapes it would silently stop to compile
    attention = torch.compile(flex_attention, dynamic=False)
    decodes = len(case.query_lens) - 1
    keys, values = case.contiguous(slice(0, decodes))
    chunk_keys, chunk_values = case.contiguous(slice(decodes, None))
    query, chunk_query = case.query[:decodes, :, None], case.query[None, decodes:].transpose(1, 2)
    contexts = torch.from_numpy(case.context_lens).cuda()
    ahead = int(case.context_lens[-1]) - case.chunk
    masks = [
        create_block_mask(lambda b, h, q, kv: kv <= q + ahead, 1, None, case.chunk, chunk_keys.shape[2], "cuda"),
        create_block_mask(lambda b, h, q, kv: kv < contexts[b], decodes, None, 1, keys.shape[2], "cuda"),
    ]
    return lambda: (
        attention(chunk_query, chunk_keys, chunk_values, block_mask=masks[0], scale=SCALE, enable_gqa=True),
        attention(query, keys, values, block_mask=masks[1], scale=SCALE, enable_gqa=True),
    )


def other_kernels(quick: bool) -> Iterator[Row]:
    """The other kernels on a batch of decodes and on a large chunk; above 1: faster than eager PyTorch."""
    for tokens in (128,) if quick else (128, 8192):
        for name, (ours, eager) in pointwise(tokens).items():
            seconds = measure(ours)
            yield Row(f"{name}_{tokens}_tokens_s", seconds, "s")
            yield Row(f"{name}_{tokens}_tokens_speedup_over_eager", measure(eager) / seconds, "times")
    layers, blocks = 32, 128 if quick else 512
    cache = torch.randn(2 * layers, 2048, BLOCK_SIZE, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    block_ids = torch.randperm(2048, device="cuda")[:blocks]
    buffer = cache.new_empty(blocks, *cache.shape[:1], *cache.shape[2:])
    moved = 2 * buffer.numel() * buffer.element_size()
    for name, kernel in (
        ("gather_blocks", lambda: swap.gather_blocks(cache, block_ids, buffer)),
        ("scatter_blocks", lambda: swap.scatter_blocks(buffer, cache, block_ids)),
        ("gather_blocks_eager", lambda: swap.gather_blocks_reference(cache, block_ids, buffer)),
        ("scatter_blocks_eager", lambda: swap.scatter_blocks_reference(buffer, cache, block_ids)),
    ):
        yield Row(f"{name}_bytes_per_s", moved / measure(kernel), "bytes/s")


def pointwise(tokens: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """By name: our kernel, and the same in eager PyTorch."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    hidden, weight = draw(tokens, HIDDEN), draw(HIDDEN)
    gate, up = draw(tokens, INTERMEDIATE), draw(tokens, INTERMEDIATE)
    query, cos, sin = draw(tokens, HEADS, HEAD_DIM), draw(tokens, HEAD_DIM), draw(tokens, HEAD_DIM)
    key, value = draw(tokens, KV_HEADS, HEAD_DIM), draw(tokens, KV_HEADS, HEAD_DIM)
    blocks = tokens // BLOCK_SIZE + 1000
    caches = draw(2, blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    slots = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:tokens]

    def write(key: Tensor) -> None:
        # The reference first asks which slots are negative, and waits for the answer.
        caches[0].flatten(0, 1)[slots] = key
        caches[1].flatten(0, 1)[slots] = value

    def rotate_and_write() -> None:
        rotate(query, cos, sin)
        write(rotate(key, cos, sin))

    return {
        "rms_norm": (lambda: rms_norm_triton(hidden, weight, 1e-5), lambda: rms_norm_reference(hidden, weight, 1e-5)),
        "silu_mul": (lambda: silu_mul_triton(gate, up), lambda: silu_mul_reference(gate, up)),
        "write_kv": (lambda: write_kv_triton(key, value, caches[0], caches[1], slots), lambda: write(key)),
        "rotary_write_kv": (
            lambda: rotary_write_kv_triton(query, key, value, cos, sin, caches[0], caches[1], slots),
            rotate_and_write,
        ),
    }


def planning() -> Iterator[Row]:
    """Seconds of the processor for one iteration's plan: 128 decodes and a chunk, their table copied to the device."""
    case = Case(128, 4096, 2048, 8192)
    seconds = []
    for _ in range(100):
        began = time.perf_counter()
        case.plan()
        seconds.append(time.perf_counter() - began)
    yield Row("plan_attention_s", float(np.median(seconds)), "s")


def run(quick: bool) -> Iterator[Row]:
    """All measurements, one after the other; quick: one case of each."""
    check()
    bandwidth = copy_bandwidth()
    yield Row("copy_bytes_per_s", bandwidth, "bytes/s")
    yield from planning()
    yield from decode_attention(quick, bandwidth)
    yield from mixed_attention(quick)
    yield from other_kernels(quick)


def tune() -> Iterator[Row]:
    """Attention compiled in other ways: those in use first, then what lies around them."""
    decodes = [
        DECODES._replace(warps=warps, short_bytes=tile, stages=stages, programs=programs)
        for warps, tile, (stages, programs) in product((4, 8), (16384, 8192, 32768), ((3, 3), (3, 2), (4, 2), (2, 4)))
    ]
    mixed = [
        WITH_CHUNKS._replace(long_bytes=tile, stages=stages, programs=programs, max_registers=registers)
        for tile, stages, (programs, registers) in product((8192, 16384), (3, 2), ((2, 128), (1, None)))
    ]
    for case, launches in ((Case(*TUNE_DECODES), decodes), (Case(*TUNE_MIXED), mixed)):
        for launch in launches:
            name = f"tune_{case.label}_" + "_".join(str(field) for field in launch)
            seconds = attempt(name, partial(attend_calls, launch=launch), case)
            if seconds is not None:
                yield Row(name, seconds, "s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes the figures; exits with 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m flexirl.bench kernels", description="Measures how fast the kernels are on a GPU."
    )
    parser.add_argument("--quick", action="store_true", help="one case of each measurement")
    parser.add_argument("--tune", action="store_true", help="ways to compile the attention kernel instead")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/bench_kernels.json"), help="where the figures are written"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "error: The kernels' bench needs a CUDA device, and PyTorch finds none here.\n")
    report(tune() if options.tune else run(options.quick), options.output)
