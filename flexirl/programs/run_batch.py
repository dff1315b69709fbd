"""Program: has a file of requests answered without a server: `python -m flexirl.run_batch IN.jsonl -o OUT.jsonl`."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from flexirl.errors import UserError
from flexirl.experiments.backends import load_backend
from flexirl.experiments.values import count_of
from flexirl.progress import progress_bar
from flexirl.serving.backend import Backend
from flexirl.serving.batch_input import raw_lines, window_s
from flexirl.serving.metrics import Metrics
from flexirl.serving.run_batch import run_batch
from flexirl.serving.tenants import Tenants


def run(config: DictConfig) -> None:
    """Answers what is not answered yet, and says how it went; raises UserError for bad configuration or files."""
    source, target = Path(str(config.input)), Path(str(config.output))
    if not source.is_file():
        raise UserError(f"{source} does not exist.")
    seconds, most = float(window_s(str(config.window))), count_of(config.batch_lines, "batch_lines")
    count = sum(1 for _ in raw_lines(source))
    if count == 0:
        raise UserError(f"{source} is empty; give it one JSON object a line.")
    backend = load_backend(config, Metrics(), Tenants(None))
    with progress_bar(count, " requests", config.progress) as progress:
        try:
            counts = asyncio.run(_run(backend, source, target, seconds, most, progress))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what is answered is in {target}; the same command goes on") from None
    words = ", ".join(f"{counts[name]} {name}" for name in ("answered", "failed") if counts[name])
    before = f", {counts['skipped']} were answered before" if counts["skipped"] else ""
    print(f"{words or 'nothing left to answer'}{before}; written to {target}")


async def _run(
    backend: Backend, source: Path, target: Path, seconds: float, most: int, progress: tqdm[None]
) -> Counter[str]:
    await backend.start()
    try:
        return await run_batch(backend, source, target, seconds, most, lambda _: progress.update())
    finally:
        await backend.close()
