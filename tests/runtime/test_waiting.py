"""A decoded token waits for the device nowhere but at the detector's window: reads and copies of the host are counted.

On a CPU nothing waits, so what is looked at are the calls that would: made in the package's own code, on any tensor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

import dartprune
from dartprune import Dart, Detector, Replay
from dartprune.drift import AttentionDrift
from dartprune.model.caches import handed
from dartprune.runtime import ring
from test_matrix import tokens
from tiny import FAMILIES

OURS = str(Path(dartprune.__file__).parent)
READS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose", "is_nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__iter__", "__contains__", "__array__"),
}
COPIES = {"tensor", "as_tensor", "from_numpy"}
WINDOW = 4


def _listed(index):
    """Whether an index is, or holds, a list or a mask, which the device must be given or asked about."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list) or (isinstance(p, torch.Tensor) and p.dtype is torch.bool) for p in parts)


class Waits(TorchFunctionMode):
    """Counts calls that wait for a device, made by the package itself."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        listed = name in ("__getitem__", "__setitem__") and _listed(args[1])
        frame = sys._getframe(1)
        if (name in READS | COPIES or listed) and frame.f_code.co_filename.startswith(OURS):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def rings_as_on_a_device(monkeypatch):
    """The ring's kernel is the CPU's alone, where nothing waits for `numpy`: rings are stored as elsewhere here."""
    monkeypatch.setattr(ring, "has_kernel", lambda device: False)


@pytest.fixture
def fires_at(monkeypatch):
    """Detectors fire at the chosen judged windows only."""
    chosen, seen = set(), []

    def decide(self, cosine, mu, sigma):
        seen.append(cosine)
        return len(seen) in chosen

    monkeypatch.setattr(AttentionDrift, "decide", decide)
    return chosen


def test_the_counter_counts():
    with Waits() as waits:
        dartprune.runtime.selection.keep_above_mean(torch.rand(5))
        torch.rand(3).tolist()  # not the package's
    assert waits.seen == ["nonzero"]


def per_step(model, pruner, backend, steps, lines=1, mask=None):
    """What each decode step waits for."""
    new = tokens(model, lines=lines, length=steps, seed=4).to(model.device)
    seen = []
    with torch.no_grad(), pruner(model, backend=backend) as run:
        with run.phase("prefill"):
            prompt = tokens(model, lines=lines, length=24).to(model.device)
            cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
        with run.phase("decode"):
            for t in range(steps):
                if mask is not None:  # the second line is over at the tenth token
                    run._live.stopped(torch.tensor([False, t > 9]))
                with Waits() as waits:
                    model(new[:, t : t + 1], **handed(cache))
                seen.append(waits.seen)
        return seen, run.report()


DART = Dart(sparsity=0.5, detector=Detector(window=WINDOW), refresh=Replay(tokens=8, settle=16))


@pytest.mark.parametrize("backend", ["gpu", "masked"])
def test_a_token_waits_for_nothing_and_a_window_for_one_read(backend, fires_at):
    if backend == "gpu":
        pytest.importorskip("triton")
    # where there is a GPU its kernels are not interpreted, and take no CPU tensors
    model = FAMILIES["llama"]().to("cuda" if backend == "gpu" and torch.cuda.is_available() else "cpu")
    seen, report = per_step(model, DART, backend, 14)
    assert report.pruned_tokens == 14 and not report.events
    # the first step makes the masks and the plan of all later ones
    for t, waits in enumerate(seen[1:], start=1):
        assert waits == (["tolist"] if (t + 1) % WINDOW == 0 else []), (t, waits)


def test_an_event_copies_a_few_numbers_and_reads_none(fires_at):
    fires_at.add(2)
    seen, report = per_step(FAMILIES["llama"](), DART, "masked", 12)
    assert [e.decoded for e in report.events] == [2 * WINDOW]
    waits = seen[2 * WINDOW - 1]
    assert waits.count("tolist") == 1
    # the CPU's way of taking the highest asks for their places, once a layer that is not whole; a GPU sorts
    assert 1 <= waits.count("nonzero") <= 3
    assert not set(waits) - {"tolist", "nonzero", "tensor", "__setitem__"}
    assert waits.count("tensor") + waits.count("__setitem__") <= 3


def test_two_lines_whose_windows_end_apart(fires_at):
    """A short prompt learns longer, so that its windows begin later."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :21] = 0
    seen, report = per_step(FAMILIES["llama"](), DART, "masked", 30, lines=2, mask=mask)
    assert report.sequences[1].dense_tokens and not report.events
    for t, waits in enumerate(seen[18:], start=18):
        assert waits in ([], ["tolist"]), (t, waits)
    assert sum(map(len, seen[18:])) <= 2 * 12 / WINDOW


def test_a_static_cache_is_not_asked_for_its_length(fires_at):
    model = FAMILIES["llama"]()
    cache = StaticCache(config=model.config, max_cache_len=64)
    new = tokens(model, length=12, seed=4)
    seen = []
    with torch.no_grad(), DART(model, backend="masked") as run:
        with run.phase("prefill"):
            model(tokens(model), **handed(cache), use_cache=True)
        with run.phase("decode"):
            for t in range(12):
                with Waits() as waits:
                    model(new[:, t : t + 1], **handed(cache))
                seen.append(waits.seen)
    assert seen[1:3] == [[], []] and seen[3] == ["tolist"] and seen[8:11] == [[], [], []]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_cuda_itself_sees_no_wait(fires_at):
    model = FAMILIES["llama"]().cuda()
    new = tokens(model, lines=2, length=7, seed=4).cuda()
    with torch.no_grad(), DART(model) as run:
        assert run.report().backend == "gpu"
        with run.phase("prefill"):
            cache = model(tokens(model).cuda(), use_cache=True).past_key_values
        with run.phase("decode"):
            for t in range(7):
                try:
                    # the first token makes the masks, the fourth ends a window, and the fifth starts the next plan
                    torch.cuda.set_sync_debug_mode("error" if t in (1, 2, 5, 6) else "default")
                    model(new[:, t : t + 1], **handed(cache))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
