"""`underline`: an answer that was shown on a terminal is written anew, with the spans that a memory was read for.

It appears token by token, and attention tells what was read at its end. So the cursor goes back to where it began.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from m3runtime.cli.terminal import printable, rewrite

if TYPE_CHECKING:
    from m3runtime.adapters.grounding import Span

LEAST = 0.05
"""The least share of attention of a span that is underlined."""
_ON, _OFF = "\x1b[4m", "\x1b[24m"


def underline(text: str, spans: "Sequence[Span]", numbers: Mapping[int, int]) -> None:
    """Underline an answer that was printed as the last thing on the terminal, where that can be; see `rewrite`.

    ``numbers`` are those of memories in the list below.
    """
    if spans:
        rewrite(text, underlined(text, spans, numbers))


def underlined(text: str, spans: "Sequence[Span]", numbers: Mapping[int, int]) -> str:
    """The text with codes that underline the spans, and after each the number of its memory."""
    parts, end = list[str](), 0
    for span in spans:
        part = text[span.start : span.end]
        start = span.start + len(part) - len(part.lstrip())
        parts += [printable(text[end:start]), _ON, printable(text[start : span.end]), _OFF, f"[{numbers[span.id]}]"]
        end = span.end
    return "".join([*parts, printable(text[end:])])
