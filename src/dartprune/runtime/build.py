"""Builds the live parts of a run for one model: layers, counters, windows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dartprune.budget import DOWN_SQUARE
from dartprune.ffn import Backend, FFNWeights, backend_names, choose
from dartprune.method import Method
from dartprune.model.families import Decoder, Layer
from dartprune.model.layer import place
from dartprune.model.layout import Owners, RowLayout, scattered, shared_weights, storage_owners
from dartprune.model.probe import down_norms, down_square
from dartprune.model.proxy import cached_forward_proxy, forward_proxy_flops
from dartprune.model.weights import row_weights
from dartprune.names import unknown
from dartprune.runtime.layer_hooks import DeviceState, LayerRun
from dartprune.runtime.ring import LayerRing
from dartprune.runtime.rows_or_dense import has_choice
from dartprune.runtime.selection import LayerSelection
from dartprune.runtime.selectors.build import TokenBuilder
from dartprune.runtime.selectors.tally import Tally
from dartprune.runtime.slots import Counters, SlotTensors
from dartprune.runtime.trace import STATISTICS, LayerTrace
from dartprune.runtime.windows import Windows
from dartprune.scoring import WEIGHT_FACTS
from dartprune.selectors.sketches import Progress


@dataclass
class Parts:
    """What a run is made of; `holders` is everything with a row per slot."""

    layers: list[LayerRun]
    counters: Counters
    windows: Windows
    holders: list[SlotTensors]
    facts: Facts
    notes: list[str]
    layout: RowLayout
    tally: Tally | None


def build(method: Method, core: nn.Module, decoder: Decoder, backend: str, progress: Progress | None = None) -> Parts:
    """Everything that holds state for this method on this model.

    Raises:
        ValueError: a named backend, scorer or token selector cannot work with these weights.
    """
    layout = RowLayout()
    try:
        return _build(method, core, decoder, backend, layout, progress)
    except BaseException:
        layout.undo()
        raise


def _build(
    method: Method, core: nn.Module, decoder: Decoder, backend: str, layout: RowLayout, progress: Progress | None
) -> Parts:
    needed, selector = method.inputs, method.token
    statistics = tuple(name for name in needed if name in STATISTICS)
    if backend not in ("auto", *backend_names()):
        raise unknown("backend", backend, ("auto", *backend_names()))
    if not method.prunes or (selector is not None and selector.ceiling):
        backend = "masked"
    tokens = TokenBuilder(selector, decoder, method.sparsity, {layer.index: place(layer) for layer in decoder.layers})
    states: dict[torch.device, DeviceState] = {}
    layers: list[LayerRun] = []
    notes: list[str] = []
    owners = storage_owners(core)
    for layer in decoder.layers:
        device, dtype = place(layer)
        chosen, weights, fallback = _lay_out(layer, device, backend, owners, layout)
        if fallback is not None and f"{chosen.name} backend: {fallback}" not in notes:
            notes.append(f"{chosen.name} backend: {fallback}")
        state = states.setdefault(device, DeviceState())
        everything = selector is not None and not selector.context
        length = method.refresh.replay_tokens
        layers.append(
            LayerRun(
                layer,
                state,
                LayerTrace(statistics, layer.neurons, method.decay, device),
                LayerSelection(
                    layer.neurons,
                    0 if everything else _widest(method, layer),
                    device,
                    masks=(not chosen.gathers and not everything) or (selector is None and has_choice(chosen, weights)),
                    compensation=layer.hidden if method.compensate == "mean" else None,
                    everything=everything,
                ),
                LayerRing(length, layer.hidden, dtype, device) if length else None,
                chosen,
                weights,
                (device, dtype),
                residual=method.impact == "residual",
                token=tokens.of(layer, weights, chosen, progress),
            )
        )
    last = layers[-1]
    counters = Counters(last.trace.device)
    windows = Windows(method.detector.window, decoder.hidden, last.trace.device)
    holders: list[SlotTensors] = [counters]
    if method.refresh.detects:
        holders.append(windows)
    for run in layers:
        holders += [part for part in (run.trace, run.selection, run.ring, run.token) if part is not None]
    facts = Facts(core)
    if any(name in WEIGHT_FACTS for name in needed):
        facts.check(layers, needed)
    if DOWN_SQUARE in needed:
        for run in layers:
            facts(run, DOWN_SQUARE)  # here, so that no text has to wait for it
    chosen_by = [run.token for run in layers if run.token is not None]
    tally = Tally(chosen_by, counters.device) if chosen_by else None
    return Parts(layers, counters, windows, holders, facts, notes, layout, tally)


def _lay_out(
    layer: Layer, device: torch.device, backend: str, owners: Owners, layout: RowLayout
) -> tuple[Backend, FFNWeights | str, str | None]:
    """The backend of a layer, its weights as that backend wants them, and why a faster one was not taken."""
    weights = row_weights(layer)
    chosen, fallback = choose(backend, weights, device)
    if chosen.wants_rows:
        modules = scattered(layer)
        reason = shared_weights(owners, modules)
        if reason is not None:
            chosen, fallback = choose(backend, reason, device)
        elif modules:
            layout.apply(modules, owners)
            weights = row_weights(layer)
    if not isinstance(weights, str):
        chosen.prepare(weights)
    return chosen, weights, fallback


def _widest(method: Method, layer: Layer) -> int:
    """The most neurons a layer's list may hold under the budget."""
    smallest = getattr(method.budget, "min_sparsity", None)
    if smallest is None or method.selection == "threshold":
        return layer.neurons
    rows = (1 - min(float(smallest), method.sparsity)) * layer.neurons
    if method.token is not None:
        return method.token.split(rows, layer.neurons, gated=layer.gated)[0]
    return min(layer.neurons, round(rows))


