"""The executor that runs a Transformers model over a paged cache, and the profile that fits model and machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flexirl.errors import UserError
from flexirl.runtime.kernels import AttentionBatch, plan_attention
from flexirl.runtime.live.executor import Batch, Interrupted, Moves, Outcome, OutOfMemory
from flexirl.runtime.live.requests import Image, Request
from flexirl.runtime.live.sampling import Logprobs, choose, likeliest, log_probabilities, penalise
from flexirl.runtime.models.attention import PagedIteration
from flexirl.runtime.models.decode_graphs import Capture, DecodeGraphs, capture_graph
from flexirl.runtime.models.host_cache import HostCache
from flexirl.runtime.models.images import ImageTable, Pictured
from flexirl.runtime.models.loading import LoadedModel, total_memory
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.kv_cache import blocks_for

_LOG = logging.getLogger(__name__)

# Share of a device's memory that weights, cache and activations may take together, and of the machine's memory that
# the cache may take where there is no other device.
_DEVICE_SHARE, _HOST_SHARE = 0.9, 0.25
_HOST_BYTES = 4 << 30  # for swapped requests, unless told otherwise; vLLM's default


class ModelExecutor:
    """Runs a Transformers model; profile: see `fit_profile`, which makes one that fits the model and the memory.

    Raises UserError for a cache that does not fit, and for end tokens that the model cannot say.
    """

    def __init__(self, model: LoadedModel, profile: EngineProfile) -> None:
        for token in model.end_tokens:
            if not 0 <= token < model.vocab_size:
                raise UserError(
                    f"Model {model.name} has eos_token_id {token}, which is not from 0 to {model.vocab_size - 1}; "
                    "correct it in its config.json, generation_config.json or tokenizer."
                )
        self.profile = profile
        self.vocab_size = model.vocab_size
        self.end_tokens = model.end_tokens
        self.image_token = model.vision.image_token if model.vision is not None else None
        self._model = model.model
        self._geometry = model.geometry
        self._block_size = int(profile.values["block_size"])
        blocks, host_blocks, tier_blocks = (
            int(profile.values[name]) for name in ("kv_blocks", "host_kv_blocks", "host_cache_blocks")
        )
        # On a CPU the tensors made of a batch are its own memory, so they serve for all that come as the same object.
        self._seen: tuple[Batch | None, tuple[Tensor, ...]] = (None, ())
        self._graphs: DecodeGraphs | None = None
        self._images = ImageTable(model.vision) if model.vision is not None else None
        geometry = model.geometry
        shape = (2 * geometry.layers, blocks, self._block_size, geometry.kv_heads, geometry.head_dim)
        try:
            # Written to at once: on a CPU, memory that never was is one page of zeros, quicker to read than any other,
            # and has to be found when it is first written.
            self._cache = torch.empty(shape, dtype=model.dtype, device=model.device).zero_()
            self._host = HostCache(self._cache, host_blocks, tier_blocks)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            gigabytes = (blocks + host_blocks + tier_blocks) * _block_bytes(model, self._block_size) / 2**30
            raise UserError(
                f"engine.kv_blocks={blocks}, engine.host_kv_blocks={host_blocks} and "
                f"engine.host_cache_blocks={tier_blocks} take {gigabytes:.1f} GiB, which {model.device} and this "
                "machine do not have left; give smaller numbers."
            ) from None
        if self._cache.is_cuda:
            try:
                self.pad_decodes(capture_graph(torch.cuda.graph_pool_handle()))
            except Exception as error:  # a model that decides on the host what to launch runs without
                _LOG.warning("decodes run without CUDA graphs: %s", error)

    def pad_decodes(self, capture: Capture) -> None:
        """From here on batches that only decode run padded, by what `capture` makes of the forward; on CUDA at once."""
        limits = self.profile.values
        self._graphs = DecodeGraphs(
            self._decode, self._plan, int(limits["max_running"]),
            blocks_for(int(limits["max_model_len"]), self._block_size), self._block_size, self._cache.device, capture,
        )  # fmt: skip

    @property
    def free_host_blocks(self) -> int:
        """See `Executor`."""
        return self._host.free_blocks

    def move(self, moves: Moves) -> dict[int, int]:
        """See `Executor`."""
        return self._host.move(moves)

    def check_images(self, request: Request) -> int:
        """See `Executor`."""
        if self._images is None:
            raise UserError(f"Request {request.id} has images and the model takes none; send text alone.")
        return self._images.vision.check(request)

    def take_images(self, r: int, request: Request) -> None:
        """See `Executor`."""
        assert self._images is not None
        self._images.enter(r, request.prompt, request.images)

    def draw_image(self, tokens: int, rng: np.random.Generator) -> Image:
        """See `Executor`."""
        assert self._images is not None
        return self._images.vision.draw(tokens, rng)

    def forget(self, r: int) -> None:
        """See `Executor`."""
        self._host.forget(r)
        if self._images is not None:
            self._images.forget(r)

    def execute(self, batch: Batch, sampling: np.ndarray | None, interrupted: Callable[[], bool] | None) -> Outcome:
        """See `Executor`."""
        try:
            pictured = None
            if self._images is not None:
                batch, pictured = self._images.place(batch)
            if self._graphs is not None and pictured is None and self._graphs.takes(batch):
                if interrupted is not None and interrupted():  # a graph runs whole
                    raise Interrupted
                self._graphs.fill(batch)
                began = time.perf_counter()
                logits = self._graphs.run()
                if len(batch.sampled_rows) < len(logits):
                    logits = logits[batch.sampled_rows]
            else:
                tokens, positions, slots, sampled_rows, block_table = self._tensors(batch)
                attention = self._plan(batch.query_lens, batch.context_lens, block_table)
                paged = PagedIteration(self._cache, slots, attention, interrupted)
                del attention  # so that all it makes is gone when the model is done
                began = time.perf_counter()
                logits = self._forward(tokens, positions, sampled_rows, paged, pictured)
                del paged
            forward_s = time.perf_counter() - began
            wanted = len(batch.sampled_rows), self.vocab_size
            if logits.shape != wanted:
                raise RuntimeError(f"the model gave logits of shape {tuple(logits.shape)} where {wanted} was asked for")
            logprobs: dict[int, Logprobs] = {}
            if sampling is None:
                chosen = likeliest(logits)
            else:
                chosen = choose(penalise(logits, batch.histories), sampling, batch.draws)
                logprobs = log_probabilities(logits, chosen, sampling)
            if self._cache.is_cuda:  # the model was only launched above
                forward_s = time.perf_counter() - began
            return Outcome(chosen, logprobs, forward_s)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if self._cache.is_cuda:
                torch.cuda.empty_cache()
            raise OutOfMemory from error

    def _plan(
        self, query_lens: np.ndarray, context_lens: np.ndarray, block_table: np.ndarray | Tensor,
        graph_context: int | None = None,
    ) -> AttentionBatch:  # fmt: skip
        return plan_attention(
            query_lens, context_lens, block_table, self._cache.device, num_heads=self._geometry.heads,
            num_kv_heads=self._geometry.kv_heads, block_size=self._block_size, graph_context=graph_context,
        )  # fmt: skip

    def _forward(
        self, tokens: Tensor, positions: Tensor, rows: Tensor | int, paged: PagedIteration,
        pictured: Pictured | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (S, vocabulary) of `rows`, all for 0; tokens, positions: (1, T), positions unless there are images."""
        inputs = {"input_ids": tokens}
        if pictured is not None:
            embeddings = self._model.get_input_embeddings()(tokens)
            embeddings[0, pictured.rows] = pictured.embed()
            inputs = {"inputs_embeds": embeddings}
            positions = torch.from_numpy(pictured.positions[:, None]).to(tokens.device)
        logits: Tensor = self._model(
            **inputs, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=paged
        ).logits[0]
        if pictured is not None:
            pictured.let_go()
        return logits

    def _decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, attention: AttentionBatch) -> Tensor:
        return self._forward(tokens[None], positions[None], 0, PagedIteration(self._cache, slots, attention))

    def _tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        """Tokens and positions (1, T), slots (T,), sampled rows (S,), block table (N, widest) on the device."""
        device = self._cache.device
        if self._cache.is_cuda or batch is not self._seen[0]:
            arrays = (batch.tokens[None], batch.positions[None], batch.slots, batch.sampled_rows, batch.block_table)
            self._seen = batch, tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        return self._seen[1]


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _block_bytes(model: LoadedModel, block_size: int) -> int:
    geometry = model.geometry
    return 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * block_size * model.dtype.itemsize


