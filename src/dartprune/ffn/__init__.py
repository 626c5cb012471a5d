"""Ways to compute a pruned FFN, by name; `register_backend` adds one."""

from __future__ import annotations

import torch

from dartprune.errors import UserError
from dartprune.ffn.backend import Backend
from dartprune.ffn.cpu.backend import CpuBackend
from dartprune.ffn.gpu.backend import GpuBackend
from dartprune.ffn.masked import MaskedBackend
from dartprune.ffn.reference import ReferenceBackend
from dartprune.ffn.weights import FFNWeights
from dartprune.names import Registry

__all__ = ["Backend", "FFNWeights", "backend_names", "choose", "register_backend"]

_backends: Registry[Backend] = Registry("backend")


def register_backend(backend: Backend) -> None:
    """Make a way of computing known under its `name`; ValueError if the name is taken."""
    _backends.register(backend.name, backend)


for _backend in (CpuBackend(), GpuBackend(), ReferenceBackend(), MaskedBackend()):
    register_backend(_backend)

# what `auto` tries before `masked`, which works everywhere, by the kind of device; "cpu" says why for all others
_AUTOMATIC = {"cpu": "cpu", "cuda": "gpu"}


def backend_names() -> list[str]:
    """Names that `backend=` accepts, beside `auto`."""
    return _backends.names()


def choose(name: str, weights: FFNWeights | str, device: torch.device) -> tuple[Backend, str | None]:
    """The backend for one layer, and why a faster one was not taken.

    Args:
        name: `auto` or a registered name.
        weights: the layer's weights, or the reason why its rows cannot be read.
        device: where the layer computes.

    Raises:
        ValueError: unknown name, or a named backend that cannot compute this layer.
    """
    if name != "auto":
        backend = _backends.get(name)
        reason = backend.reason_against(weights, device)
        if reason is not None:
            raise UserError(f"backend {name!r} cannot be used: {reason}; backend='auto' falls back to 'masked'")
        return backend, None
    backend = _backends.get(_AUTOMATIC.get(device.type, "cpu"))
    reason = backend.reason_against(weights, device)
    return (backend, None) if reason is None else (_backends.get("masked"), reason)
