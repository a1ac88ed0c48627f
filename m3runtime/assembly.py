"""Construction from a configuration: the parts of a runtime or a writer."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from m3runtime.bank.bank import Bank, OpenHome
from m3runtime.bank.index import BankIndex
from m3runtime.bank.manifest import Manifest, one_line
from m3runtime.codecs import Codec
from m3runtime.config.schema import Config, default_tiers
from m3runtime.errors import BankMismatchError, CodecError, ConfigError
from m3runtime.memory.spec import MemorySpec
from m3runtime.plugins.loading import available, construct, load
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.index import Index
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier

if TYPE_CHECKING:
    import torch

    from m3runtime.adapters.base import Adapter


def tiers(config: Config) -> list[tuple[type, dict[str, object]]]:
    """The classes and options of the configured tiers, or of those that fit the machine; the home is last."""
    configured = config.tiers or default_tiers()
    found = [(load("tiers", tier.kind), tier.options) for tier in configured]
    for place, (kind, _) in enumerate(found):
        last = place == len(found) - 1
        if issubclass(kind, Home) != last:
            name = configured[place].kind
            raise ConfigError(
                f"tiers: the last one must be a home, and {name} is none"
                if last
                else f"tiers: {name} is a home and must come last"
            )
    return found


def open_home(config: Config, *, read_only: bool = False) -> OpenHome:
    """The function that opens the home of the configured bank, or makes one."""
    found = tiers(config)
    kind, options = found[-1]
    where = f"tiers.{len(found) - 1}"
    return partial(construct, kind, options, where, slot_bytes=None, read_only=read_only)


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


def open_tiers(config: Config, slot_bytes: int, *, persistent: bool = False) -> list[CachingTier]:
    """The caching tiers, fastest first; with ``persistent`` only those that may hold something when they are opened."""
    opened: list[CachingTier] = []
    try:
        for place, (kind, options) in enumerate(tiers(config)[:-1]):
            if issubclass(kind, Persistent) or not persistent:
                opened.append(construct(kind, options, f"tiers.{place}", slot_bytes=slot_bytes))
    except BaseException:
        for tier in opened:
            tier.close()
        raise
    return opened


def open_embedder(config: Config) -> Embedder:
    """Load the embedder."""
    kind = load("embedders", config.embedder.kind)
    return construct(kind, config.embedder.options, "embedder", path=config.embedder.path)  # type: ignore[no-any-return]


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


def bank_index(config: Config, bank: Bank) -> BankIndex:
    """The upkeep of the bank's index."""
    make = partial(make_index, config, bank.manifest.dim)
    return BankIndex(bank, make, kind=config.index.kind, dtype=config.index.dtype)


def device(config: Config) -> "torch.device":
    """Where the model runs and memories are decoded."""
    import torch

    if config.model.device != "auto":
        return torch.device(config.model.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
