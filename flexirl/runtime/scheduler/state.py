"""The scheduler's state: plain structured arrays that compiled code and NumPy see alike.

A record keeps what belongs to one request (or class, or tenant) on the same cache lines, so the compiled scheduler
reads `state.requests[r].kv_blocks` and Python reads `state.requests["kv_blocks"]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.policies.interface.decision import DECISION, default_decision
from flexirl.runtime.profile.engine import ENGINE, EngineProfile
from flexirl.runtime.profile.step_time import BATCH
from flexirl.runtime.scheduler.events import EVENT
from flexirl.workloads.trace import CONTENT

# A request is in exactly one of these states.
FUTURE, WAITING, RUNNING, FINISHED, EXPIRED, REJECTED, CANCELLED = range(7)
STATUS_NAMES = ("future", "waiting", "running", "finished", "expired", "rejected", "cancelled")

REQUEST = np.dtype(
    [
        # What every iteration reads of every running request, kept within one cache line of 64 bytes.
        ("deadline_s", "f8"),  # last token due; for a TPOT promise set when the first token is out
        ("first_token_s", "f8"),
        ("last_token_s", "f8"),
        ("tpot_slo_s", "f8"),  # mean seconds per token after the first; inf where none is promised
        ("status", "i1"),
        ("request_class", "i1"),
        ("relegated", "i1"),  # 1: goes behind the others of its class, since it will be late
        ("missed", "i1"),  # 1: its promise can no longer be kept, and the loss is booked
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),  # the truth: for the executor and the accounts, never for a policy
        ("generated", "i4"),  # output tokens produced
        ("computed", "i4"),  # tokens whose keys and values are in the cache
        ("scheduled", "i4"),  # tokens in the current iteration
        ("kv_blocks", "i4"),
        ("furthest", "i4"),  # most prompt tokens ever computed, so that recomputation is not credited twice
        # The rest of what the client asked for.
        ("arrival_s", "f8"),  # of one that waits for another's answer, until that comes: its delay
        ("ttft_deadline_s", "f8"),  # first token due; inf where none is promised
        ("tenant", "i4"),
        ("max_tokens", "i4"),
        ("predicted_output_tokens", "i4"),
        ("num_images", "i4"),
        ("image_tokens", "i4"),
        ("prefix_tokens", "i4"),
        # What its sequence says, as stretches in `contents`; what lies behind the last one is its own.
        ("content_first", "i8"),
        ("own_origin", "u8"),
        ("content_count", "i4"),
        # Its place in the prefix cache: the node its cached blocks end with, and how many there are.
        ("node", "i4"),
        ("cached", "i4"),
        ("row", "i4"),  # of `block_rows`, where blocks have numbers
        ("host_blocks", "i4"),  # blocks held in host memory after preemption by swap
        ("preemptions", "i4"),
        ("unknown", "i4"),  # of the computed tokens, the last ones that the cache is not told yet: one or none
        ("saved", "i4"),  # tokens whose keys and values are in host memory too, copied there ahead of a preemption
        # Its place in a waiting queue (a skew heap).
        ("left", "i4"),
        ("right", "i4"),
        ("parent", "i4"),
        ("forgone", "f4"),  # share of an immediate request's value that was lost by being late
        ("key", "f8"),
        ("score", "f8"),  # for the SCORE order; until a policy says otherwise, 1 if immediate and 0 if deferred
        ("finish_s", "f8"),
    ],
    align=True,
)

CLASS = np.dtype(  # one record per request class
    [
        ("waiting", "i8"),
        ("waiting_tokens", "i8"),  # prefill tokens (recomputation included) owed to the waiting requests
        ("relegated", "i8"),  # of the waiting ones, those given up, and what they are owed
        ("relegated_tokens", "i8"),
        ("windowed", "i8"),  # of the waiting ones, those whose window ends at some time
        ("running", "i8"),
        ("kv_blocks", "i8"),  # in the block tables of its running requests; a shared block counts for each of them
        ("idle_blocks", "i8"),  # cached for it, and used by no running request
        ("tier_blocks", "i8"),  # of it, in the host tier
        ("preempted", "i8"),  # preemptions in the current iteration
        ("order", "i8"),  # the order its queue is sorted in now
        ("order_weight_s", "f8"),
        ("order_expected", "f8"),
        ("order_quantile", "f8"),
        ("order_finished", "i8"),  # how many had finished when it was last sorted
        # Totals since the start, in requests and tokens.
        ("arrived", "i8"),
        ("arrived_prompt", "i8"),
        ("finished", "i8"),
        ("finished_output", "i8"),  # output tokens of the finished ones, and the sum of their squares
        ("finished_output_squares", "i8"),
        ("ended_otherwise", "i8"),  # expired, rejected or cancelled
        ("preemptions", "i8"),
        ("prompt_done", "i8"),  # prompt tokens computed for the first time
        ("output_done", "i8"),  # output tokens produced
        ("kept_prompt", "i8"),  # tokens of requests finished with their promise kept
        ("kept_output", "i8"),
        ("lost_prompt", "i8"),  # tokens of requests whose promise broke
        ("lost_output", "i8"),
        ("void_prompt", "i8"),  # of prompt_done and output_done, those of requests whose promise broke
        ("void_output", "i8"),
        ("kept", "i8"),
        ("lost", "i8"),
        ("forgone_prompt", "f8"),  # tokens of immediate requests, times what lateness took of their value
        ("forgone_output", "f8"),
        ("late_prompt", "f8"),  # of those that finished late, times what was left of their value
        ("late_output", "f8"),
        ("given_up", "i8"),  # immediate requests whose first token did not come before their clients' patience ended
        ("given_up_prompt", "i8"),
        ("given_up_output", "i8"),
        ("admitted_prompt", "i8"),  # prompt tokens when first admitted, and how many of them the cache had
        ("found_prompt", "i8"),
        ("evicted_blocks", "i8"),  # from the prefix cache
    ],
    align=True,
)

TENANT = np.dtype([("service", "f8"), ("active", "i8")], align=True)  # weighted tokens served; requests in the system

SCHEDULER = np.dtype(
    [
        ("now_s", "f8"),
        ("rng", "u8"),
        ("patience", "f8"),  # see `SLO`
        ("trace_next", "i8"),  # next row of the trace to arrive
        ("trace_length", "i8"),
        ("promised", "i8"),  # entries of `promises`
        ("coming", "i8"),  # entries of `followers`
        ("running", "i8"),  # entries of the `running` list
        ("joined", "i8"),  # of them, the last ones, admitted by the plan that is being made: it evicts none of them
        ("free_blocks", "i8"),  # that no running request uses: empty ones, and idle ones in the prefix cache
        ("empty_blocks", "i8"),
        ("host_free_blocks", "i8"),
        ("nodes", "i8"),  # of the prefix cache, made so far, and the first of those to be used again
        ("spare_node", "i8"),
        ("uses", "i8"),  # how often a node became idle: their age
        ("idle_lanes", "u8"),  # a bit for each lane with idle nodes
        ("victim", "i8"),  # the idle node found to give way first, or NONE, and when
        ("victim_s", "f8"),
        ("ranked_s", "f8"),  # when the kinds of requests were ranked by how soon they return
        ("tier_made", "i8"),  # blocks of the host tier that have been used so far
        ("tier_uses", "i8"),  # how often a block came to it: their age
        ("copies", "i8"),  # entries of `copies`
        ("own_origins", "i8"),  # requests submitted
        ("spare_blocks", "i8"),  # entries of `spare_blocks`
        ("spare_row", "i8"),  # next entry of `spare_rows` to hand out
        ("rows_out", "i8"),
        ("budget", "i8"),  # tokens left in the current iteration
        ("immediate_target_s", "f8"),  # predicted step up to which immediate prefill joins the current iteration
        ("deferred_target_s", "f8"),  # the same for deferred work
        ("deferred_floor", "i8"),  # tokens that deferred work gets whatever its target
        ("fastest_step_s", "f8"),  # no iteration is shorter: bounds what lateness can still be made good
        # Totals since the start.
        ("iterations", "i8"),
        ("busy_s", "f8"),
        ("kv_block_s", "f8"),  # blocks in use, integrated over busy time
        ("recomputed_tokens", "i8"),
        ("swapped_tokens", "i8"),
    ],
    align=True,
)

# Running requests by what they do next and whether it may wait; with CLASSES, work that may wait comes after the rest.
DECODES, PREFILLS, LATER_DECODES, LATER_PREFILLS = range(4)
WORK = np.dtype(  # one record per kind of work: its requests and, if all decode, what they add to an iteration
    [
        ("count", "i8"),
        ("best_effort", "i8"),  # of them, those that may wait
        ("context", "f8"),  # tokens attended to
    ],
    align=True,
)

NODE = np.dtype(  # a run of full blocks in the prefix cache; see prefix_cache.py
    [
        ("origin", "u8"),  # of the stretch of content it holds
        ("age", "i8"),  # when it became idle, on a common count
        ("idle_s", "f4"),  # and on the clock
        ("first", "i4"),  # the number, within the sequence, of its first block
        ("blocks", "i4"),
        ("users", "i4"),  # running requests that have it in their block tables; 0: it is idle
        ("parent", "i4"),  # the run before it, or NONE
        ("children", "i4"),
        ("owner", "i2"),  # the class it is kept for: IMMEDIATE once a request of that class has used it
        ("lane", "i2"),  # the list of idle nodes that it is in, if it is idle
        ("next", "i4"),  # in that list; also of nodes to be used again
        ("previous", "i4"),
        ("chained", "i4"),  # the next node in its bucket of `buckets`
        ("marks", "i4"),  # scratch: users that may be evicted
        ("last_block", "i4"),  # where blocks have numbers: of its last one
    ],
    align=True,
)

# Lanes of idle nodes: of each kind of immediate requests, of immediate work that is not told apart, of deferred work.
KINDS = 62
UNSORTED_LANE, DEFERRED_LANE, LANES = KINDS, KINDS + 1, KINDS + 2
AGE_BINS = 24
RETURNS = np.dtype(  # how soon requests of one kind are followed by others that want what they left; see returns.py
    [
        ("left", "f4"),  # how many left something
        ("after", "f4", (AGE_BINS,)),  # and how many of them were followed, by the time it took
        ("index", "f4", (AGE_BINS,)),
    ],
    align=True,
)
GHOST = np.dtype([("origin", "u8"), ("idle_s", "f4"), ("kind", "i4")], align=True)  # what was given up

TIER_BLOCK = np.dtype(  # a block in the host tier; see host_tier.py
    [
        ("origin", "u8"),  # of the stretch of content it belongs to
        ("age", "i8"),  # when it came, on a count of the tier's own; 0: it was copied back
        ("number", "i4"),  # within its sequence
        ("owner", "i4"),  # the class it is kept for
        ("next", "i4"),  # in the list of those of its class
        ("previous", "i4"),
        ("chained", "i4"),  # the next one in its bucket of `tier_buckets`
    ],
    align=True,
)
COPY = np.dtype([("device", "i4"), ("tier", "i4"), ("to_tier", "i4")], align=True)  # of one block, one way or the other

LENGTH_BINS = 64  # a quarter of an octave each: up to 65,536 tokens
LENGTHS = np.dtype(  # outputs of one kind of request; see lengths.py
    [
        ("tag", "u8"),  # which kind
        ("total", "f4"),  # outputs counted, as far as they have not faded
        ("counts", "f4", (LENGTH_BINS,)),
    ],
    align=True,
)
_KINDS = 256  # there is room for

ITL_BINS = 256
_ITL_LOW_S, _ITL_PER_DECADE = 1e-5, 32.0  # 256 bins reach from 10 microseconds to 1,000 s, 7.5% wide


def itl_bin_edges() -> np.ndarray:
    """Lower edges in seconds of the ITL histogram's bins, and the upper edge of the last: float64 (ITL_BINS + 1,)."""
    return _ITL_LOW_S * 10.0 ** (np.arange(ITL_BINS + 1) / _ITL_PER_DECADE)


