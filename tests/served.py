"""A service on a model, in front of the live engine, and a client of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openai import OpenAI
from serving_toys import make_service, serving
from toys import toy_engine

from flexirl.policies.registry import make_policy
from flexirl.runtime.models.executor import ModelExecutor
from flexirl.runtime.models.loading import LoadedModel
from flexirl.serving.local import LocalBackend, LocalOptions
from flexirl.serving.metrics import Metrics
from flexirl.serving.tenants import add_key
from flexirl.workloads.slo import SLO

ENGINE: dict[str, float] = {
    "kv_blocks": 400, "host_kv_blocks": 0, "block_size": 16, "max_running": 8, "max_tokens_per_step": 512,
    "max_model_len": 1024, "prefix_caching": 1,
}  # fmt: skip
PROMISE = SLO(ttft_s=1.0, tpot_s=0.05)


class Served:
    """A service on a model, and a client of it."""

    def __init__(self, model: LoadedModel, folder: Path, keys: Path | None = None, **options: Any) -> None:
        self.model, self.metrics = model, Metrics()
        self.keys = {name: add_key(keys, name) for name in options.get("tenants", ())} if keys else {}
        executor = ModelExecutor(model, toy_engine(**ENGINE))
        policy = make_policy("qoserve")
        self.backend = LocalBackend(model, executor, policy, PROMISE, self.metrics, LocalOptions(64, **options))
        self.metrics.watch(self.backend.figures)
        self._serving = serving(make_service(self.backend, folder, self.metrics, keys=keys))
        self.url = self._serving.__enter__()
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def close(self) -> None:
        self.client.close()
        self._serving.__exit__(None, None, None)
