"""What a model's folder says of generating with it: how requests sample that do not say, and what ends an output."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.attention import Unsupported

# What changes tokens and is not supported, with what does nothing beside None and 0.
_UNSUPPORTED: dict[str, float] = {
    "bad_words_ids": 0, "constraints": 0, "diversity_penalty": 0, "dola_layers": 0, "epsilon_cutoff": 0,
    "eta_cutoff": 0, "exponential_decay_length_penalty": 0, "force_words_ids": 0, "forced_bos_token_id": 0,
    "forced_eos_token_id": 0, "guidance_scale": 1, "min_length": 0, "min_p": 0, "num_beams": 1, "penalty_alpha": 0,
    "sequence_bias": 0, "stop_strings": 0, "token_healing": 0, "top_h": 0, "typical_p": 1, "watermarking_config": 0,
}  # fmt: skip
_TOP_K = 50  # where a configuration samples and does not say; as in Transformers


def default_sampling(generation: GenerationConfig | None, vocab_size: int) -> Sampling:
    """How Transformers' `generate` samples without arguments; raises Unsupported, naming the field, or UserError."""
    if generation is None:
        return Sampling()
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(generation, name, None)
        if value and value != neutral:
            raise Unsupported(f"its generation_config.json has {name}={value!r}, which is not supported; take it out")
    fields = {
        name: getattr(generation, name, None)
        for name in (
            "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens",
            "min_new_tokens",
        )
    }  # fmt: skip
    if generation.do_sample:
        fields["temperature"] = 1.0 if generation.temperature is None else generation.temperature
        fields["top_k"] = _TOP_K if generation.top_k is None else generation.top_k
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for token in _listed(fields[name]):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise Unsupported(
                    f"its generation_config.json has {token!r} in {name}, which is not from 0 to {vocab_size - 1}"
                )
    return Sampling.of({name: value for name, value in fields.items() if value is not None})


def end_tokens(generation: GenerationConfig | None, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an output, whether the model can say them or not; raises Unsupported for what is no token."""
    ends = [token for source in (generation, tokenizer) for token in _listed(getattr(source, "eos_token_id", None))]
    for token in ends:
        if type(token) is not int:
            raise Unsupported(f"its eos_token_id has {token!r} in it, which is no token's number")
    return tuple(sorted(set(ends)))


def _listed(tokens: Any) -> list[Any]:
    return list(tokens) if isinstance(tokens, list | tuple) else [] if tokens is None else [tokens]
