"""Caches that tell what is done to their lines and tokens: what belongs to a sequence follows it."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import GenerationMixin

# what forwards call their cache: from transformers 5.24 on, and before
_NAMES = ("cache", "past_key_values")
_NAME = _NAMES["cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]
_LISTENER = "_dartprune_listener"


class CacheListener(Protocol):
    """What hears of one cache; each method is called after the cache has done it."""

    def reordered(self, order: Tensor) -> None:
        """Line b now goes on as line order[b] was."""

    def selected(self, lines: list[int]) -> None:
        """These of the former lines are left, in this order; one may come more than once."""

    def repeated(self, times: int) -> None:
        """Every line stands there so many times, one after the other."""

    def cropped(self, tokens: int) -> None:
        """The last tokens of every line were taken back."""

    def copied(self, copy: Any) -> None:
        """A deep copy was made; nobody listens to it yet."""


def handed(cache: Any) -> dict[str, Any]:
    """A cache as the argument of a forward, by the name that the installed transformers has for it."""
    return {_NAME: cache}


def cache_in(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, under its old name too; None if there is none."""
    return next((call[name] for name in _NAMES if call.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in what a forward gave, a tuple with a loss in front included; None if there is none."""
    cache = getattr(output, _NAME, None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return cache


def is_static(cache: Any) -> bool:
    """Whether a cache has its full size from the beginning, and keeps its length on the device."""
    return bool(getattr(cache, "is_compileable", False)) and type(cache).__name__ != "DynamicCache"


def follow(cache: Any, listener: CacheListener) -> None:
    """Tell `listener` of everything that moves the cache's lines or tokens, until `unfollow`.

    The cache's class is replaced by one of the same name that is derived from it; a cache of slots, or of another kind
    than transformers', is left as it is and tells nothing.
    """
    base = type(cache)
    if isinstance(cache, _Followed) or not hasattr(cache, "__dict__") or not hasattr(cache, "get_seq_length"):
        return
    cache.__dict__[_LISTENER] = listener
    cache.__class__ = _followed(base)  # type: ignore[arg-type]


def unfollow(cache: Any) -> None:
    """Give the cache its own class back; nothing happens where it is not followed."""
    if isinstance(cache, _Followed):
        cache.__dict__.pop(_LISTENER, None)
        cache.__class__ = cache.own_class


class _Followed:
    """Laid over the class of a cache while it is followed."""

    own_class: ClassVar[type[Any]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.own_class.reorder_cache(self, beam_idx)
        self._tell().reordered(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.own_class.batch_select_indices(self, indices)
        lines = indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices
        self._tell().selected([int(line) for line in lines])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.own_class.batch_repeat_interleave(self, repeats)
        self._tell().repeated(repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = int(self.own_class.get_seq_length(self))
        self.own_class.crop(self, *args, **kwargs)
        self._tell().cropped(max(0, before - int(self.own_class.get_seq_length(self))))

    def _tell(self) -> CacheListener:
        listener: CacheListener = self.__dict__[_LISTENER]
        return listener

    def _own_state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _LISTENER}

    def __copy__(self) -> Any:
        made: Any = object.__new__(self.own_class)
        made.__dict__.update(self._own_state())
        self._tell().copied(made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Any = object.__new__(self.own_class)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self._own_state(), memo))
        self._tell().copied(made)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # saved, it is a cache like any other, and can be read where this package is not
        return copyreg._reconstructor, (self.own_class, object, None), self._own_state()  # type: ignore[attr-defined]


@functools.cache
def _followed(base: type[Any]) -> type[Any]:
    """The class laid over `base`, made once, so that torch.compile meets the same one again."""

    class Followed(_Followed, base):  # type: ignore[misc]
        own_class = base

    Followed.__name__, Followed.__qualname__, Followed.__module__ = base.__name__, base.__qualname__, base.__module__
    return Followed
