"""Held-out passages of real files, scored without memory, with text and with memories."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from m3runtime import assembly
from m3runtime.adapters.answers import Prompt, Score
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reading import read_documents
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.passages import Corpus, hold_out
from m3runtime.lab.evaluation.text_results import MODES, TextResults
from m3runtime.lab.evaluation.text_run import run_text
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import REPOSITORY
from tests.end_to_end.conftest import NewPlace
from tests.model.families import TEXT

CHUNK = 8
WORDS = TEXT.replace(";", "").replace(",", "").split()


class StoppedError(Exception):
    """As if somebody had pressed Ctrl-C."""


def story(seed: int) -> str:
    """Sentences of words that the tiny tokenizer knows."""
    drawing = Random(seed)
    return "\n\n".join(f"the {' '.join(drawing.choices(WORDS, k=8))}." for _ in range(30))


def cut_up(adapter: Adapter, documents: Sequence[Document], **options: Any) -> Corpus:
    settings = {"passages": 5, "chunk_tokens": CHUNK, "reference_tokens": adapter.spec.reference_tokens, **options}
    return hold_out(documents, adapter, **settings)


@pytest.fixture(scope="module")
def config(new_place: NewPlace, tmp_path_factory: pytest.TempPathFactory) -> Config:
    place = new_place(tmp_path_factory.mktemp("eval"))
    place.configure(
        memory={"layers": [0, 2], "reference_tokens": 24},
        codec={"kind": "raw"},
        recall={"chunk_tokens": CHUNK, "lookahead_tokens": 2, "memories": 2, "min_score": 0.2, "when_late": "skip"},
    )
    return Config.load(place.file, environ={})


@pytest.fixture(scope="module")
def adapter(config: Config) -> Iterator[Adapter]:
    adapter = assembly.open_adapter(config)
    yield adapter
    adapter.close()


@pytest.fixture(scope="module")
def corpus(adapter: Adapter) -> Corpus:
    return cut_up(adapter, [Document(f"{seed}.txt", story(seed)) for seed in range(4)])


@pytest.fixture(scope="module")
def once(config: Config, adapter: Adapter, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed. Only for looking at."""
    folder = tmp_path_factory.mktemp("once")
    run_text(config, adapter, corpus, folder, batch_size=2)
    return folder


@pytest.fixture
def results(config: Config, adapter: Adapter, corpus: Corpus, once: Path) -> TextResults:
    return run_text(config, adapter, corpus, once, batch_size=2)


def test_every_mode_scores_every_token_of_every_passage(corpus: Corpus, results: TextResults) -> None:
    assert (results.passages, results.chunks, results.chunk_tokens) == (5, 3, CHUNK)
    assert (results.references, results.dropped) == (len(corpus.references), corpus.dropped)
    for mode in MODES:
        lengths = [[len(chunk) for chunk in passage] for passage in results.log_probs[mode]]
        assert lengths == [[CHUNK] * 3] * 5
        assert all(value < 0 for passage in results.log_probs[mode] for chunk in passage for value in chunk)
        tokens = [value for passage in results.log_probs[mode] for chunk in passage for value in chunk]
        assert results.mean(mode) == pytest.approx(sum(tokens) / len(tokens))
        assert sum(results.passage_means(mode)) / 5 == pytest.approx(results.mean(mode))
        assert sum(results.chunk_means(mode)) / 3 == pytest.approx(results.mean(mode))
    assert len({results.mean(mode) for mode in MODES}) == 3, "the modes differ"


def test_none_is_the_model_as_it_is(adapter: Adapter, corpus: Corpus, results: TextResults) -> None:
    for passage, log_probs in zip(corpus.passages, results.log_probs["none"], strict=True):
        (score,) = adapter.score([Prompt(passage.prompt)], [passage.continuation], None)
        assert [value for chunk in log_probs for value in chunk] == pytest.approx(score.log_probs, abs=1e-4)


def test_text_reads_what_memory_recalls(
    config: Config, adapter: Adapter, corpus: Corpus, results: TextResults, once: Path
) -> None:
    recalled = [chunk.ids for passage in results.recalled for chunk in passage]
    assert len(set(recalled)) > 5, "something is recalled, and not the same for every chunk"
    scores = results.recall_scores()
    assert len(scores) == sum(map(len, recalled))
    assert min(scores) >= 0.2
    with Runtime.open(config.model_copy(update={"bank": once / "bank"})) as runtime:
        for passage, log_probs, chunks in zip(
            corpus.passages, results.log_probs["text"], results.recalled, strict=True
        ):
            for place, (expected, recall) in enumerate(zip(log_probs, chunks, strict=True), start=1):
                found = runtime.search([passage.chunks[place - 1]])[0]
                assert tuple(match.id for match in found) == recall.ids
                texts = [one.text for one in runtime.references(recall.ids) if one is not None]
                before = "".join(f"{adapter.sink} {text}\n\n" for text in texts)
                so_far = "".join(passage.chunks[:place])
                prompt = before + so_far.lstrip("\n") if before else so_far
                (score,) = adapter.score([Prompt(prompt)], [passage.chunks[place]], None)
                assert expected == pytest.approx(score.log_probs, abs=1e-4)


def test_no_held_out_text_is_in_the_bank(config: Config, corpus: Corpus, once: Path, results: TextResults) -> None:
    with Runtime.open(config.model_copy(update={"bank": once / "bank"})) as runtime:
        found = runtime.references(runtime.bank.home.ids().tolist())
    texts = [one.text for one in found if one is not None]
    assert texts == [reference.text for reference in corpus.references]
    for passage in corpus.passages:
        assert not any((left + right).strip() in text for left, right in pairwise(passage.chunks) for text in texts)


