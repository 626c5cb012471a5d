"""Activations for Numba: of one value, and of many in loops that vectorise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from dartprune.ffn.cpu.lean import lean

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}

ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
INVERSE_ROOT_TWO = np.float32(1 / math.sqrt(2))
GELU_SCALE, GELU_CUBE = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
QUICK = np.float32(1.702)
LOG2E = np.float32(1 / math.log(2))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@intrinsic
def power_of_two(context: Any, exponent: Any) -> Any:
    """2^k as float32 from an int32 k in -126 .. 127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        shifted = builder.shl(builder.add(args[0], ir.Constant(word, 127)), ir.Constant(word, 23))
        return builder.bitcast(shifted, ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always")
def exp(v):
    """e^v in plain arithmetic, so that a loop over it vectorises; v beyond +-87 counts as +-87."""
    v = min(max(v, np.float32(-87.0)), np.float32(87.0))
    k = np.rint(v * LOG2E)
    r = v - k * LN2_HIGH - k * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + HALF
    return (p * r * r + r + ONE) * power_of_two(np.int32(k))


@njit(inline="always")
def _soft_gate(v, z):
    """V / (1 + e^-z)."""
    return v / (ONE + exp(-z))


@njit(inline="always")
def _tanh_gelu(v):
    # (1 + tanh z) / 2 = 1 / (1 + e^-2z)
    return _soft_gate(v, np.float32(2.0) * GELU_SCALE * (v + GELU_CUBE * v * v * v))


@njit(inline="always")
def activate(kind, v):
    """One value; kind: a number of `ACTIVATIONS`.

    No function of the C library for the frequent ones: a call takes as long as a row of weights, for what the compiler
    holds in vectors is put away.
    """
    if kind == 0:
        return _soft_gate(v, v)
    if kind == 1:
        return HALF * v * (ONE + np.float32(math.erf(v * INVERSE_ROOT_TWO)))
    if kind == 2:
        return _tanh_gelu(v)
    if kind == 3:
        return max(v, ZERO)
    if kind == 4:
        return max(v, ZERO) * max(v, ZERO)
    return _soft_gate(v, QUICK * v)


# a division that may raise an error keeps a loop from being vectorised: here it gives infinity or NaN
@lean(fastmath={"contract"}, error_model="numpy")
def activate_all(kind, v):
    """Activate v float32 [B] in place, a vector at a time."""
    if kind == 0:
        for i in range(v.shape[0]):
            v[i] = _soft_gate(v[i], v[i])
    elif kind == 5:
        for i in range(v.shape[0]):
            v[i] = _soft_gate(v[i], QUICK * v[i])
    elif kind == 2:
        for i in range(v.shape[0]):
            v[i] = _tanh_gelu(v[i])
    elif kind == 3:
        for i in range(v.shape[0]):
            v[i] = max(v[i], ZERO)
    elif kind == 4:
        for i in range(v.shape[0]):
            v[i] = max(v[i], ZERO) * max(v[i], ZERO)
    else:
        for i in range(v.shape[0]):
            v[i] = activate(kind, v[i])
