"""dartprune: skip most of a language model's FFN while it decodes (DART, arXiv 2601.22632)."""

from dartprune import budget, drift, scoring
from dartprune.budget import DepthAware, Table, Uniform
from dartprune.method import Detector
from dartprune.model.families import Family, register_family
from dartprune.pruner import Clock, Dart, Dense, Griffin, Pruner, Random, Static, presets
from dartprune.refresh import Never, Relearn, Release, Replay
from dartprune.report import Event, Report
from dartprune.run import Run
from dartprune.scoring import register_scorer

__version__ = "0.1.0"

__all__ = [
    "Clock",
    "Dart",
    "Dense",
    "DepthAware",
    "Detector",
    "Event",
    "Family",
    "Griffin",
    "Never",
    "Pruner",
    "Random",
    "Relearn",
    "Release",
    "Replay",
    "Report",
    "Run",
    "Static",
    "Table",
    "Uniform",
    "budget",
    "drift",
    "presets",
    "register_family",
    "register_scorer",
    "scoring",
]
