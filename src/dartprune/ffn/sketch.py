"""The sketch of an FFN's weights: planes of a few bits, inputs rounded for them, estimated products and scores.

Plain torch (method section 4a): right on every device, the oracle of every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from dartprune.ffn.backend import activation
from dartprune.ffn.expected import expected_sizes
from dartprune.ffn.quantised import NestedSketch, nested_estimates
from dartprune.ffn.weights import FFNWeights

WORD = 64  # bits of one word of a plane
SKETCH_BITS = (1, 2, 3, 4)
# step of the best uniform quantiser with 2^b - 1 levels for a Gaussian, in standard deviations, by bits
GAUSSIAN_STEP = {2: 1.224, 3: 0.651, 4: 0.353, 5: 0.194, 6: 0.106, 7: 0.0575, 8: 0.0311}
# half the step of the best uniform quantiser with 2^b levels for a Gaussian, in mean absolute values, by bits
GAUSSIAN_SCALE = {1: 1.0, 2: 0.624, 3: 0.367, 4: 0.210}
STARTS = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7)  # where the fit of a row's scale starts, times that
_BLOCKS = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights packed at a time: a CPU's caches hold them, a GPU is filled


@dataclass(frozen=True)
class SketchPlanes:
    """A weight matrix [I, H] in b bits: `W[i, j] ~ scale[i] * (2 q[i, j] - (2^b - 1))`, q = 0 .. 2^b - 1.

    planes: int64 [I, b, ceil(H / 64)], bit j % 64 of word j // 64 of plane k is bit k of q[i, j]; bits past H are 0.
    scale: float32 [I].
    hidden: H.
    """

    planes: Tensor
    scale: Tensor
    hidden: int

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return int(self.planes.shape[1])

    @property
    def neurons(self) -> int:
        """Number of rows, I."""
        return int(self.planes.shape[0])

    @property
    def bytes(self) -> int:
        """Memory held, and read for each token."""
        return self.planes.numel() * 8 + self.scale.numel() * 4


@dataclass(frozen=True)
class FFNSketch:
    """The sketch of one FFN and how inputs are rounded for it.

    gate: planes of the gate matrix, None for a plain FFN.  up: planes of the up matrix.
    activation_bits: 2 .. 8 bits of the rounded input.  outliers: entries of the input that are kept exact.
    """

    gate: SketchPlanes | None
    up: SketchPlanes
    activation_bits: int = 4
    outliers: int = 4

    @property
    def bytes(self) -> int:
        """Memory held, and read for each token."""
        return self.up.bytes + (0 if self.gate is None else self.gate.bytes)


AnySketch: TypeAlias = "FFNSketch | NestedSketch"
Products: TypeAlias = "tuple[Tensor | None, Tensor]"  # of inputs with gate (None for a plain FFN) and up, [N, I] each


class InputPlanes(NamedTuple):
    """Rows x [N, H] rounded: `x[n, j] ~ step[n] * X[n, j]`, X two's complement of A bits, 0 at the outliers.

    planes: int64 [N, A, ceil(H / 64)], laid out like `SketchPlanes.planes`.
    step: float32 [N].
    total: int32 [N], the sum of X over j.
    outlier_index: int64 [N, K].  outlier_value: float32 [N, K], the exact entries (where it is 0, the index is any).
    """

    planes: Tensor
    step: Tensor
    total: Tensor
    outlier_index: Tensor
    outlier_value: Tensor


def build_planes(weight: Tensor, bits: int) -> SketchPlanes:
    """Round a weight matrix to b bits a weight, each row with the scale of the least squared error.

    The levels are the odd multiples of the scale, `+-1, +-3, .. +-(2^b - 1)`; with one bit that is the sign times
    the row's mean absolute value. With more, levels and scale are fitted in turn, from several starts.

    Args:
        weight: [I, H], any float dtype and layout.
        bits: 1 to 4.

    Raises:
        ValueError: bits outside 1 to 4.
    """
    out = empty_planes(weight, bits)
    top = 2**bits - 1
    step = max(1, _BLOCKS.get(weight.device.type, _BLOCKS["cpu"]) // out.hidden)
    for first in range(0, out.neurons, step):
        part = weight[first : first + step].detach().float()
        s = part.abs().mean(dim=1, keepdim=True) * GAUSSIAN_SCALE[bits]
        if bits > 1:
            s = _fitted(part, s, top)
        out.planes[first : first + step] = _pack(_code(part, s, top).to(torch.int64), bits)
        out.scale[first : first + step] = s[:, 0]
    return out


def empty_planes(weight: Tensor, bits: int) -> SketchPlanes:
    """Planes for a weight matrix [I, H], on its device, to be filled.

    Raises:
        ValueError: bits outside 1 to 4.
    """
    if bits not in SKETCH_BITS:
        raise ValueError(f"bits={bits} is not one of {SKETCH_BITS}")
    neurons, hidden = weight.shape
    planes = torch.empty(neurons, bits, -(-hidden // WORD), dtype=torch.int64, device=weight.device)
    return SketchPlanes(planes, torch.empty(neurons, dtype=torch.float32, device=weight.device), hidden)


def build_sketch(weights: FFNWeights, bits: int, activation_bits: int = 4, outliers: int = 4) -> FFNSketch:
    """The sketch of one FFN: planes of gate and up, or of up alone where there is no gate.

    Raises:
        ValueError: bits outside 1 to 4, activation_bits outside 2 to 8, or outliers outside 0 to H.
    """
    if activation_bits not in GAUSSIAN_STEP:
        raise ValueError(f"activation_bits={activation_bits} is outside 2 to 8")
    if not 0 <= outliers <= weights.hidden:
        raise ValueError(f"outliers={outliers} is outside 0 to {weights.hidden}, the width of the input")
    gate = None if weights.gate is None else build_planes(weights.gate, bits)
    return FFNSketch(gate, build_planes(weights.up, bits), activation_bits, outliers)


def quantise_input(x: Tensor, activation_bits: int = 4, outliers: int = 4) -> InputPlanes:
    """Round each row of x [N, H] to `activation_bits` bits; its `outliers` largest entries are taken out, exact.

    The step is the best one for a Gaussian of the remaining entries' root mean square, or smaller where their
    largest needs less; what lies beyond the last level is clipped to it.
    """
    wide = x.float()
    top = 2 ** (activation_bits - 1) - 1
    # ties to the lower index, as the kernels have it
    place = wide.abs().sort(dim=1, descending=True, stable=True).indices[:, :outliers]
    value = wide.gather(1, place)
    rest = wide.scatter(1, place, 0.0)
    spread = rest.square().mean(dim=1).sqrt() * GAUSSIAN_STEP[activation_bits]
    step = torch.minimum(rest.abs().amax(dim=1) / top, spread)
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    rounded = (rest * inverse[:, None]).round().clamp(-top, top).to(torch.int64)
    return InputPlanes(_pack(rounded, activation_bits), step, rounded.sum(dim=1).int(), place, value)


def sketch_integers(x: InputPlanes, sketch: SketchPlanes) -> Tensor:
    """The integer part of the dot products: `D[n, i] = sum_j (2 q[i, j] - (2^b - 1)) X[n, j]`, int32 [N, I].

    With P = popcount this is `sum_k 2^(k+1) sum_p w_p P(q_k AND X_p) - (2^b - 1) sum_j X_j`, w_p = 2^p but
    -2^(A-1) for the last plane.
    """
    top = 2**sketch.bits - 1
    level = 2 * _unpack(sketch.planes, sketch.hidden, signed=False) - top
    rounded = _unpack(x.planes, sketch.hidden, signed=True)
    bound = top * sketch.hidden << (x.planes.shape[1] - 1)
    exact = torch.float32 if bound < 2**24 else torch.float64
    product: Tensor = rounded.to(exact) @ level.to(exact).T
    return product.int()


def sketch_dots(x: InputPlanes, sketch: SketchPlanes) -> Tensor:
    """Estimated products `W x`, float32 [N, I]: the integer part times its scales, and the outliers' part."""
    level = (2 * _unpack(sketch.planes, sketch.hidden, signed=False) - (2**sketch.bits - 1)).float()
    dots = sketch_integers(x, sketch).float() * x.step[:, None]
    for n in range(x.planes.shape[0]):
        dots[n] += level[:, x.outlier_index[n]] @ x.outlier_value[n]
    return dots * sketch.scale


