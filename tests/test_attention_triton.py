"""The Triton kernels of attention, interpreted: exact, in bounds, the same bits in any company, each byte once."""

from itertools import accumulate

import pytest
import torch
from accuracy import assert_as_exact_as_plain
from faults import plant
from test_attention import PACKS, inputs, ours, plain, run, zeros

pytest.importorskip("triton")
from interpreter import OutOfBounds, Race, interpreted  # noqa: E402

from minitrl.kernels import attention_triton, targets  # noqa: E402
from minitrl.kernels.attention import attention  # noqa: E402
from minitrl.packing import pack, pack_groups  # noqa: E402

KERNELS = ("attention_fwd_kernel", "attention_dq_kernel", "attention_dkv_kernel")

# Around the edges of blocks: on sm_90 in 16 bits, 128 queries by 64 keys, and 64 queries by 128 keys for dK and dV.
EDGES = {
    "one token": pack(zeros(1)),
    "63, empty, one, 129": pack(zeros(63, 0, 1, 129)),
    "prompts of 1, 63, 65": pack_groups(zeros(1, 63, 65), [zeros(2, 0, 7), zeros(64), zeros(1, 1, 130)]),
    "a prompt of 128": pack_groups(zeros(128), [zeros(1, 5, 129)]),
    "a prompt of 129": pack_groups(zeros(129), [zeros(63, 66)]),
    "prompts at the end": PACKS["prompts at the end"],
}


def check(tensors: list, packed, **options) -> None:
    """As test_attention.check, with only our own half interpreted."""
    truth = run(plain, *(x.double() for x in tensors), packed, **options)
    with interpreted():
        got = run(ours, *tensors, packed, **options)
    assert_as_exact_as_plain(got, run(plain, *tensors, packed, **options), truth)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(torch.float32, None), (torch.float16, 70), (torch.bfloat16, None), (torch.bfloat16, 70)],
    ids=str,
)
@pytest.mark.parametrize("name", EDGES)
def test_as_exact_as_plain_pytorch(name, dtype, window):
    check(inputs(EDGES[name], 4, 2, 64, dtype), EDGES[name], window=window)


@pytest.mark.parametrize("window", [1, 5, 128, 1000])
def test_windows(window):
    packed = EDGES["prompts of 1, 63, 65"]
    check(inputs(packed, 2, 1, 64, torch.bfloat16), packed, window=window)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 16), (3, 1, 32), (2, 2, 128), (5, 1, 256)])
def test_heads(heads, kv_heads, size):
    packed = pack_groups(zeros(33), [zeros(70, 3)])
    check(inputs(packed, heads, kv_heads, size, torch.bfloat16), packed)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_target(target):
    """Whatever its tiles are."""
    packed = EDGES["prompts of 1, 63, 65"]
    tensors = inputs(packed, 2, 1, 64, torch.bfloat16)
    truth = run(plain, *(x.double() for x in tensors), packed)
    with interpreted(target=target):
        got = run(ours, *tensors, packed)
    assert_as_exact_as_plain(got, run(plain, *tensors, packed), truth)


def test_scores_beyond_the_range_of_exp():
    packed = EDGES["a prompt of 129"]
    q, k, v, upstream = inputs(packed, 2, 1, 64, torch.float32)
    check([20 * q, k, v, upstream], packed, scale=0.5)


def test_a_prefix_of_no_tokens():
    """No Pack has one, but the kernels need not know."""
    lengths, prefixes = (0, 5, 70), (-1, 0, 0)
    q, k, v, _ = inputs(pack(zeros(75)), 2, 1, 64, torch.float32)
    starts = torch.tensor([0, *accumulate(lengths)]).int()
    with interpreted():
        got = attention(q, k, v, starts, torch.tensor(prefixes).int())
        alone = ours(q, k, v, pack(zeros(5, 70)))
    assert torch.equal(got, alone)


