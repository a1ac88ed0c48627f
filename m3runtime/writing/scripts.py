"""`warning`: a line about texts in a script that the embedder does not know."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m3runtime.retrieval.embedder import Embedder

MULTILINGUAL = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
"""An embedder of the same kind that knows fifty languages."""
_MOST_UNKNOWN = 0.1


def warning(embedder: "Embedder", texts: Sequence[str]) -> str:
    """The warning, or no text. A token that is not known says nothing, so such texts are hardly ever found."""
    share = embedder.unknown_share(texts)
    if share <= _MOST_UNKNOWN:
        return ""
    return (
        f"the embedder does not know {100 * share:.0f} % of the tokens of these texts, which will hardly be found; "
        f"choose one that knows their language, such as `m3 init --embedder {MULTILINGUAL}`"
    )
