"""A bank: a home, the trained codec beside it, and the manifest that says what they belong to.

::

    bank/
      home/               blocks, references, embeddings, manifest: the only truth
      codec.safetensors   the trained codec, named by fingerprint in the manifest
      index               nearest-neighbour index, a cache of the home's embeddings
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3runtime.codecs import Codec
from m3runtime.errors import (
    BankError,
    BankFormatError,
    BankMismatchError,
    BankMissingError,
    CodecError,
    ConfigError,
    InputError,
    RecordError,
)
from m3runtime.memory import block
from m3runtime.memory.block import BlockStamp, Ids
from m3runtime.memory.spec import MemorySpec, canonical_json, fingerprint
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.plugins.loading import available, construct, load
from m3runtime.storage.files import sync_folder
from m3runtime.storage.home import Home

FORMAT = 1
HOME, CODEC, INDEX = "home", "codec.safetensors", "index"
UNFINISHED = "home.unfinished"
_MANIFEST = "manifest"
_LARGEST_DIM = 1 << 20
_RESTORE = "restore the bank from a copy, or write it anew"
_MEND = "configure it as it was, or set `bank` to another folder"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bank was made with. Banks with equal manifests hold blocks that are interchangeable."""

    model: str
    """Fingerprint of the model."""
    model_name: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    sink: str
    spec: MemorySpec
    codec_kind: str
    codec_options: Mapping[str, Any]
    codec: str
    """Fingerprint of the trained codec."""
    embedder: str
    """Fingerprint of the embedder."""
    embedder_name: str
    dim: int
    """Length of an embedding."""
    format: int = FORMAT

    @property
    def stamp(self) -> BlockStamp:
        """What every block carries: it depends on all that a block's meaning depends on, and on nothing else."""
        of = [self.format, self.model, self.tokenizer, self.sink, self.spec.to_json(), self.codec_kind, self.codec]
        return BlockStamp(bank=fingerprint(of), codec=self.codec)

    def fingerprints(self) -> dict[str, str]:
        """Of everything that the bank was made with, by name, for people."""

        def short(name: str) -> str:  # a hub name whole, and of a folder what tells it from others
            return "/".join(Path(name).parts[-2:])

        return {
            "model": f"{short(self.model_name)} ({self.model})",
            "tokenizer": self.tokenizer,
            "embedder": f"{short(self.embedder_name)} ({self.embedder})",
            "codec": f"{self.codec_kind} ({self.codec})",
            "bank": self.stamp.bank,
        }

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json({**asdict(self), "spec": self.spec.to_json()}).encode()

    @classmethod
    def from_bytes(cls, value: bytes, where: Path) -> "Manifest":
        """Read `to_bytes`. Raises `BankFormatError` for another format version, `BankError` for anything else."""
        try:
            stated = json.loads(value)
            if stated["format"] != FORMAT:
                mend = "install a newer m3runtime" if stated["format"] > FORMAT else "write the bank anew"
                raise BankFormatError(
                    f"{where}: bank of format {_short(stated['format'])}, this release reads {FORMAT}; {mend}"
                )
            manifest = cls(**{**stated, "spec": MemorySpec.from_json(stated["spec"])})
            manifest._check_types()
        except (ValueError, KeyError, TypeError, ConfigError, RecursionError) as error:
            raise BankError(f"{where}: the manifest cannot be read: {_short(error)}; {_RESTORE}") from error
        return manifest

    def _check_types(self) -> None:
        """Raise `ValueError` for a field that is not what it is declared as: what is read may be anything."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not (field.type if field.type in (str, int, MemorySpec) else dict):
                raise ValueError(f"{field.name} cannot be {value!r}")
            if isinstance(value, str):
                value.encode()  # a ValueError, where JSON escapes what is no character
        if not 1 <= self.dim <= _LARGEST_DIM:
            raise ValueError(f"dim cannot be {self.dim}")
        if not re.fullmatch("[0-9a-f]{32}", self.codec):
            raise ValueError(f"codec is no fingerprint: {self.codec!r}")

    def check_model(self, *, model: str, name: str, tokenizer: str, sink: str, spec: MemorySpec, where: Path) -> None:
        """Raise `BankMismatchError` that names what differs, unless the bank was written by this model."""
        if self.model != model:
            raise BankMismatchError(
                f"{where}: the bank was written by another model ({self.model_name}, {self.model[:8]}), "
                f"not {name} ({model[:8]}); {_MEND}"
            )
        if self.tokenizer != tokenizer:
            raise BankMismatchError(f"{where}: the bank was written with another tokenizer; {_MEND}")
        if self.sink != sink:
            raise BankMismatchError(f"{where}: the bank was written with the sink {self.sink!r}, not {sink!r}; {_MEND}")
        if difference := self.spec.difference(spec):
            raise BankMismatchError(f"{where}: the bank was written with another spec: {difference}; {_MEND}")

    def check_codec(self, *, kind: str, options: Mapping[str, Any], where: Path) -> None:
        """Raise `BankMismatchError` unless the bank's codec is of this kind and options."""
        ours = {"kind": self.codec_kind, **self.codec_options}
        theirs = {"kind": kind, **options}
        if ours != theirs:
            differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            raise BankMismatchError(
                f"{where}: the bank was written with another codec: "
                + ", ".join(f"{key} {ours.get(key)} against {theirs.get(key)}" for key in differing)
                + "; set `codec` as it was, or write into another bank"
            )

    def check_embedder(self, *, embedder: str, name: str, where: Path) -> None:
        """Raise `BankMismatchError` unless the bank's embeddings are this embedder's."""
        if self.embedder != embedder:
            raise BankMismatchError(
                f"{where}: the bank was written with another embedder ({self.embedder_name}), not {name}; {_MEND}"
            )


