"""Train the demo model on a prepared corpus: seeded, resumable, on a CPU or one GPU.

    python tools/demo_model/train.py --corpus WORK --out RUN --tokens 12e6 [--minutes 60]

The same command goes on where a stopped one left off; what it saw so far is the same as if it had never stopped. More
`--tokens` or fewer move the fall of the learning rate, as long as that has not begun.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """What the model is: 10.5 M parameters, 83 % of them outside the embedding in FFNs."""

    hidden: int = 256
    intermediate: int = 1280
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    context: int = 2048


@dataclass(frozen=True)
class Recipe:
    """How it is trained. Fractions are of all tokens; lengths and batch in tokens."""

    seed: int = 1
    batch: int = 8192
    short: int = 256  # length of a sequence at first
    long: int = 1024  # and in the last part
    long_from: float = 0.7
    changing: float = 0.5  # share of sequences that change their domain
    bare: float = 0.25  # share of changes without a separator
    shortest_stretch: int = 64
    muon_rate: float = 6e-3
    adam_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup: int = 40  # steps
    decay_from: float = 0.5  # the rate falls from here to zero


def build(shape: Shape, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """The untrained model in fp32; what is added to the residual stream starts small."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        # the padding token is also the separator: its row must not stay at zero
        model.model.embed_tokens.padding_idx = None
        model.model.embed_tokens.weight[0].normal_(0, 0.02)
        for layer in model.model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.mul_((2 * shape.layers) ** -0.5)
    return model


