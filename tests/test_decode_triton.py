"""The Triton kernels of decoding, interpreted: exact, shared pages read once, rows that do not depend on neighbours."""

import pytest
import torch
from accuracy import assert_as_exact_as_plain
from faults import plant
from test_attention import zeros
from test_decode import cache, plain

pytest.importorskip("triton")
from interpreter import OutOfBounds, Race, interpreted  # noqa: E402

from minitrl.kernels import decode_triton, targets  # noqa: E402
from minitrl.kernels.attention import attention  # noqa: E402
from minitrl.kernels.decode import decode, extend, make_chunks, make_layout  # noqa: E402
from minitrl.packing import pack_groups  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PIECE = decode_triton.SPLIT


def check(given, **options) -> None:
    exact = [x.double() if x.is_floating_point() else x for x in given]
    with interpreted():
        got = decode(*given, **options)
    assert_as_exact_as_plain(*({"out": x} for x in (got, plain(*given, **options), plain(*exact, **options))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 70, 1000])
def test_as_exact_as_plain_pytorch(window, dtype):
    check(cache([1, 63, 2, 129, PIECE - 1, PIECE, PIECE + 1], 4, 2, 64, dtype, page_size=16), window=window)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 16), (3, 1, 32), (6, 2, 128), (2, 2, 256)])
def test_heads(heads, kv_heads, size):
    check(cache([3, 21, 80], heads, kv_heads, size, torch.bfloat16, page_size=16))


@pytest.mark.parametrize("page_size", [1, 24, 512])
def test_page_sizes(page_size):
    """Also those that do not divide a block of keys, or are larger than a piece."""
    check(cache([1, 40, 530], 2, 1, 16, torch.bfloat16, page_size=page_size), window=500)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_target(target):
    given = cache([5, 300], 2, 1, 64, torch.bfloat16, page_size=16)
    exact = [x.double() if x.is_floating_point() else x for x in given]
    with interpreted(target=target):
        got = decode(*given)
    assert_as_exact_as_plain(*({"out": x} for x in (got, plain(*given), plain(*exact))))


def test_scale_indices_of_32_bits_and_strides():
    q, k, v, table, lengths = cache([7, 12], 4, 2, 16)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    check((q, k, v, table, lengths), scale=0.3)
    with interpreted():
        expected = decode(q, k, v, table, lengths)
        strided = torch.cat([q, q + 1], 1)[:, :4], k, v, table.t().contiguous().t(), lengths
        assert torch.equal(decode(*strided), expected)
        assert torch.equal(decode(q, k, v, table.int(), lengths.int()), expected)


def group(dtype=torch.bfloat16):
    """Rows 0, 2 and 3 share a prompt of two pieces and a bit; row 4 has their pages too, but ends within piece 1."""
    q, k, v, table, lengths = cache(
        [2 * PIECE + 70, 40, 2 * PIECE + 90, 2 * PIECE + 66, PIECE + 50], 6, 2, 64, dtype, 16
    )
    pages = 2 * PIECE // 16
    table[2:, : pages + 4] = table[0, : pages + 4]
    return q, k, v, table, lengths


@pytest.mark.parametrize("window", [None, PIECE + 75])
def test_shared_pages(window):
    check(group(), window=window)


def test_shared_pages_are_read_once():
    """Requested, not merely touched: a group's rows are in one tile. What they do not fill together is read by each."""
    q, k, v, table, lengths = group()
    with interpreted() as log:
        decode(q, k, v, table, lengths)
    token = 2 * 64 * 2  # bytes of K: key heads, size, number
    apart = sum(lengths.tolist()) - 3 * PIECE - 2 * PIECE  # piece 0 serves four rows, piece 1 three
    for name in ("k_pages", "v_pages"):
        assert log["decode_split_kernel"].arguments[name].loaded == apart * token


