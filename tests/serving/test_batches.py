"""Files and batches by OpenAI's own client, over loopback, in front of a backend that says each prompt again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from serving_toys import EchoBackend, line, make_service, serving

from flexirl.serving.tenants import add_key

ENDPOINT: Any = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


def client_of(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
def client(backend: EchoBackend, tmp_path: Path) -> Iterator[OpenAI]:
    with serving(make_service(backend, tmp_path)) as url, client_of(url) as client:
        yield client


def submit(client: OpenAI, lines: list[str], window: Any = "24h", **options: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window=window, **options)


def wait(client: OpenAI, batch: Batch, *states: str) -> Batch:
    for _ in range(1000):
        batch = client.batches.retrieve(batch.id)
        if batch.status in (states or OVER):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"the batch stays {batch.status}")


def answers(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def test_a_batch_from_upload_to_answers(client: OpenAI, backend: EchoBackend) -> None:
    lines = [line(f"r{i}", f"prompt {i}") for i in range(50)] + ["", line("bad", "x", temperature=9)]
    batch = submit(client, lines, metadata={"for": "a test"})
    assert batch.object == "batch" and batch.status == "validating" and batch.metadata == {"for": "a test"}
    assert batch.expires_at == batch.created_at + 86400
    batch = wait(client, batch)
    assert batch.status == "completed" and batch.request_counts is not None and batch.usage is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (51, 50, 1)
    assert batch.usage.input_tokens == sum(len(f"prompt {i}") for i in range(50))
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
    given = answers(client, batch.output_file_id)
    assert [each["custom_id"] for each in given] == [f"r{i}" for i in range(50)]
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in given)
    said = [each["response"]["body"]["choices"][0]["message"]["content"] for each in given]
    assert said == [f"prompt {i}" for i in range(50)]
    (failed,) = answers(client, batch.error_file_id)
    assert failed["custom_id"] == "bad" and failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["param"] == "temperature"
    assert max(backend.asked.values()) == 1
    assert all(terms.request_class == 1 and 86000 < terms.window_s <= 86400 for terms in backend.terms)


def test_what_the_service_could_not_answer_is_tried_again(client: OpenAI, backend: EchoBackend) -> None:
    batch = wait(client, submit(client, [line("a", "busy 2"), line("b", "fail"), line("c", "fine")]))
    assert [each["custom_id"] for each in answers(client, batch.output_file_id)] == ["a", "c"]
    (failed,) = answers(client, batch.error_file_id)
    assert failed["custom_id"] == "b" and failed["response"]["status_code"] == 500
    assert backend.asked["fail"] == 3 and backend.asked["busy 2"] == 3


@pytest.mark.parametrize(
    "bad, code",
    [
        ("{", "invalid_json_line"), ("[]", "invalid_json_line"), ("[" * 5000, "invalid_json_line"),
        ('{"custom_id": "\\ud800", "method": "POST"}', "invalid_json_line"), ("1" * 5000, "invalid_json_line"),
        ('{"custom_id": "x"}', "missing_required_parameter"),
        (line("x", "x").replace("POST", "GET"), "invalid_method"),
        (line("x", "x").replace("chat/", ""), "mismatched_endpoint"),
        (line("x", "x").replace('"x"', "7"), "invalid_type"),
        (line("good", "x"), "duplicate_custom_id"),
    ],
)  # fmt: skip
def test_one_bad_line_fails_the_batch_and_is_named(client: OpenAI, bad: str, code: str) -> None:
    batch = wait(client, submit(client, [line("good", "a"), bad]))
    assert batch.status == "failed" and batch.failed_at and batch.errors is not None and batch.errors.data
    (error,) = batch.errors.data
    assert (error.code, error.line) == (code, 2)
    assert batch.output_file_id is None


def test_an_empty_file_fails(client: OpenAI) -> None:
    batch = wait(client, submit(client, ["", " "]))
    assert batch.errors is not None and batch.errors.data and batch.errors.data[0].code == "empty_file"


def test_a_cancelled_batch_keeps_what_is_done(client: OpenAI, backend: EchoBackend) -> None:
    backend.seconds = 0.05
    batch = submit(client, [line(f"r{i}", f"p{i}") for i in range(400)])
    while not (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.cancelling_at and batch.request_counts
    done, left = answers(client, batch.output_file_id), answers(client, batch.error_file_id)
    assert len(done) == batch.request_counts.completed > 0 and len(done) + len(left) == 400
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    assert {each["custom_id"] for each in done + left} == {f"r{i}" for i in range(400)}
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        client.batches.cancel(batch.id)


def test_a_batch_expires_and_keeps_what_is_done(backend: EchoBackend, tmp_path: Path) -> None:
    ahead_s = 0.0
    service = make_service(backend, tmp_path, clock=lambda: time.time() + ahead_s)
    with serving(service) as url, client_of(url) as client:
        batch = wait(client, submit(client, [line("a", "quick")], "1h"), "completed")
        backend.seconds = 30.0
        batch = submit(client, [line(f"r{i}", f"p{i}") for i in range(20)], "1h")
        wait(client, batch, "in_progress")
        while len(backend.asked) < 9:
            time.sleep(0.01)
        ahead_s = 3700.0
        batch = wait(client, batch)
        assert batch.status == "expired" and batch.expired_at and batch.output_file_id is None
        left = answers(client, batch.error_file_id)
        assert len(left) == 20 and {each["error"]["code"] for each in left} == {"batch_expired"}
        assert len(backend.withdrawn) == 8


def test_files_as_openai_has_them(client: OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}.jsonl", b"x" * i), purpose="batch").id for i in range(5)]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(purpose="assistants")] == []
    assert client.files.wait_for_processing(ids[3]).bytes == 3
    assert client.files.content(ids[3]).read() == b"xxx"
    assert client.files.delete(ids[3]).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(ids[3])
    expires: Any = {"anchor": "created_at", "seconds": 3600}
    soon = client.files.create(file=("a", b"1"), purpose="batch", expires_after=expires)
    assert soon.expires_at == soon.created_at + 3600


def test_a_file_that_a_batch_needs_stays(client: OpenAI, backend: EchoBackend) -> None:
    backend.seconds = 30.0
    batch = submit(client, [line("a", "b")])
    with pytest.raises(openai.ConflictError, match="is the input of"):
        client.files.delete(batch.input_file_id)
    client.batches.cancel(batch.id)
    wait(client, batch)
    assert client.files.delete(batch.input_file_id).deleted


def test_batches_are_listed_by_page(client: OpenAI) -> None:
    ids = [submit(client, [line("a", "b")]).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]
    page = client.batches.list(limit=2)
    assert page.has_more and [batch.id for batch in page.data] == ids[:2:-1]


@pytest.mark.parametrize(
    "change, status",
    [
        ({"completion_window": "soon"}, 400), ({"endpoint": "/v1/embeddings"}, 400), ({"input_file_id": "file-0"}, 404),
        ({"metadata": {str(i): "" for i in range(17)}}, 400), ({"metadata": {"a": 1}}, 400), ({"more": 1}, 400),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_is_refused(client: OpenAI, change: dict[str, Any], status: int) -> None:
    file = client.files.create(file=("a", b"1"), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h", **change}
    answer = httpx.post(f"{client.base_url}batches", json=body)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_uploads_that_are_none_are_refused(backend: EchoBackend, tmp_path: Path) -> None:
    with serving(make_service(backend, tmp_path, most_bytes=1000)) as url:
        form = {"purpose": "batch"}
        assert httpx.post(f"{url}/v1/files", data=form, files={"file": ("a", b"x" * 1001)}).status_code == 413
        assert httpx.post(f"{url}/v1/files", data=form, files={"file": ("a", b"x" * 3_000_000)}).status_code == 413
        assert httpx.post(f"{url}/v1/files", data={"purpose": "fun"}, files={"file": ("a", b"x")}).status_code == 400
        assert httpx.post(f"{url}/v1/files", data=form).status_code == 400
        kind = {"content-type": "multipart/form-data; boundary=x"}
        for body in (b"", b"--x\r\n", b"--x\r\n\r\n\r\n--x--", b"\xff" * 100):
            assert httpx.post(f"{url}/v1/files", content=body, headers=kind).status_code == 400
        good = httpx.post(f"{url}/v1/files", data=form, files={"file": ("../../etc/x", b"x" * 1000)})
        assert good.status_code == 200
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "aside", "files", "flexirl.sqlite", "flexirl.sqlite-shm", "flexirl.sqlite-wal", "lock"
        ]  # fmt: skip
        for name in ("../flexirl.sqlite", "%2e%2e%2fflexirl.sqlite", "..%2f..%2fetc%2fpasswd"):
            assert httpx.get(f"{url}/v1/files/{name}/content").status_code == 404


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ({}, True), ({"host": "localhost:80"}, True), ({"host": "[::1]:80"}, True), ({"host": "evil.example"}, False),
        ({"host": "127.0.0.1.evil.example"}, False), ({"host": "["}, False), ({"origin": "http://evil.example"}, False),
        ({"host": "localhost:80", "origin": "http://localhost:80"}, True), ({"origin": "null"}, False),
    ],
)  # fmt: skip
def test_without_keys_pages_from_elsewhere_are_refused(
    backend: EchoBackend, tmp_path: Path, headers: dict[str, str], allowed: bool
) -> None:
    with serving(make_service(backend, tmp_path)) as url:
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == (200 if allowed else 403)


def test_tenants_do_not_see_each_other(backend: EchoBackend, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    one, two = add_key(keys, "one"), add_key(keys, "two", requests_per_minute=1)
    admin = add_key(keys, "chief", admin=True)
    assert one not in keys.read_text()
    with serving(make_service(backend, tmp_path / "data", keys=keys)) as url:
        mine, theirs = client_of(url, one), client_of(url, two)
        batch = wait(mine, submit(mine, [line("a", "b")]))
        assert backend.terms[0].tenant == "one"
        for call, name in (
            (theirs.files.retrieve, batch.input_file_id), (theirs.files.content, batch.output_file_id),
            (theirs.files.delete, batch.input_file_id), (theirs.batches.retrieve, batch.id),
            (theirs.batches.cancel, batch.id),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                call(name)  # type: ignore[operator]
        assert not theirs.files.list().data and not theirs.batches.list().data
        with pytest.raises(openai.NotFoundError):
            theirs.batches.create(input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h")
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "fx-wrong").files.list()
        assert httpx.get(f"{url}/status.json").status_code == 401
        assert httpx.get(f"{url}/status.json", headers={"authorization": f"Bearer {one}"}).status_code == 403
        assert httpx.get(f"{url}/status.json", headers={"authorization": f"Bearer {admin}"}).status_code == 200
        hello: Any = [{"role": "user", "content": "hello"}]
        theirs.chat.completions.create(model="echo", messages=hello)
        with pytest.raises(openai.RateLimitError) as refused:
            theirs.chat.completions.create(model="echo", messages=hello)
        assert int(refused.value.response.headers["retry-after"]) in range(1, 61)


def test_a_batch_that_will_be_late_is_warned_of_or_refused(backend: EchoBackend, tmp_path: Path) -> None:
    backend.seconds = 0.1
    for refuse_late in (False, True):
        service = make_service(backend, tmp_path / str(refuse_late), refuse_late=refuse_late, most=2)
        with serving(service) as url, client_of(url) as client:
            first = submit(client, [line(f"r{i}", "p") for i in range(30)])
            assert wait(client, first).to_dict()["warning"] is None
            late = submit(client, [line(f"r{i}", "p") for i in range(1000)], "10s")
            late = wait(client, late, "failed") if refuse_late else wait(client, late, "in_progress", "expired")
            said = late.errors.data[0].message if refuse_late else late.to_dict()["warning"]  # type: ignore[union-attr, index]
            assert "1,000" in str(said) and "the window ends in" in str(said)
