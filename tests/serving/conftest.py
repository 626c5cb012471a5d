"""A server for the tests: the model inside, in float32, on a port of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from dartprune import Dart
from dartprune.loading import load
from dartprune.serving.engine import Engine, Limits
from dartprune.serving.request import Ask, Done, Failed, Piece

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
METHOD = Dart(sparsity=0.4, min_traced=4)
PROMPTS = (
    "Once upon a time there was a little dog who",
    "The king said to the queen: what a",
    "def main():\n    import os\n    for",
    "One day, Lily went to the park and saw a big",
    "In the year of our Lord the people of the city",
)


def _loaded():
    torch.set_num_threads(1)
    model, tokenizer = load(dtype="float32")
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture(scope="session")
def small():
    """The model inside and its tokenizer, with a chat template."""
    return _loaded()


class Heard:
    """What a request was told."""

    def __init__(self):
        self.text, self.ended, self.failed, self.pieces = defaultdict(str), {}, None, []
        self.done, self.left = threading.Event(), 1

    def __call__(self, news):
        if isinstance(news, Piece):
            self.text[news.choice] += news.text
            self.pieces.append(news)
        elif isinstance(news, Done):
            self.ended[news.choice] = news
            self.left -= 1
        elif isinstance(news, Failed):
            self.failed, self.left = news, 0
        if not self.left:
            self.done.set()

    def wait(self):
        assert self.done.wait(120), "the engine did not finish"
        return self


@contextlib.contextmanager
def engine_of(small, method=METHOD, limits=None, listener=None, start=True):
    model, tokenizer = small
    with method(model) as run:
        engine = Engine(model, tokenizer, run, limits or Limits(batch=8, chunk=16), listener)
        if start:
            engine.start()
        try:
            yield engine
        finally:
            if start:
                engine.abandon()
                assert engine.close(60)
                assert not run._pool.live, "a sequence was left open"


def asked(engine, prompt, most=24, **settings):
    """Give a prompt to the engine; returns what will be told."""
    ids = tuple(engine.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else tuple(prompt)
    heard = Heard()
    heard.left = settings.get("choices", 1)
    heard.ticket = engine.submit(Ask(ids, most, **settings), heard)
    return heard


class Served:
    """A server in a thread of this process."""

    def __init__(self, engine, **options):
        import socket

        import uvicorn

        from dartprune.serving.app import build_app
        from dartprune.serving.door import Door, Terms
        from dartprune.serving.metrics import Metrics

        self.metrics = Metrics()
        engine.listener = self.metrics
        terms = Terms("small", "dart", 0.4, 0.4, 0.8, options.pop("seconds", 120.0))
        self.app = build_app(Door(engine, terms), self.metrics, **options)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()
        assert not self.thread.is_alive()


@contextlib.contextmanager
def served_by(small, method=METHOD, limits=None, **options):
    with engine_of(small, method, limits) as engine:
        served = Served(engine, **options)
        served.engine = engine
        try:
            yield served
        finally:
            served.stop()


@pytest.fixture(scope="module")
def served():
    """A server that the tests of one file share, with a model of its own."""
    with served_by(_loaded()) as server:
        yield server
