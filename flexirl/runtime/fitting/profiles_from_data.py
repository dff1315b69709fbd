"""Writes the packaged engine profiles: four fitted to measured iterations, two estimated from published rates.

python -m flexirl.runtime.fitting.profiles_from_data CALIBRATION_FOLDER [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from flexirl.errors import UserError
from flexirl.runtime.profile.engine import PROFILES, EngineProfile, make_profile, save_profile
from flexirl.runtime.profile.step_time import (
    BATCH,
    MEASURED_EFFICIENCY,
    Chip,
    Efficiency,
    Fit,
    ModelShape,
    fit,
    roofline,
)

GIB = 2**30

# Shapes as published in each model's config.json.
LLAMA_31_8B = ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_2_70B = ModelShape("Llama-2-70B", 80, 8192, 64, 8, 128, 28672, 32000)
QWEN_25_VL_7B = ModelShape(
    "Qwen2.5-VL-7B",
    *(28, 3584, 28, 4, 128, 18944, 152064),
    # 32 encoder layers of width 1280 and MLP width 3420, and the 5120 -> 5120 -> 3584 merger of 2 x 2 patches.
    vision_params=32 * (4 * 1280**2 + 3 * 1280 * 3420) + 5120 * (5120 + 3584),
    patches_per_image_token=4,
)
SMOLLM2_135M = ModelShape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, dtype_bytes=4, tied_embeddings=True)

# Data sheets; memory as the CUDA driver reports it for an 80 GB or 141 GB part. Rates: bf16 without sparsity.
A100 = Chip("A100 SXM 80 GB", 79.2 * GIB, 2.039e12, 312e12, 32e9)
A100X2 = Chip("two A100 SXM 80 GB", 79.2 * GIB, 2.039e12, 312e12, 32e9, count=2)
H100 = Chip("H100 SXM 80 GB", 79.2 * GIB, 3.35e12, 989e12, 64e9)
H200 = Chip("H200 SXM 141 GB", 139.8 * GIB, 4.8e12, 989e12, 64e9)
# Two cores at 3 GHz with 32 fp32 operations a cycle, two channels of DDR4-3200, 3 GiB of it for the engine.
CPU = Chip("two CPU cores", 3 * GIB, 51.2e9, 192e9, 51.2e9)
CPU_EFFICIENCY = Efficiency(weights=0.5, kv=0.5, flops=0.5, host=0.5)

MEMORY_SHARE = 0.9  # vLLM's default gpu_memory_utilization
ACTIVATION_BYTES = 1.25e9  # what vLLM 0.19 keeps beside weights and KV cache in a recorded run of Llama-3.1-8B
HOST_SWAP_BYTES = 4 * GIB  # per GPU; vLLM's default swap_space
BLOCK_SIZE = 16

# Against 42 measured H100 runs the composed iterations read 11% low. Taken at a typical iteration of 64 decodes at
# context 1024; half of it per iteration, half per sampled sequence. It is work of the host, the same for every GPU.
HOST_SHARE = 1 / 0.89 - 1
HOST_DECODES, HOST_CONTEXT = 64, 1024


def read_iterations(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`BATCH` records and measured seconds of a calibration CSV; raises UserError for a missing file or column."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder with the calibration CSV files.")
    rows = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    columns = (
        "prefill_tokens",
        "decode_seqs",
        "sum_decode_context",
        "sum_chunk_x_context",
        "sum_chunk_sq",
        "t_ms",
    )
    for column in columns:
        if column not in (rows.dtype.names or ()):
            raise UserError(f"{path} has no column {column}; it needs {', '.join(columns)}.")
    features = np.zeros(len(rows), dtype=BATCH)
    # sampled_sequences stays 0: the files do not say which chunks end their prompt.
    features["prefill_tokens"] = rows["prefill_tokens"]
    features["decode_sequences"] = rows["decode_seqs"]
    features["decode_context"] = rows["sum_decode_context"]
    features["chunk_context"] = rows["sum_chunk_x_context"] + rows["sum_chunk_sq"] / 2
    return features, rows["t_ms"] * 1e-3


def capacity(model: ModelShape, chip: Chip, max_model_len: int) -> tuple[dict[str, float], dict[str, str]]:
    """Memory and limits of an engine, with their origins."""
    block_bytes = BLOCK_SIZE * model.kv_bytes_per_token
    free = chip.count * (MEMORY_SHARE * chip.memory_bytes - ACTIVATION_BYTES) - model.weight_bytes
    values = {
        "kv_blocks": int(free // block_bytes),
        "host_kv_blocks": int(chip.count * HOST_SWAP_BYTES // block_bytes),
        "block_size": BLOCK_SIZE,
        "max_tokens_per_step": 2048,
        "max_running": 256,
        "max_model_len": max_model_len,
        "prefix_caching": 1,
        "noise": 0.0,
    }
    origin = {
        "kv_blocks": f"{MEMORY_SHARE:.0%} of {chip.count} x {chip.memory_bytes / GIB:.1f} GiB, less "
        f"{model.weight_bytes / 1e9:.1f} GB of weights and {ACTIVATION_BYTES / 1e9:.2f} GB a device for activations, "
        f"in blocks of {block_bytes} bytes",
        "host_kv_blocks": "vLLM's default swap space of 4 GiB a device",
        "block_size": "vLLM's default",
        "max_tokens_per_step": "vLLM's default",
        "max_running": "vLLM's default",
        "max_model_len": "chosen: the model's own limit, at most 32768",
        "prefix_caching": "vLLM's default",
        "noise": "none: the fit's error is a property of the form, not randomness of the engine",
    }
    return values, origin


def _estimated(model: ModelShape, chip: Chip, efficiency: Efficiency) -> tuple[dict[str, float], str]:
    words = (
        f"estimated, not measured: shape of {model.name} and published rates of {chip.name} at efficiency "
        f"{efficiency.weights:.2f} (weights), {efficiency.kv:.2f} (KV cache), {efficiency.flops:.2f} (operations), "
        f"{efficiency.host:.2f} (host transfer)"
    )
    return roofline(model, chip, efficiency), words


def host_term(h100: Fit) -> dict[str, float]:
    """`host_s` and `per_sequence_s` owed on the fitted H100 iterations, see HOST_SHARE."""
    batch = {"base_s": 1, "per_token_s": HOST_DECODES, "over_16_s": 1, "per_context_s": HOST_DECODES * HOST_CONTEXT}
    owed = HOST_SHARE * sum(h100.coefficients[name] * size for name, size in batch.items())
    return {"host_s": owed / 2, "per_sequence_s": owed / 2 / HOST_DECODES}


HOST_ORIGIN = (
    "not in the measured iterations: they read 11% low against 42 measured H100 runs; that share of an H100 iteration "
    f"of {HOST_DECODES} decodes at context {HOST_CONTEXT}, half per iteration and half per sampled sequence"
)


def fitted_profile(
    name: str, path: Path, model: ModelShape, chip: Chip, max_model_len: int, host: dict[str, float]
) -> EngineProfile:
    """A profile from measured iterations, the rest from the model's shape and the chip's rates."""
    fitted = fit(*read_iterations(path))
    values, origin = capacity(model, chip, max_model_len)
    values |= fitted.coefficients | host
    origin |= {field: f"fitted to measured iterations, {path.name}" for field in fitted.coefficients}
    origin |= {field: HOST_ORIGIN for field in host}
    estimate, words = _estimated(model, chip, MEASURED_EFFICIENCY)
    values["per_swap_token_s"] = estimate["per_swap_token_s"]
    origin["per_swap_token_s"] = words
    origin["per_image_token_s"] = "the model takes no images"
    if "vidur" in path.name:  # those iterations leave out the language-model head
        head_bytes = model.lm_head_params * model.dtype_bytes
        values["base_s"] += head_bytes / (chip.count * chip.bandwidth * MEASURED_EFFICIENCY.weights)
        origin["base_s"] += "; reading the language-model head added from published bandwidth"
    return make_profile(name, values, origin, fitted.report)


def estimated_profile(
    name: str,
    model: ModelShape,
    chip: Chip,
    efficiency: Efficiency,
    max_model_len: int,
    host: dict[str, float],
    **limits: float,
) -> EngineProfile:
    """A profile from the model's shape and the chip's rates alone, marked as such."""
    values, origin = capacity(model, chip, max_model_len)
    estimate, words = _estimated(model, chip, efficiency)
    values |= estimate | host | limits
    origin |= {field: words for field in estimate}
    origin |= {field: f"estimated, not measured here: {HOST_ORIGIN}" for field in host}
    origin |= {field: "chosen for a small engine" for field in limits}
    return make_profile(name, values, origin, {"form": "roofline", "measured": False})


def build(calibration: Path) -> list[EngineProfile]:
    """All packaged profiles, from the folder of calibration CSVs."""
    h100_csv = calibration / "aic_h100_sxm_llama31_8b_vllm.csv"
    host = host_term(fit(*read_iterations(h100_csv)))
    measured = [
        ("h200-llama-3.1-8b", calibration / "aic_h200_sxm_llama31_8b_vllm.csv", LLAMA_31_8B, H200, 32768),
        ("h100-llama-3.1-8b", h100_csv, LLAMA_31_8B, H100, 32768),
        ("a100-llama-3.1-8b", calibration / "aic_a100_sxm_llama31_8b_vllm.csv", LLAMA_31_8B, A100, 32768),
        ("a100x2-llama-2-70b", calibration / "vidur_a100_llama2_70b_tp2.csv", LLAMA_2_70B, A100X2, 4096),
    ]
    small = {"max_tokens_per_step": 512, "max_running": 32}
    return [
        *(fitted_profile(name, path, model, chip, limit, host) for name, path, model, chip, limit in measured),
        estimated_profile("h100-qwen2.5-vl-7b", QWEN_25_VL_7B, H100, MEASURED_EFFICIENCY, 32768, host),
        estimated_profile("cpu-tiny", SMOLLM2_135M, CPU, CPU_EFFICIENCY, 2048, host, **small),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the packaged engine profiles.")
    parser.add_argument("calibration", type=Path, help="folder with the calibration CSV files")
    parser.add_argument("--output", type=Path, default=PROFILES, help="folder to write to (default: the package)")
    arguments = parser.parse_args()
    for profile in build(arguments.calibration):
        save_profile(profile, arguments.output / f"{profile.name}.json")
        print(f"{profile.name}: {profile.fit}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
