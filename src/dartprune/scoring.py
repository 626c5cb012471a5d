"""Trace statistics -> importance of each neuron (DART section 3.1; GRIFFIN, arXiv 2404.01365; Wanda and WINA).

A scorer is a pure function whose parameter names say what it needs; see `STATISTICS`, `WEIGHT_FACTS`, `NOISE` and
`LAYER`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dartprune.errors import UserError
from dartprune.names import Registry

STATISTICS = ("energy", "normalised_energy", "normalised_peak", "average")
WEIGHT_FACTS = ("down_norm", "proxy_max", "proxy_mean")
NOISE = "noise"
LAYER = "layer"  # number of the layer, for scores that were fixed beforehand


@dataclass(frozen=True)
class Scorer:
    """A registered scorer: its function takes `inputs` by name, float32 [..., I], and returns scores [..., I].

    `layer` alone is an int; scores [I] that depend on nothing else are the same for every sequence.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]


_scorers: Registry[Scorer] = Registry("scorer")


def register_scorer(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: make a function known as a scorer.

    Raises:
        ValueError: the name is taken, or a parameter is nothing that a run can provide.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        inputs = tuple(inspect.signature(function).parameters)
        allowed = (*STATISTICS, *WEIGHT_FACTS, NOISE, LAYER)
        for given in inputs:
            if given not in allowed:
                raise UserError(f"scorer {name!r} asks for {given!r}: its parameters may be {', '.join(allowed)}")
        _scorers.register(name, Scorer(name, function, inputs))
        return function

    return add


def scorer(name: str) -> Scorer:
    """The scorer registered under a name; ValueError naming the nearest otherwise."""
    return _scorers.get(name)


def scorer_names() -> list[str]:
    """All registered names."""
    return _scorers.names()


@register_scorer("magnitude")
def magnitude(energy: Tensor) -> Tensor:
    """Root of the neuron's energy: `sqrt(sum_t a[t,i]^2)`."""
    return energy.sqrt()


@register_scorer("average")
def average(average: Tensor) -> Tensor:
    """Exponential average of `|a_i|`."""
    return average


@register_scorer("token-normalised")
def token_normalised(normalised_energy: Tensor) -> Tensor:
    """GRIFFIN's: `sqrt(sum_t (a[t,i] / |a[t]|)^2)`."""
    return normalised_energy.sqrt()


@register_scorer("peak")
def peak(normalised_peak: Tensor) -> Tensor:
    """BWAP's: `max_t |a[t,i]| / |a[t]|`."""
    return normalised_peak


@register_scorer("weight-aware")
def weight_aware(energy: Tensor, down_norm: Tensor) -> Tensor:
    """Wanda and WINA for an FFN: `sqrt(E_i) * |W_down[:, i]|`."""
    return energy.sqrt() * down_norm


@register_scorer("max")
def proxy_maximum(energy: Tensor, proxy_max: Tensor) -> Tensor:
    """Forward proxy: `sqrt(E_i) * max_v |G[i, v]|`."""
    return energy.sqrt() * proxy_max


@register_scorer("mean")
def proxy_average(energy: Tensor, proxy_mean: Tensor) -> Tensor:
    """Forward proxy: `sqrt(E_i) * mean_v |G[i, v]|`."""
    return energy.sqrt() * proxy_mean


@register_scorer("combined")
def combined(energy: Tensor, proxy_max: Tensor, proxy_mean: Tensor) -> Tensor:
    """Sum of the two forward-proxy scores."""
    return proxy_maximum(energy, proxy_max) + proxy_average(energy, proxy_mean)


@register_scorer("product")
def product(energy: Tensor, proxy_max: Tensor, proxy_mean: Tensor) -> Tensor:
    """Product of the two forward-proxy scores."""
    return proxy_maximum(energy, proxy_max) * proxy_average(energy, proxy_mean)


@register_scorer("random")
def random(noise: Tensor) -> Tensor:
    """Uniform random numbers, drawn once per sequence."""
    return noise
