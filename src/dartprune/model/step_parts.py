"""Linear layers and norms of a decode step by kernels: few tokens here, more of them as before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartprune.model.calls import GLOBAL_HOOKS, StandIn
from dartprune.model.patch import Patch, Refuses

FEW = 4  # tokens of one call that the row kernel serves; torch's products are as quick for more
SMALL = 1 << 17  # weight bytes under which a second thread costs more than it saves
HALVES = (torch.bfloat16, torch.float16)


@dataclass
class StepMode:
    """How the steps of a run are computed. invariant: a token has the same bits alone and in a batch."""

    invariant: bool = False

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels compute these tokens [..., H]: few of them, or one a line where bits must stay."""
        if x.dtype not in HALVES or not x.is_cpu or not x.numel() or not plain_mode():
            return False
        return x.numel() <= FEW * x.shape[-1] or (self.invariant and x.dim() == 3 and x.shape[1] == 1)


class Views:
    """Tensors of a module as the kernels take them, made again where one is another or lies elsewhere than before."""

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._arrays: tuple[Any, ...] = ()

    def of(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, ...]:
        """Arrays of these tensors, in words or bytes; empty ones in words of `dtype` in the place of None."""
        key = [dtype, *(None if tensor is None else (tensor.data_ptr(), tensor.shape) for tensor in tensors)]
        if key != self._key:
            from dartprune.ffn.cpu.arrays import words

            nothing = torch.empty(0, dtype=dtype, device="cpu")
            given = (nothing if tensor is None else tensor for tensor in tensors)
            self._arrays = tuple(t.numpy() if t.dtype is torch.uint8 else words("weight", t) for t in given)
            self._key = key
        return self._arrays

    def forget(self) -> None:
        """Hold no memory."""
        self._key, self._arrays = [], ()


class OwnModule(StandIn, Refuses, ABC):
    """Base: the forward of one module while a run is attached, by kernels where they fit and else as before."""

    def __init__(self, module: Any, mode: StepMode) -> None:
        self.module = module
        self.mode = mode
        self.patch: Patch | None = None
        self.views = Views()

    @property
    def in_use(self) -> bool:
        """Whether it stands in for the module's forward now."""
        return self.patch is not None

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives."""

    def before(self, *args: Any, **kwargs: Any) -> Any:
        """What was there before; the class's own where somebody still calls this after it was taken away."""
        if self.patch is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        assert self.patch.original is not None
        return self.patch.original(*args, **kwargs)


def untouched(module: Any) -> bool:
    """Whether nobody but us has to do with a module's forward: then a kernel may compute it with others."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__self__", None)
    ours = forward is None or (isinstance(own, OwnModule) and own.in_use)
    return ours and not (module._forward_hooks or module._forward_pre_hooks or any(GLOBAL_HOOKS))


class OwnLinear(OwnModule):
    """The forward of one linear layer: few inputs by the row kernel, others as before."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output of x [..., K]."""
        weight, bias = self.module.weight, self.module.bias
        if self.in_use and x.dtype == weight.dtype and weight.is_cpu and self.mode.takes(x):
            if weight.is_contiguous():
                return _linear(x, weight, bias)
            # a down projection whose rows belong to neurons
            if self.mode.invariant and weight.t().is_contiguous():
                return _linear_by_inputs(x, weight, bias)
        out: Tensor = self.before(x)
        return out


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


def _linear_by_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import floats, words
    from dartprune.ffn.cpu.threads import use_threads

    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], weight.shape[0], dtype=torch.float32, device="cpu")
    rows = words("weight", weight.t())
    kernels.linear_by_inputs(flat.float().numpy(), rows, floats(bias), use_threads(), out.numpy())
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


class OwnNorm(OwnModule):
    """The forward of one RMS norm: few tokens by a kernel, others as before."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm of x [..., H]."""
        weight = self.module.weight
        if self.in_use and weight.dtype == hidden_states.dtype and self.mode.takes(hidden_states):
            return _normed(hidden_states, self.views.of((weight,), weight.dtype)[0], self.module.variance_epsilon)
        out: Tensor = self.before(hidden_states)
        return out


def _normed(x: Tensor, weight: Any, epsilon: float) -> Tensor:
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import words

    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    given, made = (words("token", part.view(-1, x.shape[-1])) for part in (x.contiguous(), out))
    kernels.norm(given, weight, epsilon, made)
    return out
