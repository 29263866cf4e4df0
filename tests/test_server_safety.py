"""What a hostile client can do: be refused, by name, and nothing else.

`alive` follows each attack: the server still answers, and answers right.

    what comes                                              tests, here where no file is named (below: they exist)
    S1  JSON that is none, wrong types, unknown fields      json_that_is_none, fields_that_cannot_be,
                                                            the_other_routes_check_too
    S2  slow, half-closed, gone amid generation             one_byte_now_and_then, who_leaves_frees_what_was_his
    S3  too large, too many, too long                       http_that_is_none, fields_that_cannot_be
    S4  64 clients at once get what one would               64_clients_get_what_one_would (test_server.py)
    S5  a full queue                                        queue_full
    S6  /health while the engine works                      health_answers_while_the_engine_works
    S7  no key, on any route                                the_key_is_wanted_on_every_route
    S8  another's Host, a web page's Origin                 http_that_is_none
    S9  ids outside of the vocabulary, nothing at all       fields_that_cannot_be
    S10 tensors of other names, types and shapes            tensors_that_do_not_fit_change_nothing,
                                                            sets_that_do_not_fit_are_refused_before_the_first_byte
    S11 a trainer that dies amid an update                  a_trainer_that_dies_amid_an_update_leaves_the_old_weights
    S12 regular expressions                                 fields_that_cannot_be
    S13 two lengths, bad lengths, chunks                    http_that_is_none
    S14 SIGTERM amid work                                   sigterm_drains (test_server.py)
    P1  pickles, in sockets and in files                    a_pickle_is_bytes; pickled_weights_are_not_read,
                                                            broken_weight_file_is_named (test_checkpoint.py)
    P2  paths, links and URLs for names                     model_names_open_nothing; shard_paths_stay_in_the_folder,
                                                            links_stay_in_the_folder (test_checkpoint.py)
    P3  a configuration with code to load                   auto_map_is_not_run (test_checkpoint.py)
    P4  templates                                           a_template_never_comes_with_a_request;
                                                            hostile_template_ends_in_one_error (test_tokenizer.py)
    P5  pickle, eval, exec and their like in the product    nothing_is_unpickled_or_executed (test_house.py)
"""

import json
import os
import random
import re
import socket
import string
import threading
import time
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
import serving
import torch
from serving import ask, raw
from test_engine import resident

from minitrl import checkpoint, transfer, web
from minitrl.config import parse
from minitrl.rollout import Engine
from minitrl.server import Config, Connection
from minitrl.web import MUST, Fields, Head, Refused, parse_head

KEY = "a-key-of-the-tests-0123456789"
GOOD = {"prompt": [2, 11, 3, 12], "max_tokens": 4, "seed": 1, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(tiny):
    with serving.here(tiny, max_queue=64, max_prompts=16, max_n=8, max_body_mib=0.25, max_connections=32) as running:
        yield running


@pytest.fixture(scope="module")
def expected(tiny):
    return Engine(*checkpoint.load(tiny.folder / "model")).generate([GOOD["prompt"]], max_tokens=4, seed=1)[0][0].ids


@pytest.fixture(autouse=True)
def alive(server, expected):
    """After every test the server is whole: it answers, right, and holds on to nothing."""
    yield
    status, answer = ask(server.url, "/v1/completions", GOOD)
    assert status == 200 and answer["choices"][0]["token_ids"] == expected
    assert ask(server.url, "/health")[0] == 200
    settled(server)


def settled(server):
    deadline = time.monotonic() + 20
    while (server.worker.pending or server.worker.jobs or server.held) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.worker.pending == 0 and not server.worker.jobs and server.held == 0 and server.worker.engine.idle


def refused(server, path, body, status=400, **headers):
    """The error's message, which is OpenAI-shaped and tells nothing of the machine."""
    got, answer = ask(server.url, path, body, **headers)
    assert got == status, (got, answer)
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    text = json.dumps(answer)
    assert "Traceback" not in text and "/work" not in text and " at 0x" not in text and ".py" not in text
    return error


# S1: JSON


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b"3", b"null", b'"text"', b"{", b'{"prompt": }', b'{"prompt": "1",}', b"{'prompt': '1'}",
        b'{"prompt": "1", "temperature": NaN}', b'{"prompt": "1", "temperature": Infinity}',
        b'{"prompt": "1", "temperature": -Infinity}', b'{"prompt": "1", "temperature": 1e999}',
        b'{"prompt": "1", "prompt": "2"}', b'{"prompt": "1", "x": {"a": 1, "a": 2}}', b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}', b"\xff\xfe{\x00}\x00", b'{"prompt": "1"} {}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"seed": ' + b"9" * 5000 + b"}", b"\x00" * 100,
        b'{"prompt": "1"}\x00', b'{"max_tokens": 1' + b"0" * 400 + b', "prompt": "1"}',
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_json_that_is_none(server, body):
    refused(server, "/v1/completions", body)


