"""The generation engine behind HTTP, for the openai package, for TRL's client and for `rollout_client`.

    python -m minitrl.server --model FOLDER                        (torchrun -m minitrl.server is the same)
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "2 + 2 =", "seed": 1}'

One thread owns the engine. A connection has a thread of its own, which reads and checks a request, hands it over
between two steps of the engine, and waits; nothing that comes over a socket runs in the engine's thread but checked
numbers. New weights (`transfer`) are received beside the old ones, which serve until the set is whole and verified, and
are put in place between two steps, without a request being dropped; every token is told with the version it is from.

A model too large for one device is served by several processes with a slice each: the first is the server, the others
repeat what its engine does (lockstep.py) and receive their own slices of new weights.

    torchrun --nproc_per_node 2 -m minitrl.server --model FOLDER --tensor_parallel_size 2

Without a key the server listens on loopback alone, and only to requests that name it so; with a key, on every route.
"""

import functools
import json
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from . import checkpoint, data, distributed, lockstep, runs, toy, transfer, web
from .config import CommonOptions, parse, require
from .layout import hf_tensors
from .rollout import Engine, context_length
from .sampling import Sampling
from .web import MUST, Fields, Refused, error_of, is_loopback


HEARTBEAT = 5.0  # seconds: how often idle processes that serve one model together say so to each other


@dataclass
class Config:
    """Serve a language model over HTTP: OpenAI's completions, TRL's generation server, weights from a trainer."""

    model: str | None = None  # folder with a Hugging Face checkpoint, or a Hub id; none: the built-in toy
    served_model_name: str | None = None  # what clients call it; none: as --model says, or toy
    host: str = "127.0.0.1"  # address to listen on; others than loopback need a key
    port: int = 8000  # 0: any that is free
    api_key: str | None = field(default=None, repr=False)  # bearer key; better in MINITRL_API_KEY, or in a file
    api_key_file: str | None = None  # file that holds the key
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    deterministic: bool = False  # a completion's bits depend on nothing else; a trainer with the same option has them
    tensor_parallel_size: int = 1  # processes that hold a slice of the model each: torchrun --nproc_per_node
    max_batch: int = 64  # sequences decoded at a time
    cache_gib: float | None = None  # bound of the key/value cache; none: as the load needs
    prefill_tokens: int = 4096  # tokens of prompts computed in a step at most
    max_queue: int = 4096  # sequences waiting or running, beyond which requests are told to come back (429)
    max_prompts: int = 1024  # in a request
    max_n: int = 256  # completions of a prompt
    max_body_mib: float = 8.0  # size of a request
    max_connections: int = 256  # open at a time
    transfer_timeout: float = 300.0  # seconds that a weight update waits for its sender, and slices for each other
    drain_timeout: float = 30.0  # seconds that running requests get to finish after SIGTERM

    def __post_init__(self):
        whole = self.model is not None or (self.dtype == "float32" and self.tensor_parallel_size == 1)
        rule = "given with --dtype bfloat16 or --tensor_parallel_size: the built-in toy is in float32, and in one piece"
        require(whole, "model", self.model, rule)
        require(0 <= self.port < 65536, "port", self.port, "from 0 to 65535")
        for name in "tensor_parallel_size max_batch prefill_tokens max_queue max_prompts max_n max_connections".split():
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in "max_body_mib transfer_timeout drain_timeout".split():
            require(0 < getattr(self, name) <= 1e6, name, getattr(self, name), "above 0 and at most 1e6")
        lasts = self.tensor_parallel_size == 1 or self.transfer_timeout >= 3 * HEARTBEAT
        require(lasts, "transfer_timeout", self.transfer_timeout, f"at least {3 * HEARTBEAT:.0f} with "
                "--tensor_parallel_size: idle processes hear from each other as rarely as that")
        require(self.api_key is None or self.api_key_file is None, "api_key_file", self.api_key_file, "the only key")
        # Not a field: it is never shown. An empty one is wrong, and not none.
        self.key = os.environ.get("MINITRL_API_KEY") if self.api_key is None else self.api_key
        if self.api_key_file is not None:
            self.key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        given = self.key is not None or self.api_key_file is not None
        if given and not (re.fullmatch(r"[!-~]+", self.key or "") and len(self.key) >= 16):
            raise ValueError("--api_key: at least 16 printable ASCII characters without spaces, for example "
                             "`python -c 'import secrets; print(secrets.token_urlsafe())'`")
        require(is_loopback(self.host) or self.key, "host", self.host, "127.0.0.1 or localhost where there is no key; "
                "set MINITRL_API_KEY, or --api_key_file, to listen elsewhere")


