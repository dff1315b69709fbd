"""Program: compares policies on the same arrivals: `python -m flexirl.evaluate policies='[hygen,PATH.onnx]'`.

Its work is in `flexirl/programs/evaluate.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("evaluate")
