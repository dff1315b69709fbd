"""Policies: what passes between them and an engine, rules written by hand, trained ones, and how those are trained."""

from flexirl import compile_cache

compile_cache.install()
