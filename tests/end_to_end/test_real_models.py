"""The demo's claim, as a test: a real model answers from memory what it cannot know, as well as from text."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import run as demo
from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import Writer

pytestmark = [pytest.mark.real_model, pytest.mark.slow]  # `make demo` asks the same questions

QUESTIONS = [json.loads(line) for line in demo.QUESTIONS.read_text().splitlines()]


@pytest.fixture(scope="module")
def opened(
    smollm2_path: Path, minilm_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Adapter, Runtime]]:
    """The handbook written with the demo's settings."""
    paths = {"model.path": smollm2_path, "embedder.path": minilm_path, "bank": tmp_path_factory.mktemp("real") / "bank"}
    config = Config.load(demo.SETTINGS, {}, {key: str(path) for key, path in paths.items()})
    adapter = assembly.open_adapter(config)
    report = Writer(config, adapter, assembly.open_embedder(config)).write(read_documents([demo.HANDBOOK]))
    assert report.written == report.references > 30
    with Runtime.open(config) as runtime:
        yield adapter, runtime


def right(adapter: Adapter, runtime: Runtime, mode: str) -> int:
    """How many questions are answered right, all asked in one batch."""
    settings, prompts, streams = runtime.config.generate, [], None
    for question in QUESTIONS:
        texts = None
        if mode == "text":
            (matches,) = runtime.search([question["question"]])
            texts = [one.text for one in runtime.references([match.id for match in matches]) if one]
        prompts.append(adapter.render(question["question"], settings.prompt, texts))
    if mode == "memory":
        streams = [runtime.stream(adapter.dtype) for _ in prompts]
    answers = adapter.generate(prompts, streams, settings)
    return sum(is_right(answer.text, question["answers"]) for answer, question in zip(answers, QUESTIONS, strict=True))


def test_memory_answers_what_the_model_cannot_know_as_well_as_text_does(opened: tuple[Adapter, Runtime]) -> None:
    counts = {mode: right(*opened, mode) for mode in demo.MODES}
    assert counts["memory"] >= 0.7 * len(QUESTIONS), counts
    assert counts["memory"] >= counts["text"], counts
    assert counts["none"] <= 0.1 * len(QUESTIONS), counts
