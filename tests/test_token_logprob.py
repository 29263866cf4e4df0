"""Log-prob and entropy of tokens, forward and backward, without the (T, V) logits."""

import math
from functools import partial

import pytest
import torch
from accuracy import assert_as_exact_as_plain
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitrl import distributed
from minitrl.kernels import token_logprob as kernel
from minitrl.kernels.token_logprob import IGNORE, token_logprob, token_logprob_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(T: int, V: int, D: int, dtype=torch.float64, seed: int = 0, ignored: float = 0.3) -> dict:
    """Logits of standard deviation 3: some tokens are certain, most are not, so all terms of the gradient count."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    weight = 3 * torch.randn(V, D, generator=g, dtype=torch.float64) / math.sqrt(D)
    targets = torch.randint(V, (T,), generator=g)
    targets[torch.rand(T, generator=g) < ignored] = IGNORE
    upstream = torch.randn(2, T, generator=g, dtype=torch.float64)
    upstream[:, torch.rand(T, generator=g) < 0.2] = 0  # tokens that were clipped
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets, "upstream": upstream}


def run(op, hidden, weight, targets, upstream, temperature=1.0) -> dict:
    """Outputs of an operation, and its gradients for the given upstream gradients."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs, entropy = op(hidden, weight, targets, temperature=temperature)
    torch.autograd.backward([logprobs, entropy], [u.to(logprobs.dtype) for u in upstream])
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "d_hidden": hidden.grad,
        "d_weight": weight.grad,
    }


def check(op, given: dict, temperature: float = 1.0) -> dict:
    """The operation is as exact as plain PyTorch; returns what it gave."""
    exact = given | {"hidden": given["hidden"].double(), "weight": given["weight"].double()}
    got = run(op, **given, temperature=temperature)
    plain = run(token_logprob_reference, **given, temperature=temperature)
    assert_as_exact_as_plain(got, plain, run(token_logprob_reference, **exact, temperature=temperature))
    return got


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("T", "V", "D"),
    [(1, 2, 1), (1, 500, 16), (2, 1, 3), (63, 129, 7), (129, 1001, 33), (256, 50, 8), (257, 50, 8), (700, 31, 5)],
)
def test_as_exact_as_plain_pytorch(T, V, D, dtype, temperature):
    check(token_logprob, inputs(T, V, D, dtype), temperature)


@pytest.mark.parametrize("T", [1, 63, 600])
def test_every_token_scored(T):
    check(token_logprob, inputs(T, 40, 8, torch.float32, ignored=0.0))


def test_gradients_by_finite_differences():
    """An oracle that shares no formula with either implementation."""
    given = inputs(5, 7, 3)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()

    def function(hidden, weight):
        return token_logprob(hidden, weight, given["targets"], temperature=0.7)

    assert torch.autograd.gradcheck(function, (hidden, weight), atol=1e-8, rtol=1e-6)


