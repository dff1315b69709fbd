"""What sequences of tokens say, as the prefix cache knows it: a hash for every full block, of all tokens up to its end.

SipHash-2-4 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012) under a key that no client
knows, chained from block to block: nobody can write a prompt that is taken for another's.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.state import State


@compiled
def describe(state: State, r: int, tokens: np.ndarray, known: int, salts: np.ndarray, key: np.ndarray) -> None:
    """Adds the blocks of request r that its first `known` tokens fill to what its sequence says.

    tokens: int32 (L,), its sequence; salts: uint64, one per block, what beside tokens makes it what it is: images;
    key: uint64 (2,), secret.
    """
    request, size = state.requests[r], state.engine[0].block_size
    while (request.content_count + 1) * size <= known:
        block = request.content_count
        content = state.contents[request.content_first + block]
        before = state.contents[request.content_first + block - 1].origin if block > 0 else np.uint64(0)
        content.origin = hash_tokens(key, before, salts[block], tokens[block * size : (block + 1) * size])
        content.end = (block + 1) * size
        request.content_count += 1


@compiled
def hash_tokens(key: np.ndarray, before: np.uint64, salt: np.uint64, tokens: np.ndarray) -> np.uint64:
    """SipHash-2-4 of two words and 32-bit tokens, uint64."""
    v0 = key[0] ^ np.uint64(0x736F6D6570736575)
    v1 = key[1] ^ np.uint64(0x646F72616E646F6D)
    v2 = key[0] ^ np.uint64(0x6C7967656E657261)
    v3 = key[1] ^ np.uint64(0x7465646279746573)
    v0, v1, v2, v3 = _absorb(v0, v1, v2, v3, before)
    v0, v1, v2, v3 = _absorb(v0, v1, v2, v3, salt)
    for i in range(0, len(tokens) - 1, 2):
        word = np.uint64(np.uint32(tokens[i])) | np.uint64(np.uint32(tokens[i + 1])) << np.uint64(32)
        v0, v1, v2, v3 = _absorb(v0, v1, v2, v3, word)
    last = np.uint64(16 + 4 * len(tokens)) << np.uint64(56)  # the length in bytes, above what is left over
    if len(tokens) % 2:
        last |= np.uint64(np.uint32(tokens[-1]))
    v0, v1, v2, v3 = _absorb(v0, v1, v2, v3, last)
    v2 ^= np.uint64(0xFF)
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3


@nb.njit(cache=True, inline="always")
def _absorb(v0, v1, v2, v3, word):
    v3 ^= word
    for _ in range(2):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    v0 ^= word
    return v0, v1, v2, v3


@nb.njit(cache=True, inline="always")
def _round(v0, v1, v2, v3):
    v0 += v1
    v1 = _rotated(v1, 13) ^ v0
    v0 = _rotated(v0, 32)
    v2 += v3
    v3 = _rotated(v3, 16) ^ v2
    v0 += v3
    v3 = _rotated(v3, 21) ^ v0
    v2 += v1
    v1 = _rotated(v1, 17) ^ v2
    v2 = _rotated(v2, 32)
    return v0, v1, v2, v3


@nb.njit(cache=True, inline="always")
def _rotated(word, bits):
    return (word << np.uint64(bits)) | (word >> np.uint64(64 - bits))
