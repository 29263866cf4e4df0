"""plan.py: a step on a pretended cluster asks for what the same step asks for on a real one, and formulas say."""

import json
import math
import os
from collections import Counter

import pytest
import torch
from miniature import run
from processes import run_processes
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

pytest.importorskip("triton")

from minitrl import distributed, layout, plan
from minitrl.distributed import World
from minitrl.kernels import attention
from minitrl.kernels.attention import visible
from minitrl.model import Model, ModelConfig

SHAPE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
TOKENS, PROMPT = 256, 32
SMALL = {"tokens_per_microbatch": TOKENS, "max_prompt_length": PROMPT, "max_completion_length": 64, "model": "small"}
LAYOUTS = {  # replicate, shard, tensor
    "replicate": (4, 1, 1),
    "shard": (1, 4, 1),
    "replicate-shard": (2, 2, 1),
    "tensor": (1, 1, 4),
    "replicate-tensor": (2, 1, 2),
    "shard-tensor": (1, 2, 2),
}


def shape(**changes) -> ModelConfig:
    return ModelConfig.from_hf(SHAPE | changes)


def config(mesh, **options) -> plan.Config:
    replicate, shard, tensor = mesh
    mesh = {"gpus_per_node": math.prod(mesh), "replicate": replicate, "shard": shard, "tensor": tensor}
    return plan.Config(**SMALL | mesh | options)


def pretend(mesh, what: ModelConfig | None = None, **options) -> dict:
    asked = config(mesh, **options)
    attention.tiles.cache_clear()  # what is cached is not made again, and not counted
    with plan.pretended(math.prod(mesh), mesh) as world:
        return plan.measure(asked, what or shape(), world)


# --- against a real step ---------------------------------------------------------------------------------------------


