"""Policies by name: every one has its knobs on file, and a mistake gets one sentence."""

from __future__ import annotations

from dataclasses import fields

import pytest

from flexirl.errors import UserError
from flexirl.policies.heuristics.base import RULES
from flexirl.policies.registry import make_policy
from flexirl.policies.rules import load_rule_spec, rule_names


def test_all_policies_are_there() -> None:
    assert set(rule_names()) == {
        "vllm_fcfs", "vllm_priority", "sarathi", "no_evict", "sglang", "hygen", "conserve", "qoserve", "edf", "laxity",
        "vtc", "fixed_dials", "immediate_only", "deferred_only", "least_computed", "keep_cache",
    }  # fmt: skip


@pytest.mark.parametrize("name", rule_names())
def test_every_knob_has_its_value_on_file(name: str) -> None:
    assert set(load_rule_spec(name)) == {knob.name for knob in fields(RULES[name]) if knob.init}
    assert make_policy(name) == make_policy(name)


def test_knobs_replace_those_on_file() -> None:
    assert make_policy("sarathi", {"token_budget": 256.0}) == make_policy("sarathi", {"token_budget": 256})
    assert make_policy("sarathi", {"token_budget": 256}) != make_policy("sarathi")


@pytest.mark.parametrize(
    "name, knobs, message",
    [
        ("sjf", {}, "'sjf' is unknown; choose from .*deferred_only.*vtc"),
        ("sarathi", {"budget": 3}, "sarathi has no knob 'budget'; it has token_budget"),
        ("immediate_only", {"budget": 3}, "it has none"),
        ("sarathi", {"token_budget": "many"}, "token_budget='many'"),
        ("sarathi", {"token_budget": 0}, "token_budget=0"),
        ("sarathi", {"token_budget": 1.5}, "whole number"),
        ("sarathi", {"token_budget": None}, "token_budget=None"),
        ("no_evict", {"immediate_first": 1}, "true or false"),
        ("hygen", {"latency_budget_s": -1.0}, "latency_budget_s=-1.0"),
        ("hygen", {"tolerance": 1.0}, "tolerance=1.0"),
        ("conserve", {"tbt_share": "half"}, "a number"),
        ("qoserve", {"slack_used": 0.0}, "slack_used=0.0"),
        ("laxity", {"urgent_share": 0.1}, "urgent_share=0.1"),
        ("sglang", {"decay_steps": 0}, "decay_steps=0"),
        ("fixed_dials", {"dials": [2.0]}, "dials"),
        ("fixed_dials", {"dials": ["up"]}, "a list of numbers"),
        ("fixed_dials", {"dials": [0.0] * 99}, "dials"),
    ],
)
def test_mistakes_are_named(name: str, knobs: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy(name, knobs)
