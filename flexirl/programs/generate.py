"""Program: runs a file of mixed prompts on the live engine: `python -m flexirl.generate prompts=prompts.jsonl`."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from flexirl.errors import UserError
from flexirl.experiments.configuration import load_executor, load_rule, load_slo
from flexirl.experiments.plots import plot_timeline
from flexirl.experiments.program import output_folder
from flexirl.experiments.prompts import CLASSES, PromptParser, json_object, read_lines, take_id
from flexirl.experiments.values import count_of, number, seed_of
from flexirl.policies.registry import make_policy
from flexirl.progress import progress_bar
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.guarded import words
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.recording import Recording, read_timeline
from flexirl.runtime.live.requests import ERROR, Completion, Request, Update
from flexirl.runtime.live.shadow import Shadow
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

MOST_REQUESTS = 4096  # waiting and running at once; further ones follow as these end
FALLBACK = "qoserve"  # decides where the policy fails
_LINE = 100  # characters of a text printed on one line


def run(config: DictConfig) -> None:
    """Reads, runs, prints and writes; raises UserError for bad configuration, and for a file without a good line."""
    folder = output_folder()
    path = Path(str(config.prompts))
    lines = read_lines(path)
    policy, slo = load_rule(config.policy), load_slo(config.slo)
    other = None if config.shadow is None else make_policy(str(config.shadow))
    max_tokens = count_of(config.max_tokens, "max_tokens")
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    model, executor = load_executor(config)
    print(f"{model.name} on {model.device}, {describe(executor.profile)}, policy {policy.name}")

    with (
        open(folder / "completions.jsonl", "w") as file,
        progress_bar(len(lines), " requests", config.progress) as progress,
        Recording(folder) if config.record else nullcontext() as recording,
        Shadow(other, folder / "shadow.csv") if other is not None else nullcontext() as shadow,
    ):
        printer = Printer(progress.write)
        results = Results(file, progress)
        waiting: deque[Request] = deque()

        def end(completion: Completion) -> None:
            try:
                results.end(completion)
            finally:
                feed()

        def feed() -> None:
            while waiting and engine.unfinished < MOST_REQUESTS:
                request = waiting.popleft()
                try:
                    engine.add_request(request)
                except UserError as error:
                    del results.expected[request.id]
                    results.fail(request.id, str(error))

        interval_s = None if config.interval_s is None else number(config.interval_s, "interval_s")
        options = Options(
            tokenizer=model.tokenizer, interval_s=interval_s, max_requests=min(len(lines), MOST_REQUESTS),
            save_blocks=config.save_blocks, safepoints=config.safepoints, seed=seed_of(config.seed),
            fallback=make_policy(FALLBACK), shadow=shadow, on_end=end, on_step=recording,
        )  # fmt: skip
        engine = LiveEngine(executor, policy, slo, options)
        longest = int(executor.profile.values["max_model_len"])
        parser = PromptParser(model, path.parent, max_tokens, longest, printer if config.stream else None)
        waiting.extend(requests_of(lines, parser, results))
        feed()
        try:
            engine.drain()
        except KeyboardInterrupt:
            progress.write("interrupted; what has ended is written")
        for request_id in list(results.expected):
            results.fail(request_id, f"It did not end under policy {policy.name}; choose another one.")
    if config.record:
        plot_timeline(read_timeline(folder / "timeline.csv"), policy.name, folder / "timeline.png")
    print(summary(results, engine.metrics(), engine.now_s))
    if shadow is not None:
        print(f"{shadow.policy.name} would have decided otherwise in {shadow.differences} of {shadow.asked} decisions")
    print(f"written to {folder / 'completions.jsonl'}")


def requests_of(lines: list[tuple[str, str]], parser: PromptParser, results: Results) -> Iterator[Request]:
    """The requests in these lines; a line that is none fails, and says so, by itself."""
    for place, line in lines:
        request_id = place
        try:
            fields = json_object(line)
            request_id = take_id(fields, place)
            if request_id in results.expected:
                raise UserError(f"Request {request_id} is there already; give each line an id of its own.")
            request = parser.request(request_id, fields)
        except Exception as error:  # whatever is wrong with a line, the others run
            trouble = str(error) if isinstance(error, UserError) else f"It cannot be read ({words(error)})."
            results.fail(request_id, trouble if request_id == place else f"{place}: {trouble}")
        else:
            results.expected[request_id] = request.request_class
            yield request


class Results:
    """Completions as they come, each written at once."""

    def __init__(self, file: TextIO, progress: tqdm[Any]) -> None:
        self.expected: dict[str, int] = {}  # classes of the requests that run
        self.ended: dict[int, list[Completion]] = {IMMEDIATE: [], DEFERRED: []}
        self.failed = 0
        self._file = file
        self._progress = progress

    def end(self, completion: Completion) -> None:
        """A request has ended."""
        self.ended[self.expected.pop(completion.id)].append(completion)
        self._write(completion)

    def fail(self, request_id: str, error: str) -> None:
        """A request could not run."""
        self.failed += 1
        self._write(Completion(request_id, [], ERROR, error=error))

    def _write(self, completion: Completion) -> None:
        fields: dict[str, Any] = {
            "id": completion.id, "token_ids": completion.token_ids, "text": completion.text,
            "finish_reason": completion.finish_reason, "ttft_s": completion.ttft_s, "e2e_s": completion.e2e_s,
            "preemptions": completion.preemptions,
        }  # fmt: skip
        if completion.logprobs:
            fields["logprobs"] = [{"token": each.token, "likeliest": each.likeliest} for each in completion.logprobs]
        if completion.error is not None:
            fields["error"] = completion.error
            self._progress.write(harmless(f"{completion.id}: {completion.error}"))
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
        self._progress.update()


class Printer:
    """Prints the texts of many requests side by side, whole lines of one request at a time."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._pending: dict[str, str] = {}

    def __call__(self, update: Update) -> None:
        """Prints what the update makes complete."""
        text = self._pending.pop(update.id, "") + update.text
        *whole, rest = text.split("\n")
        while len(rest) >= _LINE:
            whole.append(rest[:_LINE])
            rest = rest[_LINE:]
        if update.completion is not None:
            whole += [*([rest] if rest else []), f"[{update.completion.finish_reason}]"]
        elif rest:
            self._pending[update.id] = rest
        for line in whole:
            self._write(harmless(f"{update.id} | {line}"))


