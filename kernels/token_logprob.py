"""Hidden states -> log-prob of the chosen token and entropy of its distribution, without ever holding the (T, V) logits.

With z = x W^T / temperature, lse = log sum_v exp z_v, p = exp(z - lse), chosen token y, and upstream gradients g (log-prob) and h (entropy):

    log-prob = z_y - lse            entropy = lse - sum_v p_v z_v
    d z_v = g ([v = y] - p_v) - h p_v (log p_v + entropy)        dX = dZ W / temperature        dW = dZ^T X / temperature

The forward pass keeps lse and entropy, 8 bytes a token; the backward pass computes the logits of a chunk again. Least traffic forward: X and W once.
FLOPs: 2 T V D forward, 6 T V D backward. Statistics are float32 whatever X and W are (float64 for float64).
"""

import torch
from torch import Tensor

IGNORE = -100  # the target of a position that is not scored
CHUNK = 256  # rows of logits held at a time: CHUNK * V floats


def token_logprob_reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0):
    """The same in five lines with whole logits: the truth that tests compare with."""
    logprobs_TV = (torch.nn.functional.linear(hidden_TD, weight_VD).to(stat_dtype(hidden_TD)) / temperature).log_softmax(-1)
    scored_T = targets_T != IGNORE
    logprobs_T = logprobs_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return torch.where(scored_T, logprobs_T, 0), torch.where(scored_T, entropy_T, 0)


def stat_dtype(x: Tensor) -> torch.dtype:
    """float32 for statistics, float64 where the input has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class ChunkedTokenLogprob(torch.autograd.Function):
    """Chunks of rows, logits in place, recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        dtype = stat_dtype(hidden)
        logprobs, entropy, lse = (torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(3))
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            z = (hidden[rows] @ weight.t()).to(dtype).div_(temperature)
            highest = z.amax(-1, keepdim=True)  # z - max is exact where it matters, z - lse is rounded as lse is
            p = z.sub_(highest).exp()
            total = p.sum(-1)
            lse[rows] = highest[:, 0] + total.log()
            logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - total.log()
            entropy[rows] = total.log() - p.mul_(z).sum(-1) / total
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, h):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=stat_dtype(hidden), device=weight.device)
        live = ((g != 0) | (h != 0)).nonzero()[:, 0]  # rows without upstream gradient (masked, clipped) cost nothing
        for rows in live.split(CHUNK):
            x, y, g_rows, h_rows = hidden[rows], targets[rows, None], g[rows, None], h[rows, None]
            logp = (x @ weight.t()).to(lse.dtype).div_(ctx.temperature).sub_(lse[rows, None])
            p = logp.exp()
            total = p.sum(-1, keepdim=True)  # 1 but for the rounding of lse, which a row's numbers share: divide it out
            dz = logp.add_(entropy[rows, None] - total.log()).mul_(h_rows / total).add_(g_rows / total).mul_(p).neg_()
            dz.scatter_add_(1, y, g_rows)
            dz = dz.div_(ctx.temperature).to(weight.dtype)
            d_hidden[rows] = dz @ weight
            d_weight += dz.t() @ x
        return d_hidden, d_weight.to(weight.dtype), None, None


def token_logprob(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0):
    """Log-prob of each target and entropy of its distribution under softmax(hidden weight^T / temperature).

    hidden_TD: (T, D) the states that predict the targets.   weight_VD: (V, D).   targets_T: (T,) int64, IGNORE (-100) where nothing is scored.
    Returns (logprobs_T, entropy_T), float32 (float64 for float64), 0 at ignored positions; both carry gradients to hidden and weight.
    """
    scored = (targets_T != IGNORE).nonzero()[:, 0]  # ignored positions are left out before any work
    if len(scored) == len(targets_T):
        return ChunkedTokenLogprob.apply(hidden_TD, weight_VD, targets_T, temperature)
    logprobs, entropy = ChunkedTokenLogprob.apply(hidden_TD[scored], weight_VD, targets_T[scored], temperature)
    zeros = logprobs.new_zeros(len(targets_T))
    return zeros.index_copy(0, scored, logprobs), zeros.index_copy(0, scored, entropy)
