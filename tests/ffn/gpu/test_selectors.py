"""The GPU kernels of the per-token selectors against their references; on a CPU, in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from dartprune import GatedDart, Sketch, SketchDart
from dartprune.ffn import FFNWeights, selector_ops
from dartprune.ffn import sketch as sketch_oracle
from dartprune.ffn.gpu import cut as gpu_cut
from dartprune.ffn.gpu import gate as gpu_gate
from dartprune.ffn.gpu import kernels as gpu_kernels
from dartprune.ffn.gpu import rounding as gpu_rounding
from dartprune.ffn.gpu import selectors as gpu_selectors
from dartprune.ffn.gpu import sketch as gpu_sketch
from dartprune.ffn.gpu import tuning as gpu_tuning
from dartprune.ffn.gpu.backend import GpuBackend
from dartprune.ffn.gpu.kernels import Blocks, Config
from dartprune.ffn.selector_kernels import kernels_of
from dartprune.ffn.sketch import build_planes, build_sketch
from ffn_cases import lists, make
from selector_cases import assert_agree, case, check_choice, errors_of, gate_scores, others_of, same
from test_matrix import tokens
from tiny import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
no_warning = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
CONFIGS = (
    Config(Blocks(32, 64, 4), Blocks(32, 64, 4), splits=3),
    Config(Blocks(64, 32, 4), Blocks(16, 128, 4), splits=1),
)
SMALL = {"hidden": (1, 3, 31, 64, 130), "neurons": (1, 2, 33, 64, 129), "most_rows": 3}


def moved(thing, device=DEVICE):
    """Tensors, and what is made of them, on a device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if isinstance(thing, (sketch_oracle.FFNSketch, sketch_oracle.SketchPlanes, selector_ops.TokenRows, FFNWeights)):
        return replace(thing, **{name: moved(value, device) for name, value in vars(thing).items()})
    return thing


def on_gpu(operator, *call):
    """One call of an operator on the device; the answer on the host."""
    return moved(operator(*map(moved, call)), "cpu")


@pytest.mark.parametrize("seed", range(16))
def test_gate_on_random_cases(seed, monkeypatch):
    rng, w, x, slots, wanted, threshold, importance = case(seed, **SMALL)
    monkeypatch.setattr(gpu_tuning, "config", lambda gate, up: rng.choice(CONFIGS))
    index, count = lists(w.neurons, [w.neurons, rng.randint(0, w.neurons), rng.randint(0, w.neurons)])
    importance = None if rng.random() < 0.3 else importance
    call = (x, w, index, count, slots, wanted, threshold, importance)
    got, want = on_gpu(gpu_selectors.gated_rows, *call), selector_ops.gated_rows(*call)
    assert_agree(got, want, gate_scores(x, w, slots, importance), w, x)


@pytest.mark.parametrize("seed", range(14))
def test_sketch_on_random_cases(seed, monkeypatch):
    rng, w, x, slots, wanted, threshold, importance = case(seed, **SMALL)
    monkeypatch.setattr(gpu_tuning, "config", lambda gate, up: rng.choice(CONFIGS))
    bits, activation_bits = rng.choice([1, 1, 2, 3, 4]), rng.choice([4, 4, 2, 3, 8])
    sketch = build_sketch(w, bits, activation_bits, min(w.hidden, rng.choice([0, 1, 4, 7])))
    errors = errors_of(w) if rng.random() < 0.5 else None
    others = others_of(w) if rng.random() < 0.5 else (None, None)
    call = (x, w, sketch, slots, wanted, importance, rng.randint(1, w.neurons + 2), threshold, errors, *others)
    weight, known = (
        importance[slots if importance.shape[0] > 1 else [0] * len(slots)],
        None if errors is None else errors[slots],
    )
    scores = sketch_oracle.sketch_scores(x, w, sketch, weight, known)
    means = None if others[0] is None else others[0][slots]
    assert_agree(on_gpu(gpu_selectors.sketched_rows, *call), selector_ops.sketched_rows(*call), scores, w, x, means)


