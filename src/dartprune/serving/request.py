"""What is asked of the engine, and what it tells while it works."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from dartprune.report import SequenceReport

_numbers = itertools.count()


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the likeliest. top_k 0 and top_p 1: among all. seed None: any."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, and `choices` continuations of it.

    prompt: token ids.  most: new tokens of each choice.  stop: strings that end a choice and are not part of it.
    logprobs: None for none, else how many other tokens' are told with each token's own.  sparsity: None for the
    server's, 0 for dense.  watch: whether figures of masks and detector are told with the tokens.  client: who asks,
    for the queue's fairness.  seconds: within which all must be done, None for no limit.
    """

    prompt: tuple[int, ...]
    most: int
    sampling: Sampling = Sampling()
    choices: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    sparsity: float | None = None
    watch: bool = False
    client: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class TokenChance:
    """A token, the logarithm of its probability, and those of the likeliest: (id, logarithm)."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Figures:
    """What is drawn of one sequence while it decodes.

    similarities: (decoded tokens, cosine to the start, threshold) of each judged window so far.  events: decoded tokens
    at each refresh.  active: share of each layer's neurons that the masks keep, None while it is dense.
    """

    decoded: int
    similarities: tuple[tuple[int, float, float], ...]
    events: tuple[int, ...]
    active: tuple[float, ...] | None


@dataclass(frozen=True)
class Piece:
    """New text of one choice (it may be empty), and the tokens that it comes from."""

    choice: int
    text: str
    chances: tuple[TokenChance, ...] = ()
    figures: Figures | None = None


@dataclass(frozen=True)
class Done:
    """One choice is over: `stop` or `length`; how many tokens it got, and what was pruned of them.

    cached: tokens of the prompt that were known, told with the first choice alone.
    """

    choice: int
    reason: str
    tokens: int
    report: SequenceReport
    cached: int = 0


@dataclass(frozen=True)
class Failed:
    """The whole request is over without an answer. kind: `timeout`, `cancelled` or `internal`."""

    kind: str
    message: str


News: TypeAlias = Piece | Done | Failed


class Refusal(Exception):
    """The engine takes no request now.

    after: seconds after which it is worth to ask again, None: not here, it is being shut down.
    """

    def __init__(self, message: str, after: float | None) -> None:
        super().__init__(message)
        self.after = after


@dataclass
class Ticket:
    """A request that was taken. `tell` is called by the engine's thread with everything that happens to it.

    broken: whether the model fails at it.  cached: tokens of its prompt that were known.
    """

    ask: Ask
    tell: Callable[[News], None]
    number: int = field(default_factory=lambda: next(_numbers))
    taken: float = field(default_factory=time.monotonic)
    broken: bool = False
    cached: int = 0
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for it any longer; the engine forgets it at the next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return self.ask.seconds is not None and time.monotonic() - self.taken > self.ask.seconds
