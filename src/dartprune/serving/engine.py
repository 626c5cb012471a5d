"""The loop: requests join and leave one decoding batch, each with a slot of its own in the run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartprune.model.context import context_length
from dartprune.report import SequenceReport
from dartprune.run import Run
from dartprune.serving.drawing import Drawer, chance
from dartprune.serving.joined import can_join
from dartprune.serving.lines import Batches, Line
from dartprune.serving.listener import Listener
from dartprune.serving.prompts import Prompt, PromptReader
from dartprune.serving.queue import FairQueue
from dartprune.serving.request import Ask, Done, Failed, Figures, News, Piece, Refusal, Ticket
from dartprune.serving.words import Words

log = logging.getLogger("dartprune.serving")
GUESS = 1.0  # seconds that a request may take, before any has been seen


@dataclass(frozen=True)
class Limits:
    """What the operator allows.

    batch: sequences that decode together.  queue: requests that wait.  chunk: prompt tokens read between two steps of
    the others.  tokens: of a request's prompt and answer together, None for what the model's context holds.
    invariant: whether a line's bits may not depend on what else decodes.  prefix_bytes: for beginnings of prompts that
    are kept, 0 for none.
    """

    batch: int = 16
    queue: int = 256
    chunk: int = 256
    tokens: int | None = None
    invariant: bool = False
    prefix_bytes: int = 256 << 20


@dataclass
class Live:
    """A request of which some choices are not over."""

    ticket: Ticket
    left: int


class Engine:
    """Decodes for many at once, in a thread of its own; `submit` and `cancel` may be called from any."""

    def __init__(
        self, model: Any, tokenizer: Any, run: Run, limits: Limits | None = None, listener: Listener | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.run = run
        self.tokenizer = tokenizer
        context, asked = context_length(model), self.limits.tokens
        self.context = min(size for size in (context, asked, 1 << 62) if size is not None)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dense_above: int | None = None  # sequences; None: never
        self.listener = listener or Listener()
        self._model = model
        self.most = self.limits.batch  # sequences at a time
        self.separate, key = self._apart(model)
        self._batches = Batches(key)
        # only caches that hold every token can be cut
        self._reader = PromptReader(model, run, self.limits.chunk, self.limits.prefix_bytes if can_join(model) else 0)
        self._ends = _ends(model, tokenizer)
        self._queue = FairQueue(self.limits.queue)
        self._wake = threading.Condition()
        self._prompts: list[Prompt] = []
        self._live: dict[int, Live] = {}
        self._closing = False
        self._seconds = GUESS  # that a request takes, smoothed
        self._thread = threading.Thread(target=self._work, name="dartprune-engine", daemon=True)

    @property
    def together(self) -> int:
        """Sequences that may share a forward."""
        return 1 if self.separate else self.most

    def _apart(self, model: Any) -> tuple[str | None, Callable[[Line], Hashable]]:
        """Why lines decode one by one, None if they do not; and which may share a forward."""
        if not can_join(model):
            return "this model's caches cannot be joined", lambda line: line.slot
        if not self.limits.invariant:
            return None, lambda line: None
        reason = self.run.make_batch_invariant()
        if reason is None:
            return None, lambda line: self.run.sequences.will_prune(line.slot)
        return f"for batch invariance {reason}", lambda line: line.slot

    # ---- from any thread

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def well(self) -> bool:
        """Whether requests are taken and worked on."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def decoding(self) -> int:
        """Sequences that decode, or whose prompt is being read."""
        return len(self._batches) + len(self._prompts)

    def submit(self, ask: Ask, tell: Callable[[News], None]) -> Ticket:
        """Take a request; `tell` hears of it from the engine's thread.

        Raises:
            Refusal: the queue is full, or the engine is being shut down.
        """
        ticket = Ticket(ask, tell)
        with self._wake:  # or the thread might end between the look and the put
            if self._closing:
                raise Refusal("the server is shutting down", None)
            taken = self._queue.put(ticket)
            self._wake.notify()
        if not taken:
            after = max(1.0, self._seconds * len(self._queue) / max(1, self.most))
            self.listener.refused()
            raise Refusal(f"{self.limits.queue} requests are waiting already", after)
        self.listener.queued()
        return ticket

    def close(self, seconds: float | None = None) -> bool:
        """Finish what was taken, take no more; False if that was not done within so many seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Forget all that was taken and is not done."""
        for ticket in self._queue.all() + [live.ticket for live in list(self._live.values())]:
            ticket.cancel()

    # ---- the loop

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._queue.peek() or self._prompts or len(self._batches) or self._closing):
                    self._wake.wait(1.0)
                if self._closing and not (self._queue.peek() or self._prompts or len(self._batches)):
                    self._reader.prefixes.clear()
                    return
            try:
                self._drop_gone()
                self._admit()
                if self._prompts:
                    self._read(self._prompts[0])
                if len(self._batches):
                    self._step()
            except Exception:
                # a fault of ours or of the model: those who wait are told, and the others after them served
                log.exception("a decoding step failed")
                self._fail_all()

    def _drop_gone(self) -> None:
        """Forget requests that were cancelled or took too long."""
        for ticket in self._queue.sweep():
            self._fail(ticket)
        for ticket in [live.ticket for live in self._live.values()]:
            if ticket.cancelled or ticket.late or ticket.broken:
                self._leave([line for line in self._batches.lines if line.ticket is ticket], answered=False)
                for prompt in [prompt for prompt in self._prompts if prompt.ticket is ticket]:
                    self._prompts.remove(prompt)
                    self.run.sequences.close([prompt.slot])
                self._fail(ticket)

    def _admit(self) -> None:
        """Begin with the next requests while there is room for all of their choices."""
        taken = len(self._batches) + sum(prompt.ticket.ask.choices for prompt in self._prompts)
        while (ticket := self._queue.peek()) is not None:
            if taken and taken + ticket.ask.choices > self.most:
                return
            self._queue.pop()
            self._live[ticket.number] = Live(ticket, ticket.ask.choices)
            self._prompts.append(self._reader.open(ticket, dense=self._is_dense(taken + ticket.ask.choices)))
            self.listener.began(time.monotonic() - ticket.taken)
            taken += ticket.ask.choices

    def _read(self, prompt: Prompt) -> None:
        """Read the next chunk of a prompt; after the last one its choices begin."""
        logits = self._reader.read(prompt)
        if logits is not None:
            self._prompts.remove(prompt)
            self._begin(prompt, logits)

    def _begin(self, prompt: Prompt, logits: Tensor) -> None:
        """The prompt is read: its choices join the batch, each with its first token."""
        ask = prompt.ticket.ask
        slots = (prompt.slot, *self.run.sequences.fork([prompt.slot] * (ask.choices - 1)))
        self.listener.first_token(time.monotonic() - prompt.ticket.taken)
        lines = [
            Line(prompt.ticket, choice, slot, Words(self.tokenizer, ask.prompt, ask.stop), Drawer(ask.sampling, choice))
            for choice, slot in enumerate(slots)
        ]
        self._batches.add(prompt.cache, len(ask.prompt), lines)
        self._leave([line for line in lines if not self._advance(line, logits)])

    def _step(self) -> None:
        """One token of every line."""
        began = time.monotonic()
        self._batches.sort()
        many, over = len(self._batches), []
        for batch in self._batches:
            inputs = batch.joined.inputs([line.token for line in batch.lines], self._model.device)
            slots = tuple(line.slot for line in batch.lines)
            paused = self.run.dense() if self._is_dense(many) else nullcontext()
            with paused, self.run.phase("decode", slots=slots):
                logits = self._model(**inputs).logits[:, -1].float().cpu()
            batch.joined.grew()
            over += [line for line, row in zip(batch.lines, logits, strict=True) if not self._advance(line, row)]
        self.listener.step(many, time.monotonic() - began)
        self._leave(over)

    def _is_dense(self, lines: int) -> bool:
        """Whether so many sequences decode dense."""
        return self.dense_above is not None and lines > self.dense_above

    def _advance(self, line: Line, logits: Tensor) -> bool:
        """Draw a line's next token and tell of it; False where the line is over with it."""
        ask = line.ticket.ask
        if not math.isfinite(float(logits.max())):
            line.ticket.broken = True  # the request ends before the next step; the others go on
            return True
        line.token = token = line.drawer.draw(logits)
        line.tokens += 1
        last = line.tokens >= ask.most
        over = token in self._ends
        text = line.words.end() if over else line.words.add(token, last=last)
        chances = () if ask.logprobs is None or over else (chance(logits, token, ask.logprobs),)
        figures = self._figures(line) if ask.watch else None
        if text or chances or figures is not None:
            self._tell(line.ticket, Piece(line.choice, text, chances, figures))
        return not (over or last or line.words.stopped)

    def _figures(self, line: Line) -> Figures:
        report = self.run.sequences.report(line.slot)
        kept, neurons = report.keep, [layer.neurons for layer in self.run.layers]
        active = None if kept is None else tuple(count / of for count, of in zip(kept, neurons, strict=True))
        events = tuple(event.decoded for event in report.events)
        return Figures(report.dense_tokens + report.pruned_tokens, tuple(report.similarities), events, active)

    # ---- ends

    def _leave(self, lines: Sequence[Line], *, answered: bool = True) -> None:
        """Take lines out of the batch; with `answered` their requests are told that they are over."""
        if not lines:
            return
        self._batches.drop(lines)
        for line, report in zip(lines, self.run.sequences.close([line.slot for line in lines]), strict=True):
            if answered:
                self._finish(line, report)

    def _finish(self, line: Line, report: SequenceReport) -> None:
        ticket = line.ticket
        ended = line.token in self._ends
        reason = "stop" if ended or line.words.stopped else "length"
        self.listener.ended(report)
        live = self._live[ticket.number]
        live.left -= 1
        if not live.left:
            del self._live[ticket.number]
            took = time.monotonic() - ticket.taken
            self._seconds = 0.9 * self._seconds + 0.1 * took
            self.listener.finished("ok", took)
        # last: who hears of it may look at what was counted
        cached = 0 if line.choice else ticket.cached
        self._tell(ticket, Done(line.choice, reason, line.tokens - ended, report, cached))

    def _fail(self, ticket: Ticket) -> None:
        """Tell a request whose time is over, that nobody waits for, or that the model fails at."""
        self._live.pop(ticket.number, None)
        if ticket.cancelled:
            kind, message = "cancelled", "the client is gone"
        elif ticket.broken:
            kind, message = "internal", "the model's logits for this request were not finite"
        else:
            kind, message = "timeout", f"the request took longer than {ticket.ask.seconds:g} seconds"
        self.listener.finished(kind, time.monotonic() - ticket.taken)
        self._tell(ticket, Failed(kind, message))

    def _fail_all(self) -> None:
        """After an error nothing is known of what is under way: all of it ends."""
        tickets = [live.ticket for live in self._live.values()]
        slots = [line.slot for line in self._batches.lines] + [prompt.slot for prompt in self._prompts]
        self._batches.drop(self._batches.lines)
        self._prompts = []
        self._reader.prefixes.clear()
        self._live.clear()
        for slot in slots:
            with suppress(ValueError):  # it may be closed by now
                self.run.sequences.close([slot])
        for ticket in tickets:
            self.listener.finished("internal", time.monotonic() - ticket.taken)
            self._tell(ticket, Failed("internal", "the server failed while it worked on this request"))

    def _tell(self, ticket: Ticket, news: News) -> None:
        try:
            ticket.tell(news)
        except RuntimeError:
            # the loop that listened is closed
            ticket.cancel()


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id if model.can_generate() else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else map(int, ends))
