"""`cost`: the compute to write a piece of knowledge and to use it, by the cost model of Memory³ (appendix A).

The paper prints figures for its own model, and no formulas. The formulas here were reconstructed, and give the printed
figures to the last digit. A multiplication with an addition counts as two FLOP; norms, rotations and softmax are left
out. A layer is attention and an MLP: each token is multiplied with each of their weights once, and in attention with
2 x *context* x *query channels* numbers. The context of an encoded token is the whole reference; the context of a token
in training is half of its sequence, because attention is causal.
"""

from dataclasses import dataclass

from m3runtime.memory.shape import ModelShape
from m3runtime.memory.spec import MemorySpec

TRAINING_TOKENS = 2048
"""Tokens of a training sequence, in which the knowledge stands."""


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOP for the knowledge of one reference, by where it is stored. One use is reading it in one chunk."""

    write: int
    """Explicit memory, once: encoding up to the last memory layer, which only needs keys and values."""
    read: int
    """Explicit memory, each use: attention of a chunk's tokens to the memory in each memory layer."""
    text: int
    """Text in the context, each use: encoding up to the last layer, which only needs keys and values."""
    train: int
    """Parameters, once: forward and backward pass over the reference, with the output head. Uses are free."""
    read_share: float
    """FLOP to read all memories of a chunk, over the FLOP of the weights for the chunk, without the output head."""

    @property
    def over_text(self) -> float | None:
        """The number of uses above which memory is cheaper than text, or None if it never is."""
        saved = self.text - self.read
        return self.write / saved if saved > 0 else None

    @property
    def under_parameters(self) -> float:
        """The number of uses below which memory is cheaper than parameters; 0 if it never is."""
        return max(0.0, (self.train - self.write) / self.read)


def cost(shape: ModelShape, spec: MemorySpec, *, chunk_tokens: int, memories: int) -> Cost:
    """The cost of a full reference of this spec, where each chunk reads ``memories`` memories."""
    tokens, queries = spec.reference_tokens, shape.heads * shape.head_dim
    attention = shape.attention_weights + 2 * tokens * queries

    def encoded(layers: int) -> int:
        return 2 * tokens * (layers * attention + (layers - 1) * shape.mlp_weights)

    layer = shape.attention_weights + shape.mlp_weights
    trained = shape.layers * (layer + 2 * (TRAINING_TOKENS // 2) * queries) + shape.hidden * shape.vocabulary
    read = 4 * chunk_tokens * spec.tokens * queries * len(spec.layers)
    return Cost(
        write=encoded(spec.layers[-1] + 1),
        read=read,
        text=encoded(shape.layers),
        train=3 * 2 * tokens * trained,
        read_share=memories * read / (2 * chunk_tokens * shape.layers * layer),
    )
