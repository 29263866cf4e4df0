"""The GRPO objective on packed tokens, against TRL's formulas on padded ones, and its invariants."""

import itertools
import math

import pytest
import torch
from faults import mutant
from torch import Tensor

from minitrl import losses
from minitrl.losses import LOSS_TYPES, grpo_loss

LEVELS = ("token", "sequence")
MAX_LENGTH = 12


def batch(seed: int = 0, rows: int = 64, dtype=torch.float64) -> dict[str, Tensor]:
    """Completions as TRL has them, padded to (B, C): log-probs new, old and reference, entropy, mask; advantages (B,).

    Old log-probs lie 0.3 from the new ones, so that the ratio is clipped here and there and not everywhere.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_LENGTH + 1, (rows,), generator=g)
    lengths[: rows // 2] = lengths[: rows // 2].clamp(max=2)  # a mean of many log-ratios would hardly ever be clipped
    logprobs = -torch.randn(rows, MAX_LENGTH, generator=g, dtype=torch.float64).exp()
    noise = torch.randn(3, rows, MAX_LENGTH, generator=g, dtype=torch.float64)
    values = {
        "logprobs": logprobs,
        "old": logprobs + 0.3 * noise[0],
        "ref": logprobs + 0.5 * noise[1],
        "entropy": noise[2].abs(),
        "advantages": torch.randn(rows, generator=g, dtype=torch.float64),
    }
    mask = torch.arange(MAX_LENGTH) < lengths[:, None]
    return {name: value.to(dtype) for name, value in values.items()} | {"mask": mask}


def packed(b: dict[str, Tensor], filler: float = math.nan) -> dict[str, Tensor]:
    """The same on one axis of T tokens, two tokens of prompt before each completion, `filler` where nothing counts."""
    pieces, segments = [], []
    for i, row in enumerate(b["mask"]):
        pieces += [torch.zeros(2, dtype=torch.bool), torch.ones(int(row.sum()), dtype=torch.bool)]
        segments += [torch.full((2,), 2 * i), torch.full((int(row.sum()),), 2 * i + 1)]
    mask_T = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.bool)

    def spread(values_BC):
        return torch.full(mask_T.shape, filler, dtype=values_BC.dtype).masked_scatter(mask_T, values_BC[b["mask"]])

    return {
        "logprobs_T": spread(b["logprobs"]).requires_grad_(),
        "old_logprobs_T": spread(b["old"]),
        "advantages_T": spread(b["advantages"][:, None].expand_as(b["logprobs"])),
        "mask_T": mask_T,
        "ref_logprobs_T": spread(b["ref"]),
        "entropy_T": spread(b["entropy"]).requires_grad_(),
        "segments_T": torch.cat(segments) if segments else torch.zeros(0, dtype=torch.int64),
    }


def run(given: dict[str, Tensor], **options) -> dict:
    """Loss, metrics, and gradients with respect to log-probs and entropy."""
    given = {name: value.detach().requires_grad_(value.requires_grad) for name, value in given.items()}
    loss, metrics = grpo_loss(**given, **({"max_completion_length": MAX_LENGTH} | options))
    leaves = (given["logprobs_T"], given["entropy_T"])
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
    return {
        "loss": loss.detach(),
        "d_logprobs": torch.zeros_like(leaves[0]) if grads[0] is None else grads[0],
        "d_entropy": torch.zeros_like(leaves[1]) if grads[1] is None else grads[1],
        **metrics,
    }


def trl(
    b: dict[str, Tensor],
    *,
    loss_type="dapo",
    importance_sampling_level="token",
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    beta=0.0,
    use_bias_correction_kl=True,
    entropy_coef=0.0,
    entropy_threshold=None,
) -> dict:
    """TRL 1.16's loss of one batch on one rank, on padded tensors (GRPOTrainer._compute_loss), and its metrics."""
    m = b["mask"].double()
    logprobs, entropy = b["logprobs"].detach().requires_grad_(), b["entropy"].detach().requires_grad_()
    A = b["advantages"][:, None]
    log_ratio = logprobs - b["old"]
    if importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * m).sum(1) / m.sum(1))[:, None].expand_as(m)
    r = log_ratio.exp()
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        per_token = -r.detach().clamp(max=high) * A * logprobs
        low_clipped, high_clipped = torch.zeros_like(m), ((r > high) & (A > 0)).double()
    else:
        surrogates = torch.stack([(r if delta is None else r.clamp(max=delta)) * A, r.clamp(1 - epsilon, 1 + high) * A])
        per_token = -surrogates.amin(0)
        low_clipped, high_clipped = ((r < 1 - epsilon) & (A < 0)).double(), ((r > 1 + high) & (A > 0)).double()
    chosen = m if entropy_threshold is None else m * (entropy.detach() >= entropy_threshold)
    per_token = per_token * (chosen + 1 - m)
    metrics = {}
    if beta:
        e = b["ref"] - logprobs
        k3 = (e.exp() - e - 1) * (r if use_bias_correction_kl else 1)
        per_token = per_token + beta * k3
        metrics["kl"] = (k3 * m).sum() / m.sum()
    if loss_type == "grpo":
        loss = ((per_token * m).sum(1) / m.sum(1)).mean()
    elif loss_type == "dr_grpo":
        loss = (per_token * m).sum() / (len(m) * MAX_LENGTH)
    else:  # one micro-batch: bnpo's local count of tokens is the global one
        loss = (per_token * m).sum() / m.sum()
    loss = loss - entropy_coef * (entropy * chosen).sum() / m.sum()
    metrics |= {
        "clip_ratio/low_mean": (low_clipped * m).sum() / m.sum(),
        "clip_ratio/high_mean": (high_clipped * m).sum() / m.sum(),
    }
    metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    d_logprobs, d_entropy = torch.autograd.grad(loss, (logprobs, entropy), materialize_grads=True)
    return {"loss": loss, "d_logprobs": d_logprobs, "d_entropy": d_entropy, **metrics}


