"""Decoders that no row describes: what names and sizes suggest, proved by watching one forward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.model.apart import apart
from dartprune.model.calls import unobserved
from dartprune.model.layer import Decoder, Layer, check_single, held
from dartprune.model.shape import ACTIVATIONS, OUTPUTS, PATTERNS, Candidate, Unusual, candidates

TOKENS = 6

# One forward proves a model; later calls only look whether its modules are still the same.
_proved: weakref.WeakKeyDictionary[nn.Module, tuple[list[Candidate], Decoder]] = weakref.WeakKeyDictionary()


def by_structure(model: Any, family: str) -> Decoder:
    """Recognise a decoder by its structure.

    Names and sizes give candidates. One forward of two short lines shows where the residual stream is, and proves that
    each layer computes what its description says and that no position sees a later one.

    Raises:
        ValueError: this is not the usual decoder; one line says what was looked for, what was found and what to do.
    """
    root = model.get_decoder()
    try:
        found = candidates(root)
        check_single(candidate.draft for candidate in found)
        known = _proved.get(model)
        if known is not None and known[0] == found:
            return known[1]
        layers = _watched(root, found, int(model.config.get_text_config().vocab_size))
    except Unusual as why:
        raise UserError(
            f"{type(model).__name__} (model type {family!r}) has no row in the table of families and is not the "
            f"usual decoder: {why}. Looked for: one list of layers, in each one FFN ({', '.join(map(str, PATTERNS))}) "
            f"with its activation ({', '.join(ACTIVATIONS)}) and one attention with an output projection "
            f"({', '.join(OUTPUTS)}). "
            f"If it is a decoder, describe it: dartprune.register_family({family!r}, dartprune.Family(layers=..., ...))"
        ) from None
    decoder = Decoder(family, "structure", layers, layers[0].hidden)
    _proved[model] = (found, decoder)
    return decoder


@dataclass
class Seen:
    """What went through a module: its first input and output, and how often it ran."""

    given: Tensor | None
    made: Tensor | None
    times: int = 1


class CallRecorder:
    """Notes what goes through modules during a forward."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, Seen] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward hook."""
        if module in self.seen:
            self.seen[module].times += 1
            return
        given = args[0] if args else kwargs.get("hidden_states")
        made = output[0] if isinstance(output, tuple) and output else output
        # a copy, since a layer may add to it in place
        self.seen[module] = Seen(
            given.detach().clone() if isinstance(given, Tensor) else None,
            made.detach().clone() if isinstance(made, Tensor) else None,
        )

    def __getitem__(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """First input and output of a module that ran once; raises `Unusual` for another."""
        seen = self.seen.get(module)
        if seen is None or seen.times != 1 or seen.given is None or seen.made is None:
            times = 0 if seen is None else seen.times
            raise Unusual(f"in one forward a {type(module).__name__} ran {times} times or took no tensor")
        return seen.given, seen.made

    def chain(
        self, modules: Sequence[nn.Module], *, given: Tensor | None = None, made: Tensor | None = None
    ) -> list[nn.Module]:
        """The modules, outermost only, that changed `given` into something, or something into `made`."""
        out: list[nn.Module] = []
        for module in modules:
            seen = self.seen.get(module)
            if seen is None or seen.given is None or seen.made is None or _same(seen.given, seen.made):
                continue
            fits = (given is None or _same(seen.given, given)) and (made is None or _same(seen.made, made))
            if fits and not any(module in set(other.modules()) for other in out):
                out.append(module)
        return out


def _watched(root: nn.Module, found: Sequence[Candidate], vocabulary: int) -> tuple[Layer, ...]:
    if root.training:
        raise Unusual("it is in training mode, where a forward proves nothing: call model.eval() first")
    watcher = CallRecorder()
    place = next((tensor.device for tensor in held(root)), torch.device("cpu"))
    for candidate in found:
        hook = getattr(candidate.draft.down, "_hf_hook", None)
        if any(tensor.is_meta for tensor in held(candidate.draft.down)) and hook is None:
            raise Unusual("its weights are on the meta device, so no forward can prove what its layers do")
    lines = (
        torch.arange(2 * TOKENS, dtype=torch.int64, device="cpu").view(2, TOKENS) % TOKENS * 7919 + 11
    ) % vocabulary
    lines[1, -1] = (lines[1, -1] + 5) % vocabulary
    try:
        # hooks put on a module after torch.compile are not heard in its graph
        with ExitStack() as stack, apart(), torch.compiler.set_stance("force_eager"):
            stack.enter_context(unobserved(root.modules()))
            for candidate in found:
                for module in candidate.block.modules():
                    handle = module.register_forward_hook(watcher, with_kwargs=True)
                    stack.callback(handle.remove)
            root(input_ids=lines.to("cpu" if place.type == "meta" else place), use_cache=False)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise Unusual(f"a forward of {TOKENS} tokens failed with {type(error).__name__}: {first}") from error
    layers = tuple(_layer(candidate, watcher) for candidate in found)
    _, last = watcher[found[-1].block]
    if not _close(last[0, :-1], last[1, :-1], last[0, :-1], 64):
        raise Unusual("earlier positions change with a later token, so it is not causal")
    return layers


def _layer(candidate: Candidate, watcher: CallRecorder) -> Layer:
    draft, block = candidate.draft, candidate.block
    where = f"layer {draft.index} ({type(block).__name__})"
    x, z = watcher[draft.entry]
    a, out = watcher[draft.down]
    if not _close(draft.activations(x).view_as(a), a, a):
        raise Unusual(f"{where}: the input of its down projection is not act(gate(x)) * up(x) or act(up(x))")
    if draft.inline:
        z = out
    if not _same(z, out):
        raise Unusual(f"{where}: its FFN does more to the output of the down projection")
    attentions = [pair for pair in candidate.attentions if pair[0] in watcher.seen]
    if len(attentions) != 1:
        raise Unusual(f"{where}: {len(attentions)} of its modules with an output projection ran as attention, not one")
    attention, attention_output = attentions[0]
    wholes = [whole for whole in (attention, draft.entry, draft.down, draft.act) if isinstance(whole, nn.Module)]
    inner = {part for whole in wholes for part in whole.modules()}
    between = [part for part in block.modules() if part is not block and part not in inner]
    norms = watcher.chain(between, made=x)
    after = watcher.chain(between, given=z)
    if len(norms) > 1 or len(after) > 1:
        raise Unusual(f"{where}: several norms could be the one before or after its FFN")
    if after:
        z = watcher[after[0]][1]
    given, made = watcher[block]
    ends = [made, *(watcher[part][0] for part in watcher.chain(between, made=made))]
    # where the norm comes after the sum, what it makes is the residual stream itself
    for norm in (*norms, None):
        y = x if norm is None else watcher[norm][0]
        parallel = watcher[attention_output][1] if _same(y, given) else None
        for end in ends:
            scale = _scale(end, y, z, parallel)
            if scale is not None:
                return replace(
                    draft,
                    norm=norm,
                    contribution=after[0] if after else draft.contribution,
                    scale=_exact(scale, block, z.dtype),
                    attention_output=attention_output,
                )
    raise Unusual(f"{where}: its output is not the residual stream plus what its FFN gives")


def _scale(made: Tensor, y: Tensor, z: Tensor, parallel: Tensor | None) -> float | None:
    """The s with made = y + s * z (+ t * parallel), or None."""
    made, y, z = (part.reshape(-1, part.shape[-1]) for part in (made, y, z))
    terms = [z] if parallel is None else [z, parallel.reshape(z.shape)]
    size = torch.stack([part.double().abs() for part in (y, *terms)]).sum(0)
    if _close(y + sum(terms), made, size):
        return 1.0
    design = torch.stack([part.double().flatten() for part in terms], dim=1).cpu()
    found = torch.linalg.lstsq(design, (made.double() - y.double()).flatten().cpu()[:, None]).solution[:, 0].tolist()
    total = y.double() + sum(s * part.double() for s, part in zip(found, terms, strict=True))
    return found[0] if _close(total, made, size) and found[0] > 0 else None


def _exact(scale: float, block: nn.Module, dtype: torch.dtype) -> float:
    """The number that the layer keeps for a measured scale, since rounding blurs the measured one."""
    numbers = [value for value in vars(block).values() if isinstance(value, float)]
    near = [value for value in numbers if abs(value - scale) <= 8 * torch.finfo(dtype).eps * scale]
    return near[0] if near else scale


def _same(one: Tensor, other: Tensor) -> bool:
    if one.numel() != other.numel() or one.dtype != other.dtype:
        return False
    return torch.equal(one.flatten(), other.flatten().to(one.device))


def _close(one: Tensor, other: Tensor, size: Tensor, roundings: int = 8) -> bool:
    """Whether two tensors differ by no more than some roundings of numbers of this size, row by row."""
    gap = torch.linalg.vector_norm(one.double() - other.double(), dim=-1)
    most = roundings * torch.finfo(other.dtype).eps * torch.linalg.vector_norm(size.double(), dim=-1)
    return bool((gap <= most).all())
