"""Traces with block hashes, Mooncake's and Qwen-Bailian's: units, sizes of blocks, and hashes that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexirl.errors import UserError
from flexirl.workloads.readers import read_trace

PROMPTS = (264, 660, 40, 264)
HASHES: list[list[int]] = [list(range(17)), [*range(8), *range(100, 134)], [0, 1, 2], list(range(17))]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def bailian(**more: Any) -> list[dict[str, Any]]:
    """A conversation service's requests: seconds, and a hash for every 16 tokens."""
    return [
        {"chat_id": i, "parent_chat_id": -1, "timestamp": 38.5 * i, "input_length": prompt, "output_length": 20 + i,
         "type": "text", "turn": 1, "hash_ids": hashes, **more}
        for i, (prompt, hashes) in enumerate(zip(PROMPTS, HASHES, strict=True))
    ]  # fmt: skip


def test_bailian_is_recognised_in_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path / "qwen.jsonl", *bailian())).rows
    assert rows["arrival_s"].tolist() == [0.0, 38.5, 77.0, 115.5]
    assert rows["prompt_tokens"].tolist() == list(PROMPTS) and rows["output_tokens"].tolist() == [20, 21, 22, 23]
    assert rows["prefix_tokens"].tolist() == [0, 128, 40, 264]


def test_bailian_from_elsewhere_is_not_taken_for_mooncake(traces: Path) -> None:
    path = traces.parent / "cases" / "bailian_seconds_16.jsonl"
    if not path.is_file():
        pytest.skip("the recorded case is not on this machine")
    trace = read_trace(path)
    assert trace.duration_s > 100 and trace.rows["prefix_tokens"].max() < trace.rows["prompt_tokens"].min()


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    others = [{k: v for k, v in record.items() if k not in ("chat_id", "parent_chat_id")} for record in bailian()]
    path = write(tmp_path / "t.jsonl", *others)
    with pytest.raises(UserError, match=r"line 1 has 17 hash_ids for 264 prompt tokens, .* blocks of 512 tokens"):
        read_trace(path)
    path = write(tmp_path / "t.jsonl", *bailian(hash_ids=[1]))
    with pytest.raises(UserError, match=r"line 1 has 1 hash_ids for 264 .* blocks of 16 tokens"):
        read_trace(path)
    csv = tmp_path / "t.csv"
    csv.write_text("arrival_s,prompt_tokens,output_tokens,hash_ids\n0,10,1,1\n1,264,1," + " ".join("1" * 17) + "\n")
    with pytest.raises(UserError, match=r"line 3 has 17 hash_ids for 264 prompt tokens"):
        read_trace(csv)


def test_a_partly_filled_last_block_may_be_hashed_or_not(tmp_path: Path) -> None:
    for hashes in ([1], [1, 2]):
        record = {"timestamp": 0, "input_length": 700, "output_length": 1, "hash_ids": hashes}
        again = record | {"timestamp": 5}
        rows = read_trace(write(tmp_path / "t.jsonl", record, again)).rows
        assert rows["prefix_tokens"].tolist() == [0, min(512 * len(hashes), 700)]
        assert rows["arrival_s"].tolist() == [0.0, 0.005]


def test_lines_without_hashes_are_asked_for_their_units(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"timestamp": 1.5, "input_length": 5, "output_length": 5})
    with pytest.raises(UserError, match=r"timestamp, input_length, output_length, .*format=mooncake"):
        read_trace(path)
    assert read_trace(path, format="mooncake").rows["arrival_s"].tolist() == [0.0015]


@pytest.mark.parametrize("hashes", [{"0": 1}, "12", [[1]], [{"a": 1}], [1.5], [True], 7])
def test_hashes_that_are_none_are_refused(tmp_path: Path, hashes: Any) -> None:
    good = {"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1]}
    path = write(tmp_path / "t.jsonl", good, good | {"hash_ids": hashes})
    with pytest.raises(UserError, match=r"line 2 has hash_ids=.*list of whole numbers or strings"):
        read_trace(path)
    session = {"requests": [{"t": 0, "in": 10, "out": 1, "hash_ids": hashes}]}
    (tmp_path / "s.json").write_text(json.dumps(session))
    with pytest.raises(UserError, match=r"request 1 has hash_ids=.*list of whole numbers or strings"):
        read_trace(tmp_path / "s.json")


def test_json_lists_in_a_csv_are_hashes(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    header = "arrival_s,prompt_tokens,output_tokens,hash_ids\n"
    path.write_text(header + '0,1100,1,"[1, 2, 3]"\n1,1300,1,"[1,2,4]"\n2,700,1,"[""1"", ""2""]"\n')
    assert read_trace(path).rows["prefix_tokens"].tolist() == [0, 1024, 0]
    path.write_text(header + '0,1100,1,"{""1"": 2}"\n')
    with pytest.raises(UserError, match="line 2 has hash_ids="):
        read_trace(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_only_line_ends_end_lines(tmp_path: Path, separator: str) -> None:
    record = {"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1], "note": f"a{separator}b"}
    assert len(read_trace(write(tmp_path / "t.jsonl", record, record))) == 2
    (tmp_path / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens,note\r\n0,1,1,a{separator}b\r\n1,1,1,c\r\n")
    assert len(read_trace(tmp_path / "t.csv")) == 2


def test_a_number_too_large_for_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"timestamp": 1' + "0" * 400 + ', "input_length": 1, "output_length": 1, "hash_ids": []}'
    )
    with pytest.raises(UserError, match="line 1 has timestamp=1000"):
        read_trace(tmp_path / "t.jsonl")
