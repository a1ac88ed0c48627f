"""Training of `m3runtime.codecs.product.transform`: the transforms, where the bytes go, and the centroids."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.codecs.product import training
from m3runtime.codecs.product.allocation import WIDTHS, divide

_FLOOR = 0.02
"""Share of a unit's mean importance that every direction has: what is measured on few tokens is not quite zero."""
_CENTROIDS = 256
_LLOYD_STEPS = 40
_Transform = tuple[Tensor, Tensor, Tensor, npt.NDArray[np.float64]]


def trained(sample: Tensor, importance: Tensor, codes: int, progress: Progress | None) -> dict[str, Any]:
    """What a `TransformQuantiser` is made of.

    ``sample`` is ``float32[units, tokens, channels]``, ``importance`` ``float64[units, channels, channels]``; at most
    ``codes`` codes a token. Deterministic, whatever the number of threads.
    """
    with _one_thread():
        transforms = [_transform(x, cost) for x, cost in zip(sample, importance, strict=True)]
        chosen = divide([spectrum for *_, spectrum in transforms], codes)
        parts = sorted(
            (width, unit, sum(widths[:i])) for unit, widths in enumerate(chosen) for i, width in enumerate(widths)
        )
        kept = [sum(widths) for widths in chosen]
        coordinates = [
            ((x - mean) @ forward[:, :count]).contiguous()
            for x, (mean, forward, _, _), count in zip(sample, transforms, kept, strict=True)
        ]
    tables = []
    for done, width in enumerate(WIDTHS):
        own = [coordinates[unit][:, first : first + width] for size, unit, first in parts if size == width]

        def finished(share: float, done: int = done) -> None:
            if progress:
                progress((done + share) / len(WIDTHS))

        tables.append(_centroids(own, width, finished))
        finished(1.0)
    return {
        "parts": torch.tensor([[unit, first, width] for width, unit, first in parts], dtype=torch.int32).view(-1, 3),
        "mean": torch.stack([mean for mean, *_ in transforms]),
        "forward": torch.cat([forward[:, :n].T for (_, forward, _, _), n in zip(transforms, kept, strict=True)]),
        "inverse": torch.cat([inverse[:n] for (_, _, inverse, _), n in zip(transforms, kept, strict=True)]),
        "tables": tuple(tables),
    }


def _transform(x: Tensor, importance: Tensor) -> _Transform:
    """Mean, ``forward`` and ``inverse`` ``float32[channels, channels]``, and the spectrum.

    ``(x - mean) @ forward`` has uncorrelated coordinates whose squared errors add up to the cost.
    """
    channels = x.shape[1]
    mean = x.mean(0)
    centred = (x - mean).double()
    identity = torch.eye(channels, dtype=torch.float64)
    floor = (importance.trace() / channels).clamp_min(1e-30) * _FLOOR
    costs, axes = torch.linalg.eigh(importance + floor * identity)
    whiten = axes * costs.clamp_min(floor).sqrt()
    seen = centred @ whiten
    spectrum, rotation = torch.linalg.eigh(seen.T @ seen / len(seen))
    spectrum, rotation = spectrum.flip(0).clamp_min(0), rotation.flip(1)
    inverse = rotation.T @ (axes / costs.clamp_min(floor).sqrt()).T
    return mean, (whiten @ rotation).float(), inverse.float(), spectrum.numpy()


def _centroids(parts: list[Tensor], width: int, progress: Progress) -> Tensor:
    """``float32[parts, 256, width]`` of vectors ``float32[n, width]`` each."""
    if not parts:
        return torch.zeros(0, _CENTROIDS, width)
    if width == 1:
        return torch.from_numpy(np.stack([lloyd(part[:, 0].numpy(), _CENTROIDS) for part in parts]))[..., None]
    (found,) = training.train([(torch.stack(parts), 1)], _CENTROIDS, progress)
    return found[:, 0].contiguous()


def lloyd(x: npt.NDArray[np.float32], levels: int) -> npt.NDArray[np.float32]:
    """The levels of a scalar quantiser of least squared error (Lloyd, Max), ascending.

    k-means from random points leaves an error several times as great where so many centroids lie on a line. These start
    where a Gaussian's would: as dense as the cube root of the density (Panter and Dite).
    """
    ordered = np.sort(x).astype(np.float64)
    different = np.unique(x)
    if len(different) <= levels:
        return np.pad(different, (0, levels - len(different)), mode="edge")
    at = (np.arange(levels) + 0.5) / levels
    middle = ordered.mean()
    centroids = middle + 3**0.5 * (np.quantile(ordered, at) - middle)
    centroids = np.clip(centroids, ordered[0], ordered[-1])
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(_LLOYD_STEPS):
        borders = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        ends = np.concatenate([[0], borders, [len(ordered)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        centroids = np.sort(np.where(counts, means, centroids))
    found: npt.NDArray[np.float32] = centroids.astype(np.float32)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are added up in the same order then, however many threads there are otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
