"""lm_eval's requests and tasks on the model class `dart`, offline."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dartprune import Dense, Static
from dartprune.evaluation.benchmarks.tasks import PAPER, load_tasks, run_task, suite
from dartprune.evaluation.protocol import Protocol
from dartprune.model.caches import handed

pytest.importorskip("lm_eval", reason="needs the extra eval")
harness = pytest.importorskip("dartprune.evaluation.benchmarks.harness")
pytestmark = pytest.mark.usefixtures("no_network")

CONTEXT = "Question: What are the symptoms of a cold, and how is it treated? Answer:"
LITTLE = [
    {"query": f"The {a} ran over the old stone bridge and into the dark wood near the {b}.", "choices": c, "gold": g}
    for a, b, c, g in (
        ("dog", "river", ["It barked.", "No"], 0),
        ("boy", "town", ["yes", "no", "perhaps so"], 1),
        ("king", "sea", ["yes", "no"], 0),
    )
]


def ask(kind, *arguments, task="some"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number, task_name=task) for number, args in enumerate(arguments)]


@pytest.fixture
def arm(demo):
    model, tokenizer = demo

    def make(*args, **kwargs):
        return harness.DartLM(model, *args, tokenizer=tokenizer, silent=True, **kwargs)

    return make


def test_registered_under_its_name():
    from lm_eval.api.registry import get_model

    assert get_model("dart") is harness.DartLM


def test_scores_are_those_of_the_protocol(arm, demo):
    model, tokenizer = demo
    lm = arm("static", 0.5, batch_size="2")
    asked = [
        (CONTEXT, " headache"),
        (CONTEXT, " a fever and a cough"),
        (CONTEXT + " ", "the"),
        ("", "Once upon a time"),
    ]
    results = lm.loglikelihood(ask("loglikelihood", *asked))
    context = tokenizer(CONTEXT)["input_ids"]
    answer = tokenizer(CONTEXT + " a fever and a cough")["input_ids"][len(context) :]
    alone = Protocol(model, Static(sparsity=0.5), padding=0).score([(context, answer)])[0]
    assert results[1] == (pytest.approx(alone.logprob, abs=1e-4), alone.greedy)
    with torch.no_grad():  # without a context nothing is pruned
        start = tokenizer("Once upon a time")["input_ids"]
        logits = model(torch.tensor([[lm.prefix_token_id, *start]])).logits[0].log_softmax(-1)
    expected = sum(float(logits[i, token]) for i, token in enumerate(start))
    assert results[3][0] == pytest.approx(expected, abs=1e-3)
    assert lm.summary()["contexts_too_short"] == 1 and lm.summary()["contexts"] == 2
    dense = arm("dense").loglikelihood(ask("loglikelihood", *asked))
    assert all(abs(a[0] - b[0]) > 0.01 for a, b in zip(results[:3], dense[:3], strict=True))


def test_a_rolling_text_by_hand(arm, demo):
    model, tokenizer = demo
    text = "once upon a time there was a little dog who lived in a house by the sea . " * 3
    lm = arm("static", 0.5, max_length=32)
    (found,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    tokens = [lm.prefix_token_id, *tokenizer(text)["input_ids"]]
    expected, scored = 0.0, 0
    for first in range(16, len(tokens), 16):
        window = torch.tensor([tokens[first - 16 : first + 16]])
        with torch.no_grad(), Static(sparsity=0.5)(model) as run:
            with run.phase("prefill"):
                cache = model(input_ids=window[:, :15], use_cache=True).past_key_values
            for i in range(15, window.shape[1] - 1):
                with run.phase("decode"):
                    logits = model(input_ids=window[:, i : i + 1], **handed(cache)).logits[0, -1]
                expected += float(logits.log_softmax(-1)[window[0, i + 1]])
                scored += 1
    assert found == pytest.approx(expected, abs=1e-3)
    assert lm.summary()["rolling"] == {
        "tokens_scored": scored,
        "tokens_as_context": 16,
        "windows_begin_with": [],  # this tokenizer puts nothing before a text
    }
    assert len(tokens) == scored + 16


def test_texts_are_written_until_told_to_stop(arm, demo):
    model, tokenizer = demo
    lm = arm("dart", 0.5, batch_size=2)
    prompts = ("once upon a time there was a little", "the king said that he would go to the old house and", CONTEXT)
    greedy = lm.generate_until(ask("generate_until", *((p, {"until": [], "max_gen_toks": 12}) for p in prompts)))
    context = tokenizer(prompts[0])["input_ids"]
    (alone,) = Protocol(model, lm.pruner, padding=0).write([context], 12, ends=[tokenizer.eos_token_id])
    assert greedy[0] == tokenizer.decode(alone.tokens)
    mark = greedy[1].split()[2]
    settings = {"until": [mark], "max_gen_toks": 12, "do_sample": False}
    cut = lm.generate_until(ask("generate_until", *((p, dict(settings)) for p in prompts)))
    assert cut[1] == greedy[1].split(mark)[0] and mark not in "".join(cut)
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.99}
    drawn = lm.generate_until(ask("generate_until", (prompts[0], hot)))
    assert drawn[0] != greedy[0]
    lukewarm = hot | {"top_k": 1}
    assert lm.generate_until(ask("generate_until", (prompts[0], lukewarm)))[0] == greedy[0]


def test_long_contexts_lose_their_beginning(arm):
    lm = arm("static", 0.5, max_length=24)
    long, short = "word " * 40 + CONTEXT, CONTEXT
    asked = [(long, " headache"), (long, " a fever"), (short, " headache")]
    results = lm.loglikelihood(ask("loglikelihood", *asked))
    assert lm.summary()["contexts_cut"] == 1 and all(math.isfinite(value) for value, _ in results)
    with pytest.raises(ValueError, match="leaves no room"):
        lm.generate_until(ask("generate_until", (CONTEXT, {"until": [], "max_gen_toks": 24})))
    with pytest.raises(ValueError, match="does not fit the model's 24"):
        lm.loglikelihood(ask("loglikelihood", (CONTEXT, " word" * 30)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "drat"}, "did you mean 'dart'"),
        ({"sparsity": 1.5}, "sparsity must be"),
        ({"min_tracd": 3}, "did you mean 'min_traced'"),
        ({"refresh": "relern"}, "did you mean 'relearn'"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"max_batch_size": 8}, "give batch_size"),
    ],
)
def test_bad_arguments(arm, how, said):
    with pytest.raises(ValueError, match=said):
        arm(**how)


def test_settings_of_the_pruner(arm):
    lm = arm("dart", 0.6, refresh="relearn", budget="uniform", min_traced=4)
    assert lm.pruner.refresh.kind == "relearn" and lm.pruner.budget.kind == "uniform"
    assert lm.pruner.min_traced == 4 and lm.pruner.sparsity == 0.6 and arm("dense", 0.6).pruner == Dense()
    with pytest.raises(ValueError, match="did you mean 'top_p'"):
        harness.chooser({"top_pp": 0.5})


def test_an_inline_task(demo, make_task):
    model, tokenizer = demo
    folder = make_task("little", LITTLE)
    loaded = load_tasks({"little": None}, str(folder))["little"]
    found = {}
    for pruner in (Dense(), Static(sparsity=0.5)):
        found[pruner.name] = run_task(model, tokenizer, pruner, loaded, silent=True)
    dense, static = found["Dense"], found["Static"]
    assert dense["scores"].keys() == {"little"} and dense["did"]["realised_sparsity"] == 0
    assert static["did"]["realised_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert static["did"]["contexts"] == 3 and static["did"]["contexts_too_short"] == 0
    # by hand: the most probable choice of each row
    protocol, right = Protocol(model, Static(sparsity=0.5), padding=0), 0
    for row in LITTLE:
        context = row["query"] + "\nAnswer:"
        given = tokenizer(context)["input_ids"]
        answers = [tokenizer(f"{context} {c}")["input_ids"][len(given) :] for c in row["choices"]]
        scores = protocol.score([(given, answer) for answer in answers])
        right += max(range(len(scores)), key=lambda i: scores[i].logprob) == row["gold"]
    assert static["scores"]["little"] == pytest.approx(right / 3)
    assert static["details"]["tasks"]["little"]["pruned_tokens"] == static["did"]["pruned_tokens"]
    json.dumps(found)


def test_excerpts_of_benchmarks(demo, make_task, shared):
    model, tokenizer = demo
    for name in ("boolq", "arc_easy"):
        rows = (shared / "data" / "benchmarks" / f"{name}.jsonl").read_text().splitlines()[:5]
        folder = make_task(name, [json.loads(row) for row in rows])
    loaded = load_tasks({"boolq": 1, "arc_easy": None}, str(folder))
    for name, shots in (("boolq", 1), ("arc_easy", 0)):
        done = run_task(model, tokenizer, Static(sparsity=0.7), loaded[name], limit=3, silent=True)
        assert 0 <= done["scores"][name] <= 1 and done["details"]["shots"][name] == shots
        assert done["did"]["contexts"] == 3 and done["did"]["dense_tokens"] == 0
        assert done["did"]["realised_sparsity"] == pytest.approx(0.7, abs=0.01)


def test_tasks_that_cannot_be_had(make_task, monkeypatch, tmp_path):
    folder = make_task("little", LITTLE)
    with pytest.raises(ValueError, match="no such folder"):
        load_tasks({"little": None}, str(tmp_path / "nowhere"))
    from lm_eval import tasks as lm_tasks

    real = lm_tasks.TaskManager
    # lm_eval's own fourteen thousand take long to read
    monkeypatch.setattr(
        lm_tasks, "TaskManager", lambda include_path=None, include_defaults=True: real(None, include_path, False)
    )
    with pytest.raises(ValueError, match="unknown task 'litle': did you mean 'little'"):
        load_tasks({"litle": None}, str(folder))
    (folder / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{a}}"\ndoc_to_choice: ["x", "y"]\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n'
        "    aggregation: mean\n    higher_is_better: true\n"
    )
    with pytest.raises(ValueError, match=r"task far: the data set cannot .*give a local task"):
        load_tasks({"far": None}, str(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package lm_eval: pip install 'dartprune\[eval\]'"):
        load_tasks({"little": None})


def test_the_papers_tasks_are_lm_evals_own():
    from pathlib import Path

    import lm_eval.tasks

    assert len(suite("paper")) == 10 and [name for name, shots in PAPER.items() if shots] == [
        "mmlu",
        "gpqa_main_n_shot",
        "medmcqa",
    ]
    own = Path(lm_eval.tasks.__file__).parent
    text = "\n".join(
        path.read_text()
        for place in ("super_glue", "glue", "hellaswag", "winogrande", "arc", "openbookqa", "mmlu", "gpqa", "medmcqa")
        for path in (own / place).rglob("*.y*ml")
    )
    for name in PAPER:
        assert f"task: {name}\n" in text or f"group: {name}\n" in text, name
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        suite("papper")
