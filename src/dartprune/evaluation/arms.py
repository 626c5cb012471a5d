"""Named arms of an evaluation: each builds a pruner for a nominal sparsity.

Every preset is an arm by its own name. The others are variations of DART and masks calibrated beforehand; a name may
carry a number after `@`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dartprune.budget import DepthAware, Uniform
from dartprune.method import Detector
from dartprune.names import Registry, unknown
from dartprune.pruner import Dart, Pruner, Static, presets
from dartprune.refresh import Clock, Relearn, Release
from dartprune.scoring import register_scorer, scorer_names

WINDOW = 256  # tokens of one piece of a calibration text
LEAST = 64  # fewer tokens than this calibrate nothing
PIECES = 128  # of a longer text, spread evenly over it


@dataclass(frozen=True)
class Arm:
    """What is compared: `build` gives its pruner for a nominal sparsity in (0, 1)."""

    name: str
    build: Callable[[float], Pruner]
    prunes: bool = True


class Calibration:
    """Scores of all neurons over a text, from which masks are made that are the same for every sequence."""

    def __init__(self, model: Any, pieces: Sequence[Sequence[int]]) -> None:
        """Set up; nothing runs before a score is asked for.

        Args:
            model: a decoder in evaluation mode, not attached when a score is asked for.
            pieces: token sequences of the calibration text, see `cut`.
        """
        self.model = model
        self.pieces = [list(piece) for piece in pieces]
        self._known: dict[str, str] = {}

    def scorer(self, base: str) -> str:
        """Name of a scorer that gives what `base` gives over the calibration text, whatever the sequence.

        Args:
            base: a registered scorer that is the root of a sum over tokens: `magnitude` or `weight-aware`.
        """
        if base not in self._known:
            self._known[base] = _register(base, self._scores(base))
        return self._known[base]

    def _scores(self, base: str) -> dict[int, Tensor]:
        squares: list[Tensor] = []
        layers: list[int] = []
        with Static(scorer=base, budget=Uniform())(self.model, backend="masked") as run:
            for piece in self.pieces:
                tokens = torch.tensor([piece], device=next(self.model.parameters()).device)
                with torch.no_grad(), run.phase("prefill"):
                    cache = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
                part = [score.square().cpu() for score in run.scores(run.slots_of(cache)[0])]
                squares = part if not squares else [a + b for a, b in zip(squares, part, strict=True)]
            layers = [layer.index for layer in run.report().layers]
        return {index: total.sqrt() for index, total in zip(layers, squares, strict=True)}


def cut(tokens: Sequence[int]) -> list[list[int]]:
    """The pieces of a calibration text: at most 128 whole windows, or all of a text that is shorter than one.

    Raises:
        ValueError: too few tokens to calibrate anything.
    """
    if len(tokens) < LEAST:
        raise ValueError(f"the calibration text has {len(tokens)} tokens: give at least {LEAST}")
    starts = range(0, max(1, len(tokens) - WINDOW + 1), WINDOW)
    chosen = starts[:: -(-len(starts) // PIECES)]
    return [list(tokens[start : start + WINDOW]) for start in chosen]


def _register(base: str, tables: dict[int, Tensor]) -> str:
    """Make fixed scores known as a scorer; a process that has not calibrated them does not know the name."""
    digest = 0
    for index in sorted(tables):
        digest = zlib.crc32(tables[index].numpy().tobytes(), digest)
    name = f"calibrated-{base}-{digest:08x}"

    def fixed(layer: int) -> Tensor:
        return tables[layer]

    if name not in scorer_names():  # the digest is in the name: a known one has these very scores
        register_scorer(name)(fixed)
    return name


Builder = Callable[[float, int, Calibration | None], Pruner]


@dataclass(frozen=True)
class ArmKind:
    """A registered arm: what it is, how it is built, and the number it takes after `@`.

    build: (nominal sparsity, number, calibration) -> pruner.  number: None: takes none; 0: must be given; else default.
    """

    about: str
    build: Builder
    number: int | None = None
    calibrated: bool = False


arm_kinds: Registry[ArmKind] = Registry("arm")


def register_arm(
    name: str, about: str, *, number: int | None = None, calibrated: bool = False
) -> Callable[[Builder], Builder]:
    """Decorator: make an arm known by name."""

    def add(build: Builder) -> Builder:
        arm_kinds.register(name, ArmKind(about, build, number, calibrated))
        return build

    return add


@register_arm("clock-replay", "DART's masks and replays every N tokens instead of by the detector", number=16)
def _clock_replay(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    dart = Dart(sparsity=sparsity)
    refresh = dart.refresh
    return replace(
        dart, refresh=Clock(every=number, dense=None, replay=refresh.replay_tokens, memory=refresh.replay_memory)
    )


@register_arm("dart-depth-aware", "DART with the paper's budget, which looks at layers and not at neurons")
def _depth_aware(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    return Dart(sparsity=sparsity, budget=DepthAware())


@register_arm("dart-relearn", "DART with the paper's refresh: N dense tokens at an event", number=50)
def _relearn(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    return Dart(sparsity=sparsity, refresh=Relearn(tokens=number))


@register_arm("dart-release", "DART's first masks, dropped for good at decoded token N", number=0)
def _release(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    return Dart(sparsity=sparsity, refresh=Release(at=number))


@register_arm("dart-reference", "the settings of the authors' reference code, with N dense tokens", number=50)
def _reference(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    detector = Detector(window=5, delta=0.1, min_drop=0.1, patience=1, leave_one_out=False)
    budget = DepthAware(min_sparsity=0.1)
    return Dart(sparsity=sparsity, budget=budget, detector=detector, refresh=Relearn(tokens=number), compensate=None)


@register_arm("calibrated-magnitude", "one mask for ever: energy over a calibration text", calibrated=True)
def _calibrated_magnitude(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    return _calibrated("magnitude", sparsity, calibration)


@register_arm("calibrated-wanda", "one mask for ever: |a| * |W_down| over a calibration text", calibrated=True)
def _calibrated_wanda(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    return _calibrated("weight-aware", sparsity, calibration)


def _calibrated(base: str, sparsity: float, calibration: Calibration | None) -> Pruner:
    assert calibration is not None
    # nothing of the sequence decides: equal budgets, and not a token more traced than the mechanism wants
    return Static(sparsity=sparsity, scorer=calibration.scorer(base), budget=Uniform(), min_traced=1, skip_first=0)


def arm_names() -> dict[str, str]:
    """Every arm's name, as it is written, with what it is."""
    out = {name: (presets.get(name).__doc__ or "").split("\n")[0] for name in presets.names()}
    for name in arm_kinds.names():
        kind = arm_kinds.get(name)
        out[name if kind.number is None else f"{name}@N"] = kind.about
    return out


