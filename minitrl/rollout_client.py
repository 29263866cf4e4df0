"""Rollouts from servers in other processes: `Engine.generate`'s door, over HTTP, to one or many `minitrl.server`.

    --rollout_server http://127.0.0.1:8000 http://127.0.0.1:8001        the key, where they want one: MINITRL_API_KEY

Each prompt with its n completions is one request, and goes to whichever server has the fewest open. What a server draws
follows from the weights, the prompt and the seed, so a request that was lost with its server is simply asked again,
elsewhere: nothing is sampled twice or lost. A server that fails is left out and asked again later, each time after
twice as long.

Before anything is sampled every server has the policy's weights: rank 0 compares digests, and where they differ has the
weights sent, over a bridge (transfer.py) to each; a request names the digest that it wants to be sampled with, and a
server that has other weights refuses. So one that was restarted, or that took part in another run, serves nothing
before it is up to date. Where the trainers' mesh divides the policy each of its first replica's processes sends what it
has, from a thread of its own, when rank 0 says so; where each has the whole, rank 0 alone does, and compares the
server's log-probs with the policy's own after the first two updates since they met. (What is trained on is compared
anyway: sampling/kl.)

What is asked for in the background (`ask`; ahead.py), while the policy is trained, names a bound instead: the digests
of all weights since a step, any of which it may begin with. The server goes on with it when newer ones arrive, and
tells for every token which it is from.
"""

import http.client
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from itertools import count
from urllib.parse import urlsplit

import torch

from . import data, lora, transfer
from .distributed import ALONE, World, gather_json, with_mesh
from .model import Model
from .packing import pack_groups
from .rollout import Completion, Engine

MAX_ANSWER = 2**28  # bytes
IN_FLIGHT = 64  # requests open at a time
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, the mean over a greedy completion's tokens


