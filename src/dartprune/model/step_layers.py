"""All layers of a decode step in one call of a kernel, where every weight of theirs lies in rows of 4 bits.

The first layer's forward computes them all, and those of the others hand its result on. It is done only inside a
forward of the whole model of which nobody else hears a part.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dartprune.ffn.quantised import QuantisedRows
from dartprune.model.caches import cache_in
from dartprune.model.calls import GLOBAL_HOOKS, is_ours, replaced
from dartprune.model.layer import Layer
from dartprune.model.packed import RowProjection, packed_rows
from dartprune.model.step_attention import PRODUCTS, ForwardInputs, attends, grown, may_grow
from dartprune.model.step_hooks import FFNChoice, LayersMade, StepHooks
from dartprune.model.step_parts import OwnModule, StepMode

_Place = tuple[dict[str, Any], str]  # where a module keeps a tensor


class OwnLayer(OwnModule):
    """The forward of one decoder layer: the first computes all."""

    def __init__(self, module: Any, mode: StepMode, layers: OwnLayers, index: int) -> None:
        super().__init__(module, mode)
        self._layers = weakref.ref(layers)  # no cycle: a model that is let go of is gone at once
        self._index = index

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives; from all but the first the input, where the first computed it all."""
        layers = self._layers()
        if self.in_use and not args and layers is not None:
            out = layers.computed(hidden_states, kwargs, self._index)
            if out is not None:
                return out
        return self.before(hidden_states, *args, **kwargs)


