"""Start a few real processes that meet over gloo on loopback."""

import multiprocessing
import os
import socket

import torch.multiprocessing

# One server imports torch once and forks each process from there: a tenth of a second instead of several. (torch._dynamo
# is what AdamW imports when one is made.)
multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "minitrl.grpo"])

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_processes(body, size: int, *arguments) -> None:
    """Call body(*arguments) in `size` processes, with torchrun's variables set; an error in any of them is raised here.

    `body` stands at the top level of a test file, and calls distributed.start itself.
    """
    arguments = (body, size, free_port(), arguments)
    torch.multiprocessing.start_processes(_enter, arguments, size, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def take_place(rank: int, size: int, port: int) -> None:
    """Set torchrun's variables for this process."""
    place = (rank, size, rank, size, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(LAUNCHER, place)})


def _enter(rank: int, body, size: int, port: int, arguments: tuple) -> None:
    take_place(rank, size, port)
    body(*arguments)
