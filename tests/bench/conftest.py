"""A small model and a small stream for the benchmarks."""

from __future__ import annotations

import pytest
import torch

from dartprune.bench.device import BandwidthProbe
from dartprune.bench.models import Subject
from tiny import FAMILIES


@pytest.fixture
def stream():
    return BandwidthProbe(torch.device("cpu"), 2**16)


@pytest.fixture
def tiny_subject():
    def make(family="llama"):
        return Subject(FAMILIES[family](), f"tiny {family}", "float32", 3, 3, [])

    return make


@pytest.fixture
def finite():
    """Checks that every figure of some rows is there and finite, and that spreads are in order."""

    def check(rows):
        assert rows
        for row in rows:
            for spread in (row.seconds, row.times_as_fast):
                assert 0 < spread.lower <= spread.median <= spread.upper < float("inf")
            for value in (row.bytes_moved, row.bandwidth_share, row.limit):
                assert value is None or 0 < value < float("inf")

    return check
