"""Arrival processes against their closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from flexirl.errors import UserError
from flexirl.workloads.arrivals import DayNight, Gamma, OnOff, OuterInner, Poisson, Spread, Weibull
from flexirl.workloads.statistics import gap_cv, index_of_dispersion, peak_to_mean


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


PROCESSES = [
    Poisson(),
    Gamma(cv=0.5),
    Gamma(cv=3.0),
    Weibull(shape=0.6),
    OnOff(on_s=5, off_s=15),
    OnOff(on_s=5, off_s=5, off_level=0.3),
    DayNight(period_s=100.0),
    *(
        OuterInner(Spread(outer, skew), Spread(inner, 0.4), granularity=30)  # type: ignore[arg-type]
        for outer, inner, skew in (
            ("uniform", "zipf", 0.5),
            ("poisson", "inverse_gaussian", 0.5),
            ("gaussian", "poisson", 0.7),
            ("inverse_gaussian", "gaussian", 1.5),
            ("zipf", "uniform", 1.2),
        )
    ),
]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_times_are_sorted_inside_the_span_and_at_the_asked_rate(process):
    times = process.draw(4.0, 50_000.0, rng())
    assert times.dtype == np.float64
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] < 50_000.0
    assert len(times) == pytest.approx(200_000, rel=0.03)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@settings(max_examples=15, deadline=None)
@given(rate=st.floats(1e-3, 50), duration=st.floats(0.01, 100), seed=st.integers(0, 2**32))
def test_any_span_and_rate_is_served(process, rate, duration, seed):
    times = process.draw(rate, duration, rng(seed))
    assert (np.diff(times) >= 0).all()
    assert len(times) == 0 or (times[0] >= 0 and times[-1] < duration)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_seed_is_reproducible(process):
    assert np.array_equal(process.draw(3, 100, rng(5)), process.draw(3, 100, rng(5)))
    assert not np.array_equal(process.draw(3, 100, rng(5)), process.draw(3, 100, rng(6)))


def test_poisson_has_dispersion_one_and_exponential_gaps():
    times = Poisson().draw(5.0, 20_000.0, rng())
    for window_s in (1.0, 10.0):
        assert index_of_dispersion(times, 20_000.0, window_s) == pytest.approx(1.0, abs=0.1)
    assert stats.kstest(np.diff(times), "expon", args=(0, 1 / 5.0)).pvalue > 0.001


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0, 4.0])
def test_gamma_gaps(cv):
    times = Gamma(cv).draw(10.0, 20_000.0, rng(1))
    assert gap_cv(times) == pytest.approx(cv, rel=0.05)
    if cv < 4:  # at 4, a sixth of the gaps is smaller than the resolution of the times
        assert stats.kstest(np.diff(times)[:20_000], stats.gamma(cv**-2, scale=cv**2 / 10).cdf).pvalue > 0.001
    assert index_of_dispersion(times, 20_000.0, max(5.0, 5 * cv**2)) == pytest.approx(cv**2, rel=0.2)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_weibull_gaps(shape):
    times = Weibull(shape).draw(10.0, 20_000.0, rng(2))
    mean = special.gamma(1 + 1 / shape)
    cv = math.sqrt(special.gamma(1 + 2 / shape) / mean**2 - 1)
    assert Weibull(shape).cv == pytest.approx(cv)
    assert gap_cv(times) == pytest.approx(cv, rel=0.05)
    law = stats.weibull_min(shape, scale=1 / (10 * mean))
    assert stats.kstest(np.diff(times)[:20_000], law.cdf).pvalue > 0.001


@pytest.mark.parametrize("process", [Gamma(4.0), Weibull(0.35)], ids=str)
def test_renewal_processes_start_stationary(process):
    # Starting with a full gap would give (cv^2 - 1) / 2 requests too many or too few near 0, about 7 here.
    first_second = [len(process.draw(10.0, 1.0, rng(seed))) for seed in range(4000)]
    error = np.std(first_second) / math.sqrt(len(first_second))
    assert abs(np.mean(first_second) - 10.0) < 4 * error


def test_on_off_rates_duty_cycle_and_dispersion():
    process = OnOff(on_s=3.0, off_s=9.0, off_level=0.1)
    on, off = process.rates(6.0)
    assert (3 * on + 9 * off) / 12 == pytest.approx(6.0) and off == pytest.approx(0.1 * on)
    times = process.draw(6.0, 100_000.0, rng(3))
    assert len(times) == pytest.approx(600_000, rel=0.03)
    s1, s0 = 1 / 3.0, 1 / 9.0
    limit = 1 + 2 * s1 * s0 * (on - off) ** 2 / ((s1 + s0) ** 2 * (on * s0 + off * s1))
    assert index_of_dispersion(times, 100_000.0, 200.0) == pytest.approx(limit, rel=0.2)


def test_day_and_night():
    """The expected share of the arrivals in the first quarter of a day, which starts at night, and around noon."""
    times = DayNight(period_s=40.0, depth=0.8).draw(5.0, 40_000.0, rng())
    quarter = np.bincount((times % 40.0 // 10).astype(int), minlength=4) / len(times)
    night, noon = 0.25 - 0.8 / (2 * np.pi), 0.25 + 0.8 / (2 * np.pi)
    assert quarter == pytest.approx([night, noon, noon, night], abs=0.005)


def test_silence_while_off():
    times = OnOff(on_s=2.0, off_s=6.0).draw(50.0, 20_000.0, rng(4))
    busy = np.histogram(times, 200_000, (0, 20_000.0))[0] > 0  # 0.1 s bins hold 20 arrivals on average while ON
    assert busy.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("spread", "law"),
    [
        (Spread("uniform", 0.25), stats.uniform(0, 0.75)),
        (Spread("gaussian", 0.2), stats.truncnorm(-2.5, 2.5, loc=0.5, scale=0.2)),
        (Spread("gaussian", 3.0), stats.truncnorm(-1 / 6, 1 / 6, loc=0.5, scale=3.0)),
    ],
    ids=["uniform", "gaussian", "wide_gaussian"],
)
def test_inner_positions(spread, law):
    assert stats.kstest(spread.positions(20_000, rng()), law.cdf).pvalue > 0.001


def test_inner_inverse_gaussian_is_the_wald_law_cut_at_one():
    skew = 0.8
    law = stats.invgauss(skew**2, scale=0.5 / skew**2)  # mean 1/2, shape (1/2) / skew^2
    assert law.mean() == pytest.approx(0.5) and law.std() / law.mean() == pytest.approx(skew)
    at = Spread("inverse_gaussian", skew).positions(20_000, rng())
    assert stats.kstest(at, lambda x: law.cdf(x) / law.cdf(1.0)).pvalue > 0.001


def test_inner_poisson_steps():
    skew = 0.5  # counts of mean 4, in steps of 1/9
    at = Spread("poisson", skew).positions(50_000, rng())
    expected = stats.poisson.pmf(np.arange(9), 4) / stats.poisson.cdf(8, 4)
    assert np.bincount((at * 9).astype(int), minlength=9) / 50_000 == pytest.approx(expected, abs=0.01)


def test_inner_zipf_slots():
    at = Spread("zipf", 1.0).positions(200_000, rng())
    expected = 1 / np.arange(1, 101) / np.sum(1 / np.arange(1, 101))
    assert np.bincount((at * 100).astype(int), minlength=100) / 200_000 == pytest.approx(expected, abs=0.004)


def test_outer_shares_closed_forms():
    assert Spread("uniform", 0.0).shares(4) == pytest.approx([0.25] * 4)
    assert Spread("uniform", 1.0).shares(2) == pytest.approx([0.25, 0.75])
    assert Spread("zipf", 1.0).shares(3) == pytest.approx(np.array([6, 3, 2]) / 11)
    assert Spread("zipf", 1.0, steady=0.5).shares(3) == pytest.approx(np.array([6, 3, 2]) / 22 + 1 / 6)
    for name, skew in (("poisson", 0.5), ("gaussian", 0.2), ("inverse_gaussian", 0.5)):
        shares = Spread(name, skew).shares(5000)  # type: ignore[arg-type]
        assert shares.sum() == pytest.approx(1.0)
        assert shares.std() / shares.mean() == pytest.approx(skew, rel=0.03)


def test_segments_get_their_shares():
    spread = Spread("zipf", 1.0)
    process = OuterInner(spread, Spread("zipf", 1.0), granularity=20)
    times = process.draw(100.0, 1000.0, rng())
    counts = np.histogram(times, 20, (0, 1000.0))[0]
    assert len(times) in (100_000, 100_001)
    assert np.sort(counts) == pytest.approx(np.sort(spread.shares(20)) * 100_000, abs=1.5)


def test_the_offset_delays_all_arrivals():
    times = OuterInner(offset_s=30.0).draw(5.0, 100.0, rng())
    assert times[0] >= 30.0 and len(times) in (500, 501)
    with pytest.raises(UserError, match="offset_s"):
        OuterInner(offset_s=100.0).draw(5.0, 100.0, rng())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gamma(cv=0),
        lambda: Weibull(shape=-1),
        lambda: OnOff(off_level=2),
        lambda: Spread("cauchy", 1.0),  # type: ignore[arg-type]
        lambda: Spread("zipf", -1.0),
        lambda: Spread("poisson", 2.0),
        lambda: OuterInner(granularity=0),
    ],
)
def test_bad_parameters(make):
    with pytest.raises(UserError, match="out of range"):
        make()


def test_statistics_on_hand_made_times():
    times = np.array([0.5, 0.6, 0.7, 2.5])
    assert peak_to_mean(times, 4.0, bins=4) == 3.0
    assert index_of_dispersion(times, 4.0, 1.0) == pytest.approx(np.var([3, 0, 1, 0], ddof=1))
    assert gap_cv(np.array([0.0, 1.0, 2.0])) == 0.0
    assert math.isnan(peak_to_mean(times[:0], 4.0)) and math.isnan(index_of_dispersion(times, 4.0, 3.0))
