"""Small models of several families for tests of the live engine, and what Transformers generates with them alone."""

from __future__ import annotations

from typing import Any

import torch
from toys import toy_engine

from flexirl.runtime.live.executor import Batch, Moves, Outcome
from flexirl.runtime.live.requests import Request
from flexirl.runtime.models.executor import ModelExecutor
from flexirl.runtime.models.host_cache import HostCache
from flexirl.runtime.models.loading import LoadedModel
from flexirl.runtime.models.tiny import SHAPES

# Smaller than the tiny models, with the same proportions; Mistral's window is shorter than most sequences.
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {
    name: {**SHAPES["tiny"], "model_type": name, **SMALL, **others}
    for name, others in {"llama": {}, "qwen3": {}, "mistral": {"sliding_window": 11}}.items()
}
_TINY_VL = SHAPES["tiny-vl"]
_VISION = {**_TINY_VL["vision_config"], "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
           "window_size": 16, "out_hidden_size": 48}  # fmt: skip
_TEXT = {**_TINY_VL["text_config"], **SMALL, "rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}  # fmt: skip
# Models that take images.
SEEING = {
    "qwen2_5_vl": {**_TINY_VL, "text_config": _TEXT, "vision_config": _VISION},
    "qwen2_vl": {
        **_TINY_VL, "model_type": "qwen2_vl", "text_config": _TEXT,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2,
                          "patch_size": 4, "spatial_merge_size": 2, "initializer_range": 0.0625},
    },
}  # fmt: skip
ENGINE: dict[str, float] = {
    "kv_blocks": 40, "host_kv_blocks": 30, "block_size": 4, "max_running": 8, "max_tokens_per_step": 24,
    "max_model_len": 100, "prefix_caching": 1, "host_cache_blocks": 40,
}  # fmt: skip


class CheckedExecutor(ModelExecutor):
    """The model executor, with a place to interfere between layers and its host cache open to checks."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model, toy_engine(**ENGINE))
        self.host: HostCache = self._host
        self.between_layers = lambda: None
        self.from_tier = 0  # blocks copied back

    def move(self, moves: Moves) -> dict[int, int]:
        """See `Executor`."""
        self.from_tier += int((moves.copies["to_tier"] == 0).sum())
        return super().move(moves)

    def execute(self, batch: Batch, sampling: Any, interrupted: Any) -> Outcome:
        """Interferes after every layer but the last, when the cache is half written."""

        def ask() -> bool:
            self.between_layers()
            return interrupted is not None and interrupted()

        return super().execute(batch, sampling, ask)


def generate_alone(model: LoadedModel, request: Request, **options: Any) -> list[int]:
    """What Transformers generates with its own attention and cache; options: of its `generate`."""
    own = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        prompt = torch.tensor([request.prompt])
        stop = {"eos_token_id": None} if request.sampling.ignore_eos else {}
        tokens = model.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
            pad_token_id=0, **stop, **options,
        )[0]  # fmt: skip
    model.model.set_attn_implementation(own)
    return tokens[len(request.prompt) :].tolist()
