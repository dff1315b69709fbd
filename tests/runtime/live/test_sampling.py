"""Tokens are drawn from the distribution that Transformers' own warpers and processors leave, and by seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from live_toys import Constant, LiveRun, RandomPolicy
from model_toys import FAMILIES, CheckedExecutor, generate_alone
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexirl.errors import UserError
from flexirl.runtime.live.executor import Outcome
from flexirl.runtime.live.iteration import uniform
from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import (
    SAMPLING,
    History,
    Sampling,
    choose,
    likeliest,
    log_probabilities,
    penalise,
)
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import build

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
        ({"top_k": 10**30}, "top_k=10"),
        ({"temperature": 10**400}, "temperature=10"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"no_repeat_ngram_size": 2.0}, r"no_repeat_ngram_size=2\.0"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"frequency_penalty": "a"}, "frequency_penalty='a'"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"begin_suppress_tokens": [1.5]}, "begin_suppress_tokens="),
        ({"suppress_tokens": 5}, "suppress_tokens=5 is not a list"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens="),
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


def test_fields_that_are_not_given_are_the_defaults() -> None:
    defaults = Sampling(repetition_penalty=1.2, suppress_tokens=(3,))
    assert Sampling.of({"suppress_tokens": [5]}, defaults) == Sampling(repetition_penalty=1.2, suppress_tokens=(5,))


@pytest.mark.parametrize("temperature", [1e-4, 1e-38, 1e-45, 1e-300, 1e300, 1.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_no_temperature_draws_beyond_the_vocabulary(temperature: float, cut: dict[str, Any]) -> None:
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(4)) * 3
    logits[:, 11] = -torch.inf
    tokens = choose(logits, rows_of(200, temperature, **cut), np.linspace(1e-9, 1 - 1e-9, 200))
    assert 0 <= tokens.min() and tokens.max() < VOCAB and 11 not in tokens
    if temperature < 1e-3:
        assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_bad_numbers_has_no_token_and_harms_no_other(dtype: torch.dtype) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(4)).to(dtype)
    good = logits[[0, 5]]
    logits[1, 4] = torch.nan
    logits[2] = -torch.inf
    logits[3, 9] = torch.inf
    logits[4, :20] = -torch.inf
    draws = np.full(6, 0.7)
    for temperature in (0.0, 1.0):
        for cut in ({}, {"top_k": 4}, {"top_p": 0.8}):
            sampling = rows_of(6, temperature, logprobs=3, **cut)
            tokens = choose(logits, sampling, draws)
            assert tokens[1] == tokens[2] == -1 and tokens[3] == 9 and 20 <= tokens[4] < VOCAB
            assert tokens[[0, 5]].tolist() == choose(good, sampling[:2], draws[:2]).tolist()
            found = log_probabilities(logits, tokens, sampling)
            assert sorted(found) == [0, 3, 4, 5]
            numbers = [value for each in found.values() for value in (each.token, *dict(each.likeliest).values())]
            assert np.isfinite(numbers).all() and found[3].token == 0.0
    assert likeliest(logits).tolist() == choose(logits, rows_of(6, 0.0), draws).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties_are_those_of_transformers(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(7)).to(dtype)
    histories, expected = {}, logits.float().clone()
    for row in range(0, 40, 2):
        tokens = rng.integers(0, 6, rng.integers(1, 25)).astype(np.int32)
        generated = int(rng.integers(0, min(len(tokens), 4)))
        penalty, size = float(rng.choice([1.0, 0.7, 1.4])), int(rng.choice([0, 1, 2, 3, 30]))
        suppressed, first = (tuple(rng.integers(0, VOCAB, rng.integers(0, 4)).tolist()) for _ in range(2))
        least, stops = int(rng.integers(0, 4)), tuple(rng.integers(0, VOCAB, 2).tolist())
        sampling = Sampling(
            repetition_penalty=penalty, no_repeat_ngram_size=size, suppress_tokens=suppressed,
            begin_suppress_tokens=first, min_new_tokens=least, stop_token_ids=stops[:1],
        )  # fmt: skip
        histories[row] = History(sampling, tokens, generated, stops[1:])
        seen, begin = torch.tensor(tokens[None], dtype=torch.int64), len(tokens) - generated
        scores = RepetitionPenaltyLogitsProcessor(penalty)(seen, expected[row : row + 1])
        if size > 0:
            scores = NoRepeatNGramLogitsProcessor(size)(seen, scores)
        for processor in (
            MinNewTokensLengthLogitsProcessor(begin, least, list(stops)),
            SuppressTokensLogitsProcessor(list(suppressed)),
            SuppressTokensAtBeginLogitsProcessor(list(first), begin),
        ):
            scores = processor(seen, scores)
        expected[row] = scores[0]
    before = logits.clone()
    assert torch.equal(penalise(logits, histories), expected) and torch.equal(logits, before)


def test_penalties_by_the_output_alone_are_those_of_openai() -> None:
    logits = torch.zeros(2, 6)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=-0.25)
    history = History(sampling, np.array([4, 4, 1, 2, 2], np.int32), 3)
    expected = [0, -(0.5 - 0.25), -(0.5 - 2 * 0.25), 0, 0, 0]
    assert penalise(logits, {1: history}).tolist() == [[0.0] * 6, expected]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small Llama."""
    folder = tmp_path_factory.mktemp("llama")
    build(FAMILIES["llama"], folder, seed=1)
    return load_model(folder)


