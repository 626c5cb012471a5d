"""Random pruners on random tiny models in random calls, against plain oracles: `make fuzz`.

Every trial is made from one seed, and the next trial has the next seed. A failure prints a line that repeats it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from dartprune import DepthAware, Detector, Global, Never, Pruner, Relearn, Release, Replay, Table, Uniform, presets
from dartprune.model.caches import handed
from dartprune.refresh import Refresh, refresh_kinds
from dartprune.selectors import Exact, Sketch, TokenGate
from oracle import MaskedTwin, assert_untouched, masks_of, means_of, rule_of, snapshot
from tiny import FAMILIES

SCORERS = ("magnitude", "average", "token-normalised", "peak", "weight-aware", "random")
TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.03}


@dataclass
class Trial:
    """What one seed means."""

    seed: int
    family: str
    sizes: dict[str, int]
    dtype: torch.dtype
    pruner: Pruner
    backend: str
    lengths: list[int]
    call: str

    @classmethod
    def of(cls, seed: int) -> Trial:
        """Draw everything from a seed."""
        draw = random.Random(seed)
        call = draw.choice(list(CALLS))
        sizes = {"num_hidden_layers": draw.randint(1, 4)}
        sizes["n_layer"] = sizes["num_hidden_layers"]
        sizes["intermediate_size"] = sizes["ffn_dim"] = draw.choice((40, 72, 96))
        dtype = draw.choice([*TOLERANCES] if call == "direct" else (torch.float32, torch.float64))
        lines = 1 if call == "assisted" else draw.randint(1, 4)
        return cls(
            seed,
            draw.choice(sorted(FAMILIES)),
            sizes,
            # whether two ways of computing agree in every token can be told in 32 bits and more
            dtype,
            _pruner(draw, sizes["num_hidden_layers"]),
            draw.choice(("masked", "reference", "auto") if dtype is torch.float64 else ("masked", "reference", "cpu")),
            [draw.choice((1, 2, 7, 12, 20, 33)) for _ in range(lines)],
            call,
        )

    def model(self) -> nn.Module:
        """The model, the same at every call."""
        return FAMILIES[self.family](**self.sizes).to(self.dtype)

    def __str__(self) -> str:
        of = f"{self.family} {str(self.dtype).removeprefix('torch.')} {self.sizes['num_hidden_layers']} layers"
        return f"{self.call}, {of}, backend {self.backend}, prompts {self.lengths}, {self.pruner}"


def _refresh(draw: random.Random, window: int) -> Refresh:
    clock = refresh_kinds.get("clock")
    return draw.choice(
        (
            Never(),
            Replay(
                tokens=window * draw.randint(1, 3),
                memory=draw.choice((0.0, 0.25)),
                settle=draw.choice((0, 16)),
                every=draw.choice((None, None, 9)),
            ),
            Relearn(tokens=draw.randint(1, 9)),
            Release(at=draw.choice((None, 6))),
            clock(every=draw.randint(1, 7), dense=draw.randint(1, 4)),
            clock(every=draw.randint(1, 7), dense=None, replay=draw.randint(2, 12)),
        )
    )


def _pruner(draw: random.Random, layers: int) -> Pruner:
    window = draw.choice((3, 4, 8))
    token = draw.choice((None, None, None, TokenGate(rate=draw.choice((0.15, 0.5, 1.0))), Sketch(bits=1), Exact()))
    if isinstance(token, (Sketch, Exact)):
        refresh: Refresh = Never()
    else:
        refresh = _refresh(draw, window)
    table = ",".join(f"{layer}:{draw.choice((0.3, 0.6, 1.0))}" for layer in range(layers))
    budgets = [DepthAware(), DepthAware(spread=0.3, min_sparsity=0.1), Global(), Uniform()]
    if token is None:
        budgets.append(Table(table))
    preset = draw.choice((*presets.names(), None, None, None, None))
    if preset is not None:
        pruner = presets.get(preset)()
        return pruner if preset == "dense" else replace(pruner, sparsity=draw.choice((0.3, 0.5, 0.7)))
    return Pruner(
        sparsity=draw.choice((0.0, 0.25, 0.5, 0.7, 0.9)) if token is None else draw.choice((0.3, 0.5)),
        scorer=draw.choice(SCORERS),
        budget=draw.choice(budgets),
        selection=draw.choice(("topk", "topk", "threshold")) if token is None else "topk",
        refresh=refresh,
        detector=Detector(
            window=window,
            delta=draw.choice((0.0, 0.5, 2.5)),
            min_drop=draw.choice((0.0, 0.02)),
            patience=draw.randint(1, 2),
            leave_one_out=draw.random() < 0.8,
        ),
        start=draw.choice((0, 0, 5)),
        min_traced=draw.choice((1, 8)),
        skip_first=draw.choice((0, 1, 3)),
        impact=draw.choice(("ffn_output", "residual")),
        compensate=draw.choice((None, "mean")) if token is None or token.can_compensate else None,
        token=token,
    )


def _texts(trial: Trial, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(trial.seed)
    most = model.config.vocab_size
    return [torch.randint(5, most, (1, length), generator=generator) for length in trial.lengths]


def _padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(text.shape[1] for text in texts)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    ids = torch.zeros_like(mask)
    for line, text in enumerate(texts):
        ids[line, width - text.shape[1] :] = text[0]
        mask[line, width - text.shape[1] :] = 1
    return ids, mask


# ---- calls


class _InForce:
    """The masks that a forward uses, and what belongs to them: read before its consequences are drawn."""

    def __init__(self, model: nn.Module, run: Any) -> None:
        self.run = run
        self.slots: tuple[int, ...] = ()
        model.get_output_embeddings().register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self.slots:
            return
        run = self.run
        self.masks = masks_of(run, self.slots)
        self.dense = torch.tensor([run.selection(slot)[0] is None for slot in self.slots])
        self.keeps = [None if dense else s.keep for s, dense in zip(run.report().sequences, self.dense, strict=True)]
        ids = list(self.slots)
        if run.method.compensate == "mean":
            self.means = means_of(run, ids)


def _direct(trial: Trial, model: nn.Module, draw: random.Random) -> None:
    """A loop of the user's with a prompt in pieces, a second text in the middle: each logit against a masked twin."""
    twin = MaskedTwin(trial.model(), trial.pruner.skip_first)
    ids, mask = _padded(_texts(trial, model))
    lines, width = ids.shape
    generator = torch.Generator().manual_seed(trial.seed + 1)
    new = torch.randint(5, model.config.vocab_size, (lines, 30), generator=generator)
    more = draw.choice((0, 0, 6))  # a second text in the middle
    cuts = sorted({0, width, *(draw.randrange(width) for _ in range(draw.choice((0, 0, 2))))})
    static = draw.random() < 0.3 and trial.family not in ("gpt2", "opt", "opt-post")
    cache = StaticCache(model.config, max_cache_len=128) if static else DynamicCache(config=model.config)
    tolerance = TOLERANCES[trial.dtype]
    # near ties of a token's own neurons are cut otherwise in 16 bits, and the plain sort of the oracle has 32
    comparable = trial.pruner.token is None or trial.dtype is torch.float32
    pruner, saved, counts, replayed = trial.pruner, [0.0] * lines, [0, 0], set()
    with torch.no_grad(), pruner(model, backend=trial.backend) as run:
        seen = _InForce(model, run)

        def agree(got: Tensor, want: Tensor, what: str) -> None:
            real = torch.cat((mask, torch.ones(lines, 99, dtype=torch.int64)), 1)[:, : got.shape[1]]
            if got.shape[1] == 1:
                real = torch.ones(lines, 1)
            scale = want[real > 0].abs().amax().clamp_min(1)
            error = ((got - want)[real > 0].abs().amax() / scale).item()
            assert error < tolerance, f"{what}: logits differ by {error:.2g}"

        for first, last in pairwise(cuts):
            with run.phase("prefill"):
                given = {"attention_mask": mask[:, :last], **handed(cache), "use_cache": True}
                got = model(input_ids=ids[:, first:last], **given).logits
            want = twin.read(ids[:, first:last], mask[:, :last])
            if last == width:
                agree(got[:, -1:], want[:, -1:], "prompt")
        seen.slots = run.slots_of(cache)
        full = mask
        for t in range(new.shape[1]):
            text = new[:, t : t + 1]
            if more and t == 12:
                full = torch.cat((full, torch.ones(lines, more, dtype=torch.int64)), 1)
                with run.phase("prefill"):
                    got = model(input_ids=new[:, :more], attention_mask=full, **handed(cache)).logits
                want = twin.read(new[:, :more], full)
                if comparable:
                    agree(got[:, -1:], want[:, -1:], "second text")
            full = torch.cat((full, torch.ones(lines, 1, dtype=torch.int64)), 1)
            known = len(run.report().events)
            with run.phase("decode"):
                got = model(input_ids=text, attention_mask=full, **handed(cache)).logits
            fill = None
            if pruner.compensate == "mean":
                own = twin.means
                # what a sketch drops has a mean of its own, which its tests make by hand
                late = torch.tensor([line in replayed or pruner.token is not None for line in range(lines)])[:, None]
                fill = [torch.where(late, theirs, ours) for theirs, ours in zip(seen.means, own, strict=True)]
            rule = rule_of(pruner, run, seen.keeps) if comparable else None
            want = twin.step(text, seen.masks, rule, fill=fill, mask=full, learning=seen.dense)
            if comparable:
                agree(got, want, f"decoded token {t}")
            for line in range(lines):
                counts[0] += int(seen.dense[line])
                counts[1] += int(not seen.dense[line])
                saved[line] += _left_out(run, seen, line)
            for event in run.report().events if len(run.report().events) > known else ():
                if event.decoded == t + 1 and event.kind in ("replay", "settle"):
                    replayed.add(event.sequence)
                if event.decoded == t + 1 and event.kind == "relearn":
                    twin.forget([event.sequence])
                    replayed.discard(event.sequence)
        report = run.report()
    assert (report.dense_tokens, report.pruned_tokens) == tuple(counts), "tokens counted"
    for line, sequence in enumerate(report.sequences):
        more = sequence.realised_sparsity - saved[line] / new.shape[1]
        # a token's own neurons are fewer where the others are silent: ReLU, or too small for 16 bits
        assert more > -1e-5 and (more < 1e-5 or pruner.token is not None), "realised sparsity of a line"
    mean = sum(sequence.realised_sparsity for sequence in report.sequences) / lines
    assert abs(report.realised_sparsity - mean) < 1e-5, "realised sparsity"