class State(NamedTuple):
    """One engine's scheduler state. Records of one element are arrays of length 1, so that code can change them."""

    requests: np.ndarray  # REQUEST, (R,)
    running: np.ndarray  # int32, (2 * max_running,): request numbers in order of admission
    work: np.ndarray  # int32, (4, 2 * max_running): the running requests by kind of work, for the iteration planned
    work_totals: np.ndarray  # WORK, (4,)
    classes: np.ndarray  # CLASS, (2,)
    tenants: np.ndarray  # TENANT, (T,)
    lanes: np.ndarray  # int32, (2, T): roots of the waiting queues; tenants have lanes of their own in the FAIR order
    scheduler: np.ndarray  # SCHEDULER, (1,)
    decision: np.ndarray  # DECISION, (1,)
    batch: np.ndarray  # BATCH, (1,)
    engine: np.ndarray  # ENGINE, (1,)
    # The prefix cache; with room for nothing where there is none.
    contents: np.ndarray  # CONTENT: what the requests' sequences say
    nodes: np.ndarray  # NODE, (kv_blocks + LANES,): the last ones head the lists of idle nodes
    buckets: np.ndarray  # int32, (a power of two,): nodes by origin and first block
    tier: np.ndarray  # TIER_BLOCK, (host_cache_blocks + 2,), or none: the last two head the lists by owner
    tier_buckets: np.ndarray  # int32, (a power of two,)
    # Numbers of blocks, where an executor needs them; of length 0 where they are only counted.
    block_rows: np.ndarray  # int32, (2 * max_running, blocks of the longest sequence): block tables
    spare_rows: np.ndarray  # int32, (2 * max_running,): those that nobody has, the longest unused first
    block_before: np.ndarray  # int32, (kv_blocks,): within a node, the block before each
    spare_blocks: np.ndarray  # int32, (kv_blocks,): the empty ones, as a stack
    copies: np.ndarray  # COPY: what moves before the planned iteration between device and host tier, in this order
    promises: np.ndarray  # EVENT, (R,): when the first tokens of immediate requests are due
    # Requests that wait for an answer: the first one that waits for each, the next that waits for the same, and those
    # that are on their way, since the answer has come.
    follower: np.ndarray  # int32, (R,)
    sibling: np.ndarray  # int32, (R,)
    followers: np.ndarray  # EVENT, (R,)
    lengths: np.ndarray  # LENGTHS, (a constant,): of the classes first
    returns: np.ndarray  # RETURNS, (KINDS,)
    ghosts: np.ndarray  # GHOST, (a power of two,)
    length_tenths: np.ndarray  # float64, (2, 10): by class, outputs by the tenth of their predicted distribution
    itl_histogram: np.ndarray  # int64, (ITL_BINS,): inter-token latencies of immediate requests


