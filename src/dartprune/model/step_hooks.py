"""What a run says and hears of a decode step whose layers are computed in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from torch import Tensor


class FFNKind(Enum):
    """How the FFNs of a step are computed: whole, over given lists, or each token by a sketch beside or in the rows."""

    DENSE = auto()
    LISTS = auto()
    SKETCH = auto()
    NESTED = auto()


@dataclass(frozen=True)
class FFNChoice:
    """What the FFNs of a step compute.

    slots: int64 [N], whose row of the tensors each line is.  capacity: rows of the tensors.
    tensors: of each layer, None for what there is not. Lists: compensation, index and count. Own choices: compensation,
    `wanted`, importance, errors and means, and for a sketch planes and scale of gate and of up.
    rounding: of a sketch: bits and outliers of inputs, bits of weights.
    """

    kind: FFNKind
    slots: Tensor
    capacity: int = 1
    tensors: Sequence[Sequence[Tensor | None]] = ()
    rounding: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class LayersMade:
    """What a step leaves behind.

    inputs: of the FFNs, [L, N, H].  attention: the last layer's, [N, 1, H].  counts: how many neurons each token has
    chosen, int32 [L, N].  unions: how many they are together, int32 [L].  The last two are empty where none chose.
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
