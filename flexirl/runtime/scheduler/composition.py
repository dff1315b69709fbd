"""What a request adds to the iteration being planned: how long a chunk may be, and what it adds to the features."""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.profile.step_time import step_time_with_chunk, step_time_with_decodes
from flexirl.runtime.scheduler.books import best_effort
from flexirl.runtime.scheduler.queues import owed_tokens
from flexirl.runtime.scheduler.state import State

# Immediate prefill always advances by this much, whatever its step target: chunks this small are all but free.
MIN_CHUNK = 64


@compiled
def chunk_within_target(state: State, r: int, start: int) -> int:
    """Tokens of request r to prefill from position `start`: within budget and the step target of its kind of work."""
    scheduler, batch = state.scheduler[0], state.batch[0]
    engine, request = state.engine[0], state.requests[r]
    limit = min(request.prompt_tokens + request.generated - start, scheduler.budget)
    waits = best_effort(request)
    target_s = scheduler.deferred_target_s if waits else scheduler.immediate_target_s
    if target_s == np.inf or limit <= 0 or _step_with(engine, batch, request, start, limit) <= target_s:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if _step_with(engine, batch, request, start, middle) <= target_s:
            low = middle
        else:
            high = middle
    if waits:
        return max(low, min(limit, max(scheduler.deferred_floor, 0)))
    if batch.prefill_tokens == 0:
        return max(low, min(limit, MIN_CHUNK))
    return low


@nb.njit(cache=True, inline="always")
def _step_with(engine, batch, request, start: int, tokens: int) -> float:
    """Predicted seconds of the iteration if `tokens` of a request, from position `start` on, joined it."""
    samples = start + tokens == request.prompt_tokens + request.generated
    if samples and tokens == 1 and request.generated > 0:
        return step_time_with_decodes(engine, batch, 1, start + 1.0)
    step_s = step_time_with_chunk(engine, batch, start, tokens, image_tokens_of_chunk(request, start, tokens))
    return step_s + engine.per_sequence_s if samples else step_s


@compiled
def image_tokens_of_chunk(request, start: int, tokens: int) -> float:
    """Image tokens to encode for a chunk: images stand at the front of the prompt, each is encoded when reached."""
    images, length = np.int64(request.num_images), request.image_tokens
    if images == 0 or start >= length:
        return 0.0
    # In whole numbers: images reached by a position, counted in floating point, can come out as one too many.
    end = min(start + tokens, length)
    reached = (end * images + length - 1) // length - (start * images + length - 1) // length
    return reached * (length / images)


@nb.njit(cache=True, inline="always")
def enlist(scheduler, batch, request, tokens: int) -> None:
    """Adds `tokens` of a running request to the iteration."""
    count_in_batch(scheduler, batch, request, tokens, 1)
    request.scheduled = tokens


@nb.njit(cache=True, inline="always")
def count_in_batch(scheduler, batch, request, tokens: int, sign: int) -> None:
    scheduler.budget -= sign * tokens
    if best_effort(request):
        scheduler.deferred_floor -= sign * tokens
    owed = owed_tokens(request)
    if owed == 1 and request.generated > 0:
        batch.decode_sequences += sign
        batch.decode_context += sign * (request.computed + 1.0)
    else:
        batch.prefill_tokens += sign * tokens
        batch.chunk_context += sign * (float(tokens) * request.computed + 0.5 * float(tokens) * tokens)
        batch.image_tokens += sign * image_tokens_of_chunk(request, request.computed, tokens)
    if tokens == owed:
        batch.sampled_sequences += sign
