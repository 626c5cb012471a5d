"""Builds what is live while a pruner is attached: layers, counters, windows, selectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dartprune.ffn import Backend, FFNWeights, backend_names, choose
from dartprune.method import Method
from dartprune.model.families import Decoder, Layer
from dartprune.model.layer import place
from dartprune.model.layout import RowLayout, scattered, shared_weights, storage_owners
from dartprune.model.weights import row_weights
from dartprune.names import unknown
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.preparation import Preparation
from dartprune.runtime.reasons import CAUSES
from dartprune.runtime.ring import LayerRing, Rings
from dartprune.runtime.rows_or_dense import has_choice
from dartprune.runtime.selection import LayerSelection
from dartprune.runtime.selectors.build import SelectorBuilder
from dartprune.runtime.selectors.spending import Spending
from dartprune.runtime.slot_tensors import Counters, SlotTensors
from dartprune.runtime.step import DeviceState
from dartprune.runtime.trace import STATISTICS, LayerTrace
from dartprune.runtime.weight_facts import WeightFacts
from dartprune.runtime.windows import Windows
from dartprune.selectors.sketches import Progress


@dataclass
class LiveParts:
    """What a run is made of; `holders` is everything with a row per slot."""

    layers: list[LiveLayer]
    counters: Counters
    windows: Windows
    holders: list[SlotTensors]
    facts: WeightFacts
    notes: list[str]
    layout: RowLayout
    spending: Spending | None
    preparation: Preparation


def build(
    method: Method, core: nn.Module, decoder: Decoder, backend: str, progress: Progress | None = None
) -> LiveParts:
    """Everything that holds state for this method on this model; on an error its weights lie as they did.

    Raises:
        ValueError: a named backend, scorer or token selector cannot work with these weights.
    """
    if backend not in ("auto", *backend_names()):
        raise unknown("backend", backend, ("auto", *backend_names()))
    layout = RowLayout()
    try:
        builder = _Builder(method, core, decoder, backend, layout, progress)
        layers = [builder.layer(layer) for layer in decoder.layers]
        facts = WeightFacts(core, layers, method.inputs)
    except BaseException:
        layout.undo()
        raise
    counters = Counters(layers[-1].trace.device, len(CAUSES))
    windows = Windows(method.detector.window, decoder.hidden, counters.device)
    holders: list[SlotTensors] = [counters]
    if method.refresh.detects:
        holders.append(windows)
    for live in layers:
        holders += [part for part in (live.trace, live.selection, live.selector) if part is not None]
    holders += builder.rings
    selectors = [live.selector for live in layers if live.selector is not None]
    spending = Spending(selectors, counters.device) if selectors else None
    return LiveParts(layers, counters, windows, holders, facts, builder.notes, layout, spending, builder.preparation)


class _Builder:
    """Makes one layer after another."""

    def __init__(
        self,
        method: Method,
        core: nn.Module,
        decoder: Decoder,
        backend: str,
        layout: RowLayout,
        progress: Progress | None,
    ) -> None:
        self.notes: list[str] = []
        self._method = method
        self._layout = layout
        self._progress = progress
        self._owners = storage_owners(core)
        self._places = {layer.index: place(layer) for layer in decoder.layers}
        self.preparation = Preparation()
        self._selectors = SelectorBuilder(method, decoder, self._places, self.preparation)
        # a choice that no kernel makes is applied as a mask, and so is one that computes everything to be made
        masked = not method.prunes or not self._selectors.has_kernels
        self._backend = "masked" if masked else backend
        if method.token is not None and not method.token.ceiling and masked:
            kind = type(method.token).__name__
            self.notes.append(f"{kind} has no kernels: its choice is applied as a mask, which saves no time")
        self._states: dict[torch.device, DeviceState] = {}
        self._rings: dict[int, LayerRing] = {}
        self.rings = self._made_rings(decoder) if method.refresh.replay_tokens else []

    def _made_rings(self, decoder: Decoder) -> list[Rings]:
        """Rings of all layers, those that are alike together."""
        alike: dict[Any, list[int]] = {}
        for layer in decoder.layers:
            device, dtype = self._places[layer.index]
            alike.setdefault((layer.hidden, dtype, device), []).append(layer.index)
        made = []
        for kind, indices in alike.items():
            rings = Rings(len(indices), self._method.refresh.replay_tokens, *kind)
            with self.preparation("the ring of inputs"):
                rings.prepare()
            self._rings.update(zip(indices, rings.layers, strict=True))
            made.append(rings)
        return made

    def layer(self, layer: Layer) -> LiveLayer:
        """A layer with all it holds."""
        method = self._method
        device, dtype = self._places[layer.index]
        backend, weights = self._laid_out(layer, device)
        return LiveLayer(
            layer,
            self._states.setdefault(device, DeviceState()),
            LayerTrace(
                tuple(name for name in method.inputs if name in STATISTICS), layer.neurons, method.decay, device
            ),
            self._selection(layer, device, backend, weights),
            self._rings.get(layer.index),
            backend,
            weights,
            (device, dtype),
            residual=method.impact == "residual",
            weighs_impact=method.uses_context,
            selector=self._selectors.of(layer, weights, backend, self._progress),
        )

    def _selection(
        self, layer: Layer, device: torch.device, backend: Backend, weights: FFNWeights | str
    ) -> LayerSelection:
        method = self._method
        everything = method.token is not None and not method.token.context
        may_run_dense = method.token is None and has_choice(backend, weights)
        return LayerSelection(
            layer.neurons,
            0 if everything else _longest_list(method, layer),
            device,
            masks=(not backend.gathers and not everything) or may_run_dense,
            compensation=layer.hidden if method.compensate == "mean" and method.token is None else None,
            everything=everything,
        )

    def _laid_out(self, layer: Layer, device: torch.device) -> tuple[Backend, FFNWeights | str]:
        """The backend of a layer and its weights as that backend wants them; why no faster one was taken is noted."""
        weights = row_weights(layer)
        backend, reason = choose(self._backend, weights, device)
        if backend.wants_rows:
            modules = scattered(layer)
            shared = shared_weights(self._owners, modules)
            if shared is not None:
                backend, reason = choose(self._backend, shared, device)
            elif modules:
                self._layout.apply(modules, self._owners)
                weights = row_weights(layer)
        if not isinstance(weights, str):
            with self.preparation(f"{weights.kind} weights"):
                backend.prepare(weights)
        if reason is not None and (note := f"{backend.name} backend: {reason}") not in self.notes:
            self.notes.append(note)
        return backend, weights


def _longest_list(method: Method, layer: Layer) -> int:
    """The most neurons a layer's list may hold under the budget."""
    share = 1.0 if method.selection == "threshold" else method.budget.most_kept(method.sparsity)
    if method.token is not None:
        return method.token.split(share * layer.neurons, layer.neurons, gated=layer.gated)[0]
    return min(layer.neurons, round(share * layer.neurons))
