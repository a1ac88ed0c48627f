"""`run_text`: the likelihood of held-out passages, alone, with references as text, and with memories."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from m3runtime import assembly
from m3runtime.adapters.answers import Prompt, Score
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.banks import write_bank
from m3runtime.lab.evaluation.journal import Journal, silent
from m3runtime.lab.evaluation.passages import Corpus
from m3runtime.lab.evaluation.text_results import MODES, ChunkRecall, TextMode, TextResults
from m3runtime.memory.spec import fingerprint
from m3runtime.retrieval.embedder import Embedder
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress

_ORDER: tuple[TextMode, ...] = ("none", "memory", "text")  # text reads what memory recalled


@dataclass(frozen=True, slots=True)
class _Task:
    """Chunks of one passage that are scored together, in one mode."""

    key: str
    prompt: Prompt
    chunks: tuple[str, ...]
    """The chunks to score after the prompt."""
    tokens: int
    """Number of tokens in the prompt."""


def run_text(
    config: Config,
    adapter: Adapter,
    corpus: Corpus,
    folder: Path,
    *,
    batch_size: int = 8,
    modes: Sequence[TextMode] = MODES,
    progress: OnProgress = silent,
) -> TextResults:
    """Write the references into ``folder/bank``, and score the passages in every mode; ``memory`` must be one.

    ``none`` is the model alone. ``memory`` recalls once per chunk as in decoding, but waits for late memories.
    ``text`` puts the references that ``memory`` recalled for a chunk before the passage, and reads all of it again for
    every chunk.

    Each score is saved in ``folder/text.jsonl`` when it is computed. An interrupted run that is called again resumes,
    with equal results.

    Raises `InputError` if the chunks of ``corpus`` do not have ``config.recall.chunk_tokens`` tokens, if the folder
    belongs to another run or its bank holds other texts, or if a passage is tokenized differently alone than in its
    context.
    """
    if corpus.chunk_tokens != config.recall.chunk_tokens:
        raise InputError(
            f"the passages have chunks of {corpus.chunk_tokens} tokens, but recall.chunk_tokens is "
            f"{config.recall.chunk_tokens}"
        )
    patient = config.recall.model_copy(update={"when_late": "wait"})  # what is measured is quality, not speed
    settings = config.model_copy(update={"bank": folder / "bank", "recall": patient})
    with ExitStack() as opened:
        with ExitStack() as writing:
            embedder = assembly.open_embedder(settings)
            writing.callback(embedder.close)
            depends = _depends_on(settings, adapter, embedder, corpus)
            journal = opened.enter_context(Journal(folder / "text.jsonl", depends))
            write_bank(settings, adapter, embedder, corpus.references, progress)
        runtime = opened.enter_context(Runtime.open(settings, encoder=adapter))
        run = _Run(adapter, runtime, corpus, journal, batch_size, progress)
        for mode in _ORDER:
            if mode in modes:
                run.score(mode)
        return run.results(modes)


class _Run:
    """Scores passages, and saves the scores in a journal."""

    def __init__(
        self,
        adapter: Adapter,
        runtime: Runtime,
        corpus: Corpus,
        journal: Journal,
        batch_size: int,
        progress: OnProgress,
    ) -> None:
        self.adapter = adapter
        self.runtime = runtime
        self.corpus = corpus
        self.journal = journal
        self.batch_size = batch_size
        self.progress = progress

    def score(self, mode: TextMode) -> None:
        """Score the passages that the journal lacks in a mode."""

        def score(batch: Sequence[_Task]) -> list[list[dict[str, Any]]]:
            scores = self._score(batch, memories=mode == "memory")
            return [self._record(task, score) for task, score in zip(batch, scores, strict=True)]

        tasks = sorted(self._tasks(mode), key=lambda task: task.tokens)  # so that little is padded
        self.journal.fill(tasks, self.batch_size, lambda task: task.key, score, partial(self.progress, mode))

    def results(self, modes: Sequence[TextMode]) -> TextResults:
        """The results, from a journal that is complete."""
        passages = range(len(self.corpus.passages))
        return TextResults(
            references=len(self.corpus.references),
            dropped=self.corpus.dropped,
            chunk_tokens=self.corpus.chunk_tokens,
            log_probs={
                mode: tuple(tuple(tuple(one["log_probs"]) for one in self._records(mode, n)) for n in passages)
                for mode in modes
            },
            recalled=tuple(
                tuple(ChunkRecall(tuple(one["ids"]), tuple(one["scores"])) for one in self._records("memory", n))
                for n in passages
            ),
            fingerprints=self.runtime.bank.manifest.fingerprints(),
        )

    # -- tasks --------------------------------------------------------------------------------------------------

    def _tasks(self, mode: TextMode) -> Iterator[_Task]:
        """Tasks of whole continuations, or of single chunks in ``text``, where each chunk has its own prompt."""
        if mode == "text":
            yield from self._text_tasks()
            return
        for number, passage in enumerate(self.corpus.passages):
            yield _Task(f"{mode}/{number}", Prompt(passage.prompt), passage.chunks[1:], self.corpus.chunk_tokens)

    def _text_tasks(self) -> Iterator[_Task]:
        for number, passage in enumerate(self.corpus.passages):
            for place, record in enumerate(self._records("memory", number), start=1):
                texts = [reference.headed for reference in self.runtime.references(record["ids"]) if reference]
                prompt = self.adapter.render("".join(passage.chunks[:place]), "plain", texts)
                scored = passage.chunks[place : place + 1]
                yield _Task(f"text/{number}/{place}", prompt, scored, self.adapter.count_tokens(prompt.text))

    def _score(self, batch: Sequence[_Task], *, memories: bool) -> list[Score]:
        prompts, continuations = [task.prompt for task in batch], ["".join(task.chunks) for task in batch]
        with ExitStack() as closing:
            streams = None
            if memories:
                streams = [closing.enter_context(self.runtime.stream(self.adapter.dtype)) for _ in batch]
            return self.adapter.score(prompts, continuations, streams)

    # -- records ------------------------------------------------------------------------------------------------

    def _record(self, task: _Task, score: Score) -> list[dict[str, Any]]:
        """The record of a score, one object per chunk. Raises `InputError` for an unexpected number of tokens."""
        size = self.corpus.chunk_tokens
        if len(score.log_probs) != size * len(task.chunks):
            raise InputError(
                f"{task.key}: {len(score.log_probs)} tokens were scored, not {size * len(task.chunks)}: "
                "the model's tokenizer reads a part of a text otherwise than the whole"
            )
        parts = [score.log_probs[start : start + size] for start in range(0, len(score.log_probs), size)]
        if not score.chunks:
            return [{"log_probs": part} for part in parts]
        return [
            {"log_probs": part, "ids": recalled.ids, "scores": recalled.scores}
            for part, recalled in zip(parts, score.chunks, strict=True)
        ]

    def _records(self, mode: TextMode, number: int) -> list[dict[str, Any]]:
        """The records of the chunks of a passage, in order."""
        done = self.journal.done
        if mode != "text":
            return list(done[f"{mode}/{number}"])
        places = range(1, len(self.corpus.passages[number].chunks))
        return [record for place in places for record in done[f"text/{number}/{place}"]]


def _depends_on(config: Config, adapter: Adapter, embedder: Embedder, corpus: Corpus) -> str:
    """A fingerprint of everything that the scores depend on."""
    return fingerprint(
        {
            "model": [adapter.model_fingerprint, adapter.tokenizer_fingerprint, str(adapter.dtype)],
            "embedder": embedder.fingerprint,
            "memory": config.memory.model_dump(mode="json", exclude={"batch_size"}),
            "recall": config.recall.model_dump(mode="json"),
            "codec": config.codec.model_dump(mode="json"),
            "index": config.index.model_dump(mode="json"),
            "passages": [passage.chunks for passage in corpus.passages],
            "references": [reference.text for reference in corpus.references],
        }
    )
