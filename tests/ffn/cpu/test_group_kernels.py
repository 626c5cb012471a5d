"""Kernels over rows of 4 and 8 bits against plain torch on the unpacked rows, with inputs rounded alike."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from dartprune.ffn import choose
from dartprune.ffn.cpu import quantised as cpu
from dartprune.ffn.cpu.backend import CpuBackend
from dartprune.ffn.quantised import NestedSketch, nested_estimates, nested_pairs, quantised_rows, rounded_inputs
from dartprune.ffn.selector_ops import gated_rows, sketched_rows
from dartprune.ffn.weights import FFNWeights
from ffn_cases import ACTS, DTYPES, lists, make, naive
from selector_cases import errors_of, others_of

pytest.importorskip("numba")
FORMS = [(4, True), (4, False), (8, True), (8, False)]


def plain(rows):
    """The unpacked rows as ordinary weights."""
    biases = rows.gate_bias, rows.up_bias, rows.down_bias
    return FFNWeights(rows.gate, rows.up, rows.down, *biases, rows.activation, rows.act)


def near(got, want, tolerance=1e-3):
    scale = float(want.double().abs().max()) + 1e-6
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * scale)


def cases(number):
    """Random shapes, also such as fill no group, with all activations and forms."""
    draw = random.Random(number)
    hidden = draw.choice([1, 5, 31, 32, 33, 64, 96, 100, 127, 128, 160, 200, 256, 384, 500, 512, 576, 640, 700])
    neurons = draw.choice([1, 2, 3, 5, 17, 40, 64, 100, 300])
    bits, nested = draw.choice(FORMS)
    gated, biases, act = draw.random() < 0.7, draw.random() < 0.4, draw.choice(ACTS)
    torch.manual_seed(number)
    weights = make(hidden, neurons, torch.float32, gated, biases, act)
    return quantised_rows(weights, bits, nested=nested), draw


@pytest.mark.parametrize("block", range(10))
def test_the_pruned_ffn_on_hundreds_of_random_cases(block):
    for number in range(30 * block, 30 * block + 30):
        rows, draw = cases(number)
        neurons = rows.neurons
        slots = draw.choice([1, 2, 5])
        index, count = lists(neurons, [draw.choice([0, 1, neurons, draw.randint(0, neurons)]) for _ in range(slots)])
        n = draw.choice([1, 1, 2, 3, 70])
        x = torch.randn(n, rows.hidden) * draw.choice([1e-3, 1.0, 30.0])
        owners = torch.randint(0, slots, (n,))
        got = CpuBackend().ffn(x, rows, index, count, owners)
        near(got, naive(rounded_inputs(x), plain(rows), index, count, owners))


@pytest.mark.parametrize(("bits", "nested"), FORMS)
@pytest.mark.parametrize("hidden", [33, 128, 700])
def test_values_that_need_no_rounding_are_multiplied_exactly(bits, nested, hidden):
    """Rows of one unit and one scale, values in whole steps of the largest: what is added then is the plain product."""
    torch.manual_seed(hidden)
    rows = quantised_rows(make(hidden, 128, torch.float32, True, False, "silu"), bits, nested=nested)
    begin, groups = rows.layout.offsets[11], rows.layout.groups
    rows.tail[:, begin : begin + groups] = 255
    rows.tail[:, begin + 2 * groups : begin + 2 * groups + 4] = torch.tensor([0.01]).view(torch.uint8)
    a = torch.randint(-32767, 32768, (3, 128)).float()
    a[:, ::4] = 32767
    near(cpu.down_product(a, rows), a.double() @ rows.unpacked("down", dtype=torch.float64), 2e-6)


@pytest.mark.parametrize(("bits", "nested"), FORMS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_gives_none(bits, nested, wrong):
    """In any place of a group; the other inputs of the call are what they were."""
    rows = quantised_rows(make(96, 40, torch.float32, True, False, "silu"), bits, nested=nested)
    index, count = lists(40, [20])
    for place in (0, 31, 40, 95):
        x, a = torch.randn(3, 96), torch.randn(3, 40)
        x[1, place], a[1, place % 40] = wrong, wrong
        for got in (
            cpu.products(x, rows, "up"),
            cpu.down_product(a, rows),
            CpuBackend().ffn(x, rows, index, count, torch.zeros(3, dtype=torch.int64)),
        ):
            assert not got[1].isfinite().any() and got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_every_dtype(dtype):
    rows = quantised_rows(make(96, 40, dtype, True, True, "silu"), 4)
    index, count = lists(40, [20])
    x = torch.randn(2, 96).to(dtype)
    got = CpuBackend().ffn(x, rows, index, count, torch.zeros(2, dtype=torch.int64))
    assert got.dtype == dtype
    want = naive(rounded_inputs(x), plain(rows), index, count, torch.zeros(2, dtype=torch.int64))
    near(got, want, {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])


@pytest.mark.parametrize(("bits", "nested"), FORMS)
def test_an_input_gives_the_same_bits_alone_and_in_a_batch(bits, nested):
    rows = quantised_rows(make(160, 700, torch.float32, True, False, "silu"), bits, nested=nested)
    index, count = lists(700, [350, 700, 1, 620, 90])
    index = torch.stack([torch.cat([row[:k].sort().values, row[k:]]) for row, k in zip(index, count, strict=True)])
    x, owners = torch.randn(5, 160), torch.arange(5)
    together = CpuBackend().ffn(x, rows, index, count, owners)
    for n in range(5):
        assert torch.equal(CpuBackend().ffn(x[n : n + 1], rows, index, count, owners[n : n + 1])[0], together[n])


@pytest.mark.parametrize("block", range(4))
def test_whole_projections_and_unpacked_rows(block):
    for number in range(1000 + 10 * block, 1010 + 10 * block):
        rows, draw = cases(number)
        n = draw.choice([1, 2, 7])
        x, a = torch.randn(n, rows.hidden), torch.randn(n, rows.neurons)
        for role in ("gate", "up") if rows.layout.gated else ("up",):
            near(cpu.products(x, rows, role), rounded_inputs(x) @ rows.unpacked(role).t())
        near(cpu.down_product(a, rows), a @ rows.down)
        first = draw.randint(0, rows.neurons - 1)
        for role in ("gate", "up", "down") if rows.layout.gated else ("up", "down"):
            for dtype in DTYPES:
                got = cpu.unpacked(rows, role, first, rows.neurons, dtype)
                assert torch.equal(got, rows.unpacked(role, first, dtype=dtype))


@pytest.mark.parametrize("block", range(6))
def test_the_token_gate(block):
    for number in range(2000 + 10 * block, 2010 + 10 * block):
        rows, draw = cases(number)
        neurons, slots = rows.neurons, draw.choice([1, 3])
        index, count = lists(neurons, [draw.randint(0, neurons) for _ in range(slots)])
        n = draw.choice([1, 2, 66])
        x, owners = torch.randn(n, rows.hidden), torch.randint(0, slots, (n,))
        wanted = torch.randint(0, neurons + 1, (slots,), dtype=torch.int32)
        importance = torch.rand(draw.choice([1, slots]), neurons) if draw.random() < 0.7 else None
        got = cpu.gated_rows(x, rows, index, count, owners, wanted, None, importance)
        want = gated_rows(rounded_inputs(x), plain(rows), index, count, owners, wanted, None, importance)
        same_choice(got, want, n)


@pytest.mark.parametrize("block", range(6))
def test_the_nested_sketch(block):
    for number in range(3000 + 10 * block, 3010 + 10 * block):
        rows, draw = cases(number)
        if not rows.layout.low:
            rows = quantised_rows(plain(rows), rows.layout.bits)
        neurons, slots = rows.neurons, draw.choice([1, 3])
        n = draw.choice([1, 2, 66])
        x, owners = torch.randn(n, rows.hidden), torch.randint(0, slots, (n,))
        wanted = torch.randint(0, neurons + 1, (slots,), dtype=torch.int32)
        importance = torch.rand(draw.choice([1, slots]), neurons)
        errors = errors_of(plain(rows), slots) if draw.random() < 0.6 else None
        others = others_of(plain(rows), slots) if draw.random() < 0.5 else (None, None)
        choice = owners, wanted, importance, neurons, None, errors, *others
        got = cpu.nested_rows(x, rows, *choice)
        want = sketched_rows(rounded_inputs(x), plain(rows), NestedSketch(rows), *choice)
        same_choice(got, want, n)
        gate, up = cpu.estimates(x, rows)
        for mine, theirs in zip((gate, up), nested_estimates(x, rows), strict=True):
            if theirs is not None:
                near(mine, theirs)


@pytest.mark.parametrize("block", range(6))
def test_products_and_estimates_in_one_pass(block):
    for number in range(5000 + 20 * block, 5020 + 20 * block):
        rows, draw = cases(number)
        if not rows.layout.low:
            rows = quantised_rows(plain(rows), rows.layout.bits)
        x = torch.randn(draw.choice([1, 2, 3, 4, 5, 16, 18]), rows.hidden) * draw.choice([1e-3, 1.0, 30.0])
        got, want = cpu.pairs(x, rows), nested_pairs(x, rows)
        alone = cpu.pairs(x[-1:], rows)
        for mine, single, theirs in zip(got, alone, want, strict=True):
            assert (mine[0] is None) == (theirs[0] is None) == (not rows.layout.gated)
            for each, one, right in zip(mine, single, theirs, strict=True):
                if right is not None:
                    near(each, right)
                    assert torch.equal(each[-1:], one)  # whatever is beside it


def same_choice(got, want, rows):
    """The same neurons but for ties within rounding, and where they are the same, the same output."""
    assert torch.equal(got.count, want.count)
    for n in range(rows):
        k = int(got.count[n])
        mine, theirs = set(got.index[n, :k].tolist()), set(want.index[n, :k].tolist())
        assert len(mine) == k and len(mine - theirs) <= max(1, k // 50)
        if mine == theirs:
            near(got.out[n], want.out[n])
            if k:
                torch.testing.assert_close(got.cut[n], want.cut[n], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_token_choices_are_the_same_alone_and_in_a_batch(bits):
    rows = quantised_rows(make(160, 700, torch.float32, True, False, "silu"), bits)
    x, owners = torch.randn(5, 160), torch.arange(5)
    wanted = torch.tensor([350, 700, 1, 600, 0], dtype=torch.int32)
    importance = torch.rand(1, 700)
    index, count = lists(700, [700, 500, 3, 650, 90])
    others = others_of(plain(rows), 5)
    for call in (
        lambda x, owners: cpu.nested_rows(x, rows, owners, wanted, importance, 700, None, None, *others),
        lambda x, owners: cpu.gated_rows(x, rows, index, count, owners, wanted, None, importance),
    ):
        together = call(x, owners)
        for n in range(5):
            alone = call(x[n : n + 1], owners[n : n + 1])
            assert torch.equal(alone.out[0], together.out[n]) and torch.equal(alone.index[0], together.index[n])


def test_a_threshold_takes_the_place_of_a_number():
    rows = quantised_rows(make(96, 60, torch.float32, True, False, "silu"), 4)
    x, one = torch.randn(1, 96), torch.zeros(1, dtype=torch.int64)
    importance, wanted = torch.ones(1, 60), torch.tensor([5], dtype=torch.int32)
    first = cpu.nested_rows(x, rows, one, wanted, importance, 60, None, None)
    again = cpu.nested_rows(x, rows, one, wanted * 0, importance, 60, first.cut, None)
    assert int(again.count) == 5 and torch.equal(again.index[0, :5], first.index[0, :5])


def test_plain_vectors_give_what_the_instructions_give(monkeypatch):
    """The code for processors without products of bytes, compiled and run here."""
    from numba import njit

    from dartprune.ffn.cpu import group_blocks as blocks
    from dartprune.ffn.cpu import group_pairs, group_rows
    from dartprune.ffn.cpu import group_vectors as vectors

    rows = quantised_rows(make(700, 4, torch.float32, True, False, "silu"), 4)
    wide = quantised_rows(make(700, 4, torch.float32, True, False, "silu"), 8)
    codes = torch.randint(-127, 128, (rows.layout.width,), dtype=torch.int8).numpy()
    scale, sums = torch.rand(rows.layout.groups).numpy(), torch.randn(rows.layout.groups).numpy()
    head, tail, offsets = rows.head.numpy(), rows.tail.numpy(), rows.layout.offsets

    def compiled():
        @njit
        def parts(x, scale, sums, head, tail, at, scales, rest, groups):
            whole = group_rows.whole_row(x, scale, sums, head, scales, at, tail, rest, groups, 2, 2, head, tail)
            low = group_rows.low_row(x, scale, head, scales, tail, rest, groups, 2, head, tail)
            return whole, low, group_rows.high_row(x, scale, sums, head, scales, at, groups, 2)

        @njit
        def added(out, shares, tail, rows, at, groups, bits):
            if bits == 4:
                blocks.add_codes(out, np.float32(0.5), shares, tail, rows, 4, at, groups, 4, rows)
            else:
                blocks.add_codes(out, np.float32(0.5), shares, tail, rows, 4, at, groups, 8, rows)

        @njit
        def pairs(x, scale, sums, home, tail, at, scales, rest, groups):
            return group_pairs.row_pairs(x, scale, sums, 0, 1, home, scales, at, tail, rest, groups, 2)

        ends = offsets[4], offsets[6], offsets[8], offsets[0]
        found = []
        for i in range(4):
            whole, low, (high, _) = parts(codes, scale, sums, head[i], tail[i], *ends)
            assert whole == pytest.approx(low + high, rel=1e-5, abs=1e-4)
            found.append((whole, low, high))
        out = np.zeros((2, rows.layout.width), np.float32)
        shares = (np.arange(2 * offsets[0], dtype=np.int64) * 65537 * 100 % 2**31).reshape(2, -1).astype(np.int32)
        index = np.array([3, 0, 2, 3], np.int32)
        for k, of in enumerate((rows, wide)):
            added(out[k], shares, of.tail.numpy(), index, of.layout.offsets[10], offsets[0], of.layout.bits)
        given = codes[None], scale[None], sums[None]
        found += [(*pairs(*given, head[i], tail[i], *ends), 0.0) for i in range(4)]
        return found, torch.from_numpy(out)

    import numpy as np

    fast = compiled()
    monkeypatch.setattr(vectors, "native", lambda lanes: False)
    slow = compiled()
    torch.testing.assert_close(torch.tensor(fast[0]), torch.tensor(slow[0]))
    torch.testing.assert_close(fast[1], slow[1])
    assert fast[1].abs().amax(1).min() > 0


def test_which_backends_take_rows():
    rows = quantised_rows(make(96, 8, torch.float32, True, False, "silu"), 4)
    cpu_device = torch.device("cpu")
    assert choose("auto", rows, cpu_device)[0].name == "cpu"
    assert choose("reference", rows, cpu_device)[0].name == "reference"
    other = dataclasses.replace(make(96, 8, torch.float32, True, False, "silu"), activation="other")
    assert choose("auto", quantised_rows(other, 4), cpu_device)[0].name == "masked"
    backend = CpuBackend()
    kept = [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([2, 5], dtype=torch.int32)]
    assert backend.bytes_read(rows, kept) == 3 * rows.row_bytes
