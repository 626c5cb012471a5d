"""CUDA graphs around a decode step: what the device does for one token, captured once and replayed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.model.caches import cache_in
from dartprune.model.families import describe
from dartprune.refresh import Refresh, Release

WARM = 3  # runs before a capture, in which kernels are compiled and memory is found
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def capture(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture what `work` does on the GPU; gives a replay, and work's result, whose tensors each replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


def check_graphs(device: torch.device, refreshes: dict[str, Refresh]) -> None:
    """ValueError unless every method can run as a graph: on CUDA, with nothing but replays between steps."""
    if device.type != "cuda":
        raise UserError(f"--graphs needs CUDA, the device is {device}: leave it out to measure without graphs")
    for name, refresh in refreshes.items():
        if refresh.dense_tokens or isinstance(refresh, Release):
            raise UserError(f"--graphs cannot run {name}: it returns to dense steps, which another graph would need")


class GraphedForward:
    """Stands in for a model's forward while decoding one token at a time on one static cache.

    Installed before a pruner is attached, it lies inside the pruner's wrappers: the run plans a step before it and
    draws the consequences after it, on the host and between the replays, as ever. The layers' wrappers run while the
    graph is captured only. What they do on the device is part of the graph (index lists, rings and counters keep their
    addresses); what they hand to the host, the last layer's attention output, is computed again from the captured input
    after each replay.
    """

    def __init__(self, model: Any, capture: Capture = capture) -> None:
        self.model = model
        self._forward = model.forward
        self._capture = capture
        self._attention = describe(model).layers[-1].attention_output
        self._cache: Any = None
        self._token: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._output: Any = None
        self._seen: Tensor | None = None
        # transformers, and a pruner's wrapper, look at the parameters of a forward
        self.__signature__ = inspect.signature(self._forward)
        model.forward = self

    def remove(self) -> None:
        """Give the model its forward back, after the pruner was detached."""
        del self.model.forward

    def __call__(self, *, input_ids: Tensor, **options: Any) -> Any:
        """Run a prompt as it is; a single token by the graph, which the first one on a cache captures."""
        if input_ids.shape[1] != 1:
            return self._forward(input_ids=input_ids, **options)
        cache = cache_in(options)
        if cache is not self._cache:
            self._begin(input_ids, cache, options)
        assert self._token is not None and self._replay is not None
        self._token.copy_(input_ids)
        self._replay()
        if self._seen is not None:
            self._attention(self._seen)
        return self._output

    def _begin(self, input_ids: Tensor, cache: Any, options: dict[str, Any]) -> None:
        self._cache, self._token = cache, input_ids.clone()

        def look(module: Any, args: tuple[Tensor, ...]) -> None:
            self._seen = args[0]

        hook = self._attention.register_forward_pre_hook(look)
        try:
            self._replay, self._output = self._capture(lambda: self._forward(input_ids=self._token, **options))
        finally:
            hook.remove()
