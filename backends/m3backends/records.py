"""The bytes of texts, references and states of sources as homes keep them, and the digests of texts.

Texts may hold lone surrogates, as file names do, hence ``surrogatepass``. Functions that read raise `ValueError` for
bytes of another form.
"""

import json
from dataclasses import astuple
from hashlib import blake2b
from typing import Any

from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState

_DECODER = json.JSONDecoder()


def pack_text(text: str) -> bytes:
    """UTF-8, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


def unpack_text(value: bytes | memoryview) -> str:
    """The text that `pack_text` wrote."""
    return bytes(value).decode("utf-8", "surrogatepass")


def digest(text: str, heading: str = "") -> bytes:
    """BLAKE2b of a text, or of a text under its heading, 32 bytes.

    Cryptographic: nobody can write two that share one.
    """
    if not heading:
        return blake2b(pack_text(text), digest_size=32).digest()
    packed = pack_text(heading)
    under = len(packed).to_bytes(4, "big") + packed
    return blake2b(under + pack_text(text), digest_size=32, person=b"heading").digest()


def identity(reference: Reference) -> bytes:
    """The digest of a reference's text and heading."""
    return digest(reference.text, reference.heading)


def pack_reference(reference: Reference) -> bytes:
    """A JSON array of text, tokens, heading and places; each place is an array of its fields."""
    return _pack_json([reference.text, reference.tokens, reference.heading, [astuple(one) for one in reference.places]])


def unpack_reference(value: bytes | memoryview) -> Reference:
    """The reference that `pack_reference` wrote, or an earlier release: text, source, start, end and tokens."""
    match _unpack_json(value):
        case [str(text), str(source), int(start), int(end), int(tokens)] if _are_numbers(start, end, tokens):
            return Reference(text, tokens, places=(Place(source, start, end),))
        case [str(text), int(tokens), str(heading), list(places)] if places and _are_numbers(tokens):
            return Reference(text, tokens, heading, tuple(map(_place, places)))
    raise ValueError("not text, tokens, heading and places")


def _place(fields: object) -> Place:
    match fields:
        case [str(source), int(start), int(end), dict(metadata)] if _are_numbers(start, end) and all(
            isinstance(text, str) for text in metadata.values()
        ):
            return Place(source, start, end, metadata)
    raise ValueError("not source, start, end and metadata of a place")


def _are_numbers(*values: int) -> bool:
    """Are none of these integers booleans?"""
    return not any(isinstance(value, bool) for value in values)


_STATE = (str, int, int, str, str, str, list, list)
"""The types of a stored state: its source's name and its fields."""


def pack_state(name: str, state: SourceState) -> bytes:
    """A JSON array of the source's name and the fields of its state."""
    return _pack_json([name, *astuple(state)])


def unpack_state(value: bytes | memoryview) -> tuple[str, SourceState]:
    """The name and the state that `pack_state` wrote."""
    fields = _unpack_json(value)
    if isinstance(fields, list) and len(fields) in (5, 7):  # of an earlier release
        fields += ["", [], []][len(fields) - 5 :]
    if not (isinstance(fields, list) and tuple(map(type, fields)) == _STATE):  # a pattern takes twice as long
        raise ValueError("not the fields of a state")
    name, size, time, digest, how, expires, unread, tags = fields
    if unread and not all(isinstance(reason, str) for reason in unread):
        raise ValueError("not the fields of a state")
    if not all(isinstance(tag, list) and list(map(type, tag)) == [str, str] for tag in tags):
        raise ValueError("not the fields of a state")
    return name, SourceState(size, time, digest, how, expires, tuple(unread), tuple(map(tuple, tags)))


def _pack_json(value: object) -> bytes:
    return pack_text(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def _unpack_json(value: bytes | memoryview) -> Any:
    text = unpack_text(value)
    try:
        found, end = _DECODER.raw_decode(text)  # `json.loads` looks for white space, which takes twice as long as this
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if end != len(text):
        raise ValueError(f"there is more behind character {end}")
    return found
