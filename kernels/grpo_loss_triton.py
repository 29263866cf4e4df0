"""The clipped GRPO objective in one pass: loss, metrics and gradient from each token's numbers, read once.

The formulas stand in grpo_loss.py, and so does their text: `token_loss` and `token_slopes` are compiled from there.

    grpo_loss_tiles_kernel    a program a tile of TOKENS tokens: the gradient of each token's l_t, and the tile's sums
    grpo_loss_sums_kernel     one program: the tiles' sums, added up in their order and divided

The gradient is that of the undivided sum. What it is divided by may be known only when all is counted, and the gradient
from upstream only in the backward pass: there one product with a number applies both. So nothing is read twice and
nothing waits for the device, whatever the loss type.

Where a token's gradient depends on its sequence, on its length (grpo) or its mean log-ratio (sequence ratios), a tile
stands for the sequences that start in it, each read from its own first token on: in a first sweep its length and mean
log-ratio, in a second its losses, for sequence ratios in a third its gradients; all sweeps but the first find what they
read in cache. A token's gradient has the same bits wherever its sequence stands and whatever else is in the pack.

Bytes a token, floats of 4 bytes: mask 1; if it is live logprob 4, old 4, advantage 4, ref 4 (beta), entropy 4 (bonus or
threshold); segment 8 (by sequence); gradient out 4, kept out 1 (threshold with bonus). Backward product: 4 in, 4 out.
"""

from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grpo_loss as formulas
from .matmul_triton import settled
from .targets import config


