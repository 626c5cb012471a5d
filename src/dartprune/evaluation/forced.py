"""Teacher-forced decoding: given tokens go through the decode path one by one, with the masks in force.

The context without its last token is prefilled dense and traced; the last context token and all that follow are decode
tokens, so that every scored token is computed as a decoded one would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dartprune.pruner import Pruner
from dartprune.report import Report


@torch.no_grad()
def forced_losses(
    model: nn.Module,
    pruner: Pruner,
    tokens: Tensor,
    context: int,
    *,
    block: int = 1,
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Report]:
    """Loss of each token after the context, as the pruned model decodes the text.

    Args:
        model: a decoder in evaluation mode, not attached.
        pruner: what to attach.
        tokens: int64 [B, T], one text a line, no padding.
        context: tokens of each line that are given, at least 2.
        block: decode tokens of one forward; events act after a block, so 1 is exact for every method.
        backend: how the pruned FFN is computed.
        progress: called with the number of tokens done in each forward.

    Returns:
        float32 [B, T - context] in nats on the host, and the run's report.

    Raises:
        ValueError: a context that leaves nothing to score.
    """
    length = int(tokens.shape[1])
    if not 2 <= context < length:
        raise ValueError(f"context must lie between 2 and {length - 1} tokens for texts of {length}, got {context}")
    losses: list[Tensor] = []
    tokens = tokens.to(next(model.parameters()).device)
    with pruner(model, backend=backend) as run:
        with run.phase("prefill"):
            cache: Any = model(input_ids=tokens[:, : context - 1], use_cache=True, logits_to_keep=1).past_key_values
        with run.phase("decode"):
            for first in range(context - 1, length - 1, block):
                last = min(first + block, length - 1)
                logits = model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True).logits
                target = tokens[:, first + 1 : last + 1]
                flat = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), target.flatten(), reduction="none"
                )
                losses.append(flat.view(target.shape))
                if progress is not None:
                    progress(last - first)
        report = run.report()
    return torch.cat(losses, dim=1).cpu(), report