class Bank:
    """A home with its codec and manifest. Thread-safe as its home is."""

    def __init__(self, path: Path, home: Home, manifest: Manifest, codec: Codec) -> None:
        self.path = path
        self.home = home
        self.manifest = manifest
        self.codec = codec
        self.stamp = manifest.stamp

    @classmethod
    def create(cls, path: Path, home: "OpenHome", manifest: Manifest, codec: Codec) -> "Bank":
        """Make a bank; what an interrupted `create` left at ``path`` is made anew.

        The home comes to its place last and with the manifest in it, whole: a bank has one, or it is none.
        """
        slot = slot_bytes(codec)
        if cls.exists(path, home):
            raise BankError(f"{path}: there is a bank already")
        if (path / UNFINISHED).exists():
            try:
                shutil.rmtree(path / UNFINISHED)
            except OSError as error:  # a link, for example: what it leads to is not ours
                raise BankError(f"{path / UNFINISHED} cannot be made anew: {error}; remove it") from error
        with home(path=path / UNFINISHED, slot_bytes=slot) as made:
            codec.save(path / CODEC)
            made.set_meta(_MANIFEST, manifest.to_bytes())
        (path / UNFINISHED).rename(path / HOME)
        sync_folder(path)
        return cls(path, home(path=path / HOME), manifest, codec)

    @classmethod
    def open(cls, path: Path, home: "OpenHome", load_codec: "LoadCodec") -> "Bank":
        """Open a bank.

        Raises `BankMissingError`, `BankFormatError`, `BankError` if the home or the codec's file cannot be read, and
        `BankMismatchError` if that file is not the one that the manifest names.
        """
        if not (path / HOME).exists():
            raise BankMissingError(f"there is no bank at {path}; make one with `m3 write`")
        opened = home(path=path / HOME)
        try:
            return cls.over(path, opened, read_manifest(path, opened), load_codec)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def over(cls, path: Path, home: Home, manifest: Manifest, load_codec: "LoadCodec") -> "Bank":
        """The bank of a home that is open already, and of its manifest. Raises what `open` does of the codec."""
        try:
            codec = load_codec(manifest, path / CODEC)
        except CodecError as error:
            raise BankError(f"{error}; restore the file, or write the bank anew") from error
        if codec.fingerprint != manifest.codec:
            raise BankMismatchError(
                f"{path / CODEC}: not the codec that the bank was written with; restore the file, "
                "or write the bank anew"
            )
        if home.slot_bytes != slot_bytes(codec):
            raise BankMismatchError(f"{path}: slots of {home.slot_bytes} bytes do not fit the codec; {_RESTORE}")
        return cls(path, home, manifest, codec)

    @staticmethod
    def exists(path: Path, home: "OpenHome") -> bool:
        """Whether there is a bank at ``path``.

        Raises `BankError` if something else is where its home would be: that is somebody's, and not ours to remove.
        """
        folder = path / HOME
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        try:
            with home(path=folder) as opened:
                if _stored_manifest(path, opened) is not None:
                    return True
        except BankMissingError:
            pass
        raise BankError(f"{folder} is not the home of a bank; set `bank` to another folder")

    def blocks(self, ids: Ids, memories: MemoryTensors) -> Tensor:
        """Encode and seal: ``uint8[n, slot_bytes]`` on the CPU."""
        payloads = self.codec.encode(memories)
        out = torch.zeros(len(ids), self.home.slot_bytes, dtype=torch.uint8)
        out[:, block.HEADER_BYTES : block.HEADER_BYTES + payloads.shape[1]] = payloads
        rows = out.numpy()
        for row, (id, tokens) in enumerate(zip(ids.tolist(), memories.tokens.tolist(), strict=True)):
            size = self.codec.payload_bytes(tokens)
            block.seal(rows[row], id=id, tokens=tokens, payload_bytes=size, stamp=self.stamp)
        return out

    def decode(self, blocks: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """The memories of checked blocks, ``uint8[n, slot_bytes]``, in one call on the device they lie on."""
        heads = block.headers(blocks[:, : block.HEADER_BYTES].cpu().numpy())
        tokens = torch.from_numpy(heads["tokens"].astype(np.int64))
        return self.codec.decode(blocks[:, block.HEADER_BYTES :], tokens, dtype)

    def close(self) -> None:
        """Close the home."""
        self.home.close()


def read_manifest(path: Path, home: Home) -> Manifest:
    """The manifest of the bank at ``path``. Raises `BankMissingError`, `BankFormatError`, or `BankError` if damaged."""
    value = _stored_manifest(path, home)
    if value is None:
        raise BankMissingError(f"the bank at {path} was never finished; run `m3 write` again")
    return Manifest.from_bytes(value, path)


def _stored_manifest(path: Path, home: Home) -> bytes | None:
    try:
        return home.get_meta(_MANIFEST)
    except RecordError as error:
        raise BankError(f"{path}: the manifest cannot be read: {error}; {_RESTORE}") from error


def _short(what: object) -> str:
    """At most a line of what may be anything."""
    return " ".join(ascii(str(what)[:200])[1:-1].split())


def slot_bytes(codec: Codec) -> int:
    """Bytes of the block of a full reference."""
    return block.HEADER_BYTES + codec.payload_bytes(codec.spec.tokens)


class OpenHome:
    """Opens homes of one kind and configuration."""

    def __init__(self, kind: type[Home], options: Mapping[str, Any], where: str, *, read_only: bool = False) -> None:
        """``where`` is the key of the options in the configuration, for messages."""
        self.kind = kind
        self.options = dict(options)
        self.where = where
        self.read_only = read_only

    def __call__(self, *, path: Path, slot_bytes: int | None = None) -> Home:
        """Open the home in the folder ``path``, or make it if ``slot_bytes`` is given."""
        given = {"path": path, "slot_bytes": slot_bytes, "read_only": self.read_only}
        return construct(self.kind, self.options, self.where, **given)


class LoadCodec:
    """Loads the codec that a manifest names."""

    def __init__(self, configured: str) -> None:
        """``configured`` is the kind in the configuration, the only one that may be an import path."""
        self.configured = configured

    def __call__(self, manifest: Manifest, path: Path) -> Codec:
        """Load it. Raises `CodecError` or `PluginError`, and `BankError` for what the configuration does not name.

        A manifest cannot make us import what it likes.
        """
        name = manifest.codec_kind
        if name != self.configured and name not in available("codecs"):
            raise BankMismatchError(
                f"{path.parent}: the bank's codec is {_short(name)}, which is no plug-in; if you trust it, "
                "name it as `codec.kind` of the configuration"
            )
        kind: type[Codec] = load("codecs", name)
        return kind.load(path, manifest.spec)


def as_ids(ids: Sequence[int] | Ids) -> Ids:
    """Ids as the ``uint64`` array that tiers take. Raises `InputError` for a number that no id can be."""
    try:
        return np.array(list(ids), np.uint64)
    except OverflowError:
        raise InputError(f"there is no memory {max(ids, key=abs)}: ids lie between 0 and 2**64") from None
