"""Files of prompts: one JSON object a line, each a request, or a sentence that says why it is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexirl.errors import UserError
from flexirl.runtime.live.requests import Image, Request, Update
from flexirl.runtime.live.sampling import Sampling
from flexirl.text import is_text
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

if TYPE_CHECKING:
    from flexirl.runtime.models.loading import LoadedModel

CLASSES = {"immediate": IMMEDIATE, "deferred": DEFERRED}
_SHOWN = 80  # characters of a value in a sentence


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file that are not blank, each with its place ("line 3"); raises UserError if there are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompts={path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read as UTF-8 text ({error}).") from None
    # A text in JSON may hold other characters that end lines elsewhere.
    lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompts={path} is empty; give it one JSON object a line.")
    return lines


def json_object(line: str) -> dict[str, Any]:
    """The fields of a line, without those that are null; raises UserError for anything but a JSON object."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"This is not JSON ({error}).") from None
    except ValueError:
        raise UserError("This has a number of thousands of digits in it; write a shorter one.") from None
    except RecursionError:
        raise UserError("This is nested too deeply; write one JSON object of plain fields.") from None
    if not isinstance(fields, dict):
        raise UserError('This is not a JSON object; write {"prompt": "..."}.')
    return {name: value for name, value in fields.items() if value is not None}


def take_id(fields: dict[str, Any], place: str) -> str:
    """Takes the id out of a line's fields: without one, its place; raises UserError for what cannot be one."""
    given = fields.pop("id", place)
    if isinstance(given, bool) or not isinstance(given, str | int | float) or not is_text(str(given)):
        raise UserError(f"id={_shown(given)} is neither a number nor a text that UTF-8 can write; give another.")
    return str(given)


@dataclass(frozen=True)
class PromptParser:
    """Makes requests for a model of the fields of lines.

    folder: where paths of images begin; max_tokens: of lines that do not say, as far as that fits into `longest`
    tokens, prompt included; listener: of all requests.
    """

    model: LoadedModel
    folder: Path
    max_tokens: int
    longest: int
    listener: Callable[[Update], None] | None = None

    def request(self, request_id: str, fields: dict[str, Any]) -> Request:
        """The request with these fields, whose id is taken out; raises UserError, naming the field."""
        kind = fields.pop("class", "immediate")
        if not isinstance(kind, str) or kind not in CLASSES:
            raise UserError(f"class={_shown(kind)} is neither immediate nor deferred.")
        tokens, images = self._prompt(fields)
        most = min(self.max_tokens, max(self.longest - len(tokens), 1))
        limit = fields.pop("max_tokens", most)
        if type(limit) is not int:
            raise UserError(f"max_tokens={_shown(limit)} is not a whole number.")
        if fields.get("top_k") == -1:  # vLLM's word for all tokens
            fields["top_k"] = 0
        sampling = Sampling.of(fields, self.model.sampling)
        return Request(request_id, tokens, limit, CLASSES[kind], sampling, listener=self.listener, images=images)

    def _prompt(self, fields: dict[str, Any]) -> tuple[list[int], list[Image]]:
        text, tokens = fields.pop("prompt", None), fields.pop("prompt_token_ids", None)
        if (text is None) == (tokens is None):
            raise UserError("A request needs either a prompt or prompt_token_ids.")
        if tokens is None:
            if self.model.tokenizer is None:
                raise UserError("The model has no tokenizer; give prompt_token_ids in place of a prompt.")
            if not is_text(text):
                raise UserError(f"prompt={_shown(text)} is not a text that UTF-8 can write.")
            tokens = self.model.tokenizer(text)["input_ids"]
        elif not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError("prompt_token_ids is not a list of whole numbers.")
        paths = fields.pop("images", [])
        if not isinstance(paths, list) or not all(is_text(path) for path in paths):
            raise UserError(f"images={_shown(paths)} is not a list of paths.")
        if not paths:
            return tokens, []
        if self.model.image_files is None:
            raise UserError("The model takes no image files; send text alone.")
        images = [self.model.image_files.read(self.folder / path) for path in paths]
        return self.model.image_files.expand(tokens, images), images


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
