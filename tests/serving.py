"""Servers for tests: in a thread of this process, or in a process of their own that may be killed. Loopback only."""

import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from processes import free_port, take_place

from minitrl import checkpoint, runs, server, transfer
from minitrl.rollout import Engine


@contextmanager
def here(tiny, **options):
    """A server of the tiny model in a thread."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    config = server.Config(**{"model": str(tiny.folder / "model"), "served_model_name": "tiny", "port": 0} | options)
    engine = Engine(model, tokenizer, max_batch=config.max_batch, deterministic=config.deterministic)
    with server.Server(config, engine) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield running
        running.shutdown()
        running.weights.close()
        running.worker.stop()


def ask(url: str, path: str, body=None, method=None, timeout=60, **headers):
    """(status, the answer's JSON, or its text where it is none)."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    method = method or ("GET" if content is None else "POST")
    request = urllib.request.Request(url + path, content, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def raw(url: str, content: bytes, timeout=20) -> bytes:
    """Send bytes as they are; all that comes back until the server closes."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(content)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def meet(url, config, generation=1, secret="", mesh=(1, 1), timeout_s=20) -> transfer.Route:
    """As a trainer does: keep a store, and meet a server at it."""
    listener, answers = transfer.listen("127.0.0.1"), []
    body = {"host": "127.0.0.1", "port": listener.getsockname()[1], "generation": generation, "secret": secret}
    thread = threading.Thread(target=lambda: answers.append(ask(url, "/weights/meet", body)))
    thread.start()
    slices = ask(url, "/weights")[1]["tensor_parallel_size"]
    bridge = transfer.Bridge("127.0.0.1", body["port"], 0, 1 + slices, generation=generation, secret=secret,
                             listener=listener, timeout_s=timeout_s)  # fmt: skip
    thread.join()
    assert answers == [(200, {"generation": generation})]
    return transfer.between(bridge, config, mesh, slices)


def announce(url, route, tensors, version, **changes):
    """Say what is sent; returns the thread in which that is answered, and the list for the answer."""
    body = {"generation": route.link.generation, "version": version, "digest": transfer.digest(tensors),
            "tensors": ask(url, "/weights")[1]["tensors"]} | changes  # fmt: skip
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(url, "/weights/update", body)))
    thread.start()
    return thread, answers


def send_weights(url, config, tensors, version, generation=1) -> None:
    """As a trainer does: meet, announce, send."""
    route = meet(url, config, generation, "s")
    thread, answers = announce(url, route, tensors, version)
    transfer.send(route, tensors, next(iter(tensors.values())).dtype)
    thread.join()
    route.link.close()
    assert answers == [(200, {"version": version, "digest": transfer.digest(tensors)})]


class Process:
    """`python -m minitrl.server` with the tiny model; `kill` is kill -9, and `start` brings it back on the same port.

    world: how many processes serve it together, as under torchrun. `process` is the first, which has the port.
    """

    def __init__(self, tiny, hook=None, world=1, **options):
        self.log, self.hook, self.port, self.world = Path(tempfile.mkstemp()[1]), hook, 0, world
        options = {"model": tiny.folder / "model", "served_model_name": "tiny", "dtype": "float32",
                   "tensor_parallel_size": world, **options}  # fmt: skip
        self.options = [w for name, value in options.items() for w in ([f"--{name}", str(value)] if value is not None else [f"--{name}"])]
        self.start()

    def start(self) -> None:
        self.log.write_text("")
        argv = [*self.options, "--port", str(self.port)]
        context = multiprocessing.get_context("forkserver")
        places = [(rank, self.world, free) for free in [free_port()] for rank in range(self.world)]
        self.processes = [
            context.Process(target=_serve, args=(argv, str(self.log), self.hook, place), daemon=True) for place in places
        ]
        self.process = self.processes[0]
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + 120
        while "serving" not in (text := self.log.read_text()) and time.monotonic() < deadline and self.alive:
            time.sleep(0.05)
        assert "serving" in text, text
        self.url = next(line.split()[-1] for line in text.splitlines() if line.startswith("serving"))
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self, number=signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)
        self.process.join(60)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(60)
        self.log.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _serve(argv: list[str], log: str, hook, place) -> None:
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    if place[1] > 1:
        take_place(*place)
    if hook:
        hook()
    runs.command(functools.partial(server.main, argv))


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
