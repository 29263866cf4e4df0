"""The optimizer against plain PyTorch, its exact resume, and the schedules against transformers'."""

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file, save_file
from torch import nn

from minitrl.distributed import World, start, stop
from minitrl.training import NotFinite, Optimizer, schedule

WORLD = World(0, 1, torch.device("cpu"))


class Small(nn.Module):
    """Matrices, a bias, a norm's weight, a tied matrix, a frozen and an unused parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Linear(6, 8)
        self.norm = nn.RMSNorm(8)
        self.outer = nn.Linear(8, 6, bias=False)
        self.tied = self.outer.weight
        self.frozen = nn.Parameter(torch.ones(6, 6), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, 3))
        for p in self.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape, generator=generator)
        self.to(dtype)

    def forward(self, x):
        return self.outer(self.norm(self.inner(x))) @ self.frozen


def batch(seed: int, dtype=torch.float32, rows: int = 5):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss(model, x, scale=1.0):
    return scale * model(x).float().pow(2).sum()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9, 0.0])
def test_equals_torch(dtype, max_grad_norm):
    """Full-precision models: the same bits as clip_grad_norm_ and AdamW, with no decay on one-dimensional weights."""
    ours, theirs = Small(dtype), Small(dtype)
    optimizer = Optimizer(ours, WORLD, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-5, max_grad_norm=max_grad_norm)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-5, fused=True)
    for step in range(4):
        for micro in range(2):
            for model in (ours, theirs):
                loss(model, batch(2 * step + micro, dtype)).backward()
        theirs.unused.grad = torch.zeros_like(theirs.unused)
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = 0.01 * (step + 1)
        adam.step()
        adam.zero_grad()
        assert optimizer.step(0.01 * (step + 1)) == norm.item()
        assert all(p.grad is None for p in ours.parameters())
        assert equal(weights(ours), weights(theirs)), step
    assert all(optimizer.masters[name] is p for name, p in optimizer.parameters.items())  # no copy
    assert len(vectors) == 2 and torch.equal(ours.frozen, torch.ones(6, 6, dtype=dtype))
    assert (ours.unused.abs() < Small(dtype).unused.abs()).all()  # decayed, though no gradient reached it


def test_no_decay_on_vectors():
    model = Small()
    before = weights(model)
    Optimizer(model, WORLD, weight_decay=0.5).step(0.1)
    after = weights(model)
    assert torch.allclose(after["inner.weight"], before["inner.weight"] * 0.95)
    for vector in ("inner.bias", "norm.weight"):
        assert torch.equal(after[vector], before[vector])


def test_bf16_masters_take_updates_that_bf16_cannot():
    model = Small(torch.bfloat16)
    with torch.no_grad():
        model.unused.fill_(1.0)
    optimizer = Optimizer(model, WORLD, max_grad_norm=0)
    for _ in range(8):
        model.unused.sum().mul(1e-3).backward()
        optimizer.step(1e-3)  # AdamW moves each weight by about lr; the step of bf16 below 1.0 is 3.9e-3
    assert torch.allclose(optimizer.masters["unused"], torch.tensor(1 - 8e-3), atol=1e-4)
    assert torch.equal(model.unused, optimizer.masters["unused"].bfloat16()) and (model.unused < 1).all()
    assert all(m.dtype == torch.float32 for m in optimizer.masters.values())


def test_bf16_gradients_add_up_in_float32():
    """256 micro-batches of gradient 1: a bf16 sum would stop at 256, and 1 + 2^-9 would never show."""
    model = Small(torch.bfloat16)
    optimizer = Optimizer(model, WORLD, max_grad_norm=0)
    for _ in range(400):
        model.unused.sum().backward()
        assert model.unused.grad is None  # moved at once
    assert optimizer.step(0.0) == pytest.approx(400 * 3)  # the norm of nine gradients of 400


def test_bf16_follows_float32():
    """With masters, a bf16 model stays beside its float32 twin; every step starts from the rounded master."""
    wide, narrow = Small(), Small(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters()):
            p.copy_(q)
    a, b = Optimizer(wide, WORLD), Optimizer(narrow, WORLD)
    ratios = []
    for step in range(20):
        loss(wide, batch(step)).backward()
        loss(narrow, batch(step, torch.bfloat16)).backward()
        ratios.append(b.step(1e-3) / a.step(1e-3))
        assert all(torch.equal(p, b.masters[n].to(p.dtype)) for n, p in b.parameters.items())
    # A bfloat16 weight is off by up to 2^-9, a gradient's norm by a few times that, now up and now down
    assert max(abs(ratio - 1) for ratio in ratios) < 0.02 and abs(sum(ratios) / 20 - 1) < 0.004
    drift = torch.cat([(a.masters[n] - b.masters[n]).abs().flatten() for n in a.masters])
    assert drift.median() < 2e-3 and drift.max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resume_is_exact(dtype):
    def train(model, optimizer, steps):
        return [(loss(model, batch(s, dtype)).backward(), optimizer.step(0.01))[1] for s in steps]

    straight, first, second = Small(dtype), Small(dtype), Small(dtype)
    optimizer = Optimizer(straight, WORLD, weight_decay=0.1)
    norms = train(straight, optimizer, range(4))
    half = Optimizer(first, WORLD, weight_decay=0.1)
    assert train(first, half, range(2)) == norms[:2]
    saved = {name: tensor.clone() for name, tensor in half.state_tensors().items()}

    kept = {name: tensor.clone() for name, tensor in saved.items()}
    with torch.no_grad():
        for p in second.parameters():
            if p.requires_grad:
                p.zero_()
    other = Optimizer(second, WORLD, weight_decay=0.1)
    other.load_state_tensors(saved)
    assert equal(other.state_tensors(), kept) and saved["step"].item() == 2
    assert train(second, other, range(2, 4)) == norms[2:]
    assert equal(weights(second), weights(straight)) and equal(other.state_tensors(), optimizer.state_tensors())
    masters = {name for name in saved if name.startswith("master.")}
    assert masters == {"master." + n for n in ("inner.weight", "inner.bias", "norm.weight", "tied", "unused")}
    assert len(saved) == 1 + 3 * len(masters)
    assert equal(saved, kept)  # what was loaded from did not move on with the steps


def test_state_before_the_first_step():
    model, other = Small(), Small()
    saved = Optimizer(model, WORLD).state_tensors()
    assert saved["step"].item() == 0 and all(name == "step" or name.startswith("master.") for name in saved)
    optimizer = Optimizer(other, WORLD)
    loss(other, batch(0)).backward()
    optimizer.step(0.1)
    optimizer.load_state_tensors(saved)
    assert equal(weights(model), weights(other)) and equal(optimizer.state_tensors(), saved)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("exp_avg.unused"), r"exp_avg.unused is absent in the checkpoint, \(3, 3\) in the model"),
        (lambda t: t.update({"master.more": torch.ones(2)}), r"master.more is \(2,\) in the checkpoint, absent"),
        (lambda t: t.update({"master.unused": torch.ones(3)}), r"master.unused is \(3,\) in the checkpoint, \(3, 3\)"),
        (lambda t: t.pop("step"), "optimizer state: .* is .* in the checkpoint, absent in the model"),
    ],
)
def test_state_of_another_model_is_refused(change, words):
    model = Small()
    optimizer = Optimizer(model, WORLD)
    optimizer.step(0.1)
    state = dict(optimizer.state_tensors())
    change(state)
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_tensors(state)
    assert equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stops_before_the_update(dtype, value):
    model = Small(dtype)
    optimizer = Optimizer(model, WORLD)
    loss(model, batch(0, dtype)).backward()
    optimizer.step(0.1)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    loss(model, batch(1, dtype)).backward()
    (model.unused[0, 0] * value).backward()
    with pytest.raises(NotFinite, match="norm is (nan|inf)"):
        optimizer.step(0.1)
    assert equal(optimizer.state_tensors(), before)
    assert optimizer.step(0.0) == 0.0  # the bad gradients are gone


def test_zero_grad_forgets_the_step():
    for dtype in (torch.float32, torch.bfloat16):
        model = Small(dtype)
        optimizer = Optimizer(model, WORLD)
        loss(model, batch(0, dtype)).backward()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        assert optimizer.step(0.1) == 0.0


def test_a_second_optimizer_on_one_model():
    """A warm-up's optimizer must not go on collecting the gradients after it is gone."""
    model = Small(torch.bfloat16)
    optimizer = Optimizer(model, WORLD)
    del optimizer
    optimizer = Optimizer(model, WORLD)
    loss(model, batch(0, torch.bfloat16)).backward()
    assert optimizer.step(0.1) > 0


