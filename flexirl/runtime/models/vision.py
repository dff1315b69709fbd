"""What a vision-language model makes of images: tokens to stand for them, positions, embeddings.

For models of the Qwen2-VL kind (Wang et al., arXiv 2409.12191): an image is a grid of patches, squares of which become
one token each, and every token has three positions, in time, height and width, which are the same for text. Positions
and embeddings are the model's own code; only where they go is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexirl.errors import UserError
from flexirl.runtime.live.requests import Image, Request

FAMILIES = ("qwen2_vl", "qwen2_5_vl")


class Vision:
    """The images' side of a model.

    image_token: stands in a prompt once for every token of an image; start_token, end_token: around an image.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.image_token = int(model.config.image_token_id)
        self.start_token = int(model.config.vision_start_token_id)
        self.end_token = int(model.config.vision_end_token_id)
        self._model: Any = model
        self._merge = int(model.config.vision_config.spatial_merge_size)  # patches of a token's square, side by side
        # Numbers of a patch: colours, two frames and pixels, in one row.
        encoder: Any = model.base_model.visual
        self._patch_width = int(encoder.patch_embed.proj.weight[0].numel())

    def tokens_of(self, image: Image) -> int:
        """How many tokens stand for an image."""
        return math.prod(image.grid) // self._merge**2

    def check(self, request: Request) -> int:
        """Tokens of a request's prompt that stand for its images; raises UserError if the two do not fit."""
        for i, image in enumerate(request.images):
            patches = math.prod(image.grid)
            whole = min(image.grid) > 0 and not any(side % self._merge for side in image.grid[1:])
            if not whole or tuple(image.pixels.shape) != (patches, self._patch_width):
                raise UserError(
                    f"Image {i} of request {request.id} has pixels of shape {tuple(image.pixels.shape)} and a grid of "
                    f"{tuple(image.grid)} patches, which do not fit; prepare it with the model's image processor."
                )
        begins, ends = self.spans(request.prompt)
        found, wanted = (ends - begins).tolist(), list(map(self.tokens_of, request.images))
        if found != wanted:
            raise UserError(
                f"The prompt of request {request.id} has runs of {found} image tokens ({self.image_token}) where its "
                f"images need {wanted}; give one run for each image, with another token between two of them."
            )
        return sum(wanted)

    def spans(self, prompt: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where runs of image tokens begin and where they end, int64 (n,) each."""
        bounds = np.diff(np.asarray(prompt) == self.image_token, prepend=False, append=False)
        edges = np.flatnonzero(bounds)
        return edges[::2], edges[1::2]

    def positions(self, prompt: Sequence[int], images: Sequence[Image]) -> np.ndarray:
        """Positions of a prompt's tokens, int64 (3, P); what follows it counts on from the largest of them."""
        tokens = torch.tensor(np.asarray(prompt, np.int64)[None])
        grids = torch.tensor([image.grid for image in images])
        kinds = (tokens == self.image_token).int()
        positions, _ = self._model.base_model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=grids)
        return np.asarray(positions[:, 0].numpy(), np.int64)

    def encode(self, images: Sequence[Image]) -> list[Tensor]:
        """The embeddings of images, (tokens, hidden) each."""
        device = self._model.device
        pixels = torch.cat([torch.as_tensor(image.pixels).to(device, self._model.dtype) for image in images])
        grids = torch.tensor([image.grid for image in images], device=device)
        return list(self._model.get_image_features(pixels, grids, return_dict=True).pooler_output)

    def draw(self, tokens: int, rng: np.random.Generator) -> Image:
        """An image of random pixels, as near to a square as `tokens` allows."""
        height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        grid = (1, height * self._merge, tokens // height * self._merge)
        return Image(rng.standard_normal((math.prod(grid), self._patch_width), np.float32), grid)
