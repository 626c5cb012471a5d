"""What must hold of a model while it is attached, asked before its forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dartprune.errors import UserError
from dartprune.model.changes import Changes
from dartprune.model.context import context_length
from dartprune.model.layer import place
from dartprune.model.weights import row_weights
from dartprune.runtime.layer_hooks import LiveLayer
from dartprune.runtime.slots import Slot
from dartprune.runtime.weight_facts import WeightFacts

NO_CACHE = "use_cache=False would rerun the whole text at every step: pruned decoding needs a cache"


class Checks:
    """Refuses a forward of a model that is not what was attached."""

    def __init__(
        self, core: Any, layers: Sequence[LiveLayer], changes: Changes, facts: WeightFacts, *, sketched: bool
    ) -> None:
        """Set up; `sketched`: whether a token selector was made from the weights."""
        self._core = core
        self._layers = layers
        self._changes = changes
        self._facts = facts
        self._sketched = sketched

    def usable(self, *, cached: bool) -> None:
        """ValueError for training mode, and for a forward without a cache."""
        if self._core.training:
            raise UserError("the model is in training mode: call model.eval() before decoding")
        if not cached:
            raise UserError(NO_CACHE)

    def unchanged(self) -> None:
        """ValueError for a model that was moved, patched over or rebuilt; weights written in place are taken up."""
        for layer in self._layers:
            if place(layer.parts) != layer.place:
                device, dtype = place(layer.parts)
                raise UserError(
                    f"the model was moved to {device}, {str(dtype).removeprefix('torch.')} while attached: "
                    "call run.detach(), move it, and attach again"
                )
        change = self._changes.found()
        if change is not None:
            raise UserError(f"{change} while attached: call run.detach(), change the model, and attach again")
        if self._changes.written():
            if self._sketched:
                raise UserError(
                    "weights of the FFN were written to while attached, so that the token selector knows others: "
                    "call run.detach() and attach again"
                )
            for layer in self._layers:
                if not layer.backend.gathers:
                    layer.weights = row_weights(layer.parts)
            self._facts.forget()

    def note_length(self, slots: Sequence[Slot], tokens: int) -> None:
        """Leave a note with sequences whose text is longer than the model's context."""
        most = context_length(self._core)
        if most is not None and tokens > most:
            for slot in slots:
                slot.note(f"a text of {tokens} tokens is longer than the model's context of {most}")
