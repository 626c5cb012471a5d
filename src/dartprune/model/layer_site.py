"""Reversible wrapping of a model's forwards.

Each wrapper is a bound method of a `Site` that is made once per model and re-installed at every attach: torch.compile
guards on the wrappers, so fresh ones would recompile. A site without hooks is never installed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from dartprune.model.families import Decoder, Layer

Forward = Callable[..., Any]


class LayerHooks(Protocol):
    """What the run does at each place of one decoder layer."""

    def norm(self, y: Tensor) -> None:
        """The residual stream before the FFN's norm."""

    def ffn(self, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
        """The FFN of input x; `original` computes it the model's way."""

    def first(self, x: Tensor, original: Callable[[], Tensor]) -> Tensor:
        """The first projection of an FFN that is no module of its own."""

    def down(self, a: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The down projection of input a."""

    def contribution(self, z: Tensor) -> None:
        """What the FFN adds to the residual stream, before the family's scale."""

    def attention(self, out: Tensor) -> None:
        """The last layer's attention output."""


class Refuses:
    """Holds references into a live model, so it can be neither copied nor pickled."""

    def _refuse(self) -> NoReturn:
        raise RuntimeError("the model is attached to a pruner and cannot be copied or pickled: call run.detach() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse()


class Patch:
    """One method of one object, replaced on the instance and put back."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.had_own = False
        self.own: Any = None
        self.installed = False

    def install(self, replacement: Callable[..., Any]) -> Callable[..., Any] | None:
        """Replace; returns what was there (None if nothing was)."""
        self.had_own = self.name in self.owner.__dict__
        self.own = self.owner.__dict__.get(self.name)
        before: Callable[..., Any] | None = getattr(self.owner, self.name, None)
        setattr(self.owner, self.name, replacement)
        self.installed = True
        return before

    def remove(self) -> None:
        """Put back what was there; nothing happens if it was not installed."""
        if not self.installed:
            return
        if self.had_own:
            setattr(self.owner, self.name, self.own)
        else:
            delattr(self.owner, self.name)
        self.own, self.installed = None, False


class Site(Refuses):
    """The wrapped forwards of one decoder layer."""

    def __init__(self, layer: Layer, last: bool) -> None:
        self.layer = layer
        self.hooks: LayerHooks | None = None
        self._entry: Forward | None = None
        self._down: Forward | None = None
        self._norm: Forward | None = None
        self._contribution: Forward | None = None
        self._attention: Forward | None = None
        self._patches: list[Patch] = []
        inside = layer.entry is layer.contribution or layer.contribution is layer.down
        plan: list[tuple[nn.Module, Forward, str]] = [
            (layer.entry, self.first if layer.inline else self.ffn, "_entry"),
            (layer.down, self.down, "_down"),
        ]
        if layer.norm is not None:
            plan.append((layer.norm, self.norm, "_norm"))
        if not inside:
            plan.append((layer.contribution, self.contribution, "_contribution"))
        if last:
            plan.append((layer.attention_output, self.attention, "_attention"))
        self._plan = plan

    def install(self, hooks: LayerHooks) -> None:
        """Wrap the forwards and send what passes to `hooks`."""
        self.hooks = hooks
        for module, wrapper, name in self._plan:
            patch = Patch(module, "forward")
            self._patches.append(patch)
            setattr(self, name, patch.install(wrapper))

    def remove(self) -> None:
        """Put every forward back."""
        while self._patches:
            self._patches.pop().remove()
        self.hooks = None
        self._entry = self._down = self._norm = self._contribution = self._attention = None

    def norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped norm before the FFN."""
        assert self.hooks is not None and self._norm is not None
        self.hooks.norm(x)
        return self._norm(x, *args, **kwargs)

    def ffn(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped FFN module."""
        assert self.hooks is not None and self._entry is not None
        entry = self._entry
        return self.hooks.ffn(x, lambda: entry(x, *args, **kwargs))

    def first(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped first projection of an FFN without a module."""
        assert self.hooks is not None and self._entry is not None
        entry = self._entry
        return self.hooks.first(x, lambda: entry(x, *args, **kwargs))

    def down(self, a: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped down projection."""
        assert self.hooks is not None and self._down is not None
        down = self._down
        return self.hooks.down(a, lambda masked: down(masked, *args, **kwargs))

    def contribution(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped norm after the FFN, where there is one."""
        assert self.hooks is not None and self._contribution is not None
        out = self._contribution(*args, **kwargs)
        self.hooks.contribution(out)
        return out

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped output projection of the last layer's attention."""
        assert self.hooks is not None and self._attention is not None
        out = self._attention(*args, **kwargs)
        self.hooks.attention(out)
        return out


class Sites:
    """All sites of one model, kept while the model lives."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        last = len(decoder.layers) - 1
        self.layers = [Site(layer, layer.index == last) for layer in decoder.layers]

    def same_as(self, decoder: Decoder) -> bool:
        """Whether a fresh description names the very same modules (an adapter may have replaced some)."""
        return self.decoder == decoder


_lock = threading.Lock()
_sites: weakref.WeakKeyDictionary[nn.Module, Sites] = weakref.WeakKeyDictionary()
_attached: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def claim(model: nn.Module, owner: str) -> None:
    """Mark a model as attached; ValueError if it is already."""
    with _lock:
        if model in _attached:
            raise ValueError(
                f"the model is already attached (by {_attached[model]}): detach that run before attaching {owner}"
            )
        _attached[model] = owner


def release(model: nn.Module) -> None:
    """Mark a model as free again."""
    with _lock:
        _attached.pop(model, None)


def sites_of(model: nn.Module, decoder: Decoder) -> Sites:
    """The sites of a model, the same objects at each attach as long as its modules are the same."""
    with _lock:
        sites = _sites.get(model)
        if sites is None or not sites.same_as(decoder):
            sites = Sites(decoder)
            _sites[model] = sites
        return sites
