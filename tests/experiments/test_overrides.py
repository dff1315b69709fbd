"""Whatever a path is called, Hydra reads it as it was typed."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from flexirl.experiments.overrides import quoted, spelled_out

PARSER = OverridesParser.create()
ODD = (
    "a=b.csv",
    "a,b.csv",
    "a (copy).csv",
    "it's.csv",
    'a "b".csv',
    "a\\'b.csv",
    "[a]{b}.csv",
    "größe.csv",
    "a;b.csv",
    "dir\\",
)


def read(argument: str) -> object:
    return PARSER.parse_override(argument).value()


@pytest.mark.parametrize("path", [*ODD, "plain/path-1.csv.gz", "with space.csv"])
def test_paths_are_read_as_typed(path: str) -> None:
    for key in ("workload.path", "tuning.path", "prompts", "run", "+resume", "hydra.run.dir", "suite.folder", "model"):
        (argument,) = spelled_out(f"{key}={path}")
        assert read(argument) == path
    # What the user has quoted stays.
    for key in ("workload.path", "run"):
        assert spelled_out(f"{key}={quoted(path)}") == [f"{key}={quoted(path)}"]


@given(
    st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1).filter(
        lambda t: t == t.strip() and "${" not in t
    )
)
def test_any_text_is_read_back(text: str) -> None:
    if quoted(text) != text:
        assert read(f"workload.path={quoted(text)}") == text


def test_files_in_place_of_a_choice() -> None:
    assert spelled_out("engine=a=1,b.json") == ["engine=file", "engine.profile='a=1,b.json'"]
    assert spelled_out("policy=p.onnx") == ["policy=file", "policy.name=p.onnx"]
    assert spelled_out("engine='my engine.json'") == ["engine=file", "engine.profile='my engine.json'"]


@pytest.mark.parametrize(
    "argument",
    ["--multirun", "--config-dir=a,b", "run=null", "seed=0,1", "policies=[a,b]", "workload=poisson",
     "workload.path=${x}", "hydra.run.dir=outputs/${now:%Y-%m-%d}/a"],
)  # fmt: skip
def test_the_rest_stays(argument: str) -> None:
    assert spelled_out(argument) == [argument]


def test_a_sweep_over_paths_is_one() -> None:
    assert spelled_out("workload.path=a=1.csv,b.csv", sweep=True) == ["workload.path='a=1.csv',b.csv"]
    assert spelled_out("workload.path='a,b.csv'", sweep=True) == ["workload.path='a,b.csv'"]
    assert spelled_out("workload.path=choice(a.csv,b.csv)", sweep=True) == ["workload.path=choice(a.csv,b.csv)"]
    assert spelled_out("compare=live,surrogate") == ["compare='live,surrogate'"]
