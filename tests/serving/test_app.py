"""The server as its users meet it: the real `openai` client, and those who send it what is no request."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from dartprune.serving.engine import Limits
from serving.conftest import PROMPTS, asked, served_by

openai = pytest.importorskip("openai")


def client_of(served, key="none"):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def client(served):
    with client_of(served) as made:
        yield made


def send(served, path="/v1/completions", body=b"", method="POST", **headers):
    """Status, headers and body of a plain request."""
    request = urllib.request.Request(served.url + path, data=body if method == "POST" else None, method=method)
    for name, value in {"content-type": "application/json", **headers}.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def ask(served, **body):
    status, headers, text = send(served, body=json.dumps({"model": "small", **body}).encode())
    return status, headers, json.loads(text)


# ---- what is answered


def test_a_completion(served, client):
    answer = client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=12, temperature=0)
    want = asked(served.engine, PROMPTS[0], 12).wait()
    assert answer.choices[0].text == want.text[0] and answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.model == "small"
    usage = answer.usage.model_dump()
    assert usage["completion_tokens"] == 12 and usage["total_tokens"] == 12 + usage["prompt_tokens"]
    assert usage["dart"]["pruned_tokens"] == 11 and usage["dart"]["dense_tokens"] == 0
    assert usage["dart"]["realised_sparsity"] == pytest.approx(0.4, abs=0.01)


def test_a_chat_uses_the_template(served, client, small):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story"}]}
    ]
    answer = client.chat.completions.create(model="small", messages=messages, max_completion_tokens=10, temperature=0)
    ids = small[1]("user: Tell me a story\nassistant:", add_special_tokens=False)["input_ids"]
    assert answer.choices[0].message.content == asked(served.engine, ids, 10).wait().text[0]
    assert answer.choices[0].message.role == "assistant" and answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("chat", [False, True])
def test_streams_give_what_an_answer_gives(client, chat):
    call = {"model": "small", "max_tokens": 16, "temperature": 0.8, "seed": 5, "n": 2}
    if chat:
        create, call["messages"] = client.chat.completions.create, [{"role": "user", "content": "Hello there, old dog"}]
    else:
        create, call["prompt"] = client.completions.create, PROMPTS[1]
    whole = create(**call)
    texts, reasons, usages = ["", ""], {}, []
    for chunk in create(**call, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [c.message.content if chat else c.text for c in whole.choices] and texts[0] != texts[1]
    assert reasons == {0: "length", 1: "length"}
    assert usages[-1].completion_tokens == 32 and not any(usages[:-1])
    assert all(chunk.usage is None for chunk in create(**call, stream=True))


def test_stop_strings_and_seeds(client):
    call = {"model": "small", "prompt": PROMPTS[3], "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**call).choices[0].text
    short = client.completions.create(**call, stop=[whole[8:12], "zzz"]).choices[0]
    assert short.text == whole[: whole.index(whole[8:12])] and short.finish_reason == "stop"
    drawn = [
        client.completions.create(**call | {"temperature": 1.0}, seed=seed, top_p=0.9, extra_body={"top_k": 50})
        for seed in (1, 1, 2)
    ]
    assert drawn[0].choices[0].text == drawn[1].choices[0].text != drawn[2].choices[0].text


def test_logprobs_of_completions_and_chats(client):
    answer = client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=5, temperature=0, logprobs=2)
    logs = answer.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == 5
    assert all(
        log == pytest.approx(max(likeliest.values()))
        for log, likeliest in zip(logs.token_logprobs, logs.top_logprobs, strict=True)
    )
    assert logs.text_offset[0] == 0 and logs.text_offset == sorted(logs.text_offset)
    messages = [{"role": "user", "content": "Hello there, old dog"}]
    chat = client.chat.completions.create(
        model="small", messages=messages, max_tokens=3, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3 and len(content[0].top_logprobs) == 3
    assert content[0].top_logprobs[0].token == content[0].token
    assert bytes(content[0].bytes).decode() == content[0].token


def test_prompts_as_tokens_and_several_at_once(served, client, small):
    ids = small[1](PROMPTS[0])["input_ids"]
    call = {"model": "small", "max_tokens": 6, "temperature": 0}
    texts = [c.text for c in client.completions.create(prompt=list(PROMPTS[:2]), n=2, **call).choices]
    assert texts == [asked(served.engine, PROMPTS[k], 6).wait().text[0] for k in (0, 0, 1, 1)]
    assert client.completions.create(prompt=ids, **call).choices[0].text == texts[0]
    assert client.completions.create(prompt=[ids, ids], **call).choices[1].text == texts[0]


def test_a_request_says_how_it_is_pruned(client):
    call = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 10, "temperature": 0}

    def figures(**dart):
        usage = client.completions.create(**call, extra_body={"dart": dart}).usage.model_dump()["dart"]
        return round(usage["realised_sparsity"], 2), usage["dense_tokens"], usage["dense_because"]

    assert figures(sparsity=0.7) == (0.7, 0, {}) and figures(method="dart") == (0.4, 0, {})
    assert figures(method="dense") == figures(sparsity=0) == (0.0, 9, {"asked": 9})


def test_a_watched_stream_brings_figures(client):
    call = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 100, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(**call, extra_body={"dart": {"watch": True}}))
    figures = [chunk.model_extra["dart"] for chunk in chunks if "dart" in (chunk.model_extra or {})]
    assert len(figures) == 100 and figures[-1]["decoded"] == 99 and len(figures[-1]["active"]) == 8
    assert figures[-1]["similarities"] and not any(
        "dart" in (c.model_extra or {}) for c in client.completions.create(**call)
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").model_extra["dart"]["method"] == "dart"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


# ---- what is refused

GOOD = {"prompt": "Once upon a time", "max_tokens": 4}


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "other"}, 404, "model", "only 'small'"),
        ({"max_tokens": "4"}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than"),
        ({"max_tokens": 10**30}, 400, "max_tokens", "less than"),
        ({"max_tokens": 5000}, 400, "prompt.0", "together at most"),
        ({"prompt": "word " * 9000}, 400, "prompt.0", "tokens and 4 are asked for"),
        ({"prompt": ""}, 400, "prompt", "at least 1"),
        ({"prompt": [99999]}, 400, "prompt", "token 99999"),
        ({"prompt": [-1]}, 400, "prompt.0", "greater than"),
        ({"prompt": {"a": 1}}, 400, None, "valid"),
        ({"prompt": "\ud800"}, 400, None, "surrogate"),
        ({"seed": 1.5}, 400, "seed", "valid integer"),
        ({"temperature": -1}, 400, "temperature", "greater than"),
        ({"temperature": float("nan")}, 400, "temperature", "finite"),
        ({"top_p": 0}, 400, "top_p", "greater than"),
        ({"n": 9}, 400, "n", "at most 8"),
        ({"n": True}, 400, "n", "valid integer"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"frequency_penalty": 0.5}, 400, None, "0"),
        ({"best_of": 3}, 400, "best_of", "not known here"),
        ({"echo": True}, 400, "echo", "not known here"),
        ({"stream_options": {"include_usage": True}}, 400, None, "stream=true"),
        ({"dart": {"watch": True}}, 400, None, "stream=true"),
        ({"dart": {"sparsity": 0.2}}, 400, "dart.sparsity", "0.4 to 0.8"),
        ({"dart": {"sparsity": 0.9}}, 400, "dart.sparsity", "0.4 to 0.8"),
        ({"dart": {"method": "griffin"}}, 400, "dart.method", "prunes by dart"),
        ({"dart": {"method": "dense", "sparsity": 0.5}}, 400, "dart.sparsity", "leaves nothing out"),
    ],
)
def test_bad_requests_get_one_line(served, change, status, param, said):
    got, _headers, answer = ask(served, **GOOD | change)
    error = answer["error"]
    assert got == status and said in error["message"] and "\n" not in error["message"], error
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert param is None or error["param"] == param
    assert ask(served, **GOOD)[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'{"model": "small", "prompt": "\xff\xfe"}', 400),
        (b'{"model": "small", "prompt": "x", "max_tokens": ' + b"9" * 6000 + b"}", 400),
        (b'{"model": "small", "prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", 400),
        (b'{"model": "small", "model": "small"}', 400),
        (b"x" * 1_000_001, 413),
        (b"x" * 7_900_000, 413),
    ],
)
def test_bodies_that_are_none(small, body, status):
    with served_by(small, body_bytes=1_000_000) as served:
        got, _, text = send(served, body=body)
        assert got == status and json.loads(text)["error"]["message"]
        assert send(served, "/health", method="GET")[0] == 200


def test_a_body_that_never_ends_is_cut_off(small):
    with served_by(small, body_bytes=1_000) as served:
        sent = 0

        def forever():
            nonlocal sent
            for _ in range(10_000):
                sent += 100_000
                yield b"x" * 100_000

        with contextlib.suppress(OSError):
            status, _, _ = send(served, body=forever())
            assert status == 413
        assert sent < 100_000_000
        assert send(served, "/health", method="GET")[0] == 200


def test_who_waits_to_be_asked_for_a_body_is_refused_without_it(small):
    with served_by(small, body_bytes=1_000, keys=("one",)) as served:
        for headers, size, status in (
            (b"Authorization: Bearer one\r\n", 2_000, b" 413 "),
            (b"", 10, b" 401 "),
        ):
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as wire:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + headers
                wire.sendall(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size)
                assert status in wire.recv(4096).split(b"\r\n")[0]


def test_unknown_pages_and_methods(served):
    for path, method, status in (
        ("/v1/nothing", "GET", 404),
        ("/v1/completions", "GET", 405),
        ("/health", "POST", 405),
    ):
        got, _, text = send(served, path, method=method)
        assert got == status and json.loads(text)["error"]["message"]


def test_messages_that_the_template_refuses(small):
    _model, tokenizer = small
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ raise_exception('only one message, please') }}"
    try:
        with served_by(small) as served:
            body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "x"}]}).encode()
            status, _, text = send(served, "/v1/chat/completions", body)
            assert status == 400 and "only one message, please" in json.loads(text)["error"]["message"]
            tokenizer.chat_template = None
            status, _, text = send(served, "/v1/chat/completions", body)
            assert status == 404 and b"no chat template" in text
    finally:
        tokenizer.chat_template = before


def test_api_keys(small):
    with served_by(small, keys=("one", "two")) as served:
        for key in ("one", "two"):
            with client_of(served, key) as client:
                assert client.completions.create(model="small", prompt="Once", max_tokens=2).choices
        with client_of(served, "three") as client, pytest.raises(openai.AuthenticationError, match="API key is needed"):
            client.models.list()
        for headers in (
            {},
            {"authorization": "one"},
            {"authorization": "Basic one"},
            {"authorization": "Bearer one two"},
        ):
            assert send(served, "/v1/models", method="GET", **headers)[0] == 401
            assert send(served, body=b"x" * 4_000_000, **headers)[0] == 401, "sent to its end, and told why"
        assert [send(served, path, method="GET")[0] for path in ("/", "/health", "/ready", "/metrics")] == [200] * 4


def test_a_full_queue_is_429_and_says_when_to_come_again(small):
    with served_by(small, limits=Limits(batch=1, queue=1)) as served:
        busy = [asked(served.engine, PROMPTS[0], 400)]
        while not busy[0].pieces:
            time.sleep(0.01)
        busy.append(asked(served.engine, PROMPTS[1], 4))
        status, headers, answer = ask(served, **GOOD)
        assert status == 429 and int(headers["retry-after"]) >= 1 and "waiting" in answer["error"]["message"]
        with client_of(served) as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="small", prompt="x", max_tokens=2)
        busy[0].ticket.cancel()


def test_a_request_that_takes_too_long_is_504_and_an_error_in_a_stream(small):
    with served_by(small, seconds=0.5) as served:
        status, _, answer = ask(served, prompt=PROMPTS[0], max_tokens=1500, temperature=0)
        assert status == 504 and "longer than 0.5 seconds" in answer["error"]["message"]
        with client_of(served) as client, pytest.raises(openai.APIError, match=r"longer than 0\.5 seconds"):
            list(
                client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=1500, temperature=0, stream=True)
            )


# ---- what goes wrong on the way


def idle(served):
    deadline = time.monotonic() + 60
    while served.engine.decoding or served.engine.waiting:
        assert time.monotonic() < deadline, "a request that nobody waits for still decodes"
        time.sleep(0.02)


def test_who_hangs_up_is_forgotten(served, client):
    def cancelled(wanted=0):
        """How many were counted; a request is counted a moment after its line is gone."""
        deadline = time.monotonic() + 10
        while (counted := served.metrics.requests.labels("cancelled")._value.get()) < wanted:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return counted

    before = cancelled()
    stream = client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=1500, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    idle(served)
    assert cancelled(before + 1) == before + 1
    body = json.dumps({"model": "small", "prompt": PROMPTS[0], "max_tokens": 1500, "temperature": 0}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        while not served.engine.decoding:
            time.sleep(0.01)
    idle(served)
    assert cancelled(before + 2) == before + 2


def test_slow_half_closed_and_broken_connections(small):
    with served_by(small, body_seconds=0.5) as served:
        body = json.dumps({"model": "small", **GOOD}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as slow:
            slow.sendall(head % len(body) + body[:5])
            assert b"408" in slow.recv(100)
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as half:
            half.sendall(head % len(body) + body)
            half.shutdown(socket.SHUT_WR)
            half.recv(100)  # an answer, or the end: the server may take it for one who has left
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as broken:
            broken.sendall(b"\x00\x01\x02 not http\r\n\r\n")
            assert b"400" in broken.recv(100)
        assert send(served, "/health", method="GET", x_long="y" * 10_000)[0] == 200
        with contextlib.suppress(urllib.error.URLError, ConnectionError):  # too long: refused while it is sent
            assert send(served, "/health", method="GET", x_long="y" * 200_000)[0] in (400, 431)
        assert ask(served, **GOOD)[0] == 200
        idle(served)


def test_many_connections_at_once(served):
    connections = []
    try:
        for _ in range(200):
            connections.append(socket.create_connection(("127.0.0.1", served.port), timeout=20))
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda n: ask(served, prompt=PROMPTS[n % 5], max_tokens=3)[0], range(32)))
        assert answers == [200] * 32 and send(served, "/health", method="GET")[0] == 200
    finally:
        for connection in connections:
            connection.close()
    idle(served)


# ---- what is seen


def test_metrics_count_what_was_done(small):
    with served_by(small) as served:
        ask(served, prompt=PROMPTS[0], max_tokens=10, temperature=0)
        ask(served, prompt=PROMPTS[0], max_tokens=10, temperature=0, dart={"sparsity": 0})
        status, headers, text = send(served, "/metrics", method="GET")
        lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert lines['dartprune_requests_total{outcome="ok"}'] == "2.0"
    assert lines['dartprune_tokens_total{ffn="pruned"}'] == lines['dartprune_tokens_total{ffn="dense"}'] == "9.0"
    assert float(lines["dartprune_realised_sparsity"]) == pytest.approx(0.2, abs=0.01)
    assert lines["dartprune_first_token_seconds_count"] == "2.0" and lines["dartprune_token_seconds_count"] == "18.0"


def test_the_log_tells_figures_and_no_text(served, caplog):
    with caplog.at_level("INFO", logger="dartprune.serving"):
        ask(served, prompt="A secret word: xyzzy", max_tokens=3, temperature=0)
    facts = json.loads(caplog.messages[-1])
    assert facts["outcome"] == "ok" and facts["tokens"] == 3 and "xyzzy" not in caplog.text


def test_the_page_stands_alone(served):
    status, headers, text = send(served, "/", method="GET")
    page = text.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page


def test_the_page_in_a_browser(served, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [chromium, "--headless", "--no-sandbox", "--no-first-run", *quiet, f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", served.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "small · dart at 0.4 (0.4 to 0.8, or 0) · 8 at a time" in done.stdout
    assert done.stdout.count("<line") == 6  # the frames of both pictures


def test_health_answers_while_the_engine_works(served):
    busy = [asked(served.engine, prompt, 150) for prompt in PROMPTS]
    answers = [send(served, "/health", method="GET")[0] for _ in range(20)]
    assert answers == [200] * 20
    for heard in busy:
        heard.wait()


def test_a_stopped_engine_is_not_ready(small):
    with served_by(small) as served:
        closer = threading.Thread(target=served.engine.close)
        closer.start()
        closer.join(60)
        assert send(served, "/ready", method="GET")[0] == 503 and send(served, "/health", method="GET")[0] == 503
        status, _, answer = ask(served, **GOOD)
        assert status == 503 and "shutting down" in answer["error"]["message"]
