"""What leaving neurons out of a layer costs, whether its sensitivity foretells that, and which neurons are kept.

Masks are made from each text's prompt and stay; the tokens after it are decoded teacher-forced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dartprune.budget import Table, Uniform
from dartprune.errors import UserError
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.layers.overlap import overlaps
from dartprune.evaluation.stats import standard_error
from dartprune.evaluation.texts import Stream, batch
from dartprune.pruner import Dense, Static
from dartprune.reporting.journal import Journal
from dartprune.reporting.progress import Advance

ALL = "all layers"


@dataclass
class LayerStudy:
    """Results of a layer study.

    neurons: of each layer.  keeps: the shares of neurons kept.  sensitivity: of each layer, mean over texts.  alone:
    loss over dense in nats with this layer alone pruned, [layer][keep].  spared: how much of the loss of pruning all
    layers goes away when this one is spared, [layer][keep].  groups: the same as `alone` for several layers at once, by
    name; with its standard errors in `errors`.  foretold: rank correlation of sensitivity with `alone` and with
    `spared` at each keep.  overlap: see `overlaps`.
    """

    neurons: list[int]
    keeps: list[float]
    sensitivity: list[float]
    angle: list[float]
    change: list[float]
    alone: list[list[float]]
    spared: list[list[float]]
    groups: dict[str, list[float]]
    errors: dict[str, list[float]]
    foretold: dict[str, list[float | None]]
    overlap: dict[str, Any]
    dense_loss: float = 0.0
    realised: dict[str, list[float]] = field(default_factory=dict)

    @property
    def middle(self) -> int:
        """Number of the share kept that is shown where only one is."""
        return sorted(range(len(self.keeps)), key=lambda k: self.keeps[k])[len(self.keeps) // 2]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dict(vars(self))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, equal values sharing the mean of their ranks; None where one side is constant."""
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale else None


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return below + (equal - 1) / 2


def thirds(layers: int) -> dict[str, tuple[int, int]]:
    """First and last layer of the early, middle and late third; fewer parts where there are fewer layers."""
    parts = min(3, layers)
    bounds = [round(i * layers / parts) for i in range(parts + 1)]
    return {f"layers {a}-{b - 1}": (a, b - 1) for a, b in pairwise(bounds)}


def study_layers(
    model: Any,
    streams: Sequence[Stream],
    *,
    prompt: int,
    keeps: Sequence[float],
    groups: Mapping[str, tuple[int, int]] | None = None,
    size: int = 8,
    backend: str = "auto",
    journal: Journal | None = None,
    progress: Advance | None = None,
) -> LayerStudy:
    """Prune one layer at a time, several, and all but one.

    Args:
        model: a decoder in evaluation mode, not attached.
        streams: texts of equal length on one topic each, their domains interleaved.
        prompt: tokens of each that the masks are made from.
        keeps: shares of its neurons that a pruned layer keeps, each in (0, 1).
        groups: name -> first and last layer; None: three thirds.
        size: texts at a time.
        backend: how the pruned FFN is computed.
        journal: of what is done.
        progress: called with the number of settings done, see `settings_of`.

    Raises:
        ValueError: shares outside (0, 1), a group outside of the model, or a prompt too short for a mask.
    """
    impact, neurons = impacts(model, streams, prompt, size, backend)
    layers = len(neurons)
    groups = thirds(layers) if groups is None else groups
    tables = settings_of(layers, keeps, groups)
    journal = Journal(None, {}) if journal is None else journal
    tokens = [batch(streams[i : i + size]) for i in range(0, len(streams), size)]
    dense = torch.cat([forced_losses(model, Dense(), rows, prompt, block=rows.shape[1])[0] for rows in tokens])
    for name, table in tables.items():
        if name not in journal:
            # the share is the table's affair; masks that never change may decode in one block
            pruner = Static(sparsity=0.5, budget=Table(table))
            runs = [forced_losses(model, pruner, rows, prompt, block=rows.shape[1], backend=backend) for rows in tokens]
            over = (torch.cat([losses for losses, _ in runs]) - dense).mean(1)
            realised = sum(r.realised_sparsity * len(rows) for (_, r), rows in zip(runs, tokens, strict=True))
            journal.add(name, [float(over.mean()), standard_error(over.tolist()), realised / len(streams)])
        if progress is not None:
            progress(1)

    def row(who: str, what: int = 0) -> list[float]:
        return [journal[f"{who} keep {keep:g}"][what] for keep in keeps]

    names = [ALL, *groups]
    alone = [row(f"layer {layer}") for layer in range(layers)]
    spared = [[a - b for a, b in zip(row(ALL), row(f"all but {layer}"), strict=True)] for layer in range(layers)]
    angle, change = impact[:, 0], impact[:, 1]
    sensitivity = (angle * change).tolist()
    return LayerStudy(
        neurons=neurons,
        keeps=list(keeps),
        sensitivity=sensitivity,
        angle=angle.tolist(),
        change=change.tolist(),
        alone=alone,
        spared=spared,
        groups={name: row(name) for name in names},
        errors={name: row(name, 1) for name in [*names, *(f"layer {layer}" for layer in range(layers))]},
        foretold={
            name: [rank_correlation(sensitivity, [values[k] for values in measured]) for k in range(len(keeps))]
            for name, measured in (("alone", alone), ("spared", spared))
        },
        overlap=overlaps(model, streams, prompt, sorted(keeps)[len(keeps) // 2], size=size, backend=backend),
        dense_loss=float(dense.mean()),
        realised={name: row(name, 2) for name in names},
    )


def settings_of(layers: int, keeps: Sequence[float], groups: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Every budget table of a study by name; ValueError for a share or a group that cannot be."""
    if not keeps or any(not 0 < keep < 1 for keep in keeps):
        raise UserError(f"shares of neurons to keep must lie between 0 and 1, got {list(keeps)}")
    for name, (first, last) in groups.items():
        if not 0 <= first <= last < layers:
            raise UserError(f"{name}: the model has layers 0 to {layers - 1}")
    out = {}
    for keep in keeps:
        share = f"{keep:.6f}"
        out[f"{ALL} keep {keep:g}"] = f"all:{share}"
        for name, (first, last) in groups.items():
            out[f"{name} keep {keep:g}"] = f"all:1.0,{first}-{last}:{share}"
        for layer in range(layers):
            out[f"layer {layer} keep {keep:g}"] = f"all:1.0,{layer}:{share}"
            out[f"all but {layer} keep {keep:g}"] = f"all:{share},{layer}:1.0"
    return out


def impacts(model: Any, streams: Sequence[Stream], prompt: int, size: int, backend: str) -> tuple[Tensor, list[int]]:
    """Mean over texts of both impact terms of each layer on the prompts, float32 [L, 2], and the layers' neurons."""
    parts = []
    pruner = Static(sparsity=0.5, budget=Uniform())
    if prompt - 1 - pruner.skip_first < pruner.least_traced:
        raise UserError(f"a prompt of {prompt} tokens makes no mask: give at least {pruner.least_traced + 2}")
    with pruner(model, backend=backend) as run:
        for i in range(0, len(streams), size):
            rows = batch(streams[i : i + size])[:, :prompt].to(model.device)
            cache = run.prefill(rows)
            parts += [torch.tensor(run.impact(slot)) for slot in run.slots_of(cache)]
        neurons = [layer.neurons for layer in run.report().layers]
    return torch.stack(parts).mean(0), neurons
