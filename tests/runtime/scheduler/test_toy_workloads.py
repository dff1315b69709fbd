"""Toy workloads whose outcome is known: every time here was computed by hand, in ticks.

An iteration of the toy engine takes 16 ticks and one more for each token in it; it has 8 blocks of 4 tokens.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import TICK_S, ToyRun, deferred, immediate, toy_engine, toy_trace

from flexirl.policies.interface.decision import (
    CHEAPER,
    DEADLINE,
    LAST,
    ONE_QUEUE,
    PRIORITY,
    RECOMPUTE,
    SHORTEST,
    SWAP,
)
from flexirl.runtime.scheduler.composition import image_tokens_of_chunk
from flexirl.runtime.scheduler.state import (
    EXPIRED,
    FINISHED,
    REJECTED,
    REQUEST,
    RUNNING,
    WAITING,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


def in_ticks(times_s: list[float]) -> list[float]:
    return [time_s / TICK_S for time_s in times_s]


def test_one_request() -> None:
    run = ToyRun(toy_engine(), toy_trace(immediate(10 * TICK_S, 8, 3)))
    run.drain()
    assert in_ticks(run["first_token_s"]) == [10 + 24]
    assert in_ticks(run["finish_s"]) == [10 + 24 + 17 + 17]
    assert run.iterations == 3


def test_one_token_without_any_promise() -> None:
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 1, 1)))
    run.drain()
    assert run["status"] == [FINISHED] and run["missed"] == [0]
    assert in_ticks(run["finish_s"]) == [17]


def test_two_requests_share_iterations() -> None:
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 8, 3), immediate(5 * TICK_S, 4, 2)))
    run.drain()
    # Alone to 24; then a decode beside 4 prefill tokens; then two decodes.
    assert in_ticks(run["first_token_s"]) == [24, 24 + 21]
    assert in_ticks(run["finish_s"]) == [24 + 21 + 18, 24 + 21 + 18]


def test_long_prompt_in_chunks_of_the_budget() -> None:
    run = ToyRun(toy_engine(max_tokens_per_step=10), toy_trace(immediate(0, 24, 2)))
    run.drain()
    assert in_ticks(run["first_token_s"]) == [26 + 26 + 20]
    assert in_ticks(run["finish_s"]) == [26 + 26 + 20 + 17]


def test_decodes_go_ahead_of_a_chunk() -> None:
    trace = toy_trace(immediate(0, 4, 3), immediate(TICK_S, 20, 1))
    run = ToyRun(toy_engine(max_tokens_per_step=10), trace)
    run.drain()
    # 4 tokens to 20; then 9 tokens of the second prompt beside each decode; the last 2 tokens alone.
    assert in_ticks(run["finish_s"]) == [20 + 26 + 26, 20 + 26 + 26 + 18]


SHORTAGE = (deferred(0, 12, 6), deferred(0, 12, 6))


@pytest.mark.parametrize(
    ("mode", "caching", "swap_ticks", "finish", "recomputed", "swapped"),
    [
        # 40 for both prompts, four decodes of both, then the first needs a fifth block and evicts the second, which
        # has 16 tokens computed and one more to compute.
        (RECOMPUTE, 0, 0.125, [40 + 72 + 17, 40 + 72 + 17 + 33], 16, 0),
        (RECOMPUTE, 1, 0.125, [40 + 72 + 17, 40 + 72 + 17 + 21], 4, 0),  # three of its four blocks are still there
        (SWAP, 0, 0.125, [40 + 72 + 19, 40 + 72 + 19 + 19], 0, 32),
        (SWAP, 0, 1.0, [40 + 72 + 33, 40 + 72 + 33 + 33], 0, 32),
        (CHEAPER, 0, 0.125, [40 + 72 + 19, 40 + 72 + 19 + 19], 0, 32),  # there and back 4, recomputation 16
        (CHEAPER, 0, 1.0, [40 + 72 + 17, 40 + 72 + 17 + 33], 16, 0),  # there and back 32
    ],
)
def test_shortage_of_memory_takes_one_preemption(
    mode: int, caching: int, swap_ticks: float, finish: list[int], recomputed: int, swapped: int
) -> None:
    engine = toy_engine(prefix_caching=caching, host_kv_blocks=8, per_swap_token_s=swap_ticks * TICK_S)
    run = ToyRun(engine, toy_trace(*SHORTAGE), preemption=mode)
    run.drain()
    assert run["preemptions"] == [0, 1]
    assert in_ticks(run["finish_s"]) == finish
    assert run.state.scheduler["recomputed_tokens"][0] == recomputed
    assert run.state.scheduler["swapped_tokens"][0] == swapped
    assert run.total("prompt_done") == 24 and run.total("output_done") == 12


def test_full_host_memory_leaves_recomputation() -> None:
    run = ToyRun(toy_engine(host_kv_blocks=3), toy_trace(*SHORTAGE), preemption=SWAP)
    run.drain()
    assert run.state.scheduler["recomputed_tokens"][0] == 16 and run.state.scheduler["swapped_tokens"][0] == 0


def test_reserve_avoids_the_preemption() -> None:
    run = ToyRun(toy_engine(), toy_trace(*SHORTAGE), reserve_ratio=1.0, reserve_new_ratio=1.0)
    run.drain()
    alone = 28 + 5 * 17
    assert run["preemptions"] == [0, 0]
    assert in_ticks(run["finish_s"]) == [alone, 2 * alone]


def test_ceiling_gates_deferred_admission_only() -> None:
    several = (*(deferred(0, 13, 3) for _ in range(3)), immediate(30 * TICK_S, 4, 1))
    gated = ToyRun(toy_engine(), toy_trace(*several), deferred_kv_share=0.5)
    gated.drain()
    # 29 for the first prompt; the immediate prompt beside its second token, then the deferred ones one after another.
    assert in_ticks(gated["finish_s"]) == [29 + 17 + 21, 67 + 63, 67 + 63 + 63, 29 + 17 + 21]
    open_ = ToyRun(toy_engine(), toy_trace(*several[:3]))
    open_.drain()
    assert in_ticks(open_["finish_s"])[:2] == [42 + 18 + 18] * 2


def large_engine(**changes: float) -> dict[str, float]:
    return {"kv_blocks": 64, "max_model_len": 256, "max_tokens_per_step": 1024, **changes}


def test_step_target_sizes_the_chunk() -> None:
    trace = toy_trace(immediate(0, 200, 1))
    run = ToyRun(toy_engine(**large_engine()), trace, immediate_step_s=(16 + 90) * TICK_S)
    run.advance(iterations=1)
    assert run["computed"] == [90] and in_ticks([run.now_s]) == [16 + 90]
    run.drain()
    assert in_ticks(run["finish_s"]) == [3 * 16 + 200]


def test_immediate_prefill_always_advances() -> None:
    run = ToyRun(toy_engine(**large_engine()), toy_trace(immediate(0, 100, 1)), immediate_step_s=0.0)
    run.advance(iterations=1)
    assert run["computed"] == [64]


def test_step_target_sizes_a_deferred_chunk_beside_a_decode() -> None:
    trace = toy_trace(immediate(0, 4, 9), deferred(TICK_S, 24, 1))
    run = ToyRun(toy_engine(), trace, deferred_step_s=30 * TICK_S)
    run.advance(iterations=2)
    assert run["computed"] == [5, 13]  # 16 + 1 + 13
    run.decide(deferred_step_s=17 * TICK_S)
    run.advance(iterations=1)
    assert run["computed"] == [6, 13]


def test_last_prompt_token_keeps_to_the_step_target() -> None:
    """The last token of a prompt costs what a chunk beside decodes costs, not what a decode costs."""
    engine = toy_engine(mixed_s=10 * TICK_S)
    run = ToyRun(engine, toy_trace(immediate(0, 4, 12), deferred(TICK_S, 5, 1)), deferred_step_s=31 * TICK_S)
    run.advance(iterations=2)
    assert run["computed"] == [5, 4]  # 16 + 1 + 10 + 4
    run.decide(deferred_step_s=27 * TICK_S)  # a decode more would take 18, the chunk takes 28
    run.advance(iterations=1)
    assert run["computed"] == [6, 4]
    run.decide(deferred_step_s=28 * TICK_S)
    run.advance(iterations=1)
    assert run["computed"] == [7, 5]


def test_token_floor_feeds_deferred_work_below_its_step_target() -> None:
    trace = toy_trace(deferred(0, 5, 3), deferred(0, 4, 2))
    run = ToyRun(toy_engine(), trace, deferred_step_s=0.0, deferred_token_floor=2)
    progress = []
    for _ in range(6):
        run.advance(iterations=1)
        progress.append((*run["computed"], in_ticks([run.now_s])[0]))
    assert progress == [(2, 0, 18), (4, 0, 36), (5, 1, 54), (6, 2, 72), (7, 3, 90), (7, 4, 107)]


def test_deferred_request_expires_waiting() -> None:
    run = ToyRun(toy_engine(), toy_trace(deferred(0, 4, 2, window_s=50 * TICK_S)), deferred_kv_share=0.0)
    run.advance(50 * TICK_S)
    assert run["status"] == [WAITING]
    run.advance(60 * TICK_S)
    run.advance(61 * TICK_S)
    assert run["status"] == [EXPIRED] and in_ticks(run["finish_s"]) == [60]
    assert run.total("lost") == 1 and run.total("void_prompt") == 0


def test_deferred_request_expires_waiting_while_others_decode() -> None:
    trace = toy_trace(immediate(0, 4, 24), deferred(0, 4, 2, window_s=100 * TICK_S))
    run = ToyRun(toy_engine(), trace, deferred_kv_share=0.0)
    run.advance(1.0)
    assert run["status"] == [FINISHED, EXPIRED]
    assert in_ticks(run["finish_s"]) == [20 + 23 * 17, 20 + 5 * 17]  # with the first iteration after its window


def test_slack_of_the_decodes_sizes_the_chunks() -> None:
    """The decode's next token is due 50 ticks after its first; the iteration may take half of what is left."""
    several = (immediate(0, 4, 9, tpot_slo_s=50 * TICK_S), deferred(TICK_S, 24, 1))
    run = ToyRun(toy_engine(), toy_trace(*several), deferred_slack=0.5)
    run.advance(iterations=2)
    assert run["computed"] == [5, 25 - 17]  # from 20 to 45
    run.advance(iterations=1)
    assert run["computed"] == [6, 24]  # due at 120: (120 - 45) / 2 = 37 and 16 tokens owed fit
    both = (several[0], immediate(TICK_S, 200, 1))
    large = ToyRun(toy_engine(**large_engine()), toy_trace(*both), immediate_slack=2.0)
    large.advance(iterations=2)
    assert large["computed"] == [5, 2 * 50 - 17]