def test_by_hand():
    """softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8; at temperature 1/2 the weights are 1, 4, 25."""
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()[:, None]
    hidden, targets = torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, IGNORE, 2])
    for temperature, p in [(1.0, [1 / 8, 2 / 8, 5 / 8]), (0.5, [1 / 30, 4 / 30, 25 / 30])]:
        logprobs, entropy = token_logprob(hidden, weight, targets, temperature=temperature)
        h = -sum(x * math.log(x) for x in p)
        assert logprobs.tolist() == pytest.approx([math.log(p[0]), 0, math.log(p[2])], abs=1e-14)
        assert entropy.tolist() == pytest.approx([h, 0, h], abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_comes_out_is_float32_at_least(dtype):
    """A bf16 log-prob near -12 moves in steps of 0.0625: no ratio may ever be formed from one."""
    given = inputs(9, 11, 4, dtype)
    outputs = token_logprob(given["hidden"], given["weight"], given["targets"])
    assert all(x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in outputs)


def test_ignored_positions_are_not_looked_at():
    """NaN in their hidden states reaches nothing, and they get exactly 0 everywhere."""
    given = inputs(300, 40, 8)
    skipped = given["targets"] == IGNORE
    given["hidden"][skipped] = torch.nan
    given["upstream"][:, skipped] = torch.nan  # nor are the gradients that come for them
    got = run(token_logprob, **given)
    kept = {name: given[name][~skipped] for name in ("hidden", "targets")} | {"weight": given["weight"]}
    alone = run(token_logprob, **kept, upstream=given["upstream"][:, ~skipped])
    for name in ("logprobs", "entropy", "d_hidden"):
        assert torch.equal(got[name][~skipped], alone[name]) and got[name][skipped].eq(0).all(), name
    assert torch.equal(got["d_weight"], alone["d_weight"])


def test_tokens_without_upstream_gradient_reach_nothing():
    """A masked token's gradient is 0, and 0 times the NaN of a hidden state gone wrong would be NaN in every weight."""
    given = inputs(300, 40, 8, ignored=0.0)
    dead = (given["upstream"] == 0).all(0)
    assert 20 < dead.sum() < 100
    clean = run(token_logprob, **given)
    given["hidden"][dead] = torch.nan
    got = run(token_logprob, **given)
    assert torch.equal(got["d_hidden"], clean["d_hidden"]) and got["d_hidden"][dead].eq(0).all()
    assert torch.allclose(got["d_weight"], clean["d_weight"], rtol=1e-13)


@pytest.mark.parametrize("T", [0, 5])
def test_nothing_to_score(T):
    given = inputs(T, 6, 3, torch.float32, ignored=1.0)
    got = run(token_logprob, **given)
    assert [got[name].shape for name in got] == [(T,), (T,), (T, 3), (6, 3)]
    assert all(values.eq(0).all() for values in got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 30, 300])
def test_large_logits(dtype, offset):
    """exp overflows float32 at 88.7: logits up to +-1e4, and moderate ones that all stand far from 0.

    The latter lose most by subtracting log sum exp, rounded to its size, where subtracting the maximum would be exact.
    """
    for seed in range(5):
        given = inputs(65, 40, 8, dtype, seed)
        if offset:  # a constant feature adds the same to every logit
            given["hidden"][:, 0], given["weight"][:, 0] = 10.0, offset / 10
        else:
            given["hidden"] *= 1000
        got = check(token_logprob, given)
        assert (got["logprobs"] <= 0).all() and (got["entropy"] >= 0).all()


def test_a_certain_token_has_no_entropy_and_an_impossible_one_a_finite_log_prob():
    hidden, weight = torch.tensor([[1e4], [1e4]]), torch.tensor([[1.0], [-1.0], [0.0]])
    got = run(token_logprob, hidden, weight, torch.tensor([0, 1]), torch.ones(2, 2))
    assert got["logprobs"].tolist() == [0, -2e4] and got["entropy"].tolist() == [0, 0]
    assert got["d_hidden"].tolist() == [[0], [-2]]  # d (z_1 - z_0) / d hidden


def test_equal_logits():
    V = 1000
    got = run(token_logprob, torch.zeros(3, 4), torch.randn(V, 4), torch.tensor([0, 5, 999]), torch.ones(2, 3))
    assert torch.allclose(got["entropy"], torch.tensor(math.log(V)))
    assert torch.allclose(got["logprobs"], -got["entropy"])


