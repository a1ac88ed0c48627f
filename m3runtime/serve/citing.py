"""`Reads`: the memories that an answer read, chunk by chunk, as citations and as JSON."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from m3runtime.adapters.grounding import Grounding
from m3runtime.documents.reference import Place, Reference
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction


@dataclass(slots=True)
class Reads:
    """Collects the memories of one answer, and the places of its text that were written while they were read."""

    restriction: Restriction = UNRESTRICTED
    """Places that it does not allow are not cited."""
    with_text: bool = False
    memories: list[dict[str, Any]] = field(default_factory=list)
    """One for each chunk and memory: ``id``, ``score``, ``source``, ``span``, the places ``start_index`` and
    ``end_index`` in the answer, and more; ``share`` of attention and ``spans`` that it led, where that is known."""
    now: list[dict[str, Any]] = field(default_factory=list)
    """The entries of `memories` that are read now."""
    in_prompt: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """``references`` if such stand in the prompt as text: like `memories`, without places."""
    grounded: bool | None = None
    """See `Answer.grounded`."""
    tokens: dict[int, int] = field(default_factory=dict)
    """The tokens of each memory, by its id."""
    _cited: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def begin(self, recalled: Recalled, at: int) -> None:
        """Memories are read from the ``at``-th character of the answer on, in place of earlier ones."""
        self.end(at)
        self.now = []
        for id, score, reference in zip(recalled.ids, recalled.scores, recalled.references, strict=True):
            one = {**self._facts(id, score, reference), "start_index": at, "end_index": None}
            self.now.append(one)
            self.tokens[id] = reference.tokens
            self._cited.append((one, _address(id, self._place(reference))))
        self.memories += self.now

    def end(self, at: int) -> None:
        """The answer ends at its ``at``-th character."""
        for one in self.now:
            one["end_index"] = at

    def ground(self, grounding: Grounding, before: int) -> None:
        """Attention tells what was read: cite the spans that a memory led, and no memory that led none.

        ``before`` is how many characters of the answer's text are left out at its beginning.
        """
        for one in self.memories:
            start, end = one["start_index"], one["end_index"]
            part = grounding.part(start + before, end + before)
            spans = [span for span in part.spans(0.0) if span.id == one["id"]]
            one["share"] = round(part.memories.get(one["id"], 0.0), 4)
            one["spans"] = [[max(start, span.start - before), span.end - before] for span in spans]

    def put_in_prompt(self, references: Iterable[tuple[int, float, Reference]]) -> None:
        """These stand in the prompt as text: id, score and reference of each."""
        self.in_prompt = {"references": [self._facts(*one) for one in references]}

    @property
    def found(self) -> bool:
        """Was anything recalled? If not, the answer is the model's own."""
        return bool(self.memories or self.in_prompt.get("references"))

    def told(self) -> dict[str, Any]:
        """The fields of an answer that are ours."""
        return {**self.verdict(), "memories": self.memories, **self.in_prompt}

    def verdict(self) -> dict[str, Any]:
        """The fields of `told` that are known at the answer's end: ``found``, and ``grounded`` if that is told."""
        return {"found": self.found, **({} if self.grounded is None else {"grounded": self.grounded})}

    def url_citations(self) -> list[dict[str, Any]]:
        """The annotations of chat completions, of those memories that a part of the answer was written with."""
        return [{"type": "url_citation", "url_citation": one} for one in self._url_citations()]

    def response_annotations(self) -> list[dict[str, Any]]:
        """The annotations of responses: each memory as ``url_citation`` and as ``file_citation``."""
        urls = [{"type": "url_citation", **one} for one in self._url_citations()]
        files = [
            {
                "type": "file_citation",
                "file_id": f"memory-{one['id']}",
                "filename": one["source"],
                "index": end,
            }
            for one, _, _, end in self._used()
        ]
        return [*urls, *files]

    def _url_citations(self) -> list[dict[str, Any]]:
        return [
            {"start_index": start, "end_index": end, "title": one["heading"] or one["source"], "url": address}
            for one, address, start, end in self._used()
        ]

    def _used(self) -> list[tuple[dict[str, Any], str, int, int]]:
        """Memories with their addresses and spans, without those that only a part of the prompt was read with."""
        return [
            (one, address, start, end)
            for one, address in self._cited
            for start, end in one.get("spans", [(one["start_index"], one["end_index"] or 0)])
            if end > start
        ]

    def _facts(self, id: int, score: float, reference: Reference) -> dict[str, Any]:
        place = self._place(reference)
        facts = {
            "id": id,
            "score": round(score, 4),
            "source": place.name,
            "span": [place.start, place.end],
            "heading": reference.heading,
            "url": place.metadata.get("url"),
        }
        return {**facts, "text": reference.text} if self.with_text else facts

    def _place(self, reference: Reference) -> Place:
        return next(place for place in reference.places if self.restriction.allows(place))


def _address(id: int, place: Place) -> str:
    """The document's own address, or one that names its source and the memory."""
    return place.metadata.get("url") or f"memory:{id}?source={quote(place.name, safe='/:')}"
