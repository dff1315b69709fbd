"""Program: puts the mean of several runs of one training into the package: `python -m flexirl.pretrained FOLDER ...`.

Its work is in `flexirl/programs/pretrained.py`, imported once the command line has been checked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flexirl.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m flexirl.pretrained", description="Puts the mean of several training runs into the package."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of python -m flexirl.train, one per seed")
    parser.add_argument("--output", type=Path, help="where the policy goes; by default, into the package")
    options = parser.parse_args(arguments)
    try:
        from flexirl.programs.pretrained import run

        run(options.runs, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
