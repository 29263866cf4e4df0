"""Attention on packed tokens in Triton: the formulas of attention.py, each score computed in a tile that nobody stores.

A query's keys are counted by their place in its own sequence, prefix first: place j is token prefix_at + j of the pack
while j < behind (the prefix's length), and token own_at + j after that. Blocks of keys begin at places 0, KEYS, 2 KEYS
..., and within a block what a query may not see has score -inf, so adds exact zeros. Hence a row's bits are those of
the row alone, of the row behind a repeated prompt instead of a shared one, and of any other tile that it stands in.

    forward    per tile of queries and head, with m the running maximum (s is the score, scale q k, in base 2):
               m' = max(m, max_j s_j)   p_j = 2^(s_j - m')   c = 2^(m - m')   l = c l + sum p_j   o = c o + sum p_j v_j
               out = o / l              lse = m + log2 l
    dQ         p_j = 2^(s_j - lse)      delta = do . out     ds_j = p_j (do . v_j - delta)     dq = scale sum ds_j k_j
    dK, dV     per tile of keys and key head: the same p and ds, summed over all queries that see the tile, those of
               the segment itself and then those of its completions, and over the query heads of the group. One
               program does all of that, so there is one order of summation, no atomics, and no buffer per head.

Least traffic in bytes, b a number, with statistics of 4: forward b T (2 H + 2 K) E + 4 T H. dQ, which also leaves delta
for the next, b T (4 H + 2 K) E + 8 T H. dK and dV b T (2 H + 4 K) E + 8 T H. FLOPs per (query, key) pair and head:
4 E, 6 E, 8 E; tiles compute at most QUERIES + KEYS pairs a query more than it sees.
Tiles are listed on the host, longest first, so that the last programs to run are short; a list serves all layers.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .targets import config

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # the maximum of nothing: finite, so that LOWEST - LOWEST is 0 and -inf - LOWEST is -inf


@triton.jit
def _offsets(at, n, stride, prefix_at, own_at, behind):
    """Where the tokens at places at + n of a sequence begin, tokens being `stride` numbers apart: int64, n's shape."""
    return (tl.where(at + n < behind, prefix_at, own_at) + at + n).to(tl.int64) * stride


