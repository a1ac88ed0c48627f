"""The places of memories in a row's memory region: a memory that stays is not written again.

Columns are counted from the region's right end, which never moves: it is where the sink and the context begin. No
tensors here.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slot:
    """A stretch of columns: ``start`` is the distance of its right edge from the region's right end."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The distance of its left edge."""
        return self.start + self.length


MemorySlots = tuple[tuple[int, Slot], ...]
"""The memories that a row reads, by id, and their places."""


def distinct(names: Sequence[Hashable]) -> Sequence[Hashable]:
    """Names that tell a memory from the same one a second time."""
    seen: Counter[Hashable] = Counter()
    told = []
    for name in names:
        told.append((name, seen[name]))
        seen[name] += 1
    return told


def place(held: Mapping[Hashable, Slot], wanted: Sequence[tuple[Hashable, int]], columns: int) -> dict[Hashable, Slot]:
    """A slot for each wanted memory (name and length, names distinct) within ``columns``, which hold all of them.

    What is held and wanted stays where it is, and the others go into the smallest gaps that take them. Where that
    cannot be, gaps are closed, and only what stands gapless at the right end stays. To leave a gap and let attention
    read more columns would cost more: writing a column costs as much as reading it in two or three steps, and a chunk
    has dozens.
    """
    slots = {
        name: slot
        for name, length in wanted
        if (slot := held.get(name)) is not None and slot.length == length and slot.end <= columns
    }
    gaps = _gaps(slots.values(), columns)
    for name, length in sorted((one for one in wanted if one[0] not in slots), key=lambda one: -one[1]):
        fitting = [gap for gap in gaps if gap.length >= length]
        if not fitting:
            return _gapless(held, wanted)
        gap = min(fitting, key=lambda one: one.length)
        gaps[gaps.index(gap)] = Slot(gap.start + length, gap.length - length)
        slots[name] = Slot(gap.start, length)
    return slots


def _gaps(slots: Iterable[Slot], columns: int) -> list[Slot]:
    gaps, end = [], 0
    for slot in sorted((slot for slot in slots if slot.length), key=lambda one: one.end):
        gaps.append(Slot(end, slot.start - end))
        end = slot.end
    return [*gaps, Slot(end, columns - end)]


def _gapless(held: Mapping[Hashable, Slot], wanted: Sequence[tuple[Hashable, int]]) -> dict[Hashable, Slot]:
    lengths = dict(wanted)
    slots: dict[Hashable, Slot] = {}
    end = 0
    for name, slot in sorted(held.items(), key=lambda one: one[1].end):
        if slot.start != end or lengths.get(name) != slot.length:
            break
        slots[name] = slot
        end = slot.end
    for name, length in wanted:
        if name not in slots:
            slots[name] = Slot(end, length)
            end += length
    return slots