class Job:
    """One HTTP request's requests to the engine. The engine's thread calls `told`, the connection's waits."""

    def __init__(self, streams: bool, weights: str | list[str] | None):
        """weights: the one digest that all tokens are to be of; or those that it may begin with, to go on with what the
        same trainer sends meanwhile."""
        self.requests, self.open, self.error = [], 0, None
        self.weights, self.goes_on = [weights] if isinstance(weights, str) else weights, isinstance(weights, list)
        self.done, self.events = threading.Event(), queue.SimpleQueue() if streams else None

    def told(self, p: int, g: int, token: int, logprob: float, reason: str | None) -> None:
        if self.events:
            self.events.put((p, g, token, logprob, reason))
        self.open -= reason is not None
        if self.open == 0:
            self.end()

    def end(self, error: Refused | None = None) -> None:
        self.error = error
        self.done.set()
        if self.events:
            self.events.put(None)


class Worker(threading.Thread):
    """The thread that owns the engine: steps while there is work, and runs what others ask for between steps.

    failure: what it ended with, if it is over: where the model is sliced, a process that is gone.
    """

    def __init__(self, engine: Engine, max_queue: int):
        super().__init__(name="engine", daemon=True)
        self.engine, self.max_queue, self.jobs, self.inbox = engine, max_queue, set(), queue.SimpleQueue()
        self.tensors = {name: p.detach() for name, p in engine.model.named_parameters()}
        self.version, self.digest, self.pending = 0, transfer.digest(self.tensors, engine.tensor), 0
        self.failure, self.trainer = None, None  # trainer: whose weights they are, the bridge's generation

    def call(self, function, *arguments):
        """function(*arguments) in the engine's thread; what it returns or raises."""
        future = Future()
        self.inbox.put((future, function, *arguments))
        while True:
            try:
                return future.result(timeout=0.5)
            except futures.TimeoutError:
                if not self.is_alive():
                    raise Refused(503, "the engine has stopped") from None

    def stop(self) -> None:
        self.inbox.put(None)

    def run(self) -> None:
        try:
            while self.between_steps():
                try:
                    self.engine.step()
                except ConnectionError:
                    raise
                except Exception:  # such as logits that are not finite: those requests fail, the server goes on
                    traceback.print_exc()
                    for job in list(self.jobs):
                        self.close(job, Refused(500, "the engine failed on this batch; the server's log says why"))
        except ConnectionError as error:
            self.failure = error
            for job in self.jobs:
                job.end(Refused(503, "the engine has stopped"))

    def between_steps(self) -> bool:
        """Run what others ask for, and wait while there is nothing to do; False to stop."""
        while self.engine.idle or not self.inbox.empty():
            try:
                item = self.inbox.get(timeout=HEARTBEAT if self.engine.tensor.size > 1 else None)
            except queue.Empty:  # followers wait in bounds, and one that died has to be noticed
                lockstep.tell(self.engine, "wait")
                continue
            if item is None:
                lockstep.tell(self.engine, "stop")
                return False
            lockstep.fulfil(*item)
        return True

    def submit(self, job: Job) -> None:
        """Queue all of a job's requests, or none of them."""
        size = sum(request.n for request in job.requests)
        if job.weights is not None and self.digest not in job.weights:
            raise Refused(409, f"weights: the server holds {self.digest} (version {self.version})", "weights")
        if size > self.max_queue:
            raise Refused(400, f"n: {size} sequences in all are above --max_queue {self.max_queue}", "n")
        if self.pending + size > self.max_queue:
            raise Refused(429, f"{self.pending} sequences wait or run, and {size} more are above --max_queue",
                          **{"Retry-After": "1"})
        job.open = size
        self.pending += size
        self.jobs.add(job)
        for request in job.requests:
            self.engine.enqueue(request)

    def close(self, job: Job, error: Refused | None = None) -> None:
        """Forget a job; what still runs of it is aborted."""
        if job in self.jobs:
            self.jobs.remove(job)
            self.pending -= sum(request.n for request in job.requests)
            for request in job.requests if job.open else ():
                self.engine.abort(request)
            if not job.done.is_set():
                job.end(error)

    def install(self, new: dict, version: int, digest: str, trainer: int | None = None) -> None:
        """Put a whole, verified set of weights in place. Who insisted on those before is refused, and others go on."""
        lockstep.tell(self.engine, "install")
        lockstep.install(self.engine, self.tensors, new)
        the_same = trainer is not None and trainer == self.trainer
        self.version, self.digest, self.trainer = version, digest, trainer
        self.engine.weights_changed(version)
        for job in list(self.jobs):
            if job.weights is not None and digest not in job.weights and not (job.goes_on and the_same):
                self.close(job, Refused(409, "weights: they were replaced meanwhile", "weights"))


