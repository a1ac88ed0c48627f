"""Records as JSON lines, which gzip or Zstandard may have packed."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from m3runtime.documents.readers.opening import readable
from m3runtime.documents.text import BLOCK, file_blocks, text_blocks, text_lines
from m3runtime.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def write_lines(path: Path, packing: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a line for each record; ``packing`` is a suffix of `SUFFIXES`."""
    with _opened(path, packing) as file:
        for record in records:
            file.write(_line(record))


def read_lines(path: Path, packing: str) -> Iterator[object]:
    """The value of each line that is not blank, one in memory at a time. Raises `InputError`."""
    blocks = {".jsonl": file_blocks, ".jsonl.gz": _gzip_blocks, ".jsonl.zst": _zstd_blocks}[packing](path)
    for number, line in enumerate(text_lines(text_blocks(blocks, str(path))), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error


def _opened(path: Path, packing: str) -> BinaryIO:
    match packing:
        case ".jsonl.gz":
            return cast(BinaryIO, gzip.open(path, "wb"))
        case ".jsonl.zst":
            return cast(BinaryIO, zstandard.open(path, "wb"))
        case _:
            return path.open("wb")


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # the name of a file need not be text; escaped it can be written
        return f"{json.dumps(record)}\n".encode()


def _gzip_blocks(path: Path) -> Iterator[bytes]:
    with readable(path, "gzip"), gzip.open(path) as file:
        while block := file.read(BLOCK):
            yield block


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    with readable(path, "Zstandard"):
        frame = zstandard.ZstdDecompressor().decompressobj()
        for block in file_blocks(path):
            while block:
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                if block:
                    frame = zstandard.ZstdDecompressor().decompressobj()
        if not frame.eof:
            raise InputError(f"{path} is cut off: its last frame is not whole")
