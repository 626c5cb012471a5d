"""`dartprune layers`: which layers can be pruned, and which neurons are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError
from dartprune.reporting.tables import say, show_cells

if TYPE_CHECKING:
    from dartprune.evaluation.benchmarks.recipe import Recipe
    from dartprune.evaluation.layers.run import LayerStudy

EXAMPLE = "Example: dartprune layers --texts my-texts --keep 0.9,0.7,0.5,0.3,0.1 --out out"
INSIDE = "the passages inside"
STREAMS, TOKENS = 24, 256


def layers(
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--texts",
            help="wikitext-2, c4, files or folders of text, with commas or repeated.",
            show_default="passages inside",
        ),
    ] = None,
    model: o.Model = None,
    keep: Annotated[
        str, typer.Option("--keep", help="Shares of its neurons that a pruned layer keeps, with commas.")
    ] = "0.9,0.7,0.5,0.3,0.1",
    groups: Annotated[
        str | None,
        typer.Option("--groups", help="Layers pruned together, such as 0-3,4-15.", show_default="three thirds"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=24, help="Of a text; half are prompt.", show_default="256")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", min=2, help="Texts.")] = STREAMS,
    seed: Annotated[int, typer.Option(help="Of the draw of texts.")] = 0,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for tables, pictures, page and progress.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Prune one layer at a time, groups, and all but one; compare with sensitivity; see which neurons are kept."""
    from dartprune.evaluation.benchmarks.recipe import Recipe

    o.check_backend(backend)
    keeps = o.numbers("--keep", keep, float)
    names = [str(path) for path in o.paths(texts)] or [INSIDE]
    recipe = Recipe(
        "layers",
        dict.fromkeys(names),
        sparsities=tuple(round(1 - value, 6) for value in keeps),
        limit=streams,
        window=tokens,
    )
    carry_out(
        recipe,
        model,
        backend=backend,
        dtype=dtype,
        device=device,
        out=out,
        as_json=as_json,
        seed=seed,
        groups=_groups(groups),
    )


def carry_out(
    recipe: Recipe,
    model: str | None,
    *,
    backend: str,
    dtype: str,
    device: str | None,
    out: Path | None,
    as_json: bool,
    seed: int = 0,
    groups: dict[str, tuple[int, int]] | None = None,
) -> None:
    """Do a layer study and show it."""
    from dartprune.demo import passages
    from dartprune.evaluation.benchmarks.run import texts_of
    from dartprune.loading import DEMO, load

    inside = list(recipe.what) == [INSIDE]
    if out is not None:
        o.results_folder(out)
    documents = passages() if inside else texts_of(recipe.what)
    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    with o.resumable(out):
        found, settings = _study(
            recipe, documents, loaded, tokenizer, backend, out, as_json, seed, groups, model or DEMO
        )
    from dartprune.evaluation.layers import report

    written = report.write(found, out, model or DEMO, settings) if out is not None else []
    if as_json:
        o.print_json({"model": model or DEMO, "settings": settings, **found.to_dict()})
        return
    show_cells(report.tables(found))
    say(*_along(found))
    for path in written:
        typer.echo(f"written: {path}")


def _study(
    recipe: Recipe,
    documents: dict[str, list[str]],
    model: Any,
    tokenizer: Any,
    backend: str,
    out: Path | None,
    silent: bool,
    seed: int,
    groups: dict[str, tuple[int, int]] | None,
    name: str,
) -> tuple[LayerStudy, dict[str, Any]]:
    from dartprune.evaluation.layers.run import settings_of, study_layers, thirds
    from dartprune.evaluation.texts import opening, pieces, streams
    from dartprune.model.context import context_length
    from dartprune.model.families import describe
    from dartprune.model.sizes import dtype_name, fingerprint
    from dartprune.reporting.journal import Journal
    from dartprune.reporting.progress import bar

    length = min(recipe.window or TOKENS, context_length(model) or TOKENS)
    head = next(iter(opening(tokenizer)), None)
    drawn = streams(pieces(documents, tokenizer, length), (length,), recipe.limit or STREAMS, seed=seed, separator=head)
    count = len(describe(model).layers)
    groups = thirds(count) if groups is None else groups
    keeps = [round(1 - share, 6) for share in recipe.sparsities]
    settings = {
        **recipe.settings(),
        "keeps": keeps,
        "tokens": length,
        "prompt": length // 2,
        "groups": {who: list(ends) for who, ends in groups.items()},
        "seed": seed,
    }
    journal = Journal(
        None if out is None else out / "journal.jsonl",
        {**settings, "model": name, "backend": backend, "weights": fingerprint(model)},
    )
    with bar("layers", len(settings_of(count, keeps, groups)), silent=silent) as advance:
        found = study_layers(
            model,
            drawn,
            prompt=length // 2,
            keeps=keeps,
            groups=groups,
            size=recipe.batch,
            backend=backend,
            journal=journal,
            progress=advance,
        )
    return found, {**settings, "dtype": dtype_name(model), "begins_with": head}


def _groups(text: str | None) -> dict[str, tuple[int, int]] | None:
    if text is None:
        return None
    out = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UserError(f"--groups must be ranges of layers such as 0-3,4-15, got {part.strip()!r}")
        first = int(match[1])
        out[f"layers {part.strip()}"] = (first, int(match[2] or first))
    return out


def _along(found: LayerStudy) -> list[str]:
    values = found.overlap["over_time"]
    if not values:
        return []
    shares = ", ".join(f"{value:.2f}" for value in values)
    return [
        f"Kept neurons that two pieces of a text have in common, {found.overlap['keep']:.0%} kept, "
        f"{found.overlap['piece']} tokens each, 1 to {len(values)} pieces apart: {shares} "
        f"(chance {found.overlap['chance']:.2f})"
    ]
