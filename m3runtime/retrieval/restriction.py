"""`Restriction`: limits on the memories of one stream, within those of the configuration."""

from dataclasses import dataclass, replace

from m3runtime.documents.sources import is_within


@dataclass(frozen=True, slots=True)
class Restriction:
    """The memories that a stream may read. None: as the configuration says."""

    memories: int | None = None
    """Most memories of a chunk, if that is less than ``recall.memories``."""
    min_score: float | None = None
    """Memories that score lower are not recalled; in place of ``recall.min_score``."""
    sources: frozenset[str] | None = None
    """Only memories that have a place in one of these sources or folders of sources; the search looks at no others."""

    def allows(self, source: str) -> bool:
        """May memories of this source be read?"""
        return self.sources is None or any(is_within(source, one) for one in self.sources)

    def within(self, other: "Restriction") -> "Restriction":
        """This restriction, of whose sources only those are left that ``other`` allows."""
        if other.sources is None or self.sources is None:
            return replace(self, sources=self.sources if other.sources is None else other.sources)
        narrower = {one for one in self.sources if other.allows(one)}
        return replace(self, sources=frozenset(narrower | {one for one in other.sources if self.allows(one)}))


UNRESTRICTED = Restriction()
