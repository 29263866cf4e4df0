"""Causal attention on packed tokens, with grouped query heads, a sliding window, and prompts that are shared by their completions.

Segment b with prefix p attends to all of segment p, and causally to itself:

    o_i = sum_j softmax_j( scale q_i . k_j ) v_j,     j in prefix(b) or (j in b and j <= i),     position(i) - position(j) < window

so a group's prompt is computed once however many completions follow it. Least traffic: q, k, v in and o out, once.
FLOPs forward: 4 E H per (query, key) pair that is attended to; backward 2.5 times that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(q, k, v, cu_seqlens, prefixes_B, *, scale=None, window=None, lengths=None, prefixes=None):
    """A loop of PyTorch's own attention over segments; see `attention` for the arguments."""
    lengths = cu_seqlens.diff().tolist() if lengths is None else lengths
    prefixes = prefixes_B.tolist() if prefixes is None else prefixes
    qs, ks, vs = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))  # (heads, tokens, E) per segment
    outs = []
    for b, (length, prefix) in enumerate(zip(lengths, prefixes)):
        keys, values, behind = ks[b], vs[b], 0
        if prefix >= 0:
            behind = lengths[prefix]
            keys, values = torch.cat([ks[prefix], keys], dim=1), torch.cat([vs[prefix], values], dim=1)
        mask, causal = None, behind == 0
        if behind or (window is not None and length > window):
            mask, causal = visible(length, behind, window, q.device), False
        outs.append(
            F.scaled_dot_product_attention(
                qs[b][None], keys[None], values[None], attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )[0]
        )
    return torch.cat(outs, dim=1).transpose(0, 1) if outs else torch.empty_like(q)


def visible(length: int, behind: int, window: int | None, device) -> Tensor:
    """(length, behind + length) bool: which keys, `behind` of them in front of the segment, each of its queries may see."""
    distance = torch.arange(behind, behind + length, device=device)[:, None] - torch.arange(behind + length, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attention(q, k, v, cu_seqlens, prefixes_B, *, scale=None, window=None, lengths=None, prefixes=None) -> Tensor:
    """Attention over packed segments.

    q: (T, H, E).  k, v: (T, K, E), K divides H; query head h reads key head h // (H // K).
    cu_seqlens: (B + 1,) int32.  prefixes_B: (B,) int32, the segment in front of each, or -1 (`Pack.prefixes_B`).
    scale: by default E ** -0.5.  window: how many tokens back a query sees, itself counted; None = all.
    lengths, prefixes: the host's copies of the two integer tensors, so that nothing waits for the device.
    Returns (T, H, E) in q's dtype.
    """
    return attention_reference(q, k, v, cu_seqlens, prefixes_B, scale=scale, window=window, lengths=lengths, prefixes=prefixes)
