"""Weights from one layout to another: each element once, to the bit, and only what each needs."""

import os
import random

import pytest
import torch
from processes import run_processes
from test_checkpoint import CONFIG

from minitrl import distributed, transfer
from minitrl.layout import Box, Place, boxes, hf_tensors
from minitrl.model import Model, ModelConfig

SHAPES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 48,
          "vocab_size": 600, "head_dim": 4}  # fmt: skip


def config(**options) -> ModelConfig:
    return ModelConfig.from_hf(CONFIG | SHAPES | {"architectures": None} | options)


def places(shards: int, tensors: int) -> list[Place]:
    return [Place(s, shards, t, tensors) for s in range(shards) for t in range(tensors)]


def whole(shape_of: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, in two dimensions, each element of a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape if len(shape) == 2 else (*shape, 1), generator=generator)
            for name, (_, _, shape) in hf_tensors(shape_of).items()}  # fmt: skip


def cut(checkpoint: dict, held: list[Box], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The local parameters of a process that holds these boxes."""
    parts = {}
    for box in held:
        parts.setdefault(box.parameter, []).append((box.at, checkpoint[box.tensor][slice(*box.rows), slice(*box.columns)]))
    joined = {name: torch.cat([part for _, part in sorted(rows, key=lambda row: row[0])]) for name, rows in parts.items()}
    return {name: (t[:, 0] if "norm" in name or name.endswith("bias") else t).to(dtype).clone() for name, t in joined.items()}


def layouts(number: int):
    """A random model, and two random meshes."""
    draw = random.Random(number)
    tensors = [1, 2, 4]
    options = {"tie_word_embeddings": draw.random() < 0.5, "vocab_size": draw.choice([17, 600, 1024, 1500]),
               "model_type": draw.choice(["llama", "qwen2", "qwen3"]), "attention_bias": draw.random() < 0.5}  # fmt: skip
    return config(**options), (draw.randint(1, 7), draw.choice(tensors)), (draw.randint(1, 5), draw.choice(tensors)), draw


@pytest.mark.parametrize("number", range(60))
def test_every_element_comes_once(number):
    """Any mesh to any other, replicas among the sources: counted in tensors of ones."""
    model, mesh, other, draw = layouts(number)
    colocated = number % 3 == 0
    sources = [boxes(model, place) for place in places(*mesh)] * draw.randint(1, 3)
    targets = [boxes(model, place) for place in places(*other)] * draw.randint(1, 3)
    targets = (targets * len(sources))[: len(sources)] if colocated else targets
    seen = [{(box.tensor, box.rows, box.columns): torch.zeros(box.shape) for box in held} for held in targets]
    sent = [0] * len(sources)
    for move in transfer.moves(sources, targets, colocated):
        assert move.given in sources[move.source] and move.wanted in targets[move.target]
        for box in (move.given, move.wanted):
            assert box.rows[0] <= move.rows[0] < move.rows[1] <= box.rows[1]
            assert box.columns[0] <= move.columns[0] < move.columns[1] <= box.columns[1]
        box = move.wanted
        rows, columns = (slice(a - b, c - b) for (a, c), b in ((move.rows, box.rows[0]), (move.columns, box.columns[0])))
        seen[move.target][box.tensor, box.rows, box.columns][rows, columns] += 1
        if not (colocated and move.source == move.target):
            sent[move.source] += move.size
            rectangles = {(b.tensor, b.rows, b.columns) for b in sources[move.target]} if colocated else ()
            assert (move.given.tensor, move.given.rows, move.given.columns) not in rectangles, "what it has itself"
    assert all(bool((count == 1).all()) for held in seen for count in held.values())
    if not colocated and mesh == (1, 1):
        assert max(sent) - min(sent) <= max(box.shape[0] * box.shape[1] for box in sources[0])  # replicas share evenly


def test_what_no_source_has():
    held = [boxes(config(), place) for place in places(2, 2)]
    with pytest.raises(ValueError, match="elements are with none of 3 sources"):
        list(transfer.moves(held[:3], [boxes(config())]))
    with pytest.raises(ValueError, match="tensor lm_head.weight"):
        list(transfer.moves([boxes(config(tie_word_embeddings=True))], [boxes(config(tie_word_embeddings=False))]))


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_buckets_hold_all_in_order(size):
    given = list(transfer.moves([boxes(config())], [boxes(config(), places(2, 2)[1])]))
    bundles = list(transfer._buckets(given, size))
    assert all(sum(part.size for part in bundle) <= max(size, bundle[0].shape[1]) for bundle in bundles)
    rows = [(part.wanted, row) for bundle in bundles for part in bundle for row in range(*part.rows)]
    assert rows == [(move.wanted, row) for move in given for row in range(*move.rows)]


def in_one_world(mesh, tensors, sharded):
    world = distributed.start("cpu", 60, mesh)
    model = config()
    before, after = whole(model, 1), whole(model, 2)
    place = Place(world.shard.rank, world.shard.size, world.tensor.rank, world.tensor.size)
    held, wanted = boxes(model, place), boxes(model, Place(tensor=world.rank % tensors, tensors=tensors))
    target = cut(before, wanted, torch.bfloat16)
    if sharded:  # FSDP2 itself, not our idea of it
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        source = Model(model)
        with torch.no_grad():
            for name, value in cut(after, boxes(model)).items():
                source.get_parameter(name).copy_(value)
        for block in (*source.layers, source):
            fully_shard(block, mesh=DeviceMesh("cpu", torch.arange(world.size)))
        source = dict(source.named_parameters())
    else:
        source = cut(after, held)
    route = transfer.within(world, model, tensors)
    for bucket in (transfer.BUCKET, 1000):
        for tensor in target.values():
            tensor.zero_()
        route.carry(source, target, torch.bfloat16, verify=bucket == 1000, bucket=bucket)
        assert all(torch.equal(target[name], t) for name, t in cut(after, wanted, torch.bfloat16).items())
    received = sum(move.size for part in route.receives.values() for move in part)
    own = sum(move.size for move in route.own)
    assert received + own == sum(t.numel() for t in target.values())
    distributed.stop()


@pytest.mark.parametrize("size, mesh, tensors, sharded", [
    (4, (1, 4, 1), 1, True), (4, (1, 4, 1), 2, True), (4, (2, 1, 2), 4, False), (4, (1, 2, 2), 1, False),
    (3, (1, 3, 1), 1, False),
])  # fmt: skip
def test_from_the_trainers_shards_to_a_sampler_in_the_same_processes(size, mesh, tensors, sharded):
    run_processes(in_one_world, size, mesh, tensors, sharded)


def faulty(mesh, fault):
    """Rank 1 fails amid a transfer; the others say which rank they are, and where they stood."""
    world = distributed.start("cpu", 20, mesh)
    model = config(num_hidden_layers=4)
    held = boxes(model, Place(world.rank, world.size))
    source, target = cut(whole(model), held), cut(whole(model, 2), boxes(model))
    route, exchange = transfer.within(world, model, 1), transfer.Link.exchange
    if world.rank == 1 and fault == "a wrong shape":
        source["layers.2.o_proj.weight"] = source["layers.2.o_proj.weight"][:, :-1]
    rounds = []

    def counted(link, pieces):
        rounds.append(len(pieces))
        if world.rank == 1 and len(rounds) == 3:
            if fault == "killed":
                os._exit(0)
            elif fault == "a bit":
                [data.view(torch.uint8)[5:6].bitwise_xor_(2) for _, ours, data in pieces if ours]
        return exchange(link, pieces)

    transfer.Link.exchange = counted
    try:
        route.carry(source, target, torch.float32, verify=True, bucket=2000)
    except ConnectionError as error:
        expected = "verifying the weights" if fault == "a bit" else "of the weights"
        assert str(error).startswith(f"rank {world.rank} of 3, ") and (expected in str(error) or fault != "a bit"), error
    except ValueError as error:
        assert world.rank == 1 and "layers.2.o_proj.weight is [" in str(error)
    else:
        assert world.rank == 1 and fault == "a bit", "it sent what is wrong, and received what is right"
    os._exit(0)


@pytest.mark.parametrize("fault", ["killed", "a bit", "a wrong shape"])
def test_a_fault_of_one_is_an_error_of_all(fault):
    run_processes(faulty, 3, (1, 3, 1), fault)
