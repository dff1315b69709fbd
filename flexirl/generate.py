"""Program: runs a file of mixed prompts on the live engine: `python -m flexirl.generate prompts=prompts.jsonl`."""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("generate")
