"""RoPE: for how many positions a model's keys are rotated by the same frequencies.

A memory's keys are computed once and read in texts of any length, so their rotation must not depend on that length.
Two types of RoPE change their frequencies for all positions as soon as one is beyond a limit: LongRoPE (``longrope``,
formerly ``su``), which has a set for short and a set for long texts, and dynamic NTK (``dynamic``), whose frequencies
follow the length. Below the limit they are as fixed as any other, and beyond it memories would be silently wrong.
"""

from typing import Any

from m3runtime.errors import ConfigError, PromptTooLongError

_FIXED = {"default", "linear", "llama3", "yarn", "proportional"}
"""Types whose frequencies, and YaRN's factor, depend on the configuration alone."""


def fixed_positions(config: Any) -> int | None:
    """The number of positions within which frequencies do not change, or None for any number.

    ``config`` is a text configuration of the transformers library. Raises `ConfigError` for a type of RoPE that is not
    known to be safe.
    """
    rope = config.rope_parameters
    # Gemma 3 rotates by other parameters in layers with a sliding window.
    by_layer_type = [parameters for parameters in rope.values() if isinstance(parameters, dict)]
    limits = []
    for parameters in by_layer_type or [rope]:
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            limits.append(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif kind == "dynamic":
            limits.append(config.max_position_embeddings - 1)  # only below does transformers go back to short ones
        elif kind not in _FIXED:
            raise ConfigError(
                f"model.path: this model rotates keys by RoPE of type {kind!r}, of which it is not known whether keys "
                f"depend on the length of the text; use a model with one of {', '.join(sorted(_FIXED))}"
            )
    return min(limits, default=None)


def check_positions(count: int, fixed: int | None) -> None:
    """Raise `PromptTooLongError` unless ``count`` positions are within `fixed_positions`."""
    if fixed is not None and count > fixed:
        raise PromptTooLongError(
            f"the text needs {count} positions, the sink's and the memories' included, but this model's RoPE rotates "
            f"all keys otherwise beyond {fixed}; shorten the prompt, or lower generate.max_new_tokens"
        )
