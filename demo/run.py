"""The demo: write a corpus into memories, and answer from them. Run it with ``make demo``.

The same model answers each question three times: without references, with the recalled references as text in the
prompt, and with the memories of the same references.
"""

import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m3model.transformers import TransformersAdapter
from m3runtime import assembly
from m3runtime.adapters.answers import Answer, Prompt
from m3runtime.cli.demo import CHAPTERS, HANDBOOK, SETTINGS, corpus, overrides
from m3runtime.cli.write import write
from m3runtime.config.schema import Config
from m3runtime.runtime import Runtime

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "docs/demo/questions.jsonl"
MODES = ("none", "text", "memory")

console = Console(width=118, highlight=False)


@dataclass(frozen=True)
class Reply:
    """One answer in one mode. ``first_s`` includes retrieval, if the mode has any."""

    answer: Answer
    right: bool
    first_s: float


def main() -> None:
    console.rule("[bold]1. Models and corpus")
    settings = overrides(ROOT / ".demo")
    config = Config.load(SETTINGS, overrides=settings)
    console.print(f"model: {config.serve.name}, embedder: all-MiniLM-L6-v2 (both from packages)")
    console.print(
        f"corpus: the handbook of an invented town ({HANDBOOK.relative_to(ROOT)}), "
        f"and {len(CHAPTERS)} chapters of the Python language reference"
    )

    console.rule("[bold]2. m3 write")
    shutil.rmtree(config.bank, ignore_errors=True)  # the demo shows the writing; `m3 write` itself would go on
    write([corpus(ROOT / ".demo")], config=SETTINGS, set=[f"{key}={value}" for key, value in settings.items()])

    console.rule("[bold]3. The same questions with nothing, with text in the prompt, with memory")
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    adapter = assembly.open_adapter(config)
    assert isinstance(adapter, TransformersAdapter)
    with Runtime.open(config) as runtime:
        adapter.check(runtime.bank.manifest, runtime.bank.path)
        ask = {mode: asker(mode, adapter, runtime) for mode in MODES}
        for mode in MODES:  # once for nothing: the first call of anything is slower, and none should gain by order
            ask[mode]("Which colour has the town's gate?", [])
        replies: list[dict[str, Reply]] = []
        for number, question in enumerate(questions, 1):
            order = MODES[number % 3 :] + MODES[: number % 3]
            by_mode = {mode: ask[mode](question["question"], question["answers"]) for mode in order}
            replies.append(by_mode)
            show(number, question, by_mode)
    summarise(replies)


def is_right(text: str, accepted: Sequence[str]) -> bool:
    """True if an accepted answer occurs in the text as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text, re.IGNORECASE) for one in accepted)


def asker(mode: str, adapter: TransformersAdapter, runtime: Runtime) -> Callable[[str, Sequence[str]], Reply]:
    """A function that answers a question in one mode and judges the answer."""
    settings = runtime.config.generate

    def ask(question: str, accepted: Sequence[str]) -> Reply:
        began = time.perf_counter()
        found = 0.0
        if mode == "memory":
            with runtime.stream(adapter.dtype) as stream:
                (answer,) = adapter.generate([adapter.render(question, settings.prompt)], [stream], settings)
        else:
            prompt: Prompt = adapter.render(question, settings.prompt)
            if mode == "text":
                (matches,) = runtime.search([question])
                references = runtime.references([match.id for match in matches])
                prompt = adapter.render(question, settings.prompt, [one.headed for one in references if one])
                found = time.perf_counter() - began
            (answer,) = adapter.generate([prompt], None, settings)
        return Reply(answer, is_right(answer.text, accepted), found + answer.first_token_s)

    return ask


def show(number: int, question: dict[str, Any], replies: dict[str, Reply]) -> None:
    console.print(f"\n[bold]{number}. {question['question']}[/bold]  (right: {question['answers'][0]})")
    for mode in MODES:
        reply = replies[mode]
        mark = "[green]right[/green]" if reply.right else "[red]wrong[/red]"
        text = " ".join(reply.answer.text.split()) or "(nothing)"
        speed = f"first token {reply.first_s:5.2f} s, {reply.answer.tokens_per_s:4.1f} tokens/s"
        console.print(f"  {mode:<7}{mark}  {speed}  {text}", soft_wrap=True)
    (chunk,) = replies["memory"].answer.chunks
    for id, score, reference in zip(chunk.ids, chunk.scores, chunk.references, strict=True):
        line = f"          read memory {id} (score {score:.2f}): {' '.join(reference.text.split())}"
        console.print(line, style="dim", no_wrap=True, overflow="ellipsis")


def summarise(replies: Sequence[dict[str, Reply]]) -> None:
    console.rule("[bold]4. Summary")
    table = Table("", "right", "first token, median s (quartiles)", "tokens/s, median")
    first: dict[str, float] = {}
    names = {"none": "no memory", "text": "references as text in the prompt", "memory": "references as memory"}
    for mode in MODES:
        times = [reply[mode].first_s for reply in replies]
        low, first[mode], high = statistics.quantiles(times, n=4)
        speeds = [reply[mode].answer.tokens_per_s for reply in replies if reply[mode].answer.tokens_per_s]
        table.add_row(
            names[mode],
            f"{sum(reply[mode].right for reply in replies)} of {len(replies)}",
            f"{first[mode]:.3f} ({low:.3f}-{high:.3f})",
            f"{statistics.median(speeds):.1f}" if speeds else "-",
        )
    console.print(table)
    right = {mode: sum(reply[mode].right for reply in replies) for mode in MODES}
    console.print(
        f"With memory {right['memory']} of {len(replies)} right (text {right['text']}, nothing {right['none']}); "
        f"first token after {first['memory'] / first['text']:.2f} of the time that the text takes."
    )


if __name__ == "__main__":
    main()
