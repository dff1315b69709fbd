"""From a body to what an engine runs: the tokens of a chat or a text, images in them, and how to sample.

Images come inside messages as data URLs: the service fetches nothing from anywhere.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexirl.errors import UserError
from flexirl.runtime.live.requests import Image
from flexirl.runtime.live.sampling import Sampling
from flexirl.serving.bodies import ChatBody, Message, TextBody
from flexirl.serving.errors import ApiError
from flexirl.text import is_text

if TYPE_CHECKING:
    from flexirl.runtime.models.loading import LoadedModel

# For models without a chat template: who speaks, line by line, in the notation of such templates.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Prompt:
    """tokens of the prompt, and the images whose tokens are among them, in order."""

    tokens: list[int]
    images: list[Image]


@dataclass(frozen=True)
class Prompts:
    """Makes prompts for a model; longest: tokens of a sequence; raises ApiError, naming the field."""

    model: LoadedModel
    longest: int

    def of(self, body: ChatBody | TextBody) -> list[Prompt]:
        """One of a chat, one or more of a text."""
        if isinstance(body, ChatBody):
            return [self._chat(body.messages)]
        return [self._text(prompt) for prompt in body.prompts]

    def sampling(self, body: ChatBody | TextBody, choice: int) -> Sampling:
        """How to sample one of several answers: without a temperature as OpenAI does, but for what the model says."""
        fields = {"temperature": 1.0, **body.sampling()} if self.model.sampling.temperature == 0 else body.sampling()
        if "seed" in fields:
            fields["seed"] = (fields["seed"] + choice) & 0xFFFFFFFFFFFFFFFF
        if body.likeliest is not None:
            fields["logprobs"] = body.likeliest
        try:
            return Sampling.of(fields, self.model.sampling)
        except UserError as error:
            raise ApiError(400, str(error)) from None

    def limit(self, body: ChatBody | TextBody, prompt: Prompt) -> int:
        """Output tokens at most: what is asked for, else what fits."""
        room = self.longest - len(prompt.tokens)
        if room < 1 or (body.limit is not None and body.limit > room):
            asked = "" if body.limit is None else f" and max_tokens={body.limit}"
            raise ApiError(
                400, f"The prompt has {len(prompt.tokens)} tokens{asked}; together they may be {self.longest}, so "
                "shorten one of them.", code="context_length_exceeded", param="messages",
            )  # fmt: skip
        if body.limit is not None:
            return body.limit
        return room if isinstance(body, ChatBody) else min(room, 16)  # OpenAI's default for texts

    def _text(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, list):
            return Prompt(prompt, [])
        if not is_text(prompt):
            raise ApiError(400, "prompt is not a text that UTF-8 can write.", param="prompt")
        return Prompt(self._tokenizer(prompt)["input_ids"], [])

    def _chat(self, messages: list[Message]) -> Prompt:
        images: list[Image] = []
        # Some templates take parts, others only texts; parts are kept where there is an image to place.
        said = [
            {"role": "system" if each.role == "developer" else each.role, "content": self._content(each, images)}
            for each in messages
        ]
        tokenizer = self._tokenizer
        template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        try:
            text = tokenizer.apply_chat_template(
                said, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the model's template finds wrong with the messages
            raise ApiError(
                400, f"The model's chat template refuses the messages ({error}).", param="messages"
            ) from None
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if images:
            assert self.model.image_files is not None
            try:
                tokens = self.model.image_files.expand(tokens, images)
            except UserError as error:
                raise ApiError(400, str(error), param="messages") from None
        return Prompt(tokens, images)

    def _content(self, message: Message, images: list[Image]) -> str | list[dict[str, Any]]:
        content = message.content or ""
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part.get("type")
            if kind == "text" and is_text(part.get("text")):
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image_url" and isinstance(part.get("image_url"), dict):
                images.append(self._image(part["image_url"].get("url"), len(images)))
                parts.append({"type": "image"})
            else:
                raise ApiError(
                    400, f"A part of a message is of type {kind!r}; give text that UTF-8 can write, or image_url.",
                    param="messages",
                )  # fmt: skip
        if any(part["type"] == "image" for part in parts) and self._tokenizer.chat_template:
            return parts
        return "".join(part.get("text", "") for part in parts)

    def _image(self, url: Any, number: int) -> Image:
        if self.model.image_files is None:
            raise ApiError(400, "The model takes no images; send text alone.", param="messages")
        if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
            raise ApiError(
                400, f"Image {number} is no data URL; send it as data:image/png;base64,..., nothing is fetched.",
                param="messages",
            )  # fmt: skip
        try:
            data = base64.b64decode(url.split(";base64,", 1)[1], validate=True)
            return self.model.image_files.read(Path(str(number)), io.BytesIO(data))
        except (binascii.Error, UserError) as error:
            raise ApiError(400, f"Image {number} cannot be read ({error}).", param="messages") from None

    @property
    def _tokenizer(self) -> Any:
        if self.model.tokenizer is None:
            raise ApiError(400, "The model has no tokenizer; send a prompt of token numbers to /v1/completions.")
        return self.model.tokenizer
