"""The GRPO objective's kernel: as exact as PyTorch, each byte once, the same bits in any order."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_exact_as_plain
from faults import mutant, plant
from interpreter import Race, interpreted
from test_losses import CHOICES, LEVELS, MAX_LENGTH, batch, packed
from torch import Tensor

from minitrl.kernels import grpo_loss as formulas
from minitrl.losses import LOSS_TYPES, grpo_loss

pytest.importorskip("triton")
from minitrl.kernels import grpo_loss_triton as kernel

TOKENS = 256  # of a tile
FORMS = list(itertools.product(LOSS_TYPES, LEVELS))


def given(lengths: list[int], dtype=torch.float32, seed: int = 0, filler: float = math.nan, prompt: int = 2) -> dict:
    """Completions of these lengths, each behind a prompt that holds `filler`, in tensors whose numbers lie apart."""
    g = torch.Generator().manual_seed(seed + 1)
    segments_T = torch.tensor([2 * i + (t >= prompt) for i, n in enumerate(lengths) for t in range(prompt + n)]).long()
    sequence_T, mask_T, T = segments_T // 2, segments_T % 2 == 1, len(segments_T)
    logprobs = -torch.randn(T, generator=g).exp()
    # Whole completions are more and less likely than they were, or the mean of many log-ratios would never be clipped.
    values = {
        "logprobs_T": logprobs,
        "old_logprobs_T": logprobs + torch.tensor([0.3, -0.4, 0.0])[sequence_T % 3] + 0.3 * torch.randn(T, generator=g),
        "ref_logprobs_T": logprobs + 0.5 * torch.randn(T, generator=g),
        "entropy_T": torch.randn(T, generator=g).abs(),
        "advantages_T": torch.tensor([1.0, -0.7])[sequence_T % 2],
    }
    values = {name: torch.where(mask_T, x, filler).to(dtype)[:, None].repeat(1, 2)[:, 0] for name, x in values.items()}
    for name in ("logprobs_T", "entropy_T"):
        values[name].requires_grad_()
    return values | {"mask_T": mask_T, "segments_T": segments_T}


def options(loss_type: str, level: str, choice: str = "all") -> dict:
    more = {"epsilon_high": 1.1} if loss_type == "cispo" else {}  # cispo clips at epsilon_high itself
    chosen = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": MAX_LENGTH}
    return chosen | CHOICES[choice] | more


def run(numbers: dict[str, Tensor], dtype=None, **options) -> dict[str, Tensor]:
    """Loss, metrics and gradients, in `dtype` if that is given."""
    numbers = {
        name: x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype).requires_grad_(x.requires_grad)
        for name, x in numbers.items()
    }
    leaves = numbers["logprobs_T"], numbers["entropy_T"]
    loss, metrics = grpo_loss(**numbers, **options)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), "d_logprobs": grads[0], "d_entropy": grads[1], **metrics}


def check(numbers: dict[str, Tensor], **options) -> None:
    """Twice as far from float64 as plain PyTorch in the same dtype, at most."""
    with interpreted():
        got = run(numbers, **options)
    plain, truth = run(numbers, **options), run(numbers, torch.float64, **options)
    assert got.keys() == plain.keys()
    dtype = numbers["logprobs_T"].dtype
    assert got["d_logprobs"].dtype == got["d_entropy"].dtype == dtype and got["loss"].dtype == torch.float32
    # The kernel's loss and metrics are float32 whatever came in.
    assert_as_exact_as_plain({name: x.to(plain[name].dtype) for name, x in got.items()}, plain, truth)
    assert not any(got[name][~numbers["mask_T"]].any() for name in ("d_logprobs", "d_entropy"))


def check_slopes(module=formulas) -> None:
    """The derivatives that the kernel is compiled from, by themselves: autograd says the same in float64."""
    g = torch.Generator().manual_seed(0)
    for loss_type, corrected, delta, with_kl in itertools.product(
        ("dapo", "cispo"), (True, False), (None, 1.3), (0, 1)
    ):
        logprob, old, ref, A = torch.randn(4, 4000, generator=g, dtype=torch.float64)
        old[:20], ref[20:40] = 40 * old[:20], 40 * ref[20:40]  # beyond MAX_LOG_RATIO
        logprob.requires_grad_()
        kept = (torch.rand(4000, generator=g) < 0.8).double()
        log_ratio = (logprob.detach() - old).requires_grad_()
        e = ref - logprob if with_kl else None
        bounds = module.clip_bounds(loss_type, 0.2, 0.3 if loss_type == "dapo" else 1.5, delta)
        numbers = (logprob, log_ratio, e, A, kept, *bounds, 0.1, loss_type == "cispo", corrected)
        wanted = torch.autograd.grad(
            module.token_loss(*numbers)[0].sum(), (log_ratio, logprob), allow_unused=True, materialize_grads=True
        )
        for ours, theirs in zip(module.token_slopes(*numbers), wanted):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        assert wanted[0].abs().max() > 0.1 or loss_type == "cispo"


def test_slopes_are_autograds():
    check_slopes()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("free & moves(ratio, 0.0, delta)", "free"),  # delta does not bound
        ("~free & moves(ratio, lower, upper)", "~free"),  # a clipped ratio still moves
        ("-ratio * advantage * kept, 0.0)", "-ratio * advantage, 0.0)"),
        ("by_e = by_e * ratio", "pass"),
        ("beta * kl * ratio", "beta * kl"),
        ("+ slope * (e - near), slope", "+ slope * (e - near), slope * 0.0"),
        ("return xp.where(moves(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO), by_ratio, 0.0)", "return by_ratio"),
    ],
)
def test_faults_in_slopes_are_seen(right, wrong):
    with pytest.raises(AssertionError):
        check_slopes(mutant(formulas, right, wrong))


@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_as_exact_as_pytorch(loss_type, level):
    """Completions of 1 token, across a tile's end, longer than a tile, none: from strided tensors that hold NaN."""
    check(given([1, 63, 250, 30, 300, 0]), **options(loss_type, level))


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "all"])
def test_every_option(choice):
    for loss_type, level in (("dapo", "token"), ("cispo", "sequence")):
        check(given([40, 1, 129]), **options(loss_type, level, choice))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    for loss_type, level in (("dapo", "token"), ("grpo", "sequence")):
        check(given([63, 129], dtype), **options(loss_type, level))


