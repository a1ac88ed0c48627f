"""Construction from a configuration: the parts of a runtime or a writer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from m3runtime.bank.bank import Bank, OpenHome
from m3runtime.bank.index import LEXICAL, BankIndex
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs import Codec
from m3runtime.config.schema import Config, TierConfig
from m3runtime.device.resolve import resolve
from m3runtime.errors import BankMismatchError, CodecError, ConfigError
from m3runtime.memory.spec import MemorySpec
from m3runtime.plugins.construction import construct
from m3runtime.plugins.loading import available, load
from m3runtime.plugins.messages import one_line
from m3runtime.retrieval.bm25.index import Bm25Index
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.index import Index
from m3runtime.retrieval.lexical import LexicalIndex
from m3runtime.retrieval.reranker import Reranker
from m3runtime.storage import opening
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.defaults import default_tiers
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier

if TYPE_CHECKING:
    import torch

    from m3runtime.adapters.base import Adapter


def device(config: Config) -> "torch.device":
    """The device that ``model.device`` names: where the model runs and memories are decoded.

    Resolve it once and hand it on. Raises `ConfigError` if this machine does not have it.
    """
    return resolve(config.model.device)


def open_home(config: Config, *, read_only: bool = False) -> OpenHome:
    """The function that opens the home of the configured bank, or makes one."""
    _kinds(config.tiers or (opening.HOME,))
    return opening.open_home(config, read_only=read_only)


def open_bank(config: Config, *, read_only: bool = False) -> Bank:
    """Open the configured bank; see `Bank.open` for the errors."""
    return Bank.open(config.bank, open_home(config, read_only=read_only), partial(load_codec, config))


def load_codec(config: Config, manifest: Manifest, path: Path) -> Codec:
    """Load the codec that a manifest names from its file.

    A manifest cannot make us import what it likes: an import path has to be the configured one. Raises `CodecError`,
    `PluginError`, and `BankMismatchError` for a codec that is neither a plug-in nor configured.
    """
    name = manifest.codec_kind
    if name != config.codec.kind and name not in available("codecs"):
        raise BankMismatchError(
            f"{path.parent}: the bank's codec is {one_line(name)}, which is no plug-in; if you trust it, "
            "name it as `codec.kind` of the configuration"
        )
    kind: type[Codec] = load("codecs", name)
    return kind.load(path, manifest.spec)


def open_tiers(
    config: Config,
    slot_bytes: int,
    device: "torch.device",
    *,
    identity: Callable[[], str] = str,
    persistent: bool = False,
) -> list[CachingTier]:
    """The caching tiers, fastest first; with ``persistent`` only those that may hold blocks when they are opened.

    A tier whose constructor has a parameter ``device`` gets this one, and one that has ``bank`` gets the bank's
    ``identity``: see `Bank.identity`. Raises `ConfigError`, also for a tier whose
    options name another device.
    """
    configured = config.tiers or default_tiers(device)
    opened: list[CachingTier] = []
    with ExitStack() as undo:
        for place, kind in enumerate(_kinds(configured)[:-1]):
            if issubclass(kind, Persistent) or not persistent:
                where, options = f"tiers.{place}", configured[place].options
                given: dict[str, object] = {"slot_bytes": slot_bytes}
                if "bank" in signature(kind).parameters:
                    given["bank"] = identity()
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


def open_reranker(config: Config, device: "torch.device") -> Reranker | None:
    """Load the reranker of ``recall.reranker`` on ``device``, or on the CPU if its options say so; None without one."""
    chosen = config.recall.reranker
    if chosen is None:
        return None
    kind, options, where = load("rerankers", chosen.kind), chosen.options, "recall.reranker"
    if "device" in signature(kind).parameters and options.get("device") != "cpu":
        options["device"] = str(_same(options.get("device", "auto"), device, f"{where}.device"))
    return construct(kind, options, where, path=chosen.path)  # type: ignore[no-any-return]


def open_adapter(config: Config, device: "torch.device | None" = None) -> "Adapter":
    """Load the model on ``device`` (default: the configuration's). Raises `ConfigError` if there is none."""
    kind: type[Adapter] = load("adapters", config.model.adapter)
    return kind.open(config.model, config.memory, device or resolve(config.model.device))


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


def bank_index(config: Config, bank: Bank) -> BankIndex[Index]:
    """The upkeep of the bank's index of vectors."""
    make = partial(make_index, config, bank.manifest.dim)
    return BankIndex(bank, make, kind=config.index.kind, dtype=config.index.dtype)


def lexical_index(bank: Bank) -> BankIndex[LexicalIndex]:
    """The upkeep of the bank's index of words."""
    return BankIndex(bank, Bm25Index, kind="bm25", dtype="words 1", name=LEXICAL)


def update_indexes(config: Config, bank: Bank) -> None:
    """Bring the files of the indexes that the configuration needs in line with the home; see `BankIndex.update`."""
    bank_index(config, bank).update()
    if config.recall.search != "dense":
        lexical_index(bank).update()


def rebuild_indexes(config: Config, bank: Bank) -> None:
    """Make these files anew from the home, and remove others, so that no byte of what was forgotten stays."""
    bank_index(config, bank).rebuild()
    if config.recall.search != "dense":
        lexical_index(bank).rebuild()
    else:
        lexical_index(bank).drop()


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
