"""Compiles the kernels for Hopper in bf16, which needs no GPU, and prints what the compiler reports, as JSON by kernel.

`python tests/runtime/kernels/hopper.py` gave the table in docs/kernels.md. registers and spilled_bytes are per thread,
shared_bytes per program; programs: how many fit on a multiprocessor; tensor_cores, async_copies: instructions of that
kind. The kernels have Llama-3.1-8B's shape.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexirl.runtime.kernels.kv_write import _write_kv_kernel
from flexirl.runtime.kernels.launch import DECODES, WITH_CHUNKS, Launch
from flexirl.runtime.kernels.paged_attention import _attention_kernel, _kv_tile, _merge_kernel
from flexirl.runtime.kernels.rms_norm import _rms_norm_kernel
from flexirl.runtime.kernels.rotary import _rotary_write_kv_kernel
from flexirl.runtime.kernels.silu_mul import _silu_mul_kernel
from flexirl.runtime.kernels.swap import _copy_kernel

THREADS, REGISTERS, SHARED_BYTES = 2048, 65536, 227 * 1024  # of a multiprocessor
RESERVED_BYTES = 1024  # shared bytes of every program that are not its own
# Arguments that are not pointers to bf16; integers that are multiples of 16 in any model are marked so.
TYPES = {
    **dict.fromkeys(("items_ptr", "table_ptr", "merges_ptr"), "*i32"),
    **dict.fromkeys(("slots_ptr", "block_ids_ptr"), "*i64"),
    **dict.fromkeys(("partial_ptr", "log_sum_ptr"), "*fp32"),
    **dict.fromkeys(("log2_scale", "scale_over_cap", "eps"), "fp32"),
    **dict.fromkeys(("table_stride", "window", "num_heads", "rows", "elements", "planes", "num_blocks"), "i32"),
    **dict.fromkeys(("query_token_stride", "query_head_stride", "kv_stride"), "i32"),
    **dict.fromkeys(("query_stride", "key_stride", "value_stride"), "i32"),
}
UNALIGNED = {"table_stride", "window", "rows", "elements", "planes", "num_blocks"}


def attention(launch: Launch, long: bool) -> dict[str, Any]:
    """The attention kernel's constants; long: both kinds of items, else short ones alone."""
    return {
        "GROUP": 4, "BLOCK_SIZE": 16, "HEAD_DIM": 128, "HEAD_TILE": 128, "SHORT_ROWS": 16, "LONG_ROWS": 128,
        "SHORT_KV": _kv_tile(launch.short_bytes, 256), "LONG_KV": _kv_tile(launch.long_bytes, 256),
        "STAGES": launch.stages, "SHORT": True, "LONG": long, "WINDOWED": False, "SOFTCAPPED": False,
    }  # fmt: skip


KERNELS: dict[str, tuple[Any, int, int | None, dict[str, Any]]] = {
    "attention_decodes": (_attention_kernel, DECODES.warps, DECODES.max_registers, attention(DECODES, False)),
    "attention_mixed": (
        _attention_kernel,
        WITH_CHUNKS.warps,
        WITH_CHUNKS.max_registers,
        attention(WITH_CHUNKS, True),
    ),
    "merge": (_merge_kernel, 4, None, {"HEAD_DIM": 128, "HEAD_TILE": 128, "HEADS": 4, "SPLITS": 8}),
    "write_kv": (_write_kv_kernel, 4, None, {"WIDTH": 1024, "TILE": 1024}),
    "rotary_write_kv": (
        _rotary_write_kv_kernel,
        4,
        None,
        {"HEADS": 32, "HEADS_TILE": 32, "KV_HEADS": 8, "KV_HEADS_TILE": 8, "HALF": 64, "HALF_TILE": 64},
    ),
    "rms_norm": (_rms_norm_kernel, 4, None, {"WIDTH": 4096, "TILE": 4096, "ROWS": 1}),
    "silu_mul": (_silu_mul_kernel, 4, None, {"TILE": 2048}),
    "gather_blocks": (_copy_kernel, 4, None, {"ELEMENTS": 16384, "TILE": 4096, "GATHER": True}),
}


def compile_for_hopper(kernel: Any, warps: int, max_registers: int | None, constants: dict[str, Any]) -> dict[str, int]:
    """What the compiler reports of one kernel."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*bf16") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants and name not in UNALIGNED]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "fp32"},
    )
    options = {"num_warps": warps, "maxnreg": max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, shared = int(found[1]), compiled.metadata.shared
    threads = 32 * warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return {
        "registers": registers,
        "spilled_bytes": int(found[2]),
        "shared_bytes": shared,
        "programs": min(THREADS // threads, by_registers, SHARED_BYTES // (shared + RESERVED_BYTES)),
        "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    print(json.dumps({name: compile_for_hopper(*arguments) for name, arguments in KERNELS.items()}, indent=1))