def test_bytes_touched_are_the_least_possible():
    """All rows apart: every page's part in use, queries, outputs; and the workspace, whose size is declared."""
    lengths = [PIECE, 2 * PIECE, 100]
    B, H, K, E = 3, 4, 2, 64
    given = cache(lengths, H, K, E, torch.bfloat16, page_size=16)
    with interpreted() as log:
        decode(*given)
    split, fold = log["decode_split_kernel"], log["decode_fold_kernel"]
    pieces = sum(-(-length // PIECE) for length in lengths)
    workspace = 4 * (E + 2) * H * pieces
    least = 2 * sum(lengths) * 2 * K * E + 2 * B * H * E  # K and V, q
    tables = sum(split.arguments[name].touched for name in ("table", "lengths", "order", "rank"))
    assert split.touched - tables == least + workspace and tables < 0.01 * least
    assert fold.touched - fold.arguments["lengths"].touched == workspace + 2 * B * H * E
    assert workspace < 0.1 * 2 * PIECE * pieces * 2 * K * E


@pytest.mark.parametrize("window", [None, 100])
def test_a_row_does_not_depend_on_the_rows_beside_it(window):
    """Alone, in another order, beside longer rows, with shared pages, programs in any order: the same bits."""
    q, k, v, table, lengths = group()
    with interpreted():
        together = decode(q, k, v, table, lengths, window=window)
        for b in range(5):
            alone = decode(q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1], window=window)
            assert torch.equal(alone[0], together[b]), b
        order = torch.tensor([3, 1, 4, 0, 2])
        assert torch.equal(decode(q[order], k, v, table[order], lengths[order], window=window), together[order])
    for schedule in ("reverse", "shuffle"):
        with interpreted(schedule):
            assert torch.equal(decode(q, k, v, table, lengths, window=window), together), schedule


def test_more_rows_of_a_group_than_a_tile_holds():
    """64 queries a tile: 16 rows of 4 heads."""
    B = 19
    q, k, v, table, lengths = cache([PIECE + 1 + b for b in range(B)], 4, 1, 16, torch.bfloat16, page_size=64)
    table[:, : PIECE // 64] = table[0, : PIECE // 64]
    check((q, k, v, table, lengths))
    with interpreted() as log:
        decode(q, k, v, table, lengths)
    own = sum(range(1, B + 1))
    assert log["decode_split_kernel"].arguments["k_pages"].loaded == (2 * PIECE + own) * 16 * 2


def test_a_layout_is_made_once_for_all_layers():
    q, k, v, table, lengths = group()
    arguments = table, lengths, k.shape[1], 16, None, q.dtype
    alone = decode(q, k, v, table, lengths)  # plain PyTorch has one of its own
    assert torch.equal(decode(q, k, v, table, lengths, layout=make_layout(*arguments)), alone)
    with interpreted():
        order, rank = layout = make_layout(*arguments)
        assert torch.equal(decode(q, k, v, table, lengths, layout=layout), decode(q, k, v, table, lengths))
    assert order[0].tolist() == [0, 2, 3, 4, 1] or rank[0].tolist().count(0) == 2  # one group, and row 1 alone
    assert sorted(order[1].tolist()) == [0, 1, 2, 3, 4] and sorted(rank[1].tolist()) == [0, 0, 0, 1, 2]
    assert rank[2].tolist() == [0] * 5  # nobody fills the third piece


def paged(keys, values, sequences: list, page_size: int):
    """The rows' keys and values in pages, and what was never written large: (k_pages, v_pages, page_table)."""
    counts = [-(-len(tokens) // page_size) for tokens in sequences]
    shape = sum(counts) + 1, keys.shape[1], page_size, keys.shape[2]
    k_pages, v_pages = (x.new_full(shape, 50.0) for x in (keys, values))
    table, free = torch.zeros(len(sequences), max(counts), dtype=torch.long), torch.randperm(sum(counts)).tolist()
    for row, tokens in enumerate(sequences):
        for j, token in enumerate(tokens.tolist()):
            if j % page_size == 0:
                table[row, j // page_size] = free.pop()
            k_pages[table[row, j // page_size], :, j % page_size] = keys[token]
            v_pages[table[row, j // page_size], :, j % page_size] = values[token]
    return k_pages, v_pages, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_deterministic_decoding_is_attentions_row_to_the_bit(window, dtype, monkeypatch):
    """Queries anywhere in prompts and completions of a pack, each against the cache of all that stands before it."""
    packed = pack_groups(zeros(70, 130), [zeros(60, 3), zeros(10)])
    starts, generator = packed.cu_seqlens.tolist(), torch.Generator().manual_seed(0)
    tokens = len(packed.tokens_T)
    q, k, v = (torch.randn(tokens, heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2))
    own = {b: torch.arange(starts[b], starts[b + 1]) for b in range(5)}
    places = [(1, 60), (1, 1), (2, 2), (4, 10), (0, 37), (3, 129)]  # segment, and how many of its tokens there are
    sequences = [
        torch.cat([own[packed.prefixes[b]], own[b][:n]]) if packed.prefixes[b] >= 0 else own[b][:n] for b, n in places
    ]
    last, lengths = torch.stack([s[-1] for s in sequences]), torch.tensor([len(s) for s in sequences])
    k_pages, v_pages, table = paged(k, v, sequences, 16)
    monkeypatch.setattr(decode_triton, "GATHERED", 2 * table.shape[1] * 16 * 2 * 64 * q.element_size())  # two rows
    with interpreted() as log:
        whole = attention(q, k, v, packed.cu_seqlens, packed.prefixes_B, window=window)
        one_by_one = decode(q[last], k_pages, v_pages, table, lengths, window=window, deterministic=True)
    assert torch.equal(one_by_one, whole[last])
    first, *others = log.launches
    constants = [name for name, value in first.values.items() if name.isupper()]
    for launch in others:  # one binary: the same kernel, constants and options
        assert launch.kernel is first.kernel and launch.options == first.options and len(others) == 3
        assert all(launch.values[name] == first.values[name] for name in constants)
        assert all(launch.values[f"{x}_stride"] % 16 == 0 == first.values[f"{x}_stride"] % 16 for x in "qkv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_chunks_of_prompts_have_attentions_bits(window, dtype):
    """Several chunks at once, each against the cache of all that stands before its end."""
    packed = pack_groups(zeros(70, 130), [zeros(60, 3), zeros(10)])
    starts, generator = packed.cu_seqlens.tolist(), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(starts[-1], heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2))
    own = [torch.arange(starts[b], starts[b + 1]) for b in range(5)]
    sequences = [own[0], torch.cat([own[0], own[1]]), own[3], own[3][:129]]
    befores = [0, 100, 17, 128]
    k_pages, v_pages, table = paged(k, v, sequences, 16)
    rows = torch.cat([sequence[before:] for sequence, before in zip(sequences, befores)])
    with interpreted():
        counts = [len(sequence) - before for sequence, before in zip(sequences, befores)]
        chunks = make_chunks(befores, counts, table, k_pages, 4, window)
        out = extend(q[rows], k_pages, v_pages, chunks, window=window)
        whole = attention(q, k, v, packed.cu_seqlens, packed.prefixes_B, window=window)
    assert torch.equal(out, whole[rows])


def test_deterministic_decoding_on_a_cpu_is_an_error():
    with pytest.raises(ValueError, match="deterministic"):
        decode(*cache([3], 1, 1, 16), deterministic=True)


def test_operators_are_registered_right():
    q, k, v, table, lengths = cache([3, 20], 2, 1, 16, torch.float32, page_size=16)
    with interpreted():
        order, rank = decode_triton.sharing(table, lengths, 16)
        torch.library.opcheck(decode_triton.decode_pieces, (q, k, v, table, lengths, order, rank, 0.25, None))
        torch.library.opcheck(decode_triton.decode_as_attention, (q, k, v, table, lengths, 0.25, 4))
        compiled = torch.compile(lambda *x: decode(*x) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, table, lengths), decode(q, k, v, table, lengths) + 1)


def test_no_rows():
    q, k, v, table, lengths = cache([3], 2, 1, 16, torch.float32)
    with interpreted() as log:
        assert decode(q[:0], k, v, table[:0], lengths[:0]).shape == (0, 2, 16)
    assert not log.launches


def test_more_heads_of_a_group_than_a_tile_holds_is_an_error():
    q, k, v, table, lengths = cache([3], 65, 1, 16, torch.bfloat16)
    with interpreted(), pytest.raises(ValueError, match="65 query heads .* MINITRL_KERNELS=reference"):
        decode(q, k, v, table, lengths)


FAULTS = {
    "one token less": ("tl.max(length, 0), split", "tl.max(length, 0) - 1, split"),
    "the end of the last page": ("tl.minimum(tl.max(length, 0), split * SPLIT + SPLIT)", "split * SPLIT + SPLIT"),
    "scale forgotten": ("        scale *= LOG2_E\n", ""),
    "wrong head of the page": ("(kv_head * PAGE + keys % PAGE)", "(keys % PAGE)"),
    "the leader's pages for rows that only begin alike": ("(ordered[1:] == ordered[:-1]).all(-1)",
                                                          "(ordered[1:] == ordered[:-1]).any(-1)"),
    "a row that ends within the piece joins": ("full, rows = lengths[:, None] >= ends",
                                               "full, rows = lengths[:, None] > 0 * ends"),
    "pieces not rescaled": ("acc * keep + tl.sum(o_pieces * share[:, None], 0)", "acc + tl.sum(o_pieces, 0)"),
    "window off by one": ("length[:, None] - 1 - keys[None, :] < window", "length[:, None] - keys[None, :] < window"),
    "window's first block skipped": ("tl.maximum(oldest - first, 0) // KEYS", "tl.cdiv(oldest - first, KEYS)"),
    "the same row for all of a tile": ("row = tl.load(order + other,", "row = tl.load(order + place + 0 * other,"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    q, k, v, table, lengths = group()
    table[2, 20] = 0  # rows 0, 2 and 3 begin their second piece alike, but row 2 goes on in another way
    plant(monkeypatch, decode_triton, *FAULTS[fault])
    with pytest.raises((AssertionError, OutOfBounds, Race)):
        check((q, k, v, table, lengths), window=PIECE + 75 if "window" in fault else None)