CHOICES = {
    "defaults": {},
    "asymmetric": {"epsilon": 0.1, "epsilon_high": 0.3},
    "delta": {"delta": 1.3},
    "beta": {"beta": 0.04},
    "beta uncorrected": {"beta": 0.04, "use_bias_correction_kl": False},
    "entropy threshold": {"entropy_threshold": 0.7},
    "entropy bonus": {"entropy_coef": 0.02},
    "all": {
        "epsilon": 0.15,
        "epsilon_high": 0.25,
        "delta": 1.4,
        "beta": 0.1,
        "entropy_threshold": 0.4,
        "entropy_coef": 0.03,
    },
}


def check_formulas(loss_type: str, level: str, choice: str, seed: int = 0) -> None:
    """Packed = padded, to 1e-12: loss, gradients, metrics; and exactly 0 where nothing counts."""
    options = {"loss_type": loss_type, "importance_sampling_level": level, **CHOICES[choice]}
    if loss_type == "cispo":
        options["epsilon_high"] = 1.1  # cispo clips at epsilon_high itself
    b = batch(seed)
    given = packed(b)
    got, expected = run(given, **options), trl(b, **options)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        ours = got[name]
        if name.startswith("d_"):
            assert ours[~given["mask_T"]].eq(0).all(), name
            ours, value = ours[given["mask_T"]], value[b["mask"]]
        assert torch.allclose(ours, value.detach(), rtol=1e-12, atol=1e-14), f"{name}: {(ours - value).abs().max():.2e}"
    assert got["d_logprobs"].abs().max() > 1e-4


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_trls_formulas(loss_type, level, choice):
    for seed in range(3):
        check_formulas(loss_type, level, choice, seed)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_the_batches_can_tell(level, seed):
    """Clipped and unclipped tokens of both advantage signs occur, on both sides, or the test above proves little."""
    b = batch(seed)
    log_ratio = torch.where(b["mask"], b["logprobs"] - b["old"], 0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / b["mask"].sum(1))[:, None].expand_as(log_ratio)
    ratio, positive = log_ratio.exp()[b["mask"]], (b["advantages"][:, None] > 0).expand_as(log_ratio)[b["mask"]]
    for sign in (positive, ~positive):
        for where in (ratio < 0.8, (ratio > 0.8) & (ratio < 1.2), ratio > 1.2):
            assert (sign & where).any()
    assert (~positive & (ratio > 1.3)).any()  # delta acts


