"""Which models are attached, and by whom: one run at a time for each."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

from dartprune.errors import UserError

_lock = threading.Lock()
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
