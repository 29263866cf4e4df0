"""Hidden states -> log-prob of the chosen token and entropy of its distribution, never holding the (T, V) logits.

With z = x W^T / temperature, lse = log sum_v exp z_v, p = exp(z - lse), chosen token y:

    log-prob = z_y - lse            entropy = lse - sum_v p_v z_v

and with upstream gradients g (of the log-prob) and h (of the entropy):

    dz_v = g ([v = y] - p_v) - h p_v (log p_v + entropy)     dX = dZ W / temperature     dW = dZ^T X / temperature

Logits exist one tile at a time, ROWS tokens by COLUMNS of the vocabulary. Forward, each split of the columns leaves
three numbers a token: its largest logit m_c, s_c = sum exp(z - m_c), and that sum weighted by z - m_c; they are put
together under the overall maximum m. Kept for the backward pass are m, lse - m and the entropy, 12 bytes a token; it
computes each tile of logits again, but for what KEEP bytes hold of their exponentials.

Exponentials are taken to base 2, 2.5 times as fast on a CPU. Statistics are float32 whatever X and W are (float64 for
float64). Least traffic forward: X and W once. FLOPs: 2 T V D forward, 6 T V D backward.
"""

import math
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import COLUMNS, fixed_product, product
from .targets import use_triton

IGNORE = -100  # the target of a position that is not scored
ROWS = 1024  # of the tile of logits that is held at a time, by COLUMNS
KEEP = 2**27  # bytes of exponentials that wait for the backward pass
SPLIT = 1024  # the Triton kernels' columns per program, and the unit in which ranks share a vocabulary
LN2 = math.log(2)


def token_logprob_reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0):
    """The same in a few lines with whole logits: the truth that tests compare with."""
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD)
    return logits_logprob_reference(logits_TV, targets_T, temperature=temperature)


def logits_logprob_reference(logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0):
    """Log-prob and entropy from logits."""
    logprobs_TV = (logits_TV.to(stat_dtype(logits_TV)) / temperature).log_softmax(-1)
    scored_T = targets_T != IGNORE
    logprobs_T = logprobs_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return torch.where(scored_T, logprobs_T, 0), torch.where(scored_T, entropy_T, 0)


