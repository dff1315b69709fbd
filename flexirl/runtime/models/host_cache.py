"""Host memory behind the paged cache: where keys and values go when a request is preempted by swap, or ahead of that.

So do single blocks that the prefix cache gives up: their places in the host tier are the scheduler's business.

Copying the blocks of a deferred request as they fill leaves little to copy when it is preempted: the incremental
checkpointing of ConServe (Qiao et al., arXiv 2410.01228). The scheduler counts the host blocks of swapped requests
only, so checkpoints take what is left and give way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.kernels import gather_blocks, scatter_blocks
from flexirl.runtime.live.executor import Moves

_STAGED = 32  # blocks that pass through device memory at once on their way


class HostCache:
    """`blocks` blocks of host memory for the blocks of `cache`, (planes, num_blocks, block_size, kv_heads, dim).

    tier_blocks: further ones, the host tier.

    On a GPU it is pinned, and copies run on a stream of their own: the blocks are first gathered on the device, in
    order with what computes there, so that they may be overwritten while the copy to host memory is still under way.
    """

    def __init__(self, cache: Tensor, blocks: int, tier_blocks: int = 0) -> None:
        planes, _, *block = cache.shape
        self._cache = cache
        self._stage = torch.empty((_STAGED, planes, *block), dtype=cache.dtype, device=cache.device)
        self._store = torch.empty((blocks, planes, *block), dtype=cache.dtype, pin_memory=cache.is_cuda)
        self._tier = torch.empty((tier_blocks, planes, *block), dtype=cache.dtype, pin_memory=cache.is_cuda)
        self._stream = torch.cuda.Stream(cache.device) if cache.is_cuda else None
        self._free = list(range(blocks - 1, -1, -1))
        self._held: dict[int, list[int]] = {}  # host blocks of each request's first blocks, in order
        self._swapped: set[int] = set()

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing, not even a checkpoint."""
        return len(self._free)

    def move(self, moves: Moves) -> dict[int, int]:
        """Makes all moves of one iteration; returns of every request concerned how many of its blocks are saved now.

        Requests leave before others come back, since those may be given their device blocks.
        """
        changed: dict[int, int] = {}
        aside: dict[int, Tensor] = {}
        for r, blocks in moves.out.items():
            held = self._held.setdefault(r, [])
            self._free += held[len(blocks) :]
            del held[len(blocks) :]
            while len(self._free) < len(blocks) - len(held):
                changed[self._make_room(r, moves.back, aside)] = 0
            self._save(r, blocks[len(held) :])
            self._swapped.add(r)
            changed[r] = len(blocks)
        self._move_single(moves.copies)
        for r, blocks in moves.back.items():
            if r in aside:
                self._copy_in(blocks, aside[r], range(len(blocks)))
            else:
                self._copy_in(blocks, self._store, self._held.get(r, []))
            self._swapped.discard(r)
            held = self._held.get(r, [])
            self._free += held[moves.kept[r] :]
            del held[moves.kept[r] :]
            changed[r] = len(held)
        for r, blocks in moves.save.items():
            if r not in changed:  # or else its checkpoint was just taken
                self._save(r, blocks[: len(self._free)])
                changed[r] = len(self._held[r])
        return changed

    def _make_room(self, r: int, returning: Iterable[int], aside: dict[int, Tensor]) -> int:
        """Takes the blocks of the newest checkpoint but r's, or else of a request about to come back; returns whose.

        The scheduler counts the latter as free, but what they hold is needed once more: it is put `aside`.
        """
        checkpoints = (other for other in reversed(self._held) if other != r and other not in self._swapped)
        robbed = next(checkpoints, None)
        if robbed is None:
            robbed = next(other for other in returning if other in self._held)
            if self._stream is not None:
                self._stream.synchronize()
            aside[robbed] = self._store[self._held[robbed]]
        self._free += self._held.pop(robbed)
        return robbed

    def forget(self, r: int) -> None:
        """Frees what request r has here."""
        self._free += self._held.pop(r, [])
        self._swapped.discard(r)

    def _move_single(self, copies: np.ndarray) -> None:
        """Makes copies (`COPY`) between device and tier, as many at once as go the same way."""
        turns = np.flatnonzero(np.diff(copies["to_tier"])) + 1
        for some in np.split(copies, turns) if len(copies) else ():
            move = self._copy_out if some["to_tier"][0] else self._copy_in
            move(some["device"].tolist(), self._tier, some["tier"].tolist())

    def _save(self, r: int, device_blocks: Sequence[int]) -> None:
        """Copies further blocks of request r to free ones."""
        hosts = [self._free.pop() for _ in device_blocks]
        self._held.setdefault(r, []).extend(hosts)
        self._copy_out(device_blocks, self._store, hosts)

    def _copy_out(self, device_blocks: Sequence[int], store: Tensor, places: Sequence[int]) -> None:
        """store: (blocks, planes, block_size, kv_heads, dim) in host memory; places: which of its blocks."""
        for first in range(0, len(places), len(self._stage)):
            some = places[first : first + len(self._stage)]
            stage = self._stage[: len(some)]
            self._await_copies()
            gather_blocks(self._cache, self._numbers(device_blocks[first : first + len(some)]), stage)
            with self._copying():
                for at, start, count in _runs(some):
                    store[start : start + count].copy_(stage[at : at + count], non_blocking=True)

    def _copy_in(self, device_blocks: Sequence[int], store: Tensor, places: Sequence[int]) -> None:
        """As `_copy_out`."""
        for first in range(0, len(device_blocks), len(self._stage)):
            some = device_blocks[first : first + len(self._stage)]
            stage = self._stage[: len(some)]
            with self._copying():
                for at, start, count in _runs(places[first : first + len(some)]):
                    stage[at : at + count].copy_(store[start : start + count], non_blocking=True)
            self._await_copies()
            scatter_blocks(stage, self._cache, self._numbers(some))

    def _numbers(self, blocks: Sequence[int]) -> Tensor:
        return torch.as_tensor(np.asarray(blocks, np.int64), device=self._cache.device)

    def _copying(self) -> AbstractContextManager[Any]:
        """Runs copies on their own stream, after what has been launched so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _await_copies(self) -> None:
        """Lets the device go on only when the copies launched so far are done: the stage is free, or filled."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive numbers: (where in `numbers`, first number, length)."""
    at = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield at, numbers[at], end - at
            at = end
