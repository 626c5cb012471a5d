"""`dartprune advise`: whether pruning pays for a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dartprune.cli import options as o
from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.bench.advice import Advice, Finding, Trial

EXAMPLE = "Example: dartprune advise --model smollm2 --sparsity 0.3,0.5"
METHODS = "sketch-dart,dart"
SPARSITIES = "0.3,0.5"


def advise(
    model: o.Model = None,
    method: o.Methods = None,
    sparsity: o.Sparsities = None,
    loss: Annotated[float, typer.Option("--loss", min=0, help="Nats a token that may be lost.")] = 0.1,
    times: Annotated[float, typer.Option("--times", min=0, help="Times as fast that it must become.")] = 1.05,
    tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=16, help="Of each answer, and of each timing.")
    ] = 64,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
    as_json: o.AsJson = False,
) -> None:
    """Try methods on a model for some minutes: how much faster it decodes here, what it loses, and which to take."""
    from dartprune.bench.advice import Allowance, advise, prompts_of, work_of

    trials = _trials(o.listed(method) or METHODS.split(","), sparsity or SPARSITIES)
    o.check_backend(backend)
    o.quiet()
    from dartprune.demo import passages
    from dartprune.loading import load
    from dartprune.reporting.progress import bar

    loaded, tokenizer = load(model, dtype=dtype, device=device)
    prompts = prompts_of(tokenizer, [texts[0] for texts in passages().values()])
    with bar("trying", work_of(len(trials), len(prompts), tokens), silent=as_json) as work:
        found = advise(
            loaded, prompts, trials, new=tokens, allowed=Allowance(times, loss), backend=backend, progress=work
        )
    if as_json:
        o.print_json(found.to_dict() | {"model": model or "demo"})
    else:
        _show(found, model, loaded)


def _trials(methods: list[str], sparsity: list[str] | str) -> list[Trial]:
    """No pruning, and every method at every sparsity; UserError for one that prunes nothing, or an unknown one."""
    from dartprune.bench.advice import Trial

    trials = [Trial("dense", 0.0, o.make_pruner("dense", 0.0))]
    for share in o.numbers("--sparsity", sparsity, float):
        for name in methods:
            pruner = o.make_pruner(name, share)
            if not (pruner.prunes and share):
                raise UserError(f"--method {name} at {share:g}: it prunes nothing, which is tried in any case")
            trials.append(Trial(name, share, pruner))
    return trials


def _show(found: Advice, name: str | None, model: Any) -> None:
    from dartprune.model.sizes import count, dtype_name
    from dartprune.reporting.tables import grid, say, show

    parameters = count(model)[0] / 1e6
    dtype = dtype_name(model)
    say(
        f"{name or 'The model inside'}: {parameters:.0f} M parameters in {dtype} on {model.device}, "
        f"{found.tokens_per_second:.1f} tokens/s; the FFN takes {found.ffn_share:.0%} of a step"
    )
    columns = ("", "realised", "FFN bytes saved", "times as fast", "loss over dense, nats", "")
    show(grid(columns, [_row(finding, found) for finding in found.findings], frame=False))
    for finding in found.findings:
        if finding.refused is not None:
            say(f"{finding.arm} at {finding.sparsity:g}: {finding.refused}")
    say("Times as fast and losses with their range: over the turns, and 95 % over the answers.", style="dim")
    for sentence in found.sentences:
        say(sentence)
    if found.best is not None:
        best = found.best
        say(f"\n    with {_call(best.arm, best.sparsity)}(model):")
        say("        model.generate(...)")


def _call(arm: str, sparsity: float) -> str:
    """What makes an arm's pruner."""
    import dartprune

    name = "".join(part.title() for part in arm.split("-"))
    if not hasattr(dartprune, name):
        return f"dartprune.evaluation.arms.arm({arm!r}).build({sparsity:g})"
    return f"dartprune.{name}({f'sparsity={sparsity:g}' if sparsity else ''})"


def _row(finding: Finding, found: Advice) -> tuple[str, ...]:
    head = f"{finding.arm} {finding.sparsity:g}" if finding.sparsity else finding.arm
    if finding.refused is not None:
        return (head, *["-"] * 4, "refused")
    times, loss = finding.times, finding.loss
    return (
        head,
        f"{finding.realised:.3f}",
        o.saved(finding.bytes_saved),
        f"{times.value:.2f} ({times.low:.2f} to {times.high:.2f})",
        f"{loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f})",
        "worth it" if finding.pays(found.allowed) else "",
    )
