"""Program: answers OpenAI's interface on one engine: `python -m flexirl.serve`.

Its work is in `flexirl/programs/serve.py`, imported once the command line has been checked.
"""

from flexirl.experiments.program import run_program

if __name__ == "__main__":
    run_program("serve")
