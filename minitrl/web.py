"""HTTP read strictly, for a server that takes whoever can connect for hostile. It knows nothing of models.

A connection has a thread of its own. A request is a line, bounded headers and, told by Content-Length alone, a bounded
body of strict JSON, each within its time. Who asks is checked before what is asked, and fields that are not known, or
that would have to be ignored, are refused by name. When connections run out, the one that has kept its request back
longest is closed; when memory for bodies does, a client is told to come back.
"""

import hmac
import ipaddress
import json
import re
import select
import socket
import socketserver
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from http import HTTPStatus
from typing import NamedTuple

from . import data

MAX_HEAD, MAX_HEADERS = 16 * 1024, 64  # bytes and lines
HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS, SEND_SECONDS = 10.0, 60.0, 60.0, 30.0
BODIES = 8  # so many of the largest bodies may be held at a time
MUST = object()  # the default of a field that has to be there

# Fields that clients send although they ask for nothing: refused where they do ask for something, which null does not.
NEUTRAL = {
    "presence_penalty": [0], "frequency_penalty": [0], "best_of": [1], "echo": [False], "suffix": [""], "tools": [[]],
    "logit_bias": [{}], "tool_choice": ["none"], "response_format": [{"type": "text"}], "guided_decoding_regex": [],
    "structured_outputs": [], "prompt_logprobs": [], "skip_special_tokens": [True], "top_logprobs": [0],
}  # fmt: skip


class Refused(Exception):
    """A request that is answered with an error: status, what is wrong, and which field."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers


class Head(NamedTuple):
    """A request without its body."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    length: int  # of the body
    keep_alive: bool


def parse_head(head: bytes) -> Head:
    """The request line and headers, without the empty line. Refused where two readers could read them differently."""
    first, *lines = head.split(b"\r\n")
    match = re.fullmatch(rb"([A-Z]{3,10}) (/[!-~]*) HTTP/(\d\.\d)", first)
    if not match:
        raise Refused(400, "not a request line")
    method, target, version = (part.decode() for part in match.groups())
    if version not in ("1.0", "1.1"):
        raise Refused(505, "only HTTP/1.0 and 1.1 are spoken")
    if len(lines) > MAX_HEADERS:
        raise Refused(431, f"more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([ -~\t\x80-\xff]*)", line)
        if not match:
            raise Refused(400, "not a header line")
        name, value = match[1].decode().lower(), match[2].decode("latin-1").strip(" \t")
        if name in headers and name in ("host", "content-length", "content-type", "authorization", "expect", "origin"):
            raise Refused(400, f"the header {name} stands twice")
        headers[name] = value
    length = headers.get("content-length")
    for wrong, status, message in [
        ("transfer-encoding" in headers, 400, "Transfer-Encoding is not read; send a Content-Length"),
        ("content-encoding" in headers, 415, "Content-Encoding is not read; send the body as it is"),
        (version == "1.1" and "host" not in headers, 400, "the header host is missing"),
        (length is not None and not re.fullmatch(r"[0-9]{1,12}", length), 400, "Content-Length is not a number"),
        (length is None and method == "POST", 411, "Content-Length is missing"),
        (method != "POST" and length not in (None, "0"), 400, f"{method} with a body"),
        ("?" in target, 400, "a query is not read; parameters go into the body"),
    ]:
        if wrong:
            raise Refused(status, message)
    connection = headers.get("connection", "keep-alive" if version == "1.1" else "close").lower()
    return Head(method, target.rstrip("/") or "/", headers, int(length or 0), "close" not in connection)


class Fields:
    """The fields of a request: each is taken by name and checked, and what nobody has taken is refused."""

    def __init__(self, body: bytes):
        try:
            self.left, self.known = data.strict_json(body), []
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not a JSON object: {str(error)[:200]}") from None

    def take(self, name: str, kinds, default=None, low=None, high=None, of=None):
        """The value; `default` where it is absent or null. kinds: its types, and `of` those of a list's elements."""
        self.known.append(name)
        value = self.left.pop(name, None)
        if value is None:
            if default is MUST:
                raise Refused(400, f"{name}: required", name)
            return default
        good = _is(value, kinds) and (of is None or not isinstance(value, list) or all(_is(v, of) for v in value))
        if good and (low is None or low <= value) and (high is None or value <= high):
            return value
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        between = "" if low is None else f" from {low} to {high}"
        raise Refused(400, f"{name}: must be {wanted}{between}, not {str(value)[:80]!r}", name)

    def done(self) -> None:
        """Refuse what is left, unless it asks for nothing."""
        for name, value in self.left.items():
            if name not in NEUTRAL:
                near = [f"; did you mean {known}?" for known in get_close_matches(name, self.known, 1)]
                raise Refused(400, f"{name[:80]}: not supported here{''.join(near)}", name[:80])
            if value is not None and value not in NEUTRAL[name]:
                raise Refused(400, f"{name}: not supported here, leave it out", name)


