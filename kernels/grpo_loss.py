"""The clipped GRPO objective on packed tokens, one formula for every loss type.

With log-ratio d_t = log pi(t) - log pi_old(t), the ratio is r_t = exp(d_t) (importance_sampling_level "token"), or
r_t = exp(mean of d over the token's sequence) ("sequence": GSPO, arXiv 2507.18071 eq. 7). With advantage A and
clip(r) = min(max(r, 1 - epsilon), 1 + epsilon_high), a token's loss is

    l_t = -min( min(r_t, delta) A,  clip(r_t) A )              grpo, bnpo, dr_grpo, dapo   PPO eq. 7; delta: INTELLECT-2
    l_t = -stop_gradient(min(r_t, epsilon_high)) A log pi(t)   cispo                       arXiv 2506.13585 eq. 4
    l_t += beta k_t,  k_t = [r_t] (exp(e_t) - e_t - 1),  e_t = log pi_ref(t) - log pi(t)   Schulman's k3; [r_t] where
                                                               use_bias_correction_kl is on
    and from the sum over tokens, divided as below, goes the bonus  entropy_coef sum_t H_t / tokens

What it is divided by is counted over all micro-batches and ranks before the first backward:

    dapo, cispo   sum_t l_t / tokens                               every token weighs the same
    grpo          sum_i (sum_t l_t / |o_i|) / sequences            every sequence weighs the same
    dr_grpo       sum_t l_t / (sequences * max_completion_length)  arXiv 2503.20783
    bnpo          sum_t l_t / (this micro-batch's tokens) / micro_batches    TRL 0.16.0's, which depends on the split

The gradient of a token's loss takes two ways, by the log-ratio and straight:

    dl_t / dd_t        = -r_t A where r_t moves what `min` chose      + beta k_t r_t where k_t carries r_t
    dl_t / dlog pi(t)  = -stop_gradient(min(r_t, epsilon_high)) A     (cispo)
                         -beta [r_t] (exp(e_t) - 1)

and with sequence ratios the first reaches every token of a sequence alike, as 1 / |o_i| of its sum over the sequence.

`token_loss` and `token_slopes` are the one text of this: the reference below runs them in PyTorch, and the kernel in
grpo_loss_triton.py is compiled from the same lines. Autograd, which differentiates the one, is the judge of the other.

Least traffic a token: 3 floats in (log-probs new and old, advantage; new and old are the same on policy), 1 more for
the reference's log-prob and 1 for the entropy where they count, 1 byte of mask; 1 float of gradient out, 2 with an
entropy bonus. Of a masked token nothing but the mask is read.
"""

import torch
from torch import expm1

from . import targets

# exp(20) is 4.9e8: far beyond any ratio that training survives, and far below the overflow of a 32-bit float.
MAX_LOG_RATIO = 20.0

xp = torch  # what the functions down to token_slopes take `exp` and `where` from; for the kernel, Triton's language


def bounded(x, low, high):
    """x, at least low and at most high. NaN stays NaN: what is broken has to be seen."""
    return xp.where(x < low, low, xp.where(x > high, high, x))


def moves(x, low, high):
    """Where `bounded` moves with x."""
    return (x >= low) & (x <= high)


def constant(x):
    """x as a number that no gradient flows through."""
    return x.detach()


def k3(e):
    """exp(e) - e - 1 and its derivative; above exp(20) along the tangent, which still pulls a lost token back."""
    near = xp.where(e > MAX_LOG_RATIO, MAX_LOG_RATIO, e)
    slope = expm1(near)  # not exp(e) - 1, which is below 0 where the two policies all but agree
    return slope - near + slope * (e - near), slope