def test_strided_inputs():
    """q, k and v as slices of one product; an upstream gradient that is a transpose; heads that stand apart."""
    packed = EDGES["a prompt of 129"]
    q, k, v, upstream = inputs(packed, 4, 2, 64, torch.bfloat16)
    slices = torch.cat([q, k, v], 1).split([4, 2, 2], dim=1)
    transposed = upstream.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    odd = torch.cat([k, k[:, :, :1]], 2)[:, :, :64]  # rows of 65 numbers
    assert not any(x.is_contiguous() for x in (*slices, transposed, odd))
    with interpreted():
        expected = run(ours, q, k, v, upstream, packed)
        assert same(run(ours, *slices, transposed, packed), expected)
        assert same(run(ours, q, odd, v, upstream.expand_as(upstream), packed), expected)


GROUPS = pack_groups(zeros(70, 1, 130), [zeros(40, 70, 5), zeros(9), zeros(129, 3)])


def groups_of(packed) -> list[list[int]]:
    """The segments of each prompt and its completions."""
    firsts = [b for b, prefix in enumerate(packed.prefixes) if prefix < 0]
    return [list(range(a, b)) for a, b in zip(firsts, [*firsts[1:], len(packed.lengths)])]


def part_of(packed, groups: list[list[int]]):
    """A pack of some groups in some order, and where its tokens stand in the whole one."""
    starts, chosen = packed.cu_seqlens.tolist(), sum(groups, [])
    prefixes = [chosen.index(packed.prefixes[b]) if packed.prefixes[b] >= 0 else -1 for b in chosen]
    origin = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in chosen])
    return pack(zeros(*[packed.lengths[b] for b in chosen]), prefixes), origin


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_any_company(dtype, window):
    """Programs in any order, groups alone or packed in another order: out, dq, dk and dv are the same to the bit."""
    tensors = inputs(GROUPS, 2, 1, 64, dtype)
    with interpreted():
        whole = run(ours, *tensors, GROUPS, window=window)
    for schedule in ("reverse", "shuffle"):
        with interpreted(schedule):
            assert same(run(ours, *tensors, GROUPS, window=window), whole), schedule
    groups = groups_of(GROUPS)
    for chosen in ([groups[0]], [groups[2]], [groups[2], groups[1], groups[0]]):
        packed, origin = part_of(GROUPS, chosen)
        with interpreted():
            got = run(ours, *(x[origin] for x in tensors), packed, window=window)
        assert same(got, {name: x[origin] for name, x in whole.items()}), chosen


@pytest.mark.parametrize("window", [None, 50])
def test_a_shared_prompt_has_the_bits_of_a_repeated_one(window):
    q, k, v, _ = inputs(GROUPS, 2, 1, 64, torch.bfloat16)
    starts = GROUPS.cu_seqlens.tolist()
    pieces = [torch.cat([torch.arange(70), torch.arange(starts[b], starts[b + 1])]) for b in (1, 2, 3)]
    origin = torch.cat(pieces)
    with interpreted():
        shared = ours(q, k, v, GROUPS, window=window)
        apart = ours(q[origin], k[origin], v[origin], pack(zeros(*map(len, pieces))), window=window)
    assert torch.equal(shared[origin], apart)


def test_a_broken_group_leaves_the_others_alone():
    """NaN in one group's keys reaches no other group, forward or backward."""
    packed = pack_groups(zeros(30, 40), [zeros(20, 30), zeros(50)])
    tensors = inputs(packed, 2, 1, 64, torch.float32)
    with interpreted():
        clean = run(ours, *tensors, packed)
        for x in tensors:
            x[:80] = torch.nan
        broken = run(ours, *tensors, packed)
    assert same({n: x[80:] for n, x in broken.items()}, {n: x[80:] for n, x in clean.items()})