def test_non_contiguous_inputs():
    given = inputs(150, 61, 12, torch.float32)
    wide, tall = torch.full((150, 24), torch.nan), torch.full((12, 122), torch.nan)
    spread = torch.full((300,), -7)
    wide[:, ::2], tall[:, 1::2], spread[::2] = given["hidden"], given["weight"].t(), given["targets"]
    strided = given | {"hidden": wide[:, ::2], "weight": tall[:, 1::2].t(), "targets": spread[::2]}
    assert not any(strided[name].is_contiguous() for name in ("hidden", "weight", "targets"))
    got, packed = run(token_logprob, **strided), run(token_logprob, **given)
    for name, values in packed.items():
        assert torch.allclose(got[name], values, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("output", [0, 1], ids=["log-prob", "entropy"])
def test_either_output_alone_carries_a_gradient(output):
    given = inputs(70, 23, 6)
    leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]
    got, true = (
        torch.autograd.grad(op(*leaves, given["targets"], temperature=2.0)[output].sum(), leaves)
        for op in (token_logprob, token_logprob_reference)
    )
    for ours, theirs in zip(got, true):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_frozen_inputs():
    """Only the hidden states, only the weight, or nothing needs a gradient."""
    given = inputs(70, 23, 6)
    both = run(token_logprob, **given)
    for name in ("hidden", "weight"):
        leaf = given[name].detach().requires_grad_()
        some = given | {name: leaf}
        outputs = token_logprob(some["hidden"], some["weight"], some["targets"])
        torch.autograd.backward(outputs, list(given["upstream"]))
        assert torch.equal(leaf.grad, both[f"d_{name}"])
    logprobs, entropy = token_logprob(given["hidden"], given["weight"], given["targets"])
    assert not logprobs.requires_grad and not entropy.requires_grad
    assert torch.equal(logprobs, both["logprobs"]) and torch.equal(entropy, both["entropy"])


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives out while this is on."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_kept_exponentials(dtype, splits, dead, entropy, monkeypatch):
    """As exact whether none, some or all of the forward pass's exponentials serve in the backward pass."""
    T, V, D = 150, 60, 8
    given = inputs(T, V, D, dtype, ignored=0.0)
    if not entropy:
        given["upstream"][1] = 0
    if not dead:
        given["upstream"][0].copy_(torch.linspace(-2, 2, T))
    monkeypatch.setattr(kernel, "ROWS", 64)
    monkeypatch.setattr(kernel, "COLUMNS", 25)
    monkeypatch.setattr(kernel, "KEEP", splits * T * 25 * given["hidden"].element_size())
    check(token_logprob, given, 0.7)


@pytest.mark.parametrize("ignored", [0.0, 0.1])
def test_the_logits_are_never_held(ignored, monkeypatch):
    """No tensor of either pass comes near T * V numbers; that the probe sees such a one is shown on the reference."""
    T, V = 4096, 2048
    monkeypatch.setattr(kernel, "KEEP", T * V // 2)
    monkeypatch.setattr(kernel, "COLUMNS", 256)
    given = inputs(T, V, 4, torch.float32, ignored=ignored)
    with Largest() as whole:
        run(token_logprob_reference, **given)
    assert whole.bytes >= 4 * T * V
    with Largest() as chunked:
        run(token_logprob, **given)
    assert chunked.bytes <= T * V


# Faults that the tests above must see


def no_softmax_term(hidden, weight, targets, *, temperature):
    """Gradient of z_y - lse without the second part."""
    logits = hidden @ weight.t() / temperature
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0] - logits.detach().logsumexp(-1)
    return chosen * (targets != IGNORE), token_logprob(hidden, weight, targets, temperature=temperature)[1]


def no_gradient_through_entropy(hidden, weight, targets, *, temperature):
    logprobs, entropy = token_logprob(hidden, weight, targets, temperature=temperature)
    return logprobs, entropy.detach() + 0 * logprobs


def temperature_forgotten(hidden, weight, targets, *, temperature):
    return token_logprob(hidden, weight, targets)


def last_token_forgotten(hidden, weight, targets, *, temperature):
    targets = targets.clone()
    targets[-1] = IGNORE
    return token_logprob(hidden, weight, targets, temperature=temperature)


def target_shifted(hidden, weight, targets, *, temperature):
    return token_logprob(hidden, weight, (targets + 1) % len(weight), temperature=temperature)


def all_gradients_zero(hidden, weight, targets, *, temperature):
    logprobs, entropy = token_logprob(hidden, weight, targets, temperature=temperature)
    nothing = 0 * (hidden.sum() + weight.sum())
    return logprobs.detach() + nothing, entropy.detach() + nothing


FAULTS = [no_softmax_term, no_gradient_through_entropy, temperature_forgotten]
FAULTS += [last_token_forgotten, target_shifted, all_gradients_zero]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, dtype):
    given = inputs(129, 101, 16, dtype, ignored=0.0)
    given["upstream"][:, -1] = 1.0
    if dtype == torch.bfloat16:  # written with plain operations, whose statistics are those of the dtype
        fault = in_float32(fault)
    with pytest.raises(AssertionError, match="error|finite"):
        check(fault, given, temperature=0.7)


