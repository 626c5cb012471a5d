"""Two threads in one run."""

from __future__ import annotations

import threading

import pytest
import torch

from dartprune import Static
from dartprune.model.caches import handed
from test_matrix import tokens
from tiny import FAMILIES


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


def in_thread(work):
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_a_phase_belongs_to_its_thread(llama):
    ids = tokens(llama, lines=1)
    with Static(sparsity=0.5)(llama) as run, torch.no_grad():
        with run.phase("prefill"):
            cache = llama(input_ids=ids, use_cache=True).past_key_values

        def other():
            with torch.no_grad():
                with pytest.raises(ValueError, match="needs a phase"):
                    llama(input_ids=ids, use_cache=True)
                with run.phase("prefill"):
                    llama(input_ids=ids, use_cache=True)

        with run.phase("decode"):
            in_thread(other)
            llama(input_ids=ids[:, :1], **handed(cache))  # still this thread's phase
        with pytest.raises(ValueError, match="needs a phase"):
            llama(input_ids=ids[:, :1], **handed(cache))
        assert run.report().pruned_tokens == 1


def test_a_pause_reaches_what_is_started_inside_it(llama):
    ids = tokens(llama, lines=1)
    inside, over = threading.Event(), threading.Event()
    with Static(sparsity=0.5)(llama) as run:

        def earlier():
            inside.wait(timeout=60)
            llama.generate(ids, max_new_tokens=4, do_sample=False)
            over.set()

        thread = threading.Thread(target=earlier)
        thread.start()
        with run.dense():
            inside.set()
            over.wait(timeout=60)
            assert (run.report().pruned_tokens, run.report().dense_tokens) == (3, 0)
            in_thread(lambda: llama.generate(ids, max_new_tokens=5, do_sample=False))
            assert (run.report().pruned_tokens, run.report().dense_tokens) == (3, 4)
        thread.join(timeout=60)
        llama.generate(ids, max_new_tokens=2, do_sample=False)
        assert (run.report().pruned_tokens, run.report().dense_tokens) == (4, 4)


def test_a_report_does_not_wait_for_a_generation(llama):
    standing, asked, forwards = threading.Event(), threading.Event(), []

    def hold(module, args):
        forwards.append(None)
        if len(forwards) == 3:  # in the middle of the second pruned step
            standing.set()
            asked.wait(timeout=60)

    with Static(sparsity=0.5)(llama) as run:
        handle = llama.lm_head.register_forward_pre_hook(hold)
        call = {"max_new_tokens": 6, "do_sample": False}
        worker = threading.Thread(target=lambda: llama.generate(tokens(llama, lines=1), **call))
        worker.start()
        assert standing.wait(timeout=60)
        report = run.report()
        assert len(report.sequences) == 1 and report.pruned_tokens == 1
        asked.set()
        worker.join(timeout=60)
        handle.remove()
        assert run.report().pruned_tokens == 5
