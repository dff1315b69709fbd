"""The most revenue that any policy could earn in an episode, knowing all arrivals and lengths: a linear programme.

A fluid relaxation. Time is cut into bins; an iteration that spans bins counts in each by the share of its time there.
Variables are, per bin, the (fractional) number of iterations and the work they hold, and, per request, the share of it
that is served. What makes it a bound, not an estimate:

- An iteration's time without noise is at least a convex, piecewise linear function of what it holds: the lower convex
  hull of its cost by tokens, plus costs linear in contexts, images and sampled tokens. By convexity the iterations of a
  bin take at least as long as that many iterations of their mean, which is linear in the variables (the perspective).
- Requests owe what no schedule saves them: prompt tokens not cached from elsewhere, attention of the prompt (the same
  however it is chunked), one decode per further token with its context.
- Work lies between arrival and the last moment at which the promise is still kept, windows rounded outwards to bins.
  A request that waits for another's answer may come as soon as if that took no time, and as late as one likes.
- What was computed before the warm-up ended and is of use after it lies in the caches at that moment, or is computed
  again: tokens once generated are kept, their keys and values are not.
- An iteration holds at most its token budget, seats and cache. A request gets one token an iteration.
- Blocks are counted as tokens, swapping is free, and served shares are fractions: all in the policy's favour.

One way around it is left out: a policy could preempt a decoding request and take it back at once, its blocks still
cached, so that the next token comes from a chunk at a chunk's price for context; admission is closed in the iteration
that preempts, so this gains nothing in practice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from flexirl.envs.fleet import Task
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.fits import fits
from flexirl.runtime.profile.step_time import BATCH, step_time
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.workloads.trace import IMMEDIATE, Trace

BINS = 50
PIECES = 8  # a window of many bins is rounded outwards to multiples of this part of it, so that many share one
NOISE_DEVIATIONS = 3.0  # the surrogate cuts noise there: no iteration is faster
SLACK = 1e-6  # relative: what the solver's tolerances may cost

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


def upper_bound(task: Task, trace: Trace, bins: int = BINS) -> float:
    """Price units per second that no policy exceeds on this episode of the task."""
    return revenue_bound(task.engine, trace, task.prices, task.duration_s(), task.scenario.warmup_s, bins)


def revenue_bound(
    engine: EngineProfile, trace: Trace, prices: Prices, duration_s: float, warmup_s: float = 0.0, bins: int = BINS
) -> float:
    """The bound on `revenue_per_s` of a run of `duration_s`, accounted from `warmup_s` on; see the module's text.

    With step-time noise every iteration is taken to be as fast as noise can make it, which is safe and loose.
    """
    work = _Work.of(engine.values, trace, prices, duration_s, warmup_s)
    if len(work.pays) == 0:
        return 0.0
    budgets_s = np.full(bins, duration_s / bins) * np.exp(NOISE_DEVIATIONS * float(engine.values["noise"]))
    budgets_s[-1] += _longest_step_s(engine.values, trace)  # the last iteration may end after the episode
    programme = _Programme()
    served = programme.variables(-work.pays, upper=1.0)
    load = _Load(programme, bins)
    windows = [np.clip(times_s / duration_s * bins, 0, bins - 1).astype(int) for times_s in work.times_s]
    early = int(warmup_s / duration_s * bins)  # bins that end with the warm-up at the latest
    begun = programme.variables(np.zeros(len(served)), upper=1.0)
    held = programme.variables(np.zeros(len(served)), upper=1.0)
    _add_prefill(programme, load, work, (served, begun, held), windows[0], windows[1], early)
    _add_decodes(programme, load, work, (served, begun), windows[0], windows[2], early)
    _add_warm_up(programme, engine.values, work, served, begun, held)
    _add_iterations(programme, load, engine.values, budgets_s)
    return programme.maximum() * (1 + SLACK) / (duration_s - warmup_s)


@dataclass(frozen=True)
class _Work:
    """What each request that could pay (R,) owes and when.

    times_s: arrival, and when the first and the last token are due at the latest; prompt_s: seconds that the prompt
    costs beside its tokens (attention, images, sampling); context: tokens that all decodes attend to together.
    """

    times_s: tuple[Floats, Floats, Floats]
    pays: Floats
    prompt: Floats
    prompt_s: Floats
    decodes: Floats
    context: Floats

    @classmethod
    def of(cls, engine: np.ndarray, trace: Trace, prices: Prices, duration_s: float, warmup_s: float) -> _Work:
        rows = trace.rows
        block_size = int(engine["block_size"])
        prompt, output = rows["prompt_tokens"].astype(float), rows["output_tokens"].astype(float)
        cached = np.zeros(len(rows))
        if engine["prefix_caching"]:
            cached = np.minimum(rows["prefix_tokens"], rows["prompt_tokens"] - 1) // block_size * float(block_size)
        images = rows["num_images"].astype(float)
        length = np.maximum(rows["image_tokens"], 1).astype(float)  # 1 where there is none, to divide by
        encoded = np.maximum(images - np.ceil(cached * images / length), 0.0) * (
            rows["image_tokens"] / np.maximum(images, 1)
        )
        decodes = output - 1
        context = decodes * prompt + decodes * output / 2
        prompt_s = (
            engine["per_chunk_context_s"] * (prompt**2 - cached**2) / 2
            + engine["per_image_token_s"] * encoded
            + engine["per_sequence_s"]
        )
        arrival_s, latest_s = _arrivals(rows)
        due_s = latest_s + rows["window_s"]
        first_due_s = np.minimum(due_s, latest_s + rows["ttft_slo_s"])
        paced_s = np.where(decodes > 0, rows["tpot_slo_s"], 0.0) * np.maximum(decodes, 1.0) * (1 + SLACK)
        due_s = np.minimum(due_s, np.where(rows["request_class"] == IMMEDIATE, first_due_s + paced_s, np.inf))
        # Run alone, in as few and as cheap iterations as it can be.
        speed = np.exp(-NOISE_DEVIATIONS * float(engine["noise"]))
        least_s, token_s = engine["base_s"] + engine["host_s"], engine["per_token_s"]
        prefill_s = np.ceil((prompt - cached) / engine["max_tokens_per_step"]) * least_s + token_s * (prompt - cached)
        prefill_s = speed * (prefill_s + prompt_s)
        decode_s = speed * (
            (least_s + token_s + engine["per_sequence_s"]) * decodes + engine["per_context_s"] * context
        )
        end_s = duration_s + _longest_step_s(engine, trace) / speed
        in_time = (arrival_s + prefill_s <= first_due_s) & (
            arrival_s + prefill_s + decode_s <= np.minimum(due_s, end_s)
        )
        able = fits(engine, rows) & in_time & (due_s >= warmup_s)
        columns = (prices.of(rows), prompt - cached, prompt_s, decodes, context)
        return cls((arrival_s[able], first_due_s[able], due_s[able]), *(column[able] for column in columns))


def _arrivals(rows: np.ndarray) -> tuple[Floats, Floats]:
    """When each request comes at the earliest and at the latest."""
    earliest_s, latest_s = rows["arrival_s"].copy(), rows["arrival_s"].copy()
    for r in np.flatnonzero(rows["follows"]).tolist():  # those they wait for stand above
        earliest_s[r] = earliest_s[r - rows["follows"][r]] + rows["delay_s"][r]
        latest_s[r] = np.inf
    return earliest_s, latest_s


class _Programme:
    """A linear programme, put together piece by piece: all constraints are sums of at most 0 or of at most a number."""

    def __init__(self) -> None:
        self._costs: list[Floats] = []
        self._upper: list[Floats] = []
        self._entries: list[tuple[Numbers, Numbers, Floats]] = []
        self._limits: list[Floats] = []
        self._columns = self._rows = 0

    def variables(self, costs: ArrayLike, upper: float = np.inf) -> Numbers:
        """Numbers of new variables from 0 to `upper`, one for each of `costs`."""
        new = np.asarray(costs, dtype=float)
        self._costs.append(new)
        self._upper.append(np.full(len(new), upper))
        self._columns += len(new)
        return np.arange(self._columns - len(new), self._columns)

    def constraints(self, limits: ArrayLike) -> Numbers:
        """Numbers of new constraints, sums of at most `limits`."""
        new = np.asarray(limits, dtype=float)
        self._limits.append(new)
        self._rows += len(new)
        return np.arange(self._rows - len(new), self._rows)

    def add(self, rows: Numbers, columns: Numbers, factors: ArrayLike) -> None:
        """Adds factor x variable to constraints; the three arrays are broadcast."""
        row, column, factor = np.broadcast_arrays(rows, columns, np.asarray(factors, dtype=float))
        self._entries.append((row.ravel(), column.ravel(), factor.ravel()))

    def maximum(self) -> float:
        """The negative of the least cost."""
        rows, columns, factors = (np.concatenate(parts) for parts in zip(*self._entries, strict=True))
        matrix = csr_array((factors, (rows, columns)), shape=(self._rows, self._columns))
        upper = np.concatenate(self._upper)
        found = linprog(
            np.concatenate(self._costs), A_ub=matrix, b_ub=np.concatenate(self._limits),
            bounds=np.column_stack([np.zeros(len(upper)), upper]), method="highs-ipm",
        )  # fmt: skip
        if found.status != 0:
            raise RuntimeError(f"the upper bound was not solved: {found.message}")
        return -float(found.fun)


class _Load:
    """What the iterations of each bin hold, as variables by bin: collected while requests are added."""

    def __init__(self, programme: _Programme, bins: int) -> None:
        self.bins = bins
        self.iterations = programme.variables(np.zeros(bins))
        self.prefill: list[tuple[Numbers, Numbers]] = []  # bins, variables
        self.prompt_s: list[tuple[Numbers, Numbers]] = []
        self.decodes: list[tuple[Numbers, Numbers]] = []
        self.context: list[tuple[Numbers, Numbers]] = []


def _groups(first: Numbers, last: Numbers, bins: int) -> list[tuple[Numbers, Numbers]]:
    """Requests whose windows of bins, rounded outwards, are the same: the bins, and the numbers of the requests."""
    step = np.maximum((last - first + 1) // PIECES, 1)
    first, last = first // step * step, np.minimum(-(-(last + 1) // step) * step, bins) - 1
    windows, group = np.unique(np.column_stack([first, last]), axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group.ravel()))[:-1])
    return [(np.arange(a, b + 1), numbers) for (a, b), numbers in zip(windows, members, strict=True)]


def _spread(programme: _Programme, window: Numbers, served: Numbers, owed: Floats) -> Numbers:
    """Variables for the bins of a window among which what the served requests owe is divided."""
    parts = programme.variables(np.zeros(len(window)))
    row = programme.constraints([0.0])
    programme.add(row, served, owed)
    programme.add(row, parts, -1.0)
    return parts


def _add_prefill(
    programme: _Programme, load: _Load, work: _Work, shares: tuple[Numbers, Numbers, Numbers], first: Numbers,
    last: Numbers, early: int,
) -> None:  # fmt: skip
    """Prompts; shares: served, begun before the moment `early`, and held across it. What is not held comes after it."""
    for window, members in _groups(first, last, load.bins):
        served, begun, held = (share[members] for share in shares)
        prompt = work.prompt[members]
        tokens = _spread(programme, window, served, prompt)
        load.prefill.append((window, tokens))
        load.prompt_s.append((window, _spread(programme, window, served, work.prompt_s[members])))
        before, after = programme.constraints([0.0, 0.0])[:, None]
        programme.add(before, begun, prompt)
        programme.add(before, tokens[window < early], -1.0)
        # A first token that is due before the last may come in time and its prompt be computed again at any time.
        again = work.times_s[1][members] == work.times_s[2][members]
        programme.add(after, served[again], prompt[again])
        programme.add(after, held[again], -prompt[again])
        programme.add(after, tokens[window >= early], -1.0)


def _add_decodes(
    programme: _Programme, load: _Load, work: _Work, shares: tuple[Numbers, Numbers], first: Numbers, last: Numbers,
    early: int,
) -> None:  # fmt: skip
    """Tokens after the first; before the moment `early` only of requests (shares: served, begun) begun by then."""
    for window, members in _groups(first, last, load.bins):
        served, begun = (share[members] for share in shares)
        for owed, held in ((work.decodes[members], load.decodes), (work.context[members], load.context)):
            parts = _spread(programme, window, served, owed)
            held.append((window, parts))
            row = programme.constraints([0.0])
            programme.add(row, begun, -owed)
            programme.add(row, parts[window < early], 1.0)
        # One token a request and iteration.
        rows = programme.constraints(np.zeros(len(window)))
        programme.add(rows, load.decodes[-1][1], 1.0)
        programme.add(rows, load.iterations[window], -float(len(members)))


def _add_warm_up(
    programme: _Programme, engine: np.ndarray, work: _Work, served: Numbers, begun: Numbers, held: Numbers
) -> None:
    """What is held was begun, what was begun is served; the caches, the host's included, hold only so much."""
    for less, more in ((held, begun), (begun, served)):
        rows = programme.constraints(np.zeros(len(less)))
        programme.add(rows, less, 1.0)
        programme.add(rows, more, -1.0)
    room = float(engine["kv_blocks"] + engine["host_kv_blocks"]) * float(engine["block_size"])
    programme.add(programme.constraints([room]), held, work.prompt)


