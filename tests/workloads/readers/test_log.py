"""Logs of services, as they come: names, times, classes, blanks, order."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.workloads.readers import read_trace
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

START = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
AFTER_S = [0.0, 0.25, 3.5, 60.0, 4000.125]


def written(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("arrival_s", lambda at: f"{(at - START).total_seconds()}"),
        ("timestamp_ms", lambda at: f"{1e3 * (at - START).total_seconds()}"),
        ("ts", lambda at: f"{at.timestamp():.3f}"),
        ("timestamp", lambda at: f"{at.timestamp() * 1e3:.0f}"),
        ("created_at", lambda at: f"{at.timestamp() * 1e6:.0f}"),
        ("time", lambda at: f"{int(at.timestamp() * 1000)}000000"),
        ("request_time", lambda at: at.isoformat()),
        ("Timestamp", lambda at: at.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"),
        ("date", lambda at: at.strftime('"%Y-%m-%d %H:%M:%S,%f')[:-3] + '"'),
        ("start_time", lambda at: at.astimezone(datetime.timezone(datetime.timedelta(hours=5))).isoformat()),
    ],
)
def test_times_as_services_write_them(name, time, tmp_path: Path) -> None:
    header, time = (
        ("timestamp_ms", lambda at: f"{1e3 * (at - START).total_seconds()}") if time is None else (name, time)
    )
    instants = [START + datetime.timedelta(seconds=after) for after in AFTER_S]
    path = written(
        tmp_path / "t.csv", f"{header},prompt_tokens,completion_tokens", [f"{time(at)},5,7" for at in instants]
    )
    assert read_trace(path).rows["arrival_s"] == pytest.approx(AFTER_S, abs=2e-3)


def test_rows_are_sorted_and_tenants_and_classes_are_words(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.csv",
        "ts,user,input_tokens,output_tokens,service_tier,completion_window,max_tokens",
        ["30,bob,10,4,flex,24h,8", "10,alice,20,5,default,,5", "20,bob,30,6,batch,90,", "40,,40,7,,,100"],
    )
    rows = read_trace(path).rows
    assert rows["arrival_s"].tolist() == [10, 20, 30, 40]
    assert rows["request_class"].tolist() == [IMMEDIATE, DEFERRED, DEFERRED, IMMEDIATE]
    assert rows["window_s"].tolist() == [np.inf, 90.0, 86400.0, np.inf]
    assert rows["prompt_tokens"].tolist() == [20, 30, 10, 40]
    assert rows["tenant"][1] == rows["tenant"][2] and len(set(rows["tenant"].tolist())) == 3
    # Nobody's limit tells more than the longest output of the file; where none is given, that is it.
    assert rows["max_tokens"].tolist() == [5, 7, 7, 7]


def test_nested_lines_and_columns_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    records = [
        {
            "created": 1.7e9 + i, "usage": {"prompt_tokens": 5 + i, "completion_tokens": 3}, "who": f"u{i % 2}",
            "is_batch": i == 2,
        }
        for i in range(3)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(record) for record in records))
    rows = read_trace(path, columns={"tenant": "who"}).rows
    assert rows["arrival_s"].tolist() == [0, 1, 2] and rows["prompt_tokens"].tolist() == [5, 6, 7]
    assert rows["tenant"].tolist() == [0, 1, 0] and rows["request_class"].tolist() == [0, 0, 1]
    own = written(tmp_path / "t.csv", "when;in;out", ["3;4;5", "1;6;7"])
    rows = read_trace(own, columns={"arrival": "when", "prompt_tokens": "in", "output_tokens": "out"}).rows
    assert rows["arrival_s"].tolist() == [1, 3] and rows["output_tokens"].tolist() == [7, 5]


def test_a_few_lines_without_lengths_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"{i},{'' if i == 7 else 10},{'null' if i == 9 else 5}" for i in range(40)]
    path = written(tmp_path / "t.csv", "arrival_s,prompt_tokens,completion_tokens", lines)
    with caplog.at_level(logging.WARNING):
        assert len(read_trace(path)) == 38
    assert "2 of 40 lines" in caplog.text and "first in line 9, column prompt_tokens" in caplog.text
    path = written(tmp_path / "t.csv", "arrival_s,prompt_tokens,completion_tokens", [f"{i},10," for i in range(40)])
    with pytest.raises(UserError, match=r"40 of 40 lines lack .* line 2, column completion_tokens"):
        read_trace(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_they_like(end: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(end.join(["ts,prompt_tokens,output_tokens", "1,2,3", "2,3,4"]).encode())
    assert read_trace(path).rows["prompt_tokens"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("ts,prompt_tokens,output_tokens", "noon,5,5", "line 3 has ts='noon', which is no time; it should be seconds"),
        ("ts,prompt_tokens,output_tokens", "inf,5,5", "line 3 has ts='inf', which is no time"),
        ("ts,prompt_tokens,output_tokens", "1,many,5", "line 3, column prompt_tokens is 'many'; it should be a number"),
        (
            "ts,prompt_tokens,output_tokens,class",
            "1,5,5,nightly",
            "line 3, column class is 'nightly'.*immediate or defer",
        ),
        ("ts,prompt_tokens,output_tokens,window_s", "1,5,5,soon", "line 3, column window_s is 'soon'.*24h"),
        ("ts,prompt_tokens,output_tokens,output_tokens", "1,5,5,6", "2 columns 'output_tokens'"),
        ("ts,prompt,answer", "1,5,5", "has columns ts, prompt, answer.*workload.columns"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(header: str, row: str, message: str, tmp_path: Path) -> None:
    good = ",".join(["2"] + ["5"] * (header.count(",") - 0))
    good = good if "class" not in header and "window" not in header else good.rsplit(",", 1)[0] + ","
    with pytest.raises(UserError, match=message):
        read_trace(written(tmp_path / "t.csv", header, [good, row]))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "ts,prompt_tokens,output_tokens", ["1,5,5"])
    with pytest.raises(UserError, match="no column 'when' for arrival; its columns are ts, prompt_tokens"):
        read_trace(path, columns={"arrival": "when"})
    with pytest.raises(UserError, match="'arrivals'; choose from arrival, prompt_tokens"):
        read_trace(path, columns={"arrivals": "ts"})


def test_numbers_alone_are_read_as_cell_by_cell(tmp_path: Path) -> None:
    """The fast way and the careful one, which a text among the columns asks for."""
    rng = np.random.default_rng(0)
    times, counts = np.sort(1e3 * rng.random(500)), rng.integers(1, 12, (500, 3))
    lines = [f"{time:.3f},{','.join(map(str, row))}" for time, row in zip(times, counts, strict=True)]
    fast = read_trace(written(tmp_path / "a.csv", "arrival_s,prompt_tokens,output_tokens,client_id", lines)).rows
    careful = written(
        tmp_path / "b.csv", "arrival_s,prompt_tokens,output_tokens,client_id,class", [f"{line},chat" for line in lines]
    )
    assert (read_trace(careful).rows == fast).all()
