"""The structure of docs/architecture.md: no circle of imports, no arrow up, each word of the method in its place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
DOCS = SOURCE.parent / "docs" / "architecture.md"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "dartprune").rglob("*.py")
}


METHOD = ("scoring", "budget", "drift", "refresh", "method")
LOOP = ["prompt", "dense forward", "trace", "score", "budget", "selection", "pruned FFN", "token", "drift", "refresh"]


def room_of(module: str) -> str:
    """The first part of a module's name inside the package."""
    return [*module.split("."), ""][1]


def imported(module: str, *, lazy: bool) -> set[str]:
    """Modules of ours that a module imports when it is loaded; with `lazy` also inside functions, never for types."""
    tree = ast.parse(MODULES[module].read_text())
    found = set()
    nodes = list(ast.walk(tree)) if lazy else at_the_top(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dartprune"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module}
            if any(name not in MODULES for name in names):
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("dartprune")}
    return {name for name in found if name in MODULES} - {module}


def at_the_top(tree: ast.Module) -> list[ast.stmt]:
    out: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            out += node.orelse
        elif isinstance(node, (ast.If, ast.Try)):
            out += node.body
        else:
            out.append(node)
    return out


def test_no_circle_of_imports():
    arrows = {module: imported(module, lazy=True) - {"dartprune"} for module in MODULES if module != "dartprune"}
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(arrows[module]):
                follow(other, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        follow(module, ())


@pytest.mark.parametrize(
    ("room", "may_not_import"),
    [
        (
            METHOD,
            ("model", "runtime", "evaluation", "cli", "bench", "run"),
        ),
        (("ffn",), ("model", "runtime", "selectors", "evaluation", "cli", "bench", "run", "method", "pruner")),
        (("model",), ("runtime", "evaluation", "cli", "run", "pruner", "method", "scoring", "budget", "drift")),
        (("selectors",), ("runtime", "evaluation", "cli", "run", "pruner")),
        (("runtime",), ("evaluation", "cli", "bench", "run", "pruner")),
        (("evaluation",), ("cli", "bench")),
        (("reporting",), ("runtime", "model", "evaluation", "cli", "bench", "run", "pruner")),
    ],
)
def test_no_arrow_up(room, may_not_import):
    """Not even inside a function."""
    for module in MODULES:
        if room_of(module) in room:
            up = {name for name in imported(module, lazy=True) if room_of(name) in may_not_import}
            assert not up, f"{module} imports {', '.join(sorted(up))}"


def test_every_word_of_the_method_has_its_place():
    words = re.findall(r"^\| ([a-zA-Z ]+) \| `([^`]+)` \|", DOCS.read_text(), flags=re.M)
    assert [word for word, _ in words][: len(LOOP)] == LOOP
    for _, place in words[: len(LOOP)]:
        assert (SOURCE / "dartprune" / place).exists(), place


def test_the_page_names_files_that_are_there():
    text = DOCS.read_text()
    for place in set(re.findall(r"`((?!tests)(?:[a-z_]+/)*[a-z_]+\.py)`", text)):
        assert list((SOURCE / "dartprune").rglob(place.split("/")[-1])), place


def test_no_class_name_stands_for_two_things():
    seen: dict[str, str] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in seen, f"{node.name}: {module} and {seen[node.name]}"
                seen[node.name] = module
