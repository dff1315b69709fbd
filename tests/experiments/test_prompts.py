"""Lines of prompts become requests, or say in a sentence why not; what clients send anyway is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live_toys import Constant, LiveRun
from model_toys import FAMILIES, CheckedExecutor

from flexirl.errors import UserError
from flexirl.experiments.prompts import PromptParser, json_object, read_lines, take_id
from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import END, build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    build(FAMILIES["llama"], folder, seed=1)
    return load_model(folder)


def parsed(model: LoadedModel, line: str) -> Request:
    """The request in a line."""
    fields = json_object(line)
    return PromptParser(model, Path(), 50, 100).request(take_id(fields, "line 1"), fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"prompt": "x", "max_tokens": {"9" * 5000}}}', "a number of thousands of digits"),
        (f'{{"prompt": "x", "stop": {"[" * 3000}{"]" * 3000}}}', "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "x", "class": ["deferred"]}', r"class=\['deferred'\]"),
        ('{"prompt": "x", "class": {"priority": 1}}', "class="),
        ('{"prompt": "smile \\ud83d"}', "prompt='smile .*UTF-8"),
        ('{"prompt": "x", "id": "\\ud83d"}', "id=.*UTF-8"),
        ('{"prompt": "x", "id": ["a"]}', r"id=\['a'\]"),
        ('{"prompt": "x", "stop": [null]}', "stop="),
        ('{"prompt": "x", "images": {"a": 1}}', "images="),
        ('{"prompt": "x", "images": ["\\ud83d"]}', "images="),
        ('{"prompt": "x", "temperature": NaN}', "temperature=nan"),
        ('{"prompt": "x", "max_tokens": 1e999}', "max_tokens=inf"),
        ('{"prompt_token_ids": [[1], 2]}', "prompt_token_ids is not a list of whole numbers"),
    ],
)
def test_bad_lines_say_why(model: LoadedModel, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(model, line)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": None, "seed": None, "logprobs": None, "ignore_eos": None, "temperature": None, "top_p": None},
        {"stop_token_ids": None, "max_tokens": None, "class": None, "id": None, "prompt_token_ids": None},
        {"images": []},
        {"images": None, "top_k": -1},
    ],
)
def test_what_clients_send_for_nothing_is_nothing(model: LoadedModel, fields: dict[str, Any]) -> None:
    request = parsed(model, json.dumps({"prompt": "x", **fields}))
    assert (request.id, request.max_tokens, request.sampling, request.images) == ("line 1", 50, Sampling(), [])


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "y"}', encoding="utf-8-sig")
    lines = read_lines(tmp_path / "prompts.jsonl")
    assert [(place, json_object(line)["prompt"]) for place, line in lines] == [("line 1", "x"), ("line 3", "y")]


@pytest.mark.parametrize(("length", "most"), [(10, 50), (70, 30), (99, 1)])
def test_the_default_of_max_tokens_gives_way_to_a_long_prompt(model: LoadedModel, length: int, most: int) -> None:
    request = parsed(model, json.dumps({"prompt": "x" * length}))
    assert request.max_tokens == most
    request.check(100, model.vocab_size, 1, True)


def test_a_stop_string_that_is_a_special_token_stops(model: LoadedModel) -> None:
    """Where no text shows it: the end token of the tokenizer, which ignore_eos lets pass."""
    run = LiveRun(CheckedExecutor(model), Constant(), tokenizer=model.tokenizer)
    common = {"max_tokens": 90, "ignore_eos": True, "temperature": 1.5}
    lines = [json.dumps({"id": f"{i}", "prompt": "w", "seed": i, **common}) for i in range(20)]
    stopped = [json.dumps({**json.loads(line), "id": f"stop {i}", "stop": [END]}) for i, line in enumerate(lines)]
    for line in (*lines, *stopped):
        run.engine.add_request(parsed(model, line))
    run.drain()
    found = 0
    for i in range(20):
        free, done = run.completions[f"{i}"], run.completions[f"stop {i}"]
        ended = 257 in free.token_ids
        found += ended
        expected = free.token_ids[: free.token_ids.index(257) + 1] if ended else free.token_ids
        assert done.token_ids == expected and done.finish_reason == ("stop" if ended else "length")
    assert 0 < found < 20
