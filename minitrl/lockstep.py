"""One engine on several processes that hold a slice of the model each: the first leads, the others follow.

The engines of a sliced model have to be called the same in the same order (rollout.py). One process, which hears from
outside what is to be sampled, is the leader: ahead of each call it says to all what it is, as JSON over their process
group, and then makes it itself.

    leader      ["enqueue", 7, {...}] engine.enqueue    ["step"] engine.step    ["step"] engine.step    ["stop"]
    follower                          engine.enqueue             engine.step             engine.step    returns

An error that all meet alike, logits that are not finite, ends the requests and no more. Any other may have left the
engines in different states: it ends the leader with a ConnectionError, and with it the group. New weights are received
beside the old ones by each process's own thread, and put in place by all between two steps, or by none.
"""

import sys
import threading
import traceback
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from itertools import count

from . import transfer
from .distributed import any_true, gather_json
from .rollout import Engine, Request
from .sampling import Sampling

FIELDS = ("prompt", "n", "max_tokens", "min_tokens", "stop", "seed")  # of a Request, which JSON has as they are


def tell(engine, *order) -> None:
    """Say to the followers what comes next; nothing where there are none."""
    if engine.tensor.size > 1:
        gather_json(order, engine.tensor)


class Leader:
    """As the engine itself, for the thread of the first process that owns it."""

    def __init__(self, engine: Engine):
        self.engine, self.numbers, self.next = engine, {}, count()

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def enqueue(self, request: Request) -> Request:
        self.numbers[request] = number = next(self.next)
        fields = {name: getattr(request, name) for name in FIELDS}
        tell(self, "enqueue", number, fields, asdict(request.sampling), sorted(request.end_ids))
        return self.engine.enqueue(request)

    def abort(self, request: Request) -> None:
        if request in self.numbers:
            tell(self, "abort", self.numbers.pop(request))
            self.engine.abort(request)

    def weights_changed(self, version: int) -> None:
        tell(self, "weights_changed", version)
        self.engine.weights_changed(version)

    def step(self) -> list[Request]:
        tell(self, "step")
        try:
            finished = self.engine.step()
        except (FloatingPointError, ConnectionError):
            raise
        except Exception as error:
            raise ConnectionError(f"rank 0 of {self.tensor.size}, a step of the engine: {error!r}") from error
        for request in finished:
            del self.numbers[request]
        return finished


def follow(engine: Engine, more: dict) -> None:
    """Repeat what the leader calls until it says stop.  more: what else it may tell, by name."""
    requests = {}
    while True:
        name, *given = gather_json(None, engine.tensor)[0]
        if name == "stop":
            return
        if name == "enqueue":
            number, fields, sampling, end_ids = given
            fields |= {"stop": tuple(fields["stop"]), "sampling": Sampling(**sampling), "end_ids": frozenset(end_ids)}
            requests[number] = engine.enqueue(Request(**fields, on_token=None))
        elif name == "abort":
            engine.abort(requests.pop(*given))
        elif name == "weights_changed":
            engine.weights_changed(*given)
        elif name == "step":
            try:
                engine.step()
            except FloatingPointError:
                pass  # the leader has met it, too, and aborts the requests
            requests = {number: request for number, request in requests.items() if not request.finished}
        else:
            more[name](*given)


def install(engine: Engine, tensors: dict, new: dict | None) -> None:
    """Put new weights in place, on all processes of a sliced model or on none; None where they did not come."""
    if any_true(new is None, engine.tensor):
        raise ConnectionError("not every process of the model has got its slice")
    transfer.install(new, tensors)


class Follower:
    """A process with another slice of the model than the server's own: what it does on the server's word."""

    def __init__(self, engine: Engine, timeout_s: float):
        self.engine, self.timeout_s, self.route, self.staged = engine, timeout_s, Future(), Future()
        self.tensors = {name: p.detach() for name, p in engine.model.named_parameters()}
        transfer.digest(self.tensors, engine.tensor)  # the server's Worker asks for all slices' at its start

    def run(self) -> None:
        more = {"wait": lambda: None, "meet": self.meet, "receive": self.receive, "install": self.install}
        follow(self.engine, more)

    def meet(self, *where) -> None:
        if self.route.done() and not self.route.exception():
            self.route.result().link.close()
        self.route = aside(join, self.engine, self.timeout_s, *where)

    def receive(self) -> None:
        route = self.route
        self.staged = aside(lambda: transfer.receive(route.result(), self.tensors))

    def install(self) -> None:
        staged, self.staged = self.staged, Future()
        try:
            new = staged.result(self.timeout_s)
        except Exception as error:
            print(f"weights: {error}", file=sys.stderr, flush=True)
            new = None
        with suppress(ConnectionError):  # the server says so to who has sent them
            install(self.engine, self.tensors, new)


def join(engine: Engine, timeout_s: float, host: str, port: int, generation: int, secret: str, mesh, unless=None):
    """The route from a trainer's mesh, (shard, tensor), to this process's slice, over a bridge to be met at."""
    slices, senders = engine.tensor, mesh[0] * mesh[1]
    bridge = transfer.Bridge(
        host, port, senders + slices.rank, senders + slices.size, generation=generation, secret=secret,
        device=engine.model.head_weight.device, timeout_s=timeout_s, unless=unless,
    )  # fmt: skip
    return transfer.between(bridge, engine.model.config, mesh, slices.size)


def fulfil(future: Future, function, *arguments) -> None:
    """function(*arguments), and the future told of what it returns or raises."""
    try:
        result = function(*arguments)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # or they would hold on to a bridge and its port
        with suppress(futures.InvalidStateError):  # cancelled: nobody asks any more
            future.set_exception(error)
    else:
        with suppress(futures.InvalidStateError):
            future.set_result(result)


def aside(function, *arguments, future: Future | None = None) -> Future:
    """function(*arguments) in a thread of its own, which nobody has to wait for."""
    future = future or Future()
    threading.Thread(target=fulfil, args=(future, function, *arguments), daemon=True).start()
    return future
