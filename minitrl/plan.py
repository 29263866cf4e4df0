"""What a run will need, before a GPU is rented: grpo.py's training step, on a cluster that is only pretended.

    python -m minitrl.plan --model Qwen2.5-72B/config.json --nodes 8 --shard 64

One process stands for rank 0 of nodes x gpus_per_node. Its collectives go to a process group that sends nothing, and
its tensors have shapes but no numbers; all else is what GPUs would run: model, mesh, loss, optimizer, and the kernels
by the shapes that they register. A meter watches every operation:

    memory    the storages that are alive, and of what kind they are when there is most of them
    traffic   what this process sends: (w - 1) / w of what w processes gather or scatter, twice that of what they sum
    FLOPs     of matrix products and attention, 2 for a multiplication and its addition

Seconds are not measured: they follow from these and from the rates in GPUS. Memory is what PyTorch asks for; gaps in
the allocator's blocks, NCCL's buffers and CUDA's own come on top: HEADROOM is for them. MINITRL_KERNELS=reference
traces the plain PyTorch forms of the ops instead, as a CPU runs them.
"""

import gc
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import checkpoint, distributed, grpo, layout, runs, training
from .config import parse, require
from .distributed import World
from .experience import Rollouts
from .kernels import targets
from .kernels.token_logprob import SPLIT
from .model import ModelConfig
from .parallel import local
from .tokenizer import read_json

GIB = 2**30
HEADROOM = 0.15  # of a GPU's memory
NOTED = 1.003  # a peak that is less above the one before is not looked at
MATMUL, LINK = 0.5, 0.8  # the share of the rates below that is taken to be reached
HOST = 25e9  # bytes per second that a process moves to, from and within the machine's own memory


class GPU(NamedTuple):
    """Dense bfloat16 FLOP/s; bytes of memory; bytes per second to it, and each way to the node and to other nodes."""

    flops: float
    memory: float
    hbm: float
    node: float
    network: float


STATE, SAMPLER = ("parameters", "gradients", "optimizer"), "sampler's weights"
OPTIONS = "nodes gpus_per_node gpu replicate shard tensor tokens_per_microbatch num_micro_batches max_prompt_length "
OPTIONS += "max_completion_length dtype gradient_checkpointing cpu_offload rollout_tensor"
GPUS = {
    "A100": GPU(312e12, 79 * GIB, 2.0e12, 300e9, 25e9),
    "H100": GPU(989e12, 79 * GIB, 3.35e12, 450e9, 50e9),
    "B200": GPU(2250e12, 178 * GIB, 8.0e12, 900e9, 50e9),
}


@dataclass
class Config(grpo.Config):
    """Say what memory, traffic and time a step of GRPO takes. Options are those of minitrl.grpo, and what is below."""

    reward: tuple[str, ...] = ("none",)  # not called; nothing that speaks of data, files or sampling counts here
    nodes: int = 1  # machines
    gpus_per_node: int = 8  # GPUs of each, and so processes
    num_micro_batches: int = 2  # of a process in a step, each of --tokens_per_microbatch
    gpu: Literal["A100", "H100", "B200"] = "H100"  # that it has to fit
    search: bool = True  # where it does not fit, find the nearest layout that does
    json: str | None = None  # file for all of it

    def __post_init__(self):
        super().__post_init__()
        self.must(self.model is not None, "model", "a config.json, or the folder that it is in")
        for name in ("nodes", "gpus_per_node", "num_micro_batches"):
            self.must(getattr(self, name) >= 1, name, "at least 1")
        for name in ("deterministic", "use_peft", "beta"):
            self.must(not getattr(self, name), name, "left out here: it is not planned")
        self.replicate, self.shard, self.tensor = distributed.mesh_sizes(self.nodes * self.gpus_per_node, *self.mesh)
        self.rollout_tensor = self.rollout_tensor or self.tensor

    def check_data(self) -> None:
        """None is read."""


