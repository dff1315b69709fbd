"""What the programs do: `python -m flexirl.NAME` runs `run` of the module of that name, on its configuration."""
