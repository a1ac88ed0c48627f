"""The ``train`` section of the configuration: training of a model to read memories."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from m3runtime.config.section import Count, File, Name, Section, Whole


class StageConfig(Section):
    """One of the two stages of training."""

    steps: Annotated[Whole, Field(ge=0)]
    """Optimiser steps; 0 skips the stage."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """The highest learning rate of the stage."""
    rise: Annotated[Whole, Field(ge=0)] = 0
    """Steps in which the learning rate rises from 0 to its highest value."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The fall of the learning rate after that; ``constant``: none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """The weight decay of AdamW."""
    max_gradient: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of a gradient; greater ones are scaled down."""


class TrainConfig(Section):
    """Training of a model to read memories (Memory³, section 3.6): warmup without memories, then training with them."""

    data: Annotated[tuple[File, ...], Field(min_length=1)]
    """Files and folders to learn from, read as by `m3 write`."""
    references: tuple[File, ...] = ()
    """Files and folders of the texts to retrieve; empty: the data itself, cut into references."""
    text_field: Name = "text"
    """The field of a JSONL line that holds the text."""
    out: File
    """The folder for checkpoints and the trained model."""
    start: Literal["weights", "config"] = "weights"
    """Begin with the weights in ``model.path``, or with fresh ones for its configuration and tokenizer."""
    pack: bool = True
    """Concatenate documents and cut them every ``sequence_tokens``; false: each document begins a sequence."""
    sequence_tokens: Count = 2048
    """Tokens of a training sequence."""
    batch_size: Count = 8
    """Sequences in one forward pass of a device."""
    accumulate: Count = 1
    """Batches whose gradients are added up for one step."""
    warmup: StageConfig = StageConfig(steps=0)
    """The first stage: the model learns to write, without memory."""
    memory: StageConfig = StageConfig(steps=1000)
    """The second stage: every chunk reads the references of the last chunks."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The share of a reference's words that the training text may hold in the same order; above it, it is dropped."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of computation; weights and optimiser stay float32."""
    compile: bool | None = None
    """Compile layers and loss, which takes a minute or two at the start; null: on CUDA."""
    save_every: Count = 500
    """Steps between checkpoints, from which a stopped run resumes."""
    log_every: Count = 10
    """Steps between logged losses."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """The seed of fresh weights and of the order of sequences."""

    @model_validator(mode="after")
    def _train_at_all(self) -> Self:
        if not self.warmup.steps + self.memory.steps:
            raise ValueError("warmup.steps and memory.steps are both 0: there is nothing to train")
        return self
