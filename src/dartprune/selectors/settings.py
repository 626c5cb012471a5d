"""Settings of the token selectors: how each token gets neurons of its own (docs/token-selection.md).

A selector is a frozen dataclass. It turns what a budget leaves of a layer into two numbers: the candidates, named by
the context's mask, and how many of them each token uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from dartprune.errors import UserError, UserTypeError
from dartprune.names import Registry, unknown

IMPORTANCES = ("weights", "down", "none")


@dataclass(frozen=True)
class TokenSelector(ABC):
    """Base of all token selectors.

    kind: its registered name.  context: whether the context's mask names the candidates; otherwise every neuron is one,
    and the mask's score is never asked for.  ceiling: whether everything is computed to know what may be left out, so
    that no backend can save anything.  statistics: of the trace, beside the scorer's.  can_compensate: whether the mean
    of what was dropped can stand in a dropped neuron's place.  learns: whether tokens of the context teach it.
    """

    kind: ClassVar[str] = ""
    context: ClassVar[bool] = False
    ceiling: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()
    can_compensate: ClassVar[bool] = False

    @property
    def learns(self) -> bool:
        """See the class."""
        return False

    @abstractmethod
    def split(self, rows: float, neurons: int, *, gated: bool) -> tuple[int, int]:
        """Candidates and neurons per token, for weights worth `rows` whole neurons out of `neurons`."""


T = TypeVar("T", bound=type[TokenSelector])
L = TypeVar("L")
token_kinds: Registry[type[TokenSelector]] = Registry("token selector")
# what chooses while a selector is attached, by its kind: subclasses of `runtime.selectors.layer_selector.LayerSelector`
live_selectors: Registry[Any] = Registry("live selector")


def register_token(cls: T) -> T:
    """Class decorator: make a selector's settings known under their `kind`."""
    token_kinds.register(cls.kind, cls)
    return cls


def register_selector(settings: type[TokenSelector]) -> Callable[[L], L]:
    """Class decorator for a `LayerSelector`: it chooses wherever these settings are attached."""

    def add(cls: L) -> L:
        live_selectors.register(settings.kind, cls)
        return cls

    return add


@register_token
@dataclass(frozen=True)
class Exact(TokenSelector):
    """The k highest `|a_i| * |W_down[:, i]|` of the token itself: all is computed, a ceiling (WINA, TEAL)."""

    kind: ClassVar[str] = "exact"
    ceiling: ClassVar[bool] = True

    def split(self, rows: float, neurons: int, *, gated: bool) -> tuple[int, int]:
        """Every neuron is a candidate."""
        return neurons, round(rows)


@register_token
@dataclass(frozen=True)
class TokenGate(TokenSelector):
    """The context's mask names candidates; each token reads their gate rows and goes on with the highest (after CATS).

    rate: share of the candidates that a token uses. Weights read of a layer: `c (1 + 2 rate) / 3` for a share c of
    candidates, `c (1 + rate) / 2` for a plain FFN, so that c follows from the budget; where every neuron is a candidate
    already, the rate rises instead.
    importance: what `|act(W_gate x)_i|` is multiplied with: `weights` for `|W_down[:, i]| * |W_up[i, :]|`, `down` for
    `|W_down[:, i]|`, `none` for 1. A plain FFN always takes `|a_i| * |W_down[:, i]|`, which is exact.
    """

    kind: ClassVar[str] = "gate"
    context: ClassVar[bool] = True
    rate: float = 0.15
    importance: str = "weights"

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1:
            raise UserError(f"TokenGate: rate must lie in (0, 1], got {self.rate!r}")
        if self.importance not in IMPORTANCES:
            raise unknown("importance for TokenGate", self.importance, IMPORTANCES)

    def split(self, rows: float, neurons: int, *, gated: bool) -> tuple[int, int]:
        """Candidates first, then as many neurons as the weights left over are worth."""
        # in single rows of a matrix: a candidate costs one, a chosen neuron those of the other matrices
        chosen_cost = 2 if gated else 1
        budget = rows * (1 + chosen_cost)
        candidates = max(1, min(neurons, round(budget / (1 + chosen_cost * self.rate))))
        return candidates, max(1, min(candidates, round((budget - candidates) / chosen_cost)))


@register_token
@dataclass(frozen=True)
class Sketch(TokenSelector):
    """Every neuron is estimated from a few bits of its weights; each token computes the highest (after SparseInfer).

    bits: 1 to 4 per weight of gate and up, or `auto`: chosen from the weights and the sparsity.
    activation_bits: 2 to 8 of the rounded input.  outliers: largest entries of the input that stay exact.
    calibrate: whether the context's tokens teach how wrong the estimates are; then neurons are ranked by what is
    expected of them.  file: a sketch written by `dartprune.selectors.save_sketch`; None builds it while attaching.
    """

    kind: ClassVar[str] = "sketch"
    can_compensate: ClassVar[bool] = True
    bits: int | str = "auto"
    activation_bits: int = 4
    outliers: int = 4
    calibrate: bool = True
    file: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in ("auto", 1, 2, 3, 4):
            raise UserError(f"Sketch: bits must be 1, 2, 3, 4 or 'auto', got {self.bits!r}")
        for name, least, most in (("activation_bits", 2, 8), ("outliers", 0, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UserError(f"Sketch: {name} must be a whole number from {least} to {most}, got {value!r}")
        if not isinstance(self.calibrate, bool):
            raise UserTypeError(f"Sketch: calibrate must be True or False, got {self.calibrate!r}")
        if self.file is not None and not isinstance(self.file, str):
            raise UserTypeError(f"Sketch: file must be a path as text or None, got {self.file!r}")

    @property
    def rounding(self) -> tuple[int, int]:
        """How inputs are rounded: activation bits and outliers."""
        return self.activation_bits, self.outliers

    @property
    def learns(self) -> bool:
        """Where it is calibrated."""
        return self.calibrate

    def split(self, rows: float, neurons: int, *, gated: bool) -> tuple[int, int]:
        """Every neuron is a candidate; what the sketch itself costs was taken off the budget before."""
        return neurons, max(1, round(rows))
