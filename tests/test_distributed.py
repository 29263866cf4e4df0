"""Real processes over gloo on loopback: the collectives, the errors that name rank and phase, and cores per process."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from processes import LAUNCHER, run_processes

from minitrl import distributed
from minitrl.distributed import (
    World, any_true, barrier, gather_json, gather_ragged, print0, start, stop, sum_, together,
)  # fmt: skip

CPU = torch.device("cpu")
PATIENCE_S = 600  # on a busy machine a process may come late


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def collectives(size: int) -> None:
    world = start("cpu", PATIENCE_S)
    rank = world.rank
    assert world == World(int(os.environ["RANK"]), size, CPU)

    # In place, fp32 inside, every tensor to its own place and in its own dtype and shape; a view is written through.
    whole = torch.zeros(3, 4)
    column, half = whole[:, 1], torch.full((2, 2), 1 + rank, dtype=torch.bfloat16)
    column += torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    weight = torch.nn.Parameter(torch.ones(2))
    total = size * (size + 1) / 2
    sum_([column, half, weight], world)
    assert torch.equal(whole[:, 1], torch.tensor([1.0, 2.0, 3.0]) * total) and whole[:, 0].eq(0).all()
    assert half.dtype == torch.bfloat16 and half.eq(total).all() and weight.eq(size).all()

    count = torch.tensor(2.0**24 + 1, dtype=torch.float64)  # lost if it travelled as fp32
    sum_([count, torch.ones(1)], world)
    assert count.item() == size * (2.0**24 + 1)
    # bf16 has these whole numbers, but not all of their partial sums: the sum is fp32 and rounds once, at its end.
    terms = torch.randint(128, 256, (size, 1000), generator=torch.Generator().manual_seed(0)).bfloat16()
    total = terms[rank].clone()
    sum_([total], world)
    assert torch.equal(total, terms.float().sum(0).bfloat16())

    # Ragged, with one process that has nothing, and dtypes that gloo does not know.
    for dtype in (torch.int64, torch.float64, torch.bfloat16, torch.bool, torch.uint8):
        mine = torch.full((rank * 2, 3), rank, dtype=torch.float64).to(dtype)
        parts = gather_ragged(mine, world)
        assert [tuple(part.shape) for part in parts] == [(2 * r, 3) for r in range(size)]
        assert all(part.dtype == dtype and part.eq(torch.tensor(r).to(dtype)).all() for r, part in enumerate(parts))
    assert [part.shape for part in gather_ragged(torch.empty(0, 5), world)] == [(0, 5)] * size

    assert gather_json({"é": [rank, None]}, world) == [{"é": [r, None]} for r in range(size)]
    with together("nothing", world):
        pass
    mine = rank == size - 1
    with pytest.raises(KeyError if mine else ConnectionError), together("failing", world):
        if mine:
            raise KeyError
    assert any_true(rank == size - 1, world) is True and any_true(False, world) is False
    barrier(world)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print0(world, "rank", rank, "speaks")
    assert said.getvalue() == ("" if rank else "rank 0 speaks\n")
    stop()


def threads(wish: str, expected: int) -> None:
    os.environ["OMP_NUM_THREADS"] = wish
    torch.set_num_threads(3)
    distributed.os.sched_getaffinity = lambda pid: set(range(8))
    world = start("cpu", PATIENCE_S)
    assert torch.get_num_threads() == expected
    stop()


def one_dies() -> None:
    world = start("cpu", PATIENCE_S)
    barrier(world)
    if world.rank == 1:
        os._exit(0)  # no goodbye
    with pytest.raises(ConnectionError, match=r"rank 0 of 2, before the first step: another process is gone"):
        barrier(world, "before the first step")


def one_is_late() -> None:
    world = start("cpu", timeout_s=5)
    if world.rank == 1:
        time.sleep(15)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"rank 0 of 2, summing 1 tensors: another process is gone or too late"):
        sum_([torch.ones(3)], world)
    assert time.monotonic() - began < 12


def unequal_rows() -> None:
    world = start("cpu", PATIENCE_S)
    with pytest.raises(AssertionError, match="rows of unequal size"):
        gather_ragged(torch.zeros(2, 3 + world.rank), world)
    stop()


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size):
    run_processes(collectives, size, size)


def test_cores_are_shared_unless_the_user_chose():
    run_processes(threads, 2, "1", 4)  # 1 is what torchrun sets by itself
    run_processes(threads, 2, "3", 3)


@pytest.mark.parametrize("body", [one_dies, one_is_late, unequal_rows])
def test_a_fault_in_another_process(body):
    run_processes(body, 2)


def test_torchrun_two_processes(tmp_path):
    script = tmp_path / "sum_ranks.py"
    script.write_text(
        "import torch\n"
        "from minitrl.distributed import *\n"
        "world = start('cpu', 60)\n"
        "x = torch.tensor([world.rank + 1.0])\n"
        "sum_([x], world)\n"
        "print0(world, 'total', x.item())\n"
        "stop()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["total", "3.0"]


def test_alone_without_a_process_group():
    world = start("cpu")
    assert world == World(0, 1, CPU) and not torch.distributed.is_initialized()
    x = torch.ones(2)
    sum_([x], world)
    assert x.eq(1).all() and gather_ragged(x, world)[0] is x and any_true(True, world) and not any_true(False, world)
    barrier(world)
    stop()


def test_counts_must_be_float():
    with pytest.raises(AssertionError, match="float64"):
        sum_([torch.tensor(3)], World(0, 1, CPU))


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "0"}, ["RANK set but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}, ["not MASTER_PORT"]),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK='one'"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK=2"]),
    ],
)
def test_half_set_launcher_variables(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        start("cpu")
    assert all(word in str(caught.value) for word in words), caught.value


def test_port_in_use(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in zip(LAUNCHER, ("0", "2", "0", "2", "127.0.0.1", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"MASTER_PORT {port}: another program listens.*--standalone"):
            start("cpu", timeout_s=5)


def test_a_lone_master_address_is_no_launcher(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # some clusters set it in every shell
    assert start("cpu").size == 1


@pytest.mark.parametrize("name, gpus, expected", [("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("auto", 2, "cuda:1")])
def test_device(monkeypatch, name, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed._device(name, local_rank=1) == torch.device(expected)


@pytest.mark.parametrize(
    "name, gpus, words", [("cuda", 0, "--device cpu"), ("cuda", 1, "at most 1"), ("cuda:0", 1, "auto")]
)
def test_device_that_is_not_there(monkeypatch, name, gpus, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"--device {name}: .*{words}"):
        distributed._device(name, local_rank=1)


def test_sums_travel_on_the_processes_own_device(monkeypatch):
    """NCCL carries no tensor of the CPU's, where log-probs of rollouts are kept."""

    def carry(flat, group=None):
        raise LookupError(f"on {flat.device}")

    monkeypatch.setattr(distributed.dist, "all_reduce", carry)
    with pytest.raises(LookupError, match="on meta"):
        distributed.sum_([torch.ones(3)], distributed.World(0, 2, torch.device("meta")))


def test_sums_are_of_bounded_size(monkeypatch):
    """Of gradients of a whole model no second copy is made; each part finds its tensor."""
    seen = []
    monkeypatch.setattr(distributed, "BUCKET", 8)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat, group=None: seen.append(len(flat.mul_(2))))
    sizes = (3, 0, 4, 5, 1, 20, 2, 2)
    tensors = [torch.full((n,), float(place)) for place, n in enumerate(sizes)]
    distributed.sum_(tensors, distributed.World(0, 2, CPU))
    assert seen == [7, 6, 24] and max(seen) <= 8 + 20
    assert all(tensor.eq(2 * place).all() for place, tensor in enumerate(tensors))
