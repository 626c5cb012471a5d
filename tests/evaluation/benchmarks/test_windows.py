"""Windows score every token once, but for the first half-window."""

from __future__ import annotations

import pytest

from dartprune.evaluation.benchmarks.windows import windows


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 12, 13, 31])
def test_every_token_once(length):
    text = list(range(length))
    found = windows(text, 8)
    scored = [token for _, answer in found for token in answer]
    assert scored == text[length - len(scored) :]
    assert len(scored) == (length - 4 if length > 8 else length - length // 2)
    for context, answer in found:
        assert len(context) == (4 if length > 8 else length // 2) and 1 <= len(answer) <= 4
        assert context + answer == text[context[0] : context[0] + len(context) + len(answer)]


def test_no_window():
    assert windows([1], 8) == [] and windows([], 8) == []
    assert windows(list(range(10)), 5) == windows(list(range(10)), 4)
    with pytest.raises(ValueError, match="at least 2"):
        windows([1, 2, 3], 1)
