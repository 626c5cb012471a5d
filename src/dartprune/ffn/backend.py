"""What every way of computing a pruned FFN looks like, and the activations they share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dartprune.ffn.weights import FFNWeights


class Backend(Protocol):
    """A way of computing a pruned FFN.

    name: for the registry and the report.
    saves_time: whether neurons that are not kept are left unread.
    gathers: True if `ffn` computes the whole FFN from index lists; False if the model's own FFN runs with its
        neurons zeroed (then `ffn` is never called).
    wants_rows: whether every neuron's rows must be contiguous memory; the run lays the weights out so while attached.
    """

    name: str
    saves_time: bool
    gathers: bool
    wants_rows: bool

    def reason_against(self, weights: FFNWeights | str, device: torch.device) -> str | None:
        """None if this backend can compute an FFN with these weights (or their lack, as a reason) on `device`."""

    def prepare(self, weights: FFNWeights) -> None:
        """Compile what must be compiled for these shapes, so that no token waits for it."""

    def ffn(self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor) -> Tensor:
        """Compute the pruned FFN of x [N, H]; row n keeps the neurons `index[slots[n], :count[slots[n]]]`.

        Args:
            x: [N, H], any float dtype.
            weights: the FFN's weights.
            index: int32 [S, W], kept neurons of each slot, no duplicates.
            count: int32 [S], how many entries of each row of `index` count.
            slots: int64 [N], the slot of each row of x.

        Returns:
            [N, H] in x's dtype.
        """

    def bytes_read(self, weights: FFNWeights, kept: Sequence[Tensor]) -> int:
        """Weight bytes that one call reads for sequences that keep these neurons (int32 [k] each)."""


Operator = TypeVar("Operator", bound=Callable[..., Any])


def exactly(function: Operator) -> Operator:
    """Decorator of an operator: it computes in the dtypes that it is given, whatever autocast is in force."""

    @functools.wraps(function)
    def operator(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return operator  # type: ignore[return-value]


def outside_graphs(function: Operator) -> Operator:
    """Decorator: graphs of torch.compile end before the function and go on behind it."""
    disabled: Operator = torch.compiler.disable(function)
    return disabled


def activation(name: str, x: Tensor) -> Tensor:
    """Apply an activation by its canonical name, in x's dtype."""
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"activation {name!r} has no canonical form: use the masked backend")
