"""An exported policy in an engine: it decides as trained, and nothing in its file can stop the engine."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from agent_toys import decisive_agent, make, setting
from onnx import numpy_helper

from flexirl.envs.fleet import Fleet
from flexirl.errors import UserError
from flexirl.policies.deploy.learned import FALLBACK, LearnedPolicy, load_policy
from flexirl.policies.interface.action import PREEMPTS
from flexirl.policies.interface.policy import DECISION_INTERVAL_S, Policy, interval_of
from flexirl.policies.registry import make_policy
from flexirl.policies.training.export import export
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.simulator import simulation
from flexirl.runtime.simulator.simulation import Run, simulate

AGENTS = {"dials": "grouped_ppo", "grid": "dqn", "scores": "ppo"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each kind of action."""
    files = {}
    for kind, name in AGENTS.items():
        folder = tmp_path_factory.mktemp(f"run_{kind}")
        files[kind] = folder / "policy.onnx"
        export(decisive_agent(name, folder, kind), files[kind], {"action": kind})
    return files


def run(policy: Policy, kind: str = "dials") -> Run:
    task = setting(AGENTS[kind], kind)[1]
    return simulate(policy, task.engine, task.draw(1), task.slo, 6.0, interval_s=0.2)


def figures(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.figures.items() if name != "wall_s"}


class OncePerInterval:
    """A policy that is asked as a learned one is."""

    every_iteration = False

    def __init__(self, policy: Policy) -> None:
        self.name, self.reset, self.decide = policy.name, policy.reset, policy.decide


# ---------------------------------------------------------------------------------------------- deciding


@pytest.mark.parametrize("kind", AGENTS)
def test_runs_an_engine_deterministically(kind: str, exported: dict[str, Path]) -> None:
    policy = load_policy(exported[kind])
    first, second = run(policy, kind), run(policy, kind)
    other = run(load_policy(exported[kind]), kind)
    assert figures(first) == figures(second) == figures(other)
    assert policy.failures == {} and first.figures["iterations"]
    check_invariants(first.state)
    assert figures(first) != figures(run(make_policy(FALLBACK), kind))


@pytest.mark.parametrize("kind", AGENTS)
def test_decides_as_the_agent_in_its_environment(kind: str, exported: dict[str, Path]) -> None:
    """The same arrivals, decisions at the same times: the engine ends where the environment's member ends."""
    task = setting(AGENTS[kind], kind)[1]
    agent = decisive_agent(AGENTS[kind], exported[kind].parent, kind)
    fleet = Fleet(task, 1)
    observations = fleet.reset(0)
    trace = fleet._trace(0)
    clocks = [0.0]
    for _ in range(20):
        observations, _, _ = fleet.step(agent.predict(observations, deterministic=True)[0])
        clocks.append(float(fleet.state(0).scheduler["now_s"][0]))
    assert max(np.diff(clocks)) < 0.39  # no iteration is longer than an interval, or decisions fell at other times
    ended = simulate(load_policy(exported[kind]), task.engine, trace, task.slo, 4.0, interval_s=0.2).state
    for column in ("computed", "generated", "status", "first_token_s", "preemptions"):
        assert (ended.requests[column] == fleet.state(0).requests[column][: len(trace)]).all()


