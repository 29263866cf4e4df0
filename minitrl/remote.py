"""Servers that sample: what is asked of any (`Server`), and how one of ours gets its weights: from rank 0, or where the
mesh divides the policy from each process of its first replica, when rank 0 says so."""

import http.client
import json
import math
import os
import secrets
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count
from urllib.parse import urlsplit

import torch

from . import data, lora, transfer
from .distributed import World, gather_json

MAX_ANSWER = 2**28  # bytes


class Lost(Exception):
    """A server did not answer, or not as one of its kind does. `busy`: it will, later."""

    def __init__(self, why: str, busy: bool = False):
        super().__init__(why)
        self.busy = busy


class Weights:
    """The policy's weights, as all servers are to sample with them. end_ids: those that end a completion."""

    def __init__(self, policy, end_ids, world: World, timeout_s: float):
        self.policy, self.end_ids, self.world, self.timeout_s = policy, end_ids, world, timeout_s
        self.tensors, self.digest = {}, None
        # Of no other run: one that began with the same weights may use a server of ours: what it sends is not ours.
        self.version = gather_json(secrets.randbits(32) << 20, world)[0]
        self.known = {}  # version -> (digest, the newest step that has these weights), where samples may be older
        self.mesh = world.shard.size, world.tensor.size
        self.senders = math.prod(self.mesh)  # the first ranks
        self.orders, self.numbers, self.routes = None, count(), {}  # rank 0's to the other senders; theirs, by URL
        if self.senders > 1:
            self._begin_orders()

    def renew(self, step: int | None) -> bool:
        """Take what the policy has now, the weights of `step`; whether they are others than before."""
        self.tensors = dict(lora.merged(self.policy))  # its own weights, or copies where there are adapters
        before, self.digest = self.digest, transfer.digest(self.tensors, self.world.shard, self.world.tensor)
        self.version += self.digest != before
        if step is not None:
            self.known = self.known | {self.version: (self.digest, step)}
        return self.digest != before

    def allowed(self, least: int | None) -> dict[int, str]:
        """{version: digest} that a completion may begin with: these alone, or those of step `least` or later."""
        known = {version: digest for version, (digest, step) in self.known.items() if least is None or step >= least}
        return {self.version: self.digest} if least is None else known

    def route(self, where: dict, **keeper) -> transfer.Route:
        """To one of our servers, over a new bridge."""
        bridge = transfer.Bridge(
            where["host"], where["port"], self.world.rank, self.senders + where["slices"],
            generation=where["generation"], secret=where["secret"], device=self.world.device,
            timeout_s=self.timeout_s, **keeper,
        )  # fmt: skip
        return transfer.between(bridge, self.policy.config, self.mesh, where["slices"])

    def _begin_orders(self) -> None:
        """A store by which rank 0 tells the other senders to send: they may be anywhere in their own work then."""
        listener = transfer.listen(os.environ["MASTER_ADDR"]) if self.world.rank == 0 else None
        host, port = gather_json(listener and listener.getsockname()[:2], self.world)[0]
        if self.world.rank < self.senders:
            self.orders = transfer.store_at(host, port, listener, transfer.MEET_SECONDS)
        if 0 < self.world.rank < self.senders:
            threading.Thread(target=self._obey, daemon=True).start()

    def order(self, where: dict, dtype: torch.dtype) -> None:
        if self.orders:
            self.orders.set(str(next(self.numbers)), json.dumps(where | {"dtype": str(dtype).removeprefix("torch.")}))

    def _obey(self) -> None:
        """Send what we have whenever rank 0 says so, while it lives. Weights do not change meanwhile: rank 0 takes part
        in that, and waits until all that is sent has arrived."""
        for number in self.numbers:
            try:
                while True:
                    with suppress(transfer.NothingYet):
                        self.orders.wait([str(number)], timedelta(seconds=60))
                        break
                order = json.loads(self.orders.get(str(number)))
            except RuntimeError:
                return
            threading.Thread(target=self._send, args=(order,), daemon=True).start()

    def _send(self, order: dict) -> None:
        route = self.routes.pop(order["url"], None)
        try:
            if route and route.link.generation != order["generation"]:
                route.link.close()
                route = None
            route = route or self.route(order)
            transfer.send(route, self.tensors, getattr(torch, order["dtype"]))
            self.routes[order["url"]] = route
        except ConnectionError as error:  # rank 0 learns it from the server, and begins anew
            print(f"weights: {error}", file=sys.stderr, flush=True)
            if route:
                route.link.close()


