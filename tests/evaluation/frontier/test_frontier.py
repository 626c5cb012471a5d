"""The frontier: bits counted right, losses paired with bfloat16, and nothing measured twice."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from dartprune import Dense, SketchDart, quantise
from dartprune.evaluation.arms import arm
from dartprune.evaluation.compare.plan import CHANGING, Plan, material
from dartprune.evaluation.forced import forced_losses
from dartprune.evaluation.frontier.formats import check_formats, loaded
from dartprune.evaluation.frontier.report import notes, table, write
from dartprune.evaluation.frontier.run import ALIKE, frontier
from dartprune.evaluation.texts import batch
from dartprune.gguf_files import ffn_bits
from dartprune.model.families import describe
from dartprune.model.weights import row_weights
from dartprune.reporting.journal import Journal
from letters import Letters, documents, tiny

pytest.importorskip("numba", reason="needs the extra cpu")

PLAN = Plan(prompt=16, lengths=(32, 24), count=4, batch=2, kinds=(CHANGING,), sparsities=(0.3, 0.9), seed=3)
FORMATS = ["int8", "int4", "int3"]


class Reader:
    """Loads the same tiny model again and again, in any dtype, and counts."""

    def __init__(self):
        self.loads = 0

    def __call__(self, source, dtype):
        self.loads += 1
        torch.manual_seed(0)
        return tiny().to(getattr(torch, dtype)), Letters()


def measured(read=None, **more):
    options = {"formats": FORMATS, "methods": ["sketch-dart", "dart"], "read": read or Reader()} | more
    return frontier(None, documents(), PLAN, **options)


@pytest.fixture(scope="module")
def found():
    return measured()


def by(found):
    return {(p.weights, p.method, p.sparsity): p for p in found.points}


def streams():
    given = material(documents(), Letters(), PLAN)
    return batch(given.streams[CHANGING]), given.left_out


def mean_loss(losses, base, left_out):
    """As a reader would compute it: over streams, the two parts by their length."""
    over, change = losses - base, PLAN.lengths[0] - PLAN.prompt
    share = change / PLAN.steps
    return float(share * over[:, :change].mean() + (1 - share) * over[:, change + left_out :].mean())


def test_bfloat16_is_the_origin(found):
    origin = by(found)["bfloat16", "dense", 0.0]
    assert origin.bits == 16 and origin.loss.value == origin.loss.low == origin.loss.high == 0 and origin.realised == 0


def test_bits_of_a_format_are_those_of_its_rows(found):
    model = Reader()(None, "bfloat16")[0]
    quantise(model, 4, whole=False)
    rows = [row_weights(layer) for layer in describe(model).layers]
    held = sum(r.head.nbytes + r.tail.nbytes for r in rows)
    weights = sum(r.neurons * r.matrices * r.hidden for r in rows)
    assert by(found)["int4", "dense", 0.0].bits == pytest.approx(8 * held / weights)
    points = by(found)
    assert points["int3", "dense", 0.0].bits < points["int4", "dense", 0.0].bits < points["int8", "dense", 0.0].bits


def test_a_method_reads_what_it_does_not_leave_unread(found):
    for (weights, method, asked), point in by(found).items():
        whole = by(found)[weights, "dense", 0.0].bits
        assert point.bits == pytest.approx(whole * (1 - point.realised))
        if method == "dart":
            assert point.realised == pytest.approx(asked, abs=0.02)


def test_what_replays_read_counts():
    points = by(measured(formats=["int4"], methods=["clock-replay@8"]))
    report = forced_losses(
        Reader()(None, "bfloat16")[0], arm("clock-replay@8").build(0.3), streams()[0], PLAN.prompt, block=None
    )[1]
    events = report.sequences[0].events
    assert len(events) >= 4 and {event.kind for event in events} == {"replay"}
    for weights in ("bfloat16", "int4"):
        whole, point = points[weights, "dense", 0.0].bits, points[weights, "clock-replay@8", 0.3]
        # gate and up, two thirds of the weights
        assert point.bits == pytest.approx(whole * (1 - point.realised + len(events) * (2 / 3) / PLAN.steps))


def test_losses_are_those_of_the_streams_paired_with_bfloat16(found):
    tokens, left_out = streams()
    model = Reader()(None, "bfloat16")[0]
    base, _ = forced_losses(model, Dense(), tokens, PLAN.prompt, block=None)
    quantise(model, 4, whole=False)
    for method, pruner in (("dense", Dense()), ("sketch-dart", SketchDart(0.3))):
        # bfloat16 on rows, so that a batch of two rounds otherwise than one of four
        losses, _ = forced_losses(model, pruner, tokens, PLAN.prompt, block=None)
        want = mean_loss(losses, base, left_out)
        got = by(found)["int4", method, pruner.sparsity if method != "dense" else 0.0]
        assert got.loss.value == pytest.approx(want, abs=0.01) and got.loss.value != 0
        assert got.loss.low <= got.loss.value <= got.loss.high
    assert abs(by(found)["int8", "dense", 0.0].loss.value) < abs(by(found)["int3", "dense", 0.0].loss.value) + 0.01


def test_rounded_weights_lie_on_so_many_levels():
    model = loaded(None, "int3", Reader()).model
    before = Reader()(None, "bfloat16")[0]
    for layer, was in zip(describe(model).layers, describe(before).layers, strict=True):
        up, first = layer.up.weight, was.up.weight
        for group in up[0].float().split(32):
            assert len(group.unique()) <= 8
        step = first.float().abs().max() * 2 / 7
        assert 0 < (up.float() - first.float()).abs().max() <= step


def test_what_a_method_cannot_reach_is_said_and_not_drawn(found):
    assert any("sketch-dart at 0.9 on int4" in why for why in found.left_out)
    assert ("int4", "sketch-dart", 0.9) not in by(found)
    assert any(note.startswith("Left out: sketch-dart at 0.9") for note in notes(found))


def test_the_best_are_those_that_nothing_beats(found):
    for point in found.points:
        beaten = [
            q
            for q in found.points
            if q.bits <= ALIKE * point.bits and q.loss.value < point.loss.value and q is not point
        ]
        assert point.best == (not beaten)


def test_a_ceiling_reads_everything_and_is_no_rival():
    found = measured(formats=["int4"], methods=["per-token"])
    for point in found.points:
        if point.method == "per-token":
            assert point.ceiling and not point.best
            assert point.bits == by(found)[point.weights, "dense", 0.0].bits and point.realised > 0.2


def test_what_was_done_is_not_done_again(tmp_path):
    def journal(settings):
        return Journal(tmp_path / "journal.jsonl", settings)

    first = measured(journal=journal)
    read = Reader()
    again = measured(read, journal=journal)
    assert read.loads == 1  # to know that it is the same model
    assert again.to_dict() == first.to_dict()
    more = Reader()
    measured(more, journal=journal, formats=[*FORMATS, "int2"])
    assert more.loads == 2


def test_files(found, tmp_path):
    files = write(found, tmp_path, "a tiny model")
    assert set(files) == {"report.html", "results.json", "results.csv", "frontier.png", "frontier.svg"}
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == len(found.points) and float(rows[0]["bits"]) == 16
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["formats"] == ["bfloat16", *FORMATS]
    columns, cells = table(found.points)
    assert all(len(row) == len(columns) for row in cells)
    reads = [float(row[3]) for row in cells]
    assert reads == sorted(reads, reverse=True)


@pytest.mark.parametrize("name", ["int9", "int1", "int", "float8", "no-file.gguf", ""])
def test_unknown_formats_are_one_line(name):
    with pytest.raises(ValueError, match="unknown format of weights"):
        check_formats([name])


def test_a_gguf_file_is_taken_whole_and_its_bits_are_counted(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs the extra gguf")
    from gguf_file import write_gguf

    path = tmp_path / "tiny.Q8_0.gguf"
    torch.manual_seed(0)
    model = tiny()
    write_gguf(model, path)
    up, down = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    bits = [34 * 8 / 32 if weight.shape[1] % 32 == 0 else 32 for weight in (up, up, down)]
    assert ffn_bits(str(path)) == pytest.approx(sum(bits) / 3)
    found = measured(formats=[str(path)], methods=["dart"])
    point = by(found)[str(path), "dense", 0.0]
    assert point.bits == pytest.approx(sum(bits) / 3)
    assert (str(path), "dart", 0.3) not in by(found)  # its blocks are no rows

    class Other(Letters):
        def __call__(self, text, **options):
            return {"input_ids": [ord(letter) % 64 + 2 for letter in text]}

    def read(source, dtype):
        model, tokenizer = Reader()(source, dtype)
        return model, Other() if source else tokenizer

    with pytest.raises(ValueError, match="cuts the texts otherwise"):
        measured(formats=[str(path)], methods=[], read=read)
    monkeypatch.setattr("gguf.GGUFReader", lambda path: type("Empty", (), {"tensors": []}))
    with pytest.raises(ValueError, match="no tensor is named"):
        ffn_bits(str(path))
