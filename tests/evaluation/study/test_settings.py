"""Settings of a study that cannot be."""

from __future__ import annotations

import pytest

from dartprune.evaluation.arms import parse_arms
from dartprune.evaluation.study.settings import Settings


def test_a_release_after_the_end():
    settings = Settings(before=40, after=60)
    settings.check_arms(parse_arms("dart-release@90", 0.7))
    with pytest.raises(ValueError, match=r"'dart-release@91': the text ends at decoded token 100"):
        settings.check_arms(parse_arms("dart-release@91", 0.7))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"before": 10}, "before the change has 10 decoded tokens, fewer than two windows of 10"),
        ({"after": 0}, "after the change has 0 decoded tokens"),
        ({"after": 55}, "multiple of the window"),
        ({"mode": "fre"}, "did you mean 'free'"),
        ({"spaces": ("attenton",)}, "did you mean 'attention'"),
        ({"layers": ()}, "at least one layer"),
        ({"prompt": 2}, "prompt must be at least 4"),
        ({"recovered": 0.0}, "recovered must lie"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_settings_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        Settings(**options)