def _left_out(run: Any, seen: _InForce, line: int) -> float:
    """Share of the FFN's weights that a token of a line left out, by what its masks are."""
    keep = seen.keeps[line]
    if keep is None:
        return 0.0
    out = total = 0.0
    for layer, mask, each in zip(run.layers, seen.masks, keep, strict=True):
        candidates, neurons, token = int(mask[line].sum()), layer.neurons, run.method.token
        if token is None:
            read = candidates / neurons
        elif isinstance(token, TokenGate):
            others = layer.parts.matrices - 1
            read = (candidates + others * each) / layer.parts.matrices / neurons
        else:
            read = each / neurons + layer.fixed_share
        out += layer.size * (1 - read)
        total += layer.size
    return out / total


def _told(sequence: Any) -> tuple[Any, ...]:
    events = [(event.kind, event.decoded, event.changed) for event in sequence.events]
    counts = (sequence.dense_tokens, sequence.pruned_tokens, sequence.prompt_tokens, sequence.traced_tokens)
    return (events, counts, sequence.keep, sequence.candidates, round(sequence.realised_sparsity, 4))


def _generate(trial: Trial, model: nn.Module, draw: random.Random) -> None:
    """Greedy, with lines that end at different tokens: a batch against each of its texts alone."""
    texts = _texts(trial, model)
    ids, mask = _padded(texts)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": draw.choice((3, 24, 40)), "pad_token_id": 0}
    if draw.random() < 0.5:
        with trial.pruner(model, backend=trial.backend):
            free = model.generate(ids, attention_mask=mask, **options)
        options["eos_token_id"] = int(free[0, ids.shape[1] + draw.randrange(free.shape[1] - ids.shape[1])])
    if draw.random() < 0.2 and trial.family not in ("gpt2", "opt", "opt-post"):
        options["cache_implementation"] = "static"
    with trial.pruner(model, backend=trial.backend) as run:
        out = model.generate(ids, attention_mask=mask, **options)
        together = run.report()
    vars(model).pop("_previous_max_cache_length", None)  # transformers leaves it after a static cache
    made = 0
    for line, text in enumerate(texts):
        with trial.pruner(model, backend=trial.backend) as run:
            alone = model.generate(text, attention_mask=torch.ones_like(text), **options)[0, text.shape[1] :]
            (told,) = run.report().sequences
        vars(model).pop("_previous_max_cache_length", None)
        new = out[line, ids.shape[1] :]
        if not trial.pruner.prunes and not torch.equal(new[: len(alone)], alone):
            continue  # a near tie of the plain model
        assert torch.equal(new[: len(alone)], alone) and not new[len(alone) :].any(), f"line {line}: other tokens"
        assert _told(told) == _told(together.sequences[line]), f"line {line}: told otherwise\n{told}\n{together}"
        assert told.dense_tokens + told.pruned_tokens == len(alone) - 1, "tokens counted"
        made += len(alone) - 1
    assert not trial.pruner.prunes or together.dense_tokens + together.pruned_tokens == made, "tokens counted"


