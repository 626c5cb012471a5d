"""What a run hears of a model that it is attached to: at each layer, and at the model's own doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class LayerHooks(Protocol):
    """What the run does at each place of one decoder layer."""

    def norm(self, y: Tensor) -> None:
        """The residual stream before the FFN's norm."""

    def ffn(self, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
        """The FFN of input x; `original` computes it the model's way."""

    def first(self, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
        """The first projection of an FFN that is no module of its own."""

    def down(self, a: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The down projection of input a."""

    def contribution(self, z: Tensor) -> None:
        """What the FFN adds to the residual stream, before the family's scale."""

    def attention(self, out: Tensor) -> None:
        """The last layer's attention output."""


class ModelHooks(Protocol):
    """What the run does at the doors of the model."""

    armed: bool
    inside: int | None  # the thread in which a forward of the model runs
    split: int
    lock: Any  # a re-entrant lock

    def prepared(self, inputs: dict[str, Any], call: dict[str, Any]) -> None:
        """`generate()` is about to run this forward."""

    def candidates(self, inputs: dict[str, Any]) -> None:
        """The candidates that came with the prompt are about to be verified."""

    def begin(self, call: dict[str, Any]) -> None:
        """A forward that `generate()` did not announce is about to run."""

    def concerns(self, call: dict[str, Any]) -> bool:
        """Whether a direct call of the decoder without its head is one to be followed."""

    def finish(self, output: Any) -> None:
        """The forward has run."""

    def abort(self) -> None:
        """The forward has failed."""

    def generating(self, prompt: Tensor | None) -> None:
        """`generate()` begins."""

    def generated(self) -> None:
        """`generate()` is over, well or not."""

    def stopped(self, done: Tensor) -> None:
        """Which lines have ended, bool [B]."""
