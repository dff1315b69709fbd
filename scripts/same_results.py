"""Holds two leaderboards against each other: `python scripts/same_results.py BEFORE.json AFTER.json`.

For changes that are to change no result: run `python -m flexirl.evaluate` on both states of the code with the same
settings, then this. Every figure of every policy and seed must be the same, but for wall-clock times; figures that only
one side has are named. Exits with 1 where one differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MEASURED = {"wall_s"}  # on a clock, so never the same twice


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """A line for each row or figure that differs."""
    by_run = [{(row["policy"], row["seed"]): row for row in rows} for rows in (before, after)]
    lines = [f"{policy}, seed {seed}: on one side only" for policy, seed in sorted(set(by_run[0]) ^ set(by_run[1]))]
    for run in sorted(set(by_run[0]) & set(by_run[1])):
        old, new = by_run[0][run], by_run[1][run]
        for name in sorted((set(old) & set(new)) - MEASURED):
            if old[name] != new[name]:
                lines.append(f"{run[0]}, seed {run[1]}: {name} was {old[name]}, is {new[name]}")
    return lines


def main() -> None:
    """Compares the two files that the command line names."""
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/same_results.py BEFORE/leaderboard.json AFTER/leaderboard.json")
    before, after = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    lines = differences(before, after)
    print("\n".join(lines) or f"{len(before)} runs, the same in every figure")
    for name in sorted(set(before[0]) ^ set(after[0])):
        print(f"note: the figure {name} is on one side only")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
