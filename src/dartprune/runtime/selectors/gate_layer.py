"""The token gate at work in one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dartprune.ffn.selector_kernels import SelectorKernels
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.weights import FFNWeights
from dartprune.model.layer import Layer
from dartprune.model.probe import row_norms
from dartprune.runtime.selectors.layer_selector import LayerFacts, LayerSelector, ModelFacts
from dartprune.selectors.settings import TokenGate, register_selector
from dartprune.selectors.sketches import matrices_of


@register_selector(TokenGate)
class GateLayer(LayerSelector):
    """The highest `|act(W_gate x)_i|` among the candidates, times their importance (CATS, arXiv 2404.08763)."""

    has_kernels = True

    @classmethod
    def prepared(cls, settings: TokenGate, model: ModelFacts) -> Callable[[LayerFacts], LayerSelector]:
        """See `LayerSelector.prepared`."""
        return lambda facts: cls(facts.layer, facts.place[0], _importance(settings, facts), facts.kernels)

    def __init__(
        self, layer: Layer, device: torch.device, importance: Tensor | None, kernels: SelectorKernels | None
    ) -> None:
        super().__init__(layer, device, importance, layer.matrices - 1, kernels)

    def fixed_share(self, candidates: int) -> float:
        """The candidates' gate rows (up rows in a plain FFN)."""
        return candidates / (self.layer.matrices * self.layer.neurons)

    def compute(
        self, x: Tensor, weights: FFNWeights, index: Tensor, count: Tensor, slots: Tensor, wanted: Tensor
    ) -> TokenRows:
        """See `LayerSelector.compute`."""
        assert self.kernels is not None
        return self.kernels.gated_rows(x, weights, index, count, slots, wanted, importance=self.importance)

    def scores(self, a: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """`|act(W_gate x)|`, or `|a|` where there is no gate."""
        if not self.layer.gated:
            return a.float().abs()
        return self.layer.gate_activations(x).float().abs()


def _importance(settings: TokenGate, facts: LayerFacts) -> Tensor | None:
    """What a gate's activation is multiplied with, float32 [I]; None: 1."""
    if not facts.layer.gated or settings.importance == "down":
        return facts.norms
    if settings.importance == "none":
        return None
    return facts.norms * row_norms(matrices_of(facts.layer, facts.weights, *facts.place).up)
