"""A pruning method as a value: scorer, budget, selection, refresh and detector, validated and serialisable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from dartprune.budget import Budget, DepthAware, budget_kinds
from dartprune.drift import AttentionDrift
from dartprune.errors import UserError, UserTypeError
from dartprune.names import unknown
from dartprune.refresh import Never, Refresh, refresh_kinds
from dartprune.scoring import scorer
from dartprune.selectors.settings import TokenSelector, token_kinds

VERSION = 1
SELECTIONS = ("topk", "threshold")
IMPACTS = ("ffn_output", "residual")
COMPENSATIONS = (None, "mean")


def choice(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check a value against the ones allowed; ValueError naming the nearest."""
    if value not in allowed:
        known = [str(a) for a in allowed]
        raise unknown(f"{name} for {owner}", value, known)


def whole(owner: str, name: str, value: object, least: int) -> None:
    """Check that a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{owner}: {name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True)
class Detector:
    """Settings of the drift detector; `build` gives its live form for one sequence (DART section 3.4).

    The defaults were chosen by measurement, see docs/choices.md. opening: tokens that the reference of a short prompt
    takes in from decoding before anything is judged. `Dart` has an opening of 64 and a delta of 1.0.
    """

    window: int = 8
    delta: float = 2.5
    min_drop: float = 0.02
    patience: int = 2
    leave_one_out: bool = True
    opening: int = 0

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> AttentionDrift:
        """A detector that has seen nothing yet; ValueError for settings that make no sense."""
        return AttentionDrift(**asdict(self))


@dataclass(frozen=True)
class Method:
    """What to prune, how much, and when to choose anew.

    sparsity: share of the FFN's neurons to leave out, in [0, 1).
    scorer: registered name, see `dartprune.scoring`.  decay: of the scorer `average`.  seed: of the scorer `random`.
    budget: neurons each layer keeps.  selection: `topk` or `threshold` (all with at least the mean score; no budget).
    refresh: what happens when the topic has moved.  detector: how that is noticed.
    start: decode forwards that stay dense and traced before the masks act.
    min_traced: tokens that must have been traced before a mask is made; a selector that needs no mask takes fewer.
    skip_first: tokens at the beginning of a text that do not count in the neuron statistics.
    impact: `ffn_output` or `residual`, see `dartprune.runtime.trace.impact_terms`.
    compensate: None, or `mean`: what dropped neurons gave on average stands in their place.
    token: None, or a selector that gives each token neurons of its own, see `dartprune.selectors`.
    """

    prunes: ClassVar[bool] = True

    sparsity: float = 0.7
    scorer: str = "magnitude"
    budget: Budget = field(default_factory=DepthAware)
    selection: str = "topk"
    refresh: Refresh = field(default_factory=Never)
    detector: Detector = field(default_factory=Detector)
    start: int = 0
    min_traced: int = 8
    skip_first: int = 1
    decay: float = 0.5
    seed: int = 0
    impact: str = "ffn_output"
    compensate: str | None = None
    token: TokenSelector | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        rho = self.sparsity
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not math.isfinite(rho) or not 0 <= rho < 1:
            raise UserError(
                f"{owner}: sparsity must be a number in [0, 1), got {rho!r}; 0.7 leaves out 70 % of the neurons"
            )
        scorer(self.scorer)
        choice(owner, "selection", self.selection, SELECTIONS)
        choice(owner, "impact", self.impact, IMPACTS)
        choice(owner, "compensate", self.compensate, COMPENSATIONS)
        whole(owner, "start", self.start, 0)
        whole(owner, "min_traced", self.min_traced, 1)
        whole(owner, "skip_first", self.skip_first, 0)
        whole(owner, "seed", self.seed, 0)
        if not 0 < self.decay < 1:
            raise UserError(f"{owner}: decay must lie in (0, 1), got {self.decay!r}")
        if not isinstance(self.refresh, Refresh):
            raise UserTypeError(f"{owner}: refresh must be a Refresh such as Replay() or Never(), got {self.refresh!r}")
        if not isinstance(self.detector, Detector):
            raise UserTypeError(f"{owner}: detector must be a Detector, got {self.detector!r}")
        if not isinstance(self.budget, Budget):
            raise UserTypeError(f"{owner}: budget must be a Budget such as Global(), got {self.budget!r}")
        self._check_token(owner)
        replay = self.refresh.replay_tokens
        if self.refresh.detects and replay % self.detector.window:
            raise UserError(
                f"{owner}: replay of {replay} tokens is no multiple of the detector's window of {self.detector.window}"
            )

    def _check_token(self, owner: str) -> None:
        if self.token is None:
            return
        if not isinstance(self.token, TokenSelector):
            raise UserTypeError(f"{owner}: token must be None or one such as TokenGate(), got {self.token!r}")
        kind = type(self.token).__name__
        if self.selection != "topk":
            raise UserError(f"{owner}: {kind} takes a number of neurons from the budget: selection must be 'topk'")
        if self.compensate is not None and not self.token.can_compensate:
            raise UserError(f"{owner}: {kind} drops other neurons for each token: compensate must be None")
        taught = self.token.context or self.token.learns or self.compensate is not None
        if not taught and self.refresh.replay_tokens:
            raise UserError(
                f"{owner}: {kind} learns nothing from the context, so a replay would change nothing: "
                "use refresh=Never()"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """What must be known of the context and the weights to make its masks, by the names of `dartprune.scoring`."""
        names = scorer(self.scorer).inputs if self.token is None or self.token.context else ()
        names += tuple(name for name in self.budget.inputs if name not in names)
        if self.compensate == "mean" and self.token is None:
            names = (*names, "total")
        return names if self.token is None else (*names, *self.token.statistics)

    @property
    def uses_context(self) -> bool:
        """Whether masks follow from what neurons and layers did in the context; a selector may learn besides."""
        return self.token is None or self.token.context or self.budget.context

    @property
    def least_traced(self) -> int:
        """Tokens that must have been traced before the first masks: `min_traced`, or what a selector makes do with."""
        if self.token is not None and not self.uses_context:
            return 1 if self.token.learns else 0
        return self.min_traced

    @property
    def name(self) -> str:
        """Name of the class, for people."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """A versioned plain dict of every setting; `from_dict` gives the same method back."""
        out: dict[str, Any] = {"version": VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("budget", "refresh") or (item.name == "token" and value is not None):
                value = {"kind": value.kind, **asdict(value)}
            elif item.name == "detector":
                value = asdict(value)
            out[item.name] = value
        return out


def settings_from(data: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a Method from its dict form; ValueError naming the nearest key for an unknown one."""
    if not isinstance(data, Mapping):
        raise UserTypeError(f"a pruner is read from a mapping of its settings, got {data!r}")
    known = [item.name for item in fields(Method)]
    for key in data:
        if key not in (*known, "version", "preset"):
            raise unknown("pruner setting", key, known)
    if data.get("version") != VERSION:
        given = f"pruner version {data['version']!r} is not known" if "version" in data else "the pruner has no version"
        raise UserError(f"{given}: this release reads version {VERSION}; write 'version': {VERSION}")
    out: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("version", "preset"):
            continue
        if key == "budget":
            value = _part("budget", budget_kinds.get(_kind("budget", value)), value)
        elif key == "refresh":
            value = _part("refresh", refresh_kinds.get(_kind("refresh", value)), value)
        elif key == "token" and value is not None:
            value = _part("token", token_kinds.get(_kind("token", value)), value)
        elif key == "detector":
            value = _part("detector", Detector, value)
        out[key] = value
    return out


def _kind(owner: str, value: Any) -> str:
    if not isinstance(value, Mapping) or "kind" not in value:
        raise UserError(f"{owner} must be a mapping with a 'kind', got {value!r}")
    return str(value["kind"])


def _part(owner: str, cls: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{owner} must be a mapping of its settings, got {value!r}")
    known = [item.name for item in fields(cls)]
    options = {key: v for key, v in value.items() if key != "kind"}
    for key in options:
        if key not in known:
            raise unknown(f"{owner} setting", key, known)
    return cls(**options)
