"""How the paged attention kernel is compiled for a kind of batch, and how many of its programs run at once."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """short_bytes, long_bytes: of the key tiles of short and of long items; stages: tiles on their way or in use;
    programs: how many a multiprocessor is meant to hold at once; max_registers: per thread, where that needs a limit.
    """

    warps: int
    short_bytes: int
    long_bytes: int
    stages: int
    programs: int
    max_registers: int | None = None


# Chosen from what the compiler reports for Hopper (docs/kernels.md): no registers spilled, several programs to a
# multiprocessor, and in flight between them several times what the memory's latency asks for.
DECODES = Launch(warps=4, short_bytes=16384, long_bytes=8192, stages=3, programs=3)
WITH_CHUNKS = Launch(warps=8, short_bytes=16384, long_bytes=8192, stages=3, programs=2, max_registers=128)


def choose_launch(long: bool) -> Launch:
    """The launch for a batch with or without long items."""
    return WITH_CHUNKS if long else DECODES


def programs_at_once(device: torch.device, launch: Launch) -> int:
    """Programs that the whole device holds at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count * launch.programs
