"""`BankCodecs`: the codecs of a bank's blocks. The newest encodes, and each block names the one that decodes it.

::

    codec.safetensors                  the codec that the bank was made with
    codec-<16 hex digits>.safetensors  a later one, by its fingerprint
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3runtime.bank.manifest import Manifest, OtherCodec
from m3runtime.codecs import Codec
from m3runtime.codecs.limit import ErrorLimit
from m3runtime.errors import BankError, BankMismatchError, BlockError, CodecError, PluginError, TierError
from m3runtime.memory import block
from m3runtime.memory.block import BlockStamp, Ids
from m3runtime.memory.tensors import MemoryTensors

log = logging.getLogger("m3runtime")

CODEC = "codec.safetensors"

LoadCodec = Callable[[Manifest, Path], Codec]
"""Loads the newest codec of a manifest from a file. Raises `CodecError`, `PluginError` or `BankError`."""


@dataclass(frozen=True)
class _Loaded:
    """Replaced as a whole, so that a thread sees all of it or nothing."""

    manifest: Manifest
    newest: Codec
    by_name: Mapping[bytes, tuple[Codec, BlockStamp]]
    """Codec and stamp by the 8 bytes that a block's header has."""
    limit: ErrorLimit | None
    """The most that the newest codec may lose of a memory; None if it encodes all."""


