"""Images in the live engine: whatever the schedule, what `model.generate` gives for each request alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_toys import Constant, LiveRun, RandomPolicy, ToyExecutor
from model_toys import FAMILIES, SEEING, CheckedExecutor
from torch import Tensor
from toys import deferred, toy_trace
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from flexirl.errors import UserError
from flexirl.policies.registry import make_policy
from flexirl.runtime.fitting.calibration import draw_shapes, make_batch
from flexirl.runtime.live.requests import Image, Request
from flexirl.runtime.live.run import run_live
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import build
from flexirl.runtime.models.vision import Vision
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.workloads.slo import SLO

IMAGE, START, END = 258, 260, 261


class Model:
    """A small model, and the same as Transformers loads it."""

    def __init__(self, folder: Path, kind: str) -> None:
        build(SEEING[kind], folder, seed=1)
        self.loaded: LoadedModel = load_model(folder)
        self.own: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert self.loaded.vision is not None
        self.vision: Vision = self.loaded.vision

    def alone(self, request: Request) -> list[int]:
        """What Transformers generates for a request, greedily."""
        prompt = torch.tensor([list(request.prompt)])
        seen = {}
        if request.images:
            seen = {
                "pixel_values": torch.cat([torch.from_numpy(image.pixels) for image in request.images]),
                "image_grid_thw": torch.tensor([image.grid for image in request.images]),
                "mm_token_type_ids": (prompt == IMAGE).int(),
            }
        with torch.inference_mode():
            tokens = self.own.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
                pad_token_id=0, eos_token_id=None, **seen,
            )[0]  # fmt: skip
        return tokens[len(request.prompt) :].tolist()

    def request(self, name: str, sizes: list[int], rng: np.random.Generator, **options: Any) -> Request:
        """A request with text before, between and behind images of so many tokens."""
        prompt = rng.integers(0, 256, rng.integers(1, 12)).tolist()
        for size in sizes:
            prompt += [START, *[IMAGE] * size, END, *rng.integers(0, 256, rng.integers(0, 9)).tolist()]
        images = [self.vision.draw(size, rng) for size in sizes]
        options = {"max_tokens": int(rng.integers(1, 20)), "sampling": Sampling(ignore_eos=True), **options}
        return Request(name, prompt, images=images, **options)


@pytest.fixture(scope="module", params=SEEING)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model of each family."""
    return Model(tmp_path_factory.mktemp(request.param), request.param)


class WatchedExecutor(CheckedExecutor):
    """Counts the image tokens that are encoded, and the chunks that begin or end in an image."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.loaded)
        self.encoded, self.cut = 0, 0
        encode, vision = model.vision.encode, model.vision

        class Encoder:
            def __getattr__(self, name: str) -> Any:
                return getattr(vision, name)

            def encode(_, images: list[Image]) -> list[Tensor]:
                self.encoded += sum(map(vision.tokens_of, images))
                return encode(images)

        self._images.vision = Encoder()

    def _forward(self, tokens: Tensor, positions: Tensor, rows: Any, paged: Any, pictured: Any = None) -> Tensor:
        if pictured is not None:
            for prompt, image, begin, end in pictured.parts:
                self.cut += begin > 0 or end < prompt.ends[image] - prompt.begins[image]
        return super()._forward(tokens, positions, rows, paged, pictured)


@pytest.mark.parametrize("padded", [False, True])
def test_no_schedule_changes_a_token(model: Model, padded: bool) -> None:
    rng = np.random.default_rng(6)
    executor = WatchedExecutor(model)
    if padded:
        executor.pad_decodes(lambda run: run)
    run = LiveRun(executor, RandomPolicy(3, 24), save_blocks=2)
    requests = []
    for i in range(24):
        sizes = [[], [6], [30], [1], [9, 12], [4, 4, 4]][i % 6]
        requests.append(model.request(f"r{i}", sizes, rng, request_class=int(rng.integers(2))))
        # The same text again, with the same images or with others of the same sizes.
        images = requests[-1].images if i < 12 else [model.vision.draw(size, rng) for size in sizes]
        requests.append(replace(requests[-1], id=f"again{i}", images=images))
    for request in requests:
        run.engine.add_request(request)
    run.drain()
    for request in requests:
        assert run.completions[request.id].token_ids == model.alone(request)
    assert run.engine.metrics()["recomputed_tokens"] > 0 and run.engine.metrics()["swapped_tokens"] > 50
    assert run.engine.state.classes["found_prompt"].sum() > 50 and executor.cut > 10
    assert not executor._images._prompts  # nothing is kept of what has ended


def test_images_are_encoded_when_reached_and_as_the_scheduler_counts(model: Model) -> None:
    rng = np.random.default_rng(2)
    images = [model.vision.draw(10, rng) for _ in range(3)]
    # At the front, as the scheduler has it, in chunks of 8 tokens.
    prompt = [*[IMAGE] * 10, 5, *[IMAGE] * 10, 6, *[IMAGE] * 10, *range(30)]
    steps: list[Any] = []
    executor = WatchedExecutor(model)
    run = LiveRun(executor, Constant(token_budget=8), on_step=lambda step: steps.append((step, executor.encoded)))
    run.engine.add_request(Request("a", prompt, 3, images=images))
    run.drain()
    encoded = [tokens for _, tokens in steps]
    assert encoded[:4] == [10, 20, 30, 30] and encoded[-1] == 30
    assert np.cumsum([step.features["image_tokens"] for step, _ in steps]).tolist() == encoded


def test_calibration_encodes_what_it_counts(model: Model) -> None:
    """Every run of a drawn iteration encodes its images anew."""
    rng = np.random.default_rng(1)
    executor = WatchedExecutor(model)
    seen = 0
    for shape in itertools.islice(draw_shapes(executor.profile, rng, images=True), 30):
        for _ in range(2):
            batch, features, pictured = make_batch(shape, executor, rng)
            if pictured is not None:
                executor.take_images(shape.decodes, pictured)
            before = executor.encoded
            executor.execute(batch, None, None)
            executor.forget(shape.decodes)
            assert executor.encoded - before == features["image_tokens"]
        seen += features["image_tokens"] > 0
    assert seen > 5


def test_a_trace_with_images_runs_with_images(model: Model) -> None:
    """Where the model takes any; elsewhere their tokens are text."""
    picture = {"num_images": 2, "image_tokens": 12}
    trace = toy_trace(deferred(0.0, 20, 3, **picture), deferred(0.0, 9, 3), deferred(0.0, 12, 3, **picture))
    executor = WatchedExecutor(model)
    slo = SLO(1e9, 1e9)
    run = run_live(make_policy("qoserve"), executor, trace, slo, 1e9, 0.0, 0.2, 0, Prices())
    assert run.state.requests["num_images"].tolist() == [2, 0, 2]
    # The last prompt has no text to tell its two images apart with, so each is a token shorter.
    assert run.state.requests["image_tokens"].tolist() == [12, 0, 10] and executor.encoded == 22
    text = run_live(make_policy("qoserve"), ToyExecutor(executor.profile), trace, slo, 1e9, 0.0, 0.2, 0, Prices())
    assert text.state.requests["num_images"].tolist() == [0, 0, 0]


def test_a_prompt_may_end_in_an_image(model: Model) -> None:
    """As the model's own forward has it from the beginning each time; `generate` counts positions on otherwise."""
    rng = np.random.default_rng(6)
    image = model.vision.draw(12, rng)
    requests = [Request(f"r{i}", [i, START, *[IMAGE] * 12], 8, sampling=Sampling(ignore_eos=True), images=[image])
                for i in range(12)]  # fmt: skip
    run = LiveRun(CheckedExecutor(model.loaded), Constant(token_budget=7))
    for request in requests:
        run.engine.add_request(request)
    run.drain()
    differ = 0
    for request in requests:
        tokens = torch.tensor([[*request.prompt, *run.completions[request.id].token_ids]])
        with torch.inference_mode():
            logits = model.own(
                tokens, pixel_values=torch.from_numpy(image.pixels), image_grid_thw=torch.tensor([image.grid]),
                mm_token_type_ids=(tokens == IMAGE).int(), use_cache=False,
            ).logits[0]  # fmt: skip
        assert run.completions[request.id].token_ids == logits[len(request.prompt) - 1 : -1].argmax(-1).tolist()
        differ += run.completions[request.id].token_ids != model.alone(request)
    assert differ > 0, "`generate` counts on as the forward does; take the note out of docs/live.md"


