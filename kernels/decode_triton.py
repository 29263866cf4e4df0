"""Decoding attention in Triton: the keys of a row in pieces of fixed size, folded in order.

    split   per piece of SPLIT tokens and key head, over the tokens j of the piece that the row sees:
                m = max_j s_j      l = sum 2^(s_j - m)      o = sum 2^(s_j - m) v_j         s = scale q k, in base 2
    fold    per row and query head, over its pieces from the left:
                m' = max(m, m_i)   l = 2^(m - m') l + 2^(m_i - m') l_i    and o likewise;     out = o / l

The queries of a tile are the H / K heads of a group, of as many rows as there is room for, ROWS: rows that read the
same pages in a piece stand in one tile, and those pages are read once. `sharing` finds them on the device, once a
step: in each piece it sorts the rows by their pages and numbers those that are alike. A row alone has the same tile
with the other queries empty, so its bits depend neither on its neighbours nor on how many pieces they have.

Least traffic in bytes, b a number: b 2 K E a token in the cache, those in shared pages counted once, b 2 B H E for
queries and outputs. Workspace: 4 (E + 2) B H a piece, written and read once, at SPLIT 256 less than a tenth of a row's
own keys and values.

In the deterministic form each row is a tile of the attention kernel, with one query: the same binary and the same
blocks of keys as in training, so the same bits. Its pages are copied side by side for that.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import attention_triton
from .attention_triton import LOG2_E, LOWEST
from .targets import config

SPLIT = 256  # tokens a piece, or the largest multiple of the page size below; never a function of the batch
GATHERED = 2**28  # bytes of keys, and of values, that the deterministic form copies at once


@triton.jit(do_not_specialize=["B", "q_stride", "table_stride", "window"])
def decode_split_kernel(
    q, k_pages, v_pages, table, lengths, order, rank, best, total, out, B, q_stride, table_stride, page_stride, scale,
    window, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one piece, one key head, up to ROWS rows that read the same pages; the first of them runs it."""
    G: tl.constexpr = H // K
    ROWS: tl.constexpr = QUERIES // G
    kv_head, place = tl.program_id(0) % K, tl.program_id(0) // K % B
    split = tl.program_id(0) // K // B
    order, rank = order + split * B, rank + split * B
    number, leader = tl.load(rank + place), tl.load(order + place)
    if number % ROWS == 0 and split * SPLIT < tl.load(lengths + leader):
        m, n, e = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, E)
        member = m // G
        other = place + member
        valid = (member < ROWS) & (other < B)
        valid = valid & (tl.load(rank + other, mask=valid, other=-1) == number + member)
        row = tl.load(order + other, mask=valid, other=0).to(tl.int64)
        head = kv_head * G + m % G
        length = tl.load(lengths + row, mask=valid, other=0).to(tl.int32)
        q_tile = tl.load(
            q + (row * q_stride + head * E)[:, None] + e[None, :], mask=valid[:, None], other=0.0
        )  # [QUERIES, E]
        m_tile, l_tile = tl.full((QUERIES,), LOWEST, tl.float32), tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, E), tl.float32)
        scale *= LOG2_E
        first, end = split * SPLIT, tl.minimum(tl.max(length, 0), split * SPLIT + SPLIT)
        if WINDOW:  # blocks that none of the rows sees
            oldest = tl.min(tl.where(valid, length, 2**30), 0) - window
            first += tl.maximum(oldest - first, 0) // KEYS * KEYS
        for at in range(first, end, KEYS):
            keys = at + n
            inside = keys < end
            page = tl.load(table + leader * table_stride + keys // PAGE, mask=inside, other=0).to(tl.int64)
            offset = (page * page_stride + (kv_head * PAGE + keys % PAGE) * E)[:, None] + e[None, :]
            k_block = tl.load(k_pages + offset, mask=inside[:, None], other=0.0)  # [KEYS, E]
            scores = tl.dot(q_tile, tl.trans(k_block), input_precision="ieee")  # [QUERIES, KEYS]
            seen = inside[None, :]
            if WINDOW:
                seen = seen & (length[:, None] - 1 - keys[None, :] < window)
            scores = tl.where(seen, scores, -float("inf"))
            new = tl.maximum(m_tile, tl.max(scores, 1))
            shares = tl.exp2(tl.fma(scores, scale, -(new * scale)[:, None]))
            keep = tl.exp2((m_tile - new) * scale)
            v_block = tl.load(v_pages + offset, mask=inside[:, None], other=0.0)  # [KEYS, E]
            acc = tl.dot(shares.to(v_block.dtype), v_block, acc * keep[:, None], input_precision="ieee")
            m_tile, l_tile = new, l_tile * keep + tl.sum(shares, 1)
        at = (split.to(tl.int64) * B + row) * H + head
        tl.store(best + at, m_tile * scale, mask=valid)
        tl.store(total + at, l_tile, mask=valid)
        tl.store(out + at[:, None] * E + e[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["B", "window"])
def decode_fold_kernel(
    best, total, parts, out, lengths, B, window,
    H: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A program: one row, one query head. It folds PIECES pieces at a time, to wait for memory less often."""
    row, head, e = tl.program_id(0) // H, tl.program_id(0) % H, tl.arange(0, E)
    length = tl.load(lengths + row).to(tl.int32)
    first = tl.maximum(length - window, 0) // SPLIT if WINDOW else 0
    last = tl.cdiv(length, SPLIT)
    m, l, acc = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((E,), tl.float32)
    for at in range(first // PIECES * PIECES, last, PIECES):
        piece = at + tl.arange(0, PIECES)
        valid = (piece >= first) & (piece < last)
        place = (piece.to(tl.int64) * B + row) * H + head
        m_pieces = tl.load(best + place, mask=valid, other=-float("inf"))
        new = tl.maximum(m, tl.max(m_pieces, 0, keep_dims=True))
        keep, share = tl.exp2(m - new), tl.exp2(m_pieces - new)
        l = l * keep + tl.sum(tl.load(total + place, mask=valid, other=0.0) * share, 0, keep_dims=True)
        o_pieces = tl.load(parts + place[:, None] * E + e[None, :], mask=valid[:, None], other=0.0)  # [PIECES, E]
        acc = acc * keep + tl.sum(o_pieces * share[:, None], 0)
        m = new
    tl.store(out + tl.program_id(0).to(tl.int64) * E + e, (acc / l).to(out.dtype.element_ty))


def split_size(page_size: int) -> int:
    """Tokens of a piece, in whole pages."""
    return max(page_size, SPLIT // page_size * page_size)


def tiling(size: int, dtype: torch.dtype) -> str:
    """The name in CONFIGS of the split kernel's tiles."""
    return f"decode_split/{max(size, 64)}" + ("/float32" if dtype == torch.float32 else "")


def sharing(page_table: Tensor, lengths: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Per piece, the rows in an order that puts those with the same pages side by side, and each one's number among
    its likes: int32 (pieces, B) both. A piece that a row does not fill is that row's alone."""
    B, M = page_table.shape
    pages = split_size(page_size) // page_size
    pieces = F.pad(page_table, (0, -M % pages)).view(B, -1, pages)
    ends = torch.arange(1, pieces.shape[1] + 1, device=lengths.device) * split_size(page_size)
    full, rows = lengths[:, None] >= ends, torch.arange(B, device=lengths.device)[:, None]
    order = torch.where(full, pieces[:, :, 0], -1 - rows).argsort(dim=0, stable=True)  # (B, pieces)
    ordered = pieces.gather(0, order[:, :, None].expand_as(pieces))
    alike = F.pad((ordered[1:] == ordered[:-1]).all(-1), (0, 0, 1, 0)) & full.gather(0, order)
    alike[1:] &= full.gather(0, order)[:-1]
    begins = torch.where(alike, 0, rows).cummax(0).values
    return order.t().int().contiguous(), (rows - begins).t().int().contiguous()


@torch.library.custom_op("minitrl::decode", mutates_args=())
def decode_pieces(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, order: Tensor, rank: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """decode by pieces and fold; order and rank from `sharing`."""
    (B, H, E), (K, page_size) = q.shape, k_pages.shape[1:3]
    assert k_pages[0].is_contiguous() and k_pages.stride() == v_pages.stride(), (k_pages.stride(), v_pages.stride())
    q, page_table, out = attention_triton.rows_of(q), page_table.contiguous(), q.new_empty(B, H, E)
    best, total = (q.new_empty(len(order), B, H, dtype=torch.float32) for _ in range(2))
    parts = q.new_empty(len(order), B, H, E, dtype=torch.float32)
    shape = dict(H=H, E=E, SPLIT=split_size(page_size), WINDOW=window is not None, enable_fp_fusion=False)
    decode_split_kernel[len(order) * B * K,](
        q, k_pages, v_pages, page_table, lengths, order, rank, best, total, parts, B, q.stride(0),
        page_table.stride(0), k_pages.stride(0), scale, window or 0,
        K=K, PAGE=page_size, **shape, **config(tiling(E, q.dtype)),
    )  # fmt: skip
    decode_fold_kernel[B * H,](best, total, parts, out, lengths, B, window or 0, **shape, **config("decode_fold"))
    return out


@torch.library.custom_op("minitrl::decode_as_attention", mutates_args=())
def decode_as_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float, window: int | None
) -> Tensor:
    """decode in the deterministic form: each row a tile of the attention kernel."""
    (B, H, E), (K, page_size) = q.shape, k_pages.shape[1:3]
    slots, out = page_table.shape[1] * page_size, q.new_empty(B, H, E)
    at_once = max(1, GATHERED // (slots * K * E * q.element_size()))
    for first in range(0, B, at_once):
        some = slice(first, first + at_once)
        k, v = (x.transpose(1, 2)[page_table[some]].reshape(-1, K, E) for x in (k_pages, v_pages))
        rows = torch.arange(len(q[some]), device=q.device)
        columns = rows, torch.ones_like(rows), lengths[some] - 1, torch.zeros_like(rows), rows * slots
        tiles = torch.stack([*columns, torch.zeros_like(rows)], 1).int()  # as of query_tiles
        tiled = config(attention_triton.tiling("fwd", q.dtype, E))
        queries = attention_triton.rows_of(q[some])
        out[some], _ = attention_triton.launch_forward(queries, k, v, tiles, scale, window, tiled)
    return out


@decode_pieces.register_fake
@decode_as_attention.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


def decode(q, k_pages, v_pages, page_table, lengths, *, scale: float, window, shared, deterministic: bool) -> Tensor:
    """See decode.py."""
    attention_triton.check(q, k_pages, v_pages, scale)
    if not len(q):
        return torch.empty_like(q)
    if deterministic:
        return decode_as_attention(q, k_pages, v_pages, page_table, lengths, scale, window)
    group, most = q.shape[1] // k_pages.shape[1], config(tiling(q.shape[2], q.dtype))["QUERIES"]
    if group > most:
        raise ValueError(f"decode: a tile has no room for the {group} query heads of a key head, only for {most}; "
                         "set MINITRL_KERNELS=reference")  # fmt: skip
    order, rank = sharing(page_table, lengths, k_pages.shape[2]) if shared is None else shared
    return decode_pieces(q, k_pages, v_pages, page_table, lengths, order, rank, scale, window)


def chunk_tiles(starts, counts, page_table: list, k_pages: Tensor) -> tuple[Tensor, Tensor]:
    """The pages that `extend` copies side by side, and the attention kernel's tiles of queries."""
    tiled, page_size = config(attention_triton.tiling("fwd", k_pages.dtype, k_pages.shape[3])), k_pages.shape[2]
    pages, tiles = [], []
    for at, start, count, table in zip(accumulate(counts, initial=0), starts, counts, page_table):
        own_at = len(pages) * page_size
        pages += table[: -(-(start + count) // page_size)]
        for first in range(0, count, tiled["QUERIES"]):
            rows = min(tiled["QUERIES"], count - first)
            tiles.append((at + first, rows, start + first, 0, own_at, 0))  # as of query_tiles
    device = k_pages.device
    return torch.tensor(pages).to(device), torch.tensor(tiles, dtype=torch.int32).to(device)


def extend(q, k_pages, v_pages, pages: Tensor, tiles: Tensor, *, scale: float, window) -> Tensor:
    """See decode.py."""
    attention_triton.check(q, k_pages, v_pages, scale)
    (K, _, E), tiled = k_pages.shape[1:], config(attention_triton.tiling("fwd", q.dtype, q.shape[2]))
    k, v = (x.index_select(0, pages).transpose(1, 2).reshape(-1, K, E) for x in (k_pages, v_pages))
    return attention_triton.launch_forward(attention_triton.rows_of(q), k, v, tiles, scale, window, tiled)[0]