def token_loss(logprob, log_ratio, ref_log_ratio, advantage, kept, lower, upper, delta, beta, CISPO, CORRECTED):
    """l_t, k_t, and whether the ratio was clipped from below and from above.

    kept: 1 where the policy term counts, else 0.  ref_log_ratio: e_t, or None without a KL penalty.
    """
    ratio = xp.exp(bounded(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = bounded(ratio, lower, upper)
    if CISPO:
        loss = -constant(clipped) * advantage * logprob
    else:
        loss = -least(bounded(ratio, 0.0, delta) * advantage, clipped * advantage)
    loss = loss * kept
    kl = xp.zeros_like(loss)
    if ref_log_ratio is not None:
        kl, slope = k3(ref_log_ratio)
        if CORRECTED:
            kl = kl * ratio
        loss = loss + beta * kl
    return loss, kl, (ratio < lower) & (advantage < 0), (ratio > upper) & (advantage > 0)


def least(x, y):
    """The smaller of two, with NaN for NaN."""
    return xp.where(x <= y, x, y)


def token_slopes(logprob, log_ratio, ref_log_ratio, advantage, kept, lower, upper, delta, beta, CISPO, CORRECTED):
    """The derivatives of l_t by the log-ratio, and by the log-prob where it does not stand in the log-ratio."""
    ratio = xp.exp(bounded(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = bounded(ratio, lower, upper)
    if CISPO:
        by_ratio, straight = xp.zeros_like(ratio), -clipped * advantage * kept
    else:
        free = bounded(ratio, 0.0, delta) * advantage <= clipped * advantage
        moving = (free & moves(ratio, 0.0, delta)) | (~free & moves(ratio, lower, upper))
        by_ratio, straight = xp.where(moving, -ratio * advantage * kept, 0.0), xp.zeros_like(ratio)
    if ref_log_ratio is not None:
        kl, slope = k3(ref_log_ratio)
        by_e = beta * slope
        if CORRECTED:
            by_ratio = by_ratio + beta * kl * ratio
            by_e = by_e * ratio
        straight = straight - by_e
    return xp.where(moves(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO), by_ratio, 0.0), straight


def clip_bounds(loss_type: str, epsilon: float, epsilon_high: float | None, delta: float | None) -> tuple:
    """Between which the ratio is clipped, and the bound of the ratio that is not clipped otherwise."""
    high = epsilon if epsilon_high is None else epsilon_high
    lower, upper = (0.0, high) if loss_type == "cispo" else (1 - epsilon, 1 + high)
    return lower, upper, torch.inf if delta is None else delta


def grpo_loss_reference(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    mask_T,
    *,
    ref_logprobs_T=None,
    entropy_T=None,
    segments_T=None,
    loss_type="dapo",
    importance_sampling_level="token",
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    beta=0.0,
    use_bias_correction_kl=True,
    entropy_coef=0.0,
    entropy_threshold=None,
    max_completion_length=None,
    tokens=None,
    sequences=None,
    micro_batches=1,
):
    """The objective of a micro-batch, in plain PyTorch; autograd gives the gradient.

    Arguments are those of `minitrl.losses.grpo_loss`. Returns (loss, metrics): the loss is this micro-batch's share of
    the step's loss, and each metric its share of the step's token mean: both add up over micro-batches and ranks.
    """
    # `where` before any exp: what stands at masked positions (padding, prompts) may be NaN and must not reach the sums.
    zero = logprobs_T.new_zeros(())
    logprobs = torch.where(mask_T, logprobs_T, zero)
    advantages = torch.where(mask_T, advantages_T, zero)
    log_ratio = torch.where(mask_T, logprobs - old_logprobs_T.detach(), zero)
    ref_log_ratio = torch.where(mask_T, ref_logprobs_T.detach() - logprobs, zero) if beta != 0.0 else None
    mask = mask_T.to(logprobs.dtype)
    tokens = max(1, int(mask_T.sum()) if tokens is None else tokens)

    if segments_T is not None:
        segments = int(segments_T[-1]) + 1 if len(segments_T) else 0
        lengths = mask.new_zeros(segments).index_add(0, segments_T, mask)  # |o_i|
        sequences = max(1, int((lengths > 0).sum()) if sequences is None else sequences)
        lengths_T = lengths.clamp(min=1)[segments_T]
    if importance_sampling_level == "sequence":
        sums = torch.zeros_like(lengths).index_add(0, segments_T, log_ratio)
        log_ratio = torch.where(mask_T, sums[segments_T] / lengths_T, zero)

    kept = mask  # the tokens that the policy term and the entropy bonus act on
    if entropy_threshold is not None:  # only those where the policy decides (arXiv 2506.01939)
        kept = mask * (entropy_T.detach() >= entropy_threshold)
    bounds = clip_bounds(loss_type, epsilon, epsilon_high, delta)
    terms = (logprobs, log_ratio, ref_log_ratio, advantages, kept)
    losses, kl, low, high = token_loss(*terms, *bounds, beta, loss_type == "cispo", use_bias_correction_kl)
    metrics = {
        "clip_ratio/low_mean": (low * mask).sum() / tokens,
        "clip_ratio/high_mean": (high * mask).sum() / tokens,
        "clip_ratio/region_mean": ((low | high) * mask).sum() / tokens,
    }
    if beta != 0.0:
        metrics["kl"] = (kl.detach() * mask).sum() / tokens

    losses = losses * mask
    if loss_type == "grpo":
        loss = (losses / lengths_T).sum() / sequences
    elif loss_type == "dr_grpo":
        loss = losses.sum() / (sequences * max_completion_length)
    elif loss_type == "bnpo":
        loss = losses.sum() / mask.sum().clamp(min=1) / micro_batches
    else:
        loss = losses.sum() / tokens
    if entropy_coef != 0.0:
        loss = loss - entropy_coef * torch.where(kept > 0, entropy_T, zero).sum() / tokens
    return loss, metrics


def grpo_loss(logprobs_T, *args, **options):
    """`grpo_loss_reference`, or the same in one pass on a GPU; arguments are those of `minitrl.losses.grpo_loss`."""
    if targets.use_triton(logprobs_T):
        from . import grpo_loss_triton

        return grpo_loss_triton.grpo_loss(logprobs_T, *args, **options)
    return grpo_loss_reference(logprobs_T, *args, **options)
