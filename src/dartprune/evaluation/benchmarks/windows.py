"""Sliding windows over a text: the first half of each is context, the second half is scored."""

from __future__ import annotations

from collections.abc import Sequence


def windows(tokens: Sequence[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text into contexts and what is scored after them; windows move on by half their size.

    Every token is scored once but for the first half-window of the text, which is context alone. A text shorter than a
    window is cut in its middle.

    Args:
        tokens: of the text; fewer than two give no window.
        size: tokens of a window, at least 2; an odd one is lowered by one.

    Raises:
        ValueError: a size below 2.
    """
    if size < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {size}")
    text = list(tokens)
    half = size // 2
    if len(text) <= 2 * half:
        middle = len(text) // 2
        return [(text[:middle], text[middle:])] if middle else []
    return [(text[i - half : i], text[i : i + half]) for i in range(half, len(text), half)]
