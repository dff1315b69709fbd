"""The bodies of requests, as OpenAI defines them, with vLLM's names for what OpenAI has not: read and checked.

What would change the answer and is not supported is refused; what changes nothing in it is taken and left alone.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexirl.serving.errors import ApiError
from flexirl.text import is_text

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MOST_CHOICES = 128
MOST_ANSWERS = 1024  # to one request
MOST_STOPS = 4
_SHOWN = 200  # characters of a value in a sentence

Number = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """usage: in a last chunk of its own."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Message(BaseModel):
    """A turn of a chat; content may be parts of text and images."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None


class _Body(_Strict):
    """What both kinds have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=(1 << 31) - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Number | None = None
    stop_token_ids: list[Number] | None = None
    ignore_eos: bool | None = None
    # Nothing in an answer depends on them.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Output tokens at most, None where nothing is said."""
        return self.max_tokens

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that are given."""
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty,
            "min_new_tokens": self.min_tokens, "ignore_eos": self.ignore_eos, "stop_token_ids": self.stop_token_ids,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "seed": None if self.seed is None else self.seed & 0xFFFFFFFFFFFFFFFF,
        }  # fmt: skip
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        given["stop"] = [stop for stop in stops or () if stop] or None
        return {name: value for name, value in given.items() if value is not None}


class ChatBody(_Body):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=(1 << 31) - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    parallel_tool_calls: bool | None = None  # without tools it says nothing
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        """See `_Body.limit`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """How many tokens to give log-probabilities of beside each, None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(_Body):
    """Of /v1/completions; each prompt is a text or token numbers."""

    prompt: str | list[str] | list[Number] | list[list[Number]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One after the other."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        numbers = [token for token in prompt if isinstance(token, int)]
        return [numbers] if numbers else [each for each in prompt if not isinstance(each, int)]

    @property
    def likeliest(self) -> int | None:
        """See `ChatBody.likeliest`."""
        return self.logprobs


BODIES: dict[str, type[ChatBody | TextBody]] = {CHAT: ChatBody, TEXT: TextBody}


def parse(url: str, fields: Any) -> ChatBody | TextBody:
    """The body of a request to `url`, CHAT or TEXT; raises ApiError, naming the field."""
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object.")
    try:
        body = BODIES[url].model_validate(fields)
    except ValidationError as error:
        raise of_validation(error) from None
    if isinstance(body, TextBody):
        if len(body.prompts) * body.choices > MOST_ANSWERS:
            raise ApiError(400, f"prompt times n is more than {MOST_ANSWERS} answers; ask for fewer.", param="prompt")
        if body.best_of not in (None, body.choices):
            raise ApiError(400, f"best_of={body.best_of} is not supported; leave it out.", param="best_of")
        if not body.prompt:
            raise ApiError(400, "prompt is empty; give at least one token.", param="prompt")
    return body


def of_validation(error: ValidationError) -> ApiError:
    """The first fault that was found, as an answer."""
    first = error.errors(include_url=False, include_context=False)[0]
    # Of a field that may be of several types, the types are in the place, too.
    name = ".".join(str(part) for part in first["loc"]) or "body"
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not supported; leave it out.", code="unsupported_parameter", param=field)
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing.", code="missing_required_parameter", param=field)
    value = repr(first.get("input"))
    value = value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
    return ApiError(400, f"{name}: {first['msg']}, not {value}.", code="invalid_value", param=field)


def described(body: type[BaseModel]) -> dict[str, Any]:
    """What the description of the interface says of a body, for a route that reads it by itself."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, definition in definitions.items():  # none of them refers to another
        text = text.replace(json.dumps({"$ref": f"#/components/schemas/{name}"}), json.dumps(definition))
    content = {"application/json": {"schema": json.loads(text)}}
    return {"requestBody": {"required": True, "content": content}}


def read_json(data: bytes) -> Any:
    """What JSON says in UTF-8; raises ApiError for anything else, however odd, half a surrogate pair included."""
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
        if b"\\ud" in data.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half a surrogate pair is no text")
        return value
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:  # a number of thousands of digits, too
        raise ApiError(400, f"The body is not JSON ({str(error)[:_SHOWN]}).", code="invalid_json") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