def _add_iterations(programme: _Programme, load: _Load, engine: np.ndarray, budgets_s: Floats) -> None:
    """What iterations can hold, and that their time fits into the bins."""
    bins = load.bins
    prefill, prompt_s, decodes, context = (
        tuple(np.concatenate(parts) for parts in zip(*held, strict=True))
        for held in (load.prefill, load.prompt_s, load.decodes, load.context)
    )
    iterations = load.iterations

    def limit(per_iteration: float, *held: tuple[Numbers, ...]) -> None:
        rows = programme.constraints(np.zeros(bins))
        programme.add(rows, iterations, -per_iteration)
        for at, variables in held:
            programme.add(rows[at], variables, 1.0)

    limit(float(engine["max_tokens_per_step"]), prefill, decodes)
    limit(float(engine["max_running"]), decodes)
    limit(float(engine["kv_blocks"]) * float(engine["block_size"]), context, prefill)
    tokens_s = programme.variables(np.zeros(bins))
    for constant_s, slope_s in token_cost_hull(engine):
        rows = programme.constraints(np.zeros(bins))
        programme.add(rows, iterations, constant_s)
        programme.add(rows, tokens_s, -1.0)
        for at, variables in (prefill, decodes):
            programme.add(rows[at], variables, slope_s)
    rows = programme.constraints(budgets_s)
    programme.add(rows, tokens_s, 1.0)
    programme.add(rows[prefill[0]], prefill[1], float(engine["mixed_s"]) / float(engine["max_tokens_per_step"]))
    programme.add(rows[prompt_s[0]], prompt_s[1], 1.0)
    programme.add(rows[decodes[0]], decodes[1], float(engine["per_sequence_s"]))
    programme.add(rows[context[0]], context[1], float(engine["per_context_s"]))


