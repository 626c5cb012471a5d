"""Reversible wrapping of a model's forwards.

Each wrapper is a bound method of a `Site` that is made once per model and re-installed at every attach: torch.compile
guards on the wrappers, so fresh ones would recompile. Others may patch the same modules while we are there: what is
theirs is left alone, and a wrapper of ours that they still call passes everything on.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.model.calls import StandIn
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
    """Holds references into a live model, so it can be neither copied nor pickled while it does."""

    @property
    def in_use(self) -> bool:
        """Whether it is at work."""
        return True

    def _refuse(self) -> NoReturn:
        raise RuntimeError("the model is attached to a pruner and cannot be copied or pickled: call run.detach() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.in_use:
            self._refuse()
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.in_use:
            self._refuse()
        return super().__reduce_ex__(protocol)


class Patch:
    """One method of one object, replaced on the instance and put back.

    original: what the replacement passes on to.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.original: Callable[..., Any] | None = None
        self._had_own = False
        self._own: Any = None
        self._replacement: Any = None

    @property
    def outermost(self) -> bool:
        """Whether the replacement is what stands there now."""
        return bool(self.owner.__dict__.get(self.name) == self._replacement)

    @property
    def in_force(self) -> bool:
        """Whether a call still reaches the replacement, by itself or through what was put around it."""
        return self.outermost or any(part == self._replacement for part in _behind(self.owner, self.name))

    def install(self, replacement: Callable[..., Any]) -> Callable[..., Any] | None:
        """Replace; returns what was there (None if nothing was)."""
        self._had_own = self.name in self.owner.__dict__
        self._own = self.owner.__dict__.get(self.name)
        self.original = getattr(self.owner, self.name, None)
        setattr(self.owner, self.name, replacement)
        self._replacement = replacement
        return self.original

    def remove(self) -> bool:
        """Put back what was there; False where others have put something around it or in its place, which stays."""
        if self.outermost:
            if self._had_own:
                setattr(self.owner, self.name, self._own)
            else:
                delattr(self.owner, self.name)
            return True
        # what others keep on the owner, to be put back by them later, must not be our replacement
        for key, value in list(self.owner.__dict__.items()):
            if isinstance(value, Callable) and value == self._replacement:  # type: ignore[arg-type]
                self.owner.__dict__[key] = self.original
        return False


def _behind(owner: Any, name: str) -> Iterator[Any]:
    """The functions that a method of an object is made of: what it wraps, binds or encloses."""
    todo, seen = [getattr(owner, name, None)], set[int]()
    if hasattr(owner, "_hf_hook"):
        todo.append(owner.__dict__.get("_old_forward"))  # where accelerate keeps what its hook calls
    while todo and len(seen) < 200:
        part = todo.pop()
        if not callable(part) or isinstance(part, (nn.Module, type)) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        todo.append(getattr(part, "_torchdynamo_orig_callable", None))
        if isinstance(part, functools.partial):
            todo += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, types.MethodType):
            todo.append(part.__func__)
        elif isinstance(part, types.FunctionType):
            for cell in part.__closure__ or ():
                with suppress(ValueError):  # an empty one
                    todo.append(cell.cell_contents)


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
_attached: weakref.WeakKeyDictionary[nn.Module, tuple[str, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def claim(model: nn.Module, owner: str, run: Any) -> None:
    """Mark a model as attached by a run; ValueError if it is already."""
    with _lock:
        if model in _attached:
            raise UserError(
                f"the model is already attached (by {_attached[model][0]}): call dartprune.detach(model), "
                f"or detach() of that run, before attaching {owner}"
            )
        _attached[model] = owner, weakref.ref(run)


def claimed(model: nn.Module) -> Any:
    """The run that a model is attached to, None if it is free."""
    with _lock:
        held = _attached.get(model)
    return None if held is None else held[1]()


def release(model: nn.Module) -> None:
    """Mark a model as free again."""
    with _lock:
        _attached.pop(model, None)


def sites_of(model: nn.Module, decoder: Decoder) -> Sites:
    """The sites of a model, the same objects at each attach as long as its modules are the same."""
    with _lock:
        sites = _sites.get(model)
        if sites is None or not sites.fit(decoder):
            sites = Sites(decoder)
            _sites[model] = sites
        return sites
