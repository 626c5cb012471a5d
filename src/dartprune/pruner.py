"""Pruner: a method that can be put on a model; and the presets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

import dartprune
from dartprune.budget import Budget, DepthAware, Global, Uniform
from dartprune.errors import UserError, make_output_folder, read_user_text, user_file
from dartprune.method import Detector, Method, settings_from
from dartprune.names import Registry
from dartprune.refresh import Never, Periodic, Refresh, Replay
from dartprune.run import Run
from dartprune.selectors.settings import Exact, Sketch, TokenGate, TokenSelector
from dartprune.selectors.sketches import Progress, save_sketch

CARD, SKETCH = "dartprune.json", "dartprune-sketch.safetensors"  # in a folder: settings, and what was sketched


@dataclass(frozen=True)
class Pruner(Method):
    """A pruning method; call it on a transformers model for a `with` block, or use `attach`."""

    def __call__(self, model: nn.Module, *, backend: str = "auto") -> AbstractContextManager[Run]:
        """Prune `model` inside a `with` block; afterwards, also after an exception, it is what it was.

        Args:
            model: a decoder of transformers in evaluation mode.
            backend: how the pruned FFN is computed: `auto` or a name from `dartprune.ffn.backend_names()`.
        """
        return self._attached(model, backend)

    @contextmanager
    def _attached(self, model: nn.Module, backend: str) -> Iterator[Run]:
        run = self.attach(model, backend=backend)
        try:
            yield run
        finally:
            run.detach()

    def attach(self, model: nn.Module, *, backend: str = "auto", progress: Progress | None = None) -> Run:
        """Prune `model` until `run.detach()` is called. Raises ValueError or TypeError for what cannot be pruned.

        `progress` is told how many layers a token selector has made ready, of how many (a sketch takes a while).
        """
        return Run(self, model, backend=backend, progress=progress)

    def to_dict(self) -> dict[str, Any]:
        """A versioned plain dict of every setting; `Pruner.from_dict` gives the same pruner back."""
        data = super().to_dict()
        if type(self) in [presets.get(name) for name in presets.names()]:
            data["preset"] = presets.name_of(type(self))
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Pruner:
        """The pruner that a dict describes; ValueError naming the nearest key for an unknown one."""
        settings = settings_from(data)
        cls = presets.get(data["preset"]) if "preset" in data else Pruner
        return cls(**settings)

    def save_pretrained(
        self, folder: str | Path, model: nn.Module | None = None, *, progress: Progress | None = None
    ) -> None:
        """Write the settings to `folder/dartprune.json`, with a sketch's file beside them, as peft does for adapters.

        Args:
            folder: as of a model or of its own; it is made.
            model: whose sketch is written, for a `Sketch` with a number of bits and no file yet.
            progress: told how many layers are sketched, of how many.

        Raises:
            ValueError: nothing can be written there; a model without anything to sketch, or `bits="auto"`.
        """
        folder, data = Path(folder), {"dartprune": dartprune.__version__, **self.to_dict()}
        token = self.token if isinstance(self.token, Sketch) else None
        if model is not None and (token is None or token.file is not None or token.bits == "auto"):
            raise UserError("a model is given to write its sketch: that needs token=Sketch(bits=1 to 4) without a file")
        make_output_folder(folder)
        if token is not None and token.file is not None:
            with user_file(token.file):
                if Path(token.file).resolve() != (folder / SKETCH).resolve():
                    shutil.copyfile(token.file, folder / SKETCH)
        elif token is not None and model is not None:
            save_sketch(model, folder / SKETCH, int(token.bits), progress)
        if token is not None and (token.file is not None or model is not None):
            data["token"] = {**data["token"], "file": SKETCH}
        (folder / CARD).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def from_pretrained(folder: str | Path) -> Pruner:
        """The pruner whose settings lie in a folder, see `save_pretrained`; the file of its sketch is read from there.

        Raises:
            ValueError: there is no such file, it is no JSON, or its settings are none of a pruner.
        """
        path = Path(folder) / CARD
        if not path.is_file():
            raise UserError(f"{str(folder)!r} holds no {CARD}: give the folder that Pruner.save_pretrained() wrote")
        try:
            data = json.loads(read_user_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: no JSON ({error})") from error
        if not isinstance(data, dict):
            raise UserError(f"{path}: a pruner's settings are a JSON object, this is a {type(data).__name__}")
        data.pop("dartprune", None)
        token = data.get("token")
        if isinstance(token, dict) and token.get("file") == SKETCH:
            data["token"] = {**token, "file": str(path.with_name(SKETCH))}
        return Pruner.from_dict(data)


P = TypeVar("P", bound=type[Pruner])
presets: Registry[type[Pruner]] = Registry("method")


def register_preset(name: str) -> Any:
    """Class decorator: make a pruner known by name, to the command line too."""

    def add(cls: P) -> P:
        presets.register(name, cls)
        return cls

    return add


EARLY = Detector(delta=1.0, opening=64)  # for refreshes that cost a step or two, see docs/choices.md
RENEWAL = Replay(tokens=16, memory=0.6, settle=0, every=64)  # of what a prompt taught, see docs/token-selection.md


@register_preset("dart")
@dataclass(frozen=True)
class Dart(Pruner):
    """The paper's method with one ranking for all layers, `replay` at a drift, and the dropped neurons' mean in place.

    `budget=DepthAware()`, `refresh=Relearn()` and `compensate=None` are the paper's; docs/choices.md compares them.
    The detector is an early one, because a replay costs a step: with `Relearn`, whose alarms cost dense tokens,
    `Detector(opening=64)` raises fewer.
    """

    budget: Budget = field(default_factory=Global)
    refresh: Refresh = field(default_factory=Replay)
    detector: Detector = EARLY
    compensate: str | None = "mean"


@register_preset("static")
@dataclass(frozen=True)
class Static(Pruner):
    """DART's mask of the prompt for ever."""

    budget: Budget = field(default_factory=Global)
    refresh: Refresh = field(default_factory=Never)


