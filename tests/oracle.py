"""What tests compare against: masks applied by hand on the plain model, and the state of a model before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.model.families import describe


@contextmanager
def masked_by_hand(model: nn.Module, masks: list[Tensor]) -> Iterator[None]:
    """Zero the input of each down projection with masks bool [B, I] of each layer, by plain torch hooks."""
    handles = []
    for layer, mask in zip(describe(model).layers, masks, strict=True):

        def zero(module: nn.Module, args: Any, mask: Tensor = mask) -> Any:
            a = args[0]
            lines = a.reshape(mask.shape[0], -1, a.shape[-1])
            return (torch.where(mask[:, None], lines, torch.zeros_like(lines)).reshape(a.shape), *args[1:])

        handles.append(layer.down.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masks_of(run: Any, slots: tuple[int, ...]) -> list[Tensor]:
    """The masks in force, bool [B, I] for each layer."""
    out = []
    for number, layer in enumerate(describe(run._core).layers):
        rows = torch.ones(len(slots), layer.neurons, dtype=torch.bool)
        for line, slot in enumerate(slots):
            kept = run.selection(slot)[number]
            if kept is not None:
                rows[line] = False
                rows[line, kept.long()] = True
        out.append(rows)
    return out


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a detached model must give back: weights bit by bit, and the attributes of every module."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "strides": {name: value.stride() for name, value in model.state_dict().items()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is what it was when `before` was taken."""
    now = snapshot(model)
    assert now["attributes"] == before["attributes"]
    assert now["strides"] == before["strides"]
    assert list(now["weights"]) == list(before["weights"])
    for name, value in before["weights"].items():
        assert torch.equal(now["weights"][name], value), name
