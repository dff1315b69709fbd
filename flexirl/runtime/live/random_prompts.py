"""Random prompts of given lengths, with random images at their front where the model takes any."""

from __future__ import annotations

import numpy as np

from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.requests import Image


def draw_prompt(
    executor: Executor, tokens: int, num_images: int, image_tokens: int, rng: np.random.Generator
) -> tuple[list[int], list[Image]]:
    """Random tokens, of which `image_tokens` stand for `num_images` images, and the images.

    Images are of one size and have a token of text between them, so there may be slightly fewer image tokens. For a
    model that takes no images, all is text.
    """
    prompt = rng.integers(0, executor.vocab_size, tokens)
    mark = executor.image_token
    size = min(image_tokens, tokens - num_images + 1) // max(num_images, 1)
    if mark is None or size < 1:
        return prompt.tolist(), []
    prompt[prompt == mark] = (mark + 1) % executor.vocab_size
    for i in range(num_images):
        prompt[i * (size + 1) :][:size] = mark
    return prompt.tolist(), [executor.draw_image(size, rng) for _ in range(num_images)]
