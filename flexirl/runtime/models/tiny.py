"""Tiny models with random weights and a byte-level tokenizer, made on this machine in Hugging Face format.

They stand in for real models where a CPU has to do: same families, same code path, nothing to download.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"
_BEGIN_ID, _END_ID = 256, 257
IMAGE_TOKENS = ("<|image|>", "<|video|>", "<|vision_start|>", "<|vision_end|>")
_SHAPE: dict[str, Any] = {
    "vocab_size": 258,  # the bytes, BEGIN and END
    "bos_token_id": _BEGIN_ID,
    "eos_token_id": _END_ID,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    # Wide enough that every layer changes the outcome: with the usual 0.02 the last token alone would decide the next.
    "initializer_range": 0.0625,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "llama", **_SHAPE},
    "tiny-qwen3": {"model_type": "qwen3", **_SHAPE},
    "tiny-mistral": {"model_type": "mistral", **_SHAPE, "sliding_window": 256},
    # One that takes images; its vision encoder has a layer within windows and one across the image.
    "tiny-vl": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **_SHAPE,
            "vocab_size": 262,  # and IMAGE_TOKENS
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
            "initializer_range": 0.0625,
        },
        "tie_word_embeddings": False,
        **{f"{name}_token_id": 258 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
    },
}  # fmt: skip


def tiny_model(name: str) -> Path:
    """The folder of one of `SHAPES`, made at the first call and kept in the user's cache folder."""
    digest = hashlib.sha256(json.dumps(SHAPES[name], sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexirl" / "models"
    folder = cache / f"{name}-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Made aside and renamed, so that nobody ever sees half a model.
        with tempfile.TemporaryDirectory(dir=cache) as made:
            build(SHAPES[name], Path(made) / name, seed=0)
            try:
                os.rename(Path(made) / name, folder)
            except OSError:
                if not folder.is_dir():  # then it was not another process that was faster
                    raise
    return folder


def build(shape: dict[str, Any], folder: Path, seed: int) -> None:
    """Writes a model of this shape, weights drawn with `seed`, and its tokenizer; vocab_size at least 258.

    With a `vision_config` the model takes images, its tokenizer knows IMAGE_TOKENS, vocab_size is at least 262, and an
    image processor is there too.
    """
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    sees = "vision_config" in shape
    auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if sees:
        tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
        vision = config.vision_config
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size, "temporal_patch_size": vision.temporal_patch_size,
            "size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224},
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, as GPT-2 spells bytes, and two special ones."""
    alphabet = {character: token for token, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)
