"""How a request comes into the scheduler, and how it is taken out again by whoever sent it."""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.profile.fits import longest_sequence
from flexirl.runtime.scheduler.books import (
    book_end,
    compact,
    end_running,
    end_waiting,
    join_tenant,
)
from flexirl.runtime.scheduler.events import add_event
from flexirl.runtime.scheduler.prefix_cache import new_own_origin
from flexirl.runtime.scheduler.queues import push
from flexirl.runtime.scheduler.state import (
    CANCELLED,
    REJECTED,
    RUNNING,
    WAITING,
    State,
)
from flexirl.workloads.trace import IMMEDIATE


@compiled
def fill_in(request, row, arrival_s: float) -> None:
    """Copies what the client asked for from a `TRACE_ROW` record into a `REQUEST` record; `submit` does the rest."""
    request.arrival_s = arrival_s
    request.ttft_deadline_s = arrival_s + row.ttft_slo_s
    request.tpot_slo_s = row.tpot_slo_s
    request.deadline_s = arrival_s + row.window_s
    request.request_class = row.request_class
    request.tenant = row.tenant
    request.prompt_tokens = row.prompt_tokens
    request.output_tokens = row.output_tokens
    request.max_tokens = row.max_tokens
    request.predicted_output_tokens = row.predicted_output_tokens
    request.num_images = row.num_images
    request.image_tokens = row.image_tokens
    request.prefix_tokens = row.prefix_tokens
    request.content_first = row.content_first
    request.content_count = row.content_count


@compiled
def submit(state: State, r: int) -> None:
    """Takes in request r, whose client's side is filled in: queues it, or rejects what could never fit."""
    scheduler, request = state.scheduler[0], state.requests[r]
    group, engine = state.classes[request.request_class], state.engine[0]
    request.generated = 0
    request.computed = 0
    request.scheduled = 0
    request.kv_blocks = 0
    request.host_blocks = 0
    request.saved = 0
    request.unknown = 0
    request.furthest = 0
    request.preemptions = 0
    request.relegated = 0
    request.missed = 0
    request.forgone = 0.0
    request.score = 1.0 if request.request_class == IMMEDIATE else 0.0
    request.first_token_s = np.inf
    request.last_token_s = np.inf
    request.finish_s = np.inf
    new_own_origin(state, r)
    group.arrived += 1
    group.arrived_prompt += request.prompt_tokens
    join_tenant(state, request.tenant)
    if request.prompt_tokens + request.max_tokens > longest_sequence(engine):
        request.status = REJECTED
        book_end(state, r, scheduler.now_s)
        return
    if request.request_class == IMMEDIATE and request.ttft_deadline_s < np.inf:
        scheduler.promised = add_event(state.promises, scheduler.promised, request.ttft_deadline_s, r)
    push(state, r)


@compiled
def cancel(state: State, r: int) -> None:
    """Ends request r between two iterations and frees all it holds; nothing happens if it has ended already."""
    request = state.requests[r]
    if request.status == RUNNING:
        request.status = CANCELLED
        end_running(state, r, state.scheduler[0].now_s)
        compact(state)
    elif request.status == WAITING:
        end_waiting(state, r, CANCELLED)