def test_deferred_request_expires_running() -> None:
    run = ToyRun(toy_engine(), toy_trace(deferred(0, 4, 8, window_s=60 * TICK_S)))
    run.advance(1.0)
    assert run["status"] == [EXPIRED] and in_ticks(run["finish_s"]) == [20 + 3 * 17]
    assert run.total("void_prompt") == 4 and run.total("void_output") == 4
    assert (run.total("lost_prompt"), run.total("lost_output")) == (4, 8)
    assert run.state.scheduler["free_blocks"][0] == 8


def test_too_long_for_the_engine_is_rejected() -> None:
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 20, 4), immediate(0, 20, 4, max_tokens=13)))
    run.drain()
    assert run["status"] == [FINISHED, REJECTED]
    assert run.total("lost") == 1 and run.total("kept") == 1


def test_image_is_encoded_once_when_reached() -> None:
    engine = toy_engine(max_tokens_per_step=8, per_image_token_s=TICK_S)
    run = ToyRun(engine, toy_trace(immediate(0, 24, 1, num_images=2, image_tokens=20)))
    times = []
    for _ in range(3):
        run.advance(iterations=1)
        times.append(run.now_s)
    # The first image starts at 0, the second at 10; the third chunk reaches none.
    assert in_ticks(np.diff(times, prepend=0.0).tolist()) == [16 + 8 + 10, 16 + 8 + 10, 16 + 8]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_images_are_charged_in_full_however_they_are_cut(chunk: int) -> None:
    record = np.zeros((), dtype=REQUEST)
    for images in range(1, 9):
        for length in range(images, 80):
            record["num_images"], record["image_tokens"], record["prompt_tokens"] = images, length, 90
            charged = [image_tokens_of_chunk(record[()], at, min(chunk, 90 - at)) for at in range(0, 90, chunk)]
            assert math.isclose(sum(charged), length), (images, length)


