"""The spec that a model carries with it."""

from typing import Any

from m3runtime.config.schema import MemoryConfig


def carried(own: Any, memory: MemoryConfig) -> MemoryConfig:
    """The settings in force for a model whose configuration ``own`` is a `Memory3Config`; for others as they are.

    What the model was trained with takes the place of whatever the configuration does not say, or says only by its
    preset. A value that was set wins: a model may be tried with other memories than those it knows.
    """
    if own.model_type != "memory3":
        return memory
    trained = {
        "layers": tuple(own.memory_layers),
        "tokens_per_head": own.tokens_per_head,
        "reference_tokens": own.reference_tokens,
        "sink": own.sink,
    }
    usual = MemoryConfig.model_validate({} if memory.preset is None else {"preset": memory.preset})
    unsaid = {
        name: value
        for name, value in trained.items()
        if name not in memory.model_fields_set
        or (memory.preset is not None and getattr(memory, name) == getattr(usual, name))
    }
    return memory.model_copy(update=unsaid)
