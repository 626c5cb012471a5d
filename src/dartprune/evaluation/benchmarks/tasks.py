"""Tasks of lm-evaluation-harness on an arm: found, loaded and run, with one clear line for what cannot be."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dartprune.errors import UserError, require
from dartprune.evaluation.benchmarks.sources import why
from dartprune.names import unknown
from dartprune.pruner import Pruner

# the paper's ten benchmarks, each with its number of examples in the prompt
PAPER: dict[str, int | None] = {
    "boolq": 0,
    "rte": 0,
    "hellaswag": 0,
    "winogrande": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    "openbookqa": 0,
    "mmlu": 5,
    "gpqa_main_n_shot": 5,
    "medmcqa": 5,
}
SUITES = {"paper": PAPER}
SEED = 1234  # lm_eval's own for the examples in the prompt
RESAMPLES = 1000  # for the standard errors that have no formula


def suite(name: str) -> dict[str, int | None]:
    """The tasks of a suite with their number of examples; ValueError naming the nearest for an unknown one."""
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return dict(SUITES[name])


def load_tasks(tasks: Mapping[str, int | None], include_path: str | None = None) -> dict[str, Any]:
    """Load tasks, groups or tags with their data.

    Args:
        tasks: lm_eval's names, each with its number of examples in the prompt, None for the task's own.
        include_path: a folder of further YAML tasks; they win over lm_eval's own of the same name.

    Returns:
        lm_eval's dict of tasks and groups for each name.

    Raises:
        ValueError: lm_eval is missing, a name is unknown, or its data cannot be loaded.
    """
    require("lm_eval", "running tasks")
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging
    from lm_eval.utils import setup_logging

    setup_logging("ERROR")
    logging.set_verbosity_error()  # it tells of each of its attempts
    manager = _manager(tasks, include_path)
    _seed()  # some tasks shuffle their choices when they are loaded
    loaded = {}
    for name, shots in tasks.items():
        try:
            loaded[name] = manager.load([name])
        except (OSError, DatasetsError, HTTPError, RuntimeError, ValueError) as error:
            raise UserError(f"task {name}: {why(error)}; connect, or give a local task with --include-path") from error
        for task in loaded[name]["tasks"].values():
            if task.get_config("num_fewshot") is None or (shots is not None and task.get_config("num_fewshot") != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEED)
    return loaded


def _manager(names: Mapping[str, Any], include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"--include-path {include_path}: there is no such folder")
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager  # reading lm_eval's fourteen thousand tasks takes many seconds
    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise _unknown_task(name, known)
    return manager


def _unknown_task(name: str, known: set[str]) -> ValueError:
    import difflib

    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
    return UserError(
        f"unknown task {name!r}: {hint}lm_eval knows {len(known)}: `dartprune lm-eval ls tasks` shows them"
    )


def run_task(
    model: Any,
    tokenizer: Any,
    pruner: Pruner,
    loaded: Any,
    *,
    limit: int | None = None,
    batch: int = 8,
    backend: str = "auto",
    silent: bool = False,
) -> dict[str, Any]:
    """Run one entry of `load_tasks` on an arm.

    Args:
        model: a decoder in evaluation mode, not attached.
        tokenizer: of the model.
        pruner: the arm.
        loaded: lm_eval's dict of tasks and groups.
        limit: documents of each task at most.
        batch: contexts at a time.
        backend: how the pruned FFN is computed.
        silent: show no progress.

    Returns:
        scores: accuracy, or a task's first metric, of each group or task.  errors: their standard errors.  each: of
        each task that is no group the metric of each document, in their order.  did: what was pruned.  details: all of
        lm_eval's metrics, the number of examples in the prompt, and what was pruned in each task.
    """
    from lm_eval.evaluator import evaluate

    from dartprune.evaluation.benchmarks.harness import DartLM

    _seed()
    lm = DartLM(model, tokenizer=tokenizer, pruner=pruner, batch_size=batch, backend=backend, silent=silent)
    outcome = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True)
    results = dict(outcome["results"])
    whole = loaded["groups"] and {n: results[n] for n in loaded["groups"] if _headline(results.get(n, {}))}
    scores, errors, each = {}, {}, {}
    top = _outermost(loaded["group_map"], whole) if whole else results
    for name, metrics in top.items():
        key = _headline(metrics)
        if key is not None:
            scores[name] = float(metrics[key])
            error = metrics.get(key.replace(",", "_stderr,", 1))
            if isinstance(error, float):
                errors[name] = error
            values = _each(outcome["samples"].get(name, []), key)
            if values is not None:
                each[name] = values
    summary = lm.summary()
    tasks, rolling = summary["tasks"], summary.get("rolling")
    details = {"results": results, "shots": dict(outcome["n-shot"]), "tasks": tasks}
    if rolling is not None:
        details["rolling"] = rolling
    did = {key: value for key, value in summary.items() if key not in ("pruner", "rolling", "tasks")}
    return {"scores": scores, "errors": errors, "each": each, "did": did, "details": _plain(details)}


def _each(samples: Sequence[Mapping[str, Any]], key: str) -> list[float] | None:
    """A metric of each document, in their order; None where a task has no such number for every document."""
    metric, _, chosen = key.partition(",")
    rows = sorted((row for row in samples if row["filter"] == chosen), key=lambda row: int(row["doc_id"]))
    values = [row.get(metric) for row in rows]
    if not values or not all(isinstance(value, (bool, int, float)) for value in values):
        return None
    return [float(value) for value in values if value is not None]


def _headline(metrics: Mapping[str, Any]) -> str | None:
    """Accuracy where there is one, else the first metric."""
    keys = [key for key, value in metrics.items() if "," in key and "_stderr" not in key and isinstance(value, float)]
    return next((key for key in keys if key.startswith("acc,")), keys[0] if keys else None)


def _outermost(children: Mapping[str, list[str]], groups: Mapping[str, Any]) -> dict[str, Any]:
    inner = {child for group in groups for child in children.get(group, [])}
    return {name: metrics for name, metrics in groups.items() if name not in inner}


def _plain(value: Any) -> Any:
    """Without what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else str(value)


def _seed() -> None:
    random.seed(0)
    torch.manual_seed(SEED)
