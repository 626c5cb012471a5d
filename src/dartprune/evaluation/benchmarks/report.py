"""The results of a recipe as tables, as data and as a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dartprune.evaluation.benchmarks import results
from dartprune.evaluation.benchmarks.pictures import curves
from dartprune.evaluation.benchmarks.recipe import Recipe
from dartprune.evaluation.benchmarks.results import ArmScores
from dartprune.reporting.frame import Frame
from dartprune.reporting.page import Sheet

PROTOCOL = (
    "All of a context but its last token is prefilled dense and traced; the last context token and all that follow it "
    "are decoded with the masks in force, in every arm alike. Contexts too short for a mask run dense and are counted. "
    "Realised sparsity: one minus the share of the FFN's weights that the decoded tokens used. "
    "After ± stands one standard error, over documents or windows."
)


@dataclass
class RecipeResults:
    """Results of a recipe on a model whose weights are `dtype`; `notes` say what must be known to read them."""

    recipe: Recipe
    model: str
    dtype: str
    arms: list[ArmScores]
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Sheet]:
        """For people."""
        decimals = 2 if self.recipe.measure == "perplexity" else 3
        return results.tables(self.arms, decimals=decimals, mean=self.recipe.measure == "tasks")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "measure": self.recipe.measure,
            "title": self.recipe.title,
            "model": self.model,
            "dtype": self.dtype,
            "settings": self.recipe.settings(),
            "arms": [arm.to_dict() for arm in self.arms],
            "differences": {
                arm: {name: vars(found) for name, found in scores.items()}
                for arm, scores in results.differences(self.arms).items()
            },
            "notes": self.notes,
        }

    def write(self, folder: Path) -> list[Path]:
        """Write results.json, report.html and, for several sparsities, the picture; their paths, the page first."""
        frame = Frame(folder, self.recipe.title or f"{self.recipe.measure}: {', '.join(self.recipe.what)}")
        frame.json("results", self.to_dict())
        frame.page.text(f"Model: {self.model}, its weights {self.dtype}. {PROTOCOL}")
        for table in self.tables():
            frame.page.sheet(table)
        if len({arm.pruner.sparsity for arm in self.arms if arm.pruner.prunes}) > 1:
            figure = curves(self.arms, averaged=self.recipe.measure == "tasks")
            frame.picture("curves", figure, "Scores against realised sparsity.")
        for note in self.notes:
            frame.page.text(note)
        return frame.close(self.recipe.settings())
