"""What happens inside one layer during a forward: trace, mask, compute, remember the input."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dartprune.ffn import Backend, FFNWeights
from dartprune.ffn.masked import apply_mask
from dartprune.model.families import Layer
from dartprune.runtime.ring import LayerRing
from dartprune.runtime.selection import LayerSelection
from dartprune.runtime.selectors.layer import LayerToken
from dartprune.runtime.trace import LayerTrace, impact_terms


@dataclass
class Step:
    """One forward as the layers see it: B lines of T tokens; all tensors lie on the layer's device.

    slots: int64 [B].  row_slots: int64 [B * T].  weight, impact_weight: float32 [B, T] of 0 and 1, or None: not traced.
    ring: rows, slots and places for `LayerRing.write`, or None.  gathering: the backend computes the FFN from index
    lists.  masking: neurons are zeroed inside the model's own FFN.  staging: inputs are kept until it is known which
    tokens survive.  padded: some tokens are padding, whose values mean nothing.
    """

    slots: Tensor
    row_slots: Tensor
    weight: Tensor | None = None
    impact_weight: Tensor | None = None
    ring: tuple[Tensor, Tensor, Tensor] | None = None
    gathering: bool = False
    masking: bool = False
    staging: bool = False
    padded: bool = False


class DeviceState:
    """What the layers of one device share: the step of the forward under way, and what it leaves behind."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.attention: Tensor | None = None
        self.tracing_seconds = 0.0


