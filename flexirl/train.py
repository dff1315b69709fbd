"""Program: trains an agent, compares it with the heuristics, exports it: `python -m flexirl.train`."""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("train")
