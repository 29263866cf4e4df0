"""Objectives: pure functions from log-probs of packed tokens, or of whole answers, to a loss, each with its formula."""

import math

import torch
from torch.nn.functional import logsigmoid

from .kernels import grpo_loss as kernel

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")


def grpo_loss(
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
    """The clipped GRPO objective (TRL: GRPOTrainer._compute_loss); kernels/grpo_loss.py has its formulas.

    logprobs_T: (T,) float32 log-probs of the tokens under the policy; the gradient flows through them, and with
        entropy_coef through entropy_T; everything else is data.
    old_logprobs_T: (T,) the same before the first update on these rollouts. On policy, pass `logprobs_T.detach()`: the
        ratio is exactly 1.
    advantages_T: (T,) the advantage of each token's completion.
    mask_T: (T,) bool, the tokens trained on; others may hold NaN.
    ref_logprobs_T: (T,) under the reference policy; needed where beta != 0.
    entropy_T: (T,) the policy's entropy in nats; needed for entropy_coef and entropy_threshold.
    segments_T: (T,) int64, ascending, the sequence of each token (`Pack.segments_T`); needed for "grpo", "dr_grpo" and
        sequence ratios.
    tokens, sequences: what to divide by: the counts over all micro-batches and ranks of the step, by default those of
        these tensors.
    micro_batches: how many micro-batches the step has over all ranks; "bnpo" alone averages over them.

    Returns (loss, metrics): both are shares of the whole step's: sum them over micro-batches and ranks, never average.
    Raises ValueError for an unknown or incomplete combination of options.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is unknown; choose one of {', '.join(LOSS_TYPES)}")
    if importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
        levels = " or ".join(IMPORTANCE_SAMPLING_LEVELS)
        raise ValueError(f"importance_sampling_level {importance_sampling_level!r} is unknown; choose {levels}")
    if beta != 0.0 and ref_logprobs_T is None:
        raise ValueError(f"beta {beta} needs ref_logprobs_T, the log-probs under the reference policy")
    if (entropy_coef != 0.0 or entropy_threshold is not None) and entropy_T is None:
        raise ValueError("entropy_coef and entropy_threshold need entropy_T")
    if segments_T is None and (loss_type in ("grpo", "dr_grpo") or importance_sampling_level == "sequence"):
        raise ValueError(f"loss_type {loss_type!r} with {importance_sampling_level!r} ratios needs segments_T")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type 'dr_grpo' divides by max_completion_length: pass it")
    if mask_T.shape != logprobs_T.shape:
        shapes = f"mask_T has shape {tuple(mask_T.shape)}, logprobs_T {tuple(logprobs_T.shape)}"
        raise ValueError(f"{shapes}; every per-token tensor has length T")
    return kernel.grpo_loss(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        mask_T.bool(),
        ref_logprobs_T=ref_logprobs_T,
        entropy_T=entropy_T,
        segments_T=segments_T,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        use_bias_correction_kl=use_bias_correction_kl,
        entropy_coef=entropy_coef,
        entropy_threshold=entropy_threshold,
        max_completion_length=max_completion_length,
        tokens=tokens,
        sequences=sequences,
        micro_batches=micro_batches,
    )


def sampling_weights(old_logprobs_T, sampler_logprobs_T, mask_T, segments_T, mode, clip_max=3.0, clip_min=None):
    """(T,) what to multiply a token's policy term by, since the sampler's arithmetic is not quite the trainer's.

    The ratio is exp(old - sampler), of the token ("token_...") or of its whole sequence ("sequence_..."). Beyond the
    bounds it is cut to them ("..._truncate") or 0 ("..._mask"). TRL 1.16: GRPOTrainer's importance_sampling_ratio.

    old_logprobs_T: (T,) the trainer's log-probs before the first update.  sampler_logprobs_T: (T,) those sampled by;
    NaN where there is none: the token's own ratio is then 1.  mask_T: (T,) bool, the tokens trained on.
    segments_T: (T,) int64, the sequence of each token.
    """
    difference_T = torch.where(mask_T, old_logprobs_T - sampler_logprobs_T, 0.0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        sums = difference_T.new_zeros(int(segments_T[-1]) + 1).index_add_(0, segments_T, difference_T)
        difference_T = sums[segments_T]
    ratio_T, low, high = difference_T.exp(), clip_min or 0.0, math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio_T.clamp(low, high)
    return torch.where((ratio_T < low) | (ratio_T > high), 0.0, ratio_T)


DPO_LOSS_TYPES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_pair discopop apo_zero apo_down sft"
).split()
# Those in which a pair's loss depends on the other pairs: they are defined over a whole step, and need all of it.
WHOLE_STEP = ("aot", "aot_pair", "bco_pair")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_pair")


def dpo_loss(
    chosen_P,
    rejected_P,
    ref_chosen_P,
    ref_rejected_P,
    chosen_lengths_P,
    rejected_lengths_P,
    *,
    loss_type=("sigmoid",),
    loss_weights=(),
    beta=0.1,
    label_smoothing=0.0,
    discopop_tau=0.05,
    delta=0.0,
    pairs=None,
    chosen_tokens=None,
):
    """Direct preference optimisation (arXiv 2305.18290) and its kin, as in TRL 0.16.0's DPOTrainer.dpo_loss.

        a = chosen - ref_chosen,   b = rejected - ref_rejected,   x = a - b,   e = label_smoothing

        sigmoid    -(1 - e) log s(beta x) - e log s(-beta x)                 s: the logistic function
        robust     (-(1 - e) log s(beta x) + e log s(-beta x)) / (1 - 2 e)                          2403.00409
        hinge      max(0, 1 - beta x)                                                               2309.06657
        ipo        (a / chosen_lengths - b / rejected_lengths - 1 / (2 beta))^2                     2310.12036
        exo_pair   s(beta x) (log s(beta x) - log(1 - e)) + s(-beta x) (log s(-beta x) - log e)     2402.00856
        nca_pair   -log s(beta a) - log s(-beta a) / 2 - log s(-beta b) / 2                         2402.05369
        bco_pair   -log s(beta a - delta) - log s(delta - beta b)                                   2404.04656
        sppo_hard  (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2                                      2405.00675
        aot        sigmoid's, where beta x = beta (sort(chosen - rejected) - sort(ref_chosen - ref_rejected))
        aot_pair   sigmoid's, where beta x = beta (sort(a) - sort(b))                               2406.05882
        discopop   -log s(beta x) (1 - m) + exp(-beta x) m,   m = s(beta x / discopop_tau)          2406.08414
        apo_zero   1 - s(beta a) + s(beta b)                                                        2408.06266
        apo_down   s(beta a) + 1 - s(beta (a - b))                                                  2408.06266
        sft        -sum of chosen / chosen_tokens: TRL 1.16's, and with a weight 0.16.0's rpo_alpha

    chosen_P, rejected_P: (P,) float32, each answer's log-prob under the policy, summed over its tokens; the gradient
        flows through them, and everything else is data.
    ref_chosen_P, ref_rejected_P: the same under the reference; zeros for no reference.
    chosen_lengths_P, rejected_lengths_P: (P,) how many tokens each answer has.
    loss_type, loss_weights: one or several of these, and their weights (1 each, where none are given); they are added.
    label_smoothing: the probability that a pair stands the wrong way round; exo_pair takes 0.001 for 0.
    delta: bco_pair's mean of rewards beta a, beta b: TRL's is the mean over all steps so far of each step's mean.
    pairs, chosen_tokens: what to divide by: the counts over all micro-batches and ranks of the step, by default those
        of these tensors. WHOLE_STEP losses compare pairs with each other: they are right for a whole step alone.

    Returns the loss, a share of the whole step's: sum it over micro-batches and ranks, never average.
    """
    a, b = chosen_P - ref_chosen_P, rejected_P - ref_rejected_P
    x, half, e = a - b, 0.5 / beta, label_smoothing
    e_exo = e or 1e-3

    def smoothed(x):
        return -(1 - e) * logsigmoid(beta * x) - e * logsigmoid(-beta * x)

    formulas = {
        "sigmoid": lambda: smoothed(x),
        "robust": lambda: (e * logsigmoid(-beta * x) - (1 - e) * logsigmoid(beta * x)) / (1 - 2 * e),
        "hinge": lambda: (1 - beta * x).relu(),
        "ipo": lambda: (a / chosen_lengths_P - b / rejected_lengths_P - half) ** 2,
        "exo_pair": lambda: (beta * x).sigmoid() * (logsigmoid(beta * x) - math.log(1 - e_exo))
        + (-beta * x).sigmoid() * (logsigmoid(-beta * x) - math.log(e_exo)),
        "nca_pair": lambda: -logsigmoid(beta * a) - 0.5 * logsigmoid(-beta * a) - 0.5 * logsigmoid(-beta * b),
        "bco_pair": lambda: -logsigmoid(beta * a - delta) - logsigmoid(delta - beta * b),
        "sppo_hard": lambda: (a - half) ** 2 + (b + half) ** 2,
        "aot": lambda: smoothed((chosen_P - rejected_P).sort()[0] - (ref_chosen_P - ref_rejected_P).sort()[0]),
        "aot_pair": lambda: smoothed(a.sort()[0] - b.sort()[0]),
        # m exp(-beta x) by one exponent: apart, they are 0 times infinity where the rejected answer is far ahead
        "discopop": lambda: -logsigmoid(beta * x) * (-beta * x / discopop_tau).sigmoid()
        + (logsigmoid(beta * x / discopop_tau) - beta * x).exp(),
        "apo_zero": lambda: (-beta * a).sigmoid() + (beta * b).sigmoid(),
        "apo_down": lambda: (beta * a).sigmoid() + (-beta * x).sigmoid(),
    }
    pairs, chosen_tokens = pairs or len(x), chosen_tokens or chosen_lengths_P.sum()
    loss = x.new_zeros(())
    for kind, weight in zip(loss_type, loss_weights or (1.0,) * len(loss_type), strict=True):
        loss = loss + weight * (-chosen_P.sum() / chosen_tokens if kind == "sft" else formulas[kind]().sum() / pairs)
    return loss


def reward_loss(chosen_P, rejected_P, margins_P=0.0, center_rewards_coefficient=0.0, pairs=None):
    """A reward model's loss on scores (Bradley and Terry; TRL: RewardTrainer.compute_loss), a share as above.

        -log s(chosen - rejected - margin) + center_rewards_coefficient (chosen + rejected)^2     arXiv 2312.09244, (2)
    """
    losses_P = -logsigmoid(chosen_P - rejected_P - margins_P)
    losses_P = losses_P + center_rewards_coefficient * (chosen_P + rejected_P) ** 2
    return losses_P.sum() / (pairs or len(losses_P))


def kl_estimate(logprobs_R, ref_logprobs_R, kl_estimator="k1"):
    """(R,) each token's estimate of KL(policy || reference) from its log-probs (joschu.net/blog/kl-approx.html).

    k1 = log pi - log ref, unbiased, maybe negative; k3 = exp(-k1) - 1 + k1, unbiased and never negative.
    """
    log_ratio_R = logprobs_R - ref_logprobs_R
    return log_ratio_R if kl_estimator == "k1" else kernel.k3(-log_ratio_R)[0]


def gae(rewards_R, values_R, lengths_N, gamma=1.0, lam=0.95):
    """(advantages, returns), float64 (R,), of N completions end to end: GAE(gamma, lam), arXiv 1506.02438 eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    values_R: V_t, the value before token t. Behind a completion's last token V and A are 0.  lengths_N: ints.
    """
    rewards, values, found, end = rewards_R.tolist(), values_R.tolist(), [], len(rewards_R)
    for length in reversed(lengths_N):
        advantage = following = 0.0
        for t in range(end - 1, end - length - 1, -1):
            advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
            following = values[t]
            found.append(advantage)
        end -= length
    advantages_R = torch.tensor(found[::-1], dtype=torch.float64)
    return advantages_R, advantages_R + values_R.double()


def whiten(x_R, shift_mean=True):
    """(x - mean) / sqrt(unbiased variance + 1e-8), and without shift_mean the mean added again (TRL: masked_whiten)."""
    variance, mean = torch.var_mean(x_R, correction=min(1, len(x_R) - 1)) if len(x_R) else (x_R, x_R)
    whitened_R = (x_R - mean) * torch.rsqrt(variance + 1e-8)
    return whitened_R if shift_mean else whitened_R + mean


def ppo_loss(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    values_T,
    old_values_T,
    returns_T,
    mask_T,
    *,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    tokens=None,
):
    """PPO's loss of policy and value model together (arXiv 1707.06347 eq. 7 and 9; TRL 0.16.0: PPOTrainer.train).

        policy_t = -min( r_t A_t,  clip(r_t, 1 +- cliprange) A_t ),    r_t = exp(log pi(t) - log pi_old(t))
        value_t  = max( (V_t - R_t)^2,  (clip(V_t, V_old_t +- cliprange_value) - R_t)^2 ) / 2
        loss     = sum over tokens of (policy_t + vf_coef value_t) / tokens

    logprobs_T, values_T: (T,) float32 under policy and value model; the gradient flows through them alone.
    mask_T: (T,) bool, the tokens trained on; others may hold NaN.
    tokens: what to divide by: the count over all micro-batches and ranks of the minibatch, by default that of mask_T.

    Returns (loss, metrics): shares of the whole minibatch's: sum them over micro-batches and ranks, never average.
    """
    tokens = max(1, int(mask_T.sum()) if tokens is None else tokens)
    policy, shares = grpo_loss(logprobs_T, old_logprobs_T, advantages_T, mask_T, epsilon=cliprange, tokens=tokens)
    given = (logprobs_T.detach(), old_logprobs_T, values_T, old_values_T, returns_T)
    new, old, values, old_values, returns = (x_T[mask_T] for x_T in given)
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    free, bound = (values - returns).square(), (clipped - returns).square()
    value = 0.5 * torch.maximum(free, bound).sum() / tokens
    difference = new - old
    ratio = difference.clamp(-kernel.MAX_LOG_RATIO, kernel.MAX_LOG_RATIO).exp()
    metrics = {
        "loss/policy_avg": policy.detach(),
        "loss/value_avg": value.detach(),
        "policy/approxkl_avg": 0.5 * difference.square().sum() / tokens,
        "policy/clipfrac_avg": shares["clip_ratio/region_mean"],
        "val/clipfrac_avg": (bound > free).to(value).sum() / tokens,
        "val/ratio": ratio.sum() / tokens,
        "val/ratio_squared": ratio.square().sum() / tokens,
    }
    return policy + vf_coef * value, metrics
