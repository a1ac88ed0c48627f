"""`without_embedded`: a text without the pictures and files that stand in it as base64."""

import re
import string
from collections.abc import Callable, Iterable, Iterator

OnLeftOut = Callable[[int, int], None]
"""Called with the place in the text where characters were left out, and their number."""

_LEAST = 256
"""Characters of the shortest run that is left out: longer than any word, key or digest that somebody asks for."""
_RUN = re.compile(
    r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,[A-Za-z0-9+/=_-]*"  # a data: URI of any length
    r"|(?<![\w+/=-])(?:[A-Za-z0-9+/]{60,76}\n){3,}[A-Za-z0-9+/]*={0,2}"  # lines, as in mails and keys
    rf"|(?<![\w+/=-])[A-Za-z0-9+/_-]{{{_LEAST},}}={{0,2}}"
)
_ALPHABET = f"{string.ascii_letters}{string.digits}+/=_-.:;,\n"
"""The characters of a run. A run that reaches to the end of a block may go on in the next."""
_LONGEST = 1 << 24
"""Characters of a run that are kept in memory; the rest of a longer one is a run of its own."""


def without_embedded(blocks: Iterable[str], left_out: OnLeftOut | None = None) -> Iterator[str]:
    """The blocks of a text without ``data:`` URIs and long runs of base64, wherever it is cut into blocks.

    A run without small letters, capitals and digits is none: it is a word, a line or a sequence of another kind.
    Keeps a block and the run at its end in memory. ``left_out`` gets places in the text that is left.
    """
    rest, place = "", 0

    def keep(text: str) -> str:
        nonlocal place
        parts, done = [], 0
        for run in _RUN.finditer(text):
            if run[0].startswith("data:") or _is_base64(run[0]):
                parts.append(text[done : run.start()])
                place += run.start() - done
                if left_out:
                    left_out(place, len(run[0]))
                done = run.end()
        parts.append(text[done:])
        place += len(text) - done
        return "".join(parts)

    for block in blocks:
        rest += block
        end = len(rest.rstrip(_ALPHABET))
        if len(rest) - end > _LONGEST:
            end = len(rest)
        yield keep(rest[:end])
        rest = rest[end:]
    yield keep(rest)


def _is_base64(run: str) -> bool:
    return all(re.search(kind, run) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
