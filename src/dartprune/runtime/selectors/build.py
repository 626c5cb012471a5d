"""The live form of a method's token selector in every layer."""

from __future__ import annotations

from dartprune.errors import UserError
from dartprune.ffn import Backend, FFNWeights
from dartprune.ffn.selector_kernels import kernels_of
from dartprune.method import Method
from dartprune.model.families import Decoder
from dartprune.model.layer import Layer
from dartprune.model.probe import down_norms
from dartprune.model.weights import row_weights
from dartprune.runtime.preparation import Preparation
from dartprune.runtime.selectors import gate_layer, sketch_layer
from dartprune.runtime.selectors.layer_selector import LayerFacts, LayerSelector, ModelFacts, Place
from dartprune.selectors.settings import live_selectors
from dartprune.selectors.sketches import Progress

__all__ = ["SelectorBuilder", "gate_layer", "sketch_layer"]  # those two register what they define


class SelectorBuilder:
    """Makes the selector of one layer after another."""

    def __init__(
        self,
        method: Method,
        decoder: Decoder,
        place: dict[int, Place],
        preparation: Preparation,
    ) -> None:
        """Set up for the selector of a method; `place` says where each layer computes and in which dtype.

        Raises:
            ValueError: nothing is registered that chooses for these settings.
        """
        self._place = place
        self._preparation = preparation
        self._layers = len(decoder.layers)
        self._make = None
        self.has_kernels = True
        selector = method.token
        if selector is None:
            return
        if selector.kind not in live_selectors.names():
            raise UserError(
                f"nothing chooses for {type(selector).__name__}: register its LayerSelector with "
                "dartprune.selectors.register_selector"
            )
        live: type[LayerSelector] = live_selectors.get(selector.kind)
        self.has_kernels = live.has_kernels
        self._make = live.prepared(
            selector, ModelFacts(decoder, method.sparsity, self._facts, compensate=method.compensate is not None)
        )

    def _facts(self, layer: Layer, weights: FFNWeights | str | None = None) -> LayerFacts:
        weights = row_weights(layer) if weights is None else weights
        place = self._place[layer.index]
        return LayerFacts(layer, place, weights, down_norms(layer, weights, *place))

    def of(
        self, layer: Layer, weights: FFNWeights | str, backend: Backend, progress: Progress | None
    ) -> LayerSelector | None:
        """The selector of a layer whose weights lie as the backend wants them; None where the method has none."""
        if self._make is None:
            return None
        facts = self._facts(layer, weights)
        if self.has_kernels and not isinstance(weights, str) and backend.gathers:
            facts.kernels = kernels_of(backend)
        made = self._make(facts)
        if facts.kernels is not None and not isinstance(weights, str):
            uses = {"calibrated": made.calibrates, "compensated": made.compensates}
            with self._preparation("token selectors"):
                facts.kernels.prepare(weights, facts.sketch, **uses)
        if progress is not None:
            progress(layer.index + 1, self._layers)
        return made
