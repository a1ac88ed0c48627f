"""Builds from a configuration what a runtime or a writer is made of."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from inspect import signature
from typing import TYPE_CHECKING

import numpy as np

from m3runtime.bank import records
from m3runtime.bank.bank import INDEX, Bank, LoadCodec, OpenHome, as_ids
from m3runtime.codecs import Codec
from m3runtime.config.schema import Config, TierConfig
from m3runtime.device.resolve import resolve
from m3runtime.errors import CodecError, ConfigError, IndexFileError
from m3runtime.memory.spec import MemorySpec
from m3runtime.plugins.loading import construct, load
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.index import Index
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.defaults import HOME, default_tiers
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier

if TYPE_CHECKING:
    import torch

    from m3runtime.adapters.base import Adapter

log = logging.getLogger("m3runtime")


def device(config: Config) -> "torch.device":
    """The device that ``model.device`` names: where the model runs and memories are decoded.

    Resolve it once and hand it on. Raises `ConfigError` if this machine does not have it.
    """
    return resolve(config.model.device)


def open_home(config: Config, *, read_only: bool = False) -> OpenHome:
    """A callable that opens the bank's home."""
    configured = config.tiers or (HOME,)
    return OpenHome(_kinds(configured)[-1], configured[-1].options, f"tiers.{len(configured) - 1}", read_only=read_only)


def open_bank(config: Config, *, read_only: bool = False) -> Bank:
    """Open the bank; see `Bank.open`."""
    return Bank.open(config.bank, open_home(config, read_only=read_only), LoadCodec(config.codec.kind))


def open_tiers(
    config: Config, slot_bytes: int, device: "torch.device", *, persistent: bool = False
) -> list[CachingTier]:
    """The caching tiers, fastest first; with ``persistent`` only those that may hold blocks when they are opened.

    A tier whose constructor has a parameter ``device`` gets this one. Raises `ConfigError`, also for a tier whose
    options name another device.
    """
    configured = config.tiers or default_tiers(device)
    opened: list[CachingTier] = []
    with ExitStack() as undo:
        for place, kind in enumerate(_kinds(configured)[:-1]):
            if issubclass(kind, Persistent) or not persistent:
                where, options = f"tiers.{place}", configured[place].options
                given: dict[str, object] = {"slot_bytes": slot_bytes}
                if "device" in signature(kind).parameters:
                    given["device"] = _same(options.pop("device", "auto"), device, f"{where}.device")
                opened.append(construct(kind, options, where, **given))
                undo.callback(opened[-1].close)
        undo.pop_all()
    return opened


def open_embedder(config: Config, device: "torch.device | None" = None) -> Embedder:
    """Load the embedder on ``device`` (default: the configuration's), or on the CPU if its options say so."""
    kind, options = load("embedders", config.embedder.kind), config.embedder.options
    if "device" in signature(kind).parameters and options.get("device") != "cpu":
        device = device or resolve(config.model.device)
        options["device"] = str(_same(options.get("device", "auto"), device, "embedder.device"))
    return construct(kind, options, "embedder", path=config.embedder.path)  # type: ignore[no-any-return]


def open_adapter(config: Config) -> "Adapter":
    """Load the model."""
    kind: type[Adapter] = load("adapters", config.model.adapter)
    return kind.open(config.model, config.memory)


def make_index(config: Config, dim: int) -> Index:
    """An empty index. Raises `ConfigError` for options that make none."""
    options = {"dtype": config.index.dtype, **config.index.options}
    return construct(load("indexes", config.index.kind), options, "index", dim=dim)  # type: ignore[no-any-return]


def make_codec(config: Config, spec: MemorySpec) -> Codec:
    """The configured codec, untrained if it learns. Raises `ConfigError` for options that do not fit the spec."""
    kind: type[Codec] = load("codecs", config.codec.kind)
    try:
        return construct(kind, config.codec.options, "codec", spec=spec)
    except CodecError as error:
        raise ConfigError(f"codec.{error}") from error


def open_index(config: Config, bank: Bank, *, every: bool = False) -> tuple[Index, bool]:
    """The bank's index, loaded or rebuilt and in line with the home, and whether its file should be written anew.

    It finds what is recalled: without ``recall.cold_start`` no cold reference. For `save_index` it is to have ``every``
    one, though a file that lacks some does no harm.
    """
    rebuilt = False
    try:
        index = load_index(config, bank)
    except IndexFileError as error:
        log.info("the index is rebuilt: %s", error)
        index, rebuilt = make_index(config, bank.manifest.dim), True
    added, removed = catch_up(index, bank, cold=every or config.recall.cold_start)
    return index, rebuilt or added + removed > 0


def catch_up(index: Index, bank: Bank, *, cold: bool = True) -> tuple[int, int]:
    """Bring an index in line with the home, the only truth. Returns how many ids were added and removed.

    Without ``cold`` it holds nothing that is cold, which does not count as removed: its file may well have that.

    Memories whose embedding is damaged or missing cannot be found: they are set apart.
    """
    hidden = as_ids([]) if cold else bank.home.cold()
    there, wanted = index.ids(), bank.home.ids()
    gone, missing = np.setdiff1d(there, wanted), np.setdiff1d(np.setdiff1d(wanted, there), hidden)
    index.remove(np.concatenate([gone, np.intersect1d(there, hidden)]))
    damaged: dict[int, str] = {}
    for ids, vectors in records.embeddings(bank.home, missing, bank.manifest.dim, damaged):
        index.add(ids, vectors)
    records.set_apart(bank.home, damaged)
    return len(missing) - len(damaged), len(gone)


def load_index(config: Config, bank: Bank) -> Index:
    """The bank's index as its file has it. Raises `IndexFileError` if that cannot be used."""
    index = make_index(config, bank.manifest.dim)
    index.load(bank.path / INDEX, _stamp(bank))
    return index


def save_index(index: Index, bank: Bank) -> None:
    """Keep the index for the next `open_index`."""
    index.save(bank.path / INDEX, _stamp(bank))


def _stamp(bank: Bank) -> str:
    return f"{bank.stamp.bank}-{bank.manifest.embedder}"


def _kinds(configured: Sequence[TierConfig]) -> list[type]:
    """The classes of tiers. Raises `ConfigError` unless the last one, and no other, is a home."""
    kinds = [load("tiers", tier.kind) for tier in configured]
    for place, kind in enumerate(kinds):
        last = place == len(kinds) - 1
        if issubclass(kind, Home) != last:
            name = configured[place].kind
            raise ConfigError(
                f"tiers: the last one must be a home, and {name} is none"
                if last
                else f"tiers: {name} is a home and must come last"
            )
    return kinds


def _same(name: object, device: "torch.device", key: str) -> "torch.device":
    """The runtime's device. Raises `ConfigError` if the option ``key`` names another one."""
    if name != "auto" and (found := resolve(str(name), key)) != device:
        raise ConfigError(f"{key} is {found}, but the runtime computes on {device}; remove it, or set model.device")
    return device
