"""Arms of the study by name: presets, `dart-relearn`, and the prompt's mask released at a decoded token.

`static` and `release@R` are DART but for what they do at a drift, so that up to then they are the same as `dart`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dartprune.names import unknown
from dartprune.pruner import Dart, Pruner, presets
from dartprune.refresh import Never, Relearn, Release

RELEASE = "release@"
RELEARN = "dart-relearn"
STATIC = "static"


@dataclass(frozen=True)
class Arm:
    """One way of decoding. release: decoded token at which its masks are dropped for good, None if at none."""

    name: str
    pruner: Pruner
    release: int | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned."""
        return not self.pruner.prunes

    @property
    def frozen(self) -> bool:
        """Whether the prompt's mask stays in force for ever; one that chooses for each token has no such mask."""
        return self.pruner.prunes and self.pruner.token is None and self.pruner.refresh.kind == "never"


def parse_arms(text: str, sparsity: float) -> list[Arm]:
    """Arms from a list such as `dense,static,release@100,200,...,600,dart`; `dense` is put first in any case.

    Args:
        text: names with commas between them; bare numbers after a `release@R` are further release times, and `...`
            between numbers goes on in the step of the two before it (in the step of the first if it stands alone).
        sparsity: of every arm that prunes.

    Raises:
        ValueError: an unknown or repeated name, or a release time that is none.
    """
    names = _expanded([part.strip() for part in text.split(",") if part.strip()])
    if not names:
        raise ValueError("no arms: write such as dense,static,release@100,200,...,600,dart")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"arm {twice[0]!r} is named twice")
    names = ["dense", *(name for name in names if name != "dense")]
    return [_arm(name, sparsity) for name in names]


def _expanded(parts: Sequence[str]) -> list[str]:
    """Full names; `release@100`, `200`, `...`, `600` become one name for each time."""
    names: list[str] = []
    times: list[int] = []  # of the release list under way
    step: int | None = None  # set while `...` waits for its end
    for part in parts:
        if part.startswith(RELEASE):
            times = [_time(part)]
            names.append(part)
        elif part == "..." and times:
            step = times[-1] - times[-2] if len(times) > 1 else times[-1]
        elif part.isdigit() and times:
            end = _time(RELEASE + part)
            if step is not None:
                if step < 1 or end <= times[-1]:
                    raise ValueError(f"release times must rise across '...', got {times} and then {end}")
                names += [f"{RELEASE}{time}" for time in range(times[-1] + step, end, step)]
                step = None
            times.append(end)
            names.append(f"{RELEASE}{end}")
        else:
            times = []
            names.append(part)
    if step is not None:
        raise ValueError("'...' needs a release time after it, as in release@100,200,...,600")
    return names


def _time(name: str) -> int:
    value = name.removeprefix(RELEASE)
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"arm {name!r}: a release needs a decoded token of at least 1, as in release@100")
    return int(value)


def _arm(name: str, sparsity: float) -> Arm:
    if name.startswith(RELEASE):
        at = _time(name)
        return Arm(name, Dart(sparsity=sparsity, refresh=Release(at=at)), at)
    if name == STATIC:
        return Arm(name, Dart(sparsity=sparsity, refresh=Never()))
    if name == RELEARN:
        return Arm(name, Dart(sparsity=sparsity, refresh=Relearn()))
    if name not in presets.names():
        raise unknown("arm", name, [*presets.names(), RELEARN, RELEASE + "100"])
    preset = presets.get(name)
    return Arm(name, preset(sparsity=sparsity if preset.prunes else 0.0))
