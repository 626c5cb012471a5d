"""dartprune: skip most of a language model's FFN while it decodes (DART, arXiv 2601.22632)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dartprune import budget, drift, scoring
    from dartprune.budget import DepthAware, Global, Table, Uniform
    from dartprune.method import Detector
    from dartprune.model.families import Family, register_family
    from dartprune.pruner import (
        Clock,
        Dart,
        Dense,
        GatedDart,
        Griffin,
        PerToken,
        Pruner,
        Random,
        SketchDart,
        Static,
        presets,
    )
    from dartprune.quantisation import Quantisation, quantise
    from dartprune.refresh import Never, Relearn, Release, Replay
    from dartprune.report import Event, Report
    from dartprune.run import Run, detach, run_of
    from dartprune.scoring import register_scorer
    from dartprune.selectors.settings import Sketch, TokenGate

__version__ = "0.1.0"

# public name -> module; torch and transformers are imported when the first of them is asked for
_HOME = {
    "Clock": "pruner",
    "Dart": "pruner",
    "Dense": "pruner",
    "DepthAware": "budget",
    "Global": "budget",
    "Detector": "method",
    "Event": "report",
    "Family": "model.families",
    "GatedDart": "pruner",
    "Griffin": "pruner",
    "Never": "refresh",
    "PerToken": "pruner",
    "Pruner": "pruner",
    "Quantisation": "quantisation",
    "Random": "pruner",
    "Relearn": "refresh",
    "Release": "refresh",
    "Replay": "refresh",
    "Report": "report",
    "Run": "run",
    "Sketch": "selectors.settings",
    "SketchDart": "pruner",
    "Static": "pruner",
    "Table": "budget",
    "TokenGate": "selectors.settings",
    "Uniform": "budget",
    "detach": "run",
    "presets": "pruner",
    "quantise": "quantisation",
    "register_family": "model.families",
    "register_scorer": "scoring",
    "run_of": "run",
}
_MODULES = ("budget", "drift", "scoring")

__all__ = [
    "Clock",
    "Dart",
    "Dense",
    "DepthAware",
    "Detector",
    "Event",
    "Family",
    "GatedDart",
    "Global",
    "Griffin",
    "Never",
    "PerToken",
    "Pruner",
    "Quantisation",
    "Random",
    "Relearn",
    "Release",
    "Replay",
    "Report",
    "Run",
    "Sketch",
    "SketchDart",
    "Static",
    "Table",
    "TokenGate",
    "Uniform",
    "budget",
    "detach",
    "drift",
    "presets",
    "quantise",
    "register_family",
    "register_scorer",
    "run_of",
    "scoring",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dartprune.{name}")
    if name in _HOME:
        return getattr(import_module(f"dartprune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dartprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