def test_nothing_at_all():
    packed = pack(zeros(0, 0))
    with interpreted() as log:
        got = run(ours, *inputs(packed, 4, 2, 64, torch.bfloat16), packed)
    assert not log.launches and got["out"].shape == (0, 4, 64) and got["dk"].shape == (0, 2, 64)


def test_sampling_first_and_training_after():
    packed = pack_groups(zeros(11, 2), [zeros(5, 8), zeros(1)])  # a layout of its own, that no other test has
    tensors = inputs(packed, 4, 2, 64, torch.float32)
    with interpreted(), torch.inference_mode():
        sampled = ours(*tensors[:3], packed)
    with interpreted():
        assert torch.equal(sampled, run(ours, *tensors, packed)["out"])


# What the kernels cost


def least_bytes(T: int, H: int, K: int, E: int, number: int) -> dict[str, int]:
    """The formulas of attention_triton.py."""
    return {
        "attention_fwd_kernel": number * T * (2 * H + 2 * K) * E + 4 * T * H,
        "attention_dq_kernel": number * T * (4 * H + 2 * K) * E + 8 * T * H,
        "attention_dkv_kernel": number * T * (2 * H + 4 * K) * E + 8 * T * H,
    }


def test_bytes_touched_are_the_least_possible():
    packed = pack_groups(zeros(300), [zeros(200, 100, 129)])
    H, K, E = 3, 1, 64
    with interpreted() as log:
        run(ours, *inputs(packed, H, K, E, torch.bfloat16), packed)
    assert log.names() == list(KERNELS)
    for name, least in least_bytes(len(packed.tokens_T), H, K, E, 2).items():
        assert least <= log[name].touched <= 1.01 * least, (name, log[name].touched, least)


def cost(packed, backward: bool) -> tuple[int, int]:
    """Bytes of K and V touched, and FLOPs, at one head."""
    with interpreted(strict=False) as log:
        q, k, v, upstream = inputs(packed, 1, 1, 16, torch.bfloat16)
        run(ours, q, k, v, upstream, packed) if backward else ours(q, k, v, packed)
    launches = [log[name] for name in log.names()]
    touched = sum(launch.arguments[name].touched for launch in launches for name in ("k", "v"))
    return touched, sum(launch.flops for launch in launches)


@pytest.mark.parametrize("backward", [False, True])
def test_a_shared_prompt_costs_less(backward):
    """A prompt of 1,024 tokens with 8 answers of 256: K and V 3.3 times less, FLOPs 2.2 times less."""
    shared = pack_groups(zeros(1024), [zeros(*[256] * 8)])
    bytes_shared, flops_shared = cost(shared, backward)
    bytes_repeated, flops_repeated = cost(pack(zeros(1280)), backward)  # all 8 are alike
    assert 8 * bytes_repeated / bytes_shared >= 3.3
    assert 8 * flops_repeated / flops_shared >= 2.2


def test_tiles_are_listed_longest_first():
    lengths, prefixes = GROUPS.lengths, GROUPS.prefixes
    tiles = attention_triton.query_tiles(lengths, prefixes, None, 64, torch.device("cpu"))
    keys = tiles[:, 1] + tiles[:, 2]
    assert torch.equal(keys, keys.sort(descending=True).values) and tiles[:, 1].sum() == sum(lengths)
    tiles, runs = attention_triton.key_tiles(lengths, prefixes, None, 64, 64, torch.device("cpu"))
    queries = torch.stack([runs[a:b, 1].sum() for a, b in tiles[:, 3:].tolist()])
    assert torch.equal(queries, queries.sort(descending=True).values) and tiles[:, 1].sum() == sum(lengths)


# The operators


def example(dtype=torch.bfloat16) -> list:
    packed = pack_groups(zeros(9), [zeros(3, 5)])
    q, k, v, _ = inputs(packed, 2, 1, 16, dtype)
    return [q, k, v, list(packed.lengths), list(packed.prefixes), 0.25, None]