@pytest.mark.parametrize("lengths", [[], [1], [63], [129], [TOKENS - 2], [TOKENS - 1], [0, 0]], ids=str)
def test_few_tokens(lengths):
    for loss_type, level in (("dapo", "token"), ("dr_grpo", "sequence")):
        check(given(lengths), **options(loss_type, level))


def test_the_inputs_can_tell():
    """Tokens and whole sequences are clipped from both sides and not, or the tests above prove little."""
    for level in LEVELS:
        metrics = run(given([1, 63, 250, 30, 300, 0]), **options("dapo", level))
        assert all(metrics[f"clip_ratio/{side}_mean"] > 0 for side in ("low", "high"))
        assert metrics["clip_ratio/region_mean"] < 0.9


def test_counts_of_the_step_and_micro_batches():
    numbers = given([5, 30])
    for loss_type in LOSS_TYPES:
        check(numbers, **options(loss_type, "token"), tokens=400, sequences=7, micro_batches=3)


def test_extreme_ratios_and_what_is_broken():
    """Log-ratios of +-1e4 are finite; a NaN among the live tokens shows in the loss."""
    numbers = given([20])
    with torch.no_grad():
        numbers["logprobs_T"][4:6], numbers["old_logprobs_T"][6:8] = -1e4, -1e4
        numbers["ref_logprobs_T"][7:9] = -1e4
    check(numbers, **options("dapo", "token", "beta"))
    broken = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in numbers.items()}
    broken["old_logprobs_T"][9] = math.nan
    with interpreted():
        assert all(x.isfinite().all() for x in run(numbers, **options("grpo", "sequence", "beta")).values())
        assert run(broken, **options("grpo", "sequence", "beta"))["loss"].isnan()
        assert run(broken, **options("dapo", "token", "beta"))["loss"].isnan()


