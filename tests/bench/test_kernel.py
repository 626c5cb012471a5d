"""The arms of the kernel benchmark compute the same FFN, and its bytes are those counted by hand."""

from __future__ import annotations

import pytest
import torch

from dartprune.bench import kernel
from dartprune.bench.kernel import ARMS, FFNCase, RandomFFNs, layers_for, measure
from dartprune.ffn.reference import ReferenceBackend

CPU = torch.device("cpu")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_pruned_arms_compute_the_same(gated, batch):
    case = FFNCase(24, 40, "float32", 0.6, batch, gated, "gelu")
    layers = RandomFFNs(case, 2, ReferenceBackend(), CPU)
    for layer in range(2):
        masked = layers.masked(layer)
        torch.testing.assert_close(layers.packed(layer), masked)
        torch.testing.assert_close(layers.in_place(layer), masked)
        assert not torch.allclose(layers.dense(layer), masked, atol=1e-3)
    assert not torch.equal(layers.masked(0), layers.masked(1))  # another layer, other weights
    everything = RandomFFNs(FFNCase(24, 40, "float32", 0.0, batch, gated, "gelu"), 1, ReferenceBackend(), CPU)
    torch.testing.assert_close(everything.in_place(0), everything.dense(0))


def test_every_sequence_has_its_own_mask():
    layers = RandomFFNs(FFNCase(8, 64, "float32", 0.5, 4), 1, ReferenceBackend(), CPU)
    masks = {tuple(index.tolist()) for index in layers.index[0]}
    assert len(masks) == 4 and all(len(set(mask)) == 32 for mask in masks)


def test_one_call_goes_through_all_layers():
    layers = RandomFFNs(FFNCase(8, 16, "float32", 0.5), 3, ReferenceBackend(), CPU)
    seen = []
    layers.dense = seen.append
    layers.works()["dense"]()
    assert seen == [0, 1, 2]


def test_bytes_by_hand():
    layers = RandomFFNs(FFNCase(16, 100, "bfloat16", 0.7, 2), 1, ReferenceBackend(), CPU)
    neuron = 3 * 16 * 2
    assert layers.bytes_moved("dense") == layers.bytes_moved("masked") == 100 * neuron
    assert layers.bytes_moved("packed copy") == 2 * 30 * neuron
    assert layers.bytes_moved("zero-copy") == 2 * 30 * neuron  # the reference gathers for each sequence
    plain = RandomFFNs(FFNCase(16, 100, "float32", 0.7, 1, gated=False), 1, ReferenceBackend(), CPU)
    assert plain.bytes_moved("zero-copy") == 30 * 2 * 16 * 4


def test_rows(stream, finite):
    cases = [FFNCase(16, 64, "float32", 0.5, 2), FFNCase(16, 64, "bfloat16", 0.7, 1, False, "relu2")]
    heard = []
    result = measure(cases, backend="reference", layers=2, turns=2, stream=stream, progress=heard.append)
    assert [row.arm for row in result.rows] == [*ARMS, *ARMS] and len(heard) == 2
    finite(result.rows)
    for row in result.rows:
        # the limit is the time of the bytes alone, so its share is the bandwidth's
        assert row.share_of_limit == pytest.approx(row.bandwidth_share)
    assert result.rows[0].times_as_fast.median == 1
    assert result.rows[4].extra == {"hidden": 16, "neurons": 64, "dtype": "bfloat16", "sparsity": 0.7, "batch": 1,
                                    "gated": False, "activation": "relu2"}  # fmt: skip
    assert "goes through 2 layers" in result.notes[0]


def test_kept_rows_are_four_times_the_last_cache(monkeypatch):
    monkeypatch.setattr(kernel, "last_level_cache", lambda device: 2**20)
    case = FFNCase(64, 1024, "float32", 0.75)
    assert (
        layers_for(case, CPU) * case.weight_bytes / 4 >= 4 * 2**20 > (layers_for(case, CPU) - 1) * case.weight_bytes / 4
    )
    assert layers_for(FFNCase(4096, 14336, "float32", 0.0), CPU) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"sparsity": float("nan")}, "sparsity must lie in"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"neurons": -5}, "neurons must be at least 1"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"activation": "silo"}, "did you mean 'silu'"),
    ],
)
def test_cases_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        FFNCase(**options)


def test_a_backend_that_cannot_read_rows_here(stream, monkeypatch):
    with pytest.raises(ValueError, match="no backend reads single rows here: masked computes all"):
        measure([FFNCase(8, 16)], backend="masked", stream=stream)
    monkeypatch.setattr(kernel, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="layers need"):
        measure([FFNCase(8, 16)], backend="reference", layers=4, stream=stream)