def fit_profile(
    model: LoadedModel, profile: EngineProfile, kv_blocks: int | None = None, host_kv_blocks: int | None = None
) -> EngineProfile:
    """`profile` with block counts and longest sequence that fit the model and the memory of its device.

    kv_blocks, host_kv_blocks: taken as they are if given. Otherwise the cache gets what 90% of the device's memory
    leaves beside the weights and the largest iteration (on a CPU a quarter of the machine's memory), but no more than
    all seats can use, and host memory 4 GiB. Raises UserError if no block fits, or those given do not.
    """
    block_size = int(profile.values["block_size"])
    block_bytes = _block_bytes(model, block_size)
    longest = min(int(profile.values["max_model_len"]), model.max_len)
    fitting = _cache_bytes(model, int(profile.values["max_tokens_per_step"])) // block_bytes
    useful = int(profile.values["max_running"]) * blocks_for(longest, block_size)
    blocks = kv_blocks if kv_blocks is not None else min(fitting, useful)
    if blocks < 1 or blocks * block_bytes > total_memory(model.device):
        there = total_memory(model.device) / 2**30
        raise UserError(
            f"Model {model.name} needs {block_bytes / 2**20:.1f} MiB of cache per block, and engine.kv_blocks={blocks} "
            f"does not fit into the {there:.1f} GiB of {model.device.type}; give a number that does."
        )
    if host_kv_blocks is None:
        host_kv_blocks = min(_HOST_BYTES // block_bytes, 4 * blocks)
    return profile.replace(
        kv_blocks=blocks, host_kv_blocks=host_kv_blocks, max_model_len=min(longest, blocks * block_size)
    )


def _cache_bytes(model: LoadedModel, max_tokens: int) -> int:
    """Bytes that the cache may take."""
    if model.device.type == "cpu":
        return int(total_memory(model.device) * _HOST_SHARE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    tokens = torch.zeros((1, max_tokens), dtype=torch.int64, device=model.device)

    def attend(layer: int, query: Tensor, *_: object) -> Tensor:
        return query

    try:
        model.model(
            input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=tokens[0, :256], paged=attend
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"An iteration of {max_tokens} tokens of {model.name} does not fit into {model.device}; "
            "lower engine.max_tokens_per_step."
        ) from None
    peak = torch.cuda.max_memory_allocated(model.device)
    torch.cuda.empty_cache()
    return int(total_memory(model.device) * _DEVICE_SHARE) - peak
