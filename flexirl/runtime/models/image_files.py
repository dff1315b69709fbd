"""Image files, made by the model's own image processor into what the model takes, and prompts that refer to them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import PIL.Image
from transformers import AutoImageProcessor

from flexirl.errors import UserError
from flexirl.runtime.live.requests import Image
from flexirl.runtime.models.vision import Vision

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # others that Pillow knows may start programs to be read


class ImageFiles:
    """Reads image files for the model in a folder; raises UserError if there is no usable image processor in it."""

    def __init__(self, folder: Path, vision: Vision) -> None:
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"Model {folder} has no usable image processor: {reason}") from None
        self._vision = vision

    def read(self, path: Path, file: IO[bytes] | None = None) -> Image:
        """The image in a file, or in one that is open already; raises UserError if it cannot be read."""
        try:
            with PIL.Image.open(file or path, formats=FORMATS) as opened:
                prepared = self._processor(images=[opened.convert("RGB")], return_tensors="pt")
        except FileNotFoundError:
            raise UserError(f"Image {path} does not exist.") from None
        except Exception as error:  # whatever Pillow or the processor finds wrong with it
            kinds = ", ".join(FORMATS)
            raise UserError(f"Image {path} cannot be read ({error}); give one of {kinds}.") from None
        time, height, width = prepared["image_grid_thw"][0].tolist()
        return Image(prepared["pixel_values"], (time, height, width))

    def expand(self, tokens: list[int], images: list[Image]) -> list[int]:
        """A prompt in which one image token stands for each image, with as many as each takes.

        Without any, the images come first. Raises UserError for another number of them.
        """
        mark, start, end = self._vision.image_token, self._vision.start_token, self._vision.end_token
        if mark not in tokens:
            tokens = [token for _ in images for token in (start, mark, end)] + tokens
        if tokens.count(mark) != len(images):
            raise UserError(
                f"The prompt has {tokens.count(mark)} image tokens ({mark}) and there are {len(images)} images; "
                "give one for each, or none to put the images first."
            )
        sizes = iter(map(self._vision.tokens_of, images))
        return [expanded for token in tokens for expanded in ([mark] * next(sizes) if token == mark else [token])]
