"""The rest of a decode step on the CPU while a run is attached: linear layers and attention of one token a line.

For one token torch's bf16 and fp16 products of small matrices take several times what reading the weights takes, and
transformers' attention a dozen operators. Both are done here by kernels; whatever does not fit, and every forward of
more tokens, goes on to what was there before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from dartprune.ffn.row_format import RowFormat
from dartprune.model.calls import replaced
from dartprune.model.layer import Layer
from dartprune.model.packed import has_kernels
from dartprune.model.packed_bytes import ByteLinear
from dartprune.model.packed_rows import ALONE, RowProjection, packed_rows
from dartprune.model.patch import Patch
from dartprune.model.step_attention import ForwardInputs, OwnAttention
from dartprune.model.step_ffn import OwnFFN
from dartprune.model.step_forms import form_of
from dartprune.model.step_hooks import FFNChoice, StepHooks
from dartprune.model.step_layers import OwnLayers
from dartprune.model.step_parts import HALVES, OwnLinear, OwnModule, OwnNorm, StepMode

# attention of Llama's kind: q, k, v and o as linear layers, whole heads turned by halves, perhaps a norm for each head
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ATTENTIONS = {f"transformers.models.{key}.modeling_{key}.{name}Attention" for key, name in _FAMILIES.items()}
DECODERS = {f"transformers.models.{key}.modeling_{key}.{name}Model" for key, name in _FAMILIES.items()}
LAYERS = {f"transformers.models.{key}.modeling_{key}.{name}DecoderLayer" for key, name in _FAMILIES.items()}
NORMS = {f"transformers.models.{key}.modeling_{key}.{name}RMSNorm" for key, name in _FAMILIES.items()}
_ACTIVATIONS = {"transformers.activations.SiLUActivation", "torch.nn.modules.activation.SiLU"}


@dataclass(frozen=True)
class StepForm:
    """What is computed of a model beside its linear layers, norms and attention.

    dense: layers whose FFN lies in rows and is looked into by no method.  of_bytes: whether there are layers of bytes.
    whole: decoder layers and their FFNs, where one kernel computes them all.
    """

    dense: tuple[Layer, ...] = ()
    of_bytes: bool = False
    whole: tuple[tuple[nn.Module, Layer], ...] = ()


class OwnStep:
    """Everything of a model that is computed here while a run is attached."""

    def __init__(self, core: nn.Module, modules: list[Any], form: StepForm) -> None:
        """Set up; nothing is changed yet.

        Args:
            core: the model.
            modules: linear layers, norms and attention.
            form: what else is computed here.
        """
        self._given = modules, form
        self.mode = StepMode()
        self.shared = ForwardInputs()
        self._parts: list[OwnModule] = []
        for module in modules:
            if type(module) is nn.Linear:
                self._parts.append(OwnLinear(module, self.mode))
            elif _name(module) in NORMS:
                self._parts.append(OwnNorm(module, self.mode))
            else:
                self._parts.append(OwnAttention(module, self.mode, self.shared))
        self._parts += [OwnFFN(layer, self.mode) for layer in form.dense]
        self._layers: OwnLayers | None = None
        if form.whole:
            layers = [module for module, _ in form.whole]
            together = form_of(layers, [layer for _, layer in form.whole])
            assert together is not None
            self._layers = OwnLayers(core, layers, together, self.mode)
            self._parts += self._layers.parts

    def fits(self, modules: list[Any], form: StepForm) -> bool:
        """Whether it was made for the very same modules."""
        return self._given == (modules, form)

    def said(self, whole: int | None, steps: int) -> str:
        """What is computed here, for the report.

        Args:
            whole: steps whose layers were one call, None where a run has no choices for that.
            steps: all of them.
        """
        if not self._parts:
            return "transformers' own"
        if self._layers is not None and whole is not None and (whole or not steps):
            some = "" if whole == steps else f", in {whole} of {steps} steps"
            return f"{len(self._layers.parts)} layers in one call of a kernel{some}"
        kinds = (OwnAttention, "attention layers"), (OwnLinear, "linear layers"), (OwnFFN, "dense FFNs")
        counted = [(sum(isinstance(part, kind) for part in self._parts), name) for kind, name in kinds]
        return f"{' and '.join(f'{count} {name}' for count, name in counted if count)} by kernels"

    def prepare(self, choice: FFNChoice | None) -> None:
        """Compile the kernels, so that no token waits for it; `choice`: one as they will come, None for none."""
        of_bytes = self._given[1].of_bytes
        if not self._parts and not of_bytes:
            return
        from dartprune.ffn.cpu import step_kernels as kernels
        from dartprune.ffn.cpu.arrays import words
        from dartprune.ffn.cpu.threads import kept_threads, use_threads

        nothing, x = numpy.empty(0, numpy.float32), numpy.zeros((1, 64), numpy.float32)
        with kept_threads():
            for dtype in {part.module.weight.dtype for part in self._parts if isinstance(part, OwnLinear)}:
                weight, out = (
                    words("weight", torch.zeros(4, 64, dtype=dtype, device="cpu")),
                    numpy.empty((1, 4), numpy.float32),
                )
                kernels.linear_alone(x, weight, nothing, out)
                kernels.linear(x, weight, nothing, use_threads(), out)
            if of_bytes:
                kernels.linear(x, numpy.zeros((4, 64), numpy.int8), nothing, use_threads(), numpy.empty_like(x[:, :4]))
            for dtype in {part.module.weight.dtype for part in self._parts if isinstance(part, OwnNorm)}:
                _compile_attention(dtype, of_rows=any(map(_has_rows, self._parts)))
            for part in self._parts:
                if isinstance(part, OwnFFN):
                    part.prepare()
                    break
            if self._layers is not None and choice is not None:
                self._layers.prepare(choice)

    def install(self, hooks: StepHooks | None = None) -> None:
        """Put them in place; `hooks`: of the run that computes all layers in one call where it can."""
        if self._layers is not None:
            self._layers.install(hooks)
        for part in self._parts:
            part.patch = Patch(part.module, "forward")
            part.patch.install(part.forward)

    def remove(self) -> list[str]:
        """Put back what was there; returns the modules that somebody else has patched meanwhile."""
        kept = []
        for part in reversed(self._parts):
            if part.patch is not None and not part.patch.remove():
                kept.append(f"the forward of a {type(part.module).__name__}")
            part.patch = None
            part.views.forget()
        self.shared.forget()
        if self._layers is not None:
            self._layers.install(None)
        self.mode.invariant = False
        return kept

    def make_invariant(self, core: nn.Module) -> str | None:
        """From now on a decoded token has the same bits alone and in a batch; or why that cannot be."""
        dtype = str(getattr(core, "dtype", None)).removeprefix("torch.")
        if getattr(core, "dtype", None) not in HALVES:
            return f"the kernels of a step are for bfloat16 and float16, this model is {dtype}"
        mine = {id(part.module) for part in self._parts}
        for name, module in core.named_modules():
            if id(module) not in mine and not _is_elementwise(module):
                return f"the kernels do not compute {name or 'the model'} ({type(module).__name__})"
        config: Any = core.config
        if config._attn_implementation != "sdpa":
            return f"the kernels do not compute attention of the kind {config._attn_implementation!r}"
        for dtype in {part.module.weight.dtype for part in self._parts if isinstance(part, OwnLinear)}:
            _compile_by_inputs(dtype)
        self.mode.invariant = True
        return None


def _has_rows(part: OwnModule) -> bool:
    """Whether it is attention whose products are of rows."""
    return isinstance(part, OwnAttention) and any(isinstance(m, RowProjection) for m in part.module.children())


def _compile_attention(dtype: torch.dtype, *, of_rows: bool) -> None:
    """Call the kernels of norms and attention once with a dtype's words, and the one of rows where it may be used."""
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import words
    from dartprune.ffn.cpu.threads import use_threads

    def zeros(*shape: int) -> Any:
        return words("zeros", torch.zeros(shape, dtype=dtype, device="cpu"))

    angle, mask = numpy.zeros((1, 64), numpy.float32), numpy.empty((1, 0), numpy.float32)
    kernels.norm(zeros(1, 64), zeros(64), 1e-6, zeros(1, 64))
    work = (zeros(0), zeros(0), 0.0), angle, angle, zeros(1, 1, 8, 64), zeros(1, 1, 8, 64), 4, mask
    kernels.attend(zeros(1, 64), zeros(1, 64), zeros(1, 64), *work, 1.0, zeros(1, 64))
    weights, biases = (zeros(64, 64),) * 4, (zeros(0),) * 4
    kernels.attention(zeros(1, 64), weights, biases, *work, 1.0, use_threads(), zeros(1, 64))
    if of_rows:
        from dartprune.ffn.cpu import group_products, step_rows, unpacking

        format_ = RowFormat(64, False, ALONE, 0)
        head, tail = (numpy.zeros((64, size), numpy.uint8) for size in (format_.head, format_.tail))
        # for short prompts, and where somebody has to do with one of the modules
        group_products.products(angle, head, tail, format_.offsets, True, use_threads(), numpy.empty_like(angle))
        group_products.down_rows(angle, tail, format_.offsets, use_threads(), numpy.empty_like(angle))
        unpacking.pick_rows(head, tail, format_.offsets, numpy.zeros(1, numpy.int64), zeros(1, 64))
        rows, formats = (numpy.zeros((64, format_.head), numpy.uint8),) * 4, (format_.offsets,) * 2
        step_rows.attention_of_rows(zeros(1, 64), rows, formats, biases, *work, 1.0, use_threads(), zeros(1, 64))


