"""Counters in Prometheus' form."""

from __future__ import annotations

import threading
import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from typing_extensions import override

from dartprune.report import SequenceReport
from dartprune.serving.listener import Listener

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
WINDOW = 10.0  # seconds over which tokens a second are counted


class Metrics(Listener):
    """Counts what the engine tells."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("dartprune_requests", "Requests by their end", ["outcome"], registry=registry)
        self.tokens = Counter(
            "dartprune_tokens", "Decoded tokens of sequences that are over", ["ffn"], registry=registry
        )
        self.prompt_tokens = Counter("dartprune_prompt_tokens", "Prompt tokens read", registry=registry)
        self.refreshes = Counter("dartprune_refreshes", "Mask refreshes", registry=registry)
        self.sparsity = Gauge(
            "dartprune_realised_sparsity",
            "Share of the FFN left out, over all tokens of ended sequences",
            registry=registry,
        )
        self.rate = Gauge("dartprune_tokens_per_second", f"Decoded over the last {WINDOW:g} s", registry=registry)
        self.waiting = Gauge("dartprune_requests_waiting", "Requests in the queue", registry=registry)
        self.decoding = Gauge("dartprune_sequences_decoding", "Sequences in the batch or being read", registry=registry)
        self.queue_seconds = self._histogram("queue", "In the queue")
        self.first_token_seconds = self._histogram("first_token", "From taken to the first token")
        self.token_seconds = self._histogram("token", "Of one decoding step, each sequence's next token")
        self.request_seconds = self._histogram("request", "From taken to the end")
        self._lock = threading.Lock()
        self._steps: deque[tuple[float, int]] = deque()
        self._saved = self._decoded = 0.0
        for outcome in ("ok", "refused", "timeout", "cancelled", "internal"):
            self.requests.labels(outcome)

    def _histogram(self, what: str, said: str) -> Histogram:
        return Histogram(f"dartprune_{what}_seconds", said, buckets=_SECONDS, registry=self.registry)

    def page(self, waiting: int, decoding: int) -> bytes:
        """All of it as text, with what stands now."""
        self.waiting.set(waiting)
        self.decoding.set(decoding)
        with self._lock:
            self._forget(time.monotonic())
            self.rate.set(sum(lines for _, lines in self._steps) / WINDOW)
        return generate_latest(self.registry)

    @override
    def refused(self) -> None:
        self.requests.labels("refused").inc()

    @override
    def began(self, waited: float) -> None:
        self.queue_seconds.observe(waited)

    @override
    def first_token(self, seconds: float) -> None:
        self.first_token_seconds.observe(seconds)

    @override
    def step(self, lines: int, seconds: float) -> None:
        self.token_seconds.observe(seconds)
        now = time.monotonic()
        with self._lock:
            self._steps.append((now, lines))
            self._forget(now)

    def _forget(self, now: float) -> None:
        while self._steps and now - self._steps[0][0] > WINDOW:
            self._steps.popleft()

    @override
    def ended(self, report: SequenceReport) -> None:
        self.tokens.labels("dense").inc(report.dense_tokens)
        self.tokens.labels("pruned").inc(report.pruned_tokens)
        self.prompt_tokens.inc(report.prompt_tokens)
        self.refreshes.inc(len(report.events))
        tokens = report.dense_tokens + report.pruned_tokens
        self._saved += report.realised_sparsity * tokens
        self._decoded += tokens
        self.sparsity.set(self._saved / self._decoded if self._decoded else 0.0)

    @override
    def finished(self, how: str, seconds: float) -> None:
        self.requests.labels(how).inc()
        self.request_seconds.observe(seconds)
