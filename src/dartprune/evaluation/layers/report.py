"""A layer study as tables and as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dartprune.evaluation.layers import pictures
from dartprune.evaluation.layers.run import LayerStudy
from dartprune.reporting.frame import Frame
from dartprune.reporting.page import Sheet

_PAIRS = {"same_domain": "in common, one domain", "other_domain": "two domains"}


def tables(study: LayerStudy) -> list[Sheet]:
    """For people."""
    k = study.middle
    rows = [
        [
            str(layer),
            f"{study.sensitivity[layer]:.3f}",
            f"{study.alone[layer][k]:.3f} ± {study.errors[f'layer {layer}'][k]:.3f}",
            f"{study.spared[layer][k]:.3f}",
            *("-" if study.overlap[key] is None else f"{study.overlap[key][layer]:.2f}" for key in _PAIRS),
        ]
        for layer in range(len(study.sensitivity))
    ]
    loss = f"loss, {study.keeps[k]:.0%} kept"
    columns = ["layer", "sensitivity", loss, "loss that sparing saves", *_PAIRS.values()]
    shares = [f"{value:.0%} kept" for value in study.keeps]
    several = [
        [name, *(f"{v:.3f} ± {e:.3f}" for v, e in zip(losses, study.errors[name], strict=True))]
        for name, losses in study.groups.items()
    ]
    ranks = [
        [said, *("-" if rho is None else f"{rho:.2f}" for rho in study.foretold[name])]
        for name, said in (("alone", "one layer pruned"), ("spared", "one layer spared"))
    ]
    return [
        Sheet("one layer at a time (loss over dense in nats)", columns, rows),
        Sheet("several layers (loss over dense in nats)", ["", *shares], several),
        Sheet("rank correlation of sensitivity with the damage", ["", *shares], ranks),
    ]


def write(study: LayerStudy, folder: Path, name: str, settings: dict[str, Any]) -> list[Path]:
    """Write results.json, the pictures and report.html into a folder; their paths, the page first.

    `settings` say, beside what else there is, the weights' `dtype` and the token that each text `begins_with`, or None.
    """
    frame = Frame(folder, f"Layers of {name}")
    frame.json("results", {"model": name, "settings": settings, **study.to_dict()})
    head = settings["begins_with"]
    begin = "" if head is None else f"Each begins with token {head}, as the tokenizer begins a text. "
    frame.page.text(
        f"The weights are {settings['dtype']}. Masks are made from each text's prompt and stay; the tokens after it "
        f"are decoded teacher-forced. {begin}Loss over dense in nats; after ± stands one standard error, over texts."
    )
    for table in tables(study):
        frame.page.sheet(table)
    frame.picture("curves", pictures.curves(study), "Loss over dense against the share of neurons kept.")
    asked = "Does the sensitivity of a layer foretell what pruning it costs?"
    frame.picture("sensitivity", pictures.foretelling(study), asked)
    common = f"Kept neurons in common at {study.overlap['keep']:.0%} kept."
    frame.picture("overlap", pictures.overlap(study), common)
    return frame.close(settings)
