"""The Triton kernels of token_logprob.py, whose docstring has the formulas.

Forward, one program computes ROWS tokens by one split of SPLIT columns of the vocabulary, a tile of logits at a time,
and leaves three numbers a token (its partials), with d = (z - r) / (temperature ln 2) and z = x.w:

    reference r = max z        total s = sum 2^d        weighted u = sum 2^d d

The difference comes first: it is exact where it matters, so that a certain token has log-prob 0 and no entropy.

A second kernel folds them. Nothing is locked or added atomically, and SPLIT does not depend on how many tokens there
are: a token's bits depend on its own hidden state alone. Nor do they depend on how the vocabulary is dealt out to
several devices, if each has whole splits, the last one excepted: the partials are folded in the same order.

    token_logprob_fwd     requests 2 T V D (1 / ROWS + 1 / COLUMNS) bytes of 16-bit X and W    2 T V D FLOPs
                          touches X, W, targets, and 12 T V / SPLIT bytes of partials
    token_logprob_fold    reads the partials, writes 16 T
    token_logprob_bwd     the same tiles once more; writes dZ, CHUNK columns at a time         2 T V D FLOPs
                          and two library products with dZ, accumulated in float32, follow     4 T V D FLOPs

Where the loss is known to be sum_t (g_t log-prob_t + h_t entropy_t) before the forward pass, tiles are computed once:
token_logprob_fwd keeps 2^d of KEPT_ROWS tokens in 16 bits, token_logprob_kept turns it into dZ in place.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matmul_triton import described, grouped, load_tile, matmul_op, rows_of, settled
from .targets import config
from .token_logprob import IGNORE, SPLIT, cuts, shared_cuts

CHUNK = 8 * SPLIT  # columns of dZ that are held at a time
KEPT_ROWS = 1024  # tokens whose whole rows are held at a time, where gradients are computed in the forward pass
SLABS = 8  # up to so many devices may share the vocabulary with the same bits in dX, too
LOWEST = tl.constexpr(-1e20)  # of a column past the end: far below any logit, and finite, so that 0 * it is 0
LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logits_tile(
    x, w, row, column, T, V, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """X W^T in float32, (ROWS, COLUMNS), from this row and column on. x, w: tensor descriptors if TMA, or pointers."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, D, DEPTH):
        left = load_tile(x, row, k, T, D, D, ROWS, DEPTH, False, TMA, EVEN)
        right = load_tile(w, column, k, V, D, D, COLUMNS, DEPTH, False, TMA, EVEN)
        tile = tl.dot(left, right.T, tile, input_precision="ieee")
    return tile


