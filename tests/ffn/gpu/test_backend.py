"""The GPU row kernels against the reference in double precision; on a CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from dartprune import Dart
from dartprune.ffn import choose
from dartprune.ffn.gpu import kernels as gpu_kernels
from dartprune.ffn.gpu import tuning as gpu_tuning
from dartprune.ffn.gpu.backend import GpuBackend
from dartprune.ffn.gpu.kernels import Blocks, Config
from dartprune.ffn.reference import ReferenceBackend
from dartprune.ffn.weights import FFNWeights
from dartprune.refresh import Periodic
from ffn_cases import ACTS, DTYPES, assert_near, make
from ffn_cases import lists as narrow_lists
from test_matrix import tokens
from tiny import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
BACKEND = GpuBackend()
CONFIGS = (
    Config(Blocks(32, 64, 4), Blocks(32, 64, 4), splits=3),
    Config(Blocks(16, 128, 4), Blocks(64, 32, 4), splits=1),
    Config(Blocks(64, 32, 4), Blocks(16, 128, 4), splits=8),
)


def lists(neurons, counts, width=None):
    """Index lists of a width; what lies past a count is a neuron, and wrong."""
    short, count = narrow_lists(neurons, counts)
    index = torch.full((len(counts), width or short.shape[1]), neurons - 1, dtype=torch.int32)
    for slot, k in enumerate(counts):
        index[slot, :k] = short[slot, :k]
    return index, count


def exact(x, w, index, count, slots):
    """The reference backend in double precision, on the device; the answer on the host."""
    wide = FFNWeights(*(t if t is None else t.double() for t in w.tensors()), w.activation, w.act)
    return ReferenceBackend().ffn(x.double(), wide, index, count, slots).cpu()


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("seed", range(120))
def test_random_cases(seed, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, neurons = rng.choice([1, 3, 16, 31, 64, 97]), rng.choice([1, 2, 5, 33, 64, 75])
    dtype, gated, biases, act = rng.choice(DTYPES), rng.random() < 0.6, rng.random() < 0.5, rng.choice(ACTS)
    chosen = rng.choice(CONFIGS)
    monkeypatch.setattr(gpu_tuning, "config", lambda gate, up: chosen)
    w = make(hidden, neurons, dtype, gated, biases, act, DEVICE)
    counts = [0, 1, neurons, rng.randint(0, neurons)]
    rows = rng.choice([1, 1, 1, 2, 3, 5, 9])
    slots = torch.tensor([rng.randrange(4) for _ in range(rows)])
    x = torch.randn(hidden, rows).to(dtype).t()  # not contiguous
    x, index, count, slots = on_device(x, *lists(neurons, counts), slots)
    got = BACKEND.ffn(x, w, index, count, slots)
    assert got.dtype is dtype and got.shape == x.shape and got.is_contiguous()
    assert_near(got, exact(x, w, index, count, slots), dtype)


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
@pytest.mark.parametrize("blocks", [(1, 16), (4, 32), (32, 64)])
def test_any_blocks_and_splits(splits, blocks):
    w = make(50, 70, torch.float32, True, True, "silu", DEVICE)
    x, index, count, slots = on_device(torch.randn(3, 50), *lists(70, [70, 13, 0]), torch.tensor([0, 1, 2]))
    shape = Blocks(*blocks, 4)
    got = gpu_kernels.pruned_ffn(x, w, index, count, slots, Config(shape, shape, splits))
    assert_near(got, exact(x, w, index, count, slots), torch.float32)


def test_lists_are_read_anew_at_every_call_and_may_be_wider_than_any_count():
    w = make(32, 48, torch.float32, True, False, "silu", DEVICE)
    index, count, slots, x = on_device(*lists(48, [12], width=40), torch.tensor([0]), torch.randn(1, 32))
    before = BACKEND.ffn(x, w, index, count, slots)
    index.copy_(lists(48, [12], width=40)[0])
    after = BACKEND.ffn(x, w, index, count, slots)
    assert not torch.equal(before, after)
    assert_near(after, exact(x, w, index, count, slots), torch.float32)
    index.copy_(lists(48, [40])[0])
    count[0] = 40
    assert_near(BACKEND.ffn(x, w, index, count, slots), exact(x, w, index, count, slots), torch.float32)
    count[0] = 0
    assert BACKEND.ffn(x, w, index, count, slots).abs().sum() == 0


def test_a_slot_without_a_list_gives_the_bias_alone():
    w = make(16, 20, torch.float32, True, True, "silu", DEVICE)
    index, _ = lists(20, [5])
    x, index, count, slots = on_device(
        torch.randn(1, 16), index, torch.tensor([-1], dtype=torch.int32), torch.tensor([0])
    )
    assert torch.equal(BACKEND.ffn(x, w, index, count, slots)[0], w.down_bias)


def test_not_a_number_goes_through_only_where_its_row_is_kept():
    w = make(16, 20, torch.float32, False, False, "relu", DEVICE)
    w.up[3] = float("nan")
    index = torch.tensor([[0, 1, 2], [1, 3, 4]], dtype=torch.int32)
    x, index, count, slots = on_device(
        torch.randn(2, 16), index, torch.tensor([3, 3], dtype=torch.int32), torch.tensor([0, 1])
    )
    got = BACKEND.ffn(x, w, index, count, slots)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_x_may_start_anywhere_and_rows_of_weights_may_not_be_scattered():
    w = make(24, 40, torch.bfloat16, True, True, "gelu", DEVICE)
    index, count, slots = on_device(*lists(40, [17]), torch.tensor([0]))
    x = torch.randn(1 + 24, device=DEVICE).bfloat16()[1:].view(1, 24)
    assert x.data_ptr() % 16
    assert_near(BACKEND.ffn(x, w, index, count, slots), exact(x, w, index, count, slots), torch.bfloat16)
    scattered = make(40, 24, torch.bfloat16, True, True, "gelu", DEVICE).up.t()
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.dartprune.ffn_gpu(x, w.gate, scattered, *w.tensors()[2:], "gelu", index, count, slots)


class Recorder:
    """In the place of a kernel: notes its grids."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append((self.kernel, grid))
        return lambda *args, **kwargs: None