def test_names(exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_policy(exported["dials"]).name == f"learned:{exported['dials'].parent.name}"
    monkeypatch.chdir(exported["dials"].parent)
    assert load_policy("policy.onnx").name == f"learned:{exported['dials'].parent.name}"
    (tmp_path / "night.onnx").write_bytes(exported["dials"].read_bytes())
    assert make_policy(str(tmp_path / "night.onnx")).name == "night"


def test_a_masked_agent_is_masked_when_it_acts(tmp_path: Path) -> None:
    """One that would preempt whenever it may must not preempt, and so admit, nothing for ever."""
    agent = make("maskable_ppo", tmp_path)
    agent.policy.get_parameter("action_net.bias").data[PREEMPTS] = 100.0
    export(agent, tmp_path / "policy.onnx", {"action": "grid"})
    policy = load_policy(tmp_path / "policy.onnx")
    ended = run(policy, "grid")
    assert ended.figures["deferred_tokens_per_s"] and ended.figures["preemptions"] and policy.failures == {}


# ---------------------------------------------------------------------------------------------- bad files


def patched(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def set_property(key: str, value: str | None) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        properties = {entry.key: entry.value for entry in model.metadata_props}
        properties.pop(key, None)
        onnx.helper.set_model_props(model, properties if value is None else {**properties, key: value})

    return change


def fill_weights(value: float, only: int | None = None) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
        for tensor in matrices if only is None else [matrices[only]]:
            array = numpy_helper.to_array(tensor).copy()
            array[0] = value
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[1].name = model.graph.node[-2].output[0] = model.graph.node[-1].input[0] = "rough"


def edit_node(at: int, op_type: str = "", transposed: int = 1, takes: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[at]
        node.op_type = op_type or node.op_type
        node.input[0] = takes or node.input[0]
        for attribute in node.attribute:
            attribute.i = transposed

    return change


def squash_otherwise(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.op_type = "Sigmoid" if node.op_type == "Tanh" else node.op_type


def reshape_weights(model: onnx.ModelProto) -> None:
    matrix = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    matrix.dims[:] = matrix.dims[::-1]


def point_elsewhere(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


@pytest.mark.parametrize(
    "change, message",
    [
        (set_property("format", "flexirl-policy-0"), "has format flexirl-policy-0, but this version needs"),
        (set_property("format", None), "has format none, but"),
        (set_property("observation_schema", "flexirl-observation-0"), "observation_schema flexirl-observation-0"),
        (set_property("action_schema", "other"), "action_schema other"),
        (set_property("training", "{half"), "unreadable metadata training; export it anew"),
        (set_property("action", '"telepathy"'), "decides by telepathy"),
        (set_property("action", '"scores"'), "observes .* numbers, but this version has .*; train it anew"),
        (set_property("action", '"grid"'), "gives 10 numbers, grid are 14; train it anew"),
        (set_property("immediate_order", '"random"'), "immediate_order random"),
        (rename_output, "its outputs are not action and raw; export it anew"),
        (edit_node(0, op_type="Add"), "lacks its numbers"),
        (squash_otherwise, "its activation is Sigmoid"),
        (edit_node(4, op_type="Relu"), "one activation"),
        (edit_node(3, transposed=0), "settings that are not known"),
        (edit_node(5, takes="observation"), "no chain"),
        (reshape_weights, "do not fit each other"),
        (point_elsewhere, "not 32-bit floats in the file itself"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_refused(
    change: Callable[[onnx.ModelProto], None], message: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    path = patched(exported["dials"], tmp_path / "policy.onnx", change)
    with pytest.raises(UserError, match=f"^Policy {path} .*{message}"):
        load_policy(path)


def test_the_wrong_number_of_observations_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    path = patched(exported["scores"], tmp_path / "policy.onnx", set_property("action", '"dials"'))
    with pytest.raises(UserError, match=r"observes \d+ numbers, but this version has \d+; train"):
        load_policy(path)


def test_files_that_are_no_policy_are_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    whole = exported["dials"].read_bytes()
    with pytest.raises(UserError, match=r"missing\.onnx does not exist"):
        load_policy(tmp_path / "missing.onnx")
    with pytest.raises(UserError, match="does not exist"):
        load_policy(tmp_path)
    path = tmp_path / "policy.onnx"
    for content in (b"", b"hello", b"\x00" * 100, whole[:100], whole[: len(whole) // 2], whole[:-50]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^Policy {path} "):
            load_policy(path)
    path.write_bytes(whole)
    load_policy(path)


def test_nothing_is_unpickled(exported: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "policy.onnx"
    path.write_bytes(pickle.dumps({"harmless": 1}))
    with pytest.raises(UserError, match="not a readable ONNX file"):
        load_policy(path)


# ---------------------------------------------------------------------------------------------- falling back


@pytest.mark.parametrize("kind", AGENTS)
@pytest.mark.parametrize("value", [3e38, -3e38])  # finite, but their sums are not
def test_numbers_that_are_not_finite_make_the_fallback_decide(
    value: float, kind: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    path = patched(exported[kind], tmp_path / "policy.onnx", fill_weights(value))
    policy = load_policy(path)
    ended = run(policy, kind)
    assert policy.failures == {"not finite": 30}
    assert figures(ended) == figures(run(OncePerInterval(make_policy(FALLBACK)), kind))
    check_invariants(ended.state)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_found_on_loading(
    value: float, exported: dict[str, Path], tmp_path: Path
) -> None:
    """Else the fallback would be ranked under the network's name."""
    with pytest.raises(UserError, match="a weight of it is no finite number"):
        load_policy(patched(exported["dials"], tmp_path / "policy.onnx", fill_weights(value, only=-1)))


def test_errors_make_the_fallback_decide_and_are_counted_by_reason(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = load_policy(exported["dials"])
    decide, calls = policy._decide, iter(range(1000))

    def sometimes() -> bool:
        call = next(calls)
        if call % 3 == 0:
            raise RuntimeError("the network is gone")
        if call % 3 == 1:
            raise MemoryError
        return decide()

    monkeypatch.setattr(policy, "_decide", sometimes)
    check_invariants(run(policy).state)
    assert policy.failures == {"RuntimeError": 10, "MemoryError": 10}
    assert len(caplog.records) == 6  # the first three of each reason
    assert f"{FALLBACK} decides instead" in caplog.text


def test_a_decision_past_its_time_limit_is_not_used(exported: dict[str, Path]) -> None:
    late = LearnedPolicy(exported["dials"], time_limit_s=0.0)
    ended = run(late)
    assert late.failures == {"too late": 30}
    assert figures(ended) == figures(run(OncePerInterval(make_policy(FALLBACK))))
    in_time = LearnedPolicy(exported["dials"], time_limit_s=60.0)
    assert figures(run(in_time)) == figures(run(load_policy(exported["dials"]))) and in_time.failures == {}


def test_failures_are_counted_per_run(exported: dict[str, Path]) -> None:
    policy = LearnedPolicy(exported["dials"], time_limit_s=0.0)
    run(policy)
    policy.time_limit_s = None
    run(policy)
    assert policy.failures == {}


@pytest.mark.parametrize("name", ["qoserve", "conserve", "vllm_priority", "fixed_dials"])
def test_any_policy_that_is_ready_can_be_the_fallback(name: str, exported: dict[str, Path]) -> None:
    policy = LearnedPolicy(exported["dials"], fallback=name, time_limit_s=0.0)
    ended = run(policy)
    assert figures(ended) == figures(run(OncePerInterval(make_policy(name))))
    check_invariants(ended.state)


def test_the_default_fallback_keeps_promises_when_asked_once_per_interval(exported: dict[str, Path]) -> None:
    """Asked so rarely it loses next to nothing against being asked before each iteration."""
    always, seldom = run(make_policy(FALLBACK)).figures, run(OncePerInterval(make_policy(FALLBACK))).figures
    assert seldom["revenue_per_s"] == pytest.approx(always["revenue_per_s"], rel=0.05)
    assert seldom["immediate_attainment"] == pytest.approx(always["immediate_attainment"], abs=0.05)


def test_an_unknown_fallback_is_named(exported: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'nobody' is no rule"):
        load_policy(exported["dials"], fallback="nobody")


def test_a_policy_must_be_reset_for_each_engine(exported: dict[str, Path]) -> None:
    """What it observed of one engine does not leak into the next."""
    used, fresh = load_policy(exported["dials"]), load_policy(exported["dials"])
    run(used)
    task = setting(AGENTS["dials"], "dials")[1]
    for seed in (1, 2):
        decisions = []
        for policy in (used, fresh):
            view = Lookout(simulation.start(task.engine, task.draw(seed), 0), task.slo).view
            policy.reset(view)
            decisions.append(policy.decide(view).tobytes())
        assert decisions[0] == decisions[1]


def test_a_policy_says_how_often_it_was_asked_in_training(tmp_path: Path) -> None:
    for interval_s, expected in ((0.5, 0.5), (None, DECISION_INTERVAL_S)):
        metadata = {} if interval_s is None else {"interval_s": interval_s}
        export(decisive_agent("ppo", tmp_path, "dials"), tmp_path / "policy.onnx", metadata)
        policy = load_policy(tmp_path / "policy.onnx")
        assert interval_of(policy, None) == expected and interval_of(policy, 0.1) == 0.1
    assert interval_of(make_policy(FALLBACK), None) == DECISION_INTERVAL_S


@pytest.mark.parametrize("interval_s", [0, -1.0, "soon", True])
def test_an_interval_that_is_no_time_is_refused(tmp_path: Path, interval_s: Any) -> None:
    export(decisive_agent("ppo", tmp_path, "dials"), tmp_path / "policy.onnx", {"interval_s": interval_s})
    with pytest.raises(UserError, match="interval_s="):
        load_policy(tmp_path / "policy.onnx")
