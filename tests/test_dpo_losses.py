"""DPO's losses and the reward model's against their formulas, written again here in float64, values and gradients.

`formula` has TRL 0.16.0's expressions (DPOTrainer.dpo_loss), from the papers' notation and not from losses.py.
"""

import itertools
import math

import pytest
import torch
from faults import mutant

from minitrl import losses
from minitrl.losses import DPO_LOSS_TYPES, SMOOTHED, WHOLE_STEP

TOLERANCE = 1e-5
P = 7
CASES = [(kind, e) for kind in DPO_LOSS_TYPES for e in (0.0, 0.1) if e == 0 or kind in SMOOTHED]


def given(seed=0):
    """Log-probs as large as those of answers of 3 to 40 tokens; the policy has moved by some nats either way."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (2, P), generator=generator).float()
    reference = -lengths * (1 + torch.rand(2, P, generator=generator))
    policy = reference + 8 * torch.randn(2, P, generator=generator)
    return [*policy, *reference, *lengths]


def formula(kind, c, r, rc, rr, lc, lr, beta=0.1, e=0.0, tau=0.05, delta=0.0):
    """(P,) float64 losses."""
    c, r, rc, rr, lc, lr = (x.double() for x in (c, r, rc, rr, lc, lr))
    s = lambda z: 1 / (1 + torch.exp(-z))  # noqa: E731
    log_s = lambda z: -torch.log1p(torch.exp(-z))  # noqa: E731
    u, v = c - rc, r - rr  # the log-ratios of chosen and rejected
    z = beta * (u - v)
    if kind == "sigmoid":
        return -(1 - e) * log_s(z) - e * log_s(-z)
    if kind == "robust":
        return (-(1 - e) * log_s(z) + e * log_s(-z)) / (1 - 2 * e)
    if kind == "hinge":
        return torch.clamp(1 - z, min=0)
    if kind == "ipo":
        return ((c / lc - rc / lc) - (r / lr - rr / lr) - 1 / (2 * beta)).square()
    if kind == "exo_pair":
        e = e if e > 0 else 1e-3
        return s(z) * (torch.log(s(z)) - math.log(1 - e)) + s(-z) * (torch.log(s(-z)) - math.log(e))
    if kind == "nca_pair":
        return -log_s(beta * u) - log_s(-beta * u) / 2 - log_s(-beta * v) / 2
    if kind == "bco_pair":
        return -log_s(beta * u - delta) - log_s(-(beta * v - delta))
    if kind == "sppo_hard":
        return (u - 0.5 / beta).square() + (v + 0.5 / beta).square()
    if kind in ("aot", "aot_pair"):
        left, right = (c - r, rc - rr) if kind == "aot" else (u, v)
        d = beta * (torch.sort(left).values - torch.sort(right).values)
        return -(1 - e) * log_s(d) - e * log_s(-d)
    if kind == "discopop":
        m = s(z / tau)
        return -log_s(z) * (1 - m) + torch.exp(-z) * m
    if kind == "apo_zero":
        return (1 - s(beta * u)) + s(beta * v)
    if kind == "apo_down":
        return s(beta * u) + (1 - s(beta * (u - v)))
    assert kind == "sft"
    return (-c.sum() / lc.sum()).expand(len(c))


def with_gradients(function, x):
    """(value, d value / d chosen, d value / d rejected)."""
    leaves = [x[0].clone().requires_grad_(), x[1].clone().requires_grad_()]
    value = function(*leaves, *x[2:])
    return value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def check_formula(kind, e, seed=0):
    for beta, delta in ((0.1, 0.0), (0.7, 0.3)):
        ours = with_gradients(lambda *x: losses.dpo_loss(
            *x, loss_type=(kind,), beta=beta, label_smoothing=e, delta=delta, discopop_tau=0.4), given(seed))
        true = with_gradients(lambda *x: formula(kind, *x, beta=beta, e=e, delta=delta, tau=0.4).mean(), given(seed))
        assert true[1].abs().max() > 1e-3
        for a, b in zip(ours, true, strict=True):
            assert a.isfinite().all() and ((a - b).abs() <= TOLERANCE * b.abs().clamp(min=1)).all(), (kind, a, b)


@pytest.mark.parametrize(("kind", "e"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_formulas(kind, e, seed):
    check_formula(kind, e, seed)


def test_several_losses_are_added_by_their_weights():
    """1.16's MPO, say; and 0.16.0's rpo_alpha is the weight of sft beside sigmoid."""
    x = given()
    kinds, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.5)
    parts = [losses.dpo_loss(*x, loss_type=(kind,)) for kind in kinds]
    whole = losses.dpo_loss(*x, loss_type=kinds, loss_weights=weights)
    torch.testing.assert_close(whole, sum(w * part for w, part in zip(weights, parts)))
    torch.testing.assert_close(losses.dpo_loss(*x, loss_type=kinds), sum(parts))


@pytest.mark.parametrize("kind", [kind for kind in DPO_LOSS_TYPES if kind not in WHOLE_STEP])
def test_shares_add_up_to_the_whole(kind):
    """However the pairs are divided; a mean of means is something else."""
    x = given()
    counts = {"pairs": P, "chosen_tokens": x[4].sum()}
    whole = losses.dpo_loss(*x, loss_type=(kind,))
    for cuts in ([3], [1, 2, 6]):
        parts = zip(*(values.tensor_split(cuts) for values in x))
        shares = [losses.dpo_loss(*part, loss_type=(kind,), **counts) for part in parts]
        torch.testing.assert_close(sum(shares), whole)
        assert abs(sum(losses.dpo_loss(*p, loss_type=(kind,)) for p in zip(*(v.tensor_split([1]) for v in x))) / 2
                   - whole) > 1e-4


@pytest.mark.parametrize("kind", ["aot", "aot_pair"])
def test_sorted_losses_are_of_the_whole_step(kind):
    """Their parts are no shares, so dpo.py has to know the whole step first; bco_pair's delta is over the step too."""
    x = given()
    parts = zip(*(values.tensor_split([3]) for values in x))
    assert abs(sum(losses.dpo_loss(*p, loss_type=(kind,), pairs=P) for p in parts)
               - losses.dpo_loss(*x, loss_type=(kind,))) > 1e-2
    order = torch.randperm(P, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(losses.dpo_loss(*(v[order] for v in x), loss_type=(kind,)),
                               losses.dpo_loss(*x, loss_type=(kind,)))


def test_the_start():
    """Policy = reference: ln 2, and each pair pulls its answers apart by beta / 2."""
    reference = given()[2:]
    value, chosen, rejected = with_gradients(losses.dpo_loss, [*reference[:2], *reference])
    assert abs(value - math.log(2)) < 1e-6
    torch.testing.assert_close(chosen, torch.full((P,), -0.05 / P))
    torch.testing.assert_close(rejected, torch.full((P,), 0.05 / P))


@pytest.mark.parametrize("kind", [kind for kind in DPO_LOSS_TYPES if kind not in ("sft", "apo_down")])
def test_swapping_chosen_and_rejected_flips_the_gradient(kind):
    """At the start; but for the two losses that mean to push one of the answers alone."""
    c, r, lc, lr = given()[2:]
    _, *one = with_gradients(lambda *x: losses.dpo_loss(*x, loss_type=(kind,)), [c, r, c, r, lc, lr])
    _, *other = with_gradients(lambda *x: losses.dpo_loss(*x, loss_type=(kind,)), [r, c, r, c, lr, lc])
    assert one[0].abs().min() > 1e-4
    torch.testing.assert_close(one[0], -other[1])
    torch.testing.assert_close(one[1], -other[0])


def check_extremes(kind):
    """Log-ratios of +-1e4, where exp has long overflowed: finite loss and gradient."""
    for far in (1e4, -1e4):
        for move in ([far, 0], [0, far], [far, -far]):
            x = [torch.tensor([move[0] - 50.0]), torch.tensor([move[1] - 60.0]),
                 torch.tensor([-50.0]), torch.tensor([-60.0]), torch.tensor([5.0]), torch.tensor([6.0])]
            assert all(v.isfinite().all() for v in with_gradients(
                lambda *x: losses.dpo_loss(*x, loss_type=(kind,)), x)), (kind, move)


@pytest.mark.parametrize("kind", DPO_LOSS_TYPES)
def test_extreme_ratios(kind):
    check_extremes(kind)


def check_reward_loss():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = 3 * torch.randn(3, P, generator=generator)
    for margin, centre in itertools.product((torch.zeros(P), margins), (0.0, 0.2)):
        def true(c, r):
            c, r = c.double(), r.double()
            return (torch.log1p(torch.exp(-(c - r - margin.double()))) + centre * (c + r) ** 2).mean()

        def ours(c, r):
            cuts = (slice(0, 2), slice(2, None))  # two micro-batches
            return sum(losses.reward_loss(c[s], r[s], margin[s], centre, P) for s in cuts)

        both = [chosen, rejected]
        for a, b in zip(with_gradients(ours, both), with_gradients(true, both), strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=TOLERANCE)


def test_reward_loss():
    check_reward_loss()
    far = torch.tensor([1e4])
    for c, r in ((far, -far), (-far, far)):
        assert all(x.isfinite().all() for x in with_gradients(losses.reward_loss, [c, r]))


# Faults in the formulas that the tests above must see


def every_formula():
    for kind, e in CASES:
        check_formula(kind, e)


FAULTS = [  # what losses.py says, what it says wrongly, and which check sees it
    ("rejected_P - ref_rejected_P\n    x", "rejected_P\n    x", every_formula),
    ("-(1 - e) * logsigmoid(beta * x) - e * logsigmoid(-beta * x)", "-(1 - e) * logsigmoid(beta * x)", every_formula),
    ("(e * logsigmoid(-beta * x) - (1 - e)", "(-e * logsigmoid(-beta * x) - (1 - e)", every_formula),
    ("/ (1 - 2 * e)", "", every_formula),
    ("(1 - beta * x).relu()", "(1 - x).relu()", every_formula),
    ("a / chosen_lengths_P - b / rejected_lengths_P - half", "a - b - half", every_formula),
    ("e_exo = e or 1e-3", "e_exo = e or 1e-2", every_formula),
    ("0.5 * logsigmoid(-beta * b),", "0.5 * logsigmoid(beta * b),", every_formula),
    ("-logsigmoid(beta * a - delta)", "-logsigmoid(beta * a)", every_formula),
    ("(a - half) ** 2 + (b + half) ** 2", "(a - half) ** 2 + (b - half) ** 2", every_formula),
    ("(chosen_P - rejected_P).sort()[0]", "(chosen_P - rejected_P)", every_formula),
    ("smoothed(a.sort()[0] - b.sort()[0])", "smoothed(a.sort()[0] - b)", every_formula),
    ("(-beta * x / discopop_tau).sigmoid()", "(beta * x / discopop_tau).sigmoid()", every_formula),
    ("(-beta * a).sigmoid() + (beta * b)", "(beta * a).sigmoid() + (beta * b)", every_formula),
    ("(beta * a).sigmoid() + (-beta * x)", "(beta * a).sigmoid() + (beta * x)", every_formula),
    ("-chosen_P.sum() / chosen_tokens if", "-chosen_P.sum() / pairs if", every_formula),
    ("(logsigmoid(beta * x / discopop_tau) - beta * x).exp()",
     "(-beta * x).exp() * (beta * x / discopop_tau).sigmoid()", lambda: check_extremes("discopop")),
    ("chosen_P - rejected_P - margins_P", "chosen_P - rejected_P + margins_P", check_reward_loss),
    ("(chosen_P + rejected_P) ** 2", "(chosen_P - rejected_P) ** 2", check_reward_loss),
    ("losses_P.sum() / (pairs or len(losses_P))", "losses_P.mean()", check_reward_loss),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "check"), FAULTS, ids=[wrong for _, wrong, _ in FAULTS])
def test_faults_are_seen(right, wrong, check, monkeypatch):
    changed = mutant(losses, right, wrong)
    for name in ("dpo_loss", "reward_loss"):
        monkeypatch.setattr(losses, name, getattr(changed, name))
    with pytest.raises(AssertionError):
        check()