ONE_SEAT = toy_engine(max_running=1)


def test_earliest_deadline_first_keeps_all_promises() -> None:
    due = (70, 25, 45)
    trace = toy_trace(*(immediate(0, 4, 1, ttft_slo_s=ticks * TICK_S) for ticks in due))
    by_deadline = ToyRun(ONE_SEAT, trace, immediate_order=DEADLINE)
    by_deadline.drain()
    assert in_ticks(by_deadline["finish_s"]) == [60, 20, 40] and by_deadline["missed"] == [0, 0, 0]
    by_arrival = ToyRun(ONE_SEAT, trace)
    by_arrival.drain()
    assert in_ticks(by_arrival["finish_s"]) == [20, 40, 60] and by_arrival["missed"] == [0, 1, 1]


def test_shortest_first_and_the_weight_of_the_deadline_order() -> None:
    trace = toy_trace(immediate(0, 20, 1, ttft_slo_s=40 * TICK_S), immediate(0, 4, 1, ttft_slo_s=44 * TICK_S))
    for order, weight, finish in ((SHORTEST, 0.0, [56, 20]), (DEADLINE, 0.0, [36, 56]), (DEADLINE, 1.0, [56, 20])):
        run = ToyRun(ONE_SEAT, trace, immediate_order=order, order_weight_s=weight * TICK_S)
        run.drain()
        assert in_ticks(run["finish_s"]) == finish