class Sequences:
    """Training sequences: batch i is a function of the seed and i alone, so that a resumed run sees the same.

    Half of the sequences are one stretch of one domain, the others change domain, some without any separator.
    """

    def __init__(self, corpus: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens = {name: np.load(corpus / f"{name}.train.npy", mmap_mode="r") for name in domains(corpus)}
        sizes = np.array([len(rows) for rows in self.tokens.values()], dtype=np.float64)
        # between equal shares and shares by size: the small domains are seen, the large ones are not starved
        self.shares = np.sqrt(sizes) / np.sqrt(sizes).sum()

    def batch(self, number: int, length: int) -> Tensor:
        """int64 [recipe.batch / length, length]."""
        draw = np.random.default_rng((self.recipe.seed, number))
        rows = [self._row(draw, length) for _ in range(max(1, self.recipe.batch // length))]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _row(self, draw: np.random.Generator, length: int) -> np.ndarray:
        names = list(self.tokens)
        if draw.random() >= self.recipe.changing:
            return self._stretch(draw, str(draw.choice(names, p=self.shares)), length, separate=True)
        parts: list[np.ndarray] = []
        left, last = length, ""
        while left > 0:
            most = max(self.recipe.shortest_stretch + 1, length // 2 + 1)
            size = min(left, int(draw.integers(self.recipe.shortest_stretch, most)))
            odds = np.where(np.array(names) == last, 0.0, self.shares)
            last = str(draw.choice(names, p=odds / odds.sum()))
            separate = not parts or draw.random() >= self.recipe.bare
            parts.append(self._stretch(draw, last, size, separate))
            left -= size
        return np.concatenate(parts)

    def _stretch(self, draw: np.random.Generator, name: str, size: int, separate: bool) -> np.ndarray:
        tokens = self.tokens[name]
        needed = size - separate
        start = int(draw.integers(0, len(tokens) - needed + 1))
        body = np.asarray(tokens[start : start + needed])
        return np.concatenate([np.zeros(1, dtype=body.dtype), body]) if separate else body


def domains(corpus: Path) -> list[str]:
    """Names of the prepared domains.

    Raises:
        ValueError: the folder was not prepared.
    """
    about = corpus / "corpus.json"
    if not about.is_file():
        raise ValueError(f"{corpus}: no corpus.json there; prepare it with corpus.py")
    return list(json.loads(about.read_text())["domains"])


class Training:
    """Model, optimisers and how far they are."""

    def __init__(self, corpus: Path, out: Path, shape: Shape, recipe: Recipe, device: torch.device) -> None:
        self.corpus, self.out, self.recipe, self.device = corpus, out, recipe, device
        self.settings = {"shape": asdict(shape), "recipe": asdict(recipe)}
        self.tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
        self.model = build(shape, len(self.tokenizer), recipe.seed).to(device)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in inside]
        muon = torch.optim.Muon(
            matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (muon, recipe.muon_rate),
            (adam, recipe.adam_rate),
        ]
        self.step = 0
        self.seconds = 0.0
        self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _resume(self) -> None:
        if not self._checkpoint.is_file():
            return
        state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{self.out} holds a run with other settings; give another --out")
        self.model.load_state_dict(state["model"])
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write a checkpoint; a run killed while writing keeps the former one."""
        self.out.mkdir(parents=True, exist_ok=True)
        fresh = self._checkpoint.with_suffix(".new")
        state: dict[str, Any] = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, fresh)
        os.replace(fresh, self._checkpoint)

    def export(self) -> Path:
        """Write the model in bf16 with its tokenizer, ready to load."""
        folder = self.out / "model"
        weights = {name: value.to(torch.bfloat16) for name, value in self.model.state_dict().items()}
        copy = LlamaForCausalLM(self.model.config).to(torch.bfloat16)
        copy.load_state_dict(weights)
        copy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (self.out / "settings.json").write_text(json.dumps(self.settings, indent=1) + "\n")
        return folder

    def run(self, tokens: int, stop: Callable[[], bool], compiled: bool, save_every: float = 240) -> bool:
        """Train until `tokens` are seen; False if `stop`, asked before each step, said so first."""
        loss_of = _loss_of(self.model, self.device)
        if compiled:
            loss_of = torch.compile(loss_of)
        sequences = Sequences(self.corpus, self.recipe)
        last = max(1, tokens // self.recipe.batch)
        saved = time.monotonic()
        while self.step < last:
            if stop():
                self.save()
                return False
            begun = time.monotonic()
            done = self.step / last
            scale = rate_scale(self.step, last, self.recipe)
            for optimiser, rate in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate * scale
            length = self.recipe.short if done < self.recipe.long_from else self.recipe.long
            loss = loss_of(sequences.batch(self.step, length).to(self.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimiser, _ in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            self.step += 1
            self.seconds += time.monotonic() - begun
            if self.step % 10 == 0 or self.step == last:
                self._log(loss=round(float(loss.detach()), 4), rate=round(scale, 4), length=length)
            if self.step % 150 == 0 or self.step == last:
                self._log(valid=held_out(self.model, self.corpus, self.device))
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        return True

    def _log(self, **values: Any) -> None:
        row = {"step": self.step, "tokens": self.step * self.recipe.batch, "seconds": round(self.seconds), **values}
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def rate_scale(step: int, last: int, recipe: Recipe) -> float:
    """The learning rate's factor: a warm-up, a plateau, a straight fall to zero."""
    fall = recipe.decay_from * last
    down = (last - step) / max(1.0, last - fall) if step >= fall else 1.0
    return min(1.0, (step + 1) / recipe.warmup, down)


def _loss_of(model: LlamaForCausalLM, device: torch.device) -> Callable[[Tensor], Tensor]:
    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return loss_of


@torch.no_grad()
def held_out(model: Any, corpus: Path, device: torch.device, windows: int = 16, length: int = 256) -> dict[str, float]:
    """Loss in nats per token on the first windows of each domain's held-out part; each window begins with token 0."""
    loss_of = _loss_of(model, device)
    out = {}
    for name in domains(corpus):
        rows = held_out_windows(corpus, name, length)[:windows]
        out[name] = round(float(loss_of(rows.to(device))), 4)
    return out


def held_out_windows(corpus: Path, name: str, length: int) -> Tensor:
    """int64 [N, length] of a domain's held-out part, one after another, each begun by token 0."""
    tokens = torch.from_numpy(np.load(corpus / f"{name}.valid.npy").astype(np.int64))
    count = len(tokens) // (length - 1)
    if count == 0:
        raise ValueError(f"{name}: the held-out part has {len(tokens)} tokens, a window needs {length - 1}")
    body = tokens[: count * (length - 1)].view(count, length - 1)
    return torch.cat([torch.zeros(count, 1, dtype=torch.int64), body], dim=1)


def log_rows(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's log, those of steps that a killed run took twice only once."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["step"], "valid" in row] = row
    yield from rows.values()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoint, log, model")
    parser.add_argument("--tokens", type=float, required=True, help="tokens to train on in all")
    parser.add_argument("--minutes", type=float, help="stop after this long; the same command goes on later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    args = parser.parse_args(argv)
    if args.tokens < Recipe.batch:
        sys.exit(f"train.py: --tokens must be at least one batch of {Recipe.batch}, got {args.tokens:g}")
    try:
        training = Training(args.corpus, args.out, Shape(), Recipe(), torch.device(args.device))
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    deadline = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    if training.run(int(args.tokens), lambda: time.monotonic() > deadline, args.compile):
        print(f"{training.export()}: {training.step} steps in {training.seconds / 60:.0f} minutes")
    else:
        print(f"stopped at step {training.step}; the same command goes on")


if __name__ == "__main__":
    main()
