"""A refresh at a known rate, so that its price can be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dartprune.refresh import Action, Replay


@dataclass(frozen=True)
class Paced(Replay):
    """Replay after every `every` pruned tokens exactly; the detector does all its work and is not listened to."""

    kind: ClassVar[str] = "paced"
    settle: int = 0
    every: int = 32

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """A replay when the time has come, whatever the detector says."""
        return Action.REPLAY if since_mask >= self.every else None
