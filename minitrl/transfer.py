"""Weights from the processes that train to those that sample, however each divides them.

What a process holds is rectangles of the checkpoint's tensors (layout.py). `moves` intersects the trainers' with the
samplers': who sends which rectangle to whom. Each pair's rectangles are a stream of its own, point to point, cut into
buckets; no process ever holds more than what it has and what it gets.

    trainer 0  [ rows 0-9 of q ][ rows 0-9 of k ] ...  -- bucket, bucket, digest ->  sampler 0, 1: their columns, rows
    trainer 1  [ rows 10-19 of q ] ...                 -- bucket, bucket, digest ->  sampler 0, 1

Within one world that is all (`within`). Samplers that another launcher started cannot join its process group, and a
group dies whole when one of its processes does. So they meet the trainers at a store that one trainer keeps, and make a
group beside the others, the *bridge*: gloo between CPUs, NCCL between GPUs. A generation number and a secret, which
the samplers get over HTTP, name each meeting, so that who is late for one that has failed does not stumble into the
next. What comes over a bridge goes to staging memory; only when all of it has come everywhere, and every pair's digests
agree, it is installed. What is torn is thrown away.

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

from .distributed import World, _named, gather_json
from .layout import Box, Place, boxes, common
from .parallel import local

BUCKET = 4 * 2**20  # bytes
NothingYet = dist.DistStoreError  # a store's wait was over before what was waited for came
MEET_SECONDS = 60.0  # the keeper of a store has it before others hear of it: who is not there by then will not be


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
            self.store = store_at(host, port, listener, min(timeout_s, MEET_SECONDS))
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

    def agree(self, what: str) -> None:
        """Wait until all have come this far."""
        with _named(what, self.world):
            self.finish([self.group.allreduce([torch.zeros(1, device=self.world.device)])], what)

    def close(self) -> None:
        """Leave; a peer that waits in a broadcast learns it at once."""
        with suppress(RuntimeError, AttributeError):
            self.group.abort()
        self.group = self.store = None


def store_at(host: str, port: int, listener: socket.socket | None, timeout_s: float) -> dist.TCPStore:
    """A store, kept by the process that has the listening socket; the others connect to it."""
    # One that is only told a port listens on every interface; one that gets a socket, where that is bound.
    given = {} if listener is None else {"is_master": True, "master_listen_fd": listener.detach()}
    return dist.TCPStore(host, port, None, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, **given)


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


def describe(config, dtype: torch.dtype) -> list[list]:
    """[[tensor's name in a checkpoint, dtype, [rows, columns]], ...] of a model, as JSON has it."""
    return [[box.tensor, str(dtype).removeprefix("torch."), list(box.shape)] for box in boxes(config)]


def check(theirs, ours: list[list]) -> None:
    """ValueError naming the first tensor in which another's description differs from ours."""
    found = {}
    for entry in theirs if isinstance(theirs, list) else [theirs]:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)) or entry[0] in found:
            raise ValueError(f"tensors: each once as [name, dtype, shape], not {str(entry)[:80]}")
        found[entry[0]] = entry[1:]
    expected = {name: rest for name, *rest in ours}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            ours_is, theirs_is = (" ".join(map(str, side.get(name, ["absent"]))) for side in (expected, found))
            raise ValueError(f"tensor {name[:200]} is {theirs_is[:100]} there and {ours_is} here")


def send(route: "Route", tensors: dict[str, Tensor], dtype: torch.dtype, bucket: int = BUCKET) -> None:
    """Send what others want of this process's parameters; on return all have it, and verified it."""
    _carry_all(route, tensors, {}, dtype, bucket)


def receive(route: "Route", like: dict[str, Tensor], bucket: int = BUCKET) -> dict[str, Tensor]:
    """New tensors by name, whole and verified, as `like` has them, which is left as it is: `install` puts them there.

    ConnectionError where a sender is gone or late, or a digest is another, here or with another receiver.
    """
    new = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    _carry_all(route, {}, new, next(iter(like.values())).dtype, bucket)
    return new


def _carry_all(route: "Route", source: dict, target: dict, dtype: torch.dtype, bucket: int) -> None:
    """Whatever fails here closes the bridge, and so fails with all others: none has it alone."""
    try:
        route.carry(source, target, dtype, verify=True, bucket=bucket)
        route.link.agree("waiting until all have verified the weights")
    except BaseException:
        route.link.close()
        raise