class Facts:
    """What scorers and budgets need to know of the weights; worked out when first asked for."""

    def __init__(self, core: nn.Module) -> None:
        self._core = core
        self._known: dict[tuple[int, str], Tensor] = {}

    def check(self, layers: list[LayerRun], needed: tuple[str, ...]) -> None:
        """ValueError where the weights cannot be read; a warning where the work is long."""
        for layer in layers:
            if isinstance(layer.weights, str):
                raise ValueError(
                    f"a scorer that reads the down projection cannot be used here: {layer.weights}; use 'magnitude'"
                )
        if any(name.startswith("proxy") for name in needed):
            flops = sum(
                forward_proxy_flops(layer.layer.neurons, layer.layer.hidden, self._unembedding().shape[0])
                for layer in layers
            )
            if flops > 1e13:
                warnings.warn(
                    f"the forward proxy of this model takes {flops:.1e} floating point operations once: "
                    "hours on a CPU, minutes on a GPU; the result is cached on disk",
                    stacklevel=2,
                )

    def forget(self) -> None:
        """The weights were written to: everything is worked out anew when asked for."""
        self._known.clear()

    def __call__(self, layer: LayerRun, name: str) -> Tensor:
        """A fact of one layer: float32 [I], or on the host [] for `down_square`."""
        key = (layer.layer.index, name)
        if key not in self._known and name == DOWN_SQUARE:
            self._known[key] = torch.tensor(
                down_square(layer.layer, layer.weights, *layer.place), dtype=torch.float32, device="cpu"
            )
        if key not in self._known:
            if name == "down_norm":
                self._known[key] = down_norms(layer.layer, layer.weights, *layer.place)
            else:
                if isinstance(layer.weights, str):
                    raise ValueError(f"{name} is not known: {layer.weights}")
                highest, mean = cached_forward_proxy(layer.weights.down, self._unembedding())
                self._known[layer.layer.index, "proxy_max"] = highest.to(layer.trace.device)
                self._known[layer.layer.index, "proxy_mean"] = mean.to(layer.trace.device)
        return self._known[key]

    def _unembedding(self) -> Tensor:
        head = self._core.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError("the model has no output embeddings, which forward-proxy scores need: use 'magnitude'")
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"the output embeddings are a {type(head).__name__} without plain weights, which forward-proxy scores "
                "need: use 'magnitude'"
            )
        return weight
