"""Which kernels a backend has for the token selectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dartprune.ffn import selector_ops
from dartprune.ffn.backend import Backend
from dartprune.ffn.cpu import selectors as cpu_selectors
from dartprune.ffn.cpu.threads import kept_threads
from dartprune.ffn.gpu import selectors as gpu_selectors
from dartprune.ffn.operators import gated_operator, sketched_operator
from dartprune.ffn.selector_ops import TokenRows
from dartprune.ffn.sketch import AnySketch
from dartprune.ffn.weights import FFNWeights


@dataclass(frozen=True)
class SelectorKernels:
    """The two operators with the signatures of `selector_ops`.

    saves_time: whether rows not chosen are left unread.
    reads_union: whether a neuron that several rows of a batch need is read once for all of them.
    """

    gated_rows: Callable[..., TokenRows]
    sketched_rows: Callable[..., TokenRows]
    saves_time: bool
    reads_union: bool

    def prepare(
        self, weights: FFNWeights, sketch: AnySketch | None, *, calibrated: bool = False, compensated: bool = False
    ) -> None:
        """Compile what must be compiled for these weights, so that no token waits for it."""
        if not self.saves_time:
            return
        with kept_threads():
            for rows in (1, 2):
                x = torch.zeros(rows, weights.hidden, dtype=weights.dtype, device=weights.device)
                self._call(x, weights, sketch, calibrated, compensated)

    def _call(
        self, x: Tensor, weights: FFNWeights, sketch: AnySketch | None, calibrated: bool, compensated: bool
    ) -> None:
        slots = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        importance = torch.ones(1, weights.neurons, dtype=torch.float32, device=x.device)
        if sketch is None:
            self.gated_rows(x, weights, torch.zeros_like(one)[None], one, slots, one, importance=importance)
        else:
            moments = 2 * (weights.matrices - 1)
            errors = importance.new_zeros(1, moments, weights.neurons).bfloat16() if calibrated else None
            others: tuple[Tensor | None, Tensor | None] = None, None
            if compensated:
                others = importance.new_zeros(1, weights.neurons).bfloat16(), importance.new_zeros(1, weights.hidden)
            self.sketched_rows(x, weights, sketch, slots, one, importance, weights.neurons, None, errors, *others)


_REFERENCE = SelectorKernels(
    gated_operator("gated_rows_reference")(selector_ops.gated_rows),
    sketched_operator("sketched_rows_reference")(selector_ops.sketched_rows),
    saves_time=False,
    reads_union=True,
)
_KERNELS = {
    "cpu": SelectorKernels(cpu_selectors.gated_rows, cpu_selectors.sketched_rows, saves_time=True, reads_union=True),
    "gpu": SelectorKernels(gpu_selectors.gated_rows, gpu_selectors.sketched_rows, saves_time=True, reads_union=False),
}


def kernels_of(backend: Backend) -> SelectorKernels:
    """The kernels of a backend; the reference operators where it has none."""
    return _KERNELS.get(backend.name, _REFERENCE)
