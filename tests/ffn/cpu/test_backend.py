"""The CPU row kernels against a naive FFN in double precision: shapes, dtypes, activations, lists, batches, threads."""

from __future__ import annotations

import random
import sys
import threading

import pytest
import torch

pytest.importorskip("numba")

from dartprune import Dart
from dartprune.ffn import choose
from dartprune.ffn.cpu.backend import CpuBackend
from dartprune.ffn.reference import ReferenceBackend
from ffn_cases import ACTS, DTYPES, TOLERANCE, lists, make, naive
from test_matrix import tokens
from tiny import FAMILIES

BACKEND = CpuBackend()


@pytest.mark.parametrize("seed", range(240))
def test_random_cases(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, neurons = rng.choice([1, 3, 16, 31, 64, 97]), rng.choice([1, 2, 5, 33, 64, 129])
    dtype, gated, biases, act = rng.choice(DTYPES), rng.random() < 0.6, rng.random() < 0.5, rng.choice(ACTS)
    w = make(hidden, neurons, dtype, gated, biases, act)
    index, count = lists(neurons, [0, 1, neurons, rng.randint(0, neurons)])
    rows = rng.choice([1, 1, 2, 3, 5, 9])
    slots = torch.tensor([rng.randrange(4) for _ in range(rows)])
    x = torch.randn(hidden, rows).to(dtype).t()  # not contiguous
    got = BACKEND.ffn(x, w, index, count, slots)
    assert got.dtype is dtype and got.shape == x.shape
    want = naive(x, w, index, count, slots)
    scale = float(want.abs().max()) + 1.0
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_more_rows_than_a_word_has_bits():
    w = make(24, 40, torch.float32, True, True, "silu")
    index, count = lists(40, [10, 20, 40])
    slots = torch.randint(0, 3, (150,))
    x = torch.randn(150, 24)
    torch.testing.assert_close(
        BACKEND.ffn(x, w, index, count, slots).double(), naive(x, w, index, count, slots), rtol=1e-4, atol=1e-4
    )


def test_lists_are_read_anew_at_every_call():
    w = make(32, 48, torch.float32, True, False, "silu")
    index, count = lists(48, [12])
    slots, x = torch.tensor([0]), torch.randn(1, 32)
    before = BACKEND.ffn(x, w, index, count, slots)
    index.copy_(lists(48, [12])[0])
    after = BACKEND.ffn(x, w, index, count, slots)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.double(), naive(x, w, index, count, slots), rtol=1e-4, atol=1e-5)
    count[0] = 0
    assert BACKEND.ffn(x, w, index, count, slots).abs().sum() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_at_every_run_and_right_with_any_number_of_threads(rows):
    w = make(64, 200, torch.bfloat16, True, False, "silu")
    index, count = lists(200, [90, 31])
    slots, x = torch.tensor([0, 1, 0])[:rows], torch.randn(rows, 64).bfloat16()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            first = BACKEND.ffn(x, w, index, count, slots)
            assert all(torch.equal(first, BACKEND.ffn(x, w, index, count, slots)) for _ in range(5))
            want = naive(x, w, index, count, slots)
            torch.testing.assert_close(first.double(), want, rtol=1e-2, atol=1e-2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_of_torch_is_kept(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        w = make(16, 20, torch.float32, True, False, "silu")
        BACKEND.prepare(w)
        assert torch.get_num_threads() == threads
        index, count = lists(20, [9])
        BACKEND.ffn(torch.randn(1, 16), w, index, count, torch.tensor([0]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_two_python_threads():
    cases = []
    for seed in range(2):
        torch.manual_seed(seed)
        w = make(48, 100, torch.float32, True, False, "silu")
        index, count = lists(100, [40])
        x = torch.randn(1, 48)
        cases.append((x, w, index, count, torch.tensor([0])))
    BACKEND.prepare(cases[0][1])
    torch.set_num_threads(1)
    want = [BACKEND.ffn(*case) for case in cases]
    wrong = []

    def work(i):
        torch.set_num_threads(1)  # of this Python thread: with another number sums are added in another order
        for _ in range(200):
            if not torch.equal(BACKEND.ffn(*cases[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_models_in_two_threads():
    models = [FAMILIES[name]() for name in ("llama", "gpt2")]

    def decode(model):
        with Dart(sparsity=0.5)(model, backend="cpu"):
            return model.generate(tokens(model), max_new_tokens=24, min_new_tokens=24, do_sample=False)

    torch.set_num_threads(1)
    want = [decode(model) for model in models]
    got = [[], []]

    def work(i):
        torch.set_num_threads(1)
        for _ in range(4):
            got[i].append(decode(models[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(got[i]) == 4 and all(torch.equal(out, want[i]) for out in got[i])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [32, 77, 160])
def test_every_remainder_of_a_block(hidden, dtype, gated):
    w = make(hidden, 23, dtype, gated, True, "silu")
    for k in range(1, 13):
        index, count = lists(23, [k, 23 - k, k])
        for rows in (1, 2, 3):
            x, slots = torch.randn(rows, hidden).to(dtype), torch.arange(rows)
            want = naive(x, w, index, count, slots)
            scale = float(want.abs().max()) + 1.0
            got = BACKEND.ffn(x, w, index, count, slots)
            torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_inside_a_full_graph():
    w = make(32, 48, torch.float32, True, False, "silu")
    index, count = lists(48, [12])
    slots, x = torch.tensor([0]), torch.randn(1, 32)

    def step(x):
        return BACKEND.ffn(x * 2, w, index, count, slots) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    torch._dynamo.reset()


def test_the_reference_is_naive_too():
    w = make(31, 40, torch.float64, True, True, "gelu")
    index, count = lists(40, [0, 7, 40])
    slots, x = torch.tensor([2, 0, 1, 2]), torch.randn(4, 31, dtype=torch.float64)
    torch.testing.assert_close(ReferenceBackend().ffn(x, w, index, count, slots), naive(x, w, index, count, slots))


def test_reasons_and_bytes(monkeypatch):
    w = make(8, 10, torch.bfloat16, True, False, "silu")
    cpu = torch.device("cpu")
    assert BACKEND.reason_against(w, cpu) is None
    assert "adapters" in BACKEND.reason_against("adapters", cpu)
    assert "does not run on cuda" in BACKEND.reason_against(w, torch.device("cuda"))
    assert "float64" in BACKEND.reason_against(make(8, 10, torch.float64, True, False, "silu"), cpu)
    assert "canonical" in BACKEND.reason_against(make(8, 10, torch.float32, True, False, "other"), cpu)
    row = 3 * 8 * 2
    assert BACKEND.bytes_read(w, [torch.tensor([1, 2, 3])]) == 3 * row
    assert BACKEND.bytes_read(w, [torch.tensor([1, 2, 3]), torch.tensor([3, 4])]) == 4 * row
    assert ReferenceBackend().bytes_read(w, [torch.tensor([1, 2, 3]), torch.tensor([3, 4])]) == 5 * row
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend, why = choose("auto", w, cpu)
    assert backend.name == "masked" and "pip install 'dartprune[cpu]'" in why


def test_scattered_rows_are_refused():
    w = make(16, 16, torch.float32, True, False, "silu")
    index, count = lists(16, [4])
    across = type(w)(w.gate, w.up, w.down.t(), None, None, None, "silu", w.act)
    with pytest.raises(ValueError, match="matrix are not contiguous"):
        BACKEND.ffn(torch.randn(1, 16), across, index, count, torch.tensor([0]))
