"""Processes: who am I, and the few collectives that training needs. One process needs no process group at all.

`torchrun --nproc_per_node N -m minitrl.grpo` starts N of us and tells each its place through environment variables;
`python -m minitrl.grpo` is the same with N = 1. gloo carries the tensors of CPUs, NCCL those of GPUs. No collective
here pickles anything: what travels is tensors. A job's own process group is trusted.

N = replicate x shard x tensor processes form a mesh, tensor the innermost (world.replicate, .shard, .tensor):

    replicate   each has the whole, and its own part of the step's data; gradients are summed
    shard       the same, but parameters, gradients and optimizer state are divided: FSDP2 gathers a block at a time
    tensor      all compute one part of the step together, each with a slice of every matrix, in Megatron's form with
                the activations between blocks divided by rows (arXiv 2205.05198)

world.data is replicate and shard together: the processes among which the data of a step are divided. What is done to a
model so that it lies on a mesh stands in parallel.py.
"""

import ctypes
import json
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, groupby

import torch
import torch.distributed as dist
from torch import Tensor

PR_SET_PDEATHSIG = 1  # prctl.h's number
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h's numbers
BUCKET = 2**28  # numbers that are summed at a time, and one tensor more: a GiB beside the gradients, not all of them
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # one of these says that a launcher started us; then all must be there
_STORE = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's place among all, or among those of a dimension of the mesh: rank 0 .. size-1, and its device."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # None: all processes
    parts: dict[str, "World"] = field(default_factory=dict)  # of the mesh, where there is one
    option: str = "--tensor"  # how the user asked for this `tensor`, for who cannot be divided so

    @property
    def data(self) -> "World":
        """The processes among which a step's data are divided: all, but those of one `tensor` count as one."""
        return self.parts.get("data", self)

    @property
    def replicate(self) -> "World":
        """The processes that hold the same as this one."""
        return self.parts.get("replicate", self)

    @property
    def shard(self) -> "World":
        """The processes among which parameters are divided by FSDP2."""
        return self.parts.get("shard", World(0, 1, self.device))

    @property
    def tensor(self) -> "World":
        """The processes among which every matrix is divided."""
        return self.parts.get("tensor", World(0, 1, self.device))

    @property
    def divides(self) -> bool:
        """Whether a process holds a part of the weights alone."""
        return self.shard.size * self.tensor.size > 1


ALONE = World(0, 1, torch.device("cpu"))


def start(device: str = "auto", timeout_s: float = 1800, mesh=(None, None, 1)) -> World:
    """Join the other processes. `device` is auto, cpu or cuda; `timeout_s` bounds every wait for another process.

    mesh: (replicate, shard, tensor); of the first two, one that is None is what the number of processes leaves (both:
    all replicate).

    Raises ValueError for half-set launcher variables, a missing GPU, a taken port, or a mesh of another size than the
    number of processes; ConnectionError when the others do not come within the time.
    """
    place = _place_from_environment()
    rank, size, local_rank = place["RANK"], place["WORLD_SIZE"], place["LOCAL_RANK"]
    mesh = mesh_sizes(size, *mesh)
    world = World(rank, size, _device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        _keep_memory()
    _die_with_launcher()
    if size == 1:
        return world
    _share_cores(place["LOCAL_WORLD_SIZE"])
    cuda = world.device.type == "cuda"
    address = ":".join(os.environ[name] for name in _STORE)
    with _named(f"while all processes meet at {address}", world):
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=_fresh_store(rank, size, timeout_s),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=world.device if cuda else None,
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ValueError(
                f"MASTER_PORT {os.environ['MASTER_PORT']}: another program listens there already (another run on this "
                "machine?); give torchrun --standalone, or another --master_port"
            ) from None
    return with_mesh(world, mesh, timeout_s) if mesh[1:] != (1, 1) else world


def _fresh_store(rank: int, size: int, timeout_s: float) -> dist.Store:
    """Where the processes leave their addresses for each other: a part of torchrun's store that no earlier start used.

    torchrun keeps one store over its restarts, and who comes first would find the addresses of the dead. So all come to
    where rank 0 says, and go on once it names them: each by a word that is new with each start.
    """
    store = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]
    mine, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
    if rank == 0:
        store.set("meeting", mine)
        everyone = [store.get(f"{mine}/{other}").decode() for other in range(1, size)]
        store.set(f"{mine}/all", json.dumps(everyone))
        return dist.PrefixStore(mine, store)
    while time.monotonic() < deadline:
        lead = store.get("meeting").decode()
        store.set(f"{lead}/{rank}", mine)
        if store.check([f"{lead}/all"]) and mine in json.loads(store.get(f"{lead}/all")):
            return dist.PrefixStore(lead, store)
        time.sleep(0.05)
    raise dist.DistStoreError("rank 0 did not come, or not all of the others did")


