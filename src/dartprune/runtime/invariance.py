"""Decode steps in which a sequence gets the same bits alone and in a batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dartprune.ffn.backend import Backend
from dartprune.ffn.cpu.backend import InvariantCpuBackend
from dartprune.model.step import OwnStep
from dartprune.runtime.events import Events
from dartprune.runtime.forward import Forwards
from dartprune.runtime.layer_hooks import LiveLayer


def make_invariant(
    core: nn.Module, step: OwnStep, layers: Sequence[LiveLayer], forwards: Forwards, events: Events
) -> str | None:
    """From now on no sum of a decode step depends on what else is in its batch; or why that cannot be.

    A forward of pruned sequences alone, or of dense ones alone, is meant: whoever steps a batch keeps them apart.
    """
    backend = InvariantCpuBackend()
    if forwards.method.prunes:
        for layer in layers:
            if (reason := _against(layer, backend)) is not None:
                return f"layer {layer.index}: {reason}"
    if (reason := step.make_invariant(core)) is not None:
        return reason
    for layer in layers if forwards.method.prunes else ():
        layer.backend = backend
        assert not isinstance(layer.weights, str)
        backend.prepare(layer.weights)
    forwards.rows_or_dense.always_rows = True
    events.one_by_one = True
    return None


def _against(layer: LiveLayer, backend: Backend) -> str | None:
    if layer.backend.name != backend.name:
        return f"its backend is {layer.backend.name}"
    if layer.selector is not None and layer.selector.kernels is None:
        return "its selector is applied as a mask"
    return backend.reason_against(layer.weights, layer.place[0])
