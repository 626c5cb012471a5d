"""How sure a figure is: confidence intervals over texts by the bootstrap, shares, bands, standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
LEVEL = 95  # per cent


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval over texts."""

    value: float
    low: float
    high: float

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """The same of an increasing function of the figure, such as a perplexity."""
        return Interval(function(self.value), function(self.low), function(self.high))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    *groups: ArrayLike, statistic: Callable[[list[Array]], Array] | None = None, resamples: int = 1000, seed: int = 0
) -> Interval:
    """A statistic of means over texts, with percentiles of its values on resampled texts.

    Args:
        groups: float [columns, texts], or [texts] for one column. The columns of one group are measured on the same
            texts and resampled together; groups are independent of each other. Calls with one seed and one number of
            texts draw the same texts, so that their figures pair.
        statistic: from the means of all columns of all groups, each [n], to its values [n]; the first mean if None.
        resamples: draws.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    exact: list[Array] = []
    resampled: list[Array] = []
    for group in groups:
        columns = np.atleast_2d(np.asarray(group, dtype=np.float64))
        texts = columns.shape[1]
        rows = rng.integers(texts, size=(resamples, texts))
        exact += [column.mean(keepdims=True) for column in columns]
        resampled += [column[rows].mean(1) for column in columns]
    compute = statistic or (lambda means: means[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values = float(compute(exact)[0]), compute(resampled)
    values = values[np.isfinite(values)]
    edge = (100 - LEVEL) / 2
    low, high = map(float, np.percentile(values, [edge, 100 - edge]) if values.size else (np.nan, np.nan))
    if statistic is None:  # equal values may differ from their own mean by a rounding error
        low, high = min(low, value), max(high, value)
    return Interval(value, low, high)


def share(hits: Array) -> Interval:
    """Share of texts that are hit (bool or 0 and 1, [texts]) with Wilson's interval, which holds at 0 and 1 too."""
    count, z = len(hits), 1.96
    value = float(np.mean(hits))
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(value * (1 - value) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(value, max(0.0, float(middle - half)), min(1.0, float(middle + half)))


def difference(means: list[Array]) -> Array:
    """First mean minus second."""
    return means[0] - means[1]


def regained(means: list[Array]) -> Array:
    """Share of the second mean that the first one is free of: 1 - first / second."""
    out: Array = 1 - means[0] / means[1]
    return out


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def band(values: Array) -> tuple[Array, Array, Array]:
    """Mean over texts of each row, and the mean minus and plus 1.96 standard errors: values [rows, texts] -> [rows]."""
    mean = values.mean(1)
    error = 1.96 * values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else np.zeros_like(mean)
    return mean, mean - error, mean + error
