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
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .distributed import World, _named
from .layout import Box, Place, boxes, common

BUCKET = 16 * 2**20  # bytes
MEET_SECONDS = 60.0  # the keeper of a store has it before others hear of it: who is not there by then will not be
ALIGN = 16  # each tensor begins at a multiple of so many bytes, so that the staging memory can be viewed as it


class Link:
    """Messages from one to another within a process group, started together and waited for later."""

    def __init__(self, world: World, group):
        self.world, self.group, self.timeout = world, group, timedelta(0)  # 0: as the group has it

    def exchange(self, pieces: list[tuple[int, bool, Tensor]]) -> list:
        """Start to send, or to receive, contiguous tensors: (the other's rank, whether to send, tensor)."""
        with _named("starting to exchange weights", self.world):
            # NCCL's have to be in one group, or one waits for the other; gloo's are on their way at once.
            backend = self.group._get_backend(self.world.device) if hasattr(self.group, "_get_backend") else self.group
            together = self.world.device.type == "cuda" and len(pieces) > 0
            if together:
                backend._start_coalescing()
            works = [(backend.send if ours else backend.recv)([piece], rank, 0) for rank, ours, piece in pieces]
            return [backend._end_coalescing()] if together else works

    def finish(self, works: list, what: str) -> None:
        """Wait for what was started; `what` stands in the error."""
        with _named(what, self.world):
            for work in works:
                work.wait(self.timeout)
            if self.world.device.type == "cuda":
                torch.cuda.current_stream(self.world.device).synchronize()


class Bridge(Link):
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
            return [self.group.broadcast(tensor, root)]

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
    for number, piece in enumerate(_stream(tensors, bucket), 1):
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
    for piece in _stream(tensors, bucket):
        _fold(sums, piece)
    return sums.hexdigest()


def _fold(sums, piece: Tensor) -> None:
    """Hash a bucket by the sums of its 32-bit words over rows and columns of 1024: exact, and as fast as memory."""
    words = F.pad(piece.view(-1).view(torch.uint8), (0, -piece.nbytes % 4096)).view(torch.int32).view(-1, 1024)
    for dim in (0, 1):
        sums.update(words.sum(dim, dtype=torch.int64).cpu().numpy() if piece.is_cuda else words.numpy().sum(dim, "int64"))


def _as_tensor(sums, link: Link) -> Tensor:
    return torch.frombuffer(bytearray(sums.digest()), dtype=torch.uint8).to(link.world.device)


def _places(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[int, int]], int]:
    """Each tensor's first and last byte in the stream, by name in order, and the stream's length."""
    places, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        places[name] = (end, end + size)
        end += math.ceil(size / ALIGN) * ALIGN
    return places, end


def _stream(tensors: dict[str, Tensor], size: int) -> Iterator[Tensor]:
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


@dataclass(frozen=True)
class Move:
    """A rectangle of a checkpoint's tensor, that source number `source` sends to target number `target`."""

    source: int
    target: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    given: Box  # the source's that it is a part of
    wanted: Box  # the target's

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def moves(sources: list[list[Box]], targets: list[list[Box]], colocated: bool = False) -> Iterator[Move]:
    """Who sends which rectangle to whom, so that each element of each target's boxes comes exactly once.

    sources, targets: what each holds; two sources' boxes are the same rectangle, or have nothing in common. Of several
    that hold one, the one sends it that has sent the least so far. Each pair's moves are in the checkpoint's order.
    colocated: source i is target i, and leaves itself what it can. ValueError for what no source holds.
    """
    held, load = _rectangles(sources), [0] * len(sources)
    for tensor, rectangles in _rectangles(targets).items():
        for takers in rectangles.values():
            missing = math.prod(takers[0][1].shape)
            for givers in held.get(tensor, {}).values():
                if (shared := common(givers[0][1], takers[0][1])) is None:
                    continue
                for target, wanted in takers:
                    itself = [giver for giver in givers if colocated and giver[0] == target]
                    source, given = itself[0] if itself else min(givers, key=lambda giver: load[giver[0]])
                    move = Move(source, target, *shared, given, wanted)
                    load[source] += 0 if itself else move.size
                    yield move
                missing -= move.size
            if missing:
                raise ValueError(f"tensor {tensor}: {missing} of its elements are with none of {len(sources)} sources")


def _rectangles(lists: list[list[Box]]) -> dict[str, dict[tuple, list[tuple[int, Box]]]]:
    """Tensor -> rectangle -> the numbers of those who hold it, each with its own box."""
    found = {}
    for number, held in enumerate(lists):
        for box in held:
            found.setdefault(box.tensor, {}).setdefault((box.rows, box.columns), []).append((number, box))
    return found


