"""Tensors as the Numba kernels take them."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.weights import FFNWeights

WORDS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
_NONE = numpy.empty(0, numpy.float32)


def weight_arrays(weights: FFNWeights) -> tuple[Any, ...]:
    """Whether there is a gate; views of gate, up and down (up twice where there is none); both biases, and which are.

    16-bit floats are seen as words, since numpy has no bf16.

    Raises:
        ValueError: a matrix whose rows are not contiguous.
    """
    gate, up, down, gate_bias, up_bias, _ = weights.tensors()
    words = _words("up", up)
    gate_words = words if gate is None else _words("gate", gate)
    biased = (gate_bias is not None) + 2 * (up_bias is not None)
    return gate is not None, gate_words, words, _words("down", down), _floats(gate_bias), _floats(up_bias), biased


def _words(name: str, matrix: Tensor) -> Any:
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"the rows of the {name} matrix are not contiguous: the cpu kernels read whole rows")
    return matrix.detach().view(WORDS[matrix.dtype]).numpy()


def _floats(bias: Tensor | None) -> Any:
    return _NONE if bias is None else bias.detach().float().contiguous().numpy()
