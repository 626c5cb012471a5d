"""`dartprune serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dartprune.cli import options as o
from dartprune.cli import serving as s
from dartprune.errors import UserError, user_file

EXAMPLE = "Example: dartprune serve --model smollm2 --sparsity 0.5 --port 8000"
KEYS = "DARTPRUNE_API_KEYS"


def serve(
    model: o.Model = None,
    method: s.Method = "sketch-dart",
    sparsity: o.Sparsity = 0.5,
    allow_sparsity: s.Allow = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 for any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="That requests call the model by.")] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", help=f"A file with an API key a line; {KEYS} with commas does the same."),
    ] = None,
    batch: s.Batch = 16,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; beyond them 429.")] = 256,
    chunk: s.Chunk = 256,
    tokens: s.Tokens = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.001, help="That a request may take.")] = 600.0,
    body: Annotated[int, typer.Option("--body", min=1, help="Bytes of a request's body.")] = 4 << 20,
    drain: Annotated[
        float | None,
        typer.Option(
            "--drain", min=0, help="Seconds that requests get after SIGTERM.", show_default="as long as they take"
        ),
    ] = None,
    dense_above: s.Above = "auto",
    batch_invariant: s.Invariant = False,
    prefix_cache: s.PrefixCache = 256,
    backend: o.Backend = "auto",
    dtype: o.DType = "auto",
    device: o.Device = None,
) -> None:
    """Serve completions and chats, many requests in one batch, each with masks of its own; / shows them live."""
    from dartprune.serving.server import Address, bound, check_installed, log_to_stderr, run_server

    check_installed()
    offer = s.Offer.of(method, sparsity, allow_sparsity)
    above = s.above_of(dense_above, invariant=batch_invariant)
    o.check_backend(backend)
    sock = bound(host, port)
    try:
        address = Address(host, sock.getsockname()[1], _keys(api_keys), body, drain=drain)
        log_to_stderr()
        with s.attached(model, offer, backend=backend, dtype=dtype, device=device) as (loaded, tokenizer, run):
            limits = s.limits_of(batch, queue, chunk, tokens, prefix_cache, invariant=batch_invariant)
            terms = offer.terms | {"seconds": seconds}
            run_server(loaded, tokenizer, run, name or s.name_of(model), limits, terms, address, sock, above)
    finally:
        sock.close()


def _keys(path: Path | None) -> tuple[str, ...]:
    """API keys from a file and from the environment; UserError for a file without any."""
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
    if path is not None:
        with user_file(path):
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"--api-keys {path}: the file holds no key")
        keys += found
    return tuple(key for key in keys if key)