def test_launches_depend_on_shapes_alone(monkeypatch):
    w = make(32, 70, torch.float32, True, False, "silu", DEVICE)
    monkeypatch.setattr(gpu_tuning, "config", lambda gate, up: CONFIGS[0])
    seen = []
    for name in ("up_kernel", "down_kernel", "sum_kernel"):
        monkeypatch.setattr(gpu_kernels, name, Recorder(name, seen))
    x, slots = on_device(torch.randn(3, 32), torch.tensor([0, 1, 0]))
    launches = []
    for counts in ([0, 0], [1, 64], [64, 64], [-1, 7]):
        index, count = on_device(*lists(70, [max(k, 0) for k in counts], width=64))
        count.copy_(torch.tensor(counts))
        BACKEND.ffn(x, w, index, count, slots)
        launches.append(list(seen))
        seen.clear()
    assert launches[0] == [("up_kernel", (3, 2)), ("down_kernel", (3, 1, 1)), ("sum_kernel", (3, 1))]
    assert all(each == launches[0] for each in launches)


def test_rows_of_a_large_batch_share_the_device():
    assert [CONFIGS[2].parts(rows) for rows in (0, 1, 3, 9)] == [8, 8, 2, 1]


@pytest.mark.parametrize("gated", [True, False])
def test_the_operator_is_one_that_torch_can_trace(gated):
    w = make(16, 20, torch.float32, gated, True, "gelu", DEVICE)
    x, index, count, slots = on_device(torch.randn(2, 16), *lists(20, [7, 20]), torch.tensor([1, 0]))
    torch.library.opcheck(torch.ops.dartprune.ffn_gpu.default, (x, *w.tensors(), "gelu", index, count, slots))


