"""Program: draws one scenario and describes it: `python -m flexirl.workload workload=medium_bursty`."""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("workload", config_name="workload_stats")
