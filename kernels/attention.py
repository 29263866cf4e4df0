"""Causal attention on packed tokens: grouped query heads, a sliding window, and prompts shared by their completions.

Segment b with prefix p attends to all of segment p, and causally to itself:

    o_i = sum_j p_ij v_j        p_i = softmax_j( scale q_i . k_j )        over j in prefix(b), or in b and j <= i,
                                                                         with position(i) - position(j) < window

so a group's prompt is computed once however many completions follow it. With upstream gradient do:

    dv_j = sum_i p_ij do_i                  ds_ij = p_ij (do_i . v_j - sum_l p_il do_i . v_l)
    dq_i = scale sum_j ds_ij k_j            dk_j = scale sum_i ds_ij q_i

The backward pass computes the shares again.
Least traffic: q, k, v in and o out, once. FLOPs forward: 4 E H per (query, key) pair; backward 2.5 times that.
On a GPU attention_triton.py computes this; attention_reference says what it is.

On a CPU what costs is many small calls, and PyTorch's own backward pass in bfloat16. So there the work is cut into
units, at most QUERIES queries of one segment with all keys that they may see, and units of about the same size are
computed together as one tile: their rows gathered side by side, short ones padded, in products batched over units and
key heads. How a pack is cut is worked out once for all layers.
"""

import math
from functools import lru_cache, reduce
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .targets import use_triton

QUERIES = 64  # of a unit: the more, the more scores are computed only to be masked
FIXED_QUERIES, FIXED_KEYS = 4, 64  # of every product in the deterministic mode
SCORES = 2**19  # of a tile, over all heads: what stays in cache


def attention_reference(q, k, v, cu_seqlens, prefixes_B, *, scale=None, window=None, lengths=None, prefixes=None):
    """A loop of PyTorch's own attention over segments; see `attention` for the arguments."""
    lengths = cu_seqlens.diff().tolist() if lengths is None else lengths
    prefixes = prefixes_B.tolist() if prefixes is None else prefixes
    qs, ks, vs = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))  # (heads, tokens, E) per segment
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    outs = []
    for b, (length, prefix) in enumerate(zip(lengths, prefixes)):
        keys, values, behind = ks[b], vs[b], 0
        if prefix >= 0:
            behind = lengths[prefix]
            keys, values = torch.cat([ks[prefix], keys], dim=1), torch.cat([vs[prefix], values], dim=1)
        mask, causal = None, behind == 0
        if behind or (window is not None and length > window):
            mask, causal = visible(length, behind, window, q.device), False
        out = F.scaled_dot_product_attention(qs[b][None], keys[None], values[None], mask, is_causal=causal, **options)
        outs.append(out[0])
    return torch.cat(outs, dim=1).transpose(0, 1) if outs else torch.empty_like(q)


def visible(length: int, behind: int, window: int | None, device) -> Tensor:
    """(length, behind + length) bool: which keys, `behind` of them before the segment, each of its queries may see."""
    places = torch.arange(behind + length, device=device)
    back = places[behind:, None] - places
    return back >= 0 if window is None else (back >= 0) & (back < window)


class Unit(NamedTuple):
    """Some queries of one segment and the keys that they see, which are counted by their place in the sequence."""

    keys: int  # how many
    queries: int  # for how many there is room: slots
    segment: int
    row: int  # the first slot's row among all queries
    place: int  # and its place
    first: int  # the slots from `first` to `end` hold queries
    end: int
    skipped: int  # how many keys are out of the window of all queries


class Tile(NamedTuple):
    """U units computed together, padded to M queries and N keys each. Rows are those of (T * K, ...) matrices."""

    query_rows: Tensor  # int64 (U * K * M,)
    out_rows: Tensor  # the same, but padding goes to row T * K, which is no token's
    key_rows: Tensor  # int64 (U * K * N,)
    bias: Tensor  # float32 (U, 1, M, 1, N), 0 where the query sees the key, else -inf


@lru_cache(maxsize=8)
def tiles(lengths: tuple, prefixes: tuple, window: int | None, heads: int, kv_heads: int, fixed=False) -> list[Tile]:
    """Cut a pack into tiles. fixed: into those of the deterministic mode."""
    starts = [0, *accumulate(lengths)]
    behind = [lengths[prefix] if prefix >= 0 else 0 for prefix in prefixes]
    address = torch.tensor([behind, [starts[p] for p in prefixes], [s - b for s, b in zip(starts, behind)]])

    def key_rows(segments, places):
        lengths_before, prefix_at, own_at = address[:, segments]
        return (torch.where(places < lengths_before, prefix_at, own_at) + places)[:, None] * kv_heads + head

    head = torch.arange(kv_heads)[:, None]
    with torch.inference_mode(False):  # made while sampling, they may serve a backward pass
        return _tiles(list(zip(starts, behind, lengths)), key_rows, window, heads, kv_heads, fixed)