FIELDS = [
    ("prompt", None), ("prompt", 3), ("prompt", {}), ("prompt", []), ("prompt", [[]]), ("prompt", ""),
    ("prompt", [""]), ("prompt", [1.5]), ("prompt", [True]), ("prompt", [1, "a"]), ("prompt", [[1], "a", 2]),
    ("prompt", [[1, "x"]]), ("prompt", [[[1]]]), ("prompt", [-1]), ("prompt", [17]), ("prompt", [10**30]),
    ("prompt", [2] * 61), ("prompt", "1" * 100), ("prompt", [[1]] * 17), ("prompt", {"role": "user"}),
    ("prompt", [{"role": "user", "content": "1"}]),
    ("n", 0), ("n", -1), ("n", 9), ("n", 10**12), ("n", 1.0), ("n", "2"), ("n", True), ("n", []),
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 61), ("max_tokens", 2**31), ("max_tokens", 10**40),
    ("max_tokens", "4"), ("max_tokens", 4.0), ("max_tokens", False), ("min_tokens", -1), ("min_tokens", 5),
    ("temperature", -1), ("temperature", "1"), ("temperature", 1e-9), ("temperature", True), ("temperature", 10**400),
    ("top_p", 0), ("top_p", 1.1), ("top_p", -0.5), ("top_k", -2), ("top_k", 1.5), ("min_p", 2), ("min_p", -1),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("seed", -1), ("seed", 2**63), ("seed", 1.5),
    ("seed", "1"), ("seed", [1, 2]), ("seed", []), ("seed", [True]),
    ("stop", ""), ("stop", [""]), ("stop", [1]), ("stop", 3), ("stop", ["a"] * 17), ("stop", "a" * 257),
    ("stream", 1), ("stream", "yes"), ("model", 3), ("return_token_ids", 1), ("logprobs", 5), ("logprobs", True),
    ("logprobs", -1), ("ignore_eos", "no"), ("weights", 1), ("user", 5), ("unheard_of", 1), ("", 1),
    ("presence_penalty", 1), ("frequency_penalty", 0.5), ("best_of", 4), ("echo", True), ("suffix", "x"),
    ("logit_bias", {"1": 100}), ("tools", [{"type": "function"}]), ("tool_choice", "auto"),
    ("response_format", {"type": "json_object"}), ("guided_decoding_regex", "(a+)+$"), ("guided_regex", "(a+)+$"),
    ("guided_json", {}), ("structured_outputs", {"regex": "(a|a)*b"}), ("prompt_logprobs", 1), ("images", ["x"]),
    ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"a": 1}), ("stream_options", 3),
]  # fmt: skip


@pytest.mark.parametrize("name, value", FIELDS, ids=lambda part: str(part)[:24])
def test_fields_that_cannot_be(server, name, value):
    """S1, S3, S9, S12: wrong types, over the caps, ids outside of the vocabulary, expressions; the field is named."""
    error = refused(server, "/v1/completions", {**GOOD, "max_tokens": 4, name: value})
    assert name.split("_")[0] in error["message"] or name == "prompt" and "prompt" in error["message"]
    assert not server.worker.pending


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "text", {}, [3], [{}], [{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "boss", "content": "1"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": "1", "tool_calls": []}], [{"role": "assistant", "content": "1"}],
    ],
    ids=lambda messages: str(messages)[:40],
)  # fmt: skip
def test_messages_that_cannot_be(server, messages):
    assert "messages" in refused(server, "/v1/chat/completions", {"messages": messages})["message"]


@pytest.mark.parametrize("path, good", [
    ("/generate/", {"prompts": ["1"]}), ("/update_named_param/", {"name": "a", "dtype": "torch.float32", "shape": [1]}),
    ("/init_communicator/", {"host": "0.0.0.0", "port": 5, "world_size": 2}),
    ("/weights/meet", {"host": "127.0.0.1", "port": 5, "generation": 1, "shard": 1, "tensor": 1}),
    ("/weights/update", {"generation": 1, "version": 1, "digest": "0" * 64, "tensors": []}),
])  # fmt: skip
def test_the_other_routes_check_too(server, path, good):
    for name in good:
        for wrong in ({}, [[]], -1, 1.5, 2**70):
            if not (path, name, wrong) == ("/weights/update", "tensors", [[]]):
                assert ask(server.url, path, good | {name: wrong})[0] in (400, 409), (name, wrong)
    refused(server, path, good | {"more": 1})


