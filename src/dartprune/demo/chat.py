"""A chat model asked for two topics: what it writes dense and pruned, how fast, and what pruning costs it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.bench.stepping import TokenClock
from dartprune.evaluation.forced import forced_losses
from dartprune.pruner import Pruner
from dartprune.report import Report

INSTRUCTION = (
    "Write one paragraph about how honey bees live together in a hive. "
    "Then write one paragraph about the first landing on the Moon."
)


@dataclass
class Answer:
    """What one arm wrote and did.

    tokens: written.  rates: tokens a second of each repetition, from its median decode step.
    losses: of the dense model's own text as this arm decodes it, over dense, in nats, float32 [n]; zeros for dense.
    """

    name: str
    text: str
    tokens: int
    report: Report
    rates: list[float] = field(default_factory=list)
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu"))

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the repetitions; None for an answer of one token, which no decode step wrote."""
        return statistics.median(self.rates) if self.rates else None


def write_in_turn(
    model: nn.Module,
    tokenizer: Any,
    arms: Sequence[Pruner],
    prompt: Any,
    *,
    most: int,
    backend: str = "auto",
    repetitions: int = 3,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Answer]:
    """Let every arm answer greedily, in turn, and decode what the first one (dense) wrote.

    Args:
        model: in evaluation mode and free.
        tokenizer: its own.
        arms: methods; the first is dense.
        prompt: of `evaluation.texts.chat_prompt`.
        most: tokens to write at most.
        backend: how the pruned FFN is computed.
        repetitions: of the timing, in turn, so that a slow moment of the machine meets all arms.
        progress: told of tokens done.
    """
    found: list[Answer] = []
    whole: Tensor | None = None  # prompt and what the dense model wrote
    length = prompt["input_ids"].shape[1]
    for repetition in range(repetitions):
        for number, arm in enumerate(arms):
            clock = TokenClock()
            with torch.no_grad(), arm(model, backend=backend) as run:
                out = model.generate(  # type: ignore[operator]
                    **prompt, max_new_tokens=most, do_sample=False, streamer=clock, pad_token_id=tokenizer.pad_token_id
                )
                report = run.report()
            if repetition == 0:
                new = out[0, length:]
                text = tokenizer.decode(new, skip_special_tokens=True)
                found.append(Answer(arm.name, text, len(new), report))
                if number == 0:
                    whole = out
            found[number].rates += clock.rates
            progress(most)
    assert whole is not None
    base: Tensor | None = None
    for arm, written in zip(arms, found, strict=True):
        losses, _ = forced_losses(model, arm, whole, length, block=None, backend=backend, progress=progress)
        base = losses if base is None else base
        written.losses = (losses - base)[0]
    return found


def work_of(arms: int, most: int, repetitions: int = 3) -> int:
    """Tokens that `write_in_turn` tells of, at most."""
    return arms * most * (repetitions + 1)
