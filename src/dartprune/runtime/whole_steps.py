"""Decode steps whose layers are computed in one call: what their FFNs compute, and what the run hears of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from dartprune.ffn.quantised import NestedSketch, QuantisedRows
from dartprune.model.model_site import ModelSite
from dartprune.model.step_hooks import FFNChoice, FFNKind, LayersMade
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.model_hooks import LiveModel
from dartprune.runtime.selectors.sketch_layer import SketchLayer
from dartprune.runtime.selectors.spending import Spending
from dartprune.runtime.step import Step


class WholeSteps:
    """What a run says and hears of such steps: see `StepHooks`.

    kind: of the choices that come, None where its FFNs are not computed so.  made_so_far: how many such steps.
    """

    def __init__(
        self,
        layers: Sequence[LiveLayer],
        live: LiveModel,
        door: ModelSite,
        spending: Spending | None,
        *,
        prunes: bool,
    ) -> None:
        self._layers, self._live, self._door, self._spending = list(layers), live, door, spending
        kinds = {_kind(layer) for layer in layers} if prunes else {FFNKind.DENSE}
        rings = {None if layer.ring is None else layer.ring.rings for layer in layers}
        together = len(kinds) == len({id(layer.state) for layer in layers}) == len(rings) == 1  # and on one device
        self._rings = rings.pop()
        self.kind = kinds.pop() if together else None
        self._step: Step | None = None  # of the forward under way
        self.made_so_far = 0

    @property
    def steps(self) -> int | None:
        """How many steps were computed so, None where none can be."""
        return None if self.kind is None else self.made_so_far

    def example(self) -> FFNChoice | None:
        """A choice as they come, for kernels that are to be compiled: nothing of it is read."""
        slots = torch.zeros(1, dtype=torch.int64, device="cpu")
        return None if self.kind is None else FFNChoice(self.kind, slots, 1, (), self._rounding)

    def choice(self, lines: int) -> FFNChoice | None:
        """See `StepHooks.choice`."""
        # a call of one layer, which nobody follows, must not be taken for the beginning of a forward
        if self.kind is None or self._live.inside != threading.get_ident() or not self._door.outermost:
            return None
        self._step = step = self._layers[0].state.step
        if self.kind is FFNKind.DENSE:
            return FFNChoice(self.kind, torch.zeros(lines, dtype=torch.int64, device="cpu")) if step is None else None
        if step is None or not step.gathering or step.staging or step.weight is not None or step.sample is not None:
            return None
        capacity = int(self._layers[0].selection.count.shape[0])
        return FFNChoice(self.kind, step.row_slots, capacity, list(map(self._tensors, self._layers)), self._rounding)

    def made(self, step: LayersMade) -> None:
        """See `StepHooks.made`."""
        self.made_so_far += 1
        told, self._step = self._step, None
        if told is None:
            return
        self._layers[-1].state.attention = step.attention
        if told.ring is not None:
            rows, slots, places = told.ring
            assert self._rings is not None
            self._rings.keep(step.inputs.index_select(1, rows), slots, places)
        if self._spending is not None:
            self._spending.tell(step.counts, step.unions)

    def _tensors(self, layer: LiveLayer) -> tuple[Tensor | None, ...]:
        """What a layer's choice is made of, see `FFNChoice.tensors`."""
        selection, selector = layer.selection, layer.selector
        if selector is None:
            added = selection.compensation if selection.has_compensation else None
            return added, selection.index, selection.count
        assert isinstance(selector, SketchLayer)
        means, added = (selector.means, selector.compensation) if selector.compensates else (None, None)
        errors = selector.errors if selector.calibrates else None
        given = added, selector.wanted, selector.importance, errors, means
        if isinstance(selector.sketch, NestedSketch):
            return given
        gate, up = selector.sketch.gate or selector.sketch.up, selector.sketch.up
        return *given, gate.planes, gate.scale, up.planes, up.scale

    @property
    def _rounding(self) -> tuple[int, int, int]:
        """Of a sketch beside the weights: see `FFNChoice.rounding`."""
        selector = self._layers[0].selector
        if not isinstance(selector, SketchLayer) or isinstance(selector.sketch, NestedSketch):
            return 0, 0, 0
        return selector.sketch.activation_bits, selector.sketch.outliers, selector.sketch.up.bits


def _kind(layer: LiveLayer) -> FFNKind | None:
    """By which kernel this layer's pruned tokens are computed, where it is one that the call for all layers has."""
    selector = layer.selector
    if layer.backend.name != "cpu" or not layer.backend.gathers or isinstance(layer.weights, str):
        return None
    if selector is None:
        return FFNKind.LISTS
    if not isinstance(selector, SketchLayer) or selector.kernels is None:
        return None
    return FFNKind.NESTED if isinstance(layer.weights, QuantisedRows) else FFNKind.SKETCH
