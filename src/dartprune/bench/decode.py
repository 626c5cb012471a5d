"""Tokens per second of whole decode steps, dense and with each method in turn, and what Amdahl's law allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from dartprune.bench.costs import Shape
from dartprune.bench.device import BandwidthProbe, last_level_cache
from dartprune.bench.graphs import WARM, GraphedForward, check_graphs
from dartprune.bench.limits import amdahl, cache_bytes_per_token, step_bytes
from dartprune.bench.models import Subject, prompts
from dartprune.bench.pace import Paced
from dartprune.bench.result import Result, Row
from dartprune.bench.share import ffn_alone, ffn_share
from dartprune.bench.stepping import read, steps
from dartprune.bench.timing import Turns, alternate
from dartprune.errors import UserError
from dartprune.model.caches import cache_of
from dartprune.pruner import Pruner
from dartprune.report import Report
from dartprune.run import Run

SHARE_STEPS = 8  # dense steps in which the FFNs are timed, each turn


@dataclass(frozen=True)
class Load:
    """What is decoded: sequences, tokens of their prompts, new tokens that are timed, with or without CUDA graphs."""

    batch: int = 1
    prompt: int = 64
    new: int = 32
    graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def context(self) -> int:
        """Tokens that the cache must hold."""
        return self.prompt + max(self.new, SHARE_STEPS) + WARM + 2


@dataclass
class ArmTally:
    """What one arm did over its turns; seconds of the first step and of attaching are not part of a token's."""

    first: list[float] = field(default_factory=list)
    attached: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    report: Report | None = None


def paced(pruners: Mapping[str, Pruner], every: int | None) -> dict[str, Pruner]:
    """The same methods, those that replay at an event replaying after `every` tokens exactly; None leaves them be.

    Raises:
        ValueError: none of them replays.
    """
    if every is not None and every < 1:
        raise UserError(f"a refresh every {every} tokens makes no sense: give at least 1")
    if every is None:
        return dict(pruners)
    if not any(pruner.refresh.replay_tokens for pruner in pruners.values()):
        raise UserError(f"a refresh every {every} tokens: none of {', '.join(pruners)} replays; add 'dart'")
    out: dict[str, Pruner] = {}
    for name, pruner in pruners.items():
        tokens = pruner.refresh.replay_tokens
        refresh = Paced(tokens=tokens, memory=pruner.refresh.replay_memory, every=every) if tokens else None
        if refresh is None:
            out[name] = pruner
        else:
            out[f"{name}, replay every {every}"] = replace(pruner, refresh=refresh)
    return out


def check(pruners: Mapping[str, Pruner], load: Load, device: torch.device) -> None:
    """ValueError, before a model is built, for what cannot be measured."""
    for name, pruner in pruners.items():
        if name in ("dense", "ffn share", "stream"):
            raise UserError(f"no method can be called {name!r}: an arm has that name already")
        if isinstance(pruner.refresh, Paced) and pruner.refresh.every > load.new:
            raise UserError(f"{name}: no refresh would come within {load.new} new tokens: raise --new")
        check_prompt(pruner, load.prompt)
    if load.graphs:
        check_graphs(device, {name: pruner.refresh for name, pruner in pruners.items()})


def check_prompt(pruner: Pruner, prompt: int) -> None:
    """ValueError for a prompt from which no mask could be made."""
    if prompt < pruner.least_traced + pruner.skip_first:
        raise UserError(
            f"a prompt of {prompt} tokens makes no mask: {pruner.least_traced + pruner.skip_first} are needed"
        )


