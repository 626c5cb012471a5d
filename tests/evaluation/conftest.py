"""What the tests of evaluations share."""

from __future__ import annotations

import json

import pytest

from dartprune.loading import load


@pytest.fixture(scope="session")
def demo():
    """The model inside the package in float32, and its tokenizer."""
    model, tokenizer = load(dtype="float32")
    return model, tokenizer


@pytest.fixture
def no_network(monkeypatch, tmp_path_factory):
    """Data sets are read from local files or not at all, and nothing is left in the home of whoever runs the tests."""
    import huggingface_hub.constants

    datasets = pytest.importorskip("datasets", reason="needs the extra eval")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.mktemp("datasets", numbered=True)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, cache)


@pytest.fixture
def make_task(tmp_path):
    """Writes a YAML task with multiple choices and its rows; gives the folder."""

    def make(name, rows, *, text="{{query}}\nAnswer:", choices="{{choices}}", extra=""):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
            f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: {json.dumps(text)}\n"
            f"doc_to_choice: {json.dumps(choices)}\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
            f"    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 0\n{extra}"
        )
        return folder

    return make
