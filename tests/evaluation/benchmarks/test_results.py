"""Arms beside each other: tables, and what they differ in on the same documents."""

from __future__ import annotations

import pytest

from dartprune import Dart, Dense, Static
from dartprune.evaluation.benchmarks.results import ArmScores, collect, differences, tables
from dartprune.evaluation.benchmarks.tasks import _each
from dartprune.evaluation.tally import Tally
from dartprune.reporting.journal import Journal

RIGHT = [1.0, 0.0, 1.0, 1.0] * 25  # of a hundred documents
ARMS = {"dense": Dense(), "dart": Dart(sparsity=0.5), "static": Static(sparsity=0.5)}


def scored(each):
    """What the work of a unit gives, with these values of each document."""
    return {"scores": {"t": sum(each) / len(each)}, "errors": {}, "each": {"t": each}}


def arms(**each):
    return [ArmScores(name, ARMS[name], **scored(values)) for name, values in each.items()]


def test_differences_are_paired():
    # one document in ten is answered otherwise, for the better and for the worse
    other = [1 - x if n % 11 == 0 else x for n, x in enumerate(RIGHT)]
    found = differences(arms(dense=RIGHT, dart=other, static=RIGHT))
    difference = found["dart"]["t"]
    assert difference.value == pytest.approx(sum(other) / 100 - sum(RIGHT) / 100)
    # not paired, two shares of three quarters among a hundred would be known to 0.12 each way
    assert difference.value - 0.08 < difference.low < difference.value < difference.high < difference.value + 0.08
    assert vars(found["static"]["t"]) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_without_a_dense_arm_or_the_same_documents_there_is_no_difference():
    assert differences(arms(dart=RIGHT)) == {}
    assert differences(arms(dense=RIGHT[:50], dart=RIGHT)) == {"dart": {}}
    assert [sheet.title for sheet in tables(arms(dense=RIGHT[:50], dart=RIGHT))] == ["target sparsity 0.5"]


def test_a_table_of_differences():
    *_, sheet = tables(arms(dense=RIGHT, dart=[0.0] * 100, static=RIGHT))
    assert sheet.title.startswith("difference to dense on the same documents")
    assert list(sheet.columns) == ["", "dart", "static"]
    (row,) = sheet.rows
    assert row[0] == "t" and row[1].startswith("-0.750 [-0.8") and row[2] == "+0.000 [+0.000, +0.000]"


def test_a_journal_of_an_older_release_has_scores_without_documents(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", {})
    old = {key: value for key, value in scored(RIGHT).items() if key != "each"}
    for name in ARMS:
        journal.add(f"unit | {name}", old | {"did": Tally().to_dict(), "details": {}})
    found = collect(ARMS, ["unit"], lambda *_: pytest.fail("all is there"), journal)
    assert [arm.scores for arm in found] == [{"t": 0.75}] * 3 and differences(found) == {"dart": {}, "static": {}}


def test_values_of_documents():
    rows = [
        {"doc_id": 1, "filter": "none", "acc": 0.0, "f1": (1, 2)},
        {"doc_id": 0, "filter": "none", "acc": True, "f1": (1, 2)},
        {"doc_id": 0, "filter": "strict", "acc": 0.0},
    ]
    assert _each(rows, "acc,none") == [1.0, 0.0] and _each(rows, "acc,strict") == [0.0]
    assert _each(rows, "f1,none") is None and _each([], "acc,none") is None