def mesh_sizes(size: int, replicate: int | None, shard: int | None, tensor: int) -> tuple[int, int, int]:
    """(replicate, shard, tensor) of `size` processes. ValueError where they do not fit."""
    for name, value in (("replicate", replicate), ("shard", shard), ("tensor", tensor)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if shard is None:
        shard = max(1, size // (replicate * tensor)) if replicate else 1
    if replicate is None:
        replicate = max(1, size // (shard * tensor))
    if replicate * shard * tensor != size:
        raise ValueError(
            f"--replicate {replicate} --shard {shard} --tensor {tensor}: the product must be the number of processes, "
            f"{size}; leave one of the first two out, or start as many (torchrun --nproc_per_node)"
        )
    return replicate, shard, tensor


def with_mesh(world: World, mesh: tuple[int, int, int], timeout_s: float, option: str = World.option) -> World:
    """The same world with its `parts`, each a process group of its own. option: that gave its `tensor`."""
    ranks = torch.arange(world.size).view(mesh)
    kept = {"replicate": (0,), "shard": (1,), "tensor": (2,), "data": (0, 1)}
    parts = {}
    for name, dims in kept.items():
        others = [dim for dim in range(3) if dim not in dims]
        lists = ranks.permute(*others, *dims).reshape(-1, math.prod(mesh[dim] for dim in dims)).tolist()
        mine = next(members for members in lists if world.rank in members)
        group = None
        if len(mine) > 1:
            group, _ = dist.new_subgroups_by_enumeration(lists, timeout=timedelta(seconds=timeout_s))
        parts[name] = World(mine.index(world.rank), len(mine), world.device, group, option=option)
    return World(world.rank, world.size, world.device, None, parts)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def keepers(world: World, timeout_s: float) -> World | None:
    """The processes that together hold one whole, in a group of their own on the CPU, for work beside the training.

    They are the first of `replicate`; on the others None. All processes call this.
    """
    size = world.shard.size * world.tensor.size
    if size == 1:
        return ALONE if world.rank == 0 else None
    with _named("while those who save meet", world):
        group = dist.new_group(range(size), timedelta(seconds=timeout_s), backend="gloo")
    return World(world.rank, size, ALONE.device, group, world.parts) if world.rank < size else None


def sum_(tensors: list[Tensor], world: World) -> None:
    """Add up each tensor over all processes, in place, in fp32 (fp64 if any tensor is fp64), many in one all-reduce.

    Every process passes the same shapes in the same order. Token counts go in as fp64: exact up to 2^53.
    """
    assert all(tensor.is_floating_point() for tensor in tensors), "counts travel as float64"
    if world.size == 1 or not tensors:
        return
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    where = {"device": world.device, "dtype": torch.float64 if wide else torch.float32}  # NCCL takes no CPU tensors
    ends = accumulate(tensor.numel() for tensor in tensors)
    for _, bucket in groupby(zip(ends, tensors), lambda pair: pair[0] // BUCKET):
        some = [tensor.detach() for _, tensor in bucket]
        flat = torch.cat([tensor.reshape(-1).to(**where) for tensor in some])
        with _named(f"summing {len(some)} tensors", world):
            dist.all_reduce(flat, group=world.group)
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some])):
            tensor.copy_(part.view(tensor.shape))


def gather_ragged(tensor: Tensor, world: World) -> list[Tensor]:
    """Every process's tensor, in the order of ranks, on every process; only the first dimension may differ in size.

    Tensors travel as padded bytes, so any dtype goes through gloo and NCCL alike.
    """
    assert tensor.dim() >= 1, "a scalar has no first dimension"
    if world.size == 1:
        return [tensor]
    row_bytes = tensor[:1].numel() * tensor.element_size() if len(tensor) else 0
    mine = torch.tensor([len(tensor), row_bytes], device=world.device)
    shapes = mine.new_empty(world.size, 2)
    with _named("gathering sizes", world):
        dist.all_gather(list(shapes.unbind()), mine, group=world.group)
    lengths, widths = shapes.T.tolist()
    width = max(widths)
    assert all(w in (0, width) for w in widths), f"rows of unequal size or dtype: {widths} bytes"
    if width == 0:
        return [torch.empty_like(tensor) for _ in lengths]
    padded = torch.zeros(max(lengths) * width, dtype=torch.uint8, device=world.device)
    padded[: tensor.numel() * tensor.element_size()] = tensor.detach().contiguous().view(-1).view(torch.uint8)
    received = [torch.empty_like(padded) for _ in lengths]
    with _named("gathering tensors", world):
        dist.all_gather(received, padded, group=world.group)
    return [
        data[: n * width].view(tensor.dtype).view(n, *tensor.shape[1:]).to(tensor.device)
        for data, n in zip(received, lengths)
    ]


def gather_json(value, world: World) -> list:
    """Every process's value, anything that JSON has, in the order of ranks, on every process."""
    if world.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in gather_ragged(text, world)]


