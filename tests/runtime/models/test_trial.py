"""The trial run after loading: whatever a short sequence in the weights' own precision would not show is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexirl.errors import UserError
from flexirl.runtime.models.loading import load_model

COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA4 = {**COMMON, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
          "layer_types": ["full_attention"] * 2}  # fmt: skip
FALCON_H1 = {**COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
             "mamba_d_state": 8, "mamba_chunk_size": 8}  # fmt: skip
WHISPER = {
    **COMMON, "is_encoder_decoder": False, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "max_target_positions": 128,
}  # fmt: skip
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 60}


def random_model(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A model with random weights."""
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("phimoe", {**COMMON, "sliding_window": 60, "num_local_experts": 2}, "its attention is not plain"),
        ("phimoe", {**COMMON, "sliding_window": 4000, "num_local_experts": 2}, "its attention is not plain"),
        ("llama4_text", {**LLAMA4, "attn_temperature_tuning": True, "floor_scale": 60, "no_rope_layers": [1, 0]},
         "its attention is not plain"),
        ("llama4_text", {**LLAMA4, "attn_temperature_tuning": True, "no_rope_layers": [1, 0]},
         "its attention is not plain"),
        ("whisper", WHISPER, "logits of other rows than it is asked for"),
        ("falcon_h1", FALCON_H1, "something beside attention carries from token to token"),
    ],
)  # fmt: skip
def test_what_begins_later_or_hides_in_rounding_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], reason: str, dtype: str
) -> None:
    random_model(tmp_path, kind, settings)
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {**COMMON, "sliding_window": 60}),
        ("gemma3_text", {**COMMON, "sliding_window": 4000}),
        ("llama", {**COMMON, "rope_parameters": SCALED}),
        ("ministral3", {**COMMON, "rope_parameters": {**SCALED, "llama_4_scaling_beta": 0.1}}),
        ("phimoe", {**COMMON, "num_local_experts": 2}),
        ("qwen3_moe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                       "tie_word_embeddings": True}),
        ("llama4_text", {**LLAMA4, "attn_temperature_tuning": False, "no_rope_layers": [1, 0]}),
    ],
)  # fmt: skip
def test_what_is_handed_on_at_any_length_runs_and_is_left_as_it_was(
    tmp_path: Path, kind: str, settings: dict[str, Any], dtype: str
) -> None:
    random_model(tmp_path, kind, settings)
    model = load_model(tmp_path, dtype=dtype).model
    before = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert model.config.to_dict() == before.config.to_dict()
    for (name, weights), (_, expected) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert weights.dtype == expected.dtype and torch.equal(weights, expected), name
    for module, other in zip(model.modules(), before.modules(), strict=True):
        numbers = [{key: value for key, value in vars(each).items() if isinstance(value, int | float)}
                   for each in (module, other)]  # fmt: skip
        assert numbers[0] == numbers[1]
