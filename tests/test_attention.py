"""Attention on packed tokens: causal, grouped heads, sliding windows, prompts shared by their completions."""

import pytest
import torch
from accuracy import assert_as_exact_as_plain

from minitrl.kernels.attention import attention
from minitrl.packing import Pack, pack, pack_groups

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def zeros(*lengths: int) -> list[list[int]]:
    return [[0] * length for length in lengths]


PACKS = {
    "one token": pack(zeros(1)),
    "63 tokens": pack(zeros(63)),
    "129 tokens": pack(zeros(129)),
    "ragged": pack(zeros(5, 1, 64, 17, 2)),
    "empty segments": pack(zeros(0, 3, 0, 0, 9, 0)),
    "many short": pack(zeros(*[1 + i % 3 for i in range(60)])),
    "one group": pack_groups(zeros(7), [zeros(1, 5, 12)]),
    "long prompt": pack_groups(zeros(130), [zeros(2, 33)]),
    "several times 128": pack_groups(zeros(140), [zeros(260, 3, 129)]),
    "groups": pack_groups(zeros(3, 16, 1, 5), [zeros(4, 1), zeros(9, 9, 9), zeros(20), []]),
    "empty completions": pack_groups(zeros(4, 6), [zeros(0, 3, 0), zeros(0)]),
    "prompts at the end": pack(zeros(3, 8, 5, 2), [-1, -1, 0, 1]),
}


def inputs(packed: Pack, heads: int, kv_heads: int, size: int, dtype=torch.float64, seed: int = 0) -> list:
    """q, k, v and the upstream gradient. Scores of standard deviation 2: attention is neither flat nor one-hot."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(len(packed.tokens_T), n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, upstream = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype), upstream.to(dtype)]


def plain(q, k, v, packed: Pack, *, scale=None, window=None):
    """Whole (T, T) scores under a mask that says in words who sees whom."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    segment, place = packed.segments_T, torch.arange(len(q))
    prefix = packed.prefixes_B.long()[segment]
    own = (segment[:, None] == segment) & (place[:, None] >= place)
    seen = own | (prefix[:, None] == segment)
    if window is not None:
        seen &= packed.positions_T[:, None] - packed.positions_T < window
    scores = torch.einsum("ihe,jhe->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def ours(q, k, v, packed: Pack, **options):
    return attention(
        q, k, v, packed.cu_seqlens, packed.prefixes_B, lengths=packed.lengths, prefixes=packed.prefixes, **options
    )


def run(op, q, k, v, upstream, packed: Pack, **options) -> dict:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = op(q, k, v, packed, **options)
    out.backward(upstream)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def check(op, tensors: list, packed: Pack, **options) -> None:
    truth = run(plain, *(x.double() for x in tensors), packed, **options)
    assert_as_exact_as_plain(run(op, *tensors, packed, **options), run(plain, *tensors, packed, **options), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 16, 1000])
@pytest.mark.parametrize("name", PACKS)
def test_as_exact_as_plain_pytorch(name, window, dtype):
    check(ours, inputs(PACKS[name], 4, 2, 16, dtype), PACKS[name], window=window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (6, 6)])
@pytest.mark.parametrize("size", [8, 20, 64])
def test_heads(heads, kv_heads, size, dtype):
    check(ours, inputs(PACKS["groups"], heads, kv_heads, size, dtype), PACKS["groups"])


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale):
    check(ours, inputs(PACKS["groups"], 4, 2, 16, torch.float32), PACKS["groups"], scale=scale)


def test_scores_beyond_the_range_of_exp():
    packed = PACKS["groups"]
    q, k, v, upstream = inputs(packed, 4, 2, 16, torch.float32)
    check(ours, [20 * q, k, v, upstream], packed)


@pytest.mark.parametrize("window", [None, 3])
def test_by_hand(window):
    """One head of size 1 and all scores 0: the output is the mean of the values that are seen.

    Two prompts p = (1, 2), q = (8), completions a = (4, 6) and b = (10) of p, c = (16) of q.
    """
    packed = pack_groups([[0, 0], [0]], [[[0, 0], [0]], [[0]]])
    values = torch.tensor([1.0, 2.0, 4.0, 6.0, 10.0, 8.0, 16.0]).view(-1, 1, 1)
    out = ours(torch.zeros_like(values), torch.ones_like(values), values, packed, window=window).flatten()
    last_of_a = (1 + 2 + 4 + 6) / 4 if window is None else (2 + 4 + 6) / 3
    expected = [1, 1.5, 7 / 3, last_of_a, 13 / 3, 8, 12]
    assert out.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("window", [None, 2, 6, 9])
