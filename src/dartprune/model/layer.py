"""A model taken apart: its decoder layers and, in each, the modules of the FFN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dartprune.errors import UserError
from dartprune.model.calls import bare, quietly


@dataclass(frozen=True)
class Layer:
    """The FFN of one decoder layer, by its modules.

    entry: receives x, the FFN's input: the FFN module, or its first projection where there is no module (inline).
    gate: None for a plain FFN and for a fused one, in which `up` gives gate and up, gate first.
    norm: its input is the residual stream y before the FFN; None where y is the entry's own input.
    contribution: its output, times `scale`, is what the FFN adds to the residual stream.
    attention_output: the output projection of the layer's attention.
    """

    index: int
    entry: nn.Module
    inline: bool
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    fused: bool
    activation: str
    act: Callable[[Tensor], Tensor]
    norm: nn.Module | None
    contribution: nn.Module
    scale: float
    attention_output: nn.Module
    hidden: int
    neurons: int

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the up projection."""
        return self.gate is not None or self.fused

    @property
    def matrices(self) -> int:
        """Rows of weights that one neuron owns: 3 with a gate, else 2."""
        return 3 if self.gated else 2

    @property
    def weights(self) -> int:
        """Weights of the FFN, biases left out."""
        return self.matrices * self.neurons * self.hidden

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The FFN's linear layers by name: gate (where it is a module of its own), up and down."""
        named = {"up projection": self.up, "down projection": self.down}
        return named if self.gate is None else {"gate projection": self.gate, **named}

    def skipped(self) -> dict[str, Any]:
        """What is not called where the FFN is computed from rows, by name: modules, or functions."""
        return {**self.projections, "activation": self.act}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the projections' weights, whatever they are kept in; biases left out."""
        tensors = {id(t): t for module in self.projections.values() for t in held(module) if t.dim() > 1}
        # packed where torch cannot see it (dynamic quantisation): 8 bits each
        return sum(t.numel() * t.element_size() for t in tensors.values()) or self.weights

    def gate_activations(self, x: Tensor) -> Tensor:
        """`act(W_gate x)`, [..., I], of an FFN that has a gate."""
        gate: Tensor = quietly(self.up, x).chunk(2, dim=-1)[0] if self.gate is None else quietly(self.gate, x)
        return self.activated(gate)

    def products(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gate (None for a plain FFN) and up of FFN inputs [..., H], bias included: [..., I] each, unheard by hooks."""
        up: Tensor = quietly(self.up, x)
        if self.fused:
            gate, up = up.chunk(2, dim=-1)
            return gate, up
        return None if self.gate is None else quietly(self.gate, x), up

    def overheard(self, call: Callable[[], Tensor], rows: Tensor) -> tuple[Tensor, tuple[Tensor | None, Tensor] | None]:
        """What `call`, which computes this FFN, returns, and `products` of some rows as the model's modules gave them.

        rows: int64 [n], of the flattened inputs. None in place of [n, I] each where gate and up were not called once
        each. Copied as they come: what follows may work in place.
        """
        modules = [self.up] if self.gate is None else [self.gate, self.up]
        heard: list[tuple[nn.Module, Tensor]] = []

        def hear(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                heard.append((module, out.detach().flatten(0, -2).index_select(0, rows)))

        hooks = [module.register_forward_hook(hear) for module in modules]
        try:
            out = call()
        finally:
            for hook in hooks:
                hook.remove()
        if len(heard) != len(modules) or len(named := dict(heard)) != len(modules):
            return out, None
        up = named[self.up]
        if self.fused:
            gate, up = up.chunk(2, dim=-1)
            return out, (gate, up)
        return out, (None if self.gate is None else named[self.gate], up)

    def activations(self, x: Tensor) -> Tensor:
        """The input of the down projection, [..., I], for FFN inputs [..., H]; runs the modules, whatever they are.

        No hook of the user's hears of it, nor changes it: this is no call of the model's.
        """
        gate, up = self.products(x)
        return self.activated(up) if gate is None else self.activated(gate) * up

    def activated(self, a: Tensor) -> Tensor:
        """The activation of `a`, unheard by hooks."""
        out: Tensor = quietly(self.act, a)
        return out

    def projected(self, a: Tensor) -> Tensor:
        """The down projection of `a` [..., I], bias included, unheard by hooks."""
        out: Tensor = quietly(self.down, a)
        return out

    def given(self, a: Tensor) -> Tensor:
        """What activations a [n, I] give without the down projection's bias, float32 [n, H]; by one call of the module.

        Through the module, so that any kind of layer works.
        """
        out = self.projected(torch.cat((a, torch.zeros_like(a[:1]))))
        return (out[:-1] - out[-1:]).float()


def check_single(layers: Iterable[Layer]) -> None:
    """ValueError where two layers run the same module: each would need masks and statistics of its own in it."""
    owner: dict[nn.Module, int] = {}
    for layer in layers:
        for part in filter(None, dict.fromkeys((layer.entry, layer.down, layer.norm, layer.contribution))):
            first = owner.setdefault(part, layer.index)
            if first != layer.index:
                raise UserError(
                    f"layers {first} and {layer.index} share one {type(part).__name__} in or around their FFN: "
                    "they cannot be pruned apart; give each a module of its own, whose weights may be tied"
                )


def held(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that a module keeps: parameters, then buffers."""
    yield from module.parameters()
    yield from module.buffers()


def place(layer: Layer) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes and in which dtype, also where its weights are packed or accelerate keeps them elsewhere.

    Asked are the down projection and then what stands beside it: quantised layers hold integers, or nothing that torch
    can see.
    """
    norm = () if layer.norm is None else (layer.norm,)
    asked = (layer.down, layer.attention_output, *norm, layer.entry)
    first = next((tensor for module in asked for tensor in held(module)), None)
    floats = (t.dtype for module in asked for t in module.parameters() if t.is_floating_point())
    device = torch.device("cpu") if first is None else first.device
    hook = getattr(layer.down, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        device = torch.device(hook.execution_device)  # type: ignore[union-attr]
    return device, next(floats, torch.float32)


@dataclass(frozen=True)
class Decoder:
    """A model taken apart: family row, how it was found (`table` or `structure`), layers, width H."""

    family: str
    recognised: str
    layers: tuple[Layer, ...]
    hidden: int


def sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, an adapter around one or a quantised one; None if it is none of these."""
    module = bare(module)
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = bare(module.base_layer)
    for names in (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures")):
        pair = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in pair):
            return pair  # type: ignore[return-value]
    return None


# Exact types: a subclass may compute anything.
_BY_TYPE = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}
_BY_FUNCTION: tuple[tuple[Any, str], ...] = (
    (F.silu, "silu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
)


def activation_name(act: Any) -> str:
    """The canonical name of an activation, from the callable itself; "other" for what has none."""
    for function, name in _BY_FUNCTION:
        if act is function:
            return name
    if isinstance(act, functools.partial) and act.func is F.gelu and not act.args:
        return _gelu(act.keywords.get("approximate", "none"))
    if type(act) is nn.GELU:
        return _gelu(act.approximate)
    return _BY_TYPE.get(f"{type(act).__module__}.{type(act).__qualname__}", "other")


def _gelu(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"