def test_clip_sides_by_hand():
    """epsilon 0.1 below, epsilon_high 0.3 above: which of eight tokens are clipped, and the gradient of each."""
    ratios = torch.tensor([0.85, 0.85, 0.95, 0.95, 1.2, 1.2, 1.4, 1.4], dtype=torch.float64)
    A = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    logprobs = torch.full((8,), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - ratios.log()
    loss, metrics = grpo_loss(logprobs, old, A, torch.ones(8, dtype=torch.bool), epsilon=0.1, epsilon_high=0.3)
    loss.backward()
    moves = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1])  # 0.85 with A < 0 and 1.4 with A > 0 have gone far enough
    assert torch.allclose(logprobs.grad, -A * ratios * moves / 8)
    assert loss.item() == pytest.approx(-(0.85 - 0.9 + 0 + 0 + 1.3 - 1.4) / 8)
    assert [metrics[f"clip_ratio/{side}_mean"].item() for side in ("low", "high", "region")] == [0.125, 0.125, 0.25]


def test_delta_bounds_the_ratio_of_negative_advantages():
    ratios, logprobs = torch.tensor([1.5, 8.0]), torch.zeros(2, requires_grad=True)
    loss, _ = grpo_loss(logprobs, -ratios.log(), torch.tensor([-1.0, -1.0]), torch.ones(2, dtype=torch.bool), delta=2.0)
    loss.backward()
    assert loss.item() == pytest.approx((1.5 + 2.0) / 2, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([0.75, 0.0], rel=1e-6)


# On policy


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_on_policy_the_ratio_is_exactly_1(loss_type, level):
    """The loss is -sum(A_i L_i) / sum(L_i), bitwise as without any ratio; the gradient of token t is -A_t / tokens."""
    b = batch(dtype=torch.float32)
    given = packed(b)
    given["old_logprobs_T"] = given["logprobs_T"].detach()
    got = run(given, loss_type=loss_type, importance_sampling_level=level)
    mask, lengths = given["mask_T"], b["mask"].sum(1)
    A = torch.where(mask, given["advantages_T"], 0)
    rows, tokens = len(lengths), int(mask.sum())
    if loss_type == "grpo":
        L = torch.where(mask, lengths.repeat_interleave(2).float()[given["segments_T"]], 1)
        expected, weights = -(A / L).sum() / rows, -A / rows / L
    elif loss_type == "dr_grpo":
        expected, weights = -A.sum() / (rows * MAX_LENGTH), -A / (rows * MAX_LENGTH)
    else:
        expected, weights = -A.sum() / tokens, -A / tokens
        by_rows = -(b["advantages"].double() * lengths).sum() / lengths.sum()
        assert got["loss"].item() == pytest.approx(by_rows.item(), abs=1e-6) and abs(by_rows) > 0.01
    assert torch.equal(got["loss"], expected)
    assert torch.allclose(got["d_logprobs"], weights, rtol=1e-6 if level == "token" else 1e-5)
    assert all(got[f"clip_ratio/{side}_mean"] == 0 for side in ("low", "high", "region"))


def test_two_sequences_of_lengths_1_and_100():
    """At equal advantage a token weighs the same in both, but under grpo 100 times as much in the short one."""
    mask = torch.arange(100) < torch.tensor([[1], [100]])
    b = {name: torch.full((2, 100), -1.0, dtype=torch.float64) for name in ("logprobs", "old", "ref", "entropy")}
    given = packed(b | {"advantages": torch.ones(2, dtype=torch.float64), "mask": mask})
    for loss_type, factor in (("dapo", 1), ("bnpo", 1), ("dr_grpo", 1), ("cispo", 1), ("grpo", 100)):
        weights = run(given, loss_type=loss_type, epsilon_high=5.0)["d_logprobs"][given["mask_T"]]
        assert weights[0] < 0 and torch.allclose(weights[0], factor * weights[1:]), loss_type


# What is masked, what is extreme


def check_nan_is_harmless(loss_type: str, level: str) -> None:
    options = CHOICES["all"] | {"loss_type": loss_type, "importance_sampling_level": level}
    poisoned, clean = run(packed(batch()), **options), run(packed(batch(), filler=0.0), **options)
    infinite = run(packed(batch(), filler=math.inf), **options)
    for name, value in clean.items():
        assert value.isfinite().all(), name
        assert torch.equal(poisoned[name], value) and torch.equal(infinite[name], value), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nan_where_nothing_counts_is_harmless(loss_type, level):
    check_nan_is_harmless(loss_type, level)


def check_extreme_ratios(loss_type: str, level: str, beta: float) -> None:
    """Log-ratios of +-1e4 with both signs of the advantage, and a reference as far away: nothing overflows."""
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    old = torch.tensor([-1e4, -1e4, -1.0, -1.0])
    logprobs = torch.tensor([-1.0, -1.0, -1e4, -1e4], requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs,
        old,
        A,
        torch.ones(4, dtype=torch.bool),
        ref_logprobs_T=torch.tensor([-1e4, -1.0, -1.0, -1e4]),
        segments_T=torch.arange(4),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=5.0 if loss_type == "cispo" else None,
        beta=beta,
        max_completion_length=1,
    )
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    low, high = (0, 0.25) if loss_type == "cispo" else (0.25, 0.25)  # the 4th token and the 1st
    assert metrics["clip_ratio/low_mean"] == low and metrics["clip_ratio/high_mean"] == high
    assert all(value.isfinite() for value in metrics.values())
    if loss_type != "cispo" and not beta:
        assert logprobs.grad[0] == 0 and logprobs.grad[3] == 0  # the clipped ones


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_ratios_are_finite(loss_type, level, beta):
    check_extreme_ratios(loss_type, level, beta)


def kl(logprobs: Tensor, ref: Tensor) -> float:
    """The penalty's estimate of one token, as float32."""
    one, logprobs_T = torch.ones(1), logprobs.view(1)
    _, metrics = grpo_loss(logprobs_T, logprobs_T, 0 * one, one.bool(), ref_logprobs_T=ref.view(1), beta=1.0)
    return metrics["kl"].item()


def check_k3() -> None:
    """Never negative, 0 only where the two policies agree; exp(e) - e - 1 in float32 would be negative now and then."""
    for logprob in (-0.01, -1.0, -5.0, -40.0):
        logprobs = torch.tensor(logprob)
        assert kl(logprobs, logprobs) == 0
        for sign in (1, -1):
            for size in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 5.0):
                ref = logprobs + sign * size
                e = ref.double() - logprobs.double()
                value = kl(logprobs, ref)
                assert value >= 0 and (value > 0 or e == 0)
                assert value == pytest.approx((torch.expm1(e) - e).item(), rel=1e-6 + 2e-7 / abs(e.item()))
    e = torch.linspace(-1e-3, 1e-3, 20001)
    one = torch.ones_like(e)
    loss, metrics = grpo_loss(-one, -one, 0 * one, one.bool(), ref_logprobs_T=e - 1, beta=1.0)
    assert metrics["kl"].item() == pytest.approx(1e-6 / 6, rel=0.01)  # the mean of e^2 / 2


