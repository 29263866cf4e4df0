"""Attention against the paged key/value cache: one query per sequence (`decode`), or a chunk of a prompt (`extend`).

Row b's keys are the first lengths[b] slots of its pages, in the order of its page table:

    o_b = sum_j softmax_j( scale q_b . k_j ) v_j,     j < lengths[b],     lengths[b] - 1 - j < window

Rows may share pages (a group's prompt stands once). Within a page one head's tokens lie side by side, so that what a
kernel reads at once, one head of one page, is one piece of memory. Least traffic: every page once, 2 K E numbers a
token. On a GPU decode_triton.py computes this.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import attend_tiles, paged_tiles
from .targets import use_triton


class Layout(NamedTuple):
    """What `decode_reference` reads and hides."""

    page_rows: Tensor  # int64 (B * K * M,) rows of the (pages * K, page_size * E) matrix of pages
    bias: Tensor  # (B * K, 1, M * page_size), 0 for a slot that is seen, else -inf


def make_layout(page_table, lengths, kv_heads: int, page_size: int, window: int | None, dtype):
    """What `decode` needs to know beside the queries, worked out once a step for all layers; see there."""
    if use_triton(page_table):
        from . import decode_triton

        return decode_triton.sharing(page_table, lengths, page_size)
    return reference_layout(page_table, lengths, kv_heads, page_size, window, dtype)


def reference_layout(page_table, lengths, kv_heads: int, page_size: int, window: int | None, dtype) -> Layout:
    heads = torch.arange(kv_heads, device=page_table.device)[:, None]
    slots = torch.arange(page_table.shape[1] * page_size, device=page_table.device)
    hidden = slots >= lengths[:, None]
    if window is not None:
        hidden |= slots < lengths[:, None] - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return Layout((page_table[:, None] * kv_heads + heads).flatten(), bias.repeat_interleave(kv_heads, dim=0)[:, None])


def decode_reference(q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None, layout=None) -> Tensor:
    """Gather each row's pages side by side and attend under a length mask; see `decode` for the arguments.

    Two batched products with the H / K query heads of a key head as rows: on a CPU up to six times as fast as PyTorch's
    attention, which is made for many queries. The softmax computes in float32 at least, and rounds to q's dtype.
    """
    (rows, heads, size), (kv_heads, page_size) = q.shape, k_pages.shape[1:3]
    scale = size**-0.5 if scale is None else scale
    page_rows, bias = layout or reference_layout(page_table, lengths, kv_heads, page_size, window, q.dtype)
    gathered = (x.view(-1, page_size * size).index_select(0, page_rows) for x in (k_pages, v_pages))
    keys, values = (x.view(rows * kv_heads, -1, size) for x in gathered)
    scores = torch.baddbmm(bias, q.reshape(rows * kv_heads, -1, size), keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(rows, heads, size)


def decode(
    q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None, layout=None, deterministic=False
) -> Tensor:
    """One step of decoding attention.

    q: (B, H, E).  k_pages, v_pages: (pages, K, page_size, E); slots beyond a row's length may hold anything finite.
    page_table: (B, M) int32 or int64, row b's pages in order; entries beyond its length may be any valid page.
    lengths: (B,) tokens of each row, the one being decoded included (its key and value are in the cache already).
    layout: `make_layout` of the same; by default it is made.
    deterministic: each row has the bits that the attention kernel gives the same query in a pack; slower.
    Returns (B, H, E) in q's dtype.
    """
    if use_triton(q):
        from . import decode_triton

        options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "window": window, "shared": layout}
        return decode_triton.decode(q, k_pages, v_pages, page_table, lengths, deterministic=deterministic, **options)
    if deterministic:
        raise ValueError("decode: deterministic needs the Triton kernels, plain PyTorch has not the bits of attention")
    options = {"scale": scale, "window": window, "layout": layout}
    return decode_reference(q, k_pages, v_pages, page_table, lengths, **options)


def make_chunks(starts, counts, page_table, k_pages, heads: int, window: int | None, deterministic: bool = False):
    """What `extend` needs to know, worked out once a step for all layers: counts[b] queries behind starts[b] tokens.

    starts, counts: ints on the host.  page_table: int64 (B, M), on the host too.  k_pages: any layer's.
    """
    if use_triton(k_pages):
        from . import decode_triton

        return decode_triton.chunk_tiles(starts, counts, page_table.tolist(), k_pages)
    return paged_tiles(starts, counts, page_table, k_pages.shape[2], window, heads, k_pages.shape[1], deterministic)


def extend(q, k_pages, v_pages, chunks, *, scale=None, window=None, deterministic=False) -> Tensor:
    """Attention of several queries a sequence, a chunk of its prompt, against all that the cache holds before each.

    q: (T, H, E), the rows' queries end to end, their own keys and values in the cache already.  chunks: `make_chunks`.
    deterministic: with the bits that `attention` gives the query in a pack, if so asked, too; always on a GPU.
    Returns (T, H, E) in q's dtype.
    """
    kv_heads, _, size = k_pages.shape[1:]
    scale = size**-0.5 if scale is None else scale
    if use_triton(q):
        from . import decode_triton

        return decode_triton.extend(q, k_pages, v_pages, *chunks, scale=scale, window=window)
    return attend_tiles(q, k_pages.view(-1, size), v_pages.view(-1, size), kv_heads, chunks, scale, deterministic)
