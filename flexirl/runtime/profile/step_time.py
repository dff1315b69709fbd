"""How long one iteration takes: the hinge-form step-time model, its fit to measurements, its estimate from a roofline.

The form (coefficients named as in `flexirl.runtime.profile.engine.ENGINE`, T = prefill tokens + decode sequences):

    base + host + per_sequence S
    + per_token T + per_token_64 (T-64)+ + per_token_128 (T-128)+ + per_token_256 (T-256)+
    + over_16 [T > 16] + over_256 [T > 256]
    + per_context (sum of decode contexts) + per_chunk_context (sum of chunk x context + chunk^2 / 2)
    + (mixed + per_mixed_context (sum of decode contexts)) [prefill tokens > 0]
    + per_image_token (image tokens) + per_swap_token (swapped tokens)

Reading the weights is the base, the hinges follow the matrix multiplications as they turn from memory bound to
compute bound, the steps are changes to a larger tile. The context terms are attention; the mixed ones are the slower
path that decodes take when a chunk is in their batch, because attention no longer splits their contexts. The model
is linear in its coefficients, so measured iterations give them by non-negative least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexirl.compiled import compiled
from flexirl.errors import UserError

BATCH = np.dtype(
    [
        ("prefill_tokens", "i8"),  # prompt tokens computed in this iteration, all chunks together
        ("decode_sequences", "i8"),  # sequences that decode, one token each
        ("sampled_sequences", "i8"),  # sequences that sample a token: decodes and chunks that end their prompt
        ("decode_context", "f8"),  # sum over decodes of tokens attended to
        ("chunk_context", "f8"),  # sum over chunks of chunk * (tokens already computed) + chunk^2 / 2
        ("image_tokens", "f8"),  # image tokens that the vision encoder makes in this iteration
        ("swap_tokens", "f8"),  # tokens of KV cache moved to or from host memory
    ],
    align=True,
)

# The coefficients a fit determines; host_s is not among them, because no measurement tells it from base_s.
COEFFICIENTS = (
    "base_s",
    "per_sequence_s",
    "per_token_s",
    "per_token_64_s",
    "per_token_128_s",
    "per_token_256_s",
    "over_16_s",
    "over_256_s",
    "per_context_s",
    "per_chunk_context_s",
    "mixed_s",
    "per_mixed_context_s",
    "per_image_token_s",
    "per_swap_token_s",
)


@compiled
def _seconds(engine, prefill, decodes, sampled, decode_context, chunk_context, image_tokens, swap_tokens):
    tokens = prefill + decodes
    seconds = (
        engine.base_s
        + engine.host_s
        + engine.per_sequence_s * sampled
        + engine.per_token_s * tokens
        + engine.per_context_s * decode_context
        + engine.per_chunk_context_s * chunk_context
        + engine.per_image_token_s * image_tokens
        + engine.per_swap_token_s * swap_tokens
    )
    if prefill > 0:
        seconds += engine.mixed_s + engine.per_mixed_context_s * decode_context
    if tokens > 16:
        seconds += engine.over_16_s
        if tokens > 64:
            seconds += engine.per_token_64_s * (tokens - 64)
            if tokens > 128:
                seconds += engine.per_token_128_s * (tokens - 128)
                if tokens > 256:
                    seconds += engine.over_256_s + engine.per_token_256_s * (tokens - 256)
    return seconds


@compiled
def step_time(engine, batch):
    """Seconds that one iteration takes, without noise; `engine` is an `ENGINE` record, `batch` a `BATCH` record."""
    return _seconds(
        engine,
        batch.prefill_tokens,
        batch.decode_sequences,
        batch.sampled_sequences,
        batch.decode_context,
        batch.chunk_context,
        batch.image_tokens,
        batch.swap_tokens,
    )


@compiled
def decode_step_time(engine, sequences: int, context: float) -> float:
    """Seconds of an iteration of `sequences` decodes and nothing else, which attend to `context` tokens together."""
    return _seconds(engine, 0, sequences, sequences, context, 0.0, 0.0, 0.0)


@compiled
def step_time_with_decodes(engine, batch, sequences, context):
    """The same if more decodes, which attend to `context` tokens together, joined the batch."""
    return _seconds(
        engine,
        batch.prefill_tokens,
        batch.decode_sequences + sequences,
        batch.sampled_sequences + sequences,
        batch.decode_context + context,
        batch.chunk_context,
        batch.image_tokens,
        batch.swap_tokens,
    )


@compiled
def step_time_with_chunk(engine, batch, context, chunk, image_tokens):
    """The same if a prefill chunk of `chunk` tokens, behind `context` computed ones, joined with its image tokens."""
    return _seconds(
        engine,
        batch.prefill_tokens + chunk,
        batch.decode_sequences,
        batch.sampled_sequences,
        batch.decode_context,
        batch.chunk_context + chunk * (context + 0.5 * chunk),
        batch.image_tokens + image_tokens,
        batch.swap_tokens,
    )


@compiled
def prefill_slope(engine):
    """Seconds that one more prefill token adds to a large iteration, attention aside."""
    return engine.per_token_s + engine.per_token_64_s + engine.per_token_128_s + engine.per_token_256_s


@compiled
def decodes_cost(engine, decodes: int, context: float) -> float:
    """Seconds that `decodes` decodes, attending to `context` tokens together, add to a large iteration."""
    per_decode_s = prefill_slope(engine) + engine.per_sequence_s
    return decodes * per_decode_s + context * (engine.per_context_s + engine.per_mixed_context_s)


def design_matrix(features: np.ndarray) -> np.ndarray:
    """Columns of the linear model: float array (rows, coefficients) from `BATCH` records, in `COEFFICIENTS` order."""
    tokens = (features["prefill_tokens"] + features["decode_sequences"]).astype(float)
    mixed = features["prefill_tokens"] > 0
    return np.column_stack(
        [
            np.ones(len(features)),
            features["sampled_sequences"],
            tokens,
            np.maximum(tokens - 64, 0),
            np.maximum(tokens - 128, 0),
            np.maximum(tokens - 256, 0),
            tokens > 16,
            tokens > 256,
            features["decode_context"],
            features["chunk_context"],
            mixed,
            mixed * features["decode_context"],
            features["image_tokens"],
            features["swap_tokens"],
        ]
    ).astype(float)


@dataclass(frozen=True)
class Fit:
    """A fitted step-time model.

    coefficients: seconds per unit, by name in `COEFFICIENTS`; report: r2, mape and p95_error (shares, not percent)
    on the held-out rows, and how many rows were fitted and held out.
    """

    coefficients: dict[str, float]
    report: dict[str, Any]


def fit(features: np.ndarray, times_s: np.ndarray, seed: int = 0, weights: np.ndarray | None = None) -> Fit:
    """The hinge form that fits measured iterations best, by non-negative least squares on relative error.

    features: `BATCH` records; times_s: their measured seconds, same length. Three quarters of the rows, drawn with
    `seed`, are fitted; the rest are held out for the report. Rows are divided by their time, so that a small
    iteration weighs as much as a large one; weights: how often each row counts, once by default. A feature that is
    zero in every row keeps the coefficient 0.
    Raises UserError for fewer than 8 rows or times that are not positive and finite.
    """
    from scipy.optimize import nnls  # takes longer to import than everything else here, and only fits need it

    times_s = np.asarray(times_s, dtype=float)
    if len(times_s) != len(features) or len(times_s) < 8:
        raise UserError(f"A step-time fit needs at least 8 iterations with one time each; got {len(times_s)}.")
    if not (np.isfinite(times_s).all() and (times_s > 0).all()):
        raise UserError("A step-time fit needs positive, finite times in seconds for every iteration.")
    columns = design_matrix(features)
    order = np.random.default_rng(seed).permutation(len(times_s))
    held_out, fitted = np.split(order, [len(order) // 4])
    root = np.sqrt(weights[fitted]) if weights is not None else np.ones(len(fitted))
    relative = columns[fitted] * (root / times_s[fitted])[:, None]
    # Columns differ by ten orders of magnitude; scaled to unit length they keep the solver well conditioned.
    length = np.linalg.norm(relative, axis=0)
    used = length > 0
    solution = np.zeros(len(COEFFICIENTS))
    solution[used] = nnls(relative[:, used] / length[used], root)[0] / length[used]
    actual = times_s[held_out]
    predicted = columns[held_out] @ solution
    error = np.abs(predicted / actual - 1)
    spread = np.sum((actual - actual.mean()) ** 2)
    report = {
        "form": "hinge",
        "rows_fitted": len(fitted),
        "rows_held_out": len(held_out),
        "r2": float(1 - np.sum((actual - predicted) ** 2) / spread) if spread > 0 else 1.0,
        "mape": float(error.mean()),
        "p95_error": float(np.quantile(error, 0.95)),
    }
    return Fit(dict(zip(COEFFICIENTS, solution.tolist(), strict=True)), report)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's shape as published; bytes and operations follow from it.

    vision_params: parameters of the vision encoder; patches_per_image_token: patches it runs for one image token.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    dtype_bytes: int = 2
    tied_embeddings: bool = False
    vision_params: float = 0.0
    patches_per_image_token: int = 0

    @property
    def decoder_params(self) -> int:
        """Parameters read in every iteration: all layers and the language-model head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.lm_head_params

    @property
    def lm_head_params(self) -> int:
        """Parameters of the language-model head."""
        return self.vocab * self.hidden

    @property
    def weight_bytes(self) -> float:
        """Bytes of memory that all weights take: decoder, input embedding, vision encoder."""
        embedding = 0 if self.tied_embeddings else self.lm_head_params
        return (self.decoder_params + embedding + self.vision_params) * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True)
