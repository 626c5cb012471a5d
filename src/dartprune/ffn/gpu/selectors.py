"""Per-token selectors on the GPU: the operators of `selector_ops` with Triton kernels behind them.

A sketched row takes six launches, one after another on the current stream:

1. `round_kernel`: x as bit planes; it also clears the counts that the cut begins with;
2. `score_kernel`: products of planes by AND and population count (exact integers), then every neuron's key;
3. `cut_kernel`: the chosen neurons of each row, ascending (see `cut.py`);
4. to 6. the kernels of `kernels.py` over the rows' own lists.

A gated row takes five and one fill: `gate_kernel` reads the candidates' gate rows, the cut hands the activations of the
chosen ones on, `chosen_up_kernel` reads their up rows alone, and the down rows are summed as ever. In a plain FFN the
first rows are the up rows and need no second look: four launches.

Bytes that must move for one row that chooses k of I neurons, H wide, weights of w bytes:
- sketch of b bits: `(b H / 8 + 4) I` for each of gate and up, `4 I` of norms, and `3 k H w`; a plain FFN has no gate
  and `2 k H w`; with the mean of what was dropped in its place, `2 k` of means and `4 H` of what they give together;
- gate with C candidates: `(C + 2 k) H w` and `4 C` of importance; a plain FFN `(C + k) H w`.
The rest stays in the L2 cache: keys (written once, read three times by the cut, `16 I`), a gate's values (`8 C`), 24 KB
of counts, lists, and what `kernels.py` names. The cut is one program for each row: it reads little, but at a batch of
one it has the device for itself.

Launch sizes come from shapes alone and nothing is read back, so a captured CUDA graph follows lists, rates and slots
that change in place. Sums are float32 and their order does not depend on the number of rows, so a row gives the same
bits alone and in a batch. Each row reads its own neurons; rows of a batch find each other's in the L2 cache at best.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dartprune.ffn.gpu.backend import ready
from dartprune.ffn.operators import gated_operator, room_for_rows, sketched_operator
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.sketch import FFNSketch, InputPlanes, Products, SketchPlanes
from dartprune.ffn.weights import FFNWeights

MOST_ROWS = 32  # computed at a time: the partial sums of so many rows fit into memory beside any model


def room_for_planes(x: Tensor, activation_bits: int, outliers: int) -> InputPlanes:
    """What `round_kernel` fills for rows x [N, H]."""
    rows, words = x.shape[0], -(-x.shape[1] // 64)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=x.device)

    return InputPlanes(
        empty(rows, activation_bits, words, dtype=torch.int64),
        empty(rows, dtype=torch.float32),
        empty(rows, dtype=torch.int32),
        empty(rows, outliers, dtype=torch.int64),
        empty(rows, outliers, dtype=torch.float32),
    )


class _Group:
    """Some rows of a call: their x and slots, and what the kernels fill for them."""

    def __init__(self, call: _Call, first: int) -> None:
        part = slice(first, first + MOST_ROWS)
        self.call = call
        self.x, self.slots, self.out = call.x[part], call.slots[part], call.rows.out[part]
        self.index, self.count, self.cut = call.rows.index[part], call.rows.count[part], call.rows.cut[part]
        self.owners = torch.empty_like(self.slots)
        self.acts = torch.empty(self.index.shape, dtype=torch.float32, device=self.x.device)

    def choose(self, key: Tensor, tally: Tensor, value: Tensor | None) -> None:
        """Cut: fill the lists, and acts where the chosen neurons' values are known."""
        from dartprune.ffn.gpu import cut as gpu_cut

        lists = self.index, self.count, self.cut, self.owners
        gpu_cut.launch_cut(key, tally, value, self.slots, self.call.wanted, self.call.threshold, *lists, self.acts)

    def add_down(self, down: Tensor, down_bias: Tensor | None, compensation: Tensor | None = None) -> None:
        """The down rows of the chosen, times acts; as many parts for any number of rows, so in the same order.

        compensation: float32 [S, H], added to the rows of each slot.
        """
        from dartprune.ffn.gpu import kernels as gpu_kernels

        rows, hidden = self.x.shape
        config = self.call.config
        partial = torch.empty(config.splits, rows, hidden, dtype=torch.float32, device=self.x.device)
        gpu_kernels.launch_down(self.acts, down, self.index, self.count, self.owners, partial, config.down)
        owners = None if compensation is None else self.slots
        gpu_kernels.launch_sum(partial, down_bias, self.out, compensation, owners)


class _Call:
    """The tensors that both operators take, checked and as the kernels want them, and those that they give."""

    def __init__(
        self,
        x: Tensor,
        weights: FFNWeights,
        slots: Tensor,
        wanted: Tensor,
        threshold: Tensor | None,
        width: int,
    ) -> None:
        from dartprune.ffn.gpu import tuning as gpu_tuning

        self.x = ready(x, weights)
        self.config = gpu_tuning.config(weights.gate, weights.up)
        self.slots, self.wanted = slots.contiguous(), wanted.contiguous()
        self.threshold = None if threshold is None else threshold.float().contiguous()
        self.rows = TokenRows(*room_for_rows(self.x, width))

    def groups(self) -> Iterator[_Group]:
        """The rows, as many at a time as are computed together."""
        return (_Group(self, first) for first in range(0, self.x.shape[0], MOST_ROWS))


