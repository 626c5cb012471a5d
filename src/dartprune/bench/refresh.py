"""What renewing the masks costs: seconds of one replay, split by what it does, in dense decode steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils.benchmark import timer

from dartprune.bench.costs import Shape
from dartprune.bench.decode import Load, check_prompt
from dartprune.bench.device import BandwidthProbe
from dartprune.bench.models import Subject, prompts
from dartprune.bench.pace import Paced
from dartprune.bench.result import Result, Row
from dartprune.bench.stepping import read, steps
from dartprune.bench.timing import Turns, alternate
from dartprune.errors import UserError
from dartprune.pruner import Pruner

STEPS = 4  # dense steps, and replays, of a block
_PARTS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "mkldnn_linear", "_scaled_mm"),
    "selection": ("topk", "sort", "kthvalue", "nonzero", "searchsorted"),
}


def part_of(operator: str) -> str:
    """What an operator of a replay is there for: `products`, `selection`, or `statistics and lists`."""
    space, _, name = operator.rpartition("::")
    if space == "dartprune":
        return "products"
    return next((part for part, names in _PARTS.items() if name in names), "statistics and lists")


class ReplayTimer:
    """Times what a run does between the model's output head and the event that tells of the new masks."""

    def __init__(self, model: Any) -> None:
        self.seconds: list[float] = []
        self.parts: dict[str, float] = {}
        self.profiling = False
        self._began: float | None = None
        self._on_gpu = model.device.type == "cuda"
        self._profile: profile | None = None
        self._hook = model.get_output_embeddings().register_forward_hook(self._head)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def _head(self, *_: Any) -> None:
        if self.profiling:
            self._profile = profile(use_device="cuda" if self._on_gpu else None)
            self._profile.__enter__()
        self._began = timer()

    def event(self, _: Any) -> None:
        """Told of each event; all sequences of a batch are renewed together, so the first one ends the replay."""
        if self._began is None:
            return
        self.seconds.append(timer() - self._began)
        self._began = None
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._add(self._profile)
            self._profile = None

    def _add(self, made: profile) -> None:
        for entry in made.key_averages():
            spent = entry.self_device_time_total if self._on_gpu else entry.self_cpu_time_total
            part = part_of(entry.key)
            self.parts[part] = self.parts.get(part, 0.0) + spent / 1e6


def check(pruner: Pruner, batch: int, prompt: int) -> None:
    """ValueError, before a model is built, for what cannot be measured."""
    Load(batch, prompt, STEPS)
    tokens = pruner.refresh.replay_tokens
    if not tokens:
        raise UserError(f"{pruner.name} never replays: there is no refresh to measure; use 'dart'")
    check_prompt(pruner, prompt)
    if prompt < tokens:
        raise UserError(f"a prompt of {prompt} tokens is too short for a replay of {tokens}: give at least {tokens}")


@torch.no_grad()
def measure(
    what: Subject,
    pruner: Pruner,
    *,
    batch: int = 1,
    prompt: int = 64,
    turns: int = 5,
    backend: str = "auto",
    stream: BandwidthProbe | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Seconds of one replay of all sequences of a batch, of attaching and of detaching, against a dense decode step.

    The pruner is given a clock that replays after every token; dense steps and replays alternate. The split comes from
    torch's profiler in a pass of its own, which only its shares are taken from.

    Args:
        what: the model.
        pruner: a method that replays.
        batch: sequences renewed together.
        prompt: tokens of each prompt.
        turns: how often dense steps and replays are measured in turn.
        backend: how the pruned FFN is computed.
        stream: gives the bandwidth limit.
        progress: told what is measured.

    Raises:
        ValueError: the method does not replay, or the prompt makes no mask.
    """
    check(pruner, batch, prompt)
    load, tokens_kept = Load(batch, prompt, STEPS), pruner.refresh.replay_tokens
    model, shape = what.model, Shape.of(what.model)
    tokens = prompts(model, batch, prompt)
    prompts(model, 1, load.context)
    stream = stream or BandwidthProbe(model.device)
    bandwidth = stream.bandwidth()
    pruner = replace(pruner, refresh=Paced(tokens=tokens_kept, memory=pruner.refresh.replay_memory, every=1))
    changing: dict[str, list[float]] = {"attach": [], "detach": []}
    parts: dict[str, float] = {}

    def dense() -> float:
        output = steps(model, read(model, tokens, None), 1, None)
        began = timer()
        steps(model, output, STEPS, None)
        return (timer() - began) / STEPS

    def replays(profiling: bool = False) -> float:
        replay = ReplayTimer(model)
        replay.profiling = profiling
        try:
            with pruner(model, backend=backend) as run:
                run.on_event(replay.event)
                steps(model, read(model, tokens, run), 1 + STEPS, run)
        finally:
            replay.remove()
        seconds = run.report().seconds
        changing["attach"].append(seconds["attaching"])
        changing["detach"].append(seconds["detaching"])
        parts.update(replay.parts)
        return sum(replay.seconds[1:]) / STEPS

    progress("once without counting, and once under the profiler")
    dense()
    replays()
    replays(profiling=True)
    changing = {name: [] for name in changing}
    progress(f"{turns} turns of dense steps and replays")
    taken = alternate({"dense step": dense, "replay": replays, "stream": stream.seconds}, turns)
    taken = Turns(taken.seconds | changing, taken.order)
    moved = round(shape.ffn_bytes * (shape.matrices - 1) / shape.matrices)
    limit = stream.bytes / taken.spread("stream").median
    case = f"{what.name} {what.dtype}, batch {batch}, {tokens_kept} tokens replayed"
    rows = []
    for name, size in (("dense step", shape.step_bytes), ("replay", moved), ("attach", None), ("detach", None)):
        seconds = taken.spread(name)
        extra: dict[str, Any] = {"dense_steps": seconds.median / taken.spread("dense step").median}
        if name == "replay":
            whole = sum(parts.values())
            extra["parts"] = {part: seconds.median * value / whole for part, value in parts.items()}
        share = None if size is None else size / limit / seconds.median
        rows.append(Row(case, name, seconds, taken.times_as_fast(name, "dense step"), size, share, None, extra))
    settings = what.settings(backend, turns) | {"batch": batch, "prompt": prompt, "method": pruner.to_dict()}
    return Result("refresh", model.device, settings, rows, bandwidth, list(what.notes))
