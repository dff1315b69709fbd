"""What the programs share: configuration, seeds, rollouts, comparison, plots."""
