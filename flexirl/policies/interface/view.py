"""What a policy may know of an engine between two iterations: a few plain arrays that an engine of any kind can fill.

An engine fills `ViewArrays` before it asks (`tally_running` counts the running requests for it) and hands the policy a
`View` of them, which cannot be written to. Nothing in it tells how long an output will be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.profile.engine import ENGINE
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import IMMEDIATE

NONE = -1  # in place of a request's number: there is none

ENGINE_NOW = np.dtype(  # of the engine as a whole
    [
        ("now_s", "f8"),  # seconds on the engine's clock
        ("busy_s", "f8"),  # of them, in iterations
        ("iterations", "i8"),  # since the start
        ("free_blocks", "i8"),  # of KV cache
        ("host_free_blocks", "i8"),  # of the host memory for swapping
        ("decode_sequences", "i8"),  # in the last iteration planned
    ],
    align=True,
)

GROUP = np.dtype(  # of one request class
    [
        # The waiting queue.
        ("waiting", "i8"),
        ("waiting_tokens", "i8"),  # prefill tokens (recomputation included) owed to the waiting requests
        ("relegated", "i8"),  # of the waiting ones, those given up, and what they are owed
        ("relegated_tokens", "i8"),
        ("windowed", "i8"),  # of the waiting ones, those whose window ends at some time
        ("order", "i8"),  # the queue order in force
        # The next request in that order; nothing below means anything where there is none.
        ("head", "i8"),  # 1: there is one
        ("head_key", "f8"),  # what it is sorted by; keys of the two classes compare in the DEADLINE order
        ("head_arrival_s", "f8"),
        ("head_deadline_s", "f8"),  # end of its window; inf where it has none
        ("head_relegated", "i8"),
        ("head_predicted", "i8"),  # output tokens predicted for it; 0 without a predictor
        # The running batch: see `tally_running`.
        ("running", "i8"),
        ("kv_blocks", "i8"),  # blocks they hold
        ("idle_blocks", "i8"),  # that the prefix cache keeps for them, beyond those in use
        ("unprefilled", "i8"),  # prefill tokens owed to them
        ("decodes", "i8"),  # those that decode, and the tokens they attend to
        ("decode_context", "f8"),
        ("paced", "i8"),  # those that decode under a TPOT promise, and of them those behind it
        ("behind", "i8"),
        ("ahead_min", "f8"),  # tokens by which they are ahead of their pace: the least, inf where there is none
        ("ahead_sum", "f8"),  # and the sum, each counted as AHEAD_LIMIT at most, either way
        # Totals since the start.
        ("arrived", "i8"),
        ("arrived_prompt", "i8"),  # tokens
        ("finished", "i8"),
        ("finished_output", "i8"),  # output tokens of the finished ones, and the sum of their squares
        ("finished_output_squares", "i8"),
        ("lost", "i8"),  # broken promises
        ("preemptions", "i8"),
        ("prompt_done", "i8"),  # prompt tokens computed for the first time
        ("output_done", "i8"),  # output tokens produced
        ("admitted_prompt", "i8"),  # prompt tokens when first admitted, and how many of them the prefix cache had
        ("found_prompt", "i8"),
    ],
    align=True,
)
AHEAD_LIMIT = 16.0

SEEN = np.dtype(  # of one request
    [
        ("request", "i4"),  # its number, by which a decision scores it; NONE: there is no such request
        ("request_class", "i4"),
        ("running", "i4"),  # 1: in the batch, 0: waiting
        ("tenant", "i4"),
        ("prompt_tokens", "i4"),
        ("max_tokens", "i4"),
        ("predicted_output_tokens", "i4"),  # 0 without a predictor
        ("num_images", "i4"),
        ("image_tokens", "i4"),
        ("generated", "i4"),  # output tokens so far
        ("computed", "i4"),  # tokens whose keys and values are in the cache
        ("kv_blocks", "i4"),
        ("preemptions", "i4"),
        ("relegated", "i4"),
        ("arrival_s", "f8"),
        ("due_s", "f8"),  # an immediate one's next token at its promised pace; the end of a deferred one's window
        ("tpot_slo_s", "f8"),
        ("first_token_s", "f8"),  # inf before it
        ("last_token_s", "f8"),
    ],
    align=True,
)
VISIBLE_PER_QUEUE = 4  # the first of each class in the waiting queues; and twice as many, the newest, of the batch
VISIBLE = 4 * VISIBLE_PER_QUEUE

PROMISE = np.dtype([("ttft_s", "f8"), ("tpot_s", "f8")], align=True)  # the default promise to immediate requests


class ViewArrays(NamedTuple):
    """The arrays of a view, for compiled code; those of many engines have a leading axis."""

    now: np.ndarray  # ENGINE_NOW (1,)
    groups: np.ndarray  # GROUP (2,), by request class
    visible: np.ndarray  # SEEN (VISIBLE,), or (0,) where nobody looks at single requests
    profile: np.ndarray  # ENGINE (1,): its limits and its step-time model
    promise: np.ndarray  # PROMISE (1,)


class View:
    """What a policy sees. Its arrays are the engine's own, filled anew before each decision, and cannot be written to.

    slo: the default promise to immediate requests; list_requests: gives the requests that wait or run, as `SEEN`.
    """

    def __init__(self, arrays: ViewArrays, slo: SLO, list_requests: Callable[[], np.ndarray]) -> None:
        self.arrays = read_only(arrays)
        self.slo = slo
        self._list_requests = list_requests

    @property
    def now_s(self) -> float:
        """Seconds on the engine's clock."""
        return float(self.arrays.now["now_s"][0])

    @property
    def engine(self) -> np.ndarray:
        """The engine's figures: a record of `ENGINE`."""
        return self.arrays.profile[0]

    def group(self, request_class: int) -> np.ndarray:
        """What is known of a class: a record of `GROUP`."""
        return self.arrays.groups[request_class]

    def requests(self) -> np.ndarray:
        """All requests that wait or run, in order of their numbers: a new array of `SEEN`."""
        return self._list_requests()


