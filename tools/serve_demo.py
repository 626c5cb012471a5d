"""Starts `dartprune serve` on the model inside, streams a completion from it, and stops it with SIGTERM."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request

PROMPT = "Once upon a time there was a little dog who"


def main() -> int:
    """Serve, ask, stop; the server's exit code."""
    command = [sys.executable, "-m", "dartprune", "serve", "--method", "dart", "--sparsity", "0.5", "--port", "0"]
    command += ["--dense-above", "never"]  # so small a model gains nothing, and would be left dense
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        print(line, end="")
        if "listening on " in line:
            url = line.split("listening on ")[1].split(",")[0]
            break
    if not url:
        return process.wait() or 1
    try:
        body = {"model": "dartprune-demo", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        print(PROMPT, end="")
        with urllib.request.urlopen(request, timeout=120) as stream:
            for line in stream:
                text = line.decode().strip().removeprefix("data: ")
                if not text or text == "[DONE]":
                    continue
                chunk = json.loads(text)
                print("".join(choice["text"] for choice in chunk["choices"]), end="", flush=True)
                if chunk["usage"]:
                    print(f"\n\nusage: {json.dumps(chunk['usage'])}")
    finally:
        process.terminate()
    return 0 if process.wait(60) in (0, -15) else 1


if __name__ == "__main__":
    sys.exit(main())