def test_k3():
    check_k3()


def test_k3_of_a_token_that_the_policy_forgot():
    """-5 under the reference and -15 under the policy: exp(10) - 11 for a single token."""
    assert kl(torch.tensor(-15.0), torch.tensor(-5.0)) == pytest.approx(22015.47, abs=0.01)
    assert kl(torch.tensor(-5.0), torch.tensor(-15.0)) == pytest.approx(9 + math.exp(-10), rel=1e-6)


def check_k3_far() -> None:
    """exp(e) - e - 1 down to e = -100, and up to 20; above it goes on along its tangent, and keeps its pull."""
    top = math.expm1(20.0)
    far = ((-100.0, 99.0, -1.0), (19.0, math.expm1(19.0) - 19, math.expm1(19.0)), (39.0, top - 20 + 19 * top, top))
    for e, value, slope in far:
        logprob = torch.tensor([-50.0], requires_grad=True)
        given = logprob.detach(), torch.zeros(1), torch.ones(1, dtype=torch.bool)
        options = {"ref_logprobs_T": e - 50 + torch.zeros(1), "beta": 0.5, "use_bias_correction_kl": False}
        loss, metrics = grpo_loss(logprob, *given, **options)
        loss.backward()
        assert metrics["kl"].item() == pytest.approx(value, rel=1e-6)
        assert logprob.grad.item() == pytest.approx(-0.5 * slope, rel=1e-6)


def test_k3_far_away():
    check_k3_far()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("rows", [0, 3], ids=["no token at all", "every token masked"])
