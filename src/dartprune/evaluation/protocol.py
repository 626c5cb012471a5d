"""The protocol that every arm is measured by: masks are in force for each token that is scored or written.

All of a context but its last token is prefilled dense and traced. The last context token and all that follow it are
decode tokens: teacher-forced to score given answers, freely chosen to write. So an answer of one token is already
pruned, where one forward over context and answer would compute it dense.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.evaluation.lines import Lines
from dartprune.evaluation.tally import Tally
from dartprune.pruner import Pruner
from dartprune.report import Report
from dartprune.reporting.progress import Advance
from dartprune.run import Run

PER_RUN = 256  # sequences until the model is attached anew: a run remembers each of them until its report
Tokens = tuple[int, ...]
T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True)
class Scored:
    """An answer: its log-probability in nats, and whether greedy decoding would have given it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Written:
    """A continuation, and what happened while it was decoded. tokens: without the end token that closed it."""

    tokens: list[int]
    realised_sparsity: float
    dense_tokens: int
    pruned_tokens: int
    events: int


@dataclass
class _Context:
    """A context and its answers. stems: the answers without their last token, each with (last token, where it is due).

    Answers that differ in the last token alone are decoded once: the same logits tell the probability of all of them.
    """

    tokens: Tokens
    stems: dict[Tokens, list[tuple[int, int]]] = field(default_factory=dict)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text, by the model's generation settings and by its tokenizer."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None})


class Protocol:
    """One pruner on one model, asked for scores and continuations; `tally` counts what was done."""

    def __init__(
        self, model: nn.Module, pruner: Pruner, *, padding: int, batch: int = 8, backend: str = "auto"
    ) -> None:
        """Set up; nothing is attached between calls.

        Args:
            model: a decoder in evaluation mode, not attached.
            pruner: the arm.
            padding: token that fills up shorter contexts of a batch.
            batch: contexts at a time; a context's answers come on top.
            backend: how the pruned FFN is computed.

        Raises:
            ValueError: a batch below 1.
        """
        if batch < 1:
            raise UserError(f"the batch must hold at least 1 context, got {batch}")
        self.model, self.pruner, self.padding, self.batch, self.backend = model, pruner, padding, batch, backend
        self.tally = Tally()

    def too_short(self, context: Sequence[int]) -> bool:
        """Whether no mask could be in force for the last token of a context."""
        return len(context) - 1 - self.pruner.skip_first < self.pruner.least_traced

    def score(
        self, questions: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Advance | None = None
    ) -> list[Scored]:
        """Score answers, each after its context; equal contexts are prefilled once.

        Args:
            questions: context and answer, both of at least one token.
            progress: called with the number of answers done.

        Returns:
            One result for each question, in their order.

        Raises:
            ValueError: an empty context or answer.
        """
        contexts: dict[Tokens, _Context] = {}
        for number, (before, answer) in enumerate(questions):
            if not before or not answer:
                raise UserError(f"question {number}: a context and an answer need at least one token each")
            context = contexts.setdefault(tuple(before), _Context(tuple(before)))
            context.stems.setdefault(tuple(answer[:-1]), []).append((answer[-1], number))
        self.tally.contexts += len(contexts)
        out: list[Scored | None] = [None] * len(questions)

        def work(run: Run | None, batch: list[_Context]) -> Lines:
            lines, results = self._score(run, batch)
            for number, result in results:
                out[number] = result
            if progress is not None:
                progress(len(results))
            return lines

        short = [context for context in contexts.values() if self.too_short(context.tokens)]
        long = [context for context in contexts.values() if not self.too_short(context.tokens)]
        self.tally.contexts_too_short += len(short)
        self._pruned(self._batches(long), work)
        self._plain(self._batches(short), work)
        assert all(result is not None for result in out)
        return [result for result in out if result is not None]

    def write(
        self,
        contexts: Sequence[Sequence[int]],
        most: int,
        *,
        ends: Sequence[int],
        stop: Callable[[list[int]], bool] | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
        progress: Advance | None = None,
    ) -> list[Written]:
        """Continue contexts token by token.

        Args:
            contexts: at least one token each; every one is decoded by itself, equal ones too.
            most: tokens to write at most.
            ends: end-of-sequence tokens.
            stop: looks at the tokens written so far and says whether they are enough.
            choose: gives the next token int64 [B] for logits [B, V]; None takes the most probable.
            progress: called with the number of contexts done.

        Raises:
            ValueError: an empty context, or nothing to write.
        """
        if most < 1:
            raise UserError(f"at least one token must be written, got {most}")
        if not all(contexts):
            raise UserError("a context needs at least one token")
        self.tally.contexts += len(contexts)
        out: dict[int, Written] = {}
        numbered = [(number, tuple(context)) for number, context in enumerate(contexts)]
        numbered.sort(key=lambda item: -len(item[1]))
        texts: list[tuple[int, list[int], int]] = []

        def work(run: Run | None, batch: list[tuple[int, Tokens]]) -> Lines:
            lines = Lines(self.model, run, [tokens for _, tokens in batch], self.padding)
            written = _continue(lines, most, frozenset(ends), stop, choose or _most_probable)
            texts.extend((number, *text) for (number, _), text in zip(batch, written, strict=True))
            if progress is not None:
                progress(len(batch))
            return lines

        short = [item for item in numbered if self.too_short(item[1])]
        long = [item for item in numbered if not self.too_short(item[1])]
        self.tally.contexts_too_short += len(short)
        reports = self._pruned(_cut(long, self.batch), work)
        # a report tells of its sequences in the order in which they were opened
        for (number, text, _), s in zip(texts, (s for report in reports for s in report.sequences), strict=True):
            out[number] = Written(text, s.realised_sparsity, s.dense_tokens, s.pruned_tokens, len(s.events))
        texts.clear()
        self._plain(_cut(short, self.batch), work)
        out |= {number: Written(text, 0.0, steps, 0, 0) for number, text, steps in texts}
        return [out[number] for number in range(len(contexts))]

    # ---- how the work is cut into batches and runs

    def _batches(self, contexts: Sequence[_Context]) -> Iterator[list[_Context]]:
        """Contexts of like length with the same number of lines: the run expands each to as many."""
        alike: dict[int, list[_Context]] = {}
        for context in sorted(contexts, key=lambda c: -len(c.tokens)):
            alike.setdefault(len(context.stems), []).append(context)
        for group in alike.values():
            yield from _cut(group, self.batch)

    def _pruned(self, batches: Iterable[T], work: Callable[[Run | None, T], Lines]) -> list[Report]:
        """Do the batches, attached anew from time to time; what each of these runs reported."""
        reports = []
        waiting = deque(batches)
        while waiting:
            forwards = sequences = 0
            with self.pruner(self.model, backend=self.backend) as run:
                while waiting and sequences < PER_RUN:
                    lines = work(run, waiting.popleft())
                    sequences += lines.opened
                    forwards += lines.forwards
                    del lines  # its cache keeps its slots open
                reports.append(run.report())
            self.tally.add(reports[-1], forwards)
        return reports

    def _plain(self, batches: Iterable[T], work: Callable[[Run | None, T], Lines]) -> None:
        """Do the batches with the model as it is."""
        for batch in batches:
            lines = work(None, batch)
            self.tally.add_dense(lines.tokens, lines.forwards)

    # ---- one batch

    def _score(self, run: Run | None, contexts: list[_Context]) -> tuple[Lines, list[tuple[int, Scored]]]:
        lines = Lines(self.model, run, [c.tokens for c in contexts], self.padding)
        lines.fan_out(len(contexts[0].stems))
        stems = [item for context in contexts for item in context.stems.items()]
        active = list(range(len(stems)))
        logits = lines.first()
        due: list[tuple[int, int]] = []  # stem and question of each probability; question -1: all of the stem's
        parts: list[Tensor] = []
        step = 0
        while True:
            rows, targets = [], []
            for row, number in enumerate(active):
                stem, lasts = stems[number]
                wanted = [(stem[step], -1)] if step < len(stem) else lasts
                rows += [row] * len(wanted)
                targets += [token for token, _ in wanted]
                due += [(number, question) for _, question in wanted]
            parts.append(_probabilities(logits, rows, targets))
            staying = [row for row, number in enumerate(active) if step < len(stems[number][0])]
            if not staying:
                break
            lines.keep(staying)
            active = [active[row] for row in staying]
            logits = lines.step(torch.tensor([stems[number][0][step] for number in active]))
            step += 1
        return lines, _collect(stems, due, torch.cat(parts, dim=1).cpu())


