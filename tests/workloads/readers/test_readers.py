"""Trace readers: every format, agreement between formats, and bad files."""

import gzip
import json
import logging

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.workloads.readers import FORMATS, read_lengths, read_trace
from flexirl.workloads.readers.formats import sample_of
from flexirl.workloads.trace import check


def write(path, text):
    path.write_text(text)
    return path


def test_normalised(tmp_path):
    path = write(
        tmp_path / "t.csv",
        "arrival_s,prompt_tokens,output_tokens,num_images,image_tokens,client_id,prefix_hit_tokens\n"
        "5.5,10,3,1,4,70,8\n2.0,20,9,0,0,7,0\n5.5,11,1,0,0,70,0\n",
    )
    trace = read_trace(path)
    rows = trace.rows
    assert rows["arrival_s"].tolist() == [2.0, 5.5, 5.5]  # the offset is kept
    assert rows["prompt_tokens"].tolist() == [20, 10, 11]  # ties keep their order
    assert rows["tenant"].tolist() == [0, 1, 1] and trace.num_tenants == 2
    assert rows["num_images"].tolist() == [0, 1, 0] and rows["image_tokens"].tolist() == [0, 4, 0]
    assert rows["prefix_tokens"].tolist() == [0, 8, 0]
    assert (rows["max_tokens"] == 9).all()


def test_prefix_hits_from_hash_ids(tmp_path):
    path = write(
        tmp_path / "t.csv",
        "arrival_s,prompt_tokens,output_tokens,hash_ids\n0,1100,1,1 2 3\n1,1300,1,1 2 4\n2,700,1,1 2\n3,600,1,9 2\n",
    )
    assert read_trace(path).rows["prefix_tokens"].tolist() == [0, 1024, 700, 0]


def test_lengths_without_arrivals(tmp_path):
    path = write(tmp_path / "t.csv", "prompt_tokens,output_tokens,prob\n10,2,0.3\n20,1,0.7\n")
    rows, weights = read_lengths(path)
    assert rows["prompt_tokens"].tolist() == [10, 20] and weights.tolist() == [0.3, 0.7]
    with pytest.raises(UserError, match=r"no arrival times.*empirical"):
        read_trace(path)


def test_burstgpt_drops_failed_requests(tmp_path, caplog):
    path = write(
        tmp_path / "BurstGPT.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n",
    )
    with caplog.at_level(logging.WARNING):
        trace = read_trace(path)
    assert trace.rows["arrival_s"].tolist() == [5.0, 118.0]
    assert trace.rows["output_tokens"].tolist() == [18, 276]
    assert "1 failed requests" in caplog.text


def test_zero_lengths_become_one(tmp_path, caplog):
    path = write(tmp_path / "t.csv", "arrival_s,prompt_tokens,output_tokens\n0,10,0\n1,10,5\n")
    with caplog.at_level(logging.WARNING):
        assert read_trace(path).rows["output_tokens"].tolist() == [1, 5]
    assert "1 requests with output_tokens=0" in caplog.text


@pytest.mark.parametrize("kind", ["conv", "code"])
def test_azure_agrees_with_the_normalised_file(traces, kind):
    original = read_trace(traces / f"original_formats/azure23/AzureLLMInferenceTrace_{kind}.csv").rows
    normalised = read_trace(traces / f"azure23_{kind}.csv.gz").rows[: len(original)]
    assert original["arrival_s"] == pytest.approx(normalised["arrival_s"], abs=1e-6)
    for column in ("prompt_tokens", "output_tokens"):
        assert (original[column] == normalised[column]).all()


def test_vidur_agrees_with_azure(traces):
    vidur = read_trace(traces / "original_formats/vidur/splitwise_conv.csv").rows
    azure = read_trace(traces / "azure23_conv.csv.gz").rows[: len(vidur)]
    assert vidur["arrival_s"] == pytest.approx(azure["arrival_s"], abs=1e-5)
    assert (vidur["prompt_tokens"] == azure["prompt_tokens"]).all()


def test_vidur_lengths(traces):
    original, _ = read_lengths(
        traces / "original_formats/vidur/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
    )
    normalised, _ = read_lengths(traces / "lengths_arxiv_summ.csv.gz")
    assert (original["prompt_tokens"] == normalised["prompt_tokens"][: len(original)]).all()