@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("grpo", "token"), ("cispo", "sequence")])
def test_order_and_company_change_no_bit(loss_type, level):
    numbers, chosen = given([1, 40, 230, 270]), options(loss_type, level)
    counts = {"tokens": 541, "sequences": 4}
    results = {}
    for schedule in ("forward", "reverse", "shuffle"):
        with interpreted(schedule):
            results[schedule] = run(numbers, **chosen, **counts)
    for name, value in results["forward"].items():
        assert torch.equal(results["reverse"][name], value) and torch.equal(results["shuffle"][name], value), name
    for first in (1, 5):  # one completion alone, and all in the other order
        bounds = torch.tensor([0, 3, 45, 277, 549])
        rows = [slice(bounds[i], bounds[i + 1]) for i in ([1] if first == 1 else [3, 2, 1, 0])]
        chosen_T = torch.cat([torch.arange(row.start, row.stop) for row in rows])
        alone = {name: x.detach()[chosen_T].requires_grad_(x.requires_grad) for name, x in numbers.items()}
        alone["segments_T"] = torch.cat([torch.full((row.stop - row.start,), i) for i, row in enumerate(rows)])
        alone["segments_T"] = 2 * alone["segments_T"] + alone["mask_T"]
        with interpreted():
            got = run(alone, **chosen, **counts)
        for name in ("d_logprobs", "d_entropy"):
            assert torch.equal(got[name], results["forward"][name][chosen_T]), name


def test_one_binary_wherever_the_inputs_stand():
    """Triton makes another one for pointers that 16 does not divide, which might sum in another order."""
    numbers = given([9, 40])
    shifted = {}
    for name, x in numbers.items():
        shifted[name] = torch.cat([x.detach()[:1], x.detach()])[1:].requires_grad_(x.requires_grad)
        assert shifted[name].data_ptr() % 16
    with interpreted() as log:
        run(shifted, **options("grpo", "sequence"))
    pointers = {name: x.data_ptr() for name, x in log.launches[0].values.items() if isinstance(x, Tensor)}
    assert len(pointers) == 10 and not any(pointer % 16 for pointer in pointers.values())