def rounded_rows(x, bits, outliers):
    """`round_kernel` on rows x; the counts that it must clear held something else."""
    x = moved(x)
    planes = gpu_selectors.room_for_planes(x, bits, outliers)
    tally = torch.full((x.shape[0], gpu_cut.TALLY), 7, dtype=torch.int32, device=DEVICE)
    gpu_rounding.launch_round(x, planes, tally)
    assert not tally.any()
    return planes


@triton.jit
def integers_kernel(
    planes, x, total, out, ALL: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, INPUT_BITS: tl.constexpr,
    NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n, i = tl.program_id(0), (tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)
    x, live = x + n * INPUT_BITS * WORDS, i < ALL
    d = gpu_sketch.integers(
        planes, x, tl.load(total + n), i, live, WORDS, BITS, INPUT_BITS, NEURONS, COLUMNS
    )  # fmt: skip
    tl.store(out + n * ALL + i, d, mask=live)


@pytest.mark.parametrize("seed", range(8))
def test_rounded_inputs_and_integers(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, bits = rng.choice([1, 7, 64, 130, 300]), rng.choice([2, 3, 4, 4, 8])
    x = torch.randn(3, hidden) * torch.tensor([[1.0], [1e-3], [0.0]])
    x[0, rng.randrange(hidden)] = 100
    outliers = min(hidden, rng.choice([0, 1, 4, 5]))
    want, got = sketch_oracle.quantise_input(x, bits, outliers), rounded_rows(x, bits, outliers)
    host = sketch_oracle.InputPlanes(*(part.cpu() for part in got))
    torch.testing.assert_close(host.step, want.step, rtol=1e-6, atol=0)
    assert torch.equal(host.outlier_value, want.outlier_value) and torch.equal(host.outlier_index, want.outlier_index)
    integers = [sketch_oracle._unpack(planes.planes, hidden, signed=True) for planes in (host, want)]
    # a step that differs in its last bit may round one entry in thousands to the other side
    assert int((integers[0] - integers[1]).abs().sum()) <= 1
    assert integers[0].sum(dim=1).tolist() == host.total.tolist()
    sketch = build_planes(torch.randn(21, hidden), rng.choice([1, 2, 3, 4]))
    out = torch.empty(3, 21, dtype=torch.int32, device=DEVICE)
    words, columns = got.planes.shape[2], rng.choice([1, 4, 16])
    integers_kernel[(3, 2)](moved(sketch.planes), got.planes, got.total, out, 21, words, sketch.bits, bits, 16, columns)
    assert torch.equal(out.cpu(), sketch_oracle.sketch_integers(host, sketch))


def chosen_rows(scores, wanted, width, threshold=None):
    """`cut_kernel` alone, behind counts made in torch."""
    rows, device = scores.shape[0], torch.device(DEVICE)
    key = scores.contiguous().view(torch.int32) & 0x7FFFFFFF
    tally = torch.zeros(rows, gpu_cut.TALLY, dtype=torch.int32)
    tally.scatter_add_(1, (key >> 20).long(), (key > 0).int())
    made = [torch.empty(rows, width, dtype=torch.int32, device=device)]
    made += [torch.empty(rows, dtype=kind, device=device) for kind in (torch.int32, torch.float32, torch.int64)]
    acts = torch.empty(rows, width, device=device)
    slots = torch.arange(rows)
    gpu_cut.launch_cut(*map(moved, (key, tally, scores.contiguous(), slots, wanted, threshold)), *made, acts)
    index, count, cut, owners = (part.cpu() for part in made)
    assert torch.equal(owners, slots)
    for n, k in enumerate(count.tolist()):
        bits = [values.view(torch.int32) for values in (acts[n, :k].cpu(), scores[n, index[n, :k].long()])]
        assert torch.equal(*bits)
    return index, count, cut


@pytest.mark.parametrize("keys", [64, 8192])
@pytest.mark.parametrize("seed", range(14))
def test_choice_against_a_sort(seed, keys, monkeypatch):
    monkeypatch.setattr(gpu_cut, "MOST_KEYS", keys)
    check_choice(seed, chosen_rows)


def test_not_a_number_is_chosen_first_and_subnormals_last():
    scores = torch.tensor([[1.0, float("nan"), float("inf"), 2.0, 1e-45, 0.0]])
    index, count, cut = chosen_rows(scores, torch.tensor([2]).int(), 4)
    assert index[0, : count[0]].tolist() == [1, 2] and cut.tolist() == [float("inf")]
    index, count, cut = chosen_rows(scores, torch.tensor([6]).int(), 6)
    assert index[0, : count[0]].tolist() == [0, 1, 2, 3, 4] and cut.tolist() == [scores[0, 4]]


def every_call(dtype, rows, act="silu", hidden=70, neurons=90):
    """Both operators on the same rows: functions of (x, slots)."""
    w = make(hidden, neurons, dtype, True, True, act)
    index, count = lists(neurons, [60, 35, 90])
    wanted, importance = torch.tensor([12, 24, 3], dtype=torch.int32), torch.rand(3, neurons)
    sketch = build_sketch(w, 2)
    x, slots = torch.randn(rows, hidden).to(dtype), torch.randint(0, 3, (rows,))
    w, index, count, wanted, importance, sketch = map(moved, (w, index, count, wanted, importance, sketch))
    return (
        *map(moved, (x, slots)),
        (
            lambda x, slots: gpu_selectors.gated_rows(x, w, index, count, slots, wanted, None, importance),
            lambda x, slots: gpu_selectors.sketched_rows(x, w, sketch, slots, wanted, importance, 40),
        ),
    )


def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(monkeypatch):
    torch.manual_seed(3)
    monkeypatch.setattr(gpu_selectors, "MOST_ROWS", 2)  # the batch takes two turns
    x, slots, operators = every_call(torch.bfloat16, rows=3)
    for operator in operators:
        together = operator(x, slots)
        assert same(together, operator(x, slots))
        for n in (1, 2):
            part = selector_ops.TokenRows(*(getattr(together, f)[n : n + 1] for f in ("out", "index", "count", "cut")))
            assert same(operator(x[n : n + 1], slots[n : n + 1]), part)


def test_silent_layers_and_empty_lists_read_nothing():
    w = make(32, 48, torch.float32, True, False, "relu")
    w.gate.copy_(-w.gate.abs())
    sketch, importance = build_sketch(w, 1, outliers=0), torch.ones(1, 48)
    index, count = lists(48, [30])
    slots, wanted = torch.tensor([0]), torch.tensor([12], dtype=torch.int32)
    silent, zero = torch.rand(1, 32) + 0.1, torch.zeros(1, 32)
    results = [on_gpu(gpu_selectors.gated_rows, x, w, index, count, slots, wanted) for x in (silent, zero)]
    results += [
        on_gpu(gpu_selectors.sketched_rows, x, w, sketch, slots, wanted, importance, 20) for x in (silent, zero)
    ]
    results += [
        on_gpu(gpu_selectors.gated_rows, -silent, w, index, torch.tensor([k]).int(), slots, wanted) for k in (0, -1)
    ]
    for result in results:
        assert result.count.tolist() == [0] and result.cut.tolist() == [float("inf")]
        assert not result.out.any()


@no_warning
@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_row(value, outliers):
    w = make(40, 30, torch.float32, True, False, "silu")
    index, count = lists(30, [20])
    slots, wanted = torch.tensor([0, 0]), torch.tensor([5], dtype=torch.int32)
    x = torch.randn(2, 40)
    x[1, 7] = value
    gate = (x, w, index, count, slots, wanted)
    sketch = (x, w, build_sketch(w, 1, outliers=outliers), slots, wanted, torch.ones(1, 30), 10)
    for got, want in (
        (on_gpu(gpu_selectors.gated_rows, *gate), selector_ops.gated_rows(*gate)),
        (on_gpu(gpu_selectors.sketched_rows, *sketch), selector_ops.sketched_rows(*sketch)),
    ):
        assert got.out[0].isfinite().all() and not got.out[1].isfinite().any()
        assert torch.equal(got.count, want.count) and torch.equal(got.index[1, :5], want.index[1, :5])
        torch.testing.assert_close(got.cut, want.cut, equal_nan=True)


@no_warning
def test_infinite_activations_of_neurons_without_importance():
    w = make(8, 10, torch.float32, True, False, "relu")
    w.gate.copy_(w.gate.abs())
    sketch, importance = build_sketch(w, 1), torch.zeros(1, 10)
    index, count = lists(10, [10])
    slots, x = torch.tensor([0]), torch.full((1, 8), 3e38)
    gate, sketched = (x, w, index, count, slots, count, None, importance), (x, w, sketch, slots, count, importance, 10)
    assert torch.equal(on_gpu(gpu_selectors.gated_rows, *gate).count, selector_ops.gated_rows(*gate).count)
    assert torch.equal(
        on_gpu(gpu_selectors.sketched_rows, *sketched).count, selector_ops.sketched_rows(*sketched).count
    )


def test_scattered_weights_are_refused():
    w = make(8, 10, torch.float32, True, False, "silu", DEVICE)
    columns = replace(w, down=w.down.t().contiguous().t())
    index, count = map(moved, lists(10, [4]))
    x, slots = map(moved, (torch.randn(1, 8), torch.tensor([0])))
    with pytest.raises(ValueError, match="contiguous"):
        gpu_selectors.gated_rows(x, columns, index, count, slots, count)


class Recorder:
    """In the place of a kernel: notes its grids."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append((self.kernel, grid))
        return lambda *args, **kwargs: None


def test_launches_are_few_and_depend_on_shapes_alone(monkeypatch):
    monkeypatch.setattr(gpu_tuning, "config", lambda gate, up: CONFIGS[0])
    w = make(70, 90, torch.float32, True, False, "silu", DEVICE)
    plain = replace(w, gate=None)
    sketch, importance = build_sketch(w, 1), torch.ones(1, 90, device=DEVICE)
    seen = []
    for module in (gpu_kernels, gpu_cut, gpu_gate, gpu_rounding, gpu_sketch):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(name, seen))
    x, slots = map(moved, (torch.randn(2, 70), torch.tensor([0, 1])))

    def launches(operator, *call):
        operator(*call)
        grids, seen[:] = list(seen), []
        return grids

    for counts in ([0, -1], [3, 90], [90, 90]):
        index, count = map(moved, lists(90, [max(k, 0) for k in counts[:1]] + [90]))
        count.copy_(torch.tensor(counts))
        last = [("down_kernel", (2, 2, 3)), ("sum_kernel", (2, 2))]
        lists_of_rows = [("cut_kernel", (2,)), ("chosen_up_kernel", (2, 3)), *last]
        gate = (index, count, slots, count)
        assert launches(gpu_selectors.gated_rows, x, w, *gate) == [("gate_kernel", (2, 3)), *lists_of_rows]
        assert launches(gpu_selectors.gated_rows, x, plain, *gate) == [("gate_kernel", (2, 3)), lists_of_rows[0], *last]
        assert launches(gpu_selectors.sketched_rows, x, w, sketch, slots, count, importance, 64) == [
            ("round_kernel", (2,)),
            ("score_kernel", (2, 2)),
            ("cut_kernel", (2,)),
            ("up_kernel", (2, 2)),
            *last,
        ]


def test_the_operators_are_ones_that_torch_can_trace():
    w = make(16, 20, torch.float32, True, True, "gelu", DEVICE)
    sketch = moved(build_sketch(w, 1))
    index, count = map(moved, lists(20, [7, 20]))
    x, slots, importance = map(moved, (torch.randn(2, 16), torch.tensor([1, 0]), torch.rand(1, 20)))
    gate = (x, *w.tensors(), "gelu", index, count, slots, count, None, importance)
    planes = (sketch.gate.planes, sketch.gate.scale, sketch.up.planes, sketch.up.scale, 4, 4)
    taught = map(moved, (errors_of(w), *others_of(w)))
    sketched = (x, *w.tensors(), "gelu", *planes, slots, count, importance, 20, None, *taught)
    # not those that compare two calls in full: what lies past a count is not defined
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.dartprune.gated_rows_gpu.default, gate, test_utils=utilities)
    torch.library.opcheck(torch.ops.dartprune.sketched_rows_gpu.default, sketched, test_utils=utilities)


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


@pytest.mark.parametrize("pruner", [GatedDart(sparsity=0.4), SketchDart(sparsity=0.4, token=Sketch(bits=1))])
def test_generate_gives_the_tokens_of_the_reference(pruner):
    outputs, reports = [], []
    for backend in ("reference", "gpu"):
        model = FAMILIES["llama"]().to(DEVICE)
        with pruner(model, backend=backend) as run:
            prompt = tokens(model)[:1].to(DEVICE)
            outputs.append(model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False))
            reports.append(run.report())
    assert torch.equal(*outputs)
    want, got = reports
    assert got.backend == "gpu" and got.saves_time and not want.saves_time
    assert got.pruned_tokens == want.pruned_tokens > 0
    assert got.realised_sparsity == pytest.approx(want.realised_sparsity, abs=1e-6)


def test_the_backend_has_these_kernels_and_warms_them(monkeypatch):
    kernels = kernels_of(GpuBackend())
    assert kernels.saves_time and kernels.gated_rows is gpu_selectors.gated_rows
    w, called = make(16, 20, torch.float32, True, False, "silu", DEVICE), []
    for module, name in ((gpu_gate, "launch_gate"), (gpu_sketch, "launch_score")):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, launch=launch, name=name: [called.append(name), launch(*args)])
    kernels.prepare(w, None)
    assert set(called) == {"launch_gate"}
    called.clear()
    kernels.prepare(w, moved(build_sketch(w, 1)))
    assert set(called) == {"launch_score"}


# ---- with a GPU


def large_calls(dtype, rows):
    """Both operators at a large shape: their x, what is read anew at every call, and functions of nothing."""
    w = make(4096, 14336, dtype, True, False, "silu", "cuda")
    sketch = build_sketch(w, 1)
    index, count = map(moved, lists(14336, [8000, 14336]))
    x, slots = torch.randn(rows, 4096).to("cuda", dtype), torch.arange(rows, device="cuda") % 2
    wanted, importance = torch.tensor([4000, 1234], dtype=torch.int32, device="cuda"), torch.rand(1, 14336).cuda()
    gate = (x, w, index, count, slots, wanted, None, importance)
    sketched = (x, w, sketch, slots, wanted, importance, 14336)
    calls = [
        (lambda: gpu_selectors.gated_rows(*gate), lambda: selector_ops.gated_rows(*gate)),
        (lambda: gpu_selectors.sketched_rows(*sketched), lambda: selector_ops.sketched_rows(*sketched)),
    ]
    return x, wanted, calls


def assert_nearly_agree(got, want):
    """Few neurons differ, at the cut; and so little of the output."""
    torch.testing.assert_close(got.cut, want.cut, rtol=1e-3, atol=0)
    there = [selector_ops.chosen_mask(rows.index, rows.count, 14336) for rows in (got, want)]
    assert torch.equal(got.count, want.count) and int((there[0] ^ there[1]).sum()) <= 8 * want.count.numel()
    assert float((got.out - want.out).float().norm()) <= 0.03 * float(want.out.float().norm())


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_shapes_and_the_same_bits_twice(dtype):
    for run, reference in large_calls(dtype, rows=3)[2]:
        first = run()
        assert_nearly_agree(first, reference())
        assert all(same(moved(first, "cpu"), moved(run(), "cpu")) for _ in range(5))


@needs_cuda
def test_a_captured_graph_follows_inputs_and_rates_that_change_in_place():
    x, wanted, calls = large_calls(torch.bfloat16, rows=2)
    for run, reference in calls:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        for rates in ([4000, 1234], [0, 14336], [1, 500]):
            x.copy_(torch.randn(2, 4096))
            wanted.copy_(torch.tensor(rates))
            graph.replay()
            assert_nearly_agree(got, reference())


@no_warning
@pytest.mark.parametrize("gated", [True, False])
def test_estimates_of_gate_and_up(gated):
    torch.manual_seed(0)
    planes = [build_planes(torch.randn(50, 130, device=DEVICE), 2) for _ in range(2)]
    sketch = sketch_oracle.FFNSketch(planes[0] if gated else None, planes[1])
    x = torch.randn(5, 130, device=DEVICE)
    got, want = gpu_selectors.estimates(x, sketch), sketch_oracle.estimated_products(x, sketch)
    assert (got[0] is None) == (not gated)
    for one, other in zip(got, want, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
