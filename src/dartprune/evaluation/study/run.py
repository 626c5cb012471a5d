"""The whole study: every arm over every text, one unit after another; a study that was killed goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dartprune.errors import UserError
from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.stats import Array
from dartprune.evaluation.study.layout import CHOOSE, Text, batches, check_length, chooser, fingerprint
from dartprune.evaluation.study.lockstep import Unit, run_unit
from dartprune.evaluation.study.measures import top_dimensions
from dartprune.evaluation.study.neurons import own_neurons
from dartprune.evaluation.study.observe import points_of
from dartprune.evaluation.study.results import KINDS, Record, Results, join, save_unit
from dartprune.evaluation.study.settings import Settings
from dartprune.model import sizes
from dartprune.model.families import describe
from dartprune.reporting.journal import Journal
from dartprune.reporting.progress import Watcher


def run_study(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Text]],
    arms: Sequence[ArmAt],
    settings: Settings,
    *,
    folder: Path | None = None,
    batch: int = 30,
    backend: str = "auto",
    name: str = "",
    watcher: Watcher | None = None,
) -> Results:
    """Run every arm over every text.

    Args:
        model: a decoder in evaluation mode, not attached; it is what it was afterwards.
        tokenizer: its tokenizer.
        texts: by kind; see `layout`.
        arms: see `parse_arms`. On one-topic texts the release arms are left out: there is nothing to rescue.
        settings: of the study.
        folder: where finished units are kept; the same call goes on there. None: in memory only.
        batch: texts decoded at once. Part of what a unit is: another size starts anew.
        backend: how the pruned FFN is computed.
        name: of the model, to tell studies apart.
        watcher: told of the decoded steps of each unit that is not there yet.

    Raises:
        ValueError: settings, texts and model that do not fit, or a folder that holds another study.
    """
    settings.check_arms(arms)
    points = points_of(model, settings.layers, settings.spaces)
    check_length(texts, model.config)
    journal = Journal(
        folder / "units.jsonl" if folder is not None else None,
        {
            "settings": settings.to_dict(),
            "texts": fingerprint(texts),
            "batch": batch,
            "backend": backend,
            "model": {"name": name, **sizes.fingerprint(model)},
        },
    )
    units = _Units(model, tokenizer, settings, folder, journal)
    groups = {kind: batches(texts[kind], batch) for kind in KINDS if kind in texts}
    running = {kind: [arm for arm in arms if kind != "control" or arm.release is None] for kind in groups}
    if watcher is not None:
        labels = [units.label(a.name, k, n) for k in groups for n in range(len(groups[k])) for a in running[k]]
        watcher.expect(settings.steps * sum(label not in journal for label in labels))
    records: dict[tuple[str, str], Record] = {}
    for kind in groups:
        for number, group in enumerate(groups[kind]):
            for arm in running[kind]:
                units.ensure(arm, kind, number, group, backend, watcher)
        for arm in running[kind]:
            labels = [units.label(arm.name, kind, number) for number in range(len(groups[kind]))]
            records[arm.name, kind] = join(arm, kind, [(units.arrays(label), journal[label]) for label in labels])
    decoder = describe(model)
    return Results(
        settings=settings,
        points=points,
        top=top_dimensions(decoder.hidden, settings.top),
        dtype=sizes.dtype_name(model),
        neurons=[layer.neurons for layer in decoder.layers],
        arms=list(arms),
        names={kind: [text.name for text in group] for kind, group in texts.items()},
        records=records,
    )


class _Units:
    """Computes units, or finds them done: their facts in the journal, their arrays in the folder or in memory."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings, folder: Path | None, journal: Journal) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._folder, self._journal = folder, journal
        self._points = points_of(model, settings.layers, settings.spaces)
        self._memory: dict[str, dict[str, Array]] = {}
        self._own: tuple[tuple[str, int, bool], list[list[Tensor]]] | None = None  # of the batch under way

    @staticmethod
    def label(arm: str, kind: str, number: int) -> str:
        """Name of a unit, for people and for the journal."""
        return f"{arm} {kind} {number}"

    def ensure(
        self, arm: ArmAt, kind: str, number: int, group: Sequence[Text], backend: str, watcher: Watcher | None
    ) -> None:
        """Compute a unit unless it is there; ValueError if it is there with other settings of the arm."""
        label = self.label(arm.name, kind, number)
        if label not in self._journal:
            unit = self._compute(arm, label, group, self._own_neurons(kind, number, group), backend, watcher)
            if self._folder is None:
                self._memory[label] = unit.arrays
            else:
                save_unit(unit, self._file(label))
            self._journal.add(label, unit.facts() | {"pruner": arm.pruner.to_dict()})
        if self._journal[label]["pruner"] != arm.pruner.to_dict():
            raise UserError(f"the folder holds arm {arm.name!r} with other settings: choose another folder")

    def arrays(self, label: str) -> dict[str, Array]:
        """What a finished unit measured."""
        if self._folder is None:
            return self._memory[label]
        path = self._file(label)
        try:
            with np.load(path) as file:
                return dict(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: a finished unit cannot be read ({error}); remove the folder and start again"
            ) from None

    def _file(self, label: str) -> Path:
        assert self._folder is not None
        return self._folder / "units" / (label.replace(" ", "-").replace("@", "-") + ".npz")

    def _compute(
        self,
        arm: ArmAt,
        label: str,
        group: Sequence[Text],
        own: list[list[Tensor]],
        backend: str,
        watcher: Watcher | None,
    ) -> Unit:
        progress = None if watcher is None else partial(watcher.step, label)
        prompts = [text.prompt for text in group]
        choose = chooser(group, self._settings, self._tokenizer.eos_token_id)
        return run_unit(
            self._model, arm, prompts, choose, self._settings, self._points, own, backend=backend, progress=progress
        )

    def _own_neurons(self, kind: str, number: int, group: Sequence[Text]) -> list[list[Tensor]]:
        """Each topic's own best neurons. What the model must write itself is taken from the dense arm."""
        dense = self.label("dense", kind, number)
        written = any(CHOOSE in text.script for text in group)
        if written and dense not in self._journal:
            # the dense arm goes first and keeps every neuron, so its own overlaps need no topic
            return [[torch.ones(len(group), n.neurons, dtype=torch.bool) for n in describe(self._model).layers]] * 2
        if self._own is None or self._own[0] != (kind, number, written):
            scripts = [text.script for text in group]
            if written:
                scripts = [tuple(row) for row in self.arrays(dense)["text"].T.tolist()]
            change = self._settings.before - 1  # the step that predicts the second topic's first token
            first = [text.prompt + script[:change] for text, script in zip(group, scripts, strict=True)]
            parts = (first, [script[change:] for script in scripts])
            own = [own_neurons(self._model, part, self._settings.sparsity) for part in parts]
            self._own = (kind, number, written), own
        return self._own[1]
