"""The whole study: it goes on where it was stopped, repeats exactly, and writes everything."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from dartprune.evaluation.study.findings import find
from dartprune.evaluation.study.layout import Text
from dartprune.evaluation.study.report import write
from dartprune.evaluation.study.run import run_study
from dartprune.evaluation.study.settings import Settings
from oracle import assert_untouched, snapshot
from small_study import SETTINGS, Tokenizer, arms, model, texts

FREE = Settings(**{**vars(SETTINGS), "mode": "free", "temperature": 1.0})


class Heard:
    """A watcher: steps of each unit, and of all that were announced; may stop the work at a unit's step."""

    def __init__(self, stop=None):
        self.steps, self.expected, self.stop = {}, 0, stop

    def expect(self, steps):
        self.expected += steps

    def step(self, label, steps):
        self.steps[label] = self.steps.get(label, 0) + steps
        if (label, self.steps[label]) == self.stop:
            raise KeyboardInterrupt


def run(folder=None, chosen=None, watcher=None, settings=SETTINGS, kinds=None):
    options = {"folder": folder, "batch": 2, "backend": "masked", "watcher": watcher}
    return run_study(model(), Tokenizer(), kinds or texts(4), chosen or arms(), settings, **options)


def same(a, b):
    assert list(a.records) == list(b.records)
    for key, record in a.records.items():
        other = b.records[key]
        for name in ("tokens", "windows", "loss", "dense_loss", "text", "judged", "overlap", "realised"):
            assert np.array_equal(getattr(record, name), getattr(other, name), equal_nan=True), (key, name)
        assert record.events == other.events and record.neurons == other.neurons


def test_a_stopped_study_goes_on(tmp_path):
    whole = run()
    stopped = Heard(stop=("dart-frozen change 1", 9))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, watcher=stopped)
    again = Heard()
    resumed = run(tmp_path, watcher=again)
    assert "dart-frozen change 0" not in again.steps
    assert next(iter(again.steps)) == "dart-frozen change 1", "the unit that was cut short is done anew"
    assert set(again.steps.values()) == {SETTINGS.steps} and again.expected == sum(again.steps.values())
    assert again.expected == stopped.expected - (len(stopped.steps) - 1) * SETTINGS.steps, (
        "what is there counts no more"
    )
    same(whole, resumed)
    there = Heard()
    same(whole, run(tmp_path, watcher=there))
    assert not there.steps and there.expected == 0
    kinds = {kind: {arm for arm, k in whole.records if k == kind} for kind in ("change", "control")}
    assert kinds["control"] == kinds["change"] - {"dart-release@24"} and len(kinds["change"]) == 5
    assert all(record.texts == 4 for record in whole.records.values())
    # neuron events belong to the text they happened in, across batches
    assert sorted(row["stream"] for row in whole.records["dart-release@24", "change"].neurons) == [0, 1, 2, 3]
    more = run(tmp_path, chosen=arms()[:3])
    assert {name for name, _ in more.records} == {"dense", "dart-frozen", "dart-release@24"}


def test_another_study_is_refused(tmp_path):
    run(tmp_path, chosen=arms()[:2])
    with pytest.raises(ValueError, match=r"other settings \(settings\)"):
        run(tmp_path, chosen=arms()[:2], settings=Settings(**{**vars(SETTINGS), "seed": 1}))
    with pytest.raises(ValueError, match=r"other settings \(texts\)"):
        run(tmp_path, chosen=arms()[:2], kinds=texts(4, seed=1))
    (tmp_path / "units" / "dart-frozen-change-0.npz").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="a finished unit cannot be read"):
        run(tmp_path, chosen=arms()[:2])


def test_everything_is_written(tmp_path):
    tiny = model()
    before = snapshot(tiny)
    kinds = texts(4)
    results = run_study(
        tiny, Tokenizer(), kinds, arms(), SETTINGS, folder=tmp_path / "units", batch=4, backend="masked"
    )
    assert_untouched(tiny, before)
    findings = find(results, {"dart": {"after": {"rouge1": 0.5}}}, ["a note"])
    paths = write(results, findings, tmp_path / "out", "a title")
    pictures = ("trajectories", "divergence", "losses", "recovery", "detector", "single-texts", "turnover")
    assert paths[0].name == "report.html" and sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert {path.name for path in paths} >= {"report.json", "series.json"} | {
        f"{name}.{ending}" for name in pictures for ending in ("png", "svg")
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == len(pictures) and "a note" in page and findings.verdict[:20] in page
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["settings"]["before"] == 16 and len(data["recovery"]) == 1 and len(data["claims"]) == 3
    assert data["dimensions_of_overlap"] == 4 and "NaN" not in (tmp_path / "out" / "report.json").read_text()

    def table(name):
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    dart = results.records["dart", "change"]
    assert len(table("arms")) == 9 and len(table("texts")) == 36
    assert len(table("events")) == sum(len(e) for r in results.records.values() for e in r.events)
    assert len(table("windows")) == 9 * SETTINGS.windows * 4 * 9 and len(table("tokens")) == 9 * SETTINGS.steps * 4
    row = next(
        r for r in table("windows")
        if (r["arm"], r["texts"], r["decoded"], r["layer"], r["space"], r["measure"])
        == ("dart", "change", "24", "2", "attention", "cosine_to_dense")
    )  # fmt: skip
    assert float(row["mean"]) == pytest.approx(dart.measure("cosine_to_dense", results.lead)[2].mean(), rel=1e-4)
    series = json.loads((tmp_path / "out" / "series.json").read_text())
    assert len(series) == 9 and len(series[0]["excess_loss"]) == SETTINGS.windows


def free_kinds():
    given = [-1] * FREE.steps
    given[FREE.before - 1 : FREE.before + 1] = [100, 101]
    return {"change": [Text((5, 9, 30, 31), tuple(given), ("a", "b"), n) for n in range(2)]}


def test_free_mode_repeats_exactly():
    first, second = (run(settings=FREE, kinds=free_kinds(), chosen=arms()[:2]) for _ in range(2))
    same(first, second)
    record = first.records["dart-frozen", "change"]
    assert record.text[FREE.before - 1 : FREE.before + 1].tolist() == [[100, 100], [101, 101]]
    assert not np.array_equal(record.text[:, 0], record.text[:, 1]), "every text draws for itself"
    dense = first.records["dense", "change"]
    excess = first.excess(record)
    compared = ~np.isnan(excess)
    assert np.allclose(excess[compared], (record.dense_loss - dense.dense_loss)[compared]) and compared.mean() > 0.8
    other = run(settings=Settings(**{**vars(FREE), "seed": 1}), kinds=free_kinds(), chosen=arms()[:2])
    assert not np.array_equal(other.records["dart-frozen", "change"].text, record.text)
