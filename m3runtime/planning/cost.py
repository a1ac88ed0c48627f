"""What a piece of knowledge costs to write and to use: the cost model of Memory³, appendix A.

The paper prints figures for its own model and no formulas. Those here were reconstructed, and give the printed figures
to the last digit. A multiplication with an addition counts as two FLOP; norms, rotations and softmax are left out. A
layer is attention and an MLP: each token is multiplied with each of their weights once, and in attention with 2 x
*context* x *query channels* numbers. Encoding counts all tokens of the reference as context, and training half of its
sequence, as causality has it.
"""

from dataclasses import dataclass

from m3runtime.memory.shape import ModelShape
from m3runtime.memory.spec import MemorySpec

TRAINING_TOKENS = 2048
"""Of the sequence that the knowledge stands in while a model is trained on it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOP for one reference's knowledge, by where it is kept. Each use is reading it in one chunk."""

    write: int
    """Explicit memory, once: encoding up to the last memory layer, of which only keys and values are needed."""
    read: int
    """Explicit memory, each use: attention of a chunk's tokens to what the memory layers keep."""
    text: int
    """Text in the context, each use: encoding up to the last layer, of which only keys and values are needed."""
    train: int
    """Parameters, once: forward and backward pass over the reference, the head included. Uses are free."""
    read_share: float
    """Of the weights' own work on a chunk, head left out: what reading all memories of the chunk adds."""

    @property
    def over_text(self) -> float | None:
        """From this number of uses on, memory is cheaper than text; None: never."""
        saved = self.text - self.read
        return self.write / saved if saved > 0 else None

    @property
    def under_parameters(self) -> float:
        """Up to this number of uses, memory is cheaper than parameters; 0: never."""
        return max(0.0, (self.train - self.write) / self.read)


def cost(shape: ModelShape, spec: MemorySpec, *, chunk_tokens: int, memories: int) -> Cost:
    """The cost of a full reference of this spec, where each chunk reads so many memories."""
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
