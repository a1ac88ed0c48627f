"""Training of a `TransformDesign`: the transforms, how many bytes each coordinate gets, and the centroids.

Coordinates that cost much when they are wrong get more bytes than others. Rate-distortion theory (reverse
water-filling; Cover and Thomas, Elements of Information Theory, section 10.3.3) gives a coordinate of variance v the
bits log2(v / level) / 2, with one level for all. Here a code has eight bits, so what is chosen is how many neighbouring
coordinates share one: one where 8 bits pay, eight where 1 bit does, and none of those below the level.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.codecs.product.kmeans import MOST_VECTORS, each, new_noise, quantiser, sampled
from m3runtime.codecs.product.transform import CENTROIDS, WIDTHS, Transform, Units
from m3runtime.codecs.steps import Steps

_FLOOR = 0.02
"""Share of a unit's mean importance that every direction has: what is measured on few tokens is not quite zero."""
_ROWS = 2048
"""Vectors that are taken in float64 at a time."""
_LLOYD_STEPS = 40
_PRICE_STEPS = 60
_LOSSES = dict(zip(WIDTHS, (2.70, 2.37, 1.81, 1.60, 1.41, 1.32), strict=True))
"""The variance that 256 centroids trained on Gaussian vectors of so many coordinates leave of a variance of 1, over the
2**(-16 / n) that no quantiser of that rate can beat."""
Spectrum = npt.NDArray[np.float64]
"""Variances of the coordinates of one unit, falling."""


def train_transform(
    units: Units,
    vectors: Callable[[int], Tensor],
    costs: Callable[[int, Tensor], Tensor],
    codes: int,
    progress: Progress | None,
    steps: Steps,
) -> Transform:
    """The transform of a sample with at most ``codes`` codes in a full memory, unit by unit.

    ``vectors`` gives the sample of a unit, ``float32[tokens, channels]``, and ``costs`` the importance of errors in it,
    ``float64[channels, channels]``. Deterministic, whatever the number of threads.
    """

    def transformed(unit: int) -> Mapping[str, Tensor]:
        def work() -> dict[str, Tensor]:
            x = vectors(unit)
            names = ("mean", "forward", "inverse", "spectrum")
            return dict(zip(names, _transform(x, costs(unit, x)), strict=True))

        return steps.take(f"transform-{unit}", work)

    transforms = each(transformed, range(units.count), None)
    chosen = divide([of["spectrum"].numpy() for of in transforms], codes, units.budgets.tolist())

    def tabulated(unit: int) -> Mapping[str, Tensor]:
        def work() -> dict[str, Tensor]:
            kept = transforms[unit]["forward"][:, : sum(chosen[unit])]
            return _tables(((vectors(unit) - transforms[unit]["mean"]) @ kept).contiguous(), chosen[unit])

        return steps.take(f"tables-{unit}", work)

    tables = each(tabulated, range(units.count), progress)
    parts = sorted(
        (width, unit, sum(widths[:i])) for unit, widths in enumerate(chosen) for i, width in enumerate(widths)
    )
    kept = [sum(widths) for widths in chosen]
    return Transform(
        units,
        parts=torch.tensor([[unit, first, width] for width, unit, first in parts], dtype=torch.int32).view(-1, 3),
        mean=torch.stack([of["mean"] for of in transforms]),
        forward=torch.cat([of["forward"][:, :n].T for of, n in zip(transforms, kept, strict=True)]),
        inverse=torch.cat([of["inverse"][:n] for of, n in zip(transforms, kept, strict=True)]),
        tables=tuple(torch.cat([of[f"width{width}"] for of in tables]) for width in WIDTHS),
    )


def _tables(coordinates: Tensor, widths: Sequence[int]) -> dict[str, Tensor]:
    """The centroids of each width of one unit, ``float32[parts, 256, width]``, of ``float32[tokens, kept]``."""
    starts = list(accumulate(widths, initial=0))[:-1]
    return {
        f"width{width}": _centroids(
            [coordinates[:, at : at + width] for at, own in zip(starts, widths, strict=True) if own == width], width
        )
        for width in WIDTHS
    }


