"""The ``train`` section of the configuration: how a model learns to read memories."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from m3runtime.config.section import Count, File, Name, Section, Whole


class StageConfig(Section):
    """One of the two stages of training."""

    steps: Annotated[Whole, Field(ge=0)]
    """Optimiser steps; 0 leaves the stage out."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """The highest of the stage."""
    rise: Annotated[Whole, Field(ge=0)] = 0
    """Steps in which the learning rate rises to it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls afterwards; ``constant``: it does not."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of AdamW."""
    max_gradient: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of a greater norm are scaled down to it."""


class TrainConfig(Section):
    """How a model learns to read memories (Memory³, section 3.6): warmup without them, then training with them."""

    data: Annotated[tuple[File, ...], Field(min_length=1)]
    """Files and folders to learn from, as `m3 write` reads them; relative to the file that says so."""
    references: tuple[File, ...] = ()
    """Files and folders whose texts are retrieved; empty: the data itself, cut into references."""
    text_field: Name = "text"
    """The field of a jsonl line that holds the text."""
    out: File
    """The folder for checkpoints and the trained model, relative to the file that says so."""
    start: Literal["weights", "config"] = "weights"
    """Begin with the weights in ``model.path``, or with fresh ones: then only configuration and tokenizer are read."""
    pack: bool = True
    """Documents follow one another, cut at every ``sequence_tokens``; false: each begins a sequence of its own."""
    sequence_tokens: Count = 2048
    """Tokens of a training sequence."""
    batch_size: Count = 8
    """Sequences that a device reads at once."""
    accumulate: Count = 1
    """Batches whose gradients make one step."""
    warmup: StageConfig = StageConfig(steps=0)
    """The first stage: the model learns to write, without memory."""
    memory: StageConfig = StageConfig(steps=1000)
    """The second stage: every chunk reads the references of the last chunks."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.9
    """References are dropped of which a greater share of words stands in the training text in the same order."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What to compute in; weights and optimiser stay float32."""
    save_every: Count = 500
    """Steps between checkpoints, from which a run that was stopped goes on."""
    log_every: Count = 10
    """Steps between logged losses."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """Of fresh weights and of the order of sequences."""

    @model_validator(mode="after")
    def _train_at_all(self) -> Self:
        if not self.warmup.steps + self.memory.steps:
            raise ValueError("warmup.steps and memory.steps are both 0: there is nothing to train")
        return self
