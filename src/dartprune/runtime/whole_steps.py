"""Decode steps whose layers are computed in one call: what their FFNs compute, and what the run hears of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.ffn.quantised import NestedSketch, QuantisedRows
from dartprune.model.layer import Layer
from dartprune.model.model_site import ModelSite
from dartprune.model.step_hooks import FFNChoice, LayersMade
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.model_hooks import LiveModel
from dartprune.runtime.selectors.sketch_layer import SketchLayer
from dartprune.runtime.step import Step


class WholeSteps:
    """What a run says and hears of such steps: see `StepHooks`.

    nested: the kind of choices that will come, None for none.
    """

    def __init__(self, layers: Sequence[LiveLayer], live: LiveModel, door: ModelSite, *, prunes: bool) -> None:
        self._layers, self._live, self._door = list(layers), live, door
        self.nested: bool | None = None
        if all(_chooses_by_high_codes(layer) for layer in layers):
            self.nested = True
        elif not prunes or all(_has_lists(layer) for layer in layers):
            self.nested = False
        self._step: Step | None = None  # of the forward under way
        self._everything = _everything([layer.parts for layer in layers])

    def choice(self, lines: int) -> FFNChoice | None:
        """See `StepHooks.choice`."""
        # a call of one layer, which nobody follows, must not be taken for the beginning of a forward
        if self.nested is None or self._live.inside != threading.get_ident() or not self._door.outermost:
            return None
        states = {id(layer.state): layer.state for layer in self._layers}
        self._step = step = next(iter(states.values())).step
        if len(states) != 1:
            return None
        if step is None and self.nested is False:
            slots = torch.zeros(lines, dtype=torch.int64, device="cpu")
            return FFNChoice(slots, 1, False, self._everything)
        if step is None or not step.gathering or step.staging or step.weight is not None or step.sample is not None:
            return None
        tensors = [_nested(layer) if self.nested else _lists(layer) for layer in self._layers]
        return FFNChoice(step.row_slots, self._capacity, bool(self.nested), tensors)

    def made(self, step: LayersMade) -> None:
        """See `StepHooks.made`."""
        told, self._step = self._step, None
        if told is None:
            return
        self._layers[-1].state.attention = step.attention
        if told.ring is not None:
            rows, *where = told.ring
            for layer, x in zip(self._layers, step.inputs.index_select(1, rows).unbind(0), strict=True):
                if layer.ring is not None:
                    layer.ring.keep(x, *where)
        if self.nested:
            for layer, count, union in zip(self._layers, step.counts.unbind(0), step.unions.unbind(0), strict=True):
                assert layer.selector is not None
                layer.selector.chosen(count, union)

    @property
    def _capacity(self) -> int:
        return int(self._layers[0].selection.count.shape[0])


def _chooses_by_high_codes(layer: LiveLayer) -> bool:
    """Whether the kernel of nested rows is what computes this layer's tokens."""
    selector = layer.selector
    if not isinstance(selector, SketchLayer) or selector.kernels is None or layer.backend.name != "cpu":
        return False
    return isinstance(selector.sketch, NestedSketch)


def _has_lists(layer: LiveLayer) -> bool:
    """Whether the kernel of given lists is."""
    rows = isinstance(layer.weights, QuantisedRows)
    return layer.selector is None and layer.backend.name == "cpu" and layer.backend.gathers and rows


def _nested(layer: LiveLayer) -> tuple[Tensor | None, ...]:
    selector = layer.selector
    assert isinstance(selector, SketchLayer)
    errors = selector.errors if selector.calibrates else None
    others = (selector.means, selector.compensation) if selector.compensates else (None, None)
    return selector.wanted, selector.importance, errors, *others


def _lists(layer: LiveLayer) -> tuple[Tensor | None, ...]:
    selection = layer.selection
    return selection.index, selection.count, selection.compensation if selection.has_compensation else None


def _everything(layers: Sequence[Layer]) -> list[tuple[Tensor | None, ...]]:
    """Lists of all neurons."""
    made: dict[int, tuple[Tensor | None, ...]] = {}
    for layer in layers:
        if layer.neurons not in made:
            index = torch.arange(layer.neurons, dtype=torch.int32, device="cpu")[None]
            made[layer.neurons] = index, torch.tensor([layer.neurons], dtype=torch.int32, device="cpu"), None
    return [made[layer.neurons] for layer in layers]
