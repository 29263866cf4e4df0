"""A model on a mesh of processes (distributed.py): its parameters divided by FSDP2, its matrices by hand.

`divide` applies FSDP2 to the model's own part, and `local` and `own_parameters` say what a process then has. `gather`,
`collect` and `scatter` are Megatron's steps between a block, whose matrices are divided, and what is between blocks,
whose rows are (arXiv 2205.05198); they differ in what backward does. model.py calls them on plain tensors.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .distributed import World, _named

# PyTorch 2.13 has new names for these two, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def divide(model, world: World, dtype: torch.dtype, cpu_offload: bool = False) -> None:
    """Divide a model's parameters over world.shard, by FSDP2: each block's, and those around the blocks.

    A block's are gathered, in `dtype`, as its forward and backward pass need them; gradients are summed over world.data
    in float32 (float64 for a float64 model), not averaged, and each process keeps those of its own part. `cpu_offload`
    keeps parameters, gradients and so the optimizer in the CPU's memory.
    """
    if world.shard.size == 1:
        return
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method,
    )  # fmt: skip

    ranks = torch.arange(world.size).view(-1, world.shard.size, world.tensor.size)[:, :, world.tensor.rank]
    if world.replicate.size > 1:
        names, groups, ranks = ("replicate", "shard"), [world.replicate.group, world.shard.group], ranks.tolist()
    else:
        names, groups, ranks = ("shard",), world.shard.group, None
    mesh = DeviceMesh.from_group(groups, world.device.type, mesh=ranks, mesh_dim_names=names)
    kept, rounded = OffloadPolicy(), MixedPrecisionPolicy()
    if cpu_offload:
        kept = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    if dtype.itemsize < 4:
        # A pack's weights and temperatures stay what they are: activations have the dtype of what makes them.
        rounded = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": rounded, "offload_policy": kept}
    for block in model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in (model, *model.layers):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for method in ("logprobs", "logprob_sum", "values", "logits"):
        register_fsdp_forward_method(model, method)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter or gradient that FSDP2 has divided, in the same memory; else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own_parameters(model) -> dict[str, Tensor]:
    """By name, this process's part of each of a model's parameters."""
    if hasattr(model, "reshard"):  # after a pass without backward FSDP2 leaves those around the blocks gathered
        model.reshard()
    return {name: local(p.detach()) for name, p in model.named_parameters()}


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, rows, world, summed):
        ctx.rows, ctx.world, ctx.summed = rows, world, summed
        return _all_rows(part, rows, world)

    @staticmethod
    def backward(ctx, d_whole):
        d_part = _sum_rows(d_whole, ctx.world) if ctx.summed else _own_rows(d_whole, ctx.world)
        return d_part, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, world):
        ctx.rows, ctx.world = len(whole), world
        return _sum_rows(whole, world)

    @staticmethod
    def backward(ctx, d_part):
        return _all_rows(d_part, ctx.rows, ctx.world), None


def gather(part: Tensor, rows: int, world: World) -> Tensor:
    """(rows, D) of every process's part, where each goes on to compute something of its own: backward adds them up.

    part: (ceil(rows / size), D); the last ones are padded, so that all are of one size.
    """
    return part if world.size == 1 else _Gather.apply(part, rows, world, True)


def collect(part: Tensor, rows: int, world: World) -> Tensor:
    """The same where all go on to compute one and the same thing: backward, each keeps its part's gradient."""
    return part if world.size == 1 else _Gather.apply(part, rows, world, False)


def scatter(whole: Tensor, world: World) -> Tensor:
    """The sum of every process's (rows, D), of which each keeps its part of the rows."""
    return whole if world.size == 1 else _Scatter.apply(whole, world)


def _all_rows(part: Tensor, rows: int, world: World) -> Tensor:
    whole = part.new_empty(world.size * len(part), *part.shape[1:])
    with _named("gathering rows", world):
        _all_gather(whole, part.contiguous(), group=world.group)
    return whole[:rows]


def _sum_rows(whole: Tensor, world: World) -> Tensor:
    whole = _padded(whole, world)
    part = whole.new_empty(len(whole) // world.size, *whole.shape[1:])
    with _named("summing rows", world):
        _reduce_scatter(part, whole, group=world.group)
    return part


def _own_rows(whole: Tensor, world: World) -> Tensor:
    return _padded(whole, world).chunk(world.size)[world.rank]


def _padded(whole: Tensor, world: World) -> Tensor:
    """With rows of zeros behind, so that they can be divided evenly."""
    return F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, -len(whole) % world.size)).contiguous()
