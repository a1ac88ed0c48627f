"""How a connector opens a bank: to recall from it, or, in another process, only to read memories that were recalled."""

from collections.abc import Sequence
from contextlib import ExitStack

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.retrieval.retriever import Retriever
from m3runtime.runtime import Runtime
from m3runtime.storage.hierarchy import Hierarchy


class _NoEmbedder(Embedder):
    """A worker embeds nothing: the scheduler has recalled."""

    fingerprint = ""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    @property
    def dim(self) -> int:
        return self._dim

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        raise ConfigError(f"{len(texts)} texts to embed, in a process that only reads memories")

    embed_queries = embed_references


def open_reader(config: Config) -> Runtime:
    """The bank with its tiers, without embedder and index: for `Runtime.fetch` alone. Raises as `Runtime.open` does."""
    recall = config.recall.model_copy(update={"refresh": None, "cold_start": False, "trace": None})
    metrics = config.metrics.model_copy(update={"port": None})  # the scheduler's
    config = config.model_copy(update={"recall": recall, "metrics": metrics})
    with ExitStack() as undo:
        bank = assembly.open_bank(config, read_only=True)
        undo.callback(bank.close)
        device = assembly.device(config)
        tiers = assembly.open_tiers(config, bank.slot_bytes, device, identity=bank.identity)
        for tier in tiers:
            undo.callback(tier.close)
        dim = bank.manifest.dim
        retriever = Retriever(_NoEmbedder(dim), assembly.make_index(config, dim), memories=config.recall.memories)
        runtime = Runtime(config, bank, Hierarchy(tiers, bank.home, bank.codecs, device), retriever, device)
        undo.pop_all()
    return runtime


def on_cpu(config: Config) -> Config:
    """The same configuration, but everything is computed on the CPU."""
    return config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
