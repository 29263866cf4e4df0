"""The generation engine behind HTTP, for the openai package, for TRL's client and for `rollout_client`.

    python -m minitrl.server --model FOLDER                        (torchrun -m minitrl.server is the same)
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "2 + 2 =", "seed": 1}'

One thread owns the engine. A connection has a thread of its own, which reads and checks a request, hands it over
between two steps of the engine, and waits; nothing that comes over a socket runs in the engine's thread but checked
numbers. New weights (`transfer`) are received beside the old ones, which serve until the set is whole and verified, and
are put in place between two steps, without a request being dropped; every token is told with the version it is from.

Whoever can connect is taken for hostile. Without a key the server listens on loopback alone, and only to requests that
name it so; with a key, on every route. HTTP is read here, strictly: a request is a line, bounded headers and, told by
Content-Length alone, a bounded body of strict JSON, each within its time. Fields that are not known, or that would have
to be ignored, are refused by name. When connections run out, the one that has kept its request back longest is closed.
"""

import hmac
import ipaddress
import json
import os
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch

from . import checkpoint, data, distributed, runs, transfer
from .config import parse, require
from .model import hf_tensors
from .rollout import Engine, context_length
from .sampling import Sampling

MAX_HEAD, MAX_HEADERS = 16 * 1024, 64  # bytes and lines
HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS, SEND_SECONDS = 10.0, 60.0, 60.0, 30.0
BODIES = 8  # so many of the largest bodies may be held at a time
REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 411: "Length Required", 413: "Content Too Large",
    415: "Unsupported Media Type", 421: "Misdirected Request", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}  # fmt: skip

# Fields that are refused unless they ask for what is done anyway. None asks for nothing.
NEUTRAL = {
    "presence_penalty": [0], "frequency_penalty": [0], "best_of": [1], "echo": [False], "suffix": [""],
    "logit_bias": [{}], "tools": [[]], "tool_choice": ["none"], "functions": [[]], "function_call": ["none"],
    "response_format": [{"type": "text"}], "guided_decoding_regex": [], "guided_regex": [], "guided_json": [],
    "structured_outputs": [], "stop_token_ids": [[]], "skip_special_tokens": [True], "prompt_logprobs": [],
    "include_stop_str_in_output": [False], "top_logprobs": [0], "modalities": [["text"]], "images": [], "audio": [],
    "chat_template": [], "chat_template_kwargs": [{}], "add_generation_prompt": [True], "stream_options": [],
    "max_completion_length": [], "truncate_prompt_tokens": [], "use_beam_search": [False], "allowed_token_ids": [],
}  # fmt: skip


@dataclass
class Config:
    """Serve a language model over HTTP: OpenAI's completions, TRL's generation server, weights from a trainer."""

    model: str  # folder with a Hugging Face checkpoint, or a Hub id
    served_model_name: str | None = None  # what clients call it; none: as --model says
    host: str = "127.0.0.1"  # address to listen on; others than loopback need a key
    port: int = 8000  # 0: any that is free
    api_key: str | None = None  # bearer key for every route; better in the variable MINITRL_API_KEY, or in a file
    api_key_file: str | None = None  # file that holds the key
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    tensor_parallel_size: int = 1  # only 1 is built
    max_batch: int = 64  # sequences decoded at a time
    cache_gib: float | None = None  # bound of the key/value cache; none: as the load needs
    prefill_tokens: int = 4096  # tokens of prompts computed in a step at most
    max_queue: int = 4096  # sequences waiting or running, beyond which requests are told to come back (429)
    max_prompts: int = 1024  # in a request
    max_n: int = 256  # completions of a prompt
    max_body_mib: float = 8.0  # size of a request
    max_connections: int = 256  # open at a time
    transfer_timeout: float = 300.0  # seconds that a weight update waits for its sender
    drain_timeout: float = 30.0  # seconds that running requests get to finish after SIGTERM

    def __post_init__(self):
        require(self.tensor_parallel_size == 1, "tensor_parallel_size", self.tensor_parallel_size, "1: one process "
                "holds the model; for more throughput start several servers")
        require(0 <= self.port < 65536, "port", self.port, "from 0 to 65535")
        for name in "max_batch prefill_tokens max_queue max_prompts max_n max_connections".split():
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in "max_body_mib transfer_timeout drain_timeout".split():
            require(0 < getattr(self, name) <= 1e6, name, getattr(self, name), "above 0 and at most 1e6")
        require(self.api_key is None or self.api_key_file is None, "api_key_file", self.api_key_file, "the only key")
        self.key = self.api_key or os.environ.get("MINITRL_API_KEY")  # not a field: it is never shown
        if self.api_key_file is not None:
            self.key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        given = self.key is not None or self.api_key_file is not None
        if given and not (re.fullmatch(r"[!-~]+", self.key or "") and len(self.key) >= 16):
            raise ValueError("--api_key: at least 16 printable ASCII characters without spaces, for example "
                             "`python -c 'import secrets; print(secrets.token_urlsafe())'`")
        require(is_loopback(self.host) or self.key, "host", self.host, "127.0.0.1 or localhost where there is no key; "
                "set MINITRL_API_KEY, or --api_key_file, to listen elsewhere")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


