"""The forms in which one kernel computes all layers of a decode step: weights in rows of 4 bits, or in words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dartprune.ffn.sketch import GAUSSIAN_STEP
from dartprune.model.calls import replaced
from dartprune.model.layer import Layer
from dartprune.model.packed_bytes import ByteLinear
from dartprune.model.packed_rows import RowProjection, packed_rows
from dartprune.model.step_attention import PRODUCTS
from dartprune.model.step_hooks import FFNChoice, FFNKind
from dartprune.model.step_parts import HALVES

Place = tuple[dict[str, Any], str]  # where a module keeps a tensor
FFN = ("gate_proj", "up_proj", "down_proj")


class LayersForm(ABC):
    """Decoder layers that are alike, of Llama's kind, and how one call computes them.

    dtype: of words.  hidden: H.  sizes, epsilons: as the kernels take them.
    """

    def __init__(self, module: Any, layer: Layer, dtype: torch.dtype) -> None:
        attention = module.self_attn
        norm = attention._modules.get("q_norm")
        self.dtype, self.hidden, self.activation = dtype, layer.hidden, layer.activation
        keys = attention.k_proj.out_features
        self.sizes: tuple[int, ...] = (
            attention.q_proj.out_features, keys, keys // attention.head_dim, attention.head_dim, layer.neurons,
        )  # fmt: skip
        self.epsilons = module.input_layernorm.variance_epsilon, 0.0 if norm is None else norm.variance_epsilon

    @abstractmethod
    def places(self, module: Any) -> list[Place]:
        """Where a decoder layer keeps its tensors."""

    @abstractmethod
    def columns(self) -> list[int]:
        """The columns of the kernels' table that these belong to."""

    @abstractmethod
    def usable(self, held: Sequence[Tensor | None], kind: FFNKind) -> bool:
        """Whether one layer's tensors are still such that it can compute them."""

    def tensors(self, choice: FFNChoice, layers: int) -> Sequence[Sequence[Tensor | None]]:
        """Those of a choice, for each layer."""
        return choice.tensors

    @abstractmethod
    def run(self, given: tuple[Any, ...], choice: FFNChoice, moments: int, threads: int, filled: Any) -> None:
        """Call the kernel.

        Args:
            given: x, table, activation and place.
            choice: what the FFNs compute.
            moments: of a neuron's errors of estimate that are known.
            threads: how many.
            filled: inputs, attention, counts and unions.
        """


@cache
def _list_of_all(neurons: int) -> tuple[Tensor | None, ...]:
    """No compensation, and a list that names all neurons."""
    index = torch.arange(neurons, dtype=torch.int32, device="cpu")[None]
    return None, index, torch.tensor([neurons], dtype=torch.int32, device="cpu")


def _attention_columns() -> list[int]:
    from dartprune.ffn.cpu.step_table import FFN_NORM

    return list(range(FFN_NORM + 1))


def _attention_places(module: Any, kept_in: str, name: str) -> list[Place]:
    attention = module.self_attn
    products = [attention._modules[product] for product in PRODUCTS]
    norms = [attention._modules.get(norm) for norm in ("q_norm", "k_norm")]
    return [
        (module.input_layernorm._parameters, "weight"),
        *((getattr(part, kept_in), name) for part in products),
        *((part._parameters, "bias") for part in products),
        *(({}, "weight") if norm is None else (norm._parameters, "weight") for norm in norms),
        (module.post_attention_layernorm._parameters, "weight"),
    ]


class RowsForm(LayersForm):
    """Everything in rows of 4 bits, or the FFN in rows of 8 and attention in bytes."""

    def __init__(self, module: Any, layer: Layer) -> None:
        rows = packed_rows(layer)
        assert rows is not None
        super().__init__(module, layer, rows.dtype)
        query, out = module.self_attn.q_proj, module.self_attn.o_proj
        self.sizes += rows.layout.head, rows.layout.tail
        self._offsets = rows.layout.offsets
        self._formats: tuple[Any, Any] | None = None
        if isinstance(query, RowProjection):
            self._formats = query.layout.offsets, out.layout.offsets
            self.sizes += query.head.shape[1], out.head.shape[1]

    def places(self, module: Any) -> list[Place]:
        """See `LayersForm.places`."""
        up = module.mlp.up_proj._buffers
        ffn = [(up, "head"), (up, "tail")]
        if self._formats is not None:
            return [*_attention_places(module, "_buffers", "head"), *ffn]
        scales = [(module.self_attn._modules[product]._buffers, "scale") for product in PRODUCTS]
        return [*_attention_places(module, "_buffers", "weight8"), *ffn, *scales]

    def columns(self) -> list[int]:
        """See `LayersForm.columns`."""
        from dartprune.ffn.cpu.step_table import HEAD, OUT_SCALE, QUERY_SCALE, TAIL

        scales = range(QUERY_SCALE, OUT_SCALE + 1) if self._formats is None else ()
        return [*_attention_columns(), HEAD, TAIL, *scales]

    def usable(self, held: Sequence[Tensor | None], kind: FFNKind) -> bool:
        """See `LayersForm.usable`."""
        return all(tensor is None or tensor.dtype in (self.dtype, torch.uint8, torch.int8) for tensor in held)

    def tensors(self, choice: FFNChoice, layers: int) -> Sequence[Sequence[Tensor | None]]:
        """See `LayersForm.tensors`: all neurons are a list too."""
        return [_list_of_all(self.sizes[4])] * layers if choice.kind is FFNKind.DENSE else choice.tensors

    def run(self, given: tuple[Any, ...], choice: FFNChoice, moments: int, threads: int, filled: Any) -> None:
        """See `LayersForm.run`."""
        from dartprune.ffn.cpu import layers_rows as kernels

        (x, table, kind, place), (inputs, attention, counts, unions) = given, filled
        form = self.sizes, self._offsets, self._formats, self.epsilons
        call = x, table, *form, kind, place, choice.slots.numpy(), choice.capacity
        if choice.kind is FFNKind.NESTED:
            kernels.nested_layers(*call, moments, threads, inputs, attention, counts, unions)
        else:
            kernels.listed_layers(*call, threads, inputs, attention)


