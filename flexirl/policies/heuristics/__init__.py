"""Policies written by hand: the rules of published schedulers, the anchors, and a constant setting of the dials."""
