"""Program: answers OpenAI's interface on one engine: `python -m flexirl.serve`."""

from __future__ import annotations

from pathlib import Path

import uvicorn
from omegaconf import DictConfig, OmegaConf

from flexirl.errors import UserError
from flexirl.experiments.backends import load_backend
from flexirl.experiments.program import output_folder
from flexirl.experiments.values import count_of, number
from flexirl.serving.app import create_app, is_local
from flexirl.serving.batch_runner import BatchRunner
from flexirl.serving.metrics import Metrics
from flexirl.serving.service import Service, Tier
from flexirl.serving.store import Store
from flexirl.serving.tenants import KEYS, Tenants


def run(config: DictConfig) -> None:
    """Serves until it is told to stop; raises UserError for bad configuration."""
    server = config.server
    folder, port = Path(str(server.data_dir)), count_of(server.port, "server.port", least=0)
    if port > 65535:
        raise UserError(f"server.port={port} is out of range; ports are up to 65535.")
    if config.late_batches not in ("warn", "refuse"):
        raise UserError(f"late_batches={config.late_batches} is neither warn nor refuse.")
    drain_s, most = number(server.drain_s, "server.drain_s"), count_of(config.batch_lines, "batch_lines")
    tiers = {str(name): _tier(str(name), tier) for name, tier in config.tiers.items()}
    tenants = Tenants(folder / KEYS)
    if tenants.open and not is_local(str(server.host)):
        raise UserError(
            f"server.host={server.host} can be reached from elsewhere and there are no API keys; make one with "
            f"`flexirl key NAME --data-dir {folder}`, or leave server.host at 127.0.0.1."
        )
    OmegaConf.save(config, output_folder() / "config.yaml", resolve=True)
    store = Store(folder, None if server.database is None else str(server.database))
    metrics = Metrics()
    backend = load_backend(config, metrics, tenants)
    metrics.watch(backend.figures)
    runner = BatchRunner(store, backend, metrics, most, refuse_late=config.late_batches == "refuse")
    service = Service(backend, store, runner, metrics, tenants, folder / "policies", {"default": Tier(), **tiers})
    print(f"OpenAI's interface on http://{server.host}:{port}/v1, what it does on http://{server.host}:{port}/status")
    uvicorn.run(
        create_app(service), host=str(server.host), port=port, log_level="warning",
        timeout_graceful_shutdown=max(int(drain_s), 1),
    )  # fmt: skip


def _tier(name: str, values: DictConfig) -> Tier:
    try:
        return Tier(**OmegaConf.to_container(values, resolve=True))  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"tiers.{name}={values} has something other than ttft_s, tpot_s and window_s.") from None
