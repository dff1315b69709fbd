"""The status page in a browser shows what the service does, and what clients say in it stays text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from serving_toys import EchoBackend, line, make_service, serving

CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_shows_batches(tmp_path: Path) -> None:
    backend = EchoBackend(seconds=60.0)
    service = make_service(backend, tmp_path / "data")
    backend.models = ("<b>echo</b>",)
    (tmp_path / "in").write_text("\n".join(line(f"r{i}", "p") for i in range(20)))
    with open(tmp_path / "in", "rb") as source:
        file = service.store.add_file("default", "batch", "in", source, None, 10_000)
    batch = service.store.add_batch("default", file["id"], "/v1/chat/completions", "24h", 86400, None, None)
    with serving(service) as url:
        shown = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom", f"{url}/status",
            ],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    assert batch["id"] in shown and "in progress" in shown and "24.0 h" in shown
    assert "<td>20</td><td>8</td>" in shown  # of how many, and how many are with the backend
    assert "&lt;b&gt;echo&lt;/b&gt;" in shown and '<div id="trouble" role="alert"></div>' in shown
