"""What to do when the topic has moved (DART section 3.5, and this project's own `replay`).

A policy is a frozen dataclass. The run asks it after every decode forward what each pruned sequence should do; it knows
no model and holds no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeVar

from dartprune.errors import UserError
from dartprune.names import Registry


class Action(Enum):
    """What happens to a sequence's masks."""

    REPLAY = "replay"  # new masks from buffered inputs, at once
    RELEARN = "relearn"  # masks dropped, dense tokens traced, everything rebuilt
    RELEASE = "release"  # masks dropped for good
    SETTLE = "settle"  # the second replay, when the new reference is large enough


def _positive(owner: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{owner}: {name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class Refresh(ABC):
    """Base of all policies: what a policy needs from the run, and its decision in `due`."""

    kind: ClassVar[str] = ""

    @property
    def detects(self) -> bool:
        """Whether the policy listens to the drift detector."""
        return False

    @property
    def replay_tokens(self) -> int:
        """FFN inputs to keep per layer and sequence."""
        return 0

    @property
    def replay_memory(self) -> float:
        """Share of the old statistics in a replay's blend."""
        return 0.5

    @property
    def settle_tokens(self) -> int:
        """Tokens of the new reference after which a second replay is taken; 0: none."""
        return 0

    @property
    def dense_tokens(self) -> int:
        """Dense tokens of a relearn."""
        return 0

    @abstractmethod
    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """What a pruned sequence should do now.

        Args:
            decoded: decode forwards of this sequence so far.
            since_mask: decode forwards since its masks were made.
            fired: whether the detector fired in this forward.
        """


R = TypeVar("R", bound=type[Refresh])
refresh_kinds: Registry[type[Refresh]] = Registry("refresh policy")


def register_refresh(cls: R) -> R:
    """Class decorator: make a policy known under its `kind`."""
    refresh_kinds.register(cls.kind, cls)
    return cls


@register_refresh
@dataclass(frozen=True)
class Never(Refresh):
    """The mask of the prompt for ever (GRIFFIN, and the paper's static arm)."""

    kind: ClassVar[str] = "never"

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """Nothing, ever."""
        return None


@register_refresh
@dataclass(frozen=True)
class Replay(Refresh):
    """At an event, run the last inputs dense through gate and up, blend, and choose anew: no dense token.

    tokens: buffered inputs (a multiple of the detector's window).  memory: share of the old statistics.
    settle: reference tokens at which one more replay is taken (0: none).
    every: pruned tokens after which a replay is taken without an event (None: never).
    """

    kind: ClassVar[str] = "replay"
    tokens: int = 16
    memory: float = 0.25
    settle: int = 32
    every: int | None = None

    def __post_init__(self) -> None:
        _positive(type(self).__name__, tokens=self.tokens, every=self.every)
        if not 0 <= self.memory < 1:
            raise UserError(f"Replay: memory must lie in [0, 1), got {self.memory!r}")
        if isinstance(self.settle, bool) or not isinstance(self.settle, int) or self.settle < 0:
            raise UserError(f"Replay: settle must be a whole number of tokens, 0 for none, got {self.settle!r}")

    @property
    def detects(self) -> bool:
        """Whether the policy listens to the drift detector."""
        return True

    @property
    def replay_tokens(self) -> int:
        """FFN inputs to keep per layer and sequence."""
        return self.tokens

    @property
    def replay_memory(self) -> float:
        """Share of the old statistics in a replay's blend."""
        return self.memory

    @property
    def settle_tokens(self) -> int:
        """Tokens of the new reference after which a second replay is taken."""
        return self.settle

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """A replay when the detector fires, or when the masks have grown too old."""
        old = self.every is not None and since_mask >= self.every
        return Action.REPLAY if fired or old else None


@register_refresh
@dataclass(frozen=True)
class Relearn(Refresh):
    """The paper's: drop the masks, decode `tokens` tokens dense, rebuild budget, reference and masks from them."""

    kind: ClassVar[str] = "relearn"
    tokens: int = 50

    def __post_init__(self) -> None:
        _positive("Relearn", tokens=self.tokens)

    @property
    def detects(self) -> bool:
        """Whether the policy listens to the drift detector."""
        return True

    @property
    def dense_tokens(self) -> int:
        """Dense tokens of a relearn."""
        return self.tokens

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """A relearn when the detector fires."""
        return Action.RELEARN if fired else None


@register_refresh
@dataclass(frozen=True)
class Release(Refresh):
    """Drop the masks for good: at decoded token `at`, or at the first event where `at` is None."""

    kind: ClassVar[str] = "release"
    at: int | None = None

    def __post_init__(self) -> None:
        _positive("Release", at=self.at)

    @property
    def detects(self) -> bool:
        """Only a release without a fixed time listens to the detector."""
        return self.at is None

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """A release at the fixed time or at the first event."""
        reached = fired if self.at is None else decoded >= self.at
        return Action.RELEASE if reached else None


@register_refresh
@dataclass(frozen=True)
class Periodic(Refresh):
    """Every `every` pruned tokens, whatever the context: `dense` dense tokens (BWAP), or a replay of `replay` inputs.

    Exactly one of `dense` and `replay` must be given. `memory` is the replay's share of the old statistics; after dense
    tokens the masks are rebuilt from these alone.
    """

    kind: ClassVar[str] = "clock"
    every: int = 16
    dense: int | None = 4
    replay: int | None = None
    memory: float = 0.5

    def __post_init__(self) -> None:
        _positive("Periodic", every=self.every, dense=self.dense, replay=self.replay)
        if (self.dense is None) == (self.replay is None):
            raise UserError(
                f"Periodic: give either dense or replay, got dense={self.dense!r} and replay={self.replay!r}"
            )
        if not 0 <= self.memory < 1:
            raise UserError(f"Periodic: memory must lie in [0, 1), got {self.memory!r}")

    @property
    def replay_tokens(self) -> int:
        """FFN inputs to keep per layer and sequence."""
        return self.replay or 0

    @property
    def replay_memory(self) -> float:
        """Share of the old statistics in a replay's blend."""
        return self.memory

    @property
    def dense_tokens(self) -> int:
        """Dense tokens of a relearn."""
        return self.dense or 0

    def due(self, decoded: int, since_mask: int, fired: bool) -> Action | None:
        """A refresh whenever the clock has run out."""
        if since_mask < self.every:
            return None
        return Action.REPLAY if self.replay is not None else Action.RELEARN
