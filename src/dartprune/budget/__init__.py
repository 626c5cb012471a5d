"""How many neurons each layer keeps: pure functions in `shares` and `table`, frozen values in `kinds`."""

from __future__ import annotations

from dartprune.budget.kinds import (
    DOWN_SQUARE,
    NEURON_LEVEL,
    Budget,
    BudgetFacts,
    DepthAware,
    Global,
    Table,
    Uniform,
    budget_kinds,
    register_budget,
)
from dartprune.budget.shares import depth_aware, distribute, keep_counts, rank, sensitivity, uniform
from dartprune.budget.table import parse_table

__all__ = [
    "DOWN_SQUARE",
    "NEURON_LEVEL",
    "Budget",
    "BudgetFacts",
    "DepthAware",
    "Global",
    "Table",
    "Uniform",
    "budget_kinds",
    "depth_aware",
    "distribute",
    "keep_counts",
    "parse_table",
    "rank",
    "register_budget",
    "sensitivity",
    "uniform",
]