def _is(value, kinds) -> bool:
    """isinstance, but a bool is no number, and an integer is a float."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int) and abs(value) < 2**53)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def error_of(status: int, message: str, param: str | None = None) -> dict:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Connection(socketserver.BaseRequestHandler):
    """One connection: requests one after the other."""

    routes: dict = {}  # (method, path) -> a function of the connection and the request's Fields; returns the answer

    def handle(self) -> None:
        self.buffer, self.keep = b"", True
        while self.keep:
            try:
                self.keep, whole = False, False  # what was not read would be taken for the next request
                head = self.read_head()
                self.check(head)
                fields = self.read_fields(head)
                self.keep = whole = head.keep_alive
                answer = self.routes[head.method, head.path](self, fields)
                if answer is not None:
                    self.answer(200, answer)
            except Refused as refused:
                self.keep = whole
                self.fail(refused)
            except (ConnectionError, TimeoutError):
                return
            except Exception:
                traceback.print_exc()  # never to the client: it may hold paths and addresses
                self.keep = False
                self.fail(Refused(500, "internal error; the server's log says more"))

    def read_head(self) -> Head:
        self.receive(lambda: self.buffer, IDLE_SECONDS)
        self.receive(lambda: b"\r\n\r\n" in self.buffer[: MAX_HEAD + 4] or len(self.buffer) > MAX_HEAD, HEAD_SECONDS)
        head, end, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if not end or len(head) > MAX_HEAD:
            raise Refused(431, f"more than {MAX_HEAD} bytes of headers")
        return parse_head(head)

    def receive(self, complete, seconds: float) -> None:
        """Read until `complete()`. Meanwhile the server may close the connection to make room for another."""
        deadline = time.monotonic() + seconds
        with self.server.waiting(self.request):
            while not complete():
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

    def check(self, head: Head) -> None:
        """Who may ask at all, and for what: before the body is read, and the key first."""
        server, headers = self.server, head.headers
        if server.key:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {server.key}".encode()):
                raise Refused(401, "a bearer key is needed, and this is not it", **{"WWW-Authenticate": "Bearer"})
        else:  # a web page may lead a browser here, by a name of its own or from elsewhere
            name = re.sub(r":\d*$", "", headers.get("host", "localhost").lower())
            if not is_loopback(name) and name not in (server.host, "0.0.0.0"):  # which TRL's client says for localhost
                raise Refused(421, "host: not a name of this machine; a server without a key answers to localhost")
            if "origin" in headers:
                raise Refused(403, "origin: web pages are not served without a key")
        methods = [method for method, path in self.routes if path == head.path]
        if not methods:
            raise Refused(404, "no such route")
        if head.method not in methods:
            raise Refused(405, f"{head.path}: takes {methods[0]}", Allow=methods[0])
        if head.length > server.max_body:
            raise Refused(413, f"the body is larger than {server.max_body} bytes (--max_body_mib)")
        if head.length and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "content-type: must be application/json")

    def read_fields(self, head: Head) -> Fields:
        with self.server.body(head.length):
            if head.headers.get("expect", "").lower() == "100-continue":
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.receive(lambda: len(self.buffer) >= head.length, BODY_SECONDS)
            body, self.buffer = self.buffer[: head.length], self.buffer[head.length :]
            return Fields(body or b"{}")

    def send(self, content: bytes) -> None:
        self.request.settimeout(SEND_SECONDS)
        self.request.sendall(content)

    def send_head(self, status: int, body: bytes = b"", **headers: str | int) -> None:
        headers |= {"Connection": "keep-alive" if self.keep else "close", "X-Content-Type-Options": "nosniff"}
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        self.send("\r\n".join(lines).encode() + body)

    def answer(self, status: int, content: dict, **headers: str) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_head(status, body, **{"Content-Type": "application/json", "Content-Length": len(body)}, **headers)

    def fail(self, refused: Refused) -> None:
        with suppress(OSError):
            self.answer(refused.status, error_of(refused.status, str(refused), refused.param), **refused.headers)
            if not self.keep:  # let the answer arrive: closing with bytes unread would reset the connection under it
                self.request.shutdown(socket.SHUT_WR)
                self.request.settimeout(1)
                with self.server.waiting(self.request):  # others may have its place
                    for _ in range(16):
                        if not self.request.recv(65536):
                            break

    def gone(self) -> bool:
        """Whether the client has closed its side, whatever it sent before: nobody waits for the answer then."""
        poll = select.poll()
        poll.register(self.request, getattr(select, "POLLRDHUP", select.POLLHUP))  # Linux has a name for half of it
        return bool(poll.poll(0))


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accepts connections, and bounds what they hold. key: None where none is needed.  max_body: bytes."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128

    def __init__(self, host: str, port: int, connection: type, key: str | None, max_body: float, max_connections: int):
        self.host, self.key, self.max_body, self.max_connections = host, key, int(max_body), max_connections
        self.lock, self.open, self.idle, self.held = threading.Lock(), 0, {}, 0
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), connection)

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
            if self.held + length > BODIES * self.max_body:
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
            crowded, oldest = self.open > self.max_connections, next(iter(self.idle), None)
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
