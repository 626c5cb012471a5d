"""The CPU kernels of the per-token selectors against their references in torch."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from dartprune.ffn import selector_ops
from dartprune.ffn import sketch as sketch_oracle
from dartprune.ffn.cpu import selectors as cpu_selectors
from dartprune.ffn.cpu.sketch_bytes import integers_by_bytes
from dartprune.ffn.sketch import FFNSketch, build_planes, build_sketch
from ffn_cases import DTYPES, lists, make
from selector_cases import assert_agree, case, check_choice, errors_of, gate_scores, others_of, same


@pytest.mark.parametrize("seed", range(160))
def test_gate_on_random_cases(seed):
    rng, w, x, slots, wanted, threshold, importance = case(seed)
    index, count = lists(w.neurons, [w.neurons, rng.randint(0, w.neurons), rng.randint(0, w.neurons)])
    importance = None if rng.random() < 0.3 else importance
    call = (x, w, index, count, slots, wanted, threshold, importance)
    want = selector_ops.gated_rows(*call)
    assert_agree(cpu_selectors.gated_rows(*call), want, gate_scores(x, w, slots, importance), w, x)


@pytest.mark.parametrize("seed", range(160))
def test_sketch_on_random_cases(seed):
    rng, w, x, slots, wanted, threshold, importance = case(seed)
    bits, activation_bits = rng.choice([1, 1, 2, 3, 4]), rng.choice([4, 4, 2, 3, 8])
    sketch = build_sketch(w, bits, activation_bits, min(w.hidden, rng.choice([0, 1, 4, 7])))
    width = rng.randint(1, w.neurons + 2)
    errors = errors_of(w) if rng.random() < 0.5 else None
    others = others_of(w) if rng.random() < 0.5 else (None, None)
    call = (x, w, sketch, slots, wanted, importance, width, threshold, errors, *others)
    weight, known = (
        importance[slots if importance.shape[0] > 1 else [0] * len(slots)],
        None if errors is None else errors[slots],
    )
    scores = sketch_oracle.sketch_scores(x, w, sketch, weight, known)
    means = None if others[0] is None else others[0][slots]
    assert_agree(cpu_selectors.sketched_rows(*call), selector_ops.sketched_rows(*call), scores, w, x, means)


@pytest.mark.parametrize("seed", range(40))
def test_rounded_inputs_and_integers(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, bits = rng.choice([1, 7, 64, 130, 512, 600, 1100]), rng.choice([2, 3, 4, 4, 5, 8])
    x = torch.randn(3, hidden) * torch.tensor([[1.0], [1e-3], [0.0]])
    x[0, rng.randrange(hidden)] = 100
    outliers = min(hidden, rng.choice([0, 1, 4, 5]))
    want, got = sketch_oracle.quantise_input(x, bits, outliers), cpu_selectors.quantise_input(x, bits, outliers)
    torch.testing.assert_close(got.step, want.step, rtol=1e-6, atol=0)
    assert torch.equal(got.outlier_value, want.outlier_value)
    assert not (got.outlier_index != want.outlier_index)[want.outlier_value != 0].any()
    integers = [sketch_oracle._unpack(planes.planes, hidden, signed=True) for planes in (got, want)]
    # a step that differs in its last bit may round one entry in thousands to the other side
    assert int((integers[0] - integers[1]).abs().sum()) <= 1
    assert integers[0].sum(dim=1).tolist() == got.total.tolist()
    sketch = build_planes(torch.randn(21, hidden), rng.choice([1, 2, 3, 4]))
    assert torch.equal(cpu_selectors.sketch_integers(got, sketch), sketch_oracle.sketch_integers(got, sketch))


@pytest.mark.parametrize("seed", range(40))
def test_many_rows_have_the_estimates_that_each_has_alone(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, neurons, rows = rng.choice([1, 7, 64, 130, 576, 900]), rng.randint(1, 150), rng.choice([4, 5, 8, 19, 33])
    sketch = build_planes(torch.randn(neurons, hidden), rng.choice([1, 2, 3, 4]))
    options = rng.choice([2, 3, 4, 4, 5, 8]), min(hidden, rng.choice([0, 1, 3, 4, 7]))
    x = torch.randn(rows, hidden) * torch.rand(rows, 1)
    both = FFNSketch(build_planes(torch.randn(neurons, hidden), sketch.bits), sketch, *options)
    of_gate, got = cpu_selectors.estimates(x, both)
    alone = [torch.cat(one) for one in zip(*(cpu_selectors.estimates(row[None], both) for row in x), strict=True)]
    assert torch.equal(of_gate, alone[0])
    assert torch.equal(got, alone[1])
    plain = cpu_selectors.estimates(x, FFNSketch(None, sketch, *options))
    assert plain[0] is None
    assert torch.equal(got, plain[1])
    rounded = cpu_selectors.quantise_input(x, *options)
    torch.testing.assert_close(got, sketch_oracle.sketch_dots(rounded, sketch), rtol=1e-4, atol=1e-4)
    # and the integers themselves, by bytes and by bits
    by_bytes = np.empty((rows, neurons), np.int32)
    codes = np.empty((neurons, rounded.planes.shape[2] * 64), np.uint8)
    inputs = np.zeros((rows, codes.shape[1]), np.int8)
    inputs[:, :hidden] = sketch_oracle._unpack(rounded.planes, hidden, signed=True).numpy()
    integers_by_bytes(0, neurons, sketch.planes.numpy(), inputs, rounded.total.numpy(), codes, by_bytes)
    assert by_bytes.tolist() == cpu_selectors.sketch_integers(rounded, sketch).tolist()


@pytest.mark.parametrize("seed", range(60))
def test_choice_against_a_sort(seed):
    check_choice(seed, cpu_selectors.chosen_rows)


@pytest.mark.parametrize("hidden", [3, 100])
def test_fewer_entries_than_outliers(hidden):
    x = torch.zeros(2, hidden)
    x[0, 0], x[1, 2] = 5, -3
    w = make(hidden, 9, torch.float32, True, False, "silu")
    sketch, importance = build_sketch(w, 1, outliers=3), torch.ones(1, 9)
    call = (x, w, sketch, torch.tensor([0, 0]), torch.tensor([4], dtype=torch.int32), importance, 9)
    got, want = cpu_selectors.sketched_rows(*call), selector_ops.sketched_rows(*call)
    torch.testing.assert_close(got.cut, want.cut)
    assert torch.equal(got.index[:, :4], want.index[:, :4])


def every_call(dtype, act="silu", rows=9, hidden=200, neurons=300):
    """Both operators on the same rows: functions of (x, slots)."""
    w = make(hidden, neurons, dtype, True, True, act)
    index, count = lists(neurons, [200, 120, 300])
    wanted, importance = torch.tensor([40, 77, 5], dtype=torch.int32), torch.rand(3, neurons)
    sketch = build_sketch(w, 2)
    x, slots = torch.randn(rows, hidden).to(dtype), torch.randint(0, 3, (rows,))
    return (
        x,
        slots,
        (
            lambda x, slots: cpu_selectors.gated_rows(x, w, index, count, slots, wanted, None, importance),
            lambda x, slots: cpu_selectors.sketched_rows(x, w, sketch, slots, wanted, importance, 100),
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(dtype):
    torch.manual_seed(3)
    x, slots, operators = every_call(dtype, rows=70)  # more than the kernel takes at a time
    for operator in operators:
        together = operator(x, slots)
        for n in (0, 1, 40, 63, 64, 69):
            alone = operator(x[n : n + 1], slots[n : n + 1])
            part = selector_ops.TokenRows(*(getattr(together, f)[n : n + 1] for f in ("out", "index", "count", "cut")))
            assert same(alone, part)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_same_bits_with_any_number_of_threads(rows):
    torch.manual_seed(4)
    x, slots, operators = every_call(torch.bfloat16, rows=rows)
    before = torch.get_num_threads()
    try:
        for operator in operators:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results += [operator(x, slots) for _ in range(3)]
            assert all(same(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_silent_layers_read_nothing():
    w = make(32, 48, torch.float32, True, False, "relu")
    w.gate.copy_(-w.gate.abs())
    sketch, importance = build_sketch(w, 1, outliers=0), torch.ones(1, 48)
    index, count = lists(48, [30])
    slots, wanted = torch.tensor([0]), torch.tensor([12], dtype=torch.int32)
    for x in (torch.rand(1, 32) + 0.1, torch.zeros(1, 32)):
        for result in (
            cpu_selectors.gated_rows(x, w, index, count, slots, wanted),
            cpu_selectors.sketched_rows(x, w, sketch, slots, wanted, importance, 20),
        ):
            assert result.count.tolist() == [0] and result.cut.tolist() == [float("inf")]
            assert not result.out.any()


def test_not_a_number_shows():
    torch.manual_seed(5)
    x, slots, operators = every_call(torch.float32, rows=2)
    x[1, 7] = float("nan")
    for operator in operators:
        result = operator(x, slots)
        assert result.out[0].isfinite().all() and result.out[1].isnan().all()


def test_infinite_activations_of_neurons_without_importance():
    w = make(8, 10, torch.float32, True, False, "relu")
    w.gate.copy_(w.gate.abs())
    sketch, importance = build_sketch(w, 1), torch.zeros(1, 10)
    index, count = lists(10, [10])
    slots, x = torch.tensor([0]), torch.full((1, 8), 3e38)
    for got, want in (
        (f.gated_rows(x, w, index, count, slots, count, None, importance).count for f in (cpu_selectors, selector_ops)),
        (f.sketched_rows(x, w, sketch, slots, count, importance, 10).count for f in (cpu_selectors, selector_ops)),
    ):
        assert torch.equal(got, want)


def test_rows_that_are_not_contiguous_are_refused():
    w = make(8, 10, torch.float32, True, False, "silu")
    columns = replace(w, down=w.down.t().contiguous().t())
    index, count = lists(10, [4])
    with pytest.raises(ValueError, match="down matrix are not contiguous"):
        cpu_selectors.gated_rows(torch.randn(1, 8), columns, index, count, torch.tensor([0]), count)


def test_inside_a_full_graph():
    torch.manual_seed(6)
    x, slots, operators = every_call(torch.float32, rows=2)
    for operator in operators:

        def step(x, operator=operator):
            result = operator(x * 2, slots)
            return result.out + 1, result.count, result.cut

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        for got, want in zip(compiled(x), step(x), strict=True):
            assert torch.equal(got, want)
        torch._dynamo.reset()
