"""Tensors as the Numba kernels take them."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from dartprune.ffn.weights import FFNWeights

WORDS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
_NONE = numpy.empty(0, numpy.float32)
_NO_ERRORS = numpy.empty((0, 0, 0), numpy.uint16)
_NO_MEANS, _NO_COMPENSATION = numpy.empty((0, 0), numpy.uint16), numpy.empty((0, 0), numpy.float32)


def weight_arrays(weights: FFNWeights) -> tuple[Any, ...]:
    """Whether there is a gate; views of gate, up and down (up twice where there is none); both biases, and which are.

    16-bit floats are seen as words, since numpy has no bf16.

    Raises:
        ValueError: a matrix whose rows are not contiguous.
    """
    gate, up, down, gate_bias, up_bias, _ = weights.tensors()
    up_words = words("up", up)
    gate_words = up_words if gate is None else words("gate", gate)
    biased = (gate_bias is not None) + 2 * (up_bias is not None)
    return gate is not None, gate_words, up_words, words("down", down), floats(gate_bias), floats(up_bias), biased


def words(name: str, matrix: Tensor) -> Any:
    """A matrix whose rows are contiguous as the kernels see it: 16-bit floats are words, since numpy has no bf16."""
    if matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
        raise ValueError(f"the rows of the {name} matrix are not contiguous: the cpu kernels read whole rows")
    return matrix.detach().view(WORDS[matrix.dtype]).numpy()


def floats(bias: Tensor | None) -> Any:
    """A vector in float32, empty for None."""
    return _NONE if bias is None else bias.detach().float().contiguous().numpy()


def error_array(errors: Tensor | None) -> Any:
    """Means and variances of a sketch's errors, bf16 words [S, 4 or 2, I]; empty for None."""
    return _NO_ERRORS if errors is None else words("errors", errors)


def others_arrays(means: Tensor | None, compensation: Tensor | None) -> tuple[Any, Any]:
    """What stands in the place of dropped neurons, bf16 words [S, I], and its product [S, H]; both empty for None."""
    if means is None or compensation is None:
        return _NO_MEANS, _NO_COMPENSATION
    return words("means", means), compensation.numpy()