def test_mooncake_agrees_with_the_normalised_file(traces):
    original = read_trace(traces / "original_formats/mooncake/synthetic_trace.jsonl").rows
    normalised = read_trace(traces / "mooncake_synthetic.csv.gz").rows
    assert original["arrival_s"] == pytest.approx(normalised["arrival_s"], abs=1e-6)
    for column in ("prompt_tokens", "output_tokens", "prefix_tokens"):
        assert (original[column] == normalised[column]).all()


def test_agent_sessions_agree_with_the_normalised_file(traces):
    session = read_trace(traces / "original_formats/agentic_cc/traces/trace_0274.json").rows
    with (
        gzip.open(traces / "agentic_cc.csv.gz", "rt") as train,
        gzip.open(traces / "agentic_cc.val.csv.gz", "rt") as val,
    ):
        lines = [line.split(",") for file in (train, val) for line in file if line.split(",")[3] == "274"]
    expected = sorted((float(f[5]), int(f[1]), int(f[6])) for f in lines)
    got = sorted(zip(*(session[c].tolist() for c in ("arrival_s", "prompt_tokens", "prefix_tokens")), strict=True))
    assert np.array(got) == pytest.approx(np.array(expected), abs=1e-3)


def test_agent_session_folder_is_seeded(traces):
    folder = traces / "original_formats/agentic_cc/traces"
    one, two, other = (read_trace(folder, seed=seed) for seed in (1, 1, 2))
    assert (one.rows == two.rows).all() and not (one.rows["arrival_s"] == other.rows["arrival_s"]).all()
    assert len(one) == len(other)


@pytest.mark.parametrize("service", ["language/m-large", "multimodal/mm-image", "reason/deepseek-r1"])
def test_servegen(traces, service):
    folder = traces / "original_formats/servegen/data" / service
    trace = read_trace(folder, seed=3)
    assert trace.num_tenants == 3
    expected = 0.0  # requests: rate times 600 s windows
    for file in folder.glob("chunk-*-trace.csv"):
        expected += 600 * np.loadtxt(file, delimiter=",", usecols=1).sum()
    assert len(trace) == pytest.approx(expected, rel=0.15)
    assert (trace.rows["num_images"].sum() > 0) == ("image" in service)
    assert (trace.rows == read_trace(folder, seed=3).rows).all()


def test_servegen_values_are_never_run(tmp_path):
    write(tmp_path / "chunk-0-trace.csv", "0,1.0,1.0,Gamma,1.0,1.0\n600,0,0,,0,0\n")
    mark = tmp_path / "ran"
    bad = {"0": {"input_tokens": f"{{1: open({str(mark)!r}, 'w').write('x')}}", "output_tokens": "{1: 1.0}"}}
    write(tmp_path / "chunk-0-dataset.json", json.dumps(bad))
    with pytest.raises(UserError, match="not a ServeGen dataset"):
        read_trace(tmp_path)
    assert not mark.exists()


def test_servegen_rates_and_lengths(tmp_path):
    write(tmp_path / "chunk-0-trace.csv", "0,2.0,1.5,Weibull,0.7,9.0\n1000,0,0,,0,0\n2000,1.0,2.0,Gamma,0.25,8.0\n")
    dataset = {"0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{3: 1.0}"}}
    write(tmp_path / "chunk-0-dataset.json", json.dumps(dataset))
    rows = read_trace(tmp_path, seed=1).rows
    assert (rows["arrival_s"] < 1000).sum() == pytest.approx(2000, rel=0.15)
    assert ((rows["arrival_s"] >= 1000) & (rows["arrival_s"] < 2000)).sum() == 0
    assert (rows["arrival_s"] >= 2000).sum() == pytest.approx(1000, rel=0.25)
    assert set(rows["prompt_tokens"].tolist()) == {10, 20} and (rows["output_tokens"] == 3).all()


def test_every_recorded_trace_is_readable(traces):
    for path in traces.glob("*.val.csv.gz"):
        trace = read_trace(path)
        check(trace.rows, path.name)
        assert len(trace) > 1000


