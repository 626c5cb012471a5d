"""A comparison on disk and on the terminal: results.json, results.csv, pictures, and one page with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dartprune.evaluation.compare.outcomes import Comparison, Outcome, PartOutcome
from dartprune.evaluation.compare.pictures import against_sparsity, curves
from dartprune.evaluation.compare.plan import CHANGING, ONE
from dartprune.evaluation.stats import Interval
from dartprune.reporting.frame import Frame
from dartprune.reporting.page import TextTable

UNREACHED, CEILING = "*", "†"
_PARTS = {ONE: ("one topic",), CHANGING: ("before", "after")}
_EXPLAINED = (
    "Every arm decodes the same token streams, teacher-forced: the prompt without its last token runs dense and is "
    "traced, every later token is computed as a decoded one, with the stream's own masks in force. Losses are in nats "
    "a token, minus the dense model's on the same tokens; brackets hold 95 % of the means over streams drawn anew. "
    "realised: one minus the share of the FFN's weights that decoded tokens need, dense ones counted as 0; each arm's "
    "nominal sparsity was tuned until this figure was the wanted one. An arm marked * cannot reach it and is shown as "
    "it is: do not rank it with the others. Two figures with a stroke between them are those of the streams on one "
    "topic and of those that change it. An arm marked † computes everything to know what it could have left out: a "
    "ceiling, no method. bytes saved: what the backend left unread, one stream at a time."
)


def write(comparison: Comparison, folder: Path, title: str) -> dict[str, str]:
    """Write every file of a comparison; returns their paths by name."""
    frame = Frame(folder, title)
    page, versus = frame.page, comparison.settings["versus"]
    frame.json("results", comparison.to_dict())
    frame.csv("results", flat(comparison))
    page.text(_EXPLAINED)
    page.text(_streams(comparison))
    for target in comparison.settings["sparsities"]:
        page.heading(f"{target:.0%} realised sparsity")
        how_often = "loss over dense in nats, and how often the likeliest token is dense's"
        page.table(*quality(comparison, target), caption=how_often)
        page.table(*conduct(comparison, target), caption="what the arms did, for one stream unless said otherwise")
        columns, rows = pairs(comparison, target)
        if rows:
            better = f"loss minus that of {versus} on the same streams; above 0 {versus} is better"
            page.table(columns, rows, caption=better)
    if comparison.of(CHANGING):
        page.heading("Around the change of topic")
        caption = "Loss over dense against the distance from the change of topic."
        frame.picture("curves", curves(comparison), caption)
    page.heading("Against realised sparsity")
    caption = "Loss over dense against realised sparsity, with 95 % intervals."
    frame.picture("sparsity", against_sparsity(comparison), caption)
    remarks = notes(comparison)
    if remarks:
        page.heading("Remarks")
        for remark in remarks:
            page.text(remark)
    return {path.name: str(path) for path in frame.close(comparison.settings)}


def flat(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each arm, sparsity and part of the streams."""
    return [_flat(outcome, name, part) for outcome in comparison.outcomes for name, part in outcome.parts.items()]


def _flat(o: Outcome, name: str, part: PartOutcome) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": o.arm, "kind": o.kind, "part": name}
    row |= {key: getattr(o, key) for key in ("target", "nominal", "realised_sparsity", "reached", "ceiling")}
    row |= {key: getattr(o, key) for key in ("bytes_saved", "dense_tokens", "pruned_tokens")}
    for label, figure in (
        ("loss_over_dense", part.over_dense),
        ("loss_over_versus", part.over_versus),
        ("kl_from_dense", part.divergence),
        ("top1_agreement", part.agreement),
        ("perplexity", part.perplexity),
    ):
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
            row[label + suffix] = None if figure is None else getattr(figure, end)
    row |= {"events_per_stream": part.events, "refreshes_per_stream": o.refreshes}
    return row | {key: getattr(o, key) for key in ("false_alarms_per_200", "noticed", "delay", "short_contexts")}


def _parts(comparison: Comparison) -> list[tuple[str, str]]:
    """Kind and name of each part of the streams."""
    return [(kind, part) for kind in (ONE, CHANGING) if comparison.of(kind) for part in _PARTS[kind]]


def quality(comparison: Comparison, target: float) -> TextTable:
    """The table of losses: one row an arm, dense first."""
    parts = _parts(comparison)
    columns = ["arm", "realised", *(part for _, part in parts)]
    last = parts[-1][1]
    columns += [f"KL, {last}", f"top-1, {last}"]
    columns += [f"perplexity, {part}" for _, part in parts]
    rows = []
    for arm, mine in _by_arm(comparison, target):
        figures = [mine[kind].parts[part] for kind, part in parts]
        row = [_marked(arm, mine), " / ".join(f"{o.realised_sparsity:.3f}" for o in mine.values())]
        row += [_interval(p.over_dense) for p in figures]
        row += [_interval(figures[-1].divergence), f"{figures[-1].agreement.value:.3f}"]
        rows.append(row + [f"{p.perplexity.value:.1f}" for p in figures])
    return columns, rows


