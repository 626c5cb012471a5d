"""What one arm does on one batch of streams, against the dense model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.evaluation.forced import LONGEST_BLOCK, forced_steps, step_losses
from dartprune.pruner import Dense, Pruner
from dartprune.report import Report
from dartprune.reporting.progress import Advance

ALIKE = {torch.float32: 1e-5, torch.float64: 1e-10}  # mean change of loss, nats, that rounding alone may make
ALIKE_16_BIT = 2e-3


@dataclass
class Reference:
    """The dense model's answers on one batch of n scored tokens a stream, kept where the model is.

    log_probs: float16 [B, n, V], normalised again when read.  norms: float32 [B, n], what they are normalised by.
    best: int64 [B, n], the likeliest token.  losses: float32 [B, n] in nats.
    """

    log_probs: Tensor
    norms: Tensor
    best: Tensor
    losses: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.log_probs.nbytes + self.norms.nbytes + self.best.nbytes + self.losses.nbytes


@dataclass
class BatchMeasures:
    """One arm on one batch; float32 [B, n] on the host.

    losses: in nats.  divergence: KL(dense || arm) in nats.  agreement: 1 where the likeliest token is the dense one.
    short: streams whose prompt was too short to trace, so that decoding began dense.
    """

    losses: Tensor
    divergence: Tensor
    agreement: Tensor
    report: Report
    short: int


def reference(
    model: torch.nn.Module,
    tokens: Tensor,
    context: int,
    progress: Advance | None = None,
    *,
    block: int = LONGEST_BLOCK,
) -> Reference:
    """Decode streams int64 [B, T] with the plain model, block by block after `context` tokens, as every arm does.

    Args:
        model: a decoder in evaluation mode, not attached.
        tokens: of the streams.
        context: tokens of each that are given.
        progress: called with the number of tokens done in each forward.
        block: longest block of tokens that one forward decodes.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with Dense()(model) as run:
        for position, logits in forced_steps(model, run, tokens, context, block=None, longest=block):
            exact = logits.float().log_softmax(-1)
            half = exact.half()
            parts.append((half, half.float().logsumexp(-1), exact.argmax(-1), step_losses(logits, tokens, position)))
            if progress is not None:
                progress(logits.shape[1])
    return Reference(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def measure(
    model: torch.nn.Module,
    pruner: Pruner,
    tokens: Tensor,
    context: int,
    dense: Reference,
    *,
    backend: str = "masked",
    progress: Advance | None = None,
    block: int = LONGEST_BLOCK,
) -> BatchMeasures:
    """Decode streams teacher-forced with a pruner and compare every token's distribution with the dense one.

    Args: as of `reference`, of the same streams; backend: how the pruned FFN is computed.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    short = 0
    with pruner(model, backend=backend) as run:
        for position, logits in forced_steps(model, run, tokens, context, block=None, longest=block):
            if not parts and pruner.prunes and pruner.start == 0:
                short = sum(sequence.dense_tokens > 0 for sequence in run.report().sequences)
            ours = logits.float().log_softmax(-1)
            at = slice(position - context, position - context + logits.shape[1])
            theirs = dense.log_probs[:, at].float() - dense.norms[:, at, None]
            apart = (theirs.exp() * (theirs - ours)).sum(-1)
            alike = (ours.argmax(-1) == dense.best[:, at]).float()
            parts.append((step_losses(logits, tokens, position), apart, alike))
            if progress is not None:
                progress(logits.shape[1])
        report = run.report()
    losses, divergence, agreement = (torch.cat(column, dim=1).cpu() for column in zip(*parts, strict=True))
    return BatchMeasures(losses, divergence, agreement, report, short)


def check_masks(name: str, nominal: float, measured: BatchMeasures, dense: Reference, dtype: torch.dtype) -> None:
    """ValueError for an arm that says it prunes, with a nominal sparsity above 0, and does not.

    Args:
        name: of the arm.
        nominal: the sparsity it was built for.
        measured: what it did on the streams of `dense`.
        dense: the same streams, dense.
        dtype: of the model's weights, which decides what may be rounding.
    """
    report = measured.report
    if nominal <= 0:
        return
    if report.pruned_tokens == 0 or report.realised_sparsity <= 0:
        raise UserError(
            f"arm {name!r} was built for a sparsity of {nominal:g} and pruned none of {report.dense_tokens} decoded "
            "tokens: it would be compared as dense; give longer prompts or streams, or leave it out"
        )
    change = float((measured.losses - dense.losses.cpu()).abs().mean())
    if change <= ALIKE.get(dtype, ALIKE_16_BIT):
        raise UserError(
            f"arm {name!r} reports a realised sparsity of {report.realised_sparsity:.3f}, but its losses are the dense "
            f"model's (mean change {change:.1e} nats): its masks do not act; it cannot be compared"
        )
