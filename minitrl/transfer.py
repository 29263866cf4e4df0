"""Weights from a trainer to rollout workers that another launcher started: over a process group of their own.

A default process group cannot be joined from outside, and it dies whole when one of its processes does. So trainer and
worker meet at a store that the trainer keeps and make a group beside it, the *bridge*: gloo between CPUs, NCCL between
GPUs. A generation number and a secret, which the worker gets over HTTP, name each meeting, so that who is late for one
that has failed does not stumble into the next.

    worker's tensors  ->  describe -> checked by both sides before the first byte
    trainer's bytes   ->  [ bucket ][ bucket ][ buc ][ digest ]  ->  staging memory  ->  digest equal?  ->  install

All tensors are one stream of bytes in the order of their names, and a bucket is so many bytes of it, wherever tensors
begin and end. Until the digest has come and agrees the worker's weights are untouched: what is torn is thrown away.
Nothing but raw bytes travels, and nothing is unpickled; a store and a group listen on the one address that was given,
never on all.
"""

import hashlib
import math
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .distributed import World, _named

BUCKET = 16 * 2**20  # bytes
MEET_SECONDS = 60.0  # the keeper of a store has it before others hear of it: who is not there by then will not be
ALIGN = 16  # each tensor begins at a multiple of so many bytes, so that the staging memory can be viewed as it


class Bridge:
    """A process group of `size` processes of any worlds. Every wait is bounded by timeout_s, and ends in a
    ConnectionError that names rank and phase.

    host, port: of the store.  listener: the listening socket of the one process that keeps the store (`listen`).
    generation, secret: the same for all who are to meet.  device: where the tensors to send or receive lie.
    unless: called while the keeper waits for the others; what it raises ends that.
    """

    def __init__(self, host: str, port: int, rank: int, size: int, *, generation: int, secret: str = "",
                 device="cpu", timeout_s: float = 300.0, listener: socket.socket | None = None, unless=None):
        self.world = World(rank, size, torch.device(device))
        self.generation, self.timeout = generation, timedelta(seconds=timeout_s)
        with _named(f"meeting at {host}:{port}, generation {generation}", self.world):
            # A store that is only told a port listens on every interface; one that gets a socket, where that is bound.
            given = {"is_master": False} if listener is None else {"is_master": True}
            if listener is not None:
                given["master_listen_fd"] = listener.detach()
            patience = min(self.timeout, timedelta(seconds=MEET_SECONDS))
            self.store = dist.TCPStore(host, port, None, timeout=patience, wait_for_workers=False, **given)
            store = dist.PrefixStore(f"bridge/{generation}/{secret}", self.store)
            store.set(f"here/{rank}", "")
            deadline = time.monotonic() + timeout_s
            while unless and not store.check([f"here/{other}" for other in range(size)]):
                unless()
                if time.monotonic() > deadline:
                    raise RuntimeError("nobody came")
                time.sleep(0.02)
            if self.world.device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self.timeout
                self.group = dist.ProcessGroupNCCL(store, rank, size, options)
            else:
                options = dist.ProcessGroupGloo._Options()
                options._timeout = self.timeout
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_address(host, port))]
                self.group = dist.ProcessGroupGloo(store, rank, size, options)

    def broadcast(self, tensor: Tensor, root: int = 0):
        """Start to send, on rank `root`, or to receive a contiguous tensor; returns what `finish` waits for."""
        with _named("starting a broadcast", self.world):
            return self.group.broadcast(tensor, root)

    def finish(self, work, what: str) -> None:
        """Wait for a broadcast; `what` stands in the error."""
        with _named(what, self.world):
            work.wait(self.timeout)
            if self.world.device.type == "cuda":
                torch.cuda.current_stream(self.world.device).synchronize()

    def close(self) -> None:
        """Leave; a peer that waits in a broadcast learns it at once."""
        with suppress(RuntimeError, AttributeError):
            self.group.abort()
        self.group = self.store = None


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket for a store: on that one address, at a free port unless one is given (OSError where it is taken)."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def local_address(host: str, port: int) -> str:
    """The address of this machine that talks to `host`: loopback for loopback."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return probe.getsockname()[0]


def describe(tensors: dict[str, Tensor]) -> list[list]:
    """[[name, dtype, shape], ...] in the order of the stream, as JSON has it."""
    return [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors.items())]


def check(described, tensors: dict[str, Tensor]) -> None:
    """ValueError naming the first tensor in which a description differs from `tensors`."""
    ours = {name: [dtype, shape] for name, dtype, shape in describe(tensors)}
    theirs = {}
    for entry in described if isinstance(described, list) else [described]:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)) or entry[0] in theirs:
            raise ValueError(f"tensors: each once as [name, dtype, shape], not {str(entry)[:80]}")
        theirs[entry[0]] = entry[1:]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            ours_is, theirs_is = (" ".join(map(str, side.get(name, ["absent"]))) for side in (ours, theirs))
            raise ValueError(f"tensor {name[:200]} is {theirs_is[:100]} there and {ours_is} here")


def send(bridge: Bridge, tensors: dict[str, Tensor], bucket: int = BUCKET) -> str:
    """Send from this rank to all others, who `receive`; returns the digest. One bucket is filled as another travels."""
    sums, flying = hashlib.sha256(), None
    for number, piece in enumerate(_buckets(tensors, bucket), 1):
        work = bridge.broadcast(piece, bridge.world.rank)
        _fold(sums, piece)
        if flying:
            bridge.finish(flying, f"sending bucket {number - 1} of the weights")
        flying = work
    bridge.finish(flying, "sending the last bucket of the weights")
    final = torch.frombuffer(bytearray(sums.digest()), dtype=torch.uint8).to(bridge.world.device)
    bridge.finish(bridge.broadcast(final, bridge.world.rank), "sending the weights' digest")
    return sums.hexdigest()


def receive(bridge: Bridge, tensors: dict[str, Tensor], root: int = 0, bucket: int = BUCKET):
    """(new tensors by name, digest) of what rank `root` sends, in memory of their own, whole and verified.

    `tensors` says what to expect and is left as it is: `install` puts the new ones there. ConnectionError where the
    sender is gone or late, or the digest is another: then nothing has happened.
    """
    places, total = _places(tensors)
    flat, sums = torch.empty(total, dtype=torch.uint8, device=bridge.world.device), hashlib.sha256()
    for number, piece in enumerate(flat.split(bucket), 1):
        bridge.finish(bridge.broadcast(piece, root), f"receiving bucket {number} of the weights")
        _fold(sums, piece)
    final = torch.empty(32, dtype=torch.uint8, device=bridge.world.device)
    bridge.finish(bridge.broadcast(final, root), "receiving the weights' digest")
    with _named("verifying the weights", bridge.world):
        if bytes(final.tolist()) != sums.digest():
            raise RuntimeError(f"their digest is {sums.hexdigest()}, not what the sender says; nothing was installed")
    new = {name: flat[a:b].view(tensors[name].dtype).view(tensors[name].shape) for name, (a, b) in places.items()}
    return new, sums.hexdigest()


@torch.no_grad()
def install(new: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy a whole set in place, so that whoever holds the old tensors holds the new ones."""
    check(describe(new), tensors)
    for name, tensor in new.items():
        tensors[name].copy_(tensor)


