"""Speeds, as ratios where there is a peer: `make bench`."""
