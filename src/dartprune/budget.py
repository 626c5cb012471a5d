"""Layer sensitivity -> how many neurons each layer keeps (DART section 3.2)."""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from dartprune.errors import UserError, UserTypeError
from dartprune.names import Registry

DOWN_SQUARE = "down_square"  # what a budget asks for to know the mean squared norm of the down projection's columns
ALIKE = 0.01  # a spread of sensitivities below this share of their mean says nothing


def sensitivity(angle: Tensor, change: Tensor) -> Tensor:
    """How much a layer's FFN moves the residual stream: `mean(1 - cos) * mean(|z - y| / |y|)`, [L]."""
    return angle * change


def _check(sparsity: float, min_sparsity: float = 0.0, max_sparsity: float = 1.0) -> None:
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity must be a number in [0, 1), got {sparsity!r}; 0.7 leaves out 70 % of the neurons")
    if not 0 <= min_sparsity <= max_sparsity <= 1:
        raise UserError(f"layer bounds must satisfy 0 <= min <= max <= 1, got [{min_sparsity!r}, {max_sparsity!r}]")


def distribute(pressure: Tensor, sparsity: float, min_sparsity: float = 0.1, max_sparsity: float = 0.9) -> Tensor:
    """Pruned fractions in proportion to a pressure, within bounds, with mean `sparsity`.

    Args:
        pressure: how readily each layer is pruned, [L], not negative.
        sparsity: mean of the result.
        min_sparsity: lower bound; widened, with a warning, where `sparsity` lies below it.
        max_sparsity: upper bound; likewise.

    Returns:
        float32 [L] on the host.

    Raises:
        ValueError: `sparsity` outside [0, 1), or bounds that contradict each other.
    """
    _check(sparsity, min_sparsity, max_sparsity)
    p = pressure.detach().cpu().double()
    if 0 < sparsity < min_sparsity or sparsity > max_sparsity:  # 0 means what it says: nothing is pruned
        warnings.warn(
            f"sparsity {sparsity:g} lies outside of the layer bounds [{min_sparsity:g}, {max_sparsity:g}]: "
            "the bound is widened to it",
            stacklevel=3,
        )
    low, high = min(min_sparsity, sparsity), max(max_sparsity, sparsity)
    layers = p.numel()
    total = float(p.sum())
    if layers == 1 or total <= 0 or not math.isfinite(total):
        return torch.full((layers,), float(sparsity), dtype=torch.float32, device="cpu")
    wanted = sparsity * layers
    out = (wanted * p / total).clamp(low, high)
    for _ in range(10 * layers + 100):
        rest = wanted - float(out.sum())
        if abs(rest) < 1e-9 * layers:
            break
        free = out < high - 1e-12 if rest > 0 else out > low + 1e-12
        share = torch.where(free, p, 0.0)
        if float(share.sum()) <= 0:
            share = free.double()
        out = (out + rest * share / share.sum()).clamp(low, high)
    return out.float()


def depth_aware(
    sensitivity: Tensor,
    sparsity: float,
    *,
    early_width: float = 0.3,
    late_width: float = 0.15,
    early_floor: float = 0.25,
    late_floor: float = 0.35,
    min_sparsity: float = 0.1,
    max_sparsity: float = 0.9,
) -> Tensor:
    """Pruned fraction of each layer: insensitive layers give more, the first and the last ones are protected.

    Args:
        sensitivity: [L], any float dtype, see `sensitivity()`.
        sparsity: mean pruned fraction, in [0, 1).
        early_width: share of the depth at the beginning that is protected; 0 for none.
        late_width: the same at the end.
        early_floor: pressure on the very first layer, of 1.
        late_floor: pressure on the very last layer, of 1.
        min_sparsity: least pruned fraction of a layer.
        max_sparsity: greatest pruned fraction of a layer.

    Returns:
        float32 [L] on the host with mean `sparsity` (DART section 3.2).

    Raises:
        ValueError: `sparsity` outside [0, 1), or bounds that contradict each other.
    """
    # 1 - cos of nearly equal vectors may come out a rounding error below 0
    s = sensitivity.detach().cpu().double().clamp_min(0)
    layers = s.numel()
    mean = float(s.mean())
    spread = float(s.max() - s.min())
    if not math.isfinite(mean) or spread < ALIKE * mean or spread == 0:
        readiness = torch.ones(layers, dtype=torch.float64, device="cpu")
    else:
        readiness = 1 - (s - s.min()) / (spread + 1e-6 * mean)
    depth = torch.full((1,), 0.5, dtype=torch.float64, device="cpu")
    if layers > 1:
        depth = torch.linspace(0, 1, layers, dtype=torch.float64, device="cpu")
    protection = torch.ones(layers, dtype=torch.float64, device="cpu")
    early, late = depth < early_width, depth > 1 - late_width
    if early_width > 0:
        protection = torch.where(early, early_floor + (1 - early_floor) * depth / early_width, protection)
    if late_width > 0:
        protection = torch.where(late, late_floor + (1 - late_floor) * (1 - depth) / late_width, protection)
    return distribute(readiness * protection, sparsity, min_sparsity, max_sparsity)


