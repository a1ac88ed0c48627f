"""`Words`: the texts of tokens that recalls search by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

_FEW = 4
"""A stretch of fewer tokens is a role, or a line feed of a chat template."""


@dataclass(frozen=True, slots=True)
class Words:
    """How a scheduler reads tokens."""

    decode: Callable[[Sequence[int]], str]
    """The text of tokens, without special ones."""
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Those of a tokenizer of the transformers library."""

        def decode(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        return cls(decode, frozenset(tokenizer.all_special_ids))

    def last(self, tokens: Sequence[int]) -> Sequence[int]:
        """The last stretch between special tokens that says something: of a chat, the user's last words."""
        end = len(tokens)
        for at in range(len(tokens) - 1, -1, -1):
            if tokens[at] in self.special:
                if end - at - 1 >= _FEW:
                    return tokens[at + 1 : end]
                end = at
        return tokens[:end] if end >= _FEW else tokens