def test_what_the_image_shows_matters(model: Model) -> None:
    rng = np.random.default_rng(5)
    request = model.request("a", [12], rng, max_tokens=12)
    other = Request("b", request.prompt, 12, sampling=request.sampling, images=[model.vision.draw(12, rng)])
    run = LiveRun(CheckedExecutor(model.loaded), Constant())
    for each in (request, other):
        run.engine.add_request(each)
    run.drain()
    assert run.completions["a"].token_ids != run.completions["b"].token_ids


def test_images_that_do_not_fit_are_refused(model: Model) -> None:
    rng = np.random.default_rng(0)
    run = LiveRun(CheckedExecutor(model.loaded), Constant())
    good = model.request("good", [6], rng)
    image = good.images[0]

    def refusal(prompt: Any, images: list[Image]) -> str:
        with pytest.raises(UserError) as error:
            run.engine.add_request(Request("bad", prompt, 3, images=images))
        return str(error.value)

    assert "prepare it with the model's image processor" in refusal(good.prompt, [image._replace(grid=(1, 3, 4))])
    assert "of shape (24, 5)" in refusal(good.prompt, [image._replace(pixels=image.pixels[:, :5])])
    assert "prepare it" in refusal(good.prompt, [image._replace(grid=(1, 0, 4), pixels=image.pixels[:0])])
    assert "runs of [6] image tokens (258) where its images need [6, 6]" in refusal(good.prompt, [image, image])
    assert "runs of [12] image tokens" in refusal([1, *[IMAGE] * 12], [image, image])
    assert "runs of [] image tokens" in refusal([1, 2], [image])
    run.engine.add_request(good)
    run.drain()
    assert run.completions["good"].token_ids == model.alone(good)


def test_a_model_of_text_alone_refuses_images(tmp_path: Path) -> None:
    build(FAMILIES["llama"], tmp_path, seed=1)
    run = LiveRun(CheckedExecutor(load_model(tmp_path)), Constant())
    with pytest.raises(UserError, match="the model takes none"):
        run.engine.add_request(Request("a", [1, 2], 3, images=[Image(np.zeros((4, 8), np.float32), (1, 2, 2))]))
    assert run.engine.unfinished == 0


def test_models_that_take_images_another_way_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only qwen2_vl and qwen2_5_vl are supported"):
        load_model(tmp_path)


def test_fused_kernels_serve_images_too(tmp_path: Path) -> None:
    plain = Model(tmp_path, "qwen2_5_vl")
    fused = load_model(tmp_path, fused=True)
    assert any("forward" in module.__dict__ for module in fused.model.modules())
    request = plain.request("a", [9, 6], np.random.default_rng(3), max_tokens=8)
    run = LiveRun(CheckedExecutor(fused), Constant(token_budget=7))
    run.engine.add_request(request)
    run.drain()
    assert run.completions["a"].token_ids == plain.alone(request)