@torch.no_grad()
def install(new: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy a whole set in place, so that whoever holds the old tensors holds the new ones."""
    for name in new.keys() | tensors.keys():
        if name not in new or name not in tensors or new[name].shape != tensors[name].shape:
            raise ValueError(f"tensor {name} is not in both sets, or of two shapes")
    for name, tensor in new.items():
        tensors[name].copy_(tensor)


def digest(tensors: dict[str, Tensor], *worlds: World, bucket: int = BUCKET) -> str:
    """64 hexadecimal digits that change with any bit of this process's parameters, and of those of its worlds."""
    sums = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sums.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for piece in local(tensor).detach().contiguous().view(-1).view(torch.uint8).split(bucket):
            _fold(sums, piece)
    found = sums.hexdigest()
    for world in worlds:
        if world.size > 1:
            found = hashlib.sha256("".join(gather_json(found, world)).encode()).hexdigest()
    return found


def _fold(sums, piece: Tensor) -> None:
    """Hash a bucket by the sums of its 64-bit words, modulo 2^64, over rows and columns of 512: at memory's speed."""
    data = piece.view(-1).view(torch.uint8)
    data = data.clone() if data.storage_offset() % 8 else data  # of a view into another tensor
    whole = len(data) // 4096 * 4096
    for part in (data[:whole], F.pad(data[whole:], (0, -len(data) % 4096))):
        if len(part):
            words = part.view(torch.int64).view(-1, 512)
            sums.update(words.sum(0).cpu().numpy())
            sums.update(words.sum(1).cpu().numpy())


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
    def carry(
        self, source: dict[str, Tensor], target: dict[str, Tensor], dtype: torch.dtype, verify=False, bucket=BUCKET
    ) -> None:
        """Send what others want of `source`, cast to dtype, and fill `target`, which has it, with what they send.

        Both are this process's parameters by name, of FSDP2's the shard. A bucket of each pair's stream, so many bytes,
        travels as the next is filled.  verify: each pair's digests have to agree in the end.
        ConnectionError where a process is gone or late, or a digest is another: then `target` is torn.
        """
        for move in self.own:
            _part(target, move.wanted, move).copy_(_part(source, move.given, move))
        options = dtype, max(bucket // dtype.itemsize, 1), verify
        streams = [(rank, True, self._give(part, source, *options)) for rank, part in self.sends.items()]
        streams += [(rank, False, self._take(part, target, *options, rank)) for rank, part in self.receives.items()]
        flying = [], []  # what to wait for, and the memory that has to last until then
        for number, pieces in enumerate(zip_longest(*(stream for *_, stream in streams))):
            starting = [(*pair, piece) for (*pair, _), piece in zip(streams, pieces) if piece is not None]
            flying, landing = (self.link.exchange(starting), starting), flying
            self.link.finish(landing[0], f"bucket {number} of the weights")
        self.link.finish(flying[0], "the last bucket of the weights")

    def _give(self, moves_: list[Move], source, dtype, size: int, verify: bool) -> Iterator[Tensor | None]:
        """What one other process gets, piece by piece: buckets; after one turn without any, their digest."""
        sums = hashlib.sha256()
        for part in _buckets(moves_, size):
            data = self._room(part, dtype)
            for move, piece in _pieces(part, data):
                piece.copy_(_part(source, move.given, move))
            _fold(sums, data) if verify else None
            yield data
        if verify:
            yield None
            yield torch.frombuffer(bytearray(sums.digest()), dtype=torch.uint8).to(self.link.world.device)

    def _take(self, moves_: list[Move], target, dtype, size: int, verify: bool, rank: int) -> Iterator[Tensor | None]:
        """Room for what one other process sends; each piece is there when the next but one is asked for."""
        sums, landed = hashlib.sha256(), None

        def unpack(part: list[Move], data: Tensor) -> None:
            _fold(sums, data) if verify else None
            for move, piece in _pieces(part, data):
                _part(target, move.wanted, move).copy_(piece)

        for part in _buckets(moves_, size):
            data = self._room(part, dtype)
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

    def _room(self, part: list[Move], dtype) -> Tensor:
        return torch.empty(sum(move.size for move in part), dtype=dtype, device=self.link.world.device)


def _pieces(part: list[Move], data: Tensor) -> Iterator[tuple[Move, Tensor]]:
    """A bucket's moves, and where in its data each stands."""
    return ((move, piece.view(move.shape)) for move, piece in zip(part, data.split([move.size for move in part])))


def within(world: World, config, slices: int) -> Route:
    """From a mesh's parameters to models of tensor size `slices`, one to each so many ranks of the same world."""
    mesh = _all_boxes(config, world.shard.size, world.tensor.size) * world.replicate.size
    models = _all_boxes(config, 1, slices) * (world.size // slices)
    return Route(Link(world, world.group or dist.group.WORLD), mesh, models, colocated=True)


def between(bridge: Bridge, config, mesh: tuple[int, int], slices: int) -> Route:
    """From a trainer's mesh of (shard, tensor) to one model of tensor size `slices`."""
    return Route(bridge, _all_boxes(config, *mesh), _all_boxes(config, 1, slices))


def _all_boxes(config, shards: int, slices: int) -> list[list[Box]]:
    return [boxes(config, Place(s, shards, t, slices)) for s in range(shards) for t in range(slices)]


def _part(tensors: dict[str, Tensor], box: Box, move: Move) -> Tensor:
    """A view of a move's elements within the parameter that holds them."""
    whole = local(tensors[box.parameter])
    whole = whole if whole.dim() == 2 else whole[:, None]
    if len(whole) < box.at + box.shape[0] or whole.shape[1] != box.shape[1]:
        raise ValueError(f"{box.parameter} is {list(whole.shape)} here, which has no {list(box.shape)} at row {box.at}")
    top, left = box.at + move.rows[0] - box.rows[0], move.columns[0] - box.columns[0]
    return whole[top : top + move.shape[0], left : left + move.shape[1]]


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
