"""`Bank`: a home, its codecs and its manifest.

::

    bank/
      home/               blocks, references, embeddings, manifest: the only truth
      codec.safetensors   the codec; the manifest has its fingerprint. For others see `m3runtime.bank.codecs`
      bias.safetensors    directions for attention with plain slots, if they were calibrated: `m3runtime.bank.bias`
      index               nearest-neighbour index, a cache of the home's embeddings: see `m3runtime.bank.index`
      lexical             index of words, if ``recall.search`` needs one: a cache of the home's texts
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from m3runtime.bank.codecs import CODEC, BankCodecs, LoadCodec, new_codec_file, slot_bytes
from m3runtime.bank.identity import identify, identity_of
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs import Codec
from m3runtime.errors import BankError, BankMismatchError, BankMissingError, CodecError
from m3runtime.memory.block import HEADER_BYTES, BlockStamp, Ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.storage.files import sync_folder
from m3runtime.storage.home import Home

HOME = "home"
UNFINISHED = "home.unfinished"

OpenHome = Callable[..., Home]
"""Opens the home in the folder ``path``, or makes one with slots of ``slot_bytes``; both are given by name."""


class Bank:
    """A durable collection of memories. As thread-safe as its home; `close` closes the home."""

    def __init__(self, path: Path, home: Home, codecs: BankCodecs) -> None:
        self.path = path
        self.home = home
        self.codecs = codecs

    @property
    def manifest(self) -> Manifest:
        """The manifest."""
        return self.codecs.manifest

    @property
    def codec(self) -> Codec:
        """The newest codec, which encodes new blocks."""
        return self.codecs.newest

    @property
    def stamp(self) -> BlockStamp:
        """The stamp of blocks of the newest codec."""
        return self.manifest.stamp

    def identity(self) -> str:
        """The identity that no other bank has; the fingerprint of its blocks if it has none and cannot get one.

        A copy of a bank has the same.
        """
        return identity_of(self.home, self.stamp.bank)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot for blocks of the newest codec. The slots of the home hold blocks of all codecs."""
        return min(self.home.slot_bytes, slot_bytes(self.codec))

    @classmethod
    def create(cls, path: Path, home: OpenHome, manifest: Manifest, codec: Codec, slot: int = 0) -> "Bank":
        """Make a bank in the folder ``path``. The remains of an interrupted `create` are removed first.

        ``slot`` is the least bytes of a slot, for codecs to come. The home is built under another name and renamed when
        it has its manifest, so a bank is whole or absent. Raises `BankError` if a bank exists already.
        """
        if cls.exists(path, home):
            raise BankError(f"{path}: there is a bank already")
        if (path / UNFINISHED).exists():
            try:
                shutil.rmtree(path / UNFINISHED)
            except OSError as error:  # a link, for example: its target is not ours
                raise BankError(f"{path / UNFINISHED} cannot be made anew: {error}; remove it") from error
        with home(path=path / UNFINISHED, slot_bytes=max(slot, slot_bytes(codec))) as made:
            codec.save(path / CODEC)
            identify(made)
            manifest.write(made)
        (path / UNFINISHED).rename(path / HOME)
        sync_folder(path)  # or the new name might not outlive a power cut
        return cls(path, home(path=path / HOME), BankCodecs(path, manifest, lambda *_: codec))

    @classmethod
    def open(cls, path: Path, home: OpenHome, load_codec: LoadCodec) -> "Bank":
        """Open the bank in the folder ``path``.

        Raises `BankMissingError`, `BankFormatError`, `BankError` if the home or the codec file cannot be read, and
        `BankMismatchError` if that file is not the one that the manifest names.
        """
        opened = home(path=home_folder(path))
        try:
            return cls.over(path, opened, Manifest.read(path, opened), load_codec)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def over(cls, path: Path, home: Home, manifest: Manifest, load_codec: LoadCodec) -> "Bank":
        """The bank of an open home and its manifest. Raises the same errors as `open` about the codec."""
        codecs = BankCodecs(path, manifest, load_codec, partial(Manifest.read, path, home))
        if not max(map(slot_bytes, codecs.all)) <= home.slot_bytes <= _most_bytes(manifest.spec):
            raise BankMismatchError(
                f"{path}: slots of {home.slot_bytes} bytes do not fit the codec; restore the bank from a copy, "
                "or write it anew"
            )
        return cls(path, home, codecs)

    @staticmethod
    def exists(path: Path, home: OpenHome) -> bool:
        """Is there a bank at ``path``?

        Raises `BankError` if something else is in the place of its home: that is not ours to remove.
        """
        folder = path / HOME
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        try:
            with home(path=folder) as opened:
                if Manifest.is_in(path, opened):
                    return True
        except BankMissingError:
            pass
        raise BankError(f"{folder} is not the home of a bank; set `bank` to another folder")

    def blocks(self, ids: Ids, memories: MemoryTensors) -> Tensor:
        """Encode and seal memories: ``uint8[n, slot_bytes]`` on the CPU.

        All n are encoded at once on the device they lie on: the caller bounds n.
        """
        return self.codecs.seal(ids, memories, self.home.slot_bytes)

    def decode(self, blocks: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Decode verified blocks, ``uint8[n, slot_bytes]``, on the device they lie on, to memories of ``dtype``.

        All n are decoded in one call, which takes n times the size of a decoded memory in float32 and in ``dtype``,
        besides the codec's own work: the caller bounds n. Raises `BlockError` for a payload that no memory has.
        """
        return self.codecs.decode(blocks, dtype)

    def adopt(self, manifest: Manifest, *new: Codec) -> None:
        """Store another manifest of this bank and the codecs that are ``new`` in it, and use them from now on.

        It is stored as a whole or not at all. Raises `BankError` if the file of a codec cannot be written.
        """
        before = {codec.fingerprint for codec in self.codecs.all}
        for codec in new:
            if codec.fingerprint not in before:
                try:
                    codec.save(new_codec_file(self.path, codec.fingerprint))
                except CodecError as error:
                    raise BankError(str(error)) from error
        manifest.write(self.home)
        self.codecs.renew(manifest, *new)
        self.codecs.remove_strays()

    def close(self) -> None:
        """Close the home."""
        self.home.close()


def _most_bytes(spec: MemorySpec) -> int:
    """More than any block of a memory has: eight bytes for each number. A slot may have been a wider codec's."""
    return HEADER_BYTES + 16 * spec.tokens * spec.vectors_per_token * spec.head_dim


def home_folder(path: Path) -> Path:
    """The folder of the home of the bank at ``path``. Raises `BankMissingError`."""
    if not (path / HOME).exists():
        raise BankMissingError(f"there is no bank at {path}; make one with `m3 write`")
    return path / HOME
