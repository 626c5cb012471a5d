"""The notebooks run from top to bottom, and what they show is small."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
FOLDER = Path(__file__).resolve().parents[1] / "examples"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST = 100_000  # bytes of a notebook


def test_there_are_two():
    assert [book.stem for book in BOOKS] == ["compare_methods", "quick_start"]


@pytest.mark.filterwarnings("ignore")  # of jupyter's own event loop
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_notebook_runs(book, tmp_path):
    assert book.stat().st_size < MOST
    notebook = nbformat.read(book, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and any(cell.outputs for cell in code)
    for cell in code:
        assert all(output.output_type != "error" for output in cell.outputs)