def _cut(items: Sequence[E], size: int) -> Iterator[list[E]]:
    yield from (list(items[i : i + size]) for i in range(0, len(items), size))


def _continue(
    lines: Lines,
    most: int,
    ends: frozenset[int],
    stop: Callable[[list[int]], bool] | None,
    choose: Callable[[Tensor], Tensor],
) -> list[tuple[list[int], int]]:
    """Tokens of each line, and its decode forwards."""
    texts: list[list[int]] = [[] for _ in range(len(lines))]
    steps = [1] * len(lines)
    active = list(range(len(lines)))
    logits = lines.first()
    while True:
        tokens = choose(logits)
        staying = []
        for row, (number, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token in ends:
                continue
            texts[number].append(token)
            if len(texts[number]) < most and not (stop is not None and stop(texts[number])):
                staying.append(row)
        if not staying:
            return list(zip(texts, steps, strict=True))
        lines.keep(staying)
        active = [active[row] for row in staying]
        for number in active:
            steps[number] += 1
        logits = lines.step(tokens[torch.tensor(staying, device=tokens.device)])


def _most_probable(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _probabilities(logits: Tensor, rows: list[int], targets: list[int]) -> Tensor:
    """Log-probability of tokens, and whether each is the most probable: logits [B, V] -> float32 [2, n]."""
    line = torch.tensor(rows, device=logits.device)
    token = torch.tensor(targets, device=logits.device)
    values = logits.float()
    logprob = values[line, token] - values.logsumexp(-1)[line]
    return torch.stack((logprob, (values.argmax(-1)[line] == token).float()))


def _collect(
    stems: list[tuple[Tokens, list[tuple[int, int]]]], due: list[tuple[int, int]], probabilities: Tensor
) -> list[tuple[int, Scored]]:
    """Answers from the probabilities of their tokens."""
    sums = [[0.0, 1.0] for _ in stems]
    last: dict[int, tuple[int, float, float]] = {}
    for (number, question), (logprob, greedy) in zip(due, probabilities.T.tolist(), strict=True):
        if question < 0:
            sums[number][0] += logprob
            sums[number][1] *= greedy
        else:
            last[question] = (number, logprob, greedy)
    return [
        (question, Scored(sums[number][0] + logprob, bool(sums[number][1] * greedy)))
        for question, (number, logprob, greedy) in last.items()
    ]
