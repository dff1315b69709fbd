"""Immediate requests by OpenAI's own client, over loopback, in front of the engine on the tiny model.

What it says is held against Transformers' own `generate`.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import torch
from openai import OpenAI
from served import Served
from serving_toys import line
from transformers import AutoModelForCausalLM

from flexirl.policies.registry import PRETRAINED_FILE
from flexirl.runtime.models.loading import load_model
from flexirl.runtime.models.tiny import tiny_model
from flexirl.serving.token_text import TokenText


@cache
def alone() -> Any:
    """The tiny model as Transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(tiny_model("tiny"))


def generate(prompt: str, max_tokens: int) -> list[int]:
    """The likeliest tokens by Transformers."""
    tokens = torch.tensor([load_model("tiny").tokenizer(prompt)["input_ids"]])
    output = alone().generate(tokens, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    return output[0, tokens.shape[1] :].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(load_model("tiny"), tmp_path_factory.mktemp("served"))
    yield served
    served.close()


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client


def chat(client: OpenAI, text: str, **options: Any) -> Any:
    given = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **given)


def text_of(served: Served, prompt: str, max_tokens: int) -> str:
    tokens = generate(prompt, max_tokens)
    return str(served.model.tokenizer.decode(tokens, skip_special_tokens=True))


def test_texts_are_those_of_transformers(served: Served, client: OpenAI) -> None:
    prompts = ["One upon a time", "x", "The end"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=20, temperature=0)
    assert [choice.text for choice in answer.choices] == [text_of(served, prompt, 20) for prompt in prompts]
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, prompts))
    by_number = client.completions.create(
        model="tiny", prompt=served.model.tokenizer("x")["input_ids"], max_tokens=20, temperature=0
    )
    assert by_number.choices[0].text == answer.choices[1].text
    assert client.completions.create(model="tiny", prompt="x").usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_a_chat_without_a_template_is_lines_of_who_speaks(served: Served, client: OpenAI) -> None:
    answer = chat(client, "Hi")
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text_of(served, "user: Hi\nassistant: ", 12)
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=12, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_the_model_s_own_template_is_used(served: Served, client: OpenAI) -> None:
    served.model.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    try:
        assert chat(client, "Hi").choices[0].message.content == text_of(served, "<Hi>", 12)
        served.model.tokenizer.chat_template = "{{ raise_exception('only Greek') }}"
        with pytest.raises(openai.BadRequestError, match="only Greek"):
            chat(client, "Hi")
    finally:
        served.model.tokenizer.chat_template = None