def digest(tensors: dict[str, Tensor], bucket: int = BUCKET) -> str:
    """64 hexadecimal digits that change with any bit: what `send` and `receive` return of the same tensors."""
    sums = hashlib.sha256()
    for piece in _buckets(tensors, bucket):
        _fold(sums, piece)
    return sums.hexdigest()


def _fold(sums, piece: Tensor) -> None:
    """Hash a bucket; a GPU's by the sums of its 32-bit words over rows and columns of 1024, which are exact."""
    if not piece.is_cuda:
        sums.update(piece.numpy())
        return
    words = piece.view(torch.int32)
    words = F.pad(words, (0, -len(words) % 1024)).view(-1, 1024)
    for dim in (0, 1):
        sums.update(words.sum(dim, dtype=torch.int64).cpu().numpy())


def _places(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[int, int]], int]:
    """Each tensor's first and last byte in the stream, by name in order, and the stream's length."""
    places, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        places[name] = (end, end + size)
        end += math.ceil(size / ALIGN) * ALIGN
    return places, end


def _buckets(tensors: dict[str, Tensor], size: int) -> Iterator[Tensor]:
    """The stream in buckets, by turns in two buffers: one is good until the next but one is asked for."""
    places, total = _places(tensors)
    device = next(iter(tensors.values())).device
    buffers, waiting = [torch.zeros(min(size, total), dtype=torch.uint8, device=device) for _ in range(2)], list(places)
    for number, start in enumerate(range(0, total, size)):
        piece = buffers[number % 2][: min(size, total - start)].zero_()
        for name in list(waiting):
            a, b = places[name]
            if a >= start + len(piece):
                break
            data = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
            piece[max(a - start, 0) : b - start].copy_(data[max(start - a, 0) : start + len(piece) - a])
            if b <= start + len(piece):
                waiting.remove(name)
        yield piece
