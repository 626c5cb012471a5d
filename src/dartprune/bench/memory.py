"""Bytes that attaching adds for one sequence, measured, beside the report's own count."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dartprune.bench.costs import Shape, memory_per_sequence
from dartprune.bench.decode import Load, check_prompt
from dartprune.bench.device import resident_bytes
from dartprune.bench.models import Subject, prompts
from dartprune.bench.result import MemoryRow, Result
from dartprune.bench.stepping import read, steps
from dartprune.bench.timing import Spread, alternate
from dartprune.errors import UserError
from dartprune.pruner import Pruner
from dartprune.report import Report
from dartprune.run import Run

WIDER = 4  # the second batch has so many times the sequences of the first


def check(pruners: Mapping[str, Pruner], batch: int, prompt: int, new: int) -> None:
    """ValueError, before a model is built, for what cannot be measured."""
    Load(batch, prompt, new)
    for pruner in pruners.values():
        if not pruner.prunes:
            raise UserError(f"{pruner.name} holds nothing for a sequence: there is no memory to measure; use 'dart'")
        check_prompt(pruner, prompt)


@torch.no_grad()
def measure(
    what: Subject,
    pruners: Mapping[str, Pruner],
    *,
    batch: int = 1,
    prompt: int = 288,
    new: int = 4,
    turns: int = 3,
    backend: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Bytes that one more sequence holds while it is decoded, unattached and attached.

    A batch of `batch` sequences and one of four times as many are decoded, unattached and attached in turn; each time
    the bytes held while the caches are alive are read, less those before. On a CPU these are the process's resident
    bytes, with the allocator's free pages given back first; on a GPU the highest number of bytes allocated. The larger
    batch less the smaller one leaves what single sequences hold: weights, kernels and code cancel.

    The report counts what a sequence may come to hold: give a prompt that fills all windows of the detector (32 of 8
    tokens). For all layers of a shape those left out are added by arithmetic
    (`bench.costs.memory_per_sequence`, linear in the layers but for these windows); by measurement that sum is
    scaled by measured over reported.

    Args:
        what: the model; a few layers of a large shape are enough.
        pruners: by name.
        batch: sequences of the smaller batch.
        prompt: tokens of each prompt.
        new: decoded tokens.
        turns: how often all are measured.
        backend: how the pruned FFN is computed.
        progress: told what is measured.

    Raises:
        ValueError: nothing would be held, or resident memory cannot be read on this system.
    """
    check(pruners, batch, prompt, new)
    model = what.model
    few, many = prompts(model, batch, prompt), prompts(model, WIDER * batch, prompt)
    prompts(model, 1, prompt + new)
    held = HeldBytes(model.device)
    reports: dict[str, Report] = {}

    def growth(added: Callable[[torch.Tensor], int]) -> float:
        """Bytes per sequence, by the difference of both batches."""
        return (added(many) - added(few)) / (len(many) - len(few))

    def attached(name: str, pruner: Pruner) -> Callable[[], float]:
        def added(tokens: torch.Tensor) -> int:
            with pruner(model, backend=backend) as run:
                grown = _added(model, tokens, new, run, held)
                reports[name] = run.report()
            return grown

        return lambda: growth(added)

    arms: dict[str, Callable[[], float]] = {
        "unattached": lambda: growth(lambda tokens: _added(model, tokens, new, None, held))
    }
    arms |= {name: attached(name, pruner) for name, pruner in pruners.items()}
    progress("once without counting: compiles, and takes memory")
    for measured in arms.values():
        measured()
    progress(f"{turns} turns")
    taken = alternate(arms, turns).seconds  # bytes, here
    shape = Shape.of(model)
    case = f"{what.name} {what.dtype}, {what.layers} of {what.all_layers} layers, {prompt + new} tokens"
    rows = []
    for name, pruner in pruners.items():
        added = Spread.of([a - b for a, b in zip(taken[name], taken["unattached"], strict=True)])
        reported = reports[name].overhead_bytes_per_sequence
        masks = "masked" in reports[name].backend
        here, full = (
            memory_per_sequence(replace(shape, layers=layers), pruner, masks=masks)
            for layers in (what.layers, what.all_layers)
        )
        whole = reported + full - here
        rows.append(
            MemoryRow(
                case=case,
                arm=name,
                unattached=Spread.of(taken["unattached"]),
                attached=Spread.of(taken[name]),
                added=added,
                reported=reported,
                all_layers_reported=whole,
                all_layers_measured=whole * added.median / reported,
            )
        )
    settings = what.settings(backend, turns) | {"batches": [len(few), len(many)], "prompt": prompt, "new": new}
    settings["methods"] = {name: pruner.to_dict() for name, pruner in pruners.items()}
    notes = [note for report in reports.values() for note in report.notes]
    return Result("memory", model.device, settings, rows, None, list(dict.fromkeys(notes)))


def _added(model: Any, tokens: torch.Tensor, new: int, run: Run | None, held: HeldBytes) -> int:
    """Bytes that decoding these prompts holds while the cache is alive."""
    before = held.before()
    output = steps(model, read(model, tokens, run), new, run)
    after = held.after()
    del output
    return after - before


class HeldBytes:
    """Bytes held on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # free pages that glibc's allocator keeps would hide what is taken from them
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def before(self) -> int:
        """Bytes now; on a GPU also the start of a new maximum."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return int(torch.cuda.memory_allocated(self.device))
        return self._resident()

    def after(self) -> int:
        """Bytes now; on a GPU the most since `before`."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return self._resident()

    def _resident(self) -> int:
        if self._trim is not None:
            self._trim(0)
        return resident_bytes()
