"""Hashes of tokens: the published function, chained so that a block is known by all that stands before it."""

from __future__ import annotations

import numpy as np
import pytest
from toys import toy_engine

from flexirl.runtime.live.contents import describe, hash_tokens
from flexirl.runtime.scheduler.state import State, new_states

KEY = np.frombuffer(bytes(range(16)), np.uint64).copy()
MASK = (1 << 64) - 1


def siphash(message: bytes) -> int:
    """SipHash-2-4 under KEY, as its authors write it down."""
    k0, k1 = (int(word) for word in KEY)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(i: int, bits: int) -> None:
        v[i] = (v[i] << bits | v[i] >> (64 - bits)) & MASK

    def half(a: int, b: int, c: int, d: int, bits: tuple[int, int]) -> None:
        v[a] = (v[a] + v[b]) & MASK
        v[c] = (v[c] + v[d]) & MASK
        rotate(b, bits[0])
        rotate(d, bits[1])
        v[b] ^= v[a]
        v[d] ^= v[c]
        rotate(a, 32)

    def rounds(count: int) -> None:
        for _ in range(count):
            half(0, 1, 2, 3, (13, 16))
            half(2, 1, 0, 3, (17, 21))

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_slow_one_is_the_published_one() -> None:
    # From the vectors of the reference implementation, `vectors_sip64`: messages of 0 and 8 bytes.
    assert siphash(b"") == 0x726FDB47DD0E0E31
    assert siphash(bytes(range(8))) == 0x93F5F5799A932462


@pytest.mark.parametrize("count", [1, 2, 15, 16, 61, 128])
def test_hash_is_siphash_of_what_is_before_and_the_tokens(count: int) -> None:
    tokens = np.random.default_rng(count).integers(0, 2**31 - 1, count).astype(np.int32)
    before, salt = np.uint64(2**63 + 5), np.uint64(77)
    message = before.tobytes() + salt.tobytes() + tokens.tobytes()
    assert int(hash_tokens(KEY, before, salt, tokens)) == siphash(message)


def described(tokens: np.ndarray, salts: np.ndarray, *known: int) -> np.ndarray:
    """The contents of a request, told of so many known tokens one after the other."""
    engine = toy_engine(prefix_caching=1)
    state = State(*(array[0] for array in new_states(1, engine, 2, 1, contents=16)))
    state.requests["content_first"][1] = 8
    for count in known:
        describe(state, 1, tokens, count, salts, KEY)
    assert not state.contents[:8]["end"].any()
    return state.contents[8 : 8 + state.requests["content_count"][1]]


def test_blocks_are_chained_and_known_as_they_fill() -> None:
    tokens, salts = np.arange(20, dtype=np.int32), np.zeros(5, np.uint64)
    whole = described(tokens, salts, 19)
    assert whole["end"].tolist() == [4, 8, 12, 16]
    assert np.array_equal(whole, described(tokens, salts, 3, 4, 5, 15, 19))
    changed = tokens.copy()
    changed[5] = 99
    assert (described(changed, salts, 19)["origin"] == whole["origin"]).tolist() == [True, False, False, False]
    salts[2] = 1
    assert (described(tokens, salts, 19)["origin"] == whole["origin"]).tolist() == [True, True, False, False]
