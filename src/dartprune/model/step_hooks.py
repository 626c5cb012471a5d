"""What a run says and hears of a decode step whose layers are computed in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class FFNChoice:
    """What the FFNs of a step compute.

    slots: int64 [N], whose row of the tensors each line is.  capacity: rows of the tensors.
    nested: each token chooses by the high codes; else over given lists.
    tensors: of each layer, None for what there is not. Nested: `wanted`, importance, errors, means and compensation;
    else index, count and compensation.
    """

    slots: Tensor
    capacity: int
    nested: bool
    tensors: Sequence[Sequence[Tensor | None]]


@dataclass(frozen=True)
class LayersMade:
    """What a step leaves behind.

    inputs: of the FFNs, [L, N, H].  attention: the last layer's, [N, 1, H].  counts: how many neurons each token has
    chosen, int32 [L, N].  unions: how many they are together, int32 [L].  The last two are empty for given lists.
    """

    inputs: Tensor
    attention: Tensor
    counts: Tensor
    unions: Tensor


class StepHooks(Protocol):
    """What a run says and hears of such a step."""

    def choice(self, lines: int) -> FFNChoice | None:
        """What the FFNs of the forward under way compute, None where it needs the modules themselves."""

    def made(self, step: LayersMade) -> None:
        """The layers have run."""
