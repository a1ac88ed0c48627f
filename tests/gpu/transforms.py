"""A trained transform of any shape, of random numbers: training one of a large shape takes minutes."""

import torch

from m3runtime.codecs.product.transform import CENTROIDS, WIDTHS
from m3runtime.codecs.product.transform_design import TransformDesign
from m3runtime.codecs.product.transform_quantiser import TransformQuantiser
from m3runtime.memory.spec import MemorySpec


def made_transform(spec: MemorySpec) -> TransformQuantiser:
    """A quantiser of units that keep all coordinates: half of them in parts of two, half in parts of four.

    So a token has three bytes for eight numbers, which is about what a trained one has.
    """
    design = TransformDesign(spec)
    units, channels = design.units.count, design.units.channels
    half = channels // 2
    parts = [
        (width, unit, first)
        for width, of in ((2, 0), (4, half))
        for unit in range(units)
        for first in range(of, of + half, width)
    ]
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(channels, channels, generator=random) / channels**0.5
    tensors = {
        "parts": torch.tensor([(unit, first, width) for width, unit, first in parts], dtype=torch.int32),
        "mean": torch.randn(units, channels, generator=random),
        "forward": matrix.T.repeat(units, 1),
        "inverse": matrix.repeat(units, 1),
    }
    for width in WIDTHS:
        count = sum(part[0] == width for part in parts)
        tensors[f"width{width}"] = torch.randn(count, CENTROIDS, width, generator=random)
    return design.restore(tensors)
