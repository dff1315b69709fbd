"""Program: the surrogate against a recorded run of vLLM: `python -m flexirl.validate run=FOLDER`."""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("validate")
