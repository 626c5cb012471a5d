"""`dartprune eval`, `layers` and `lm-eval` as a user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TEXT = "once upon a time there was a little dog who lived by the sea . the king went to the old house . " * 20


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "dogs.txt"
    path.write_text(TEXT)
    return path


def test_perplexity_resumes_and_writes(run, text, tmp_path, monkeypatch):
    from dartprune.evaluation.benchmarks import run as execute

    out = tmp_path / "out"
    how = ("eval", "--perplexity", text, "--method", "dense,static", "-s", "0.5,0.7", "--window", 64, "--limit", 3)
    real, calls = execute.perplexity, []

    def killed(*args, **kwargs):
        calls.append(args[0].pruner.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        done = real(*args, **kwargs)
        done["did"]["notes"] = ["something was odd"] if len(calls) > 1 else []
        return done

    monkeypatch.setattr(execute, "perplexity", killed)
    code, _, err = run(*how, "--out", out)
    assert code == 130 and f"what is done lies in {out}: the same command goes on from there" in " ".join(err.split())
    code, said, _ = run(*how, "--out", out)
    assert code == 0 and calls == ["Dense", "Static", "Static", "Static"], "what was done is not done again"
    assert "target sparsity 0.5" in said and "target sparsity 0.7" in said and "realised sparsity" in said
    assert "0 of 3" in said and str(out / "report.html") in said.replace("\n", "")
    data = json.loads((out / "results.json").read_text())
    arms = {arm["arm"]: arm for arm in data["arms"]}
    assert list(arms) == ["dense", "static 0.5", "static 0.7"]
    assert arms["static 0.7"]["realised_sparsity"] == pytest.approx(0.7, abs=0.01)
    assert arms["dense"]["scores"]["dogs"] < arms["static 0.7"]["scores"]["dogs"]
    assert [note for note in data["notes"] if "odd" in note] == [
        "static 0.5: something was odd",
        "static 0.7: something was odd",
    ]
    assert data["dtype"] == "bfloat16" and "its weights bfloat16" in (out / "report.html").read_text()
    assert (out / "curves.png").stat().st_size > 10_000 and "<img" in (out / "report.html").read_text()
    printed = json.loads(run(*how, "--json", "--out", out)[1])
    assert printed == data
    code, _, err = run(*how[:-1], 2, "--out", out)
    assert code == 2 and "holds results of other settings (limit)" in err
    calls[:] = calls[:2]
    code, _, err = run(*how)
    assert code == 130 and "nothing was kept: with --out FOLDER the same command goes on" in " ".join(err.split())


def test_summaries(run, tmp_path):
    pytest.importorskip("rouge_score", reason="needs the extra eval")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"document": TEXT, "summary": "a dog by the sea"}) + "\n")
    code, out, _ = run("eval", "--summaries", path, "--method", "dart", "--output-tokens", 8, "--json")
    (arm,) = json.loads(out)["arms"]
    assert code == 0 and set(arm["scores"]) == {"pairs ROUGE-1", "pairs ROUGE-2", "pairs ROUGE-L"}
    assert arm["details"][str(path)]["documents"][0]["tokens"] <= 8


def test_recipes_are_listed_and_take_other_data(run, text):
    code, out, _ = run("eval", "--recipe", "list")
    assert code == 0 and "benchmarks: Ten benchmarks" in out
    listed = json.loads(run("eval", "--recipe", "list", "--json")[1])
    for name, recipe in listed.items():
        assert recipe["title"] and recipe["about"] and recipe["ran"].startswith("2026-"), name
    how = (text, "--window", 64, "--limit", 2, "--sparsity", 0.5, "--method", "dart", "--json")
    data = json.loads(run("eval", "--recipe", "perplexity", *how)[1])
    assert data["title"].startswith("Perplexity") and [arm["arm"] for arm in data["arms"]] == ["dart 0.5"]


def test_layers(run, text, tmp_path, demo_config):
    how = ("--texts", text, "--tokens", 40, "--streams", 2, "--out", tmp_path / "out")
    code, out, _ = run("layers", *how, "--keep", "0.5", "--groups", "0-1")
    assert code == 0 and "layers 0-1" in out and "rank correlation" in out
    assert (tmp_path / "out" / "sensitivity.png").exists()
    data = json.loads(run("layers", *how, "--keep", "0.5", "--groups", "0-1", "--json")[1])
    assert len(data["sensitivity"]) == demo_config["num_hidden_layers"] and data["keeps"] == [0.5]


def test_tasks_and_lm_evals_own_command(run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    import datasets
    from lm_eval import tasks as lm_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"query": TEXT[:120], "choices": ["yes", "no"], "gold": n % 2} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "dogs.yaml").write_text(
        f"task: dogs\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    options = ("--tasks", "dogs", "--include-path", folder, "--method", "dense,dart")
    code, out, _ = run("eval", *options)
    assert code == 0 and "dogs" in out and "0.700" in out
    assert "difference to dense on the same documents" in " ".join(out.split())
    code, out, _ = run("eval", *options, "--json")
    data = json.loads(out)
    scores = {arm["arm"]: arm["scores"]["dogs"] for arm in data["arms"]}
    (pruned,) = set(scores) - {"dense"}
    assert data["differences"][pruned]["dogs"]["value"] == pytest.approx(scores[pruned] - scores["dense"])
    real = lm_tasks.TaskManager
    # lm_eval's own fourteen thousand take long to read
    monkeypatch.setattr(lm_tasks, "TaskManager", lambda **how: real(**how, include_defaults=False))
    results = tmp_path / "results"
    code, out, _ = run(
        *("lm-eval", "--model_args", "pretrained=demo,sparsity=0.6,method=static", "--tasks", "dogs"),
        *("--include_path", folder, "--output_path", results),
    )
    assert code == 0 and "|dogs|" in out
    (path,) = results.rglob("results*.json")
    said = json.loads(path.read_text())["config"]["dartprune"]
    assert said["realised_sparsity"] == pytest.approx(0.6, abs=0.01) and said["bytes_saved"] > 0
    assert said["contexts"] == 1 and said["contexts_too_short"] == 0 and said["dense_tokens"] == 0
    assert said["events"] == {} and said["pruner"]["preset"] == "static" and said["tasks"]["dogs"]["contexts"] == 1
    for arguments, message in (
        (("pretrained=demo,method=drat", "--tasks", "dogs"), "did you mean 'dart'"),
        (("pretrained=demo", "--tasks", "dgos"), "Tasks not found: dgos"),
        (("pretrained=demo", "--tasks", "dogs", "--model", "drat"), "Attempted to load model 'drat'"),
    ):
        code, _, err = run("lm-eval", "--include_path", folder, "--model_args", *arguments)
        assert code == 2 and message in err and "Traceback" not in err


def test_the_sample_of_the_docs_runs(run, tmp_path, monkeypatch):
    docs = (Path(__file__).resolve().parents[2] / "docs" / "harness.md").read_text()
    (task,) = re.findall(r"```yaml\n(.*?)```", docs, re.S)
    (row,) = re.findall(r"`(\{\"question\".*?\})`", docs)
    (command,) = re.findall(r"run `dartprune (eval --tasks animals .*?)`", docs)
    monkeypatch.chdir(tmp_path)
    Path("animals.jsonl").write_text("\n".join([row] * 3))
    Path("tasks").mkdir()
    Path("tasks/animals.yaml").write_text(task)
    code, out, err = run(*command.split())
    assert code == 0, err
    assert "animals" in out and "realised sparsity" in out


def test_help(run):
    for command in ("eval", "layers", "lm-eval"):
        code, out, _ = run(command, "--help")
        assert code == 0 and "Example:" in out
    assert "--num_fewshot" in run("lm-eval", "run", "--help")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("eval",), "give one of --suite"),
        (("eval", "--tasks", "boolq", "--suite", "paper"), "give one of --suite"),
        (("eval", "--suite", "papper"), "did you mean 'paper'"),
        (("eval", "--recipe", "benchmark"), "did you mean 'benchmarks'"),
        (("eval", "--recipe", "benchmarks", "--perplexity", "c4"), "give one of --suite"),
        (("eval", "--recipe", "layers", "c44"), "did you mean 'c4'"),
        (("eval", "--perplexity", "nothing.txt"), "there is no such file or folder"),
        (("eval", "--perplexity", "c44"), "did you mean 'c4'"),
        (("eval", "--perplexity", "c4", "--sparsity", "0.5,x"), "--sparsity 0.5,x: write numbers"),
        (("eval", "--perplexity", "c4", "--sparsity", "1.5"), "sparsity must be a number in [0, 1)"),
        (("eval", "--perplexity", "c4", "--method", "drat"), "did you mean 'dart'"),
        (("eval", "--perplexity", "c4", "--method", "dart", "--sparsity", ""), "nothing to measure"),
        (("layers", "--keep", "0.5,y"), "--keep 0.5,y: write numbers"),
        (("layers", "--groups", "0:3"), "must be ranges of layers"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 2, (out, err)
    assert message in err.replace("\n", ""), err
    assert "Traceback" not in err
