"""Notices what somebody changes in a model while a run is attached to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dartprune.model.calls import bare, between, watched_globally
from dartprune.model.layer import Layer
from dartprune.model.layer_site import Sites
from dartprune.model.model_site import ModelSite


class Changes:
    """Remembers where a model's parts are, and tells what is there no longer."""

    def __init__(self, core: nn.Module, sites: Sites, door: ModelSite, read: Sequence[bool]) -> None:
        """Remember everything as it is now, weights laid out and nothing patched yet.

        Args:
            core: the model.
            sites: of its layers.
            door: of the model itself.
            read: whether the weights of each layer are read by rows, past its modules.
        """
        self._sites = sites
        self._door = door
        layers = sites.decoder.layers
        rows = [layer for layer, is_read in zip(layers, read, strict=True) if is_read]
        self._links = [*_links(core, layers)]
        self._weights = [*_weights(rows)]
        self._version = self._versions()
        shells = _shells(core)
        self._skipped = [
            (f"layer {layer.index}'s {role}", module)
            for layer in rows
            for role, part in layer.skipped().items()
            if isinstance(part, nn.Module)
            for module in (part, *shells.get(part, ()))
        ]

    def found(self) -> str | None:
        """The first change that makes the run's masks those of another model, as a sentence; None if there is none."""
        for holder, name, part, label in self._links:
            if holder.get(name) is not part:
                return f"{label} was replaced"
        for holder, name, weight, address, label in self._weights:
            if holder.get(name) is not weight or weight.data_ptr() != address:
                return f"{label} has other weights"
        for lost in (self._door.lost(), *(site.lost() for site in self._sites.layers)):
            if lost is not None:
                return f"{lost} was replaced"
        return None

    def written(self) -> bool:
        """Whether weights of any FFN were written to, or replaced, since the last call."""
        before, self._version = self._version, self._versions()
        return self._version != before

    def heard(self) -> str | None:
        """What a layer that is read by rows calls beside its weights by now, as a sentence; None: nothing."""
        if self._skipped and watched_globally():
            return "forward hooks for all modules were added"
        for label, module in self._skipped:
            if between(module) is not None:
                return f"{label} was given hooks or another forward"
        return None

    def _versions(self) -> list[tuple[int, int]]:
        return [
            (id(weight), 0 if weight.is_inference() else weight._version)
            for layer in self._sites.decoder.layers
            for module in layer.projections.values()
            for weight in module.parameters()
        ]


Link = tuple[Mapping[str, Any], str, Any, str]


def _links(core: nn.Module, layers: Sequence[Layer]) -> Iterator[Link]:
    """By which names the parts that a run relies on are reached from the model."""
    parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    names = {module: name for name, module in core.named_modules()}
    for parent in names:
        for name, child in parent._modules.items():
            if child is not None:
                parents.setdefault(child, []).append((parent, name))
    seen: set[nn.Module] = set()

    def up_from(module: nn.Module, label: str) -> Iterator[Link]:
        if module in seen:
            return
        seen.add(module)
        for parent, name in parents.get(module, ()):
            yield parent._modules, name, module, label
            yield from up_from(parent, names[parent])

    for layer in layers:
        where = f"layer {layer.index}'s"
        parts = {"FFN": layer.entry, **layer.skipped(), "norm": layer.norm, "norm after the FFN": layer.contribution}
        if layer is layers[-1]:
            parts["attention output"] = layer.attention_output
        for role, part in parts.items():
            if isinstance(part, nn.Module):
                yield from up_from(part, f"{where} {role}")
            elif part is not None:
                own = vars(layer.entry)
                yield from ((own, name, part, f"{where} {role}") for name, value in own.items() if value is part)


def _weights(layers: Sequence[Layer]) -> Iterator[tuple[Mapping[str, Any], str, Tensor, int, str]]:
    for layer in layers:
        for role, module in layer.projections.items():
            for name, weight in module._parameters.items():
                if weight is not None:
                    yield module._parameters, name, weight, weight.data_ptr(), f"layer {layer.index}'s {role}"


def _shells(core: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The shells of torch.compile around modules, whose hooks are called too."""
    out: dict[nn.Module, list[nn.Module]] = {}
    for module in core.modules():
        inner = bare(module)
        if inner is not module:
            out.setdefault(inner, []).append(module)
    return out