def paged_tiles(
    starts, counts, page_table: Tensor, page_size: int, window: int | None, heads: int, kv_heads: int, fixed=False
) -> list[Tile]:
    """The same for counts[b] queries that follow starts[b] tokens of their sequence, whose keys are in pages: a key's
    row is that of the (pages * K * page_size, E) matrix. page_table: int64 (B, M), on the host."""

    def key_rows(segments, places):
        pages = page_table[segments, places // page_size]
        return (pages[:, None] * kv_heads + head) * page_size + (places % page_size)[:, None]

    head = torch.arange(kv_heads)[:, None]
    return _tiles(list(zip(accumulate(counts, initial=0), starts, counts)), key_rows, window, heads, kv_heads, fixed)


def _tiles(segments: list[tuple], key_rows, window: int | None, heads: int, kv_heads: int, fixed: bool) -> list[Tile]:
    """segments: of each its first query's row, that query's place in the sequence, and how many queries there are."""
    units, groups, rows = [], [], FIXED_QUERIES if fixed else QUERIES
    for b, (start, behind, length) in enumerate(segments):
        for at in range(-(behind % rows) if fixed else 0, length, rows):  # fixed: by place, wherever the segment begins
            first, end = max(0, -at), min(rows, length - at)
            skipped = 0 if window is None else max(0, behind + at - window + 1)
            keys = behind + at + end - skipped
            keys = keys + -keys % FIXED_KEYS if fixed else keys
            units.append(Unit(keys, rows if fixed else end, b, start + at, behind + at, first, end, skipped))
    for unit in sorted(units, reverse=True):
        if groups and _fits(unit, groups[-1], heads):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return [_tile(group, key_rows, window, kv_heads, sum(length for *_, length in segments)) for group in groups]


def _fits(unit: Unit, group: list[Unit], heads: int) -> bool:
    """Whether a unit may join the group: its tile stays in cache, and padding at most doubles the unit's scores."""
    padded = group[0].keys * max(other.queries for other in [*group, unit])
    return (len(group) + 1) * padded * heads <= SCORES and padded <= 2 * unit.keys * unit.queries


def _tile(units: list[Unit], key_rows, window: int | None, kv_heads: int, tokens: int) -> Tile:
    keys, queries, segment, row, place, first, end, skipped = torch.tensor(units).t()[:, :, None]  # (U, 1) each
    m, n = torch.arange(queries.max()), torch.arange(keys.max())
    slot = torch.minimum(torch.maximum(m, first), end - 1)  # padding repeats one of the unit's own
    back = (place + slot)[:, :, None] - (skipped + n)[:, None]  # (U, M, N) how far behind the query the key is
    hidden = (back < 0) | (back >= window) if window is not None else back < 0
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, :, None]
    query_rows = (row + slot)[:, None] * kv_heads + torch.arange(kv_heads)[:, None]
    out_rows = torch.where(((first <= m) & (m < end))[:, None], query_rows, tokens * kv_heads)
    places = torch.minimum(skipped + n, place + end - 1)
    return Tile(query_rows.flatten(), out_rows.flatten(), key_rows(segment, places).flatten(), bias)


