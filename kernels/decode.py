"""Decoding attention: one query per sequence against the paged key/value cache.

Row b's keys are the first lengths[b] slots of its pages, in the order of its page table:

    o_b = sum_j softmax_j( scale q_b . k_j ) v_j,     j < lengths[b],     lengths[b] - 1 - j < window

Rows may share pages (a group's prompt stands once). Least traffic: every page once, 2 K E numbers a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_reference(q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None) -> Tensor:
    """Gather each row's pages side by side and attend under a length mask; see `decode` for the arguments."""
    rows, heads, size = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    keys, values = (pages[page_table].view(rows, -1, kv_heads, size).transpose(1, 2) for pages in (k_pages, v_pages))
    slots = torch.arange(page_table.shape[1] * page_size, device=q.device)
    seen = slots < lengths[:, None]
    if window is not None:
        seen &= slots >= lengths[:, None] - window
    out = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=seen[:, None, None], scale=scale, enable_gqa=heads != kv_heads
    )
    return out[:, :, 0]


def decode(q, k_pages, v_pages, page_table, lengths, *, scale=None, window=None) -> Tensor:
    """One step of decoding attention.

    q: (B, H, E).  k_pages, v_pages: (pages, page_size, K, E), slots at and beyond a row's length may hold anything finite.
    page_table: (B, M) int32 or int64, row b's pages in order; entries beyond its length may be any valid page.
    lengths: (B,) tokens of each row, the one being decoded included (its key and value are in the cache already).
    Returns (B, H, E) in q's dtype.
    """
    return decode_reference(q, k_pages, v_pages, page_table, lengths, scale=scale, window=window)
