"""`Record`: a reference and its embedding, as other programs read and write it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from m3runtime.documents.expiry import last_day_of
from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import InputError
from m3runtime.plugins.messages import first_fault
from m3runtime.retrieval.embedder import Embeddings


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A reference, and its embedding if it is known."""

    reference: Reference
    """Its ``tokens`` are those that the writing model counted; 0 if they are not known."""
    embedding: Embeddings | None = None
    """``float32[dim]``."""
    embedder: str = ""
    """The fingerprint of the embedder."""


class _Stated(BaseModel):
    """The fields that a file states; others are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)

    text: str
    heading: str = ""
    tokens: Annotated[int, Field(ge=0)] = 0
    places: list[dict[str, Any]] = []
    embedding: list[float] | None = None
    embedder: str | None = None


_PLACE = TypeAdapter(Place)


def to_mapping(record: Record, id: int) -> dict[str, Any]:
    """The fields of a record under its id in the bank; ``embedding`` and ``embedder`` only if they are known."""
    one = record.reference
    fields = {
        "id": id,
        "text": one.text,
        "heading": one.heading,
        "tokens": one.tokens,
        "places": [asdict(place) for place in one.places],
    }
    if record.embedding is not None:
        fields |= {"embedding": record.embedding.tolist(), "embedder": record.embedder}
    return fields


def from_mapping(fields: object, name: str, number: int) -> Record:
    """The record that a file named ``name`` states at its ``number``. Only ``text`` must be there.

    A text without places stands in that file, in the record of that number; white space around it is dropped. Raises
    `InputError`.
    """
    where = f"{name}, record {number}"
    if not isinstance(fields, Mapping):
        raise InputError(f"{where} is not an object with a text in 'text'")
    try:
        stated = _Stated.model_validate(fields)
        text = stated.text if stated.places else stated.text.strip()
        own = Place(name, 0, len(text), {"record": str(number)})
        places = tuple(_PLACE.validate_python(place) for place in stated.places) or (own,)
        for place in places:
            if place.expires and last_day_of(place.expires) != place.expires:
                raise InputError(f"{where}: expires must be a date such as 2027-01-31, not {place.expires[:40]!r}")
        f"{text}{stated.heading}".encode()
    except ValidationError as error:
        raise InputError(f"{where}: {first_fault(error)}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a character (a lone surrogate)") from error
    except ValueError as error:
        raise InputError(f"{where}: expires {error}") from error
    if not text.strip():
        raise InputError(f"{where}: text is blank")
    embedding = None if stated.embedding is None else np.array(stated.embedding, np.float32)
    return Record(Reference(text, stated.tokens, stated.heading, places), embedding, stated.embedder or "")