def in_float32(op):
    def wide(hidden, weight, targets, *, temperature):
        return op(hidden.float(), weight.float(), targets, temperature=temperature)

    return wide


# --- the sum whose weights are known before --------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_sum_is_that_of_its_parts(dtype, entropy, monkeypatch):
    monkeypatch.setattr(kernel, "COLUMNS", 64)
    given = inputs(30, 200, 16, dtype)
    g, h = torch.randn(2, 30, dtype=dtype).unbind()
    g[given["targets"] == IGNORE] = torch.nan  # is not looked at
    scored, found = given["targets"] != IGNORE, []
    for alone in (True, False):
        x, w = (given[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
        if alone:
            weights = {"entropy_weights_T": h} if entropy else {}
            total, logprobs, entropies, top = kernel.token_logprob_sum(x, w, given["targets"], g, **weights, temperature=0.7)
            assert torch.equal(top, scored & ((x @ w.T).argmax(-1) == given["targets"]))
        else:
            logprobs, entropies = token_logprob(x, w, given["targets"], temperature=0.7)
            total = (g * logprobs + (h * entropies if entropy else 0))[scored].sum()
        (3 * total).backward()
        found.append([total.detach(), logprobs.detach(), entropies.detach(), x.grad, w.grad])
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    assert all((a - b).abs().max() <= bound for a, b in zip(*found))


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_the_likeliest_token_is_the_first_of_equals(columns, monkeypatch):
    monkeypatch.setattr(kernel, "COLUMNS", columns)  # within a tile and across tiles
    hidden, weight = torch.ones(4, 1), torch.tensor([0.0, 2.0, 2.0, 1.0])[:, None]
    top = kernel.token_logprob_sum(hidden, weight, torch.arange(4), torch.ones(4))[3]
    assert top.tolist() == [False, True, False, False]


def test_a_frozen_weight_gets_no_gradient_and_the_states_do():
    given = inputs(9, 11, 4)
    x = given["hidden"].requires_grad_()
    kernel.token_logprob_sum(x, given["weight"], given["targets"], torch.ones(9, dtype=x.dtype))[0].backward()
    expected, x.grad = x.grad, None
    token_logprob(x, given["weight"], given["targets"])[0].sum().backward()
    assert torch.allclose(expected, x.grad, atol=1e-12) and given["weight"].grad is None


# --- ranks that share a vocabulary -----------------------------------------------------------------------------------


def rank_of_group(given: dict, vocabulary: int):
    world = distributed.start("cpu", 60)
    group = torch.distributed.group.WORLD
    bounds = kernel.cuts(vocabulary, world.size)
    mine = slice(bounds[world.rank], bounds[world.rank + 1])
    options = {"vocabulary": vocabulary, "group": group}
    whole = run(token_logprob, **given, temperature=0.7)
    shared = run(partial(token_logprob, **options), **given | {"weight": given["weight"][mine]}, temperature=0.7)
    for name, expected in whole.items():
        expected = expected[mine] if name == "d_weight" else expected
        torch.testing.assert_close(shared[name], expected, rtol=1e-12, atol=1e-13)
    weights = given["upstream"]
    pieces = given["hidden"], given["weight"], given["targets"], *weights
    _, *found = kernel.token_logprob_sum(*pieces[:4])
    _, *shared = kernel.token_logprob_sum(pieces[0], pieces[1][mine], *pieces[2:4], **options)
    assert torch.equal(shared[2], found[2]) and found[2].any()
    torch.testing.assert_close(shared[0], found[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("vocabulary", "ranks"), [(1025, 2), (7000, 2), (9000, 4)])
def test_ranks_share_a_vocabulary(vocabulary, ranks):
    given = inputs(33, vocabulary, 8)
    likeliest = (given["hidden"] @ given["weight"].T).argmax(1)
    given["targets"][::3] = likeliest[::3]
    run_processes(rank_of_group, ranks, given, vocabulary)
