"""A comparison: equal realised sparsity, honest arms, the same again, and no unit twice after a kill."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch

from dartprune import Static
from dartprune.evaluation.arms import Arm, arm
from dartprune.evaluation.compare import run as compare_module
from dartprune.evaluation.compare.plan import CHANGING, ONE, Plan, material
from dartprune.evaluation.compare.report import brief, conduct, flat, notes, pairs, quality, write
from dartprune.evaluation.compare.run import compare, journal_settings
from dartprune.evaluation.texts import JOIN
from dartprune.reporting.journal import Journal
from dartprune.reporting.page import Page
from letters import Letters, documents, tiny

PLAN = Plan(prompt=16, lengths=(32, 24), count=4, batch=2, sparsities=(0.5, 0.75), seed=3)
NAMES = ("static", "clock", "dart", "dart-reference@30")


def run(model, names=NAMES, plan=PLAN, **more):
    given = material(documents(), Letters(), plan)
    return compare(model, [a if isinstance(a, Arm) else arm(a) for a in names], given, plan, **more)


@pytest.fixture(scope="module")
def comparison():
    torch.manual_seed(0)
    return run(tiny())


def test_realised_sparsities_agree_or_say_so(comparison):
    assert len(comparison.outcomes) == 2 * (1 + 2 * len(NAMES))
    for outcome in comparison.outcomes:
        away = abs(outcome.realised_sparsity - outcome.target)
        assert outcome.reached == (away <= 0.005), (outcome.arm, outcome.target, outcome.realised_sparsity)
        assert outcome.dense_tokens + outcome.pruned_tokens == PLAN.count * PLAN.steps
    by = {(o.arm, o.kind, o.target): o for o in comparison.outcomes}
    assert by["static", ONE, 0.5].nominal == 0.5 and by["static", ONE, 0.5].bytes_saved == pytest.approx(0.5, abs=0.01)
    clock = by["clock", CHANGING, 0.5]
    assert clock.reached and clock.nominal > 0.55 and clock.dense_tokens > 0
    assert not by["clock", ONE, 0.75].reached and by["clock", ONE, 0.75].nominal == 0.75
    assert by["dart", CHANGING, 0.5].reached and by["dart", CHANGING, 0.5].dense_tokens == 0


def test_dense_is_at_no_distance(comparison):
    for outcome in comparison.of(ONE, 0.0) + comparison.of(CHANGING, 0.0):
        assert outcome.arm == "dense" and set(outcome.curve) <= {0.0, None} and len(outcome.curve) == PLAN.steps
        for part in outcome.parts.values():
            assert part.over_dense.value == part.over_dense.low == part.over_dense.high == 0
            assert abs(part.divergence.value) < 1e-5 and part.agreement.value == 1


def test_intervals_hold_their_means_and_come_from_the_streams(comparison):
    for outcome in comparison.outcomes:
        for part in outcome.parts.values():
            assert len(part.each_over_dense) == PLAN.count
            assert part.over_dense.value == pytest.approx(sum(part.each_over_dense) / PLAN.count)
            for estimate in (part.over_dense, part.divergence, part.agreement, part.perplexity):
                assert estimate.low <= estimate.value <= estimate.high


def test_parts_add_up_to_the_curve_without_what_follows_the_join(comparison):
    change = PLAN.lengths[0] - PLAN.prompt
    assert comparison.settings["left_out_after_change"] == 1 + JOIN
    for outcome in comparison.of(CHANGING, 0.5):
        before, left_out = outcome.curve[:change], outcome.curve[change : change + 1 + JOIN]
        after = outcome.curve[change + 1 + JOIN :]
        assert left_out == [None] * (1 + JOIN)
        assert outcome.parts["before"].over_dense.value == pytest.approx(sum(before) / len(before))
        assert outcome.parts["after"].over_dense.value == pytest.approx(sum(after) / len(after))


def test_pairs_are_differences_of_losses(comparison):
    by = {(o.arm, o.kind, o.target): o for o in comparison.outcomes}
    static, dart = by["static", ONE, 0.5].parts["one topic"], by["dart", ONE, 0.5].parts["one topic"]
    assert static.over_versus.value == pytest.approx(static.over_dense.value - dart.over_dense.value)
    assert dart.over_versus is None


def test_the_same_seed_gives_the_same_figures(comparison):
    again = run(tiny(), ("static", "dart"))
    kept = {(o.arm, o.kind, o.target): o for o in comparison.outcomes}
    for outcome in again.outcomes:
        assert dataclasses.asdict(outcome) == dataclasses.asdict(kept[outcome.arm, outcome.kind, outcome.target])
    other = run(tiny(), ("static",), dataclasses.replace(PLAN, seed=4, kinds=(ONE,)))
    assert other.of(ONE, 0.5)[0].parts != kept["static", ONE, 0.5].parts


class Killed(BaseException):
    pass


class Killer:
    """Counts forwards by their steps, and kills after some."""

    def __init__(self, after):
        self.after, self.done = after, 0

    def expect(self, steps):
        pass

    def step(self, label, steps):
        self.done += steps
        if self.done > self.after:
            raise Killed


def forwards_of(model):
    counted = []
    model.lm_head.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    model, names = tiny(), ("static", "clock")
    plan = dataclasses.replace(PLAN, sparsities=(0.5,))
    settings = journal_settings(model, material(documents(), Letters(), plan), plan, "auto")
    forwards = forwards_of(model)
    whole = Journal(None, settings)
    want = run(model, names, plan, journal=whole).to_dict()
    needed, path = len(forwards), tmp_path / "journal.jsonl"
    forwards.clear()
    with pytest.raises(Killed):
        run(model, names, plan, journal=Journal(path, settings), watcher=Killer(15 * plan.steps + 7))
    first, units = len(forwards), len(Journal(path, settings))
    assert 0 < units < len(whole)
    forwards.clear()
    assert run(model, names, plan, journal=Journal(path, settings)).to_dict() == want
    # at most the unit that was under way and the two batches' dense distributions of its kind come again
    assert first + len(forwards) <= needed + 3 * (plan.steps + 1)
    forwards.clear()
    assert run(model, names, plan, journal=Journal(path, settings)).to_dict() == want and not forwards
    run(model, (*names, "griffin"), plan, journal=Journal(path, settings))
    assert 0 < len(forwards) < needed, "another arm costs that arm alone"


def test_the_watcher_hears_of_every_step_and_of_no_more(tmp_path):
    class Heard(Killer):
        expected = 0

        def expect(self, steps):
            self.expected += steps

    plan = dataclasses.replace(PLAN, sparsities=(0.5,), kinds=(ONE,))
    model = tiny()
    settings = journal_settings(model, material(documents(), Letters(), plan), plan, "auto")
    forwards = forwards_of(model)
    for again in (False, True):
        heard = Heard(10**9)
        run(model, ("static", "clock"), plan, journal=Journal(tmp_path / "j", settings), watcher=heard)
        assert heard.done <= heard.expected
        if not again:
            # tokens, of which a forward decodes a block where no mask can change
            assert heard.done == heard.expected > len(forwards)


def test_a_journal_of_another_model_or_text_is_refused(tmp_path):
    model, given = tiny(), material(documents(), Letters(), PLAN)
    Journal(tmp_path / "j", journal_settings(model, given, PLAN, "auto"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        Journal(tmp_path / "j", journal_settings(model, given, PLAN, "auto"))
    other = material(documents(420), Letters(), PLAN)
    with pytest.raises(ValueError, match=r"other settings \(texts\)"):
        Journal(tmp_path / "j", journal_settings(tiny(), other, PLAN, "auto"))


def test_an_arm_that_never_masks_fails_the_comparison():
    sleeper = Arm("sleeper", lambda sparsity: Static(sparsity=sparsity, start=500))
    with pytest.raises(ValueError, match=r"arm 'sleeper' was built for .* and pruned none"):
        run(tiny(), ("static", sleeper))


def test_dense_distributions_that_would_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(compare_module, "HELD", 15_000)
    with pytest.raises(ValueError, match=r"a batch of 2 streams take .* a batch of 1 would do"):
        run(tiny())


def test_distributions_that_do_not_all_fit_change_nothing(monkeypatch, comparison):
    monkeypatch.setattr(compare_module, "HELD", 35_000)  # one batch of two
    model = tiny()
    forwards = forwards_of(model)
    plan = dataclasses.replace(PLAN, sparsities=(0.5,), kinds=(ONE,))
    found = run(model, ("static",), plan)
    kept = {(o.arm, o.kind, o.target): o for o in comparison.outcomes}
    assert found.outcomes[1].parts["one topic"].divergence == kept["static", ONE, 0.5].parts["one topic"].divergence
    # two batches dense as an arm and static; their distributions, the second one's twice: a prefill and one block each;
    # one stream alone, token by token, for its bytes
    assert len(forwards) == (2 + 2 + 3) * 2 + PLAN.steps + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsities": (1.2,)}, "sparsities must lie between 0 and 1, got 1.2"),
        ({"sparsities": (0.5, 0.5)}, "different numbers"),
        ({"sparsities": ()}, "at least one"),
        ({"prompt": 32}, "leaves nothing of the first topic's 32"),
        ({"prompt": 1}, "prompt must be a whole number of at least 2"),
        ({"count": 0}, "count must be"),
        ({"batch": 0}, "batch must be"),
        ({"lengths": (32,)}, "two whole numbers"),
        ({"lengths": (32, 6)}, "the second topic's 6 tokens leave nothing to compare: the first 6 are left out"),
        ({"kinds": ("one",)}, "unknown kind of streams 'one': did you mean 'one-topic'"),
        ({"kinds": (ONE, ONE)}, "two different ones"),
        ({"tolerance": 0.0}, "tolerance must lie"),
    ],
)
def test_plans_that_make_no_sense(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(PLAN, **change)


def test_texts_that_cannot_serve():
    with pytest.raises(ValueError, match="no domain has a text of 56 tokens"):
        material({"a": ["short"]}, Letters(), PLAN)
    with pytest.raises(ValueError, match=r"needs two domains .* there is one: a \(too short: b\); .*--kinds one-topic"):
        material({"a": ["x" * 300], "b": ["short"]}, Letters(), PLAN)
    given = material({"a": ["x" * 300], "b": ["short"]}, Letters(), dataclasses.replace(PLAN, kinds=(ONE,)))
    assert (given.domains, given.too_short) == (["a"], ["b"]) and list(given.streams) == [ONE]
    with pytest.raises(ValueError, match="nothing to compare"):
        run(tiny(), ("dense",))
    with pytest.raises(ValueError, match="named once"):
        run(tiny(), ("dart", "dart"))


def drawn(name):
    return [f"{name}.png", f"{name}.svg"]


def test_everything_is_written(tmp_path, comparison, monkeypatch):
    figures = []
    picture = Page.picture
    monkeypatch.setattr(
        Page, "picture", lambda self, figure, text: (figures.append(figure), picture(self, figure, text))[1]
    )
    files = write(comparison, tmp_path / "out", "A title")
    assert sorted(files) == [*drawn("curves"), "report.html", "results.csv", "results.json", *drawn("sparsity")]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(comparison.to_dict()))
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(flat(comparison)) == 3 * (1 + 2 * len(NAMES))
    after = next(r for r in rows if (r["arm"], r["part"], r["target"]) == ("dart", "after", "0.5"))
    mean = next(o for o in comparison.of(CHANGING, 0.5) if o.arm == "dart").parts["after"].over_dense.value
    assert float(after["loss_over_dense"]) == mean and after["reached"] == "True" and after["loss_over_versus"] == ""
    html = (tmp_path / "out" / "report.html").read_text()
    assert (
        all(name in html for name in NAMES)
        and f"{round(mean, 2) + 0.0:.2f}" in html
        and html.count("data:image/svg+xml") == 2
    )
    assert "first 6 tokens after a change are in no figure" in html and "The weights are float32" in html
    assert "clock cannot realise 75%" in html and "clock*" in html
    curves, sparsity = figures
    assert len(curves.axes) == 2 and len(sparsity.axes) == 3
    labels = [text.get_text() for text in curves.axes[1].get_legend().get_texts()]
    assert len(labels) == len(NAMES) and any(label.startswith("clock (realises 0.") for label in labels)


def test_tables_have_a_row_for_each_arm(comparison):
    for table, arms in ((quality, 5), (brief, 5), (conduct, 4), (pairs, 3)):
        columns, rows = table(comparison, 0.5)
        assert len(rows) == arms and all(len(row) == len(columns) for row in rows), table.__name__
    assert any(note.startswith("dart-reference@30 cannot realise") for note in notes(comparison))
    alone = run(tiny(), ("static",), dataclasses.replace(PLAN, kinds=(ONE,), sparsities=(0.5,)))
    for table in (quality, brief, conduct):
        columns, rows = table(alone, 0.5)
        assert rows and all(len(row) == len(columns) for row in rows)
    assert pairs(alone, 0.5)[1] == [], "no dart, no pairs"


def test_one_kind_alone_has_no_picture_of_a_change(tmp_path):
    alone = run(tiny(), ("static",), dataclasses.replace(PLAN, kinds=(ONE,), sparsities=(0.5,)))
    assert sorted(write(alone, tmp_path, "t")) == ["report.html", "results.csv", "results.json", *drawn("sparsity")]
