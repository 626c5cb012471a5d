"""What happens inside one layer during a forward: trace, mask, compute, remember the input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.ffn import Backend, FFNWeights
from dartprune.ffn.masked import apply_mask
from dartprune.model.families import Layer
from dartprune.runtime.ring import LayerRing
from dartprune.runtime.sample import Sample
from dartprune.runtime.selection import LayerSelection
from dartprune.runtime.selectors.layer_selector import LayerSelector, Lesson
from dartprune.runtime.step import DeviceState, Step
from dartprune.runtime.trace import LayerTrace, impact_terms


class _WithoutGradient(torch.autograd.Function):
    """The result of row kernels: a gradient that came back would lack what they computed, so it is refused."""

    @classmethod
    def told(cls, out: Tensor, *sources: Tensor) -> Tensor:
        """The same values, which depend on the sources."""
        told: Tensor = cls.apply(out, *sources)  # type: ignore[no-untyped-call]
        return told

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UserError("no gradient passes through the row kernels of decoded tokens: attach with backend='masked'")


class LiveLayer:
    """One layer while attached: hears the calls of its `LayerSite`.

    index, neurons, size: number of the layer, of its neurons and of its FFN's weights.  place: device and dtype in
    which it computes.  weights: as the backend wants them, or why their rows cannot be read.  weighs_impact: whether
    the method wants to know what the FFN does to the residual stream.
    """

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
        weighs_impact: bool,
        selector: LayerSelector | None = None,
    ) -> None:
        self.parts = layer
        self.index, self.neurons, self.size = layer.index, layer.neurons, layer.weights
        self.state = state
        self.trace = trace
        self.selection = selection
        self.ring = ring
        self.backend = backend
        self.weights = weights
        self.place = place
        self.residual = residual
        self.weighs_impact = weighs_impact
        self.selector = selector
        self.staged: Tensor | None = None
        self.staged_impact: Tensor | None = None
        self.sampled: Tensor | None = None  # inputs of the rows that teach the selector
        self.lesson: Lesson | None = None  # what they teach, where the forward itself told their products
        self._y: Tensor | None = None
        self._x: Tensor | None = None
        self._raw: Tensor | None = None
        self._transformed = layer.contribution is not layer.entry and layer.contribution is not layer.down

    @property
    def saves_time(self) -> bool:
        """Whether neurons that a token does not use are left unread here."""
        return self.backend.saves_time and (self.selector is None or self.selector.saves_time)

    @property
    def fixed_share(self) -> float:
        """Share of the layer's weight bytes that a token selector reads beside the weights."""
        return 0.0 if self.selector is None else self.selector.fixed_share(0)

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
        if step.gathering:
            out = self._gathered(x, step)
        elif step.sample is not None and self._teaches(x, step):
            out = self._overheard(original, step.sample)
        else:
            out = original()
        self._made(out, step, self.parts.entry)
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
            if self.parts.inline:
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
        self._made(out, step, self.parts.down)
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
        if self.parts.contribution is module:
            self._impact(out, step)
        elif self._transformed and self._weighs(step):
            self._raw = out.detach()

    def _weighs(self, step: Step) -> bool:
        """Whether the impact of this forward's tokens is wanted."""
        return self.weighs_impact and (step.impact_weight is not None or step.staging)

    def _take(self, x: Tensor, step: Step) -> None:
        x = x.detach()  # what is kept must not keep the graph of gradients alive
        if self.parts.norm is None and self._weighs(step):
            self._y = x
        if step.staging:
            self.staged = x.reshape(step.slots.shape[0], -1, x.shape[-1])
        if step.sample is not None:
            self.sampled, self.lesson = x.reshape(-1, x.shape[-1]).index_select(0, step.sample.rows.flatten()), None
        if step.masking and self.selector is not None:
            self._x = x
        if step.ring is not None and self.ring is not None:
            # in a graph that is compiled or captured nothing is done afterwards
            later = x.is_cpu and not torch.compiler.is_compiling()
            rows, *where = step.ring
            x = x.reshape(-1, x.shape[-1])
            if later:
                self.ring.keep(x.index_select(0, rows), *where)
            else:
                self.ring.write(x, rows, *where)

    def _teaches(self, x: Tensor, step: Step) -> bool:
        """Whether a selector learns from this forward at once: from a prompt, and not while it is compiled."""
        several = x.numel() > step.slots.shape[0] * x.shape[-1]
        return self.selector is not None and several and not torch.compiler.is_compiling()

    def _overheard(self, original: Callable[[], Tensor], sample: Sample) -> Tensor:
        """The model's own FFN, whose products of the sampled rows teach the selector: they need not be made again."""
        out, products = self.parts.overheard(original, sample.rows.flatten())
        if products is None:
            return out
        assert self.selector is not None and self.sampled is not None
        began = time.perf_counter()
        x, self.sampled = self.sampled.view(*sample.rows.shape, -1), None
        self.lesson = self.selector.lesson(x, sample.weight, sample.slots, products)
        self.state.tracing_seconds += time.perf_counter() - began
        return out

    def _gathered(self, x: Tensor, step: Step) -> Tensor:
        assert not isinstance(self.weights, str)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.no_grad():
                out = self._from_rows(x, step)
            return _WithoutGradient.told(out, x, *self.weights.sources)
        return self._from_rows(x, step)

    def _from_rows(self, x: Tensor, step: Step) -> Tensor:
        assert not isinstance(self.weights, str)
        rows = _as_autocast_has_it(x.reshape(-1, x.shape[-1]))
        if self.selector is not None:
            return self.selector.ffn(rows, self.weights, self.selection, step.row_slots).reshape(x.shape)
        out = self.backend.ffn(rows, self.weights, self.selection.index, self.selection.count, step.row_slots)
        return self._compensated(out.reshape(x.shape), step)

    def _masked(self, a: Tensor, step: Step) -> Tensor:
        if self.selector is None:
            lines = a.reshape(step.slots.shape[0], -1, a.shape[-1])
            return apply_mask(lines, self.selection.rows_mask(step.slots)).reshape(a.shape)
        x, self._x = self._x, None
        assert x is not None
        rows = a.reshape(-1, a.shape[-1])
        mask = self.selector.mask(rows, x.reshape(-1, x.shape[-1]), self.selection, step.row_slots)
        return self.selector.filled(rows, mask, step.row_slots).reshape(a.shape)

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
        if self.parts.scale != 1.0:
            raw = z if raw is None else raw
            z = z * self.parts.scale
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
