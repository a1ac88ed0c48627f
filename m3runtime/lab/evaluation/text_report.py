"""`text_report`: the results of ``m3 eval text`` as a report."""

from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.passages import Corpus, hold_out
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, difference, mean
from m3runtime.lab.evaluation.text_results import MODES, TextMode, TextResults
from m3runtime.lab.evaluation.text_run import run_text
from m3runtime.writing.writer import OnProgress

_NAMES: dict[TextMode, str] = {
    "none": "the passage so far, alone",
    "text": "and before it, as text, the references that memory recalls for the chunk",
    "memory": "and memories, recalled for each chunk as in decoding",
}


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The settings of ``m3 eval text``."""

    corpus: tuple[str, ...]
    seed: int = 0
    passages: int = 40
    chunks: int = 3
    """Scored chunks of each passage."""
    share: float = 2 / 3
    """References that share more than this with a passage are dropped."""

    @property
    def command(self) -> str:
        """The command that has these settings."""
        corpus = " ".join(f"--corpus {path}" for path in self.corpus)
        return (
            f"m3 eval text {corpus} --seed {self.seed} --passages {self.passages} --chunks {self.chunks} "
            f"--share {self.share:g}"
        )


def evaluate_text(
    config: Config, settings: TextSettings, folder: Path, batch_size: int, progress: OnProgress = silent
) -> Report:
    """Run the evaluation in a folder, or resume it; see `run_text`. Raises `InputError` if there is too little text."""
    documents = list(read_documents([Path(path) for path in settings.corpus]))
    adapter = assembly.open_adapter(config)
    corpus = hold_out(
        documents,
        adapter,
        passages=settings.passages,
        chunk_tokens=config.recall.chunk_tokens,
        reference_tokens=adapter.spec.reference_tokens,
        continuation=settings.chunks,
        share=settings.share,
        seed=settings.seed,
    )
    results = run_text(config, adapter, corpus, folder, batch_size=batch_size, progress=progress)
    return text_report(results, settings, corpus, config)


def text_report(results: TextResults, settings: TextSettings, corpus: Corpus, config: Config) -> Report:
    """The report: tables, a picture, and a summary in words."""
    seed = settings.seed
    return Report(
        title=f"Text: {results.passages} held-out passages of {', '.join(settings.corpus)}",
        command=settings.command,
        settings={**asdict(settings), "corpus": " ".join(settings.corpus)},
        config=config.model_dump(mode="json"),
        fingerprints=results.fingerprints,
        summary=_summary(results, seed),
        tables=(_likelihood(results, seed), _recall(results, seed)),
        plots=(_plot(results, seed),),
        results={
            "passages": [{"source": one.source, "start": one.start, "chunks": one.chunks} for one in corpus.passages],
            "log_probs": results.log_probs,
            "recalled": [[asdict(chunk) for chunk in passage] for passage in results.recalled],
            "references": results.references,
            "dropped": results.dropped,
        },
    )


def _gain(results: TextResults, mode: TextMode, baseline: TextMode, seed: int) -> Estimate:
    return difference(results.passage_means(mode), results.passage_means(baseline), seed)


def _likelihood(results: TextResults, seed: int) -> Table:
    rows: list[tuple[object, ...]] = []
    for mode in MODES:
        gained = "" if mode == "none" else _gain(results, mode, "none", seed)
        of_chunks = [f"{value:.3f}" for value in results.chunk_means(mode)]
        rows.append((mode, _NAMES[mode], mean(results.passage_means(mode), seed), gained, *of_chunks))
    chunks = tuple(f"chunk {number}" for number in range(1, results.chunks + 1))
    return Table(
        "Next-token log-likelihood",
        ("mode", "what the model is given", "all chunks", "more than alone", *chunks),
        tuple(rows),
        f"Natural logarithm, mean over tokens; chunks are of {results.chunk_tokens} tokens. In brackets, the interval "
        "of 95 % of bootstrap resamples of the passages.",
    )


def _recall(results: TextResults, seed: int) -> Table:
    counts = [len(chunk.ids) for chunk in chain(*results.recalled)]
    scores = results.recall_scores()
    rows: list[tuple[object, ...]] = [
        ("references in the bank", results.references),
        ("references dropped, because a passage has too much of them", results.dropped),
        ("memories recalled for a chunk", mean(counts, seed)),
        ("score of a recalled memory", mean(scores, seed) if scores else "-"),
    ]
    return Table("Recall", ("", ""), tuple(rows))


def _summary(results: TextResults, seed: int) -> tuple[str, ...]:
    memory, text = _gain(results, "memory", "none", seed), _gain(results, "text", "none", seed)
    against = _gain(results, "memory", "text", seed)
    return (
        f"Memory changes the log-likelihood of a token by {memory}, the same references as text by {text}; the "
        f"difference is {against}.",
        f"Passages have {results.chunks} scored chunks; {results.dropped} references were dropped, "
        f"{results.references} remain, of which {_per_chunk(results):.1f} are recalled for a chunk.",
    )


def _per_chunk(results: TextResults) -> float:
    return fmean(len(chunk.ids) for chunk in chain(*results.recalled))


def _plot(results: TextResults, seed: int) -> Plot:
    def by_chunk(mode: TextMode) -> tuple[Estimate, ...]:
        def of(number: int) -> list[float]:
            return [fmean(passage[number]) for passage in results.log_probs[mode]]

        base = [[fmean(passage[number]) for passage in results.log_probs["none"]] for number in range(results.chunks)]
        return tuple(difference(of(number), base[number], seed) for number in range(results.chunks))

    labels = tuple(f"chunk {number}" for number in range(1, results.chunks + 1))
    series: tuple[Any, ...] = tuple(Series(mode, by_chunk(mode)) for mode in ("text", "memory"))
    return Plot("text", "What references change", "log-likelihood of a token, more than alone", series, labels)
