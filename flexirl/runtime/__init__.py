"""The serving engine: the compiled scheduler, engine profiles, the simulator, the live engine, models and kernels."""

from flexirl import compile_cache

compile_cache.install()
