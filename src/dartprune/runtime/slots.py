"""What the host knows of each live sequence: its slot."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor

from dartprune.drift import AttentionDrift
from dartprune.report import Event


class State(Enum):
    """How the decoded tokens of a slot are computed."""

    LEARNING = "learning"  # dense and traced, until a mask may be made
    PRUNED = "pruned"
    RELEASED = "released"  # dense for good
    DENSE = "dense"  # the Dense preset: never traced, never pruned


@dataclass
class MaskCounts:
    """How many neurons the masks of one sequence keep, and how old they are.

    keep: of each layer, None while it is dense.  per_token: of these, how many each token uses, with a token selector.
    former: `keep` before the last change.  age: decode forwards since the masks were made or renewed.  born: decode
    forwards before they were made.  stale: new text was traced, so that they must be made anew before the next token.
    """

    keep: list[int] | None = None
    per_token: list[int] | None = None
    former: list[int] | None = None
    age: int = 0
    born: int = 0
    stale: bool = False


@dataclass
class RingPlace:
    """Where a sequence's next FFN input goes in the rings of all layers, and how many they hold of it."""

    next: int = 0
    filled: int = 0

    def advance(self, tokens: int, length: int) -> None:
        """Some tokens were written into rings of that length; 0: there are no rings."""
        if length:
            self.next = (self.next + tokens) % length
            self.filled = min(length, self.filled + tokens)

    def retreat(self, tokens: int, length: int) -> None:
        """The last tokens do not count any longer."""
        if length:
            self.next = (self.next - tokens) % length
            self.filled = max(0, self.filled - tokens)


@dataclass
class Detection:
    """The drift detector of one sequence.

    fill: tokens in the window under way.  recent: means of the last windows, float32 [H] each.  settling: a new
    reference grows, so that the detector rests.  similarities: (decoded, cosine, threshold) of each judged window.
    """

    drift: AttentionDrift
    fill: int = 0
    settling: bool = False
    recent: list[Tensor] = field(default_factory=list)
    similarities: list[tuple[int, float, float]] = field(default_factory=list)

    def copy(self) -> Detection:
        """One that goes its own way from here."""
        return Detection(self.drift.copy(), self.fill, self.settling, list(self.recent), list(self.similarities))


@dataclass
class LoggedEvent:
    """An event and how many neurons it changed: a scalar on the device, unread; None as long as no mask was made."""

    event: Event
    changed: Tensor | None

    def told(self) -> Event:
        """The event with its figure (waits for the device)."""
        return replace(self.event, changed=None if self.changed is None else int(self.changed))


@dataclass
class Slot:
    """What the host knows of one sequence.

    position: tokens that its cache holds.  decoded: decode forwards, padding after the end included: a clock, not a
    count for the report.  inherited: of these, decoded by the sequence it was copied from.  least: tokens that must
    have been traced before the next mask is made.  dense_left: dense tokens still owed to a relearn.  noise_seed: made
    from its first tokens.  sparsity: asked for this sequence, None for the method's; 0 stays dense.
    """

    id: int
    sequence: int
    state: State
    detection: Detection
    least: int
    masks: MaskCounts = field(default_factory=MaskCounts)
    ring: RingPlace = field(default_factory=RingPlace)
    noise_seed: int | None = None
    sparsity: float | None = None
    position: int = 0
    prompt_tokens: int = 0
    traced: int = 0
    decoded: int = 0
    dense_left: int = 0
    inherited: int = 0
    finished: bool = False
    events: list[LoggedEvent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def onto(self, slot_id: int) -> Slot:
        """A copy that lives in another slot (a beam that is continued there)."""
        return replace(
            self,
            id=slot_id,
            detection=self.detection.copy(),
            masks=copy.deepcopy(self.masks),
            ring=replace(self.ring),
            events=[replace(logged) for logged in self.events],
            notes=list(self.notes),
        )

    def fork(self) -> None:
        """Go on as a sequence of its own: what happened so far is told by the one it was copied from."""
        self.inherited, self.prompt_tokens = self.decoded, 0
        self.events, self.detection.similarities = [], []

    def masked_within(self, decoded: int) -> bool:
        """Whether masks were in force for one of its tokens, if it ended after so many; what follows is padding."""
        return self.masks.keep is not None and (self.masks.born < decoded or self.decoded == decoded)

    def traced_within(self, decoded: int) -> int:
        """Tokens that were traced until then."""
        until = self.decoded if self.masks.keep is None else self.masks.born
        return self.traced - (max(0, until - decoded) if self.state in (State.LEARNING, State.PRUNED) else 0)

    def events_within(self, decoded: int) -> list[LoggedEvent]:
        """Events until then; masks that a relearn was for may have come too late."""
        events = [logged for logged in self.events if logged.event.decoded <= decoded]
        if events and self.masks.keep is not None and not self.masked_within(decoded):
            events[-1] = replace(events[-1], changed=None)
        return events

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)
