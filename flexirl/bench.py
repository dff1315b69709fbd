"""Program: measures speeds, as ratios where there is a peer: `python -m flexirl.bench [NAME]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHES = {
    "startup": "how long commands take before their work begins",
    "live": "the live engine",
    "serving": "the server: what HTTP and batches cost, how long immediate requests wait beside them",
    "kernels": "the kernels, on a GPU",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the bench that the first argument names, else the one of the surrogate and of training."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # One bench needs no other's libraries, which take seconds to import.
    if words and words[0] in BENCHES:
        importlib.import_module(f"flexirl.benches.{words[0]}").main(words[1:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m flexirl.bench",
        description="Measures how fast the surrogate, training and decisions are.",
        epilog="Other benches: " + "; ".join(f"bench {name}, {what}" for name, what in BENCHES.items()) + ".",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"), help="where the figures are written")
    options = parser.parse_args(words)
    from flexirl.benches.figures import report
    from flexirl.benches.speed import run

    report(run(options.quick), options.output)


if __name__ == "__main__":
    main()