def main(argv: list[str] | None = None) -> int:
    """Print the plan. Returns the exit status: 0 where it fits, else 1."""
    config = parse(Config, argv)
    shape = shape_of(config.model)
    found = plan(config, shape)
    print(table(found), flush=True)
    if not found["fits"] and config.search:
        found["nearest"] = nearest(config, shape)
        print("\nnearest that fits: " + (table(found["nearest"]) if found["nearest"] else "none was found"))
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["fits"] else 1


def shape_of(model: str) -> ModelConfig:
    """The shape that a config.json, or one in a folder, speaks of. ValueError for others."""
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    require(path.is_file(), "model", model, "a config.json, or the folder that it is in; weights are not needed")
    return ModelConfig.from_hf(read_json(path))


def plan(config: Config, shape: ModelConfig) -> dict:
    """What the first process needs, as JSON has it: bytes, FLOPs and seconds of a step."""
    size, gpu, item = config.nodes * config.gpus_per_node, GPUS[config.gpu], getattr(torch, config.dtype).itemsize
    with pretended(size, config.mesh) as world:
        config.check_mesh(world)
        found, place = measure(config, shape, world), layout.place_of(world)
    backward, state = found["backward"], sum(found["update"]["kept"][kind] for kind in STATE)
    more = config.num_micro_batches / min(2, config.num_micro_batches)
    backward |= {name: {key: more * n for key, n in backward[name].items()} for name in ("traffic", "calls")}
    # A sampler with a layout of its own is there all the time (rollout_client.engine_of).
    mine = {box.tensor: box for box in layout.boxes(shape, place)}
    boxes = layout.boxes(shape, layout.Place(tensors=config.rollout_tensor))
    own = not config.rollout_server and (config.shard > 1 or config.rollout_tensor != config.tensor)
    weights = own * item * sum(math.prod(box.shape) for box in boxes)
    known = filter(None, (layout.common(box, mine[box.tensor]) for box in boxes if box.tensor in mine))
    received = weights - own * item * sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in known)
    on_host = STATE if config.cpu_offload else ()
    peaks = {n: {k: b for k, b in x["peak"].items() if k not in on_host} | {SAMPLER: weights} for n, x in found.items()}
    phase = max(peaks, key=lambda name: sum(peaks[name].values()))
    peak, room = sum(peaks[phase].values()), gpu.memory * (1 - HEADROOM)
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads // config.rollout_tensor * shape.head_dim * item
    cache = max(0, int((room - (0 if on_host else state) - weights) / token))
    sequences = cache // (config.max_prompt_length + config.max_completion_length)
    return {
        "model": config.model,
        "parameters": sum(math.prod(box.shape) for box in layout.boxes(shape)),
        "options": {name: getattr(config, name) for name in OPTIONS.split()},
        "fits": peak <= room and sequences > 0,
        "memory": {"peak": peak, "room": room, "phase": phase, "kinds": peaks[phase], "state": state},
        "traffic": [
            {"phase": phase, "group": key[0], "collective": key[1], "calls": reading["calls"][key], "bytes": sent}
            for phase, reading in found.items() for key, sent in reading["traffic"].items()
        ],
        "flops": more * backward["flops"],
        "seconds": {name: seconds(config, found, more * backward["flops"], GPUS[name]) for name in GPUS},
        "rollouts": {
            "weights": weights, "received": received, "seconds": received / (LINK * rate(config, gpu, 1, size)),
            "cache_tokens": cache, "sequences": sequences,
        },
    }  # fmt: skip


