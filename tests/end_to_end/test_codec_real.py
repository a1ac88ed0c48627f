"""A real model answers alike from banks that were begun with 1, 5, 17 and 100 references, and from one in int8."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import pytest

import run as demo
from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.lab.evaluation.asking import AnswersResults
from m3runtime.lab.evaluation.facts import FactsRun, FactsSettings
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.lab.evaluation.trials import changed
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.writing.fitting import join
from m3runtime.writing.verification import verify
from m3runtime.writing.writer import Writer

pytestmark = [pytest.mark.real_model, pytest.mark.slow, pytest.mark.timeout(7200)]

SETTINGS = FactsSettings(seed=0, references=320, questions=120, unanswerable=0, timed=1)


@pytest.fixture(scope="module")
def opened(smollm2_path: Path, minilm_path: Path) -> Iterator[tuple[Adapter, Config]]:
    """The demo's model and settings. It computes the memory of each text once."""
    paths = {"model.path": smollm2_path, "embedder.path": minilm_path}
    config = Config.load(demo.SETTINGS, {}, {key: str(path) for key, path in paths.items()})
    adapter = assembly.open_adapter(config)
    computed: dict[str, MemoryTensors] = {}
    encode = adapter.encode

    def once(references: Sequence[str]) -> MemoryTensors:
        if new := [text for text in references if text not in computed]:
            memories = encode(new)
            computed.update((text, memories.rows(slice(row, row + 1))) for row, text in enumerate(new))
        return join([computed[text] for text in references])

    adapter.encode = once  # type: ignore[method-assign]
    yield adapter, config
    adapter.close()


def asked(adapter: Adapter, config: Config, folder: Path, first: int) -> AnswersResults:
    """The answers from a bank that was begun with the ``first`` references."""
    run = FactsRun(config, SETTINGS, folder)
    if first:
        documents = [Document(f"world-0:{number}", text) for number, text in enumerate(run.world.references[:first])]
        report = Writer(run.config, adapter, assembly.open_embedder(config)).write(documents, whole=True)
        assert (report.written, report.codec) == (first, None)
    return run.run(adapter, modes=("memory",))


def right(results: AnswersResults) -> list[float]:
    return [float(results.answers["memory"][item.key]["right"]) for item in results.items]


def log_probs(results: AnswersResults) -> list[float]:
    return [fmean(results.answers["memory"][item.key]["log_probs"]) for item in results.items]


@pytest.fixture(scope="module")
def in_int8(opened: tuple[Adapter, Config], tmp_path_factory: pytest.TempPathFactory) -> AnswersResults:
    adapter, config = opened
    return asked(adapter, changed(config, {"codec": {"kind": "scalar"}}), tmp_path_factory.mktemp("int8"), 0)


@pytest.mark.parametrize("first", [1, 5, 17, 100])
def test_a_bank_answers_alike_whatever_it_began_with(
    opened: tuple[Adapter, Config], in_int8: AnswersResults, tmp_path: Path, first: int
) -> None:
    results = asked(*opened, tmp_path, first)
    codecs = verify(opened[1].model_copy(update={"bank": tmp_path / "bank"})).codecs
    assert {name.split()[0] for name in codecs} == {"product", "scalar"}
    interval = mean(right(in_int8))
    assert interval.low <= fmean(right(results)) <= interval.high
    lost = difference(log_probs(in_int8), log_probs(results))
    assert lost.value < 0.1, lost
