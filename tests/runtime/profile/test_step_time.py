"""The step-time model against an independent formula, and its fit against known and measured iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from flexirl.errors import UserError
from flexirl.runtime.fitting.profiles_from_data import H100, LLAMA_31_8B, read_iterations
from flexirl.runtime.profile.engine import ENGINE
from flexirl.runtime.profile.step_time import (
    BATCH,
    COEFFICIENTS,
    design_matrix,
    fit,
    roofline,
    step_time,
    step_time_with_chunk,
    step_time_with_decodes,
)

CALIBRATION = Path(__file__).parents[4] / "shared" / "calibration"


def engine_of(**figures: float) -> Any:
    record = np.zeros((), dtype=ENGINE)
    for name, value in figures.items():
        record[name] = value
    return record[()]


def batch_of(**figures: float) -> Any:
    record = np.zeros((), dtype=BATCH)
    for name, value in figures.items():
        record[name] = value
    return record[()]


def by_hand(e: np.void, b: np.void) -> float:
    tokens = int(b["prefill_tokens"]) + int(b["decode_sequences"])
    total = e["base_s"] + e["host_s"] + e["per_sequence_s"] * b["sampled_sequences"] + e["per_token_s"] * tokens
    for knee in (64, 128, 256):
        total += e[f"per_token_{knee}_s"] * max(tokens - knee, 0)
    total += e["over_16_s"] * (tokens > 16) + e["over_256_s"] * (tokens > 256)
    total += e["per_context_s"] * b["decode_context"] + e["per_chunk_context_s"] * b["chunk_context"]
    if b["prefill_tokens"] > 0:
        total += e["mixed_s"] + e["per_mixed_context_s"] * b["decode_context"]
    return total + e["per_image_token_s"] * b["image_tokens"] + e["per_swap_token_s"] * b["swap_tokens"]


engines = st.builds(
    engine_of,
    host_s=st.floats(0, 1e-2),
    **{name: st.floats(0, 1e-2 / (1 + at)) for at, name in enumerate(COEFFICIENTS)},
)
batches = st.builds(
    batch_of,
    prefill_tokens=st.integers(0, 4096),
    decode_sequences=st.integers(0, 512),
    sampled_sequences=st.integers(0, 512),
    decode_context=st.floats(0, 1e6),
    chunk_context=st.floats(0, 1e8),
    image_tokens=st.floats(0, 1e4),
    swap_tokens=st.floats(0, 1e5),
)


@settings(deadline=None)  # the first call compiles
@given(engines, batches)
def test_step_time_is_the_documented_formula(engine: np.void, batch: np.void) -> None:
    assert step_time(engine, batch) == pytest.approx(by_hand(engine, batch), rel=1e-12)


@settings(deadline=None)  # the first call compiles
@given(engines, batches)
def test_design_matrix_is_the_same_model(engine: np.void, batch: np.void) -> None:
    row = design_matrix(np.array([batch], dtype=BATCH))[0]
    total = engine["host_s"] + row @ [engine[name] for name in COEFFICIENTS]
    assert step_time(engine, batch) == pytest.approx(total, rel=1e-12)


@settings(deadline=None)
@given(engines, batches, st.integers(0, 5000), st.integers(1, 300), st.integers(0, 500))
def test_one_more_decode_or_chunk_is_a_batch_that_holds_it(
    engine: np.void, batch: np.void, context: int, chunk: int, image_tokens: int
) -> None:
    joined = batch.copy()
    joined["prefill_tokens"] += chunk
    joined["chunk_context"] += chunk * (context + 0.5 * chunk)
    joined["image_tokens"] += image_tokens
    assert step_time_with_chunk(engine, batch, context, chunk, image_tokens) == pytest.approx(by_hand(engine, joined))
    joined = batch.copy()
    joined["decode_sequences"] += 1
    joined["sampled_sequences"] += 1
    joined["decode_context"] += context
    assert step_time_with_decodes(engine, batch, 1, context) == pytest.approx(by_hand(engine, joined))


def random_batches(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    features = np.zeros(count, dtype=BATCH)
    features["prefill_tokens"] = np.exp(random.uniform(0, np.log(2048), count)) * random.integers(0, 2, count)
    features["decode_sequences"] = 1 + np.exp(random.uniform(0, np.log(255), count))
    features["sampled_sequences"] = features["decode_sequences"] + random.integers(0, 4, count)
    features["decode_context"] = features["decode_sequences"] * random.uniform(16, 4000, count)
    features["chunk_context"] = features["prefill_tokens"] * random.uniform(1, 3000, count)
    return features


TRUE = {
    "base_s": 6e-3,
    "per_sequence_s": 9e-6,
    "per_token_s": 8e-6,
    "per_token_64_s": 4e-6,
    "per_token_128_s": 2e-6,
    "per_token_256_s": 1e-5,
    "over_16_s": 5e-4,
    "over_256_s": 2e-3,
    "per_context_s": 4e-8,
    "per_chunk_context_s": 6e-10,
    "mixed_s": 4e-4,
    "per_mixed_context_s": 1e-8,
    "per_image_token_s": 7e-6,
    "per_swap_token_s": 3e-6,
}


@pytest.mark.parametrize("live", [False, True])
def test_fit_recovers_the_coefficients_it_was_given(live: bool) -> None:
    features = random_batches(2000, seed=1)
    if live:  # image and swap work appear when an engine is measured that does them
        random = np.random.default_rng(2)
        features["image_tokens"] = random.integers(0, 2000, 2000)
        features["swap_tokens"] = random.integers(0, 9000, 2000)
    times = design_matrix(features) @ [TRUE[name] for name in COEFFICIENTS]
    found = fit(features, times)
    for name in COEFFICIENTS:
        absent = not live and name in ("per_image_token_s", "per_swap_token_s")
        assert found.coefficients[name] == pytest.approx(0.0 if absent else TRUE[name], rel=1e-6), name
    assert found.report["mape"] < 1e-9
    assert (found.report["rows_fitted"], found.report["rows_held_out"]) == (1500, 500)


def test_a_row_counts_as_often_as_its_weight_says() -> None:
    features = random_batches(2000, seed=1)
    times = design_matrix(features) @ [TRUE[name] for name in COEFFICIENTS]
    times[1::2] *= 2  # another engine's
    found = fit(features, times, weights=np.where(np.arange(2000) % 2, 1e-9, 1.0))
    assert found.coefficients["per_token_s"] == pytest.approx(TRUE["per_token_s"], rel=1e-3)
    found = fit(features, times, weights=np.where(np.arange(2000) % 2, 1.0, 1e-9))
    assert found.coefficients["per_token_s"] == pytest.approx(2 * TRUE["per_token_s"], rel=1e-3)


def test_fit_is_deterministic() -> None:
    features = random_batches(500, seed=3)
    times = 0.01 * np.random.default_rng(4).lognormal(0, 0.1, 500)
    assert fit(features, times) == fit(features, times)


def test_relative_fit_is_better_than_ordinary_on_small_iterations() -> None:
    features = random_batches(3000, seed=5)
    columns = design_matrix(features)
    # An engine that is not of the form: compute saturates smoothly.
    times = np.hypot(6e-3, 3e-5 * (features["prefill_tokens"] + features["decode_sequences"])) + columns[:, 8] * 4e-8
    relative = columns @ np.array([fit(features, times).coefficients[name] for name in COEFFICIENTS])
    used = columns.any(axis=0)
    length = np.linalg.norm(columns[:, used], axis=0)
    ordinary = columns[:, used] @ (nnls(columns[:, used] / length, times)[0] / length)
    small = times < np.quantile(times, 0.3)
    assert np.abs(relative / times - 1)[small].mean() < np.abs(ordinary / times - 1)[small].mean()


@pytest.mark.parametrize("times", [np.ones(7), np.zeros(20), np.full(20, np.nan)])
def test_fit_refuses_bad_times(times: np.ndarray) -> None:
    with pytest.raises(UserError):
        fit(random_batches(len(times), seed=6), times)


@pytest.mark.parametrize(
    "file, mape",
    [
        ("aic_a100_sxm_llama31_8b_vllm", 0.024),
        ("aic_h100_sxm_llama31_8b_vllm", 0.033),
        ("aic_h200_sxm_llama31_8b_vllm", 0.028),
        ("vidur_a100_llama2_70b_tp2", 0.031),
    ],
)
@pytest.mark.skipif(not CALIBRATION.is_dir(), reason="the calibration data are not beside the repository")
def test_fit_on_measured_iterations_is_as_good_as_published(file: str, mape: float) -> None:
    report = fit(*read_iterations(CALIBRATION / f"{file}.csv")).report
    assert report["mape"] < mape
    assert report["r2"] > 0.995


def test_roofline_meets_both_arms_of_the_maximum() -> None:
    figures = roofline(LLAMA_31_8B, H100)
    engine = engine_of(**figures)
    assert LLAMA_31_8B.decoder_params == pytest.approx(7.5e9, rel=0.01)
    assert LLAMA_31_8B.weight_bytes == pytest.approx(16.06e9, rel=0.01)
    assert LLAMA_31_8B.kv_bytes_per_token == 131072
    one = step_time(engine, batch_of(decode_sequences=1))
    assert one == pytest.approx(LLAMA_31_8B.decoder_params * 2 / (3.35e12 * 0.70), rel=0.01)
    slope = sum(figures[f"per_token{knee}_s"] for knee in ("", "_64", "_128", "_256"))
    assert slope == pytest.approx(2 * LLAMA_31_8B.decoder_params / (989e12 * 0.83))