@triton.jit(do_not_specialize=["T"])
def token_logprob_fwd_kernel(
    x, w, targets, chosen, partials, kept, peaks, T, V, D, inverse_temperature,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x (T, D), w (V, D), targets (T,) -> chosen (T,) the targets' logits, and partials (V / SPLIT, 3, T).

    Only if kept (T, V) is given: there 2^d relative to a peak, and in peaks (T, V / COLUMNS) the peak of each tile.
    """
    block, split = grouped(tl.program_id(0), tl.cdiv(T, ROWS), tl.cdiv(V, SPLIT), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    real = rows < T
    scale = inverse_temperature * LOG2_E
    reference = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), COLUMNS):
        z = logits_tile(x, w, block * ROWS, first, T, V, D, ROWS, COLUMNS, DEPTH, TMA, EVEN)
        columns = first + tl.arange(0, COLUMNS)
        # The target's logit goes out at once, to where no other tile writes: nothing of it lives through the loop.
        target = tl.load(targets + rows, mask=real, other=-1)
        mine = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        tl.store(chosen + rows, mine, mask=(target >= first) & (target < tl.minimum(first + COLUMNS, V)))
        z = tl.where(columns[None, :] < V, z, LOWEST)
        peak = tl.maximum(reference, tl.max(z, 1))
        z = (z - peak[:, None]) * scale
        p = tl.exp2(z)
        drop = (reference - peak) * scale
        fade = tl.exp2(drop)
        weighted = fade * (weighted + drop * total) + tl.sum(p * z, 1)
        total = fade * total + tl.sum(p, 1)
        reference = peak
        if kept is not None:
            inside = real[:, None] & (columns < V)[None, :]
            tl.store(kept + rows.to(tl.int64)[:, None] * V + columns[None, :], p.to(kept.dtype.element_ty), mask=inside)
            tl.store(peaks + rows.to(tl.int64) * tl.cdiv(V, COLUMNS) + first // COLUMNS, peak, mask=real)
    partials += (3 * split).to(tl.int64) * T
    tl.store(partials + rows, reference, mask=real)
    tl.store(partials + T + rows, total, mask=real)
    tl.store(partials + 2 * T.to(tl.int64) + rows, weighted, mask=real)


@triton.jit(do_not_specialize=["T"])
def token_logprob_fold_kernel(
    partials, chosen, logprobs, entropy, reference_out, log2_total_out, T, splits, inverse_temperature,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partials (splits, 3, T), chosen (T,) -> log-probs, entropy, r and log2 s of the whole vocabulary, each (T,)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = inverse_temperature * LOG2_E
    reference = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & (rows < T)[None, :]
        at = partials + (3 * split).to(tl.int64)[:, None] * T + rows[None, :]
        r = tl.load(at, mask=inside, other=LOWEST)
        s = tl.load(at + T, mask=inside, other=0.0)
        u = tl.load(at + 2 * T.to(tl.int64), mask=inside, other=0.0)
        peak = tl.maximum(reference, tl.max(r, 0))
        r = (r - peak[None, :]) * scale
        drop = (reference - peak) * scale
        fade = tl.exp2(drop)
        weighted = fade * (weighted + drop * total) + tl.sum(tl.exp2(r) * (u + r * s), 0)
        total = fade * total + tl.sum(tl.exp2(r) * s, 0)
        reference = peak
    log2_total = tl.log2(total)
    z = tl.load(chosen + rows, mask=rows < T, other=0.0)
    log2_p = (z - reference) * scale - log2_total
    tl.store(logprobs + rows, log2_p * LN2, mask=rows < T)
    tl.store(entropy + rows, (log2_total - weighted / total) * LN2, mask=rows < T)  # a sum of numbers >= 0
    tl.store(reference_out + rows, reference, mask=rows < T)
    tl.store(log2_total_out + rows, log2_total, mask=rows < T)


@triton.jit
def upstream(rows, T, entropy, g, h, inverse_temperature):
    """dz = p (a + b log2 p) + [chosen] c: the numbers a, b, c of each row."""
    real = rows < T
    c = tl.load(g + rows, mask=real, other=0.0) * inverse_temperature
    of_entropy = tl.load(h + rows, mask=real, other=0.0) * inverse_temperature
    return -c - of_entropy * tl.load(entropy + rows, mask=real, other=0.0), of_entropy * -LN2, c


@triton.jit(do_not_specialize=["T"])
def token_logprob_bwd_kernel(
    x, w, targets, reference, log2_total, entropy, g, h, dz, T, V, D, start, stop, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dz (T, stop - start): the gradient of the logits of columns start to stop, not yet divided by anything."""
    block, other = grouped(tl.program_id(0), tl.cdiv(T, ROWS), tl.cdiv(stop - start, COLUMNS), GROUP)
    first = start + other * COLUMNS
    rows, columns = block * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    z = logits_tile(x, w, block * ROWS, first, T, V, D, ROWS, COLUMNS, DEPTH, TMA, EVEN)
    real = rows < T
    target = tl.load(targets + rows, mask=real, other=-1)
    r = tl.load(reference + rows, mask=real, other=0.0)
    log2_s = tl.load(log2_total + rows, mask=real, other=0.0)
    a, b, c = upstream(rows, T, entropy, g, h, inverse_temperature)
    log2_p = (z - r[:, None]) * (inverse_temperature * LOG2_E) - log2_s[:, None]
    d = tl.exp2(log2_p) * (a[:, None] + b[:, None] * log2_p)
    d += tl.where(columns[None, :] == target[:, None], c[:, None], 0.0)
    dz += rows.to(tl.int64)[:, None] * (stop - start) + (columns - start)[None, :]
    tl.store(dz, d.to(dz.dtype.element_ty), mask=real[:, None] & (columns < stop)[None, :])


@triton.jit(do_not_specialize=["T"])
def token_logprob_kept_kernel(
    kept, peaks, targets, reference, log2_total, entropy, g, h, T, V, inverse_temperature,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns kept (T, V), what the forward kernel left of tiles of COLUMNS, into dZ in place: a row per program."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = kept + tl.cast(row, tl.int64) * V + columns
    kept_p = tl.load(at, mask=columns < V, other=0.0).to(tl.float32)
    tiles = tl.cdiv(V, COLUMNS)
    peak = tl.load(peaks + tl.cast(row, tl.int64) * tiles + columns // COLUMNS, mask=columns < V, other=0.0)
    shift = (peak - tl.load(reference + row)) * (inverse_temperature * LOG2_E) - tl.load(log2_total + row)
    a, b, c = upstream(row, T, entropy, g, h, inverse_temperature)
    log2_p = tl.log2(tl.maximum(kept_p, 1e-38)) + shift  # where kept_p is 0, so is what this is multiplied by
    d = kept_p * tl.exp2(shift) * (a + b * log2_p) + tl.where(columns == tl.load(targets + row), c, 0.0)
    tl.store(at, d.to(kept.dtype.element_ty), mask=columns < V)


# --- launching -------------------------------------------------------------------------------------------------------


def forward_row(hidden: Tensor, kept: Tensor | None = None) -> str:
    """The row of CONFIGS. Where a tile takes little time, for D is small, narrow ones leave room for two programs on a
    processor: one computes logits while the other adds up exponentials. What is kept takes registers, too."""
    if hidden.dtype == torch.float32:
        return "token_logprob_fwd/float32"
    if kept is not None:
        return "token_logprob_fwd/kept"
    return "token_logprob_fwd/narrow" if hidden.shape[1] <= 256 else "token_logprob_fwd"


def launch_tiles(kernel, row: str, hidden: Tensor, weight: Tensor, columns: int, *args, **constants) -> None:
    """Launch a kernel that computes tiles of the logits of so many columns, or splits of them."""
    tiles, D = config(row), hidden.shape[1]
    tma = tiles["TMA"] and D * hidden.element_size() % 16 == 0
    constants = tiles | constants | {"TMA": tma, "EVEN": D % tiles["DEPTH"] == 0, "enable_fp_fusion": False}
    x, w = hidden, weight
    if tma:
        x, w = (described(m, (tiles[name], tiles["DEPTH"])) for m, name in ((x, "ROWS"), (w, "COLUMNS")))
    programs = triton.cdiv(len(hidden), tiles["ROWS"]) * triton.cdiv(columns, constants.get("SPLIT", tiles["COLUMNS"]))
    kernel[(programs,)](x, w, *args, **constants)


def launch_forward(hidden, weight, targets, temperature, kept=None):
    """-> chosen (T,), NaN where this weight does not have the target; partials (V / SPLIT, 3, T); peaks if kept."""
    (T, D), V, row = hidden.shape, len(weight), forward_row(hidden, kept)
    chosen = torch.full((T,), torch.nan, dtype=torch.float32, device=hidden.device)
    partials = chosen.new_empty(triton.cdiv(V, SPLIT), 3, T)
    peaks = None if kept is None else chosen.new_empty(T, triton.cdiv(V, config(row)["COLUMNS"]))
    rest = targets.int(), chosen, partials, kept, peaks, T, V, D, 1 / temperature
    launch_tiles(token_logprob_fwd_kernel, row, settled(hidden), settled(weight), V, *rest, SPLIT=SPLIT)
    return chosen, partials, peaks


def launch_fold(chosen, partials, temperature) -> Tensor:
    """-> (4, T): log-probs, entropy, reference, log2_total."""
    out, tiles = aligned_rows(len(chosen), chosen.device), config("token_logprob_fold")
    rest = *out, len(chosen), len(partials), 1 / temperature
    grid = (triton.cdiv(len(chosen), tiles["ROWS"]),)
    token_logprob_fold_kernel[grid](partials, chosen, *rest, enable_fp_fusion=False, **tiles)
    return out


def aligned_rows(T: int, device) -> Tensor:
    """(4, T) float32, each row on an address that 16 divides, whatever T is: see `settled`."""
    return torch.empty(4, triton.cdiv(T, 4) * 4, dtype=torch.float32, device=device)[:, :T]


def add_product(total: Tensor | None, a: Tensor, b: Tensor, deterministic: bool) -> Tensor:
    """total + a @ b in float32, in place: a 16-bit product would round each chunk's part of dX."""
    if deterministic:
        product = matmul_op(a, b, True)
        return product if total is None else total.add_(product)
    if not a.is_cuda:
        a, b = a.float(), b.float()
    wide = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(a, b, **wide) if total is None else torch.addmm(total, a, b, **wide, out=total)


def select(rows: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors' rows of those numbers; themselves, where these are all."""
    return [x if len(rows) == len(x) else x.index_select(0, rows) for x in tensors]


def pairwise_sum(part, first: int, stop: int) -> Tensor:
    """part(first) + ... + part(stop - 1) as a binary tree, whose halves are the sums that fewer devices would have."""
    if stop - first == 1:
        return part(first)
    middle = (first + stop) // 2
    return pairwise_sum(part, first, middle) + pairwise_sum(part, middle, stop)


def gradients(hidden, weight, targets, out, upstream, temperature, deterministic, needs, bounds):
    """dX (float32) and dW of a weight whose rows the targets count; what is not needed is anything.

    Rows that are ignored, or whose upstream gradients are 0, are left out. bounds: of the slabs of columns whose parts
    of dX are summed as a tree.
    """
    live = ((targets != IGNORE) & (upstream[:2] != 0).any(0)).nonzero()[:, 0]
    columns = (targets.int(), out[2], out[3], out[1], upstream[0], upstream[1])
    x, *vectors = select(live, settled(hidden), *columns)
    weight, vectors, (T, D), V = settled(weight), [settled(v) for v in vectors], x.shape, len(weight)
    d_weight = (torch.empty_like if T else torch.zeros_like)(weight) if needs[1] else None
    buffer = x.new_empty(T * min(CHUNK, V))
    row = f"token_logprob_bwd{rows_of(x.dtype)}"

    def slab(i: int) -> Tensor:
        part = x.new_zeros((T, D), dtype=torch.float32)
        for start in range(bounds[i], bounds[i + 1], CHUNK):
            stop = min(start + CHUNK, bounds[i + 1])
            dz = buffer[: T * (stop - start)].view(T, stop - start)
            rest = *vectors, dz, T, V, D, start, stop, 1 / temperature
            launch_tiles(token_logprob_bwd_kernel, row, x, weight, stop - start, *rest)
            if needs[0]:
                add_product(part, dz, weight[start:stop], deterministic)
            if needs[1]:
                d_weight[start:stop] = add_product(None, dz.t(), x, deterministic)
        return part

    d_hidden = pairwise_sum(slab, 0, len(bounds) - 1) if T else x.float()
    if needs[0] and T < len(hidden):
        d_hidden = d_hidden.new_zeros(hidden.shape).index_copy_(0, live, d_hidden)
    return d_hidden, d_weight


@torch.library.custom_op("minitrl::token_logprob", mutates_args=())
def token_logprob_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, deterministic: bool
) -> Tensor:
    """-> (4, T) float32: log-probs and entropy, 0 where ignored, and reference and log2_total for the backward pass."""
    out = torch.zeros(4, len(targets), dtype=torch.float32, device=hidden.device)
    scored = (targets != IGNORE).nonzero()[:, 0]
    if len(scored):
        some_hidden, some_targets = select(scored, hidden, targets)
        chosen, partials, _ = launch_forward(some_hidden, weight, some_targets, temperature)
        out[:, scored] = launch_fold(chosen, partials, temperature)
    return out


@token_logprob_op.register_fake
def _(hidden, weight, targets, temperature, deterministic):
    return hidden.new_empty((4, len(targets)), dtype=torch.float32)


@torch.library.custom_op("minitrl::token_logprob_backward", mutates_args=())
def token_logprob_backward_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, saved: Tensor, upstream: Tensor,
    temperature: float, deterministic: bool, needs_hidden: bool, needs_weight: bool, bounds: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> dX in float32, and dW; empty if not needed."""
    needs = needs_hidden, needs_weight
    found = gradients(hidden, weight, targets, saved, upstream, temperature, deterministic, needs, bounds)
    empty = weight.new_empty(0, dtype=torch.float32), weight.new_empty(0)
    return tuple(dx if need else none for dx, need, none in zip(found, needs, empty))


@token_logprob_backward_op.register_fake
def _(hidden, weight, targets, saved, upstream, temperature, deterministic, needs_hidden, needs_weight, bounds):
    d_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    return d_hidden, weight.new_empty(weight.shape if needs_weight else 0)


def _save(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.deterministic = inputs
    ctx.save_for_backward(hidden, weight, targets, output)


def _backward(ctx, upstream):
    needs, (hidden, weight, *_) = ctx.needs_input_grad[:2], ctx.saved_tensors
    bounds = cuts(len(weight), SLABS if ctx.deterministic else 1)
    options = ctx.temperature, ctx.deterministic, *needs, bounds
    gradients = token_logprob_backward_op(*ctx.saved_tensors, upstream, *options)
    return *(gradient.to(hidden.dtype) if need else None for gradient, need in zip(gradients, needs)), None, None, None


token_logprob_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("minitrl::token_logprob_sum", mutates_args=())
def token_logprob_sum_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, g: Tensor, h: Tensor, temperature: float, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> sum(g log-probs + h entropy), the (4, T) of token_logprob, and the sum's gradients dX and dW."""
    live = ((targets != IGNORE) & ((g != 0) | (h != 0))).nonzero()[:, 0]
    out = token_logprob_op(hidden, weight, targets.index_fill(0, live, IGNORE), temperature, deterministic)
    d_hidden, d_weight = hidden.new_zeros(hidden.shape), weight.new_zeros(weight.shape, dtype=torch.float32)
    weight, V, tiles = settled(weight), len(weight), config("token_logprob_kept")
    for some in (live[i : i + KEPT_ROWS] for i in range(0, len(live), KEPT_ROWS)):
        x, y = settled(hidden[some]), targets[some]
        kept = x.new_empty(len(some), V)
        chosen, partials, peaks = launch_forward(x, weight, y, temperature, kept)
        out[:, some] = mine = launch_fold(chosen, partials, temperature)
        token_logprob_kept_kernel[len(some), triton.cdiv(V, tiles["BLOCK"])](
            kept, peaks, y, mine[2], mine[3], mine[1], g[some], h[some], len(some), V, 1 / temperature,
            COLUMNS=config(forward_row(x, kept))["COLUMNS"], enable_fp_fusion=False, **tiles,
        )  # fmt: skip
        d_hidden[some] = add_product(None, kept, weight, deterministic).to(hidden.dtype)
        add_product(d_weight, kept.t(), x, deterministic)
    total = (g * out[0] + h * out[1])[live].sum()  # what is not live may be NaN
    return total, out, d_hidden, d_weight.to(weight.dtype)


@token_logprob_sum_op.register_fake
def _(hidden, weight, targets, g, h, temperature, deterministic):
    out = hidden.new_empty((4, len(targets)), dtype=torch.float32)
    return out.new_empty(()), out, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save_sum(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])


def _backward_sum(ctx, upstream, *_):
    d_hidden, d_weight = ctx.saved_tensors
    return d_hidden * upstream, d_weight * upstream, None, None, None, None, None


token_logprob_sum_op.register_autograd(_backward_sum, setup_context=_save_sum)


@torch.library.custom_op("minitrl::token_logprob_part", mutates_args=())
def token_logprob_part_op(hidden: Tensor, shard: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-> what `launch_forward` leaves of a shard of the vocabulary: chosen (T,), and partials (V / SPLIT, 3, T)."""
    return launch_forward(hidden, shard, targets, temperature)[:2]


@token_logprob_part_op.register_fake
def _(hidden, shard, targets, temperature):
    chosen = hidden.new_empty(len(targets), dtype=torch.float32)
    return chosen, chosen.new_empty(triton.cdiv(len(shard), SPLIT), 3, len(targets))


@torch.library.custom_op("minitrl::token_logprob_fold", mutates_args=())
def token_logprob_fold_op(chosen: Tensor, partials: Tensor, temperature: float) -> Tensor:
    """-> the (4, T) of token_logprob."""
    return launch_fold(chosen, partials, temperature).contiguous()


@token_logprob_fold_op.register_fake
def _(chosen, partials, temperature):
    return chosen.new_empty(4, len(chosen))


def local_targets(targets: Tensor, first: int, stop: int) -> Tensor:
    """Targets counted from a shard's first row; -1 for those of other shards, and IGNORE as it is."""
    local = torch.where((targets >= first) & (targets < stop), targets - first, -1)
    return local.masked_fill(targets == IGNORE, IGNORE)


class ShardedTokenLogprob(torch.autograd.Function):
    """token_logprob of one of the ranks that share the vocabulary. All have the same hidden states and targets.

    The ranks exchange 12 bytes a token and split of the vocabulary forward, and the sum of dX backward.
    """

    @staticmethod
    def forward(ctx, hidden, shard, targets, vocabulary, group, temperature, deterministic):
        ranks, rank = group.size(), group.rank()
        bounds = shared_cuts(vocabulary, group, shard)
        if deterministic and SLABS % ranks:
            raise ValueError(f"the deterministic mode shares a vocabulary among 1, 2, 4 or {SLABS} ranks, not {ranks}")
        scored = (targets != IGNORE).nonzero()[:, 0]
        hidden_some, targets_some = select(scored, hidden, targets)
        local = local_targets(targets_some, bounds[rank], bounds[rank + 1])
        out = torch.zeros(4, len(targets), dtype=torch.float32, device=hidden.device)
        if len(scored):
            chosen, partials = token_logprob_part_op(hidden_some, shard, local, temperature)
            most = triton.cdiv(triton.cdiv(vocabulary, SPLIT), ranks)
            mine = chosen.new_zeros(1 + 3 * most, len(scored))
            mine[0], mine[1 : 1 + 3 * len(partials)] = chosen, partials.flatten(0, 1)
            everyone = chosen.new_empty(ranks, *mine.shape)
            torch.distributed.all_gather([*everyone], mine, group=group)
            splits = [triton.cdiv(stop - start, SPLIT) for start, stop in pairwise(bounds)]
            partials = torch.cat([part[1 : 1 + 3 * n] for part, n in zip(everyone, splits)]).unflatten(0, (-1, 3))
            owners = torch.bucketize(targets_some, targets.new_tensor(bounds[1:-1]), right=True)
            chosen = everyone[owners, 0, torch.arange(len(scored), device=owners.device)]
            out[:, scored] = token_logprob_fold_op(chosen, partials, temperature)
        ctx.save_for_backward(hidden, shard, targets, out)
        ctx.options = vocabulary, group, temperature, deterministic
        return out

    @staticmethod
    def backward(ctx, upstream):
        vocabulary, group, temperature, deterministic = ctx.options
        hidden, shard, targets, out = ctx.saved_tensors
        ranks, rank = group.size(), group.rank()
        finest = cuts(vocabulary, SLABS if deterministic else ranks)
        each = (len(finest) - 1) // ranks
        bounds = finest[rank * each : (rank + 1) * each + 1]
        local = local_targets(targets, bounds[0], bounds[-1])
        d_hidden, d_shard = token_logprob_backward_op(
            hidden, shard, local, out, upstream, temperature, deterministic, *ctx.needs_input_grad[:2],
            [bound - bounds[0] for bound in bounds],
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            if deterministic:
                parts = d_hidden.new_empty(ranks, *d_hidden.shape)
                torch.distributed.all_gather([*parts], d_hidden, group=group)
                d_hidden = pairwise_sum(parts.__getitem__, 0, ranks)
            else:
                torch.distributed.all_reduce(d_hidden, group=group)
            d_hidden = d_hidden.to(hidden.dtype)
        found = (dx if need else None for dx, need in zip((d_hidden, d_shard), ctx.needs_input_grad))
        return *found, None, None, None, None, None
