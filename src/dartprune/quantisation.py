"""Packs a model's weights into 4 or 8 bits in place: the FFN in rows, the rest in rows or in bytes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.errors import UserError, require
from dartprune.ffn.quantised import BITS, quantised_rows
from dartprune.model.families import Decoder, Layer, describe
from dartprune.model.layer import held
from dartprune.model.packed import Packed
from dartprune.model.packed_bytes import ByteEmbedding, ByteLinear, bytes_of
from dartprune.model.packed_rows import VOCABULARY, PackedRows, RowEmbedding, RowProjection, lone_rows, saves_vocabulary
from dartprune.model.weights import row_weights
from dartprune.packed_file import let_save
from dartprune.run import run_of

Progress = Callable[[int, int], None]  # layers done, layers in all
# embeddings whose vectors are multiplied with a number that they keep
_SCALED = {"Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding", "GemmaTextScaledWordEmbedding"}


@dataclass(frozen=True)
class Quantisation:
    """What `quantise` did: bits of the FFN's weights; bytes of all weights before and after; what it left alone."""

    bits: int
    bytes_before: int
    bytes: int
    left: tuple[str, ...]

    def __str__(self) -> str:
        size = f"{self.bytes_before / 1e6:.0f} MB to {self.bytes / 1e6:.0f} MB"
        left = f"; left as they were: {', '.join(self.left)}" if self.left else ""
        return f"{self.bits} bits: weights {size}{left}"


@torch.no_grad()
def quantise(
    model: Any, bits: int = 4, *, nested: bool = True, whole: bool = True, progress: Progress | None = None
) -> Quantisation:
    """Pack a model's weights into 4 or 8 bits, in place and layer by layer; pruners are attached to it as to any other.

    The FFN becomes rows, one neuron a row, with a scale and a low for each 32 weights. With 4 bits so does all else,
    one output a row, embedding and head in rows of 6 where that is smaller; with 8 bits it becomes bytes with one scale
    a row.

    Args:
        model: a transformers decoder on the CPU, in evaluation mode.
        bits: 4 or 8.
        nested: each code of gate and up lies in two halves, the first of which serves token selectors as their sketch.
        whole: False leaves everything but the FFN as it is.
        progress: told how many layers are done, of how many.

    Raises:
        TypeError: no model.
        ValueError: other bits; a model that is attached, elsewhere than on the CPU, in training mode, quantised before,
            or with an FFN whose weights cannot be read. Nothing has been changed then.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise UserError(f"bits must be 4 or 8, got {bits!r}")
    require("numba", "quantised rows", "cpu")
    decoder = describe(model)
    _check(model, decoder)
    before = _size(model)
    # by name, and the layers let go one by one: what is packed is freed before the next
    paths = {id(module): path for path, module in model.named_modules()}
    layers = list(reversed(decoder.layers))
    del decoder
    count = len(layers)
    while layers:
        _pack_ffn(model, layers.pop(), bits, nested, paths)
        if progress is not None:
            progress(count - len(layers), count)
    left = _pack_rest(model, bits) if whole else []
    if whole:
        _leave_the_file(model)
    let_save(model)  # packed weights are in no state dict: what transformers wrote would be a model without them
    _give_back()
    return Quantisation(bits, before, _size(model), tuple(left))


def _check(model: Any, decoder: Decoder) -> None:
    if run_of(model) is not None:
        raise UserError("the model is attached: call dartprune.detach(model) before quantising it")
    if model.training:
        raise UserError("the model is in training mode: call model.eval() before quantising it")
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise UserError(f"{name} lies on {tensor.device}: rows of 4 and 8 bits are computed on the CPU")
    if any(isinstance(module, Packed) for module in model.modules()):
        raise UserError("the model is quantised already: load it again to quantise it otherwise")
    for layer in decoder.layers:
        weights = row_weights(layer)
        if isinstance(weights, str):
            raise UserError(f"layer {layer.index} cannot be quantised: {weights}")
        if weights.activation == "other":
            raise UserError(f"layer {layer.index} cannot be quantised: its activation has no canonical form")


def _leave_the_file(model: nn.Module) -> None:
    """Norms and biases may be views of a mapped checkpoint, which keeps all of it mapped: copied."""
    for module in model.modules():
        if not isinstance(module, Packed):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.clone()


def _give_back() -> None:
    """Hand freed memory back: glibc keeps what was freed layer by layer, in all as much as the weights were."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _size(model: nn.Module) -> int:
    tensors = {id(t): t for t in held(model)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _pack_ffn(model: nn.Module, layer: Layer, bits: int, nested: bool, paths: dict[int, str]) -> None:
    weights = row_weights(layer)
    assert not isinstance(weights, str)
    from dartprune.ffn.cpu.rounding import rounded

    rows = quantised_rows(weights, bits, nested=nested, round_matrix=rounded)
    roles = {"gate_up" if layer.fused else "up": layer.up, "down": layer.down}
    if layer.gate is not None:
        roles["gate"] = layer.gate
    for role, module in roles.items():
        parent, _, name = paths[id(module)].rpartition(".")
        setattr(model.get_submodule(parent), name, RowProjection(rows, role, module.bias))  # type: ignore[arg-type]


def _pack_rest(model: Any, bits: int) -> list[str]:
    """Pack what is no FFN; returns the names of other modules with matrices, which are left as they are."""
    left: list[str] = []
    shared: dict[int, tuple[Tensor, Tensor] | PackedRows] = {}
    head = model.get_output_embeddings()

    def packed_vocabulary(weight: Tensor) -> tuple[Tensor, Tensor] | PackedRows:
        """The packed form of a weight, the same for an embedding and a head that are tied."""
        place = weight.data_ptr()
        if place not in shared:
            in_rows = bits == 4 and saves_vocabulary(weight.shape[1])
            shared[place] = lone_rows(weight, VOCABULARY) if in_rows else bytes_of(weight)
        return shared[place]

    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if type(module) is nn.Embedding or kind in _SCALED:
            if module is not model.get_input_embeddings():
                continue  # of positions: small, and added to something
            factor = float(getattr(module, "embed_scale", 1.0)) if kind in _SCALED else 1.0
            words = packed_vocabulary(module.weight)
            packed: Packed = (
                RowEmbedding(words, factor) if isinstance(words, PackedRows) else ByteEmbedding(*words, factor)
            )
        elif kind == "Conv1D" or type(module) is nn.Linear:
            weight = module.weight.detach()
            weight = weight.t().contiguous() if kind == "Conv1D" else weight
            if module is head:
                packed = _linear(packed_vocabulary(module.weight), module.bias)
            else:
                packed = _linear(bytes_of(weight) if bits == 8 else lone_rows(weight), module.bias)
        else:
            weight = getattr(module, "weight", None)
            if not isinstance(module, Packed) and isinstance(weight, Tensor) and weight.dim() > 1:
                left.append(path)
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], packed)
    return left


def _linear(packed: tuple[Tensor, Tensor] | PackedRows, bias: Tensor | None) -> Packed:
    return RowProjection(packed, "up", bias) if isinstance(packed, PackedRows) else ByteLinear(*packed, bias)
