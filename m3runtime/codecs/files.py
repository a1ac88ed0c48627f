"""The file of a codec: one safetensors file that proves every one of its bytes.

safetensors has no checksum and keeps no order in its metadata, so all of ours is canonical JSON under one
key::

    __metadata__: {"m3runtime": {"codec": {kind, spec, options, measured, tensors}, "digest": "...", "format": 1}}

The digest is XXH3-128 over the whole file with the digest's own digits as zeros. ``tensors`` states dtype
and shape of each.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from m3runtime.codecs.base import Codec, Distortion
from m3runtime.errors import CodecError, ConfigError
from m3runtime.spec import MemorySpec, canonical_json, fingerprint

C = TypeVar("C", bound=Codec)

FORMAT = 1
_KEY = "m3runtime"
_ZEROS = "0" * 32


@dataclass(frozen=True, slots=True)
class CodecFile:
    """What a codec's file holds, after every check: see `read`."""

    path: Path
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    measured: Distortion | None

    def make(self, codec: type[C], spec: MemorySpec) -> C:
        """The codec of these options, without its tensors. Raises `CodecError` if the options do not fit."""
        try:
            return codec(spec, **self.options)
        except (TypeError, CodecError) as error:
            raise CodecError(f"{self.path}: options do not fit: {error}") from error

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `CodecError` unless the tensors are exactly these, float32 and finite."""
        if self.tensors.keys() != shapes.keys():
            raise CodecError(f"{self.path}: holds tensors {sorted(self.tensors)}, not {sorted(shapes)}")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise CodecError(f"{self.path}: tensor {name!r} is {found}, not torch.float32 {shape}")
            if not torch.isfinite(tensor).all():
                raise CodecError(f"{self.path}: tensor {name!r} is not finite")


def codec_fingerprint(codec: Codec, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Thirty-two hex digits over a codec's kind, spec, options and trained tensors."""
    trained = {name: xxhash.xxh3_128_hexdigest(_bytes(tensor)) for name, tensor in (tensors or {}).items()}
    return fingerprint(
        {
            "kind": codec.kind,
            "spec": codec.spec.to_json(),
            "options": dict(codec.options),
            "tensors": trained,
        }
    )


def write(
    path: Path, codec: Codec, tensors: Mapping[str, Tensor] | None = None, measured: Distortion | None = None
) -> None:
    """Write all of a codec's file or nothing. Raises `CodecError` if the drive does not take it.

    Equal codecs give equal files.
    """
    tensors = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
    record = {
        "kind": codec.kind,
        "spec": codec.spec.to_json(),
        "options": dict(codec.options),
        "measured": asdict(measured) if measured else None,
        "tensors": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()},
    }
    text = canonical_json({"codec": record, "digest": _ZEROS, "format": FORMAT})
    data = safetensors.torch.save(tensors, {_KEY: text})
    at = data.index(_escaped(_ZEROS))
    digest = _escaped(xxhash.xxh3_128_hexdigest(data))
    replace(path, data[:at] + digest + data[at + len(digest) :])


def stated(path: Path) -> tuple[str, MemorySpec]:
    """The kind and the spec of the codec in a file, which is checked as by `read`."""
    _, kind, spec = _checked(path)
    return kind, spec


def read(path: Path, kind: str, spec: MemorySpec) -> CodecFile:
    """Read a codec's file and check it.

    Raises `CodecError` that names the file if it is missing, damaged, of another kind or spec, or of a newer
    format.
    """
    file, found, written = _checked(path)
    if found != kind:
        raise CodecError(f"{path}: holds a codec of kind {found!r}, not {kind!r}")
    if written != spec:
        raise CodecError(f"{path}: the codec is of another spec: {written.difference(spec)}")
    return file


def replace(path: Path, data: bytes) -> None:
    """Write all of a file or nothing, over what was there. Raises `CodecError` if the drive does not take it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # The rename lasts only once the folder is on the drive too.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CodecError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _checked(path: Path) -> tuple[CodecFile, str, MemorySpec]:
    """What a file holds after every check, and the kind and spec that it states."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CodecError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8:end])["__metadata__"][_KEY])
        version, digest, record = head["format"], _escaped(head["digest"]), head["codec"]
        at = data.index(digest, 8, end)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CodecError(f"{path}: damaged, or not the file of a codec") from error
    if version != FORMAT:
        raise CodecError(f"{path}: format version {version}, this release reads {FORMAT}")
    blanked = data[:at] + _escaped(_ZEROS) + data[at + len(digest) :]
    if _escaped(xxhash.xxh3_128_hexdigest(blanked)) != digest:
        raise CodecError(f"{path}: damaged, its digest does not match")
    try:
        tensors = safetensors.torch.load(data)
        found, measured, written = record["kind"], record["measured"], MemorySpec.from_json(record["spec"])
        stated = {name: (dtype, tuple(shape)) for name, (dtype, shape) in record["tensors"].items()}
        file = CodecFile(path, record["options"], tensors, Distortion(**measured) if measured else None)
    except (SafetensorError, ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CodecError(f"{path}: not the file of a codec: {error}") from error
    if stated != {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}:
        raise CodecError(f"{path}: its tensors are not those that it states")
    return file, found, written


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _escaped(digest: str) -> bytes:
    """The digest's field as it stands in the file: JSON inside a string of JSON."""
    return f'\\"digest\\":\\"{digest}\\"'.encode()
