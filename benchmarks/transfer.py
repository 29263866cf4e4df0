"""Weights from 2 trainers (FSDP2's shards) to 2 tensor-parallel samplers, against TRL 0.16.0's way, on a CPU:

    python -m benchmarks.transfer [--rounds 9]

A random model of SmolLM2-135M's size with 8 heads and 4 key/value heads, which two processes can share; float32
parameters, sampled from in bfloat16. Trainers and samplers are worlds of their own, of two processes each, over gloo on
loopback. Both ways move the same values and take turns, one transfer each.

    ours      each trainer sends each sampler the rectangles that both have, in buckets, with a digest for each pair; when
              all are verified they are put in place                                        minitrl/transfer.py
    theirs    parameter by parameter, in the checkpoint's tensors: gathered on each trainer, broadcast by the first to all
              samplers, each of which keeps its slice; a barrier. (trl/extras/vllm_client.py and vllm_serve.py at v0.16.0
              without their HTTP request for each parameter, and cast to bfloat16 before it is gathered: both in its favour)

Writes benchmarks/results/transfer.json: medians over the rounds and the rounds themselves, the processor's time of all
four (which depends less on what else the machine does), the bytes that each sent and received, what it holds, and how
much its memory grew during a transfer. Ends with an error unless the samplers'
slices are, to the bit, the gathered tensors' in both ways, and each sampler received just its slice and two digests.
"""

import argparse
import json
import os
import platform
import re
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from minitrl import checkpoint, distributed, parallel, transfer
from minitrl.layout import Place, boxes, hf_tensors
from minitrl.model import ModelConfig

TRAINERS = SAMPLERS = 2
CONFIG = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
DIGEST = 32  # bytes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def memory(reset: bool = False) -> int:
    """The most bytes of memory that this process had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Process:
    """One of the four: rank 0 and 1 train, 2 and 3 sample."""

    def __init__(self, rank: int, ports: list[int]):
        self.rank, trains = rank, rank < TRAINERS
        place = {"RANK": rank % 2, "WORLD_SIZE": 2, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0 if trains else 1]}  # fmt: skip
        os.environ.update({name: str(value) for name, value in place.items()})
        self.world = distributed.start("cpu", 300, (1, 2, 1) if trains else (1, 1, 2))
        torch.set_num_threads(1)
        self.config, self.received, self.sent = ModelConfig.from_hf(CONFIG), 0, 0
        dtype = torch.float32 if trains else torch.bfloat16
        self.model = checkpoint.empty(self.config, dtype, world=self.world)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        for i, tensor in enumerate(self.parameters.values()):
            shard, generator = parallel.local(tensor), torch.Generator().manual_seed(2 * i + self.world.rank)
            shard.normal_(generator=generator) if trains else shard.zero_()
        self.all = self.bridge(rank, TRAINERS + SAMPLERS, ports[2])
        self.first = None if rank == 1 else self.bridge(max(rank - 1, 0), 1 + SAMPLERS, ports[3])
        self.route = transfer.between(self.all, self.config, (TRAINERS, 1), SAMPLERS)
        self.slice = boxes(self.config, Place(tensor=self.world.rank, tensors=SAMPLERS))
        if trains:
            self.as_theirs()

    def bridge(self, rank: int, size: int, port: int) -> transfer.Bridge:
        listener = transfer.listen("127.0.0.1", port) if rank == 0 else None
        return transfer.Bridge("127.0.0.1", port, rank, size, generation=1, listener=listener)

    def as_theirs(self) -> None:
        """The same values as transformers has them, a parameter for each tensor of the checkpoint, sharded by FSDP2."""
        mesh, self.theirs = DeviceMesh("cpu", [0, 1]), {}
        places = {box.tensor: box for box in boxes(self.config)}
        for tensor, (parameter, _, shape) in hf_tensors(self.config).items():
            box, whole = places[tensor], self.parameters[parameter].full_tensor()
            self.theirs[tensor] = distribute_tensor(whole[box.at : box.at + shape[0]].clone(), mesh, [Shard(0)])

    def way_of_ours(self) -> None:
        if self.rank < TRAINERS:
            transfer.send(self.route, self.parameters, torch.bfloat16)
        else:
            transfer.install(transfer.receive(self.route, self.parameters), self.parameters)

    def way_of_theirs(self) -> None:
        for tensor, (parameter, _, shape) in hf_tensors(self.config).items():
            if self.rank < TRAINERS:
                whole = self.theirs[tensor].to(torch.bfloat16).full_tensor()
            else:
                whole = torch.empty(shape, dtype=torch.bfloat16)
                self.received += whole.nbytes
            if self.rank == 0:
                self.sent += SAMPLERS * whole.nbytes
            if self.first:
                self.first.finish(self.first.broadcast(whole, 0), tensor)
                if self.rank >= TRAINERS:
                    self.keep(tensor, whole)
                self.first.agree("TRL's barrier")

    def keep(self, tensor: str, whole) -> None:
        for box in self.slice:
            if box.tensor == tensor:
                whole = whole if whole.dim() == 2 else whole[:, None]
                mine = self.parameters[box.parameter]
                mine = mine if mine.dim() == 2 else mine[:, None]
                mine[box.at : box.at + box.shape[0]].copy_(whole[slice(*box.rows), slice(*box.columns)])

    def count(self) -> None:
        """Count what the route's link carries, digests included."""
        exchange = self.all.exchange

        def counted(pieces):
            for _, ours, piece in pieces:
                self.sent, self.received = self.sent + ours * piece.nbytes, self.received + (not ours) * piece.nbytes
            return exchange(pieces)

        self.all.exchange = counted

    def run(self, rounds: int) -> dict:
        """Seconds of each way's rounds, and what this process sent, received, holds and took more memory for."""
        self.count()
        found = {way: {"seconds": [], "cpu_seconds": []} for way in ("ours", "theirs")}
        kept = {}
        for number in range(rounds + 1):
            for way, transfer_ in (("ours", self.way_of_ours), ("theirs", self.way_of_theirs)):
                if self.rank >= TRAINERS:
                    for tensor in self.parameters.values():
                        tensor.zero_()
                self.sent = self.received = 0
                before = memory(reset=True)
                self.all.agree("beginning")
                began, worked = time.perf_counter(), time.process_time()
                transfer_()
                self.all.agree("ending")
                if number:  # the first round meets new connections and new memory
                    found[way]["seconds"].append(time.perf_counter() - began)
                    found[way]["cpu_seconds"].append(time.process_time() - worked)
                grown = max(memory() - before, found[way].get("memory_growth", 0))  # what is freed is kept for the next
                found[way] |= {"sent": self.sent, "received": self.received, "memory_growth": grown}
                if self.rank >= TRAINERS and not number:
                    kept[way] = {name: tensor.clone() for name, tensor in self.parameters.items()}
        held = {name: parallel.local(tensor) for name, tensor in self.parameters.items()}
        found["holds"] = sum(tensor.numel() for tensor in held.values())
        found["exact"] = all(torch.equal(kept["ours"][name], kept["theirs"][name]) and kept["ours"][name].any()
                             for name in kept.get("ours", ()))  # fmt: skip
        return found