def test_nothing_to_train_on(loss_type, level, rows):
    given = packed(batch(rows=3))
    if rows:
        given["mask_T"] = torch.zeros_like(given["mask_T"])
        given["logprobs_T"] = given["logprobs_T"].detach().nan_to_num(-1.0).requires_grad_()
    else:
        given = {name: value.detach()[:0].requires_grad_(value.requires_grad) for name, value in given.items()}
    options = CHOICES["all"] | {"loss_type": loss_type, "importance_sampling_level": level}
    for counts in ({}, {"tokens": 0, "sequences": 0}):
        got = run(given, **options, **counts)
        assert all(value.eq(0).all() for value in got.values()), got


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_masked_row_changes_nothing(loss_type, level):
    """A completion that is left out (truncated, say) is left out of what the loss is divided by, too."""
    options = CHOICES["all"] | {"loss_type": loss_type, "importance_sampling_level": level}
    b = batch(rows=6)
    without = run(packed(b), **options)
    doubled = {name: torch.cat([value, value[2:3]]) for name, value in b.items()}
    given = packed(doubled)
    given["mask_T"] = given["mask_T"] & (given["segments_T"] < 12)
    got = run(given, **options)
    T = len(without["d_logprobs"])
    for name, value in without.items():  # nothing but the order of summation
        assert torch.allclose(got[name][:T] if name.startswith("d_") else got[name], value, rtol=1e-13, atol=0), name
        if name.startswith("d_"):
            assert got[name][T:].eq(0).all()


# Micro-batches


def partitions(items: list):
    """Every way to divide a list into non-empty parts."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def in_parts(b: dict[str, Tensor], parts: list[list[int]], **options) -> dict:
    """Loss, gradients by row and metrics, added up over micro-batches of the given rows."""
    total = {"d_logprobs": torch.zeros_like(b["logprobs"]), "d_entropy": torch.zeros_like(b["entropy"])}
    counts = {"tokens": int(b["mask"].sum()), "sequences": len(b["mask"]), "micro_batches": len(parts)}
    for rows in parts:
        given = packed({name: value[rows] for name, value in b.items()})
        got = run(given, **counts, **options)
        for name, value in got.items():
            if name.startswith("d_"):
                blank, mask = torch.zeros_like(b["logprobs"][rows]), b["mask"][rows]
                total[name][rows] += blank.masked_scatter(mask, value[given["mask_T"]])
            else:
                total[name] = total.get(name, 0) + value
    return total


def check_splits(loss_type: str, level: str) -> float:
    """The largest difference that a division of 5 sequences into micro-batches makes, over all 52 divisions."""
    b = batch(rows=5)
    options = CHOICES["all"] | {"loss_type": loss_type, "importance_sampling_level": level}
    whole = in_parts(b, [list(range(5))], **options)
    divisions = list(partitions(list(range(5))))
    assert len(divisions) == 52
    worst = 0.0
    for parts in divisions:
        got = in_parts(b, parts, **options)
        worst = max([worst, *((got[name] - value).abs().max().item() for name, value in whole.items())])
    return worst


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "bnpo"])
def test_splits_into_micro_batches_sums_to_the_whole(loss_type, level):
    assert check_splits(loss_type, level) < 1e-12


def test_bnpo_depends_on_the_split():
    """As TRL 0.16.0's does: a mean over micro-batches of means over their tokens."""
    assert check_splits("bnpo", "token") > 0.01
    b = batch(rows=2)
    halves = in_parts(b, [[0], [1]], loss_type="bnpo")["loss"]
    alone = [trl({name: value[i : i + 1] for name, value in b.items()}, loss_type="bnpo")["loss"] for i in range(2)]
    assert torch.allclose(halves, sum(alone) / 2, rtol=1e-12)


# Errors


@pytest.mark.parametrize(
    ("options", "without", "message"),
    [
        ({"loss_type": "gpro"}, [], "loss_type 'gpro'.*choose one of grpo"),
        ({"importance_sampling_level": "word"}, [], "importance_sampling_level 'word'"),
        ({"beta": 0.04}, ["ref_logprobs_T"], "beta 0.04 needs ref_logprobs_T"),
        ({"entropy_coef": 0.1}, ["entropy_T"], "entropy_coef"),
        ({"entropy_threshold": 0.0}, ["entropy_T"], "entropy_threshold"),
        ({"loss_type": "grpo"}, ["segments_T"], "'grpo'.*segments_T"),
        ({"loss_type": "dr_grpo"}, ["segments_T"], "'dr_grpo'.*segments_T"),
        ({"importance_sampling_level": "sequence"}, ["segments_T"], "'sequence'.*segments_T"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, [], "max_completion_length"),
    ],
)
def test_options_that_do_not_go_together(options, without, message):
    given = {name: value for name, value in packed(batch()).items() if name not in without}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**given, **({"max_completion_length": MAX_LENGTH} | options))