class BankCodecs:
    """All codecs of one bank, loaded. It is `m3runtime.memory.block.Stamps`. Thread-safe."""

    def __init__(
        self, path: Path, manifest: Manifest, load: LoadCodec, current: Callable[[], Manifest] | None = None
    ) -> None:
        """``path`` is the bank's folder.

        ``current`` reads the manifest anew: it is called for a block whose codec is not known, since another process
        may have trained one. Raises `BankError` if a codec's file cannot be read, and `BankMismatchError` if one is not
        the codec that the manifest names.
        """
        self._path, self._load, self._current = path, load, current
        self._renewing = threading.Lock()
        self._loaded = self._all(manifest, {})

    @property
    def manifest(self) -> Manifest:
        """The manifest that these codecs are of."""
        return self._loaded.manifest

    @property
    def newest(self) -> Codec:
        """The codec of new blocks."""
        return self._loaded.newest

    @property
    def all(self) -> tuple[Codec, ...]:
        """Every codec, the newest first."""
        return tuple(codec for codec, _ in self._loaded.by_name.values())

    def renew(self, manifest: Manifest, *new: Codec) -> None:
        """Take the codecs of another manifest of this bank: loaded ones, ``new`` ones, or from their files.

        Raises what the constructor raises.
        """
        known = {codec.fingerprint: codec for codec in (*self.all, *new)}
        self._loaded = self._all(manifest, known)

    def bank_of(self, codec: bytes) -> bytes | None:
        """See `m3runtime.memory.block.Stamps.bank_of`."""
        known = self._find(codec)
        return None if known is None else known[1].bank_bytes

    def of(self, header: np.void) -> Codec:
        """The codec of a block. Raises `BlockError` if the bank does not have it."""
        known = self._find(bytes(header["codec"]))
        if known is None:
            raise BlockError(f"block {header['id']}: was encoded by another codec")
        return known[0]

    def seal(self, ids: Ids, memories: MemoryTensors, slot_bytes: int) -> Tensor:
        """Encode and seal memories, ``uint8[n, slot_bytes]`` on the CPU: by the newest codec, or as its limit says."""
        loaded, n = self._loaded, len(ids)
        out = torch.zeros(n, slot_bytes, dtype=torch.uint8)
        payloads = loaded.newest.encode(memories)
        spoilt = self._spoilt(loaded, payloads, memories)
        rows = [row for row in range(n) if row not in spoilt]
        _seal(out, rows, payloads[rows] if spoilt else payloads, ids, memories, loaded.newest, loaded.manifest.stamp)
        if spoilt:
            codec, stamp = loaded.by_name[_name(loaded.manifest.others[0])]
            _seal(out, spoilt, codec.encode(memories.rows(spoilt)), ids, memories, codec, stamp)
        return out

    def decode(self, blocks: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Decode checked blocks, ``uint8[n, slot]``, on their device: one call of each codec among them.

        Raises `BlockError` for a payload that no memory has.
        """
        heads = block.headers(blocks[:, : block.HEADER_BYTES].cpu().numpy())
        tokens = torch.from_numpy(heads["tokens"].astype(np.int64))
        names = np.ascontiguousarray(heads["codec"]).view("<u8")
        if not len(names):
            return self.newest.decode(blocks[:, block.HEADER_BYTES :], tokens, dtype)
        if (names == names[0]).all():
            return self.of(heads[0]).decode(blocks[:, block.HEADER_BYTES :], tokens, dtype)
        keys = values = None
        for name in np.unique(names):
            rows = np.flatnonzero(names == name)
            where = torch.from_numpy(rows).to(blocks.device)
            part = self.of(heads[rows[0]]).decode(blocks[where, block.HEADER_BYTES :], tokens[rows], dtype)
            if keys is None or values is None:
                _, layers, heads_of, _, dim = part.keys.shape
                shape = (len(blocks), layers, heads_of, int(tokens.max()), dim)
                keys, values = (x.new_zeros(shape) for x in (part.keys, part.values))
            for to, x in ((keys, part.keys), (values, part.values)):
                to[where, :, :, : x.shape[3]] = x
        assert keys is not None
        assert values is not None
        return MemoryTensors(keys, values, tokens)

    def files(self) -> Iterator[tuple[Path, Codec]]:
        """The file of each codec, the newest first."""
        return ((codec_file(self._path, codec.fingerprint), codec) for codec in self.all)

    def remove_strays(self) -> None:
        """Remove the files of codecs that the bank no longer has, or did not come to have."""
        kept = {path for path, _ in self.files()}
        for path in self._path.glob("codec-*.safetensors"):
            if path not in kept:
                with suppress(OSError):  # harmless where it stays
                    path.unlink()

    def _find(self, name: bytes) -> tuple[Codec, BlockStamp] | None:
        """Codec and stamp by the name in a block's header, or None."""
        known = self._loaded.by_name.get(name)
        if known is not None or self._current is None:
            return known
        with self._renewing:
            try:
                manifest = self._current()
                if manifest != self.manifest:
                    self.renew(manifest)
            except (BankError, TierError, PluginError) as error:
                log.warning("%s: the codec of a block is new, and cannot be read: %s", self._path, error)
            return self._loaded.by_name.get(name)

    def _all(self, manifest: Manifest, known: Mapping[str, Codec]) -> _Loaded:
        by_name: dict[bytes, tuple[Codec, BlockStamp]] = {}
        named = [OtherCodec(manifest.codec_kind, manifest.codec_options, manifest.codec), *manifest.others]
        for one in named:
            codec = known.get(one.fingerprint) or self._read(manifest, one)
            by_name[_name(one)] = codec, manifest.stamp_of(one.kind, one.fingerprint)
        if len(by_name) < len(named):
            raise BankError(f"{self._path}: its manifest names a codec twice; restore the bank from a copy")
        newest = by_name[_name(named[0])][0]
        if not manifest.typical_errors:
            return _Loaded(manifest, newest, by_name, None)
        if not manifest.others or len(manifest.typical_errors) != 2 * len(manifest.spec.layers):
            raise BankError(f"{self._path}: the limit of its codec's errors cannot be read; restore it from a copy")
        return _Loaded(manifest, newest, by_name, ErrorLimit(manifest.typical_errors))

    def _read(self, manifest: Manifest, one: OtherCodec) -> Codec:
        path = codec_file(self._path, one.fingerprint)
        try:
            named = replace(manifest, codec_kind=one.kind, codec_options=one.options, codec=one.fingerprint)
            codec = self._load(named, path)
        except CodecError as error:
            raise BankError(f"{error}; restore the file, or write the bank anew") from error
        if codec.fingerprint != one.fingerprint:
            raise BankMismatchError(
                f"{path}: not the codec that the bank was written with; restore the file, or write the bank anew"
            )
        return codec

    @staticmethod
    def _spoilt(loaded: _Loaded, payloads: Tensor, memories: MemoryTensors) -> list[int]:
        """The rows of which the newest codec loses more than it may."""
        if loaded.limit is None:
            return []
        decoded = loaded.newest.decode(payloads.to(memories.keys.device), memories.tokens, torch.float32)
        return loaded.limit.exceeded(memories, decoded)


def codec_file(path: Path, fingerprint: str) -> Path:
    """The file of a codec in the bank's folder ``path``."""
    own = path / f"codec-{fingerprint[:16]}.safetensors"
    return own if own.exists() else path / CODEC


def new_codec_file(path: Path, fingerprint: str) -> Path:
    """The file to make for a later codec of the bank in the folder ``path``."""
    return path / f"codec-{fingerprint[:16]}.safetensors"


def slot_bytes(codec: Codec) -> int:
    """Bytes of the block of a full reference, which a slot holds."""
    return block.HEADER_BYTES + codec.payload_bytes(codec.spec.tokens)


def _name(one: OtherCodec) -> bytes:
    return bytes.fromhex(one.fingerprint)[:8]


def _seal(
    out: Tensor,
    rows: list[int],
    payloads: Tensor,
    ids: Ids,
    memories: MemoryTensors,
    codec: Codec,
    stamp: BlockStamp,
) -> None:
    """Put payloads into these rows of ``out``, and seal them."""
    out[rows, block.HEADER_BYTES : block.HEADER_BYTES + payloads.shape[1]] = payloads
    slots = out.numpy()
    for row in rows:
        tokens = int(memories.tokens[row])
        size = codec.payload_bytes(tokens)
        block.seal(slots[row], id=int(ids[row]), tokens=tokens, payload_bytes=size, stamp=stamp)