@pytest.mark.parametrize("stop", [("Writing memories", 0), ("none", 2), ("text", 8), ("memory", 2)])
def test_an_interrupted_run_goes_on_to_equal_results(
    stop: tuple[str, int], config: Config, adapter: Adapter, corpus: Corpus, results: TextResults, tmp_path: Path
) -> None:
    def stopping(mode: str, done: int, total: int) -> None:
        if (mode, done) == stop:
            raise StoppedError

    class Counting:
        """The adapter, and how many chunks it was asked to score."""

        scored = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(adapter, name)

        def score(self, prompts: Any, continuations: Sequence[str], streams: Any) -> list[Score]:
            self.scored += sum(adapter.count_tokens(text) // CHUNK for text in continuations)
            return adapter.score(prompts, continuations, streams)

    counting: Any = Counting()
    with pytest.raises(StoppedError):
        run_text(config, counting, corpus, tmp_path, batch_size=2, progress=stopping)
    assert run_text(config, counting, corpus, tmp_path, batch_size=2) == results
    assert counting.scored == 3 * 5 * 3, "nothing is scored twice"
    assert run_text(config, counting, corpus, tmp_path, batch_size=2) == results
    assert counting.scored == 3 * 5 * 3


def test_a_batch_of_which_a_part_was_kept_is_completed(
    config: Config, adapter: Adapter, corpus: Corpus, results: TextResults, tmp_path: Path
) -> None:
    run_text(config, adapter, corpus, tmp_path, batch_size=2)
    journal = tmp_path / "text.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert run_text(config, adapter, corpus, tmp_path, batch_size=2) == results
    assert sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(lines), "each result stands there once"


def test_progress_counts_scored_passages(config: Config, adapter: Adapter, corpus: Corpus, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    run_text(config, adapter, corpus, tmp_path, batch_size=2, progress=lambda *words: said.append(words))
    assert [words for words in said if words[0] == "none"] == [("none", done, 5) for done in (0, 2, 4, 5)]
    assert list(dict.fromkeys(stage for stage, *_ in said)) == ["Writing memories", "none", "memory", "text"]
    assert said[-1] == ("text", 15, 15)


def test_what_does_not_belong_together_is_refused(
    config: Config, adapter: Adapter, corpus: Corpus, results: TextResults, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"chunks of 4 tokens, but recall.chunk_tokens is 8"):
        run_text(config, adapter, replace(corpus, chunk_tokens=4), tmp_path)
    bank = config.model_copy(update={"bank": tmp_path / "bank"})
    held_out = [Document("held out", passage.continuation[:40]) for passage in corpus.passages]
    Writer(bank, adapter, assembly.open_embedder(bank)).write(held_out, whole=True)
    with pytest.raises(InputError, match="bank remembers other texts than these"):
        run_text(config, adapter, corpus, tmp_path)


def test_a_run_of_other_settings_is_refused(
    config: Config, adapter: Adapter, corpus: Corpus, results: TextResults, once: Path
) -> None:
    other = config.model_copy(update={"recall": config.recall.model_copy(update={"min_score": 0.25})})
    with pytest.raises(InputError, match="of other settings"):
        run_text(other, adapter, corpus, once)
    with pytest.raises(InputError, match="of other settings"):
        run_text(config, adapter, replace(corpus, passages=corpus.passages[:3]), once)


def test_an_adapter_that_scores_other_tokens_is_refused(
    config: Config, adapter: Adapter, corpus: Corpus, tmp_path: Path
) -> None:
    class Careless:
        def __getattr__(self, name: str) -> Any:
            return getattr(adapter, name)

        def score(self, *arguments: Any) -> list[Score]:
            return [Score(score.log_probs[:-1], score.chunks) for score in adapter.score(*arguments)]

    careless: Any = Careless()
    with pytest.raises(InputError, match=r"none/0: 23 tokens were scored, not 24"):
        run_text(config, careless, corpus, tmp_path)


@pytest.mark.long
@pytest.mark.real_model
def test_a_real_model_knows_a_text_better_with_its_other_parts(
    real_model: tuple[Adapter, Config], tmp_path: Path
) -> None:
    adapter, config = real_model
    (document,) = read_documents([REPOSITORY / "docs/embed.md"])
    document = replace(document, content=document.text[:2600])  # writing the whole takes a minute
    corpus = cut_up(adapter, [document], passages=1, continuation=2, chunk_tokens=config.recall.chunk_tokens)
    results = run_text(config, adapter, corpus, tmp_path)
    assert len(results.recall_scores()) > 4
    assert results.mean("memory") > results.mean("none")


def test_the_command_reports_what_it_found(new_place: NewPlace, config: Config, tmp_path: Path) -> None:
    place = new_place(tmp_path / "place")
    place.configure(**{name: config.model_dump(mode="json")[name] for name in ("memory", "codec", "recall")})
    for seed in range(4):
        place.text(f"corpus/{seed}.txt", story(seed))
    arguments = ("eval", "text", "--corpus", "corpus", "--passages", "5", "--batch", "2", "--json")
    one = place.m3(*arguments, "--out", "one").json
    two = place.m3(*arguments, "--out", "two").json
    assert {path.name for path in (place.folder / "one").iterdir()} == {
        "report.json", "report.md", "text.png", "text.svg", "text.jsonl", "bank",
    }  # fmt: skip
    assert one == two
    assert len(one["results"]["passages"]) == 5
    assert len(one["results"]["log_probs"]["memory"]) == 5
    assert f"| {one['tables'][0]['rows'][0][0]} |" in (place.folder / "one/report.md").read_text()
    assert "room for" in place.m3(*arguments, "--passages", "500").complaint
