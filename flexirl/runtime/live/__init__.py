"""The mechanism on a model: a live engine with requests, sampling, text, recording and shadow policies."""
