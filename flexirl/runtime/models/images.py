"""The images of the requests in an engine: which tokens of an iteration stand for them, and their embeddings.

An image is encoded when a chunk first reaches it and kept until its last token is computed, so that a chunk may end
in the middle of it. A prompt that is computed again, after a preemption, has it encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.live.executor import Batch
from flexirl.runtime.live.requests import Image
from flexirl.runtime.models.vision import Vision


@dataclass
class _Prompt:
    images: Sequence[Image]
    begins: np.ndarray  # int64 (images,): where each image's tokens begin in the prompt, and where they end
    ends: np.ndarray
    positions: np.ndarray  # int64 (3, prompt)
    embeddings: dict[int, Tensor] = field(default_factory=dict)  # (tokens, hidden), of the images being computed


class Part(NamedTuple):
    """Tokens `begin` to `end` of one image of a prompt."""

    prompt: _Prompt
    image: int
    begin: int
    end: int


@dataclass(frozen=True)
class Pictured:
    """What is different in an iteration with image tokens: three positions a token, and embeddings in some rows."""

    vision: Vision
    positions: np.ndarray  # int64 (3, T)
    rows: np.ndarray  # int64: the rows of `parts`, one after the other
    parts: list[Part]

    def embed(self) -> Tensor:
        """The embeddings of the image tokens, (rows, hidden); encodes the images that are not at hand."""
        missing = [part for part in self.parts if part.image not in part.prompt.embeddings]
        if missing:
            encoded = self.vision.encode([part.prompt.images[part.image] for part in missing])
            for part, embeddings in zip(missing, encoded, strict=True):
                part.prompt.embeddings[part.image] = embeddings
        return torch.cat([part.prompt.embeddings[part.image][part.begin : part.end] for part in self.parts])

    def let_go(self) -> None:
        """The iteration is done: gives up the embeddings of images whose last token was in it."""
        for part in self.parts:
            if part.end == part.prompt.ends[part.image] - part.prompt.begins[part.image]:
                del part.prompt.embeddings[part.image]


class ImageTable:
    """Images by the requests' places in the scheduler's table."""

    def __init__(self, vision: Vision) -> None:
        self.vision = vision
        self._prompts: dict[int, _Prompt] = {}
        # By place, 0 for requests without images: tokens of the prompt; what positions behind it are ahead of indices.
        self._length = np.zeros(0, np.int64)
        self._offset = np.zeros(0, np.int64)

    def enter(self, r: int, prompt: Sequence[int], images: Sequence[Image]) -> None:
        """Request r has come, with images."""
        positions = self.vision.positions(prompt, images)
        self._prompts[r] = _Prompt(images, *self.vision.spans(prompt), positions)
        self._make_room(r)
        self._length[r], self._offset[r] = len(prompt), positions.max() + 1 - len(prompt)

    def forget(self, r: int) -> None:
        """Request r has ended."""
        if self._prompts.pop(r, None) is not None:
            self._length[r] = self._offset[r] = 0

    def _make_room(self, r: int) -> None:
        more = max(r + 1 - len(self._length), 0)
        self._length, self._offset = np.pad(self._length, (0, more)), np.pad(self._offset, (0, more))

    def place(self, batch: Batch) -> tuple[Batch, Pictured | None]:
        """The batch with the positions that its tokens have beside images, and the image tokens in it, if any."""
        if not self._prompts:
            return batch, None
        self._make_room(int(batch.requests.max()))
        text = batch.positions + np.repeat(self._offset[batch.requests], batch.query_lens)
        positions = np.stack((text, text, text))
        starts = batch.context_lens - batch.query_lens
        rows: list[np.ndarray] = []
        parts: list[Part] = []
        first_rows = np.cumsum(batch.query_lens) - batch.query_lens
        for n in np.flatnonzero(starts < self._length[batch.requests]).tolist():
            prompt, start, end = self._prompts[int(batch.requests[n])], int(starts[n]), int(batch.context_lens[n])
            row = int(first_rows[n]) - start  # of the prompt's first token, if it were there
            within = min(end, prompt.positions.shape[1])
            positions[:, row + start : row + within] = prompt.positions[:, start:within]
            for image in np.flatnonzero((prompt.begins < end) & (prompt.ends > start)).tolist():
                begins = int(prompt.begins[image])
                begin, stop = max(start, begins), min(end, int(prompt.ends[image]))
                rows.append(np.arange(row + begin, row + stop))
                parts.append(Part(prompt, image, begin - begins, stop - begins))
        if not parts:  # text has the same position three times
            return batch._replace(positions=positions[0]), None
        return batch, Pictured(self.vision, positions, np.concatenate(rows), parts)
