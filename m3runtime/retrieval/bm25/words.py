"""`words`: the words of a text, as they are searched by."""

import re
import unicodedata
from collections.abc import Iterator

_ALONE = (
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese and Chinese
    r"\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Korean, Thai, Lao, Burmese, Khmer
)
"""Scripts that are written without spaces, or whose words are joined with others."""
_RUN = re.compile(rf"[{_ALONE}]+|[^\W{_ALONE}]+")
_IS_ALONE = re.compile(rf"[{_ALONE}]")
_ACCENTS = re.compile("[\u0300-\u036f]")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W_A-Za-z0-9]+")
_LONGEST = 64


def words(text: str) -> Iterator[str]:
    """The words of a text in small letters without accents, each as often as it stands there.

    Names such as ``readFile`` and ``read_file`` are words, and their parts are, too. Scripts without spaces give each
    pair of neighbouring characters.
    """
    for run in _RUN.findall(_ACCENTS.sub("", unicodedata.normalize("NFKD", text))):
        if _IS_ALONE.match(run):
            composed = unicodedata.normalize("NFC", run)
            yield from (composed[at : at + 2] for at in range(max(1, len(composed) - 1)))
            continue
        whole = run.casefold()[:_LONGEST]
        yield whole
        if not (run.isalpha() and (run[1:].islower() or run.isupper() or len(run) == 1)):
            parts = [part.casefold()[:_LONGEST] for part in _PART.findall(run)]
            if parts != [whole]:
                yield from parts