@pytest.mark.parametrize(
    "options", [{}, {"n": 3, "temperature": 1.0, "seed": 5}, {"logprobs": True, "top_logprobs": 2}]
)
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, options: dict[str, Any]) -> None:
    whole = chat(client, "Tell me", **options)
    usage: Any = {"include_usage": True}
    chunks = list(chat(client, "Tell me", stream=True, stream_options=usage, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
    for i, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == i]
        assert mine[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
        if options.get("logprobs"):
            streamed = [entry for each in mine if each.logprobs for entry in each.logprobs.content]
            assert [(entry.token, entry.logprob) for entry in streamed] == [
                (entry.token, pytest.approx(entry.logprob, abs=1e-5)) for entry in choice.logprobs.content
            ]
    assert len({choice.message.content for choice in whole.choices}) == len(whole.choices)


def test_log_probabilities_are_the_model_s(served: Served, client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=3, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    tokens = served.model.tokenizer("abc")["input_ids"] + generate("abc", 3)
    with torch.no_grad():
        logits = alone()(torch.tensor([tokens])).logits[0, 2:-1]
    expected = torch.log_softmax(logits, -1)
    chosen = expected[torch.arange(3), torch.tensor(tokens[3:])].tolist()
    assert logprobs.token_logprobs == pytest.approx(chosen, abs=1e-4)
    assert [len(likeliest) for likeliest in logprobs.top_logprobs] == [2, 2, 2]


def test_what_was_said_before_is_cached_and_counted(client: OpenAI) -> None:
    start = "A long beginning that both have in common. " * 4
    assert chat(client, start + "one").usage.prompt_tokens_details.cached_tokens == 0
    again = chat(client, start + "two").usage
    assert again.prompt_tokens_details.cached_tokens == (len("user: ") + len(start)) // 16 * 16


def test_stops_end_an_answer(served: Served, client: OpenAI) -> None:
    said = text_of(served, "user: Hi\nassistant: ", 40)
    stop = said[5:7]
    answer = chat(client, "Hi", max_tokens=40, stop=[stop])
    assert answer.choices[0].message.content == said[: said.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "options, param",
    [
        ({"max_tokens": 0}, "max_tokens"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"), ({"logit_bias": {"5": 1}}, "logit_bias"), ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"), ({"max_tokens": 5000}, "messages"),
        ({"service_tier": "gold"}, "service_tier"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_by_name(client: OpenAI, options: dict[str, Any], param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, "Hi", stream=stream, **options)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b'{"messages": NaN}', b'{"messages": [{"role": "user"}'
        b', 5]}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [], "model": "tiny"}',
        b'{"messages": [{"role": "tool", "content": "x"}]}', b'{"max_tokens": 1' + b"0" * 6000 + b"}",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}',
    ],
)  # fmt: skip
def test_broken_bodies_are_refused(served: Served, body: bytes) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_model_that_is_not_here_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the one that is served is 'tiny'"):
        client.completions.create(model="gpt-6", prompt="x")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(served: Served, stream: bool) -> None:
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": stream}
    fields["ignore_eos"] = True  # drawn tokens may end it before the client has gone
    cancelled = served.backend.figures()["ended_otherwise"]

    def look_and_leave() -> None:
        with (
            httpx.Client(timeout=0.3) as client,
            client.stream("POST", f"{served.url}/v1/chat/completions", json=fields) as answer,
        ):
            for each in answer.iter_lines():
                if '"content"' in each and '"role"' not in each:  # its first token: the engine has it by then
                    return

    if stream:
        look_and_leave()
    else:
        with pytest.raises(httpx.ReadTimeout):
            look_and_leave()
    for _ in range(500):
        if served.backend.figures()["ended_otherwise"] > cancelled and not served.backend._open:
            break
        time.sleep(0.01)
    assert served.backend.figures()["ended_otherwise"] == cancelled + 1
    assert not served.backend._open


def test_a_flexible_request_is_deferred_and_answered(served: Served, client: OpenAI) -> None:
    answer = chat(client, "Later", service_tier="flex")
    assert answer.service_tier == "flex"
    assert served.metrics.summary()["deferred"]["requests"] >= 1


def test_a_batch_beside_streams_on_the_engine(served: Served, client: OpenAI) -> None:
    lines = [line(f"r{i}", f"hello {i}", model="tiny", max_tokens=8, temperature=0) for i in range(40)]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    said = []
    talking = threading.Thread(target=lambda: said.extend(chat(client, "Hi", stream=True)))
    talking.start()
    while batch.status not in ("completed", "failed"):
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    talking.join()
    assert batch.request_counts is not None and batch.request_counts.completed == 40 and len(said) > 2
    for i, each in enumerate(client.files.content(batch.output_file_id or "").text.splitlines()):
        content = json.loads(each)["response"]["body"]["choices"][0]["message"]["content"]
        assert content == text_of(served, f"user: hello {i}\nassistant: ", 8)


def test_metrics_and_status_say_what_was_done(served: Served, client: OpenAI) -> None:
    chat(client, "Hi")
    text = httpx.get(f"{served.url}/metrics").text
    for name in ("flexirl_ttft_seconds_bucket", 'flexirl_promises_total{kept="', "flexirl_engine_iterations "):
        assert name in text
    status = httpx.get(f"{served.url}/status.json").json()
    assert status["model"] == "tiny" and status["engine"]["policy"] == "qoserve" and status["trouble"] is None
    assert status["served"]["immediate"]["requests"] >= 1
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"
    assert "<title>FlexiRL</title>" in httpx.get(f"{served.url}/status").text
    assert httpx.get(f"{served.url}/nothing").json()["error"]["message"] == "There is nothing at /nothing."


def test_the_dashboard_asks_for_what_is_told(served: Served, client: OpenAI) -> None:
    chat(client, "Hi")
    told = httpx.get(f"{served.url}/metrics").text
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    asked = {expression["expr"] for panel in dashboard["panels"] for expression in panel["targets"]}
    names = {name for expression in asked for name in re.findall(r"flexirl_\w+", expression)}
    assert len(names) > 10
    assert [name for name in names if f"# TYPE {name.removesuffix('_bucket')} " not in told] == []


def test_another_policy_takes_charge_and_goes_back(served: Served, client: OpenAI) -> None:
    def post(**request: Any) -> httpx.Response:
        return httpx.post(f"{served.url}/admin/policy", timeout=60, **request)

    assert post(json={"name": "sarathi"}).json() | {"known": []} == {
        "policy": "sarathi", "previous": "qoserve", "known": []
    }  # fmt: skip
    chat(client, "Hi")
    sent = post(content=PRETRAINED_FILE.read_bytes(), headers={"content-type": "application/octet-stream"})
    assert sent.status_code == 200 and sent.json()["previous"] == "sarathi"
    chat(client, "Hi")
    assert post(json={"back": True}).json()["policy"] == "sarathi"
    for bad in ({"name": "../x.onnx"}, {"name": 5}, {}, [], {"back": False}):
        assert post(json=bad).status_code == 400
    for data in (b"", b"nonsense", PRETRAINED_FILE.read_bytes()[:500]):
        assert post(content=data, headers={"content-type": "application/octet-stream"}).status_code == 400
    post(json={"name": "qoserve"})
    assert httpx.get(f"{served.url}/status.json").json()["engine"]["policy"] == "qoserve"


def test_an_engine_that_fails_comes_back_and_batches_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(load_model("tiny"), tmp_path)
    try:
        lines = [line(f"r{i}", f"hello {i}", model="tiny", max_tokens=30) for i in range(30)]
        file = served.client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = served.client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while served.backend.figures()["iterations"] < 5:
            time.sleep(0.01)
        broken = served.backend._engine

        def fail() -> bool:
            raise RuntimeError("a cosmic ray")

        monkeypatch.setattr(broken._stepping, "iterate", fail)
        while served.backend._engine is broken:
            time.sleep(0.01)
        while batch.status not in ("completed", "failed"):
            time.sleep(0.05)
            batch = served.client.batches.retrieve(batch.id)
        assert batch.request_counts is not None and batch.request_counts.completed == 30
        assert "flexirl_engine_restarts_total 1.0" in httpx.get(f"{served.url}/metrics").text
    finally:
        served.close()


def test_the_queue_is_limited_and_what_comes_too_late_is_refused(tmp_path: Path) -> None:
    served = Served(load_model("tiny"), tmp_path, queued_tokens={"default": 500})
    try:
        with pytest.raises(openai.RateLimitError, match="tokens open") as refused:
            chat(served.client, "x" * 400, max_tokens=200)
        assert refused.value.response.headers["retry-after"] == "1"
        assert chat(served.client, "x" * 400, max_tokens=20).usage.completion_tokens == 20
        served.backend._engine.state.classes["waiting_tokens"][0] = 1 << 40  # as if a crowd waited
        with pytest.raises(openai.RateLimitError, match="are promised") as late:
            chat(served.client, "Hi")
        assert int(late.value.response.headers["retry-after"]) > 1
        assert chat(served.client, "Hi", service_tier="flex").usage.completion_tokens == 12
        served.backend._engine.state.classes["waiting_tokens"][0] = 0
    finally:
        served.close()


def test_one_tenant_finds_nothing_of_another_s_in_the_cache(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    clients = {}
    served = Served(load_model("tiny"), tmp_path / "data", tenants=("one", "two"), keys=keys)
    try:
        for name in ("one", "two"):
            clients[name] = OpenAI(base_url=f"{served.url}/v1", api_key=served.keys[name], max_retries=0)
        said = "The same long question, word by word, from both of them. " * 3
        cached = [
            chat(clients[name], said).usage.prompt_tokens_details.cached_tokens for name in ("one", "two", "one", "two")
        ]
        assert cached[:2] == [0, 0] and cached[2] == cached[3] > 100
    finally:
        served.close()


def test_images_come_inside_messages(tmp_path: Path) -> None:
    served = Served(load_model("tiny-vl"), tmp_path)
    try:
        pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

        def ask(url: str) -> Any:
            content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
            return served.client.chat.completions.create(
                model="tiny-vl",
                messages=[{"role": "user", "content": content}],
                max_tokens=4,
                temperature=0,  # type: ignore[list-item, misc]
            )

        with_image = ask(url).usage
        assert with_image.prompt_tokens > len("user: What?\nassistant: ") + 2
        for bad in ("data:image/png;base64,AAAA", "data:image/png;base64,?", "file:///etc/passwd"):
            with pytest.raises(openai.BadRequestError, match="Image 0"):
                ask(bad)
    finally:
        served.close()


def test_the_bytes_of_tokens_are_those_of_their_text() -> None:
    texts = TokenText(load_model("tiny").tokenizer)
    for text in ("plain", "ä€𝄞 \n\x00", "".join(map(chr, range(128, 400)))):
        tokens = load_model("tiny").tokenizer(text)["input_ids"]
        assert b"".join(map(texts.bytes_of, tokens)) == text.encode()
    half = load_model("tiny").tokenizer("€")["input_ids"][1]
    assert texts.text_of(half) == "bytes:\\x82"