class Refused(Exception):
    """A request that is answered with an error: status, what is wrong, and which field."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers


@dataclass(frozen=True)
class Head:
    """A request without its body."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    length: int  # of the body
    keep_alive: bool


def parse_head(head: bytes) -> Head:
    """The request line and headers, without the empty line. Refused where two readers could read them differently."""
    lines = head.split(b"\r\n")
    match = re.fullmatch(rb"([A-Z]{3,10}) (/[!-~]*) HTTP/(\d\.\d)", lines[0])
    if not match:
        raise Refused(400, "not a request line")
    method, target, version = (part.decode() for part in match.groups())
    if version not in ("1.0", "1.1"):
        raise Refused(505, "only HTTP/1.0 and 1.1 are spoken")
    if len(lines) > MAX_HEADERS + 1:
        raise Refused(431, f"more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        match = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([ -~\t\x80-\xff]*)", line)
        if not match:
            raise Refused(400, "not a header line")
        name, value = match[1].decode().lower(), match[2].decode("latin-1").strip(" \t")
        if name in headers and name in ("host", "content-length", "content-type", "authorization", "expect", "origin"):
            raise Refused(400, f"the header {name} stands twice")
        headers[name] = value
    if "transfer-encoding" in headers:
        raise Refused(400, "Transfer-Encoding is not read; send a Content-Length")
    if "content-encoding" in headers:
        raise Refused(415, "Content-Encoding is not read; send the body as it is")
    if version == "1.1" and "host" not in headers:
        raise Refused(400, "the header host is missing")
    length = headers.get("content-length")
    if length is not None and not re.fullmatch(r"[0-9]{1,12}", length):
        raise Refused(400, "Content-Length is not a number")
    if length is None and method == "POST":
        raise Refused(411, "Content-Length is missing")
    if method != "POST" and int(length or 0):
        raise Refused(400, f"{method} with a body")
    if "?" in target:
        raise Refused(400, "a query is not read; parameters go into the body")
    connection = headers.get("connection", "keep-alive" if version == "1.1" else "close").lower()
    return Head(method, target.rstrip("/") or "/", headers, int(length or 0), "close" not in connection)


class Fields:
    """The fields of a request: each is taken by name and checked, and what nobody has taken is refused."""

    def __init__(self, body: bytes):
        try:
            self.left = data._parse(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not a JSON object: {str(error)[:200]}") from None
        self.known = []

    def take(self, name: str, kinds, default=None, low=None, high=None, of=None, required: bool = False):
        """The value; `default` where it is absent or null. kinds: its types, and `of` those of a list's elements."""
        self.known.append(name)
        value = self.left.pop(name, None)
        if value is None:
            if required:
                raise Refused(400, f"{name}: required", name)
            return default
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        good = _is(value, kinds) and (of is None or not isinstance(value, list) or all(_is(v, of) for v in value))
        if good and (low is None or low <= value) and (high is None or value <= high):
            return value
        wanted = " or ".join(kind.__name__ for kind in kinds)
        between = "" if low is None and high is None else f" from {low} to {high}"
        raise Refused(400, f"{name}: must be {wanted}{between}, not {str(value)[:80]!r}", name)

    def done(self) -> None:
        """Refuse what is left, unless it is neutral."""
        for name, value in self.left.items():
            if name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    raise Refused(400, f"{name}: not supported here; leave it out", name)
                continue
            near = get_close_matches(name, self.known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Refused(400, f"{name[:80]}: no such field{hint}", name[:80])


def _is(value, kinds) -> bool:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int) and abs(value) < 2**53)


