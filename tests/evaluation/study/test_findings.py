"""Conclusions from records made by hand."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from dartprune.evaluation.arms import parse_arms
from dartprune.evaluation.stats import Interval
from dartprune.evaluation.study import claims as c
from dartprune.evaluation.study import findings as f
from dartprune.evaluation.study import pictures
from dartprune.evaluation.study import recovery as r
from dartprune.evaluation.study.settings import Settings
from dartprune.evaluation.study.tables import write_tables
from dartprune.reporting.frame import Frame
from small_study import SETTINGS, arms, record, results

S = SETTINGS
COUNT = 12
EVENT = {"decoded": 24, "kind": "replay", "similarity": 0.1}
DENSE, STATIC, RELEASE, DART, _ = arms()


def noise(shape, seed):
    return 0.02 * np.random.default_rng(seed).normal(size=shape)


def loss(before, after, seed, release=None, left=0.0, settings=S):
    """Loss over dense [steps, texts]: two levels, and what is left after a release."""
    out = np.full((settings.steps, COUNT), float(before))
    out[settings.before :] = after
    if release is not None:
        out[release:] = left
    return out + noise(out.shape, seed)


def cosine(before, after, seed):
    out = np.full((S.windows, COUNT), float(before))
    out[S.before // S.window :] = after
    return out + noise(out.shape, seed) / 4


def judged(change_at):
    """Series that drift from a window on, far below the threshold."""
    cosines = np.full((S.steps // 8, COUNT), 0.8)
    cosines[change_at:] = 0.1
    return np.stack((cosines, np.full_like(cosines, 0.75), np.full_like(cosines, 0.1)), axis=1)


def study(release_left, static_after=1.0, control_after=0.2, seen_at=2, control_seen=99):
    still = cosine(0.95, 0.94, 4)
    return results(
        [
            record(DENSE, "change", loss(0, 0, 0) * 0),
            record(STATIC, "change", loss(0.2, static_after, 1), cosine=cosine(0.95, 0.7, 1), judged=judged(seen_at)),
            record(RELEASE, "change", loss(0.2, static_after, 2, 24, release_left), cosine=cosine(0.95, 0.9, 2)),
            record(DART, "change", loss(0.2, 0.5, 3), events=[[EVENT]] * COUNT),
            record(DENSE, "control", loss(0, 0, 0) * 0),
            record(STATIC, "control", loss(0.2, control_after, 4), cosine=still, judged=judged(control_seen)),
            record(DART, "control", loss(0.2, 0.2, 5)),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(("left", "said"), [(0.0, "recovers"), (0.6, "does not")])
def test_recovery(left, said):
    (row,) = r.recoveries(study(left))
    assert row.release == 24 and row.tokens == 16 and row.verdict == said
    assert row.frozen.value == pytest.approx(1.0, abs=0.02) and row.released.value == pytest.approx(left, abs=0.02)
    assert row.regained.value == pytest.approx(1 - left, abs=0.03)
    assert row.regained.low <= row.regained.value <= row.regained.high
    assert row.similarity_regained.value == pytest.approx(1 - 0.1 / 0.3, abs=0.05)
    assert row.half_time == (8 if left == 0 else None)
    assert row.lost.value == pytest.approx(left, abs=0.02)
    line = r.verdict([row], 0.8)
    assert line.startswith("The model recovers at every" if left == 0 else "The model does not recover")


def test_nothing_to_regain():
    (row,) = r.recoveries(study(0.0, static_after=0.0))
    assert row.verdict == "nothing to regain" and "costs no loss" in r.verdict([row], 0.8)
    assert "nothing can be said" in r.verdict([], 0.8)


def test_until_when():
    rows = [
        r.Recovery(**{**vars(r.recoveries(study(left))[0]), "release": at})
        for at, left in ((100, 0.0), (200, 0.05), (300, 0.7), (400, 0.7))
    ]
    assert r.verdict(rows, 0.8).startswith("The model recovers when released by decoded token 200")
    assert r.verdict(rows[2:], 0.8).startswith("The model does not recover")
    assert r.verdict([rows[2], rows[0]], 0.8).startswith("The model recovers when")
    shuffled = [r.Recovery(**{**vars(rows[3]), "release": 50}), *rows[:2]]
    assert r.verdict(shuffled, 0.8).startswith("Recovery follows no order")


def test_few_texts_answer_nothing(monkeypatch):
    """Whatever the figures say: an interval over two texts knows two values."""
    for module in (c, r):
        monkeypatch.setattr(module, "LEAST_TEXTS", COUNT + 1)
    found = study(0.6)
    rows = r.recoveries(found)
    assert [row.verdict for row in rows] == ["undecided"] and rows[0].regained.high < 0.8
    line = r.verdict(rows, 0.8)
    assert line.startswith("Whether the model recovers when released at 24 is undecided: ") and "than 13 texts" in line
    made = c.claims(study(0.0), [])
    assert [claim.answer for claim in made] == ["undecided"] * 3
    assert made[0].figures.startswith("12 texts of a kind answer nothing: give at least 13; seen were: loss over dense")
    monkeypatch.undo()
    assert c.claims(study(0.0), [])[0].answer == "reproduced" and c.LEAST_TEXTS == 10
    assert [row.verdict for row in r.recoveries(found)] == ["does not"]
    assert r._recovers(Interval(1, 0.5, 1.5), Interval(0.4, 0.0, 0.9), 0.8) == "undecided", "the interval allows both"


def test_the_first_tokens_of_the_second_topic_are_compared_nowhere(tmp_path):
    """The first one is predicted by the last step that feeds the first topic."""
    kept, freed = loss(0.2, 1.0, 1), loss(0.2, 1.0, 2)
    for high in (kept, freed):
        high[S.before - 1 : S.before + 5] = 100.0
    release = parse_arms(f"dart-release@{S.before}", 0.5)[-1]
    rows = ((DENSE, kept * 0), (STATIC, kept), (release, freed))
    made = results([record(arm, "change", losses) for arm, losses in rows])
    assert S.join == slice(S.before - 1, S.before + 5)
    found = f.find(made)
    row = next(row for row in found.arms if row.arm == STATIC.name)
    assert row.excess_before.value == pytest.approx(0.2, abs=0.02)
    assert row.excess_after.value == pytest.approx(1.0, abs=0.02)
    assert found.recovery[0].frozen.value == pytest.approx(1.0, abs=0.02)
    windows = made.windowed_excess(made.records[STATIC.name, "change"])
    assert windows.shape == (S.windows, COUNT) and np.allclose(windows.mean(1)[:2], 0.2, atol=0.03)
    assert np.allclose(windows.mean(1)[2:], 1.0, atol=0.03)
    frame = Frame(tmp_path, "t")
    write_tables(made, found, frame)
    with (tmp_path / "texts.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == STATIC.name]
    assert all(float(row["excess_before"]) < 0.3 and float(row["excess_after"]) < 1.1 for row in rows)
    assert max(json.loads((tmp_path / "series.json").read_text())[1]["excess_loss"]) < 1.1
    drawn = pictures.losses(made).axes[0].lines[0].get_ydata()
    assert max(drawn) < 1.1


def test_every_arm_has_a_colour_of_its_own():
    names = "dense,dart-frozen,dart,dart-relearn,sketch-dart,gated-dart,static"
    made = results([record(arm, "change", loss(0.2, 1.0, 1)) for arm in parse_arms(names, 0.5)])
    colours = [line.get_color() for line in pictures.losses(made).axes[0].lines if line.get_label() in names]
    assert len(colours) == 6 == len(set(colours)), colours


def test_a_window_that_holds_nothing_else_has_no_loss():
    small = Settings(**{**vars(S), "window": 2})
    made = results([record(DENSE, "change", loss(0, 0, 0) * 0, settings=small)], small)
    windows = made.windowed_excess(made.records["dense", "change"])
    empty = np.isnan(windows).all(1)
    assert np.flatnonzero(empty).tolist() == [8, 9] and not np.isnan(windows[~empty]).any()


def test_the_three_claims():
    trap, early, rescue = c.claims(study(0.0), [])
    assert trap.answer == "reproduced" and early.answer == "reproduced" and rescue.answer == "undecided"
    assert "needs release times" in rescue.figures
    assert c.claims(study(0.0, control_after=1.5), [])[0].answer == "refuted"
    assert c.claims(study(0.0, seen_at=5), [])[1].answer == "refuted", "24 tokens late, 16 are early"
    assert c.claims(study(0.0, control_seen=2), [])[1].answer == "refuted", "as often without a change"


def test_the_claim_about_release():
    def rows(*verdicts):
        (row,) = r.recoveries(study(0.0))
        return [
            r.Recovery(**{**vars(row), "release": 100 * (i + 1), "verdict": verdict})
            for i, verdict in enumerate(verdicts)
        ]

    def answer(*verdicts):
        return c.claims(study(0.0), rows(*verdicts))[2].answer

    good, bad, open_ = "recovers", "does not", "undecided"
    assert answer(good, good, good, good, bad, bad) == "reproduced"
    assert answer(good, good, good, good, good, good) == "refuted"
    assert answer(good, good, bad, good, bad, bad) == "refuted"
    assert answer(good, good, good, open_, bad, bad) == "undecided"


def test_table_of_arms():
    rows = {(row.arm, row.kind): row for row in f.find(study(0.0)).arms}
    static, dart = rows["dart-frozen", "change"], rows["dart", "change"]
    assert static.excess_before.value == pytest.approx(0.2, abs=0.02)
    assert static.excess_after.value == pytest.approx(1.0, abs=0.02)
    assert static.to_dense_after == pytest.approx(0.7, abs=0.01)
    assert dart.noticed == COUNT and dart.delay == 8 and dart.events_after == 1 and dart.events_before == 0
    assert dart.false_alarms is None and rows["dart", "control"].false_alarms == 0
    assert static.noticed == 0 and static.delay is None


def test_free_mode_compares_with_what_the_dense_arm_wrote():
    made = results(list(study(0.0).records.values()), Settings(**{**vars(S), "mode": "free"}))
    static = made.records["dart-frozen", "change"]
    static.dense_loss = static.dense_loss + 0.25
    excess = made.excess(static)
    assert np.isnan(excess[S.join]).all() and np.allclose(np.delete(excess, S.join, 0), 0.25)


def test_the_curve_needs_a_frozen_arm():
    assert len(f.detector_curve(study(0.0))) > 50
    alone = results([record(DENSE, "change", loss(0, 0, 0)), record(DART, "change", loss(0, 0, 0))])
    assert f.detector_curve(alone) == [] and r.recoveries(alone) == []
    assert [claim.answer for claim in c.claims(alone, [])] == ["undecided"] * 3


def test_neuron_rows():
    made = study(0.0)
    made.records["dart", "change"].neurons = [
        {"stream": 0, "decoded": 24, "kind": "replay", "added": [4, 0, 2], "dropped": [4, 0, 2]},
        {"stream": 1, "decoded": 24, "kind": "replay", "added": [2, 0, 2], "dropped": [2, 0, 2]},
    ]
    rows = [row for row in f.find(made).neurons if row["arm"] == "dart" and row["kind"] == "change"]
    assert [row["added"] for row in rows] == [3, 0, 2] and all(row["events"] == 2 for row in rows)
    assert not [row for row in f.find(made).neurons if row["arm"] == "dense"]
    assert not parse_arms("dense", 0.5)[0].pruner.prunes