class Server:
    """One server as this process knows it. Each kind has three methods of its own, which raise Lost or ValueError.

    state() -> (whether it has these weights, what `update` has to know).  update(state, timeout_s): send it these.
    answer(body, least, timeout_s) -> (what it answers to a request, the completions' version if they do not tell).
    """

    comparisons = math.inf  # of its log-probs with the policy's: one after each update
    held = False  # by us: it is being given weights, or has them and waits to be told to go on

    def __init__(self, url: str, weights: Weights):
        parts = urlsplit(url.removeprefix("vllm+"))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"--rollout_server {url}: must be as http://127.0.0.1:8000, of a vLLM as vllm+http://...")
        self.url, self.host, self.secure = url.rstrip("/"), parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.secure else 80)
        self.weights, self.ready, self.load, self.why = weights, False, 0, "not asked yet"
        self.again, self.delay = 0.0, 0.5  # seconds: when to ask again, and how long to wait after that
        self.route, self.where = None, {}  # to it, and where we have met
        self.compared = 0  # how often its log-probs were, with the policy's
        self.sockets = weakref.WeakSet()

    @contextmanager
    def connection(self, timeout_s: float):
        """An open one, for several requests."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        try:
            with closing(kind(self.host, self.port, timeout=min(10.0, timeout_s))) as connection:
                connection.connect()
                self.sockets.add(connection.sock)
                connection.sock.settimeout(timeout_s)
                yield connection
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"{type(error).__name__}: {str(error)[:200]}") from None

    def ask(self, method: str, path: str, body: dict | None, timeout_s: float, connection=None) -> dict:
        """The answer's JSON. Lost where there is none; ValueError where the server says that the request is wrong."""
        headers, key = {"Content-Type": "application/json"}, os.environ.get("MINITRL_API_KEY")
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        with nullcontext(connection) if connection else self.connection(timeout_s) as opened:
            opened.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = opened.getresponse()
            content = response.read(MAX_ANSWER)
        try:
            answer = data.strict_json(content)
        except (ValueError, RecursionError) as error:
            raise Lost(f"{type(error).__name__}: {str(error)[:200]}") from None
        if response.status == 200:
            return answer
        error = answer.get("error")
        message = str(error.get("message") if isinstance(error, dict) else answer)[:300]
        if response.status == 404 or "has no attribute" in message:
            raise ValueError(f"--rollout_server {self.url}: {response.status}: {message}; {self.kind}")
        if response.status in (409, 429) or response.status >= 500:
            raise Lost(f"{response.status}: {message}", busy=response.status == 429)
        raise ValueError(f"--rollout_server {self.url}: {response.status}: {message}")


class Ours(Server):
    """A `minitrl.server`. Its weights come over a bridge (transfer.py), and it refuses what is not for them."""

    kind = "such a URL is a minitrl.server's, and a vLLM's is vllm+http://..."
    comparisons = 2  # since we met: what it takes over was verified, and each step's sampling/kl tells the same

    def state(self) -> tuple[bool, dict]:
        weights, here = self.weights, f"--rollout_server {self.url}: "
        state = self.ask("GET", "/weights", None, 10.0)
        if state.get("deterministic") != weights.policy.deterministic:
            raise ValueError(f"{here}give both --deterministic, or neither")
        # On all ranks: rank 0's error alone would be heard only when the others give up waiting for it.
        dtype, theirs = next(iter(weights.tensors.values())).dtype, state.get("tensors")
        if weights.world.shard.size > 1 and theirs == transfer.describe(weights.policy.config, torch.bfloat16):
            dtype = torch.bfloat16  # ours are masters
        try:
            transfer.check(theirs, transfer.describe(weights.policy.config, dtype))
        except ValueError as error:
            raise ValueError(f"{here}serves another model, or in another --dtype: {error}") from None
        holds = (state.get("digest"), state.get("version")) == (weights.digest, weights.version)
        return holds, state | {"dtype": dtype}

    def update(self, state: dict, timeout_s: float) -> None:
        """Where the bridge is gone, or the server forgot it, over a new one."""
        weights, dtype = self.weights, state["dtype"]
        try:
            with ThreadPoolExecutor(1) as pool:
                if self.route is None or state.get("generation") != self.route.link.generation:
                    self._meet(state.get("tensor_parallel_size"), dtype, pool, timeout_s)
                else:
                    weights.order(self.where, dtype)
                asked = {"generation": self.route.link.generation, "version": weights.version, "digest": weights.digest,
                         "tensors": transfer.describe(weights.policy.config, dtype)}  # fmt: skip
                updated = pool.submit(self.ask, "POST", "/weights/update", asked, timeout_s)
                try:
                    transfer.send(self.route, weights.tensors, dtype)
                except ConnectionError:
                    updated.result()  # says why, if it was the server that did not want them
                    raise
                if updated.result().get("digest") != weights.digest:
                    raise Lost("took over other weights than were sent")
        except BaseException:
            if self.route:
                self.route.link.close()
            self.route = None
            raise

    def _meet(self, slices: int, dtype: torch.dtype, pool, timeout_s: float) -> None:
        """A new bridge, which we keep the store of. Its number is larger than any before it anywhere."""
        if not (type(slices) is int and 1 <= slices <= 4096):
            raise Lost(f"tensor_parallel_size {str(slices)[:80]}: not an answer of ours")
        listener = transfer.listen(transfer.local_address(self.host, self.port))
        host, port = listener.getsockname()[:2]
        meeting = {"host": host, "port": port, "generation": time.time_ns() // 10**6, "secret": secrets.token_hex(16)}
        self.where, self.compared = meeting | {"url": self.url, "slices": slices}, 0
        mesh = dict(zip(("shard", "tensor"), self.weights.mesh))
        met = pool.submit(self.ask, "POST", "/weights/meet", meeting | mesh, timeout_s)
        self.weights.order(self.where, dtype)
        self.route = self.weights.route(self.where, listener=listener, unless=lambda: met.done() and met.result())
        met.result()

    def answer(self, body: dict, least: int | None, timeout_s: float) -> tuple[dict, None]:
        wanted = self.weights.digest if least is None else list(self.weights.allowed(least).values())
        return self.ask("POST", "/v1/completions", body | {"weights": wanted}, timeout_s), None
