"""Scores over a calibration text, from which masks are made that are the same for every sequence."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartprune.budget import Uniform
from dartprune.errors import UserError
from dartprune.pruner import Static
from dartprune.scoring import register_scorer, scorer_names

WINDOW = 256  # tokens of one piece of a calibration text
LEAST = 64  # fewer tokens than this calibrate nothing
PIECES = 128  # of a longer text, spread evenly over it


class Calibration:
    """Scores of all neurons over a text, from which masks are made that are the same for every sequence."""

    def __init__(self, model: Any, pieces: Sequence[Sequence[int]]) -> None:
        """Set up; nothing runs before a score is asked for.

        Args:
            model: a decoder in evaluation mode, not attached when a score is asked for.
            pieces: token sequences of the calibration text, see `cut`.
        """
        self.model = model
        self.pieces = [list(piece) for piece in pieces]
        self._known: dict[str, str] = {}

    def scorer(self, base: str) -> str:
        """Name of a scorer that gives what `base` gives over the calibration text, whatever the sequence.

        Args:
            base: a registered scorer that is the root of a sum over tokens: `magnitude` or `weight-aware`.
        """
        if base not in self._known:
            self._known[base] = _register(base, self._scores(base))
        return self._known[base]

    def _scores(self, base: str) -> dict[int, Tensor]:
        squares: list[Tensor] = []
        with Static(scorer=base, budget=Uniform())(self.model, backend="masked") as run:
            for piece in self.pieces:
                tokens = torch.tensor([piece], device=next(self.model.parameters()).device)
                cache = run.prefill(tokens)
                part = [score.square().cpu() for score in run.scores(run.slots_of(cache)[0])]
                squares = part if not squares else [a + b for a, b in zip(squares, part, strict=True)]
            layers = [layer.index for layer in run.report().layers]
        return {index: total.sqrt() for index, total in zip(layers, squares, strict=True)}


def cut(tokens: Sequence[int], head: Sequence[int] = ()) -> list[list[int]]:
    """The pieces of a calibration text: at most 128 whole windows, or all of a text that is shorter than one.

    Each begins with `head`, see `texts.opening`, which comes on top.

    Raises:
        ValueError: too few tokens to calibrate anything.
    """
    if len(tokens) < LEAST:
        raise UserError(f"the calibration text has {len(tokens)} tokens: give at least {LEAST}")
    starts = range(0, max(1, len(tokens) - WINDOW + 1), WINDOW)
    return [[*head, *tokens[start : start + WINDOW]] for start in starts[:: -(-len(starts) // PIECES)]]


def _register(base: str, tables: dict[int, Tensor]) -> str:
    """Make fixed scores known as a scorer; a process that has not calibrated them does not know the name."""
    digest = 0
    for index in sorted(tables):
        digest = zlib.crc32(tables[index].numpy().tobytes(), digest)
    name = f"calibrated-{base}-{digest:08x}"

    def fixed(layer: int) -> Tensor:
        return tables[layer]

    if name not in scorer_names():  # the digest is in the name: a known one has these very scores
        register_scorer(name)(fixed)
    return name
