"""Loads a model from a local Hugging Face folder, or says in one sentence why it cannot be run.

Nothing is downloaded, unpickled or executed from the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from flexirl.errors import UserError
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.attention import Unsupported
from flexirl.runtime.models.generation import default_sampling, end_tokens
from flexirl.runtime.models.image_files import ImageFiles
from flexirl.runtime.models.tiny import SHAPES, tiny_model
from flexirl.runtime.models.trial import TOLERANCE, Geometry, first_line, try_out
from flexirl.runtime.models.vision import FAMILIES, Vision


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run with paged attention.

    max_len: longest sequence it was made for; end_tokens: those that end an output; sampling: how requests sample that
    do not say; tokenizer: None if the folder has none, so that only token numbers can be used; vision: None for a model
    of text alone; image_files: None also without an image processor in the folder, so that only prepared images can be
    used.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    geometry: Geometry
    vocab_size: int
    max_len: int
    end_tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    vision: Vision | None = None
    image_files: ImageFiles | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of keys and values."""
        return self.model.dtype


def load_model(
    name_or_path: str | Path, device: str = "cpu", dtype: str | None = None, fused: bool | None = None
) -> LoadedModel:
    """One of the tiny models by name, or the model in a folder.

    dtype: float32, bfloat16 or float16; None takes float32 on a CPU and bfloat16 elsewhere. fused: whether fused
    kernels replace what they stand in for; None: on CUDA. Raises UserError for a folder that is missing, incomplete,
    damaged or pickled, for a model that cannot be run, and where memory is short.
    """
    where = _device(device)
    wanted = _dtype(dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    with _quiet():
        folder = tiny_model(str(name_or_path)) if str(name_or_path) in SHAPES else Path(name_or_path)
        if not folder.is_dir():
            raise UserError(f"model={name_or_path} is neither a folder nor one of {', '.join(SHAPES)}.")
        config = _config(folder)
        _check_weights(folder, where, wanted)
        model = _load(folder, config, where, wanted)
        tokenizer = _tokenizer(folder)
        fused = where.type == "cuda" if fused is None else fused
        with _refusing(folder, where):
            vision, geometry, vocab_size = try_out(model, fused)
            ends = end_tokens(model.generation_config, tokenizer)
            sampling = default_sampling(model.generation_config, vocab_size)
        has_processor = (folder / "preprocessor_config.json").is_file()
        image_files = ImageFiles(folder, vision) if vision is not None and has_processor else None
    text_config = config.get_text_config()
    return LoadedModel(
        name=str(name_or_path) if str(name_or_path) in SHAPES else folder.resolve().name,
        model=model,
        tokenizer=tokenizer,
        geometry=geometry,
        vocab_size=vocab_size,
        max_len=int(getattr(text_config, "max_position_embeddings", None) or np.iinfo(np.int32).max),
        end_tokens=ends,
        sampling=sampling,
        vision=vision,
        image_files=image_files,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' progress bars and warnings are for its own users; ours get one sentence."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


@contextmanager
def _refusing(folder: Path, device: torch.device) -> Iterator[None]:
    """Turns whatever a model that was loaded is then found to be, or to raise, into a sentence."""
    try:
        yield
    except (Unsupported, UserError) as reason:
        raise _refusal(folder, str(reason)) from None
    except torch.OutOfMemoryError:
        raise _too_large(folder, device) from None
    except Exception as error:
        raise _refusal(
            folder, f"with paged attention its code fails ({type(error).__name__}: {first_line(error)})"
        ) from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not known; choose cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda needs a CUDA device and a CUDA build of PyTorch, which are not here; use cpu.")
    return device


def _dtype(name: str) -> torch.dtype:
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
    if name not in dtypes:
        raise UserError(f"dtype={name} is not known; choose from {', '.join(dtypes)}.")
    return dtypes[name]


def _config(folder: Path) -> PretrainedConfig:
    """The model's configuration, unless it says by itself that the model cannot be run."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"Model {folder} has no usable config.json: {first_line(error)}") from None
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    rope = next((kind for kind in ("dynamic", "longrope") if kind in rope_types), None)
    reason = None
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder, and only decoders are supported"
    elif config.model_type not in FAMILIES and any(
        getattr(config, part, None) is not None for part in ("vision_config", "audio_config")
    ):
        reason = f"it reads more than text, and of such models only {' and '.join(FAMILIES)} are supported"
    elif getattr(config, "quantization_config", None) is not None:
        reason = "its weights are quantised; use the original ones"
    elif rope is not None:
        reason = f"its {rope} rotary embedding depends on the longest sequence beside it in a batch"
    elif "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        reason = "chunked attention is not supported"
    elif type(config) not in _auto_class(config)._model_mapping:
        reason = f"Transformers knows no language model of type {config.model_type}"
    if reason is not None:
        raise _refusal(folder, reason)
    return config


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if config.model_type in FAMILIES else AutoModelForCausalLM


def _check_weights(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError unless the safetensors files that will be loaded are there, open and will fit."""
    files = _weight_files(folder)
    if not files:
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
        if pickled:
            raise UserError(f"Model {folder} has pickled weights ({pickled[0]}); convert them to safetensors first.")
        raise UserError(f"Model {folder} has no weights; it needs model.safetensors or its index.")
    parameters = 0
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    parameters += int(np.prod(tensors.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a readable safetensors file: {first_line(error)}") from None
        except (MemoryError, RuntimeError):  # of the system, which does not map it
            raise UserError(
                f"{file} has {file.stat().st_size / 2**30:.1f} GiB, more than this machine can map into its memory of "
                f"{total_memory(torch.device('cpu')) / 2**30:.1f} GiB; use a smaller model."
            ) from None
    needed, there = parameters * dtype.itemsize, total_memory(device)
    if needed > there:
        raise UserError(
            f"Model {folder} needs {needed / 2**30:.1f} GiB for its weights and {device.type} has "
            f"{there / 2**30:.1f} GiB; use a smaller model or a smaller dtype."
        )


def _weight_files(folder: Path) -> list[Path]:
    """The files that Transformers loads: one by its usual name, or else those of the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(folder / name for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of safetensors files ({type(error).__name__}).") from None


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _load(folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
        model, report = loaded
        missing = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
        if missing:
            raise UserError(f"Model {folder} has no fitting weights for {missing[0]}; its files are incomplete.")
        # Without gradients to track, no context has to be entered for each iteration.
        ready: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        return ready
    except torch.OutOfMemoryError:
        raise _too_large(folder, device) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Model {folder} cannot be loaded: {first_line(error)}") from None


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"Model {folder} has no usable tokenizer: {first_line(error)}") from None


def _too_large(folder: Path, device: torch.device) -> UserError:
    return UserError(f"Model {folder} does not fit into the memory of {device}; use a smaller one.")


def _refusal(folder: Path, reason: str) -> UserError:
    return UserError(f"Model {folder} cannot be run: {reason.rstrip('.')}.")
