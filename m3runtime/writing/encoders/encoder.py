"""`Encoder`: computes blocks and embeddings for a writer that is another process."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import BankCodecs
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import M3Error
from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.writing.encoding import Encoding
from m3runtime.writing.pipeline import Clock, Pipeline

_PHASES = ("model", "encode", "embed")


@dataclass(frozen=True, slots=True)
class Setup:
    """All that an encoder needs of a bank, wherever it runs: its home is not asked."""

    config: Config
    manifest: bytes
    codecs: Mapping[str, bytes]
    """The contents of the codecs' files, by name."""
    slot_bytes: int

    @classmethod
    def of(cls, config: Config, bank: Bank) -> Self:
        """The setup for an open bank, as it is now."""
        files = {path.name: path.read_bytes() for path, _ in bank.codecs.files()}
        return cls(config, bank.manifest.to_bytes(), files, bank.home.slot_bytes)


@dataclass(frozen=True, slots=True)
class Task:
    """One group of references to encode."""

    ids: Ids
    references: Sequence[Reference]
    embed: bool
    read: bool
    """Does the model read them? Catalogued references are only embedded."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The result of a task."""

    blocks: npt.NDArray[np.uint8] | None
    """Sealed blocks, ``uint8[n, slot_bytes]``, if the model read the references."""
    vectors: Embeddings | None
    seconds: Mapping[str, float]
    """Seconds in each phase; see `m3runtime.writing.pipeline.PHASES`."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that a task raised."""

    kind: type[M3Error] | None
    """None for an error that is not our own."""
    message: str
    trace: str

    def raised(self) -> Exception:
        """The error to raise in the writer."""
        if self.kind is not None:
            return self.kind(self.message)
        error = RuntimeError(f"an encoder failed: {self.message}")
        error.add_note(self.trace)
        return error


class Encoder:
    """Does tasks for one bank, on one device. The first task loads model, embedder and codecs. For one thread."""

    def __init__(self, setup: Setup, device: str, threads: int) -> None:
        """``threads`` is the number of CPU threads to compute on."""
        self._setup = setup
        self._device = device
        self._threads = threads

    def attempt(self, task: Task) -> Encoded | Failed:
        """Do a task. Errors are returned, since not every error survives the way to another process."""
        try:
            return self._encode(task)
        except Exception as error:  # noqa: BLE001 - the writer raises it
            kind = type(error) if isinstance(error, M3Error) else None
            message = str(error) if kind else f"{type(error).__name__}: {error}"
            return Failed(kind, message, traceback.format_exc())

    def _encode(self, task: Task) -> Encoded:
        group = Encoding(self._codecs, self._setup.slot_bytes, task.ids, task.references)
        pipeline, clock = self._opened
        before = dict(clock.seconds)
        pipeline.compute(group, embed=task.embed, read=task.read)
        return Encoded(
            group.blocks.numpy() if task.read else None,
            group.vectors if task.embed else None,
            {name: clock.seconds[name] - before[name] for name in _PHASES},
        )

    @cached_property
    def _config(self) -> Config:
        config = self._setup.config
        return config.model_copy(update={"model": config.model.model_copy(update={"device": self._device})})

    @cached_property
    def _codecs(self) -> BankCodecs:
        manifest = Manifest.from_bytes(self._setup.manifest, self._config.bank)
        with TemporaryDirectory(prefix="m3-") as folder:
            for name, content in self._setup.codecs.items():
                Path(folder, name).write_bytes(content)
            return BankCodecs(Path(folder), manifest, partial(assembly.load_codec, self._config))

    @cached_property
    def _opened(self) -> tuple[Pipeline, Clock]:
        config, manifest, clock = self._config, self._codecs.manifest, Clock()
        torch.set_num_threads(self._threads)
        device = assembly.device(config)
        adapter = assembly.open_adapter(config, device)
        adapter.check(manifest, config.bank)
        embedder = assembly.open_embedder(config, device)
        manifest.check_embedder(embedder=embedder.fingerprint, name=config.embedder.path, where=config.bank)
        parallel = device.type != "cpu"
        return Pipeline(adapter, embedder, clock, batch_size=config.memory.batch_size, parallel=parallel), clock