class WordsForm(LayersForm):
    """Everything in words: bf16 or fp16, as it was loaded."""

    def __init__(self, module: Any, layer: Layer) -> None:
        super().__init__(module, layer, module.mlp.up_proj.weight.dtype)

    def places(self, module: Any) -> list[Place]:
        """See `LayersForm.places`."""
        ffn = [(module.mlp._modules[name]._parameters, "weight") for name in FFN]
        return [*_attention_places(module, "_parameters", "weight"), *ffn]

    def columns(self) -> list[int]:
        """See `LayersForm.columns`."""
        from dartprune.ffn.cpu.step_table import DOWN, GATE, UP

        return [*_attention_columns(), GATE, UP, DOWN]

    def usable(self, held: Sequence[Tensor | None], kind: FFNKind) -> bool:
        """See `LayersForm.usable`: of a pruned FFN the rows of neurons must be contiguous in down too."""
        *others, down = held
        assert down is not None
        lying = [tensor for tensor in others if tensor is not None] + [down if kind is FFNKind.DENSE else down.t()]
        return all(tensor.dtype == self.dtype and tensor.is_contiguous() for tensor in lying)

    def run(self, given: tuple[Any, ...], choice: FFNChoice, moments: int, threads: int, filled: Any) -> None:
        """See `LayersForm.run`."""
        from dartprune.ffn.cpu import layers_words as kernels

        (x, table, kind, place), (inputs, attention, counts, unions) = given, filled
        call: tuple[Any, ...] = (x, table, self.sizes, self.epsilons, kind, place)
        if choice.kind is FFNKind.DENSE:
            kernels.dense_layers(*call, threads, inputs, attention)
            return
        call = *call, choice.slots.numpy(), choice.capacity
        if choice.kind is FFNKind.LISTS:
            kernels.listed_layers(*call, threads, inputs, attention)
            return
        bits, outliers, planes = choice.rounding
        rounding = bits, numpy.float32(GAUSSIAN_STEP[bits]), outliers
        kernels.sketched_layers(*call, moments, rounding, planes, threads, inputs, attention, counts, unions)


def form_of(modules: Sequence[Any], layers: Sequence[Layer]) -> LayersForm | None:
    """How one kernel computes all decoder layers of a model, or None.

    Args:
        modules: decoder layers of Llama's kind.
        layers: their FFNs.
    """
    both = list(zip(modules, layers, strict=False))
    if not both or len(modules) != len(layers) or any(layer.entry is not module.mlp for module, layer in both):
        return None
    described = {_description(module, layer) for module, layer in both}
    if len(described) != 1 or None in described:
        return None
    return (RowsForm if packed_rows(layers[0]) is not None else WordsForm)(*both[0])


def _description(module: Any, layer: Layer) -> tuple[Any, ...] | None:
    """What must be the same in all layers; None where no kernel can compute this one."""
    attention, rows = module.self_attn, packed_rows(layer)
    norms = module.input_layernorm, module.post_attention_layernorm
    heads = [attention._modules.get(name) for name in ("q_norm", "k_norm")]
    products = [attention._modules.get(name) for name in PRODUCTS]
    ffn = [module.mlp._modules.get(name) for name in FFN]
    dtype: torch.dtype | None
    kept: tuple[Any, ...] = ()
    if rows is not None:
        dtype = rows.dtype
        forms = [part.layout for part in products if isinstance(part, RowProjection) and part.is_alone]
        in_bytes = [part.scale.dtype for part in products if isinstance(part, ByteLinear)]
        kept = rows.layout, tuple(forms)
        fit = len(forms) == len(products) or in_bytes == [dtype] * len(products)
    else:
        dtype = layer.up.weight.dtype if type(layer.up) is nn.Linear else None
        fit = dtype in HALVES and all(type(part) is nn.Linear for part in (*products, *ffn))
        fit = fit and all(part.weight.dtype == dtype and part.weight.is_cpu for part in (*products, *ffn))
    if not fit or any(part is None or part.bias is not None for part in ffn):
        return None
    if layer.activation == "other" or layer.scale != 1.0 or any(map(replaced, module.modules())):
        return None
    words = [norm.weight for norm in (*norms, *heads) if norm is not None]
    words += [part.bias for part in products if part.bias is not None]
    if any(tensor.dtype != dtype for tensor in words):
        return None
    epsilons = tuple(norm and norm.variance_epsilon for norm in (*norms, *heads))
    shapes = tuple((part.in_features, part.out_features) for part in products)
    return dtype, kept, layer.neurons, layer.activation, attention.scaling, attention.head_dim, shapes, epsilons
