"""Policies: the rules written by hand, the learned ones, and how both are made from a name."""
