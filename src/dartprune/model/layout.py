"""Keeps the projections of a model row by row per neuron while a run needs it, without a second copy."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.ffn.quantised import QuantisedRows
from dartprune.model.layer import Layer
from dartprune.model.weights import row_weights

_ALONE = 2  # references to a storage that one tensor holds: the tensor's, and that of the handle we look through


def scattered(layer: Layer) -> list[nn.Module]:
    """The projections whose rows per neuron are no contiguous memory as they are (down, or GPT-2's c_fc)."""
    weights = row_weights(layer)
    if isinstance(weights, (str, QuantisedRows)):
        return []
    parts = [(layer.up, weights.up), (layer.down, weights.down)]
    if layer.gate is not None and weights.gate is not None:
        parts.append((layer.gate, weights.gate))
    return [module for module, rows in parts if not rows.is_contiguous()]


@dataclass
class Owners:
    """Who reads each storage of a model's parameters, by the storage's address.

    inside: how many modules of the model.  outside: what another parameter or process does with it.
    alone: storages that were allocated for one parameter and that nobody else holds.
    """

    inside: Counter[int] = field(default_factory=Counter)
    outside: dict[int, str] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)


def storage_owners(core: nn.Module) -> Owners:
    """Who shares the memory of a model's parameters: its own modules, other parameters, other processes."""
    owners = Owners()
    held: set[int] = set()
    own: set[int] = set()
    for module in core.modules():
        for parameter in module.parameters(recurse=False):
            own.add(id(parameter))
            if parameter.is_meta:
                continue
            storage = parameter.untyped_storage()
            address = storage.data_ptr()
            owners.inside[address] += 1
            if parameter.device.type == "cpu" and storage.is_shared():
                owners.outside[address] = "lies in memory that it shares with other processes"
            elif torch._C._storage_Use_Count(storage._cdata) > _ALONE:
                held.add(address)
            elif storage.resizable() and storage.nbytes() == parameter.numel() * parameter.element_size():
                owners.alone.add(address)
    # state dicts and graphs of gradients hold weights too, but only another parameter computes with them
    if held:
        for other in gc.get_objects():
            if type(other) is nn.Parameter and id(other) not in own and not other.is_meta:
                place = _address(other)
                if place in held:
                    owners.outside[place] = "shares its memory with a parameter of another model"
    return owners


def _address(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def shared_weights(owners: Owners, modules: Sequence[nn.Module]) -> str | None:
    """Why these modules' weights cannot be laid out anew: somebody else reads the same memory; None if nobody does."""
    for module in modules:
        weight: Tensor = module.weight  # type: ignore[assignment]
        address = weight.untyped_storage().data_ptr()
        if address in owners.outside:
            return f"a weight of the FFN {owners.outside[address]}, so it cannot be laid out by rows"
        if owners.inside[address] > 1:
            return "the FFN shares its weights with another module, so they cannot be laid out by rows"
    return None


@dataclass
class _Laid:
    """A weight that was laid out: where it lay, and the tensor there if it was not laid out in its own memory."""

    weight: Tensor
    strides: tuple[int, ...]
    address: int
    before: Tensor | None
    hook: Any


class RowLayout:
    """Stores weights transposed and shows them as they were: same Parameter objects, shapes and values.

    No memory beyond one weight at a time, where the memory is the weight's alone; memory that is mapped from a file or
    held by others too is left as it is, and comes back with `undo`. A state dict shows contiguous copies meanwhile,
    since file formats ask for these.
    """

    def __init__(self) -> None:
        self._done: list[_Laid] = []

    def apply(self, modules: Sequence[nn.Module], owners: Owners | None = None) -> None:
        """Lay out the weights of these modules; those that `owners` knows to be alone in their own memory."""
        alone = set() if owners is None else owners.alone
        for module in modules:
            weight: Tensor = module.weight  # type: ignore[assignment]
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                strides, before = weight.stride(), weight.data
                rows = before.t().contiguous()
                in_place = before.untyped_storage().data_ptr() in alone
                if in_place:
                    rows = before.as_strided(rows.shape, rows.stride()).copy_(rows)
                weight.data = rows.t()
            hook = module.register_state_dict_post_hook(_contiguous)
            self._done.append(_Laid(weight, strides, weight.data_ptr(), None if in_place else before, hook))

    def undo(self) -> None:
        """Put every weight back; a second call does nothing."""
        while self._done:
            laid = self._done.pop()
            laid.hook.remove()
            weight = laid.weight
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                if weight.data_ptr() != laid.address:  # moved, or other weights were put there
                    weight.data = weight.data.contiguous()
                elif laid.before is None:
                    plain = weight.data.contiguous()
                    weight.data = weight.data.as_strided(weight.shape, laid.strides).copy_(plain)
                else:
                    if not torch.equal(laid.before, weight.data):  # written to meanwhile
                        laid.before.copy_(weight.data)
                    weight.data = laid.before


def _contiguous(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of a laid out module: its weight in a state dict lies as if nothing had happened."""
    value = state.get(f"{prefix}weight")
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # `keep_vars` asks for the parameter itself
        state[f"{prefix}weight"] = value.contiguous()
