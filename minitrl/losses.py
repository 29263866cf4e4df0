"""Objectives on packed tokens: pure functions from log-probs to a loss, each with its formula."""

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
