"""What share of a dense decode step the FFN takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from dartprune.bench.graphs import capture
from dartprune.bench.stepping import read, steps
from dartprune.bench.timing import seconds_per_call
from dartprune.model.families import describe


class FfnTimer:
    """Times the FFNs inside a model's forwards, from an FFN's input to the end of its down projection.

    By themselves, one after the other, they need not take the time that they take between the layers of a real step.
    """

    def __init__(self, model: Any) -> None:
        self._on_gpu = model.device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._hooks = []
        for layer in describe(model).layers:
            self._hooks.append(layer.entry.register_forward_pre_hook(self._enter))
            self._hooks.append(layer.down.register_forward_hook(self._leave))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, *_: Any) -> None:
        self._began = self._now()

    def _leave(self, *_: Any) -> None:
        self._spans.append((self._began, self._now()))

    def remove(self) -> float:
        """Take the hooks off the model; gives the seconds of all FFNs that ran."""
        for hook in self._hooks:
            hook.remove()
        if not self._on_gpu:
            return float(sum(end - began for began, end in self._spans))
        torch.cuda.synchronize()
        return float(sum(began.elapsed_time(end) for began, end in self._spans)) / 1e3


def ffn_share(model: Any, tokens: Tensor, count: int) -> float:
    """Share of the time of `count` dense decode steps after these prompts [B, T] that the FFNs take, in [0, 1]."""
    output = steps(model, read(model, tokens, None), 1, None)
    ffns = FfnTimer(model)
    began = timer()
    try:
        steps(model, output, count, None)
        whole = timer() - began
    finally:
        spent = ffns.remove()
    return spent / whole


def ffn_alone(model: Any, batch: int) -> Callable[[], float]:
    """Seconds of all FFNs for one token of each sequence, as a CUDA graph (in which no hook runs)."""
    layers = describe(model).layers
    draw = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(batch, 1, layers[0].hidden, generator=draw, dtype=torch.float32).to(model.device, model.dtype)

    def work() -> None:
        for layer in layers:
            layer.down(layer.activations(x))

    replay, _ = capture(work)
    return lambda: seconds_per_call(replay, model.device)
