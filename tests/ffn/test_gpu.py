"""The GPU kernels against a naive FFN: here through Triton's interpreter, and as they are where there is a GPU."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from dartprune import Dart
from dartprune.ffn import choose, gpu_kernels, gpu_tuning
from dartprune.ffn.gpu import GpuBackend, _ffn_gpu
from ffn_cases import ACTS, DTYPES, assert_near, lists, make, naive
from test_matrix import tokens
from tiny import FAMILIES

BACKEND = GpuBackend()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")


def on_device(*parts):
    return tuple(part.to(DEVICE) for part in parts)


@pytest.mark.parametrize("seed", range(160))
def test_random_cases(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, neurons = rng.choice([1, 3, 16, 31, 64, 97]), rng.choice([1, 2, 5, 33, 64, 129])
    dtype, gated, biases, act = rng.choice(DTYPES), rng.random() < 0.6, rng.random() < 0.5, rng.choice(ACTS)
    w = make(hidden, neurons, dtype, gated, biases, act, DEVICE)
    index, count = lists(neurons, [0, 1, neurons, rng.randint(0, neurons)])
    rows = rng.choice([1, 1, 2, 3, 5, 9])
    slots = torch.tensor([rng.randrange(4) for _ in range(rows)])
    x = torch.randn(hidden, rows).to(DEVICE, dtype).t()  # not contiguous
    got = BACKEND.ffn(x, w, *on_device(index, count, slots))
    assert got.dtype is dtype and got.shape == x.shape
    assert_near(got, naive(x.cpu(), on_host(w), index, count, slots), dtype)


def on_host(w):
    parts = [None if t is None else t.cpu() for t in w.tensors()]
    return type(w)(*parts, w.activation, w.act)


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
@pytest.mark.parametrize("blocks", [(1, 16), (4, 32), (32, 64)])
def test_any_blocks_and_splits(splits, blocks):
    w = make(50, 70, torch.float32, True, True, "silu", DEVICE)
    index, count = lists(70, [70, 13, 0])
    slots, x = torch.tensor([0, 1, 2]), torch.randn(3, 50, device=DEVICE)
    shape = gpu_kernels.Blocks(*blocks, 4)
    got = gpu_kernels.pruned_ffn(
        x, *w.tensors(), *on_device(index, count, slots), "silu", gpu_kernels.Config(shape, shape, splits)
    )
    assert_near(got, naive(x.cpu(), on_host(w), index, count, slots), torch.float32)


def test_lists_are_read_anew_at_every_call():
    w = make(32, 48, torch.float32, True, False, "silu", DEVICE)
    index, count = lists(48, [12])
    held = on_device(index, count, torch.tensor([0]))
    x = torch.randn(1, 32, device=DEVICE)
    before = BACKEND.ffn(x, w, *held)
    index.copy_(lists(48, [12])[0])
    held[0].copy_(index)
    after = BACKEND.ffn(x, w, *held)
    assert not torch.equal(before, after)
    assert_near(after, naive(x.cpu(), on_host(w), index, count, torch.tensor([0])), torch.float32)
    held[1][0] = 0
    assert BACKEND.ffn(x, w, *held).abs().sum() == 0


def test_the_launch_depends_on_shapes_alone(monkeypatch):
    grids = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            grids.append((self.name, grid))
            return self.kernel[grid]

    for name in ("up_kernel", "down_kernel", "sum_kernel"):
        monkeypatch.setattr(gpu_kernels, name, Recorder(name, getattr(gpu_kernels, name)))
    w = make(40, 90, torch.float32, True, False, "silu", DEVICE)
    index, count = lists(90, [80, 80])
    x, slots = torch.randn(2, 40, device=DEVICE), torch.tensor([0, 1])
    config = gpu_kernels.Config(gpu_kernels.Blocks(16, 32, 4), gpu_kernels.Blocks(16, 32, 4), 4)
    seen = []
    for counts in ([80, 80], [0, 3], [1, 0]):
        grids.clear()
        count[:] = torch.tensor(counts)
        got = gpu_kernels.pruned_ffn(x, *w.tensors(), *on_device(index, count, slots), "silu", config)
        assert_near(got, naive(x.cpu(), on_host(w), index, count, slots), torch.float32)
        seen.append(list(grids))
    assert len(seen[0]) == 3 and seen[0] == seen[1] == seen[2]


def test_rows_must_be_contiguous_weights():
    w = make(16, 16, torch.float32, True, False, "silu", DEVICE)
    index, count = lists(16, [4])
    across = type(w)(w.gate, w.up, w.down.t(), None, None, None, "silu", w.act)
    with pytest.raises(ValueError, match="rows are contiguous"):
        BACKEND.ffn(torch.randn(1, 16, device=DEVICE), across, *on_device(index, count, torch.tensor([0])))


def test_operator_is_well_formed():
    w = make(16, 20, torch.float32, True, True, "silu", DEVICE)
    held = on_device(*lists(20, [7]), torch.tensor([0]))
    x = torch.randn(1, 16, device=DEVICE)
    torch.library.opcheck(_ffn_gpu, (x, *w.tensors(), *held, "silu"), test_utils=("test_schema", "test_faketensor"))


def test_inside_a_full_graph():
    w = make(32, 48, torch.float32, True, False, "silu", DEVICE)
    held = on_device(*lists(48, [12]), torch.tensor([0]))
    x = torch.randn(1, 32, device=DEVICE)

    def step(x):
        return BACKEND.ffn(x * 2, w, *held) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
@torch.no_grad()
def test_generate_equals_the_reference(family):
    model = FAMILIES[family]().to(DEVICE)
    ids = tokens(model).to(DEVICE)
    out = {}
    for backend in ("gpu", "reference"):
        with Dart(sparsity=0.5)(model, backend=backend) as run:
            out[backend] = model.generate(ids, max_new_tokens=10, do_sample=False)
            report = run.report()
        assert report.pruned_tokens > 0
    assert torch.equal(out["gpu"], out["reference"])


def test_reasons_and_bytes(monkeypatch):
    w = make(8, 10, torch.bfloat16, True, False, "silu", DEVICE)
    assert BACKEND.reason_against(w, torch.device(DEVICE)) is None
    assert "adapters" in BACKEND.reason_against("adapters", torch.device(DEVICE))
    assert "float64" in BACKEND.reason_against(make(8, 10, torch.float64, True, False, "silu"), torch.device(DEVICE))
    assert "canonical" in BACKEND.reason_against(make(8, 10, torch.float32, True, False, "other"), torch.device(DEVICE))
    row = 3 * 8 * 2
    assert BACKEND.bytes_read(w, [torch.tensor([1, 2, 3]), torch.tensor([3, 4])]) == 5 * row
    assert choose("auto", make(8, 10, torch.bfloat16, True, False, "silu"), torch.device("cpu"))[0].name != "gpu"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "does not run on cpu" in BACKEND.reason_against(w, torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'dartprune[gpu]'" in BACKEND.reason_against(w, torch.device("cuda"))


@pytest.mark.skipif(CUDA, reason="the interpreter alone")
def test_nothing_is_tuned_under_the_interpreter():
    w = make(8, 10, torch.float32, True, False, "silu")
    BACKEND.prepare(w)
    assert gpu_tuning.interpreted() and gpu_tuning.config(w.gate, w.up) is gpu_tuning.INTERPRETED


@needs_gpu
def test_a_captured_graph_follows_its_lists():
    w = make(512, 1400, torch.bfloat16, True, False, "silu", DEVICE)
    BACKEND.prepare(w)
    index, count = lists(1400, [400, 400])
    held = on_device(index, count, torch.tensor([0, 1]))
    x = torch.randn(2, 512, device=DEVICE, dtype=torch.bfloat16)
    BACKEND.ffn(x, w, *held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = BACKEND.ffn(x, w, *held)
    for counts in ([400, 400], [0, 17]):
        index, count = lists(1400, [400, 400])
        count[:] = torch.tensor(counts)
        held[0].copy_(index)
        held[1].copy_(count)
        graph.replay()
        assert_near(out, naive(x.cpu(), on_host(w), index, count, torch.tensor([0, 1])), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_shapes_and_the_same_bits_twice(dtype):
    w = make(4096, 14336, dtype, True, False, "silu", DEVICE)
    BACKEND.prepare(w)
    index, count = lists(14336, [4300])
    held = on_device(index, count, torch.tensor([0]))
    x = torch.randn(1, 4096, device=DEVICE).to(dtype)
    first = BACKEND.ffn(x, w, *held)
    assert all(torch.equal(first, BACKEND.ffn(x, w, *held)) for _ in range(5))
    kept = index[0].long().to(DEVICE)
    a = torch.nn.functional.silu(x.double() @ w.gate[kept].double().T) * (x.double() @ w.up[kept].double().T)
    assert_near(first, (a @ w.down[kept].double()).cpu(), dtype)


@needs_gpu
def test_compiled_on_a_gpu():
    w = make(256, 700, torch.bfloat16, True, False, "silu", DEVICE)
    BACKEND.prepare(w)
    index, count = lists(700, [200])
    held = on_device(index, count, torch.tensor([0]))
    x = torch.randn(1, 256, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: BACKEND.ffn(x * 2, w, *held) + 1, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), BACKEND.ffn(x * 2, w, *held) + 1)
    torch._dynamo.reset()
