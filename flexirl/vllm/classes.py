"""What a request of vLLM says of itself: its class, what it was promised, whose it is.

In its sampling parameters' `extra_args` (`vllm_xargs` over HTTP), as `{"flexirl": {"class": "deferred", "window_s":
86400}}` or flat, as `{"flexirl_class": "deferred", "flexirl_window_s": 86400}`. Without a word it is immediate, unless
its priority number says that it may wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flexirl.errors import UserError
from flexirl.vllm.settings import KEY, Settings, is_seconds
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

CLASSES = {"immediate": IMMEDIATE, "deferred": DEFERRED}
_WORDS = ("class", "window_s", "ttft_s", "tpot_s", "tenant")
_NEVER_S = float("inf")


class Wish(NamedTuple):
    """What is promised to a request, in seconds, inf for nothing; tenant: a name, empty where nobody is named."""

    request_class: int
    window_s: float
    ttft_s: float
    tpot_s: float
    tenant: str


def read_wish(priority: int, extra_args: Any, settings: Settings) -> Wish:
    """The wish of a request; raises UserError for a word that cannot be understood."""
    words = _words(extra_args) if extra_args else {}
    name = words.get("class")
    if name is None:
        request_class = DEFERRED if priority > settings.deferred_above else IMMEDIATE
    elif isinstance(name, str) and name in CLASSES:
        request_class = CLASSES[name]
    else:
        raise UserError(f"{KEY}_class={name!r} is unknown; choose from {', '.join(CLASSES)}.")
    deferred = request_class == DEFERRED
    return Wish(
        request_class,
        _seconds(words, "window_s", settings.window_s if deferred else None),
        _seconds(words, "ttft_s", None if deferred else settings.ttft_s),
        _seconds(words, "tpot_s", None if deferred else settings.tpot_s),
        str(words.get("tenant", "")),
    )


def default_wish(settings: Settings) -> Wish:
    """Of a request whose words cannot be understood: it is immediate, so that it suffers nothing for them."""
    return read_wish(settings.deferred_above, None, settings)


def _words(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    words = {word: extra_args[f"{KEY}_{word}"] for word in _WORDS if f"{KEY}_{word}" in extra_args}
    nested = extra_args.get(KEY, {})
    if not isinstance(nested, Mapping):
        raise UserError(f"{KEY}={nested!r} of a request should be a mapping of {', '.join(_WORDS)}.")
    for word in nested:
        if word not in _WORDS:
            raise UserError(f"{KEY}.{word} of a request is unknown; choose from {', '.join(_WORDS)}.")
    return words | dict(nested)


def _seconds(words: Mapping[str, Any], word: str, default: float | None) -> float:
    value = words.get(word, default)
    if value is None:
        return _NEVER_S
    if not is_seconds(value):
        raise UserError(f"{KEY}_{word}={value!r} of a request is out of range; give a positive number of seconds.")
    return float(value)
