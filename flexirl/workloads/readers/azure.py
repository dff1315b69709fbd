"""Azure inference CSV: TIMESTAMP, ContextTokens, GeneratedTokens, and NumImages in the multimodal trace of 2025.

That trace does not say how many tokens an image has. Each is read as IMAGE_TOKENS of the request's context tokens,
about the mean of ServeGen's recorded multimodal service (505), which is logged.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.readers.formats import Column, Format, Table
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import Csv

log = logging.getLogger(__name__)

IMAGE_TOKENS = 500


def _read(path: Path, seed: int) -> Table:
    table = Csv(path)
    table.require("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    clock = _instants(path, table.strings("TIMESTAMP"))
    arrival_s = (clock - clock.min()) / np.timedelta64(1, "s")
    prompt, output = table.numbers("ContextTokens", "GeneratedTokens")
    images: dict[str, Column | NDArray[np.int64]] = {}
    if "NumImages" in table.names:
        (count,) = table.numbers("NumImages")
        with_images = count > 0
        # At least one token is text.
        tokens = np.where(with_images, np.minimum(count * IMAGE_TOKENS, np.maximum(prompt - 1, 0)), 0.0)
        images = {"num_images": count, "image_tokens": np.where(np.isnan(tokens), 0.0, tokens)}
        if with_images.any():
            log.warning(
                "%s does not say how many tokens its images have: each of those in %.1f%% of its requests is read as "
                "%d of their context tokens", path, 100 * with_images.mean(), IMAGE_TOKENS,
            )  # fmt: skip
    return Table(rows_of(path, arrival_s, prompt, output, **images))


def _instants(path: Path, stamps: list[tuple[int, str]]) -> NDArray[np.datetime64]:
    """Raises UserError, naming the line, for what is no date and time."""
    # The 2024 files carry a UTC offset, which is the same in every row.
    plain = [stamp.removesuffix("+00:00") for _, stamp in stamps]
    try:
        instants = np.array(plain, dtype="datetime64[ns]")
        if not np.isnat(instants).any():
            return instants
    except ValueError:
        pass
    line, stamp = next(named for named, text in zip(stamps, plain, strict=True) if not _is_instant(text))
    raise UserError(f"{path}: line {line} has TIMESTAMP={stamp!r}, which is not a date and time.")


def _is_instant(text: str) -> bool:
    try:
        return not np.isnat(np.datetime64(text, "ns"))
    except ValueError:
        return False


FORMAT = Format("azure", lambda sample: sample.kind == "csv" and sample.has("ContextTokens"), _read)
