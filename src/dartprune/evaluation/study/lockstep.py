"""One arm decodes one batch of texts, and beside it, token by token, the dense model reads the same tokens.

The dense model runs on a cache of its own, so that what both have at each token can be compared at once and no vector
has to be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dartprune.drift import AttentionDrift
from dartprune.evaluation.arms import ArmAt
from dartprune.evaluation.forced import token_losses
from dartprune.evaluation.lines import Lines
from dartprune.evaluation.stats import Array
from dartprune.evaluation.study.measures import Trajectory, top_dimensions
from dartprune.evaluation.study.neurons import NeuronLog
from dartprune.evaluation.study.observe import Observer, Point
from dartprune.evaluation.study.settings import Settings
from dartprune.model.families import describe
from dartprune.reporting.progress import Advance

Choose = Callable[[int, Tensor], Tensor]


@dataclass
class Unit:
    """What one arm left behind on B texts of S decoded tokens (W windows, P points, L layers).

    arrays, float32 where not said otherwise:
        tokens [S, P, 8, 2]: mean and standard deviation over the texts of each token measure.
        windows [W, P, 9, B]: of each text.
        loss, dense_loss [S, B]: of the token that step d predicts, for the arm and for the dense model, in nats.
        text int64 [S, B]: the token that step d predicts.
        judged [D, 3, B]: the detector's cosine, mu and sigma on the prompt's reference, window by window.
        overlap [W, 2, L, B]: share of each topic's own best neurons that is kept.
    events: for each text, the run's events.  neurons: see `NeuronLog.rows`.  similarities: for each text, what the
    run's own detector saw.  realised_sparsity: for each text.  held: bytes of the statistics between tokens.
    """

    arrays: dict[str, Array]
    events: list[list[dict[str, Any]]]
    neurons: list[dict[str, Any]]
    similarities: list[list[tuple[int, float, float]]]
    realised_sparsity: list[float]
    backend: str
    held: int = field(default=0)

    def facts(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        return {key: value for key, value in vars(self).items() if key != "arrays"}


class StudyDetectors:
    """What detectors would see whose reference stays the prompt: one of each text, nothing fires."""

    def __init__(self, arm: ArmAt, lines: int) -> None:
        self._drifts: list[AttentionDrift] = [replace(arm.pruner.detector, opening=0).build() for _ in range(lines)]
        self._sum: Tensor | None = None
        self._count = 0
        self.rows: list[Tensor] = []

    def begin(self, prompt: Tensor, real: Tensor) -> None:
        """Take the prompt's vectors, [lines, tokens, H]; real bool [lines, tokens], which of them are no padding."""
        for drift, vectors, counted in zip(self._drifts, prompt, real, strict=True):
            drift.reference(vectors[counted])

    def step(self, vectors: Tensor) -> None:
        """Take one decoded token of each text, [lines, H]."""
        self._sum = vectors if self._sum is None else self._sum + vectors
        self._count += 1
        if self._count < self._drifts[0].window:
            return
        means, self._sum, self._count = self._sum / self._count, None, 0
        self.rows.append(torch.stack([self._judged(*pair) for pair in zip(self._drifts, means, strict=True)], 1).cpu())

    @staticmethod
    def _judged(drift: AttentionDrift, mean: Tensor) -> Tensor:
        """Cosine, mu and sigma of a window's mean."""
        if drift.ready:
            return drift.compare(mean)
        # as in the run: the first decoded windows complete a reference that is too short
        drift.absorb(mean)
        return mean.new_full((3,), torch.nan)

    def bytes_held(self) -> int:
        """Bytes of the references and of the window under way."""
        hidden = 0 if self._sum is None else self._sum.shape[-1]
        return sum(drift.bytes_held(hidden) for drift in self._drifts)