def test_inside_a_full_graph():
    w = make(32, 48, torch.float32, True, False, "silu", DEVICE)
    index, count, slots, x = on_device(*lists(48, [12]), torch.tensor([0]), torch.randn(1, 32))

    def step(x):
        return BACKEND.ffn(x * 2, w, index, count, slots) + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    index.copy_(lists(48, [12])[0])
    torch.testing.assert_close(compiled(x), step(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_gives_the_tokens_of_the_reference(family):
    pruner = Dart(sparsity=0.5, refresh=Periodic(every=5, dense=None, replay=8))
    outputs, reports = [], []
    for backend in ("reference", "gpu"):
        model = FAMILIES[family]().to(DEVICE)
        with pruner(model, backend=backend) as run:
            prompt = tokens(model).to(DEVICE)
            outputs.append(model.generate(prompt, max_new_tokens=14, min_new_tokens=14, do_sample=False))
            reports.append(run.report())
    assert torch.equal(*outputs)
    want, got = reports
    assert got.backend == "gpu" and got.saves_time and got.pruned_tokens == want.pruned_tokens == 2 * 13
    assert got.events and [(e.kind, e.decoded) for e in got.events] == [(e.kind, e.decoded) for e in want.events]
    assert got.bytes_saved == pytest.approx(want.bytes_saved)


def test_reasons_and_bytes(monkeypatch):
    w = make(8, 10, torch.bfloat16, True, False, "silu")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert BACKEND.reason_against(w, cuda) is None
    assert "adapters" in BACKEND.reason_against("adapters", cuda)
    assert "does not run on mps" in BACKEND.reason_against(w, torch.device("mps"))
    assert "float64" in BACKEND.reason_against(make(8, 10, torch.float64, True, False, "silu"), cuda)
    assert "canonical" in BACKEND.reason_against(make(8, 10, torch.float32, True, False, "other"), cuda)
    row = 3 * 8 * 2
    assert BACKEND.bytes_read(w, [torch.tensor([1, 2, 3]), torch.tensor([3, 4])]) == 5 * row
    assert choose("auto", w, cuda)[0].name == "gpu"
    with monkeypatch.context() as older:
        older.setattr("triton.__version__", "3.2.0")
        assert BACKEND.reason_against(w, cuda) == "the gpu kernel needs Triton 3.6 or newer, this is 3.2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "7.0" in BACKEND.reason_against(w, cuda)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKEND.reason_against(w, cpu) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'dartprune[gpu]'" in BACKEND.reason_against(w, cuda)
    backend, why = choose("auto", w, cuda)
    assert backend.name == "masked" and "pip install 'dartprune[gpu]'" in why
    assert choose("auto", w, cpu)[0].name == "masked"  # the interpreter only when it is asked for
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "does not run on cpu" in BACKEND.reason_against(w, cpu)


def test_nothing_is_measured_in_the_interpreter_or_during_a_capture(monkeypatch):
    w = make(8, 10, torch.float32, True, False, "silu")
    monkeypatch.setattr(gpu_tuning, "_time", lambda run: pytest.fail("measured"))
    monkeypatch.setattr(gpu_tuning, "interpreted", lambda: True)
    gpu_tuning.measure(w)
    assert gpu_tuning.config(w.gate, w.up) is gpu_tuning.INTERPRETED
    monkeypatch.setattr(gpu_tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu_tuning.measure(w)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 34))
    gpu_tuning.measure(w)
    assert gpu_tuning.config(w.gate, w.up) is gpu_tuning.UNMEASURED


def test_the_fastest_blocks_are_taken_once_per_shape(monkeypatch):
    """With a clock of our own: two neurons at a time and 16 splits are fastest."""
    w = make(600, 40, torch.float32, True, False, "silu")
    times = []

    def time(run):
        run()
        times.append(last["cost"])
        return times[-1]

    last = {}

    def up(*args):
        last["cost"] = abs(args[-1].neurons - 2) + args[-1].columns / 1e4

    def down(acts, down, index, count, slots, partial, blocks):
        last["cost"] = abs(partial.shape[0] - 16) + abs(blocks.neurons - 16) + blocks.columns / 1e4 + blocks.warps / 10

    monkeypatch.setattr(gpu_tuning, "interpreted", lambda: False)
    monkeypatch.setattr(gpu_tuning, "_time", time)
    monkeypatch.setattr(gpu_tuning, "_chosen", {})
    monkeypatch.setattr(gpu_kernels, "launch_up", up)
    monkeypatch.setattr(gpu_kernels, "launch_down", down)
    monkeypatch.setattr(gpu_kernels, "launch_sum", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    processors = type("Properties", (), {"multi_processor_count": 24})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    gpu_tuning.measure(w)
    # 600 columns are 3 blocks of 256, of which 2 * 24 programs make 16 splits
    assert gpu_tuning.config(w.gate, w.up) == Config(Blocks(2, 512, 4), Blocks(16, 256, 4), splits=16)
    tried = len(times)
    assert tried > len(gpu_tuning.UP)
    gpu_tuning.measure(make(600, 40, torch.float32, True, True, "gelu"))
    assert len(times) == tried
    gpu_tuning.measure(make(600, 40, torch.bfloat16, True, False, "silu"))
    assert len(times) == 2 * tried


COMPILE = """
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dartprune.ffn.gpu import kernels as k

def build(kernel, pointers, constants, capability):
    names = kernel.arg_names
    signature = {name: pointers.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in pointers.items() if kind[0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    built = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4, "enable_fp_fusion": True})
    assert built.asm["cubin"]
    return built.asm["ptx"]

for capability, weight, gated, act, hidden in (
    (90, "*bf16", True, "silu", 4096), (80, "*fp16", False, "gelu_tanh", 2048), (75, "*fp32", True, "gelu", 600)
):
    lists = {"index": "*i32", "count": "*i32", "slots": "*i64", "acts": "*fp32", "width": "i32"}
    up = dict.fromkeys(("x", "gate", "up", "gate_bias", "up_bias"), weight) | lists
    up |= {"means": "*bf16", "owners": "*i64"}
    flags = {"GATED": gated, "GATE_BIASED": gated, "UP_BIASED": True, "ACT": act}
    for means in (0, 14336):
        sizes = {"HIDDEN": hidden, "MEANS": means, "NEURONS": 4, "COLUMNS": 512}
        ptx = build(k.up_kernel, up, {**sizes, **flags}, capability)
        assert "ld.global.v4" in ptx, "weights are not read sixteen bytes at a time"
    down = {"down": weight, "partial": "*fp32", **lists}
    ptx = build(k.down_kernel, down, {"HIDDEN": hidden, "NEURONS": 16, "COLUMNS": 256}, capability)
    assert "ld.global.v4" in ptx, "weights are not read sixteen bytes at a time"
    total = {"partial": "*fp32", "down_bias": weight, "out": weight, "parts": "i32"}
    total |= {"compensation": "*fp32", "owners": "*i64"}
    sizes = {"HIDDEN": hidden, "PARTS": k.SUM_PARTS, "COLUMNS": k.SUM_COLUMNS}
    for compensated in (False, True):
        build(k.sum_kernel, total, {**sizes, "DOWN_BIASED": True, "COMPENSATED": compensated}, capability)
print("all built")
"""


def test_the_compiler_takes_the_kernels_without_a_gpu(tmp_path):
    """What the interpreter forgives and the compiler does not; weights must be read in wide pieces."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all built" in done.stdout, done.stderr


# ---- with a GPU


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_shapes_and_the_same_bits_twice(dtype):
    w = make(4096, 14336, dtype, True, False, "silu", "cuda")
    BACKEND.prepare(w)
    index, count, slots = on_device(*lists(14336, [4301, 1434, 12902]), torch.tensor([0, 1, 2, 0, 0]))
    for rows in (1, 5):
        x = torch.randn(rows, 4096, device="cuda").to(dtype)
        first = BACKEND.ffn(x, w, index, count, slots[:rows])
        assert_near(first, exact(x, w, index, count, slots[:rows]), dtype)
        assert all(torch.equal(first, BACKEND.ffn(x, w, index, count, slots[:rows])) for _ in range(5))


@needs_cuda
def test_rows_beyond_the_first_two_billion_elements():
    neurons, hidden = (1 << 31) // 4096 + 64, 4096
    up = torch.zeros(neurons, hidden, dtype=torch.float16, device="cuda")
    up[-1] = 1.0
    index = torch.tensor([[neurons - 1]], dtype=torch.int32, device="cuda")
    count, slots = on_device(torch.tensor([1], dtype=torch.int32), torch.tensor([0]))
    x = torch.full((1, hidden), 1 / hidden, dtype=torch.float16, device="cuda")
    out = torch.ops.dartprune.ffn_gpu(x, None, up, up, None, None, None, "relu", index, count, slots)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-2, atol=1e-2)


@needs_cuda
def test_a_captured_graph_follows_lists_that_change_in_place():
    w = make(512, 1000, torch.bfloat16, True, True, "silu", "cuda")
    BACKEND.prepare(w)
    index, count, slots = on_device(*lists(1000, [300, 500]), torch.tensor([1, 0, 1]))
    x = torch.randn(3, 512, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        BACKEND.ffn(x, w, index, count, slots)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = BACKEND.ffn(x, w, index, count, slots)
    for counts in ([300, 500], [0, 123], [500, 1]):
        index.copy_(lists(1000, counts, width=500)[0])
        count.copy_(torch.tensor(counts))
        x.copy_(torch.randn(3, 512))
        graph.replay()
        assert_near(out, exact(x, w, index, count, slots), torch.bfloat16)


@needs_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch captures one to begin with
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode):
    w = make(64, 200, torch.float16, True, False, "silu", "cuda")
    index, count, slots = on_device(*lists(200, [60]), torch.tensor([0]))

    @torch.compile(mode=mode, fullgraph=True)
    def step(x):
        return BACKEND.ffn(x * 2, w, index, count, slots) + 1

    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 64, device="cuda").half()
            index.copy_(lists(200, [60])[0])
            assert_near(step(x) - 1, exact(x * 2, w, index, count, slots), torch.float16)
    torch._dynamo.reset()
