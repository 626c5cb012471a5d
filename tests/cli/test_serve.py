"""`dartprune serve` and `dartprune batch` as commands: a real process, signals, and mistakes in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

pytest.importorskip("fastapi")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--sparsity", "1.5"], "--sparsity must lie in"),
        (["serve", "--allow-sparsity", "0.6,0.8"], "write LOW,HIGH around"),
        (["serve", "--allow-sparsity", "a,b"], "write numbers"),
        (["serve", "--dense-above", "some"], "a number, never or auto"),
        (["serve", "--host", "no.such.host.invalid"], "cannot listen"),
        (["serve", "--api-keys", "/no/such/file"], "no such file"),
        (["serve", "--method", "darts", "--port", "0"], "dart"),
        (["serve", "--backend", "gpus", "--port", "0"], "backend"),
        (["batch", "/no/such/file", "out.jsonl"], "no such file"),
        (["batch", __file__, "/no/such/folder/out.jsonl"], "there is no folder"),
        (["batch", __file__, __file__], "written over"),
    ],
)
def test_mistakes_are_one_line(run, arguments, said):
    code, _, error = run(*arguments)
    assert code == 2 and said in error.replace("\n", " ").lower().replace("low,high", "LOW,HIGH")


def test_more_than_the_method_can_leave_out_is_refused_at_the_start(run):
    code, _, error = run("serve", "--port", "0", "--sparsity", "0.5", "--allow-sparsity", "0.5,0.99")
    assert code == 2 and "sparsity 0.99: this run can take 0 or 0.5" in error


def test_a_port_that_is_taken(run):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, error = run("serve", "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen" in error


def started(*arguments):
    """A server's process and its address."""
    command = [sys.executable, "-m", "dartprune", "serve", "--port", "0", "--dense-above", "never", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if "listening on" in line:
            return process, line.split("listening on ")[1].split(",")[0].split(";")[0].strip()
    raise AssertionError(f"the server ended with {process.wait()}")


def post(url, body):
    data = json.dumps({"model": "dartprune-demo", **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_sigterm_under_load_loses_no_request_that_was_taken():
    process, url = started("--batch", "2", "--method", "dart")
    answers = []

    def ask(number):
        answers.append(post(url, {"prompt": f"Number {number} was", "max_tokens": 60, "temperature": 0}))

    try:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # all are taken, most wait
            text = urllib.request.urlopen(f"{url}/metrics", timeout=20).read().decode()
            figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            taken = float(figures["dartprune_requests_waiting"]) + float(figures["dartprune_queue_seconds_count"])
            if taken == 6:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [60] * 6
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.stderr.close()


def test_a_batch_from_the_command_line(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}\n{"prompt": 5}\n')
    code, out, _ = run("batch", source, target, "--method", "dart", "--dense-above", "never")
    assert code == 0 and "2 answers, 1 of them errors" in out
    assert [("error" in json.loads(line)) for line in target.read_text().splitlines()] == [False, True]
    assert "0 answers, 2 were there" in run("batch", source, target, "--method", "dart", "--dense-above", "never")[1]
