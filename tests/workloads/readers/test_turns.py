"""Recorded sessions and block hashes become what requests say and whom they wait for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flexirl.workloads.readers import read_trace
from flexirl.workloads.trace import Trace

TRACES = Path(__file__).parents[4] / "shared" / "traces"


def said(trace: Trace, number: int) -> list[tuple[int, int]]:
    """The stretches of a request."""
    row = trace.rows[number]
    first, count = int(row["content_first"]), int(row["content_count"])
    return [(int(content["origin"]), int(content["end"])) for content in trace.contents[first : first + count]]


def common(trace: Trace, a: int, b: int) -> int:
    """Tokens that two requests begin with alike."""
    alike = 0
    for (one, end), (other, other_end) in zip(said(trace, a), said(trace, b), strict=False):
        if one != other:
            break
        alike = min(end, other_end)
        if end != other_end:
            break
    return alike


def test_block_hashes_say_which_requests_begin_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hashes: list[list[int]] = []
    for _ in range(60):  # paths down a tree, where a block's hash says all that stands before it
        path = list(hashes[rng.integers(len(hashes))][: rng.integers(1, 9)]) if hashes and rng.random() < 0.7 else []
        hashes.append(path + [int(rng.integers(10**9)) for _ in range(rng.integers(1, 6))])
    lines = [
        {"timestamp": i, "input_length": 512 * len(path) - int(rng.integers(500)), "output_length": 1, "hash_ids": path}
        for i, path in enumerate(hashes)
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    trace = read_trace(path)
    for a in range(60):
        assert said(trace, a)[-1][1] == lines[a]["input_length"]
        for b in range(a):
            blocks = next(
                (i for i, (x, y) in enumerate(zip(*(hashes[n] for n in (a, b)), strict=False)) if x != y), None
            )
            if blocks is None:
                blocks = min(len(hashes[a]), len(hashes[b]))
            assert common(trace, a, b) in (512 * blocks, *(int(lines[n]["input_length"]) for n in (a, b) if blocks))
    assert len(trace.contents) < sum(map(len, hashes))


def test_a_log_of_sessions_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens,session_id,cached_tokens\n"
        "0,100,50,a,0\n3,70,10,b,0\n10,180,20,a,150\n11,500,1,,0\n30,120,5,a,90\n31,300,5,b,75\n"
    )
    trace = read_trace(path)
    assert trace.rows["follows"].tolist() == [0, 0, 2, 0, 2, 4]
    assert trace.rows["delay_s"] == pytest.approx([0, 0, 10 - 50 * 0.02, 0, 20 - 20 * 0.02, 28 - 10 * 0.02])
    assert common(trace, 0, 2) == 150  # the prompt and the answer
    assert common(trace, 2, 4) == common(trace, 0, 4) == 90  # something before was taken back
    assert common(trace, 1, 5) == 75 and common(trace, 0, 1) == 0
    assert said(trace, 3) == [] and said(trace, 4)[-1][1] == 125


def test_the_next_turn_of_a_chat_names_its_parent(tmp_path: Path) -> None:
    chats = [(1, -1, 0.0, 20), (2, 1, 9.0, 40), (3, -1, 10.0, 20), (4, 2, 30.0, 60), (5, 77, 31.0, 20)]
    lines = [
        {"chat_id": chat, "parent_chat_id": parent, "timestamp": at, "input_length": tokens, "output_length": 100,
         "hash_ids": list(range(100 * (chat == 3), 100 * (chat == 3) + -(-tokens // 16)))}
        for chat, parent, at, tokens in chats
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    trace = read_trace(path)
    assert trace.rows["follows"].tolist() == [0, 1, 0, 2, 0]
    assert trace.rows["delay_s"] == pytest.approx([0, 7, 0, 19, 0])


def test_a_trimmed_trace_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = [f"{i},{100 + 50 * i},10,{i % 3},{90 + 50 * i if i > 2 else 0}" for i in range(12)]
    path.write_text("arrival_s,prompt_tokens,output_tokens,session_id,cached_tokens\n" + "\n".join(rows))
    trace = read_trace(path)
    part = Trace(trace.rows[6:9].copy(), "part", 1, contents=trace.contents)
    assert [said(part.trimmed(), i) for i in range(3)] == [said(trace, 6 + i) for i in range(3)]
    assert len(part.trimmed().contents) < len(trace.contents)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the traces are not beside the repository")
def test_agents_come_back_with_what_they_said() -> None:
    trace = read_trace(TRACES / "agentic_cc.val.csv.gz")
    follows = np.flatnonzero(trace.rows["follows"])
    assert len(follows) > 0.9 * len(trace)
    for r in follows[:: len(follows) // 200].tolist():
        before = r - int(trace.rows["follows"][r])
        most = int(trace.rows["prompt_tokens"][before] + trace.rows["output_tokens"][before])
        assert common(trace, before, r) == min(int(trace.rows["prefix_tokens"][r]), most)