def new_arrays(engines: int, visible: int = VISIBLE) -> ViewArrays:
    """Views of so many engines that nobody has looked at yet; their profiles and promises are to be set."""
    arrays = ViewArrays(
        now=np.zeros((engines, 1), ENGINE_NOW),
        groups=np.zeros((engines, 2), GROUP),
        visible=np.zeros((engines, visible), SEEN),
        profile=np.zeros((engines, 1), ENGINE),
        promise=np.zeros((engines, 1), PROMISE),
    )
    arrays.visible["request"] = NONE
    return arrays


@compiled
def one_view(arrays: ViewArrays, m: int) -> ViewArrays:
    """The view of engine number m of many."""
    return ViewArrays(arrays.now[m], arrays.groups[m], arrays.visible[m], arrays.profile[m], arrays.promise[m])


def idle_arrays(engine: np.ndarray, slo: SLO) -> ViewArrays:
    """The view of one engine without requests; engine: an `ENGINE` record."""
    arrays = ViewArrays(*(array[0] for array in new_arrays(1)))
    arrays.profile[0] = engine
    arrays.promise[0] = (slo.ttft_s, slo.tpot_s)
    return arrays


def idle_view(engine: np.ndarray, slo: SLO) -> View:
    """The same, as a policy sees it."""
    return View(idle_arrays(engine, slo), slo, lambda: np.zeros(0, SEEN))


def read_only(arrays: ViewArrays) -> ViewArrays:
    """The same memory, not to be written to."""
    views = [array.view() for array in arrays]
    for view in views:
        view.flags.writeable = False
    return ViewArrays(*views)


@compiled
def tally_running(requests: np.ndarray, running: np.ndarray, count: int, now_s: float, groups: np.ndarray) -> None:
    """Counts the running requests into `groups`: from `unprefilled` to `ahead_sum`.

    requests: any records with the fields of `SEEN` that are read here; running: numbers of the `count` running ones.
    """
    for c in range(2):
        group = groups[c]
        group.unprefilled = 0
        group.decodes = 0
        group.decode_context = 0.0
        group.paced = 0
        group.behind = 0
        group.ahead_min = np.inf
        group.ahead_sum = 0.0
    for i in range(count):
        request = requests[np.uintp(running[i])]
        group = groups[request.request_class]
        owed = request.prompt_tokens + request.generated - request.computed
        if owed > 1:
            group.unprefilled += owed
            continue
        group.decodes += 1
        group.decode_context += request.computed + 1
        if request.request_class == IMMEDIATE and 0 < request.tpot_slo_s < np.inf:
            ahead = request.generated - (now_s - request.first_token_s) / request.tpot_slo_s
            group.ahead_min = min(group.ahead_min, ahead)
            group.ahead_sum += min(max(ahead, -AHEAD_LIMIT), AHEAD_LIMIT)
            group.behind += 1 if ahead < 0 else 0
            group.paced += 1
