"""Seconds of several works, measured in turn, and what can be said of them: medians, quartiles, ratios."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

from dartprune.errors import UserError

Work = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile of some values."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Turns:
    """Seconds of each arm, one value a turn, and the order in which they were measured."""

    seconds: dict[str, list[float]]
    order: list[str]

    def spread(self, arm: str) -> Spread:
        """Seconds of an arm over the turns."""
        return Spread.of(self.seconds[arm])

    def times_as_fast(self, arm: str, base: str) -> Spread:
        """How many times as fast `arm` is as `base`: the ratio of medians, and quartiles of the turns' ratios."""
        each = Spread.of([b / a for a, b in zip(self.seconds[arm], self.seconds[base], strict=True)])
        middle = statistics.median(self.seconds[base]) / statistics.median(self.seconds[arm])
        return Spread(min(each.lower, middle), middle, max(each.upper, middle))


def alternate(arms: Mapping[str, Callable[[], float]], turns: int) -> Turns:
    """Measure all arms in every turn, so that a slow moment of the machine meets all of them.

    Every second turn goes backwards: no arm always follows the same other, and a slow drift cancels.

    Args:
        arms: each measures itself, and gives its seconds.
        turns: how often, at least 1.
    """
    if turns < 1:
        raise UserError(f"turns must be at least 1, got {turns}")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order: list[str] = []
    for turn in range(turns):
        for name in reversed(list(arms)) if turn % 2 else arms:
            seconds[name].append(arms[name]())
            order.append(name)
    return Turns(seconds, order)


def seconds_per_call(work: Work, device: torch.device, calls: int = 2) -> float:
    """Seconds of one call in a short, warmed block; on a GPU with its cache emptied before each call.

    `torch.utils.benchmark` measures on a CPU, with all of torch's threads, and on a GPU without Triton;
    `triton.testing.do_bench` measures on a GPU.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from triton.testing import do_bench

        return float(do_bench(work, warmup=5, rep=25, return_mode="median")) / 1e3
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return float(timer.timeit(calls).mean)
