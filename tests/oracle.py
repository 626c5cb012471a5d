"""What tests compare against: masks applied by hand on the plain model, and the state of a model before and after."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.ffn.sketch import FFNSketch, SketchPlanes, quantise_input
from dartprune.model.caches import handed
from dartprune.model.families import Layer, describe
from dartprune.selectors import Exact, Sketch

# from layer, its a [B, T, I], its x [B, T, H] and the candidates bool [B, I] to what each token uses, bool [B, T, I]
Rule = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def masked_by_hand(
    model: nn.Module, masks: list[Tensor], rule: Rule | None = None, means: list[Tensor] | None = None
) -> Iterator[None]:
    """Zero the input of each down projection with masks bool [B, I] of each layer, by plain torch hooks.

    With a rule, each token uses of its mask's neurons only those that the rule names. With means [B, I] of each layer,
    these stand where zeros would.
    """
    handles = []
    fills = [torch.zeros_like(mask, dtype=torch.float32) for mask in masks] if means is None else means
    for layer, mask, fill in zip(describe(model).layers, masks, fills, strict=True):
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, inputs: list[Tensor] = inputs) -> None:
            inputs[:] = [args[0]]

        def zero(
            module: nn.Module,
            args: Any,
            layer: Layer = layer,
            mask: Tensor = mask,
            fill: Tensor = fill,
            inputs: list[Tensor] = inputs,
        ) -> Any:
            a = args[0]
            lines = a.reshape(mask.shape[0], -1, a.shape[-1])
            used = mask[:, None]
            if rule is not None:
                used = rule(layer, lines, inputs[0].reshape(*lines.shape[:2], -1), mask)
            return (torch.where(used, lines, fill[:, None].to(lines)).reshape(a.shape), *args[1:])

        handles.append(layer.entry.register_forward_pre_hook(keep))
        handles.append(layer.down.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of_down(model: nn.Module) -> Iterator[list[Tensor]]:
    """The input of each down projection, one forward long, by plain hooks."""
    inputs: list[Tensor] = []
    handles = [
        layer.down.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in describe(model).layers
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def inputs_of_ffn(model, index, ids, **options):
    """The FFN inputs [B, T, H] of one layer in a plain forward."""
    seen = []
    handle = describe(model).layers[index].entry.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=ids, use_cache=False, **options)
    handle.remove()
    return seen[0]


class MaskedTwin:
    """A plain model beside a pruned one: it reads the same tokens with a cache of its own, the masks put on by hand.

    It never was attached to anything. It keeps the sums of what the down projections got from counted tokens, for the
    mean of what a mask drops; the first `skip_first` tokens of a text and padding are not counted.
    """

    def __init__(self, model: nn.Module, skip_first: int = 1) -> None:
        self.model = model
        self.cache: Any = None
        self._skip = skip_first
        self._seen: Tensor | int = 0
        self._sums: list[Tensor] = []
        self._count = torch.zeros(())

    @property
    def means(self) -> list[Tensor]:
        """Of the inputs of the down projections, [B, I] of each layer."""
        return [total / self._count.clamp_min(1)[:, None] for total in self._sums]

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read given text [B, T], all neurons at work; mask [B, past + T] of 0 and 1 for padding; the logits."""
        with inputs_of_down(self.model) as inputs:
            out = self.model(input_ids=ids, attention_mask=mask, **handed(self.cache), use_cache=True)
        self.cache = out.past_key_values
        real = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        place = real.cumsum(1) + self._seen
        self._seen = place[:, -1:]
        self._count_tokens(inputs, (real * (place > self._skip)).float())
        return out.logits

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        masks: list[Tensor],
        rule: Rule | None = None,
        *,
        fill: list[Tensor] | None = None,
        mask: Tensor | None = None,
        learning: Tensor | None = None,
    ) -> Tensor:
        """Decode on with masks bool [B, I] of each layer, as `masked_by_hand`; `fill` stands where zeros would.

        The lines `learning`, bool [B], count for the means.
        """
        with inputs_of_down(self.model) as inputs, masked_by_hand(self.model, masks, rule, fill):
            logits = self.model(input_ids=ids, attention_mask=mask, **handed(self.cache), use_cache=True).logits
        self._seen = self._seen + ids.shape[1]
        if learning is not None:
            self._count_tokens(inputs, learning.float()[:, None].expand(ids.shape))
        return logits

    def forget(self, lines: list[int]) -> None:
        """Begin the sums of these lines anew."""
        for total in (*self._sums, self._count):
            total[lines] = 0

    def _count_tokens(self, inputs: list[Tensor], counted: Tensor) -> None:
        new = [(a.reshape(*counted.shape, -1) * counted[..., None]).sum(1).float() for a in inputs]
        self._sums = [old + more for old, more in zip(self._sums or [0] * len(new), new, strict=True)]
        self._count = self._count + counted.sum(1)


def masks_of(run: Any, slots: tuple[int, ...]) -> list[Tensor]:
    """The masks in force, bool [B, I] for each layer."""
    out = []
    for number, layer in enumerate(run.layers):
        rows = torch.ones(len(slots), layer.neurons, dtype=torch.bool)
        for line, slot in enumerate(slots):
            kept = run.selection(slot)[number]
            if kept is not None:
                rows[line] = False
                rows[line, kept.long()] = True
        out.append(rows)
    return out