@triton.jit
def expm1(x):
    """exp(x) - 1, near 0 by its series: x (1 + x/2 (1 + x/3 (1 + ...))). Triton has none that runs everywhere."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for n in tl.static_range(10, 1, -1):
        series = 1.0 + x * (1.0 / n) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def constant(x):
    return x


# The functions of grpo_loss.py under Triton: the same code, which finds other things behind the names that it uses.
names = {"__name__": __name__, "xp": tl, "expm1": expm1, "constant": constant}
names["MAX_LOG_RATIO"] = tl.constexpr(formulas.MAX_LOG_RATIO)
shared = "bounded moves least k3 token_loss token_slopes".split()
for function in (getattr(formulas, name) for name in shared):
    names[function.__name__] = triton.jit(FunctionType(function.__code__, names, function.__name__))
token_loss, token_slopes = names["token_loss"], names["token_slopes"]


@triton.jit
def read(t, live, numbers):
    """Of the tokens t those that are live, in float32, and 0 for the others, of which nothing is read."""
    return tl.load(numbers + t, mask=live, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def grpo_loss_tiles_kernel(
    logprobs, old, ref, advantages, entropy, mask, segments, gradient, kept_out, sums,
    T, lower, upper, delta, beta, threshold,
    LOSS_TYPE: tl.constexpr, CORRECTED: tl.constexpr, THRESHOLD: tl.constexpr, SEQUENCE_RATIOS: tl.constexpr,
    BY_SEQUENCE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """gradient (T,): d l_t / d log pi(t).  kept_out (T,): whether the policy term counts.  sums (7, tiles)."""
    CISPO: tl.constexpr = LOSS_TYPE == "cispo"
    SWEEPS: tl.constexpr = 2 if SEQUENCE_RATIOS else 1
    tile, lane = tl.program_id(0), tl.arange(0, TOKENS)
    start, limit = tile * TOKENS, tl.minimum(tile * TOKENS + TOKENS, T)
    nothing = tl.zeros([TOKENS], tl.float32)
    loss, bonus, low, high, kl, tokens, sequences = nothing, nothing, nothing, nothing, nothing, nothing, 0.0
    if BY_SEQUENCE:
        t = start + lane
        before = tl.load(segments + t - 1, mask=(t > 0) & (t < T), other=-1)
        starts = (tl.load(segments + t, mask=t < T, other=-1) != before) & (t < T)
        start = tl.min(tl.where(starts, t, T))

    while start < limit:  # once, or for each sequence that starts in this tile
        end, length, mean = limit, 1.0, 0.0
        if BY_SEQUENCE:
            segment = tl.load(segments + start)
            count, total, end, reached = nothing, nothing, start, start
            while reached == end:  # all of the tokens so far were of this sequence
                t = reached + lane
                ours = tl.load(segments + t, mask=t < T, other=-1) == segment
                live = tl.load(mask + t, mask=ours, other=0) != 0
                count += live.to(tl.float32)
                if SEQUENCE_RATIOS:
                    total += read(t, live, logprobs) - read(t, live, old)
                end += tl.sum(ours.to(tl.int32))
                reached += TOKENS
            length = tl.maximum(tl.sum(count), 1.0)
            sequences += tl.minimum(tl.sum(count), 1.0)
            mean = tl.sum(total) / length

        through = nothing
        for sweep in tl.static_range(SWEEPS):
            each = tl.sum(through) / length  # what every token of the sequence gets, known in the last sweep
            for first in range(start, end, TOKENS):
                t = first + lane
                live = tl.load(mask + t, mask=t < end, other=0) != 0
                logprob, advantage = read(t, live, logprobs), read(t, live, advantages)
                if SEQUENCE_RATIOS:
                    log_ratio = tl.where(live, mean, 0.0)
                else:
                    log_ratio = logprob - read(t, live, old)
                kept, nats, ref_log_ratio = live, nothing, None
                if ref is not None:
                    ref_log_ratio = read(t, live, ref) - logprob
                if entropy is not None:
                    nats = read(t, live, entropy)
                    if THRESHOLD:
                        kept = live & (nats >= threshold)
                counts = kept.to(tl.float32)
                terms = (logprob, log_ratio, ref_log_ratio, advantage, counts, lower, upper, delta, beta)
                by_ratio, straight = token_slopes(*terms, CISPO, CORRECTED)
                losses, k3, is_low, is_high = token_loss(*terms, CISPO, CORRECTED)
                if LOSS_TYPE == "grpo":
                    losses, by_ratio, straight = losses / length, by_ratio / length, straight / length
                if sweep == 0:
                    loss += losses
                    bonus += tl.where(kept, nats, 0.0)
                    low += is_low.to(tl.float32)
                    high += is_high.to(tl.float32)
                    kl += k3
                    tokens += live.to(tl.float32)
                    through += by_ratio
                if sweep == SWEEPS - 1:
                    if SEQUENCE_RATIOS:
                        by_ratio = tl.where(live, each, 0.0)
                    tl.store(gradient + t, by_ratio + straight, mask=t < end)
                    if kept_out is not None:
                        tl.store(kept_out + t, kept, mask=t < end)
        start = end

    at, tiles = sums + tile, tl.num_programs(0)
    tl.store(at, tl.sum(loss))
    tl.store(at + tiles, tl.sum(bonus))
    tl.store(at + 2 * tiles, tl.sum(low))
    tl.store(at + 3 * tiles, tl.sum(high))
    tl.store(at + 4 * tiles, tl.sum(kl))
    tl.store(at + 5 * tiles, tl.sum(tokens))
    tl.store(at + 6 * tiles, sequences)


@triton.jit
def added_up(row, tiles, TILES: tl.constexpr):
    total = tl.zeros([TILES], tl.float32)
    for first in range(0, tiles, TILES):
        at = first + tl.arange(0, TILES)
        total += tl.load(row + at, mask=at < tiles, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["tiles"])
def grpo_loss_sums_kernel(
    sums, loss, metrics, shares, tiles, tokens, sequences, factor, entropy_coef,
    LOSS_TYPE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """tokens, sequences: of the step, or negative: those counted here.  factor: what their number is multiplied by.

    loss ().  metrics (4,): clipped low, high, either; k3.  shares (2,): what the gradients of log-probs and entropy are
    multiplied by.
    """
    counted = tl.maximum(added_up(sums + 5 * tiles, tiles, TILES), 1.0)
    tokens = tl.where(tokens < 0, counted, tl.maximum(tokens, 1.0))
    if LOSS_TYPE == "grpo" or LOSS_TYPE == "dr_grpo":
        found = added_up(sums + 6 * tiles, tiles, TILES)
        divisor = tl.maximum(tl.where(sequences < 0, found, sequences), 1.0) * factor
    elif LOSS_TYPE == "bnpo":
        divisor = counted * factor
    else:
        divisor = tokens
    low, high = added_up(sums + 2 * tiles, tiles, TILES), added_up(sums + 3 * tiles, tiles, TILES)
    bonus = entropy_coef * added_up(sums + tiles, tiles, TILES)
    tl.store(loss, added_up(sums, tiles, TILES) / divisor - bonus / tokens)
    tl.store(metrics, low / tokens)
    tl.store(metrics + 1, high / tokens)
    tl.store(metrics + 2, (low + high) / tokens)
    tl.store(metrics + 3, added_up(sums + 4 * tiles, tiles, TILES) / tokens)
    tl.store(shares, 1.0 / divisor)
    tl.store(shares + 1, -entropy_coef / tokens)


@torch.library.custom_op("minitrl::grpo_loss", mutates_args=())
def grpo_loss_op(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor | None, entropy: Tensor | None,
    segments: Tensor | None, loss_type: str, sequence_ratios: bool, lower: float, upper: float, delta: float,
    beta: float, corrected: bool, entropy_coef: float, threshold: float | None, tokens: float, sequences: float,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss (), metrics (4,), the gradient (T,) of the undivided sum, kept (T,) or (0,), shares (2,)."""
    loss, metrics, gradient, kept, shares = _outputs(logprobs, entropy_coef, threshold)
    inputs = (logprobs, old, ref, advantages, entropy, mask, segments)
    T, tile = len(logprobs), config("grpo_loss_tiles")
    tiles = triton.cdiv(T, tile["TOKENS"])
    sums = logprobs.new_empty(7, tiles, dtype=torch.float32)
    if tiles:
        grpo_loss_tiles_kernel[(tiles,)](
            *(None if x is None else settled(x) for x in inputs), gradient, kept if len(kept) else None, sums,
            T, lower, upper, delta, beta, threshold or 0.0,
            LOSS_TYPE=loss_type, CORRECTED=corrected, THRESHOLD=threshold is not None, SEQUENCE_RATIOS=sequence_ratios,
            BY_SEQUENCE=segments is not None, **tile,
        )  # fmt: skip
    numbers = (tokens, sequences, factor, entropy_coef)
    results = sums, loss, metrics, shares
    grpo_loss_sums_kernel[(1,)](*results, tiles, *numbers, LOSS_TYPE=loss_type, **config("grpo_loss_sums"))
    return loss, metrics, gradient, kept, shares


