"""The host tier by hand: a conversation whose blocks gave way comes back, in ticks; 8 blocks of 4 tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toys import TICK_S, ToyRun, deferred, immediate, toy_engine, toy_trace

from flexirl.policies.interface.decision import EVERYBODYS, IMMEDIATES, NOBODYS
from flexirl.runtime.scheduler.invariants import check_invariants, tier_blocks
from flexirl.runtime.scheduler.prefix_cache import forget_idle
from flexirl.workloads.trace import CONTENT

COPY_TICKS = 1  # of a block


def play(tier: int, again: bool = False, **decision: float) -> ToyRun:
    """A conversation, a deferred request that needs seven of the eight blocks, the conversation's next turn.

    again: and another such deferred request.
    """
    engine = toy_engine(prefix_caching=1, host_cache_blocks=tier, per_swap_token_s=COPY_TICKS * TICK_S / 4)
    said = {"content_first": 0, "content_count": 1}
    turns = immediate(0, 16, 1, **said), immediate(200 * TICK_S, 20, 1, **said)
    others = (deferred((100 + 200 * i) * TICK_S, 28, 1) for i in range(1 + again))
    run = ToyRun(engine, replace(toy_trace(*turns, *others), contents=np.array([(5, 16)], CONTENT)), **decision)
    run.drain()
    check_invariants(run.state)
    return run


@pytest.mark.parametrize(
    ("tier", "to_host", "second", "third", "copied"),
    [
        # The second request takes three blocks of the first. Of the third one block is on the device, and four of the
        # second give way to it.
        (0, EVERYBODYS, 44, 16 + 16, 0),
        (10, NOBODYS, 44, 16 + 16, 0),
        (10, IMMEDIATES, 44 + 3, 16 + 4 + 3, 6),
        (10, EVERYBODYS, 44 + 3, 16 + 4 + 3 + 4, 10),
        # The last of the three went first, so it is the one to give way; when the other two come back nothing else may
        # come in their place until they have, and then two blocks do.
        (2, EVERYBODYS, 44 + 3, 16 + 8 + 2 + 2, 7),
    ],
)
def test_a_conversation_comes_back(tier: int, to_host: int, second: int, third: int, copied: int) -> None:
    run = play(tier, to_host=to_host)
    assert [time_s / TICK_S for time_s in run["finish_s"]] == [32, 100 + second, 200 + third]
    assert run.state.scheduler["swapped_tokens"][0] == 4 * copied


def test_deferred_blocks_give_way_first() -> None:
    """Beyond their share of the tier, though they came later."""
    run = play(4, deferred_cache_share=0.0)
    assert set(tier_blocks(run.state)) >= {(5, 1), (5, 2), (5, 3)} and len(tier_blocks(run.state)) == 4


def test_what_was_copied_back_is_not_copied_again() -> None:
    """Of the conversation's blocks four give way to the second deferred request, and three of them are there still."""
    once, twice = play(10, to_host=IMMEDIATES), play(10, again=True, to_host=IMMEDIATES)
    copied = [run.state.scheduler["swapped_tokens"][0] // 4 for run in (once, twice)]
    assert copied == [6, 7] and len(tier_blocks(twice.state)) == 4


def test_what_was_copied_back_gives_way_first() -> None:
    """Three blocks come back while nothing may come in their place; then one more block needs room."""
    kept = tier_blocks(play(3, to_host=EVERYBODYS).state)
    assert len(kept) == 3 and {key for key in kept if key[0] == 5} == {(5, 1), (5, 2)}


def test_what_cannot_be_relied_on_is_not_kept() -> None:
    run = play(10)
    copied = run.state.scheduler["swapped_tokens"][0]
    forget_idle(run.state)
    assert tier_blocks(run.state) == {} and run.state.scheduler["swapped_tokens"][0] == copied
    check_invariants(run.state)
