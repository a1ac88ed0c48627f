"""The verdict on measured directions: are they good for null slots, and for weights?

A query that meets a direction with logit ``x`` gives a null slot the logit ``-level * x``: of the attention of a query
with ``x`` near zero, many null slots take a share. Few queries do so (of rare tokens, in a first layer), so it counts
how much is lost on average. A weight ``exp(b)`` becomes ``exp(b * x)``: of the attention that a memory would get
without a weight no more than ``|x - 1| / e`` goes wrong, for ``|b| exp(b)`` is at most ``1 / e``.
"""

from dataclasses import replace

from m3model.attention.layout import Pair
from m3model.bias.calibration import BUCKETS, Measured
from m3runtime.bank.bias import BiasDirections, BiasFacts, BiasStretch
from m3runtime.errors import ConfigError

LEVELS = (40.0, 80.0, 160.0)
"""Levels of null slots, of which the first is taken that is low enough."""
NULL_WEIGHT = 1e-3
"""The share of any head's attention that all null slots of a full region may take, on average over queries.

That is 1e-6 for each of them, and all together a quarter of what rounding to bfloat16 loses.
"""
TYPICAL_ERROR = 0.15
"""Error of a weight in the median head, at most: 6 % of a memory's attention go wrong."""
GREATEST_ERROR = 0.4
"""Error of a weight in any head, at most: 15 %."""
_NAMED = 3
"""Heads that a refusal names."""


def judged(measured: Measured, facts: BiasFacts, sink: Pair) -> BiasDirections:
    """Directions with their level and verdict. ``facts`` says what they are of, ``sink`` is of all layers.

    Raises `ConfigError` that names the worst heads if the directions are not even good for null slots.
    """
    overall, error = measured.overall, measured.error
    level = next((one for one in LEVELS if measured.null_weight(one).max() < NULL_WEIGHT), None)
    if level is None:
        worst = measured.null_weight(LEVELS[-1]).flatten().argsort(descending=True)[:_NAMED].tolist()
        heads = overall.least.shape[1]
        named = "; ".join(
            f"layer {one // heads}, KV head {one % heads}: "
            f"{overall.least.flatten()[one]:.2f} to {overall.greatest.flatten()[one]:.2f}, "
            f"deviation {overall.std.flatten()[one]:.2f}"
            for one in worst
        )
        raise ConfigError(
            f"model.path: {facts.model_name} has no bias directions over {facts.length} positions: queries should meet "
            f"them with a logit of 1, but do with {named}; try a smaller --length, or read memories "
            "without weights and null slots"
        )
    return BiasDirections(
        replace(
            facts,
            null_level=level,
            null_weight=float(measured.null_weight(level).max()),
            weights=bool(error.median() <= TYPICAL_ERROR and error.max() <= GREATEST_ERROR),
            weight_error=float(error.median()),
            greatest_error=float(error.max()),
            stretches=_stretches(measured, facts),
        ),
        measured.directions,
        overall.mean,
        overall.std,
        overall.least,
        overall.greatest,
        *(one.float().cpu() for one in sink),
    )


def _stretches(measured: Measured, facts: BiasFacts) -> tuple[BiasStretch, ...]:
    by = measured.by_position
    return tuple(
        BiasStretch(
            end=facts.offset + (number + 1) * facts.length // BUCKETS,
            error=float((by.error[..., number] + measured.taken).median()),
            least=float(by.least[..., number].min()),
            greatest=float(by.greatest[..., number].max()),
        )
        for number in range(BUCKETS)
        if by.count[0, 0, number]
    )
