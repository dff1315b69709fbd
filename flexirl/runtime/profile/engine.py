"""What an engine is: the numbers the scheduler and the step-time model need, read from a JSON profile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexirl.errors import UserError

# The step-time model, in seconds, of one iteration with T = prefill tokens + decode sequences:
#   base + host + per_sequence * S
#   + per_token * T + per_token_64 * (T-64)+ + per_token_128 * (T-128)+ + per_token_256 * (T-256)+
#   + over_16 if T > 16, + over_256 if T > 256: matrix multiplications change to a larger tile there
#   + per_context * (sum of decode contexts) + per_chunk_context * (sum of chunk * context + chunk^2 / 2)
#   + mixed + per_mixed_context * (sum of decode contexts) if there is any prefill: a chunk in the batch sends
#     the decodes down a slower attention path
#   + per_image_token * (image tokens encoded)
#   + per_swap_token * (tokens moved to or from host memory)
# S = sequences that sample a token. All arithmetic is linear in the coefficients.
ENGINE = np.dtype(
    [
        ("base_s", "f8"),
        ("host_s", "f8"),
        ("per_sequence_s", "f8"),
        ("per_token_s", "f8"),
        ("per_token_64_s", "f8"),
        ("per_token_128_s", "f8"),
        ("per_token_256_s", "f8"),
        ("over_16_s", "f8"),
        ("over_256_s", "f8"),
        ("per_context_s", "f8"),
        ("per_chunk_context_s", "f8"),
        ("mixed_s", "f8"),
        ("per_mixed_context_s", "f8"),
        ("per_image_token_s", "f8"),
        ("per_swap_token_s", "f8"),
        ("noise", "f8"),  # standard deviation of log(step time); 0 is none
        ("kv_blocks", "i4"),  # blocks of KV cache
        ("host_kv_blocks", "i4"),  # blocks of host memory that preempted requests may be swapped to
        ("host_cache_blocks", "i4"),  # blocks of host memory for what the prefix cache gives up
        ("block_size", "i4"),  # tokens per block
        ("max_tokens_per_step", "i4"),  # token budget of one iteration
        ("max_running", "i4"),  # seats: requests in the running batch
        ("max_model_len", "i4"),  # longest sequence, prompt and output together
        ("prefix_caching", "i4"),  # 1: freed blocks stay reusable by their owner until reallocated (vLLM's LRU)
    ],
    align=True,
)


UNITS = {
    "base_s": "s",
    "host_s": "s",
    "per_sequence_s": "s per sampled sequence",
    "per_token_s": "s per token",
    "per_token_64_s": "s per token beyond 64",
    "per_token_128_s": "s per token beyond 128",
    "per_token_256_s": "s per token beyond 256",
    "over_16_s": "s",
    "over_256_s": "s",
    "per_context_s": "s per token of decode context",
    "per_chunk_context_s": "s per token squared",
    "mixed_s": "s",
    "per_mixed_context_s": "s per token of decode context beside prefill",
    "per_image_token_s": "s per image token",
    "per_swap_token_s": "s per token",
    "noise": "standard deviation of log(step time)",
    "kv_blocks": "blocks",
    "host_kv_blocks": "blocks",
    "host_cache_blocks": "blocks",
    "block_size": "tokens",
    "max_tokens_per_step": "tokens",
    "max_running": "sequences",
    "max_model_len": "tokens",
    "prefix_caching": "0 or 1",
}
OPTIONAL = ("host_cache_blocks",)  # 0 where a profile does not know it
LONGEST_S = 600.0  # of what an iteration takes beside its tokens
AT_LEAST_ONE = ("kv_blocks", "block_size", "max_tokens_per_step", "max_running", "max_model_len")
PROFILES = Path(__file__).parent / "engines"
SCHEMA = 1


@dataclass(frozen=True)
class EngineProfile:
    """An engine: `values` is one `ENGINE` record; `origin` says where each figure comes from; `fit` how well."""

    name: str
    values: np.ndarray
    origin: dict[str, str]
    fit: dict[str, Any]

    def replace(self, **changes: float) -> EngineProfile:
        """A copy with some figures changed; raises UserError for a name that is not one, or a bad value."""
        values = self.values.copy()
        origin = dict(self.origin)
        for name, value in changes.items():
            if name not in UNITS:
                raise UserError(f"engine.{name} is not a figure of an engine profile; choose from {', '.join(UNITS)}.")
            values[name] = _checked(value, name, "engine.")
            origin[name] = "set by the user"
        return EngineProfile(self.name, values, origin, self.fit)


def make_profile(name: str, values: dict[str, float], origin: dict[str, str], fit: dict[str, Any]) -> EngineProfile:
    """A profile from figures by name; one that is not given is 0 and says so."""
    record = np.zeros((), dtype=ENGINE)
    for field, value in values.items():
        record[field] = value
    return EngineProfile(name, record[()], {field: origin.get(field, "not modelled") for field in UNITS}, fit)


def profile_names() -> list[str]:
    """Names of the packaged profiles, sorted."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def save_profile(profile: EngineProfile, path: str | Path) -> None:
    """Writes a profile as JSON; `load_profile` reads back the same figures to the last bit."""
    values = {
        field: {"value": profile.values[field].item(), "unit": UNITS[field], "origin": profile.origin[field]}
        for field in UNITS
    }
    document = {"schema": SCHEMA, "name": profile.name, "values": values, "fit": profile.fit}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def load_profile(name_or_path: str | Path) -> EngineProfile:
    """A packaged profile by name, or the one in a file whose name ends in `.json`.

    Raises UserError for a name that is not packaged, and for a file that is missing, malformed, of another schema, or
    in which a figure is missing, of the wrong type, negative or not finite.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        if str(name_or_path) not in profile_names():
            raise UserError(
                f"No engine profile is named {name_or_path}; choose from {', '.join(profile_names())}, "
                "or give the path of a .json file."
            )
        path = PROFILES / f"{name_or_path}.json"
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"Engine profile {path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"Engine profile {path} is not valid JSON: {error}.") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UserError(f'Engine profile {path} is not of schema {SCHEMA}; it needs "schema": {SCHEMA}.')
    figures = document.get("values")
    if not isinstance(figures, dict) or not isinstance(document.get("name"), str):
        raise UserError(f"Engine profile {path} needs a name and an object of values.")
    values: dict[str, float] = {}
    origin: dict[str, str] = {}
    for field in UNITS:
        figure = figures.get(field)
        if figure is None and field in OPTIONAL:
            continue
        if figure is None:
            raise UserError(f"Engine profile {path} has no value for {field}.")
        if not isinstance(figure, dict) or "value" not in figure:
            raise UserError(
                f'Engine profile {path} has {field}={figure!r}; write it as {{"value": ..., "origin": "where from"}}.'
            )
        values[field] = _checked(figure["value"], field, f"Engine profile {path}: ")
        origin[field] = str(figure.get("origin", "not stated"))
    unknown = sorted(set(figures) - set(UNITS))
    if unknown:
        raise UserError(f"Engine profile {path} has an unknown figure {unknown[0]}.")
    if values["max_model_len"] > values["kv_blocks"] * values["block_size"]:
        raise UserError(f"Engine profile {path}: max_model_len does not fit into kv_blocks x block_size tokens.")
    return make_profile(document["name"], values, origin, document.get("fit", {}))


def _checked(value: Any, field: str, place: str) -> float:
    whole = ENGINE[field].kind == "i"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise UserError(f"{place}{field}={value!r} is not a {'whole ' if whole else ''}number.")
    least = 1 if field in AT_LEAST_ONE else 0
    limit = LONGEST_S if UNITS[field] == "s" else float(np.finfo("f8").max)
    most = 1 if field == "prefix_caching" else int(np.iinfo("i4").max) if whole else limit
    if not least <= value <= most:
        raise UserError(f"{place}{field}={value} is not between {least} and {most}.")
    return value
