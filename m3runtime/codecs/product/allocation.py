"""Where a codec's bytes go: coordinates that cost much when they are wrong get more of them than others.

Rate-distortion theory (reverse water-filling; Cover and Thomas, Elements of Information Theory, section 10.3.3) gives
a coordinate of variance v the bits log2(v / level) / 2, with one level for all. Here a code has eight bits, so what is
chosen is how many neighbouring coordinates share one: one where 8 bits pay, eight where 1 bit does, and none of those
below the level.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Spectrum = npt.NDArray[np.float64]
"""Variances of the coordinates of one unit, falling."""

# What 256 centroids trained on Gaussian vectors of so many coordinates leave of a variance of 1, over the 2**(-16 / n)
# that no quantiser of that rate can beat.
_LOSSES = {1: 2.70, 2: 2.37, 3: 1.81, 4: 1.60, 6: 1.41, 8: 1.32}
WIDTHS = tuple(_LOSSES)
"""How many coordinates can share a code."""
_STEPS = 60


def divide(spectra: Sequence[Spectrum], codes: int) -> list[list[int]]:
    """How many coordinates each code of each unit covers, from the greatest on, with at most ``codes`` in all.

    What is left over at a spectrum's end gets no code. Minimises the predicted sum of squared errors: a price of a code
    is found by bisection at which all units together buy as many as there are.
    """
    costs = [_costs(spectrum) for spectrum in spectra]
    low, high = 1e-12, 2 * max(float(spectrum.sum()) for spectrum in spectra) + 1e-12
    for _ in range(_STEPS):
        price = (low * high) ** 0.5
        if sum(len(_bought(cost, price)) for cost in costs) > codes:
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