def test_a_long_text_is_refused_before_it_is_encoded(server):
    """Encoding takes seconds a MiB."""
    for path, body in (("/v1/completions", {"prompt": "1" * 5000}), ("/generate", {"prompts": ["1" * 5000]}),
                       ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1" * 5000}]})):  # fmt: skip
        assert "4096 characters" in refused(server, path, body)["message"]


def test_requests_are_checked_aside_from_the_engine(server, monkeypatch):
    """Millions of ids take seconds to look at."""
    threads, engine = [], server.worker.engine
    look = engine._prompt_ids
    spy = lambda *given: threads.append(threading.current_thread()) or look(*given)  # noqa: E731
    monkeypatch.setattr(engine, "_prompt_ids", spy)
    assert "2000 tokens" in refused(server, "/v1/completions", {"prompt": [1] * 2000})["message"]
    assert ask(server.url, "/v1/completions", {"prompt": [[1], [2]], "max_tokens": 2})[0] == 200
    assert len(threads) == 3 and server.worker not in threads


def test_encoding_lets_other_threads_go_on(tiny):
    tokenizer, counts, over = checkpoint.load(tiny.folder / "model")[1], [0], threading.Event()
    text = "1+2=" * 2**17
    assert tokenizer.encode(text[: 2**15]) == tokenizer.encode(text[:2**10]) * 2**5, "both ways to the same ids"

    def count():
        while not over.wait(0.001):
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    began = time.monotonic()
    tokenizer.encode(text)
    took = time.monotonic() - began
    over.set()
    thread.join()
    assert counts[0] > took / 0.1, "a tick each tenth of a second at the least"


# S2, S3, S8, S13: HTTP


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"\r\n\r\n", 400), (b"GET\r\n\r\n", 400), (b"GET /health\r\n\r\n", 400), (b"GET  /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1 \r\nHost: localhost\r\n\r\n", 400), (b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400), (b"GET http://x/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505), (b"GET /health HTTP/0.9\r\n\r\n", 505),
        (b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400), (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400), (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad : x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n folded\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\nY: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\rY: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n", 400), (b"GET /health HTTP/1.1\r\nnothing\r\n\r\n", 400),
        (b"GET /health?a=1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: identity\r\nContent-Length: 0\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5, 5\r\n\r\nabcde", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\nx", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0x10\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: \xb2\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n", 413),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Encoding: gzip\r\n\r\n{}", 415),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\n{}", 415),
        (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", 415),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421), (b"GET /health HTTP/1.1\r\nHost: 10.0.0.1:8000\r\n\r\n", 421),
        (b"GET /health HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 421), (b"GET /health HTTP/1.1\r\nHost: \r\n\r\n", 421),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404), (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /generate HTTP/1.1\r\nHost: localhost\r\n\r\n", 405), (b"PUT /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"CONNECT /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431), (b"A" * 20_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 70 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400), (b"\x80\x04\x95cos\nsystem\n(S'touch x'\ntR.\r\n\r\n", 400),
    ],
    ids=lambda part: repr(part[:60]) if isinstance(part, bytes) else str(part),
)  # fmt: skip
def test_http_that_is_none(server, request_bytes, status):
    answer = raw(server.url, request_bytes.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) if status == 404 or
                 status == 405 else request_bytes)  # fmt: skip
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1, "what follows a refused request is not another request"
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == status


def test_a_body_of_the_largest_size_is_read_and_a_larger_one_is_not(server):
    """S3: to the byte."""
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    for length, status in ((server.max_body, b"400"), (server.max_body + 1, b"413")):
        answer = raw(server.url, head + b"Content-Length: %d\r\n\r\n" % length + b" " * length)
        assert answer[9:12] == status, answer[:200]


def test_good_http_in_many_pieces(server):
    """Several requests on one connection, however the bytes fall."""
    body = json.dumps(GOOD).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nhost: LOCALHOST:1\r\ncontent-type: application/json; charset=utf-8\r\n"
    post += b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
    get, last = (b"GET /health/ HTTP/1.1\r\nHost: [::1]:80\r\nConnection: %s\r\n\r\n" % c for c in (b"keep-alive", b"close"))
    stream = get + post + body + get + last
    for size in (len(stream), 1000, 7):
        host, port = server.server_address
        with socket.create_connection((host, port), timeout=20) as connection:
            for start in range(0, len(stream), size):
                connection.sendall(stream[start : start + size])
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        assert answer.count(b"HTTP/1.1 200 OK") == 4 and answer.count(b"100 Continue") == 1, answer


def test_a_refused_request_does_not_end_the_connection(server):
    import http.client

    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    for body, status in (({"prompt": 3}, 400), (GOOD, 200), ({"nothing": 1}, 400), (GOOD, 200)):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
    connection.close()


