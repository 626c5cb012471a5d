"""All layers of a decode step in one call of a kernel.

The first layer's forward computes them all, and those of the others hand its result on. It is done only inside a
forward of the whole model of which nobody else hears a part.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dartprune.model.caches import cache_in
from dartprune.model.calls import GLOBAL_HOOKS, is_ours
from dartprune.model.step_attention import ForwardInputs, attends, grown, may_grow
from dartprune.model.step_forms import FFN, LayersForm
from dartprune.model.step_hooks import FFNChoice, FFNKind, LayersMade, StepHooks
from dartprune.model.step_parts import OwnModule, StepMode

OWN = (FFNKind.SKETCH, FFNKind.NESTED)  # each token chooses its neurons


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

    parts: what stands in for their forwards.  form: how one call computes them.  hooks: the run that is attached.
    """

    def __init__(self, core: Any, modules: list[Any], form: LayersForm, mode: StepMode) -> None:
        """Set up.

        Args:
            core: the model.
            modules: its decoder layers.
            form: see `form_of`.
            mode: how steps are computed.
        """
        self.parts = [OwnLayer(module, mode, self, index) for index, module in enumerate(modules)]
        self.form = form
        self.hooks: StepHooks | None = None
        self._config, self._mode, self._modules = core.config.get_text_config(), mode, modules
        self._shared = ForwardInputs()
        self._dicts = [part.__dict__ for module in modules for part in module.modules()]
        self._heard = [hooks for d in self._dicts for hooks in (d["_forward_hooks"], d["_forward_pre_hooks"])]
        self._unbiased = [module.mlp._modules[name]._parameters for module in modules for name in FFN]
        self._forwards: list[Any] = []  # of all these modules, when they were last looked at
        places = [place for module in modules for place in form.places(module)]
        self._owners, self._names = [owner for owner, _ in places], [name for _, name in places]
        self._shapes = [None if tensor is None else tensor.shape for tensor in self._tensors()]
        self._result: Tensor | None = None
        self._forget()

    def prepare(self, choice: FFNChoice) -> None:
        """Compile the kernel for such a choice, so that no token waits for it."""
        from dartprune.ffn.cpu.step_table import COLUMNS

        x = torch.zeros(1, 1, self.form.hidden, dtype=self.form.dtype, device="cpu")
        turned = numpy.zeros((1, self.form.sizes[3]), numpy.float32)
        place = turned, turned, 0, numpy.empty((1, 0), numpy.float32), 1.0
        self._run(x, numpy.zeros((0, COLUMNS), numpy.int64), place, choice)

    def install(self, hooks: StepHooks | None) -> None:
        """Compute for a run from now on; None: no longer."""
        self.hooks, self._forwards = hooks, []
        if hooks is None:
            self._shared.forget()
            self._forget()

    def _forget(self) -> None:
        self._kind: FFNKind | None = None
        self._held: list[Tensor | None] = []  # what the table is of: the layers' own tensors
        self._movable: list[Tensor] = []  # those that are parameters, whose memory may change under them
        self._memory: list[int] = []
        self._chosen: list[Tensor | None] = []  # and those of the choice
        self._rooms: list[weakref.ref[Tensor]] = []  # and of the cache, which is gone when it is let go of
        self._table: Any = None
        self._result = None

    def computed(self, x: Tensor, call: dict[str, Any], index: int) -> Tensor | None:
        """What layer `index` gives, or None where its own forward must."""
        if index:
            return x if x is self._result else None
        if self.hooks is None or self._mode.invariant or not self._mode.takes(x) or not self._fits(x, call):
            return None
        choice = self.hooks.choice(x.shape[0])
        table = None if choice is None else self._weights(choice.kind)
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
        if any(bias is not None for bias in map(dict.get, self._unbiased, repeat("bias"))):
            return False
        if not attends(attention, x, call.get("position_embeddings"), call.get("attention_mask"), call):
            return False
        length = held[0].keys.shape[2] if may_grow(held[0], x) else -1
        return all(may_grow(layer, x) and layer.keys.shape[2] == length for layer in held)

    def _ours(self) -> bool:
        """Whether every forward that stands on a module's instance is a run's."""
        forwards = list(map(dict.get, self._dicts, repeat("forward")))
        if forwards != self._forwards:
            if not all(forward is None or is_ours(forward) for forward in forwards):
                return False
            self._forwards = forwards
        return True

    def _computed(self, x: Tensor, call: dict[str, Any], table: Any, choice: FFNChoice) -> Tensor:
        cache, mask, lines = cache_in(call), call.get("attention_mask"), x.shape[0]
        length = cache.layers[0].keys.shape[2]
        self._write_choice(choice.kind, self.form.tensors(choice, len(table)))
        self._write_cache(cache.layers)
        turned, added = self._shared.of(call["position_embeddings"], lines), self._shared.added(mask, lines, length + 1)
        out = x.clone(memory_format=torch.contiguous_format)
        place = *turned, length, added, self._modules[0].self_attn.scaling
        assert self.hooks is not None
        self.hooks.made(self._run(out, table, place, choice))
        return out

    def _run(self, x: Tensor, table: Any, place: Any, choice: FFNChoice) -> LayersMade:
        """Call the kernel: x [N, 1, H] goes on in place."""
        from dartprune.ffn.cpu.activations import ACTIVATIONS
        from dartprune.ffn.cpu.arrays import words
        from dartprune.ffn.cpu.threads import use_threads

        lines, layers = x.shape[0], len(table)
        chosen = layers if choice.kind in OWN else 0
        made = LayersMade(
            torch.empty(layers, lines, x.shape[-1], dtype=x.dtype, device="cpu"),
            torch.empty_like(x),
            torch.empty(chosen, lines, dtype=torch.int32, device="cpu"),
            torch.empty(chosen, dtype=torch.int32, device="cpu"),
        )
        flat, attention = (words("tokens", part.view(lines, -1)) for part in (x, made.attention))
        filled = words("inputs", made.inputs), attention, made.counts.numpy(), made.unions.numpy()
        errors = choice.tensors[0][3] if choice.kind in OWN and choice.tensors else None
        moments = 0 if errors is None else errors.shape[1]
        given = flat, table, ACTIVATIONS[self.form.activation], place
        self.form.run(given, choice, moments, use_threads(), filled)
        return made

    def _tensors(self) -> list[Tensor | None]:
        """The layers' own, as they are now."""
        return list(map(dict.get, self._owners, self._names))

    def _weights(self, kind: FFNKind) -> Any:
        """The table, the layers' own tensors in it; None where they are such by now that no kernel takes them."""
        from dartprune.ffn.cpu.step_table import COLUMNS

        held = self._tensors()
        if (
            kind is not self._kind
            or not _are_same(held, self._held)
            or list(map(Tensor.data_ptr, self._movable)) != self._memory
        ):
            many = len(held) // len(self._modules)
            lines = [held[first : first + many] for first in range(0, len(held), many)]
            shapes = [None if tensor is None else tensor.shape for tensor in held]
            self._forget()
            if shapes != self._shapes or not all(self.form.usable(line, kind) for line in lines):
                return None
            self._table = numpy.zeros((len(lines), COLUMNS), numpy.int64)
            self._table[:, self.form.columns()] = [_addresses(line) for line in lines]
            self._kind, self._held = kind, held
            self._movable = [tensor for tensor in held if type(tensor) is nn.Parameter]
            self._memory = list(map(Tensor.data_ptr, self._movable))
        return self._table

    def _write_choice(self, kind: FFNKind, tensors: Sequence[Sequence[Tensor | None]]) -> None:
        from dartprune.ffn.cpu import step_table as columns

        chosen = list(chain.from_iterable(tensors))
        if _are_same(chosen, self._chosen):
            return
        places = [columns.COMPENSATION]
        if kind in OWN:
            places += [columns.WANTED, columns.IMPORTANCE, columns.ERRORS, columns.MEANS]
        else:
            places += [columns.INDEX, columns.COUNT]
            self._table[:, columns.WIDTH] = [line[1].shape[1] for line in tensors if line[1] is not None]
        if kind is FFNKind.SKETCH:
            places += [columns.GATE_PLANES, columns.GATE_SCALE, columns.UP_PLANES, columns.UP_SCALE]
        self._table[:, places] = list(map(_addresses, tensors))
        self._chosen = chosen

    def _write_cache(self, layers: Sequence[Any]) -> None:
        """Make room for a token in every layer of a cache."""
        from dartprune.ffn.cpu import step_table as columns

        rooms = list(map(grown, layers))
        if not _are_same([keys for keys, _ in rooms], [known() for known in self._rooms]):
            places = [columns.KEYS, columns.VALUES, columns.ROOM]
            self._table[:, places] = [(keys.data_ptr(), values.data_ptr(), keys.shape[2]) for keys, values in rooms]
            self._rooms = [weakref.ref(keys) for keys, _ in rooms]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _are_same(found: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether these are the very same objects."""
    return len(found) == len(known) and all(map(operator.is_, found, known))
