"""Budgets as frozen, serialisable values, each known by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from dartprune.budget.shares import depth_aware, rank, sensitivity, uniform
from dartprune.budget.table import entries, parse_table
from dartprune.errors import UserError, UserTypeError
from dartprune.names import Registry

DOWN_SQUARE = "down_square"  # what a budget asks for to know the mean squared norm of the down projection's columns
NEURON_LEVEL = ("energy", DOWN_SQUARE)


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
        entries(self.keep)

    def pruned(self, facts: BudgetFacts, sparsity: float) -> Tensor:
        """Pruned fractions [L] from the table, see `parse_table`."""
        return parse_table(self.keep, facts.neurons)
