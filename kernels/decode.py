"""Decoding attention: one query per sequence against the paged key/value cache.

Row b's keys are the first lengths[b] slots of its pages, in the order of its page table:

    o_b = sum_j softmax_j( scale q_b . k_j ) v_j,     j < lengths[b],     lengths[b] - 1 - j < window

Rows may share pages (a group's prompt stands once). Within a page one head's tokens lie side by side, so that what a
kernel reads at once, one head of one page, is one piece of memory. Least traffic: every page once, 2 K E numbers a
token. On a GPU decode_triton.py computes this.
"""

import torch
from torch import Tensor

from .targets import use_triton


def decode_reference(q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None) -> Tensor:
    """Gather each row's pages side by side and attend under a length mask; see `decode` for the arguments.

    Two batched products with the H / K query heads of a key head as rows: on a CPU up to six times as fast as PyTorch's
    attention, which is made for many queries. The softmax computes in float32 at least, and rounds to q's dtype.
    """
    (rows, heads, size), (kv_heads, page_size) = q.shape, k_pages.shape[1:3]
    scale = size**-0.5 if scale is None else scale
    table = page_table[:, None] * kv_heads + torch.arange(kv_heads, device=q.device)[:, None]  # (B, K, M) heads' pages
    gathered = (x.view(-1, page_size * size).index_select(0, table.flatten()) for x in (k_pages, v_pages))
    keys, values = (x.view(rows * kv_heads, -1, size) for x in gathered)
    slots = torch.arange(page_table.shape[1] * page_size, device=q.device)
    hidden = slots >= lengths[:, None]
    if window is not None:
        hidden |= slots < lengths[:, None] - window
    scores = torch.bmm(q.reshape(rows * kv_heads, -1, size) * scale, keys.transpose(1, 2)).view(rows, heads, -1)
    shares = scores.masked_fill_(hidden[:, None], -torch.inf).softmax(-1)
    return torch.bmm(shares.view(rows * kv_heads, -1, shares.shape[-1]), values).view(rows, heads, size)


def sharing(page_table: Tensor, lengths: Tensor, page_size: int) -> tuple[Tensor, Tensor] | None:
    """Which rows read the same pages: worked out once a step for all layers. None where plain PyTorch runs."""
    if not use_triton(page_table):
        return None
    from . import decode_triton

    return decode_triton.sharing(page_table, lengths, page_size)


def decode(
    q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None, shared=None, deterministic=False
) -> Tensor:
    """One step of decoding attention.

    q: (B, H, E).  k_pages, v_pages: (pages, K, page_size, E); slots beyond a row's length may hold anything finite.
    page_table: (B, M) int32 or int64, row b's pages in order; entries beyond its length may be any valid page.
    lengths: (B,) tokens of each row, the one being decoded included (its key and value are in the cache already).
    shared: what `sharing` returned for this table and these lengths; by default it is asked.
    deterministic: each row has the bits that the attention kernel gives the same query in a pack; slower.
    Returns (B, H, E) in q's dtype.
    """
    if use_triton(q):
        from . import decode_triton

        options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "window": window, "shared": shared}
        return decode_triton.decode(q, k_pages, v_pages, page_table, lengths, deterministic=deterministic, **options)
    if deterministic:
        raise ValueError("decode: deterministic needs the Triton kernels, plain PyTorch has not the bits of attention")
    return decode_reference(q, k_pages, v_pages, page_table, lengths, scale=scale, window=window)
