"""One iteration of a live engine: planned, computed by the executor, booked; who ended with it is reported."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from flexirl.policies.interface.decision import RECOMPUTE
from flexirl.runtime.live.arrays import Arrays
from flexirl.runtime.live.clock import Clock
from flexirl.runtime.live.executor import Batch, Executor, Interrupted, Moves, OutOfMemory
from flexirl.runtime.live.guarded import Guard, words
from flexirl.runtime.live.intake import Intake
from flexirl.runtime.live.iteration import Counts, finish, prepare
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.places import Places
from flexirl.runtime.live.requests import LENGTH, STOP
from flexirl.runtime.live.step import Step
from flexirl.runtime.live.token_budget import TokenBudget
from flexirl.runtime.scheduler.commit import abandon
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.runtime.scheduler.prefix_cache import forget_idle

_LOG = logging.getLogger(__name__)


class Stepping:
    """Whatever a device does in an iteration costs at most the requests that were in it.

    tokens, abandoned, device_failures: sampled tokens, iterations broken off, iterations that failed since the start.
    """

    def __init__(
        self,
        arrays: Arrays,
        executor: Executor,
        places: Places,
        intake: Intake,
        clock: Clock,
        guard: Guard,
        options: Options,
    ) -> None:
        self.tokens = self.abandoned = self.device_failures = 0
        self._state, self._swaps, self._requests, self._flat, self._live, self._is_end = arrays
        self._executor, self._places, self._intake = executor, places, intake
        self._clock, self._guard = clock, guard
        self._save_blocks, self._safepoints, self._on_step = options.save_blocks, options.safepoints, options.on_step
        self._block_size = int(executor.profile.values["block_size"])
        self._budget = TokenBudget(self._state.engine)
        self._batch_seen: tuple[tuple[int, ...], Any] = ((), None)

    def iterate(self) -> bool:
        """Plans and computes one iteration; False if nothing may run now."""
        state, flat, places = self._state, self._flat, self._places
        began, began_s = self._clock.now_s(), self._now_s()
        save_blocks = 0
        if self._save_blocks > 0 and state.decision["preemption"][0] != RECOMPUTE:
            save_blocks = min(self._save_blocks, self._executor.free_host_blocks)
        counts = Counts(*prepare(self._live, save_blocks))
        if counts.swapped_out or counts.swapped_in or counts.saved or counts.copies:
            try:
                self._move(counts)
            except Exception as error:  # whatever a device does, the engine goes on
                # What lies where is not known any more, so nothing that was computed can be relied on.
                self._abandon(began_s)
                self._fail(np.flatnonzero(state.requests["computed"] > 0).tolist(), error)
                return True
        places.collect(counts.ended_otherwise)
        if counts.tokens == 0:
            return False
        sampled = flat.sampled[: counts.sampled]
        sampling = places.sampling[sampled] if places.particular else None
        may_stop = self._safepoints and not counts.urgent
        ids = [] if self._on_step is None else self._ids(counts)
        batch, histories = self._batch(counts), places.histories(sampled)
        if histories:
            batch = batch._replace(histories=histories)
        prepared = self._clock.now_s()
        try:
            outcome = self._executor.execute(batch, sampling, self._interrupted if may_stop else None)
            failed = outcome.failed_rows(counts.sampled, self._executor.vocab_size)
        except Interrupted:
            self.abandoned += 1
            self._abandon(began_s)
            self._tell(counts, ids, began_s, began, prepared, None, None)
            return True
        except OutOfMemory:
            self._abandon(began_s)
            if not self._budget.ran_out(counts.tokens, self._iterations()):
                places.fail(
                    [int(flat.requests[0])],
                    "The device is out of memory; send it again when the engine has less to do.",
                )
            return True
        except Exception as error:
            # It may have written keys and values, but only those of the requests in it.
            self._abandon(began_s)
            self._fail(flat.requests[: counts.requests].tolist(), error)
            return True
        if len(failed):  # the others compute their tokens once more, the same ones
            self._abandon(began_s)
            places.fail(
                sampled[failed].tolist(),
                "The model gave no number to choose a token by (NaN, or every token suppressed); "
                "change the prompt or its sampling fields.",
            )
            forget_idle(state)
            return True
        executed = self._clock.now_s()
        watched = np.flatnonzero(self._requests.watched[sampled]).tolist() if places.watched else []
        for i in watched:
            token = int(outcome.tokens[i])
            ends = bool(self._is_end[token] and self._requests.ends_early[sampled[i]])
            flat.stops[i] = places.output(sampled[i]).watch(token, ends, outcome.logprobs.get(i))
        self.tokens += counts.sampled
        if self._budget.short:
            self._budget.fitted(self._iterations())
        elapsed_s = max(self._clock.now_s() - began_s, 1e-9)
        ended, ended_otherwise = finish(self._live, outcome.tokens, self._is_end, elapsed_s)
        for i in watched:
            if not flat.ended[i]:
                places.output(sampled[i]).tell(int(outcome.tokens[i]))
        if ended:
            for i in np.flatnonzero(flat.ended[: counts.sampled]).tolist():
                places.complete(int(sampled[i]), STOP if flat.stops[i] else LENGTH)
        places.collect(ended_otherwise)
        self._tell(counts, ids, began_s, began, prepared, executed, outcome.forward_s)
        return True

    def _now_s(self) -> float:
        return float(self._state.scheduler["now_s"][0])

    def _iterations(self) -> int:
        return int(self._state.scheduler["iterations"][0])

    def _batch(self, counts: Counts) -> Batch:
        """The flattened batch's valid parts, as the same object while their sizes stay."""
        sizes = counts.requests, counts.tokens, counts.widest, counts.sampled
        if sizes != self._batch_seen[0]:
            flat, (requests, tokens, widest, sampled) = self._flat, sizes
            batch = Batch(
                tokens=flat.tokens[:tokens],
                positions=flat.positions[:tokens],
                slots=flat.slots[:tokens],
                query_lens=flat.query_lens[:requests],
                context_lens=flat.context_lens[:requests],
                block_table=flat.blocks[: requests * widest].reshape(requests, widest),
                sampled_rows=flat.sampled_rows[:sampled],
                draws=flat.draws[:sampled],
                requests=flat.requests[:requests],
            )
            self._batch_seen = sizes, batch
        return self._batch_seen[1]

    def _move(self, counts: Counts) -> None:
        """Lets the executor move keys and values as the plan has it."""
        flat, requests, block_size = self._flat, self._state.requests, self._block_size
        moves = Moves(copies=self._state.copies[: counts.copies])

        def row(r: int) -> np.ndarray:
            return self._state.block_rows[requests["row"][r]]

        for r in flat.swapped_out[: counts.swapped_out].tolist():
            blocks = self._state.block_rows[self._swaps.rows[r]]
            moves.out[r] = blocks[: blocks_for(int(requests["computed"][r]), block_size)].tolist()
        for r in flat.swapped_in[: counts.swapped_in].tolist():
            computed = int(requests["computed"][r])
            moves.back[r] = row(r)[: blocks_for(computed, block_size)].tolist()
            moves.kept[r] = computed // block_size if self._save_blocks > 0 else 0
        for r, count in flat.saved[: counts.saved].tolist():
            first = int(requests["saved"][r]) // block_size
            moves.save[r] = row(r)[first : first + count].tolist()
        for r, blocks in self._executor.move(moves).items():
            requests["saved"][r] = blocks * block_size

    def _interrupted(self) -> bool:
        """True if an immediate request has come since the iteration began."""
        return self._intake.urgent(self._clock)

    def _abandon(self, began_s: float) -> None:
        abandon(self._state, max(self._clock.now_s() - began_s, 0.0))
        self._places.collect()

    def _fail(self, requests: list[int], error: Exception) -> None:
        """Ends the requests, for which the device failed."""
        self.device_failures += 1
        _LOG.error("the device failed; the requests it was computing end", exc_info=error)
        self._places.fail(requests, f"The device failed ({words(error)}); send it again.")
        forget_idle(self._state)

    def _ids(self, counts: Counts) -> list[str]:
        return [self._places.output(r).request.id for r in self._flat.requests[: counts.requests].tolist()]

    def _tell(
        self,
        counts: Counts,
        ids: list[str],
        began_s: float,
        began: float,
        prepared: float,
        executed: float | None,
        forward_s: float | None,
    ) -> None:
        """Tells `on_step` of the iteration just booked; executed, forward_s: None if it was broken off."""
        if self._on_step is None:
            return
        if executed is None:
            executed = self._clock.now_s()
        step = Step(
            state=self._state,
            began_s=began_s,
            elapsed_s=self._now_s() - began_s,
            abandoned=forward_s is None,
            requests=ids,
            tokens=self._flat.query_lens[: counts.requests].tolist(),
            features=self._state.batch[0].copy(),
            decision=self._state.decision[0].copy(),
            prepare_s=prepared - began,
            execute_s=executed - prepared,
            forward_s=forward_s or 0.0,
            finish_s=self._clock.now_s() - executed,
        )
        self._guard.call("on_step", self._on_step, step)