@pytest.mark.parametrize(
    ("loss_type", "level", "choice", "floats_in", "by_sequence"),
    [("dapo", "token", "defaults", 3, 0), ("dapo", "token", "all", 5, 0), ("grpo", "sequence", "all", 5, 1)],
)
def test_each_byte_once(loss_type, level, choice, floats_in, by_sequence):
    """Touched is the least possible. Where nothing depends on the sequence, so is what is asked of the cache."""
    lengths = [200, 56, 300]
    numbers, live = given(lengths), sum(lengths)
    T = len(numbers["mask_T"])
    with interpreted() as log:
        run(numbers, **options(loss_type, level, choice))
    count, tiles = log["grpo_loss_tiles_kernel"], -(-T // TOKENS)
    kept = T if choice == "all" else 0  # the threshold's choice, for the bonus's gradient
    least = 4 * floats_in * live + T * (1 + 8 * by_sequence) + 4 * T + kept
    assert count.touched - 4 * 7 * tiles == least
    assert log["grpo_loss_sums_kernel"].touched < 4 * 7 * tiles + 40
    if by_sequence:
        assert count.requested < 4 * least
    else:
        assert count.requested == count.touched


def test_through_fake_tensors_and_torch_compile():
    """No graph break, no kernel run on tensors without memory, and the checks that PyTorch has for an operator."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    numbers, chosen = given([5, 9], filler=0.0), options("dapo", "token")
    with interpreted() as log, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in numbers.items()}
        loss, _ = grpo_loss(**fake, **chosen)
        assert loss.shape == () and loss.dtype == torch.float32 and not log.launches
    with interpreted():
        compiled = torch.compile(lambda **given: grpo_loss(**given, **chosen)[0], fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        loss = compiled(**numbers)
        grads = torch.autograd.grad(loss, (numbers["logprobs_T"], numbers["entropy_T"]))
        plain = run(numbers, **chosen)
        assert torch.equal(loss.detach(), plain["loss"])
        assert torch.equal(grads[0], plain["d_logprobs"]) and torch.equal(grads[1], plain["d_entropy"])
        given_T = [numbers[name].detach().contiguous() for name in ("logprobs_T", "old_logprobs_T", "advantages_T")]
        arguments = (*given_T, numbers["mask_T"], None, None, None, "dapo", False, 0.8, 1.2, math.inf, 0.0, True, 0.0)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments[0].requires_grad_()
        torch.library.opcheck(torch.ops.minitrl.grpo_loss, (*arguments, None, -1.0, -1.0, 1.0), test_utils=tests)


def test_float64_is_refused():
    with interpreted(), pytest.raises(ValueError, match="float64 log-probs need MINITRL_KERNELS=reference"):
        run(given([3], torch.float64))


FAULTS = [  # in the kernel: what is right, what is wrong
    ("tl.load(mask + t, mask=t < end, other=0) != 0", "tl.load(mask + t, mask=t < end - 1, other=0) != 0"),  # end token
    ("losses, by_ratio, straight = losses / length, by_ratio / length, straight / length", "losses = losses / length"),
    ("each = tl.sum(through) / length", "each = tl.sum(through)"),
    ("mean = tl.sum(total) / length", "mean = tl.sum(total)"),
    ("other=-1) == segment", "other=-1) >= segment"),  # a sequence runs on into the next
    ("kept = live & (nats >= threshold)", "kept = live & (nats > threshold + 0.1)"),
    ("read(t, live, ref) - logprob", "logprob - read(t, live, ref)"),
    ("bonus / tokens", "bonus / divisor"),
    ("tl.store(shares, 1.0 / divisor)", "tl.store(shares, 1.0 / tokens)"),
    ("starts = (tl.load(segments + t", "starts = (lane > 0) & (tl.load(segments + t"),  # what begins with the tile
    ("tl.store(shares + 1, -entropy_coef / tokens)", "tl.store(shares + 1, -entropy_coef / divisor)"),
    ("at = first + tl.arange(0, TILES)", "at = tl.arange(0, TILES) + 1"),  # the first tile's sums forgotten
    ("series = 1.0 + x * (1.0 / n) * series", "series = 1.0 + x * series"),
]


def kernels() -> None:
    check(given([9, 40]), **options("dr_grpo", "token"), tokens=70, sequences=3)
    check(given([250, 20, 4]), **options("grpo", "sequence"))


@pytest.mark.parametrize(("right", "wrong"), FAULTS, ids=[wrong for _, wrong in FAULTS])
def test_faults_in_the_kernel_are_seen(right, wrong, monkeypatch):
    operator = kernel.grpo_loss
    plant(monkeypatch, kernel, right, wrong)
    monkeypatch.setattr(kernel, "grpo_loss", operator)  # what it calls is faulty
    with pytest.raises((AssertionError, Race)):
        kernels()


def test_packed_rows_of_the_other_tests():
    """The batch on which test_losses.py compares with TRL, old log-probs the policy's own: the ratio is exactly 1."""
    numbers = packed(batch(rows=6, dtype=torch.float32))
    numbers["old_logprobs_T"] = numbers["logprobs_T"].detach()
    with interpreted():
        got = run(numbers, **options("dapo", "sequence", "defaults"))
    A, mask = numbers["advantages_T"], numbers["mask_T"]
    assert torch.equal(got["d_logprobs"][mask], -A[mask] * (1 / mask.sum()))
    assert got["clip_ratio/region_mean"] == 0