class Weights:
    """New weights: from our trainer as one verified set, from TRL 0.16.0's client tensor by tensor."""

    def __init__(self, worker: Worker, config: Config):
        self.worker, self.config, self.device = worker, config, worker.engine.model.head_weight.device
        self.bridge, self.route, self.meeting, self.lock = None, None, Future(), threading.Lock()
        self.places = hf_tensors(worker.engine.model.config)
        self.described = transfer.describe(worker.engine.model.config, worker.engine.model.head_weight.dtype)
        self.named, self.line = {}, ThreadPoolExecutor(1)  # TRL's: what has come so far, one after the other

    @contextmanager
    def alone(self):
        """One meeting or update at a time. Whatever fails loses the bridge, so that a sender learns it at once."""
        if not self.lock.acquire(timeout=1):
            raise Refused(409, "another weight update is under way")
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, ConnectionError):
                raise Refused(409, f"the update failed, the old weights serve on: {error}") from None
            raise
        finally:
            self.lock.release()

    def close(self) -> None:
        """Leave the bridge, or the meeting that still waits for somebody to come."""
        self.meeting.cancel()
        bridge, self.bridge, self.route, self.named = self.bridge, None, None, {}
        if bridge:
            bridge.close()

    def meet(self, host: str, port: int, generation: int, secret: str, mesh: tuple[int, int]) -> None:
        """Join a bridge to a trainer of so many (shard, tensor) processes, in place of the one before."""
        engine, where = self.worker.engine, (host, port, generation, secret, mesh)

        def meeting(unless) -> transfer.Route:
            self.worker.call(lockstep.tell, engine, "meet", *where)
            return lockstep.join(engine, self.config.transfer_timeout, *where, unless)

        self._meet(meeting)

    def meet_trl(self, host: str, port: int, listener) -> None:
        """The same with TRL's client, which comes to us as rank 1."""
        options = {"generation": 0, "device": self.device, "timeout_s": self.config.transfer_timeout}
        self._meet(lambda unless: transfer.Bridge(host, port, 0, 2, listener=listener, unless=unless, **options))

    def _meet(self, function) -> None:
        self.close()
        with self.alone():
            self.meeting = meeting = Future()

            def unless() -> None:
                if meeting.cancelled():
                    raise ConnectionAbortedError

            # Aside, since torch waits without limit for a store that takes a connection and says nothing.
            lockstep.aside(function, unless, future=meeting)
            try:
                met = meeting.result(self.config.transfer_timeout + 1)
            except futures.TimeoutError:
                raise ConnectionError("nothing came of the meeting") from None
            except futures.CancelledError:
                raise ConnectionAbortedError("another meeting was called") from None
            self.bridge, self.route = (met.link, met) if isinstance(met, transfer.Route) else (met, None)

    def update(self, generation: int, version: int, digest: str, tensors) -> None:
        """Receive a whole set; raises Refused, and nothing has changed, where it does not fit or come.

        digest: what the trainer calls this set, the same on all of its processes.
        """
        with self.alone():
            if self.route is None or self.bridge.generation != generation:
                raise Refused(409, f"generation: there is no bridge of generation {generation} here", "generation")
            try:
                transfer.check(tensors, self.described)
            except ValueError as error:
                raise Refused(400, str(error), "tensors") from None
            self.worker.call(lockstep.tell, self.worker.engine, "receive")
            new = transfer.receive(self.route, self.worker.tensors)
            self.worker.call(self.worker.install, new, version, digest, generation)

    def aside(self, action, *arguments) -> None:
        """TRL's requests are answered before they are done, in order."""

        def run() -> None:
            try:
                action(*arguments)
            except Exception as error:
                print(f"weights: {error}", file=sys.stderr, flush=True)

        self.line.submit(run)

    def receive_named(self, name: str, dtype: torch.dtype) -> None:
        """One tensor, by its name in the checkpoint; the last one that was missing installs all."""
        with self.alone():
            if self.bridge is None:
                raise Refused(409, "no communicator: the client did not come, or was lost")
            self.named[name] = received = torch.empty(self.places[name][2], dtype=dtype, device=self.device)
            self.bridge.finish(self.bridge.broadcast(received, 1), f"receiving {name}")
            if len(self.named) == len(self.places):
                new = {ours: torch.empty_like(tensor) for ours, tensor in self.worker.tensors.items()}
                for theirs, (ours, rows, _) in self.places.items():
                    new[ours][rows or slice(None)].copy_(self.named[theirs])
                self.named = {}
                self.worker.call(self.worker.install, new, self.worker.version + 1, transfer.digest(new))
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


