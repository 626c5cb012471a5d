"""What stands between a caller and a module's own computation: hooks, forwards replaced on the instance, shells.

Reading the rows of a projection leaves all of it out, so such layers are masked. Calls that a run makes for itself go
past observers: a probe must not count what the model never did.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch

# Hooks from here are part of what a module computes: they move, gather or rebuild its weights.
_PARTS = ("torch.distributed", "torch.nn.utils", "transformers", "accelerate", "peft")
_KINDS = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = (_torch._global_forward_hooks, _torch._global_forward_pre_hooks)


class StandIn:
    """Owner of bound methods that stand in for modules' forwards."""


def bare(part: Any) -> Any:
    """A module without the shells that torch.compile puts around it."""
    while isinstance(part, nn.Module) and isinstance(part._modules.get("_orig_mod"), nn.Module):
        part = part._modules["_orig_mod"]
    return part


def is_ours(function: Any) -> bool:
    """Whether a function stands in for a forward on behalf of a run."""
    return isinstance(function, types.MethodType) and isinstance(function.__self__, StandIn)


def between(part: Any) -> str | None:
    """What reading a module's weights would leave out, as the end of a sentence; None where there is nothing."""
    if not isinstance(part, nn.Module):
        return None
    if part._forward_hooks or part._forward_pre_hooks:
        return "has forward hooks, which reading its rows would leave out"
    if replaced(part):
        return "has a forward of its own on the instance, which reading its rows would leave out"
    return None


def replaced(module: nn.Module) -> bool:
    """Whether somebody else has put another forward on this instance; moving inputs between devices does not count."""
    forward = module.__dict__.get("forward")
    if forward is None or is_ours(forward):
        return False
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return forward.__func__ is not type(module).forward
    hook = type(getattr(module, "_hf_hook", None))
    return (hook.__module__, hook.__qualname__) != ("accelerate.hooks", "AlignDevicesHook")


def watched_globally() -> bool:
    """Whether hooks are in force that torch calls for every module of the process."""
    return any(GLOBAL_HOOKS)


def quietly(function: Any, x: Tensor) -> Any:
    """A module's or a plain function's result, without telling observers."""
    if not isinstance(function, nn.Module) or torch.compiler.is_compiling():
        return function(x)
    with unobserved(function.modules()):
        return function(x)


@contextmanager
def unobserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No hook of the user's on these modules is called inside; those of libraries that hold the weights are."""
    taken: list[tuple[nn.Module, str, Any]] = []
    for module in modules:
        for kind in _KINDS:
            hooks = module.__dict__[kind]
            if hooks and not all(map(_is_part, hooks.values())):
                taken.append((module, kind, hooks))
                module.__dict__[kind] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_part(hook))
    everywhere = [(hooks, dict(hooks)) for hooks in GLOBAL_HOOKS if hooks]
    for hooks, _ in everywhere:
        hooks.clear()
    try:
        yield
    finally:
        for module, kind, hooks in taken:
            module.__dict__[kind] = hooks
        for hooks, before in everywhere:
            hooks.update(before)


def _is_part(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return str(home).startswith(_PARTS)