def rank(contributions: Sequence[Tensor], sparsity: float, max_sparsity: float = 1.0) -> Tensor:
    """Pruned fractions from one ranking of all layers' neurons: the highest contributions of the model are kept.

    Args:
        contributions: of each layer, float [I], not negative, comparable between layers, on one device.
        sparsity: mean of the result over all neurons.
        max_sparsity: greatest pruned fraction of a layer; widened to `sparsity` where that is higher.

    Returns:
        float32 [L] on the host (waits for the device once).

    Raises:
        ValueError: `sparsity` outside [0, 1), or a bound outside [0, 1].
    """
    _check(sparsity, 0.0, max_sparsity)
    sizes = [len(part) for part in contributions]
    kept = round((1 - sparsity) * sum(sizes))
    ranked = []
    for part, size in zip(contributions, sizes, strict=True):
        part = part.float().nan_to_num(nan=torch.inf).clone()
        # what a layer keeps in any case stands above all others
        sure = min(size, math.ceil((1 - max(max_sparsity, sparsity)) * size))
        part[part.topk(sure).indices] = torch.inf
        ranked.append(part)
    many = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    owners = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(many).to(ranked[0].device)
    chosen = owners[torch.cat(ranked).topk(kept).indices]
    counts = torch.bincount(chosen, minlength=len(sizes)).cpu()
    return (1 - counts.double() / many).float()


def uniform(layers: int, sparsity: float) -> Tensor:
    """The same pruned fraction in every layer, float32 [L]; ValueError outside [0, 1)."""
    _check(sparsity)
    return torch.full((layers,), float(sparsity), dtype=torch.float32, device="cpu")


def _entries(table: str) -> list[tuple[str, int, int | None, str]]:
    """Each entry's text, first and last layer (None: to the end) and amount; what needs no model is checked."""
    out: list[tuple[str, int, int | None, str]] = []
    for entry in (part.strip() for part in table.split(",")):
        match = re.fullmatch(r"(all|(\d+)(?:-(\d+))?)\s*:\s*(\d+\.\d*|\.\d+|\d+)", entry)
        if match is None:
            raise UserError(f"budget entry {entry!r} cannot be read: write layer:share, first-last:share or all:share")
        where, first, last, amount = match.groups()
        if where == "all":
            out.append((entry, 0, None, amount))
            continue
        begin, end = int(first), int(last or first)
        if begin > end:
            raise UserError(f"budget entry {entry!r} names the range backwards: write {end}-{begin}")
        out.append((entry, begin, end, amount))
    return out


def parse_table(table: str, neurons: Sequence[int]) -> Tensor:
    """Pruned fractions from a table of what each layer keeps.

    Args:
        table: entries such as `0:0.9,1-3:0.82,4:1200,all:0.3`: a layer, a range or `all`, then the share of neurons to
            keep (with a point) or their number. Later entries win over earlier ones.
        neurons: neurons of each layer.

    Returns:
        float32 [L].

    Raises:
        ValueError: an entry that cannot be read or does not fit the model, or a layer that no entry names.
    """
    layers = len(neurons)
    out = [math.nan] * layers
    for entry, begin, last, amount in _entries(table):
        end = layers - 1 if last is None else last
        if end >= layers:
            raise UserError(f"budget entry {entry!r} names layer {end}, but the model has layers 0 to {layers - 1}")
        for layer in range(begin, end + 1):
            keep = float(amount) if "." in amount else int(amount) / neurons[layer]
            if keep > 1:
                raise UserError(f"budget entry {entry!r} keeps more than the {neurons[layer]} neurons of layer {layer}")
            out[layer] = 1 - keep
    missing = [layer for layer, value in enumerate(out) if math.isnan(value)]
    if missing:
        raise UserError(f"the budget table names no share for layer {missing[0]}: add it, or 'all:SHARE' in front")
    return torch.tensor(out, dtype=torch.float32, device="cpu")


def keep_counts(pruned: Tensor, neurons: Sequence[int]) -> list[int]:
    """Neurons that each layer keeps: `round((1 - p_l) * I_l)`."""
    return [round((1 - float(p)) * n) for p, n in zip(pruned.tolist(), neurons, strict=True)]


@dataclass(frozen=True)
class BudgetFacts:
    """What a budget may look at: the trace of one sequence.

    angle, change: float32 [L], the mean impact terms of each layer.  neurons: of each layer.
    contributions: of each layer float32 [I], on one device: what each neuron adds to the residual stream, of the
    stream's square there; empty unless the budget's `inputs` name `NEURON_LEVEL`.
    """

    angle: Tensor
    change: Tensor
    neurons: Sequence[int]
    contributions: Sequence[Tensor] = ()


