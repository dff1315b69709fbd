"""Program: compares policies over a suite of scenarios: `python -m flexirl.benchmark suite=bursts`."""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("benchmark")
