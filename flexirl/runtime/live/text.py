"""Text from tokens, bit by bit: never half a character, and stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "�"  # what a tokenizer gives for bytes that are no character, or none yet
_UNFINISHED = 3  # bytes of an unfinished UTF-8 character, at most, each of which may be a token
_WINDOW, _KEPT = 32, 12  # tokens decoded together at most, and kept when the window moves on all the same


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that decoded text leaves out, by what they are written as; tokenizer: None has none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: number for number, token in added.items() if token.special}


class Detokenizer:
    """The text of one output as its tokens come; `push` and `flush` give what is new and will not change any more.

    A token's text depends on those before it (spaces, characters of several tokens), so a window of the last tokens is
    decoded anew each time. The window starts where the text was whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._settled = 0  # tokens of the window whose text is whole
        self._given = 0  # characters of the window's text given out

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these further tokens settle."""
        self._window += tokens
        text = self._decode(self._window)
        # One unfinished character can make marks of all bytes in a row, those of finished characters before it, too.
        pending = len(text) - len(text.rstrip(_REPLACEMENT))
        full = len(self._window) > _WINDOW
        if pending > 0 and full:  # then it is no text
            pending = min(pending, _UNFINISHED)
        new = text[self._given : len(text) - pending]
        self._given += len(new)
        if pending == 0:
            # The next window starts with the tokens just settled, for what the next ones' text owes to them.
            self._window, self._settled = self._window[self._settled :], len(self._window) - self._settled
            self._given = len(self._decode(self._window))
        elif full:
            self._window, self._settled = self._window[-_KEPT:], 0
            self._given = max(len(self._decode(self._window)) - pending, 0)
        return new

    def flush(self) -> str:
        """What was held back, marks for unfinished characters included; the output is over."""
        text = self._decode(self._window)[self._given :]
        self._given += len(text)
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Looks for stop strings in a text as it grows, and holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=1)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be given out; after a stop string nothing more, and `found` is True."""
        if self.found:
            return ""
        text = self._held + text
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = 0
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                kept = length
                break
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back and turned out to be text."""
        held, self._held = self._held, ""
        return held