def stat_dtype(x: Tensor) -> torch.dtype:
    """float32 for statistics, float64 where the input has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(size: int, step: int):
    """Slices that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def targets_within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target stands in these columns, and where in them."""
    rows = ((targets >= columns.start) & (targets < columns.stop)).nonzero()[:, 0]
    return rows, targets[rows] - columns.start


def cuts(vocabulary: int, parts: int) -> list[int]:
    """Where a vocabulary is cut for ranks to share it, into whole splits, as even as they get: parts + 1 numbers.

    Rank r holds the rows from cuts[r] to cuts[r + 1]. Each part of 1, 2 or 4 is made of whole ones of twice as many.
    """
    splits = -(-vocabulary // SPLIT)
    return [min(SPLIT * (i * splits // parts), vocabulary) for i in range(parts + 1)]


class TiledTokenLogprob(torch.autograd.Function):
    """The formulas above, in place where they can be. Columns are the outer loop, so that W is read once.

    The exponentials of the first tiles, KEEP bytes of them whatever T and V are, wait for the backward pass, which
    then needs no logits there: p = e 2^(their split's maximum - lse).

    Ranks that share a vocabulary have the tiles of their own rows; forward they exchange the numbers that tiles leave,
    backward they add up dX.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, deterministic, logits, likeliest, vocabulary, group):
        first = 0
        if group is not None:
            bounds = shared_cuts(vocabulary, group, weight)
            targets = targets - bounds[group.rank()]  # those of other ranks stand in no tile
        multiply = fixed_product if deterministic else product
        T, V, dtype = len(hidden), len(weight), stat_dtype(hidden)
        scale = 1 / (temperature * LN2)  # from a logit to the exponent of 2
        highest, total, weighted = hidden.new_empty((3, -(-V // COLUMNS), T), dtype=dtype)
        chosen, top = hidden.new_zeros(T, dtype=dtype), torch.ones_like(targets, dtype=torch.bool)
        kept = KEEP // (max(T, 1) * COLUMNS * hidden.element_size()) if any(ctx.needs_input_grad) else 0
        exponentials = hidden.new_empty(min(kept, len(total)), T, COLUMNS)
        tile, spare = hidden.new_empty((2, ROWS * COLUMNS), dtype=dtype)
        for c, columns in enumerate(blocks(V, COLUMNS)):
            for rows in blocks(T, ROWS):
                if logits is None:
                    z = _logits(hidden[rows], weight[columns], tile, multiply)
                else:
                    z = _tile(tile, len(hidden[rows]), len(weight[columns])).copy_(logits[rows, columns])
                mine, y = targets_within(targets[rows], columns)
                chosen[rows][mine] = z[mine, y]
                if likeliest:
                    top[rows][mine] = z[mine].argmax(-1) == y
                highest[c, rows] = z.amax(-1)
                z.sub_(highest[c, rows, None]).mul_(scale)  # the difference first: it is exact where it matters
                e = _tile(spare, *z.shape)
                e = torch.mul(z, LN2, out=e).exp_() if deterministic else torch.exp2(z, out=e)
                total[c, rows] = e.sum(-1)
                if c < kept:
                    exponentials[c, rows, : z.shape[1]] = e
                weighted[c, rows] = e.mul_(z).sum(-1)
        if group is not None:
            stats, first = _of_all(torch.stack([highest, total, weighted]), bounds, group)
            highest, total, weighted = stats
            torch.distributed.all_reduce(chosen, group=group)
        if likeliest:  # the first of all that are equally likely
            tiles = torch.arange(len(highest), device=targets.device) - first
            before = tiles[:, None] < targets // COLUMNS
            top &= torch.where(before, highest < chosen, highest <= chosen).all(0)
            if group is not None:  # the rank that has the target knows
                top = (top & (targets >= 0) & (targets < V)).byte()
                torch.distributed.all_reduce(top, group=group)
                top = top > 0
        shift = (highest - highest.amax(0)) * scale  # from each split's maximum to the overall one
        highest, factor = highest.amax(0), shift.mul(LN2).exp_()  # from here on of a few numbers a token
        weighted = reduce(torch.add, factor * (weighted + shift * total))  # in order, which .sum(0) does not promise
        total = reduce(torch.add, factor * total)
        logprobs = (chosen - highest) / temperature - total.log()
        entropy = total.log() - LN2 * weighted / total
        stats = highest, total.log2(), entropy
        ctx.save_for_backward(hidden, weight, targets, *stats, exponentials, shift[first : first + kept])
        ctx.temperature, ctx.group = temperature, group
        ctx.mark_non_differentiable(top)
        return logprobs, entropy, top

    @staticmethod
    def backward(ctx, g, h, _):
        all_hidden, weight, *saved, exponentials, shift = ctx.saved_tensors
        live = ((g != 0) | (h != 0)).nonzero()[:, 0]  # rows without upstream gradient (masked, clipped) cost nothing
        rows_of = (x.index_select(0, live) for x in (all_hidden, *saved, g, h))
        hidden, targets, highest, log2_total, entropy, g, h = rows_of
        dtype, scale = entropy.dtype, 1 / (ctx.temperature * LN2)
        g, h = g / -ctx.temperature, h / -ctx.temperature
        entropy_counts = bool(h.any())
        d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        tile, spare = hidden.new_empty((2, ROWS * COLUMNS), dtype=dtype)
        for c, columns in enumerate(blocks(len(weight), COLUMNS)):
            w, dw = weight[columns], None
            for rows in blocks(len(hidden), ROWS):
                x = hidden[rows]
                if c < len(exponentials):
                    e = _tile(spare, len(x), len(w)).copy_(exponentials[c, :, : len(w)][live[rows]])
                    log2_p = shift[c, live[rows]] - log2_total[rows]  # where e is 1
                    at_1 = log2_p.exp2() * (g[rows] + h[rows] * (entropy[rows] + LN2 * log2_p))
                    if entropy_counts:
                        e_log_e = torch.xlogy(e, e, out=_tile(tile, *e.shape))  # 0 where e is 0
                        dz = e.mul_(at_1[:, None]).addcmul_(e_log_e, (log2_p.exp2() * h[rows])[:, None])
                    else:
                        dz = e.mul_(at_1[:, None])
                else:
                    z = _logits(x, w, tile)
                    log2_p = z.sub_(highest[rows, None]).mul_(scale).sub_(log2_total[rows, None])
                    dz = torch.exp2(log2_p, out=_tile(spare, *z.shape))
                    if entropy_counts:
                        dz.mul_(log2_p.mul_(LN2 * h[rows, None]).add_((g + h * entropy)[rows, None]))
                    else:
                        dz.mul_(g[rows, None])
                mine, y = targets_within(targets[rows], columns)
                dz[mine, y] -= g[rows][mine]
                dz = dz.to(w.dtype)
                d_hidden[rows] += product(dz, w.t())
                if d_weight is not None:
                    part = product(dz.t(), x.t())
                    dw = part if dw is None else dw.to(dtype).add_(part)
            if d_weight is not None:
                d_weight[columns] = 0 if dw is None else dw
        if ctx.group is not None:
            torch.distributed.all_reduce(d_hidden, group=ctx.group)
        d_hidden = torch.zeros_like(all_hidden).index_copy_(0, live, d_hidden.to(hidden.dtype))
        return d_hidden, d_weight, *[None] * 7


def shared_cuts(vocabulary: int, group, weight: Tensor) -> list[int]:
    """`cuts` for the ranks of a group; ValueError where the weight is not this rank's part, or a part is empty."""
    ranks, rank = group.size(), group.rank()
    bounds = cuts(vocabulary, ranks)
    if min(stop - start for start, stop in pairwise(bounds)) == 0:
        raise ValueError(f"a vocabulary of {vocabulary} cannot be shared by {ranks} ranks in pieces of {SPLIT}")
    if len(weight) != bounds[rank + 1] - bounds[rank]:
        raise ValueError(f"rank {rank} of {ranks} holds {len(weight)} rows of a vocabulary cut at {bounds}")
    return bounds


def _of_all(stats: Tensor, bounds: list[int], group) -> tuple[Tensor, int]:
    """Every rank's (3, tiles, T) numbers one after the other, and how many tiles come before this rank's own."""
    tiles = [-(-(stop - start) // COLUMNS) for start, stop in pairwise(bounds)]
    mine = F.pad(stats, (0, 0, 0, max(tiles) - stats.shape[1]))
    everyone = [torch.empty_like(mine) for _ in tiles]
    torch.distributed.all_gather(everyone, mine, group=group)
    return torch.cat([part[:, :n] for part, n in zip(everyone, tiles)], dim=1), sum(tiles[: group.rank()])


def _tile(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The beginning of a buffer as a matrix: fresh memory for each tile costs more than what is done in it."""
    return buffer[: rows * columns].view(rows, columns)


def _logits(x: Tensor, w: Tensor, buffer: Tensor, multiply=product) -> Tensor:
    """x w^T in the buffer's dtype and memory."""
    return _tile(buffer, len(x), len(w)).copy_(multiply(x, w))


def token_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    deterministic: bool = False,
    logits_TV: Tensor | None = None,
    vocabulary: int | None = None,
    group=None,
):
    """Log-prob of each target and entropy of its distribution under softmax(hidden weight^T / temperature).

    hidden_TD: (T, D) the states that predict the targets.  weight_VD: (V, D).
    targets_T: (T,) int64, IGNORE (-100) where nothing is scored.
    deterministic: a token has the same bits in any batch: its log-prob, and on a GPU, where the log-prob has them
        always, its gradient too.
    logits_TV: what `linear.logits` of the same made in the same mode, where it is at hand; a GPU has no use for it.
    group: the torch.distributed group whose ranks share a vocabulary of so many tokens; weight_VD holds this rank's
        rows of it (`cuts`), and all ranks pass the same hidden states and targets, and get the same results: to the
        bit those of one device on a GPU (d_hidden if deterministic), to rounding on a CPU.
    Returns (logprobs_T, entropy_T), float32 (float64 for float64), 0 at ignored positions; both carry gradients.
    """
    if use_triton(hidden_TD):
        check(hidden_TD, weight_VD)
        from . import token_logprob_triton as kernels

        if group is None:
            out = kernels.token_logprob_op(hidden_TD, weight_VD, targets_T, temperature, deterministic)
        else:
            options = vocabulary, group, temperature, deterministic
            out = kernels.ShardedTokenLogprob.apply(hidden_TD, weight_VD, targets_T, *options)
        return out[0], out[1]
    options = temperature, deterministic, logits_TV, False, vocabulary, group
    return _tiled(hidden_TD, weight_VD, targets_T, *options)[:2]


def _tiled(hidden_TD, weight_VD, targets_T, temperature, deterministic, logits_TV, *options):
    """TiledTokenLogprob of the scored positions: the others are left out before any work."""
    scored = (targets_T != IGNORE).nonzero()[:, 0]
    if len(scored) == len(targets_T):
        given = hidden_TD, weight_VD, targets_T, temperature, deterministic, logits_TV
        return TiledTokenLogprob.apply(*given, *options)
    logits_TV = None if logits_TV is None else logits_TV[scored]
    given = hidden_TD[scored], weight_VD, targets_T[scored], temperature, deterministic, logits_TV
    found = TiledTokenLogprob.apply(*given, *options)
    return tuple(x.new_zeros(len(targets_T)).index_copy(0, scored, x) for x in found)


def token_logprob_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    entropy_weights_T: Tensor | None = None,
    temperature: float = 1.0,
    deterministic: bool = False,
    vocabulary: int | None = None,
    group=None,
):
    """sum_t (weights_t log-prob_t + entropy_weights_t entropy_t): for losses known before the forward pass, as SFT's.

    On a GPU logits are then computed once and not twice: one product of four is saved. Other arguments are
    token_logprob's.
    Returns (the sum, logprobs_T, entropy_T, top_T), top_T bool: whether no token is likelier than the target. The sum
    alone carries gradients, to hidden and weight alone.
    """
    zeros = torch.zeros_like(weights_T)
    g, h = weights_T.detach(), zeros if entropy_weights_T is None else entropy_weights_T.detach()
    scored_T = targets_T != IGNORE  # elsewhere a weight may be NaN
    if use_triton(hidden_TD):
        check(hidden_TD, weight_VD)
        from . import token_logprob_triton as kernels

        if group is not None:
            options = vocabulary, group, temperature, deterministic
            out = kernels.ShardedTokenLogprob.apply(hidden_TD, weight_VD, targets_T, *options)
            total = torch.where(scored_T, g * out[0] + h * out[1], 0).sum()
        elif torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
            sums = g.float(), h.float(), temperature, deterministic
            total, out, *_ = kernels.token_logprob_sum_op(hidden_TD, weight_VD, targets_T, *sums)
        else:
            out = kernels.token_logprob_op(hidden_TD, weight_VD, targets_T, temperature, deterministic)
            total = torch.where(scored_T, g * out[0] + h * out[1], 0).sum()
        out = out.detach()
        return total, out[0], out[1], scored_T & (out[0] >= -LN2 * out[3])  # the likeliest has log-prob -log s
    options = temperature, deterministic, None, True, vocabulary, group
    logprobs, entropy, top = _tiled(hidden_TD, weight_VD, targets_T, *options)
    total = torch.where(scored_T, g * logprobs + h * entropy, 0).sum()
    return total, logprobs.detach(), entropy.detach(), top


def logits_logprob(logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0):
    """token_logprob for those who hold the logits (T, V): read once forward; backward read, their gradient written."""
    if use_triton(logits_TV):
        check(logits_TV)
        from .logits_logprob_triton import logits_logprob_op

        return logits_logprob_op(logits_TV, targets_T, temperature)[:2].unbind()
    return logits_logprob_reference(logits_TV, targets_T, temperature=temperature)


def check(*tensors: Tensor) -> None:
    """Raises ValueError for what the Triton kernels do not compute."""
    dtypes = [x.dtype for x in tensors]
    if dtypes[0] not in (torch.float32, torch.float16, torch.bfloat16) or len(set(dtypes)) > 1:
        wanted = "float32, float16 or bfloat16, the same for all"
        raise ValueError(f"token_logprob of {dtypes}: the kernels take {wanted}; or set MINITRL_KERNELS=reference")
