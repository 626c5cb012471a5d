"""Whether pruning pays for a model on this machine: a short measurement of time and loss, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.bench.limits import amdahl
from dartprune.bench.share import ffn_share
from dartprune.bench.stepping import TokenClock
from dartprune.errors import UserError
from dartprune.evaluation.forced import forced_losses, token_losses
from dartprune.evaluation.stats import Interval, interval
from dartprune.evaluation.texts import chat_prompt
from dartprune.pruner import Pruner

INSTRUCTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a lost boat.",
    "Give me a recipe for a simple vegetable soup.",
    "Write a Python function that returns the prime numbers below n.",
    "Summarise what happened at the first landing on the Moon.",
    "What should I look at when I buy a used bicycle?",
)
PASSAGE = 64  # tokens of a passage that a model without a chat template goes on from
SHORTEST = 8  # tokens of an answer that count as one
SHARE_STEPS = 8


@dataclass(frozen=True)
class Allowance:
    """What is called worth it: at least so many times as fast, at most so many nats a token lost."""

    times: float = 1.05
    loss: float = 0.1


@dataclass(frozen=True)
class Trial:
    """One method at one sparsity; at 0 it leaves nothing out, and only the kernels for the rest of a step are tried."""

    arm: str
    sparsity: float
    pruner: Pruner


@dataclass
class Finding:
    """What one trial gave; refused: why it could not be attached, and then nothing else is known.

    realised: share of the FFN left out, over all decoded tokens.  bytes_saved: of its weights, left unread.
    tokens_per_second: from the median step.  times: as fast as the plain model in the same turn, median, least and
    most over the turns.  loss: over the plain model in nats a token, on what that wrote, interval over answers.
    slow_because: why no time is saved, None where it is.
    """

    arm: str
    sparsity: float
    refused: str | None = None
    realised: float = 0.0
    bytes_saved: float = 0.0
    tokens_per_second: float = 0.0
    times: Interval = field(default_factory=lambda: Interval(1.0, 1.0, 1.0))
    loss: Interval = field(default_factory=lambda: Interval(0.0, 0.0, 0.0))
    slow_because: str | None = None

    def pays(self, allowed: Allowance) -> bool:
        """Whether it is worth it."""
        return self.refused is None and self.times.value >= allowed.times and self.loss.value <= allowed.loss


@dataclass
class Advice:
    """All findings, and what they say.

    tokens_per_second: of the plain model.  ffn_share: of its step's time.  limit: times as fast as a step can become
    where the FFN takes no time at all.  answers, tokens: what the loss was measured on.
    """

    tokens_per_second: float
    ffn_share: float
    limit: float
    answers: int
    tokens: int
    allowed: Allowance
    findings: list[Finding]

    @property
    def best(self) -> Finding | None:
        """The quickest one that is worth it; one that leaves nothing out unless pruning wins more than that."""
        worth = [finding for finding in self.findings if finding.pays(self.allowed)]
        whole = [finding for finding in worth if not finding.sparsity]
        enough = self.allowed.times * max((finding.times.value for finding in whole), default=0.0)
        pruned = [finding for finding in worth if finding.sparsity and finding.times.value >= enough]
        return max(pruned or whole, key=lambda finding: finding.times.value, default=None)

    @property
    def sentences(self) -> list[str]:
        """The advice, and what it rests on."""
        basis = f"The loss is that of {self.tokens} tokens in {self.answers} answers of the model's own: a first look."
        best = self.best
        if best is not None and not best.sparsity:
            kernels = (
                f"Attach {best.arm} alone: {best.times.value:.2f} times as fast by the kernels for the rest of a step"
            )
            return [f"{kernels}; leaving out neurons adds less than {self.allowed.times:g} times to that.", basis]
        if best is not None:
            return [
                f"Use {best.arm} at {best.sparsity:g}: {best.times.value:.2f} times as fast, "
                f"{max(0.0, best.loss.value):.3f} nats a token lost.",
                basis,
            ]
        return ["Leave this model dense.", *self._against(), basis]

    def _against(self) -> list[str]:
        """Why nothing is worth it."""
        tried = [finding for finding in self.findings if finding.refused is None and finding.sparsity]
        if not tried:
            return ["No method could be attached."]
        because = [finding.slow_because for finding in tried]
        if all(because):
            return [f"No time is saved: {because[0]}."]
        quick = [finding for finding in tried if finding.times.value >= self.allowed.times]
        if not quick:
            share = f"the FFN takes {self.ffn_share:.0%} of a dense step, so {self.limit:.2f} is the most"
            return [f"Nothing is {self.allowed.times:g} times as fast: {share}."]
        near = min(quick, key=lambda finding: finding.loss.value)
        return [
            f"What is faster loses more than {self.allowed.loss:g} nats a token: the least, {near.arm} at "
            f"{near.sparsity:g}, {near.loss.value:.3f}."
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"best": None if self.best is None else asdict(self.best), "advice": self.sentences}


def prompts_of(tokenizer: Any, passages: Sequence[str]) -> list[Tensor]:
    """What a model is asked to go on from: instructions in its chat template, or else passages, int64 [1, T] each."""
    if tokenizer.chat_template is not None:
        return [chat_prompt(tokenizer, instruction)["input_ids"] for instruction in INSTRUCTIONS]
    return [tokenizer(text, return_tensors="pt")["input_ids"][:, :PASSAGE] for text in passages]


@torch.no_grad()
def advise(
    model: nn.Module,
    prompts: Sequence[Tensor],
    trials: Sequence[Trial],
    *,
    new: int = 64,
    turns: int = 3,
    allowed: Allowance | None = None,
    backend: str = "auto",
    progress: Callable[[int], None] = lambda tokens: None,
) -> Advice:
    """Measure every trial against the plain model: time in turn, loss on what the plain model writes.

    Args:
        model: a decoder in evaluation mode, not attached.
        prompts: int64 [1, T] each; the first one is decoded for the time.
        trials: what is tried.
        new: tokens that are decoded, for the time and of each answer.
        turns: of the timing.
        allowed: what is called worth it.
        backend: how the pruned FFN is computed.
        progress: told of tokens done, `work_of` in all.

    Raises:
        ValueError: a model that cannot be pruned, or whose answers end at once.
    """
    device = next(model.parameters()).device
    prompts = [prompt.to(device) for prompt in prompts]
    answers = [_written(model, prompt, new, progress) for prompt in prompts]
    pairs = [(p.shape[1], a) for p, a in zip(prompts, answers, strict=True) if a.shape[1] - p.shape[1] >= SHORTEST]
    if not pairs:
        raise UserError(f"the model ends every answer within {SHORTEST} tokens: nothing can be measured")
    base = [_plain_loss(model, context, text) for context, text in pairs]
    share = ffn_share(model, prompts[0], SHARE_STEPS)
    findings = [Finding(trial.arm, trial.sparsity) for trial in trials]
    rates: list[list[float]] = [[] for _ in trials]
    plain: list[float] = []
    for _ in range(turns):
        plain.append(_rate(model, prompts[0], new))
        progress(new)
        for trial, finding, mine in zip(trials, findings, rates, strict=True):
            if finding.refused is None:
                try:
                    mine.append(_attached_rate(model, trial.pruner, finding, prompts[0], new, backend))
                except UserError as error:
                    finding.refused = str(error)
            progress(new)
    for trial, finding, mine in zip(trials, findings, rates, strict=True):
        if finding.refused is None:
            _judge(model, trial.pruner, finding, pairs, base, backend, progress)
            times = [ours / theirs for ours, theirs in zip(mine, plain, strict=True)]
            finding.times = Interval(statistics.median(times), min(times), max(times))
            finding.tokens_per_second = statistics.median(mine)
    tokens = sum(text.shape[1] - context for context, text in pairs)
    limit = amdahl(share, 1.0)
    allowed = allowed or Allowance()
    return Advice(statistics.median(plain), share, limit, len(pairs), tokens, allowed, findings)


def work_of(trials: int, prompts: int, new: int, turns: int = 3) -> int:
    """Tokens that `advise` tells of, at most."""
    return new * (prompts + turns * (trials + 1) + trials * prompts)


def _written(model: Any, prompt: Tensor, new: int, progress: Callable[[int], None]) -> Tensor:
    """The prompt and what the plain model writes, int64 [1, T]."""
    out: Tensor = model.generate(prompt, max_new_tokens=new, do_sample=False)
    progress(new)
    return out


def _plain_loss(model: Any, context: int, text: Tensor) -> Tensor:
    """Mean loss of the unattached model on what follows the context, a scalar."""
    logits = model(input_ids=text).logits[:, context - 1 : -1]
    return token_losses(logits, text[:, context:]).mean()


def _rate(model: Any, prompt: Tensor, new: int) -> float:
    """Tokens a second of the median step."""
    clock = TokenClock()
    # no end, instead of a least length, for which all logits are looked through at each step
    model.generate(prompt, max_new_tokens=new, eos_token_id=None, do_sample=False, streamer=clock)
    return clock.rates[0]


def _attached_rate(model: Any, pruner: Pruner, finding: Finding, prompt: Tensor, new: int, backend: str) -> float:
    """The same with a method attached; what it left unread, and why no time is saved, are noted."""
    with pruner(model, backend=backend) as run:
        rate = _rate(model, prompt, new)
        report = run.report()
    finding.bytes_saved = report.bytes_saved
    if not report.saves_time:
        reasons = [reason for reasons in report.reasons.values() for reason in reasons]
        finding.slow_because = reasons[0] if reasons else f"the {report.backend} backend computes all neurons"
    return rate


def _judge(
    model: nn.Module,
    pruner: Pruner,
    finding: Finding,
    pairs: Sequence[tuple[int, Tensor]],
    base: Sequence[Tensor],
    backend: str,
    progress: Callable[[int], None],
) -> None:
    """The loss on the answers, and what was left out meanwhile."""
    over, realised, tokens = [], 0.0, 0
    for (context, text), dense in zip(pairs, base, strict=True):
        losses, report = forced_losses(model, pruner, text, context, block=None, backend=backend, progress=progress)
        over.append(float(losses.mean() - dense))
        count = losses.shape[1]
        realised += report.realised_sparsity * count
        tokens += count
    finding.loss = interval(over)
    finding.realised = realised / tokens