class Route:
    """What this process sends and receives when weights go from one layout to another: worked out once, used often.

    sources, targets: the boxes of each. In the link's group the sources are ranks 0, 1, ... and the targets the next
    ones, or, if colocated, the same.
    """

    def __init__(self, link: Link, sources: list[list[Box]], targets: list[list[Box]], colocated: bool = False):
        first, rank = 0 if colocated else len(sources), link.world.rank
        self.link, self.own, self.sends, self.receives = link, [], {}, {}  # moves: here, and by the other's rank
        for move in moves(sources, targets, colocated):
            source, target = move.source, first + move.target
            if source == target == rank:
                self.own.append(move)
            elif source == rank:
                self.sends.setdefault(target, []).append(move)
            elif target == rank:
                self.receives.setdefault(source, []).append(move)

    @torch.no_grad()
    def carry(self, source: dict[str, Tensor], target: dict[str, Tensor], dtype: torch.dtype, verify=False, bucket=BUCKET):
        """Send what others want of `source`, and fill `target`, whose dtype that is, with what they send.

        Both are this process's parameters by name, of FSDP2's the shard. A bucket of each pair's stream, so many bytes,
        travels as the next is filled.  verify: each pair's digests have to agree in the end.
        ConnectionError where a process is gone or late, or a digest is another: then `target` is torn.
        """
        for move in self.own:
            _part(target, move.wanted, move).copy_(_part(source, move.given, move))
        options = dtype, max(bucket // dtype.itemsize, 1), verify
        streams = [(rank, True, self._give(part, source, *options)) for rank, part in self.sends.items()]
        streams += [(rank, False, self._take(part, target, *options, rank)) for rank, part in self.receives.items()]
        flying = []
        for number, pieces in enumerate(zip_longest(*(stream for *_, stream in streams))):
            starting = [(*pair, piece) for (*pair, _), piece in zip(streams, pieces) if piece is not None]
            flying, landing = self.link.exchange(starting), flying
            self.link.finish(landing, f"bucket {number} of the weights")
        self.link.finish(flying, "the last bucket of the weights")

    def _give(self, moves_: list[Move], source, dtype, size: int, verify: bool) -> Iterator[Tensor | None]:
        """What one other process gets, piece by piece: buckets; after one turn without any, their digest."""
        sums = hashlib.sha256()
        for part in _buckets(moves_, size):
            data = torch.cat([_part(source, move.given, move).to(dtype).flatten() for move in part])
            _fold(sums, data) if verify else None
            yield data
        if verify:
            yield None
            yield _as_tensor(sums, self.link)

    def _take(self, moves_: list[Move], target, dtype, size: int, verify: bool, rank: int) -> Iterator[Tensor | None]:
        """Room for what one other process sends; each piece is there when the next but one is asked for."""
        sums, landed = hashlib.sha256(), None

        def unpack(part: list[Move], data: Tensor) -> None:
            _fold(sums, data) if verify else None
            for move, piece in zip(part, data.split([move.size for move in part])):
                _part(target, move.wanted, move).copy_(piece.view(move.shape))

        for part in _buckets(moves_, size):
            data = torch.empty(sum(move.size for move in part), dtype=dtype, device=self.link.world.device)
            yield data
            if landed:
                unpack(*landed)
            landed = part, data
        yield None
        unpack(*landed)
        if verify:
            theirs = torch.empty(32, dtype=torch.uint8, device=self.link.world.device)
            yield theirs
            yield None
            with _named("verifying the weights", self.link.world):
                if bytes(theirs.tolist()) != sums.digest():
                    raise RuntimeError(f"their digest is not the one that rank {rank} sent")


def within(world: World, config, tensors: int) -> Route:
    """From a mesh's parameters to models of tensor size `tensors`, one to each so many ranks of the same world."""
    shards, slices = world.shard.size, world.tensor.size
    sources = [boxes(config, Place(rank // slices % shards, shards, rank % slices, slices)) for rank in range(world.size)]
    targets = [boxes(config, Place(tensor=rank % tensors, tensors=tensors)) for rank in range(world.size)]
    return Route(Link(world, world.group or dist.group.WORLD), sources, targets, colocated=True)


def _part(tensors: dict[str, Tensor], box: Box, move: Move) -> Tensor:
    """A view of a move's elements within the parameter that holds them."""
    whole = tensors[box.parameter]
    local = whole.to_local() if hasattr(whole, "to_local") else whole
    local = local if local.dim() == 2 else local[:, None]
    if len(local) < box.at + box.shape[0] or local.shape[1] != box.shape[1]:
        raise ValueError(f"{box.parameter} is {list(local.shape)} here, too small for {list(box.shape)} at row {box.at}")
    top, left = box.at + move.rows[0] - box.rows[0], move.columns[0] - box.columns[0]
    return local[top : top + move.shape[0], left : left + move.shape[1]]


def _buckets(moves_: list[Move], size: int) -> Iterator[list[Move]]:
    """Moves in bundles of at most `size` elements, large ones cut by rows (of which one may be larger)."""
    bundle, room = [], size
    for move in moves_:
        (top, bottom), width = move.rows, move.shape[1]
        while top < bottom:
            rows = min(bottom - top, max(room // width, not bundle))
            if rows:
                bundle.append(replace(move, rows=(top, top + rows)))
                top, room = top + rows, room - rows * width
            if top < bottom or room <= 0:
                yield bundle
                bundle, room = [], size
    if bundle:
        yield bundle