def rate(config: Config, gpu: GPU, stride: int, size: int) -> float:
    """Bytes per second that each of `size` processes, `stride` apart, sends: those of a node share its adapters."""
    near = min(size, max(1, config.gpus_per_node // stride))
    return gpu.node if near == size else min(gpu.node, gpu.network * near)


def seconds(config: Config, found: dict, flops: float, gpu: GPU) -> dict[str, float]:
    """Of a step's training: products; links that FSDP2 uses beside them, and those that are waited for; the update."""
    T, S, R = config.tensor, config.shard, config.replicate
    groups = {"tensor": (1, T), "shard": (T, S), "replicate": (T * S, R), "data": (T, S * R), "all": (1, T * S * R)}
    took = {"products": flops / (MATMUL * gpu.flops), "beside": 0.0, "waiting": 0.0}
    for phase, reading in found.items():
        for (group, _), sent in reading["traffic"].items():
            kind = "beside" if phase == "backward" and group in ("shard", "replicate") else "waiting"
            took[kind] += sent / (LINK * rate(config, gpu, *groups[group]))
    state = {kind: found["update"]["peak"][kind] for kind in STATE}
    if config.cpu_offload:  # each micro-batch takes the parameters twice, and brings their gradients
        took["beside"] += config.num_micro_batches * 3 * state["parameters"] / HOST
    took["update"] = 2 * sum(state.values()) / (HOST if config.cpu_offload else gpu.hbm)
    return took | {"step": max(took["products"], took["beside"]) + took["waiting"] + took["update"]}


def nearest(config: Config, shape: ModelConfig) -> dict | None:
    """The plan of the nearest layout that fits: by 4 and 6 layers (FSDP2 gathers ahead) first, and then in whole."""
    few = [replace(shape, num_hidden_layers=n, windows=shape.windows[:n]) for n in (4, 6)]
    for other in others(config, shape):
        four, six = (plan(replace(other, num_micro_batches=1), some)["memory"]["peak"] for some in few)
        if six + (six - four) / 2 * (shape.num_hidden_layers - 6) <= GPUS[config.gpu].memory * (1 - HEADROOM):
            if (found := plan(other, shape))["fits"]:
                return found
    return None


def others(config: Config, shape: ModelConfig):
    """Other layouts, the nearest first: fully sharded, more sliced, smaller micro-batches, offloaded, on more nodes."""
    parameters = sum(math.prod(box.shape) for box in layout.boxes(shape))
    longest, memory = config.max_prompt_length + config.max_completion_length, GPUS[config.gpu].memory
    slices = [n for n in (1, 2, 4, 8) if shape.num_key_value_heads % n == 0 and config.gpus_per_node % n == 0]
    thrifty = [n for n in slices if 2 * parameters / n < memory / 4] or slices[-1:]
    for nodes, offload, half in product((config.nodes << i for i in range(8)), (False, True), range(4)):
        size, tokens = nodes * config.gpus_per_node, config.tokens_per_microbatch >> half
        if tokens >= longest and (offload or 16 * parameters / size < memory):
            for n in slices:
                mesh = {"nodes": nodes, "replicate": 1, "shard": size // n, "tensor": n, "rollout_tensor": thrifty[0]}
                yield replace(config, **mesh, cpu_offload=offload, tokens_per_microbatch=tokens)


def table(found: dict) -> str:
    """The plan as text."""
    options, memory, rollouts, took = (found[name] for name in ("options", "memory", "rollouts", "seconds"))
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    lines = [f"{found['model']}, {found['parameters'] / 1e9:.2f} B parameters", given, ""]
    lines += [f"{'memory of a process at its peak':34} {'GiB':>9}   ({memory['phase']})"]
    lines += [f"  {kind:32} {size / GIB:9.2f}" for kind, size in memory["kinds"].items()]
    verdict = f"{'fits' if found['fits'] else 'DOES NOT FIT'} in {memory['room'] / GIB:.1f}, {1 - HEADROOM:.0%} of"
    lines += [f"  {'together':32} {memory['peak'] / GIB:9.2f}   {verdict} {options['gpu']}'s memory"]
    lines += [f"\n{'sent by a process in a step':34} {'GiB':>9} {'calls':>7}"]
    for row in found["traffic"]:
        what = f"{row['phase']}: {row['collective']} in {row['group']}"
        lines += [f"  {what:32} {row['bytes'] / GIB:9.3f} {row['calls']:7.0f}"]
    lines += [f"\n{'seconds of a step':18} " + "".join(f"{kind:>10}" for kind in took["H100"])]
    lines += [f"  {gpu:17}" + "".join(f"{t:10.3f}" for t in times.values()) for gpu, times in took.items()]
    lines += [f"\n{found['flops']:.3e} FLOPs. Sampling: {rollouts['sequences']} sequences of full length in the cache"]
    weights = f"{rollouts['received'] / GIB:.2f} GiB of weights come in {rollouts['seconds']:.2f} s"
    return "\n".join(lines) + f" ({rollouts['cache_tokens']} tokens); {weights}"


class Pretend(TorchDispatchMode):
    """Of what has no numbers, any that is read is 1 and any flag true; every process has what this one has.

    Tensors that do have numbers, the lengths, places and masks of a pack, keep them.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented
        if FakeTensor not in types and any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                if function is torch.ops.c10d.allgather_.default:
                    for wholes, part in zip(*args[:2]):
                        torch._foreach_copy_(wholes, [part] * len(wholes))
                return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1  # for a flag: true
        if function is torch.ops.aten.nonzero.default:
            return self._chosen(args[0])
        if function is torch.ops.aten.index.Tensor:  # by a mask: by the places that it has
            places = [self._chosen(x).unbind(1) if x is not None and x.dtype == torch.bool else [x] for x in args[1]]
            args = args[0], [x for some in places for x in some]
        return function(*args, **kwargs)

    def _chosen(self, mask: Tensor) -> Tensor:
        with unset_fake_temporarily():
            return (torch.ones(mask.shape) if isinstance(mask, FakeTensor) else mask).nonzero()


@contextmanager
def pretended(size: int, mesh: tuple):
    """Inside, this process is the first of `size`: yields its World. Ops go the kernels' way."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which makes the backend "fake" known

    before, targets.interpreted_as = targets.interpreted_as, "sm_90"
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:  # on the CPU: the backward pass of a fake CUDA tensor needs PyTorch for CUDA
        world, mesh = World(0, size, torch.device("cpu")), distributed.mesh_sizes(size, *mesh)
        yield distributed.with_mesh(world, mesh, 1800) if mesh[1:] != (1, 1) else world
    finally:
        targets.interpreted_as = before
        dist.destroy_process_group()


def _attention(factor: int, q: Tensor, lengths, prefixes, scale, window) -> int:
    """FLOPs for each (query, key) pair and number of a head: a token sees its prompt, and its segment up to itself."""
    behind = [lengths[prefix] if prefix >= 0 else 0 for prefix in prefixes]
    pairs = sum(min(n + i + 1, window or math.inf) for n, length in zip(behind, lengths) for i in range(length))
    return factor * pairs * q.shape[1] * q.shape[2]


# FLOPs of our ops (formulas: kernels/), which PyTorch's table does not have; and bytes that they take and give back.
FLOPS = {
    "minitrl::attention_forward": lambda q, k, v, *layout: _attention(4, q, *layout),
    "minitrl::attention_backward": lambda d_out, q, k, v, out, lse, *layout: _attention(10, q, *layout),
    "minitrl::token_logprob": lambda x, w, *_: 2 * len(x) * w.numel(),
    "minitrl::token_logprob_part": lambda x, w, *_: 2 * len(x) * w.numel(),
    "minitrl::token_logprob_backward": lambda x, w, *_: 6 * len(x) * w.numel(),
}
WORKSPACE = {
    "minitrl::token_logprob": lambda x, w, *_: 12 * len(x) * math.ceil(len(w) / SPLIT),
    # a chunk of dZ, and in float32 dX and the chunk's dW
    "minitrl::token_logprob_backward": lambda x, w, *_: 2 * len(x) * min(8 * SPLIT, len(w))
    + 4 * x.shape[1] * (len(x) + min(8 * SPLIT, len(w))),
}

# PyTorch's names of collectives: ours, and how often the whole goes round the ring, less one process's part.
COLLECTIVES = {
    **dict.fromkeys(("c10d::allgather_", "c10d::_allgather_base_"), ("all_gather", 1)),
    **dict.fromkeys(("c10d::reduce_scatter_", "c10d::_reduce_scatter_base_"), ("reduce_scatter", 1)),
    "c10d::allreduce_": ("all_reduce", 2),
}


class Meter(TorchDispatchMode):
    """Counts memory, traffic and FLOPs of what runs inside, with numbers or without.

    A storage's kind is that of the op that made it, "head", "in transit" (what is gathered and summed of parameters and
    gradients) or `other`, until somebody claims it. gradients(): what is claimed for "gradients" at this moment.
    """

    other = "activations"

    def __init__(self, world: World, gradients: Callable[[], list[Tensor]]):
        super().__init__()
        self.gradients, self.live, self.dead, self.current, self.counts = gradients, {}, [], 0, {}
        self.names, self.groups = {}, {}  # of ranks, and by PyTorch's names
        for name in ("replicate", "shard", "tensor", "data"):
            if group := getattr(world, name).group:
                self.names.setdefault(tuple(dist.get_process_group_ranks(group)), name)
        self.names.setdefault(tuple(range(world.size)), "all" if world.parts else "replicate")
        self.reading()

    def reading(self) -> dict:
        """What there was since the last reading, and is alive now; traffic and calls by (group, collective)."""
        self.settle()
        found = self.counts | {"kept": self.kinds()}
        self.peak, self.counts = 0, {"peak": Counter(), "flops": 0, "traffic": Counter(), "calls": Counter()}
        return found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name, packet = function._schema.name, function._overloadpacket
        kind = "head" if name.startswith("minitrl::token_logprob") else self.other
        if name.startswith("c10d::"):
            kind = self._sent(name, args)
        elif name.startswith("fsdp::"):
            kind = "in transit"
        elif name in FLOPS:
            self.counts["flops"] += FLOPS[name](*args)
        elif packet in flop_registry:
            self.counts["flops"] += flop_registry[packet](*args, **kwargs, out_val=out)
        for x in tree_leaves((args, kwargs, out) if kind == "in transit" else out):
            if isinstance(x, Tensor):
                self.see(x, kind)
        self._compare(WORKSPACE[name](*args) if name in WORKSPACE else 0, kind)
        return out

    def see(self, x: Tensor, kind: str, claimed: bool = False) -> None:
        """Note a tensor's storage, and its size as it is now: FSDP2 resizes them in place."""
        if not isinstance(x, FakeTensor) and x.is_meta:
            return
        self._bury()
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = [weakref.ref(storage, lambda _: self.dead.append(key)), 0, kind]
        entry = self.live[key]
        if claimed or (kind == "in transit" and entry[2] == "activations"):
            entry[2] = kind
        self.current += storage.nbytes() - entry[1]
        entry[1] = storage.nbytes()

    def claim(self, kind: str, tensors: list[Tensor]) -> None:
        """Give the storages of these another kind; of a DTensor, this process's part."""
        for x in tensors:
            self.see(local(x), kind, claimed=True)

    def kinds(self) -> Counter:
        """Bytes that are alive, by kind."""
        self.claim("gradients", self.gradients())
        found = Counter()
        for _, size, kind in self.live.values():
            found[kind] += size
        return found

    def settle(self) -> None:
        """Read all sizes again, and forget what only reference cycles hold."""
        gc.collect()
        for entry in self.live.values():
            size = 0 if (storage := entry[0]()) is None else storage.nbytes()
            self.current += size - entry[1]
            entry[1], storage = size, None  # or the last one would live on here
        self._bury()

    def _bury(self) -> None:
        while self.dead:  # not in the callbacks, which come at any time
            self.current -= self.live.pop(self.dead.pop())[1]

    def _compare(self, workspace: int, kind: str) -> None:
        if self.current + workspace > self.peak * NOTED:
            self.settle()
            if self.current + workspace > self.peak * NOTED:
                self.peak, self.counts["peak"] = self.current + workspace, self.kinds()
                self.counts["peak"][kind] += workspace

    def _sent(self, name: str, args) -> str:
        """Count a collective; returns its tensors' kind."""
        boxed = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        group = dist.ProcessGroup.unbox(boxed)
        if group.group_name not in self.groups:
            ranks = tuple(dist.get_process_group_ranks(group))
            self.groups[group.group_name] = self.names.get(ranks, f"{len(ranks)} processes")
        where, (ours, rounds), w = self.groups[group.group_name], COLLECTIVES.get(name, (name, 1)), group.size()
        whole = max(sum(x.nbytes for x in tree_leaves(side) if isinstance(x, Tensor)) for side in args[:2])
        self.counts["traffic"][where, ours] += whole * rounds * (w - 1) / w
        self.counts["calls"][where, ours] += 1
        return self.other if where == "tensor" else "in transit"


def rollouts_of(config: Config, count: int) -> Rollouts:
    """Rollouts of one process that fill `count` micro-batches, of a prompt each; the last completion is cut short."""
    prompt, completion = config.max_prompt_length, config.max_completion_length
    lengths = [completion] * ((config.tokens_per_microbatch - prompt) // completion)
    rest = config.tokens_per_microbatch - prompt - sum(lengths)
    lengths_PG = torch.tensor([lengths + [rest] * (rest > 0)] * count)
    P, G, R = *lengths_PG.shape, int(lengths_PG.sum())
    tokens, nothing = torch.zeros(P * prompt + R, dtype=torch.int64), torch.zeros(P, G)
    about = {"truncated_PG": nothing.bool(), "rewards_PGF": nothing[..., None], "rewards_PG": nothing}
    about["versions_PG"] = torch.zeros_like(lengths_PG)
    about |= {"sampler_logprobs_R": torch.full((R,), torch.nan), "advantages_PG": nothing + 1}  # NaN: unknown
    return Rollouts(tokens[R:], torch.full((P,), prompt), tokens[:R], lengths_PG, **about)


def measure(config: Config, shape: ModelConfig, world: World) -> dict[str, dict]:
    """Readings of grpo.backward and of the optimizer's step, in a `pretended` world or, with numbers, in a real one.

    Two micro-batches are run at most: any further one would ask for what the second did.
    """
    is_pretended = dist.is_initialized() and dist.get_backend() == "fake"
    fake = FakeTensorMode(allow_non_fake_inputs=True) if is_pretended else None
    count = min(2, config.num_micro_batches)
    rollouts = rollouts_of(config, count)
    mine = [[(p, list(range(rollouts.lengths_PG.shape[1])))] for p in range(count)]
    with ExitStack() as modes:
        # On meta before the modes begin: within, DTensors cannot be made.
        device = "meta" if fake else world.device
        policy = checkpoint.empty(shape, getattr(torch, config.dtype), device, world, config.cpu_offload and not fake)
        if fake:
            modes.enter_context(fake)
            policy.to_empty(device="cpu")
            modes.enter_context(Pretend())
        torch._foreach_zero_([local(p.detach()) for p in policy.parameters()])  # where there are numbers, none is NaN
        policy.gradient_checkpointing = config.gradient_checkpointing
        optimizer = training.optimizer_of(policy, config, world)
        optimizer.step(0.0)  # without gradients: makes AdamW's state
        weights = [*optimizer.parameters.values(), *optimizer.masters.values()]
        held = optimizer._grads
        meter = Meter(world, lambda: [x for x in (*(w.grad for w in weights), *held.values()) if x is not None])
        state = [x for master in optimizer.masters.values() for x in optimizer.adam.state[master].values()]
        meter.claim("optimizer", [*optimizer.masters.values(), *state])
        meter.claim("parameters", list(optimizer.parameters.values()))
        gc.collect()
        gc.freeze()  # what is there stays, and need not be looked through at each peak
        with meter:
            run, plans = SimpleNamespace(world=world), [mine] * world.data.size
            grpo.backward(policy, rollouts, {}, plans, config, run, 0)
            found = {"backward": meter.reading()}
            meter.other = "in transit"
            optimizer.step(config.learning_rate)
            found["update"] = meter.reading()
        gc.unfreeze()
    return found


if __name__ == "__main__":
    runs.command(main)
