"""A hook of mkdocs: pages link to files of the repository as they do on disk; the site takes those files in.

Links that lead out of `docs/` go to a copy inside the site: pages by their name, results under `results/`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# where a file of the repository lies in the site
PLACES = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "src/dartprune/demo/model/MODEL_CARD.md": "files/model-card.txt",
    "tools/demo_model/README.md": "files/demo-model.txt",
}
RESULTS, INSIDE = "benchmarks/results/", "results/"
_LINK = re.compile(r"(\]\()([^)#\s]+)")


def _place(path: str) -> str | None:
    """Where the site has a file of the repository; None for one that it has not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return INSIDE + path.removeprefix(RESULTS) if path.startswith(RESULTS) else PLACES.get(path)


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside `docs/`."""
    inside = dict(PLACES)
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            inside[name] = INSIDE + name.removeprefix(RESULTS)
    for name, place in inside.items():
        binary = not place.endswith(".md")
        content = (ROOT / name).read_bytes() if binary else (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page, which are right on disk, into those of the site."""
    own = page.file.src_uri
    home = ROOT if own in PLACES.values() else (ROOT / "docs" / own).parent
    up = "../" * own.count("/")

    def turned(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (home / target).resolve()
        place = _place(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None
        return match[1] + up + (place if place is not None else target)

    return _LINK.sub(turned, markdown)