@contextmanager
def impatient(monkeypatch):
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "IDLE_SECONDS", "SEND_SECONDS"):
        monkeypatch.setattr(web, name, 0.6)
    yield


@pytest.mark.parametrize("start", [
    b"", b"G", b"GET /health HTTP/1.1\r\n", b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
    b"Content-Type: application/json\r\n\r\n{",
])  # fmt: skip
def test_one_byte_now_and_then(server, monkeypatch, start):
    """S2: each part has its time as a whole; bytes that trickle in do not prolong it."""
    with impatient(monkeypatch), socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(start)
        began, answer = time.monotonic(), b""
        with pytest.raises(OSError):
            while time.monotonic() < began + 15:
                if start:
                    connection.sendall(b"a")
                connection.settimeout(0.1)
                try:
                    chunk = connection.recv(65536)
                    answer += chunk
                    if not chunk:
                        raise ConnectionResetError
                except TimeoutError:
                    pass
        assert time.monotonic() - began < 10
        assert answer == b"" if not start else answer.startswith(b"HTTP/1.1 408")


def slowly(server, monkeypatch, seconds=0.02):
    step = server.worker.engine.step

    def slower():
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(server.worker.engine, "step", slower)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("more", [b"", b"GET /health HT"])
def test_who_leaves_frees_what_was_his(server, monkeypatch, stream, half, more):
    """S2: a client that closes its connection, or its half, amid generation: its sequences leave the batch.

    more: what it has sent of another request, which nobody reads before the first is answered.
    """
    slowly(server, monkeypatch, 0.1)
    body = json.dumps(GOOD | {"n": 8, "max_tokens": 60, "ignore_eos": True, "stream": stream}).encode()
    connection = socket.create_connection(server.server_address, timeout=20)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
    deadline = time.monotonic() + 10
    while not server.worker.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.worker.pending == 8
    time.sleep(0.1)
    connection.sendall(more)
    began = time.monotonic()
    connection.shutdown(socket.SHUT_WR) if half else connection.close()
    while server.worker.pending and time.monotonic() < began + 10:
        time.sleep(0.01)
    assert server.worker.pending == 0 and server.worker.engine.idle
    assert server.worker.engine.pool.in_use == 0
    assert time.monotonic() - began < 4, "60 slow steps take longer: they were not waited for"
    connection.close()


def test_a_reader_that_does_not_read_is_left(server, monkeypatch):
    """A stream into a full socket ends in its time, and holds no one up meanwhile."""
    monkeypatch.setattr(web, "SEND_SECONDS", 0.5)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.server_address)
        body = json.dumps(GOOD | {"prompt": [[2 + i % 9] for i in range(8)], "n": 8, "max_tokens": 60, "stream": True,
                                  "ignore_eos": True, "logprobs": 0}).encode()  # fmt: skip
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
        time.sleep(0.3)
        assert ask(server.url, "/health", timeout=5)[0] == 200
        settled(server)


def test_connections_that_say_nothing_make_room(server):
    """Twice as many silent connections as there may be: whoever asks is served, and the longest silent are closed."""
    silent = [socket.create_connection(server.server_address, timeout=20) for _ in range(2 * 32)]
    try:
        for connection in silent[::3]:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: local")
        for _ in range(5):
            assert ask(server.url, "/health", timeout=5)[0] == 200
        assert server.open <= 34
        closed = 0
        for connection in silent[:16]:
            connection.settimeout(5)
            closed += connection.recv(100) == b""
        assert closed == 16
    finally:
        for connection in silent:
            connection.close()


def test_connections_that_were_refused_make_room_too(server):
    """Who is told that he is wrong gets a moment to read that, which is nobody else's."""
    refused = [socket.create_connection(server.server_address, timeout=20) for _ in range(32)]
    try:
        for connection in refused:
            connection.sendall(b"nonsense\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert ask(server.url, "/health", timeout=5)[0] == 200
    finally:
        for connection in refused:
            connection.close()


def test_queue_full(server, monkeypatch):
    """S5: beyond --max_queue: 429, Retry-After, at once; and afterwards all is as before."""
    slowly(server, monkeypatch)
    body = GOOD | {"n": 8, "max_tokens": 30, "ignore_eos": True}
    threads = [threading.Thread(target=ask, args=(server.url, "/v1/completions", body)) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while server.worker.pending < 64 and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    assert "--max_queue" in refused(server, "/v1/completions", GOOD, 429)["message"]
    answer = raw(server.url, b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 15\r\n"
                 b"\r\n" + b'{"prompt": "1"}')  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 429") and b"\r\nRetry-After: 1\r\n" in answer
    assert ask(server.url, "/health")[0] == 200 and time.monotonic() - began < 1  # S6
    for thread in threads:
        thread.join()
    refused(server, "/v1/completions", GOOD | {"prompt": [[1]] * 9, "n": 8})


def test_health_answers_while_the_engine_works(server, monkeypatch):
    """S6: many times, at once, while a long answer is under way."""
    slowly(server, monkeypatch)
    body = GOOD | {"n": 8, "max_tokens": 60, "ignore_eos": True}
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(server.url, "/v1/completions", body)))
    thread.start()
    deadline = time.monotonic() + 10
    while not server.worker.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    for path in ("/health", "/health/", "/v1/models", "/weights") * 5:
        assert ask(server.url, path, timeout=5)[0] == 200
    assert server.worker.pending == 8 and not answers, "60 slow steps take longer"
    thread.join()
    assert answers[0][0] == 200


