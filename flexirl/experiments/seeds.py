"""Where the seeds of a run's parts begin, far from one another: nothing is judged on what it was fitted to."""

from __future__ import annotations

# Training itself begins at the run's own seed.
VALIDATION_SEED = 250_000
PRETRAINED_SEED = 350_000  # episodes on which the runs behind the packaged policy are judged
TUNING_SEED = 500_000
COMPARISON_SEED = 1_000_000
