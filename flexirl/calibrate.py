"""Program: measures a model on this machine and writes an engine profile: `python -m flexirl.calibrate model=tiny`."""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("calibrate")
