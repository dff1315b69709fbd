"""The mechanism on modelled time: the surrogate of a serving engine, and whole runs on it."""
