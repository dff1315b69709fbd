"""generation_config.json is honoured as Transformers' `generate` does, or the model is refused, naming the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_toys import LiveRun, RandomPolicy
from model_toys import FAMILIES, CheckedExecutor, generate_alone

from flexirl.errors import UserError
from flexirl.experiments.prompts import PromptParser
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import build


def model_with(folder: Path, **fields: Any) -> LoadedModel:
    """A small Llama with these fields in its generation_config.json."""
    build(FAMILIES["llama"], folder, seed=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, **fields}))
    return load_model(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "eos_token_id": [257, 3]},
        {"suppress_tokens": list(range(0, 250, 2)), "begin_suppress_tokens": list(range(1, 200, 2))},
        {"min_new_tokens": 12, "eos_token_id": list(range(128, 258))},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
        {"num_beams": 1, "typical_p": 1.0, "bad_words_ids": None, "guidance_scale": 1.0, "min_length": 0},
    ],
)
def test_greedy_outputs_are_those_of_generate(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = model_with(tmp_path, **fields)
    plain = model_with(tmp_path / "plain", eos_token_id=257)
    parser = PromptParser(model, tmp_path, 25, 100)
    rng = np.random.default_rng(2)
    run = LiveRun(CheckedExecutor(model), RandomPolicy(4, 24))
    requests = {}
    for i in range(10):
        prompt = np.tile(rng.integers(0, 256, 5), 6)[: rng.integers(5, 30)].tolist()
        requests[f"r{i}"] = parser.request(f"r{i}", {"prompt_token_ids": prompt})
        run.engine.add_request(requests[f"r{i}"])
    run.drain()
    found = {name: run.completions[name].token_ids for name in requests}
    assert found == {name: generate_alone(model, request) for name, request in requests.items()}
    differs = found != {name: generate_alone(plain, request) for name, request in requests.items()}
    assert differs == (not {"temperature", "num_beams"} & set(fields) or fields.get("repetition_penalty") is not None)


def test_what_a_model_samples_with_is_what_requests_that_do_not_say_get(tmp_path: Path) -> None:
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    parser = PromptParser(model_with(tmp_path, **sampled, repetition_penalty=1.1), tmp_path, 25, 100)
    ids: dict[str, Any] = {"prompt_token_ids": [1, 2]}
    own = Sampling(temperature=0.6, top_p=0.9, top_k=50, repetition_penalty=1.1)
    assert parser.request("a", {**ids}).sampling == own
    asked = parser.request("b", {**ids, "temperature": 0, "top_k": -1, "repetition_penalty": 1.0, "seed": 3}).sampling
    assert asked == Sampling(top_p=0.9, seed=3)
    assert load_model(tmp_path).sampling == own
    assert model_with(tmp_path / "greedy", do_sample=False, temperature=0.6, top_k=9).sampling == Sampling(top_k=9)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"eos_token_id": [257, "x"]}, "'x' in it, which is no token's number"),
        ({"suppress_tokens": [-1]}, r"has -1 in suppress_tokens, which is not from 0 to 257"),
        ({"begin_suppress_tokens": [1000]}, "1000 in begin_suppress_tokens"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"bad_words_ids": [[1]]}, r"bad_words_ids=\[\[1\]\], which is not supported"),
        ({"num_beams": 4}, "num_beams=4, which is not supported"),
        ({"do_sample": True, "min_p": 0.1}, "min_p=0.1, which is not supported"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id=3"),
        ({"min_length": 30}, "min_length=30"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model_with(tmp_path, **fields)


@pytest.mark.parametrize("ends", [258, -1, [257, 300]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_token_is_refused_before_anything_runs(tmp_path: Path, ends: Any, file: str) -> None:
    build({**FAMILIES["llama"], **({"eos_token_id": ends} if file == "config.json" else {})}, tmp_path, seed=1)
    if file == "generation_config.json":
        (tmp_path / file).write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match=r"eos_token_id (258|-1|300), which is not from 0 to 257"):
        CheckedExecutor(load_model(tmp_path))
