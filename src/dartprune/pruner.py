"""Pruner: a method that can be put on a model; and the presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from dartprune.budget import Budget, DepthAware, Global, Uniform
from dartprune.errors import UserError
from dartprune.method import Detector, Method, settings_from
from dartprune.names import Registry
from dartprune.refresh import Never, Periodic, Refresh, Replay
from dartprune.run import Run
from dartprune.selectors.settings import Exact, Sketch, TokenGate, TokenSelector
from dartprune.selectors.sketches import Progress


@dataclass(frozen=True)
class Pruner(Method):
    """A pruning method; call it on a transformers model for a `with` block, or use `attach`."""

    def __call__(self, model: nn.Module, *, backend: str = "auto") -> AbstractContextManager[Run]:
        """Prune `model` inside a `with` block; afterwards, also after an exception, it is what it was.

        Args:
            model: a decoder of transformers in evaluation mode.
            backend: how the pruned FFN is computed: `auto` or a name from `dartprune.ffn.backend_names()`.
        """
        return self._attached(model, backend)

    @contextmanager
    def _attached(self, model: nn.Module, backend: str) -> Iterator[Run]:
        run = self.attach(model, backend=backend)
        try:
            yield run
        finally:
            run.detach()

    def attach(self, model: nn.Module, *, backend: str = "auto", progress: Progress | None = None) -> Run:
        """Prune `model` until `run.detach()` is called. Raises ValueError or TypeError for what cannot be pruned.

        `progress` is told how many layers a token selector has made ready, of how many (a sketch takes a while).
        """
        return Run(self, model, backend=backend, progress=progress)

    def to_dict(self) -> dict[str, Any]:
        """A versioned plain dict of every setting; `Pruner.from_dict` gives the same pruner back."""
        data = super().to_dict()
        if type(self) in [presets.get(name) for name in presets.names()]:
            data["preset"] = presets.name_of(type(self))
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Pruner:
        """The pruner that a dict describes; ValueError naming the nearest key for an unknown one."""
        settings = settings_from(data)
        cls = presets.get(data["preset"]) if "preset" in data else Pruner
        return cls(**settings)


P = TypeVar("P", bound=type[Pruner])
presets: Registry[type[Pruner]] = Registry("method")


def register_preset(name: str) -> Any:
    """Class decorator: make a pruner known by name, to the command line too."""

    def add(cls: P) -> P:
        presets.register(name, cls)
        return cls

    return add


@register_preset("dart")
@dataclass(frozen=True)
class Dart(Pruner):
    """The paper's method with one ranking for all layers, `replay` at a drift, and the dropped neurons' mean in place.

    `budget=DepthAware()`, `refresh=Relearn()` and `compensate=None` are the paper's; docs/choices.md compares them.
    """

    budget: Budget = field(default_factory=Global)
    refresh: Refresh = field(default_factory=Replay)
    detector: Detector = field(default_factory=lambda: Detector(opening=64))
    compensate: str | None = "mean"


@register_preset("static")
@dataclass(frozen=True)
class Static(Pruner):
    """DART's mask of the prompt for ever."""

    budget: Budget = field(default_factory=Global)
    refresh: Refresh = field(default_factory=Never)


@register_preset("griffin")
@dataclass(frozen=True)
class Griffin(Pruner):
    """GRIFFIN (arXiv 2404.01365): token-normalised score, the same budget in every layer, never refreshed."""

    scorer: str = "token-normalised"
    budget: Budget = field(default_factory=Uniform)


@register_preset("clock")
@dataclass(frozen=True)
class Clock(Pruner):
    """BWAP: maximum of the normalised activations; 8 dense tokens, then 16 pruned and 4 dense in turn."""

    scorer: str = "peak"
    budget: Budget = field(default_factory=Uniform)
    refresh: Refresh = field(default_factory=Periodic)
    start: int = 8


@register_preset("random")
@dataclass(frozen=True)
class Random(Pruner):
    """Neurons drawn once per sequence from a seed: the floor that every score must beat."""

    scorer: str = "random"
    budget: Budget = field(default_factory=Uniform)


@register_preset("per-token")
@dataclass(frozen=True)
class PerToken(Pruner):
    """Each token its own best neurons, known because all are computed: the ceiling of every selector (WINA, TEAL)."""

    budget: Budget = field(default_factory=Uniform)
    token: TokenSelector | None = field(default_factory=Exact)


@register_preset("gated-dart")
@dataclass(frozen=True)
class GatedDart(Dart):
    """DART whose masks name candidates: each token reads their gate rows and computes the best. No extra memory.

    Even the layers that matter least must name candidates, so the layers differ less than DART's.
    """

    budget: Budget = field(default_factory=lambda: DepthAware(spread=0.3))
    token: TokenSelector | None = field(default_factory=TokenGate)
    compensate: str | None = None  # each token drops others


@register_preset("sketch-dart")
@dataclass(frozen=True)
class SketchDart(Pruner):
    """Each token its own neurons, found by a low-bit sketch of the weights whose errors the prompt calibrates."""

    budget: Budget = field(default_factory=Uniform)
    token: TokenSelector | None = field(default_factory=Sketch)


@register_preset("dense")
@dataclass(frozen=True)
class Dense(Pruner):
    """No pruning: the same counting and reporting around the plain model."""

    prunes = False
    sparsity: float = 0.0
    budget: Budget = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity != 0:
            raise UserError(f"Dense: sparsity is 0 by definition, got {self.sparsity!r}")
