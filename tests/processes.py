"""Start a few real processes that meet over gloo on loopback."""

import multiprocessing
import os
import socket

import torch.multiprocessing

# One server imports torch once and forks each process from there: a tenth of a second instead of several.
multiprocessing.set_forkserver_preload(["torch", "pytest", "minitrl.distributed"])

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_processes(body, size: int, *arguments) -> None:
    """Call body(*arguments) in `size` processes, with torchrun's variables set; an error in any of them is raised here.

    `body` stands at the top level of a test file, and calls distributed.start itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_enter, (body, size, port, arguments), size, start_method="forkserver")


def _enter(rank: int, body, size: int, port: int, arguments: tuple) -> None:
    place = (rank, size, rank, size, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(LAUNCHER, place)})
    body(*arguments)
