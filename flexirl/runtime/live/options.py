"""What a live engine may be told beside its executor, its policy and its promise; all of it has a default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.clock import Clock
from flexirl.runtime.live.requests import Completion
from flexirl.runtime.live.shadow import Shadow
from flexirl.runtime.live.step import Step


@dataclass(frozen=True)
class Options:
    """tokenizer: of the model, for texts and stop strings; clock: see `flexirl.runtime.live.clock`, None the wall's;
    interval_s: seconds between decisions, for a policy that is not asked every iteration, None as it was trained;
    max_requests: waiting and running at once; save_blocks: blocks of deferred requests copied to host memory ahead
    of a preemption, per iteration; safepoints: an iteration of deferred work alone is broken off when an immediate
    request arrives; separate_caches: what one tenant has sent is not found in the prefix cache by another, who could
    tell by the time it takes; seed: of requests that sample without one; fallback: decides where the policy fails,
    None the default decision; shadow: see `flexirl.runtime.live.shadow`; on_end: called with every completion, one
    after the other, from a thread beside the engine's; on_step: called with every iteration, in the engine's thread
    and time.
    """

    tokenizer: Any = None
    clock: Clock | None = None
    interval_s: float | None = None
    max_requests: int = 4096
    num_tenants: int = 1
    save_blocks: int = 0
    safepoints: bool = True
    separate_caches: bool = False
    seed: int = 0
    fallback: Policy | None = None
    shadow: Shadow | None = None
    on_end: Callable[[Completion], None] | None = None
    on_step: Callable[[Step], None] | None = None


DEFAULTS = Options()