def means_of(run: Any, slots: Iterable[int]) -> list[Tensor]:
    """What stands in the place of what is dropped by the run's own account, [B, I] of each layer."""
    ids = list(slots)
    if run.method.token is not None:
        return [layer.selector.means[ids].float() for layer in run.layers]
    traces = [layer.trace for layer in run.layers]
    return [trace.tensors()["total"][ids] / trace.tokens[ids].clamp_min(1)[:, None] for trace in traces]


def rule_of(pruner: Any, run: Any, keeps: list[list[int] | None] | None = None) -> Rule | None:
    """How the pruner's token selector chooses, by a plain sort; None where there is no selector.

    keeps: of each line, the neurons of each layer that a token uses; None: those of the report's sequences.
    """
    selector = pruner.token
    if selector is None:
        return None

    def rule(layer: Layer, a: Tensor, x: Tensor, candidates: Tensor) -> Tensor:
        used = torch.zeros(a.shape, dtype=torch.bool)
        unit = torch.eye(layer.neurons)
        norms = (_plain(layer.down, unit) - _plain(layer.down, torch.zeros_like(unit))).norm(dim=1)
        if isinstance(selector, Exact):
            scores = a.abs() * norms
        elif isinstance(selector, Sketch):
            scores = _sketched(run.layers[layer.index].selector, layer, x) * norms
        elif layer.gated:
            gate, _ = _gate_and_up(layer, x)
            rows = _gate_and_up(layer, torch.eye(layer.hidden))[1] - _gate_and_up(layer, torch.zeros(layer.hidden))[1]
            scores = layer.act(gate).abs() * norms * rows.norm(dim=0)
        else:
            scores = a.abs() * norms
        counts = [sequence.keep for sequence in run.report().sequences] if keeps is None else keeps
        for line, keep in enumerate(counts):
            if keep is None:  # dense
                used[line] = True
                continue
            for t in range(a.shape[1]):
                score = (scores[line, t] * candidates[line]).tolist()
                order = sorted(range(layer.neurons), key=lambda i: (-score[i], i))
                kept = [i for i in order[: keep[layer.index]] if score[i] > 0]
                used[line, t, kept] = True
        return used

    return rule


def _gate_and_up(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    up = _plain(layer.up, x)
    if layer.fused:
        return up.chunk(2, dim=-1)
    return _plain(layer.gate, x), up


def sketch_products(sketch: FFNSketch, layer: Layer, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gate (None for a plain FFN) and up from the sketch's matrices and rounded inputs [N, H], both written out."""

    def whole(planes: SketchPlanes) -> Tensor:
        bits = (planes.planes[..., None] >> torch.arange(64)) & 1
        code = (bits * (2 ** torch.arange(planes.bits))[:, None, None]).sum(1).flatten(1)[:, : layer.hidden]
        return planes.scale[:, None] * (2 * code - (2**planes.bits - 1))

    rounded = quantise_input(x, sketch.activation_bits, sketch.outliers)
    rest = x.scatter(1, rounded.outlier_index, 0.0)
    top = 2 ** (sketch.activation_bits - 1) - 1
    near = (rest / rounded.step[:, None]).round().clamp(-top, top) * rounded.step[:, None]
    near = near.scatter(1, rounded.outlier_index, rounded.outlier_value)
    zero = torch.zeros(layer.hidden)
    up = near @ whole(sketch.up).t()
    if sketch.gate is None:
        return None, up + _plain(layer.up, zero)
    gate_bias, up_bias = _gate_and_up(layer, zero)
    return near @ whole(sketch.gate).t() + gate_bias, up + up_bias


def _sketched(selector: Any, layer: Layer, x: Tensor) -> Tensor:
    """`|act(g^) u^|`, or what is expected of it under the errors that each line's context has shown."""
    products = sketch_products(selector.sketch, layer, x.reshape(-1, layer.hidden))
    gate, up = (None if part is None else part.reshape(*x.shape[:2], -1) for part in products)
    if not selector.learns:
        return (layer.act(up) if gate is None else layer.act(gate) * up).abs()
    # [B, 1, I] each: the lines are in the slots 0, 1, ...
    errors = [part[:, None] for part in selector.errors[: x.shape[0]].float().unbind(1)]

    def mean_square(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        spread = variance.sqrt()
        points = ((0.0, 4.0), (3**0.5, 1.0), (-(3**0.5), 1.0))
        return sum(w * layer.act(value + mean + z * spread) ** 2 for z, w in points) / 6

    if gate is None:
        return mean_square(up, *errors).sqrt()
    second = (up + errors[2]) ** 2 + errors[3]
    return (mean_square(gate, *errors[:2]) * second).sqrt()


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    """The module's own forward, without the hooks and wrappers of the instance."""
    out: Tensor = type(module).forward(module, x)
    return out


def held_by(run: Any) -> list[Tensor]:
    """Every tensor that is reached from a run, those inside of the model's modules left out."""
    found: list[Tensor] = []
    seen = {id(run)}
    queue: list[Any] = [run]
    while queue:
        item = queue.pop()
        if isinstance(item, Tensor):
            found.append(item)
            continue
        if isinstance(item, (nn.Module, type, ModuleType, FrameType)):
            continue
        parts = (item.__closure__ or ()) if isinstance(item, FunctionType) else gc.get_referents(item)
        for part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                queue.append(part)
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a detached model must give back: weights bit by bit, and the attributes of every module."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "strides": {name: value.stride() for name, value in model.state_dict().items()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is what it was when `before` was taken."""
    now = snapshot(model)
    assert now["attributes"] == before["attributes"]
    assert now["strides"] == before["strides"]
    assert list(now["weights"]) == list(before["weights"])
    for name, value in before["weights"].items():
        assert torch.equal(now["weights"][name], value), name
