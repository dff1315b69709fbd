"""`python -m flexirl.generate` as a user runs it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from programs import run
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from flexirl.experiments.program import run_program
from flexirl.programs import generate
from flexirl.runtime.models.tiny import tiny_model

FIELDS = {"id", "token_ids", "text", "finish_reason", "ttft_s", "e2e_s", "preemptions"}


def write_prompts(folder: Path, lines: list[Any]) -> None:
    """prompts.jsonl with these lines; one that is not text is written as JSON."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "prompts.jsonl").write_text(text)


def completions(folder: Path) -> list[dict[str, Any]]:
    """What the run wrote."""
    return [json.loads(line) for line in (folder / "out" / "completions.jsonl").read_text().splitlines()]


GOOD: list[Any] = [
    {"id": "greedy", "class": "immediate", "prompt": "Once upon a time", "max_tokens": 20, "ignore_eos": True},
    {"id": "tokens", "class": "deferred", "prompt_token_ids": [1, 2, 3] * 20, "max_tokens": 30, "ignore_eos": True},
    *({"id": f"d{i}", "class": "deferred", "prompt": "x" * 60, "max_tokens": 40, "temperature": 1, "seed": i,
       "ignore_eos": True} for i in range(4)),
    {"prompt": "without an id", "max_tokens": 5, "logprobs": 1, "ignore_eos": True},
]  # fmt: skip
BAD: list[tuple[Any, str, str]] = [
    ("not json", "line 8", "not JSON"),
    ([1, 2], "line 9", "not a JSON object"),
    ({"id": "class", "class": "urgent", "prompt": "x"}, "class", "class='urgent'"),
    ({"id": "neither"}, "neither", "either a prompt or prompt_token_ids"),
    ({"id": "zero", "prompt": "x", "max_tokens": 0}, "zero", "max_tokens=0"),
    ({"id": "long", "prompt": "x" * 700, "max_tokens": 5}, "long", "together more than the 192"),
    ({"id": "stop", "prompt": "x", "stop": 3}, "stop", "stop=3 is not a list"),
    ({"id": "field", "prompt": "x", "temperatur": 1}, "field", "'temperatur' is not a field"),
    ({"id": "greedy", "prompt": "again"}, "greedy", "there already"),
]


def test_good_lines_run_and_bad_ones_say_why(tmp_path: Path) -> None:
    write_prompts(tmp_path, [*GOOD, *(line for line, _, _ in BAD)])
    limits = ("engine.kv_blocks=12", "policy=vllm_priority", "shadow=edf")
    ran = run(tmp_path, "generate", "prompts=prompts.jsonl", "hydra.run.dir=out", *limits)
    assert ran.returncode == 0, ran.stderr
    found = completions(tmp_path)
    assert all(set(completion) >= FIELDS for completion in found) and len(found) == len(GOOD) + len(BAD)
    failed = {(completion["id"], completion["error"]) for completion in found if completion["finish_reason"] == "error"}
    for _, name, message in BAD:
        assert any(name == failed_name and message in error for failed_name, error in failed), (name, failed)
    ended = {completion["id"]: completion for completion in found if completion["finish_reason"] != "error"}
    assert {name: len(ended[name]["token_ids"]) for name in ("greedy", "tokens", "d0", "d3", "line 7")} == {
        "greedy": 20, "tokens": 30, "d0": 40, "d3": 40, "line 7": 5,
    }  # fmt: skip
    assert ended["d0"]["token_ids"] != ended["d1"]["token_ids"] and len(ended["line 7"]["logprobs"]) == 5
    # The cache holds three of the six long requests, so some had to step aside.
    assert sum(completion["preemptions"] for completion in found) > 0
    assert all(0 < completion["ttft_s"] <= completion["e2e_s"] for completion in ended.values())
    printed = ran.stdout
    assert "greedy | " in printed and "[length]" in printed and "9 did not run" in printed and "microseconds" in printed
    assert (tmp_path / "out" / "config.yaml").is_file()
    differences = (tmp_path / "out" / "shadow.csv").read_text().splitlines()
    assert differences[0] == "time_s,field,decided,shadow" and len(differences) > 1
    assert "edf would have decided otherwise in" in printed