def engine_of(config, policy, tokenizer, world: World):
    """What samples from the policy: an engine in this process, or those behind --rollout_server."""
    if config.rollout_server:
        return RemoteEngine(config.rollout_server, policy, tokenizer, world, config.rollout_timeout)
    options = {"max_batch": config.rollout_batch_size, "cache_gib": config.rollout_cache_gib}
    R = config.rollout_tensor or world.tensor.size
    if world.shard.size == 1 and world.tensor.size == R:
        return Engine(policy, tokenizer, **options)
    mesh = with_mesh(world, (world.size // R, 1, R), config.timeout, "--rollout_tensor")
    return OwnEngine(policy, tokenizer, getattr(torch, config.dtype), world, mesh.tensor, **options)


class OwnEngine(Engine):
    """Samples from `policy` by a model of its own, which is divided otherwise: by `tensor`, or not, where that is
    one process. All of `world` call `generate` at the same places: first the weights are brought over."""

    def __init__(self, policy, tokenizer, dtype: torch.dtype, world: World, tensor: World, **options):
        with torch.device("meta"):
            model = Model(policy.config, tensor).to(dtype)
        super().__init__(model.to_empty(device=world.device), tokenizer, deterministic=policy.deterministic, **options)
        self.policy, self.dtype, self.route = policy, dtype, transfer.within(world, policy.config, tensor.size)

    def generate(self, *arguments, **options) -> list[list[Completion]]:
        """As `Engine.generate`."""
        self.route.carry(dict(lora.merged(self.policy)), dict(self.model.named_parameters()), self.dtype)
        return super().generate(*arguments, **options)


class Lost(Exception):
    """A server did not answer, or not as one of ours does. `busy`: it will, later."""

    def __init__(self, why: str, busy: bool = False):
        super().__init__(why)
        self.busy = busy


class _Server:
    """One server as this process knows it."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and not parts.query
        if not good:
            raise ValueError(f"--rollout_server {url}: must be a URL such as http://127.0.0.1:8000")
        self.url, self.host, self.secure = url.rstrip("/"), parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.secure else 80)
        self.ready, self.load, self.why = False, 0, "not asked yet"
        self.again, self.delay = 0.0, 0.5  # seconds: when to ask again, and how long to wait after that
        self.route, self.where = None, {}  # to it, and where we have met
        self.compared = 0  # how often its log-probs, with ours, since then
        self.sockets = weakref.WeakSet()

    def ask(self, method: str, path: str, body: dict | None, timeout_s: float) -> dict:
        """The answer's JSON. Lost where there is none; ValueError where the server says that the request is wrong."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("MINITRL_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            with closing(kind(self.host, self.port, timeout=min(10.0, timeout_s))) as connection:
                connection.connect()
                self.sockets.add(connection.sock)
                connection.sock.settimeout(timeout_s)
                connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
                response = connection.getresponse()
                content = response.read(MAX_ANSWER)
            answer = data.strict_json(content)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise Lost(f"{type(error).__name__}: {str(error)[:200]}") from None
        if response.status == 200:
            return answer
        error = answer.get("error")
        message = str(error.get("message") if isinstance(error, dict) else answer)[:300]
        if response.status in (409, 429) or response.status >= 500:
            raise Lost(f"{response.status}: {message}", busy=response.status == 429)
        raise ValueError(f"--rollout_server {self.url}: {response.status}: {message}")


class RemoteEngine:
    """Samples from `policy` by way of servers. All ranks of `world` call `generate` at the same places.

    timeout_s: that a request may take, and that a step may be without any server.
    """

    def __init__(self, urls, policy, tokenizer, world: World, timeout_s: float = 600.0):
        urls = [url for given in urls for url in given.split(",")]
        if len(set(urls)) < len(urls):
            raise ValueError(f"--rollout_server {' '.join(urls)}: one stands there twice")
        self.servers = [_Server(url) for url in urls]
        self.policy, self.tokenizer, self.world, self.timeout_s = policy, tokenizer, world, timeout_s
        self.tensors, self.digest, self.lock = {}, None, threading.Condition()
        # Of no other run: one that began with the same weights may use a server of ours: what it sends is not ours.
        self.version = gather_json(secrets.randbits(32) << 20, world)[0]
        self.tensor = ALONE  # each process asks for itself
        self.mismatch = 0.0  # nats, the largest found after an update
        self.still = threading.Lock()  # held while weights are sent, and while they change
        self.known = {}  # version -> (digest, the newest step that has these weights), for `ask`
        self.too_old = 0  # completions that came from older weights than were asked for, and were asked for again
        self.probe = None  # a prompt to compare a server by
        self.background, self.courier = ThreadPoolExecutor(IN_FLIGHT), None  # rank 0's, who sends the weights
        self.changed, self.ended = threading.Event(), threading.Event()
        self.mesh = world.shard.size, world.tensor.size
        self.senders = math.prod(self.mesh)  # the first ranks
        self.orders, self.numbers, self.routes = None, count(), {}  # rank 0's to the other senders; theirs, by URL
        if self.senders > 1:
            self._begin_orders()

    def generate(self, prompts, n=1, max_tokens=256, seed=0, **options) -> list[list[Completion]]:
        """As `Engine.generate`. ConnectionError names the servers where none can be had for timeout_s."""
        bodies = self._bodies(prompts, n, max_tokens, seed, options)
        with self.still:
            self._renew()
        return self._gather(bodies)

    def ask(self, least: int, prompts, n=1, max_tokens=256, seed=0, **options) -> Future:
        """`generate` in the background, by the weights of step `least` or later. `versions` are steps here."""
        return self.background.submit(self._gather, self._bodies(prompts, n, max_tokens, seed, options), least)

    @contextmanager
    def updating(self, step: int):
        """Inside, the policy's weights become those of `step`, while none are sent. Then these are, in the background:
        by rank 0, for all ranks, whether or not it has something to ask for itself."""
        with self.still:
            yield
            self._renew(step)
        if self.courier is None and self.world.rank == 0:
            self.courier = threading.Thread(target=self._keep_sending, daemon=True)  # no exit waits for it
            self.courier.start()
        self.changed.set()

    def _keep_sending(self) -> None:
        while not self.ended.is_set():
            with suppress(ValueError):  # who asks that server meets the same, and says so
                self.revive()
            self.changed.wait(0.2)  # a server that was lost may be back
            self.changed.clear()

    def close(self, asked: list[Future]) -> None:
        """End what was asked for, and the sending."""
        self.ended.set()
        self.changed.set()
        while wait(asked, 0.1).not_done or (self.courier and (self.courier.join(0.1) or self.courier.is_alive())):
            with suppress(RuntimeError):  # another is opened just now: the next turn has it
                for connected in [connected for server in self.servers for connected in server.sockets]:
                    with suppress(OSError):
                        connected.shutdown(socket.SHUT_RDWR)

    def _bodies(self, prompts, n: int, max_tokens: int, seed, options: dict) -> list[dict]:
        """A request for each prompt."""
        ids = [p if isinstance(p, list) and isinstance(p[0], int) else self.tokenizer.prompt_ids(p) for p in prompts]
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * len(ids)
        self.probe = ids[0] if ids else self.probe
        return [
            {"prompt": prompt, "seed": s, "n": n, "max_tokens": max_tokens, "logprobs": 0, "return_token_ids": True}
            | {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
            for prompt, s in zip(ids, seeds, strict=True)
        ]

    def _renew(self, step: int | None = None) -> None:
        """Take the policy's weights for those to sample with; all servers are to get them where they are others."""
        self.tensors = dict(lora.merged(self.policy))  # its own weights, or copies where there are adapters
        digest = transfer.digest(self.tensors, self.world.shard, self.world.tensor)
        if digest != self.digest:
            self.digest, self.version = digest, self.version + 1
            for server in self.servers:
                server.ready, server.again = False, 0.0
        if step is not None:
            self.known = self.known | {self.version: (digest, step)}

    def _gather(self, bodies: list[dict], least: int | None = None) -> list[list[Completion]]:
        self.revive()
        stop = time.monotonic() + self.timeout_s
        with ThreadPoolExecutor(min(IN_FLIGHT, len(bodies)) or 1) as pool:
            over = threading.Event()
            futures = [pool.submit(self._complete, body, over, least) for body in bodies]
            try:
                open_, ready = set(futures), any(server.ready for server in self.servers)
                # With nothing to ask for itself, rank 0 has the weights to send, unless its courier does.
                while open_ or not (ready or futures or least is not None):
                    done, open_ = wait(open_, 0.2, FIRST_EXCEPTION) if open_ else ((), over.wait(0.2) and ())
                    for future in done:
                        future.result()
                    ready = any(server.ready for server in self.servers)
                    if ready:
                        stop = time.monotonic() + self.timeout_s
                    elif time.monotonic() > stop:
                        raise ConnectionError("no rollout server can be had: " + self._whys())
                    if self.ended.is_set():
                        raise ConnectionAbortedError("it is not wanted any more")
                    if open_ or not ready:
                        self.revive()
            finally:
                over.set()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]

    def revive(self) -> None:
        """Take back the servers that are due to be asked again, if they have these weights or rank 0 can send them."""
        with self.still:
            due = [server for server in self.servers if not server.ready and server.again <= time.monotonic()]
            if due:
                with ThreadPoolExecutor(len(due)) as pool:
                    list(pool.map(self._try, due))

    def _try(self, server: _Server) -> None:
        try:
            state = server.ask("GET", "/weights", None, 10.0)
            if state.get("deterministic") != self.policy.deterministic:
                raise ValueError(f"--rollout_server {server.url}: give both --deterministic, or neither")
            # On all ranks: rank 0's error alone would be heard only when the others give up waiting for it.
            dtype, described = self._described(server, state.get("tensors"))
            if (state.get("digest"), state.get("version")) != (self.digest, self.version):
                if self.world.rank > 0:
                    raise Lost("waits for rank 0 to send it the weights", busy=True)
                self._update(server, state, dtype, described)
            if self.probe and self.world.rank == 0 and self.senders == 1 and server.compared < 2:
                self._compare(server, self.probe)
                server.compared += 1
        except (Lost, OSError) as error:
            self._leave_out(server, error)
            return
        with self.lock:
            server.ready, server.delay = True, 0.5
            self.lock.notify_all()

    def _described(self, server: _Server, theirs) -> tuple[torch.dtype, list]:
        """(dtype to send in, `transfer.describe` of it); ValueError where the server has another model."""
        dtype = next(iter(self.tensors.values())).dtype
        if self.world.shard.size > 1 and theirs == transfer.describe(self.policy.config, torch.bfloat16):
            dtype = torch.bfloat16  # ours are masters
        described = transfer.describe(self.policy.config, dtype)
        if theirs != described:
            try:
                transfer.check(theirs, described)
            except ValueError as error:
                raise ValueError(f"--rollout_server {server.url}: serves another model, or in another --dtype: {error}"
                                 ) from None
        return dtype, described

    def _update(self, server: _Server, state: dict, dtype: torch.dtype, described: list) -> None:
        """Send the weights; where the bridge is gone, or the server forgot it, over a new one."""
        try:
            with ThreadPoolExecutor(1) as pool:
                if server.route is None or state.get("generation") != server.route.link.generation:
                    self._meet(server, state.get("tensor_parallel_size"), dtype, pool)
                else:
                    self._order(server.where, dtype)
                asked = {"generation": server.route.link.generation, "version": self.version, "digest": self.digest,
                         "tensors": described}  # fmt: skip
                updated = pool.submit(server.ask, "POST", "/weights/update", asked, self.timeout_s)
                try:
                    transfer.send(server.route, self.tensors, dtype)
                except ConnectionError:
                    updated.result()  # says why, if it was the server that did not want them
                    raise
                if updated.result().get("digest") != self.digest:
                    raise Lost("took over other weights than were sent")
        except BaseException:
            if server.route:
                server.route.link.close()
            server.route = None
            raise

    def _meet(self, server: _Server, slices: int, dtype: torch.dtype, pool) -> None:
        """A new bridge to a server, which we keep the store of. Its number is larger than any before it anywhere."""
        if not (type(slices) is int and 1 <= slices <= 4096):
            raise Lost(f"tensor_parallel_size {str(slices)[:80]}: not an answer of ours")
        listener = transfer.listen(transfer.local_address(server.host, server.port))
        host, port = listener.getsockname()[:2]
        meeting = {"host": host, "port": port, "generation": time.time_ns() // 10**6, "secret": secrets.token_hex(16)}
        server.where, server.compared = meeting | {"url": server.url, "slices": slices}, 0
        mesh = {"shard": self.mesh[0], "tensor": self.mesh[1]}
        met = pool.submit(server.ask, "POST", "/weights/meet", meeting | mesh, self.timeout_s)
        self._order(server.where, dtype)
        server.route = self._route(server.where, listener=listener, unless=lambda: met.done() and met.result())
        met.result()

    def _route(self, where: dict, **keeper) -> transfer.Route:
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

    def _order(self, where: dict, dtype: torch.dtype) -> None:
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
            route = route or self._route(order)
            transfer.send(route, self.tensors, getattr(torch, order["dtype"]))
            self.routes[order["url"]] = route
        except ConnectionError as error:  # rank 0 learns it from the server, and begins anew
            print(f"weights: {error}", file=sys.stderr, flush=True)
            if route:
                route.link.close()

    @torch.no_grad()
    def _compare(self, server: _Server, prompt: list[int]) -> None:
        """A server's log-probs of a greedy completion against the policy's own."""
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0.0, "logprobs": 0, "return_token_ids": True}
        (completion,) = self._completions(server, {**body, "n": 1, "ignore_eos": True})
        pack = pack_groups([prompt], [[completion.ids]], self.world.device)
        ours = self.policy.logprobs(pack, pack.completion_T)[0][pack.completion_T].cpu()
        difference = (ours - torch.tensor(completion.logprobs)).abs().mean().item()
        self.mismatch = max(self.mismatch, difference)
        tolerance = TOLERANCE[self.policy.head_weight.dtype]
        if not difference <= tolerance:
            raise ValueError(f"--rollout_server {server.url}: after the update its log-probs differ from the policy's "
                             f"by {difference:.3g} nats, more than {tolerance}: it does not sample from these weights")

    def _complete(self, body: dict, over: threading.Event, least: int | None) -> list[Completion]:
        """One prompt's completions, from whichever server; asked again until one has answered.

        ConnectionError where that has not helped for timeout_s: then it is the request that servers fail at.
        """
        first = None  # when it was lost for the first time
        while not over.is_set():
            with self.lock:
                ready = [server for server in self.servers if server.ready]
                if not ready:
                    self.lock.wait(0.5)
                    continue
                server = min(ready, key=lambda server: server.load)
                server.load += 1
            try:
                return self._completions(server, body, least)
            except Lost as lost:
                if not lost.busy:
                    first = first or time.monotonic()
                    if time.monotonic() - first > self.timeout_s:
                        raise ConnectionError(f"no rollout server answers a request, the last: {server.url} ({lost})")
                if lost.busy:
                    over.wait(1)
                elif server.ready:  # all that it had die together: count that once
                    self._leave_out(server, lost)
            finally:
                with self.lock:
                    server.load -= 1
        raise ConnectionAbortedError("another request failed")

    def _completions(self, server: _Server, body: dict, least: int | None = None) -> list[Completion]:
        wanted = self.digest if least is None else [known for known, step in self.known.values() if step >= least]
        answer = server.ask("POST", "/v1/completions", body | {"weights": wanted}, self.timeout_s)
        try:
            completions = []
            for index, choice in enumerate(answer["choices"]):
                ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
                good = choice["index"] == index and 0 < len(ids) == len(logprobs) <= body["max_tokens"]
                good = good and all(type(i) is int and 0 <= i < self.policy.config.vocab_size for i in ids)
                good = good and all(type(x) is float and math.isfinite(x) for x in logprobs)
                good = good and choice["finish_reason"] in ("stop", "length") and isinstance(choice["text"], str)
                versions = tuple(map(tuple, choice["weight_versions"]))
                good = good and (len(versions) == 1 or least is not None)
                assert good, f"choice {index} is not a completion, or not of one version"
                if least is not None:
                    versions = tuple((self.known.get(version, ("", -1))[1], *part) for version, *part in versions)
                    if (oldest := min(versions)[0]) < least:
                        self.too_old += 1
                        raise Lost(f"choice {index} is of the weights of step {oldest}, not of {least} or later")
                completions.append(Completion(ids, logprobs, choice["text"], choice["finish_reason"], versions))
            assert len(completions) == body["n"], f"{len(completions)} completions of {body['n']}"
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise Lost(f"not an answer of ours: {error!r}") from None
        return completions

    def _leave_out(self, server: _Server, why: Exception) -> None:
        with self.lock:
            server.ready, server.why = False, str(why)
            server.again, server.delay = time.monotonic() + server.delay, min(2 * server.delay, 30.0)
            if getattr(why, "busy", False):
                server.again, server.delay = time.monotonic() + 0.1, 0.5

    def _whys(self) -> str:
        return "; ".join(f"{server.url} ({server.why})" for server in self.servers)