def _outputs(logprobs: Tensor, entropy_coef: float, threshold: float | None) -> tuple[Tensor, ...]:
    T = len(logprobs)
    loss, metrics, gradient, shares = (logprobs.new_empty(n, dtype=torch.float32) for n in ((), 4, T, 2))
    kept = logprobs.new_empty(T if entropy_coef and threshold is not None else 0, dtype=torch.bool)
    return loss, metrics, gradient, kept, shares


@grpo_loss_op.register_fake
def _(logprobs, old, advantages, mask, ref, entropy, segments, *options):
    return _outputs(logprobs, options[7], options[8])


def _keep(ctx, inputs, output):
    logprobs, mask, entropy, entropy_coef = inputs[0], inputs[3], inputs[5], inputs[14]
    _, metrics, gradient, kept, shares = output
    ctx.mark_non_differentiable(metrics, gradient, kept, shares)
    ctx.set_materialize_grads(False)  # the others get no gradient: no zeros for them
    bonus = entropy is not None and entropy_coef != 0.0
    ctx.save_for_backward(gradient, shares, (kept if len(kept) else mask) if bonus else None)
    ctx.dtypes = logprobs.dtype, entropy.dtype if bonus else None


def _backward(ctx, g, *_):
    gradient, shares, kept = ctx.saved_tensors
    d_logprobs = (gradient * (g * shares[0])).to(ctx.dtypes[0])
    d_entropy = None if kept is None else (kept * (g * shares[1])).to(ctx.dtypes[1])
    return d_logprobs, None, None, None, None, d_entropy, *[None] * 13


grpo_loss_op.register_autograd(_backward, setup_context=_keep)


def grpo_loss(
    logprobs_T, old_logprobs_T, advantages_T, mask_T, *, ref_logprobs_T=None, entropy_T=None, segments_T=None,
    loss_type="dapo", importance_sampling_level="token", epsilon=0.2, epsilon_high=None, delta=None, beta=0.0,
    use_bias_correction_kl=True, entropy_coef=0.0, entropy_threshold=None, max_completion_length=None, tokens=None,
    sequences=None, micro_batches=1,
):  # fmt: skip
    """Loss and metrics of a micro-batch; arguments and what is returned are those of `minitrl.losses.grpo_loss`."""
    if logprobs_T.dtype == torch.float64:
        raise ValueError("the Triton kernel computes in float32: float64 log-probs need MINITRL_KERNELS=reference")
    sequence_ratios = importance_sampling_level == "sequence"
    by_sequence = sequence_ratios or loss_type == "grpo" or (loss_type == "dr_grpo" and sequences is None)
    uses_entropy = entropy_coef != 0.0 or entropy_threshold is not None
    inputs = (
        logprobs_T, old_logprobs_T, advantages_T, mask_T, ref_logprobs_T if beta != 0.0 else None,
        entropy_T if uses_entropy else None, segments_T if by_sequence else None,
    )  # fmt: skip
    loss, metrics, *_ = grpo_loss_op(
        *inputs,
        loss_type,
        sequence_ratios,
        *formulas.clip_bounds(loss_type, epsilon, epsilon_high, delta),
        beta,
        use_bias_correction_kl,
        entropy_coef,
        entropy_threshold,
        -1.0 if tokens is None else tokens,
        -1.0 if sequences is None else sequences,
        {"dr_grpo": max_completion_length, "bnpo": micro_batches}.get(loss_type, 1.0),
    )
    kinds = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", *(["kl"] if beta != 0.0 else []))
    return loss, dict(zip(kinds, metrics.unbind()))
