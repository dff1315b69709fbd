"""A slow scheduler that says the same rules in plain Python, to compare the compiled one with.

Nothing is clever here: a queue is sorted each time it is asked, blocks are known one by one, iterations are taken one
by one, and the step time is the sum that the documentation gives. It has no noise.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from plain_cache import Block, Key, PlainCache

from flexirl.policies.interface.decision import (
    ARRIVAL,
    CHEAPER,
    CLASSES,
    DEADLINE,
    FAIR,
    LAST,
    LEAST_COMPUTED,
    LEAST_OUTPUT,
    LOWEST_SCORE,
    ONE_QUEUE,
    RECOMPUTE,
    SHORTEST,
)
from flexirl.runtime.scheduler.state import (
    EXPIRED,
    FINISHED,
    FUTURE,
    REJECTED,
    RUNNING,
    WAITING,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

MIN_CHUNK = 64
NEVER = math.inf
NEVER_DUE_S = 1e9  # what has no deadline counts as due then in the DEADLINE order
LATEST_KEY = 5e11  # whom nobody is due before, in a queue


@dataclass(eq=False)
class Request:
    """One request: the client's side from a row of the trace, and where it stands."""

    number: int
    row: dict[str, Any]
    status: int = FUTURE
    generated: int = 0
    computed: int = 0
    scheduled: int = 0
    kv_blocks: int = 0
    cached: int = 0
    host_blocks: int = 0
    furthest: int = 0
    preemptions: int = 0
    relegated: bool = False
    missed: bool = False
    first_token_s: float = NEVER
    last_token_s: float = NEVER
    finish_s: float = NEVER

    def __post_init__(self) -> None:
        follows = self.row["follows"]
        self.waits_for: int | None = self.number - follows if follows else None  # whose answer it waits for
        self.deferred: bool = self.row["request_class"] == DEFERRED
        self.tenant: int = self.row["tenant"]
        self.prompt: int = self.row["prompt_tokens"]
        self.output: int = self.row["output_tokens"]
        self.score: float = 0.0 if self.deferred else 1.0
        self.comes(NEVER if follows else self.row["arrival_s"])

    def comes(self, arrival_s: float) -> None:
        """It is known when it arrives."""
        self.arrival_s: float = arrival_s
        self.first_due_s: float = arrival_s + self.row["ttft_slo_s"]
        self.deadline_s: float = arrival_s + self.row["window_s"]

    @property
    def sequence(self) -> int:
        """Tokens so far, prompt and output."""
        return self.prompt + self.generated

    @property
    def owed(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.sequence - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next token follows from the last one alone."""
        return self.owed == 1 and self.generated > 0

    @property
    def waits(self) -> bool:
        """Whether it is work that may wait."""
        return self.deferred or self.relegated

    def images_in(self, start: int, tokens: int) -> float:
        """Image tokens encoded by a chunk: those of every image whose first token lies in it."""
        images, length = self.row["num_images"], self.row["image_tokens"]
        first_tokens = [image * length // images for image in range(images)]
        return sum(length / images for at in first_tokens if start <= at < min(start + tokens, length))


@dataclass
class Batch:
    """What one iteration computes."""

    chunks: list[tuple[Request, int]] = field(default_factory=list)  # request, tokens
    swap_tokens: int = 0

    def add(self, request: Request, tokens: int) -> None:
        """Puts `tokens` of a request in."""
        self.chunks.append((request, tokens))

    def drop(self, request: Request) -> None:
        """Takes a request out again."""
        self.chunks = [(other, tokens) for other, tokens in self.chunks if other is not request]

    @property
    def decodes(self) -> list[Request]:
        """The requests that feed back a token of their own output."""
        return [request for request, _ in self.chunks if request.decodes]

    @property
    def prefills(self) -> list[tuple[Request, int, int]]:
        """All others: request, first position, tokens."""
        decodes = self.decodes
        return [(request, request.computed, tokens) for request, tokens in self.chunks if request not in decodes]

    @property
    def sampled(self) -> int:
        """Sequences that sample a token."""
        return sum(tokens == request.owed for request, tokens in self.chunks)


@dataclass
class Totals:
    """The running totals of one class."""

    arrived: int = 0
    finished: int = 0
    ended_otherwise: int = 0
    preemptions: int = 0
    prompt_done: int = 0
    output_done: int = 0
    kept: int = 0
    lost: int = 0
    kept_prompt: int = 0
    kept_output: int = 0
    lost_prompt: int = 0
    lost_output: int = 0
    void_prompt: int = 0
    void_output: int = 0


class Reference:
    """The engine on one trace; `advance` it under a decision given as a record of `DECISION`."""

    def __init__(self, engine: np.ndarray, rows: np.ndarray, num_tenants: int, contents: np.ndarray) -> None:
        self.engine = {name: engine[name].item() for name in engine.dtype.names or ()}
        self.requests = [
            Request(number, {name: row[name].item() for name in rows.dtype.names or ()})
            for number, row in enumerate(rows)
        ]
        self.running: list[Request] = []
        tier = self.engine["host_cache_blocks"] if self.engine["prefix_caching"] else 0
        self.cache = PlainCache(self.engine["kv_blocks"], tier)
        self.contents = [(int(content["origin"]), int(content["end"])) for content in contents]
        self.host_free: int = self.engine["host_kv_blocks"]
        self.now_s = 0.0
        self.iterations = 0
        self.busy_s = 0.0
        self.kv_block_s = 0.0
        self.recomputed = 0
        self.swapped = 0
        self.found_prompt, self.admitted_prompt = [0, 0], [0, 0]
        self.service = [0.0] * num_tenants
        self.totals = (Totals(), Totals())
        self.itls_s: list[float] = []
        self.batch = Batch()
        self.evicted: list[Request] = []  # in the current iteration
        self.joined: list[Request] = []  # in the iteration being planned, which evicts none of them
        self.decision: dict[str, Any] = {}
        self.targets_s: dict[bool, float] = {}  # by whether the work may wait
        self.floor = 0
        self.orders: list[tuple[int, float, float]] = [(ARRIVAL, 0.0, 0.0)] * 2  # order, weight, expected output
        self.fastest_step_s = (
            self.engine["base_s"] + self.engine["host_s"] + self.engine["per_token_s"] + self.engine["per_sequence_s"]
        )
        self.arrive()

    # ---------------------------------------------------------------------------------------------- time

    def advance(self, decision: np.ndarray, until_s: float, iterations: int) -> None:
        """Runs until the clock reaches `until_s` or for `iterations` iterations."""
        names = [name for name in decision.dtype.names or () if decision[name].shape == ()]
        self.decision = {name: decision[name].item() for name in names}
        for c, (name, weight) in enumerate(
            (("immediate_order", "order_weight_s"), ("deferred_order", "deferred_weight_s"))
        ):
            wanted = (self.decision[name], self.decision[weight], self.decision["expected_output"])
            before = self.orders[c]
            # A weight that is much as before changes nothing.
            alike = wanted[1] == before[1] or (before[1] != 0 and 0.5 < wanted[1] / before[1] < 2)
            if wanted[0] != before[0] or (wanted[0] == DEADLINE and not (alike and wanted[2] == before[2])):
                self.orders[c] = wanted
        for _ in range(self.decision["preempt_count"]):
            victims = [request for request in self.running if request.deferred]
            if victims:
                self.preempt(self.victim(victims))
        last = self.iterations + iterations
        while self.now_s < until_s and self.iterations < last:
            self.arrive()
            self.plan()
            if self.batch.chunks:
                self.commit(self.step_s(self.batch.chunks))
            else:
                coming = [request.arrival_s for request in self.requests if request.status == FUTURE]
                self.now_s = min([*coming, until_s])
                self.settle()
        self.arrive()

    def arrive(self) -> None:
        """Queues what has arrived, or rejects what can never fit."""
        # Rejecting one may let another come at the same time.
        while coming := [r for r in self.requests if r.status == FUTURE and r.arrival_s <= self.now_s]:
            request = min(coming, key=lambda r: (r.arrival_s, r.row["follows"] > 0, r.number))
            self.totals[request.deferred].arrived += 1
            in_system = [r for r in self.requests if r.status in (WAITING, RUNNING)]
            if in_system and not any(r.tenant == request.tenant for r in in_system):
                least = min(self.service[r.tenant] for r in in_system)
                self.service[request.tenant] = max(self.service[request.tenant], least)
            longest = request.prompt + request.row["max_tokens"]
            fits = self.blocks(longest) <= self.engine["kv_blocks"] and longest <= self.engine["max_model_len"]
            request.status = WAITING
            if not fits:
                self.end(request, REJECTED)
        self.settle_first_tokens()

    def step_s(self, chunks: list[tuple[Request, int]]) -> float:
        """Seconds of an iteration of these requests and tokens."""
        engine, batch = self.engine, Batch(chunks)
        tokens = sum(count for _, count in chunks)
        context = sum(request.computed + 1 for request in batch.decodes)
        seconds = engine["base_s"] + engine["host_s"] + engine["per_sequence_s"] * batch.sampled
        seconds += engine["per_token_s"] * tokens
        for hinge in (64, 128, 256):
            seconds += engine[f"per_token_{hinge}_s"] * max(tokens - hinge, 0)
        for step in (16, 256):
            seconds += engine[f"over_{step}_s"] * (tokens > step)
        seconds += engine["per_context_s"] * context
        if batch.prefills:
            seconds += engine["mixed_s"] + engine["per_mixed_context_s"] * context
        for request, start, count in batch.prefills:
            seconds += engine["per_chunk_context_s"] * (count * start + count * count / 2)
            seconds += engine["per_image_token_s"] * request.images_in(start, count)
        return seconds + engine["per_swap_token_s"] * self.batch.swap_tokens

    # ---------------------------------------------------------------------------------------------- plan

    def plan(self) -> None:
        """Chooses the iteration."""
        self.batch = Batch(swap_tokens=self.batch.swap_tokens)
        self.evicted = []
        self.set_targets()
        phases = [(True, False), (False, True)] if self.decision["discipline"] == CLASSES else [(True, True)]
        for immediate, deferred in phases:
            self.run_on(immediate, deferred)
            self.admit_some(immediate, deferred)
        self.joined = []

    @property
    def budget(self) -> int:
        """Tokens left in this iteration."""
        most = min(self.decision["token_budget"], self.engine["max_tokens_per_step"])
        return most - sum(tokens for _, tokens in self.batch.chunks)

    def run_on(self, immediate: bool, deferred: bool) -> None:
        """Gives the running requests their tokens."""
        line = [request for request in self.running if (deferred if request.waits else immediate)]
        if self.decision["decodes_first"]:
            line.sort(key=lambda request: not request.decodes)  # stable
        for request in line:
            if self.budget <= 0:
                return
            if request.status != RUNNING:
                continue  # evicted by one ahead of it
            if not request.decodes:
                tokens = self.chunk(request, request.computed)
            else:
                step_s = self.step_s([*self.batch.chunks, (request, 1)])
                may = not request.waits or step_s <= self.targets_s[True] or self.floor_left() > 0
                tokens = 1 if may else 0
            if tokens > 0 and self.grow(request, request.computed + tokens):
                self.batch.add(request, tokens)

    def set_targets(self) -> None:
        """Turns step targets and shares of slack into this iteration's targets."""
        decision = self.decision
        self.targets_s = {False: decision["immediate_step_s"], True: decision["deferred_step_s"]}
        self.floor = decision["deferred_token_floor"]
        decoding = [request for request in self.running if request.decodes]
        slacks_s = [
            request.first_token_s + request.generated * request.row["tpot_slo_s"] - self.now_s
            for request in decoding
            if not request.waits and not request.missed
        ]
        slack_s = max(min(slacks_s, default=NEVER), 0.0)
        aside = [request for request in decoding if request.waits]
        if decision["immediate_slack"] > 0:
            each_s = self.slope_s() + self.engine["per_sequence_s"]
            per_context_s = self.engine["per_context_s"] + self.engine["per_mixed_context_s"]
            aside_s = sum(each_s + (request.computed + 1) * per_context_s for request in aside)
            self.targets_s[False] = min(
                self.targets_s[False], decision["immediate_slack"] * slack_s - decision["deferred_decodes"] * aside_s
            )
        if decision["deferred_slack"] > 0:
            self.targets_s[True] = min(self.targets_s[True], decision["deferred_slack"] * slack_s)
            self.floor = max(self.floor, int(decision["deferred_decodes"] * len(aside)))

    def slope_s(self) -> float:
        """Seconds that one more prefill token adds to a large iteration."""
        return float(sum(self.engine[name] for name in ("per_token_s", *(f"per_token_{h}_s" for h in (64, 128, 256)))))

    def floor_left(self) -> int:
        """Tokens that work that may wait gets yet, whatever its step target."""
        given = sum(tokens for request, tokens in self.batch.chunks if request.waits)
        return max(self.floor - given, 0)

    def chunk(self, request: Request, start: int) -> int:
        """Tokens to prefill from `start`."""
        limit = min(request.sequence - start, self.budget)
        target_s = self.targets_s[request.waits]
        computed, request.computed = request.computed, start
        tokens = limit
        while tokens > 0 and self.step_s([*self.batch.chunks, (request, tokens)]) > target_s:
            tokens -= 1
        request.computed = computed
        if request.waits:
            return max(tokens, min(limit, self.floor_left()))
        return tokens if self.batch.prefills else max(tokens, min(limit, MIN_CHUNK))

    def grow(self, request: Request, tokens: int) -> bool:
        """Gets a running request the blocks for `tokens` tokens; False if it evicted itself."""
        need = self.blocks(tokens) - request.kv_blocks
        while need > self.cache.free:
            anyone = self.decision["discipline"] == ONE_QUEUE or not request.waits
            settled = [other for other in self.running if other not in self.joined]
            victim = self.victim([other for other in settled if anyone or other.waits])
            self.preempt(victim)
            if victim is request:
                return False
        self.take(request, max(need, 0))
        return True

    def victim(self, candidates: list[Request]) -> Request:
        """Whom to evict first."""
        rule = self.decision["victim"]
        blind = rule == LAST and self.decision["discipline"] == ONE_QUEUE
        if not blind and any(request.waits for request in candidates):
            candidates = [request for request in candidates if request.waits]
        if rule == LAST:
            return candidates[-1]
        if rule == LEAST_OUTPUT:
            return min(candidates, key=lambda request: (request.generated, -request.prompt))
        if rule == LEAST_COMPUTED:
            return min(candidates, key=lambda request: (request.computed, -request.arrival_s))
        if rule == LOWEST_SCORE:
            return min(candidates, key=lambda request: (request.score, -request.arrival_s))
        return max(reversed(candidates), key=lambda request: request.arrival_s)

    def preempt(self, request: Request) -> None:
        """Takes a running request out of the batch and queues it again."""
        self.batch.drop(request)
        self.running.remove(request)
        self.evicted.append(request)
        request.status = WAITING
        request.preemptions += 1
        self.totals[request.deferred].preemptions += 1
        if self.swaps(request):
            request.host_blocks = request.kv_blocks
            self.host_free -= request.host_blocks
            self.swapped += request.computed
            self.batch.swap_tokens += request.computed
            self.give_back(request, keep=False)
        else:
            self.recomputed += request.computed
            self.give_back(request, keep=True)
            request.computed = 0

    def swaps(self, request: Request) -> bool:
        """Whether a preemption is by swap."""
        mode, engine, tokens = self.decision["preemption"], self.engine, request.computed
        if mode == RECOMPUTE or tokens == 0 or request.kv_blocks > self.host_free:
            return False
        if mode == CHEAPER:
            again_s = self.slope_s() * tokens + engine["per_chunk_context_s"] * tokens * tokens / 2
            again_s += engine["per_image_token_s"] * min(tokens, request.row["image_tokens"])
            return 2 * tokens * engine["per_swap_token_s"] < again_s
        return True

    # ---------------------------------------------------------------------------------------------- waiting requests

    def admit_some(self, immediate: bool, deferred: bool) -> None:
        """Admits from the head of the queue until the head must wait."""
        while self.budget > 0:
            if any(deferred or not request.deferred for request in self.evicted):
                return
            request = self.next(immediate, deferred)
            if request is None:
                return
            if request.deferred and self.now_s > request.deadline_s:
                self.end(request, EXPIRED)
            elif not request.relegated and self.hopeless(request):
                request.relegated = True
            elif not self.admit(request):
                return

    def next(self, immediate: bool, deferred: bool) -> Request | None:
        """The request to admit next."""
        heads = [self.head(request_class) for request_class in (IMMEDIATE, DEFERRED)]
        if self.decision["discipline"] != ONE_QUEUE:
            first, second = heads
            urgent = first is not None and not first.relegated
            if urgent and immediate:
                return first
            if not deferred or urgent:
                return second if deferred else None
            return first if second is None or (first and not self.decision["relegated_last"]) else second
        both = [request for request in heads if request is not None]
        fair = self.orders[IMMEDIATE][0] == FAIR
        return min(both, key=lambda r: (self.service[r.tenant] if fair else 0, self.key(r)), default=None)

    def head(self, request_class: int) -> Request | None:
        """The first of a class's queue."""
        queue = self.queue(request_class)
        if self.orders[request_class][0] == FAIR and queue:
            first = {request.tenant: request for request in reversed(queue)}.values()
            return min(first, key=lambda r: (r.relegated, self.service[r.tenant], r.tenant))
        return queue[0] if queue else None

    def queue(self, request_class: int) -> list[Request]:
        """The waiting requests of a class in its order (arrival within a tenant if that is FAIR)."""
        mine = [r for r in self.requests if r.status == WAITING and r.deferred == (request_class == DEFERRED)]
        return sorted(mine, key=self.key)

    def key(self, request: Request) -> tuple[bool, float, int]:
        """What the queues are sorted by."""
        order, weight_s, expected = self.orders[request.deferred]
        if order in (ARRIVAL, FAIR):
            value = request.arrival_s
        elif order not in (SHORTEST, DEADLINE):
            value = -request.score
        else:
            remaining = request.owed
            if request.deferred and request.row["predicted_output_tokens"]:
                engine, context = self.engine, request.prompt + request.generated
                decode_s = self.slope_s() + engine["per_sequence_s"]
                decode_s += context * (engine["per_context_s"] + engine["per_mixed_context_s"])
                to_come = max(request.row["predicted_output_tokens"] - request.generated, 0)
                remaining += to_come * (decode_s / self.slope_s())
            elif request.deferred and order == DEADLINE:
                remaining += max(expected - request.generated, 0)
            due_s = request.deadline_s if request.deferred else request.first_due_s
            value = remaining if order == SHORTEST else min(due_s, NEVER_DUE_S) + weight_s * remaining
        return request.relegated, min(value, LATEST_KEY), request.number

    def hopeless(self, request: Request) -> bool:
        """Whether its first token would be late if its prefill, run alone, took `relegate` times as long as it does.

        A deferred one, whether its window has less time left than the margin, or than half of the window.
        """
        if request.deferred:
            margin_s = min(self.decision["deferred_margin_s"], (request.deadline_s - request.arrival_s) / 2)
            return self.now_s > request.deadline_s - margin_s
        if not self.decision["relegate"] or request.generated > 0:
            return False
        engine, start = self.engine, self.reusable(request)
        tokens = request.prompt - start
        alone_s = self.slope_s() * tokens
        alone_s += engine["per_chunk_context_s"] * (tokens * start + tokens * tokens / 2)
        alone_s += engine["per_image_token_s"] * request.images_in(start, tokens)
        return self.now_s + self.decision["relegate"] * alone_s > request.first_due_s

    def admit(self, request: Request) -> bool:
        """Admits a waiting request if it may join now."""
        total, decision = self.engine["kv_blocks"], self.decision
        if request.deferred:
            share, free = decision["deferred_kv_share"], self.cache.free
            if (share < 1 and total - free >= share * total) or decision["preempt_count"] > 0:
                return False
            of_immediate = sum(not block.deferred for block in self.cache.idle.values())
            kept = min(int(decision["immediate_cache_share"] * total), of_immediate)
            if kept > 0 and self.need(request, self.running, ()) > free - kept:
                return False
        start = self.reusable(request)
        tokens = self.chunk(request, start)
        if tokens <= 0:
            return False

        def fits() -> bool:
            seats = self.engine["max_running"] - len(self.running)
            return self.need(request, self.running, ()) <= self.cache.free and seats > 0

        if not fits():
            keep = [other for other in self.running if not other.waits or other in self.joined]
            leaving = [other for other in self.running if other not in keep]
            reach = self.cache.free + sum(other.kv_blocks - other.cached for other in leaving)
            reach += sum(bool(block.users) and not block.used_beside(leaving) for block in self.cache.known.values())
            if request.waits or not decision["preempt_for_immediate"] or not leaving:
                return False
            if self.need(request, keep, leaving) > reach:
                return False
            while not fits():
                self.preempt(self.victim([other for other in self.running if other not in keep]))
        if request.host_blocks > 0:
            self.host_free += request.host_blocks
            request.host_blocks = 0
            self.swapped += start
            self.batch.swap_tokens += start
        else:
            found = min(len(self.found(request)), start // self.engine["block_size"])
            for key in self.keys(request, 0, found):
                self.cache.use(request, key)
            request.cached = request.kv_blocks = found
            self.bring_back(request, start // self.engine["block_size"])
            if request.preemptions:
                self.recomputed -= start
            else:
                self.admitted_prompt[request.deferred] += request.prompt
                self.found_prompt[request.deferred] += start
        request.status = RUNNING
        request.computed = start
        self.running.append(request)
        self.joined.append(request)
        self.take(request, self.blocks(start + tokens) - request.kv_blocks)
        self.batch.add(request, tokens)
        return True

    def reusable(self, request: Request) -> int:
        """Tokens of a waiting request that need no computing."""
        if request.host_blocks > 0:
            return request.computed
        size = self.engine["block_size"]
        said = request.row["prefix_tokens"] if request.row["content_count"] == 0 else 0
        shared = said // size if self.engine["prefix_caching"] else 0
        found, most = len(self.found(request)), (request.sequence - 1) // size
        found += self.cache.tier.found(self.keys(request, found, most))
        return min(max(found, shared), most) * size

    def need(self, request: Request, running: list[Request], leaving: Collection[Request]) -> int:
        """Free blocks it takes to admit a request beside these running ones when the others leave."""
        decision = self.decision
        found = self.found(request) if request.host_blocks == 0 else []
        used = sum(block.used_beside(leaving) for block in found)
        if decision["reserve_ratio"] <= 0 and decision["reserve_new_ratio"] <= 0:
            return self.blocks(request.sequence) - used

        def lifetime(other: Request, ratio: float) -> int:
            more = min(other.row["max_tokens"] - other.generated, decision["reserve_clip"])
            return self.blocks(other.sequence + math.ceil(ratio * more))

        aside = [max(lifetime(other, decision["reserve_ratio"]) - other.kv_blocks, 0) for other in running]
        return lifetime(request, decision["reserve_new_ratio"]) - used + sum(aside)

    # ---------------------------------------------------------------------------------------------- memory

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return math.ceil(tokens / self.engine["block_size"])

    def take(self, request: Request, count: int) -> None:
        """Gives a request `count` free blocks."""
        assert count <= self.cache.free
        copied = self.cache.tier.copied
        self.cache.give(count, self.decision["deferred_cache_share"], self.decision["to_host"])
        request.kv_blocks += count
        self.note_copies(self.cache.tier.copied - copied)

    def bring_back(self, request: Request, blocks: int) -> None:
        """Copies the blocks of a request back that the host tier has beyond those it has, up to `blocks`."""
        keys = self.keys(request, request.kv_blocks, blocks)
        keys = keys[: self.cache.tier.found(keys)]
        for key in keys:
            self.cache.tier.kept[key].held = True
        self.take(request, len(keys))
        for key in keys:
            self.cache.tier.copy_back(key)
        self.note_copies(len(keys))

    def note_copies(self, blocks: int) -> None:
        """So many blocks are copied to or from host memory in this iteration."""
        self.swapped += blocks * self.engine["block_size"]
        self.batch.swap_tokens += blocks * self.engine["block_size"]

    def give_back(self, request: Request, keep: bool) -> None:
        """Frees a request's blocks; keep: the full ones stay known."""
        if keep:
            self.remember(request, request.computed)
        self.cache.empty += request.kv_blocks - request.cached
        self.cache.leave(request, self.keys(request, 0, request.cached)[::-1])
        request.kv_blocks = request.cached = 0

    def remember(self, request: Request, tokens: int) -> None:
        """The first `tokens` of a request become known, as far as they fill blocks."""
        if self.engine["prefix_caching"]:
            count = tokens // self.engine["block_size"]
            for key in self.keys(request, request.cached, count):
                self.cache.remember(request, key)
            request.cached = max(request.cached, count)

    def keys(self, request: Request, first: int, end: int) -> list[Key]:
        """By what the blocks `first` to `end` of a request are known; nobody else has its number as an origin."""
        begin, count, size = request.row["content_first"], request.row["content_count"], self.engine["block_size"]
        stretches = [*self.contents[begin : begin + count], (-1 - request.number, 1 << 60)]
        return [(next(o for o, behind in stretches if behind >= (b + 1) * size), b) for b in range(first, end)]

    def found(self, request: Request) -> list[Block]:
        """The blocks that need no computing; the last token is always computed."""
        if not self.engine["prefix_caching"]:
            return []
        return self.cache.found(self.keys(request, 0, (request.sequence - 1) // self.engine["block_size"]))

    # ---------------------------------------------------------------------------------------------- accounts

    def commit(self, elapsed_s: float) -> None:
        """Books the iteration."""
        began_s, self.now_s = self.now_s, self.now_s + elapsed_s
        self.iterations += 1
        self.busy_s += elapsed_s
        self.kv_block_s += elapsed_s * (self.engine["kv_blocks"] - self.cache.free)
        self.batch.swap_tokens = 0
        for request, tokens in [(r, n) for r in self.running for other, n in self.batch.chunks if other is r]:
            totals = self.totals[request.deferred]
            request.computed += tokens
            fresh = min(request.computed, request.prompt) - request.furthest
            if fresh > 0:
                request.furthest += fresh
                totals.prompt_done += fresh
                self.service[request.tenant] += fresh
            count = request.row["content_count"]
            if request.computed <= request.prompt and count > 0:
                said = self.contents[request.row["content_first"] + count - 1][1]
                self.remember(request, min(request.computed, said))
            if request.owed > 0:
                continue
            request.generated += 1
            totals.output_done += 1
            self.service[request.tenant] += 2
            if request.generated == 1:
                request.first_token_s = self.now_s
                if not request.deferred:
                    further = request.output - 1
                    pace_s = request.row["tpot_slo_s"] * further * (1.0 + 1e-9) if further else 0.0
                    request.deadline_s = min(request.deadline_s, self.now_s + pace_s)
            elif not request.deferred:
                self.itls_s.append(elapsed_s if request.last_token_s == began_s else self.now_s - request.last_token_s)
            request.last_token_s = self.now_s
            if request.generated == request.output:
                self.end(request, FINISHED)
        self.settle()

    def settle(self) -> None:
        """Books the promises that can no longer be kept, and ends deferred requests whose window has closed."""
        for request in list(self.running):
            least_s = (request.output - request.generated) * self.fastest_step_s
            if not request.deferred and self.now_s + least_s > request.deadline_s:
                self.lose(request)
            if request.deferred and self.now_s > request.deadline_s:
                self.end(request, EXPIRED)
        self.settle_first_tokens()

    def settle_first_tokens(self) -> None:
        """Books the promises of a first token that are broken."""
        for request in self.requests:
            late = request.first_token_s > request.first_due_s and self.now_s > request.first_due_s
            if request.status != FUTURE and not request.deferred and late:
                self.lose(request)

    def lose(self, request: Request) -> None:
        """Books once that a promise broke."""
        if not request.missed:
            request.missed = True
            totals = self.totals[request.deferred]
            totals.lost += 1
            totals.lost_prompt += request.prompt
            totals.lost_output += request.output

    def end(self, request: Request, status: int) -> None:
        """Ends a request."""
        if request in self.running:
            self.running.remove(request)
            self.give_back(request, keep=True)
        self.host_free += request.host_blocks
        request.host_blocks = 0
        request.status = status
        request.finish_s = self.now_s
        for other in self.requests:
            if other.waits_for == request.number:
                other.comes(self.now_s + other.row["delay_s"])
        totals = self.totals[request.deferred]
        if status == FINISHED:
            totals.finished += 1
        else:
            totals.ended_otherwise += 1
        first_late = not request.deferred and request.first_token_s > request.first_due_s
        if status != FINISHED or first_late or self.now_s > request.deadline_s:
            self.lose(request)
        if request.missed:
            totals.void_prompt += request.furthest
            totals.void_output += request.generated
        else:
            totals.kept += 1
            totals.kept_prompt += request.prompt
            totals.kept_output += request.output
