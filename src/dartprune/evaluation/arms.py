"""The registry of arms: each builds a pruner for a nominal sparsity.

Every preset is an arm by its own name. The others are variations of DART and masks calibrated beforehand; a name may
carry a number after `@`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dartprune.budget import DepthAware, Uniform
from dartprune.errors import UserError
from dartprune.evaluation.calibration import Calibration
from dartprune.method import Detector
from dartprune.names import Registry, comma_list, unknown
from dartprune.pruner import Dart, Pruner, SketchDart, Static, presets
from dartprune.refresh import Never, Periodic, Relearn, Release

Builder = Callable[[float, int, Calibration | None], Pruner]
FORMER = {"release": "dart-release"}  # heads of names that were written otherwise


@dataclass(frozen=True)
class Arm:
    """What is compared: `build` gives its pruner for a nominal sparsity in (0, 1)."""

    name: str
    build: Callable[[float], Pruner]
    prunes: bool = True

    def at(self, sparsity: float) -> ArmAt:
        """The arm at one nominal sparsity."""
        return ArmAt(self.name, self.build(sparsity))


@dataclass(frozen=True)
class ArmAt:
    """An arm at one nominal sparsity."""

    name: str
    pruner: Pruner

    @property
    def frozen(self) -> bool:
        """Whether the prompt's mask stays in force for ever; one that chooses for each token has no such mask."""
        return self.pruner.prunes and self.pruner.token is None and self.pruner.refresh.kind == "never"

    @property
    def release(self) -> int | None:
        """Decoded token at which its masks are dropped for good; None for none."""
        refresh = self.pruner.refresh
        return refresh.at if isinstance(refresh, Release) else None


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
    replay, memory = dart.refresh.replay_tokens, dart.refresh.replay_memory
    return replace(dart, refresh=Periodic(every=number, dense=None, replay=replay, memory=memory))


@register_arm("dart-reference", "the settings of the authors' reference code, with N dense tokens", number=50)
def _reference(sparsity: float, number: int, calibration: Calibration | None) -> Pruner:
    detector = Detector(window=5, delta=0.1, min_drop=0.1, patience=1, leave_one_out=False)
    budget = DepthAware(min_sparsity=0.1)
    return Dart(sparsity=sparsity, budget=budget, detector=detector, refresh=Relearn(tokens=number), compensate=None)


register_arm("dart-depth-aware", "DART with the paper's budget, which looks at layers and not at neurons")(
    lambda sparsity, number, calibration: Dart(sparsity=sparsity, budget=DepthAware())
)
register_arm("dart-frozen", "DART up to its first event, and the prompt's masks for ever")(
    lambda sparsity, number, calibration: Dart(sparsity=sparsity, refresh=Never())
)
register_arm("dart-relearn", "DART with the paper's refresh: N dense tokens at an event", number=50)(
    # each alarm costs N dense tokens: the later detector
    lambda sparsity, number, calibration: Dart(
        sparsity=sparsity, refresh=Relearn(tokens=number), detector=Detector(opening=64)
    )
)
register_arm("dart-release", "DART's first masks, dropped for good at decoded token N", number=0)(
    lambda sparsity, number, calibration: Dart(sparsity=sparsity, refresh=Release(at=number))
)
register_arm("sketch-dart-frozen", "SketchDart with what the prompt taught for ever")(
    lambda sparsity, number, calibration: SketchDart(sparsity=sparsity, refresh=Never())
)
register_arm("sketch-dart-zero", "the same with 0 in the place of dropped neurons, not their mean")(
    lambda sparsity, number, calibration: SketchDart(sparsity=sparsity, refresh=Never(), compensate=None)
)
register_arm("calibrated-magnitude", "one mask for ever: energy over a calibration text", calibrated=True)(
    lambda sparsity, number, calibration: _calibrated("magnitude", sparsity, calibration)
)
register_arm("calibrated-wanda", "one mask for ever: |a| * |W_down| over a calibration text", calibrated=True)(
    lambda sparsity, number, calibration: _calibrated("weight-aware", sparsity, calibration)
)


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


