"""Every layout of processes computes what one process does: loss, norm of the gradient and weights, in float64.

SGD, not AdamW: its first updates have the size of the learning rate whatever a gradient's size is, rounding's too.
"""

import random

import pytest
import torch
from processes import run_processes

from minitrl import checkpoint, distributed, layout, losses, parallel, rollout_client, training
from minitrl.distributed import World
from minitrl.model import Model, ModelConfig
from minitrl.packing import pack_groups, plan_micro_batches

STEPS, RATE = 3, 0.5
SHAPE = {
    "vocab_size": 3500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128, "rope_theta": 1e4,
}  # fmt: skip
FAMILY = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
CPU = torch.device("cpu")


def whole_model(family: str) -> Model:
    model = Model(ModelConfig.from_hf(SHAPE | FAMILY[family])).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.05 + name.endswith("norm.weight"))
    return model


def groups(seed: int) -> tuple[list, list]:
    """Prompts of one to 40 tokens with none to five completions of one to 30: nothing divides evenly."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(1, most))]

    return [ids(40) for _ in range(7)], [[ids(30) for _ in range(draw.choice([0, 1, 3, 5]))] for _ in range(7)]


def train(model: Model, world: World, capacity: int, dtype=torch.float64) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each of STEPS steps of GRPO's own loss, with SGD in place of AdamW."""
    optimizer = training.Optimizer(model, world, max_grad_norm=0.5)
    optimizer.adam = torch.optim.SGD([p for group in optimizer.adam.param_groups for p in group["params"]], lr=0.0)
    found = []
    for step in range(STEPS):
        prompts, completions = groups(step)
        lengths = [[len(c) for c in answers] for answers in completions]
        plan = plan_micro_batches([len(p) for p in prompts], lengths, capacity, world.data.size)
        count, most = sum(map(sum, lengths)), max(map(len, plan))
        total = torch.zeros((), dtype=torch.float64)
        for batch in plan[world.data.rank] + [[(0, [])]] * (most - len(plan[world.data.rank])):
            pack = pack_groups([prompts[p] for p, _ in batch], [[completions[p][g] for g in gs] for p, gs in batch])
            mask_T = pack.completion_T
            logprobs_T, entropy_T = model.logprobs(pack, mask_T, 0.8)
            noise_T = torch.sin(pack.tokens_T + 3.0 * pack.positions_T)  # a function of the token: the same everywhere
            old_T, advantages_T = logprobs_T.detach() + 0.3 * noise_T, torch.cos(pack.tokens_T.double())
            loss, _ = losses.grpo_loss(logprobs_T, old_T, advantages_T, mask_T, entropy_T=entropy_T, tokens=count,
                                       sequences=1, micro_batches=1, entropy_coef=0.01, beta=0.1,
                                       ref_logprobs_T=old_T - 0.1 * noise_T, segments_T=pack.segments_T)  # fmt: skip
            loss.backward()
            total += loss.detach()
        distributed.sum_([total], world.data)
        found.append((total.item(), optimizer.step(RATE)))
    return found


def parts_of(model: Model, world: World) -> dict[str, torch.Tensor]:
    """This process's part of each of the checkpoint's tensors, by its box."""
    parameters = {name: parallel.local(p.detach()) for name, p in model.named_parameters()}
    found = {}
    for box in layout.boxes(model.config, layout.place_of(world)):
        found[box] = parameters[box.parameter][box.at : box.at + box.shape[0]].reshape(box.shape)
    return found


