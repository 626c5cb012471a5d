"""Linear layers and norms of a decode step by kernels: few tokens here, more of them as before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dartprune.model.calls import StandIn
from dartprune.model.layer_site import Patch, Refuses

FEW = 4  # tokens of one call that the row kernel serves; torch's products are as quick for more
SMALL = 1 << 17  # weight bytes under which a second thread costs more than it saves
HALVES = (torch.bfloat16, torch.float16)


class OwnLinear(StandIn, Refuses):
    """The forward of one linear layer: few inputs by the row kernel, others as before."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.patch: Patch | None = None

    @property
    def in_use(self) -> bool:
        """Whether it stands in for the module's forward now."""
        return self.patch is not None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output of x [..., K]."""
        patch = self.patch
        if patch is None:
            return type(self.module).forward(self.module, x)
        assert patch.original is not None
        weight, bias = self.module.weight, self.module.bias
        if not _fits(x, weight):
            out: Tensor = patch.original(x)
            return out
        return _linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and weight.is_cpu and weight.is_contiguous() and is_few(x)


def is_few(x: Tensor) -> bool:
    """Whether these are few tokens [..., H] of a 16-bit dtype on the CPU, with nothing to be recorded."""
    return x.dtype in HALVES and x.is_cpu and 0 < x.numel() <= FEW * x.shape[-1] and plain_mode()


def plain_mode() -> bool:
    """Whether no graph is traced, no gradient kept and no other dtype asked for."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import floats, words
    from dartprune.ffn.cpu.threads import use_threads

    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=torch.float32, device="cpu")
    given = flat.float().numpy(), words("weight", weight), floats(bias)
    threads = 1 if weight.numel() * 2 < SMALL else use_threads()
    if threads == 1:
        kernels.linear_alone(*given, out.numpy())
    else:
        kernels.linear(*given, threads, out.numpy())
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


class OwnNorm(StandIn, Refuses):
    """The forward of one RMS norm: few tokens by a kernel, others as before."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.patch: Patch | None = None

    @property
    def in_use(self) -> bool:
        """Whether it stands in for the module's forward now."""
        return self.patch is not None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm of x [..., H]."""
        patch, module = self.patch, self.module
        if patch is None:
            before: Tensor = type(module).forward(module, hidden_states)
            return before
        assert patch.original is not None
        weight = module.weight
        if weight.dtype != hidden_states.dtype or not is_few(hidden_states):
            before = patch.original(hidden_states)
            return before
        return _normed(hidden_states, weight, module.variance_epsilon)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import words

    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    kernels.norm(words("input", flat), words("weight", weight), epsilon, words("output", out))
    return out.view(x.shape)
