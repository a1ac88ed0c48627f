"""Trained codecs in files of their own: of any kind, or the one that the configuration names."""

from pathlib import Path

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.codecs import Codec, files
from m3runtime.config.schema import Config
from m3runtime.errors import BankMismatchError, CodecError, ConfigError, PluginError
from m3runtime.memory.spec import MemorySpec
from m3runtime.plugins.loading import available, load
from m3runtime.plugins.messages import difference, one_line


def load_any(path: Path) -> Codec:
    """The codec of a file, of the kind and spec that the file states.

    Raises `CodecError` that names the file, and `PluginError` if no plug-in is called as the kind: a file cannot make
    us import what it likes.
    """
    file = files.read(path)
    if file.kind not in (known := available("codecs")):
        raise PluginError(
            f"{path}: its codec is of kind {one_line(file.kind)}, which no plug-in has; known are {', '.join(known)}"
        )
    codec: type[Codec] = load("codecs", file.kind)
    return codec.load(path, file.spec)


def configured(config: Config, spec: MemorySpec) -> Codec:
    """The codec of ``codec.file``, or else the configured one, untrained if it learns.

    Without configured options, the file's own hold. Raises `ConfigError` that names the file, unless it can be read and
    is of the kind and options that are configured, and of this spec.
    """
    path = config.codec.file
    if path is None:
        return assembly.make_codec(config, spec)
    kind: type[Codec] = load("codecs", config.codec.kind)
    try:
        codec = kind.load(path, spec)
    except CodecError as error:
        raise ConfigError(f"codec.file: {error}; make one with `m3 codec fit`, or leave `codec.file` out") from error
    if config.codec.options and (differing := difference(codec.options, assembly.make_codec(config, spec).options)):
        raise ConfigError(f"codec.file: {path}: its options are not those of `codec`: {differing}")
    return codec


def check_bank(config: Config, bank: Bank) -> None:
    """Raise `BankMismatchError` unless the bank's codec is the configured one; see `configured`.

    With ``codec.file`` it must be the very codec of that file.
    """
    codec = configured(config, bank.manifest.spec)
    bank.manifest.check_codec(kind=config.codec.kind, options=codec.options, where=bank.path)
    if config.codec.file is not None and codec.fingerprint != bank.manifest.codec:
        raise BankMismatchError(
            f"{bank.path}: the bank's codec ({bank.manifest.codec[:8]}) is not that of {config.codec.file} "
            f"({codec.fingerprint[:8]}); leave `codec.file` out, or encode the bank by it with `m3 codec refit`"
        )