class Lent(TorchDispatchMode):
    """gloo works on copies, below the meter. Its own thread holds what it was given until it is run again, moments after
    the collective is done: whether a buffer is still alive at a peak would be up to the system's scheduler."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        if not function._schema.name.startswith("c10d::"):
            return function(*args, **(kwargs or {}))
        copies = tree_map_only(torch.Tensor, torch.clone, args)
        work = function(*copies, **(kwargs or {}))[-1]
        work.wait()
        for x, copy in zip(tree_leaves(args[0]), tree_leaves(copies[0])):  # what it gives stands first
            x.copy_(copy)
        return args[0], work


def plain(found: dict) -> dict:
    """As JSON has it, without what is nothing."""
    readings = {phase: dict(reading) for phase, reading in found.items()}
    for reading in readings.values():
        for key in ("peak", "kept", "traffic", "calls"):
            reading[key] = {str(name): n for name, n in reading[key].items() if n}
    return readings


def real_steps(folder: str, names: list[str], meshes: list[tuple], options: dict) -> None:
    os.environ["MINITRL_KERNELS"] = "reference"
    world = distributed.start("cpu", 120)
    for name, mesh in zip(names, meshes):
        part = world if mesh[1:] == (1, 1) else distributed.with_mesh(world, mesh, 60)
        attention.tiles.cache_clear()
        with Lent():
            found = plan.measure(config(mesh, **options), shape(), part)
        if world.rank == 0:
            with open(f"{folder}/{name}.json", "w") as file:
                json.dump(plain(found), file)
    distributed.stop()


@pytest.mark.parametrize(
    ("processes", "names", "options"),
    [
        (2, ["replicate", "shard", "tensor"], {}),
        (4, ["replicate-shard", "shard-tensor"], {}),
        pytest.param(4, list(LAYOUTS), {}, marks=pytest.mark.slow),
        pytest.param(4, list(LAYOUTS), {"gradient_checkpointing": False}, marks=pytest.mark.slow),
    ],
)
def test_a_pretended_step_asks_for_what_a_real_one_does(processes, names, options, tmp_path, monkeypatch):
    """Bytes of every kind at the peak and after, FLOPs, and what is sent, on the very same meter: to the byte."""
    monkeypatch.setenv("MINITRL_KERNELS", "reference")
    meshes = [tuple(n and (n if n == 1 else n * processes // 4) for n in LAYOUTS[name]) for name in names]
    run_processes(real_steps, processes, str(tmp_path), names, meshes, options)
    for name, mesh in zip(names, meshes):
        real = json.loads((tmp_path / f"{name}.json").read_text())
        pretended = json.loads(json.dumps(plain(pretend(mesh, **options))))
        for phase in real:
            assert pretended[phase] == real[phase], (name, phase)


# --- against formulas ------------------------------------------------------------------------------------------------


def traffic(what: ModelConfig, mesh, micro_batches: int, checkpointing: bool = True) -> tuple[Counter, Counter]:
    """What a process sends in backward passes and in the update, in bytes: bfloat16 forward, float32 sums."""
    (R, S, T), D, L = mesh, what.hidden_size, what.num_hidden_layers
    with torch.device("meta"):
        model = Model(what, World(0, T, torch.device("cpu")))
    padded = {name: math.ceil(len(p) / S) * S * p[0].numel() for name, p in model.named_parameters()}
    every, blocks = sum(padded.values()), sum(n for name, n in padded.items() if name.startswith("layers."))
    backward, update = Counter(), Counter()

    def send(into, group, kind, whole, rounds=1, members=None):
        members = members or {"replicate": R, "shard": S, "tensor": T}[group]
        into[group, kind] += whole * rounds * (members - 1) / members

    if S > 1:  # blocks are gathered forward and backward, what is around them once
        send(backward, "shard", "all_gather", 2 * (2 * blocks + every - blocks))
        send(backward, "shard", "reduce_scatter", 4 * every)
        send(backward, "replicate", "all_reduce", 4 * every / S, 2)
    else:
        send(update, "replicate", "all_reduce", 4 * every, 2)
    if T > 1:
        rows, scored = 2 * TOKENS * D, TOKENS - PROMPT
        # forward 2 of each in a block; recomputed all but the last; backward those of the other kind
        send(backward, "tensor", "all_gather", rows * (L * (4 + 2 * checkpointing) + 2))
        send(backward, "tensor", "reduce_scatter", rows * (L * (4 + checkpointing) + 1))
        splits = math.ceil(math.ceil(what.vocab_size / 1024) / T)  # each leaves three numbers a token
        send(backward, "tensor", "all_gather", 4 * T * (1 + 3 * splits) * scored)
        send(backward, "tensor", "all_reduce", 4 * scored * D, 2)
        norms = [n for name, n in padded.items() if name.endswith("norm.weight")]
        send(update, "tensor", "all_reduce", 4 * sum(norms) / S, 2)
    return Counter({key: micro_batches * n for key, n in backward.items()}), update


@pytest.mark.parametrize(
    ("mesh", "checkpointing"),
    [*((mesh, True) for mesh in (*LAYOUTS.values(), (2, 2, 2), (64, 8, 1), (4, 16, 4), (1, 1, 1))), ((1, 2, 2), False)],
    ids=str,
)
def test_what_is_sent_is_what_the_layout_has_to_send(mesh, checkpointing):
    """Nothing beside it: no gradient is gathered, no parameter twice. A step's metrics and norms are a few numbers."""
    found = pretend(mesh, gradient_checkpointing=checkpointing)
    expected = traffic(shape(), mesh, 2, checkpointing)
    for phase, formula in zip(("backward", "update"), expected):
        counted = found[phase]["traffic"]
        for key in counted.keys() | formula.keys():
            assert abs(counted[key] - formula[key]) <= 512 + 24 * math.prod(mesh), (phase, key)


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [
        *((mesh, "bfloat16") for mesh in ((8, 1, 1), (2, 4, 1), (1, 64, 1), (1, 1, 4), (1, 16, 4))),
        *((mesh, "float32") for mesh in ((1, 1, 1), (1, 64, 1))),
    ],
    ids=str,
)
def test_what_stays_is_parameters_and_the_optimizers_state(mesh, dtype):
    """Alone: 2 + 12 bytes a parameter, in float32 4 + 8; divided by FSDP2, 4 + 8 of what a process holds of it."""
    kept = pretend(mesh, dtype=dtype, num_micro_batches=1)["update"]["kept"]
    mine = sum(math.prod(box.shape) for box in layout.boxes(shape(), layout.Place(0, mesh[1], 0, mesh[2])))
    master = mesh[1] > 1 or dtype == "float32"
    assert kept["parameters"] == (4 if master else 2) * mine
    steps = 4 * len(list(Model(shape()).parameters()))  # AdamW's counts
    assert kept["optimizer"] == (8 if master else 12) * mine + steps
    assert sum(kept.values()) - kept["parameters"] - kept["optimizer"] < 4096


def test_no_process_ever_holds_the_model():
    """In transit at most what is around the blocks, two blocks and their gradients; not the twelve that there are."""
    what = shape(num_hidden_layers=12, vocab_size=1024)
    found = pretend((1, 16, 1), what)["backward"]
    with torch.device("meta"):
        sizes = Counter(name.split(".")[1] if "layers" in name else "" for name, p in Model(what).named_parameters()
                        for _ in range(p.numel()))  # fmt: skip
    block, around = sizes["0"], sizes[""]
    assert found["peak"]["in transit"] <= 2 * (around + 2 * block) + 4 * (block + around) * 17 / 16
    assert found["peak"]["in transit"] < 2 * 12 * block


def test_flops_are_those_of_the_matrices_and_of_attention():
    what = shape()
    found = pretend((1, 1, 1), what, num_micro_batches=1)["backward"]["flops"]
    D, F, H, K, E, V = 64, 176, 8, 4, 16, 4096
    block = D * (H + 2 * K) * E + H * E * D + 3 * D * F
    lengths = [PROMPT, 64, 64, 64, 32]
    pairs = sum(int(visible(n, PROMPT if i else 0, None, "cpu").sum()) for i, n in enumerate(lengths))
    forward = 2 * TOKENS * block + 4 * H * E * pairs
    recomputed = forward - 2 * TOKENS * D * F  # the last product is not needed again
    backward = 4 * TOKENS * block + 10 * H * E * pairs
    assert found == 3 * (forward + recomputed + backward) + 8 * (TOKENS - PROMPT) * V * D


