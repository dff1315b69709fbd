"""The page that documents the environment's numbers says what the code says."""

from __future__ import annotations

from pathlib import Path

from flexirl.policies.interface.action import DIALS
from flexirl.policies.interface.observation import REQUEST_TABLE, TABLE

PAGE = (Path(__file__).parents[2] / "docs" / "environment.md").read_text()


def test_every_number_is_documented_as_it_is() -> None:
    for f in (*TABLE, *REQUEST_TABLE):
        assert f"| `{f.name}` | {f.meaning} | {f.unit} | {f.scale} | {f.low:g} to {f.high:g} |" in PAGE
    for d in DIALS:
        assert f"| `{d.name}` | {d.meaning} | {d.low} | {d.zero} | {d.high} |" in PAGE