def test_a_shared_prompt_is_a_repeated_prompt(window):
    """One copy of a prompt before its completions, or one copy for each: the same outputs and gradients."""
    prompts, completions = [5, 1, 9], [[3, 1, 8], [2], [6, 6]]
    shared = pack_groups(zeros(*prompts), [zeros(*lengths) for lengths in completions])
    # Where in the shared pack each token of the repeated one stands: prompt b's tokens, then the completion's.
    starts = shared.cu_seqlens.tolist()
    pieces = [
        [i for s in (shared.prefixes[b], b) for i in range(starts[s], starts[s + 1])]
        for b in range(len(shared.lengths))
        if shared.prefixes[b] >= 0
    ]
    origin = torch.tensor(sum(pieces, []))
    repeated = pack(zeros(*map(len, pieces)))
    is_completion = shared.completion_T[origin]

    q, k, v, upstream = inputs(shared, 4, 2, 16)
    upstream[~shared.completion_T] = 0  # a prompt's own outputs count once in one pack and G times in the other
    got = run(ours, q, k, v, upstream, shared, window=window)
    apart = run(ours, q[origin], k[origin], v[origin], upstream[origin], repeated, window=window)
    assert torch.allclose(got["out"][origin][is_completion], apart["out"][is_completion], rtol=0, atol=1e-12)
    for name in ("dq", "dk", "dv"):
        summed = torch.zeros_like(got[name]).index_add(0, origin, apart[name])
        assert torch.allclose(got[name], summed, rtol=0, atol=1e-12), name
        assert got[name].abs().max() > 0.1

    prompt = shared.prefixes_B[shared.segments_T] < 0
    first = {int(o): i for i, o in reversed(list(enumerate(origin.tolist())))}  # a prompt token's first copy
    copies = torch.tensor([first[int(i)] for i in prompt.nonzero()])
    assert torch.allclose(got["out"][prompt], apart["out"][copies], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_nothing_leaks_between_groups_or_between_completions(window):
    """The Jacobian of each segment's outputs is exactly 0 but for keys and values it may see; those all count."""
    packed = pack_groups(zeros(3, 2), [zeros(2, 3), zeros(2)])
    q, k, v, _ = inputs(packed, 2, 1, 4)
    T = len(q)
    reach = torch.zeros(T, T)  # (output, input)
    jacobians = torch.autograd.functional.jacobian(lambda *qkv: ours(*qkv, packed, window=window), (q, k, v))
    for jacobian in jacobians[1:]:  # (T, H, E, T, K, E)
        reach += jacobian.abs().sum((1, 2, 4, 5))
    own = jacobians[0].abs().sum((1, 2, 4, 5))
    assert torch.equal(own != 0, torch.eye(T, dtype=bool) & (own != 0)), "a query is its own token's alone"
    for i in range(T):
        for j in range(T):
            mine, theirs = int(packed.segments_T[i]), int(packed.segments_T[j])
            seen = (mine == theirs and j <= i) or packed.prefixes[mine] == theirs
            if window is not None:
                seen &= int(packed.positions_T[i] - packed.positions_T[j]) < window
            assert (reach[i, j] != 0) == seen, (i, j)


def test_a_broken_group_leaves_the_others_alone():
    """NaN in one group's keys reaches no other group, forward or backward."""
    packed = pack_groups(zeros(3, 4), [zeros(2, 3), zeros(5)])
    tensors = inputs(packed, 4, 2, 16)
    clean = run(ours, *tensors, packed)
    for x in tensors[1:3]:
        x[:8] = torch.nan
    tensors[3][:8] = 0
    broken = run(ours, *tensors, packed)
    for name, values in clean.items():
        assert torch.equal(values[8:], broken[name][8:]), name


def test_segments_of_any_order_and_alone_give_the_same():
    """Attention of a segment does not depend on what else is in the pack."""
    lengths = [5, 1, 17, 9]
    packed = pack(zeros(*lengths))
    q, k, v, _ = inputs(packed, 4, 4, 16)
    whole = ours(q, k, v, packed).split(lengths)
    for b, rows in enumerate(torch.arange(sum(lengths)).split(lengths)):
        alone = ours(q[rows], k[rows], v[rows], pack(zeros(lengths[b])))
        assert torch.allclose(alone, whole[b], rtol=0, atol=1e-13)


def test_sampling_first_and_training_after():
    """What is kept of a pack's layout while sampling, in inference mode, may serve a backward pass later."""
    packed = pack_groups(zeros(11, 2), [zeros(5, 9), zeros(1)])  # a layout of its own, that no other test has
    tensors = inputs(packed, 4, 2, 16)
    with torch.inference_mode():
        sampled = ours(*tensors[:3], packed)
    check(ours, tensors, packed)
    assert torch.equal(sampled, run(ours, *tensors, packed)["out"])


def test_host_copies_are_a_courtesy():
    packed = PACKS["groups"]
    q, k, v, _ = inputs(packed, 4, 2, 16)
    assert torch.equal(attention(q, k, v, packed.cu_seqlens, packed.prefixes_B), ours(q, k, v, packed))


def test_non_contiguous_inputs():
    """q, k and v as the model has them: slices of one (T, H + 2 K, E) product; and an upstream that is a transpose."""
    packed = PACKS["groups"]
    T, H, K, E = len(packed.tokens_T), 4, 2, 16
    qkv = torch.randn(T, H + 2 * K, E, dtype=torch.float64)
    views = qkv.split([H, K, K], dim=1)
    upstream = torch.randn(E, H, T, dtype=torch.float64).permute(2, 1, 0)
    assert not any(x.is_contiguous() for x in (*views, upstream))
    got = run(ours, *views, upstream, packed)
    apart = run(ours, *(x.contiguous() for x in (*views, upstream)), packed)
    for name, values in apart.items():
        assert torch.allclose(got[name], values, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_nothing_at_all(dtype):
    packed = pack(zeros(0, 0))
    got = run(ours, *inputs(packed, 4, 2, 16, dtype), packed)
    assert got["out"].shape == (0, 4, 16) and got["dk"].shape == (0, 2, 16) and got["out"].dtype == dtype


# Faults that the tests above must see: each is our attention, asked for something slightly else


def window_of_one_more(q, k, v, packed, *, window):
    return ours(q, k, v, packed, window=window + 1)


def window_of_one_less(q, k, v, packed, *, window):
    return ours(q, k, v, packed, window=window - 1)


def window_ignored(q, k, v, packed, *, window):
    return ours(q, k, v, packed)


def prompts_ignored(q, k, v, packed, *, window):
    return attention(q, k, v, packed.cu_seqlens, torch.full_like(packed.prefixes_B, -1), window=window)


def wrong_prompt(q, k, v, packed, *, window):
    """The second group's completions read the first group's prompt."""
    return attention(q, k, v, packed.cu_seqlens, packed.prefixes_B.clamp(max=0), window=window)


def segments_merged(q, k, v, packed, *, window):
    return ours(q, k, v, pack(zeros(len(q))), window=window)


def heads_interleaved(q, k, v, packed, *, window):
    """Query head h reads key head h % K instead of h // (H // K)."""
    repeats = q.shape[1] // k.shape[1]
    return ours(q, k.repeat(1, repeats, 1), v.repeat(1, repeats, 1), packed, window=window)


def scale_forgotten(q, k, v, packed, *, window):
    return ours(q, k, v, packed, window=window, scale=1.0)


def prompt_without_gradient(q, k, v, packed, *, window):
    """Completions read the prompt, but do not train it."""
    prompt = ~packed.completion_T[:, None, None]
    k, v = torch.where(prompt, k.detach(), k), torch.where(prompt, v.detach(), v)
    return ours(q, k, v, packed, window=window)


def last_query_forgotten(q, k, v, packed, *, window):
    out = ours(q, k, v, packed, window=window)
    return torch.cat([out[:-1], torch.zeros_like(out[-1:])])


FAULTS = [window_of_one_more, window_of_one_less, window_ignored, prompts_ignored, wrong_prompt, segments_merged]
FAULTS += [heads_interleaved, scale_forgotten, prompt_without_gradient, last_query_forgotten]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, dtype):
    packed = pack(zeros(4, 6, 5, 3, 8), [-1, -1, 0, 1, 1])
    with pytest.raises(AssertionError, match="error"):
        check(fault, inputs(packed, 4, 2, 16, dtype), packed, window=7)