@triton.jit
def _hide(scores, queries, keys, window, WINDOW: tl.constexpr):
    """-inf where the query, by its place, does not see the key. Both broadcast to the shape of the scores."""
    seen = queries >= keys
    if WINDOW:
        seen = seen & (queries - keys < window)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def _key_range(position, rows, window, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Places [first, full, end): of the blocks that a tile of queries reads, those before `full` need no mask."""
    end = position + rows
    if WINDOW:
        first = tl.maximum(position - window + 1, 0) // KEYS * KEYS
        return first, first, end
    return 0, (position + 1) // KEYS * KEYS, end


@triton.jit
def _forward_block(
    q, best, total, out, k, v, k_stride, v_stride, at, queries, end, prefix_at, own_at, behind, scale, window,
    E: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: the new maximum, sum and output of the queries."""
    n, e = tl.arange(0, KEYS), tl.arange(0, E)[None, :]
    inside = (at + n < end)[:, None] if MASKED else None
    k += _offsets(at, n, k_stride, prefix_at, own_at, behind)[:, None]
    v += _offsets(at, n, v_stride, prefix_at, own_at, behind)[:, None]
    k_block = tl.load(k + e, mask=inside, other=0.0 if MASKED else None)  # [KEYS, E]
    scores = tl.dot(q, tl.trans(k_block), input_precision="ieee")  # [QUERIES, KEYS]
    if MASKED:
        scores = _hide(scores, queries[:, None], (at + n)[None, :], window, WINDOW)
    new = tl.maximum(best, tl.max(scores, 1))
    # A written-out fma: with and without the mask in between, the compiler must round the same way.
    shares = tl.exp2(tl.fma(scores, scale, -(new * scale)[:, None]))
    keep = tl.exp2((best - new) * scale)
    v_block = tl.load(v + e, mask=inside, other=0.0 if MASKED else None)  # [KEYS, E]
    out = tl.dot(shares.to(v_block.dtype), v_block, out * keep[:, None], input_precision="ieee")
    return new, total * keep + tl.sum(shares, 1), out


@triton.jit(do_not_specialize=["tokens", "window"])
def attention_fwd_kernel(
    q, k, v, out, lse, tiles, q_stride, k_stride, v_stride, tokens, scale, window,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries, one head. Heads are neighbours, so that those of a group find keys in cache."""
    tile, head = tiles + tl.program_id(0) // H * 6, tl.program_id(0) % H
    query_at, rows, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    prefix_at, own_at, behind = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    k += head // (H // K) * E
    v += head // (H // K) * E
    m, e = tl.arange(0, QUERIES), tl.arange(0, E)[None, :]
    row = (query_at + m).to(tl.int64)
    q_tile = tl.load(q + row[:, None] * q_stride + head * E + e, mask=(m < rows)[:, None], other=0.0)  # [QUERIES, E]
    best, total = tl.full((QUERIES,), LOWEST, tl.float32), tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, E), tl.float32)
    scale *= LOG2_E
    first, full, end = _key_range(position, rows, window, KEYS, WINDOW)
    for at in range(first, full, KEYS):
        best, total, acc = _forward_block(
            q_tile, best, total, acc, k, v, k_stride, v_stride, at, position + m, end, prefix_at, own_at, behind,
            scale, window, E, KEYS, WINDOW, MASKED=False,
        )  # fmt: skip
    for at in range(full, end, KEYS):
        best, total, acc = _forward_block(
            q_tile, best, total, acc, k, v, k_stride, v_stride, at, position + m, end, prefix_at, own_at, behind,
            scale, window, E, KEYS, WINDOW, MASKED=True,
        )  # fmt: skip
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * (H * E) + head * E + e, acc, mask=(m < rows)[:, None])
    # Not an fma: the shares were taken relative to the product as it is rounded.
    tl.store(lse + head.to(tl.int64) * tokens + row, best * scale + tl.log2(total), mask=m < rows)


@triton.jit
def _dq_block(
    q, d_out, lse, delta, dq, k, v, k_stride, v_stride, at, queries, end, prefix_at, own_at, behind, scale, window,
    E: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the gradient of the queries."""
    n, e = tl.arange(0, KEYS), tl.arange(0, E)[None, :]
    inside = (at + n < end)[:, None] if MASKED else None
    k += _offsets(at, n, k_stride, prefix_at, own_at, behind)[:, None]
    v += _offsets(at, n, v_stride, prefix_at, own_at, behind)[:, None]
    k_block = tl.load(k + e, mask=inside, other=0.0 if MASKED else None)  # [KEYS, E]
    v_block = tl.load(v + e, mask=inside, other=0.0 if MASKED else None)  # [KEYS, E]
    scores = tl.dot(q, tl.trans(k_block), input_precision="ieee")  # [QUERIES, KEYS]
    if MASKED:
        scores = _hide(scores, queries[:, None], (at + n)[None, :], window, WINDOW)
    shares = tl.exp2(tl.fma(scores, scale, -lse[:, None]))
    d_shares = tl.dot(d_out, tl.trans(v_block), input_precision="ieee")
    d_scores = shares * (d_shares - delta[:, None])
    return tl.dot(d_scores.to(k_block.dtype), k_block, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "window"])
def attention_dq_kernel(
    q, k, v, out, d_out, lse, delta, dq, tiles, q_stride, k_stride, v_stride, d_stride, tokens, scale, window,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one tile of queries, one head. It leaves delta for the kernel of dK and dV."""
    tile, head = tiles + tl.program_id(0) // H * 6, tl.program_id(0) % H
    query_at, rows, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    prefix_at, own_at, behind = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    k += head // (H // K) * E
    v += head // (H // K) * E
    m, e = tl.arange(0, QUERIES), tl.arange(0, E)[None, :]
    row, valid = (query_at + m).to(tl.int64), (m < rows)[:, None]
    d_tile = tl.load(d_out + row[:, None] * d_stride + head * E + e, mask=valid, other=0.0)  # [QUERIES, E]
    out_tile = tl.load(out + row[:, None] * (H * E) + head * E + e, mask=valid, other=0.0)
    delta_tile = tl.sum(out_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
    statistic = head.to(tl.int64) * tokens + row
    tl.store(delta + statistic, delta_tile, mask=m < rows)
    lse_tile = tl.load(lse + statistic, mask=m < rows, other=0.0)
    q_tile = tl.load(q + row[:, None] * q_stride + head * E + e, mask=valid, other=0.0)  # [QUERIES, E]
    acc = tl.zeros((QUERIES, E), tl.float32)
    scale_2 = scale * LOG2_E
    first, full, end = _key_range(position, rows, window, KEYS, WINDOW)
    for at in range(first, full, KEYS):
        acc = _dq_block(
            q_tile, d_tile, lse_tile, delta_tile, acc, k, v, k_stride, v_stride, at, position + m, end, prefix_at,
            own_at, behind, scale_2, window, E, KEYS, WINDOW, MASKED=False,
        )  # fmt: skip
    for at in range(full, end, KEYS):
        acc = _dq_block(
            q_tile, d_tile, lse_tile, delta_tile, acc, k, v, k_stride, v_stride, at, position + m, end, prefix_at,
            own_at, behind, scale_2, window, E, KEYS, WINDOW, MASKED=True,
        )  # fmt: skip
    acc = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + row[:, None] * (H * E) + head * E + e, acc, mask=valid)


@triton.jit
def _dkv_block(
    k, v, dk, dv, q, d_out, lse, delta, q_stride, d_stride, query_at, count, at, position, keys, scale, window,
    E: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: what it adds to the gradients of keys and values. Scores are [keys, queries].

    Queries beyond the last one are zeros, and so is their gradient: they add nothing.
    """
    m, e = tl.arange(0, QUERIES), tl.arange(0, E)[None, :]
    row, valid = (query_at + at + m).to(tl.int64), at + m < count
    q_block = tl.load(q + row[:, None] * q_stride + e, mask=valid[:, None], other=0.0)  # [QUERIES, E]
    scores = tl.dot(k, tl.trans(q_block), input_precision="ieee")
    if MASKED:
        scores = _hide(scores, (position + at + m)[None, :], keys[:, None], window, WINDOW)
    shares = tl.exp2(tl.fma(scores, scale, -tl.load(lse + row, mask=valid, other=0.0)[None, :]))
    d_block = tl.load(d_out + row[:, None] * d_stride + e, mask=valid[:, None], other=0.0)  # [QUERIES, E]
    dv = tl.dot(shares.to(d_block.dtype), d_block, dv, input_precision="ieee")
    d_shares = tl.dot(v, tl.trans(d_block), input_precision="ieee")
    d_scores = shares * (d_shares - tl.load(delta + row, mask=valid, other=0.0)[None, :])
    return tl.dot(d_scores.to(q_block.dtype), q_block, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["tokens", "window"])
def attention_dkv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, tiles, runs, q_stride, k_stride, v_stride, d_stride, tokens, scale, window,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one tile of keys, one key head; all queries of its group of heads that see the tile."""
    tile, kv_head = tiles + tl.program_id(0) // K * 5, tl.program_id(0) % K
    key_at, rows, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    first_run, last_run = tl.load(tile + 3), tl.load(tile + 4)
    n, e = tl.arange(0, KEYS), tl.arange(0, E)[None, :]
    row, valid = (key_at + n).to(tl.int64)[:, None], (n < rows)[:, None]
    k_tile = tl.load(k + row * k_stride + kv_head * E + e, mask=valid, other=0.0)  # [KEYS, E]
    v_tile = tl.load(v + row * v_stride + kv_head * E + e, mask=valid, other=0.0)
    dk_tile, dv_tile = tl.zeros((KEYS, E), tl.float32), tl.zeros((KEYS, E), tl.float32)
    scale_2 = scale * LOG2_E
    for member in range(H // K):
        head = kv_head * (H // K) + member
        q_head, d_head = q + head * E, d_out + head * E
        lse_head, delta_head = lse + head.to(tl.int64) * tokens, delta + head.to(tl.int64) * tokens
        for run in range(first_run, last_run):
            query_at, count = tl.load(runs + run * 4), tl.load(runs + run * 4 + 1)
            query_position, diagonal = tl.load(runs + run * 4 + 2), tl.load(runs + run * 4 + 3)
            for at in range(0, diagonal, QUERIES):
                dk_tile, dv_tile = _dkv_block(
                    k_tile, v_tile, dk_tile, dv_tile, q_head, d_head, lse_head, delta_head, q_stride, d_stride,
                    query_at, count, at, query_position, position + n, scale_2, window,
                    E, QUERIES, WINDOW, MASKED=True,
                )  # fmt: skip
            for at in range(diagonal, count, QUERIES):
                dk_tile, dv_tile = _dkv_block(
                    k_tile, v_tile, dk_tile, dv_tile, q_head, d_head, lse_head, delta_head, q_stride, d_stride,
                    query_at, count, at, query_position, position + n, scale_2, window,
                    E, QUERIES, WINDOW, MASKED=False,
                )  # fmt: skip
    tl.store(dk + row * (K * E) + kv_head * E + e, (dk_tile * scale).to(dk.dtype.element_ty), mask=valid)
    tl.store(dv + row * (K * E) + kv_head * E + e, dv_tile.to(dv.dtype.element_ty), mask=valid)


@lru_cache(maxsize=32)
def query_tiles(lengths: tuple, prefixes: tuple, window: int | None, queries: int, device: torch.device) -> Tensor:
    """int32 (tiles, 6): the first query's token, how many queries, the first one's place in its sequence, and where
    the sequence's keys stand (prefix_at, own_at, behind)."""
    starts, tiles = [0, *accumulate(lengths)], []
    for start, length, prefix in zip(starts, lengths, prefixes):
        behind = lengths[prefix] if prefix >= 0 else 0
        for first in range(0, length, queries):
            rows, position = min(queries, length - first), behind + first
            tiles.append((start + first, rows, position, starts[prefix], start - behind, behind))

    def keys(tile):
        _, rows, position, *_ = tile
        return rows + (position if window is None else min(position, window - 1))

    return _table(sorted(tiles, key=keys, reverse=True), 6, device)


@lru_cache(maxsize=32)
def key_tiles(lengths: tuple, prefixes: tuple, window: int | None, keys: int, queries: int, device: torch.device):
    """The tiles of keys, and the runs of queries that see them.

    tiles: int32 (tiles, 5), the first key's token, how many keys, the first one's place, and its runs [first, last).
    runs: int32 (runs, 4), the first query's token, how many queries, the first one's place, and how many of them, in
    whole blocks, do not all see the whole tile. Without a window all queries of completions that stand side by side
    see all of the prompt alike, and are one run.
    """
    starts, tiles, runs = [0, *accumulate(lengths)], [], []
    children = [[] for _ in lengths]
    for b, prefix in enumerate(prefixes):
        if prefix >= 0 and lengths[b]:
            if window is None and children[prefix] and sum(children[prefix][-1]) == starts[b]:
                at, count = children[prefix].pop()
                children[prefix].append((at, count + lengths[b]))
            else:
                children[prefix].append((starts[b], lengths[b]))
    for start, length, prefix, after in zip(starts, lengths, prefixes, children):
        behind = lengths[prefix] if prefix >= 0 else 0
        for first in range(0, length, keys):
            rows, position, first_run = min(keys, length - first), behind + first, len(runs)
            for at, count, place in [(start + first, length - first, position)] + [(*child, length) for child in after]:
                if window is None:
                    ahead = max(0, position + rows - 1 - place)  # queries before the tile's last key
                else:  # the last key is seen from fewer than `window` places on
                    count = ahead = min(count, position + rows - 1 + window - place)
                if count > 0:
                    runs.append((at, count, place, -(-min(ahead, count) // queries) * queries))
            tiles.append((start + first, rows, position, first_run, len(runs)))
    tiles.sort(key=lambda tile: sum(count for _, count, _, _ in runs[tile[3] : tile[4]]), reverse=True)
    return _table(tiles, 5, device), _table(runs, 4, device)


def _table(rows: list[tuple], columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made while sampling, it may serve a backward pass
        return torch.tensor(rows, dtype=torch.int32).view(-1, columns).to(device, non_blocking=True)


def tiling(kernel: str, dtype: torch.dtype, size: int) -> str:
    """The name in CONFIGS of the kernel's tiles ("fwd", "dq", "dkv")."""
    return f"attention_{kernel}/{max(size, 64)}" + ("/float32" if dtype == torch.float32 else "")


def rows_of(x: Tensor) -> Tensor:
    """x (T, heads, E) as the kernels read it, copied if need be: a token's heads side by side, all of them aligned."""
    aligned = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def launch_forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, window: int | None, tiled: dict):
    """out (T, H, E) and lse (H, T), of the queries that the tiles name."""
    (T, H, E), K = q.shape, k.shape[1]
    out, lse = q.new_empty(T, H, E), q.new_empty(H, T, dtype=torch.float32)
    if len(tiles):
        attention_fwd_kernel[len(tiles) * H,](
            q, k, v, out, lse, tiles, q.stride(0), k.stride(0), v.stride(0), T, scale, window or 0,
            H=H, K=K, E=E, WINDOW=window is not None, enable_fp_fusion=False, **tiled,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("minitrl::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], prefixes: Sequence[int], scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """out (T, H, E) in q's dtype, and lse (H, T) in float32, of base 2."""
    q, k, v = map(rows_of, (q, k, v))
    tiled = config(tiling("fwd", q.dtype, q.shape[2]))
    tiles = query_tiles(tuple(lengths), tuple(prefixes), window, tiled["QUERIES"], q.device)
    return launch_forward(q, k, v, tiles, scale, window, tiled)


@attention_forward.register_fake
def _(q, k, v, lengths, prefixes, scale, window):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("minitrl::attention_backward", mutates_args=())
def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Sequence[int],
    prefixes: Sequence[int], scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the dtypes and shapes of q, k, v."""
    (T, H, E), K = q.shape, k.shape[1]
    d_out, q, k, v = map(rows_of, (d_out, q, k, v))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    layout, shape = (tuple(lengths), tuple(prefixes), window), dict(H=H, K=K, E=E, WINDOW=window is not None)
    strides = q.stride(0), k.stride(0), v.stride(0), d_out.stride(0)
    if T:
        tiled = config(tiling("dq", q.dtype, E))
        tiles = query_tiles(*layout, tiled["QUERIES"], q.device)
        attention_dq_kernel[len(tiles) * H,](
            q, k, v, out, d_out, lse, delta, dq, tiles, *strides, T, scale, window or 0,
            enable_fp_fusion=False, **shape, **tiled,
        )  # fmt: skip
        tiled = config(tiling("dkv", q.dtype, E))
        tiles, runs = key_tiles(*layout, tiled["KEYS"], tiled["QUERIES"], q.device)
        attention_dkv_kernel[len(tiles) * K,](
            q, k, v, d_out, lse, delta, dk, dv, tiles, runs, *strides, T, scale, window or 0,
            enable_fp_fusion=False, **shape, **tiled,
        )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _(d_out, q, k, v, out, lse, lengths, prefixes, scale, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *ctx.layout = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, d_out, _):
    return *attention_backward(d_out, *ctx.saved_tensors, *ctx.layout), None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raises ValueError for what the kernels do not compute."""
    H, E, remedy = q.shape[1], q.shape[2], "or set MINITRL_KERNELS=reference"
    if E not in (16, 32, 64, 128, 256):
        raise ValueError(f"attention: heads of size {E} have no Triton kernel, only 16, 32, 64, 128, 256; {remedy}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; one of float32, float16, bfloat16, "
                         f"the same for all, has a Triton kernel; {remedy}")  # fmt: skip
    if scale <= 0:
        raise ValueError(f"attention: scale {scale} must be positive; {remedy}")
    assert H % k.shape[1] == 0 and k.shape == v.shape and k.shape[-1] == E, (q.shape, k.shape, v.shape)


def attention(q, k, v, lengths: tuple, prefixes: tuple, *, scale: float, window: int | None) -> Tensor:
    """See attention.py. Differentiable in q, k, v."""
    check(q, k, v, scale)
    return attention_forward(q, k, v, lengths, prefixes, scale, window)[0]
