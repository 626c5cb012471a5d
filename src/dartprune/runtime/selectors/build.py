"""The live form of a method's token selector in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dartprune.ffn import Backend, FFNWeights
from dartprune.ffn.selector_kernels import kernels_of
from dartprune.model.families import Decoder
from dartprune.model.layer import Layer
from dartprune.model.probe import down_norms, row_norms
from dartprune.model.weights import row_weights
from dartprune.runtime.preparation import Preparation
from dartprune.runtime.selectors.layer_selector import ExactLayer, GateLayer, LayerSelector
from dartprune.runtime.selectors.sketch_layer import SketchLayer
from dartprune.selectors.settings import Sketch, TokenGate, TokenSelector
from dartprune.selectors.sketches import Matrices, Progress, Sketcher, matrices_of

Place = tuple[torch.device, torch.dtype]


class SelectorBuilder:
    """Makes the selector of one layer after another."""

    def __init__(
        self,
        selector: TokenSelector | None,
        decoder: Decoder,
        sparsity: float,
        place: dict[int, Place],
        preparation: Preparation,
    ) -> None:
        """Set up; `place` says where each layer computes and in which dtype."""
        self._preparation = preparation
        self.selector = selector
        self.place = place
        self._layers = len(decoder.layers)
        self._sketcher = Sketcher(selector, decoder, sparsity, self._facts) if isinstance(selector, Sketch) else None

    def _facts(self, layer: Layer) -> tuple[Matrices, Tensor]:
        weights, place = row_weights(layer), self.place[layer.index]
        return matrices_of(layer, weights, *place), down_norms(layer, weights, *place)

    def of(
        self, layer: Layer, weights: FFNWeights | str, backend: Backend, progress: Progress | None
    ) -> LayerSelector | None:
        """The selector of a layer whose weights lie as the backend wants them; None where the method has none."""
        if self.selector is None:
            return None
        device, dtype = self.place[layer.index]
        norms = down_norms(layer, weights, device, dtype)
        kernels = None if isinstance(weights, str) or not backend.gathers else kernels_of(backend)
        made: LayerSelector
        sketch = None
        if isinstance(self.selector, TokenGate):
            made = GateLayer(layer, device, self._importance(layer, weights, norms), kernels)
        elif self._sketcher is not None:
            parts = matrices_of(layer, weights, device, dtype)
            sketch = self._sketcher.of(layer, parts)
            biases = parts.gate_bias, parts.up_bias
            made = SketchLayer(
                layer, (device, dtype), norms, sketch, biases, kernels, calibrate=self._sketcher.settings.calibrate
            )
        else:
            made = ExactLayer(layer, device, norms, layer.matrices)
        if kernels is not None and not isinstance(weights, str):
            with self._preparation("token selectors"):
                kernels.prepare(weights, sketch, calibrated=made.learns)
        if progress is not None:
            progress(layer.index + 1, self._layers)
        return made

    def _importance(self, layer: Layer, weights: FFNWeights | str, norms: Tensor) -> Tensor | None:
        assert isinstance(self.selector, TokenGate)
        if not layer.gated or self.selector.importance == "down":
            return norms
        if self.selector.importance == "none":
            return None
        up = matrices_of(layer, weights, *self.place[layer.index]).up
        importance: Tensor = norms * row_norms(up)
        return importance
