"""Program: the surrogate against a recorded run of vLLM: `python -m flexirl.validate run=FOLDER`.

Its work is in `flexirl/programs/validate.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("validate")
