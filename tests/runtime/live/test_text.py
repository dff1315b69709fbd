"""Text comes whole and in order, whatever the tokens are and wherever they are cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexirl.runtime.live.text import Detokenizer, StopStrings
from flexirl.runtime.models.tiny import BEGIN, END, byte_tokenizer

BYTES = byte_tokenizer()
TEXTS = [
    "plain",
    "héllo €uro",
    "日本語 テキスト",
    "👩‍🚀 family 👨‍👩‍👧",
    "tabs\tand\nlines",
    "",
    " leading  spaces ",
    "�real mark",
]


def spelled_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: words with a mark for the space before them, and single bytes for what is left."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "hel", "lo", "e", "l", "o"]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(tokenizer: Any, tokens: list[int], cuts: random.Random) -> list[str]:
    """The text in the pieces in which it is settled, tokens coming one or several at a time."""
    detokenizer = Detokenizer(tokenizer)
    found = []
    while tokens:
        count = cuts.choice((1, 1, 1, 2, 5))
        found.append(detokenizer.push(tokens[:count]))
        tokens = tokens[count:]
    return [*found, detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTES, spelled_tokenizer()], ids=["bytes", "spelled"])
def test_pieces_make_the_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    for seed in range(5):
        found = pieces(tokenizer, tokens, random.Random(seed))
        assert "".join(found) == whole
    one_by_one = Detokenizer(tokenizer)
    settled = [one_by_one.push([token]) for token in tokens]
    # A character is not given out before it is whole: no marks but those of the text itself.
    assert "".join(settled).count("�") <= text.count("�")
    assert whole.startswith("".join(settled))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=80), st.randoms(use_true_random=False))
def test_any_bytes_give_the_text_of_the_tokenizer(tokens: list[int], cuts: random.Random) -> None:
    assert "".join(pieces(BYTES, tokens, cuts)) == BYTES.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_silent() -> None:
    begin, end = BYTES.convert_tokens_to_ids([BEGIN, END])
    tokens = [begin, *BYTES("ab")["input_ids"], end]
    assert "".join(pieces(BYTES, tokens, random.Random(0))) == "ab"


def test_endless_garbage_costs_no_more_per_token() -> None:
    decoded: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            decoded.append(len(tokens))
            return str(BYTES.decode(tokens, **options))

    detokenizer = Detokenizer(Counting())
    continuation = BYTES.convert_tokens_to_ids(pre_tokenizers.ByteLevel.alphabet())[0]
    for _ in range(500):
        detokenizer.push([continuation])
    assert max(decoded) < 40


def stopped(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    """What comes through, and whether a stop string was found; a text that is given out is never taken back."""
    filter_ = StopStrings(stops)
    text = "".join(filter_.push(part) for part in parts)
    return text + filter_.flush(), filter_.found


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_first_stop_string_ends_the_text(stops: list[str], parts: list[str]) -> None:
    text, found = stopped(stops, parts)
    whole = "".join(parts)
    # Stops are looked for as text comes, so the text ends with the part in which the first of them is complete.
    seen = next(
        ("".join(parts[:i]) for i in range(len(parts) + 1) if any(s in "".join(parts[:i]) for s in stops)), None
    )
    assert found == (seen is not None)
    assert text == (whole if seen is None else seen[: min(seen.find(stop) for stop in stops if stop in seen)])


def test_a_beginning_is_held_back_until_it_is_none() -> None:
    filter_ = StopStrings(["END"])
    assert filter_.push("the E") == "the " and filter_.push("N") == "" and filter_.push("T") == "ENT"
    assert filter_.push("E") == "" and filter_.flush() == "E" and not filter_.found