def estimated_products(x: Tensor, sketch: FFNSketch) -> Products:
    """Estimated products of rows x [N, H], float32 [N, I], without biases."""
    rounded = quantise_input(x, sketch.activation_bits, sketch.outliers)
    return None if sketch.gate is None else sketch_dots(rounded, sketch.gate), sketch_dots(rounded, sketch.up)


def sketch_scores(
    x: Tensor, weights: FFNWeights, sketch: AnySketch, importance: Tensor, errors: Tensor | None = None
) -> Tensor:
    """Estimated weight of each neuron, float32 [N, I]: `|act(g^ + bias) (u^ + bias)| * importance` [N, I].

    With errors [N, 4 or 2, I], what is expected under them: see `expected.expected_sizes`.
    """
    act = partial(activation, weights.activation)
    if isinstance(sketch, NestedSketch):
        g, a = nested_estimates(x, sketch.rows)
    else:
        g, a = estimated_products(x, sketch)
    if weights.up_bias is not None:
        a = a + weights.up_bias.float()
    if g is not None and weights.gate_bias is not None:
        g = g + weights.gate_bias.float()
    return estimated_sizes(act, g, a, errors) * importance


def estimated_sizes(act: Callable[[Tensor], Tensor], gate: Tensor | None, up: Tensor, errors: Tensor | None) -> Tensor:
    """Estimated size of each neuron's activation, float32 [N, I], from estimated products with biases added."""
    if errors is not None:
        return expected_sizes(act, gate, up, errors)
    return act(up).abs() if gate is None else (act(gate) * up).abs()


