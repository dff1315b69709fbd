"""Most of these tests need vLLM, which has an environment of its own: `make test-vllm`. They are skipped elsewhere."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:  # not just `vllm`, as which the folder of these tests may pass
    import vllm.v1
except ImportError:
    vllm = None

if vllm is not None:
    # vLLM for CPUs looks through all modules for kernels, and stumbles over an object of llvmlite that has whatever
    # attribute it is asked for. A server is not concerned: it imports the scheduler after that, and only once.
    from llvmlite.binding import ffi

    _any_attribute = ffi._lib_wrapper.__getattr__

    def _no_special_attribute(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _any_attribute(self, name)

    ffi._lib_wrapper.__getattr__ = _no_special_attribute