class Connection(web.Connection):
    """The routes: each takes the fields, and returns the answer or has sent it."""

    @property
    def worker(self) -> Worker:
        return self.server.worker

    def health(self, fields: Fields):
        if self.server.draining or not self.worker.is_alive():
            raise Refused(503, "stopping" if self.server.draining else "the engine has stopped")
        return {"status": "ok"}

    def models(self, fields: Fields):
        limit = context_length(self.worker.engine.model.config)
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "minitrl"}
        return {"object": "list", "data": [model | {"max_model_len": limit}]}

    def completions(self, fields: Fields):
        logprobs = fields.take("logprobs", (int, bool), False)
        if logprobs is True or logprobs:
            raise Refused(400, "logprobs: 0 gives the sampled tokens' own; those of others are not kept", "logprobs")
        prompt = fields.take("prompt", (str, list), MUST, of=(str, list, int))
        numbers = 0 if isinstance(prompt, str) else sum(isinstance(part, int) for part in prompt)
        one = isinstance(prompt, str) or (prompt and numbers == len(prompt))
        if numbers and not one:
            raise Refused(400, "prompt: a text, token ids, or a list of these", "prompt")
        return self.complete(fields, [prompt] if one else prompt, "text_completion", logprobs is not False, 16)

    def chat(self, fields: Fields):
        logprobs = fields.take("logprobs", bool, False)
        messages = fields.take("messages", list, MUST, of=dict)
        most = fields.take("max_completion_tokens", int, None, 1, 2**31)
        try:
            messages = data.checked_prompt({"prompt": messages})
        except ValueError as error:
            raise Refused(400, f"messages: {error}", "messages") from None
        return self.complete(fields, [messages], "chat.completion", logprobs, most)

    def complete(self, fields: Fields, prompts: list, kind: str, with_logprobs: bool, max_tokens: int | None):
        """Sample, and answer in OpenAI's form: at once, or as server-sent events, one a token."""
        model = fields.take("model", str, self.server.name)
        if model != self.server.name:
            raise Refused(404, f"model: {self.server.name} is served here", "model")
        stream, with_ids = fields.take("stream", bool, False), fields.take("return_token_ids", bool, False)
        as_ids, chat = fields.take("return_tokens_as_token_ids", bool, False), kind == "chat.completion"
        fields.take("user", str)
        with_usage = not stream or fields.take("stream_options", dict, {}).get("include_usage") is True
        tokenizer = self.worker.engine.tokenizer
        base = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
                "object": f"{kind}.chunk" if stream and chat else kind}  # fmt: skip

        def logprobs_of(ids: list[int], values: list[float]) -> dict | None:
            names = [f"token_id:{i}" if as_ids else tokenizer.decode([i], skip_special_tokens=False) for i in ids]
            if chat:
                pairs = zip(names, values, strict=True)
                return {"content": [{"token": t, "logprob": x, "bytes": None, "top_logprobs": []} for t, x in pairs]}
            return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": None}

        def choice(p: int, g: int, text: str, ids: list, logprobs: list, reason: str | None, first: bool) -> dict:
            choice = {"index": p * options["n"] + g, "finish_reason": reason}
            choice["logprobs"] = logprobs_of(ids, logprobs) if with_logprobs else None
            if chat:
                role = {"role": "assistant"} if first else {}
                choice["delta" if stream else "message"] = role | {"content": text}
            else:
                choice["text"] = text
            if with_ids:
                choice |= {"token_ids": ids} | ({"prompt_token_ids": prompts[p]} if first else {})
            if reason:
                choice["weight_versions"] = job.requests[p].results[g].versions  # [[version, from token, to token]]
            return choice

        def usage() -> dict:
            counts = [sum(map(len, prompts)), sum(len(r.ids) for request in job.requests for r in request.results)]
            return dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), [*counts, sum(counts)]))

        with self.sampling(fields, prompts, max_tokens, stream) as (prompts, job, options):
            places = [(p, g) for p in range(len(prompts)) for g in range(options["n"])]
            if not stream:
                self.wait(job)
                results = [(p, g, job.requests[p].results[g]) for p, g in places]
                choices = [choice(p, g, r.text, r.ids, r.logprobs, r.finish_reason, True) for p, g, r in results]
                return base | {"choices": choices, "usage": usage()}
            texts = {place: Text(tokenizer, options["stop"]) for place in places}
            self.send_head(200, **{"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
            while (event := self.next_event(job)) is not None:
                p, g, token, logprob, reason = event
                text = texts[p, g]
                first, new = not text.ids, text.add(token)
                if reason:
                    new += text.finish(job.requests[p].results[g].text)
                self.send_event(base | {"choices": [choice(p, g, new, [token], [logprob], reason, first)]})
            if job.error:
                self.send_event(error_of(job.error.status, str(job.error)))
            elif with_usage:
                self.send_event(base | {"choices": [], "usage": usage()})
            self.send(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    @contextmanager
    def sampling(self, fields: Fields, prompts: list, max_tokens: int | None, stream: bool):
        """(ids of the prompts, job, options) of all fields that say how to sample, checked, and the engine at work."""
        config, engine, take, count = self.server.config, self.worker.engine, fields.take, len(prompts)
        if not 0 < count <= config.max_prompts:
            raise Refused(400, f"prompt: from 1 to {config.max_prompts} of them (--max_prompts), not {count}", "prompt")
        options = {"n": take("n", int, 1, 1, config.max_n), "max_tokens": take("max_tokens", int, max_tokens, 1, 2**31)}
        options |= {"min_tokens": take("min_tokens", int, 0, 0, 2**31), "ignore_eos": take("ignore_eos", bool, False)}
        stop = take("stop", (str, list), [], of=str)
        options["stop"] = stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if len(stop) > 16 or not all(0 < len(string) <= 256 for string in stop):
            raise Refused(400, "stop: at most 16 strings of 1 to 256 characters", "stop")
        numbers = {name: take(name, float, 1.0) for name in ("temperature", "top_p", "repetition_penalty")}
        numbers |= {"min_p": take("min_p", float, 0.0), "top_k": take("top_k", int, 0, -1, 2**31)}
        seeds, weights = take("seed", (int, list), of=int), take("weights", (str, list), of=str)
        fields.done()
        if seeds is None:  # nobody is to draw the same twice
            seeds = [secrets.randbits(63) for _ in prompts]
        seeds = seeds if isinstance(seeds, list) else [seeds] * count
        if len(seeds) != count or not all(0 <= seed < 2**63 for seed in seeds):
            raise Refused(400, f"seed: from 0 to 2^63 - 1, or one for each of the {count} prompts", "seed")
        limit = 64 * context_length(engine.model.config)  # before it is encoded, which takes seconds a MiB
        texts = [[p] if isinstance(p, str) else [m["content"] for m in p if isinstance(m, dict)] for p in prompts]
        if any(sum(map(len, parts)) > limit for parts in texts):
            raise Refused(400, f"prompt: a text of more than {limit} characters, 64 a position of the model", "prompt")
        if self.server.draining:
            raise Refused(503, "the server is stopping", **{"Retry-After": "10"})
        job = Job(stream, weights)
        try:
            options["sampling"] = Sampling(**numbers)
            is_ids = [isinstance(prompt, list) and not any(isinstance(i, dict) for i in prompt) for prompt in prompts]
            ids = [p if given else engine.tokenizer.prompt_ids(p) for p, given in zip(prompts, is_ids)]
            options["max_tokens"] = options["max_tokens"] or max(context_length(engine.model.config) - len(ids[0]), 1)
            for p, (prompt, seed) in enumerate(zip(ids, seeds)):
                on_token = functools.partial(job.told, p)
                job.requests.append(engine.prepare(prompt, seed=seed, on_token=on_token, **options))
        except ValueError as error:
            raise Refused(400, str(error)[:500], str(error).split()[0]) from None
        self.worker.call(self.worker.submit, job)
        try:
            yield ids, job, options
        finally:
            self.worker.call(self.worker.close, job)

    def wait(self, job: Job) -> None:
        while not job.done.wait(0.5):
            if self.gone():
                raise ConnectionAbortedError
        if job.error:
            raise job.error

    def next_event(self, job: Job):
        while not self.gone():
            with suppress(queue.Empty):
                return job.events.get(timeout=0.5)
        raise ConnectionAbortedError

    def send_event(self, content: dict) -> None:
        body = f"data: {json.dumps(content, allow_nan=False)}\n\n".encode()
        self.send(b"%x\r\n%b\r\n" % (len(body), body))

    def generate(self, fields: Fields):
        """TRL 0.16.0: ids alone, prompt-major."""
        with self.sampling(fields, fields.take("prompts", list, MUST, of=str), 16, False) as (_, job, _):
            self.wait(job)
            return {"completion_ids": [result.ids for request in job.requests for result in request.results]}

    def init_communicator(self, fields: Fields):
        """TRL's client is rank 1 and comes to us, after the answer. TRL heeds no host and world_size either."""
        fields.take("host", str), fields.take("world_size", int, None, 1, 4096)
        host, port = self.server.config.host, fields.take("port", int, MUST, 1, 65535)
        fields.done()
        if self.worker.engine.tensor.size > 1:
            raise Refused(400, "TRL's client sends whole tensors: start the server with --tensor_parallel_size 1")
        self.server.weights.close()  # a client that was killed may still have the port
        for left in reversed(range(100)):
            try:
                listener = transfer.listen(host, port)
                break
            except OSError as error:
                if not left:
                    raise Refused(409, f"port: {error.strerror}", "port") from None
                time.sleep(0.02)
        self.server.weights.aside(self.server.weights.meet_trl, host, port, listener)
        return {"message": "Request received, initializing communicator"}

    def update_named_param(self, fields: Fields):
        name, dtype = fields.take("name", str, MUST), fields.take("dtype", str, MUST).removeprefix("torch.")
        shape, places = fields.take("shape", list, MUST, of=int), self.server.weights.places
        fields.done()
        if name not in places or list(places[name][2]) != shape:
            raise Refused(400, f"name: no tensor {name[:200]} of shape {shape[:8]} in this model", "name")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise Refused(400, "dtype: torch.bfloat16, torch.float16 or torch.float32", "dtype")
        self.server.weights.aside(self.server.weights.receive_named, name, getattr(torch, dtype))
        return {"message": "Request received, updating named parameter"}

    def reset_prefix_cache(self, fields: Fields):
        self.worker.call(lambda: self.worker.engine.weights_changed(self.worker.version))
        return {"message": "Request received, resetting prefix cache status: True"}

    def close_communicator(self, fields: Fields):
        self.server.weights.close()
        return {"message": "Request received, closing communicator"}

    def weights(self, fields: Fields):
        deterministic = self.worker.engine.model.deterministic
        state = {"version": self.worker.version, "digest": self.worker.digest, "deterministic": deterministic}
        bridge, slices = self.server.weights.bridge, self.worker.engine.tensor.size
        return state | {"generation": bridge and bridge.generation, "tensor_parallel_size": slices,
                        "tensors": self.server.weights.described}

    def weights_meet(self, fields: Fields):
        host, port = fields.take("host", str, MUST), fields.take("port", int, MUST, 1, 65535)
        mesh = tuple(fields.take(name, int, 1, 1, 4096) for name in ("shard", "tensor"))
        generation, secret = fields.take("generation", int, MUST, 0, 2**53), fields.take("secret", str, "")
        fields.done()
        self.server.weights.meet(host, port, generation, secret, mesh)
        return {"generation": generation}

    def weights_update(self, fields: Fields):
        numbers = [fields.take(name, int, MUST, 0, 2**53) for name in ("generation", "version")]
        digest, tensors = fields.take("digest", str, MUST), fields.take("tensors", list, MUST)
        fields.done()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise Refused(400, "digest: 64 hexadecimal digits", "digest")
        self.server.weights.update(*numbers, digest, tensors)
        return {"version": self.worker.version, "digest": self.worker.digest}


Connection.routes = {
    ("GET", "/health"): Connection.health,
    ("GET", "/v1/models"): Connection.models,
    ("POST", "/v1/completions"): Connection.completions,
    ("POST", "/v1/chat/completions"): Connection.chat,
    ("GET", "/weights"): Connection.weights,
    ("POST", "/weights/meet"): Connection.weights_meet,
    ("POST", "/weights/update"): Connection.weights_update,
    ("GET", "/get_tensor_parallel_size"): lambda connection, _: {
        "tensor_parallel_size": connection.worker.engine.tensor.size},
    ("POST", "/generate"): Connection.generate,
    ("POST", "/init_communicator"): Connection.init_communicator,
    ("POST", "/update_named_param"): Connection.update_named_param,
    ("POST", "/reset_prefix_cache"): Connection.reset_prefix_cache,
    ("POST", "/close_communicator"): Connection.close_communicator,
}


class Server(web.Server):
    """The worker and its weights behind HTTP."""

    def __init__(self, config: Config, engine: Engine):
        self.config, self.name, self.draining = config, config.served_model_name or config.model or "toy", False
        limits = config.key, config.max_body_mib * 2**20, config.max_connections
        super().__init__(config.host, config.port, Connection, *limits)
        self.worker = Worker(engine if engine.tensor.size == 1 else lockstep.Leader(engine), config.max_queue)
        self.weights = Weights(self.worker, config)
        self.worker.start()

    def drain(self) -> None:
        """Take no more work, finish what runs, stop."""
        self.draining, deadline = True, time.monotonic() + self.config.drain_timeout
        while self.worker.pending and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the last answers are being written
        self.shutdown()
        self.weights.close()
        self.worker.stop()
        self.worker.join(self.config.drain_timeout)  # until it has told its followers


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    config = parse(Config, argv, preset=lambda given: {} if "model" in given else {"dtype": "float32"})
    world, slices = distributed.start(config.device, config.transfer_timeout), config.tensor_parallel_size
    if world.size != slices:
        raise ValueError(f"--tensor_parallel_size {slices}: {world.size} processes were started; start as many "
                         "(torchrun --nproc_per_node), or for more throughput several servers, on several ports")
    if slices > 1:
        world = distributed.with_mesh(world, (1, 1, slices), config.transfer_timeout, "--tensor_parallel_size")
    if config.model is None:  # as it is at the default --seed; a trainer with another sends its own
        model, tokenizer = toy.build(CommonOptions.seed, world.device)
    else:
        model, tokenizer = checkpoint.load(config.model, getattr(torch, config.dtype), world.device, world=world)
    engine = Engine(model, tokenizer, max_batch=config.max_batch, cache_gib=config.cache_gib,
                    prefill_tokens=config.prefill_tokens, deterministic=config.deterministic)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(1) if stop.is_set() else stop.set())
    if world.rank > 0:  # it ends when the server says so, or is gone
        signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
        lockstep.Follower(engine, config.transfer_timeout).run()
        return 0
    with Server(config, engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"serving {server.name} at {server.url}", flush=True)
        while not stop.wait(1):
            if server.worker.failure:
                time.sleep(1)  # the last answers are being written
                raise server.worker.failure
        print("stopping: no new requests; a second signal ends this at once", flush=True)
        server.drain()
    return 0


if __name__ == "__main__":
    runs.command(main)
