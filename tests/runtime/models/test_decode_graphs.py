"""Padded decodes in static buffers: run eagerly in the place of a captured graph, they change no token."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from live_toys import Constant, LiveRun, RandomPolicy
from model_toys import FAMILIES, CheckedExecutor, generate_alone
from torch import Tensor

from flexirl.runtime.kernels import AttentionBatch, plan_attention
from flexirl.runtime.kernels.work_list import pad_decodes, plan_work
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.executor import Batch, Interrupted
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import SAMPLING, Sampling
from flexirl.runtime.models import executor as executor_file
from flexirl.runtime.models.decode_graphs import padded_sizes
from flexirl.runtime.models.executor import ModelExecutor, fit_profile
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import build
from flexirl.runtime.profile.engine import load_profile
from flexirl.workloads.slo import SLO


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    build(FAMILIES[request.param], folder, seed=1)
    return load_model(folder)


class PaddedExecutor(CheckedExecutor):
    """Runs decodes padded, eagerly; `addresses`: by size, where each run found its tensors."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self.addresses: dict[int, set[tuple[int, ...]]] = {}
        self.pad_decodes(lambda run: run)

    def _decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, attention: AttentionBatch) -> Tensor:
        tensors = [tokens, positions, slots, attention.block_table]
        if attention.work is not None:
            tensors += [attention.work.items, attention.work.merges]
        self.addresses.setdefault(len(tokens), set()).add(tuple(tensor.data_ptr() for tensor in tensors))
        return super()._decode(tokens, positions, slots, attention)


def test_padded_sizes() -> None:
    assert padded_sizes(1) == [1] and padded_sizes(8) == [1, 2, 4, 8] and padded_sizes(11) == [1, 2, 4, 8, 11]
    assert padded_sizes(70) == [1, 2, 4, 8, 16, 32, 48, 64, 70]


def test_no_schedule_changes_a_token(model: LoadedModel) -> None:
    rng = np.random.default_rng(4)
    executor = PaddedExecutor(model)
    run = LiveRun(executor, RandomPolicy(2, 24), save_blocks=2)
    requests = [
        Request(f"r{i}", rng.integers(0, 256, rng.integers(1, 50)).tolist(), int(rng.integers(1, 40)), i % 2,
                Sampling(ignore_eos=True))
        for i in range(24)
    ]  # fmt: skip
    for request in requests:
        run.engine.add_request(request)
    run.drain()
    for request in requests:
        assert run.completions[request.id].token_ids == generate_alone(model, request)
    assert run.engine.metrics()["preemptions"] > 5
    # Each size was used, and found its buffers where they had always been.
    assert set(executor.addresses) == {1, 2, 4, 8}
    assert all(len(places) == 1 for places in executor.addresses.values())