@register_preset("griffin")
@dataclass(frozen=True)
class Griffin(Pruner):
    """GRIFFIN (arXiv 2404.01365): token-normalised score, the same budget in every layer, never refreshed."""

    scorer: str = "token-normalised"
    budget: Budget = field(default_factory=Uniform)


@register_preset("clock")
@dataclass(frozen=True)
class Clock(Pruner):
    """BWAP: maximum of the normalised activations; 8 dense tokens, then 16 pruned and 4 dense in turn."""

    scorer: str = "peak"
    budget: Budget = field(default_factory=Uniform)
    refresh: Refresh = field(default_factory=Periodic)
    start: int = 8


@register_preset("random")
@dataclass(frozen=True)
class Random(Pruner):
    """Neurons drawn once per sequence from a seed: the floor that every score must beat."""

    scorer: str = "random"
    budget: Budget = field(default_factory=Uniform)


@register_preset("per-token")
@dataclass(frozen=True)
class PerToken(Pruner):
    """Each token its own best neurons, known because all are computed: the ceiling of every selector (WINA, TEAL)."""

    budget: Budget = field(default_factory=Uniform)
    token: TokenSelector | None = field(default_factory=Exact)


@register_preset("gated-dart")
@dataclass(frozen=True)
class GatedDart(Dart):
    """DART whose masks name candidates: each token reads their gate rows and computes the best. No extra memory.

    Even the layers that matter least must name candidates, so the layers differ less than DART's.
    """

    budget: Budget = field(default_factory=lambda: DepthAware(spread=0.3))
    token: TokenSelector | None = field(default_factory=TokenGate)
    compensate: str | None = None  # each token drops others


@register_preset("sketch-dart")
@dataclass(frozen=True)
class SketchDart(Pruner):
    """Each token its own neurons, found by a low-bit sketch of the weights whose errors the prompt calibrates.

    `compensate="mean"`: what a neuron gave on average when tokens of the prompt dropped it stands for it; None: 0.
    What the prompt taught is renewed from the last 16 inputs, at a change of topic and after 64 tokens at the latest;
    `refresh=Never()` leaves it as it is, and stands by itself where nothing is taught.
    """

    budget: Budget = field(default_factory=Uniform)
    token: TokenSelector | None = field(default_factory=Sketch)
    compensate: str | None = "mean"
    refresh: Refresh = RENEWAL
    detector: Detector = EARLY

    def __post_init__(self) -> None:
        taught = self.compensate is not None or (self.token is not None and self.token.learns)
        if not taught and self.refresh == RENEWAL:
            object.__setattr__(self, "refresh", Never())
        super().__post_init__()


@register_preset("dense")
@dataclass(frozen=True)
class Dense(Pruner):
    """No pruning: the same counting and reporting around the plain model."""

    prunes = False
    sparsity: float = 0.0
    budget: Budget = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity != 0:
            raise UserError(f"Dense: sparsity is 0 by definition, got {self.sparsity!r}")