def any_true(flag: bool, world: World) -> bool:
    """Whether the flag is true on any process: all stop together, or none does."""
    if world.size == 1:
        return bool(flag)
    vote = torch.tensor(int(flag), device=world.device)
    with _named("agreeing on a flag", world):
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=world.group)
    return bool(vote.item())


def barrier(world: World, what: str = "at a barrier") -> None:
    """Wait until every process is here; `what` stands in the error if one does not come in time."""
    if world.size > 1:
        with _named(what, world):
            # A sum instead of dist.barrier(): it waits on the device that we gave, and times out under our name.
            dist.all_reduce(torch.zeros(1, device=world.device), group=world.group)
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)


def meet(world: World, what: str, timeout_s: float = 30.0) -> None:
    """Wait so long, and no longer, until all are here; on the CPU. The ConnectionError says which rank is not."""
    if world.size > 1:
        with _named(what, world):
            dist.monitored_barrier(world.group, timedelta(seconds=timeout_s))


def carry(tensor: Tensor, source: int, target: int, world: World) -> None:
    """On rank `source` send the tensor to rank `target`, which receives it in its own; it is contiguous."""
    with _named(f"carrying a tensor from rank {source} to {target}", world):
        if world.rank == source:
            dist.send(tensor, group=world.group, group_dst=target)
        else:
            dist.recv(tensor, group=world.group, group_src=source)


@contextmanager
def together(what: str, world: World, tells: Callable[[], bool] = lambda: True):
    """An error inside, on one process, ends the block with an error on all: none waits for what will not come.

    For work without collectives of its own, which all processes enter at the same place. Who fails where others may be
    in some (tells() is false) tells nobody, since they would not hear it: that it ends is what wakes them.
    """
    try:
        yield
    except Exception:
        with suppress(ConnectionError):  # what failed here is what the user has to see
            tells() and any_true(True, world)
        raise
    if any_true(False, world):
        raise ConnectionError(f"rank {world.rank} of {world.size}, {what}: another process failed, and says why")


def print0(world: World, *values) -> None:
    """Print on rank 0 alone, at once."""
    if world.rank == 0:
        print(*values, flush=True)


@contextmanager
def _named(what: str, world: World):
    """A collective fails when another process died or hangs: say where this one stood."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {world.rank} of {world.size}, {what}: another process is gone or too late ({error})"
        ) from error


@contextmanager
def among_others(what: str, world: World):
    """The same around more than our own collectives, for FSDP2's; errors of other kinds stay what they are."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        with _named(what, world):
            raise


def _place_from_environment() -> dict[str, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them, or those of a process on its own."""
    if not any(name in os.environ for name in _PLACE):
        return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    missing = [name for name in _PLACE + _STORE if not os.environ.get(name)]
    if missing:
        given = ", ".join(name for name in _PLACE + _STORE if name not in missing)
        raise ValueError(
            f"environment: {given} set but not {', '.join(missing)}; start with torchrun, which sets all, or unset them"
        )
    place = {}
    for name in _PLACE + ("LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name, os.environ["WORLD_SIZE"])  # without LOCAL_WORLD_SIZE: all on this machine
        if not text.isdecimal():
            raise ValueError(f"environment: {name}={text!r} is not a whole number; start with torchrun, which sets it")
        place[name] = int(text)
    if place["RANK"] >= place["WORLD_SIZE"]:
        raise ValueError(f"environment: RANK={place['RANK']} but WORLD_SIZE={place['WORLD_SIZE']}; ranks count from 0")
    return place


def _device(name: str, local_rank: int) -> torch.device:
    """Turn --device into this process's own device: one GPU a process."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: auto, cpu or cuda (CUDA_VISIBLE_DEVICES picks among several GPUs)")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        remedy = f"start at most {gpus} processes a machine (--nproc_per_node)" if gpus else "use --device cpu"
        raise ValueError(f"--device {name}: process {local_rank} of this machine finds {gpus} GPUs; {remedy}")
    return torch.device("cuda", local_rank)


def _share_cores(local_size: int) -> None:
    """Give each of this machine's processes its share of the cores.

    torchrun sets OMP_NUM_THREADS=1 when it starts several processes and the user has not set it, which would leave
    most cores idle; a 1 is therefore taken for torchrun's, any other value for the user's wish.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that we may use; elsewhere: all
        cores = len(affinity(0)) if affinity else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_size))


def _die_with_launcher() -> None:
    """Where torchrun started us, have the system kill us when torchrun is killed.

    Its workers would go on without it, holding GPUs and the output folder, while the other machines start anew.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(AttributeError, OSError, TypeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_memory() -> None:
    """Have the C library keep what is freed, for the next step, instead of giving it back to the system at once.

    To get large tensors again page by page takes a tenth of a step on a CPU. glibc alone has this switch.
    """
    with suppress(AttributeError, OSError, TypeError):  # other libraries, and Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