NEURON_LEVEL = ("energy", DOWN_SQUARE)


@dataclass(frozen=True)
class Budget(ABC):
    """Base of all budgets: a frozen dataclass, made known by `register_budget`.

    kind: its registered name.  inputs: facts that its contributions are made from, see `BudgetFacts`.
    context: whether it looks at the context at all.
    """

    kind: ClassVar[str] = ""
    context: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def pruned(self, facts: BudgetFacts, sparsity: float) -> Tensor:
        """Share of its neurons that each layer leaves out, float32 [L] on the host, with mean `sparsity`."""

    def most_kept(self, sparsity: float) -> float:
        """The greatest share of its neurons that a layer may keep, so that no list is held longer than that."""
        return 1.0


B = TypeVar("B", bound=type[Budget])
budget_kinds: Registry[type[Budget]] = Registry("budget")


def register_budget(cls: B) -> B:
    """Class decorator: make a budget known under its `kind`."""
    budget_kinds.register(cls.kind, cls)
    return cls


@register_budget
@dataclass(frozen=True)
class DepthAware(Budget):
    """The paper's budget; `depth_protection` and `magnitude_factor` switch two of its parts off for studies.

    min_sparsity: the paper's is 0.1; a layer that must not be touched may be left whole here (docs/choices.md).
    spread: how far the layers may differ, of what the paper has: 1 is the paper's budget, 0 the same share everywhere.
    """

    kind: ClassVar[str] = "depth-aware"
    early_width: float = 0.3
    late_width: float = 0.15
    early_floor: float = 0.25
    late_floor: float = 0.35
    min_sparsity: float = 0.0
    max_sparsity: float = 0.9
    depth_protection: bool = True
    magnitude_factor: bool = True
    spread: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "early_width",
            "late_width",
            "early_floor",
            "late_floor",
            "min_sparsity",
            "max_sparsity",
            "spread",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"DepthAware: {name} must lie in [0, 1], got {value!r}")
        if self.min_sparsity > self.max_sparsity:
            raise UserError(
                f"DepthAware: min_sparsity {self.min_sparsity!r} is above max_sparsity {self.max_sparsity!r}"
            )

    def pruned(self, facts: BudgetFacts, sparsity: float) -> Tensor:
        """Pruned fractions [L] from the mean impact terms [L] of each layer."""
        pruned = depth_aware(
            sensitivity(facts.angle, facts.change) if self.magnitude_factor else facts.angle,
            sparsity,
            early_width=self.early_width if self.depth_protection else 0.0,
            late_width=self.late_width if self.depth_protection else 0.0,
            early_floor=self.early_floor,
            late_floor=self.late_floor,
            min_sparsity=self.min_sparsity,
            max_sparsity=self.max_sparsity,
        )
        return pruned if self.spread == 1 else sparsity + self.spread * (pruned - sparsity)

    def most_kept(self, sparsity: float) -> float:
        """What the lower bound leaves."""
        return 1 - min(self.min_sparsity, sparsity)


@register_budget
@dataclass(frozen=True)
class Global(Budget):
    """One ranking of all layers' neurons by what they add to the residual stream, of its size there.

    A neuron's contribution is `E_i mean_j |W_down[:, j]|^2 / |y|^2`, y the residual stream before the FFN, its square
    the geometric mean over tokens. Not of the paper; docs/choices.md has what it wins.
    max_sparsity: greatest pruned fraction of a layer.
    """

    kind: ClassVar[str] = "global"
    inputs: ClassVar[tuple[str, ...]] = NEURON_LEVEL
    max_sparsity: float = 0.98

    def __post_init__(self) -> None:
        value = self.max_sparsity
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"Global: max_sparsity must lie in [0, 1], got {value!r}")

    def pruned(self, facts: BudgetFacts, sparsity: float) -> Tensor:
        """Pruned fractions [L] from each layer's contributions [I]."""
        return rank(facts.contributions, sparsity, self.max_sparsity)


@register_budget
@dataclass(frozen=True)
class Uniform(Budget):
    """The same share in every layer."""

    kind: ClassVar[str] = "uniform"
    context: ClassVar[bool] = False

    def pruned(self, facts: BudgetFacts, sparsity: float) -> Tensor:
        """Pruned fractions [L], all `sparsity`."""
        return uniform(len(facts.neurons), sparsity)


@register_budget
@dataclass(frozen=True)
class Table(Budget):
    """What each layer keeps, given by hand; the sparsity of the pruner is not looked at."""

    kind: ClassVar[str] = "table"
    context: ClassVar[bool] = False
    keep: str = "all:1.0"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, str):
            raise UserTypeError(f"Table: keep must be text such as '0:0.9,1-3:0.82,all:0.3', got {self.keep!r}")
        _entries(self.keep)

    def pruned(self, facts: BudgetFacts, sparsity: float) -> Tensor:
        """Pruned fractions [L] from the table, see `parse_table`."""
        return parse_table(self.keep, facts.neurons)
