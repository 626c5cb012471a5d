"""What all tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dartprune.demo import model_folder
from dartprune.errors import UserError
from dartprune.loading import load

# tiny models gain nothing from threads, and on a busy machine threads that wait for each other are very slow
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# without a GPU its kernels are interpreted; Triton asks for this when it is first imported, by whatever test
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `slow.txt` names: `make test-quick` leaves it out."""
    names = {item.nodeid.partition("[")[0] for item in items}
    fewer = any(config.getoption(name, None) for name in ("ignore", "deselect", "lf"))
    whole = config.args == config.getini("testpaths") and not fewer
    if whole and SLOW - names:
        raise pytest.UsageError(f"tests/slow.txt names tests that are not there: {', '.join(sorted(SLOW - names))}")
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_numbers():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """A folder with larger texts and models that lies beside some checkouts."""
    if not SHARED.is_dir():
        pytest.skip("no folder ../shared with larger texts and models")
    return SHARED


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in bfloat16 and its tokenizer: fetched once, and kept in the cache."""
    try:
        return load("smollm2")
    except UserError as error:
        pytest.skip(f"SmolLM2 is not to be had: {error}")


@pytest.fixture(scope="session")
def demo_config() -> dict[str, Any]:
    """The settings of the embedded model."""
    config: dict[str, Any] = json.loads((model_folder() / "config.json").read_text())
    return config