def token_cost_hull(engine: np.ndarray) -> list[tuple[float, float]]:
    """The lower convex hull of an iteration's time by its tokens: pieces (constant, slope) in seconds.

    At every number of tokens from 1 to the engine's budget the greatest of constant + slope x tokens is at most the
    iteration's time, and reaches it at the corners of the hull (Andrew's monotone chain, 1979).
    """
    hull: list[tuple[float, float]] = []
    for tokens in range(1, int(engine["max_tokens_per_step"]) + 1):
        point = (float(tokens), _tokens_s(engine, tokens))
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    if len(hull) == 1:
        return [(hull[0][1], 0.0)]
    slopes = [_slope(a, b) for a, b in pairwise(hull)]
    return [(y - slope * x, slope) for (x, y), slope in zip(hull, slopes, strict=False)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _tokens_s(engine: np.ndarray, tokens: int) -> float:
    """Seconds of an iteration of decodes that sample and attend for free."""
    batch = np.zeros((), dtype=BATCH)
    batch["decode_sequences"] = tokens
    return float(step_time(engine, batch[()]))


def _longest_step_s(engine: np.ndarray, trace: Trace) -> float:
    """Seconds that no iteration exceeds, swapping and noise aside."""
    rows = trace.rows
    seats, tokens = float(engine["max_running"]), float(engine["max_tokens_per_step"])
    batch = np.zeros((), dtype=BATCH)
    batch["prefill_tokens"] = tokens
    batch["sampled_sequences"] = seats
    batch["decode_context"] = float(engine["kv_blocks"]) * float(engine["block_size"])
    batch["chunk_context"] = tokens * float((rows["prompt_tokens"] + rows["output_tokens"]).max(initial=0))
    batch["image_tokens"] = seats * float((rows["image_tokens"] / np.maximum(rows["num_images"], 1)).max(initial=0.0))
    batch["image_tokens"] = min(float(batch["image_tokens"]), float(rows["image_tokens"].sum()))
    return float(step_time(engine, batch[()]))
