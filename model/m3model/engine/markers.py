"""Markers of special tokens, such as ``<|im_end|>``: in the words of users and documents they are text."""

import copy
import re
from typing import Any


def literal_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer that reads markers as the text that they are. Used with that option alone it is safe.

    A tokenizer keeps the option of its last call, so that one that several threads share must not change it.
    """
    literal = copy.deepcopy(tokenizer)
    literal.split_special_tokens = True
    if literal.is_fast:
        literal.backend_tokenizer.encode_special_tokens = True
    return literal


class Markers:
    """The markers of a tokenizer's special tokens. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*added, *tokenizer.all_special_tokens}, key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def spans(self, text: str) -> tuple[tuple[int, int], ...]:
        """The span of each marker in a text."""
        return tuple(found.span() for found in self._pattern.finditer(text))

    def hidden(self, texts: list[str]) -> "tuple[list[str], dict[str, str]]":
        """The texts with a private character for each marker, and what the characters stand for."""
        whole = "".join(texts)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in whole)
        names = {name: next(free) for name in dict.fromkeys(self._pattern.findall(whole))}
        hidden = [self._pattern.sub(lambda found: names[found[0]], text) for text in texts]
        return hidden, {character: name for name, character in names.items()}


def shown(text: str, hidden: dict[str, str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A text with its markers back where `Markers.hidden` took them away, and their spans."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for character in re.split(f"([{''.join(hidden)}])", text) if hidden else [text]:
        part = hidden.get(character, character)
        if part is not character:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return "".join(parts), tuple(spans)