def _aligned_rows(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeroed records that start on a cache line."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def new_states(
    count: int, engine: EngineProfile, max_requests: int, num_tenants: int, contents: int = 0, numbered: bool = False
) -> State:
    """`count` empty states in one State whose arrays have a leading member axis; see `member`.

    contents: stretches of content that there is room for; numbered: blocks have numbers, for an executor.
    """
    profile = engine.values
    blocks, rows_of_blocks = int(profile["kv_blocks"]), 2 * int(profile["max_running"])
    caching = bool(profile["prefix_caching"])
    tier = int(profile["host_cache_blocks"]) if caching else 0
    longest = -(-int(profile["max_model_len"]) // int(profile["block_size"]))

    def rows(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        return np.zeros((count, *shape), dtype=dtype)

    states = State(
        requests=_aligned_rows((count, max_requests), REQUEST),
        running=rows((2 * int(profile["max_running"]),), np.int32),  # evicted ones stay listed until the plan is made
        work=rows((4, 2 * int(profile["max_running"])), np.int32),
        work_totals=rows((4,), WORK),
        classes=rows((2,), CLASS),
        tenants=rows((num_tenants,), TENANT),
        lanes=rows((2, num_tenants), np.int32),
        scheduler=rows((1,), SCHEDULER),
        decision=rows((1,), DECISION),
        batch=rows((1,), BATCH),
        engine=rows((1,), ENGINE),
        contents=rows((contents,), CONTENT),
        nodes=rows((blocks + LANES if caching else 0,), NODE),
        buckets=rows((1 << (blocks - 1).bit_length() if caching else 0,), np.int32),
        tier=rows((tier + 2 if tier else 0,), TIER_BLOCK),
        tier_buckets=rows((1 << (tier - 1).bit_length() if tier else 0,), np.int32),
        block_rows=rows((rows_of_blocks, longest) if numbered else (0, 0), np.int32),
        spare_rows=rows((rows_of_blocks if numbered else 0,), np.int32),
        block_before=rows((blocks if numbered else 0,), np.int32),
        spare_blocks=rows((blocks if numbered else 0,), np.int32),
        copies=rows((3 * blocks if numbered and tier else 0,), COPY),
        promises=rows((max_requests,), EVENT),
        follower=rows((max_requests,), np.int32),
        sibling=rows((max_requests,), np.int32),
        followers=rows((max_requests,), EVENT),
        lengths=rows((_KINDS,), LENGTHS),
        returns=rows((KINDS if caching else 0,), RETURNS),
        ghosts=rows(((1 << 16 if numbered else 1 << 12) if caching else 0,), GHOST),
        length_tenths=rows((2, 10), np.float64),
        itl_histogram=rows((ITL_BINS,), np.int64),
    )
    states.engine[:] = profile
    states.decision[:] = default_decision()
    return states
