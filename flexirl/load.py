"""Program: plays a workload against a server: `python -m flexirl.load url=http://127.0.0.1:8000 workload=tiny`.

Its work is in `flexirl/programs/load.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("load")
