"""What FFN weights may be kept in, a model with its weights in that form, and the bits that each weight costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dartprune.errors import UserError, require
from dartprune.ffn.quantised import BITS
from dartprune.ffn.row_format import RowFormat, row_values
from dartprune.gguf_files import GGUF, ffn_bits
from dartprune.loading import load
from dartprune.model.families import describe
from dartprune.model.weights import row_weights
from dartprune.quantisation import quantise

BASE = "bfloat16"
MOST, LEAST = 8, 2  # bits that rounding is done to
_ROUNDED = re.compile(r"int([0-9]+)")


@dataclass(frozen=True)
class Loaded:
    """A model whose FFN is kept in some format. bits: of an FFN weight, scales counted."""

    model: Any
    tokenizer: Any
    bits: float


Load = Callable[[str | None, str], tuple[Any, Any]]  # name or path, dtype -> model, tokenizer


def check_formats(names: Sequence[str]) -> list[str]:
    """The formats in order, the base in front and each once.

    Raises:
        ValueError: a name that is neither bfloat16, int2 to int8, nor a GGUF file that is there.
    """
    for name in names:
        match = _ROUNDED.fullmatch(name)
        known = name == BASE or (match is not None and LEAST <= int(match[1]) <= MOST)
        if not known and not (name.endswith(GGUF) and Path(name).is_file()):
            raise UserError(
                f"unknown format of weights {name!r}: write {BASE}, int{LEAST} to int{MOST}, or a GGUF file"
            )
    return list(dict.fromkeys([BASE, *names]))


def has_rows(name: str) -> bool:
    """Whether rows of a format can be left unread, so that methods save something there."""
    return name == BASE or name in {f"int{bits}" for bits in BITS}


def loaded(source: str | None, name: str, read: Load | None = None) -> Loaded:
    """A model with its FFN in a format; everything else stays in bfloat16, but for a GGUF file, which is taken whole.

    Args:
        source: of the model, as `dartprune.loading.load` takes it.
        name: a format that `check_formats` lets pass.
        read: instead of `dartprune.loading.load`.
    """
    read = read or (lambda path, dtype: load(path, dtype=dtype))
    if name.endswith(GGUF):
        model, tokenizer = read(name, BASE)
        return Loaded(model, tokenizer, ffn_bits(name))
    model, tokenizer = read(source, BASE)
    if name == BASE:
        return Loaded(model, tokenizer, 16.0)
    bits = int(name.removeprefix("int"))
    if bits in BITS:
        quantise(model, bits, whole=False)
        rows = [row_weights(layer) for layer in describe(model).layers]
        sizes = [
            (8 * r.neurons * r.row_bytes, r.neurons * r.matrices * r.hidden) for r in rows if not isinstance(r, str)
        ]
    else:
        sizes = _round(model, bits)
    return Loaded(model, tokenizer, sum(bits for bits, _ in sizes) / sum(count for _, count in sizes))


@torch.no_grad()
def _round(model: Any, bits: int) -> list[tuple[int, int]]:
    """Round the FFN in place as rows would be, the nearest value for each; bits and number of weights of each layer."""
    require("numba", "rounding weights", "cpu")
    from dartprune.ffn.cpu.rounding import rounded

    sizes = []
    for layer in describe(model).layers:
        weights = row_weights(layer)
        if isinstance(weights, str):
            raise UserError(f"layer {layer.index} cannot be rounded: {weights}")
        layout = RowFormat(weights.hidden, weights.gate is not None, bits, 0)
        for matrix in (weights.gate, weights.up, weights.down):
            if matrix is not None:
                matrix.copy_(row_values(*rounded(matrix, layout, bits), layout))
        each = layout.codes(bits) + layout.scales
        sizes.append(
            (8 * weights.neurons * weights.matrices * each, weights.neurons * weights.matrices * weights.hidden)
        )
    return sizes
