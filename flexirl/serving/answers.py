"""From completions to the objects of OpenAI's interface: whole answers, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexirl.runtime.live.requests import Completion, Update
from flexirl.runtime.live.sampling import Logprobs
from flexirl.serving.bodies import ChatBody, TextBody
from flexirl.serving.token_text import TokenText


@dataclass
class Answer:
    """One answer in the making; prompt_tokens: of all prompts; texts: of single tokens, for log-probabilities."""

    body: ChatBody | TextBody
    model: str
    tier: str
    prompt_tokens: int
    texts: TokenText
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice so far

    def __post_init__(self) -> None:
        self._chat = isinstance(self.body, ChatBody)
        self.id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._kind = "chat.completion" if self._chat else "text_completion"

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer of all choices."""
        choices = []
        for i, completion in enumerate(completions):
            logprobs = self._logprobs(i, completion.token_ids, completion.logprobs)
            choices.append({"index": i, **self._said(completion.text), "logprobs": logprobs,
                            "finish_reason": completion.finish_reason})  # fmt: skip
        return self._object(self._kind, choices) | {"usage": self.usage(completions)}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that come before any token: of a chat, who speaks."""
        if not self._chat:
            return []
        return [self._chunk(i, {"role": "assistant", "content": ""}, None, None) for i in range(choices)]

    def piece(self, choice: int, update: Update) -> dict[str, Any] | None:
        """The chunk for what is new in a choice, None if there is nothing to say yet."""
        reason = None if update.completion is None else update.completion.finish_reason
        given = [] if update.logprobs is None or update.token is None else [update.logprobs]
        if not update.text and not given and reason is None:
            return None
        logprobs = self._logprobs(choice, [] if update.token is None else [update.token], given)
        said = {"content": update.text} if update.text or given else {}
        return self._chunk(choice, said if self._chat else {"content": update.text}, logprobs, reason)

    def closing(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """The chunks after the last token."""
        if not self.body.with_usage:
            return []
        return [self._object(self._chunk_kind, []) | {"usage": self.usage(completions)}]

    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Tokens of all prompts and outputs; a prompt that is answered several times counts once."""
        output = sum(len(completion.token_ids) for completion in completions)
        firsts = completions[:: self.body.choices]
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": output,
            "total_tokens": self.prompt_tokens + output,
            "prompt_tokens_details": {"cached_tokens": sum(completion.cached_tokens for completion in firsts)},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
            "service_tier": self.tier,
        }  # fmt: skip

    def _chunk(self, choice: int, said: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        content = {"delta": said} if self._chat else {"text": said.get("content", "")}
        entry = {"index": choice, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._object(self._chunk_kind, [entry])
        return chunk | {"usage": None} if self.body.with_usage else chunk

    def _said(self, text: str) -> dict[str, Any]:
        if self._chat:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"text": text}

    def _logprobs(self, choice: int, tokens: Sequence[int], given: Sequence[Logprobs]) -> dict[str, Any] | None:
        """Log-probabilities in the one or the other way of writing them."""
        if self.body.likeliest is None:
            return None
        if self._chat:
            entries = []
            for token, each in zip(tokens, given, strict=True):
                likeliest = [self._entry(other, value) for other, value in each.likeliest]
                entries.append({**self._entry(token, each.token), "top_logprobs": likeliest})
            return {"content": entries, "refusal": None}
        texts = [self.texts.text_of(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(choice, 0))
            self._offsets[choice] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.token for each in given],
            "top_logprobs": [{self.texts.text_of(other): value for other, value in each.likeliest} for each in given],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.texts.bytes_of(token)
        # Of an impossible token it is minus infinity, which JSON cannot write; OpenAI writes this.
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": max(logprob, -9999.0)}
