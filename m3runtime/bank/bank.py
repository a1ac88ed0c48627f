"""`Bank`: a home, its trained codec and its manifest.

::

    bank/
      home/               blocks, references, embeddings, manifest: the only truth
      codec.safetensors   the trained codec; the manifest has its fingerprint
      index               nearest-neighbour index, a cache of the home's embeddings: see `m3runtime.bank.index`
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3runtime.bank.manifest import Manifest
from m3runtime.codecs import Codec
from m3runtime.errors import BankError, BankMismatchError, BankMissingError, CodecError
from m3runtime.memory import block
from m3runtime.memory.block import Ids
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.storage.files import sync_folder
from m3runtime.storage.home import Home

HOME, CODEC = "home", "codec.safetensors"
UNFINISHED = "home.unfinished"

OpenHome = Callable[..., Home]
"""Opens the home in the folder ``path``, or makes one with slots of ``slot_bytes``; both are given by name."""
LoadCodec = Callable[[Manifest, Path], Codec]
"""Loads the codec of a manifest from a file. Raises `CodecError`, `PluginError` or `BankError`."""


class Bank:
    """A durable collection of memories. As thread-safe as its home; `close` closes the home."""

    def __init__(self, path: Path, home: Home, manifest: Manifest, codec: Codec) -> None:
        self.path = path
        self.home = home
        self.manifest = manifest
        self.codec = codec
        self.stamp = manifest.stamp

    @classmethod
    def create(cls, path: Path, home: OpenHome, manifest: Manifest, codec: Codec) -> "Bank":
        """Make a bank in the folder ``path``. The remains of an interrupted `create` are removed first.

        The home is built under another name and renamed when it has its manifest, so a bank is whole or absent.
        Raises `BankError` if a bank exists already.
        """
        if cls.exists(path, home):
            raise BankError(f"{path}: there is a bank already")
        if (path / UNFINISHED).exists():
            try:
                shutil.rmtree(path / UNFINISHED)
            except OSError as error:  # a link, for example: its target is not ours
                raise BankError(f"{path / UNFINISHED} cannot be made anew: {error}; remove it") from error
        with home(path=path / UNFINISHED, slot_bytes=slot_bytes(codec)) as made:
            codec.save(path / CODEC)
            manifest.write(made)
        (path / UNFINISHED).rename(path / HOME)
        sync_folder(path)  # or the new name might not outlive a power cut
        return cls(path, home(path=path / HOME), manifest, codec)

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
            raise BankMismatchError(
                f"{path}: slots of {home.slot_bytes} bytes do not fit the codec; restore the bank from a copy, "
                "or write it anew"
            )
        return cls(path, home, manifest, codec)

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
        payloads = self.codec.encode(memories)
        out = torch.zeros(len(ids), self.home.slot_bytes, dtype=torch.uint8)
        out[:, block.HEADER_BYTES : block.HEADER_BYTES + payloads.shape[1]] = payloads
        rows = out.numpy()
        for row, (id, tokens) in enumerate(zip(ids.tolist(), memories.tokens.tolist(), strict=True)):
            size = self.codec.payload_bytes(tokens)
            block.seal(rows[row], id=id, tokens=tokens, payload_bytes=size, stamp=self.stamp)
        return out

    def decode(self, blocks: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Decode verified blocks, ``uint8[n, slot_bytes]``, on the device they lie on, to memories of ``dtype``.

        All n are decoded in one call, which takes n times the size of a decoded memory in float32 and in ``dtype``,
        besides the codec's own work: the caller bounds n. Raises `BlockError` for a payload that no memory has.
        """
        heads = block.headers(blocks[:, : block.HEADER_BYTES].cpu().numpy())
        tokens = torch.from_numpy(heads["tokens"].astype(np.int64))
        return self.codec.decode(blocks[:, block.HEADER_BYTES :], tokens, dtype)

    def close(self) -> None:
        """Close the home."""
        self.home.close()


def home_folder(path: Path) -> Path:
    """The folder of the home of the bank at ``path``. Raises `BankMissingError`."""
    if not (path / HOME).exists():
        raise BankMissingError(f"there is no bank at {path}; make one with `m3 write`")
    return path / HOME


def slot_bytes(codec: Codec) -> int:
    """Bytes of the block of a full reference, which is the size of a slot."""
    return block.HEADER_BYTES + codec.payload_bytes(codec.spec.tokens)
