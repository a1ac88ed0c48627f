"""`Trials`: the answers to a world's questions under one setting after the other.

References are encoded once for all settings that read the same memories, and codecs are applied in RAM. No bank is
written: the quality of memories is measured, not their storage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.codecs import Codec
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.lab.evaluation.laboratory import Laboratory, weighted
from m3runtime.lab.evaluation.world import World
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.spec import canonical_json
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.recall.lease import Part
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.naming import CANDIDATES, Naming
from m3runtime.retrieval.retriever import passing
from m3runtime.writing.codec_files import configured
from m3runtime.writing.fitting import fit_codec, sample
from m3runtime.writing.writer import OnProgress

TrialMode = Literal["none", "text", "memory"]


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of one setting, question by question."""

    right: tuple[float, ...]
    log_probs: tuple[float, ...]
    """Log-likelihood of the right answer, mean over its tokens."""
    bytes: float
    """Mean size of a block; 0 if no memory is read."""
    recalled: float
    """Mean number of memories, or of references as text, for a question."""


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with changed values, by dotted key or by section, such as ``codec``."""
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return Config.model_validate(values)


class Trials:
    """Runs trials over one world with one model. One thread."""

    def __init__(
        self,
        config: Config,
        adapter: Adapter,
        world: World,
        *,
        batch: int = 16,
        reads: Sequence[str] | None = None,
    ) -> None:
        """``adapter`` needs `Adapter.with_memory`; its own memory settings are not used.

        ``reads`` are the texts that the model reads; default: the world's references, which are searched.
        """
        self.config = config
        self.world = world
        self.batch = batch
        self.progress: OnProgress = silent
        self._adapter = adapter
        self._adapters: dict[str, Adapter] = {}
        self._encoded: tuple[str, dict[int, Part]] = ("", {})
        self._coded: tuple[str, dict[int, Part], float] = ("", {}, 0.0)
        self._references = {
            number: Reference(
                text, adapter.count_tokens(text), places=(Place(f"world-{world.seed}:{number}", 0, len(text)),)
            )
            for number, text in enumerate(world.references if reads is None else reads)
        }
        self._nearest = self._search()

    def run(self, mode: TrialMode, changes: Mapping[str, Any]) -> Trial:
        """Ask all questions in one mode, under the configuration with ``changes``."""
        config = changed(self.config, changes)
        adapter = self._adapter_of(config)
        matches = self._recalled(config)
        size, laboratory = 0.0, None
        if mode == "memory":
            parts, size = self._parts(config, adapter)
            laboratory = self._laboratory(config, adapter, parts, matches)
        texts = [[self._references[match.id].text for match in found] if mode == "text" else None for found in matches]
        prompts = [
            adapter.render(question.text, config.generate.prompt, given)
            for question, given in zip(self.world.questions, texts, strict=True)
        ]
        right, log_probs = self._ask(config, adapter, prompts, laboratory)
        recalled = 0.0 if mode == "none" else float(np.mean([len(found) for found in matches]))
        return Trial(tuple(right), tuple(log_probs), size, recalled)

    def likelihoods(self, parts: Mapping[int, Part], changes: Mapping[str, Any] | None = None) -> list[float]:
        """The log-likelihood of each right answer, mean over its tokens, from memories that the caller made.

        Nothing is generated.
        """
        config = changed(self.config, changes or {})
        adapter = self._adapter_of(config)
        laboratory = self._laboratory(config, adapter, parts, self._recalled(config))
        questions, found = self.world.questions, [0.0] * len(self.world.questions)
        prompts = [adapter.render(question.text, config.generate.prompt) for question in questions]
        for rows in self._batches(adapter, prompts):
            streams = [laboratory.stream(adapter.dtype) for _ in rows]
            wanted = [f" {questions[row].answers[0]}" for row in rows]
            for row, score in zip(rows, adapter.score([prompts[row] for row in rows], wanted, streams), strict=True):
                found[row] = float(np.mean(score.log_probs))
        return found

    def _recalled(self, config: Config) -> list[list[Match]]:
        rules = config.recall
        naming = Naming(self._searched, rules.names_weight)
        found = [
            naming.scored(question.text, nearest) if rules.names_weight else nearest
            for question, nearest in zip(self.world.questions, self._nearest, strict=True)
        ]
        return [passing(nearest[: rules.memories], min_score=rules.min_score, margin=rules.margin) for nearest in found]

    def _searched(self, ids: Sequence[int]) -> dict[int, Reference]:
        """The references as they are searched, whatever the model reads."""
        return {id: Reference(self.world.references[id], 0) for id in ids}

    def _laboratory(
        self, config: Config, adapter: Adapter, parts: Mapping[int, Part], matches: Sequence[Sequence[Match]]
    ) -> Laboratory:
        choices = {
            question.text: weighted(found, config.recall.score_temperature)
            for question, found in zip(self.world.questions, matches, strict=True)
        }
        return Laboratory(config, adapter.spec, parts, self._references, choices)

    def _batches(self, adapter: Adapter, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """The rows of prompts in batches of similar lengths."""
        lengths = [adapter.count_tokens(prompt.text) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda row: (lengths[row], row))
        for start in range(0, len(order), self.batch):
            self.progress("Asking questions", start, len(order))
            yield order[start : start + self.batch]

    def _ask(
        self, config: Config, adapter: Adapter, prompts: Sequence[Prompt], laboratory: Laboratory | None
    ) -> tuple[list[float], list[float]]:
        questions = self.world.questions
        right, log_probs = [0.0] * len(questions), [0.0] * len(questions)
        for rows in self._batches(adapter, prompts):
            batch = [prompts[row] for row in rows]
            wanted = [f" {questions[row].answers[0]}" for row in rows]
            streams = None if laboratory is None else [laboratory.stream(adapter.dtype) for _ in rows]
            examined = adapter.examine(batch, wanted, streams, config.generate)
            for row, (answer, score) in zip(rows, examined, strict=True):
                assert score is not None
                right[row] = float(is_right(answer.text, questions[row].answers))
                log_probs[row] = float(np.mean(score.log_probs))
        return right, log_probs

    # -- retrieval ----------------------------------------------------------------------------------------------

    def _search(self) -> list[list[Match]]:
        """The nearest references of each question, by exact search."""
        embedder = assembly.open_embedder(self.config)
        try:
            references = embedder.embed_references(list(self.world.references))
            asked = embedder.embed_queries([question.text for question in self.world.questions])
        finally:
            embedder.close()
        scores = asked @ references.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :CANDIDATES]
        return [
            [Match(int(id), float(score)) for id, score in zip(ids, row[ids], strict=True)]
            for ids, row in zip(order, scores, strict=True)
        ]

    # -- memories -----------------------------------------------------------------------------------------------

    def _adapter_of(self, config: Config) -> Adapter:
        key = canonical_json(config.memory.model_dump(mode="json"))
        if key not in self._adapters:
            self._adapters[key] = self._adapter.with_memory(config.memory)
        return self._adapters[key]

    def _parts(self, config: Config, adapter: Adapter) -> tuple[dict[int, Part], float]:
        """The memories after encoding and decoding by the codec, and the mean size of a block in bytes."""
        shape = config.memory.model_dump(
            mode="json", include={"layers", "tokens_per_head", "select_by", "sink", "place"}
        )
        encoded = canonical_json(shape)
        if self._encoded[0] != encoded:
            self._coded = ("", {}, 0.0)  # so that RAM holds two sets of memories at most
            self._encoded = (encoded, self._encode(adapter))
        coded = canonical_json([shape, config.codec.model_dump(mode="json")])
        if self._coded[0] != coded:
            self._coded = ("", {}, 0.0)
            self._coded = (coded, *self._recode(configured(config, adapter.spec), adapter))
        return self._coded[1:]

    def _encode(self, adapter: Adapter) -> dict[int, Part]:
        parts: dict[int, Part] = {}
        order = sorted(self._references, key=lambda id: self._references[id].tokens)
        for start in range(0, len(order), self.batch):
            self.progress("Computing memories", start, len(order))
            ids = order[start : start + self.batch]
            memories = adapter.encode([self._references[id].text for id in ids])
            for row, (id, tokens) in enumerate(zip(ids, memories.tokens.tolist(), strict=True)):
                parts[id] = (memories.keys[row, :, :, :tokens].clone(), memories.values[row, :, :, :tokens].clone())
        return parts

    def _recode(self, codec: Codec, adapter: Adapter) -> tuple[dict[int, Part], float]:
        """Every memory after encoding and decoding, and the mean size of a block in bytes."""
        parts = self._encoded[1]
        drawn = sample([self._references[id] for id in parts], self.config.codec.sample_tokens, adapter.spec)
        texts = [one.text for one in drawn]
        fit_codec(codec, adapter, texts, self.batch, partial(self.progress, "Training the codec"))
        found, size = {}, 0
        for done, (id, part) in enumerate(parts.items()):
            self.progress("Encoding memories", done, len(parts))
            memory = _alone(part)
            device, dtype = part[0].device, part[0].dtype
            decoded = codec.decode(codec.encode(memory).to(device), memory.tokens, dtype)
            found[id] = (decoded.keys[0], decoded.values[0])
            size += HEADER_BYTES + codec.payload_bytes(int(memory.tokens))
        return found, size / len(parts)


def _alone(part: Part) -> MemoryTensors:
    keys, values = part
    return MemoryTensors(keys[None], values[None], torch.tensor([keys.shape[2]]))
