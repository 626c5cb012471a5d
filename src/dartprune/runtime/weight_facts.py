"""What scorers and budgets need to know of the weights; worked out when first asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dartprune.budget import DOWN_SQUARE
from dartprune.errors import UserError
from dartprune.model.probe import down_norms, down_square
from dartprune.model.proxy import cached_forward_proxy, forward_proxy_flops
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.scoring import WEIGHT_FACTS


class WeightFacts:
    """The facts of all layers, see `dartprune.scoring.WEIGHT_FACTS` and `dartprune.budget.DOWN_SQUARE`."""

    def __init__(self, core: nn.Module, layers: Sequence[LiveLayer], needed: Sequence[str]) -> None:
        """Set up for the named facts.

        Raises:
            ValueError: a scorer reads weights that cannot be read. A warning tells where the work is long.
        """
        self._core = core
        self._known: dict[tuple[int, str], Tensor] = {}
        if any(name in WEIGHT_FACTS for name in needed):
            self._check(layers, needed)
        if DOWN_SQUARE in needed:
            for layer in layers:
                self(layer, DOWN_SQUARE)  # here, so that no text has to wait for it

    def _check(self, layers: Sequence[LiveLayer], needed: Sequence[str]) -> None:
        for layer in layers:
            if isinstance(layer.weights, str):
                raise UserError(
                    f"a scorer that reads the down projection cannot be used here: {layer.weights}; use 'magnitude'"
                )
        if any(name.startswith("proxy") for name in needed):
            vocabulary = self._unembedding().shape[0]
            flops = sum(forward_proxy_flops(layer.neurons, layer.parts.hidden, vocabulary) for layer in layers)
            if flops > 1e13:
                warnings.warn(
                    f"the forward proxy of this model takes {flops:.1e} floating point operations once: "
                    "hours on a CPU, minutes on a GPU; the result is cached on disk",
                    stacklevel=2,
                )

    def forget(self) -> None:
        """The weights were written to: everything is worked out anew when asked for."""
        self._known.clear()

    def __call__(self, layer: LiveLayer, name: str) -> Tensor:
        """A fact of one layer: float32 [I], or on the host [] for `down_square`."""
        key = (layer.index, name)
        if key not in self._known and name == DOWN_SQUARE:
            self._known[key] = torch.tensor(
                down_square(layer.parts, layer.weights, *layer.place), dtype=torch.float32, device="cpu"
            )
        if key not in self._known:
            if name == "down_norm":
                self._known[key] = down_norms(layer.parts, layer.weights, *layer.place)
            else:
                if isinstance(layer.weights, str):
                    raise UserError(f"{name} is not known: {layer.weights}")
                highest, mean = cached_forward_proxy(layer.weights.down, self._unembedding())
                self._known[layer.index, "proxy_max"] = highest.to(layer.trace.device)
                self._known[layer.index, "proxy_mean"] = mean.to(layer.trace.device)
        return self._known[key]

    def _unembedding(self) -> Tensor:
        head = self._core.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UserError("the model has no output embeddings, which forward-proxy scores need: use 'magnitude'")
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UserError(
                f"the output embeddings are a {type(head).__name__} without plain weights, which forward-proxy scores "
                "need: use 'magnitude'"
            )
        return weight
