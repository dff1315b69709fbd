"""Program: compares policies over a suite of scenarios: `python -m flexirl.benchmark suite=bursts`.

Its work is in `flexirl/programs/benchmark.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("benchmark")
