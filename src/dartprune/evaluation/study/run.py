"""The whole study: every arm over every text, one unit after another; a study that was killed goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.study.layout import CHOOSE, Text, batches, check_length, chooser, fingerprint
from dartprune.evaluation.study.lockstep import Unit, run_unit
from dartprune.evaluation.study.measures import top_dimensions
from dartprune.evaluation.study.neurons import own_neurons
from dartprune.evaluation.study.observe import points_of
from dartprune.evaluation.study.results import KINDS, Record, Results, join, save_unit
from dartprune.evaluation.study.settings import Settings
from dartprune.model.families import describe
from dartprune.reporting.journal import Journal

Told = Callable[[str, int], None]
Key = tuple[str, str, int]  # arm, kind, batch


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
    told: Told | None = None,
) -> Results:
    """Run every arm over every text.

    Args:
        model: a decoder in evaluation mode, not attached; it is what it was afterwards.
        tokenizer: its tokenizer.
        texts: by kind; see `layout`.
        arms: see `parse_arms`. On one-topic texts the release arms are left out: there is nothing to rescue.
        settings: of the study.
        folder: where finished units are kept; the same call goes on there. None: in memory only.
        batch: texts decoded at once in forced mode. Part of what a unit is: another size starts anew.
        backend: how the pruned FFN is computed.
        name: of the model, to tell studies apart.
        told: called with a unit's description and the steps it has gone, 0 first.

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
            "model": [name, sum(p.numel() for p in model.parameters()), str(next(model.parameters()).dtype)],
        },
    )
    held: dict[Key, dict[str, Any]] = {}
    for kind in (k for k in KINDS if k in texts):
        for number, group in enumerate(batches(texts[kind], batch)):
            own: list[list[Tensor]] | None = None
            for arm in arms:
                if kind == "control" and arm.release is not None:
                    continue
                key: Key = (arm.name, kind, number)
                if _label(key) not in journal:
                    if own is None:
                        own = _own(model, group, settings, held.get(("dense", kind, number)), folder, number, kind)
                    unit = _unit(model, tokenizer, arm, group, settings, points, own, backend, _label(key), told)
                    if folder is None:
                        held[key] = unit.arrays
                    else:
                        save_unit(unit, _file(folder, key))
                    journal.add(_label(key), unit.facts() | {"pruner": arm.pruner.to_dict()})
                _check_same(journal[_label(key)], arm)
    decoder = describe(model)
    return Results(
        settings=settings,
        points=points,
        top=top_dimensions(decoder.hidden, settings.top),
        neurons=[layer.neurons for layer in decoder.layers],
        arms=list(arms),
        names={kind: [text.name for text in group] for kind, group in texts.items()},
        records=_records(texts, arms, batch, journal, held, folder),
    )


def _label(key: Key) -> str:
    return f"{key[0]} {key[1]} {key[2]}"


def _file(folder: Path, key: Key) -> Path:
    return folder / "units" / (_label(key).replace(" ", "-").replace("@", "-") + ".npz")


def _check_same(facts: Mapping[str, Any], arm: ArmAt) -> None:
    if facts["pruner"] != arm.pruner.to_dict():
        raise ValueError(f"the folder holds arm {arm.name!r} with other settings: choose another folder")


def _unit(
    model: nn.Module,
    tokenizer: Any,
    arm: ArmAt,
    group: Sequence[Text],
    settings: Settings,
    points: Any,
    own: list[list[Tensor]],
    backend: str,
    label: str,
    told: Told | None,
) -> Unit:
    steps = 0

    def progress(n: int) -> None:
        nonlocal steps
        steps += n
        if told is not None:
            told(label, steps)

    progress(0)
    prompt = torch.tensor([text.prompt for text in group])
    choose = chooser(group, settings, tokenizer.eos_token_id)
    return run_unit(model, arm, prompt, choose, settings, points, own, backend=backend, progress=progress)


def _own(
    model: nn.Module,
    group: Sequence[Text],
    settings: Settings,
    dense: Mapping[str, Any] | None,
    folder: Path | None,
    number: int,
    kind: str,
) -> list[list[Tensor]]:
    """Each topic's own best neurons. What the model must write itself is taken from the dense arm."""
    given = torch.tensor([text.given for text in group])
    if bool((given == CHOOSE).any()):
        if folder is not None and _file(folder, ("dense", kind, number)).exists():
            dense = _arrays(folder, ("dense", kind, number))
        if dense is None:
            # the dense arm goes first and keeps every neuron, so its own overlaps need no topic
            return [[torch.ones(len(group), n.neurons, dtype=torch.bool) for n in describe(model).layers]] * 2
        given = torch.from_numpy(dense["text"]).T
    change = settings.before - 1  # the step that predicts the second topic's first token
    first = torch.cat((torch.tensor([text.prompt for text in group]), given[:, :change]), dim=1)
    return [own_neurons(model, part, settings.sparsity) for part in (first, given[:, change:])]


def _arrays(folder: Path, key: Key) -> dict[str, Any]:
    path = _file(folder, key)
    try:
        with np.load(path) as found:
            return dict(found)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: a finished unit cannot be read ({error}); remove the folder and start again"
        ) from None


def _records(
    texts: Mapping[str, Sequence[Text]],
    arms: Sequence[ArmAt],
    batch: int,
    journal: Journal,
    held: Mapping[Key, dict[str, Any]],
    folder: Path | None,
) -> dict[tuple[str, str], Record]:
    out: dict[tuple[str, str], Record] = {}
    for kind in (k for k in KINDS if k in texts):
        for arm in arms:
            keys: list[Key] = [(arm.name, kind, i) for i in range(len(batches(texts[kind], batch)))]
            if _label(keys[0]) not in journal:
                continue
            units = [(held[k] if folder is None else _arrays(folder, k), journal[_label(k)]) for k in keys]
            out[arm.name, kind] = join(arm, kind, units)
    return out