def run_unit(
    model: nn.Module,
    arm: ArmAt,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    settings: Settings,
    points: Sequence[Point],
    own: Sequence[Sequence[Tensor]],
    *,
    backend: str = "auto",
    progress: Advance | None = None,
) -> Unit:
    """Decode one batch with one arm.

    Args:
        model: a decoder in evaluation mode, not attached.
        arm: how to decode.
        prompts: tokens of each text, of any lengths; all but the last are prefilled, the last is the first that is
            decoded.
        choose: gives the tokens [B] that step d predicts from d and the arm's logits [B, V].
        settings: of the study.
        points: where to look.
        own: of each topic, its best neurons; see `own_neurons`.
        backend: how the pruned FFN is computed.
        progress: called with 1 after each step.
    """
    decoder = describe(model)
    count, lead = len(prompts), [Point(len(decoder.layers) - 1, "attention")]
    path = Trajectory(settings.window, settings.before, top_dimensions(decoder.hidden, settings.top))
    detectors = StudyDetectors(arm, count)
    tape = _Tape()
    losses: list[Tensor] = []
    texts: list[Tensor] = []
    overlaps: list[Tensor] = []
    held = 0
    # the last layer's attention comes first: the detectors need it, whatever the report looks at
    with Observer(model, [*lead, *(p for p in points if p not in lead)]) as observer, torch.no_grad():
        order = [observer.points.index(point) for point in points]
        with arm.pruner(model, backend=backend) as run:
            lines = Lines(model, run, prompts)
            seen = observer.take(count)
            path.begin(seen[order], lines.prefilled)
            detectors.begin(seen[0], lines.prefilled)
            shadow: Lines | None = None
            if arm.pruner.prunes:
                with run.dense():
                    shadow = Lines(model, None, prompts, hold=True)
                observer.take(count)
            log = NeuronLog(run, run.slots_of(lines.cache), [layer.neurons for layer in decoder.layers], own)
            token: Tensor | None = None
            for step in range(1, settings.steps + 1):
                logits = dense_logits = _next(lines, token)
                mine = reference = observer.take(count)[:, :, 0]
                if shadow is not None:
                    with run.dense():
                        dense_logits = _next(shadow, token)
                    reference = observer.take(count)[:, :, 0]
                log.step(step)
                detectors.step(mine[0])
                token = choose(step, logits).to(logits.device)
                pair = [token_losses(x[:, None], token[:, None])[:, 0] for x in (logits, dense_logits)]
                losses.append(torch.stack(pair).cpu())
                texts.append(token.cpu())
                if tape.add(*path.step(mine[order], reference[order])):
                    overlaps.append(log.overlap())
                    held = path.bytes_held() + detectors.bytes_held() + log.bytes_held()
                if progress is not None:
                    progress(1)
            report = run.report()
    both = torch.stack(losses)
    arrays = {
        "tokens": torch.stack(tape.tokens),
        "windows": torch.stack(tape.windows).movedim(2, 3),
        "loss": both[:, 0],
        "dense_loss": both[:, 1],
        "text": torch.stack(texts),
        "judged": torch.stack(detectors.rows) if detectors.rows else torch.zeros(0, 3, count),
        "overlap": torch.stack(overlaps),
    }
    return Unit(
        arrays={name: np.asarray(value) for name, value in arrays.items()},
        events=[[asdict(event) for event in sequence.events] for sequence in report.sequences],
        neurons=log.rows,
        similarities=[sequence.similarities for sequence in report.sequences],
        realised_sparsity=[sequence.realised_sparsity for sequence in report.sequences],
        backend=report.backend,
        held=held,
    )


def _next(lines: Lines, token: Tensor | None) -> Tensor:
    """Logits [B, V] after one more token of each line; None: the last of its prompt."""
    return lines.first() if token is None else lines.step(token)


class _Tape:
    """What is stored for the report; one transfer from the device for each window."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.windows: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def add(self, token: Tensor, window: Tensor | None) -> bool:
        """Keep the measures of a token, over its texts, and of the window that it ends, if it does."""
        # of one text alone there is no deviation
        self._waiting.append(torch.stack((token.mean(1), token.std(1, correction=0)), dim=-1))
        if window is None:
            return False
        self.tokens += list(torch.stack(self._waiting).cpu().unbind(0))
        self._waiting.clear()
        self.windows.append(window.cpu())
        return True