def test_a_large_file_is_read_in_seconds(traces):
    trace = read_trace(traces / "servegen_m-large.csv.gz")
    assert len(trace) == 486_923 and trace.num_tenants == 128


HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", HEADER, "no requests"),
        ("t.csv", "a,b\n1,2\n", "no known format"),
        ("t.csv", "arrival_s,prompt_tokens\n0,1\n", "name them in workload.columns"),
        ("t.csv", HEADER + "0,1,1\n1,x,1\n", "line 3, column prompt_tokens is 'x'"),
        ("t.csv", HEADER + "0,1,1\n1,4\n", "1 of 2 lines lack .* the first in line 3, column output_tokens"),
        ("t.csv", HEADER + "0,1,1\n1,-5,1\n", "request 2 has prompt_tokens=-5"),
        ("t.csv", HEADER + "0,1,1.5\n", "output_tokens=1.5.*whole number"),
        ("t.csv", HEADER + "0,1,nan\n", "1 of 1 lines lack .* line 2, column output_tokens"),
        ("t.csv", HEADER + "-1,1,1\n", "arrives at -1 s"),
        ("t.csv", HEADER + ",1,1\n", "1 of 1 lines lack .* line 2, column arrival_s"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "not a date and time"),
        ("t.jsonl", '{"timestamp": 0, "input_length": 5}\n', "line 1 has output_length=None"),
        ("t.jsonl", "{oops\n", "line 1 is not JSON"),
        ("t.json", "[]", "no list of requests"),
        ("t.json", "oops", "not a JSON file"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as raised:
        read_trace(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_missing_truncated_and_unknown(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_trace(tmp_path / "none.csv")
    whole = gzip.compress((HEADER + "0,1,1\n" * 1000).encode())
    (tmp_path / "t.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete gzip file"):
        read_trace(tmp_path / "t.csv.gz")
    with pytest.raises(UserError, match="not a trace format; choose from azure"):
        read_trace(write(tmp_path / "t.csv", HEADER + "0,1,1\n"), format="parquet")
    with pytest.raises(UserError, match="folder without"):
        read_trace(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not a text file"):
        read_trace(tmp_path / "b.csv")


def test_one_row_without_a_time_is_named(tmp_path):
    vidur = write(tmp_path / "v.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,5\nnan,5,5\n2,5,5\n")
    with pytest.raises(UserError, match="request 2 has no arrival time; 1 of 3 have none"):
        read_trace(vidur)
    line = '{"timestamp": %s, "input_length": 5, "output_length": 5, "hash_ids": [1]}\n'
    with pytest.raises(UserError, match="request 1 has no arrival time; 1 of 2"):
        read_trace(write(tmp_path / "t.jsonl", line % "NaN" + line % "3"))


def test_dots_in_a_name_do_not_make_another_format(tmp_path):
    path = write(tmp_path / "run.json.export.csv", HEADER + "0,1,1\n")
    assert len(read_trace(path)) == 1


def test_clients_without_lengths_are_said_with_their_share(tmp_path, caplog):
    for client, rate in ((0, 1.0), (1, 3.0)):
        write(tmp_path / f"chunk-{client}-trace.csv", f"0,{rate},1.0,Gamma,1.0,1.0\n600,0,0,,0,0\n")
    dataset = {"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{3: 1.0}"}}
    write(tmp_path / "chunk-0-dataset.json", json.dumps(dataset))
    with caplog.at_level(logging.WARNING):
        assert len(read_trace(tmp_path)) == pytest.approx(600, rel=0.2)
    assert "1 of 2 clients have no lengths" in caplog.text and "75.0% of all requests" in caplog.text


def test_every_format_is_recognised_by_itself_alone(traces):
    folder = traces / "original_formats"
    places = {
        "azure": folder / "azure23/AzureLLMInferenceTrace_conv.csv", "vidur": folder / "vidur/splitwise_conv.csv",
        "mooncake": folder / "mooncake/synthetic_trace.jsonl", "agentic": folder / "agentic_cc/traces",
        "servegen": folder / "servegen/data/language/m-large", "log": traces / "azure23_conv.csv.gz",
    }  # fmt: skip
    for name, path in places.items():
        recognising = [format.name for format in FORMATS.values() if format.recognises(sample_of(path))]
        assert recognising[0] == name