@torch.no_grad()
def measure(
    what: Subject,
    pruners: Mapping[str, Pruner],
    load: Load | None = None,
    *,
    turns: int = 3,
    backend: str = "auto",
    stream: BandwidthProbe | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Seconds of one decode step: dense, and with each pruner attached.

    Each turn reads the prompts and decodes one untimed token (it makes the masks) and then the timed ones, all of them
    counted, refreshes included. Dense means unattached.

    Args:
        what: the model.
        pruners: by the name of their arm.
        load: what is decoded.
        turns: how often all arms are measured in turn.
        backend: how the pruned FFN is computed.
        stream: gives the bandwidth limit.
        progress: told what is measured.

    Raises:
        ValueError: a context that is too long, a pace that no refresh would meet, or graphs that cannot be.
    """
    load = load or Load()
    device = what.model.device
    check(pruners, load, device)
    tokens = prompts(what.model, load.batch, load.prompt)
    prompts(what.model, 1, load.context)  # the new ones must fit too
    stream = stream or BandwidthProbe(device)
    bandwidth = stream.bandwidth()
    done = {name: ArmTally() for name in ("dense", *pruners)}
    arms: dict[str, Callable[[], float]] = {"dense": lambda: _dense(what.model, tokens, load, done["dense"])}
    for name, pruner in pruners.items():
        arms[name] = _pruned(what.model, pruner, backend, tokens, load, done[name])
    if load.graphs:
        alone = ffn_alone(what.model, load.batch)
        arms |= {"ffn share": lambda: alone() / arms["dense"]()}
    else:
        arms |= {"ffn share": lambda: ffn_share(what.model, tokens, SHARE_STEPS)}
    arms |= {"stream": stream.seconds}
    progress("once without counting: compiles, and takes memory")
    for arm in arms.values():
        arm()
    for kept in done.values():
        kept.first.clear()
        kept.attached.clear()
    progress(f"{turns} turns of {', '.join(done)}")
    taken = alternate(arms, turns)
    rows = _rows(what, load, taken, done, stream.bytes)
    settings = what.settings(backend, turns)
    settings |= {"batch": load.batch, "prompt": load.prompt, "new": load.new, "graphs": load.graphs}
    settings["methods"] = {name: pruner.to_dict() for name, pruner in pruners.items()}
    return Result("decode", device, settings, rows, bandwidth, [*what.notes, *_notes(what, done)])


def _pays_after(attach_seconds: float, taken: Turns, name: str, batch: int) -> int | None:
    """Decoded tokens after which the time of attaching is won back; None where a step is not quicker than dense."""
    spared = taken.spread("dense").median - taken.spread(name).median
    return math.ceil(attach_seconds / spared) * batch if spared > 0 else None


def _notes(what: Subject, done: Mapping[str, ArmTally]) -> list[str]:
    notes = [note for kept in done.values() if kept.report is not None for note in kept.report.notes]
    if Shape.of(what.model).step_bytes < 2 * last_level_cache(what.model.device):
        notes.append("the weights fit into the last cache: shares of the memory bandwidth mean nothing here")
    return list(dict.fromkeys(notes))


def _rows(what: Subject, load: Load, taken: Turns, done: Mapping[str, ArmTally], stream_bytes: int) -> list[Row]:
    shape = Shape.of(what.model)
    share = min(1.0, taken.spread("ffn share").median)
    bandwidth = stream_bytes / taken.spread("stream").median
    case = f"{what.name} {what.dtype}, batch {load.batch}{', CUDA graphs' if load.graphs else ''}"
    rows = []
    for name, kept in done.items():
        report = kept.report
        saved = 0.0 if report is None else report.bytes_saved
        moved = step_bytes(shape, saved, load.batch * (load.prompt + load.new // 2) * kept.cache_bytes)
        seconds = taken.spread(name)
        extra: dict[str, Any] = {
            "tokens_per_second": load.batch / seconds.median,
            "ffn_share_of_dense_step": share,
            "ffn_share_of_step_bytes": shape.ffn_bytes / shape.step_bytes,
            "first_step_seconds": statistics.median(kept.first),
        }
        if report is not None:
            extra |= {
                "target_sparsity": report.target_sparsity,
                "realised_sparsity": report.realised_sparsity,
                "bytes_saved": report.bytes_saved,
                "backend": report.backend,
                "saves_time": report.saves_time,
                "refreshes_per_sequence": len(report.events) / load.batch,
                "attach_seconds": statistics.median(kept.attached),
                "pays_after_tokens": _pays_after(statistics.median(kept.attached), taken, name, load.batch),
            }
        limit = None if report is None else amdahl(share, report.realised_sparsity)
        ratio = taken.times_as_fast(name, "dense")
        rows.append(Row(case, name, seconds, ratio, moved, moved / bandwidth / seconds.median, limit, extra))
    return rows


def _dense(model: Any, tokens: Tensor, load: Load, done: ArmTally) -> float:
    forward = GraphedForward(model) if load.graphs else None
    try:
        return _decode(model, tokens, load, done, None)
    finally:
        if forward is not None:
            forward.remove()


def _pruned(
    model: Any, pruner: Pruner, backend: str, tokens: Tensor, load: Load, done: ArmTally
) -> Callable[[], float]:
    def arm() -> float:
        forward = GraphedForward(model) if load.graphs else None
        try:
            with pruner(model, backend=backend) as run:
                seconds = _decode(model, tokens, load, done, run)
            done.report = run.report()
            done.attached.append(done.report.seconds["attaching"])
            return seconds
        finally:
            if forward is not None:
                forward.remove()

    return arm


def _decode(model: Any, tokens: Tensor, load: Load, done: ArmTally, run: Run | None) -> float:
    """Seconds of one step, over all new tokens."""
    cache = None
    if load.graphs:
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=load.context)
    output = read(model, tokens, run, cache)
    began = timer()
    output = steps(model, output, 1, run)
    ready = timer()
    output = steps(model, output, load.new, run)
    ended = timer()
    done.first.append(ready - began)
    done.cache_bytes = cache_bytes_per_token(cache_of(output))
    return (ended - ready) / load.new