def _transform(x: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, ``forward`` and ``inverse`` ``float32[channels, channels]``, and the spectrum.

    ``(x - mean) @ forward`` has uncorrelated coordinates whose squared errors add up to the cost.
    """
    channels = x.shape[1]
    mean = x.mean(0)
    identity = torch.eye(channels, dtype=torch.float64)
    floor = (importance.trace() / channels).clamp_min(1e-30) * _FLOOR
    costs, axes = torch.linalg.eigh(importance + floor * identity)
    whiten = axes * costs.clamp_min(floor).sqrt()
    covariance = torch.zeros_like(identity)
    for rows in torch.split(x, _ROWS):  # in float64 all of them would take more RAM than the sample
        seen = (rows - mean).double() @ whiten
        covariance += seen.T @ seen
    spectrum, rotation = torch.linalg.eigh(covariance / len(x))
    spectrum, rotation = spectrum.flip(0).clamp_min(0), rotation.flip(1)
    inverse = rotation.T @ (axes / costs.clamp_min(floor).sqrt()).T
    return mean, (whiten @ rotation).float(), inverse.float(), spectrum


def _centroids(parts: list[Tensor], width: int) -> Tensor:
    """``float32[parts, 256, width]`` of vectors ``float32[n, width]`` each."""
    if not parts:
        return torch.zeros(0, CENTROIDS, width)
    if width == 1:
        return torch.from_numpy(np.stack([lloyd(part[:, 0].numpy(), CENTROIDS) for part in parts]))[..., None]
    some = sampled(torch.stack(parts), CENTROIDS, MOST_VECTORS, new_noise())
    return torch.cat([quantiser(group, 1, CENTROIDS) for group in some])


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


def divide(spectra: Sequence[Spectrum], codes: int, tokens: Sequence[int] | None = None) -> list[list[int]]:
    """The number of coordinates that each code of each unit covers, from the greatest on.

    A unit has its codes for each of its ``tokens`` (default: for one); those of all are at most ``codes``.

    What is left over at a spectrum's end gets no code. Minimises the predicted sum of squared errors: a price of a code
    is found by bisection at which all units together buy as many as there are.
    """
    costs = [_costs(spectrum) for spectrum in spectra]
    tokens = [1] * len(costs) if tokens is None else tokens
    low, high = 1e-12, 2 * max(float(spectrum.sum()) for spectrum in spectra) + 1e-12
    for _ in range(_PRICE_STEPS):
        price = (low * high) ** 0.5
        if sum(of * len(_bought(cost, price)) for of, cost in zip(tokens, costs, strict=True)) > codes:
            low = price
        else:
            high = price
    return [_bought(cost, high) for cost in costs]


def _costs(spectrum: Spectrum) -> tuple[list[list[float]], list[float]]:
    """For each width, the error of a code that starts at each coordinate; and of no codes from each on."""
    sums = np.concatenate([[0.0], np.cumsum(spectrum)])
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(spectrum, 1e-30)))])
    of_width = []
    for width, loss in _LOSSES.items():
        error = width * loss * 2.0 ** (-16 / width) * np.exp((logs[width:] - logs[:-width]) / width)
        of_width.append(np.minimum(error, sums[width:] - sums[:-width]).tolist())
    return of_width, (sums[-1] - sums).tolist()


def _bought(cost: tuple[list[list[float]], list[float]], price: float) -> list[int]:
    """The widths of codes that are worth their price, by dynamic programming from the end."""
    of_width, nothing = cost
    count = len(nothing) - 1
    best, choice = list(nothing), [0] * (count + 1)
    for at in range(count - 1, -1, -1):
        for width, errors in zip(WIDTHS, of_width, strict=True):
            if at < len(errors):
                total = errors[at] + price + best[at + width]
                if total < best[at]:
                    best[at], choice[at] = total, width
    widths, at = [], 0
    while at < count and choice[at]:
        widths.append(choice[at])
        at += choice[at]
    return widths