class Job:
    """One HTTP request's requests to the engine. The engine's thread calls `on_token`, the connection's waits."""

    def __init__(self, streams: bool):
        self.requests, self.open, self.size, self.error = [], 0, 0, None
        self.done, self.events = threading.Event(), queue.SimpleQueue() if streams else None

    def on_token(self, p: int):
        def told(g: int, token: int, logprob: float, reason: str | None) -> None:
            if self.events:
                self.events.put((p, g, token, logprob, reason))
            self.open -= reason is not None
            if self.open == 0:
                self.end()

        return told

    def end(self, error: str | None = None) -> None:
        self.error = error
        self.done.set()
        if self.events:
            self.events.put(None)


class Worker(threading.Thread):
    """The thread that owns the engine: steps while there is work, and runs what others ask for between steps."""

    def __init__(self, engine: Engine, max_queue: int):
        super().__init__(name="engine", daemon=True)
        self.engine, self.max_queue, self.jobs, self.inbox = engine, max_queue, set(), queue.SimpleQueue()
        self.tensors = {name: p.detach() for name, p in engine.model.named_parameters()}
        self.version, self.digest, self.pending = 0, transfer.digest(self.tensors), 0

    def call(self, function, *arguments):
        """function(*arguments) in the engine's thread; what it returns or raises."""
        future = Future()
        self.inbox.put((future, function, arguments))
        while True:
            try:
                return future.result(timeout=5)
            except TimeoutError:
                if not self.is_alive():
                    raise Refused(503, "the engine has stopped") from None

    def stop(self) -> None:
        self.inbox.put(None)

    def run(self) -> None:
        while True:
            while self.engine.idle or not self.inbox.empty():
                if (item := self.inbox.get()) is None:
                    return
                future, function, arguments = item
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            try:
                self.engine.step()
            except Exception:  # such as logits that are not finite: those requests fail, the server goes on
                traceback.print_exc()
                for job in list(self.jobs):
                    self.close(job, "the engine failed on this batch; the server's log says why")
            for job in [job for job in self.jobs if job.done.is_set()]:
                self.close(job)

    def submit(self, job: Job, prompts: list[list[int]], seeds: list[int], weights: str | None, options: dict) -> None:
        """Queue all of a job's requests, or none of them."""
        size = len(prompts) * options["n"]
        if weights not in (None, self.digest):
            raise Refused(409, f"weights: the server holds {self.digest} (version {self.version})", "weights")
        if self.pending + size > self.max_queue:
            raise Refused(429, f"{self.pending} sequences wait or run, and {size} more are above --max_queue",
                          **{"Retry-After": "1"})
        job.open = job.size = size
        self.pending += size
        self.jobs.add(job)
        try:
            for p, (prompt, seed) in enumerate(zip(prompts, seeds)):
                job.requests.append(self.engine.submit(prompt, seed=seed, on_token=job.on_token(p), **options))
        except BaseException:
            self.close(job)
            raise

    def close(self, job: Job, error: str | None = None) -> None:
        """Forget a job; what still runs of it is aborted."""
        if job in self.jobs:
            self.jobs.remove(job)
            self.pending -= job.size
            for request in job.requests if job.open else ():
                self.engine.abort(request)
            if not job.done.is_set():
                job.end(error)

    def install(self, new: dict, version: int, digest: str) -> None:
        """Put a whole, verified set of weights in place."""
        transfer.install(new, self.tensors)
        self.version, self.digest = version, digest
        self.engine.weights_changed(version)