def test_bodies_are_bounded_together(server, monkeypatch):
    """Many large bodies that do not come: memory is promised to a few of them alone."""
    monkeypatch.setattr(web, "BODIES", 2)
    head = (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 250000\r\n\r\n")  # fmt: skip
    slow = [socket.create_connection(server.server_address, timeout=20) for _ in range(2)]
    for connection in slow:
        connection.sendall(head)
    deadline = time.monotonic() + 10
    while server.held < 500_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert raw(server.url, head).startswith(b"HTTP/1.1 503")
    assert ask(server.url, "/v1/completions", GOOD)[0] == 200, "small ones still fit"
    for connection in slow:
        connection.close()


# S7: the key


def test_the_key_is_wanted_on_every_route(tiny):
    paths = {path: method for method, path in Connection.routes}
    with serving.here(tiny, api_key=KEY) as server:
        for path, method in [*paths.items(), ("/", "GET"), ("/nothing", "GET"), ("/health", "PUT"), ("/docs", "GET")]:
            body = b"{}" if method in ("POST", "PUT") else None
            for headers in ({}, {"Authorization": ""}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"},
                            {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": f"bearer {KEY}"},
                            {"Authorization": "Bearer \xe9"}):  # fmt: skip
                status, answer = ask(server.url, path, body if method == "POST" else None, method, **headers)
                assert status == 401 and KEY not in json.dumps(answer), (path, headers)
            status, _ = ask(server.url, path, body if method == "POST" else None, method, Authorization=f"Bearer {KEY}")
            assert status != 401
        # Before the body is read.
        answer = raw(server.url, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401") and b"WWW-Authenticate: Bearer" in answer
        # With a key any name of the machine will do.
        good = f"GET /health HTTP/1.0\r\nHost: trainer.example\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        assert raw(server.url, good.encode()).startswith(b"HTTP/1.1 200")


def test_the_key_comes_from_where_it_is_not_seen(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "key").write_text(KEY + "\n")
    model = str(tiny.folder / "model")
    assert Config(model, api_key_file=str(tmp_path / "key")).key == KEY
    monkeypatch.setenv("MINITRL_API_KEY", KEY)
    assert Config(model, host="0.0.0.0").key == KEY and KEY not in repr(Config(model))
    for wrong in ("short", "", "with spaces in it, which no header has", "ключ" * 8):
        monkeypatch.setenv("MINITRL_API_KEY", wrong)
        with pytest.raises(SystemExit):
            parse(Config, ["--model", model, "--host", "0.0.0.0"])
        shown = capsys.readouterr().err
        assert ("--api_key: at least 16" in shown or "--host" in shown) and (not wrong or wrong not in shown)
    monkeypatch.delenv("MINITRL_API_KEY")
    with pytest.raises(ValueError, match="--api_key: at least 16"):  # of a variable that is not set, say
        Config(model, api_key="")
    monkeypatch.setenv("MINITRL_API_KEY", KEY)
    monkeypatch.delenv("MINITRL_API_KEY")
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(ValueError, match=f"--host {host}"):
            Config(model, host=host)
    for host in ("127.0.0.1", "127.5.5.5", "localhost", "::1"):
        assert Config(model, host=host).key is None


def test_the_client_sends_the_key(tiny, monkeypatch):
    from minitrl.distributed import World
    from minitrl.rollout_client import RemoteEngine

    with serving.here(tiny, api_key=KEY) as server:
        policy, tokenizer = checkpoint.load(tiny.folder / "model")
        options = [server.url], policy, tokenizer, World(0, 1, torch.device("cpu"))
        with pytest.raises(ValueError, match="401: a bearer key is needed"):
            RemoteEngine(*options, timeout_s=5).generate([[2]], max_tokens=2)
        monkeypatch.setenv("MINITRL_API_KEY", KEY)
        assert RemoteEngine(*options, timeout_s=20).generate([[2]], max_tokens=2)


# S10, S11: weights


def test_tensors_that_do_not_fit_change_nothing(server):
    before = transfer.digest(server.worker.tensors)
    for body in (
        {"name": "model.nothing", "dtype": "torch.float32", "shape": [32]},
        {"name": "model.norm.weight", "dtype": "torch.float32", "shape": [33]},
        {"name": "model.norm.weight", "dtype": "torch.float32", "shape": [-32]},
        {"name": "model.norm.weight", "dtype": "torch.float32", "shape": [2**62, 2**62]},
        {"name": "model.norm.weight", "dtype": "torch.float32", "shape": []},
        {"name": "model.norm.weight", "dtype": "torch.load", "shape": [32]},
        {"name": "model.norm.weight", "dtype": "os.system", "shape": [32]},
        {"name": "model.norm.weight", "dtype": "torch.int8", "shape": [32]},
        {"name": "../../etc/passwd", "dtype": "torch.float32", "shape": [32]},
    ):
        refused(server, "/update_named_param/", body)
    assert transfer.digest(server.worker.tensors) == before == server.worker.digest


def meet(server, generation=5):
    return serving.meet(server.url, server.worker.engine.model.config, generation)


def test_sets_that_do_not_fit_are_refused_before_the_first_byte(server):
    before = transfer.digest(server.worker.tensors)
    good = transfer.describe(server.worker.engine.model.config, torch.float32)
    body = {"generation": 5, "version": 1, "digest": "0" * 64}
    sets = [[], good[1:], [*good, ["more", "float32", [1]]], [*good, good[0]], [[good[0][0], "float32", [10**9]], *good[1:]],
            [[good[0][0], "bfloat16", good[0][2]], *good[1:]], [["../x", *good[0][1:]], *good[1:]], [3], [[1, 2, 3]]]  # fmt: skip
    for tensors in sets:
        route = meet(server)
        assert refused(server, "/weights/update", body | {"tensors": tensors})["param"] == "tensors"
        with pytest.raises(ConnectionError):  # and the sender does not wait for anyone
            transfer.send(route, server.worker.tensors, torch.float32)
    refused(server, "/weights/update", body | {"generation": 6, "tensors": good}, 409)
    for digest in ("", "0" * 63, "x" * 64, "0" * 65):
        assert refused(server, "/weights/update", body | {"digest": digest, "tensors": good})["param"] == "digest"
    assert transfer.digest(server.worker.tensors) == before == server.worker.digest


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_trainer_that_dies_amid_an_update_leaves_the_old_weights(server, pieces):
    """Before the first byte, after the last, and after the digest: the trainer has to come to the end."""
    before = transfer.digest(server.worker.tensors)
    route = meet(server)
    changed = {name: tensor + 1 for name, tensor in server.worker.tensors.items()}
    thread, got = serving.announce(server.url, route, changed, 9)
    stream = route._give(route.sends[1], changed, torch.float32, transfer.BUCKET // 4, True)
    for piece in [piece for piece in stream if piece is not None][:pieces]:
        route.link.finish(route.link.exchange([(1, True, piece)]), "sending")
    route.link.close()
    thread.join()
    status, answer = got[0]
    # Who leaves before the first byte may be missed when connections are made, or when that byte is waited for.
    phase = ("(starting to exchange|bucket 1 of the) weights", "bucket 3 of the weights", "waiting until all have verified")
    assert status == 409 and re.search(f"the old weights serve on: rank 1 of 2, {phase[pieces]}", answer["error"]["message"])
    assert transfer.digest(server.worker.tensors) == before == server.worker.digest and server.worker.version == 0
    meet(server, 6).link.close()  # a second client is taken at once


def test_a_bit_that_changed_on_the_way_leaves_the_old_weights(server):
    before = transfer.digest(server.worker.tensors)
    route = meet(server)
    thread, got = serving.announce(server.url, route, server.worker.tensors, 9)
    stream = route._give(route.sends[1], server.worker.tensors, torch.float32, transfer.BUCKET // 4, True)
    for piece in [piece for piece in stream if piece is not None]:
        if piece.dtype == torch.float32:
            piece.view(torch.uint8)[77] ^= 4
        route.link.finish(route.link.exchange([(1, True, piece)]), "sending")
    with pytest.raises(ConnectionError, match="waiting until all have verified"):
        route.link.agree("waiting until all have verified the weights")
    thread.join()
    assert got[0][0] == 409 and "verifying the weights" in got[0][1]["error"]["message"]
    assert transfer.digest(server.worker.tensors) == before == server.worker.digest


def test_a_trainer_that_hangs_is_waited_for_in_bounds(tiny):
    with serving.here(tiny, transfer_timeout=1) as server:
        route = meet(server)
        began = time.monotonic()
        thread, got = serving.announce(server.url, route, server.worker.tensors, 9)
        thread.join()
        assert got[0][0] == 409 and time.monotonic() - began < 15
        route.link.close()
        body = {"host": "127.0.0.1", "port": serving.closed_port(), "generation": 7}
        assert ask(server.url, "/weights/meet", body)[0] == 409
        assert ask(server.url, "/v1/completions", GOOD)[0] == 200


def test_a_trainer_that_says_nothing_keeps_no_other_waiting(tiny):
    """Torch's store waits for it without limit. Who comes next is a trainer that was started anew."""
    with serving.here(tiny) as server, socket.create_server(("127.0.0.1", 0)) as silent:
        body = {"host": "127.0.0.1", "port": silent.getsockname()[1], "generation": 1}
        got = []
        first = threading.Thread(target=lambda: got.append(ask(server.url, "/weights/meet", body)))
        first.start()
        silent.accept()
        began = time.monotonic()
        meet(server).link.close()
        first.join(20)
        assert time.monotonic() - began < 20 and got[0][0] == 409 and "another meeting" in str(got[0][1])


def test_weights_that_are_not_finite_fail_requests_and_not_the_server(tiny):
    model, _ = checkpoint.load(tiny.folder / "model")
    good = {name: p.detach().clone() for name, p in model.named_parameters()}
    with serving.here(tiny) as server:
        for tensors, status in (({n: t * float("nan") for n, t in good.items()}, 500), (good, 200)):
            serving.send_weights(server.url, model.config, tensors, 1)
            for stream in (False, True):
                got = ask(server.url, "/v1/completions", GOOD | {"stream": stream})
                assert got[0] == (200 if stream else status)
                assert not stream or ('"code": 500' in got[1]) == (status == 500)


# P1, P2, P4


def test_a_pickle_is_bytes(tiny, tmp_path):
    with serving.here(tiny, transfer_timeout=2) as server:
        send_pickles(server, tmp_path / "marker")


def send_pickles(server, marker):

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    import pickle

    bomb = pickle.dumps(Bomb())
    raw(server.url, bomb + b"\r\n\r\n")
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"
    for kind in (b"application/json", b"application/x-pickle", b"application/python-pickle"):
        assert raw(server.url, head % (len(bomb), kind) + bomb)[9:12] in (b"400", b"415")
    listener = transfer.listen("127.0.0.1")
    port = listener.getsockname()[1]
    body = {"host": "127.0.0.1", "port": port, "generation": 1}

    def stranger():
        connection, _ = listener.accept()
        connection.sendall(bomb)
        connection.close()

    thread = threading.Thread(target=stranger)
    thread.start()
    assert ask(server.url, "/weights/meet", body)[0] == 409
    thread.join()
    listener.close()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "http://evil.example/model", "", "~", "."])
def test_model_names_open_nothing(server, name):
    refused(server, "/v1/completions", GOOD | {"model": name}, 404)


def test_a_template_never_comes_with_a_request(tiny, tmp_path):
    """P4: and the checkpoint's own gets messages as data: what looks like a template in them is text."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{% for a in range(10) %}{{ m['content'] }}{% endfor %}{% endfor %}"
    checkpoint.save(model, tokenizer, tmp_path / "model")

    class Chatty:
        folder = tmp_path

    with serving.here(Chatty) as server:
        ask_ = [{"role": "user", "content": "1"}] * 20_000
        refused(server, "/v1/chat/completions", {"messages": ask_})  # more steps than a template may take
        text = "{{ ''.__class__ }}"
        refused(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 2})
        ok = {"messages": [{"role": "user", "content": "1"}], "max_tokens": 2}
        assert ask(server.url, "/v1/chat/completions", ok)[1]["usage"]["prompt_tokens"] == 10


# The parser under a fuzzer


def hostile_head(random_: random.Random) -> bytes:
    """A request's head, more or less: a good one, cut up, repeated, changed, or noise."""
    parts = [b"GET", b"POST", b" ", b"/", b"/v1/completions", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", b"\x00",
             b"Host: localhost", b"Content-Length: 5", b"Content-Length: -5", b"Transfer-Encoding: chunked", b":", b"a" * 300,
             b"\xff\xfe", b"\t", b" \r\n", b"Authorization: Bearer x", b"Connection: close", b"Expect: 100-continue",
             b"%00", b"?", b"#", b"Content-Length: 5\r\nContent-Length: 6", "é".encode(), b"Host"]  # fmt: skip
    kind = random_.randrange(4)
    if kind == 0:
        return b"".join(random_.choices(parts, k=random_.randrange(1, 20)))
    good = bytearray(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 15\r\nAccept: */*")  # fmt: skip
    for _ in range(random_.randrange(1, 5)):
        at = random_.randrange(len(good))
        if kind == 1:
            good[at] = random_.randrange(256)
        elif kind == 2:
            good[at:at] = random_.choice(parts)
        else:
            del good[at : at + random_.randrange(1, 9)]
    return bytes(good)


def hostile_body(random_: random.Random) -> bytes:
    """A request's body: fields with values of every kind, sometimes not even JSON."""

    def value(depth=0):
        kind = random_.randrange(12 if depth < 3 else 9)
        return [
            None, True, random_.choice([0, -1, 1, 2, 2**31, 2**63, 10**30]), random_.choice([0.5, -0.0, 1e308, 5e-324]),
            "".join(random_.choices(string.printable, k=random_.randrange(8))), "\U0001f600\ud7ff", "1+2=", [2, 11, 3], 4,
        ][kind] if kind < 9 else [value(depth + 1) for _ in range(random_.randrange(4))] if kind < 11 else {
            random_.choice(["a", "role", "content", "type"]): value(depth + 1) for _ in range(random_.randrange(3))
        }  # fmt: skip

    names = [name for name, _ in FIELDS] + ["prompts", "messages", "shape", "tensors", "port", "name", "dtype"]
    body = {random_.choice(names): value() for _ in range(random_.randrange(6))}
    if random_.random() < 0.7:
        body["prompt"] = random_.choice(["1+2=", [2, 3], ["1", "2"], value()])
    text = bytearray(json.dumps(body).encode())
    if random_.random() < 0.3 and text:
        text[random_.randrange(len(text))] = random_.randrange(256)
    return bytes(text)


def fuzz_parsers(cases: int, seed: int) -> int:
    random_, good = random.Random(seed), 0
    for case in range(cases):
        if case == cases // 4:
            before = resident("VmRSS")
        try:
            head = parse_head(hostile_head(random_))
            assert isinstance(head, Head) and 0 <= head.length < 10**12 and head.path.startswith("/")
            assert "transfer-encoding" not in head.headers and all(c not in v for v in head.headers.values() for c in "\r\n\0")
            good += 1
        except Refused as refused:
            assert 400 <= refused.status < 506 and HTTPStatus(refused.status)
        try:
            fields = Fields(hostile_body(random_))
            fields.take("prompt", (str, list), MUST, of=(str, list, int))
            fields.take("n", int, 1, 1, 8), fields.take("temperature", float, 1.0), fields.take("stop", (str, list), of=str)
            fields.done()
            good += 1
        except Refused as refused:
            assert refused.status == 400 and len(str(refused)) < 500
    assert resident("VmRSS") - before < 2**22, "what is refused is forgotten"
    return good


def test_a_few_thousand_hostile_requests():
    assert fuzz_parsers(3000, 0) > 100, "the fuzzer has to get somewhere"


@pytest.mark.slow
def test_a_hundred_thousand_hostile_requests():
    assert fuzz_parsers(100_000, 1) > 3000


def fuzz_routes(server, cases: int, seed: int) -> set[int]:
    """Whole requests over one socket after the other, to all routes, until the answer: always one, and never a 500."""
    random_, statuses, before = random.Random(seed), set(), 0
    paths = [path for method, path in Connection.routes if method == "POST" and "communicator" not in path]
    for case in range(cases):
        before = resident("VmRSS") if case == cases // 4 else before
        body = hostile_body(random_)
        path = random_.choice(paths)
        if path == "/weights/meet":
            continue
        head = (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n").encode()  # fmt: skip
        answer = raw(server.url, head + body)
        statuses.add(int(answer[9:12]))
        assert statuses <= {200, 400, 404, 409, 429}, (path, body, answer)
    settled(server)
    assert resident("VmRSS") - before < 2**24, "no request leaves anything behind"
    return statuses


def test_hostile_requests_to_every_route(server):
    assert {200, 400} <= fuzz_routes(server, 300, 2)


@pytest.mark.slow
def test_thousands_of_hostile_requests_to_every_route(server):
    assert {200, 400} <= fuzz_routes(server, 10_000, 3)


def test_every_row_of_the_table_has_its_tests():
    rows = re.split(r"\n    (?=[SP]\d)", __doc__)[1:]
    assert [row.split()[0] for row in rows] == [f"S{i}" for i in range(1, 15)] + [f"P{i}" for i in range(1, 6)]
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for row in rows:
        names = re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b(?!\.py)", row)
        assert names and all(f"def test_{name}(" in written for name in names), row
