"""Looks at vectors inside a model while it runs: attention outputs and residual streams of chosen layers.

Plain torch hooks on modules that stand beside the FFN, so that every backend goes on as it does without them; only
where a family's residual stream is the FFN's own input and that FFN is no module (OPT with norms after) do the row
backends step back. Hooks are gone after the block, also after an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.model.families import Decoder, Layer, describe


@dataclass(frozen=True)
class Point:
    """A place inside the model. layer: index.  space: `attention` or `residual`."""

    layer: int
    space: str

    @property
    def name(self) -> str:
        """For people and tables."""
        return f"{self.space} {self.layer}"


def points_of(model: nn.Module, layers: Sequence[str], spaces: Sequence[str]) -> list[Point]:
    """The places that are asked for, each once, in the order of layers; ValueError for a layer that is not there."""
    count = len(describe(model).layers)
    named = {"first": 0, "middle": count // 2, "last": count - 1}
    indices: list[int] = []
    for text in layers:
        index = named.get(text, int(text) if text.isdigit() else -1)
        if not 0 <= index < count:
            raise UserError(f"unknown layer {text!r}: write first, middle, last, or 0 to {count - 1}")
        indices.append(index)
    return [Point(index, space) for index in sorted(set(indices)) for space in spaces]


class Observer:
    """Keeps the vectors of a forward at some points until they are taken; a context manager."""

    def __init__(self, model: nn.Module, points: Sequence[Point]) -> None:
        """Set up.

        Raises:
            ValueError: a compiled model, in which hooks that come later are silently ignored.
        """
        if hasattr(model, "_orig_mod"):
            raise UserError("a compiled model cannot be observed: give the model as it was before torch.compile")
        self.points = list(points)
        self._decoder: Decoder = describe(model)
        self._handles: list[Any] = []
        self._seen: dict[Point, Tensor] = {}

    def __enter__(self) -> Observer:
        try:
            for point in self.points:
                self._handles.append(self._hook(point, self._decoder.layers[point.layer]))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._seen.clear()

    def _hook(self, point: Point, layer: Layer) -> Any:
        if point.space == "attention":

            def after(module: nn.Module, args: Any, output: Any) -> None:
                self._seen.setdefault(point, output.detach())

            return layer.attention_output.register_forward_hook(after)

        def ahead(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            # the first call of a forward: a replay after it runs projections again
            self._seen.setdefault(point, (args[0] if args else next(iter(kwargs.values()))).detach())

        # without a norm before the FFN the residual stream is what the FFN is given
        module = layer.norm if layer.norm is not None else layer.entry
        return module.register_forward_pre_hook(ahead, with_kwargs=True)

    def take(self, lines: int) -> Tensor:
        """Vectors of the forward since the last call, float32 [points, lines, tokens, H]; then they are forgotten.

        Raises:
            RuntimeError: the forward did not pass a point.
        """
        missing = [point.name for point in self.points if point not in self._seen]
        if missing:
            raise RuntimeError(f"the forward passed no vector at {', '.join(missing)}: its modules were not called")
        device = next(self._decoder.layers[-1].attention_output.parameters()).device
        vectors = [self._seen[point].reshape(lines, -1, self._decoder.hidden) for point in self.points]
        self._seen.clear()
        return torch.stack([part.float().to(device) for part in vectors])
