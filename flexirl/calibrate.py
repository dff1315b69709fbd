"""Program: measures a model on this machine and writes an engine profile: `python -m flexirl.calibrate model=tiny`.

Its work is in `flexirl/programs/calibrate.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("calibrate")
