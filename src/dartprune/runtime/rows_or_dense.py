"""How a batch of pruned sequences is computed: by the row kernel over the union of their neurons, or dense with masks.

Reading each sequence's rows on their own is no third way: a row of the union is read once and serves all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dartprune.cache import cache_folder
from dartprune.ffn.backend import Backend
from dartprune.ffn.masked import apply_mask
from dartprune.ffn.quantised import QuantisedRows
from dartprune.ffn.timing import Dense, Timing, kept_timing
from dartprune.ffn.weights import FFNWeights
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.slots import Slot

SMALL = 1 << 22  # weight bytes of a layer under which the row kernel always serves: the caches hold it either way
MEASURED = 1 << 28  # weight bytes that are measured on: more than the caches hold


def has_choice(backend: Backend, weights: FFNWeights | str) -> bool:
    """Whether a batch on this layer may run dense with masks where that is faster; then its masks must be held."""
    # rows of 4 and 8 bits have no other form that could be faster
    return backend.name == "cpu" and not isinstance(weights, (str, QuantisedRows)) and _bytes(weights) >= SMALL


class RowsOrDense:
    """Decides for each set of sequences and masks; a decision reads the masks once and holds until they change."""

    def __init__(self, layers: Sequence[LiveLayer]) -> None:
        self.layers = list(layers)
        # a token selector computes by rows of its own
        self._open = all(layer.selector is None and has_choice(layer.backend, layer.weights) for layer in layers)
        self.always_rows = False
        self._timing: dict[tuple[int, int, int], Timing] = {}
        self._known: tuple[tuple[int, tuple[int, ...]], bool] | None = None

    def gathers(self, slots: Sequence[Slot], masks: int) -> bool:
        """Whether the row kernel is the faster way for one token of each of these pruned sequences.

        Args:
            slots: the sequences.
            masks: changes whenever a mask does.
        """
        if self.always_rows or not self._open or len(slots) == 1:
            return True
        key = (masks, tuple(slot.id for slot in slots))
        if self._known is None or self._known[0] != key:
            self._known = (key, self._compare(slots))
        return self._known[1]

    def _compare(self, slots: Sequence[Slot]) -> bool:
        kernel = dense = 0.0
        rows = [slot.id for slot in slots]
        for layer in self.layers:
            timing = self._timing_of(layer)
            masks = layer.selection.mask[rows]
            kernel += timing.kernel_seconds(int(masks.any(0).sum()), int(masks.sum()))
            dense += timing.dense_seconds(len(slots))
        return kernel < dense

    def _timing_of(self, layer: LiveLayer) -> Timing:
        key = _shape(layer)
        if key not in self._timing:
            alike = [other for other in self.layers if _shape(other) == key]
            alike = alike[: max(1, MEASURED // _bytes(_rows(layer)))]
            weights = [_rows(other) for other in alike]
            self._timing[key] = kept_timing(cache_folder(), weights, [_dense(other) for other in alike])
        return self._timing[key]


def _dense(layer: LiveLayer) -> Dense:
    def work(x: Tensor) -> Tensor:
        a = layer.parts.activations(x)
        out: Tensor = layer.parts.projected(apply_mask(a[:, None], a > 0)[:, 0])
        return out

    return work


def _rows(layer: LiveLayer) -> FFNWeights:
    assert not isinstance(layer.weights, str)
    return layer.weights


def _shape(layer: LiveLayer) -> tuple[int, int, int]:
    weights = _rows(layer)
    return weights.matrices, weights.neurons, weights.hidden


def _bytes(weights: FFNWeights) -> int:
    return weights.neurons * weights.row_bytes