def _compile_by_inputs(dtype: torch.dtype) -> None:
    """Call the kernel of linear layers that lie the other way round once with a dtype's words."""
    from dartprune.ffn.cpu import step_kernels as kernels
    from dartprune.ffn.cpu.arrays import words
    from dartprune.ffn.cpu.threads import kept_threads, use_threads

    x, rows = numpy.zeros((2, 4), numpy.float32), words("weight", torch.zeros(4, 64, dtype=dtype, device="cpu"))
    with kept_threads():
        kernels.linear_by_inputs(
            x, rows, numpy.empty(0, numpy.float32), use_threads(), numpy.empty((2, 64), numpy.float32)
        )


def _is_elementwise(module: nn.Module) -> bool:
    """Whether what a module computes itself is one element, or one token, at a time."""
    name = _name(module)
    if name in ATTENTIONS or name in NORMS:
        return False
    ours = name.startswith(tuple(f"transformers.models.{key}.modeling_{key}." for key in _FAMILIES))
    return ours or isinstance(module, (nn.Embedding, nn.ModuleList)) or name in _ACTIVATIONS


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _modules(core: Any) -> list[nn.Module]:
    """The modules of a model that can be computed here."""
    if not has_kernels() or getattr(core, "dtype", None) not in HALVES:
        return []
    return [module for module in core.modules() if _is_taken(module) and not replaced(module)]


