"""Program: trains an agent, compares it with the heuristics, exports it: `python -m flexirl.train`.

Its work is in `flexirl/programs/train.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("train")
