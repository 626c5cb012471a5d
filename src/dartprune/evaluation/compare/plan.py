"""What every arm of a comparison is given: the streams, and which of their tokens are scored."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dartprune.errors import UserError
from dartprune.evaluation.forced import LONGEST_BLOCK
from dartprune.evaluation.texts import JOIN, Stream, pieces, streams
from dartprune.names import unknown

ONE, CHANGING = "one-topic", "changing"
KINDS = (ONE, CHANGING)


@dataclass(frozen=True)
class Plan:
    """Settings of a comparison.

    prompt: tokens given to each stream, dense and traced.  lengths: tokens of the first topic, prompt included, and of
    the second; streams on one topic have as many as both.  count: streams of each kind.  batch: streams decoded
    together.  kinds: `one-topic`, `changing` or both.  sparsities: realised ones to compare at.  tolerance: how far
    apart they may lie.  versus: arm that the others are paired with, beside dense.  block: longest block of tokens that
    one forward decodes; an arm whose masks may change decodes in shorter ones, which differ by rounding.
    """

    prompt: int = 64
    lengths: tuple[int, ...] = (128, 128)
    count: int = 30
    batch: int = 15
    kinds: tuple[str, ...] = KINDS
    sparsities: tuple[float, ...] = (0.5, 0.7)
    tolerance: float = 0.005
    seed: int = 0
    versus: str = "dart"
    block: int = LONGEST_BLOCK

    def __post_init__(self) -> None:
        for name, least in (("prompt", 2), ("count", 1), ("batch", 1), ("seed", 0), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if len(self.lengths) != 2 or any(not isinstance(n, int) or n < 2 for n in self.lengths):
            raise UserError(f"lengths must be two whole numbers of at least 2, got {list(self.lengths)}")
        if self.lengths[1] <= JOIN + 1:
            raise UserError(
                f"the second topic's {self.lengths[1]} tokens leave nothing to compare: "
                f"the first {JOIN + 1} are left out"
            )
        if self.prompt >= self.lengths[0]:
            raise UserError(
                f"the prompt of {self.prompt} tokens leaves nothing of the first topic's {self.lengths[0]} to decode"
            )
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"kinds must name one kind of streams or two different ones, got {list(self.kinds)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of streams", kind, KINDS)
        if not self.sparsities or len(set(self.sparsities)) < len(self.sparsities):
            raise UserError(f"sparsities must be different numbers, at least one, got {list(self.sparsities)}")
        for value in self.sparsities:
            if not math.isfinite(value) or not 0 < value < 1:
                raise UserError(f"sparsities must lie between 0 and 1, got {value!r}; 0.7 leaves out 70 %")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance must lie between 0 and 1, got {self.tolerance!r}")

    def to_dict(self) -> dict[str, Any]:
        """What the streams depend on, as plain data."""
        told = {"prompt": self.prompt, "lengths": list(self.lengths), "streams": self.count}
        told |= {"batch": self.batch, "seed": self.seed}
        return told if self.block == LONGEST_BLOCK else told | {"block": self.block}  # older folders name none

    @property
    def steps(self) -> int:
        """Scored tokens of a stream."""
        return sum(self.lengths) - self.prompt


@dataclass(frozen=True)
class Part:
    """Tokens that are scored together: [first, last) counted from the end of the prompt."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Material:
    """The streams of each kind, and what became of the texts.

    separator: token that begins each stretch, None for none.  domains: those with enough text.  too_short: the others.
    digest: of all texts, to tell whether they are the same again.
    """

    streams: dict[str, list[Stream]]
    separator: int | None
    digest: str
    domains: list[str]
    too_short: list[str] = field(default_factory=list)

    def parts(self, kind: str, plan: Plan) -> list[Part]:
        """What is scored in a stream: not a separator, nor what follows it at once, see `texts.JOIN`."""
        if kind == ONE:
            return [Part("one topic", 0, plan.steps)]
        change = plan.lengths[0] - plan.prompt
        return [Part("before", 0, change), Part("after", change + self.left_out, plan.steps)]

    @property
    def left_out(self) -> int:
        """Tokens after the change of topic that are not compared, a separator among them."""
        return JOIN + (self.separator is not None)


def material(documents: Mapping[str, Sequence[str]], tokenizer: Any, plan: Plan) -> Material:
    """Cut texts into the streams of a plan.

    Args:
        documents: texts of each domain, see `dartprune.evaluation.texts.read_texts`.
        tokenizer: of the model; its token for the beginning of a text, or else the end, begins each stretch.
        plan: how many and how long.

    Raises:
        ValueError: texts that are too short, or one domain where the topic should change.
    """
    length = sum(plan.lengths)
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens = pieces(documents, tokenizer, length)
    if CHANGING in plan.kinds and len(tokens) < 2:
        short = sorted(set(documents) - set(tokens))
        raise UserError(
            f"a change of topic needs two domains with a text of {length} tokens, there is one: {', '.join(tokens)}"
            + (f" (too short: {', '.join(short)})" if short else "")
            + "; give more texts, or --kinds one-topic"
        )
    drawn = {
        kind: streams(
            tokens, (length,) if kind == ONE else plan.lengths, plan.count, seed=plan.seed, separator=separator
        )
        for kind in plan.kinds
    }
    digest = zlib.crc32(json.dumps({name: list(texts) for name, texts in documents.items()}, sort_keys=True).encode())
    return Material(drawn, separator, f"{digest:08x}", sorted(tokens), sorted(set(documents) - set(tokens)))
