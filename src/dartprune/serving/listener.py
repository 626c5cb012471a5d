"""What the engine tells of its work, for counters of any kind."""

from __future__ import annotations

from dartprune.report import SequenceReport


class Listener:
    """Hears nothing; `metrics.py` has one that counts."""

    def queued(self) -> None:
        """A request was taken."""

    def refused(self) -> None:
        """A request was not taken: too many wait."""

    def began(self, waited: float) -> None:
        """A request's prompt is being read, after so many seconds in the queue."""

    def first_token(self, seconds: float) -> None:
        """A request got its first token, so many seconds after it was taken."""

    def step(self, lines: int, seconds: float) -> None:
        """A decoding step of so many sequences."""

    def ended(self, report: SequenceReport) -> None:
        """One sequence is over."""

    def finished(self, how: str, seconds: float) -> None:
        """A request is over: `ok`, `timeout`, `cancelled` or `internal`."""