class OwnLayers:
    """All decoder layers of a model.

    parts: what stands in for their forwards.  hooks: the run that is attached.
    """

    def __init__(self, core: Any, modules: list[Any], rows: QuantisedRows, mode: StepMode) -> None:
        """Set up.

        Args:
            core: the model.
            modules: its decoder layers, see `layers_in_rows`.
            rows: of the first one's FFN.
            mode: how steps are computed.
        """
        self.parts = [OwnLayer(module, mode, self, index) for index, module in enumerate(modules)]
        self.hooks: StepHooks | None = None
        self._config, self._mode, self._modules = core.config.get_text_config(), mode, modules
        self._shared = ForwardInputs()
        self._dicts = [part.__dict__ for module in modules for part in module.modules()]
        self._heard = [hooks for d in self._dicts for hooks in (d["_forward_hooks"], d["_forward_pre_hooks"])]
        self._forwards: list[Any] = []  # of all these modules, when they were last looked at
        self._places = [place for module in modules for place in _places(module)]
        self._held: list[Tensor | None] = []
        self._pointers: list[int] = []  # of those that are parameters, whose memory may change under them
        self._table: Any = None
        self._result: Tensor | None = None
        attention, out = modules[0].self_attn, modules[0].self_attn.o_proj
        products = attention.q_proj, attention.k_proj, out
        self._activation, self._dtype, self._hidden = rows.activation, rows.dtype, rows.hidden
        self._formats = products[0].layout.offsets, out.layout.offsets, rows.layout.offsets
        self._sizes = (
            products[0].out_features, products[1].out_features, products[0].head.shape[1], out.head.shape[1],
            products[1].out_features // attention.head_dim, attention.head_dim,
            rows.neurons, rows.layout.head, rows.layout.tail,
        )  # fmt: skip
        norm = attention._modules.get("q_norm")
        self._epsilons = modules[0].input_layernorm.variance_epsilon, 0.0 if norm is None else norm.variance_epsilon

    def prepare(self, *, nested: bool) -> None:
        """Compile the kernel, so that no token waits for it."""
        from dartprune.ffn.cpu import step_layers as kernels

        x = torch.zeros(1, 1, self._hidden, dtype=self._dtype, device="cpu")
        turned = numpy.zeros((1, self._sizes[5]), numpy.float32)
        place = turned, turned, 0, numpy.empty((1, 0), numpy.float32), 1.0
        slots = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._run(x, numpy.zeros((0, kernels.COLUMNS), numpy.int64), place, FFNChoice(slots, 1, nested, ()), 0)

    def install(self, hooks: StepHooks | None) -> None:
        """Compute for a run from now on; None: no longer."""
        self.hooks, self._forwards = hooks, []
        if hooks is None:
            self._shared.forget()
            self._result, self._table, self._held, self._pointers = None, None, [], []

    def computed(self, x: Tensor, call: dict[str, Any], index: int) -> Tensor | None:
        """What layer `index` gives, or None where its own forward must."""
        if index:
            return x if x is self._result else None
        if self.hooks is None or not self._mode.takes(x) or not self._fits(x, call):
            return None
        table, choice = self._weights(), self.hooks.choice(x.shape[0])
        if table is None or choice is None:
            return None
        self._result = self._computed(x, call, table, choice)
        return self._result

    def _fits(self, x: Tensor, call: dict[str, Any]) -> bool:
        """Whether the kernel computes what the modules would, and nobody hears or changes a part of it."""
        attention, cache = self._modules[0].self_attn, cache_in(call)
        held: Any = getattr(cache, "layers", ())
        if not len(held) == len(self._modules) == self._config.num_hidden_layers:
            return False
        if any(self._heard) or any(GLOBAL_HOOKS) or not self._ours():
            return False
        if not attends(attention, x, call.get("position_embeddings"), call.get("attention_mask"), call):
            return False
        length = held[0].keys.shape[2] if may_grow(held[0], x) else -1
        return all(may_grow(layer, x) and layer.keys.shape[2] == length for layer in held)

    def _ours(self) -> bool:
        """Whether every forward that stands on a module's instance is a run's."""
        forwards = [d.get("forward") for d in self._dicts]
        if forwards != self._forwards:
            if not all(forward is None or is_ours(forward) for forward in forwards):
                return False
            self._forwards = forwards
        return True

    def _computed(self, x: Tensor, call: dict[str, Any], table: Any, choice: FFNChoice) -> Tensor:
        cache, mask, lines = cache_in(call), call.get("attention_mask"), x.shape[0]
        length = cache.layers[0].keys.shape[2]
        _write_choice(table, choice)
        _write_cache(table, cache.layers)
        turned, added = self._shared.of(call["position_embeddings"], lines), self._shared.added(mask, lines, length + 1)
        out = x.clone(memory_format=torch.contiguous_format)
        place = *turned, length, added, self._modules[0].self_attn.scaling
        moments = 0
        if choice.nested and (errors := choice.tensors[0][2]) is not None:
            moments = errors.shape[1]
        assert self.hooks is not None
        self.hooks.made(self._run(out, table, place, choice, moments))
        return out

    def _run(self, x: Tensor, table: Any, place: Any, choice: FFNChoice, moments: int) -> LayersMade:
        """Call the kernel: x [N, 1, H] goes on in place."""
        from dartprune.ffn.cpu import step_layers as kernels
        from dartprune.ffn.cpu.activations import ACTIVATIONS
        from dartprune.ffn.cpu.arrays import words
        from dartprune.ffn.cpu.threads import use_threads

        lines, layers = x.shape[0], len(table)
        inputs = torch.empty(layers, lines, x.shape[-1], dtype=x.dtype, device="cpu")
        attention = torch.empty_like(x)
        flat, kept, attended = words("x", x.view(lines, -1)), words("x", inputs), words("x", attention.view(lines, -1))
        kind = ACTIVATIONS[self._activation]
        given = flat, table, self._sizes, self._formats, self._epsilons, kind, place, choice.slots.numpy()
        counts = torch.empty(layers if choice.nested else 0, lines, dtype=torch.int32, device="cpu")
        unions = torch.empty(counts.shape[0], dtype=torch.int32, device="cpu")
        if choice.nested:
            filled = kept, attended, counts.numpy(), unions.numpy()
            kernels.layers_nested(*given, choice.capacity, moments, use_threads(), *filled)
        else:
            kernels.layers_by_lists(*given, choice.capacity, use_threads(), kept, attended)
        return LayersMade(inputs, attention, counts, unions)

    def _weights(self) -> Any:
        """The table, the layers' own tensors in its first columns; None where they are of another kind by now."""
        from dartprune.ffn.cpu.step_layers import COLUMNS

        held = [tensors.get(name) for tensors, name in self._places]
        same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        pointers = [tensor.data_ptr() for tensor in held if type(tensor) is nn.Parameter]
        if not same or pointers != self._pointers:
            if any(tensor is not None and tensor.dtype not in (self._dtype, torch.uint8) for tensor in held):
                return None
            self._table = numpy.zeros((len(self._modules), COLUMNS), numpy.int64)
            every = [0 if tensor is None else tensor.data_ptr() for tensor in held]
            lines = numpy.array(every, numpy.int64).reshape(len(self._modules), -1)
            self._table[:, : lines.shape[1]] = lines
            self._held, self._pointers = held, pointers
        return self._table


