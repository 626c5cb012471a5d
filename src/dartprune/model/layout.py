"""Keeps the projections of a model row by row per neuron while a run needs it, without a second copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from dartprune.model.layer import Layer
from dartprune.model.weights import row_weights


def scattered(layer: Layer) -> list[nn.Module]:
    """The projections whose rows per neuron are no contiguous memory as they are (down, or GPT-2's c_fc)."""
    weights = row_weights(layer)
    if isinstance(weights, str):
        return []
    parts = [(layer.up, weights.up), (layer.down, weights.down)]
    if layer.gate is not None and weights.gate is not None:
        parts.append((layer.gate, weights.gate))
    return [module for module, rows in parts if not rows.is_contiguous()]


def storage_owners(core: nn.Module) -> Counter[int]:
    """How many modules' parameters lie in each storage of a model, by the storage's address."""
    return Counter(
        parameter.untyped_storage().data_ptr()
        for module in core.modules()
        for parameter in module.parameters(recurse=False)
        if not parameter.is_meta
    )


def shared_weights(owners: Counter[int], modules: Sequence[nn.Module]) -> str | None:
    """Why these modules' weights cannot be laid out anew: another module reads the same memory; None if none does."""
    for module in modules:
        weight: Tensor = module.weight  # type: ignore[assignment]
        if owners[weight.untyped_storage().data_ptr()] > 1:
            return "the FFN shares its weights with another module, so they cannot be laid out by rows"
    return None


class RowLayout:
    """Stores weights transposed and shows them as they were: same Parameter objects, shapes and values.

    No memory beyond one weight at a time. `undo` gives contiguous weights back, bit by bit the same.
    """

    def __init__(self) -> None:
        self._done: list[nn.Module] = []

    def apply(self, modules: Sequence[nn.Module]) -> None:
        """Lay out the weights of these modules."""
        for module in modules:
            weight: Tensor = module.weight  # type: ignore[assignment]
            weight.data = weight.data.t().contiguous().t()
            self._done.append(module)

    def undo(self) -> None:
        """Put every weight back; a second call does nothing."""
        while self._done:
            weight: Tensor = self._done.pop().weight  # type: ignore[assignment]
            weight.data = weight.data.contiguous()
