"""vLLM v1's scheduler and block pool in plain Python, to compare the replay with.

Follows vLLM 0.32 name by name where it can: `Scheduler.schedule` and `update_from_output` in
`vllm/v1/core/sched/scheduler.py`, `AsyncScheduler` beside it, `BlockPool` and `allocate_slots` in `vllm/v1/core`, and
`step_with_batch_queue` in `vllm/v1/engine/core.py`. Blocks are single objects with a reference count, found again by
whose tokens they hold, so that requests which begin alike share them. Nothing here knows the compiled scheduler.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

BLOCK = 16  # tokens
Work = tuple["Request", int, int, bool]  # request, tokens, tokens computed before, whether it samples


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return math.ceil(tokens / BLOCK)


@dataclass(eq=False)
class Request:
    """One request; `placeholders` are output tokens that an iteration in flight will sample."""

    number: int
    arrival_s: float
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0
    placeholders: int = 0
    running: bool = False
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    queued_s: float = -1.0
    scheduled_s: float = -1.0
    first_token_s: float = -1.0
    last_token_s: float = -1.0

    @property
    def tokens(self) -> int:
        """Tokens known so far."""
        return self.prompt + self.generated


class BlockPool:
    """Blocks by number; the free ones in the order in which they will be given out."""

    def __init__(self, blocks: int, shared: Mapping[int, tuple[int, int]]) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self.references = dict.fromkeys(range(blocks), 0)
        self.content: dict[int, tuple[int, int]] = {}  # block -> whose tokens, which block of them
        self.cached: dict[tuple[int, int], int] = {}  # the other way round
        self.shared = shared

    def name(self, number: int, index: int) -> tuple[int, int]:
        """What block `index` of a request is called: the same for all requests that begin alike up to its end."""
        while number in self.shared and (index + 1) * BLOCK <= self.shared[number][1]:
            number = self.shared[number][0]
        return number, index

    def hits(self, request: Request) -> list[int]:
        """Cached blocks a request begins with; its last token is always computed."""
        found: list[int] = []
        for index in range((request.tokens - 1) // BLOCK):
            block = self.cached.get(self.name(request.number, index))
            if block is None:
                break
            found.append(block)
        return found

    def touch(self, blocks: Sequence[int]) -> None:
        """Takes cached blocks up again."""
        for block in blocks:
            self.free.pop(block, None)
            self.references[block] += 1

    def take(self, count: int) -> list[int]:
        """Gives out `count` free blocks, which forget what they held."""
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            name = self.content.pop(block, None)
            if name is not None and self.cached.get(name) == block:
                del self.cached[name]
            self.references[block] = 1
        return taken

    def allocate(self, request: Request, tokens: int) -> None:
        """Gives a request the blocks for `tokens` tokens more; what is full is findable from now on."""
        end = request.computed + tokens
        request.blocks += self.take(max(blocks_for(end) - len(request.blocks), 0))
        self.cache(request, min(end, request.tokens))

    def cache(self, request: Request, tokens: int) -> None:
        """Makes the full blocks of a request's first `tokens` tokens findable."""
        for index, block in enumerate(request.blocks[: tokens // BLOCK]):
            if block not in self.content:
                self.content[block] = self.name(request.number, index)
                self.cached.setdefault(self.content[block], block)

    def give_back(self, request: Request) -> None:
        """Frees a request's blocks, the last one first; those without findable content go to the front of the queue."""
        for block in reversed(request.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free[block] = None
                self.free.move_to_end(block, last=block in self.content)
        request.blocks = []


class Engine:
    """Serves requests; `shared` says of some with which earlier request, and for how many tokens, they begin alike.

    step_s: seconds of an iteration, from (tokens, computed before) per chunk, tokens attended to per decode, samples.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        step_s: Callable[[list[tuple[int, int]], list[int], int], float],
        blocks: int,
        token_budget: int,
        seats: int,
        asynchronous: bool,
        shared: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self.requests, self.step_s = requests, step_s
        self.pool = BlockPool(blocks, shared or {})
        self.token_budget, self.seats, self.asynchronous = token_budget, seats, asynchronous
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.prefix_hits = 0  # prompt tokens

    def run(self) -> Engine:
        """Serves all requests to their end."""
        coming, now_s = deque(self.requests), 0.0
        flying: list[Work] = []
        while coming or self.waiting or self.running:
            while coming and coming[0].arrival_s <= now_s:
                coming[0].queued_s = now_s
                self.waiting.append(coming.popleft())
            # With nothing in flight the first iteration is chosen on the spot, and the second one right behind it.
            flying = flying or self.schedule(now_s)
            if not flying:
                now_s = coming[0].arrival_s
                continue
            ahead = self.schedule(now_s) if self.asynchronous else []
            chunks = [(tokens, before) for request, tokens, before, _ in flying if not self.decodes(request, before)]
            contexts = [before + 1 for request, _, before, _ in flying if self.decodes(request, before)]
            now_s += self.step_s(chunks, contexts, sum(samples for *_, samples in flying))
            self.update(flying, now_s)
            flying = ahead
        return self

    @staticmethod
    def decodes(request: Request, before: int) -> bool:
        """Whether an iteration feeds back the request's newest token alone; asked before its outcome is booked."""
        return request.generated > 0 and before == request.tokens - 1

    def schedule(self, now_s: float) -> list[Work]:
        """Chooses an iteration from what is known by now."""
        budget, work, preempted = self.token_budget, [], False
        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            position += 1
            if request.placeholders and request.computed + 2 - request.placeholders >= request.prompt + request.output:
                continue  # the iteration in flight makes its last token
            tokens = min(request.tokens + request.placeholders - request.computed, budget)
            need = blocks_for(request.computed + tokens) - len(request.blocks)
            while request.running and need > len(self.pool.free):
                self.preempt(self.running.pop())
                preempted = True
            if not request.running:
                break
            self.pool.allocate(request, tokens)
            budget -= tokens
            work.append((request, tokens))
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.seats:
            request = self.waiting[0]
            hits = self.pool.hits(request)
            tokens = min(request.tokens - len(hits) * BLOCK, budget)
            # scheduler_reserve_full_isl: all its tokens so far must fit, though only a chunk's blocks are taken now.
            idle_hits = sum(self.pool.references[block] == 0 for block in hits)
            if blocks_for(request.tokens) - len(hits) + idle_hits > len(self.pool.free):
                break
            self.waiting.popleft()
            self.pool.touch(hits)
            request.computed, request.blocks = len(hits) * BLOCK, hits
            self.pool.allocate(request, tokens)
            if request.scheduled_s < 0:
                request.scheduled_s = now_s
                self.prefix_hits += request.computed
            request.running = True
            self.running.append(request)
            budget -= tokens
            work.append((request, tokens))
        return [self.advance(request, tokens) for request, tokens in work]

    def advance(self, request: Request, tokens: int) -> Work:
        """Counts an iteration's tokens as computed as soon as it is chosen."""
        before = request.computed
        request.computed += tokens
        samples = request.computed == request.tokens + request.placeholders
        request.placeholders += samples
        return request, tokens, before, samples

    def preempt(self, request: Request) -> None:
        """Puts a running request back to the head of the queue."""
        self.pool.give_back(request)
        request.running = False
        request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def update(self, flying: list[Work], now_s: float) -> None:
        """Books what an iteration made."""
        for request, _, _, samples in flying:
            if not samples:
                continue
            request.generated += 1
            request.placeholders -= 1
            if request.generated == 1:
                request.first_token_s = now_s
            if request.generated == request.output:
                request.last_token_s = now_s
                (self.running if request.running else self.waiting).remove(request)
                self.pool.give_back(request)
            elif request.running:
                self.pool.cache(request, request.computed - request.placeholders)
