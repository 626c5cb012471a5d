"""A refresh at a known rate, so that its price can be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dartprune.errors import UserError
from dartprune.refresh import Action, Replay


@dataclass(frozen=True)
class Paced(Replay):
    """Replay after every `every` pruned tokens exactly; the detector does all its work and is not listened to."""

    kind: ClassVar[str] = "paced"
    settle: int = 0
    every: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"a refresh every {self.every} tokens makes no sense: give at least 1")

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """A replay when the time has come, whatever the detector says."""
        return Action.REPLAY if since_mask >= self.every else None
