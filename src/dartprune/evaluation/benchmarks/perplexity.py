"""Perplexity over sliding windows: masks made from the first half of each window act on the other half."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dartprune.errors import UserError
from dartprune.evaluation.protocol import Protocol
from dartprune.evaluation.texts import opening
from dartprune.reporting.progress import Advance


def windows(tokens: Sequence[int], size: int, head: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
    """Cut a text into contexts and what is scored after them; windows move on by half their size.

    Every token is scored once but for the first half-window of the text, which is context alone. A text shorter than a
    window is cut in its middle.

    Args:
        tokens: of the text; fewer than two give no window.
        size: tokens of a window, at least 2; an odd one is lowered by one.
        head: begins every context and counts in its length, see `texts.opening`; the text's own is taken off before.

    Raises:
        ValueError: a size below 2.
    """
    if size < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {size}")
    text, first = list(tokens), list(head)
    if first and text[: len(first)] == first:
        text = text[len(first) :]
    half = size // 2
    context = half - len(first)
    if context < 1:
        raise ValueError(f"a window of {size} tokens has no room beside the {len(first)} that begin each")
    if len(text) <= half + context:
        middle = len(text) // 2
        return [(first + text[:middle], text[middle:])] if middle else []
    return [(first + text[i - context : i], text[i : i + half]) for i in range(context, len(text), half)]


def cut(documents: Sequence[str], tokenizer: Any, size: int, limit: int | None = None) -> list[tuple[Any, Any]]:
    """Windows over documents that are joined with a blank line.

    Args:
        documents: texts of one domain.
        tokenizer: of the model.
        size: tokens of a window.
        limit: windows to take at most, spread evenly over the text.

    Raises:
        ValueError: the text is too short for a window.
    """
    tokens = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
    cuts = windows(tokens, size, opening(tokenizer))
    if not cuts:
        raise UserError(f"the text has {len(tokens)} tokens: nothing is left to score after a context")
    if limit is not None and limit < len(cuts):
        cuts = [cuts[i * len(cuts) // limit] for i in range(limit)]
    return cuts


def perplexity(
    protocol: Protocol,
    parts: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Advance | None = None,
    head: Sequence[int] = (),
) -> dict[str, Any]:
    """Perplexity of the second halves of windows.

    Args:
        protocol: the arm on its model, new.
        parts: windows from `cut`.
        progress: called with the number of windows done.
        head: what begins every window, for the record.

    Returns:
        scores: `perplexity`.  errors: its standard error over windows.  did: what was pruned.  details: `loss` in nats
        per token, `tokens` scored, the loss of each window, and `begins_with`, the tokens at the head of each.
    """
    results = protocol.score(parts, progress)
    sizes = torch.tensor([float(len(answer)) for _, answer in parts])
    losses = torch.tensor([-result.logprob for result in results])
    loss = float(losses.sum() / sizes.sum())
    # of a ratio of sums, by its linear form
    spread = (losses - loss * sizes) / sizes.mean()
    count = len(parts)
    error = float(spread.square().sum().sqrt()) / count if count > 1 else 0.0
    return {
        "scores": {"perplexity": math.exp(loss)},
        "errors": {"perplexity": math.exp(loss) * error},
        "did": protocol.tally.to_dict(),
        "details": {
            "loss": loss,
            "loss_error": error,
            "tokens": int(sizes.sum()),
            "begins_with": list(head),
            "windows": [float(x) for x in losses / sizes],
        },
    }