def default_arms() -> list[str]:
    """The arms that need nothing given, in the order of a table."""
    first = ["dense", "random", "griffin", "static", "clock", "clock-replay"]
    first += ["dart-reference", "dart-relearn", "dart-depth-aware", "dart"]
    return first + [name for name in presets.names() if name not in first]


def needs_calibration(name: str) -> bool:
    """Whether an arm is made from a calibration text."""
    return name in arm_kinds.names() and arm_kinds.get(name).calibrated


def arm(name: str, calibration: Calibration | None = None) -> Arm:
    """The arm of that name.

    Args:
        name: of a preset or a registered arm, with `@N` where the arm takes a number.
        calibration: for the calibrated arms.

    Raises:
        ValueError: an unknown name, with the nearest; a number missing, not whole or not wanted; no calibration.
    """
    head, at, tail = name.partition("@")
    if head in presets.names():
        if at:
            raise ValueError(f"arm {name!r}: {head} takes no number; write {head}")
        cls = presets.get(head)
        return Arm(name, lambda sparsity: cls(sparsity=sparsity) if cls.prunes else cls(), prunes=cls.prunes)
    if head not in arm_kinds.names():
        raise unknown("arm", head, [*presets.names(), *arm_kinds.names()])
    kind = arm_kinds.get(head)
    number = _number(name, head, at, tail, kind.number)
    if kind.calibrated and calibration is None:
        raise ValueError(
            f"arm {name!r} needs a calibration text: give --calibration FILE, which dartprune compare takes"
        )
    return Arm(name, lambda sparsity: kind.build(sparsity, number, calibration))


def check_arms(names: Sequence[str], *, calibrated: bool) -> None:
    """Check names before the long work; `calibrated`: whether a calibration text is given.

    Raises:
        ValueError: what `arm` would raise; a name twice; a calibration text that no arm is made from.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"every arm must be named once, got {', '.join(names)}")
    for name in names:
        arm(name, Calibration(None, []) if calibrated else None)  # stands in for the text until a model is there
    if calibrated and not any(needs_calibration(name) for name in names):
        known = ", ".join(name for name in arm_kinds.names() if arm_kinds.get(name).calibrated)
        raise ValueError(f"a calibration text is given, but no arm is made from it: add one of {known} to --method")


def _number(name: str, head: str, at: str, tail: str, default: int | None) -> int:
    if default is None:
        if at:
            raise ValueError(f"arm {name!r}: {head} takes no number; write {head}")
        return 0
    if not at:
        if default == 0:
            raise ValueError(f"arm {name!r} needs a number of tokens: write {head}@100")
        return default
    if not tail.isascii() or not tail.isdigit() or int(tail) < 1:
        raise ValueError(f"arm {name!r}: after @ comes a whole number of tokens of at least 1, as in {head}@100")
    return int(tail)