def _same_on_the_reference(trial: Trial, model: nn.Module, options: dict[str, Any]) -> None:
    ids, mask = _padded(_texts(trial, model))
    found = []
    for backend in (trial.backend, "masked"):
        torch.manual_seed(trial.seed)
        with trial.pruner(model, backend=backend) as run:
            out = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
            found.append((out, [_told(sequence) for sequence in run.report().sequences]))
    assert torch.equal(found[0][0], found[1][0]), "other tokens than with the masked backend"
    assert found[0][1] == found[1][1], f"told otherwise\n{found[0][1]}\n{found[1][1]}"
    torch.manual_seed(trial.seed)
    plain = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    torch.manual_seed(trial.seed)
    with presets.get("dense")()(model):
        dense = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    assert torch.equal(plain, dense), "the dense preset changes the tokens"


def _sample(trial: Trial, model: nn.Module, draw: random.Random) -> None:
    """Sampling from a fixed seed: the same on another backend, and as without a run where nothing is pruned."""
    returns = draw.randint(1, 3)
    _same_on_the_reference(
        trial, model, {"do_sample": True, "top_k": 0, "num_return_sequences": returns, "max_new_tokens": 20}
    )


def _beams(trial: Trial, model: nn.Module, draw: random.Random) -> None:
    """Beams, likewise."""
    _same_on_the_reference(
        trial, model, {"do_sample": False, "num_beams": draw.randint(2, 4), "max_new_tokens": draw.choice((6, 20))}
    )


