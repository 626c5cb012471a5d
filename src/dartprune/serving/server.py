"""A model on a port: engine, application and uvicorn put together, and taken apart without losing a request."""

from __future__ import annotations

import logging
import socket
import sys
from dataclasses import dataclass
from typing import Any

from dartprune.errors import UserError, require
from dartprune.run import Run
from dartprune.serving.engine import Engine, Limits

log = logging.getLogger("dartprune.serving")


@dataclass(frozen=True)
class Address:
    """Where to listen; `keys`: API keys, of which a request needs one, none: everybody may ask.

    body_bytes: of a request.  body_seconds: within which they must come.  drain: seconds that requests under way get
    after SIGTERM, None for as long as they take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    drain: float | None = None


def check_installed() -> None:
    """ValueError where the server's packages are missing."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "dartprune serve", "serve")


def bound(host: str, port: int) -> socket.socket:
    """A socket on that address; ValueError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {error}") from None
    return sock


def run_server(
    model: Any,
    tokenizer: Any,
    run: Run,
    name: str,
    limits: Limits,
    terms: dict[str, Any],
    address: Address,
    sock: socket.socket,
    above: int | str | None = "auto",
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was taken.

    Args:
        model: to which `run` is attached.
        tokenizer: its tokenizer.
        run: of the method.
        name: that requests call the model by.
        limits: of the engine.
        terms: the other fields of `door.Terms`.
        address: of the server.
        sock: bound to it.
        above: the number of sequences above which steps are dense, None for never, `auto` to measure it now.
    """
    import uvicorn

    from dartprune.serving.app import build_app
    from dartprune.serving.door import Door, Terms
    from dartprune.serving.metrics import Metrics
    from dartprune.serving.pace import measured

    metrics = Metrics()
    engine = Engine(model, tokenizer, run, limits, metrics)
    if above == "auto":
        log.info("measuring from how many sequences on dense steps are faster")
    engine.dense_above = measured(above, model, run, engine.together)
    app = build_app(
        Door(engine, Terms(name, **terms)),
        metrics,
        keys=address.keys,
        body_bytes=address.body_bytes,
        body_seconds=address.body_seconds,
    )
    engine.start()
    sock.listen(2048)  # who comes from here on waits until uvicorn takes the socket over, and is not refused
    log.info("%s", _said(engine, address))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=None if address.drain is None else round(address.drain),
    )
    try:
        uvicorn.Server(config).run(sockets=[sock])
    finally:
        if not engine.close(address.drain):
            log.warning("requests were still under way after %g seconds", address.drain)


def _said(engine: Engine, address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    parts = [f"listening on http://{host}:{address.port}, {engine.most} sequences at a time"]
    if engine.separate is not None:
        parts.append(f"{engine.separate}, so each decodes in forwards of its own")
    elif engine.limits.invariant:
        parts.append("batch invariant")
    if engine.dense_above is not None:
        parts.append(f"steps of more than {engine.dense_above} sequences are dense")
    return "; ".join(parts)


def log_to_stderr() -> None:
    """Lines of the server's own log, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("dartprune.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if name.startswith("dartprune") else logging.WARNING)
        logger.propagate = False
