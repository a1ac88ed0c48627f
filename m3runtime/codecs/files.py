"""The file of a codec: one safetensors file that proves every one of its bytes.

safetensors has no checksum and keeps no order in its metadata, so all of ours is canonical JSON under one
key::

    __metadata__: {"m3runtime": {"codec": {kind, spec, options, measured, tensors}, "digest": "...", "format": 1}}

The digest is XXH3-128 over the whole file with the digest's own digits as zeros. ``tensors`` states dtype
and shape of each.

A file that is longer than a codec of its spec can be is refused before it is read; safetensors refuses one that is not
as long as its header says. The digest finds damage; it proves nothing against somebody who computes it anew, so all
that is read is checked.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from m3runtime.errors import CodecError, ConfigError
from m3runtime.memory.spec import MemorySpec, canonical_json
from m3runtime.plugins.messages import one_line
from m3runtime.storage.files import open_regular, write_atomically

FORMAT = 1
_KEY = "m3runtime"
_ZEROS = "0" * 32
_MOST_HEAD = 4 << 20
"""Bytes of the header at most."""
_MOST = 8 << 30
"""Bytes of a file at most, whatever its spec."""
_MOST_LEVELS = 4
"""Levels of the largest residual quantiser, for `_most_bytes`."""


@dataclass(frozen=True, slots=True)
class Distortion:
    """Relative squared error of ``decode(encode(m))``: the sum of squared errors over the sum of squares."""

    keys: float
    values: float


@dataclass(frozen=True, slots=True)
class CodecFile:
    """The content of a codec's file; `read` has checked it, but for what the kind of codec alone can tell."""

    kind: str
    spec: MemorySpec
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    measured: Distortion | None


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CodecError` unless these tensors are all that is wanted, of these shapes, float32 and finite."""
    if tensors.keys() != wanted.keys():
        raise CodecError(f"it holds tensors {one_line(sorted(tensors))}, not {sorted(wanted)}")
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CodecError(f"tensor {name!r} is {found}, not torch.float32 {shape}")
        if not torch.isfinite(tensor).all():
            raise CodecError(f"tensor {name!r} is not finite")


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The XXH3-128 of each tensor's bytes, in hex."""
    return {name: xxhash.xxh3_128_hexdigest(_bytes(tensor)) for name, tensor in tensors.items()}


def write(path: Path, codec: CodecFile) -> None:
    """Write all of a codec's file or nothing. Raises `CodecError` if the drive does not take it, or it is too large.

    Equal codecs give equal files.
    """
    tensors = {name: tensor.contiguous() for name, tensor in codec.tensors.items()}
    record = {
        "kind": codec.kind,
        "spec": codec.spec.to_json(),
        "options": dict(codec.options),
        "measured": asdict(codec.measured) if codec.measured else None,
        "tensors": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()},
    }
    text = canonical_json({"codec": record, "digest": _ZEROS, "format": FORMAT})
    if sum(tensor.nbytes for tensor in tensors.values()) > min(_MOST, _most_bytes(codec.spec)):
        raise CodecError(f"{path}: not written, a codec of this spec that large is not read back")
    data = safetensors.torch.save(tensors, {_KEY: text})
    at = data.index(_escaped(_ZEROS))
    digest = _escaped(xxhash.xxh3_128_hexdigest(data))
    replace(path, data[:at] + digest + data[at + len(digest) :])


def read(path: Path) -> CodecFile:
    """Read the file of a codec and check it. Raises `CodecError` if it is missing, damaged or of a newer format."""
    data, end, head = _read(path)
    version, digest, record = head["format"], _escaped(head["digest"]), head["codec"]
    if version != FORMAT:
        raise CodecError(f"{path}: format version {one_line(version)}, this release reads {FORMAT}")
    at = data.find(digest, 8, end)
    computed = xxhash.xxh3_128()
    for piece in (memoryview(data)[:at], _escaped(_ZEROS), memoryview(data)[at + len(digest) :]):
        computed.update(piece)
    if at < 0 or _escaped(computed.hexdigest()) != digest:
        raise CodecError(f"{path}: damaged, its digest does not match")
    try:
        tensors = safetensors.torch.load(data)
        spec, measured = MemorySpec.from_json(record["spec"]), _distortion(record["measured"])
        stated = {name: (dtype, tuple(shape)) for name, (dtype, shape) in record["tensors"].items()}
        file = CodecFile(record["kind"], spec, record["options"], tensors, measured)
    except (SafetensorError, ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CodecError(f"{path}: not the file of a codec: {one_line(error)}") from error
    if stated != {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}:
        raise CodecError(f"{path}: its tensors are not those that it states")
    return file


def replace(path: Path, data: bytes) -> None:
    """Write all of a file or nothing, in place of an older one. Raises `CodecError` if the drive does not take it."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise CodecError(f"{path}: cannot be written: {error.strerror}") from error


def _read(path: Path) -> tuple[bytes, int, dict[str, Any]]:
    """The bytes of a file, the end of its header, and our part of the header.

    Reads no more than the header of a file that is longer than a codec of its spec can be.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            end = 8 + int.from_bytes(start, "little")
            if len(start) < 8 or end > min(size, _MOST_HEAD):
                raise CodecError(f"{path}: damaged, or not the file of a codec")
            start += file.read(end - 8)
            head, spec = _head(start[8:], path)
            if size > min(_MOST, end + _most_bytes(spec)):
                raise CodecError(f"{path}: damaged, {size} bytes are more than a codec of its spec has")
            return start + file.read(size - end), end, head
    except OSError as error:
        raise CodecError(f"{path}: cannot be read: {error.strerror}") from error


def _head(text: bytes, path: Path) -> tuple[dict[str, Any], MemorySpec]:
    """Our part of a header's JSON, and the spec that it states."""
    try:
        head = json.loads(json.loads(text)["__metadata__"][_KEY], object_pairs_hook=_unique)
        if not (isinstance(head["digest"], str) and isinstance(head["codec"], dict) and "format" in head):
            raise TypeError
        return head, MemorySpec.from_json(head["codec"]["spec"])
    except (ValueError, LookupError, TypeError, AttributeError, ConfigError, RecursionError) as error:
        raise CodecError(f"{path}: damaged, or not the file of a codec") from error


def _most_bytes(spec: MemorySpec) -> int:
    """Bytes that the tensors of no codec of this spec exceed: levels of 16 bits, and matrices of whole layers."""
    layer = 2 * spec.kv_heads * spec.head_dim  # numbers of one token in one layer
    return 4 * len(spec.layers) * layer * (_MOST_LEVELS * 2**16 + 4 * layer)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. One key with two values would mean one thing to us and another to safetensors."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _distortion(measured: Any) -> Distortion | None:
    if measured is None:
        return None
    if not all(type(number) in (float, int) and math.isfinite(number) for number in measured.values()):
        raise ValueError("the distortion that it states is no number")
    return Distortion(**measured)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _escaped(digest: str) -> bytes:
    """The digest's field as it stands in the file: JSON inside a string of JSON."""
    return f'\\"digest\\":\\"{digest}\\"'.encode()