# custom operators for the reasons that `backend.py` gives
@gated_operator("gated_rows_gpu")
def gated_rows(
    x: Tensor,
    weights: FFNWeights,
    index: Tensor,
    count: Tensor,
    slots: Tensor,
    wanted: Tensor,
    threshold: Tensor | None,
    importance: Tensor | None,
) -> TokenRows:
    """Token gate: see `selector_ops.gated_rows`. The weights must be contiguous."""
    from dartprune.ffn.gpu import cut as gpu_cut
    from dartprune.ffn.gpu import gate as gpu_gate

    gate, up, down, gate_bias, up_bias, down_bias = weights.tensors()
    matrix, bias = (up, up_bias) if gate is None else (gate, gate_bias)
    lists = index.contiguous(), count.contiguous()
    weight = None if importance is None else importance.float().contiguous()
    with torch.cuda.device_of(x):
        call = _Call(x, weights, slots, wanted, threshold, index.shape[1])
        blocks = call.config.up
        for group in call.groups():
            rows, neurons = group.x.shape[0], up.shape[0]
            # one fill for both: what is no candidate has the key 0
            zeros = torch.zeros(rows * (gpu_cut.TALLY + neurons), dtype=torch.int32, device=x.device)
            tally, key = zeros.split((rows * gpu_cut.TALLY, rows * neurons))
            key = key.view(rows, neurons)
            value = torch.empty(key.shape, dtype=torch.float32, device=x.device)
            gpu_gate.launch_gate(
                *(group.x, matrix, bias, weight, *lists, group.slots, key, value, tally),
                *(weights.activation, blocks),
            )
            group.choose(key, tally, value)
            if gate is not None:
                gpu_gate.launch_chosen_up(group.x, up, up_bias, group.index, group.count, group.acts, blocks)
            group.add_down(down, down_bias)
    return call.rows


@sketched_operator("sketched_rows_gpu")
def sketched_rows(
    x: Tensor,
    weights: FFNWeights,
    sketch: FFNSketch,
    slots: Tensor,
    wanted: Tensor,
    importance: Tensor,
    width: int,
    threshold: Tensor | None,
    errors: Tensor | None,
    means: Tensor | None = None,
    compensation: Tensor | None = None,
) -> TokenRows:
    """Sketch: see `selector_ops.sketched_rows`. The weights must be contiguous."""
    from dartprune.ffn.gpu import cut as gpu_cut
    from dartprune.ffn.gpu import kernels as gpu_kernels
    from dartprune.ffn.gpu import rounding as gpu_rounding
    from dartprune.ffn.gpu import sketch as gpu_sketch

    gate, up, down, gate_bias, up_bias, down_bias = weights.tensors()
    act, biases = weights.activation, (gate_bias, up_bias)
    planes = FFNSketch(None if sketch.gate is None else _contiguous(sketch.gate), _contiguous(sketch.up))
    weight, known = importance.float().contiguous(), None if errors is None else errors.contiguous()
    if means is not None and compensation is not None:
        means, compensation = means.contiguous(), compensation.contiguous()
    with torch.cuda.device_of(x):
        call = _Call(x, weights, slots, wanted, threshold, width)
        for group in call.groups():
            rounded = room_for_planes(group.x, sketch.activation_bits, sketch.outliers)
            key = torch.empty(group.x.shape[0], weights.neurons, dtype=torch.int32, device=x.device)
            tally = torch.empty(group.x.shape[0], gpu_cut.TALLY, dtype=torch.int32, device=x.device)
            gpu_rounding.launch_round(group.x, rounded, tally)
            gpu_sketch.launch_score(rounded, planes, *biases, weight, known, group.slots, key, tally, act)
            group.choose(key, tally, None)
            lists = group.index, group.count, group.owners
            others = (None, None) if means is None else (means, group.slots)
            gpu_kernels.launch_up(group.x, gate, up, *biases, *lists, group.acts, act, call.config.up, *others)
            group.add_down(down, down_bias, compensation)
    return call.rows


def estimates(x: Tensor, sketch: FFNSketch) -> Products:
    """Rows x [N, H] rounded, and their products as `sketch.estimated_products` gives them, float32 [N, I]."""
    from dartprune.ffn.gpu import cut as gpu_cut
    from dartprune.ffn.gpu import rounding as gpu_rounding
    from dartprune.ffn.gpu import sketch as gpu_sketch

    matrices = [sketch.up] if sketch.gate is None else [sketch.gate, sketch.up]
    outs = [torch.empty(x.shape[0], m.neurons, dtype=torch.float32, device=x.device) for m in matrices]
    with torch.cuda.device_of(x):
        rounded = room_for_planes(x, sketch.activation_bits, sketch.outliers)
        tally = torch.empty(x.shape[0], gpu_cut.TALLY, dtype=torch.int32, device=x.device)
        gpu_rounding.launch_round(x.detach().contiguous(), rounded, tally)
        for matrix, out in zip(matrices, outs, strict=True):
            gpu_sketch.launch_estimate(rounded, _contiguous(matrix), out)
    return (None if sketch.gate is None else outs[0]), outs[-1]


def _contiguous(planes: SketchPlanes) -> SketchPlanes:
    return SketchPlanes(planes.planes.contiguous(), planes.scale.contiguous(), planes.hidden)
