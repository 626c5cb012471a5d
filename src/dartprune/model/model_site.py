"""The wrapped doors of a whole model: forward, generate, and what transformers calls between decoding steps."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from dartprune.errors import UserError
from dartprune.model.apart import apart
from dartprune.model.candidates import joined, split_inputs
from dartprune.model.hooks import ModelHooks
from dartprune.model.patch import Forward, Patch, Refuses

# what transformers' own adapter interface changes the model with
_ADAPTERS = ("load_adapter", "add_adapter", "set_adapter")
NO_ADAPTER = "adapters cannot be changed while the model is attached: call run.detach() first"
NO_BATCHING = "continuous batching cannot be pruned: call run.detach() first, or generate() with a batch of texts"
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _not_compiled(method: Forward) -> Forward:
    """Keep torch.compile out of a method, but not out of what it calls."""
    disabled: Forward = torch.compiler.disable(method, recursive=False)
    return disabled


class _Recorded(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria that tell the run which lines have ended."""

    hooks: ModelHooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = super().__call__(*args, **kwargs)
        self.hooks.stopped(done)
        return done


class ModelSite(Refuses):
    """The wrapped methods of one model; made once per model, installed at each attach.

    Without hooks they pass everything on.  spent: somebody else may still call them, so they are not installed again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.hooks: ModelHooks | None = None
        self.spent = False
        self._original: dict[str, Callable[..., Any] | None] = {}
        self._patches: dict[str, Patch] = {}
        # what happens around a forward is no part of any graph; inside, torch.compile goes on
        self._forward = _with_signature(self._make_forward(), model.forward)
        decoder = _headless(model)
        self._decoder = _with_signature(self._make_decoder(), None if decoder is None else decoder.forward)
        self._generate = _with_signature(self._make_generate(), getattr(model, "generate", None))
        self._prepare = _with_signature(self._make_prepare(), getattr(model, "prepare_inputs_for_generation", None))

    def install(self, hooks: ModelHooks) -> None:
        """Wrap the model's methods and report to `hooks`."""
        model = self.model()
        assert model is not None
        if _is_paged(getattr(model.config, "_attn_implementation", None)):
            raise UserError("the model is in the hands of continuous batching: stop its manager before attaching")
        self.hooks = hooks
        _model_sites[model] = weakref.ref(self)
        wrappers: dict[str, Callable[..., Any]] = {
            "forward": self._forward,
            "generate": self._generate,
            "prepare_inputs_for_generation": self._prepare,
            "_get_stopping_criteria": self._stopping_criteria,
            **{name: self._refused(name, RuntimeError(NO_ADAPTER)) for name in _ADAPTERS},
            **{name: self._refused(name, ValueError(NO_BATCHING)) for name in _BATCHING},
            "set_attn_implementation": self._set_attention,
            "_get_logits_processor": self._logits_processor,
        }
        for name, wrapper in wrappers.items():
            if hasattr(model, name):
                self._replace(model, name, wrapper, name)
        decoder = _headless(model)
        if decoder is not None:
            self._replace(decoder, "forward", self._decoder, "decoder")

    def _replace(self, owner: Any, name: str, wrapper: Callable[..., Any], known_as: str) -> None:
        self._patches[known_as] = patch = Patch(owner, name)
        self._original[known_as] = patch.install(wrapper)

    @property
    def in_use(self) -> bool:
        """Whether a run listens."""
        return self.hooks is not None

    @property
    def outermost(self) -> bool:
        """Whether nobody has put anything around the forwards of the model and of its decoder."""
        return all(patch.outermost for name, patch in self._patches.items() if name in ("forward", "decoder"))

    def lost(self) -> str | None:
        """The method whose calls do not come here any more, since somebody replaced it; None if all do.

        Soft prompts put a preparation of their own in place; its forwards are known by their caches all the same.
        """
        for name, patch in self._patches.items():
            if name != "prepare_inputs_for_generation" and not patch.in_force:
                return f"the model's {name}"
        return None

    def remove(self) -> list[str]:
        """Put every method back; returns those that somebody else has patched meanwhile, and still does."""
        kept: list[str] = []
        while self._patches:
            name, patch = self._patches.popitem()
            if patch.remove():
                self._original.pop(name, None)
            else:
                self.spent = True
                kept.append(f"the model's {name}")
        self.hooks = None
        model = self.model()
        if model is not None:
            _model_sites[model] = self
        return kept

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        original = self._original.get(name) or self._restored(name)
        return original(*args, **kwargs)

    def _restored(self, name: str) -> Callable[..., Any]:
        """The model's own method, for who kept our wrapper: a bound method, or a shallow copy of the model."""
        model = self.model()
        if model is None:
            raise RuntimeError("this method belongs to a model that is gone: it was taken while a pruner was attached")
        if name == "decoder":
            model, name = _headless(model), "forward"
        found: Callable[..., Any] = getattr(model, name)
        return found

    def _make_forward(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hooks, original = self.hooks, self._original.get("forward")
            if original is None:
                return self._restored("forward")(*args, **kwargs)
            if hooks is None or (torch.compiler.is_compiling() and hooks.armed):
                # generate() compiles the call itself: what follows the forward is done before the next one
                return original(*args, **kwargs)
            return self._around_forward(args, kwargs)

        return forward

    @_not_compiled
    def _around_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks, original = self.hooks, self._original["forward"]
        assert hooks is not None and original is not None
        with hooks.lock:
            if not hooks.armed:
                with apart():
                    hooks.begin(_named(self._forward, args, kwargs))
            hooks.inside = threading.get_ident()
            try:
                if hooks.split:
                    return self._in_two(hooks, original, kwargs)
                output = original(*args, **kwargs)
                with apart():
                    hooks.finish(output)
            except BaseException:
                hooks.abort()
                raise
            finally:
                hooks.inside = None
            return output

    def _make_decoder(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hooks, original = self.hooks, self._original.get("decoder")
            if original is None:
                return self._restored("decoder")(*args, **kwargs)
            if hooks is None or torch.compiler.is_compiling() or hooks.inside or hooks.armed:
                return original(*args, **kwargs)
            return self._around_decoder(original, args, kwargs)

        return forward

    def _around_decoder(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder called without its head: text is read, or a token is decoded, as the phase says."""
        hooks = self.hooks
        assert hooks is not None
        call = _named(self._decoder, args, kwargs)
        with hooks.lock:
            if not hooks.concerns(call):
                return original(*args, **kwargs)
            with apart():
                hooks.begin(call)
            try:
                output = original(*args, **kwargs)
                with apart():
                    hooks.finish(output)
            except BaseException:
                hooks.abort()
                raise
            return output

    def _in_two(self, hooks: ModelHooks, original: Forward, kwargs: dict[str, Any]) -> Any:
        """Run the prompt, then the candidates behind it, and hand over one output."""
        head, tail = split_inputs(kwargs, hooks.split)
        hooks.split = 0
        first = original(**head)
        with apart():
            hooks.finish(first)
            hooks.candidates(tail)
        second = original(**tail)
        with apart():
            hooks.finish(second)
        return joined(first, second)

    def _make_generate(self) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            hooks = self.hooks
            if hooks is None:
                return self._call("generate", *args, **kwargs)
            given = next((kwargs[key] for key in ("input_ids", "inputs") if kwargs.get(key) is not None), None)
            if given is None and args:
                given = args[0]
            with hooks.lock:
                with apart():
                    hooks.generating(given if isinstance(given, Tensor) else None)
                try:
                    return self._call("generate", *args, **kwargs)
                finally:
                    with apart():
                        hooks.generated()

        return generate

    def _make_prepare(self) -> Callable[..., Any]:
        def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
            inputs = self._call("prepare_inputs_for_generation", *args, **kwargs)
            if self.hooks is not None:
                with apart():
                    self.hooks.prepared(inputs, kwargs)
            return inputs

        return prepare_inputs_for_generation

    def _stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = self._call("_get_stopping_criteria", *args, **kwargs)
        if self.hooks is None:
            return criteria
        recorded = _Recorded(criteria)
        recorded.hooks = self.hooks
        return recorded

    def _set_attention(self, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        """A manager of continuous batching made by hand may ask for paged attention: refused right there."""
        if self.hooks is not None and _is_paged(implementation):
            raise ValueError(NO_BATCHING)
        return self._call("set_attn_implementation", implementation, *args, **kwargs)

    def _logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Such a manager asks for this while it is made, and gives no prompt's length, as `generate()` does."""
        if self.hooks is not None and len(args) + len(kwargs) == 1:
            raise ValueError(NO_BATCHING)
        return self._call("_get_logits_processor", *args, **kwargs)

    def _refused(self, name: str, error: Exception) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if self.hooks is None:
                return self._call(name, *args, **kwargs)
            raise error

        return refuse


def _is_paged(implementation: Any) -> bool:
    """Whether an attention implementation, or one of a dictionary of them, is for continuous batching."""
    names = implementation.values() if isinstance(implementation, dict) else [implementation]
    return any(str(name).startswith("paged|") for name in names)


def _headless(model: Any) -> nn.Module | None:
    """The decoder inside a model with a head; None where there is none, or it was compiled on its own."""
    decoder = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    inside = isinstance(decoder, nn.Module) and decoder is not model and not hasattr(decoder, "_orig_mod")
    return decoder if inside else None


def _named(wrapper: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    return {**inspect.signature(wrapper).bind_partial(*args).arguments, **kwargs} if args else kwargs


def _with_signature(wrapper: Callable[..., Any], original: Callable[..., Any] | None) -> Callable[..., Any]:
    # transformers looks at the parameters of forward and of prepare_inputs_for_generation
    if original is not None:
        wrapper.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return wrapper


# While installed a site refers to its model through the run; the model's own methods then keep it alive.
_model_sites: weakref.WeakKeyDictionary[nn.Module, ModelSite | weakref.ref[ModelSite]] = weakref.WeakKeyDictionary()


def model_site(model: nn.Module) -> ModelSite:
    """The site of a model, the same object at each attach."""
    held = _model_sites.get(model)
    site = held() if isinstance(held, weakref.ref) else held
    if site is None or site.spent:
        site = ModelSite(model)
        _model_sites[model] = site
    return site