class Weights:
    """New weights: from our trainer as one verified set, from TRL 0.16.0's client tensor by tensor."""

    def __init__(self, worker: Worker, config: Config):
        self.worker, self.config = worker, config
        self.bridge, self.lock = None, threading.Lock()
        self.device = next(iter(worker.tensors.values())).device
        self.places = hf_tensors(worker.engine.model.config)
        self.named, self.line = {}, ThreadPoolExecutor(1)  # TRL's: what has come so far, one after the other

    @contextmanager
    def alone(self):
        """One meeting or update at a time; the bridge is lost with whatever fails on it."""
        if not self.lock.acquire(blocking=False):
            raise Refused(409, "another weight update is under way")
        try:
            yield
        except BaseException as error:
            self.close()  # whoever sends learns it at once
            if isinstance(error, ConnectionError):
                raise Refused(409, f"the update failed, the old weights serve on: {error}") from None
            raise
        finally:
            self.lock.release()

    def close(self) -> None:
        bridge, self.bridge, self.named = self.bridge, None, {}
        if bridge:
            bridge.close()

    def meet(self, host: str, port: int, rank: int, size: int, generation: int, secret: str = "", listener=None):
        """Join a bridge, in place of the one before."""
        with self.alone():
            self.close()
            self.bridge = transfer.Bridge(host, port, rank, size, generation=generation, secret=secret,
                                          device=self.device, timeout_s=self.config.transfer_timeout, listener=listener)

    def update(self, generation: int, version: int, tensors) -> None:
        """Receive a whole set from rank 0; raises Refused, and nothing has changed, where it does not fit or come."""
        with self.alone():
            if self.bridge is None or self.bridge.generation != generation:
                raise Refused(409, f"generation {generation} has no bridge here; meet first", "generation")
            try:
                transfer.check(tensors, self.worker.tensors)
            except ValueError as error:
                raise Refused(400, str(error), "tensors") from None
            new, digest = transfer.receive(self.bridge, self.worker.tensors)
            self.worker.call(self.worker.install, new, version, digest)

    def start_trl(self, port: int) -> None:
        """TRL's client is rank 1 and comes to us. The answer goes out before the meeting, as it expects."""
        try:
            listener = transfer.listen(self.config.host, port)
        except OSError as error:
            raise Refused(409, f"port: {error.strerror}", "port") from None
        self.line.submit(self.aside, lambda: self.meet(self.config.host, port, 0, 2, 0, listener=listener))

    def start_tensor(self, name: str, dtype: str, shape: list[int]) -> None:
        """Announces one tensor, by its name in the checkpoint; received after the answer. The last one installs all."""
        if name not in self.places or list(self.places[name][2]) != shape:
            raise Refused(400, f"name: no tensor {name[:200]} of shape {shape[:8]} in this model", "name")
        if (kind := dtype.removeprefix("torch.")) not in ("bfloat16", "float16", "float32"):
            raise Refused(400, "dtype: torch.bfloat16, torch.float16 or torch.float32", "dtype")
        self.line.submit(self.aside, lambda: self.tensor(name, getattr(torch, kind), shape))

    def aside(self, action) -> None:
        try:
            action()
        except Exception as error:
            print(f"weights: {error}", file=sys.stderr, flush=True)

    def tensor(self, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        with self.alone():
            if self.bridge is None:
                raise Refused(409, "no communicator: the client did not come, or was lost")
            received = torch.empty(shape, dtype=dtype, device=self.device)
            self.bridge.finish(self.bridge.broadcast(received, 1), f"receiving {name}")
            self.named[name] = received
            if len(self.named) == len(self.places):
                new = {ours: torch.empty_like(tensor) for ours, tensor in self.worker.tensors.items()}
                for theirs, (ours, rows, _) in self.places.items():
                    new[ours][rows or slice(None)].copy_(self.named[theirs])
                self.named = {}
                version, digest = self.worker.version + 1, transfer.digest(new)
                self.worker.call(self.worker.install, new, version, digest)
            # vLLM's barrier: the client goes on when we have it.
            self.bridge.finish(self.bridge.broadcast(received.new_ones(1, dtype=torch.uint8), 0), "answering")


class Text:
    """A completion's text as it grows: what may still become a stop string, or half a character, is held back."""

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop, self.ids, self.text, self.sent = tokenizer, stop, [], "", 0
        self.context = self.read = 0

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.ids.append(token)
        before, after = (self.tokenizer.decode(self.ids[self.context : end]) for end in (self.read, None))
        if after.endswith("\ufffd"):
            return ""
        self.text, self.context, self.read = self.text + after[len(before) :], self.read, len(self.ids)
        ends = [k for string in self.stop for k in range(1, len(string) + 1) if self.text.endswith(string[:k])]
        new = self.text[self.sent : len(self.text) - max(ends, default=0)]
        self.sent += len(new)
        return new

    def finish(self, whole: str) -> str:
        """What is left, once the engine has said what all of the text is."""
        return whole[self.sent :] if whole.startswith(self.text[: self.sent]) else ""


class Connection(socketserver.BaseRequestHandler):
    """One connection: requests one after the other."""

    server: "Server"

    def handle(self) -> None:
        self.buffer, keep = b"", True
        while keep:
            try:
                head = self.read_head()
                keep = head.keep_alive
                self.check(head)
                self.route(head)
            except Refused as refused:
                # What was not read would be taken for the next request; what was read and refused breaks nothing.
                keep = keep and refused.status in (400, 404, 409, 429) and self.clean
                self.fail(refused, keep)
            except (ConnectionError, TimeoutError):
                return
            except Exception:
                traceback.print_exc()  # never to the client: it may hold paths and addresses
                keep = False
                self.fail(Refused(500, "internal error; the server's log says more"), keep)

    def read_head(self) -> Head:
        self.clean = False
        self.receive(lambda: self.buffer, time.monotonic() + IDLE_SECONDS)
        end = self.receive(lambda: b"\r\n\r\n" in self.buffer, time.monotonic() + HEAD_SECONDS, MAX_HEAD)
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if end > MAX_HEAD and len(head) > MAX_HEAD:
            raise Refused(431, f"more than {MAX_HEAD} bytes of headers")
        return parse_head(head)

    def receive(self, complete, deadline: float, limit: float = float("inf")) -> int:
        """Read until `complete()`; the number of bytes. Meanwhile the server may close the connection to make room."""
        with self.server.waiting(self.request):
            while not complete():
                if len(self.buffer) > limit:
                    raise Refused(431, f"more than {limit} bytes of headers")
                self.request.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    received = self.request.recv(65536)
                except TimeoutError:
                    if not self.buffer:
                        raise
                    raise Refused(408, "the request did not come in time") from None
                if not received:
                    raise ConnectionAbortedError
                self.buffer += received
        return len(self.buffer)

    def check(self, head: Head) -> None:
        """Who may ask at all: before the body is read, and for every route, known or not."""
        config, headers = self.server.config, head.headers
        if config.key:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {config.key}".encode()):
                raise Refused(401, "a bearer key is needed, and this is not it", **{"WWW-Authenticate": "Bearer"})
        else:  # a web page may lead a browser here, by a name of its own or from elsewhere
            name = re.sub(r":\d*$", "", headers.get("host", "localhost"))
            if not is_loopback(name) and name != config.host:
                raise Refused(421, "host: not a name of this machine; a server without a key answers to localhost")
            if "origin" in headers:
                raise Refused(403, "origin: web pages are not served without a key")
        if head.length > config.max_body_mib * 2**20:
            raise Refused(413, f"the body is larger than {config.max_body_mib} MiB (--max_body_mib)")
        if head.length and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "content-type: must be application/json")

    def route(self, head: Head) -> None:
        methods = {path: method for method, path in ROUTES}
        if head.path not in methods:
            raise Refused(404, "no such route")
        if methods[head.path] != head.method:
            raise Refused(405, f"{head.path}: takes {methods[head.path]}", Allow=methods[head.path])
        with self.server.body(head.length):
            if head.headers.get("expect", "").lower() == "100-continue":
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.receive(lambda: len(self.buffer) >= head.length, time.monotonic() + BODY_SECONDS)
            body, self.buffer, self.clean = self.buffer[: head.length], self.buffer[head.length :], True
            fields = Fields(body or b"{}")
        self.keep_alive = head.keep_alive
        answer = ROUTES[head.method, head.path](self, fields)
        if answer is not None:
            self.answer(200, answer, head.keep_alive)

    def send(self, content: bytes) -> None:
        self.request.settimeout(SEND_SECONDS)
        self.request.sendall(content)

    def answer(self, status: int, content: dict | str, keep: bool, **headers: str) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        self.send(self.head(status, keep, headers) + body)

    def head(self, status: int, keep: bool, headers: dict[str, str]) -> bytes:
        headers = headers | {"Connection": "keep-alive" if keep else "close", "X-Content-Type-Options": "nosniff"}
        lines = [f"HTTP/1.1 {status} {REASONS[status]}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def fail(self, refused: Refused, keep: bool) -> None:
        kind = "server_error" if refused.status >= 500 else "invalid_request_error"
        error = {"message": str(refused), "type": kind, "param": refused.param, "code": refused.status}
        with suppress(OSError):
            self.answer(refused.status, {"error": error}, keep, **refused.headers)
            if not keep:  # let the answer arrive: closing with bytes unread would reset the connection under it
                self.request.shutdown(socket.SHUT_WR)
                self.request.settimeout(1)
                for _ in range(16):
                    if not self.request.recv(65536):
                        break

    def gone(self) -> bool:
        """Whether the client has closed its side: nobody waits for the answer then."""
        with suppress(OSError):
            ready = select.select([self.request], [], [], 0)[0]
            return bool(ready) and not self.request.recv(1, socket.MSG_PEEK)
        return True

    # The routes: each takes the fields, and returns the answer or has sent it.

    def health(self, fields: Fields):
        if self.server.draining or not self.server.worker.is_alive():
            raise Refused(503, "stopping" if self.server.draining else "the engine has stopped")
        return {"status": "ok"}

    def models(self, fields: Fields):
        limit = context_length(self.server.worker.engine.model.config)
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "minitrl"}
        return {"object": "list", "data": [model | {"max_model_len": limit}]}

    def completions(self, fields: Fields):
        logprobs = fields.take("logprobs", (int, bool))
        if logprobs not in (None, False, 0):
            raise Refused(400, "logprobs: 0 gives the sampled tokens' own; those of others are not kept", "logprobs")
        with_logprobs = logprobs is not None and logprobs is not False
        prompt = fields.take("prompt", (str, list), of=(str, list, int), required=True)
        one = isinstance(prompt, str) or (prompt and not any(isinstance(part, (str, list)) for part in prompt))
        prompts = [prompt] if one else prompt
        return self.complete(fields, prompts, "text_completion", with_logprobs, 16)

    def chat(self, fields: Fields):
        with_logprobs = fields.take("logprobs", bool, False)
        messages = fields.take("messages", list, of=dict, required=True)
        most = fields.take("max_completion_tokens", int, None, 1, 2**31)
        try:
            messages = data._checked_prompt({"prompt": messages})
        except ValueError as error:
            raise Refused(400, f"messages: {error}", "messages") from None
        return self.complete(fields, [messages], "chat.completion", with_logprobs, most)

    def complete(self, fields: Fields, prompts: list, kind: str, with_logprobs: bool, max_tokens: int | None):
        """Sample, and answer in OpenAI's form: at once, or as server-sent events."""
        model = fields.take("model", str, self.server.name)
        if model != self.server.name:
            raise Refused(404, f"model: {self.server.name} is served here", "model")
        stream, with_ids = fields.take("stream", bool, False), fields.take("return_token_ids", bool, False)
        as_ids = fields.take("return_tokens_as_token_ids", bool, False)
        fields.take("user", str)
        usage_too = not stream or (fields.take("stream_options", dict, {}) or {}).get("include_usage") is True
        prompts, job, options = self.submit(fields, prompts, max_tokens, stream)
        tokenizer = self.server.worker.engine.tokenizer

        def logprobs_of(ids: list[int], values: list[float]) -> dict | None:
            if not with_logprobs:
                return None
            names = [f"token_id:{i}" if as_ids else tokenizer.decode([i], skip_special_tokens=False) for i in ids]
            if kind == "chat.completion":
                content = zip(names, values, strict=True)
                return {"content": [
                    {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in content
                ]}  # fmt: skip
            return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": None}

        def choice(p: int, g: int, text: str, ids: list, logprobs: list, reason: str | None, first: bool) -> dict:
            choice = {"index": p * options["n"] + g, "finish_reason": reason, "logprobs": logprobs_of(ids, logprobs)}
            if kind == "text_completion":
                choice["text"] = text
            elif stream:
                choice["delta"] = ({"role": "assistant"} if first else {}) | {"content": text}
            else:
                choice["message"] = {"role": "assistant", "content": text}
            if with_ids:
                choice |= {"token_ids": ids} | ({"prompt_token_ids": prompts[p]} if first else {})
            if reason:
                choice["weight_versions"] = job.requests[p].results[g].versions  # [[version, from token, to token]]
            return choice

        def whole(choices: list[dict], usage: dict | None) -> dict:
            shape = f"{kind}.chunk" if stream and kind == "chat.completion" else kind
            base = {"id": name, "object": shape, "created": created, "model": model, "choices": choices}
            return base | ({"usage": usage} if usage_too else {})

        name, created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        pairs = [(p, g) for p in range(len(prompts)) for g in range(options["n"])]
        try:
            if not stream:
                self.wait(job)
                results = {(p, g): job.requests[p].results[g] for p, g in pairs}
                choices = [choice(*at, r.text, r.ids, r.logprobs, r.finish_reason, True) for at, r in results.items()]
                return whole(choices, self.usage(prompts, job))
            texts = {at: Text(tokenizer, options["stop"]) for at in pairs}
            headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "Transfer-Encoding": "chunked"}
            self.send(self.head(200, self.keep_alive, headers))
            while (event := self.next_event(job)) is not None:
                p, g, token, logprob, reason = event
                text = texts[p, g]
                first, new = not text.ids, text.add(token)
                if reason:
                    new += text.finish(job.requests[p].results[g].text)
                self.event(whole([choice(p, g, new, [token], [logprob], reason, first)], None))
            if job.error:
                self.event({"error": {"message": job.error, "type": "server_error", "param": None, "code": 500}})
            elif usage_too:
                self.event(whole([], self.usage(prompts, job)))
            self.event("[DONE]")
            self.send(b"0\r\n\r\n")
        finally:
            self.server.worker.call(self.server.worker.close, job)

    def submit(self, fields: Fields, prompts: list, max_tokens: int | None, stream: bool):
        """(ids of the prompts, job, options): all fields that say how to sample, checked, and the engine at work."""
        server, take = self.server, fields.take
        config, engine = server.config, server.worker.engine
        most = len(prompts)
        if not 0 < most <= config.max_prompts:
            raise Refused(400, f"prompt: from 1 to {config.max_prompts} prompts (--max_prompts), not {most}", "prompt")
        n = take("n", int, 1, 1, config.max_n)
        max_tokens = take("max_tokens", int, max_tokens, 1, 2**31)
        min_tokens, ignore_eos = take("min_tokens", int, 0, 0, 2**31), take("ignore_eos", bool, False)
        stop = take("stop", (str, list), [], of=str)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if len(stop) > 16 or not all(0 < len(string) <= 256 for string in stop):
            raise Refused(400, "stop: at most 16 strings of 1 to 256 characters", "stop")
        numbers = {name: take(name, float, 1.0) for name in ("temperature", "top_p", "repetition_penalty")}
        numbers |= {"min_p": take("min_p", float, 0.0), "top_k": take("top_k", int, 0, -1, 2**31)}
        seed, weights = take("seed", (int, list), of=int), take("weights", str)
        fields.done()
        if isinstance(seed, list) and len(seed) != most:
            raise Refused(400, f"seed: an integer, or one for each of the {most} prompts", "seed")
        # Without a seed nobody is to draw the same twice.
        seeds = [secrets.randbits(63) for _ in prompts] if seed is None else seed
        seeds = seeds if isinstance(seeds, list) else [seeds] * most
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise Refused(400, "seed: from 0 to 2^63 - 1", "seed")
        if server.draining:
            raise Refused(503, "the server is stopping", **{"Retry-After": "10"})
        job = Job(stream)
        try:
            options = {"n": n, "min_tokens": min_tokens, "stop": stop, "ignore_eos": ignore_eos}
            options["sampling"] = Sampling(**numbers)
            ids = [prompt if isinstance(prompt, list) and not any(isinstance(i, dict) for i in prompt)
                   else engine.tokenizer.prompt_ids(prompt) for prompt in prompts]  # fmt: skip
            room = context_length(engine.model.config) - max(map(len, ids))
            options["max_tokens"] = max_tokens or max(room, 1)
            server.worker.call(server.worker.submit, job, ids, seeds, weights, options)
        except ValueError as error:
            raise Refused(400, str(error)[:500], str(error).split()[0]) from None
        return ids, job, options

    def wait(self, job: Job) -> None:
        while not job.done.wait(0.5):
            if self.gone():
                raise ConnectionAbortedError
        if job.error:
            raise Refused(500, job.error)

    def next_event(self, job: Job):
        while True:
            with suppress(queue.Empty):
                return job.events.get(timeout=0.5)
            if self.gone():
                raise ConnectionAbortedError

    def event(self, content: dict | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
        body = f"data: {text}\n\n".encode()
        self.send(f"{len(body):x}\r\n".encode() + body + b"\r\n")

    def usage(self, prompts: list[list[int]], job: Job) -> dict:
        prompt = sum(map(len, prompts))
        sampled = sum(len(result.ids) for request in job.requests for result in request.results)
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    def generate(self, fields: Fields):
        """TRL 0.16.0: ids alone, prompt-major."""
        prompts = fields.take("prompts", list, of=str, required=True)
        _, job, _ = self.submit(fields, prompts, 16, False)
        try:
            self.wait(job)
        finally:
            self.server.worker.call(self.server.worker.close, job)
        return {"completion_ids": [result.ids for request in job.requests for result in request.results]}

    def parallel(self, fields: Fields):
        return {"tensor_parallel_size": 1}

    def init_communicator(self, fields: Fields):
        fields.take("host", str), fields.take("world_size", int)  # TRL's server does not heed them either
        port = fields.take("port", int, required=True, low=1, high=65535)
        fields.done()
        self.server.weights.start_trl(port)
        return {"message": "Request received, initializing communicator"}

    def update_named_param(self, fields: Fields):
        name, dtype = fields.take("name", str, required=True), fields.take("dtype", str, required=True)
        shape = fields.take("shape", list, of=int, required=True)
        fields.done()
        self.server.weights.start_tensor(name, dtype, shape)
        return {"message": "Request received, updating named parameter"}

    def reset_prefix_cache(self, fields: Fields):
        worker = self.server.worker
        worker.call(lambda: worker.engine.weights_changed(worker.version))
        return {"message": "Request received, resetting prefix cache status: True"}

    def close_communicator(self, fields: Fields):
        self.server.weights.close()
        return {"message": "Request received, closing communicator"}

    def weights(self, fields: Fields):
        worker, bridge = self.server.worker, self.server.weights.bridge
        generation = bridge.generation if bridge else None
        return {"version": worker.version, "digest": worker.digest, "generation": generation,
                "tensors": transfer.describe(worker.tensors)}  # fmt: skip

    def weights_meet(self, fields: Fields):
        host, port = fields.take("host", str, required=True), fields.take("port", int, None, 1, 65535, required=True)
        rank, size = (fields.take(name, int, None, 1, 4096, required=True) for name in ("rank", "size"))
        generation = fields.take("generation", int, None, 0, 2**53, required=True)
        secret = fields.take("secret", str, "")
        fields.done()
        self.server.weights.meet(host, port, rank, size, generation, secret)
        return {"generation": generation}

    def weights_update(self, fields: Fields):
        generation, version = (fields.take(name, int, None, 0, 2**53, required=True) for name in ("generation", "version"))
        tensors = fields.take("tensors", list, required=True)
        fields.done()
        self.server.weights.update(generation, version, tensors)
        return {"version": self.server.worker.version, "digest": self.server.worker.digest}


ROUTES = {
    ("GET", "/health"): Connection.health,
    ("GET", "/v1/models"): Connection.models,
    ("POST", "/v1/completions"): Connection.completions,
    ("POST", "/v1/chat/completions"): Connection.chat,
    ("GET", "/weights"): Connection.weights,
    ("POST", "/weights/meet"): Connection.weights_meet,
    ("POST", "/weights/update"): Connection.weights_update,
    ("GET", "/get_tensor_parallel_size"): Connection.parallel,
    ("POST", "/generate"): Connection.generate,
    ("POST", "/init_communicator"): Connection.init_communicator,
    ("POST", "/update_named_param"): Connection.update_named_param,
    ("POST", "/reset_prefix_cache"): Connection.reset_prefix_cache,
    ("POST", "/close_communicator"): Connection.close_communicator,
}


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accepts connections, and bounds what they hold."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128

    def __init__(self, config: Config, engine: Engine):
        self.config, self.name, self.draining = config, config.served_model_name or config.model, False
        self.lock, self.open, self.idle, self.held = threading.Lock(), 0, {}, 0
        self.address_family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((config.host, config.port), Connection)
        self.worker = Worker(engine, config.max_queue)
        self.weights = Weights(self.worker, config)
        self.worker.start()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextmanager
    def waiting(self, connection: socket.socket):
        """Inside, nothing is being done for the connection but to wait for its bytes."""
        with self.lock:
            self.idle.setdefault(connection, None)
        try:
            yield
        finally:
            with self.lock:
                self.idle.pop(connection, None)

    @contextmanager
    def body(self, length: int):
        """Memory for a body while it is read and parsed."""
        with self.lock:
            if self.held + length > BODIES * self.config.max_body_mib * 2**20:
                raise Refused(503, "too many large requests at once", **{"Retry-After": "1"})
            self.held += length
        try:
            yield
        finally:
            with self.lock:
                self.held -= length

    def process_request(self, request, client_address) -> None:
        with self.lock:
            self.open += 1
            crowded, oldest = self.open > self.config.max_connections, next(iter(self.idle), None)
            if crowded and oldest is not None:
                self.idle.pop(oldest)
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up and ends
        if crowded and oldest is None:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        with self.lock:
            self.open -= 1
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        traceback.print_exc()

    def drain(self) -> None:
        """Take no more work, finish what runs, stop."""
        self.draining, deadline = True, time.monotonic() + self.config.drain_timeout
        while self.worker.pending and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the last answers are being written
        self.shutdown()
        self.weights.close()
        self.worker.stop()


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    config = parse(Config, argv)
    world = distributed.start(config.device)
    if world.size > 1:
        raise ValueError(f"--nproc_per_node {world.size}: one process serves; start several servers, on several ports")
    model, tokenizer = checkpoint.load(config.model, getattr(torch, config.dtype), world.device)
    engine = Engine(model, tokenizer, max_batch=config.max_batch, cache_gib=config.cache_gib,
                    prefill_tokens=config.prefill_tokens)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(1) if stop.is_set() else stop.set())
    with Server(config, engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"serving {server.name} at {server.url}", flush=True)
        while not stop.wait(1):
            pass
        print("stopping: no new requests; a second signal ends this at once", flush=True)
        server.drain()
    return 0


if __name__ == "__main__":
    runs.command(main)
