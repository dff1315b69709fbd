"""What single tokens say, for log-probabilities: their bytes, which need not be a whole character."""

from __future__ import annotations

import re
from functools import cache
from typing import Any


class TokenText:
    """tokenizer: of the model, None for one without: tokens are then written as their numbers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text, in UTF-8."""
        if self._tokenizer is None:
            return str(token).encode()
        text = str(self._tokenizer.decode([token]))
        if "�" not in text:
            return text.encode()
        written = str(self._tokenizer.convert_ids_to_tokens(token))
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", written)  # as SentencePiece writes it
        if byte:
            return bytes([int(byte[1], 16)])
        if all(character in _byte_of() for character in written):
            return bytes(_byte_of()[character] for character in written)
        return text.encode()

    def text_of(self, token: int) -> str:
        """The same as text; bytes that are none are written out, as OpenAI does."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@cache
def _byte_of() -> dict[str, int]:
    """The byte behind each character by which byte-level tokenizers write it (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
