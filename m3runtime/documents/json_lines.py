"""`json_documents`: a document for each line of a JSONL file."""

import json
from collections.abc import Iterator
from pathlib import Path

from m3runtime.config.schema import DocumentsConfig
from m3runtime.documents.document import Document
from m3runtime.documents.expiry import EXPIRES, last_day_of
from m3runtime.documents.text import file_blocks, text_blocks, text_lines
from m3runtime.errors import InputError

_LONGEST = 2000
"""Characters of a title, an address or another value that is kept."""
_DIGITS = 4000
"""Digits of the longest whole number; Python refuses to read much longer ones."""


def json_documents(path: Path, fields: DocumentsConfig) -> Iterator[Document | InputError]:
    """The records, one line in memory at a time; those whose text is blank are left out.

    In place of a line that is not an object with a text there is the `InputError`.
    """
    for number, line in enumerate(text_lines(text_blocks(file_blocks(path), str(path))), 1):
        if line.strip():
            try:
                document = _document(line, number, path, fields)
            except InputError as error:
                yield error
                continue
            if document is not None:
                yield document


def _document(line: str, number: int, path: Path, fields: DocumentsConfig) -> Document | None:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < _DIGITS else digits)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}; a record must be one line") from error
    try:
        text = _field(record, fields.text_field)
    except KeyError:
        text = None
    if not isinstance(text, str):
        raise InputError(f"{where} is not an object with a text in {fields.text_field!r}")
    metadata = {name: shown for name in fields.metadata_fields if (shown := _shown(record, name))}
    for key, name in (("url", fields.url_field), ("title", fields.title_field)):
        if name and (shown := " ".join(_shown(record, name).split())):
            metadata[key] = shown
    if fields.expires_field and (shown := _shown(record, fields.expires_field)):
        try:
            metadata[EXPIRES] = last_day_of(shown)
        except ValueError as error:
            raise InputError(f"{where}: {fields.expires_field!r} {error}") from error
    names = (fields.id_field,) if fields.id_field else ("source", "id")
    metadata["record"] = next(filter(None, (_shown(record, name) for name in names)), str(number))
    for name, value in ((fields.text_field, text), *metadata.items()):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {name!r} has half a character (a lone surrogate)") from error
    if not text.strip():
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    title = metadata.get("title", "")
    if title and text.lstrip("# ").partition("\n")[0].strip() != title:
        text = f"# {title}\n\n{text}"
    return Document(path.as_posix(), text, metadata)


def _field(record: object, name: str) -> object:
    """The value of a field, or of the one that the dots in its name lead to. Raises `KeyError` if there is none."""
    if isinstance(record, dict) and name in record:
        return record[name]
    outer, dot, inner = name.partition(".")
    if not (dot and isinstance(record, dict)):
        raise KeyError(name)
    return _field(record[outer], inner)


def _shown(record: object, name: str) -> str:
    """The value of a field as a short text; empty if there is none."""
    try:
        value = _field(record, name)
    except KeyError:
        return ""
    if value is None:
        return ""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
