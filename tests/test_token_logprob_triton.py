"""The Triton kernels of token_logprob, token_logprob_sum and logits_logprob, on a CPU by tests/interpreter.py.

It runs them as they are launched on a GPU of each kind, in memory filled with NaN; an access out of bounds, a race, or
a lane that is read though nobody wrote it is an error in every test here.
"""

import pytest
import torch
from accuracy import assert_as_exact_as_plain
from faults import plant
from processes import run_processes
from test_token_logprob import inputs, run

pytest.importorskip("triton")
from interpreter import OutOfBounds, Race, interpreted  # noqa: E402
from minitrl.kernels.token_logprob import (  # noqa: E402
    IGNORE,
    SPLIT,
    cuts,
    logits_logprob,
    logits_logprob_reference,
    token_logprob,
    token_logprob_reference,
    token_logprob_sum,
)

from minitrl.kernels import logits_logprob_triton, token_logprob_triton  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_gpu(op=token_logprob, **how):
    """The op as it would run on a GPU; how: arguments of `interpreted`."""

    def call(given: dict, **options) -> dict:
        with interpreted(**how):
            return run(lambda *args, **kwargs: op(*args, **kwargs, **options), **given, temperature=0.7)

    return call


def deterministic(*args, **kwargs):
    return token_logprob(*args, **kwargs, deterministic=True)


class Known(torch.autograd.Function):
    """token_logprob_sum in token_logprob's clothes: upstream gradients are known before, and 1 comes back."""

    upstream = None

    @classmethod
    def op(cls, hidden, weight, targets, temperature=1.0):
        g, h = cls.upstream.float()
        total, logprobs, entropy, _ = token_logprob_sum(
            hidden, weight, targets, g, entropy_weights_T=h, temperature=temperature
        )
        assert not logprobs.requires_grad and not entropy.requires_grad
        return cls.apply(total, logprobs, entropy)

    @staticmethod
    def forward(ctx, total, logprobs, entropy):
        return logprobs.clone(), entropy.clone()

    @staticmethod
    def backward(ctx, g, h):
        return torch.ones(()), None, None


def exact(op, given: dict, target: str = "sm_90") -> dict:
    """The op, interpreted, is as exact as plain PyTorch; returns what it gave."""

    Known.upstream = given["upstream"]
    with interpreted(target=target):
        got = run(op, **given, temperature=0.7)
    assert_as_exact_as_plain(got, *plain_and_true(given))
    return got


def plain_and_true(given: dict) -> list[dict]:
    wide = given | {"hidden": given["hidden"].double(), "weight": given["weight"].double()}
    return [run(token_logprob_reference, **each, temperature=0.7) for each in (given, wide)]