def test_work_lists_stay_where_they_are(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the Triton kernel in its interpreter, which reads its work from the static buffers alone."""
    pytest.importorskip("triton")

    def plan(
        query_lens: np.ndarray, context_lens: np.ndarray, table: Any, device: Any, graph_context: int | None = None,
        **shape: int,
    ) -> AttentionBatch:  # fmt: skip
        batch = plan_attention(query_lens, context_lens, table, device, **shape)
        work = plan_work(batch.query_lens, batch.context_lens, shape["num_heads"] // shape["num_kv_heads"], 2.0)
        if graph_context is not None:
            work = pad_decodes(work, len(query_lens), graph_context, 2.0)
        return replace(batch, work=work)

    monkeypatch.setattr(executor_file, "plan_attention", plan)
    monkeypatch.setattr(sys.modules["flexirl.runtime.kernels.paged_attention"], "runs_triton", lambda tensor: True)
    executor = PaddedExecutor(model)
    run = LiveRun(executor, Constant())
    requests = [Request(f"r{i}", list(range(40, 47 + 6 * i)), 5, sampling=Sampling(ignore_eos=True)) for i in range(3)]
    for request in requests:
        run.engine.add_request(request)
    run.drain()
    for request in requests:
        assert run.completions[request.id].token_ids == generate_alone(model, request)
    assert all(len(places) == 1 for places in executor.addresses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3", "tiny-mistral", "tiny-vl"])
def test_captured_graphs_change_no_token(name: str) -> None:
    """Graphs, fused kernels and Triton's attention on a GPU in fp32 against the model alone on the CPU."""
    loaded, alone = load_model(name, "cuda", "float32"), load_model(name)
    executor = ModelExecutor(loaded, fit_profile(loaded, load_profile("cpu-tiny"), 400, 100))
    assert executor._graphs is not None
    ended: dict[str, list[int]] = {}
    options = Options(on_end=lambda done: ended.update({done.id: done.token_ids}))
    engine = LiveEngine(executor, RandomPolicy(2, 64), SLO(1.0, 0.05), options)
    rng = np.random.default_rng(4)
    requests = [Request(f"r{i}", rng.integers(0, 256, rng.integers(1, 50)).tolist(), 30, i % 2,
                        Sampling(ignore_eos=True)) for i in range(20)]  # fmt: skip
    for request in requests:
        engine.add_request(request)
    engine.drain()
    for request in requests:
        assert ended[request.id] == generate_alone(alone, request)


def decodes(context_lens: list[int], first_block: int) -> Batch:
    """Decodes whose contexts lie in blocks of their own, from `first_block` on."""
    contexts = np.array(context_lens)
    blocks = -(-contexts // 4)
    table = np.zeros((len(contexts), blocks.max()), np.int32)
    for row, count, end in zip(table, blocks, first_block + np.cumsum(blocks), strict=True):
        row[:count] = np.arange(end - count, end)
    slots = table[np.arange(len(contexts)), blocks - 1].astype(np.int64) * 4 + (contexts - 1) % 4
    return Batch(
        tokens=np.arange(len(contexts)) + 65, positions=contexts - 1, slots=slots,
        query_lens=np.ones(len(contexts), np.int64), context_lens=contexts, block_table=table,
        sampled_rows=np.arange(len(contexts)), draws=np.zeros(len(contexts)),
        requests=np.arange(len(contexts), dtype=np.int32),
    )  # fmt: skip


def test_padding_reads_and_writes_nothing_that_matters(model: LoadedModel) -> None:
    plain, padded = CheckedExecutor(model), PaddedExecutor(model)
    noise = torch.randn(plain._cache.shape, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = torch.nan  # the block that padding reads
    for executor in (plain, padded):
        executor._cache.copy_(noise)
    # A batch that fills the size, then smaller ones with other widths in the same buffers, one that samples in part.
    batches = [decodes([33, 9, 40, 1, 2, 3, 4, 5], 1), decodes([3, 17, 30, 8, 21], 2), decodes([60], 9)]
    batches.append(decodes([9, 50, 3], 1)._replace(sampled_rows=np.array([0, 2]), draws=np.zeros(2)))
    sampling = np.zeros(8, SAMPLING)
    sampling["logprobs"] = 3
    sampling["top_p"] = 1.0
    for batch in batches:
        outcomes = [each.execute(batch, sampling[: len(batch.sampled_rows)], None) for each in (plain, padded)]
        assert outcomes[0].tokens.tolist() == outcomes[1].tokens.tolist()
        for row in outcomes[0].logprobs:
            assert outcomes[0].logprobs[row].token == pytest.approx(outcomes[1].logprobs[row].token, abs=1e-5)
        torch.testing.assert_close(padded._cache, plain._cache, equal_nan=True, atol=1e-5, rtol=1e-5)
        untouched = torch.ones(plain._cache.shape[1] * 4, dtype=torch.bool)
        untouched[torch.from_numpy(batch.slots)] = False
        now, before = (cache.flatten(1, 2)[:, untouched].nan_to_num() for cache in (padded._cache, noise))
        assert torch.equal(now, before)
        noise = padded._cache.clone()


def test_a_graph_is_broken_off_before_it_starts(model: LoadedModel) -> None:
    executor = PaddedExecutor(model)
    before = executor._cache.clone()
    with pytest.raises(Interrupted):
        executor.execute(decodes([5, 6], 1), None, lambda: True)
    assert torch.equal(executor._cache, before)