def _fitted(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """The scale [R, 1] of the least squared error that is found from multiples of `scale`."""
    best, least = scale, torch.full_like(scale, torch.inf)
    for start in STARTS:
        s = scale * start
        for _ in range(3):
            level = 2 * _code(weight, s, top) - top
            s = (weight * level).sum(dim=1, keepdim=True) / level.square().sum(dim=1, keepdim=True)
        error = (weight - s * (2 * _code(weight, s, top) - top)).square().sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def _code(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """The nearest level's number, 0 .. top, as floats; an all-zero row takes any."""
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return torch.floor((weight * inverse + (top + 1)) / 2).clamp(0, top)


def _pack(values: Tensor, bits: int) -> Tensor:
    """The lowest bits of int64 [R, H] as planes int64 [R, bits, ceil(H / 64)]."""
    hidden = values.shape[1]
    words = -(-hidden // WORD)
    values = F.pad(values, (0, words * WORD - hidden)).view(-1, words, WORD)
    place = torch.arange(WORD, device=values.device)
    return torch.stack([(((values >> k) & 1) << place).sum(dim=2) for k in range(bits)], dim=1)


def _unpack(planes: Tensor, hidden: int, *, signed: bool) -> Tensor:
    """Planes int64 [R, bits, words] as values int32 [R, H]; with `signed` the last plane counts negative."""
    rows, bits, words = planes.shape
    place = torch.arange(WORD, device=planes.device)
    values = torch.zeros(rows, hidden, dtype=torch.int32, device=planes.device)
    for k in range(bits):
        plane = ((planes[:, k, :, None] >> place) & 1).view(rows, words * WORD)[:, :hidden].int()
        values += plane * (-(2**k) if signed and k == bits - 1 else 2**k)
    return values