def test_no_schedule_changes_what_is_penalised(model: LoadedModel) -> None:
    """Greedy outputs under preemption, beside requests without penalties, are what Transformers generates alone."""
    rng = np.random.default_rng(2)
    run = LiveRun(CheckedExecutor(model), RandomPolicy(4, 24))
    kinds: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": tuple(range(0, 256, 2))},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "begin_suppress_tokens": (7,)},
    ]  # fmt: skip
    requests = {}
    for i in range(25):
        fields = kinds[i % 5]
        prompt = np.tile(rng.integers(0, 256, 5), 6)[: rng.integers(5, 30)].tolist()
        request = Request(f"r{i}", prompt, 20, i % 2, Sampling(ignore_eos=True, **fields))
        requests[request.id] = request, fields
        run.engine.add_request(request)
    run.drain()
    assert run.engine.metrics()["preemptions"] > 5
    changed = 0
    for name, (request, fields) in requests.items():
        asked = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        assert run.completions[name].token_ids == generate_alone(model, request, **asked)
        changed += run.completions[name].token_ids != generate_alone(model, request)
    assert changed > 10


def test_a_suppressed_token_beyond_the_vocabulary_is_refused(model: LoadedModel) -> None:
    run = LiveRun(CheckedExecutor(model), Constant())
    with pytest.raises(UserError, match="suppress_tokens that is not from 0 to 257"):
        run.engine.add_request(Request("a", [1], 3, sampling=Sampling(suppress_tokens=(258,))))


MARK = 3


class SpoiledExecutor(CheckedExecutor):
    """Its model gives no numbers after the token MARK; `rows`: so many more rows of logits than were asked for."""

    rows = 0

    def _forward(self, tokens: Tensor, positions: Tensor, rows: Any, paged: Any, pictured: Any = None) -> Tensor:
        logits = super()._forward(tokens, positions, rows, paged, pictured)
        logits[tokens[0, rows] == MARK] = torch.nan
        return torch.cat([logits, logits[:1].expand(self.rows, -1)])


def test_a_row_without_numbers_ends_its_request_alone(model: LoadedModel) -> None:
    run = LiveRun(SpoiledExecutor(model), Constant())
    requests = [Request(f"r{i}", [10 + i, 20, 30], 12, sampling=Sampling(ignore_eos=True)) for i in range(5)]
    hopeless = [
        Request("nan", [4, MARK], 12),
        Request("nan drawn", [4, MARK], 12, sampling=Sampling(temperature=1.0, top_p=0.9, logprobs=2)),
        Request("suppressed", [4, 5], 12, sampling=Sampling(suppress_tokens=tuple(range(258)))),
    ]
    for request in (requests[0], hopeless[0], *requests[1:], *hopeless[1:]):
        run.engine.add_request(request)
    run.drain()
    for request in requests:
        assert run.completions[request.id].token_ids == generate_alone(model, request)
        assert MARK not in run.completions[request.id].token_ids
    for request in hopeless:
        completion = run.completions[request.id]
        assert completion.finish_reason == "error" and completion.error is not None
        assert "no number to choose a token by" in completion.error and completion.token_ids == []


def test_logits_that_were_not_asked_for_are_a_device_failure(model: LoadedModel) -> None:
    executor = SpoiledExecutor(model)
    executor.rows = 40
    run = LiveRun(executor, Constant())
    run.engine.add_request(Request("a", [1, 2, 3], 5))
    run.drain()
    error = run.completions["a"].error
    assert error is not None and "The device failed" in error and "logits of shape (41, 258)" in error
    executor.rows = 0
    run.engine.add_request(Request("b", [1, 2, 4], 5, sampling=Sampling(ignore_eos=True)))
    run.drain()
    assert len(run.completions["b"].token_ids) == 5


@pytest.mark.parametrize("tokens", [[1, 258], [1, -2], [1], [1, 2, 3]])
def test_tokens_that_cannot_be_never_reach_compiled_code(model: LoadedModel, tokens: list[int]) -> None:
    class Confused(CheckedExecutor):
        def execute(self, batch: Any, sampling: Any, interrupted: Any) -> Outcome:
            return super().execute(batch, sampling, interrupted)._replace(tokens=np.array(tokens))

    run = LiveRun(Confused(model), Constant())
    for name in "ab":
        run.engine.add_request(Request(name, [1, 2, 3], 5))
    run.drain()
    assert all("The device failed" in str(completion.error) for completion in run.completions.values())
