"""From configuration to what answers requests: the engine here, or a server elsewhere."""

from __future__ import annotations

from omegaconf import DictConfig

from flexirl.experiments.configuration import load_executor, load_rule, load_slo
from flexirl.experiments.values import count_of, flag_of, number, seed_of
from flexirl.policies.registry import make_policy
from flexirl.serving.backend import Backend
from flexirl.serving.local import LocalBackend, LocalOptions
from flexirl.serving.metrics import Metrics
from flexirl.serving.tenants import Tenants, read_key
from flexirl.serving.upstream import UpstreamBackend

_FALLBACK = "qoserve"  # decides where the policy fails


def load_backend(config: DictConfig, metrics: Metrics, tenants: Tenants) -> Backend:
    """What `upstream` names, else an engine on `model`; raises UserError for what cannot be."""
    if config.upstream is not None:
        return UpstreamBackend(
            str(config.upstream), read_key(config.upstream_key_file), flag_of(config.upstream_hints, "upstream_hints")
        )
    refuse_after = config.get("refuse_after")
    options = LocalOptions(
        max_requests=count_of(config.max_requests, "max_requests"),
        refuse_after=None if refuse_after is None else number(refuse_after, "refuse_after"),
        tenants=tenants.names, queued_tokens=tenants.queued_tokens, seed=seed_of(config.seed),
        fallback=make_policy(_FALLBACK),
    )  # fmt: skip
    policy, slo = load_rule(config.policy), load_slo(config.slo)
    model, executor = load_executor(config)
    return LocalBackend(model, executor, policy, slo, metrics, options)