def harmless(line: str) -> str:
    """The line as it can be printed: a model may say anything, and a terminal would obey some of it."""
    return "".join(character if character.isprintable() else "·" for character in line)


def describe(profile: EngineProfile) -> str:
    """The engine's limits in a few words."""
    figures = profile.values
    return f"{figures['kv_blocks']} blocks of {figures['block_size']} tokens, {figures['max_running']} seats"


def summary(results: Results, metrics: dict[str, float], duration_s: float) -> str:
    """What came of all requests, in a few lines."""
    lines = []
    for name, request_class in CLASSES.items():
        ended = results.ended[request_class]
        if not ended:
            continue
        reasons = Counter(completion.finish_reason for completion in ended)
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        ttft_s = [completion.ttft_s for completion in ended if completion.ttft_s is not None]
        waits = f"; TTFT median {np.median(ttft_s):.3f} s, P99 {np.percentile(ttft_s, 99):.3f} s" if ttft_s else ""
        lines.append(f"{len(ended)} {name}: {counts}{waits}")
    if results.failed:
        lines.append(f"{results.failed} did not run")
    lines.append(
        f"{metrics['tokens']:.0f} tokens in {duration_s:.2f} s, {metrics['iterations']:.0f} iterations, "
        f"{metrics['preemptions']:.0f} preemptions; decisions took {1e6 * metrics['decision_median_s']:.0f} "
        f"microseconds in the median, {1e6 * metrics['decision_p99_s']:.0f} at P99"
    )
    return "\n".join(lines)
