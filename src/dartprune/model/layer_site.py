"""Reversible wrapping of a model's forwards.

Each wrapper is a bound method of a `Site` that is made once per model and re-installed at every attach: torch.compile
guards on the wrappers, so fresh ones would recompile. Others may patch the same modules while we are there: what is
theirs is left alone, and a wrapper of ours that they still call passes everything on.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor, nn

from dartprune.model.calls import StandIn
from dartprune.model.families import Decoder, Layer
from dartprune.model.hooks import LayerHooks
from dartprune.model.patch import Forward, Patch, Refuses


class Site(StandIn, Refuses):
    """The wrapped forwards of one decoder layer; without hooks they pass everything on.

    spent: somebody else may still call these wrappers, so they are never installed again.
    """

    def __init__(self, layer: Layer, last: bool) -> None:
        self.layer = layer
        self.hooks: LayerHooks | None = None
        self.spent = False
        self._entry: Forward | None = None
        self._down: Forward | None = None
        self._norm: Forward | None = None
        self._contribution: Forward | None = None
        self._attention: Forward | None = None
        self._patches: list[tuple[Patch, str]] = []
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

    @property
    def in_use(self) -> bool:
        """Whether a run listens."""
        return self.hooks is not None

    def lost(self) -> str | None:
        """The module whose calls do not come here any more, since somebody replaced its forward; None if all do."""
        for patch, name in self._patches:
            if not patch.in_force:
                return f"the forward of layer {self.layer.index}'s {_ROLES[name]} ({type(patch.owner).__name__})"
        return None

    def install(self, hooks: LayerHooks) -> None:
        """Wrap the forwards and send what passes to `hooks`."""
        self.hooks = hooks
        for module, wrapper, name in self._plan:
            patch = Patch(module, "forward")
            self._patches.append((patch, name))
            setattr(self, name, patch.install(wrapper))

    def remove(self) -> list[str]:
        """Put every forward back; returns the modules that somebody else has patched meanwhile, and still does."""
        kept: list[str] = []
        while self._patches:
            patch, name = self._patches.pop()
            if patch.remove():
                setattr(self, name, None)
            else:
                self.spent = True
                kept.append(f"the forward of layer {self.layer.index}'s {_ROLES[name]}")
        self.hooks = None
        return kept

    def norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped norm before the FFN."""
        assert self._norm is not None
        if self.hooks is not None:
            self.hooks.norm(x)
        return self._norm(x, *args, **kwargs)

    def ffn(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped FFN module."""
        entry = self._entry
        assert entry is not None
        if self.hooks is None:
            return entry(x, *args, **kwargs)
        return self.hooks.ffn(x, lambda: entry(x, *args, **kwargs))

    def first(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped first projection of an FFN without a module."""
        entry = self._entry
        assert entry is not None
        if self.hooks is None:
            return entry(x, *args, **kwargs)
        return self.hooks.first(x, lambda: entry(x, *args, **kwargs))

    def down(self, a: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped down projection."""
        down = self._down
        assert down is not None
        if self.hooks is None:
            return down(a, *args, **kwargs)
        return self.hooks.down(a, lambda masked: down(masked, *args, **kwargs))

    def contribution(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped norm after the FFN, where there is one."""
        assert self._contribution is not None
        out = self._contribution(*args, **kwargs)
        if self.hooks is not None:
            self.hooks.contribution(out)
        return out

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped output projection of the last layer's attention."""
        assert self._attention is not None
        out = self._attention(*args, **kwargs)
        if self.hooks is not None:
            self.hooks.attention(out)
        return out


_ROLES = {
    "_entry": "FFN",
    "_down": "down projection",
    "_norm": "norm",
    "_contribution": "norm after the FFN",
    "_attention": "attention output",
}


class Sites:
    """All sites of one model, kept while the model lives."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        last = len(decoder.layers) - 1
        self.layers = [Site(layer, layer.index == last) for layer in decoder.layers]

    def fit(self, decoder: Decoder) -> bool:
        """Whether they can be installed anew: on the very same modules, and no wrapper is left elsewhere."""
        return self.decoder == decoder and not any(site.spent for site in self.layers)


_lock = threading.Lock()
_sites: weakref.WeakKeyDictionary[nn.Module, Sites] = weakref.WeakKeyDictionary()


def sites_of(model: nn.Module, decoder: Decoder) -> Sites:
    """The sites of a model, the same objects at each attach as long as its modules are the same."""
    with _lock:
        sites = _sites.get(model)
        if sites is None or not sites.fit(decoder):
            sites = Sites(decoder)
            _sites[model] = sites
        return sites
