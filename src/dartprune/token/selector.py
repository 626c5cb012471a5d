"""Settings of the token selectors: how each token gets neurons of its own (docs/token-selection.md).

A selector is a frozen dataclass. It turns what a budget leaves of a layer into two numbers: the candidates, named by
the context's mask, and how many of them each token uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from dartprune.names import Registry


@dataclass(frozen=True)
class TokenSelector(ABC):
    """Base of all token selectors.

    kind: its registered name.  context: whether the context's mask names the candidates; otherwise every neuron is one,
    and the mask's score is never asked for.  ceiling: whether everything is computed to know what may be left out, so
    that no backend can save anything.  statistics: of the trace, beside the scorer's.
    """

    kind: ClassVar[str] = ""
    context: ClassVar[bool] = False
    ceiling: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def split(self, rows: float, neurons: int, *, gated: bool) -> tuple[int, int]:
        """Candidates and neurons per token, for weights worth `rows` whole neurons out of `neurons`."""


T = TypeVar("T", bound=type[TokenSelector])
token_kinds: Registry[type[TokenSelector]] = Registry("token selector")


def register_token(cls: T) -> T:
    """Class decorator: make a selector known under its `kind`."""
    token_kinds.register(cls.kind, cls)
    return cls


@register_token
@dataclass(frozen=True)
class Exact(TokenSelector):
    """The k highest `|a_i| * |W_down[:, i]|` of the token itself: all is computed, a ceiling (WINA, TEAL)."""

    kind: ClassVar[str] = "exact"
    ceiling: ClassVar[bool] = True

    def split(self, rows: float, neurons: int, *, gated: bool) -> tuple[int, int]:
        """Every neuron is a candidate."""
        return neurons, round(rows)
