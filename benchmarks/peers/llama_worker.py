"""Decodes with llama.cpp when it is told to: run by `decode.py`, in whatever Python has `llama_cpp`.

    python llama_worker.py FILE.gguf THREADS

Reads lines of JSON, {"prompt": [ids], "tokens": n}, and answers each with {"seconds": of the n decoded tokens}.
"""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama


def main() -> None:
    """Load, then answer until the input ends."""
    path, threads = sys.argv[1], int(sys.argv[2])
    model = Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False)
    print(json.dumps({"ready": path}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        model.reset()
        model.eval(task["prompt"])
        token = model.sample(temp=0.0)
        began = time.perf_counter()
        for _ in range(task["tokens"]):
            model.eval([token])
            token = model.sample(temp=0.0)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
