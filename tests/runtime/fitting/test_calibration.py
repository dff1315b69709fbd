"""Calibration against a device whose times are known, and the shapes it draws against the engine's limits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.policies.registry import make_policy
from flexirl.runtime.fitting.calibration import calibrate, draw_shapes, make_batch
from flexirl.runtime.live.executor import Batch, Moves, Outcome
from flexirl.runtime.live.requests import Image, Request
from flexirl.runtime.profile.engine import EngineProfile, load_profile, make_profile
from flexirl.runtime.profile.pace import at_pace
from flexirl.runtime.profile.step_time import BATCH, step_time
from flexirl.workloads.trace import Trace, empty_rows


def requests(longest: int) -> Trace:
    """Immediate and deferred ones of up to so many tokens either way, some with images."""
    rows, rng = empty_rows(40), np.random.default_rng(0)
    rows["prompt_tokens"], rows["output_tokens"] = rng.integers(longest // 8, longest, (2, 40))
    rows["num_images"] = rng.integers(0, 3, 40)
    rows["image_tokens"] = rows["prompt_tokens"] // 2 * (rows["num_images"] > 0)
    rows["request_class"] = np.arange(40) % 2
    return Trace(rows, "requests", 1)


REQUESTS = requests(200)
ABOUT = {"machine": "a device of known times", "date": "2026-01-01"}


def engine(**changes: float) -> EngineProfile:
    limits = {"kv_blocks": 400, "host_kv_blocks": 100, "block_size": 16, "max_tokens_per_step": 256, "max_running": 32,
              "max_model_len": 1024}  # fmt: skip
    return make_profile("known", {**limits, **changes}, {}, {})


class KnownDevice:
    """Takes 5 ms an iteration, 40 microseconds a token, 1 a token of decode context, 3 a token moved.

    And, if it takes images, 200 for each of their tokens, which it encodes when first it sees the request.
    """

    vocab_size = 50
    end_tokens = ()

    def __init__(self, profile: EngineProfile, image_token: int | None = None) -> None:
        self.profile = profile
        self.image_token = image_token
        self.now_s = 0.0
        self._to_encode: dict[int, int] = {}

    @property
    def free_host_blocks(self) -> int:
        return 100

    def move(self, moves: Moves) -> dict[int, int]:
        blocks = [len(each) for some in (moves.out, moves.back, moves.save) for each in some.values()]
        self.now_s += 3e-6 * 16 * sum(blocks)
        return dict.fromkeys([*moves.out, *moves.back], 0)

    def execute(self, batch: Batch, sampling: Any, interrupted: Any) -> Outcome:
        decodes = batch.query_lens == 1
        self.now_s += 5e-3 + 4e-5 * len(batch.tokens) + 1e-6 * batch.context_lens[decodes].sum()
        self.now_s += 2e-4 * sum(self._to_encode.pop(r, 0) for r in batch.requests.tolist())
        return Outcome(np.zeros(len(batch.sampled_rows), np.int64), {}, 0.0)

    def check_images(self, request: Request) -> int:
        marks = list(request.prompt).count(self.image_token)
        assert sum(len(image.pixels) for image in request.images) == marks
        return marks

    def take_images(self, r: int, request: Request) -> None:
        self._to_encode[r] = self.check_images(request)

    def draw_image(self, tokens: int, rng: np.random.Generator) -> Image:
        return Image(np.zeros((tokens, 1)), (1, 1, tokens))

    def forget(self, r: int) -> None:
        self._to_encode.pop(r, None)


@pytest.mark.parametrize("image_token", [None, 7])
def test_a_device_of_the_models_form_is_found_again(image_token: int | None) -> None:
    device = KnownDevice(engine(), image_token)
    found = calibrate(device, make_policy("qoserve"), REQUESTS, "known", ABOUT, 20.0, 0, now_s=lambda: device.now_s)
    values = found.profile.values
    assert found.profile.fit["mape"] < 1e-3 and values["noise"] < 1e-6
    assert values["base_s"] == pytest.approx(5e-3, rel=0.01)
    assert values["per_token_s"] + values["per_sequence_s"] == pytest.approx(4e-5, rel=0.05)
    assert values["per_context_s"] == pytest.approx(1e-6, rel=0.01)
    assert values["per_swap_token_s"] == pytest.approx(3e-6)
    assert values["per_image_token_s"] == pytest.approx(0.0 if image_token is None else 2e-4, rel=0.01)
    origin = "not measured" if image_token is None else "measured"
    assert found.profile.origin["per_image_token_s"].startswith(origin)
    if image_token is None:  # with images, steps know only about when they are encoded
        assert found.predicted_s == pytest.approx(np.array([step.elapsed_s for step in found.steps]), rel=1e-2)
    assert found.profile.name == "known" and found.profile.fit["machine"] == ABOUT["machine"]
    assert {name: values[name] for name in ("kv_blocks", "max_running")} == {"kv_blocks": 400, "max_running": 32}


@pytest.mark.parametrize("profile", [engine(), engine(kv_blocks=70), load_profile("cpu-tiny")])
def test_drawn_iterations_fit_into_the_engine(profile: EngineProfile) -> None:
    rng = np.random.default_rng(0)
    limits, device = profile.values, KnownDevice(profile, image_token=7)
    kinds, pictures, prompts, uneven = set(), [], set(), 0
    for shape in itertools.islice(draw_shapes(profile, rng, images=True), 90):
        batch, features, pictured = make_batch(shape, device, rng)
        kinds.add((shape.decodes > 0, shape.chunk > 0))
        prompts.add(int((batch.query_lens > 1).sum()))
        attended = batch.context_lens[: shape.decodes]
        assert features["decode_context"] == attended.sum()
        uneven += len(set(attended.tolist())) > 1
        if pictured is not None:
            pictures.append(len(pictured.images))
            assert list(pictured.prompt[shape.before :]) == batch.tokens[shape.decodes :].tolist()
            assert len(pictured.images) == shape.images
            assert features["image_tokens"] == shape.image_tokens <= shape.chunk
        assert len(batch.tokens) <= limits["max_tokens_per_step"] and len(batch.query_lens) <= limits["max_running"]
        assert batch.context_lens.max() <= limits["max_model_len"]
        assert (batch.query_lens <= batch.context_lens).all()
        # Every sequence writes into blocks of its own, at the ends of its context.
        ends = np.repeat(np.cumsum(batch.query_lens), batch.query_lens)
        from_end = ends - np.arange(len(batch.tokens))
        assert (batch.positions == np.repeat(batch.context_lens, batch.query_lens) - from_end).all()
        used = [row[: -(-length // 16)] for row, length in zip(batch.block_table, batch.context_lens, strict=True)]
        assert len(set(np.concatenate(used).tolist())) == sum(map(len, used)) <= limits["kv_blocks"]
        assert features["prefill_tokens"] + features["decode_sequences"] == len(batch.tokens)
    assert kinds == {(True, False), (False, True), (True, True)}
    assert 20 < len(pictures) < 45 and max(pictures) > 1
    assert prompts == {0, 1, 2, 3, 4} and uneven > 20


def test_an_engine_at_a_pace_takes_so_many_times_as_long() -> None:
    profile = load_profile("h100-llama-3.1-8b")
    batch = np.zeros((), BATCH)
    batch["prefill_tokens"], batch["decode_sequences"], batch["decode_context"] = 300, 20, 4000.0
    slower = at_pace(profile, 1.3)
    assert step_time(slower.values, batch) == pytest.approx(1.3 * step_time(profile.values, batch), rel=1e-12)
    assert slower.values["kv_blocks"] == profile.values["kv_blocks"]


def test_requests_that_cannot_run_are_left_out_or_refused() -> None:
    device = KnownDevice(engine())
    with pytest.raises(UserError, match="No request of requests fits into 1024 tokens"):
        calibrate(device, make_policy("qoserve"), requests(20_000), "known", ABOUT, 1.0, 0)


def test_no_time_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match="seconds=0"):
        calibrate(KnownDevice(engine()), make_policy("qoserve"), REQUESTS, "known", ABOUT, 0.0, 0)