SHAPES = [(1, 1, 8), (1, 1025, 8), (63, 129, 33), (129, 1100, 40), (130, 257, 264)]
OPS = {"token_logprob": token_logprob, "deterministic": deterministic, "known": Known.op}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, op, dtype):
    target = "sm_80" if shape[0] == 129 else "sm_90"  # pointers, and tensor descriptors where rows can be so read
    exact(op, inputs(*shape, dtype), target)


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.slow) if d != torch.bfloat16 else d for d in DTYPES], ids=str
)
def test_a_real_vocabulary(dtype):
    """Qwen's tokens and one more: the last split and the last tile have one column."""
    exact(token_logprob, inputs(3, 151_937, 8, dtype, ignored=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_all_logits_far_below_zero(op, dtype):
    """exp(-400) is 0 in float32: a running maximum that starts at 0 gives log 0."""
    given = inputs(20, 1030, 16, dtype)
    given["hidden"][:, 0], given["weight"][:, 0] = 16.0, -25.5
    given["weight"][:, 1:] /= 4
    logits = given["hidden"].double() @ given["weight"].double().t() / 0.7
    assert logits.max() < -400
    exact(op, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_up_to_ten_thousand(dtype):
    given = inputs(300, 60, 8, dtype)
    given["hidden"] *= 1000
    got = exact(token_logprob, given)
    assert (got["logprobs"] <= 0).all() and (got["entropy"] >= 0).all()


def test_strided_inputs():
    """Rows with gaps, columns of a matrix, every second target: all give the bits of the same without gaps."""
    given = inputs(70, 300, 24, torch.bfloat16)
    wide, tall = torch.full((70, 48), torch.nan).bfloat16(), torch.full((24, 600), torch.nan).bfloat16()
    spread = torch.full((140,), -7)
    wide[:, ::2], tall[:, 1::2], spread[::2] = given["hidden"], given["weight"].t(), given["targets"]
    strided = given | {"hidden": wide[:, ::2], "weight": tall[:, 1::2].t(), "targets": spread[::2]}
    one_later = given | {
        "hidden": torch.cat([given["hidden"].new_zeros(1), given["hidden"].flatten()])[1:].view(70, 24)
    }
    assert one_later["hidden"].data_ptr() % 16
    true = on_gpu()(given)
    for other in (strided, one_later):
        assert_same_bits(on_gpu()(other), true)


def assert_same_bits(got: dict, true: dict):
    assert got.keys() == true.keys()
    for name, values in true.items():
        assert torch.equal(got[name], values), f"{name}: {(got[name] - values).abs().max()}"


def test_ignored_positions_are_not_looked_at():
    given = inputs(100, 300, 24, torch.bfloat16)
    skipped = given["targets"] == IGNORE
    assert 10 < skipped.sum() < 90
    kept = {name: given[name][~skipped] for name in ("hidden", "targets")} | {"weight": given["weight"]}
    alone = on_gpu()(kept | {"upstream": given["upstream"][:, ~skipped]})
    given["hidden"][skipped], given["upstream"][:, skipped] = torch.nan, torch.nan
    for op in (token_logprob, deterministic):
        got = on_gpu(op)(given)
        for name in ("logprobs", "entropy"):
            assert torch.equal(got[name][~skipped], alone[name]) and got[name][skipped].eq(0).all(), name
        assert got["d_hidden"][skipped].eq(0).all() and got["d_weight"].isfinite().all()
    assert_same_bits({"d_weight": on_gpu()(given)["d_weight"]}, {"d_weight": alone["d_weight"]})


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_rows_without_upstream_gradient_are_left_out(op):
    """Not multiplied by 0: the NaN of their hidden states reaches no weight, and no tile is computed for them."""
    given = inputs(300, 300, 24, torch.bfloat16, ignored=0)
    dead = torch.arange(300) >= 100
    given["upstream"][:, dead], given["upstream"][:, ~dead] = 0.0, 1.0
    given["hidden"][dead] = torch.nan
    Known.upstream = given["upstream"]
    with interpreted() as log:
        got = run(op, **given)
    assert got["d_weight"].isfinite().all() and got["d_hidden"].isfinite().all()
    assert got["d_hidden"][dead].eq(0).all() and got["d_hidden"][~dead].ne(0).any()
    if op != Known.op:
        backward = [launch for launch in log.launches if launch.kernel.__name__ == "token_logprob_bwd_kernel"]
        assert [launch.values["T"] for launch in backward] == [100] * len(backward) and backward


@pytest.mark.parametrize("T", [0, 5])
def test_nothing_to_score(T):
    given = inputs(T, 60, 8, ignored=1.0, dtype=torch.bfloat16)
    for op in (token_logprob, deterministic):
        got = on_gpu(op)(given)
        assert [got[name].shape for name in got] == [(T,), (T,), (T, 8), (60, 8)]
        assert all(values.eq(0).all() for values in got.values())


def test_a_target_out_of_the_vocabulary_is_seen():
    given = inputs(5, 60, 8, torch.bfloat16, ignored=0)
    given["targets"][2], given["targets"][3] = 60, -1
    with interpreted():
        logprobs, _ = token_logprob(given["hidden"], given["weight"], given["targets"])
    assert logprobs.isnan().tolist() == [False, False, True, True, False]


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("schedule", ["reverse", "shuffle"])
def test_order_of_programs(op, schedule):
    given = inputs(140, 2100, 40, torch.bfloat16)
    Known.upstream = given["upstream"]
    assert_same_bits(on_gpu(op, schedule=schedule)(given), on_gpu(op)(given))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("D", [40, 264], ids=["narrow", "wide"])
def test_alone_and_in_any_batch(D, target):
    """A token's log-prob and entropy, to the bit; and, in the deterministic mode, its gradient."""
    given = inputs(200, 1100 if D == 40 else 300, D, torch.bfloat16, ignored=0)
    given["upstream"][:] = 1.0
    whole = on_gpu(deterministic, target=target)(given)
    for some in (torch.tensor([137]), torch.arange(60, 195), torch.randperm(200)):
        part = given | {name: given[name][some] for name in ("hidden", "targets")}
        part["upstream"] = given["upstream"][:, some]
        got = on_gpu(deterministic, target=target)(part)
        for name in ("logprobs", "entropy", "d_hidden"):
            assert torch.equal(got[name], whole[name][some]), name
    usual = on_gpu(target=target)(given)
    for name in ("logprobs", "entropy"):
        assert torch.equal(usual[name], whole[name]), name


def rank_of_group(given: dict, vocabulary: int, expected: dict):
    from minitrl import distributed

    distributed.start("cpu")
    group = torch.distributed.group.WORLD
    bounds = cuts(vocabulary, group.size())
    mine = slice(bounds[group.rank()], bounds[group.rank() + 1])
    with interpreted():
        for always in (True, False):
            options = {"deterministic": always, "vocabulary": vocabulary, "group": group}
            got = run(
                lambda *args, **kwargs: token_logprob(*args, **kwargs, **options),
                **given | {"weight": given["weight"][mine]},
                temperature=0.7,
            )
            assert torch.equal(got["logprobs"], expected["logprobs"])
            assert torch.equal(got["entropy"], expected["entropy"])
            assert torch.equal(got["d_weight"], expected["d_weight"][mine])
            if always:
                assert torch.equal(got["d_hidden"], expected["d_hidden"])
            else:
                assert torch.allclose(got["d_hidden"], expected["d_hidden"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_vocabulary(ranks):
    """1 = 2 = 4 to the bit: log-probs, entropies, dW, and in the deterministic mode dX."""
    vocabulary = 5 * SPLIT + 77  # 6 splits: 1 or 2 a rank of 4
    given = inputs(40, vocabulary, 16, torch.bfloat16, ignored=0.1)
    bounds = torch.tensor(cuts(vocabulary, ranks))
    given["targets"][: ranks + 1] = (bounds + IGNORE).clamp(min=0)  # counted from a rank's first row, these are IGNORE
    given["upstream"][:, : ranks + 1] = 1.0
    run_processes(rank_of_group, ranks, given, vocabulary, on_gpu(deterministic)(given))


def test_cuts():
    """Whole splits but for the last, and each rank of 1, 2 or 4 holds what two ranks of twice as many hold."""
    for vocabulary in (1, 1024, 1025, 32_000, 49_152, 151_936, 151_937, 262_144):
        for ranks in (1, 2, 4, 8):
            bounds = cuts(vocabulary, ranks)
            assert bounds[0] == 0 and bounds[-1] == vocabulary and bounds == sorted(bounds)
            assert all(bound % SPLIT == 0 for bound in bounds[:-1] if bound < vocabulary)
            assert ranks == 8 or bounds == cuts(vocabulary, 2 * ranks)[::2]


def test_ranks_with_the_wrong_rows_or_no_kernels_are_told():
    class Group:
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 2)

    given = inputs(3, 2000, 8, torch.bfloat16)
    args = given["hidden"], given["weight"], given["targets"]
    with interpreted(), pytest.raises(ValueError, match="1000 cannot be shared by 2 ranks in pieces of 1024"):
        token_logprob(args[0], args[1][:0], args[2], vocabulary=1000, group=Group)
    with (
        interpreted(),
        pytest.raises(ValueError, match=r"rank 0 of 2 holds 2000 rows of a vocabulary cut at \[0, 1024"),
    ):
        token_logprob(*args, vocabulary=2000, group=Group)
    with pytest.raises(ValueError, match="rank 0 of 2 holds 2000 rows"):
        token_logprob(*args, vocabulary=2000, group=Group)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_bytes_of_the_forward_pass(target):
    """At this shape cut-cross-entropy requests 25.30 MB, without entropy, and verl 25.25."""
    T, V, D = 512, 4096, 512
    given = inputs(T, V, D, torch.bfloat16, ignored=0)
    with interpreted(target=target, strict=False) as log, torch.no_grad():
        token_logprob(given["hidden"], given["weight"], given["targets"])
    forward, fold = log["token_logprob_fwd_kernel"], log["token_logprob_fold_kernel"]
    partials = 3 * 4 * T * V // SPLIT
    assert forward.flops == 2 * T * V * D
    assert forward.touched == 2 * (T + V) * D + 4 * T + 4 * T + partials  # each exactly once
    assert forward.requested <= 25_300_000
    assert fold.touched == fold.requested == partials + 4 * T + 16 * T


def test_bytes_of_the_backward_pass():
    """verl's, which has no entropy to begin with, requests 46.98 MB for dZ alone."""
    T, V, D = 512, 4096, 512
    given = inputs(T, V, D, torch.bfloat16, ignored=0)
    given["upstream"][:] = 1.0
    with interpreted(strict=False) as log:
        run(token_logprob, **given)
    backward = log["token_logprob_bwd_kernel"]
    vectors = 6 * 4 * T  # targets, reference, log2_total, entropy, g, h
    assert backward.touched == 2 * (T + V) * D + 2 * T * V + vectors
    assert backward.requested <= 46_980_000 and backward.flops == 2 * T * V * D


def test_known_gradients_compute_logits_once():
    T, V, D = 128, 2048, 320
    given = inputs(T, V, D, torch.bfloat16, ignored=0)
    given["upstream"][:] = 1.0
    Known.upstream = given["upstream"]
    with interpreted(strict=False) as log:
        run(Known.op, **given)
    assert sum(launch.flops for launch in log.launches) == 2 * T * V * D  # and twice that in library products
    assert "token_logprob_bwd_kernel" not in log.names()
    kept = log["token_logprob_kept_kernel"]
    vectors = (8 + 5 * 4) * T + 4 * T * V // 128
    assert kept.touched == 2 * T * V + vectors  # read and written in one place
    assert kept.arguments["kept"].requested == 2 * 2 * T * V


def test_bytes_from_logits():
    T, V = 8, 9000
    logits = torch.randn(T, V).bfloat16().requires_grad_()
    targets = torch.randint(V, (T,))
    targets[3] = IGNORE
    with interpreted(strict=False) as log:
        logprobs, entropy = logits_logprob(logits, targets)
        (logprobs[:6].sum() + entropy[:6].sum()).backward()
    forward, backward = log["logits_logprob_fwd_kernel"], log["logits_logprob_bwd_kernel"]
    assert forward.arguments["logits"].requested == forward.arguments["logits"].touched == 2 * (T - 1) * V
    assert backward.arguments["logits"].requested == backward.arguments["logits"].touched == 2 * 5 * V  # live rows
    assert backward.arguments["dz"].requested == backward.arguments["dz"].touched == 2 * T * V


def test_the_logits_are_never_held(monkeypatch):
    """Nothing that a kernel gets, and nothing that the op makes, comes near T * V numbers."""
    T, V = 512, 12 * SPLIT
    monkeypatch.setattr(token_logprob_triton, "CHUNK", SPLIT)
    given = inputs(T, V, 8, torch.bfloat16)
    made = []

    def recorded(make):
        def call(*args, **kwargs):
            made.append(out := make(*args, **kwargs))
            return out

        return call

    for name in ("new_empty", "new_zeros"):
        monkeypatch.setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name)))
    with interpreted(strict=False) as log:
        run(token_logprob, **given)
    largest = max(count.size for launch in log.launches for count in launch.arguments.values())
    assert made and max(largest, *(x.numel() * x.element_size() for x in made)) <= 2 * T * V // 8


# --- from logits -----------------------------------------------------------------------------------------------------


def run_logits(op, logits, targets, upstream) -> dict:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = op(logits, targets, temperature=0.7)
    torch.autograd.backward([logprobs, entropy], [u.to(logprobs.dtype) for u in upstream])
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "d_logits": logits.grad}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, V", [(1, 1), (63, 129), (3, 4097), (2, 151_937)])
@pytest.mark.parametrize("offset", [0, -500])
def test_from_logits(T, V, offset, dtype):
    given = inputs(T, V, 4, dtype)
    logits = (3 * torch.randn(T, V) + offset).to(dtype)
    rest = given["targets"], given["upstream"]
    with interpreted():
        got = run_logits(logits_logprob, logits, *rest)
    plain, true = (run_logits(logits_logprob_reference, x, *rest) for x in (logits, logits.double()))
    assert_as_exact_as_plain(got, plain, true)
    wide = torch.full((T, V + 3), torch.nan, dtype=dtype)
    wide[:, 1 : 1 + V] = logits
    with interpreted(schedule="reverse"):
        assert_same_bits(run_logits(logits_logprob, wide[:, 1 : 1 + V], *rest), got)
        alone = run_logits(logits_logprob, logits[-1:], rest[0][-1:], rest[1][:, -1:])
    assert_same_bits(alone, {name: values[-1:] for name, values in got.items()})


