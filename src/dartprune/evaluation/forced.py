"""Teacher-forced decoding: given tokens go through the decode path one by one, with the masks in force.

The context without its last token is prefilled dense and traced; the last context token and all that follow are decode
tokens, so that every scored token is computed as a decoded one would be (DART section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.errors import UserError
from dartprune.model.caches import handed
from dartprune.pruner import Pruner
from dartprune.report import Report
from dartprune.reporting.progress import Advance
from dartprune.run import Run

LONGEST_BLOCK = 64  # tokens of one forward
LARGEST_LOGITS = 1 << 26  # their elements


def forced_steps(
    model: nn.Module, run: Run, tokens: Tensor, context: int, *, block: int | None = 1, longest: int = LONGEST_BLOCK
) -> Iterator[tuple[int, Tensor]]:
    """Decode given texts on an attached model; the caller may look at the run between the steps.

    Args:
        model: the model that `run` is attached to.
        run: the run; its sequences are new ones.
        tokens: int64 [B, T], one text a line, no padding.
        context: tokens of each line that are given, at least 2.
        block: decode tokens of one forward; events act after a block, so 1 is exact for every method. None: as many as
            go before the next token at which a mask may change, up to rounding the same as one by one.
        longest: and not more tokens than that.

    Yields:
        position p of the first token that the logits are for, and logits [B, n, V] of the tokens p to p + n - 1.

    Raises:
        ValueError: a context that leaves nothing to score, or a block below 1.
    """
    length = int(tokens.shape[1])
    if not 2 <= context < length:
        raise UserError(f"context must lie between 2 and {length - 1} tokens for texts of {length}, got {context}")
    if block is not None and block < 1:
        raise UserError(f"block must be at least 1, got {block}")
    tokens = tokens.to(next(model.parameters()).device)
    cache = run.prefill(tokens[:, : context - 1])
    config: Any = model.config
    most = max(1, min(longest, LARGEST_LOGITS // (len(tokens) * config.get_text_config().vocab_size)))
    first = context - 1
    while first < length - 1:
        size = run.quiet_tokens(run.slots_of(cache), most) if block is None else block
        last = min(first + size, length - 1)
        with torch.no_grad(), run.phase("decode"):
            logits = model(input_ids=tokens[:, first:last], **handed(cache), use_cache=True).logits
        yield first + 1, logits
        first = last


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token in nats: logits [B, n, V], targets int64 [B, n] -> float32 [B, n]."""
    flat = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def step_losses(logits: Tensor, tokens: Tensor, position: int) -> Tensor:
    """Loss of the tokens [B, T] from `position` on, which logits [B, n, V] are for: float32 [B, n]."""
    return token_losses(logits, tokens[:, position : position + logits.shape[1]].to(logits.device))


def forced_losses(
    model: nn.Module,
    pruner: Pruner,
    tokens: Tensor,
    context: int,
    *,
    block: int | None = 1,
    backend: str = "auto",
    progress: Advance | None = None,
) -> tuple[Tensor, Report]:
    """Loss of each token after the context, as the pruned model decodes the text.

    Args: as of `forced_steps`, and
        pruner: attached to the model, which is in evaluation mode and free.
        backend: how the pruned FFN is computed.
        progress: called with the number of tokens done in each forward.

    Returns:
        float32 [B, T - context] in nats on the host, and the run's report.

    Raises:
        ValueError: a context that leaves nothing to score.
    """
    losses: list[Tensor] = []
    with pruner(model, backend=backend) as run:
        for position, logits in forced_steps(model, run, tokens, context, block=block):
            losses.append(step_losses(logits, tokens, position))
            if progress is not None:
                progress(logits.shape[1])
        report = run.report()
    return torch.cat(losses, dim=1).cpu(), report
