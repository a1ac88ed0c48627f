"""The cost of codecs: bytes, squared error, error of attention's output, and likelihood of the next token.

``make quality NAME=codec`` runs it on SmolLM2-135M and writes docs/quality/codec. Every codec is trained on references
other than those that are measured.
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import codec_variants as cv
import m3model.attention.implementation
from m3model.adapter import TransformersAdapter
from m3model.engine.scoring import Row, Scoring
from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.cli.progress import progress_bars
from m3runtime.config.schema import Config
from m3runtime.device.resolve import resolve
from m3runtime.documents.reading import read_documents
from m3runtime.documents.reference import Place, Reference
from m3runtime.lab.evaluation.laboratory import Choice, Laboratory
from m3runtime.lab.evaluation.passages import hold_out
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, mean
from m3runtime.lab.evaluation.world import make_world
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.recall.lease import Part
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.retriever import log_weights, passing
from m3runtime.stream import Stream
from m3runtime.writing.fitting import WEIGHED, join

BATCH = 16
SAMPLE = 96
"""References that a codec is trained on."""
REFERENCES, QUESTIONS, PASSAGES, TOPICS = 160, 120, 32, 60


@dataclass(frozen=True)
class Set:
    """Texts to be scored, the references they may recall, and others to train on."""

    name: str
    references: tuple[str, ...]
    others: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """The reading of a set with one variant's memories."""

    log_probs: tuple[float, ...]
    """Log-probability of each text, summed over its tokens."""
    tokens: tuple[int, ...]
    predicted: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Result:
    """One row for one set."""

    variant: str
    bytes: float
    keys: float
    values: float
    output: float
    divergence: float
    lost: Estimate


class Nearest(Laboratory):
    """Recalls for each text the nearest references, as a runtime does; their memories lie in RAM."""

    def __init__(self, config: Config, adapter: TransformersAdapter, embedder: Embedder, texts: Sequence[str]) -> None:
        references = {
            number: Reference(text, adapter.count_tokens(text), places=(Place(str(number), 0, len(text)),))
            for number, text in enumerate(texts)
        }
        super().__init__(config, adapter.spec, {}, references, {})
        self.embedder = embedder
        self.vectors = embedder.embed_references(list(texts))
        self.found: dict[str, list[Choice]] = {}

    def read(self, parts: Mapping[int, Part]) -> None:
        """Deliver these memories from now on."""
        self.parts = parts

    def recall(self, streams: Sequence[Stream], texts: Sequence[str], *, wait: bool | None = None) -> list[Recalled]:
        """See `Laboratory.recall`."""
        rules = self.config.recall
        for text in set(texts) - self.found.keys():
            scores = self.embedder.embed_queries([text])[0] @ self.vectors.T
            best = [Match(int(id), float(scores[id])) for id in np.argsort(-scores, kind="stable")[: rules.memories]]
            chosen = passing(best, min_score=rules.min_score, margin=rules.margin)
            weights = log_weights(chosen, rules.score_temperature)
            self.found[text] = [Choice(one.id, one.score, w) for one, w in zip(chosen, weights, strict=True)]
        self.choices = self.found
        return super().recall(streams, texts, wait=wait)