class Chip:
    """An accelerator's published rates; `count` of them work as one by tensor parallelism."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes per second of device memory
    flops: float  # dense operations per second in the model's data type
    host_bandwidth: float  # bytes per second to host memory, one direction
    count: int = 1


@dataclass(frozen=True)
class Efficiency:
    """Shares of the published rates that are reached.

    The first three are those that the measured H100 iterations of Llama-3.1-8B show (fitted base, context and
    256-token-and-more slopes against 3.35 TB/s and 989 TFLOP/s); the last is the usual share for pinned copies.
    """

    weights: float = 0.70  # of memory bandwidth, reading weights; launches and small operators included
    kv: float = 0.92  # of memory bandwidth, reading KV cache
    flops: float = 0.83  # of dense operations per second
    host: float = 0.80  # of bandwidth to host memory


MEASURED_EFFICIENCY = Efficiency()


def roofline(model: ModelShape, chip: Chip, efficiency: Efficiency = MEASURED_EFFICIENCY) -> dict[str, float]:
    """Step-time coefficients, in seconds by name in `COEFFICIENTS`, from a model's shape and a chip's rates.

    The matrix multiplications of T tokens take the longer of reading the weights and computing 2 x parameters x T.
    That maximum bends at one token count; its slope is shared between the two neighbouring knees of the hinge form
    such that both of its straight arms are met exactly, or put on the last knee where it bends later. Attention of
    decodes reads KV cache; attention of chunks computes, and so does the vision encoder, 2 x parameters per patch
    (its own attention is left out).
    """
    bandwidth = chip.count * chip.bandwidth
    flops = chip.count * chip.flops * efficiency.flops
    weights_s = model.decoder_params * model.dtype_bytes / (bandwidth * efficiency.weights)
    token_s = 2.0 * model.decoder_params / flops
    knees = np.array([0, 64, 128, 256])
    bend = min(weights_s / token_s, knees[-1])
    slopes = [token_s * np.interp(bend, knees, arm) for arm in np.eye(len(knees))]
    hinges = ("per_token_s", "per_token_64_s", "per_token_128_s", "per_token_256_s")
    return dict.fromkeys(COEFFICIENTS, 0.0) | {
        "base_s": weights_s,
        **dict(zip(hinges, map(float, slopes), strict=True)),
        "per_context_s": model.kv_bytes_per_token / (bandwidth * efficiency.kv),
        "per_chunk_context_s": 4.0 * model.layers * model.heads * model.head_dim / flops,
        "per_image_token_s": 2.0 * model.vision_params * model.patches_per_image_token / flops,
        "per_swap_token_s": model.kv_bytes_per_token / (chip.count * chip.host_bandwidth * efficiency.host),
    }
