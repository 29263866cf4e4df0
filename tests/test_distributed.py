"""Real processes over gloo on loopback: the collectives, the errors that name rank and phase, and cores per process."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp

from minitrl import distributed
from minitrl.distributed import World, any_true, barrier, gather_ragged, print0, start, stop, sum_

CPU = torch.device("cpu")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def enter(rank: int, size: int, port: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def collectives(rank: int, size: int, port: int) -> None:
    enter(rank, size, port)
    world = start("cpu", timeout_s=60)
    assert world == World(rank, size, CPU)

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
    small = torch.tensor([1.0 if rank else 2.0**-9], dtype=torch.bfloat16)  # 1 + 2^-9 is no bf16: the sum rounds once
    sum_([small], world)
    assert small.item() == torch.tensor(size - 1 + 2.0**-9).bfloat16().item()

    # Ragged, with one process that has nothing, and dtypes that gloo does not know.
    for dtype in (torch.int64, torch.float64, torch.bfloat16, torch.bool, torch.uint8):
        mine = torch.full((rank * 2, 3), rank, dtype=torch.float64).to(dtype)
        parts = gather_ragged(mine, world)
        assert [tuple(part.shape) for part in parts] == [(2 * r, 3) for r in range(size)]
        assert all(part.dtype == dtype and part.eq(torch.tensor(r).to(dtype)).all() for r, part in enumerate(parts))
    assert [part.shape for part in gather_ragged(torch.empty(0, 5), world)] == [(0, 5)] * size

    assert any_true(rank == size - 1, world) is True and any_true(False, world) is False
    barrier(world)
    print0(world, f"only rank {rank} speaks")
    stop(world)


def threads(rank: int, size: int, port: int, wish: str, expected: int) -> None:
    os.environ["OMP_NUM_THREADS"] = wish
    torch.set_num_threads(3)
    distributed.os.sched_getaffinity = lambda pid: set(range(8))
    enter(rank, size, port)
    world = start("cpu", timeout_s=60)
    assert torch.get_num_threads() == expected
    stop(world)


def one_dies(rank: int, size: int, port: int) -> None:
    enter(rank, size, port)
    world = start("cpu", timeout_s=60)
    barrier(world)
    if rank == 1:
        os._exit(0)  # no goodbye
    with pytest.raises(RuntimeError, match=r"rank 0 of 2, before the first step: another process is gone"):
        barrier(world, "before the first step")


def one_is_late(rank: int, size: int, port: int) -> None:
    enter(rank, size, port)
    world = start("cpu", timeout_s=3)
    if rank == 1:
        time.sleep(6)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 0 of 2, summing 1 tensors: another process is gone or too late"):
        sum_([torch.ones(3)], world)
    assert time.monotonic() - began < 5


def unequal_rows(rank: int, size: int, port: int) -> None:
    enter(rank, size, port)
    world = start("cpu", timeout_s=60)
    with pytest.raises(AssertionError, match="rows of unequal size"):
        gather_ragged(torch.zeros(2, 3 + rank), world)
    stop(world)


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size, capfd):
    mp.spawn(collectives, (size, free_port()), nprocs=size)
    said = [line for line in capfd.readouterr().out.splitlines() if "speaks" in line]
    assert said == ["only rank 0 speaks"]


def test_cores_are_shared_unless_the_user_chose():
    mp.spawn(threads, (2, free_port(), "1", 4), nprocs=2)  # 1 is what torchrun sets by itself
    mp.spawn(threads, (2, free_port(), "3", 3), nprocs=2)


@pytest.mark.parametrize("body", [one_dies, one_is_late, unequal_rows])
def test_a_fault_in_another_process(body):
    mp.spawn(body, (2, free_port()), nprocs=2)


def test_torchrun_two_processes(tmp_path):
    script = tmp_path / "sum_ranks.py"
    script.write_text(
        "import torch\n"
        "from minitrl.distributed import *\n"
        "world = start('cpu', 60)\n"
        "x = torch.tensor([world.rank + 1.0])\n"
        "sum_([x], world)\n"
        "print0(world, 'total', x.item())\n"
        "stop(world)\n"
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
    stop(world)


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
