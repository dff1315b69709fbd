"""vLLM's scheduler with a FlexiRL policy in charge: who joins, who gets how many tokens, who has to leave.

vLLM's own `schedule` still allocates blocks and builds its output, so whatever else it does keeps working. Before it
runs, a plan is made (`mirror.py`) and handed to it in the ways it has itself: those evicted are preempted, those who
may join are all that it finds in its queue, and those who are to compute less are cut where vLLM cuts chunks.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from flexirl.errors import UserError
from flexirl.policies.registry import make_policy
from flexirl.runtime.profile.engine import EngineProfile, load_profile
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.vllm.classes import default_wish, read_wish
from flexirl.vllm.deciding import Deciding, Failures
from flexirl.vllm.mirror import COMPUTED, GENERATED, TOLD, Mirror, Plan
from flexirl.vllm.settings import LEAST_WORK, check_version, read_settings
from flexirl.vllm.step_time import OnlineFit
from flexirl.vllm.waiting import OfferedQueue
from flexirl.workloads.slo import SLO

_LOG = init_logger("vllm.flexirl")
_LOOK_AGAIN_STEPS = 64  # between two looks for the cached prefix of a waiting request
_OVERDUE_S = 1.0  # between two looks for requests that were given up too long ago


class _Step(NamedTuple):
    """A step that vLLM has scheduled and not heard of yet. batch: its `BATCH` record, None if it went another way."""

    output: int
    batch: np.ndarray | None
    tokens: int
    scheduled_s: float
    predicted_s: float


class Scheduler(AsyncScheduler):
    """See above. failures: what fell back to vLLM's own order, by reason; mirror, deciding, fit: its parts.

    Raises UserError, as the server starts, for settings that mean nothing and for a version of vLLM it does not know.
    """

    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = read_settings(self.vllm_config.additional_config)
        check_version(vllm.__version__, self.settings.any_version)
        self.failures = Failures()
        self.clock = time.monotonic
        self._began_s, self._began_wall_s = self.clock(), time.time()
        self._own_policy = self.policy
        self.waiting = OfferedQueue(self.policy == SchedulingPolicy.PRIORITY)
        self._caps: dict[str, int] = {}
        self._steps: deque[_Step] = deque()
        self._heard_s = self._next_overdue_s = 0.0
        self._tenants: dict[str, int] = {}
        self._place_of: dict[str, int] = {}
        self._unready: list[Request] = []
        self._outside: deque[Request] = deque()
        self._overdue: list[Request] = []
        profile = load_profile(self.settings.profile).replace(**self._limits())
        self._profile = EngineProfile("vllm", profile.values, profile.origin, profile.fit)
        self._slo = SLO(self.settings.ttft_s, self.settings.tpot_s)
        policy = make_policy(self.settings.policy, self.settings.knobs)
        self.deciding = Deciding(policy, self.settings.interval_s, self.settings.time_limit_s, self.failures)
        self._start()
        _LOG.info("FlexiRL's policy %s schedules.", policy.name)

    def _limits(self) -> dict[str, float]:
        """This engine's limits, in the terms of a profile. The first block of a cache is none to be used."""
        groups = len(self.kv_cache_config.kv_cache_groups) or 1
        return {
            "kv_blocks": max(self.kv_cache_manager.block_pool.num_gpu_blocks - 1, 1),
            "host_kv_blocks": 0,
            "block_size": max(self.block_size // groups, 1),  # tokens per block of the pool that all groups share
            "max_tokens_per_step": self.max_num_scheduled_tokens,
            "max_running": self.max_num_active_reqs,
            "max_model_len": self.max_model_len,
            "prefix_caching": int(self.cache_config.enable_prefix_caching),
            "noise": 0.0,
        }

    def _start(self) -> None:
        """A mirror of the engine as it stands, and a policy that has seen nothing."""
        self.mirror = Mirror(self._profile, self.settings.max_requests, self.settings.tenants)
        self.lookout = Lookout(self.mirror.state, self._slo)
        self.fit = OnlineFit(self.mirror.state.engine[0])
        self.deciding.start(self.lookout.view)
        self._prefix = self.mirror.state.requests["prefix_tokens"]
        self._looked = np.full(self.settings.max_requests, -_LOOK_AGAIN_STEPS)
        self._place_of.clear()
        for request in self.requests.values():
            request.flexirl_place = -1
        self._unready, self._outside, self._overdue = [], deque(), []
        self.waiting.arrived = list(self.waiting)

    def _now_s(self) -> float:
        return self.clock() - self._began_s

    # ------------------------------------------------------------------------------------------- what vLLM calls

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """See vLLM's scheduler."""
        plan = None
        if self._pause_state == PauseState.UNPAUSED:
            try:
                plan = self._plan()
            except Exception as error:  # of ours: requests must not suffer for it
                self.failures.count("plan", "FlexiRL's plan failed; vLLM's own order holds for the step", error)
                self._start()
        try:
            if plan is not None:
                self.policy = SchedulingPolicy.FCFS  # whoever comes last in the running list is its victim
            output: SchedulerOutput = super().schedule(throttle_prefills)
        finally:
            self.policy = self._own_policy
            self.waiting.withdraw()
            self._caps = {}
        batch = None if plan is None else self.mirror.state.batch[0].copy()
        if batch is not None and self.num_spec_tokens == 0:
            planned = batch["prefill_tokens"] + batch["decode_sequences"]
            batch = batch if planned == output.total_num_scheduled_tokens else None
        predicted_s = 0.0 if plan is None else plan.step_s
        tokens = output.total_num_scheduled_tokens
        self._steps.append(_Step(id(output), batch, tokens, self._now_s(), predicted_s))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """See vLLM's scheduler."""
        now_s = self._now_s()
        while self._steps:
            step = self._steps.popleft()
            if step.output == id(scheduler_output):
                self._hear(step, now_s)
                break
        return super().update_from_output(scheduler_output, model_runner_output)

    def add_request(self, request: Request) -> None:
        """See vLLM's scheduler."""
        request.flexirl_place = -1
        super().add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        place = self._place_of.pop(request.request_id, None)
        if place is not None:
            finished = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
            self.mirror.end(place, finished, len(request._output_token_ids), self._now_s())
        return super()._free_request(request, delay_free_blocks)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        if self._caps and request.request_id in self._caps:
            cap = self._caps[request.request_id]
            if cap == 0 or (cap < num_new_tokens and self._may_be_cut(request)):
                num_new_tokens = cap
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return tokens

    def _may_be_cut(self, request: Request) -> bool:
        """False where vLLM has its own mind about where chunks end."""
        whole = self.need_mamba_block_aligned_split or not self.scheduler_config.enable_chunked_prefill
        return not (whole or request.has_encoder_inputs or request.pooling_params is not None)

    # -------------------------------------------------------------------------------------------- before a step

    def _plan(self) -> Plan | None:
        """Plans a step and hands the plan to vLLM; None if vLLM's own order is to hold."""
        now_s = self._now_s()
        self._follow(now_s)
        decision = None
        if self.deciding.due(now_s):
            decision = self.deciding.ask(self.lookout, now_s)
            if decision is None:
                return None
        if now_s >= self._next_overdue_s:
            self._next_overdue_s = now_s + _OVERDUE_S
            self._overdue += self._requests_at(self.mirror.overdue(now_s, self.settings.relegated_wait_s))
        self._look_for_prefixes()
        # What is on its way has to end first, and what it makes is counted already.
        begins_s = now_s
        if self._steps:
            device_s = max(self._heard_s, self._steps[0].scheduled_s)
            begins_s = max(now_s, device_s + sum(step.predicted_s for step in self._steps))
        plan = self.mirror.plan(decision, self.settings.victims == LEAST_WORK, begins_s)
        self._carry_out(plan)
        return plan

    def _follow(self, now_s: float) -> None:
        """Tells the mirror of all that vLLM did since the last step."""
        mirror, running = self.mirror, self.running
        self._overdue = [request for request in self._overdue if request in self.waiting]
        count = len(running)
        places = [request.flexirl_place for request in running]
        if -1 in places:
            places = [self._place(request) for request in running]
        told = [len(request._output_token_ids) for request in running]
        mirror.numbers[:count] = places
        mirror.figures[COMPUTED, :count] = [request.num_computed_tokens for request in running]
        mirror.figures[TOLD, :count] = told
        mirror.figures[GENERATED, :count] = [request.num_output_placeholders for request in running]
        mirror.figures[GENERATED, :count] += mirror.figures[TOLD, :count]
        manager = self.kv_cache_manager
        free_blocks = manager.block_pool.get_num_free_blocks()
        if self.waiting:  # vLLM lets nobody join below its watermark
            free_blocks = max(free_blocks - manager.watermark_blocks, 0)
        for request in self._requests_at(mirror.follow(count, free_blocks, now_s)):
            if request in self.waiting:
                self.waiting.arrived.append(request)
        if self.waiting.arrived or self._unready or self._outside:
            self._take_in()

    def _take_in(self) -> None:
        """Queues in the mirror whoever waits in vLLM's queue and could run."""
        arrived = self._unready + self.waiting.arrived
        self._unready, self.waiting.arrived = [], []
        for _ in range(min(len(self._outside), self.mirror.places_left)):
            arrived.append(self._outside.popleft())
        for request in arrived:
            if request not in self.waiting or request in self._overdue:
                continue
            if self._is_blocked_waiting_status(request.status) and not self._handle_blocked_waiting_request(request):
                self._unready.append(request)
            elif request.request_id in self._place_of:
                made = request.num_output_tokens
                self.mirror.wait(request.flexirl_place, request.num_computed_tokens, made, request.num_preemptions)
            elif self.mirror.places_left == 0:
                self._outside.append(request)
            else:
                self._place(request)

    def _place(self, request: Request) -> int:
        """The place of a request in the mirror, which it is given if it has none."""
        place = self._place_of.get(request.request_id)
        if place is None:
            place = self._enter(request)
        return place

    def _enter(self, request: Request) -> int:
        params = request.sampling_params
        try:
            wish = read_wish(request.priority, params.extra_args if params is not None else None, self.settings)
        except UserError as error:
            self.failures.count("request", f"{error} Request {request.request_id} counts as immediate.")
            wish = default_wish(self.settings)
        arrival_s = request.arrival_time - self._began_wall_s
        place = self.mirror.enter(
            request,
            arrival_s=min(arrival_s, self._now_s()),
            request_class=wish.request_class,
            ttft_slo_s=wish.ttft_s,
            tpot_slo_s=wish.tpot_s,
            window_s=wish.window_s,
            tenant=self._tenants.setdefault(wish.tenant, len(self._tenants)) % self.settings.tenants,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            num_images=len(request.mm_features),
            image_tokens=sum(feature.mm_position.length for feature in request.mm_features),
        )
        request.flexirl_place = self._place_of[request.request_id] = place
        self._prefix[place] = 0
        self._looked[place] = -_LOOK_AGAIN_STEPS
        return place

    def _requests_at(self, places: list[int]) -> list[Request]:
        requests = self.mirror.request_at
        return [requests[place] for place in places if requests[place] is not None]

    def _look_for_prefixes(self) -> None:
        """Tells the mirror how much of those next in line is in the cache."""
        if not self.cache_config.enable_prefix_caching or not len(self.waiting):
            return
        for place in self.mirror.heads():
            if self.current_step - self._looked[place] >= _LOOK_AGAIN_STEPS:
                self._looked[place] = self.current_step
                self._prefix[place] = self.kv_cache_manager.get_computed_blocks(self.mirror.request_at[place])[1]

    def _carry_out(self, plan: Plan) -> None:
        requests = self.mirror.request_at
        for request in self._requests_at(plan.evicted):
            # What an earlier step may still write to is not given away; the request stays, and the mirror sees it.
            if request.status == RequestStatus.RUNNING and self._request_blocks_can_be_freed(request):
                self.running.remove(request)
                self._preempt_request(request, time.monotonic(), drop_stale_output=self.requires_kv_delivery)
        if self.kv_cache_manager.block_pool.get_num_free_blocks() < 2 * len(self.running):
            order = self._requests_at(self.mirror.victims_last())
            running = [request for request in order if request.status == RequestStatus.RUNNING]
            if len(running) == len(self.running):
                self.running = running
        self._caps = {requests[place].request_id: tokens for place, tokens in plan.cut}
        self.waiting.offer([*self._overdue, *self._requests_at(plan.joined)])

    # --------------------------------------------------------------------------------------------- after a step

    def _hear(self, step: _Step, now_s: float) -> None:
        """A step has ended: how long it had the device to itself teaches what steps take."""
        took_s = now_s - max(self._heard_s, step.scheduled_s)
        self._heard_s = now_s
        if step.tokens == 0:
            return
        scheduler = self.mirror.state.scheduler[0]
        scheduler["iterations"] += 1
        scheduler["busy_s"] += took_s
        if step.batch is not None and took_s > 0:
            self.fit.add(step.batch, step.tokens, took_s)