def one_of_many(family: str, mesh: tuple, capacity: int, checkpointing: bool, expected: list, weights: dict) -> None:
    world = distributed.start("cpu", 120, mesh)
    model = checkpoint.divided(whole_model(family), torch.float64, world)
    model.gradient_checkpointing = checkpointing
    found = train(model, world, capacity)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=0)
    for box, part in parts_of(model, world).items():
        whole = weights[box.tensor].reshape(len(weights[box.tensor]), -1)
        torch.testing.assert_close(part, whole[slice(*box.rows), slice(*box.columns)], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def alone():
    """What one process computes: {family: (losses and norms, weights)}."""
    found = {}
    for family in FAMILY:
        model, world = whole_model(family), World(0, 1, CPU)
        steps = train(model, world, 10**6)
        found[family] = steps, {box.tensor: part for box, part in parts_of(model, world).items()}
    return found


LAYOUTS = {  # (replicate, shard, tensor), tokens in a micro-batch, activation checkpointing
    "shard 4": ((1, 4, 1), 10**6, False),
    "shard 4, accumulated": ((1, 4, 1), 60, False),
    "replicate 2 shard 2": ((2, 2, 1), 60, False),
    "tensor 4": ((1, 1, 4), 60, False),
    "shard 2 tensor 2": ((1, 2, 2), 60, False),
    "shard 2 tensor 2, checkpointing": ((1, 2, 2), 60, True),
    "replicate 2 tensor 2": ((2, 1, 2), 60, False),
    "replicate 2 shard 2 tensor 2": ((2, 2, 2), 60, True),
}


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_one_process(name, family, alone):
    mesh, capacity, checkpointing = LAYOUTS[name]
    size = mesh[0] * mesh[1] * mesh[2]
    run_processes(one_of_many, size, family, mesh, capacity, checkpointing, *alone[family])


def test_boxes_cover_each_tensor_once():
    """Whatever the layout: every element of every tensor is in one process's box, or in one of each of `tensor`'s."""
    for family in FAMILY:
        config = ModelConfig.from_hf(SHAPE | FAMILY[family])
        for shards in (1, 2, 3, 7):
            for tensors in (1, 2, 4):
                seen = {name: torch.zeros(shape[0], *(shape[1:] or [1])) for name, (*_, shape) in
                        layout.hf_tensors(config).items()}  # fmt: skip
                for shard in range(shards):
                    for tensor in range(tensors):
                        for box in layout.boxes(config, layout.Place(shard, shards, tensor, tensors)):
                            seen[box.tensor][slice(*box.rows), slice(*box.columns)] += 1
                for name, times in seen.items():
                    assert (times == (tensors if layout.same_everywhere(name) else 1)).all(), name


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ((None, None, 1), (8, 1, 1)), ((None, 4, 1), (2, 4, 1)), ((2, None, 1), (2, 4, 1)), ((None, None, 2), (4, 1, 2)),
        ((2, None, 2), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)),
    ],
)  # fmt: skip
def test_sizes_of_the_mesh(mesh, sizes):
    assert distributed.mesh_sizes(8, *mesh) == sizes


@pytest.mark.parametrize("mesh", [(3, None, 1), (None, 3, 1), (None, None, 3), (2, 2, 1), (None, None, 16), (None, 0, 1)])
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    with pytest.raises(ValueError, match="--replicate .* --shard .* --tensor .*: the product must be|must be at least 1"):
        distributed.mesh_sizes(8, *mesh)


@pytest.mark.parametrize("changed, named", [
    ({"num_attention_heads": 9, "num_key_value_heads": 9}, "num_attention_heads, 9"),
    ({"num_key_value_heads": 1}, "num_key_value_heads, 1"),
    ({"intermediate_size": 51}, "intermediate_size, 51"),
    ({"vocab_size": 1000}, "vocab_size, 1000, is too small"),
])  # fmt: skip
def test_what_does_not_divide_is_refused_by_name(changed, named):
    config = ModelConfig.from_hf(SHAPE | FAMILY["llama"] | changed)
    with pytest.raises(ValueError, match=f"--tensor 2: .*{named}"), torch.device("meta"):
        Model(config, World(0, 2, CPU))


def bfloat16_shard(expected: float, grads: dict) -> None:
    world = distributed.start("cpu", 120, (None, 2, 1))
    model = checkpoint.divided(whole_model("llama").bfloat16(), torch.bfloat16, world)
    total = weighted_sum(model, world.rank == 0)
    if world.rank == 0:
        assert total == expected
    optimizer = training.Optimizer(model, world)
    for (name, held), grad in zip(optimizer.held.items(), optimizer._take_gradients()):
        rows = -(-len(grads[name]) // 2) * world.rank
        assert grad.dtype == torch.float32 and torch.equal(grad, grads[name][rows : rows + held.shape[0]].float()), name


def weighted_sum(model: Model, whole: bool) -> float:
    """The sum of log-probs by weights that bfloat16 does not have, backward; or that of an empty micro-batch."""
    pack = pack_groups([[3, 4, 5]], [[[6, 7], [8]]]) if whole else pack_groups([], [])
    total = model.logprob_sum(pack, pack.completion_T.float() / -3)[0]
    total.backward()
    return total.item()


def test_bfloat16_shards_compute_what_a_bfloat16_model_does():
    """To the bit: activations and parameters are rounded, and nothing else that goes into a pass."""
    model = whole_model("llama").bfloat16()
    expected = weighted_sum(model, True)
    run_processes(bfloat16_shard, 2, expected, {name: p.grad for name, p in model.named_parameters()})


def test_a_sampler_that_does_not_divide_is_refused_by_its_own_option():
    model, three = whole_model("llama"), World(0, 3, CPU, option="--rollout_tensor")
    with pytest.raises(ValueError, match="--rollout_tensor 3: does not divide the model's num_attention_heads, 8"):
        rollout_client.OwnEngine(model, None, torch.float32, three, three)