def enter(rank: int, ports: list[int], rounds: int, queue) -> None:
    with torch.no_grad():
        queue.put((rank, Process(rank, ports).run(rounds)))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    queue, ports = context.Queue(), [free_port() for _ in range(4)]
    arguments = ports, options.rounds, queue
    processes = torch.multiprocessing.start_processes(enter, arguments, TRAINERS + SAMPLERS, join=False)
    ranks = [found for _, found in sorted(queue.get(timeout=1200) for _ in range(TRAINERS + SAMPLERS))]
    processes.join()
    seconds = {way: [round(x, 4) for x in ranks[0][way]["seconds"]] for way in ("ours", "theirs")}
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    cpu = {way: round(sum(statistics.median(found[way]["cpu_seconds"]) for found in ranks), 4) for way in seconds}
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"]))
    config = ModelConfig.from_hf(CONFIG)
    size = sum(box.shape[0] * box.shape[1] for box in boxes(config))
    slices = [sum(box.shape[0] * box.shape[1] for box in boxes(config, Place(tensor=r, tensors=SAMPLERS)))
              for r in range(SAMPLERS)]  # fmt: skip
    for rank, part in enumerate(slices, TRAINERS):
        assert ranks[rank]["exact"], f"rank {rank}: the two ways' values differ"
        assert ranks[rank]["ours"]["received"] == 2 * part + TRAINERS * DIGEST, ranks[rank]["ours"]
    assert all(found["holds"] < 0.51 * size for found in ranks), "a process holds more than its part"
    row = {
        "command": f"python -m benchmarks.transfer --rounds {options.rounds}", "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "torch": torch.__version__, "parameters": size, "bytes": 2 * size, "seconds": seconds,
        "median": medians, "theirs / ours": round(ratio, 2),
        "cpu_seconds": cpu, "load_average": os.getloadavg()[0],
        "ranks": [{"holds": found["holds"], **{way: {name: found[way][name] for name in ("sent", "received", "memory_growth")}
                   for way in ("ours", "theirs")}} for found in ranks],
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "transfer.json"
    path.write_text(json.dumps(row, indent=1) + "\n")
    print(f"{size / 1e6:.1f} M parameters in bfloat16, {TRAINERS} trainers to {SAMPLERS} samplers, medians of {options.rounds}")
    for way, median in medians.items():
        print(f"{way:7s} {median:.3f} s   received by rank {[found[way]['received'] for found in ranks]}   "
              f"memory grew by {[found[way]['memory_growth'] >> 20 for found in ranks]} MiB")
    print(f"processor: ours {cpu['ours']:.2f} s, theirs {cpu['theirs']:.2f} s")
    print(f"theirs / ours {ratio:.2f}, exact to the bit; a sampler's slice is {[2 * part for part in slices]} bytes")


if __name__ == "__main__":
    main()