def attend_tiles(
    q: Tensor, k_rows: Tensor, v_rows: Tensor, kv_heads: int, tiles: list[Tile], scale: float, fixed: bool = False
) -> Tensor:
    """(T, H, E) of queries (T, H, E), tile by tile. A row of theirs holds the H / K heads that read one key head."""
    (T, H, E), K = q.shape, kv_heads
    q_rows = q.reshape(T * K, H // K * E)
    out = q_rows.new_empty(T * K + 1, q_rows.shape[1])  # the last row is for padding
    for tile in tiles:
        batch = len(tile.bias) * K
        queries = q_rows.index_select(0, tile.query_rows).view(batch, -1, E)
        keys, values = (x.index_select(0, tile.key_rows).view(batch, -1, E) for x in (k_rows, v_rows))
        if fixed:
            means = _fixed_means(queries.float(), keys.float(), values.float(), tile.bias, scale).to(q.dtype)
        else:
            shares, total = _softmax(queries, keys, tile.bias, scale)
            means = torch.bmm(shares.to(q.dtype), values).div_(total)
        out.index_copy_(0, tile.out_rows, means.view(len(tile.out_rows), -1))
    return out[:-1].view(T, H, E)


class TiledAttention(torch.autograd.Function):
    """The formulas above."""

    @staticmethod
    def forward(ctx, q, k, v, tiles, scale, fixed_tiles):
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale = tiles, scale
        k_rows, v_rows = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])
        return attend_tiles(q, k_rows, v_rows, k.shape[1], fixed_tiles or tiles, scale, bool(fixed_tiles))

    @staticmethod
    def backward(ctx, d_out):
        q, k, v = ctx.saved_tensors
        (T, H, E), K = q.shape, k.shape[1]
        q_rows, k_rows, v_rows = q.reshape(T * K, H // K * E), k.reshape(T * K, E), v.reshape(T * K, E)
        d_out = F.pad(d_out.reshape(q_rows.shape), (0, 0, 0, 1))  # padding gets no gradient, so it gives none
        dq = torch.empty_like(d_out)
        dk, dv = (torch.zeros_like(k_rows, dtype=_stat_dtype(k)) for _ in range(2))
        for tile in ctx.tiles:
            batch = len(tile.bias) * K
            queries = q_rows.index_select(0, tile.query_rows).view(batch, -1, E)
            keys, values = (x.index_select(0, tile.key_rows).view(batch, -1, E) for x in (k_rows, v_rows))
            d_means = d_out.index_select(0, tile.out_rows).view(batch, -1, E)
            shares, total = _softmax(queries, keys, tile.bias, ctx.scale)
            shares.div_(total)
            d_values = torch.bmm(shares.to(q.dtype).transpose(1, 2), d_means)
            d_scores = torch.bmm(d_means, values.transpose(1, 2)).to(shares.dtype).mul_(shares)
            d_scores = d_scores.addcmul_(shares, d_scores.sum(-1, keepdim=True), value=-1).to(q.dtype)
            d_keys = torch.bmm(d_scores.transpose(1, 2), queries)
            dq.index_copy_(0, tile.out_rows, torch.bmm(d_scores, keys).view(len(tile.out_rows), -1))
            dk.index_add_(0, tile.key_rows, d_keys.view(-1, E).to(dk.dtype))
            dv.index_add_(0, tile.key_rows, d_values.view(-1, E).to(dv.dtype))
        dq, dk = dq[:-1].mul_(ctx.scale), dk.mul_(ctx.scale)
        return dq.view(T, H, E), dk.view(T, K, E).to(k.dtype), dv.view(T, K, E).to(v.dtype), None, None, None


def _softmax(queries: Tensor, keys: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exponentials of scores less their largest, (U * K, M * H / K, N) float32, and their sums over the keys."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).to(_stat_dtype(queries))
    by_query = scores.view(len(bias), -1, bias.shape[2], scores.shape[1] // bias.shape[2], scores.shape[2])
    torch.add(bias, by_query, alpha=scale / math.log(2), out=by_query)
    exponentials = scores.sub_(scores.amax(-1, keepdim=True)).exp2_()  # on a CPU exp2 is 2.5 times as fast as exp
    return exponentials, exponentials.sum(-1, keepdim=True)


def _fixed_means(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The deterministic mode: a product is of so many queries and keys, and blocks of keys follow each other in order.

    A query always stands in the same row of its product, by its place, and a key in the same column. A block that a
    query does not see adds exact zeros. So its bits are those of any pack, chunk or step that it stands in.
    """
    by_block = []
    for k, hidden in zip(keys.split(FIXED_KEYS, dim=1), bias.split(FIXED_KEYS, dim=-1)):
        scores = torch.bmm(queries, k.transpose(1, 2))
        by_query = scores.view(len(bias), -1, bias.shape[2], scores.shape[1] // bias.shape[2], scores.shape[2])
        torch.add(hidden, by_query, alpha=scale, out=by_query)
        by_block.append(scores)
    highest = reduce(torch.maximum, [scores.amax(-1, keepdim=True) for scores in by_block])
    shares = [scores.sub_(highest).exp_() for scores in by_block]
    total = reduce(torch.add, [share.sum(-1, keepdim=True) for share in shares])
    parts = [torch.bmm(share, v) for share, v in zip(shares, values.split(FIXED_KEYS, dim=1))]
    return reduce(torch.add, parts).div_(total)


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attention(
    q, k, v, cu_seqlens, prefixes_B, *, scale=None, window=None, lengths=None, prefixes=None, deterministic=False
) -> Tensor:
    """Attention over packed segments.

    q: (T, H, E).  k, v: (T, K, E), K divides H; query head h reads key head h // (H // K).
    cu_seqlens: (B + 1,) int32.  prefixes_B: (B,) int32, the segment in front of each, or -1 (`Pack.prefixes_B`).
    scale: by default E ** -0.5.  window: how many tokens back a query sees, itself counted; None = all.
    lengths, prefixes: the host's copies of the two integer tensors, so that nothing waits for the device.
    deterministic: a token has the same bits in any pack, and from the paged cache (on a GPU it has them always).
    Returns (T, H, E) in q's dtype.
    """
    lengths = tuple(cu_seqlens.diff().tolist() if lengths is None else lengths)
    prefixes = tuple(prefixes_B.tolist() if prefixes is None else prefixes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton(q):
        from . import attention_triton

        return attention_triton.attention(q, k, v, lengths, prefixes, scale=scale, window=window)
    if q.device.type != "cpu":
        options = {"scale": scale, "window": window, "lengths": lengths, "prefixes": prefixes}
        return attention_reference(q, k, v, cu_seqlens, prefixes_B, **options)
    layout = lengths, prefixes, window, q.shape[1], k.shape[1]
    return TiledAttention.apply(q, k, v, tiles(*layout), scale, tiles(*layout, True) if deterministic else None)
