"""What an iteration came to, booked: progress, tokens, broken promises, who ended; or that it was broken off."""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.books import (
    OUTPUT_SERVICE,
    book_first_token,
    book_prompt,
    compact,
    end_running,
    itl_bin,
    last_token_due_s,
    overdue,
    patience_ends_s,
    settle_first_tokens,
    settle_running,
    total_blocks,
)
from flexirl.runtime.scheduler.kv_cache import blocks_for, share, trim
from flexirl.runtime.scheduler.queues import owed_tokens
from flexirl.runtime.scheduler.state import (
    FINISHED,
    State,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@compiled
def commit(state: State, elapsed_s: float) -> None:
    """Books the planned iteration, which took `elapsed_s` seconds: progress, tokens, broken promises, who ended."""
    scheduler = state.scheduler[0]
    began_s = scheduler.now_s
    now_s = began_s + elapsed_s
    scheduler.now_s = now_s
    scheduler.iterations += 1
    scheduler.busy_s += elapsed_s
    scheduler.kv_block_s += elapsed_s * (total_blocks(state) - scheduler.free_blocks)
    state.batch[0].swap_tokens = 0.0
    one_tenant = len(state.tenants) == 1
    tokens_made, immediate_tokens, first_tokens, paused = 0, 0, 0, 0  # all but the first of immediate requests
    kept = 0
    for i in range(scheduler.running):
        r = state.running[i]
        request = state.requests[np.uintp(r)]
        tokens = request.scheduled
        if tokens > 0:
            request.scheduled = 0
            request.computed += tokens
            if request.computed <= request.prompt_tokens:
                book_prompt(state, r)
                if request.content_count > 0:
                    share(state, r)
            if owed_tokens(request) == 0:
                request.generated += 1
                is_immediate = request.request_class == IMMEDIATE
                immediate_tokens += is_immediate
                tokens_made += 1
                if not one_tenant:
                    state.tenants[request.tenant].service += OUTPUT_SERVICE
                if request.generated == 1:
                    first_tokens += is_immediate
                    book_first_token(state, r, now_s)
                elif is_immediate & (request.last_token_s != began_s):  # it paused
                    paused += 1
                    state.itl_histogram[itl_bin(now_s - request.last_token_s)] += 1
                request.last_token_s = now_s
                if request.generated == request.output_tokens:
                    request.status = FINISHED
                    end_running(state, r, now_s)
                    continue
        if overdue(scheduler, request) and settle_running(state, r):
            continue
        state.running[np.uintp(kept)] = r
        kept += 1
    scheduler.running = kept
    if immediate_tokens > 0:
        state.itl_histogram[itl_bin(elapsed_s)] += immediate_tokens - first_tokens - paused
    state.classes[IMMEDIATE].output_done += immediate_tokens
    state.classes[DEFERRED].output_done += tokens_made - immediate_tokens
    if one_tenant:
        state.tenants[0].service += OUTPUT_SERVICE * tokens_made
    settle_first_tokens(state)


@compiled
def stop_after(state: State, r: int) -> None:
    """Makes the token that request r samples in the planned iteration its last one.

    A live engine does not know an output's length before it ends: until then `output_tokens` is `max_tokens`, and what
    was counted on it is put right here, between `plan` and `commit`.
    """
    request = state.requests[r]
    group = state.classes[request.request_class]
    shorter = request.generated + 1 - request.output_tokens
    if request.missed == 1:
        group.lost_output += shorter
    group.forgone_output += request.forgone * shorter
    ends_s = patience_ends_s(state, request)
    if request.request_class == IMMEDIATE and request.first_token_s > ends_s and state.scheduler[0].now_s > ends_s:
        group.given_up_output += shorter
    request.output_tokens = request.generated + 1
    if request.request_class == IMMEDIATE and request.generated > 0:
        request.deadline_s = min(request.deadline_s, last_token_due_s(request, request.first_token_s))


@compiled
def abandon(state: State, elapsed_s: float) -> None:
    """Books that the planned iteration was broken off after `elapsed_s` seconds: none of its tokens was computed."""
    scheduler = state.scheduler[0]
    scheduler.now_s += elapsed_s
    scheduler.busy_s += elapsed_s
    scheduler.kv_block_s += elapsed_s * (total_blocks(state) - scheduler.free_blocks)
    state.batch[0].swap_tokens = 0.0
    for i in range(scheduler.running):
        r = state.running[i]
        if state.requests[r].scheduled > 0:
            state.requests[r].scheduled = 0
            trim(state, r, blocks_for(state.requests[r].computed, state.engine[0].block_size))
    settle(state)


@compiled
def settle(state: State) -> None:
    """Books what fell due while the clock moved without an iteration: broken promises, windows that closed."""
    scheduler = state.scheduler[0]
    ended = False
    for i in range(scheduler.running):
        if overdue(scheduler, state.requests[state.running[i]]):
            ended |= settle_running(state, state.running[i])
    if ended:
        compact(state)
    settle_first_tokens(state)