def test_predicted_output_counts_as_the_prefill_that_takes_as_long() -> None:
    """Prefill takes a tick a token, a decode after n tokens 1 + n: 8 + 9 come before 4 + 3 x 5, 10 + 11 after it."""
    for prompt, first in ((8, 0), (10, 1)):
        predicted = [deferred(0, prompt, 1, predicted_output_tokens=1), deferred(0, 4, 3, predicted_output_tokens=3)]
        run = ToyRun(toy_engine(max_running=1, per_context_s=TICK_S), toy_trace(*predicted), deferred_order=SHORTEST)
        run.drain()
        assert int(np.argmin(run["finish_s"])) == first


def test_relegation_lets_the_one_through_that_can_still_make_it() -> None:
    trace = toy_trace(immediate(0, 8, 1, ttft_slo_s=3 * TICK_S), immediate(0, 4, 1, ttft_slo_s=30 * TICK_S))
    for relegate, finish, missed in ((0, [24, 44], [1, 1]), (1, [44, 20], [1, 0])):
        run = ToyRun(ONE_SEAT, trace, relegate=relegate)
        run.drain()
        assert in_ticks(run["finish_s"]) == finish and run["missed"] == missed


def test_a_deferred_request_whose_window_is_too_short_lets_another_one_through() -> None:
    """Both wait for 30 ticks, and each takes 16 + 4 ticks to its first token and 17 to its second: 37.

    The first to be due has 20 left then; half of its window is 25.
    """
    two = (deferred(0, 4, 2, window_s=50 * TICK_S), deferred(0, 4, 2, window_s=100 * TICK_S))
    for margin, kept in ((0, 0), (19, 0), (21, 1), (37, 1)):
        trace = toy_trace(immediate(0, 14, 1), *two)
        run = ToyRun(ONE_SEAT, trace, deferred_order=DEADLINE, deferred_margin_s=margin * TICK_S)
        run.advance()
        assert run.state.classes["kept"][DEFERRED] == kept
        assert run["relegated"] == [0, kept, 0]


def test_the_margin_is_at_most_half_of_the_window() -> None:
    for wait, relegated in ((24, 0), (26, 1)):
        trace = toy_trace(immediate(0, wait - 16, 1), deferred(0, 4, 1, window_s=50 * TICK_S))
        run = ToyRun(ONE_SEAT, trace, deferred_margin_s=40 * TICK_S)
        run.advance()
        assert run["relegated"] == [0, relegated]


def test_cached_prefix_saves_its_blocks_and_counts_against_relegation() -> None:
    for caching, finish, hits in ((1, 20, 4), (0, 24, 0)):
        trace = toy_trace(immediate(0, 8, 1, prefix_tokens=7, ttft_slo_s=30 * TICK_S))
        run = ToyRun(toy_engine(prefix_caching=caching), trace)
        run.drain()
        assert in_ticks(run["finish_s"]) == [finish]
        assert run.state.classes["found_prompt"][IMMEDIATE] == hits
    # 20 tokens cannot be had within 10 ticks, the 4 that are not cached can.
    tight = toy_trace(immediate(0, 20, 1, prefix_tokens=16, ttft_slo_s=10 * TICK_S))
    for caching, relegated in ((1, 0), (0, 1)):
        run = ToyRun(toy_engine(prefix_caching=caching), tight, relegate=1)
        run.drain()
        assert run["relegated"] == [relegated]


def test_immediate_request_takes_memory_from_a_deferred_one() -> None:
    trace = toy_trace(deferred(0, 20, 10), immediate(TICK_S, 16, 1))
    for preempt, first_token, preemptions in ((1, 36 + 32, [1, 0]), (0, 36 + 9 * 17 + 32, [0, 0])):
        run = ToyRun(toy_engine(), trace, preempt_for_immediate=preempt)
        run.drain()
        assert in_ticks(run["first_token_s"])[1] == first_token and run["preemptions"] == preemptions


