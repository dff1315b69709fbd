"""Program: has a file of requests answered without a server: `python -m flexirl.run_batch IN.jsonl -o OUT.jsonl`.

Its work is in `flexirl/programs/run_batch.py`, imported once the command line has been checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flexirl.experiments.program import run_program


def words(arguments: Sequence[str]) -> list[str]:
    """The command line as settings: the two files have a short way of being named."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("input", nargs="?")
    parser.add_argument("-o", "--output")
    # What is a setting is none of the files, whatever place it stands in.
    options, settings = parser.parse_known_args([word for word in arguments if not _is_setting(word)])
    settings += [word for word in arguments if _is_setting(word)]
    files = {"input": options.input, "output": options.output}
    return [f"{name}={path}" for name, path in files.items() if path is not None] + settings


def _is_setting(word: str) -> bool:
    return "=" in word.split("/")[0]


if __name__ == "__main__":
    sys.argv[1:] = words(sys.argv[1:])
    run_program("run_batch")
