"""The command `flexirl`: names a program and hands it the rest of the command line."""

from __future__ import annotations

import difflib
import runpy
import sys

PROGRAMS = {
    "train": "trains an agent, compares it with the rules, exports it",
    "evaluate": "compares policies on the same arrivals",
    "benchmark": "compares policies over a suite of scenarios and writes a report",
    "workload": "draws arrivals and lengths and describes them",
    "calibrate": "measures a model on this machine and writes an engine profile",
    "validate": "holds the surrogate against a recorded run",
    "generate": "runs a file of immediate and deferred prompts on the live engine",
    "serve": "answers OpenAI's interface: immediate requests, files and batches",
    "load": "plays a workload against a server",
    "run-batch": "has a file of requests answered without a server",
    "deploy": "puts a policy in charge of a running server",
    "key": "makes an API key for a tenant of a server",
    "pretrained": "makes the packaged policy of several trainings",
    "bench": "measures speeds (also: bench live, bench kernels)",
}


def main() -> None:
    """`flexirl PROGRAM ...` is `python -m flexirl.PROGRAM ...`; alone it says what there is."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<12}{what}" for name, what in PROGRAMS.items()]
        print("\n".join(["usage: flexirl PROGRAM [options]; flexirl PROGRAM --help says more", *lines]))
        return
    if words[0] not in PROGRAMS:
        near = difflib.get_close_matches(words[0], PROGRAMS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(PROGRAMS)}."
        print(f"error: flexirl has no program {words[0]!r}; {remedy}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"flexirl {words[0]}", *words[1:]]
    runpy.run_module(f"flexirl.{words[0].replace('-', '_')}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
