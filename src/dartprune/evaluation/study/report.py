"""A study as a folder: one page, pictures, and its numbers as JSON and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dartprune.evaluation.stats import Interval
from dartprune.evaluation.study import pictures
from dartprune.evaluation.study.findings import Findings, to_data
from dartprune.evaluation.study.results import Results
from dartprune.evaluation.study.tables import arm_table, escape_table, recovery_table, write_tables
from dartprune.reporting.frame import Frame


def write(results: Results, findings: Findings, folder: Path, title: str) -> list[Path]:
    """Write all files of a study into a folder; their paths, the page first."""
    frame = Frame(folder, title)
    frame.json("report", to_data(results, findings))
    write_tables(results, findings, frame)
    _opening(results, findings, frame)
    _arms(results, findings, frame)
    if findings.recovery:
        frame.page.heading("Recovery")
        frame.page.table(*recovery_table(findings))
        frame.picture(
            "recovery",
            pictures.recovery(results, findings.recovery),
            "Above: loss over dense with the frozen mask and with releases. Below: the share of the frozen mask's "
            "loss, and of its distance from the dense vectors, that each release gave back; bars: 95 % intervals.",
        )
    _detection(results, findings, frame)
    if findings.quality:
        frame.page.heading("Text")
        rows = [(arm, part, v) for arm, parts in findings.quality.items() for part, v in parts.items()]
        cells = [(arm, part, *map(_short, figures.values())) for arm, part, figures in rows]
        caption = "Beside the text that the dense arm wrote."
        frame.page.table(("arm", "part", *rows[0][2]), cells, caption=caption)
    if findings.escapes:
        caption = "Share of 4-grams of words that return in the first tokens after a release, with 95 % intervals."
        frame.page.table(*escape_table(findings), caption=caption)
    arms = {arm.name: arm.pruner.to_dict() for arm in results.arms}
    return frame.close({"settings": results.settings.to_dict(), "arms": arms})


def _opening(results: Results, findings: Findings, frame: Frame) -> None:
    s, page = results.settings, frame.page
    page.text(findings.verdict)
    page.table(("claim", "answer", "figures"), [(c.claim, c.answer, c.figures) for c in findings.claims])
    page.text(
        f"{results.records['dense', 'change'].texts} texts; decoded tokens are counted from 1, the second topic begins "
        f"after token {s.before}, the text ends at {s.steps}. Windows have {s.window} tokens; the overlap of largest "
        f"dimensions counts {results.top}. The first {s.join.stop - s.join.start} tokens of the "
        "second topic are in no loss that is compared, in table or picture: they begin in mid-sentence, and cost the "
        "dense model itself ten nats and more. Every arm prunes from the first decoded token on, and the dense model "
        f"reads the same tokens beside it. The weights are {results.dtype}."
    )
    for note in findings.notes:
        page.text(note)


def _arms(results: Results, findings: Findings, frame: Frame) -> None:
    frame.page.heading("Arms")
    caption = "Loss over dense in nats with 95 % intervals over texts; cosines at the last layer."
    frame.page.table(*arm_table(findings), caption=caption)
    caption = "Loss over dense in each window. Bands: 1.96 standard errors over texts."
    frame.picture("losses", pictures.losses(results), caption)
    frame.picture(
        "trajectories",
        pictures.trajectories(results),
        "Cosine of each window's mean with the centroid of the arm's own first-topic vectors. Vertical lines: the "
        "change of topic (dotted) and the release (in the arm's colour). Bands: 1.96 standard errors over texts.",
    )
    frame.picture(
        "divergence",
        pictures.divergence(results),
        "Cosine of each window's mean with that of the dense model, which reads the same tokens. Below the first "
        "FFN nothing differs.",
    )


def _detection(results: Results, findings: Findings, frame: Frame) -> None:
    detecting = results.detecting
    if findings.curve or detecting is not None:
        frame.page.heading("Detection")
    if findings.curve:
        frame.page.text(
            "Assumed in the replay: the mask and the reference stay the prompt's, which is exact up to a detector's "
            "first event; so only first events count, and a text is watched up to its first event."
        )
        frame.picture(
            "detector",
            pictures.detector(results, findings.curve),
            "What other thresholds of the drift detector would have done, replayed from recorded cosines: each mark is "
            "one setting.",
        )
    if detecting is None:
        return
    caption = "What the detector saw in single texts: windows, thresholds, events, and the change of topic."
    frame.picture("single-texts", pictures.single_texts(results, detecting), caption)
    frame.page.heading("Neurons")
    frame.picture(
        "turnover",
        pictures.turnover(results, detecting),
        "Neurons that events exchanged, layer by layer, and the share of each topic's own best neurons (those that "
        "a prompt of this topic alone would keep) among the kept ones.",
    )
    rows = [row for row in findings.neurons if row["kind"] == "change"]
    frame.page.table(list(rows[0]), [[_short(v) for v in row.values()] for row in rows])


def _short(value: Any) -> str:
    if isinstance(value, Interval):
        return str(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
