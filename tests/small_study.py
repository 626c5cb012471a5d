"""A small study for tests: a tiny model, texts made of two halves of the vocabulary, and records made by hand."""

from __future__ import annotations

import numpy as np
import torch

from dartprune import Dart, Detector, Relearn, Replay
from dartprune.evaluation.arms import ArmAt, parse_arms
from dartprune.evaluation.study.layout import Text
from dartprune.evaluation.study.results import Record, Results
from dartprune.evaluation.study.settings import Settings
from tiny import FAMILIES

SETTINGS = Settings(
    sparsity=0.5,
    prompt=16,
    before=16,
    after=32,
    window=8,
    layers=("first", "last"),
    early=16,
    horizon=16,
    resamples=100,
)
# a detector that fires easily: a tiny random model knows no topics
EAGER = Detector(window=8, delta=0.0, min_drop=0.0, patience=1)


class Tokenizer:
    """Says nothing but where texts end."""

    eos_token_id = 1
    bos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def model():
    return FAMILIES["llama"]()


def texts(count, settings=SETTINGS, seed=0):
    """Given texts, by kind: numbers of 2 to 60, then of 61 to 120, or of the first range alone."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=g).tolist()

    kinds = {}
    for kind, low in (("change", 61), ("control", 2)):
        kinds[kind] = []
        for number in range(count):
            row = draw(2, 60, settings.prompt - 1 + settings.before) + draw(low, low + 59, settings.after + 1)
            row = tuple(row)
            topics = ("low", "high") if kind == "change" else ("low",)
            kinds[kind].append(Text(row[: settings.prompt], row[settings.prompt :], topics, number))
    return kinds


def arms():
    """Dense, static, one release, and two arms that detect easily."""
    return [
        *parse_arms("dense,dart-frozen,dart-release@24", 0.5),
        ArmAt("dart", Dart(sparsity=0.5, detector=EAGER, refresh=Replay(tokens=8, settle=16))),
        ArmAt("dart-relearn", Dart(sparsity=0.5, detector=EAGER, refresh=Relearn(tokens=8))),
    ]


def record(arm, kind, loss, *, settings=SETTINGS, cosine=None, judged=None, events=None):
    """A record with this loss over dense [steps, texts] and this cosine with dense [windows, texts]."""
    steps, count = loss.shape
    windows = np.ones((settings.windows, 1, 9, count))
    if cosine is not None:
        windows[:, 0, 4] = cosine
    return Record(
        arm=arm,
        kind=kind,
        tokens=np.zeros((steps, 1, 8, 2)),
        windows=windows,
        loss=loss + 1.0,
        dense_loss=np.ones_like(loss),
        text=np.zeros((steps, count), dtype=np.int64),
        judged=np.zeros((0, 3, count)) if judged is None else judged,
        overlap=np.full((settings.windows, 2, 3, count), 0.5),
        events=events or [[] for _ in range(count)],
        neurons=[],
        similarities=[[] for _ in range(count)],
        realised=np.full(count, 0.5),
        backends=["masked"],
        held=1,
    )


def results(records, settings=SETTINGS):
    """Results of records by hand, with one point."""
    from dartprune.evaluation.study.observe import Point

    arms_ = list({r.arm.name: r.arm for r in records}.values())
    count = records[0].texts
    return Results(
        settings=settings,
        points=[Point(2, "attention")],
        neurons=[72] * 3,
        arms=arms_,
        top=4,
        dtype="float32",
        names={kind: [f"text {i}" for i in range(count)] for kind in ("change", "control")},
        records={(r.arm.name, r.kind): r for r in records},
    )
