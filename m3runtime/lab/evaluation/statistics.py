"""Means, differences and ratios with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int
    """Number of observations."""

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean, with its interval. Raises `ValueError` if there are no values."""
    observed = np.asarray(values, np.float64)
    if not len(observed):
        raise ValueError("no values, no mean")
    value = float(observed.mean())
    if len(observed) == 1 or np.ptp(observed) == 0:  # every resample is the same
        return Estimate(value, value, value, len(observed))
    from scipy.stats import bootstrap

    interval = bootstrap(
        (observed,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=seed
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), len(observed))


def difference(values: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of the differences of ``values`` and ``baseline``, in pairs of the same questions.

    Raises `ValueError` if there are no values, or the numbers of values differ.
    """
    return mean([value - base for value, base in zip(values, baseline, strict=True)], seed)


def separation(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Estimate:
    """The area under the ROC curve: how often a value is greater than one of the others; equal ones count half.

    Both are resampled. Raises `ValueError` if there are none of either.
    """
    ours, theirs = np.sort(np.asarray(values, np.float64)), np.sort(np.asarray(others, np.float64))
    if not len(ours) or not len(theirs):
        raise ValueError("an area takes values of both kinds")
    above = (np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")) / 2 / len(theirs)
    below = (np.searchsorted(ours, theirs, "left") + np.searchsorted(ours, theirs, "right")) / 2 / len(ours)
    value = float(above.mean())
    # The two parts of the variance of a two-sample U statistic (DeLong et al. 1988), each resampled by itself.
    random = np.random.default_rng(seed)
    drawn = [random.choice(part - part.mean(), (RESAMPLES, len(part))).mean(1) for part in (above, below)]
    low, high = np.quantile(value + drawn[0] + drawn[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, max(0.0, float(low)), min(1.0, float(high)), len(ours) + len(theirs))


def ratio(values: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of ``values`` over the mean of ``baseline``, resampled in pairs of the same questions.

    Infinite if the mean of the baseline is 0. Raises `ValueError` if there are no values, or their numbers differ.
    """
    ours, theirs = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if not len(ours) or ours.shape != theirs.shape:
        raise ValueError("a ratio takes as many values as its baseline, at least one")

    def of(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = a.mean(axis) / b.mean(axis)
        return np.where(np.isnan(found), 1.0, found)  # 0 over 0

    value = float(of(ours, theirs))
    if len(ours) == 1:
        return Estimate(value, value, value, 1)
    from scipy.stats import bootstrap

    with np.errstate(invalid="ignore"):  # its own interval cannot cope with resamples of an infinite ratio
        resampled = bootstrap(
            (ours, theirs), of, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile", rng=seed
        ).bootstrap_distribution
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Estimate(value, float(low), float(high), len(ours))
