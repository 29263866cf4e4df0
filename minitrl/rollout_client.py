"""Rollouts from servers in other processes: `Engine.generate`'s door, over HTTP, to one or many.

    --rollout_server http://127.0.0.1:8000 vllm+http://127.0.0.1:8001      the key, where they want one: MINITRL_API_KEY

Each prompt with its n completions is one request, and goes to whichever server has the fewest open. What a server draws
follows from the weights, the prompt and the seed, so a request that was lost with its server is simply asked again,
elsewhere: nothing is sampled twice or lost. A server that fails is left out and asked again later, each time after
twice as long.

Before anything is sampled every server has the policy's weights: rank 0 asks what it holds, sends these where they are
others (remote.py, vllm.py), and compares log-probs: a vLLM's after each update, ours after the first two since they
met. Ours refuse a request that names another digest than theirs; a vLLM is asked for its version before and after. So
one that was restarted or taken by another run samples nothing stale.

What is asked for in the background (`ask`; ahead.py), while the policy is trained, names a bound instead: the digests
of all weights since a step, any of which it may begin with. The server goes on with it when newer ones arrive.
"""

import math
import socket
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import torch

from . import lora, transfer
from .distributed import ALONE, World, with_mesh
from .model import Model
from .packing import pack_groups
from .remote import Lost, Ours, Server, Weights
from .rollout import Completion, Engine
from .vllm import VLLM

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


class RemoteEngine:
    """Samples from `policy` by way of servers. All ranks of `world` call `generate` at the same places.
    timeout_s: that a request may take, and that a step may be without any server."""

    def __init__(self, urls, policy, tokenizer, world: World, timeout_s: float = 600.0):
        urls = [url.rstrip("/") for given in urls for url in given.split(",")]
        if len(set(urls)) < len(urls):
            raise ValueError(f"--rollout_server {' '.join(urls)}: one stands there twice")
        self.policy, self.tokenizer, self.world, self.timeout_s = policy, tokenizer, world, timeout_s
        self.weights, self.lock = Weights(policy, tokenizer.end_ids, world, timeout_s), threading.Condition()
        self.servers = [(VLLM if url.startswith("vllm+") else Ours)(url, self.weights) for url in urls]
        self.tensor = ALONE  # each process asks for itself
        self.mismatch = 0.0  # nats, the largest found after an update
        self.still = threading.Lock()  # held while weights are sent, and while they change
        self.too_old = 0  # completions that came from older weights than were asked for, and were asked for again
        self.probe = list(range(8)), 8  # a prompt to compare a server by, the last of ours, and how many tokens fit
        self.background, self.courier = ThreadPoolExecutor(IN_FLIGHT), None  # rank 0's, who sends the weights
        self.changed, self.ended = threading.Event(), threading.Event()

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
        patience = time.monotonic() + 30.0  # seconds: who is held for its weights is to be let go by its sender
        while wait(asked, 0.1).not_done or (self.courier and (self.courier.join(0.1) or self.courier.is_alive())):
            with suppress(RuntimeError):  # another is opened just now: the next turn has it
                over = [server for server in self.servers if not server.held or time.monotonic() > patience]
                for connected in [connected for server in over for connected in server.sockets]:
                    with suppress(OSError):
                        connected.shutdown(socket.SHUT_RDWR)

    def _bodies(self, prompts, n: int, max_tokens: int, seed, options: dict) -> list[dict]:
        """A request for each prompt."""
        ids = [p if isinstance(p, list) and isinstance(p[0], int) else self.tokenizer.prompt_ids(p) for p in prompts]
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * len(ids)
        self.probe = (ids[0], min(max_tokens, 8)) if ids else self.probe
        return [
            {"prompt": prompt, "seed": s, "n": n, "max_tokens": max_tokens, "logprobs": 0, "return_token_ids": True}
            | {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
            for prompt, s in zip(ids, seeds, strict=True)
        ]

    def _renew(self, step: int | None = None) -> None:
        """Take the policy's weights for those to sample with; all servers are to get them where they are others."""
        if self.weights.renew(step):
            for server in self.servers:
                server.ready, server.again = False, 0.0

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
                        whys = "; ".join(f"{server.url} ({server.why})" for server in self.servers)
                        raise ConnectionError(f"no rollout server can be had: {whys}")
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

    def _try(self, server: Server) -> None:
        try:
            holds, state = server.state()
            if not holds:
                if self.world.rank > 0:
                    raise Lost("waits for rank 0 to send it the weights", busy=True)
                server.update(state, self.timeout_s)
            if self.world.rank == 0 and self.weights.senders == 1 and server.compared < server.comparisons:
                self._compare(server, *self.probe)
                server.compared += 1
        except (Lost, OSError) as error:
            self._leave_out(server, error)
            return
        with self.lock:
            server.ready, server.delay = True, 0.5
            self.lock.notify_all()

    @torch.no_grad()
    def _compare(self, server: Server, prompt: list[int], tokens: int) -> None:
        """A server's log-probs of a greedy completion against the policy's own."""
        (body,) = self._bodies([prompt], 1, tokens, 0, {"temperature": 0.0, "ignore_eos": True})
        (completion,) = self._completions(server, body)
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

    def _completions(self, server: Server, body: dict, least: int | None = None) -> list[Completion]:
        answer, told = server.answer(body, least, self.timeout_s)
        try:
            completions = []
            for index, choice in enumerate(answer["choices"]):
                ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
                good = choice["index"] == index and 0 < len(ids) == len(logprobs) <= body["max_tokens"]
                good = good and all(type(i) is int and 0 <= i < self.policy.config.vocab_size for i in ids)
                good = good and all(type(x) is float and math.isfinite(x) for x in logprobs)
                good = good and choice["finish_reason"] in ("stop", "length") and isinstance(choice["text"], str)
                versions = tuple(map(tuple, [(told, 0, len(ids))] if told else choice["weight_versions"]))
                good = good and (len(versions) == 1 or least is not None)
                assert good, f"choice {index} is not a completion, or not of one version"
                if least is not None:
                    known = self.weights.known
                    versions = tuple((known.get(version, ("", -1))[1], *part) for version, *part in versions)
                    if (oldest := min(versions)[0]) < least:
                        self.too_old += 1
                        raise Lost(f"choice {index} is of the weights of step {oldest}, not of {least} or later")
                completions.append(Completion(ids, logprobs, choice["text"], choice["finish_reason"], versions))
            assert len(completions) == body["n"], f"{len(completions)} completions of {body['n']}"
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise Lost(f"not an answer of ours: {error!r}") from None
        return completions

    def _leave_out(self, server: Server, why: Exception) -> None:
        with self.lock:
            server.ready, server.why = False, str(why)
            server.again, server.delay = time.monotonic() + server.delay, min(2 * server.delay, 30.0)
            if getattr(why, "busy", False):
                server.again, server.delay = time.monotonic() + 0.1, 0.5
