"""A prefix cache that knows every block by itself, to compare the compiled one with: a dictionary and a sort."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from flexirl.policies.interface.decision import EVERYBODYS, IMMEDIATES

Key = tuple[int, int]  # the origin of a block's last token, and the block's number in its sequence


class Sequence(Protocol):
    """Whoever holds blocks."""

    number: int
    deferred: bool


@dataclass
class Block:
    """One full block that is known, and the class it is kept for."""

    deferred: bool
    users: list[Sequence] = field(default_factory=list)
    idle_since: int = 0  # on a count of its own; of those that nobody uses

    def used_beside(self, leaving: Collection[Sequence]) -> bool:
        """Whether somebody uses it who is not about to leave."""
        return any(user not in leaving for user in self.users)


@dataclass
class Kept:
    """One block in the host tier: the one of the least `turn` gives way first."""

    deferred: bool
    turn: tuple[int, int]  # when it came; of those copied back, 0 and the latest first
    held: bool = False  # until it is copied back


class PlainTier:
    """`total` blocks of host memory for what a cache gives up."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.kept: dict[Key, Kept] = {}
        self.copied = 0
        self._clock = 0

    def keep(self, key: Key, deferred: bool, deferred_share: float) -> None:
        """A block is given up; it is copied unless it is there still."""
        self._clock += 1
        if key not in self.kept:
            if len(self.kept) == self.total and not self._give_way(deferred_share):
                return
            self.copied += 1
        self.kept[key] = Kept(deferred, (self._clock, 0))

    def _give_way(self, deferred_share: float) -> bool:
        some = {key: kept for key, kept in self.kept.items() if not kept.held}
        if not some:
            return False
        of_deferred = [key for key, kept in some.items() if kept.deferred]
        surplus = deferred_share < 1 and len(of_deferred) > int(deferred_share * self.total)
        turns = {key: (kept.turn[0], not kept.deferred, kept.turn[1]) for key, kept in some.items()}
        del self.kept[min(of_deferred if surplus else some, key=turns.__getitem__)]
        return True

    def found(self, keys: list[Key]) -> int:
        """How many of these, from the first one on, are there."""
        return [*(key in self.kept for key in keys), False].index(False)

    def copy_back(self, key: Key) -> None:
        """Copies a block, which is held until now, back to the cache."""
        self._clock += 1
        self.copied += 1
        self.kept[key] = Kept(self.kept[key].deferred, (0, -self._clock))


class PlainCache:
    """`total` blocks: empty, known, or somebody's own; `tier`: in host memory, for what is given up."""

    def __init__(self, total: int, tier: int = 0) -> None:
        self.total = self.empty = total
        self.tier = PlainTier(tier)
        self.known: dict[Key, Block] = {}
        self.evicted = [0, 0]
        self._clock = 0

    @property
    def idle(self) -> dict[Key, Block]:
        """What is known and nobody uses."""
        return {key: block for key, block in self.known.items() if not block.users}

    @property
    def free(self) -> int:
        """Blocks that can be given to somebody."""
        return self.empty + len(self.idle)

    def found(self, keys: list[Key]) -> list[Block]:
        """The blocks of a sequence that are known, from its first one on."""
        blocks = [self.known.get(key) for key in keys]
        there = [*blocks, None].index(None)
        return [block for block in blocks[:there] if block is not None]

    def use(self, user: Sequence, key: Key) -> None:
        """Somebody uses a block that is known; those who do not wait keep it for their class."""
        block = self.known[key]
        block.users.append(user)
        block.deferred &= user.deferred

    def remember(self, user: Sequence, key: Key) -> None:
        """A block of a user's own is full: it becomes known, or is given back if another is known to hold the same."""
        if key in self.known:
            self.use(user, key)
            self.empty += 1
        else:
            self.known[key] = Block(user.deferred, [user])

    def leave(self, user: Sequence, keys: list[Key]) -> None:
        """A user needs these blocks no longer, in this order."""
        for key in keys:
            self._clock += 1
            self.known[key].users.remove(user)
            self.known[key].idle_since = self._clock

    def give(self, count: int, deferred_share: float, to_host: int) -> None:
        """Hands out `count` blocks, emptying idle ones as needed: longest idle first, deferred above their share.

        to_host: whose go to the tier.
        """
        while self.empty < count:
            idle = self.idle
            of_deferred = [key for key, block in idle.items() if block.deferred]
            surplus = deferred_share < 1 and len(of_deferred) > int(deferred_share * self.total)
            key = min(of_deferred if surplus else idle, key=lambda k: idle[k].idle_since)
            deferred = self.known.pop(key).deferred
            self.evicted[deferred] += 1
            if to_host == EVERYBODYS or (to_host == IMMEDIATES and not deferred):
                self.tier.keep(key, deferred, deferred_share)
            self.empty += 1
        self.empty -= count
