"""A toy device for the live engine: its model is a checksum, so any lost, stale or misplaced key changes a token."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from toys import decision_with

from flexirl.policies.interface.decision import SCORE, default_decision
from flexirl.policies.interface.view import View
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.executor import Batch, Interrupted, Moves, Outcome, OutOfMemory
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.requests import Completion
from flexirl.runtime.models.host_cache import HostCache
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.workloads.slo import SLO

VOCAB, END = 40, 39
TICK_S = 2.0**-10


def next_token(context: Sequence[int] | np.ndarray) -> int:
    """What the toy model says after these tokens."""
    return zlib.crc32(np.asarray(context, np.int64).tobytes()) % VOCAB


def alone(prompt: Sequence[int], max_tokens: int, ends: Sequence[int] = (END,)) -> list[int]:
    """What the toy model generates from a prompt by itself."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


class ToyExecutor:
    """Keeps tokens and positions where a model keeps keys and values, with the real host cache behind them.

    between_layers: called in the middle of each iteration; most_tokens: an iteration of more runs out of memory.
    """

    vocab_size = VOCAB
    end_tokens = (END,)
    image_token = None

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        blocks, block_size = int(profile.values["kv_blocks"]), int(profile.values["block_size"])
        # Noise, so that reading what was never written shows.
        self._cache = torch.randint(VOCAB, (2, blocks, block_size, 1, 1))
        sizes = (int(profile.values[name]) for name in ("host_kv_blocks", "host_cache_blocks"))
        self.host = HostCache(self._cache, *sizes)
        self.between_layers: Callable[[], None] = lambda: None
        self.most_tokens: int | None = None
        self.asked = 0
        self.moved_out = self.moved_back = self.saved = 0

    @property
    def free_host_blocks(self) -> int:
        """See `Executor`."""
        return self.host.free_blocks

    def move(self, moves: Moves) -> dict[int, int]:
        """See `Executor`."""
        self.moved_out += len(moves.out)
        self.moved_back += len(moves.back)
        self.saved += len(moves.save)
        return self.host.move(moves)

    def forget(self, r: int) -> None:
        """See `Executor`."""
        self.host.forget(r)

    def execute(self, batch: Batch, sampling: np.ndarray | None, interrupted: Callable[[], bool] | None) -> Outcome:
        """See `Executor`."""
        if self.most_tokens is not None and len(batch.tokens) > self.most_tokens:
            raise OutOfMemory
        tokens, positions = (plane.flatten().numpy() for plane in self._cache)
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens share a slot"
        tokens[batch.slots] = batch.tokens
        self.between_layers()
        if interrupted is not None:
            self.asked += 1
            if interrupted():
                raise Interrupted
        positions[batch.slots] = batch.positions
        ends = np.cumsum(batch.query_lens) - 1
        block_size = self._cache.shape[2]
        sampled = []
        for row in batch.sampled_rows.tolist():
            (n,) = np.flatnonzero(ends == row)
            places = np.arange(batch.context_lens[n])
            slots = batch.block_table[n, places // block_size] * block_size + places % block_size
            assert (positions[slots] == places).all(), "keys of other positions"
            sampled.append(next_token(tokens[slots]))
        return Outcome(np.array(sampled, np.int64), {}, 0.0)


class TickClock:
    """A clock that moves on by a tick whenever it is read, so that runs repeat exactly; idle time is skipped."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        """See `Clock`."""
        self._now_s += TICK_S
        return self._now_s

    def resume(self) -> None:
        """See `Clock`."""

    def pause(self) -> None:
        """See `Clock`."""

    def wait(self, until_s: float, wake: threading.Event) -> bool:
        """See `Clock`."""
        if until_s == float("inf"):
            return False
        self._now_s = max(self._now_s, until_s)
        return True


def random_decision(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Any decision: disciplines, orders, victims, both modes of preemption, budgets up to `tokens`, everything."""
    decision = default_decision()
    for name, count in {
        "discipline": 3,
        "immediate_order": SCORE + 1,
        "deferred_order": SCORE + 1,
        "victim": 5,
    }.items():
        decision[name] = rng.integers(count)
    for name in ("decodes_first", "preempt_for_immediate", "relegated_last"):
        decision[name] = rng.integers(2)
    several = rng.integers(18)
    decision["preemption"], decision["to_host"], decision["by_return"] = several // 6, several // 2 % 3, several % 2
    decision["token_budget"] = rng.choice([1, 2, 5, tokens])
    decision["preempt_count"] = rng.choice([0, 0, 0, 1, 3])
    decision["deferred_token_floor"] = rng.choice([0, 0, 4])
    decision["relegate"] = rng.choice([0.0, 0.0, 1.0])
    for name in ("immediate_step_s", "deferred_step_s"):
        decision[name] = rng.choice([np.inf, np.inf, 30 * TICK_S])
    decision["deferred_kv_share"] = rng.choice([1.0, 1.0, 0.5])
    decision["deferred_cache_share"] = rng.choice([1.0, 0.5, 0.0])
    decision["immediate_cache_share"] = rng.choice([0.0, 0.0, 0.3])
    decision["reserve_ratio"] = decision["reserve_new_ratio"] = rng.choice([0.0, 0.0, 0.5])
    return decision


class Constant:
    """A policy that always says the same: the default decision with some fields changed."""

    name = "constant"
    every_iteration = True

    def __init__(self, **changes: float) -> None:
        self._decision = decision_with(**changes)

    def reset(self, view: View) -> None:
        """Nothing to forget."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        return self._decision


class RandomPolicy:
    """Another random decision each time it is asked."""

    name = "random"

    def __init__(self, seed: int, tokens: int, every_iteration: bool = False) -> None:
        self.every_iteration = every_iteration
        self._rng = np.random.default_rng(seed)
        self._tokens = tokens

    def reset(self, view: View) -> None:
        """Nothing to forget."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        return random_decision(self._rng, self._tokens)


class LiveRun:
    """An engine that is checked in all its parts after every few iterations, and what came of its requests."""

    def __init__(self, executor: Any, policy: Any, **options: Any) -> None:
        self.completions: dict[str, Completion] = {}
        self.executor = executor
        self._ended: list[str] = []
        slo = options.pop("slo", SLO(1.0, 0.05))
        defaults = {"clock": TickClock(), "max_requests": 64, "on_end": self._on_end}
        self.engine = LiveEngine(executor, policy, slo, Options(**{**defaults, **options}))

    def _on_end(self, completion: Completion) -> None:
        self._ended.append(completion.id)
        self.completions[completion.id] = completion

    def obey(self, policy: Any) -> None:
        """Has another policy decide from here on, without anybody noticing."""
        self.engine._deciding.policy = policy

    def step(self, iterations: int = 1) -> None:
        """Decides, runs some iterations, checks everything."""
        self.engine.decide()
        self.engine.advance(self.engine.now_s + 2.0, iterations)
        self.check()

    def check(self) -> None:
        """The scheduler's invariants, and every block of device and host memory in one place."""
        check_invariants(self.engine.state, reused=True)
        assert len(set(self._ended)) == len(self._ended), "a request ended twice"
        host: HostCache = self.executor.host
        on_host = [*host._free, *(block for blocks in host._held.values() for block in blocks)]
        assert sorted(on_host) == list(range(len(host._store))), "a host block is held twice or lost"
        assert set(host._held) <= set(self.engine._places.place_of.values()), "an ended request holds host memory"

    def drain(self) -> None:
        """Runs until every request has ended."""
        for _ in range(100_000):
            if self.engine.unfinished == 0:
                return
            self.step(8)
        raise AssertionError("some requests never end")