def conduct(comparison: Comparison, target: float) -> TextTable:
    """The table of what the arms did: bytes, events, refreshes, dense tokens."""
    kinds = [kind for kind in (ONE, CHANGING) if comparison.of(kind)]
    columns = ["arm", "nominal", "bytes saved", "dense tokens", "refreshes"]
    columns += ["events in 200 tokens of one topic"] if ONE in kinds else []
    columns += ["events before + after", "change noticed", "after tokens"] if CHANGING in kinds else []
    columns.append("contexts too short")
    rows = []
    for arm, mine in _by_arm(comparison, target):
        if arm == "dense":
            continue
        outcomes = [mine[kind] for kind in kinds]
        tokens = sum(o.dense_tokens + o.pruned_tokens for o in outcomes)
        row = [_marked(arm, mine)]
        row.append(" / ".join(f"{o.nominal:.3f}" for o in outcomes))
        row.append(" / ".join(f"{o.bytes_saved:.3f}" for o in outcomes))
        row.append(f"{sum(o.dense_tokens for o in outcomes) / tokens:.1%}")
        row.append(" / ".join(f"{o.refreshes:.1f}" for o in outcomes))
        if ONE in kinds:
            row.append(f"{mine[ONE].false_alarms_per_200:.2f}")
        if CHANGING in kinds:
            o = mine[CHANGING]
            row.append(f"{o.parts['before'].events:.1f} + {o.parts['after'].events:.1f}")
            row += [f"{o.noticed:.0%}", "" if o.delay is None else f"{o.delay:g}"]
        rows.append([*row, str(sum(o.short_contexts for o in outcomes))])
    return columns, rows


def brief(comparison: Comparison, target: float) -> TextTable:
    """What fits on a terminal: every loss, and of the last part of the streams the interval, agreement and events."""
    parts = _parts(comparison)
    columns = ["arm", "realised", "bytes saved", *(part for _, part in parts), "low", "high", "top-1", "events"]
    rows = []
    for arm, mine in _by_arm(comparison, target):
        figures = [mine[kind].parts[part] for kind, part in parts]
        outcome, last = mine[parts[-1][0]], figures[-1]
        row = [_marked(arm, mine), f"{outcome.realised_sparsity:.3f}", f"{outcome.bytes_saved:.3f}"]
        row += [f"{value:.2f}" for value in (*(p.over_dense.value for p in figures), last.over_dense.low)]
        row += [f"{last.over_dense.high:.2f}", f"{last.agreement.value:.2f}"]
        rows.append([*row, "+".join(f"{p.events:.1f}" for p in outcome.parts.values())])
    return columns, rows


def brief_legend(comparison: Comparison) -> str:
    """What the columns of `brief` are."""
    last = "after the change" if comparison.of(CHANGING) else "on one topic"
    return (
        f"Loss over dense in nats a token, by part of the streams; low and high: 95 % of its means {last}; top-1: how "
        f"often the likeliest token there is dense's; events: changes of a stream's masks. "
        f"{UNREACHED} cannot realise the wanted sparsity: not to be ranked with the others; {CEILING} computes "
        "everything: a ceiling."
    )


def pairs(comparison: Comparison, target: float) -> TextTable:
    """The table of paired differences; no rows where the arm to be paired with is not among the arms."""
    parts = _parts(comparison)
    rows = []
    for arm, mine in _by_arm(comparison, target):
        over = [mine[kind].parts[part].over_versus for kind, part in parts]
        if arm != "dense" and all(over):
            rows.append([_marked(arm, mine), *(_interval(e) for e in over if e is not None)])
    return ["arm", *(part for _, part in parts)], rows


def notes(comparison: Comparison) -> list[str]:
    """Everything a reader must know beside the figures."""
    out = []
    short = comparison.settings["domains_too_short"]
    if short:
        out.append(f"Domains without a text of that length, left out: {', '.join(short)}.")
    for arm in dict.fromkeys(o.arm for o in comparison.outcomes):
        mine = [o for o in comparison.outcomes if o.arm == arm]
        missed = [f"{o.target:.0%} ({o.kind}: {o.realised_sparsity:.1%})" for o in mine if not o.reached]
        if missed:
            out.append(f"{arm} cannot realise {', '.join(missed)}.")
        for note in dict.fromkeys(note for o in mine for note in o.notes):
            out.append(f"{arm}: {note}.")
        contexts = sum(o.short_contexts for o in mine)
        if contexts:
            out.append(f"{arm}: {contexts} prompts were too short to trace; decoding began dense there.")
    return out


def _streams(comparison: Comparison) -> str:
    s = comparison.settings
    first, second = s["lengths"]
    return (
        f"{s['streams']} streams of each kind from {', '.join(s['domains'])}: {s['prompt']} tokens of prompt, "
        f"then {first + second - s['prompt']} decoded ones, of the same topic or, where the topic changes, "
        f"{first - s['prompt']} of the first and {second} of the second. The weights are {s['weights']['dtype']}. The "
        f"first {s['left_out_after_change']} tokens after a change are in no figure and no picture: a text that is cut "
        "in begins in mid-sentence, and costs the dense model itself ten nats and more a token there."
        + ("" if s["separator"] is None else f" Each stretch begins with token {s['separator']}, which is one of them.")
    )


def _by_arm(comparison: Comparison, target: float) -> list[tuple[str, dict[str, Outcome]]]:
    rows: dict[str, dict[str, Outcome]] = {}
    for o in comparison.outcomes:
        if o.arm == "dense" or o.target == target:
            rows.setdefault(o.arm, {})[o.kind] = o
    return list(rows.items())


def _marked(arm: str, mine: dict[str, Outcome]) -> str:
    reached, ceiling = all(o.reached for o in mine.values()), any(o.ceiling for o in mine.values())
    return arm + ("" if reached else UNREACHED) + (CEILING if ceiling else "")


def _interval(figure: Interval) -> str:
    value, low, high = (round(end, 2) + 0.0 for end in (figure.value, figure.low, figure.high))  # no -0.00
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