def test_from_logits_on_a_cpu():
    logits, targets = torch.randn(5, 7), torch.tensor([1, 2, IGNORE, 0, 6])
    for got, true in zip(logits_logprob(logits, targets), logits_logprob_reference(logits, targets)):
        assert torch.equal(got, true)


# --- the sum whose gradients are known before ------------------------------------------------------------------------


def test_the_sum_scales_with_its_upstream_gradient_and_runs_on_a_cpu():
    given = inputs(30, 200, 16)
    g, h = given["upstream"]
    given["targets"][1::3] = (given["hidden"] @ given["weight"].T)[1::3].argmax(-1)  # some are the likeliest
    tops = []
    found = []
    for dtype in (torch.float32, torch.float64):
        x, w = (given[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
        args = x, w, given["targets"], g.to(dtype)
        if dtype == torch.float32:
            with interpreted():
                total, logprobs, entropy, top = token_logprob_sum(*args, entropy_weights_T=h.to(dtype))
                (3 * total).backward()
        else:
            total, logprobs, entropy, top = token_logprob_sum(*args, entropy_weights_T=h.to(dtype))
            (3 * total).backward()
        tops.append(top)
        found.append([total.detach(), logprobs, entropy, x.grad, w.grad])
    for got, true in zip(*found):
        assert torch.allclose(got.double(), true, rtol=1e-4, atol=1e-4)
    assert torch.equal(*tops) and 0 < tops[0].sum() < 30
    scored = given["targets"] != IGNORE
    by_hand = (g * found[1][1] + h * found[1][2])[scored].sum()
    assert torch.allclose(found[1][0], by_hand)


def test_without_gradients_the_sum_computes_none():
    given = inputs(30, 200, 16, torch.bfloat16)
    likeliest = (given["hidden"] @ given["weight"].T).float().argmax(-1)
    given["targets"][::2] = likeliest[::2]
    with interpreted() as log, torch.no_grad():
        args = given["hidden"], given["weight"], given["targets"], given["upstream"][0].float()
        assert token_logprob_sum(*args)[3][::2].float().mean() > 0.9
    assert log.names() == ["token_logprob_fwd_kernel", "token_logprob_fold_kernel"]


def test_more_rows_than_are_kept_at_a_time(monkeypatch):
    monkeypatch.setattr(token_logprob_triton, "KEPT_ROWS", 32)
    exact(Known.op, inputs(100, 1100, 24, torch.bfloat16))


# --- the operators ---------------------------------------------------------------------------------------------------


def operators() -> dict:
    given = inputs(6, 40, 8, torch.float32)
    x, w, y = given["hidden"].requires_grad_(), given["weight"].requires_grad_(), given["targets"]
    g, h = given["upstream"].float()
    saved, upstream = torch.rand(4, 6), torch.rand(4, 6)
    logits = torch.randn(6, 40, requires_grad=True)
    kernels, of_logits = token_logprob_triton, logits_logprob_triton
    plain = x.detach(), w.detach(), y
    return {
        "token_logprob": (kernels.token_logprob_op, (x, w, y, 0.7, False)),
        "token_logprob_backward": (
            kernels.token_logprob_backward_op,
            (*plain, saved, upstream, 0.7, True, True, False, [0, 40]),
        ),
        "token_logprob_part": (kernels.token_logprob_part_op, (*plain[:2], y.clamp(min=0), 0.7)),
        "token_logprob_fold": (kernels.token_logprob_fold_op, (torch.rand(6), torch.rand(1, 3, 6), 0.7)),
        "token_logprob_sum": (kernels.token_logprob_sum_op, (*plain, g, h, 0.7, False)),
        "logits_logprob": (of_logits.logits_logprob_op, (logits, y, 0.7)),
        "logits_logprob_backward": (
            of_logits.logits_logprob_backward_op,
            (logits.detach(), y, saved, upstream, 0.7),
        ),
    }


@pytest.mark.parametrize("name", operators())
def test_operators_are_registered_right(name):
    """Schema, fake implementation and gradient, as torch.compile will use them."""
    op, args = operators()[name]
    with interpreted():
        torch.library.opcheck(op, args)


def test_through_torch_compile():
    given = inputs(20, 60, 8, torch.float32)
    compiled = torch.compile(token_logprob, fullgraph=True, backend="aot_eager")
    got = on_gpu(compiled)(given)
    assert_same_bits(got, on_gpu()(given))


def test_the_switch(monkeypatch):
    given = inputs(20, 60, 8, torch.float32)
    monkeypatch.setenv("MINITRL_KERNELS", "reference")
    with interpreted() as log:
        run(token_logprob, **given)
    assert not log.launches


@pytest.mark.parametrize("hidden, weight", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_dtypes_without_kernels_are_refused(hidden, weight):
    given = inputs(3, 60, 8)
    args = given["hidden"].to(hidden), given["weight"].to(weight), given["targets"]
    for call in (
        lambda: token_logprob(*args),
        lambda: token_logprob_sum(args[0].requires_grad_(), *args[1:], torch.ones(3)),
    ):
        with interpreted(), pytest.raises(ValueError, match="float32, float16 or bfloat16, the same for all"):
            call()


# --- faults that these tests must see --------------------------------------------------------------------------------

FAULTS = {
    "softmax term dropped": ("return -c - of_entropy * tl.load", "return -of_entropy * tl.load"),
    "entropy's gradient dropped": ("of_entropy * -LN2, c", "of_entropy * 0, c"),
    "a column too many": ("where(columns[None, :] < V, z", "where(columns[None, :] <= V, z"),
    "temperature forgotten": ("* (inverse_temperature * LOG2_E) - log2_s", "* LOG2_E - log2_s"),
    "sum not rescaled": ("total = fade * total + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    "weighted sum not shifted": (
        "fade * (weighted + drop * total) + tl.sum(p * z, 1)",
        "fade * weighted + tl.sum(p * z, 1)",
    ),
    "last split lost": ("inside = (split < splits)", "inside = (split < splits - 1)"),
    "first column's target lost": ("mask=(target >= first)", "mask=(target > first)"),
    "stored past the end": ("mask=real[:, None] & (columns < stop)", "mask=real[:, None] & (columns < stop + 64)"),
    "rows with one gradient lost": ("(upstream[:2] != 0).any(0)", "(upstream[:2] != 0).all(0)"),
    "a chunk's part of dX lost": ("add_product(part, dz,", "add_product(None, dz,"),
    "maximum starts at 0": (
        "reference = tl.full((ROWS,), LOWEST, tl.float32)\n    total = tl.zeros((ROWS,), tl.float32)\n"
        "    weighted = tl.zeros((ROWS,), tl.float32)\n    for first in range(split",
        "reference = tl.zeros((ROWS,), tl.float32)\n    total = tl.zeros((ROWS,), tl.float32)\n"
        "    weighted = tl.zeros((ROWS,), tl.float32)\n    for first in range(split",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    """By tests above, which run here once more."""
    plant(monkeypatch, token_logprob_triton, *FAULTS[fault])
    given = inputs(70, 2 * SPLIT + 65, 16, torch.bfloat16, ignored=0)
    given["upstream"][0, :20] = 0.0
    given["targets"][:3] = torch.tensor([0, SPLIT, 2 * SPLIT])
    if fault == "a chunk's part of dX lost":
        monkeypatch.setattr(token_logprob_triton, "CHUNK", SPLIT)
    if fault == "maximum starts at 0":
        test, args = test_all_logits_far_below_zero, (token_logprob, torch.bfloat16)
    elif fault == "a column too many":  # one of a thousand: too small a fault for bfloat16
        test, args = test_as_exact_as_plain_pytorch, ((63, 129, 33), token_logprob, torch.float32)
    else:
        test, args = exact, (token_logprob, given)
    with pytest.raises((AssertionError, OutOfBounds, Race)):
        test(*args)