def _is_taken(module: nn.Module) -> bool:
    if type(module) is nn.Linear or _name(module) in NORMS:
        weight: Any = module.weight  # norms may be kept in float32
        return weight.dtype in HALVES and weight.device.type == "cpu"
    return _name(module) in ATTENTIONS


# torch.compile guards on the forwards, so a model that is attached again gets the same ones
_steps: weakref.WeakKeyDictionary[nn.Module, OwnStep] = weakref.WeakKeyDictionary()


def own_step(core: nn.Module, layers: Sequence[Layer], *, prunes: bool) -> OwnStep:
    """What can be computed here of a model, the same object at each attach as long as its modules are the same.

    Args:
        core: the model.
        layers: its FFNs.
        prunes: whether a method looks into them.
    """
    modules = _modules(core)
    form = StepForm()
    if modules:
        dense = () if prunes else tuple(layer for layer in layers if _in_rows(layer))
        form = StepForm(dense, _of_bytes(core), _whole(core, layers))
    elif has_kernels():
        form = StepForm(of_bytes=_of_bytes(core))
    step = _steps.get(core)
    if step is None or not step.fits(modules, form):
        step = _steps[core] = OwnStep(core, modules, form)
    return step


def _of_bytes(core: nn.Module) -> bool:
    return any(isinstance(module, ByteLinear) for module in core.modules())


def _whole(core: nn.Module, layers: Sequence[Layer]) -> tuple[tuple[nn.Module, Layer], ...]:
    """The decoder layers and FFNs of a model whose layers one kernel computes; else none."""
    decoders: list[Any] = [module for module in core.modules() if _name(module) in DECODERS]
    kinds = getattr(decoders[0].config, "layer_types", None) or () if decoders else ()
    if len(decoders) != 1 or len(set(kinds)) > 1 or replaced(decoders[0]):
        return ()
    modules = list(decoders[0].layers)
    fits = all(_name(module) in LAYERS for module in modules) and form_of(modules, layers) is not None
    return tuple(zip(modules, layers, strict=True)) if fits else ()


def _in_rows(layer: Layer) -> bool:
    """Whether an FFN module's projections are rows that a kernel takes."""
    return not layer.inline and not replaced(layer.entry) and packed_rows(layer) is not None