def arm(name: str, calibration: Calibration | None = None) -> Arm:
    """The arm of that name.

    Args:
        name: of a preset or a registered arm, with `@N` where the arm takes a number.
        calibration: for the calibrated arms.

    Raises:
        ValueError: an unknown name, with the nearest; a number missing, not whole or not wanted; no calibration.
    """
    head, at, tail = name.partition("@")
    head = FORMER.get(head, head)
    if head in presets.names():
        if at:
            raise UserError(f"arm {name!r}: {head} takes no number; write {head}")
        cls = presets.get(head)
        return Arm(head, lambda sparsity: cls(sparsity=sparsity) if cls.prunes else cls(), prunes=cls.prunes)
    if head not in arm_kinds.names():
        raise unknown("method", head, [*presets.names(), *arm_kinds.names()])
    kind = arm_kinds.get(head)
    number = _number(name, head, at, tail, kind.number)
    if kind.calibrated and calibration is None:
        raise UserError(
            f"arm {name!r} needs a calibration text: give --calibration FILE, which dartprune compare takes"
        )
    return Arm(head + at + tail, lambda sparsity: kind.build(sparsity, number, calibration))


def _number(name: str, head: str, at: str, tail: str, default: int | None) -> int:
    if default is None:
        if at:
            raise UserError(f"arm {name!r}: {head} takes no number; write {head}")
        return 0
    if not at:
        if default == 0:
            raise UserError(f"arm {name!r} needs a number of tokens: write {head}@100")
        return default
    if not tail.isascii() or not tail.isdigit() or int(tail) < 1:
        raise UserError(f"arm {name!r}: after @ comes a whole number of tokens of at least 1, as in {head}@100")
    return int(tail)


# ---- several arms


def check_arms(names: Sequence[str], *, calibrated: bool) -> None:
    """Check names before the long work; `calibrated`: whether a calibration text is given.

    Raises:
        ValueError: what `arm` would raise; a name twice; a calibration text that no arm is made from.
    """
    check_once(names)
    for name in names:
        arm(name, Calibration(None, []) if calibrated else None)  # stands in for the text until a model is there
    known = [name for name in arm_kinds.names() if arm_kinds.get(name).calibrated]
    if calibrated and not set(known) & set(names):
        raise UserError(
            f"a calibration text is given, but no arm is made from it: add one of {', '.join(known)} to --method"
        )


def check_once(names: Sequence[str]) -> None:
    """ValueError for a name that stands twice."""
    if len(set(names)) < len(names):
        raise UserError(f"every arm must be named once, got {', '.join(names)}")


def arm_list(text: str) -> list[str]:
    """Names from a list such as `static,dart-release@100,200,...,600,dart`.

    Bare numbers after a `NAME@N` are further ones of that arm; `...` between numbers goes on in the step of the two
    before it, in the step of the first if that stands alone.

    Raises:
        ValueError: numbers that do not rise across `...`, or nothing after it.
    """
    names: list[str] = []
    numbers: list[int] = []  # of the arm whose list is under way
    step: int | None = None  # set while `...` waits for its end
    for part in comma_list(text):
        if part == "..." and numbers:
            step = numbers[-1] - numbers[-2] if len(numbers) > 1 else numbers[-1]
        elif part.isdigit() and numbers:
            base, end = names[-1].partition("@")[0], int(part)
            if step is not None:
                if step < 1 or end <= numbers[-1]:
                    raise UserError(f"numbers must rise across '...', got {numbers} and then {end}")
                names += [f"{base}@{number}" for number in range(numbers[-1] + step, end, step)]
                step = None
            numbers.append(end)
            names.append(f"{base}@{end}")
        else:
            number = part.partition("@")[2]
            numbers = [int(number)] if number.isdigit() else []
            names.append(part)
    if step is not None:
        raise UserError(f"'...' needs a number after it, as in {names[-1]},...,600")
    return names


def parse_arms(text: str, sparsity: float) -> list[ArmAt]:
    """The arms of a list, see `arm_list`, at one sparsity; `dense` is put first in any case.

    Raises:
        ValueError: what `arm_list` and `arm` raise; a name twice, or none.
    """
    names = arm_list(text)
    if not names:
        raise UserError("no arms: write such as dense,dart-frozen,dart-release@100,200,...,600,dart")
    arms = [arm(name).at(sparsity) for name in names]
    check_once([one.name for one in arms])
    return [arm("dense").at(0.0), *(one for one in arms if one.name != "dense")]


def arms_at(names: Sequence[str], sparsities: Sequence[float]) -> dict[str, Pruner]:
    """Every arm at every sparsity by name, such as `static 0.7`; one that does not prune stands there once.

    Raises:
        ValueError: an unknown arm, a sparsity outside [0, 1), or nothing asked for.
    """
    arms = [arm(name) for name in names]
    out = {one.name: one.build(0.0) for one in arms if not one.prunes}
    for sparsity in sparsities:
        out |= {f"{one.name} {sparsity:g}": one.build(sparsity) for one in arms if one.prunes}
    if not out:
        raise UserError("nothing to measure: give at least one method, and a sparsity if it prunes")
    return out
