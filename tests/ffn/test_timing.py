"""What a batch costs: the model of it, and the file that keeps it."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from dartprune.ffn.timing import BATCHES, Timing, kept_timing, measure
from dartprune.ffn.weights import FFNWeights

ONE = Timing((2.0, 3.0, 5.0, 9.0, 17.0), 0.5, 0.25)


def weights(neurons=8):
    matrix = torch.randn(neurons, 16)
    return FFNWeights(matrix, matrix, matrix, None, None, None, "silu", F.silu)


def test_between_the_measured_sizes_and_beyond():
    assert [ONE.dense_seconds(rows) for rows in (*BATCHES, 3, 24, 64)] == [2.0, 3.0, 5.0, 9.0, 17.0, 2.5, 13.0, 33.0]
    assert ONE.kernel_seconds(10, 40) == 15.0


def test_measured_seconds_are_seconds():
    w = weights()
    timing = measure([w], [lambda x: x @ w.up.t() @ w.down])
    assert len(timing.dense) == len(BATCHES) and min(timing.dense) > 0
    assert timing.union >= 0 and timing.pair >= 0 and timing.union + timing.pair > 0


def test_measured_once_for_each_shape(tmp_path):
    calls = []

    def work(given, dense):
        calls.append(given)
        return ONE

    for neurons in (8, 8, 16, 8, 16):
        assert kept_timing(tmp_path / "new", [weights(neurons)], [], work) == ONE
    assert len(calls) == 2
    data = json.loads((tmp_path / "new" / "cpu-timing.json").read_text())
    assert data["version"] == 1 and len(data["layers"]) == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cpu-timing.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "layers": {"a": {"dense": [1]}}}']
)
def test_a_broken_file_is_measured_again(tmp_path, content):
    path = tmp_path / "cpu-timing.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match="measured again"):
        assert kept_timing(tmp_path, [weights()], [], lambda *given: ONE) == ONE
    assert kept_timing(tmp_path, [weights()], [], lambda *given: pytest.fail("it was kept")) == ONE


def test_another_version_is_written_anew(tmp_path):
    path = tmp_path / "cpu-timing.json"
    path.write_text('{"version": 0, "anything": true}')
    assert kept_timing(tmp_path, [weights()], [], lambda *given: ONE) == ONE
    assert json.loads(path.read_text())["version"] == 1


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        kept_timing(tmp_path / "file" / "x", [weights()], [], lambda *given: ONE)