def _write_choice(table: Any, choice: FFNChoice) -> None:
    from dartprune.ffn.cpu import step_layers as columns

    pointers = [[0 if tensor is None else tensor.data_ptr() for tensor in line] for line in choice.tensors]
    if choice.nested:
        places = [columns.WANTED, columns.IMPORTANCE, columns.ERRORS, columns.MEANS, columns.COMPENSATION]
    else:
        places = [columns.INDEX, columns.COUNT, columns.COMPENSATION]
        table[:, columns.WIDTH] = [line[0].shape[1] for line in choice.tensors if line[0] is not None]
    table[:, places] = pointers


def _write_cache(table: Any, layers: Sequence[Any]) -> None:
    """Make room for a token in every layer of a cache."""
    from dartprune.ffn.cpu import step_layers as columns

    rooms = [grown(layer) for layer in layers]
    places = [columns.KEYS, columns.VALUES, columns.ROOM]
    table[:, places] = [(keys.data_ptr(), values.data_ptr(), keys.shape[2]) for keys, values in rooms]


def _places(module: Any) -> list[_Place]:
    """Where the tensors of a decoder layer are kept, in the order of the table's columns."""
    attention, up = module.self_attn, module.mlp.up_proj
    products = [attention._modules[name] for name in PRODUCTS]
    norms = [attention._modules.get(name) for name in ("q_norm", "k_norm")]
    return [
        (module.input_layernorm._parameters, "weight"),
        *((part._buffers, "head") for part in products),
        *((part._parameters, "bias") for part in products),
        *(({}, "weight") if norm is None else (norm._parameters, "weight") for norm in norms),
        (module.post_attention_layernorm._parameters, "weight"),
        (up._buffers, "head"),
        (up._buffers, "tail"),
    ]


def layers_in_rows(modules: list[Any], layers: Sequence[Layer]) -> tuple[tuple[Any, Layer], ...]:
    """Decoder layers and their FFNs, where one kernel can compute them all; else none.

    Args:
        modules: decoder layers of Llama's kind.
        layers: the FFNs of the model.
    """
    both = tuple(zip(modules, layers, strict=False))
    if len(modules) != len(layers) or any(layer.entry is not module.mlp for module, layer in both):
        return ()
    forms = {_form(module, layer) for module, layer in both}
    return both if len(forms) == 1 and () not in forms else ()


def _form(module: Any, layer: Layer) -> tuple[Any, ...]:
    """What must be the same in all layers; empty where the kernel cannot compute this one."""
    rows, attention = packed_rows(layer), module.self_attn
    norms = module.input_layernorm, module.post_attention_layernorm
    heads = [attention._modules.get(name) for name in ("q_norm", "k_norm")]
    products = [attention._modules.get(name) for name in PRODUCTS]
    if rows is None or not all(isinstance(part, RowProjection) and part.is_alone for part in products):
        return ()
    biased = any(bias is not None for bias in (rows.gate_bias, rows.up_bias, rows.down_bias))
    if biased or rows.activation == "other" or layer.scale != 1.0 or any(map(replaced, module.modules())):
        return ()
    dtypes = {norm.weight.dtype for norm in (*norms, *heads) if norm is not None}
    dtypes |= {part.bias.dtype for part in products if part.bias is not None}
    if dtypes != {rows.dtype}:
        return ()
    epsilons = [norm.variance_epsilon for norm in norms], [norm and norm.variance_epsilon for norm in heads]
    return (
        rows.layout, rows.neurons, rows.activation, rows.dtype, attention.scaling, attention.head_dim,
        tuple((part.layout, part.out_features) for part in products), str(epsilons),
    )  # fmt: skip