def _assisted(trial: Trial, model: nn.Module, draw: random.Random) -> None:
    """Candidates from another model or from the prompt: the tokens of greedy decoding, where nothing is refreshed."""
    pruner = trial.pruner if trial.pruner.prunes else presets.get("static")(sparsity=0.5)
    trial.pruner = pruner = replace(pruner, refresh=Never(), start=0, min_traced=1, skip_first=0)
    (text,) = _texts(trial, model)
    options = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(text)}
    helper: dict[str, Any] = {"prompt_lookup_num_tokens": draw.randint(1, 5)}
    if draw.random() < 0.5:
        helper = {"assistant_model": FAMILIES[draw.choice(("llama", "qwen2"))]()}
    found = []
    for more in ({}, helper):
        with pruner(model, backend=trial.backend) as run:
            out = model.generate(text, **options, **more)
            found.append((out, run.report()))
    (plain, one), (assisted, other) = found
    assert torch.equal(plain, assisted), "other tokens than greedy decoding"
    assert one.sequences[0].keep == other.sequences[0].keep, "other masks than greedy decoding"
    # the last round's candidates may end one token later or earlier than the text
    assert abs(one.pruned_tokens - other.pruned_tokens) <= 1, "tokens counted"


CALLS: dict[str, Callable[[Trial, nn.Module, random.Random], None]] = {
    "direct": _direct,
    "generate": _generate,
    "sample": _sample,
    "beams": _beams,
    "assisted": _assisted,
}


def one(trial: Trial) -> None:
    """Run a trial; AssertionError where something is not right."""
    torch.manual_seed(trial.seed)
    model = trial.model()
    ids, mask = _padded(_texts(trial, model))
    before = snapshot(model)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
    if not plain.isfinite().all():
        return  # the plain model itself knows no answer (Gemma 2 in 64 bits, with padding)
    try:
        CALLS[trial.call](trial, model, random.Random(-trial.seed - 1))
    finally:
        model.get_output_embeddings()._forward_pre_hooks.clear()
    assert_untouched(model, before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain), "restored, but other logits"


def fuzz(seconds: float, seed: int) -> tuple[int, list[str]]:
    """Trials from `seed` on for so many seconds, one at least; how many were run, and a line of each that failed."""
    began, trials, failed = time.monotonic(), 0, []
    while not trials or time.monotonic() - began < seconds:
        trial = Trial.of(seed + trials)
        trials += 1
        try:
            one(trial)
        except Exception as error:
            traceback.print_exc()
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            failed.append(f"make fuzz SEED={trial.seed} SECONDS=0  # {what} ({trial})")
            print(failed[-1], flush=True)
    return trials, failed


def main() -> int:
    """Command line; exit code 1 where a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="stop after so long; 0: one trial")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    trials, failed = fuzz(given.seconds, given.seed)
    print(f"{trials} trials, {len(failed)} failed")
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
