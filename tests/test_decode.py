"""Decoding attention: one query a sequence against a paged cache."""

import pytest
import torch
from accuracy import assert_as_exact_as_plain

from minitrl.kernels.attention import attention
from minitrl.kernels.decode import decode
from minitrl.packing import pack

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def cache(
    lengths: list[int], heads: int, kv_heads: int, size: int, dtype=torch.float64, page_size: int = 4, seed: int = 0
):
    """(q, k_pages, v_pages, page_table, lengths): pages in random order, and what no row may read is large, not 0."""
    g = torch.Generator().manual_seed(seed)
    needed = [-(-length // page_size) for length in lengths]
    pages = sum(needed) + 3
    shuffled = torch.randperm(pages, generator=g).tolist()
    table = torch.randint(pages, (len(lengths), max(needed) + 1), generator=g)  # beyond a row's length: any page
    k_pages, v_pages = (torch.full((pages, kv_heads, page_size, size), 50.0, dtype=torch.float64) for _ in range(2))
    for b, length in enumerate(lengths):
        own = [shuffled.pop() for _ in range(needed[b])]
        table[b, : len(own)] = torch.tensor(own)
        for values in (k_pages, v_pages):
            for j in range(length):
                values[own[j // page_size], :, j % page_size] = torch.randn(
                    kv_heads, size, generator=g, dtype=torch.float64
                )
    q = 2 * torch.randn(len(lengths), heads, size, generator=g, dtype=torch.float64)
    return q.to(dtype), k_pages.to(dtype), v_pages.to(dtype), table, torch.tensor(lengths)


def plain(q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None):
    """Row by row, head by head, token by token out of its page."""
    page_size, repeats = k_pages.shape[2], q.shape[1] // k_pages.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - window)
        slots = [(int(page_table[b, j // page_size]), j % page_size) for j in range(first, length)]
        for h in range(q.shape[1]):
            keys = torch.stack([k_pages[page, h // repeats, slot] for page, slot in slots])
            values = torch.stack([v_pages[page, h // repeats, slot] for page, slot in slots])
            out[b, h] = (scale * (keys @ q[b, h])).softmax(0) @ values
    return out


def check(op, given, **options) -> None:
    exact = [x.double() if x.is_floating_point() else x for x in given]
    results = [op(*given, **options), plain(*given, **options), plain(*exact, **options)]
    assert_as_exact_as_plain(*({"out": out} for out in results))


LENGTHS = {"one": [1], "a full page": [4], "page edges": [3, 4, 5, 8, 9], "ragged": [1, 63, 2, 129, 17]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 6, 1000])
@pytest.mark.parametrize("name", LENGTHS)
def test_as_exact_as_plain_pytorch(name, window, dtype):
    check(decode, cache(LENGTHS[name], 4, 2, 8, dtype), window=window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 3), (4, 4)])
@pytest.mark.parametrize("size", [5, 16, 64])
def test_heads(heads, kv_heads, size, dtype):
    check(decode, cache([3, 21, 8], heads, kv_heads, size, dtype))


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_page_sizes(page_size):
    check(decode, cache([1, 15, 16, 17, 40], 4, 2, 8, torch.float32, page_size))


def test_scale():
    check(decode, cache([7, 12], 4, 2, 8, torch.float32), scale=0.3)


def test_indices_of_32_bits():
    q, k, v, table, lengths = cache([7, 12], 4, 2, 8)
    assert torch.equal(decode(q, k, v, table.int(), lengths.int()), decode(q, k, v, table, lengths))


def test_rows_share_the_pages_of_their_prompt():
    """Two completions of a prompt of two pages, against each with a copy of its own."""
    q, k, v, table, lengths = cache([11, 11], 4, 2, 8)
    k[table[1, :2]], v[table[1, :2]] = k[table[0, :2]].clone(), v[table[0, :2]].clone()
    apart = decode(q, k, v, table, lengths)
    shared = table.clone()
    shared[1, :2] = table[0, :2]
    k[table[1, :2]] = v[table[1, :2]] = 99.0  # nobody's any more
    assert torch.equal(decode(q, k, v, shared, lengths), apart)


@pytest.mark.parametrize("window", [None, 5])
def test_is_the_last_row_of_attention(window):
    """What is sampled from is what is trained: the cache gives the same output as the pack."""
    lengths = [6, 1, 13]
    q, k, v, table, lengths_B = cache(lengths, 4, 2, 8)
    packed = pack([[0] * length for length in lengths])
    keys, values = (
        torch.cat([pages[table[b]].transpose(1, 2).flatten(0, 1)[:length] for b, length in enumerate(lengths)])
        for pages in (k, v)
    )
    ends = packed.cu_seqlens[1:].long() - 1
    queries = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    queries[ends] = q
    whole = attention(queries, keys, values, packed.cu_seqlens, packed.prefixes_B, window=window)
    assert torch.allclose(decode(q, k, v, table, lengths_B, window=window), whole[ends], rtol=0, atol=1e-13)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    given = cache([6, 30, 1, 13], 4, 2, 8)
    together = decode(*given)
    q, k, v, table, lengths = given
    for b in range(4):
        alone = decode(q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1])
        assert torch.allclose(alone[0], together[b], rtol=0, atol=1e-13)


def test_non_contiguous_queries_and_tables():
    q, k, v, table, lengths = cache([6, 30, 1], 4, 2, 8)
    strided = torch.cat([q, q + 1], 1)[:, :4], k, v, table.t().contiguous().t(), lengths  # q as a slice of q, k and v
    assert not strided[0].is_contiguous() and not strided[3].is_contiguous()
    assert torch.equal(decode(*strided), decode(q, k, v, table, lengths))


# Faults that the tests above must see: each is our decode, asked for something slightly else


def one_token_more(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table, lengths + 1, window=window)


def one_token_less(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table, (lengths - 1).clamp(min=1), window=window)


def window_of_one_more(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table, lengths, window=window + 1)


def window_ignored(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table, lengths)


def pages_in_order_of_address(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table.sort(1).values, lengths, window=window)


def rows_mixed_up(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table.flip(0), lengths, window=window)


def heads_interleaved(q, k, v, table, lengths, *, window):
    repeats = q.shape[1] // k.shape[1]
    return decode(q, k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1), table, lengths, window=window)


def scale_forgotten(q, k, v, table, lengths, *, window):
    return decode(q, k, v, table, lengths, window=window, scale=1.0)


FAULTS = [one_token_more, one_token_less, window_of_one_more, window_ignored, pages_in_order_of_address]
FAULTS += [rows_mixed_up, heads_interleaved, scale_forgotten]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, dtype):
    with pytest.raises(AssertionError, match="error"):
        check(fault, cache([6, 30, 13], 4, 2, 8, dtype), window=9)
