"""Program: draws one scenario and describes it: `python -m flexirl.workload workload=medium_bursty`.

Its work is in `flexirl/programs/workload.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("workload", "workload_stats")