@pytest.mark.parametrize("window", [None, 1, 7, 30, 300])
def test_pairs_that_attention_computes(window):
    lengths, prefixes = [20, 13, 40, 9, 1], [-1, 0, 0, -1, 3]
    q = torch.empty(83, 2, 8)
    seen = sum(int(visible(n, lengths[p] if p >= 0 else 0, window, "cpu").sum()) for n, p in zip(lengths, prefixes))
    assert plan._attention(4, q, lengths, prefixes, 1.0, window) == 4 * 2 * 8 * seen


def test_a_micro_batch_is_full():
    rollouts = plan.rollouts_of(config((1, 1, 1), tokens_per_microbatch=250), 3)
    assert rollouts.num_tokens == 750 and rollouts.lengths_PG.tolist() == [[64, 64, 64, 26]] * 3


# --- what follows ----------------------------------------------------------------------------------------------------


def test_further_micro_batches_cost_what_the_second_does():
    one, two, five = (plan.plan(config((1, 4, 1), num_micro_batches=n), shape()) for n in (1, 2, 5))
    assert five["flops"] == 2.5 * two["flops"] == 5 * one["flops"]
    sent = [sum(row["bytes"] for row in found["traffic"] if row["group"] == "shard") for found in (one, two, five)]
    assert sent[2] == pytest.approx(2.5 * sent[1], rel=1e-3) and sent[1] == pytest.approx(2 * sent[0], rel=1e-3)
    assert five["memory"]["peak"] == two["memory"]["peak"] > one["memory"]["peak"]


def test_rates_of_links():
    asked, gpu = config((1, 1, 1), gpus_per_node=8, nodes=8, replicate=8, shard=8), plan.GPUS["H100"]
    assert plan.rate(asked, gpu, 1, 8) == 450e9  # within a node
    assert plan.rate(asked, gpu, 8, 8) == 50e9  # one process of each node: its own adapter
    assert plan.rate(asked, gpu, 1, 64) == 400e9  # all of a node: eight adapters
    assert plan.rate(asked, gpu, 2, 32) == 200e9


def test_a_sampler_of_its_own_is_counted():
    own, shared = (plan.plan(config(mesh), shape()) for mesh in ((1, 4, 1), (4, 1, 1)))
    weights = 2 * sum(math.prod(box.shape) for box in layout.boxes(shape()))
    assert own["memory"]["kinds"]["sampler's weights"] == own["rollouts"]["weights"] == weights
    held = 2 * sum(math.prod(box.shape) for box in layout.boxes(shape(), layout.Place(0, 4)))
    assert own["rollouts"]["received"] == weights - held
    assert shared["rollouts"]["weights"] == shared["rollouts"]["received"] == 0


def test_the_command(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    argv = ["--model", str(tmp_path), "--gpus-per-node", "4", "--shard", "4", "--json", str(tmp_path / "plan.json")]
    done = run(argv, plan)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert done.code == 0 and "fits in 67.1" in done.out and found["fits"] and found["options"]["shard"] == 4
    assert [row["group"] for row in found["traffic"] if row["bytes"] > 1e6] == ["shard", "shard"]


def test_what_does_not_fit_gets_the_nearest_that_does(tmp_path):
    """8 layers of 30 billion parameters on two GPUs: with the state in the machine's memory they fit."""
    wide = {"hidden_size": 8192, "intermediate_size": 147456, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 128, "num_hidden_layers": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | wide))
    argv = ["--model", str(tmp_path), "--gpus_per_node", "4", "--shard", "4", "--json", str(tmp_path / "plan.json")]
    done = run(argv, plan)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert done.code == 1 and "DOES NOT FIT" in done.out and "nearest that fits" in done.out
    assert not found["fits"] and found["nearest"]["fits"]
    assert found["nearest"]["memory"]["peak"] <= found["memory"]["room"] < found["memory"]["peak"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model None: must be a config.json"),
        (["--model", "nowhere"], "--model nowhere: must be a config.json, or the folder that it is in"),
        (["--model", "MODEL", "--shard", "3"], "--replicate 2 --shard 3 --tensor 1"),
        (["--model", "MODEL", "--tensor", "8"], "--tensor 8: does not divide"),
        (["--model", "MODEL", "--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--model", "MODEL", "--beta", "0.1"], "--beta 0.1: must be left out here"),
        (["--model", "MODEL", "--cpu_offload"], "--cpu_offload"),
        (["--model", "MODEL", "--rollout_tensor", "3"], "--rollout_tensor 3"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    done = run([str(tmp_path) if word == "MODEL" else word for word in argv], plan)
    assert done.code and message in done.err and "Traceback" not in done.err
