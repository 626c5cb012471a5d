"""What `dartprune serve` and `dartprune batch` share: a model with a method attached, and what requests may ask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.run import Run
    from dartprune.serving.engine import Limits

Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences that decode together.")]
Chunk = Annotated[int, typer.Option("--chunk", min=1, help="Prompt tokens read between two steps of the others.")]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", min=2, help="Of a prompt and its answer together.", show_default="the model's context"),
]
Allow = Annotated[
    str | None,
    typer.Option(
        "--allow-sparsity", help="LOW,HIGH: what a request may ask for; dense it may always be.",
        show_default="the one of --sparsity",
    ),
]  # fmt: skip
Above = Annotated[
    str,
    typer.Option(
        "--dense-above",
        help="Steps of more sequences than this are dense: a number, never, or auto, which measures at the start.",
    ),
]
Invariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="A request's tokens do not depend on what else decodes: sums in one order, slower with many at once.",
    ),
]
PrefixCache = Annotated[
    int, typer.Option("--prefix-cache", min=0, help="MiB for beginnings of prompts that came before; 0 for none.")
]
Method = Annotated[str, typer.Option("--method", help="sketch-dart, dart, static, dense or another method.")]
KEPT_PRODUCTS = "32"  # compiled ones: more than the shapes of a decoding step


@dataclass(frozen=True)
class Offer:
    """What requests get and may ask for."""

    method: str
    sparsity: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, method: str, sparsity: float, allowed: str | None) -> Offer:
        """From the options; UserError for what does not fit together."""
        if not 0 <= sparsity < 1:
            raise UserError(f"--sparsity must lie in [0, 1), got {sparsity:g}")
        if method == "dense" or sparsity == 0:
            return cls("dense", 0.0, 0.0, 0.0)
        pair = (sparsity, sparsity) if allowed is None else o.numbers("--allow-sparsity", allowed, float)
        if len(pair) != 2 or not 0 < pair[0] <= sparsity <= pair[1] < 1:
            raise UserError(f"--allow-sparsity {allowed}: write LOW,HIGH around --sparsity {sparsity:g}, in (0, 1)")
        return cls(method, sparsity, *pair)

    @property
    def terms(self) -> dict[str, Any]:
        """As `door.Terms` has them."""
        return {"method": self.method, "sparsity": self.sparsity, "lowest": self.lowest, "highest": self.highest}


def limits_of(batch: int, queue: int, chunk: int, tokens: int | None, prefix_cache: int, *, invariant: bool) -> Limits:
    """The engine's limits."""
    from dartprune.serving.engine import Limits

    return Limits(batch, queue, chunk, tokens, invariant, prefix_cache << 20)


def above_of(text: str, *, invariant: bool) -> int | str | None:
    """The option --dense-above; UserError for anything else."""
    if text not in ("auto", "never") and not text.isdigit():
        raise UserError(f"--dense-above {text}: write a number, never or auto")
    if invariant and text.isdigit():
        raise UserError(f"--batch-invariant with --dense-above {text}: answers would depend on how many decode")
    if text == "never" or invariant:
        return None
    return text if text == "auto" else int(text)


@contextmanager
def attached(
    model: str | None, offer: Offer, *, backend: str, dtype: str, device: str | None
) -> Iterator[tuple[Any, Any, Run]]:
    """The model, its tokenizer, and the run of the offered method."""
    # prompts come in any length, and for each torch's library keeps a compiled product, a thousand of them by default
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, KEPT_PRODUCTS)
    from dartprune.loading import load

    # room is held for the lowest sparsity that may be asked for
    pruner = o.make_pruner(offer.method, offer.lowest)
    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    with pruner(loaded, backend=backend) as run:
        # more than the method can leave out is refused now, not when it is asked for
        run.sequences.close(run.sequences.open(sparsity=offer.highest))
        yield loaded, tokenizer, run


def name_of(model: str | None) -> str:
    """What a model is called by requests: its name on the hub, or that of its folder or file."""
    if model is None:
        return "dartprune-demo"
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