@pytest.mark.parametrize("victim", range(4))
def test_in_one_queue_too_room_is_made_by_deferred_requests_alone(victim: int) -> None:
    trace = toy_trace(deferred(0, 8, 8), immediate(0, 12, 3), immediate(30 * TICK_S, 16, 1))
    run = ToyRun(toy_engine(), trace, discipline=ONE_QUEUE, victim=victim, preempt_for_immediate=1)
    run.advance(iterations=2)
    assert run["preemptions"] == [1, 0, 0] and run["status"][1:] == [RUNNING, FINISHED]


def test_last_in_one_queue_is_blind_to_class() -> None:
    trace = toy_trace(deferred(0, 12, 6), immediate(0, 12, 6))
    for victim, preemptions in ((LAST, [0, 1]), (1, [1, 0])):
        run = ToyRun(toy_engine(), trace, discipline=ONE_QUEUE, victim=victim)
        run.drain()
        assert run["preemptions"] == preemptions


def test_nothing_is_evicted_for_a_request_that_cannot_start() -> None:
    """An immediate request whose chunk would be empty waits without taking anybody's memory."""
    engine = toy_engine(**large_engine(kv_blocks=40))
    trace = toy_trace(deferred(0, 40, 20), immediate(0, 100, 2), immediate(TICK_S, 20, 2))
    run = ToyRun(engine, trace, discipline=PRIORITY, immediate_step_s=(16 + 64) * TICK_S)
    for _ in range(3):
        run.advance(iterations=1)
        taken = run["preemptions"][0]
        assert taken == 0 or run["status"][2] != WAITING


def test_preempt_count_is_made_once_and_holds_admission() -> None:
    trace = toy_trace(*(deferred(0, 4, 20) for _ in range(3)))
    run = ToyRun(toy_engine(), trace)
    run.advance(iterations=1)
    run.decide(preempt_count=2)
    run.advance(iterations=4)
    assert run["status"] == [RUNNING, WAITING, WAITING]
    run.decide()
    run.advance(iterations=1)
    assert run["status"] == [RUNNING] * 3 and run["preemptions"] == [0, 1, 1]


def test_loss_is_booked_when_the_promise_breaks() -> None:
    """A first token that is not there when due is lost then, for every request of the trace, and once."""
    late = [immediate(ticks * TICK_S, 4, 2, ttft_slo_s=5 * TICK_S) for ticks in (0, 100, 102, 200)]
    run = ToyRun(toy_engine(), toy_trace(*late))
    lost = []
    for until in (20, 99, 110, 160, 250):
        run.advance(until * TICK_S)
        lost.append((run.total("lost"), sum(run["missed"])))
    # Each iteration takes longer than the promise. The request at 102 is lost within the iteration from 100 to 120.
    assert lost == [(1, 1), (1, 1), (3, 3), (3, 3), (4, 4)]
    run.drain()
    assert run.total("lost") == 4 and run.total("lost_prompt") == 16 and run.total("kept") == 0
    assert run.state.classes["lost"][IMMEDIATE] == 4 and run.state.classes["lost"][DEFERRED] == 0


def test_loss_is_booked_while_nothing_runs() -> None:
    """Both wait for tokens that nobody gives them, and the first to arrive is the last to be due."""
    trace = toy_trace(immediate(0, 4, 1, ttft_slo_s=90 * TICK_S), immediate(40 * TICK_S, 4, 1, ttft_slo_s=20 * TICK_S))
    run = ToyRun(toy_engine(), trace, token_budget=0)
    missed = []
    for until in (50, 60, 70, 90, 100):
        run.advance(until * TICK_S)
        missed.append(run["missed"])
    assert missed == [[0, 0], [0, 0], [0, 1], [0, 1], [1, 1]]
    assert run["status"] == [WAITING, WAITING] and run.total("lost") == 2


def test_pace_that_cannot_be_kept_is_lost_before_the_end() -> None:
    """10 tokens, 18 ticks each promised, 17 the least possible: two slow iterations use up what may be lost."""
    trace = toy_trace(immediate(0, 4, 11, tpot_slo_s=18 * TICK_S), immediate(40 * TICK_S, 20, 1))
    run = ToyRun(toy_engine(), trace)
    missed = []
    for _ in range(5):
        run.advance(iterations=1)
        missed.append(run["missed"][0])
    # First token at 20, due at 200; 37, 54, then 36 beside the other's prompt to 91 with 7 tokens to come: 91 + 119.
    assert in_ticks([run.now_s]) == [108]
    assert missed == [0, 0, 0, 1, 1]
