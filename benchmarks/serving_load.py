"""Mixed load on a server of its own: answers, streams, hang-ups and mistakes; what failed, and what was left behind.

python benchmarks/serving_load.py --model smollm2 --seconds 600 --out benchmarks/results/serving-load-smollm2.json
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from dartprune.bench.result import machine

WORDS = [
    "the",
    "old",
    "house",
    "river",
    "light",
    "small",
    "wind",
    "story",
    "open",
    "night",
    "paper",
    "green",
    "under",
    "about",
    "music",
]
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Load:
    """Asks until it is stopped; counts what came back."""

    def __init__(self, port: int, model: str) -> None:
        self.port, self.url, self.model = port, f"http://127.0.0.1:{port}", model
        self.counts = {"answered": 0, "streamed": 0, "hung up": 0, "mistakes": 0, "failed": 0}
        self.failures: list[str] = []
        self.health: list[float] = []
        self.until = 0.0
        self._lock = threading.Lock()

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _body(self, draw: random.Random, **more: Any) -> bytes:
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(3, 120)))
        body = {"model": self.model, "prompt": prompt, "max_tokens": draw.randint(1, 40), "temperature": 0.7}
        if draw.random() < 0.2:
            body["dart"] = {"sparsity": draw.choice([0, 0.5])}
        return json.dumps(body | more).encode()

    def _post(self, body: bytes) -> tuple[int, bytes]:
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def client(self, seed: int) -> None:
        """One client."""
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            kind = draw.choices(["answer", "stream", "hang up", "mistake"], [4, 4, 1, 1])[0]
            try:
                if kind == "hang up":
                    self._hang_up(draw)
                elif kind == "mistake":
                    wrong = draw.choice([b"{", b'{"model": 3}', self._body(draw, n=0), self._body(draw, echo=True)])
                    self._judge("mistakes", self._post(wrong), 400)
                elif kind == "stream":
                    status, text = self._post(self._body(draw, stream=True))
                    whole = status == 200 and text.rstrip().endswith(b"[DONE]") and b'"error"' not in text
                    self._judge("streamed", (200 if whole else -status, text), 200)
                else:
                    self._judge("answered", self._post(self._body(draw)), 200)
            except OSError as error:
                self._judge("", (0, str(error).encode()), 200)

    def _judge(self, what: str, got: tuple[int, bytes], wanted: int) -> None:
        if got[0] == wanted:
            self._count(what)
        else:
            self._count("failed")
            self.failures.append(f"{got[0]}: {got[1][:200]!r}")

    def _hang_up(self, draw: random.Random) -> None:
        body = self._body(draw, stream=draw.random() < 0.5, max_tokens=400)
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(HEAD % len(body) + body)
            time.sleep(draw.random())
        self._count("hung up")

    def watch(self) -> None:
        """Ask for the health page twice a second."""
        while time.monotonic() < self.until:
            began = time.perf_counter()
            with urllib.request.urlopen(f"{self.url}/health", timeout=30):
                self.health.append(time.perf_counter() - began)
            time.sleep(0.5)

    def figures(self) -> dict[str, float]:
        """What /metrics says."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def run(self, seconds: float, clients: int, first: int) -> None:
        """All clients for so long, and until the server has nothing left to do."""
        self.until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(first + n,)) for n in range(clients)]
        threads.append(threading.Thread(target=self.watch))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while self.figures()["dartprune_sequences_decoding"] or self.figures()["dartprune_requests_waiting"]:
            time.sleep(0.2)


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Serve, load, look, stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--method", default="sketch-dart")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "dartprune", "serve", "--port", "0", "--method", args.method, "--sparsity", "0.5"]
    command += ["--model", args.model] if args.model else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = next(line for line in process.stderr if "listening on" in line)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    port = int(said.split("listening on ")[1].split(",")[0].rsplit(":", 1)[1])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as page:
        model = json.loads(page.read())["data"][0]["id"]
    warm = Load(port, model)
    warm.run(min(60.0, args.seconds / 5), args.clients, 1000)  # caches and allocators have their size after that
    before = resident(process.pid)
    print(f"warm: {warm.counts}, {before / 1e6:.0f} MB", file=sys.stderr, flush=True)
    load = Load(port, model)
    load.run(args.seconds, args.clients, 0)
    after, figures = resident(process.pid), load.figures()
    process.terminate()
    code = process.wait(60)
    health = sorted(load.health)
    found = {
        "seconds": args.seconds,
        "clients": args.clients,
        "counts": load.counts,
        "failures": load.failures[:20],
        "health_p99_seconds": health[int(0.99 * (len(health) - 1))],
        "health_median_seconds": statistics.median(health),
        "resident_before": before,
        "resident_after": after,
        "sequences_left": figures["dartprune_sequences_decoding"],
        "requests_left": figures["dartprune_requests_waiting"],
        "internal_errors": figures['dartprune_requests_total{outcome="internal"}'],
        "exit_code": code,
        "server": said.split("INFO ")[1].split("; ")[-1].strip(),
    }
    print(json.dumps(found, indent=1))
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items() if key != "out"}
        data = {"benchmark": "serving load", "date": time.strftime("%Y-%m-%d"), "machine": machine(torch.device("cpu"))}
        args.out.write_text(json.dumps(data | {"settings": settings} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
