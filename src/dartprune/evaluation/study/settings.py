"""Settings of a study: how the text is laid out, what is looked at, and how it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dartprune.errors import UserError
from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.texts import JOIN
from dartprune.names import unknown

SPACES = ("attention", "residual")
MODES = ("forced", "free")


@dataclass(frozen=True)
class Settings:
    """One study.

    Decoded tokens are counted from 1: step d feeds one token and predicts the next. Steps 1 to `before` feed the first
    topic, the `after` steps that follow feed the second; so the change lies at decoded token `before`.

    mode: `forced` (given text) or `free` (the model writes).  sparsity: of every arm that prunes.
    prompt: tokens of the prompt, dense for every arm; in free mode each prompt has its own length.
    window: tokens of a window of the report.
    layers: `first`, `middle`, `last` or numbers.  spaces: `attention` (output of the layer's attention) and `residual`
    (residual stream before the FFN).  top: dimensions whose overlap is counted.
    early: tokens after the change within which a detection is early.
    horizon: tokens after a release, and at the end of the text, over which recovery is judged.
    recovered: share of the loss that must be regained.
    temperature: of free decoding, 0 is greedy.  seed: of the streams, of sampling and of the resampling.
    resamples: of the bootstrap.
    """

    mode: str = "forced"
    sparsity: float = 0.7
    prompt: int = 64
    before: int = 60
    after: int = 840
    window: int = 10
    layers: tuple[str, ...] = ("first", "middle", "last")
    spaces: tuple[str, ...] = SPACES
    top: int = 100
    early: int = 50
    horizon: int = 100
    recovered: float = 0.8
    temperature: float = 0.0
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        for space in self.spaces:
            if space not in SPACES:
                raise unknown("space", space, SPACES)
        if not self.spaces or not self.layers:
            raise UserError("nothing to look at: name at least one layer and one space")
        least = {"prompt": 4, "window": 1, "top": 1, "early": 1, "horizon": JOIN + 2, "resamples": 100, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value < smallest:
                raise UserError(f"{name} must be at least {smallest}, got {value}")
        for name in ("before", "after"):
            value = getattr(self, name)
            if value < 2 * self.window:
                raise UserError(
                    f"the text {name} the change has {value} decoded tokens, fewer than two windows of {self.window}"
                )
            if value % self.window:
                raise UserError(f"{name} must be a multiple of the window of {self.window} tokens, got {value}")
        if not 0 < self.recovered <= 1:
            raise UserError(f"recovered must lie in (0, 1], got {self.recovered}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must be at least 0, got {self.temperature}")

    @property
    def steps(self) -> int:
        """Decoded tokens of a text."""
        return self.before + self.after

    @property
    def join(self) -> slice:
        """Steps, from 0, whose losses are not compared: they predict the second topic's first tokens, see `texts.JOIN`.

        The first of them may be a separator. It is predicted by the last step that still feeds the first topic.
        """
        return slice(self.before - 1, self.before + min(JOIN, self.after // 2))

    @property
    def windows(self) -> int:
        """Windows of a text."""
        return self.steps // self.window

    def check_arms(self, arms: Sequence[ArmAt]) -> None:
        """ValueError for a release after the end of the text, or too near to it to be judged."""
        for arm in arms:
            if arm.release is not None and arm.release > self.steps - self.window:
                raise UserError(
                    f"arm {arm.name!r}: the text ends at decoded token {self.steps}, and a release needs a window of "
                    f"{self.window} tokens behind it"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        return data | {"layers": list(self.layers), "spaces": list(self.spaces)}