class LayerRun:
    """The run's side of one layer; receives the calls of its `Site`."""

    def __init__(
        self,
        layer: Layer,
        state: DeviceState,
        trace: LayerTrace,
        selection: LayerSelection,
        ring: LayerRing | None,
        backend: Backend,
        weights: FFNWeights | str,
        place: tuple[torch.device, torch.dtype],
        *,
        residual: bool,
        token: LayerToken | None = None,
    ) -> None:
        self.layer = layer
        self.state = state
        self.trace = trace
        self.selection = selection
        self.ring = ring
        self.backend = backend
        self.weights = weights
        self.place = place
        self.residual = residual
        self.token = token
        self.staged: Tensor | None = None
        self.staged_impact: Tensor | None = None
        self._y: Tensor | None = None
        self._x: Tensor | None = None
        self._raw: Tensor | None = None
        self._transformed = layer.contribution is not layer.entry and layer.contribution is not layer.down

    @property
    def saves_time(self) -> bool:
        """Whether neurons that a token does not use are left unread here."""
        return self.backend.saves_time and (self.token is None or self.token.saves_time)

    @property
    def fixed_share(self) -> float:
        """Share of the layer's weight bytes that a token selector reads beside the weights."""
        return 0.0 if self.token is None else self.token.fixed_share(0)

    def norm(self, y: Tensor) -> None:
        """Keep the residual stream for the impact of this FFN."""
        step = self.state.step
        if step is not None and self._weighs(step):
            self._y = y.detach()

    def ffn(self, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
        """An FFN module: pruned by the backend, or the model's own."""
        step = self.state.step
        if step is None:
            return original()
        self._take(x, step)
        out = self._gathered(x, step) if step.gathering else original()
        self._made(out, step, self.layer.entry)
        return out

    def first(self, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
        """The first projection of an FFN without a module; skipped where the backend computes the whole."""
        step = self.state.step
        if step is None:
            return original()
        self._take(x, step)
        if step.gathering:
            # the activation that follows runs on x, and `down` drops its result
            self._x = x
            return x
        return original()

    def down(self, a: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The down projection: trace its input, zero what is not kept."""
        step = self.state.step
        if step is None:
            return original(a)
        if step.gathering:
            if self.layer.inline:
                x, self._x = self._x, None
                assert x is not None
                return self._gathered(x, step)
            return original(a)
        if step.weight is not None:
            self._trace(a, step.weight, step)
        if step.masking:
            a = self._masked(a, step)
        out = original(a)
        if step.masking:
            out = self._compensated(out, step)
        self._made(out, step, self.layer.down)
        return out

    def contribution(self, z: Tensor) -> None:
        """What the FFN adds to the residual stream."""
        step = self.state.step
        if step is not None:
            self._impact(z, step)

    def attention(self, out: Tensor) -> None:
        """Keep the last layer's attention output for the detector."""
        if self.state.step is not None:
            self.state.attention = out.detach()

    def _made(self, out: Tensor, step: Step, module: object) -> None:
        """Weigh what the FFN adds, or keep its output where a module after it makes something else of it."""
        if self.layer.contribution is module:
            self._impact(out, step)
        elif self._transformed and self._weighs(step):
            self._raw = out.detach()

    @staticmethod
    def _weighs(step: Step) -> bool:
        """Whether the impact of this forward's tokens is wanted."""
        return step.impact_weight is not None or step.staging

    def _take(self, x: Tensor, step: Step) -> None:
        x = x.detach()  # what is kept must not keep the graph of gradients alive
        if self.layer.norm is None and self._weighs(step):
            self._y = x
        if step.staging:
            self.staged = x.reshape(step.slots.shape[0], -1, x.shape[-1])
        if step.masking and self.token is not None:
            self._x = x
        if step.ring is not None and self.ring is not None:
            self.ring.write(x.reshape(-1, x.shape[-1]), *step.ring)

    def _gathered(self, x: Tensor, step: Step) -> Tensor:
        assert not isinstance(self.weights, str)
        rows = _as_autocast_has_it(x.reshape(-1, x.shape[-1]))
        if self.token is not None:
            return self.token.ffn(rows, self.weights, self.selection, step.row_slots).reshape(x.shape)
        out = self.backend.ffn(rows, self.weights, self.selection.index, self.selection.count, step.row_slots)
        return self._compensated(out.reshape(x.shape), step)

    def _masked(self, a: Tensor, step: Step) -> Tensor:
        if self.token is None:
            lines = a.reshape(step.slots.shape[0], -1, a.shape[-1])
            return apply_mask(lines, self.selection.rows_mask(step.slots)).reshape(a.shape)
        x, self._x = self._x, None
        assert x is not None
        rows = a.reshape(-1, a.shape[-1])
        mask = self.token.mask(rows, x.reshape(-1, x.shape[-1]), self.selection, step.row_slots)
        return rows.masked_fill(~mask, 0).reshape(a.shape)

    def _compensated(self, out: Tensor, step: Step) -> Tensor:
        if not self.selection.has_compensation:
            return out
        added = self.selection.compensation.index_select(0, step.slots)[:, None]
        lines = out.reshape(step.slots.shape[0], -1, out.shape[-1])
        return (lines + added.to(out.dtype)).reshape(out.shape)

    def _trace(self, a: Tensor, weight: Tensor, step: Step) -> None:
        lines = a.detach().reshape(step.slots.shape[0], -1, a.shape[-1])
        if torch.compiler.is_compiling():
            self.trace.add(lines, step.slots, weight, padded=step.padded)
            return
        began = time.perf_counter()
        self.trace.add(lines, step.slots, weight, padded=step.padded)
        self.state.tracing_seconds += time.perf_counter() - began

    def _impact(self, z: Tensor, step: Step) -> None:
        y, self._y = self._y, None
        raw, self._raw = self._raw, None
        if y is None:
            return
        lines, z = step.slots.shape[0], z.detach()
        y, z = y.reshape(lines, -1, y.shape[-1]), z.reshape(lines, -1, z.shape[-1])
        if raw is not None:
            raw = raw.reshape(z.shape)
        if self.layer.scale != 1.0:
            raw = z if raw is None else raw
            z = z * self.layer.scale
        terms = impact_terms(y, z, residual=self.residual, raw=raw)
        if step.staging:
            self.staged_impact = terms
        elif step.impact_weight is not None:
            assert step.weight is not None  # what is weighed is traced
            self.trace.add_impact(terms, step.slots, step.impact_weight, step.weight)


def _as_autocast_has_it(x: Tensor) -> Tensor:
    """Inputs as a linear layer would take them here: under autocast in its dtype, which is that of the output then."""
    kind = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
