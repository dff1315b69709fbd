"""Tokens are drawn from the distribution that Transformers' own warpers leave, and by seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flexirl.errors import UserError
from flexirl.runtime.live.iteration import uniform
from flexirl.runtime.live.sampling import SAMPLING, Sampling, choose, log_probabilities

VOCAB = 30


def rows_of(count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, logprobs: int = -1) -> np.ndarray:
    """`SAMPLING` records, all alike."""
    return np.array([(temperature, top_p, top_k, logprobs)] * count, SAMPLING)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 0.8, 0), (1.3, 1.0, 5), (1.5, 0.7, 9), (1.0, 0.01, 0)],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    draws = np.array([uniform(np.uint64(9), i) for i in range(40_000)])
    tokens = choose(logits.expand(len(draws), -1), rows_of(len(draws), temperature, top_p, top_k), draws)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k > 0:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0].numpy()
    drawn = np.bincount(tokens, minlength=VOCAB) / len(draws)
    assert not drawn[expected == 0].any(), "a token was drawn that is cut off"
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(0.25 / len(draws))


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(5))
    rng = np.random.default_rng(0)
    sampling, draws = rows_of(50), rng.random(50)
    sampling["temperature"] = rng.choice([0.0, 0.7, 1.5], 50)
    sampling["top_p"] = rng.choice([1.0, 0.6], 50)
    sampling["top_k"] = rng.choice([0, 3], 50)
    together = choose(logits, sampling, draws)
    one_by_one = [int(choose(logits[i : i + 1], sampling[i : i + 1], draws[i : i + 1])[0]) for i in range(50)]
    assert together.tolist() == one_by_one
    greedy = sampling["temperature"] == 0
    assert (together[greedy] == logits.argmax(-1).numpy()[greedy]).all() and (
        together != logits.argmax(-1).numpy()
    ).any()


@pytest.mark.parametrize("draw", [1e-12, 1 - 1e-12])
def test_the_last_and_the_least_draw_stay_among_what_is_left(draw: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 8]] = 50.0
    for sampling in (rows_of(1), rows_of(1, top_k=2), rows_of(1, top_p=0.9)):
        assert choose(logits, sampling, np.array([draw]))[0] in (3, 8)


def test_log_probabilities_are_those_before_temperature() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(6))
    sampling = rows_of(3, temperature=3.0)
    sampling["logprobs"] = [-1, 0, 2]
    found = log_probabilities(logits, np.array([1, 2, 3]), sampling)
    expected = logits.log_softmax(-1)
    assert set(found) == {1, 2} and found[1].likeliest == []
    assert found[1].token == pytest.approx(float(expected[1, 2])) and found[2].token == pytest.approx(
        float(expected[2, 3])
    )
    best = expected[2].topk(2)
    assert found[2].likeliest == [
        (token, pytest.approx(value)) for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = np.array([[uniform(np.uint64(seed), i) for i in range(300)] for seed in range(300)])
    counts = np.bincount((numbers.ravel() * 20).astype(int), minlength=20)
    assert ((counts - 4500) ** 2 / 4500).sum() < 44  # the chance of more is 0.1%
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.015
    assert 0 < numbers.min() and numbers.max() < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": 5}, "stop=5 is not a list"),
        ({"stop": [""]}, r"stop=\[''\]"),
        ({"stop": ["a", 3]}, "stop="),
        ({"stop_token_ids": "ab"}, "stop_token_ids='ab' is not a list"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids="),
        ({"ignore_eos": 1}, "ignore_eos=1"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"logprobs": True}, "logprobs=True"),
        ({"stopp": "x"}, "'stopp' is not a field"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling.of(fields)


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert Sampling.of({"stop": "\n\n", "temperature": 1}) == Sampling(temperature=1, stop=("\n\n",))