def test_a_file_longer_than_the_engines_room_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, and two at a time: a request whose turn comes later is the same request."""
    monkeypatch.chdir(tmp_path)
    bad = [{"id": "zero", "prompt": "x", "max_tokens": 0}, {"id": "greedy", "prompt": "again"}]
    write_prompts(tmp_path, [*GOOD, *bad])
    tokens = []
    for most in (generate.MOST_REQUESTS, 2):
        monkeypatch.setattr(generate, "MOST_REQUESTS", most)
        monkeypatch.setattr(sys, "argv", ["generate", "prompts=prompts.jsonl", "hydra.run.dir=out", "stream=false"])
        run_program("generate")
        found = completions(tmp_path)
        assert {done["id"] for done in found if done["finish_reason"] == "error"} == {"greedy", "zero"}
        tokens.append({done["id"]: done["token_ids"] for done in found if done["finish_reason"] != "error"})
    assert len(tokens[0]) == len(GOOD) and tokens[0] == tokens[1]


@pytest.fixture
def own_logging() -> Iterator[None]:
    """A program in this process has log files of its own, which would be written to after their folder is gone."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if handler not in before:
            logging.root.removeHandler(handler)
            handler.close()
    logging.root.handlers[:] = before


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("policy=fifo",), "Could not find 'policy/fifo'"),
        (("policy=nowhere.onnx",), "nowhere.onnx does not exist"),
        (("policy.slack_used=2",), "slack_used=2"),
        (("shadow=nobody",), "'nobody' is unknown"),
        (("model=nowhere",), "neither a folder nor one of tiny"),
        (("device=abacus",), "device=abacus"),
        (("engine.kv_blocks=0",), "engine.kv_blocks=0"),
        (("max_tokens=0",), "max_tokens=0"),
        (("prompts=nothing.jsonl",), "nothing.jsonl does not exist"),
        (("prompts=empty.jsonl",), "empty.jsonl is empty"),
        (("prompts=latin.jsonl",), "latin.jsonl cannot be read as UTF-8"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text('{"prompt": "x"}')
    Path("empty.jsonl").write_text(" \n\n")
    Path("latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    monkeypatch.setattr(sys, "argv", ["generate", "prompts=good.jsonl", "hydra.run.dir=out", *arguments])
    with pytest.raises(SystemExit) as left:
        run_program("generate")
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_images_are_read_from_files(tmp_path: Path) -> None:
    """Where the prompt says or in front, they are what the model's processor and `model.generate` make of them."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 70, 90, 3), np.uint8)
    for i, picture in enumerate(pixels):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (tmp_path / "text.png").write_text("no image")
    common = {"max_tokens": 8, "ignore_eos": True}
    lines = [
        {"id": "placed", "prompt": "a<|image|>b<|image|>c", "images": ["0.png", "1.png"], **common},
        {"id": "front", "class": "deferred", "prompt": "what is it", "images": ["1.png"], **common},
        {"id": "text", "prompt": "no image", **common},
        {"id": "missing", "prompt": "x", "images": ["2.png"]},
        {"id": "damaged", "prompt": "x", "images": ["text.png"]},
        {"id": "count", "prompt": "<|image|>", "images": ["0.png", "1.png"]},
        {"id": "path", "prompt": "x", "images": "0.png"},
    ]
    write_prompts(tmp_path, lines)
    ran = run(tmp_path, "generate", "prompts=prompts.jsonl", "hydra.run.dir=out", "model=tiny-vl")
    assert ran.returncode == 0, ran.stderr
    found = {completion["id"]: completion for completion in completions(tmp_path)}
    reasons = {name: found[name]["error"] for name in ("missing", "damaged", "count", "path")}
    assert "2.png does not exist" in reasons["missing"] and "text.png cannot be read" in reasons["damaged"]
    assert "1 image tokens (258) and there are 2 images" in reasons["count"] and "list of paths" in reasons["path"]

    folder = tiny_model("tiny-vl")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for line in lines[:3]:
        prompt = str(line["prompt"])
        if line["id"] == "front":
            prompt = f"<|vision_start|><|image|><|vision_end|>{prompt}"
        seen = {}
        if "images" in line:
            pictures = [PIL.Image.open(tmp_path / name) for name in line["images"]]
            seen = dict(processor(images=pictures, return_tensors="pt"))
            for grid in seen["image_grid_thw"]:
                prompt = prompt.replace("<|image|>", "<|here|>" * (int(grid.prod()) // 4), 1)
            prompt = prompt.replace("<|here|>", "<|image|>")
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        if seen:
            seen["mm_token_type_ids"] = (tokens == 258).int()
        generated = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None,
            pad_token_id=0, **seen,
        )  # fmt: skip
        assert found[line["id"]]["token_ids"] == generated[0, tokens.shape[1] :].tolist()


def test_a_model_of_text_alone_takes_no_images(tmp_path: Path) -> None:
    write_prompts(tmp_path, [{"id": "a", "prompt": "x", "images": ["0.png"]}, {"prompt": "x", "max_tokens": 2}])
    assert run(tmp_path, "generate", "prompts=prompts.jsonl", "hydra.run.dir=out").returncode == 0
    assert "takes no image files" in completions(tmp_path)[0]["error"]
