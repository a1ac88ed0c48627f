"""`Restriction`: limits on the memories of one stream, within those of the configuration."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from m3runtime.config.where import SOURCE, Condition, Where
from m3runtime.documents.reference import Place
from m3runtime.documents.sources import is_within


@dataclass(frozen=True, slots=True)
class Restriction:
    """The memories that a stream may read. None: as the configuration says."""

    memories: int | None = None
    """Most memories of a chunk, if that is less than ``recall.memories``."""
    min_score: float | None = None
    """Memories that score lower are not recalled; in place of ``recall.min_score``."""
    where: Where = frozenset()
    """Only memories that have a place which meets all of these; the search looks at no others."""

    def allows(self, place: Place) -> bool:
        """May memories of this place be read?"""
        return meets(self.where, place.source, place.metadata)

    def allows_source(self, source: str) -> bool:
        """May memories of this source be read, as far as its name tells?"""
        return meets((one for one in self.where if one.field == SOURCE), source, {})

    def within(self, where: Where) -> "Restriction":
        """This restriction, of whose memories only those are left that meet these conditions as well."""
        return replace(self, where=self.where | where) if where else self


def meets(where: Iterable[Condition], source: str, metadata: Mapping[str, str]) -> bool:
    """Does a place with this source and metadata meet all of these conditions?"""
    return all(
        _is_in(condition, source)
        if condition.field == SOURCE
        else (value := metadata.get(condition.field)) is not None and condition.allows(value)
        for condition in where
    )


def _is_in(condition: Condition, source: str) -> bool:
    if condition.values is None:
        return condition.allows(source)
    return any(is_within(source, one) for one in condition.values)


UNRESTRICTED = Restriction()
