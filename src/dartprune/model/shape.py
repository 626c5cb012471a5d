"""The layers of a decoder as the names and sizes of its modules suggest them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from dartprune.model.calls import bare
from dartprune.model.layer import Layer, activation_name, sizes


class Unusual(Exception):
    """Why a model is not taken for a decoder, as the end of a sentence."""


class Pattern(NamedTuple):
    """Names of an FFN's projections; fused: `up` is gate and up in one, gate first."""

    gate: str | None
    up: str
    down: str
    fused: bool = False

    def __str__(self) -> str:
        return "/".join(name for name in self[:3] if name)


# The first that fits counts, so those with a gate come before their parts.
PATTERNS = (
    Pattern("gate_proj", "up_proj", "down_proj"),
    Pattern("w1", "w3", "w2"),
    Pattern("c_fc_0", "c_fc_1", "c_proj"),
    Pattern(None, "gate_up_proj", "down_proj", fused=True),
    Pattern(None, "up_proj", "down_proj"),
    Pattern(None, "fc1", "fc2"),
    Pattern(None, "fc_in", "fc_out"),
    Pattern(None, "c_fc", "c_proj"),
    Pattern(None, "dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class Candidate:
    """One layer as it seems to be.

    draft: its FFN; norm, contribution, scale and attention output are still to be seen.  attentions: modules that seem
    to be its attention, each with its output projection.
    """

    block: nn.Module
    draft: Layer
    attentions: tuple[tuple[nn.Module, nn.Module], ...]


def candidates(root: nn.Module) -> list[Candidate]:
    """The layers below a module; raises `Unusual` where there are none, or more than one reading."""
    return [_candidate(index, block) for index, block in enumerate(_blocks(root))]


def short(module: nn.Module) -> str:
    """A module's children in one line."""
    children = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
    more = [f"{len(children) - 12} more"] if len(children) > 12 else []
    return ", ".join(children[:12] + more) or "no modules"


def _blocks(root: nn.Module) -> nn.ModuleList:
    lists = {path: part for path, part in root.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    found = {path: part for path, part in lists.items() if any(_ffns(block) for block in part)}
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outermost) == 1:
        return found[outermost[0]]
    if outermost:
        raise Unusual(f"several lists of layers with an FFN were found: {', '.join(outermost)}")
    seen = [f"{len(part)} {type(part[0]).__name__} in {path!r} ({short(part[0])})" for path, part in lists.items()]
    raise Unusual(f"no list of layers with an FFN was found, only {'; '.join(seen[:3]) or short(root)}")


def _ffns(block: nn.Module) -> list[tuple[str, nn.Module, Pattern]]:
    parts = [(path, part) for path, part in block.named_modules() if bare(part) is part]
    return [(path, part, pattern) for path, part in parts for pattern in _fitting(part)]


def _fitting(holder: nn.Module) -> Iterator[Pattern]:
    """The pattern of the FFN whose projections a module holds, if it holds one."""
    for pattern in PATTERNS:
        parts = [bare(getattr(holder, name, None)) for name in pattern[:3] if name]
        shapes = [sizes(part) if isinstance(part, nn.Module) else None for part in parts]
        if shapes[-1] is None:
            continue
        neurons, hidden = shapes[-1]
        if all(shape == (hidden, neurons * (1 + pattern.fused)) for shape in shapes[:-1]):
            yield pattern
            return


def _candidate(index: int, block: nn.Module) -> Candidate:
    block = bare(block)
    where = f"layer {index} ({type(block).__name__}: {short(block)})"
    ffns = _ffns(block)
    if len(ffns) != 1:
        names = " and ".join(repr(path) for path, _, _ in ffns)
        raise Unusual(f"{where} has {f'several FFNs, {names}' if ffns else 'no FFN'}")
    path, holder, pattern = ffns[0]
    acts = [act for name in ACTIVATIONS if callable(act := bare(getattr(holder, name, None)))]
    if len(acts) != 1:
        raise Unusual(f"{where} has {'several activations' if acts else 'no activation'} beside {pattern}")
    up, down = bare(getattr(holder, pattern.up)), bare(getattr(holder, pattern.down))
    neurons, hidden = sizes(down) or (0, 0)
    attentions = tuple(
        (part, output)
        for place, part in block.named_modules()
        if ("attn" in place.lower() or "attention" in place.lower()) and not _inside(place, path) and bare(part) is part
        for name in OUTPUTS
        if isinstance(output := bare(getattr(part, name, None)), nn.Module) and (sizes(output) or (0, 0))[1] == hidden
    )
    if not attentions:
        raise Unusual(f"{where} has no attention with an output projection of width {hidden}")
    inline = holder is block
    draft = Layer(
        index=index,
        entry=up if inline else holder,
        inline=inline,
        gate=bare(getattr(holder, pattern.gate)) if pattern.gate else None,
        up=up,
        down=down,
        fused=pattern.fused,
        activation=activation_name(acts[0]),
        act=acts[0],
        norm=None,
        contribution=down if inline else holder,
        scale=1.0,
        attention_output=attentions[0][1],
        hidden=hidden,
        neurons=neurons,
    )
    return Candidate(block, draft, attentions)


def _inside(path: str, other: str) -> bool:
    return bool(other) and f"{path}.".startswith(f"{other}.")
