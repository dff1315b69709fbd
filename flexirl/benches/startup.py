"""How long commands take before their work begins: `python -m flexirl.bench startup [--quick]`.

Each figure is the median of whole processes, measured in turns with one that only imports PyTorch and
stable-baselines3, so that it can be read as a multiple of that on a slow or busy machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from flexirl.benches.figures import Row, report

BARE = (sys.executable, "-c", "import torch, stable_baselines3")
MAKE = "import flexirl, gymnasium; gymnasium.make('flexirl/Batching-v0')"
ONE_RULE = ("-m", "flexirl.evaluate", "policies=[qoserve]", "seeds=1", "progress=false")
TRAIN = ("-m", "flexirl.train")
COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("-m", "flexirl.train", "--help"),
    "wrong_override": ("-m", "flexirl.train", "nonsense=1"),
    "gymnasium_make": ("-c", MAKE),
    "evaluate_one_rule": ONE_RULE,
    "train": TRAIN,
}
_BEGINS = b"optimises"  # of the line that training prints once its agent has played, before it learns


def warm(repeats: int) -> Iterator[Row]:
    """Seconds of each command with everything compiled, and as a multiple of the bare imports beside it.

    Training counts until its agent has been made and has played the episodes on which observations are normalised.
    """
    for name, words in COMMANDS.items():
        seconds(words)  # compiles what is not compiled yet
        ours, bare = [], []
        for _ in range(repeats):
            ours.append(seconds(words))
            bare.append(seconds(BARE[1:]))
        yield Row(f"startup_{name}_s", median(ours), "s")
        yield Row(f"startup_{name}_of_bare_imports", median(ours) / median(bare), "")


def cold() -> Iterator[Row]:
    """Seconds of the two commands that compile most, with nothing in the compile cache."""
    for name, words in (("evaluate_one_rule", ONE_RULE), ("train", TRAIN)):
        with tempfile.TemporaryDirectory() as cache:
            yield Row(f"startup_{name}_cold_s", seconds(words, {"XDG_CACHE_HOME": cache}), "s")


def seconds(words: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Of a process of this interpreter, in a folder of its own; one that trains is ended as it begins."""
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-u", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PYTHONPATH": os.pathsep.join(sys.path), **os.environ, **(environment or {})},
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        shown = b""
        while not (words == TRAIN and _BEGINS in shown) and (more := os.read(process.stdout.fileno(), 4096)):
            shown += more
        took = time.perf_counter() - began
        process.terminate()
        process.stdout.read()
    if b"Traceback" in shown:
        raise RuntimeError(f"{' '.join(words)} failed: {shown.decode(errors='replace')}")
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m flexirl.bench startup", description="Measures start-up times.")
    parser.add_argument("--quick", action="store_true", help="one repeat, and nothing compiled anew")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_startup.json"), help="where the figures go")
    options = parser.parse_args(arguments)

    def figures() -> Iterator[Row]:
        yield from warm(1 if options.quick else 5)
        if not options.quick:
            yield from cold()

    report(figures(), options.output)
