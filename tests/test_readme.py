"""Every Python example of the README and of the contributing guide is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import DynamicCache

from dartprune import Pruner, ffn, presets, scoring
from dartprune.budget import budget_kinds
from dartprune.demo import model_folder
from dartprune.evaluation.arms import arm, arm_kinds
from dartprune.model import families
from dartprune.model.caches import handed
from dartprune.refresh import refresh_kinds
from dartprune.selectors.settings import live_selectors, token_kinds
from test_matrix import tokens
from tiny import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("quickstart", "decoding", "quantised"))]


@pytest.mark.parametrize(("page", "number"), [(page, n) for page in PAGES for n in range(len(blocks(page)))])
def test_examples_of_readme_and_docs_run(page, number, monkeypatch, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    code = blocks(page)[number]
    for cls in (AutoModelForCausalLM, AutoTokenizer):
        # a name on the hub stands for any model; here the one inside the package is taken
        original = cls.from_pretrained
        monkeypatch.setattr(cls, "from_pretrained", lambda name, original=original, **k: original(model_folder(), **k))
    namespace = {}
    exec(compile(code, f"{page}, example {number}", "exec"), namespace)
    if "print" in code:
        assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert all(blocks(page) for page in PAGES)


# ---- the recipes of the contributing guide: each runs, and has an effect


def recipes():
    """The code of each recipe by its heading."""
    found = re.findall(r"^### An? (.+?)\n.*?```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S | re.M)
    return dict(found)


@pytest.fixture
def registries(monkeypatch):
    """What a recipe registers is gone afterwards."""
    for registry in (
        scoring._scorers,
        budget_kinds,
        refresh_kinds,
        token_kinds,
        live_selectors,
        ffn._backends,
        presets,
        arm_kinds,
    ):
        monkeypatch.setattr(registry, "_values", dict(registry._values))
    before = dict(families.FAMILIES)
    yield
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def run_recipe(name):
    namespace = {"__name__": "recipe"}
    exec(compile(recipes()[name], f"CONTRIBUTING.md, {name}", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture
def decode(registries):
    """Decode with a recipe's pruner on a tiny model: the report, the run's kept neurons, and the namespace."""

    def work(name, new=30, **options):
        namespace = run_recipe(name)
        model = FAMILIES["llama"]()
        length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with namespace["pruner"](model, **options) as run:
            cache = DynamicCache(config=model.config)
            model.generate(tokens(model, lines=1, length=20), **handed(cache), **length)
            kept = run.selection(run.slots_of(cache)[0])
            return run.report(), kept, namespace, run

    return work


def test_every_extension_has_a_recipe_and_every_recipe_a_test():
    expected = ["scorer", "budget", "refresh policy", "token selector", "family", "backend", "preset", "arm"]
    assert list(recipes()) == expected


def test_a_scorer(decode):
    report, kept, namespace, run = decode("scorer")
    assert namespace["pruner"].scorer == "energy-times-norm" and report.realised_sparsity == pytest.approx(
        0.5, abs=0.02
    )
    trace, down = run.layers[1].trace, run.layers[1].parts.down.weight
    scores = trace.energy[0] * down.norm(dim=0).square()
    assert kept[1].tolist() == sorted(scores.topk(len(kept[1])).indices.tolist())


def test_a_budget(decode):
    report, _, namespace, _ = decode("budget")
    assert [round(layer.pruned_fraction, 1) for layer in report.layers] == [0.3, 0.5, 0.7]  # -0.15, 0, 0.15, in 72
    assert report.layers[0].kept > report.layers[1].kept > report.layers[2].kept
    assert Pruner.from_dict(namespace["pruner"].to_dict()) == namespace["pruner"]


def test_a_refresh_policy(decode):
    report, _, namespace, _ = decode("refresh policy")
    assert [(event.kind, event.decoded) for event in report.events] == [("replay", 20)]
    assert Pruner.from_dict(namespace["pruner"].to_dict()) == namespace["pruner"]


def test_a_token_selector(decode):
    report, *_ = decode("token selector")
    assert report.realised_sparsity == pytest.approx(0.5, abs=0.02) and report.dense_tokens == 0


def test_a_family(registries):
    run_recipe("family")
    model = FAMILIES["llama"]()
    model.config.model_type = "my-llama"
    for layer in model.model.layers:
        layer.residual_multiplier = 0.5
    decoder = families.describe(model)
    assert (decoder.family, decoder.recognised) == ("my-llama", "table") and decoder.layers[0].scale == 0.5


def test_a_backend(decode):
    report, _, namespace, _ = decode("backend", backend="counting")
    assert report.backend == "counting" and namespace["counting"].calls == 3 * 29


def test_a_preset(decode):
    report, _, namespace, _ = decode("preset")
    assert report.method == "Paper" and namespace["pruner"].to_dict()["preset"] == "paper"
    assert arm("paper").build(0.5) == namespace["pruner"]


def test_an_arm(decode):
    report, *_ = decode("arm", new=50)
    assert [(event.kind, event.decoded) for event in report.events if event.kind == "release"] == [("release", 40)]
    assert report.sequences[0].dense_because == {"released": 9}
