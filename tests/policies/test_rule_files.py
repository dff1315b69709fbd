"""A rule with its knobs in a file: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexirl.errors import UserError
from flexirl.policies.registry import check_names, make_policy
from flexirl.policies.rules import make_rule, rule_names, save_rule


@pytest.mark.parametrize("name", rule_names())
def test_every_rule_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    rule = make_rule(name)
    save_rule(rule, tmp_path / "rule.yaml")
    assert make_policy(str(tmp_path / "rule.yaml")) == rule


def test_a_rule_goes_by_the_name_of_its_file(tmp_path: Path) -> None:
    """So one rule can be compared under several settings; saved again, it is still that rule."""
    for name, share in (("little", 0.1), ("much", 0.8)):
        save_rule(make_rule("keep_cache", {"kept_share": share}), tmp_path / f"{name}.yaml")
    little = make_policy(str(tmp_path / "little.yaml"))
    assert little.name == "little" and make_policy("keep_cache").name == "keep_cache"
    check_names(["keep_cache", "qoserve", str(tmp_path / "little.yaml"), str(tmp_path / "much.yaml")])
    (tmp_path / "others").mkdir()
    save_rule(little, tmp_path / "others" / "much.yaml")  # type: ignore[arg-type]
    assert make_policy(str(tmp_path / "others" / "much.yaml")) == little
    with pytest.raises(UserError, match=r"much\.yaml and .*much\.yaml both go by the name much; rename one"):
        check_names([str(tmp_path / "much.yaml"), str(tmp_path / "others" / "much.yaml")])


def test_searched_knobs_are_kept_and_can_be_replaced(tmp_path: Path) -> None:
    rule = make_rule("fixed_dials", {"dials": [0.25, -0.5], "tune": False})
    save_rule(rule, tmp_path / "rule.yaml")
    assert make_policy(str(tmp_path / "rule.yaml")) == rule
    assert make_policy(str(tmp_path / "rule.yaml"), {"tune": True, "fallback": "edf"}).tune  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed", "no readable YAML"),
        ("- qoserve", "no rule: it needs a name"),
        ("dials: [1]", "no rule: it needs a name"),
        ("name: fifo", "'fifo' is no rule"),
        ("name: qoserve\nspeed: 3", "no knob 'speed'"),
        ("name: !!python/object/apply:os.getcwd []", "no readable YAML"),
    ],
)
def test_what_is_no_rule_is_told_in_a_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rule.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        make_policy(str(tmp_path / "rule.yaml"))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="does not exist"):
        make_policy(str(tmp_path / "other.yaml"))
