"""Bodies of the programs: each is imported once the command line has been checked, and does the work in `run`."""