def test_shapes_that_do_not_go_together():
    given = packed(batch())
    with pytest.raises(ValueError, match="mask_T has shape"):
        grpo_loss(**given | {"mask_T": given["mask_T"][1:]})


def test_what_is_not_needed_may_be_absent():
    given = packed(batch())
    few = [given[name] for name in ("logprobs_T", "old_logprobs_T", "advantages_T", "mask_T")]
    for loss_type in ("dapo", "bnpo", "cispo"):
        assert torch.equal(grpo_loss(*few, loss_type=loss_type)[0], run(given, loss_type=loss_type)["loss"])
    few[3] = few[3].int()  # a mask of 0 and 1 is one, too
    assert torch.equal(grpo_loss(*few)[0], run(given)["loss"])


# Faults in the formulas that the tests above must see


def formulas():
    for loss_type, level, choice in itertools.product(LOSS_TYPES, LEVELS, CHOICES):
        check_formulas(loss_type, level, choice)


def splits():
    assert all(check_splits(loss_type, "sequence") < 1e-12 for loss_type in ("grpo", "dr_grpo", "dapo", "cispo"))


def poison():
    for loss_type, level in itertools.product(LOSS_TYPES, LEVELS):
        check_nan_is_harmless(loss_type, level)


def extremes():
    for loss_type, level, beta in itertools.product(LOSS_TYPES, LEVELS, (0.0, 0.04)):
        check_extreme_ratios(loss_type, level, beta)


FAULTS = [  # what the formula says, what it says wrongly, and which check sees it
    ("else (1 - epsilon, 1 + high)", "else (1 - high, 1 + epsilon)", formulas),  # sides swapped
    ("return xp.where(x <= y, x, y)", "return xp.where(x >= y, x, y)", formulas),
    ("-constant(clipped) * advantage * logprob", "-clipped * advantage * logprob", formulas),
    ("least(bounded(ratio, 0.0, delta) * advantage,", "least(ratio * advantage,", formulas),
    ("losses = losses * mask", "losses = losses * mask * mask.roll(-1)", formulas),  # the end token forgotten
    ("ref_logprobs_T.detach() - logprobs, zero", "logprobs - ref_logprobs_T, zero", formulas),  # k3 of the other direction
    ("kl = kl * ratio", "kl = kl * constant(ratio)", formulas),
    ("(losses / lengths_T).sum()", "losses.sum()", formulas),
    ("loss = loss * kept", "pass", formulas),
    ("torch.where(kept > 0, entropy_T, zero)", "torch.where(kept > 0, entropy_T.detach(), zero)", formulas),
    ("sums[segments_T] / lengths_T", "sums[segments_T]", formulas),  # the product of ratios, not their geometric mean
    ("(ratio < lower) & (advantage < 0)", "(ratio < lower)", formulas),
    ("loss = losses.sum() / tokens", "loss = losses.sum() / mask.sum()", splits),
    ("(losses / lengths_T).sum() / sequences", "(losses / lengths_T).sum() / (lengths > 0).sum()", splits),
    ("torch.where(mask_T, logprobs - old_logprobs_T.detach(), zero)", "(logprobs - old_logprobs_T) * mask_T", poison),
    ("advantages = torch.where(mask_T, advantages_T, zero)", "advantages = advantages_T * mask_T", poison),
    ("logprobs = torch.where(mask_T, logprobs_T, zero)", "logprobs = logprobs_T", poison),
    ("MAX_LOG_RATIO = 20.0", "MAX_LOG_RATIO = 200.0", extremes),
    ("near = xp.where(e > MAX_LOG_RATIO, MAX_LOG_RATIO, e)", "near = e", extremes),
    ("+ slope * (e - near)", "", check_k3_far),
    ("e > MAX_LOG_RATIO, MAX_LOG_RATIO, e)", "e < -MAX_LOG_RATIO, -MAX_LOG_RATIO, e)", extremes),
    ("slope = expm1(near)", "slope = xp.exp(near) - 1", check_k3),
]


@pytest.mark.parametrize(("right", "wrong", "check"), FAULTS, ids=[wrong for _, wrong, _ in FAULTS])
def test_faults_are_seen(right, wrong, check, monkeypatch):
    monkeypatch.setattr(losses.kernel, "grpo_loss", mutant(losses.kernel, right, wrong).grpo_loss)
    with pytest.raises(AssertionError):
        check()
