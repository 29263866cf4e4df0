"""A training step in a layout against the same layout written by hand in plain PyTorch, over gloo:

    torchrun --nproc_per_node 2 -m benchmarks.by_hand

By hand is what a good script for this one model and these equal lengths would be: a dense Llama on a (B, L) batch,
PyTorch's attention, fully_shard as its documentation has it, or Megatron's slices with an all-reduce-free sequence
split; cross-entropy of whole logits. Ours is minitrl's Model on the same tokens, with its packs and its chunked head.
Both models are in the same processes and take turns, step by step; the first two rounds are not counted. float32, SGD.
Writes benchmarks/results/by_hand.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from minitrl import checkpoint, distributed
from minitrl.model import Model, ModelConfig
from minitrl.packing import pack

RESULT = Path(__file__).parent / "results" / "by_hand.json"
SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024, "rope_theta": 1e4,
}  # fmt: skip
BATCH, LENGTH = 4, 256  # of each part of the data
D, H, K, E, FFN, V = 512, 8, 4, 64, 1408, 8192


class Split(torch.autograd.Function):
    """Sum over processes and keep one's rows; backward gathers. `Join` is the other way round."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(x.shape[0] // dist.get_world_size(), *x.shape[1:])
        dist.reduce_scatter_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, d):
        out = d.new_empty(d.shape[0] * dist.get_world_size(), *d.shape[1:])
        dist.all_gather_single(out, d.contiguous())
        return out


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Split.backward(ctx, x)

    @staticmethod
    def backward(ctx, d):
        return Split.forward(ctx, d)


class Block(nn.Module):
    def __init__(self, parts: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.heads, self.kv_heads = H // parts, K // parts
        self.qkv = nn.Linear(D, (self.heads + 2 * self.kv_heads) * E, bias=False)
        self.o = nn.Linear(self.heads * E, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * FFN // parts, bias=False), nn.Linear(FFN // parts, D, bias=False)
        self.join, self.split = (Join.apply, Split.apply) if parts > 1 else (lambda x: x, lambda x: x)

    def forward(self, x, cos, sin):  # x: (L or its part, B, D)
        y = self.qkv(self.join(self.norm1(x)))
        L, B, _ = y.shape
        q, k, v = y.view(L, B, -1, E).permute(1, 2, 0, 3).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = (t * cos + t.roll(E // 2, -1) * sin for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.split(self.o(out.permute(2, 0, 1, 3).reshape(L, B, -1)))
        gate, up = self.gate_up(self.join(self.norm2(x))).chunk(2, -1)
        return x + self.split(self.down(F.silu(gate) * up))


class ByHand(nn.Module):
    def __init__(self, parts: int):
        super().__init__()
        self.embed, self.norm = nn.Embedding(V // parts, D), nn.RMSNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(Block(parts) for _ in range(SHAPE["num_hidden_layers"]))
        self.head, self.parts = nn.Linear(D, V // parts, bias=False), parts

    def forward(self, ids):  # (B, L) -> the sum of -log p
        x, first = ids.T, dist.get_rank() * (V // self.parts) if self.parts > 1 else 0
        if self.parts > 1:
            mine = (x >= first) & (x < first + V // self.parts)
            x = Split.apply(self.embed(torch.where(mine, x - first, 0)) * mine[..., None])
        else:
            x = self.embed(x)
        angles = torch.outer(torch.arange(ids.shape[1]), 1e4 ** -(torch.arange(0, E, 2) / E))
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        x = Join.apply(x) if self.parts > 1 else x
        logits, targets = self.head(x)[:-1].float(), ids.T[1:]
        if self.parts == 1:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        highest = logits.detach().amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        own = (targets >= first) & (targets < first + V // self.parts)
        chosen = logits.gather(-1, torch.where(own, targets - first, 0)[..., None])[..., 0] * own
        sums = torch.stack([(logits - highest[..., None]).exp().sum(-1), chosen])
        total, chosen = Summed.apply(sums)
        return (total.log() + highest - chosen).sum()


class Summed(torch.autograd.Function):
    """The sum over processes, all of which compute the same with it."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, d):
        return d


def by_hand(layout: str, world):
    """(step() -> seconds) of the script."""
    torch.manual_seed(0)
    model = ByHand(world.tensor.size)
    if layout == "shard":
        mesh = init_device_mesh("cpu", (world.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3), lambda ids: model(ids)


def ours(layout: str, world):
    """The same of minitrl's model."""
    torch.manual_seed(0)
    whole = Model(ModelConfig.from_hf(SHAPE))
    for p in whole.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    model = checkpoint.divided(whole, torch.float32, world)

    def loss(ids):
        packed = pack(ids.tolist())
        return -model.logprob_sum(packed, (packed.predictors_T >= 0).float())[0]

    return model, torch.optim.SGD(model.parameters(), lr=1e-3), loss


def step(model, optimizer, loss, ids, world) -> float:
    """Seconds of forward, backward and update, between two barriers."""
    distributed.barrier(world)
    began = time.perf_counter()
    (loss(ids) / (BATCH * LENGTH)).backward()
    if world.shard.size == world.tensor.size == 1:
        distributed.sum_([p.grad for p in model.parameters()], world)
    optimizer.step()
    optimizer.zero_grad()
    distributed.barrier(world)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds, rows = parser.parse_args().rounds, []
    world = distributed.start("cpu", 600)
    for layout in ("replicate", "shard", "tensor"):
        mesh = {"replicate": (2, 1, 1), "shard": (1, 2, 1), "tensor": (1, 1, 2)}[layout]
        there = distributed.with_mesh(world, mesh, 600) if layout != "replicate" else world
        draw = torch.Generator().manual_seed(there.data.rank)
        ids = torch.randint(V, (BATCH, LENGTH), generator=draw)
        sides = {"by hand": by_hand(layout, there), "ours": ours(layout, there)}
        taken = {side: [] for side in sides}
        for number in range(rounds + 2):
            for side, parts in sides.items():
                seconds = step(*parts, ids, there)
                if number > 1:
                    taken[side].append(round(seconds, 4))
        row = {"layout": layout, "seconds": {side: statistics.median(times) for side, times in taken.items()}}
        row["ours over by hand"] = statistics.median(o / h for o, h in zip(taken["ours"], taken["by hand"]))
        rows.append(row | {"rounds": taken})
        distributed.print0(world, {name: row[name] for name in ("layout", "seconds", "ours over by hand")})
    if world.rank == 0:
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine |= {"python": platform.python_version(), "load_average": os.getloadavg()[0]}
        settings = {"shape": SHAPE, "batch": BATCH, "length": LENGTH, "dtype": "float32", "processes": world.size}
        command = "torchrun --nproc_per_node 2 -m benchmarks.by_hand"
        found = {"command": command, "machine": machine, "settings": settings, "rows": rows}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    distributed.stop()


if __name__ == "__main__":
    main()
