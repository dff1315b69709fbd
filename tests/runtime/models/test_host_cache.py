"""Keys and values come back from host memory as they left, however short of it the engine is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexirl.runtime.live.executor import Moves
from flexirl.runtime.models.host_cache import HostCache


def cache_of(blocks: int, device: str = "cpu") -> Tensor:
    """A cache whose every entry is different: 4 planes, blocks of 2 tokens, 3 heads of size 5."""
    return torch.arange(4 * blocks * 2 * 3 * 5, dtype=torch.float32, device=device).view(4, blocks, 2, 3, 5)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
def test_blocks_come_back_elsewhere(device: str) -> None:
    cache = cache_of(80, device)
    before = cache.clone()
    host = HostCache(cache, 40)
    blocks = list(range(79, 42, -1))  # more than are moved at once
    assert host.move(Moves(out={7: blocks})) == {7: 37} and host.free_blocks == 3
    cache.zero_()
    places = list(range(1, 38))
    assert host.move(Moves(back={7: places}, kept={7: 0})) == {7: 0} and host.free_blocks == 40
    assert torch.equal(cache[:, places], before[:, blocks]) and not cache[:, 38:].any()


def test_what_is_saved_ahead_is_not_copied_again() -> None:
    cache = cache_of(8)
    before = cache.clone()
    host = HostCache(cache, 6)
    assert host.move(Moves(save={1: [0, 1]})) == {1: 2}
    assert host.move(Moves(save={1: [2]})) == {1: 3}
    cache[:, :3] = 0.0  # were they copied again, this would come back
    host.move(Moves(out={1: [0, 1, 2, 3]}))
    cache[:, :4] = 0.0
    assert host.move(Moves(back={1: [4, 5, 6, 7]}, kept={1: 3})) == {1: 3} and host.free_blocks == 3
    assert torch.equal(cache[:, 4:], before[:, :4])
    host.forget(1)
    assert host.free_blocks == 6


def test_checkpoints_give_way_to_swapped_requests() -> None:
    cache = cache_of(8)
    before = cache.clone()
    host = HostCache(cache, 3)
    host.move(Moves(save={1: [0, 1]}))
    # Request 1 loses its checkpoint to 2 in the very iteration that would have saved another of its blocks.
    assert host.move(Moves(out={2: [4, 5]}, save={1: [2]})) == {1: 0, 2: 2} and host.free_blocks == 1
    assert host.move(Moves(save={1: [0, 1, 2]})) == {1: 1}, "more was saved than there is room for"
    cache[:, 4:6] = 0.0
    host.move(Moves(back={2: [6, 7]}, kept={2: 0}))
    assert torch.equal(cache[:, 6:], before[:, 4:6])


def test_leaving_and_coming_back_can_cross() -> None:
    """One request takes the device blocks of another and leaves it its host blocks, of which there are no others."""
    cache = cache_of(6)
    before = cache.clone()
    host = HostCache(cache, 3)
    host.move(Moves(out={1: [0, 1, 2]}))
    assert host.move(Moves(out={2: [3, 4, 5]}, back={1: [3, 4, 5]}, kept={1: 3})) == {2: 3, 1: 0}
    assert torch.equal(cache[:, 3:], before[:, :3])
    host.move(Moves(back={2: [0, 1, 2]}, kept={2: 0}))
    assert torch.equal(cache[:, :3], before[:, 3:]) and host.free_blocks == 3


def test_a_shorter_sequence_lets_go_of_what_was_saved_beyond_it() -> None:
    """A request preempted by recompute had more saved than it has computed when it is swapped out."""
    host = HostCache(cache_of(8), 4)
    host.move(Moves(save={1: [0, 1, 2, 3]}))
    assert host.move(Moves(out={1: [4, 5]})) == {1: 2} and host.free_blocks == 2