def test_operators_are_registered_right():
    q, k, v, *layout = example(torch.float32)
    with interpreted():
        inputs_ = [x.requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(attention_triton.attention_forward, (*inputs_, *layout))
        out, lse = attention_triton.attention_forward(q, k, v, *layout)
        backward = (torch.ones_like(out), q, k, v, out, lse, *layout)
        torch.library.opcheck(
            attention_triton.attention_backward, [x.detach() if i < 6 else x for i, x in enumerate(backward)]
        )


def test_fake_tensors_and_torch_compile():
    """Shapes without data; and one graph, which serves other lengths too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v, *layout = example()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x).requires_grad_() for x in (q, k, v)]
        out, lse = attention_triton.attention_forward(*fake, *layout)
        gradients = torch.autograd.grad(out.sum(), fake)
    assert out.shape == q.shape and lse.shape == (2, 17) and [g.shape for g in gradients] == [q.shape, k.shape, v.shape]

    def doubled(q, k, v):
        return 2 * attention_triton.attention_forward(q, k, v, *layout)[0]

    with interpreted():
        compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), doubled(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ((q[..., :24], k[..., :24], v[..., :24]), {}), "heads of size 24 have no Triton kernel"),
        (lambda q, k, v: ((q, k.half(), v), {}), "the same for all"),
        (lambda q, k, v: ((q.double(), k.double(), v.double()), {}), "float64"),
        (lambda q, k, v: ((q, k, v), {"scale": -1.0}), "scale -1.0 must be positive"),
    ],
)
def test_what_the_kernels_do_not_compute_is_an_error(change, message):
    packed = pack(zeros(5))
    tensors, options = change(*inputs(packed, 2, 1, 64, torch.bfloat16)[:3])
    with interpreted(), pytest.raises(ValueError, match=message) as error:
        ours(*tensors, packed, **options)
    assert "MINITRL_KERNELS=reference" in str(error.value)


# Faults in the kernels that the tests above must see

FAULTS = {
    "mask off by one": ("seen = queries >= keys", "seen = queries > keys"),
    "window off by one": ("queries - keys < window", "queries - keys <= window"),
    "blocks taken for unmasked too early": ("return 0, (position + 1) //", "return 0, (position + rows) //"),
    "prefix forgotten": ("tl.where(at + n < behind, prefix_at, own_at)", "tl.where(at + n < 0, prefix_at, own_at)"),
    "wrong head of the group": ("k += head // (H // K) * E\n    v += head // (H // K) * E\n    m, e = tl.arange(0, "
                                "QUERIES), tl.arange(0, E)[None, :]\n    row = ",
                                "k += head % K * E\n    v += head % K * E\n    m, e = tl.arange(0, "
                                "QUERIES), tl.arange(0, E)[None, :]\n    row = "),
    "sum not rescaled": ("total * keep + tl.sum", "total + tl.sum"),
    "output not rescaled": ("out * keep[:, None]", "out"),
    "natural exponent": ("    scale *= LOG2_E\n", ""),
    "softmax's mean forgotten in dQ": ("shares * (d_shares - delta[:, None])", "shares * d_shares"),
    "dK without its scale": ("(dk_tile * scale)", "(dk_tile)"),
    "completions do not train the prompt": ("[(*child, length) for child in after]", "[]"),
    "one head of the group in dK and dV": ("for member in range(H // K):", "for member in range(1):"),
    "the last query of a run forgotten": ("at + m < count", "at + m < count - 1"),
    "the diagonal of dK and dV cut short": ("position + rows - 1 - place)  #", "position - place)  #"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    packed = pack_groups(zeros(65, 5), [zeros(66, 1, 70), zeros(9)])
    tensors = inputs(packed, 4, 2, 64, torch.bfloat16)
    window = 60 if "window" in fault else None
    plant(monkeypatch, attention_triton, *FAULTS[fault])
    with pytest.raises((AssertionError, OutOfBounds, Race)):
        check(tensors, packed, window=window)