def two_halves(dtype, folder: str) -> None:
    world = start("cpu", 600)
    rank, size = world.rank, world.size
    model = Small(dtype)
    optimizer = Optimizer(model, world)
    for step in range(3):
        # Rank 1 has nothing in the last step: its micro-batches were all without signal.
        if not (step == 2 and rank == 1):
            loss(model, batch(step, dtype, rows=4)[rank::size] if step < 2 else batch(step, dtype, rows=4)).backward()
        norm = optimizer.step(0.01)
    save_file({"norm": torch.tensor(norm, dtype=torch.float64), **weights(model)}, f"{folder}/{rank}.safetensors")
    with pytest.raises(NotFinite):  # on one rank, so on all
        loss(model, batch(0, dtype), float("nan") if rank else 1.0).backward()
        optimizer.step(0.01)
    stop()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_processes_are_one(tmp_path, dtype):
    run_processes(two_halves, 2, dtype, str(tmp_path))
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    norms = [result.pop("norm").item() for result in results]
    assert norms[0] == norms[1] and equal(*results)

    model = Small(dtype)
    optimizer = Optimizer(model, WORLD)
    for step in range(3):
        loss(model, batch(step, dtype, rows=4)).backward()
        norm = optimizer.step(0.01)
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-2, atol=2e-2)
    assert norms[0] == pytest.approx(norm, rel=tolerance["rtol"])
    for name, weight in weights(model).items():
        torch.testing.assert_close(results[0][name], weight, **tolerance)


NAMES = ("linear", "cosine", "constant", "constant_with_warmup")


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (10, 10), (0, 1), (5, 3)])
def test_schedule_is_transformers(name, warmup, total):
    optimization = pytest.importorskip("transformers.optimization")
    adam = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = optimization.get_scheduler(name, adam, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 3):
        assert schedule(name, step, warmup, total) == theirs.lr_lambdas[0](step), step


def test_schedule_values():
    """The same by hand, for where transformers is not installed."""
    assert [schedule("linear", s, 2, 6) for s in range(8)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [schedule("constant_with_warmup", s, 2, 6) for s in range(4)] == [0, 0.5, 1, 1]
    assert [schedule("constant", s, 0, 6) for s in (0, 9)] == [1, 1]
    cosine = [schedule("cosine", s, 2, 6) for s in range(7)]
    assert cosine == pytest.approx([0, 0.5, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0])
    with pytest.raises(ValueError, match="--lr_scheduler_type step"):
        schedule("step", 0, 0, 6)
