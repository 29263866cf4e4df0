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

Least traffic per token: 5 floats in (log-probs new, old and reference, advantage, entropy), 1 byte of mask, 2 floats of
gradient out.
"""

import torch

# exp(20) is 4.9e8: far beyond any ratio that training survives, and far below the overflow of a 32-bit float.
MAX_LOG_RATIO = 20.0


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
    log_ratio = torch.where(mask_T, logprobs - old_logprobs_T, zero)
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
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    high = epsilon if epsilon_high is None else epsilon_high
    lower, upper = (0.0, high) if loss_type == "cispo" else (1 - epsilon, 1 + high)
    clipped = ratio.clamp(lower, upper)
    if loss_type == "cispo":
        losses = -clipped.detach() * advantages * logprobs
    else:
        unclipped = ratio if delta is None else ratio.clamp(max=delta)
        losses = -torch.minimum(unclipped * advantages, clipped * advantages)

    kept = mask  # the tokens that the policy term and the entropy bonus act on
    if entropy_threshold is not None:  # only those where the policy decides (arXiv 2506.01939)
        kept = mask * (entropy_T.detach() >= entropy_threshold)
        losses = losses * kept

    with torch.no_grad():
        low_clipped = (ratio < lower) & (advantages < 0)
        high_clipped = (ratio > upper) & (advantages > 0)
        metrics = {
            "clip_ratio/low_mean": (low_clipped * mask).sum() / tokens,
            "clip_ratio/high_mean": (high_clipped * mask).sum() / tokens,
            "clip_ratio/region_mean": ((low_clipped | high_clipped) * mask).sum() / tokens,
        }
    if beta != 0.0:
        ref_log_ratio = torch.where(mask_T, ref_logprobs_T - logprobs, zero).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = torch.expm1(ref_log_ratio) - ref_log_ratio  # expm1 keeps k3 >= 0 where the two policies all but agree
        if use_bias_correction_kl:
            kl = kl * ratio
        metrics["kl"] = (kl.detach() * mask).sum() / tokens
        losses = losses + beta * kl

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


grpo_loss = grpo_loss_reference  # the one form there is so far, for every device
