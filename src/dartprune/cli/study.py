"""`dartprune study`: what happens inside a pruned model when the topic changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.evaluation.arms import ArmAt
    from dartprune.evaluation.study.escapes import Escape
    from dartprune.evaluation.study.findings import Findings
    from dartprune.evaluation.study.layout import Text
    from dartprune.evaluation.study.results import Results
    from dartprune.evaluation.study.settings import Settings
    from dartprune.evaluation.study.similarity import Encoder

EXAMPLE = (
    "Example: dartprune study --mode forced --texts DIR --split valid --streams 60 "
    "--method dart-frozen,dart-release@100,200,...,600,dart --out study"
)
ARMS = "dense,dart-frozen,dart-release@100,200,...,600,dart,griffin"


def study(
    more: Annotated[
        list[Path] | None, typer.Argument(help="Further texts, as in --texts A B.", show_default=False)
    ] = None,
    mode: Annotated[str, typer.Option(help="forced: given texts; free: the model writes.")] = "forced",
    texts: o.Texts = None,
    split: Annotated[str | None, typer.Option(help="Of folders, only the files NAME.SPLIT.*")] = None,
    prompt: Annotated[str | None, typer.Option(help="Free: one prompt.")] = None,
    bridge: Annotated[str, typer.Option(help="Free: text that turns --prompt to the second topic.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="Free: a JSON file of two-topic prompts.", show_default="the hundred inside")
    ] = None,
    one_request: Annotated[
        bool, typer.Option("--one-request", help="Free: ask for both topics at once; the change is then unknown.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Free: put the request into the tokenizer's chat template.")
    ] = False,
    streams: Annotated[int, typer.Option(min=1, help="Texts that change their topic.")] = 60,
    control: Annotated[
        int | None, typer.Option(min=0, help="Texts on one topic.", show_default="as many as --streams")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Arms as in compare, with commas or repeated; dense is always there.",
            show_default=ARMS,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for results; a study that was stopped goes on there.")
    ] = Path("study"),
    model: o.Model = None,
    sparsity: o.Sparsity = 0.7,
    prompt_tokens: Annotated[int, typer.Option(help="Forced: tokens of the prompt, dense for every arm.")] = 64,
    before: Annotated[int, typer.Option(help="Decoded tokens of the first topic.")] = 60,
    after: Annotated[int, typer.Option(help="Decoded tokens from the change on.")] = 840,
    window: Annotated[int, typer.Option(help="Tokens of a window of the report.")] = 10,
    layers: Annotated[
        str, typer.Option(help="Layers to look at: first, middle, last or numbers.")
    ] = "first,middle,last",
    spaces: Annotated[str, typer.Option(help="Spaces to look at: attention, residual.")] = "attention,residual",
    top: Annotated[
        int, typer.Option(help="Largest dimensions whose overlap is counted; at most an eighth of all.")
    ] = 100,
    early: Annotated[int, typer.Option(help="Tokens after the change within which a detection is early.")] = 50,
    horizon: Annotated[int, typer.Option(help="Tokens after a release over which recovery is judged.")] = 100,
    recovered: Annotated[float, typer.Option(help="Share of the loss that a recovery must regain.")] = 0.8,
    temperature: Annotated[float, typer.Option(help="Free: 0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the texts, of sampling and of the intervals.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Texts decoded at once.")] = 30,
    separator: Annotated[bool, typer.Option(help="Forced: begin each stretch with the begin-of-text token.")] = True,
    similarity: Annotated[
        Path | None,
        typer.Option(help="Free: folder of a local sentence encoder, to compare meanings.", show_default="none"),
    ] = None,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    as_json: o.AsJson = False,
) -> None:
    """Follow texts that change their topic through a pruned model, and ask when a release of the masks still helps."""
    from dartprune.evaluation.arms import parse_arms
    from dartprune.evaluation.study.layout import stretch_begin
    from dartprune.evaluation.study.settings import Settings
    from dartprune.names import comma_list

    settings = Settings(
        mode=mode,
        sparsity=sparsity,
        prompt=prompt_tokens,
        before=before,
        after=after,
        window=window,
        layers=tuple(comma_list(layers)),
        spaces=tuple(comma_list(spaces)),
        top=top,
        early=early,
        horizon=horizon,
        recovered=recovered,
        temperature=temperature,
        seed=seed,
    )
    chosen = parse_arms(",".join(method) if method else ARMS, sparsity)
    settings.check_arms(chosen)
    sources = [*o.paths(texts), *(more or [])]
    _check_mode(mode, sources, prompt, bridge, prompts, similarity, one_request, chat)
    control = streams if control is None else control
    o.check_backend(backend)
    o.results_folder(out)
    from dartprune.loading import load

    o.quiet()
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    encoder: Encoder | None = None
    if mode == "forced":
        from dartprune.evaluation.study.layout import forced_texts
        from dartprune.evaluation.texts import read_texts

        laid = forced_texts(read_texts(sources, split=split), tokenizer, settings, streams, control, separator)
    else:
        from dartprune.evaluation.study.quality import check_libraries

        check_libraries()
        if similarity is not None:
            from dartprune.evaluation.study.similarity import Encoder

            encoder = Encoder(similarity)
        laid = _free(tokenizer, settings, prompt, bridge, prompts, one_request, chat, streams, control)
    name = "demo" if model is None else Path(model).name
    with o.resumable(out):
        results = _run(loaded, tokenizer, laid, chosen, settings, out, batch, backend, name, as_json)
    begin = stretch_begin(tokenizer, separator) if mode == "forced" else None
    found, paths = _conclude(results, laid, tokenizer, encoder, out, name, one_request, begin)
    if as_json:
        from dartprune.evaluation.study.findings import to_data

        o.print_json(to_data(results, found) | {"files": [str(path) for path in paths]})
    else:
        _show(found, paths)


def _check_mode(
    mode: str,
    sources: list[Path],
    prompt: str | None,
    bridge: str,
    prompts: Path | None,
    similarity: Path | None,
    one_request: bool,
    chat: bool,
) -> None:
    """UserError before the long work for options that do not go together."""
    written = prompt is not None or prompts is not None or similarity is not None or one_request or chat or bridge
    if mode == "forced":
        if written:
            raise UserError(
                "--prompt, --bridge, --prompts, --one-request, --chat and --similarity belong to --mode free"
            )
        if not sources:
            raise UserError("--mode forced needs --texts: files or folders with the text of at least two topics")
    elif sources:
        raise UserError("--texts belongs to --mode forced; in free mode the model writes: give --prompt or --prompts")
    if prompt is not None and prompts is not None:
        raise UserError("give either --prompt or --prompts")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: give some text to continue")
    if bridge and prompt is None:
        raise UserError("--bridge belongs to --prompt; prompts of a file bring their own")


def _free(
    tokenizer: Any,
    settings: Settings,
    prompt: str | None,
    bridge: str,
    prompts: Path | None,
    one_request: bool,
    chat: bool,
    streams: int,
    control: int,
) -> dict[str, list[Text]]:
    from dartprune.evaluation.study.layout import free_texts
    from dartprune.evaluation.study.prompts import TopicPrompt, generate_prompts, read_prompts

    if prompt is not None:
        rows = [TopicPrompt("first topic", "second topic", prompt, prompt, bridge)]
    else:
        rows = generate_prompts() if prompts is None else read_prompts(prompts)
    return free_texts(rows[:streams], tokenizer, settings, control, one_request=one_request, chat=chat)


def _run(
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[Text]],
    arms: list[ArmAt],
    settings: Settings,
    out: Path,
    batch: int,
    backend: str,
    name: str,
    silent: bool,
) -> Results:
    from dartprune.evaluation.study.run import run_study
    from dartprune.reporting.progress import bar

    with bar("reading texts", 0, silent=silent) as work:
        return run_study(
            model, tokenizer, texts, arms, settings,
            folder=out, batch=batch, backend=backend, name=name, watcher=work,
        )  # fmt: skip


def _conclude(
    results: Results,
    texts: dict[str, list[Text]],
    tokenizer: Any,
    encoder: Encoder | None,
    out: Path,
    name: str,
    one_request: bool,
    begin: int | None,
) -> tuple[Findings, list[Path]]:
    import json

    from dartprune.evaluation.study.findings import find
    from dartprune.evaluation.study.report import write

    settings = results.settings
    quality: dict[str, dict[str, dict[str, float]]] = {}
    notes: list[str] = []
    escaped: list[Escape] = []
    if settings.mode == "free":
        import torch

        from dartprune.evaluation.study.escapes import escapes
        from dartprune.evaluation.study.layout import written
        from dartprune.evaluation.study.quality import naming, text_quality
        from dartprune.evaluation.study.similarity import similarity

        topics = [text.topics for text in texts["change"]]
        wrote = {
            arm.name: written(texts["change"], torch.from_numpy(record.text), settings, tokenizer)
            for arm in results.arms
            if (record := results.get(arm.name)) is not None
        }
        for arm, parts in wrote.items():
            quality[arm] = {
                part: text_quality(said, wrote["dense"][part]) | naming(said, topics) for part, said in parts.items()
            }
            if encoder is not None:
                for part, said in parts.items():
                    quality[arm][part] |= similarity(encoder, said, wrote["dense"][part])
        escaped = escapes(results, tokenizer)
        (out / "written.json").write_text(json.dumps(wrote, indent=1) + "\n")
        notes.append(
            "Loss over dense is the dense model's loss on what the arm wrote, minus that on what the dense arm wrote: "
            "text that repeats itself is easy to predict, so read it beside repetition."
        )
        if one_request or any(not any(token >= 0 for token in text.script) for text in texts["change"]):
            notes.append(
                "The place of the change is unknown, because the model was asked for both topics at once: 'before' "
                f"and 'after' mean decoded token {settings.before}, and what is counted from the change has no meaning."
            )
    else:
        notes.append(
            "The text is given, so a pruned model cannot write itself into a corner: what a release must undo is the "
            "cache that was filled by the pruned model. Free mode shows the other half."
        )
        if begin is not None:
            notes.append(f"Each stretch of a text begins with token {begin}.")
    found = find(results, quality, notes, escaped)
    return found, write(
        results, found, out, f"Knowledge drift: {name} at sparsity {settings.sparsity:g}, {settings.mode}"
    )


def _show(found: Findings, paths: list[Path]) -> None:
    from dartprune.reporting.tables import grid, say, show

    columns = ("arm", "texts", "sparsity", "loss before", "after", "cosine before", "after", "events", "delay")
    arms = [
        (
            row.arm,
            "change" if row.kind == "change" else "one topic",
            f"{row.realised_sparsity:.2f}",
            f"{row.excess_before.value:.2f}",
            f"{row.excess_after.value:.2f}",
            f"{row.to_dense_before:.2f}",
            f"{row.to_dense_after:.2f}",
            f"{row.events_before + row.events_after:.1f}",
            "" if row.delay is None else f"{row.delay:g}",
        )
        for row in found.arms
    ]
    show(grid(columns, arms, title="loss over dense in nats; cosine with dense vectors", words=("texts",)))
    if found.recovery:
        heads = ("released at", "loss regained", "cosine regained", "left at the end", "verdict")
        releases = [
            (str(row.release), str(row.regained), str(row.similarity_regained), str(row.lost), row.verdict)
            for row in found.recovery
        ]
        show(grid(heads, releases, title="releases of the prompt's mask", words=("verdict",)))
    if found.escapes:
        heads = ("released at", "dense", "frozen", "released", "fewer")
        shares = [(str(r.release), str(r.dense), str(r.frozen), str(r.released), str(r.fewer)) for r in found.escapes]
        show(grid(heads, shares, title="4-grams that return in what is written after a release"))
    say(*(f"{claim.answer}: {claim.claim}: {claim.figures}" for claim in found.claims), found.verdict)
    typer.echo(f"report: {paths[0]}")