class Watched(Scoring):
    """Keeps all that was predicted, not the tokens' own probabilities alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.predicted: list[list[Tensor]] = [[] for _ in self.rows]

    def _take(self, logits: Tensor, first: int) -> None:
        super()._take(logits, first)
        for row, kept, scores in zip(self.rows, self.predicted, logits, strict=True):
            kept.append(scores[: len(row.tokens[first:])].float().log_softmax(-1).half())


@contextmanager
def outputs_kept(wanted: bool) -> Iterator[list[Tensor]]:
    """The outputs of attention in every layer and pass within the block, float16."""
    kept: list[Tensor] = []
    attend = m3model.attention.implementation.attend

    def watching(*args: Any, **options: Any) -> Tensor:
        result = attend(*args, **options)
        kept.append(result.half())
        return result

    m3model.attention.implementation.attend = watching if wanted else attend
    try:
        yield kept
    finally:
        m3model.attention.implementation.attend = attend


def read(
    adapter: TransformersAdapter, nearest: Nearest, some: Set, progress: Callable[[int, int], None], *, outputs: bool
) -> Reading:
    """Score all texts of a set, which read memories held in RAM."""
    count = len(some.prompts)
    order = sorted(range(count), key=lambda n: (adapter.count_tokens(some.prompts[n].text), n))
    log_probs, tokens = [0.0] * count, [0] * count
    predicted: list[Tensor] = [torch.empty(0)] * count
    kept: list[Tensor] = []
    for start in range(0, count, BATCH):
        progress(start, count)
        chosen = order[start : start + BATCH]
        rows = [
            Row(some.prompts[n], adapter.ids(some.prompts[n].text), adapter.ids(some.continuations[n])) for n in chosen
        ]
        room = max(len(row.ids) for row in rows) + max(len(row.tokens) for row in rows)
        session = adapter.session(len(rows), context=room)
        scoring = Watched(session, adapter.tokenizer, rows, [nearest.stream(adapter.dtype) for _ in rows])
        with outputs_kept(outputs) as seen:
            scores = scoring.run()
        kept.extend(seen)
        for n, score, row in zip(chosen, scores, scoring.predicted, strict=True):
            log_probs[n], tokens[n], predicted[n] = sum(score.log_probs), len(score.log_probs), torch.cat(row)
    return Reading(tuple(log_probs), tuple(tokens), tuple(predicted), tuple(kept))


def compare(variant: str, size: float, errors: tuple[float, float], ours: Reading, exact: Reading) -> Result:
    """A row: what reading other memories than the exact ones changes."""
    total = sum(exact.tokens)
    divergence = sum(
        float((p.float().exp() * (p.float() - q.float())).sum())
        for p, q in zip(exact.predicted, ours.predicted, strict=True)
    )
    wrong = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(exact.outputs, ours.outputs, strict=True))
    power = sum(float(a.float().square().sum()) for a in exact.outputs)
    # Per token, so that a text counts by its length; resampled text by text.
    share = [len(exact.tokens) * n / total for n in exact.tokens]
    lost = [
        (b - a) / n * weight
        for a, b, n, weight in zip(ours.log_probs, exact.log_probs, exact.tokens, share, strict=True)
    ]
    return Result(variant, size, *errors, wrong / max(power, 1e-30), divergence / total, mean(lost))


def study(config: Config, adapter: TransformersAdapter, some: Set, progress: Any, *, outputs: bool) -> list[Result]:
    """All variants on one set."""
    encoded = _encoded(adapter, some.references, lambda done, of: progress(f"{some.name}: memories", done, of))
    nearest = Nearest(config, adapter, assembly.open_embedder(config), some.references)
    nearest.read({n: (m.keys[0], m.values[0]) for n, m in encoded.items()})
    exact = read(
        adapter, nearest, some, lambda done, of: progress(f"{some.name}: unquantised", done, of), outputs=outputs
    )
    others = _encoded(adapter, some.others, lambda done, of: progress(f"{some.name}: sample", done, of))
    sample = join([others[n] for n in sorted(random.Random(0).sample(sorted(others), min(SAMPLE, len(others))))])
    importance = adapter.importance(some.others[:: max(1, len(some.others) // WEIGHED)][:WEIGHED])
    assert importance is not None
    results = []
    for variant in cv.variants(everywhere=not outputs):
        title = f"{some.name}: {variant.name}"
        around = (variant.around or cv.Around)(adapter)
        codec = cv.trained(
            variant, around, sample, importance, lambda share, s=title: progress(s, int(99 * share), 100)
        )
        parts, wrong, power, size = {}, np.zeros(2), np.zeros(2), 0.0
        for n, memories in encoded.items():
            progress(title, n, len(encoded))
            back = cv.coded(codec, around, memories)
            pairs = ((memories.keys, back.keys), (memories.values, back.values))
            wrong += [float((a - b).square().sum()) for a, b in pairs]
            power += [float(a.square().sum()) for a, _ in pairs]
            count = int(memories.tokens)
            size += HEADER_BYTES + codec.payload_bytes(count) + around.extra_bytes(count)
            parts[n] = (back.keys[0], back.values[0])
        nearest.read(parts)
        ours = read(adapter, nearest, some, lambda done, of, s=title: progress(s, done, of), outputs=outputs)
        results.append(compare(variant.name, size / len(encoded), tuple(wrong / power), ours, exact))
    return results


def facts(adapter: TransformersAdapter, config: Config) -> Set:
    """Invented facts; the codec is trained on those of another world."""
    world = make_world(0, references=REFERENCES, questions=QUESTIONS, unanswerable=0)
    other = make_world(2, references=REFERENCES, questions=QUESTIONS, unanswerable=0)
    prompts = tuple(adapter.render(question.text, config.generate.prompt) for question in world.questions)
    answers = tuple(f" {question.answers[0]}" for question in world.questions)
    return Set("facts", tuple(world.references), tuple(other.references), prompts, answers)


def texts(adapter: TransformersAdapter, config: Config, corpus: Path) -> Set:
    """Held-out passages of real texts; the codec is trained on references that none of them can recall."""
    documents = sorted(read_documents([corpus]), key=lambda document: document.name)[:TOPICS]
    held_out = hold_out(
        documents,
        adapter,
        passages=PASSAGES,
        chunk_tokens=config.recall.chunk_tokens,
        reference_tokens=adapter.spec.reference_tokens,
    )
    references = [document.text for document in held_out.references]
    random.Random(0).shuffle(references)
    others = references[: max(SAMPLE, len(references) // 4)]
    prompts = tuple(Prompt(passage.prompt) for passage in held_out.passages)
    return Set(
        "text",
        tuple(references[len(others) :]),
        tuple(others),
        prompts,
        tuple(passage.continuation for passage in held_out.passages),
    )


def main(config: Config, corpus: Path, out: Path, command: str) -> None:
    """Measure, and write the report into ``out``."""
    adapter = TransformersAdapter.open(config.model, config.memory, resolve(config.model.device))
    with progress_bars(shown=sys.stderr.isatty()) as progress:
        sets = [facts(adapter, config), texts(adapter, config, corpus)]
        found = {some.name: study(config, adapter, some, progress, outputs=some.name == "facts") for some in sets}
    report(found, config, adapter, command).save(out)


def report(found: Mapping[str, Sequence[Result]], config: Config, adapter: TransformersAdapter, command: str) -> Report:
    """Tables and the curve of bytes against loss."""
    tables, lines = [], []
    for name, results in found.items():
        whole = results[0].bytes
        rows = tuple(
            (
                one.variant,
                f"{one.bytes / 1000:.0f} kB",
                f"{whole / one.bytes:.1f}",
                f"{one.keys:.4f}",
                f"{one.values:.4f}",
                f"{one.output:.4f}" if one.output else "",
                f"{one.divergence:.4f}",
                str(one.lost),
                f"{100 * (1 - np.exp(-one.lost.value)):.1f} %",
            )
            for one in results
        )
        columns = ("codec", "a memory", "times fewer", "error of keys", "of values", "of attention's output")
        columns += ("KL divergence", "log-likelihood lost", "likelihood lost")
        note = (
            "Errors are squared and relative, of attention's output over all layers while a question is read. "
            "Divergence of what is predicted and loss of log-likelihood are per token, in nats, against unquantised "
            "memories."
        )
        tables.append(Table(name, columns, rows, note))
        for kind in ("scalar", "product, "):
            own = [one for one in results if one.variant.startswith(kind)]
            place = tuple(one.bytes / 1000 for one in own)
            lines.append(Series(f"{name}: {kind.strip(', ')}", tuple(one.lost for one in own), place))
    plot = Plot("codec", "What quantising costs", "log-likelihood lost, nats a token", tuple(lines), x="kB a memory")
    best = {name: next(one for one in results if one.variant == "product, 48 bytes") for name, results in found.items()}
    summary = tuple(
        f"{name}: the default codec takes {results[0].bytes / best[name].bytes:.1f} times fewer bytes than bfloat16 and"
        f" loses {best[name].lost} nats a token of log-likelihood."
        for name, results in found.items()
    )
    return Report(
        title="What codecs cost",
        command=command,
        settings={
            "references": REFERENCES,
            "questions": QUESTIONS,
            "passages": PASSAGES,
            "documents": TOPICS,
            "seed": 0,
        },
        config=config.model_dump(mode="json"),
        fingerprints={"model": adapter.model_fingerprint, "tokenizer": adapter.tokenizer_fingerprint},
        summary=summary,
        tables=tuple(tables),
        plots=(plot,),
        results={name: [asdict(one) for one in results] for name, results in found.items()},
    )


def _encoded(
    adapter: TransformersAdapter, references: Sequence[str], progress: Callable[[int, int], None]
) -> dict[int, MemoryTensors]:
    """The memory of each reference, in float32 and by itself."""
    found: dict[int, MemoryTensors] = {}
    order = sorted(range(len(references)), key=lambda n: (len(references[n]), n))
    for start in range(0, len(order), BATCH):
        progress(start, len(order))
        rows = order[start : start + BATCH]
        batch = adapter.encode([references[n] for n in rows])
        for row, (n, count) in enumerate(zip(rows, batch.tokens.tolist(), strict=True)):
            pair = (x[row : row + 1, :, :, :count].clone() for x in (batch.keys, batch.values))
            found[n] = MemoryTensors(*pair, batch.tokens[row : row + 1])
    return dict(sorted(found.items()))
