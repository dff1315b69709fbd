"""Program: runs a file of mixed prompts on the live engine: `python -m flexirl.generate prompts=prompts.jsonl`.

Its work is in `flexirl/programs/generate.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("generate")
