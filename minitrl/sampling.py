"""From logits to tokens: what is done to a distribution before a token is drawn from it, and the drawing."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What is done to the logits before a token is drawn, in this order: penalty, temperature, top_k, top_p, min_p."""

    temperature: float = 1.0  # 0 = greedy: nothing is cut, and log-probs are those at temperature 1
    top_p: float = 1.0  # keep the fewest likeliest tokens whose mass reaches top_p
    top_k: int = 0  # keep the k likeliest; 0 or -1 = all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the likeliest
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen, in the prompt or since; multiplies others

    def __post_init__(self):
        t, penalty = self.temperature, self.repetition_penalty
        # A temperature below 1e-4 is greedy in all but name. Smaller and larger ones could leave float32's range, which
        # is no number and fails all who are drawn for at the same time; so could penalties.
        good = is_(Real, t) and (t == 0 or 1e-4 <= t <= 1e6)
        check(good, "temperature", t, "0 (greedy) or from 0.0001 to 1000000")
        check(is_(Real, self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 = off)")
        check(is_(Integral, self.top_k) and self.top_k >= -1, "top_k", self.top_k, "a positive integer, or 0 (off)")
        check(is_(Real, self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        good = is_(Real, penalty) and 1e-4 <= penalty <= 1e4
        check(good, "repetition_penalty", penalty, "from 0.0001 to 10000 (1 = off)")

    @property
    def untouched(self) -> bool:
        """Whether the temperature is all that changes the distribution."""
        return not self.cuts and self.repetition_penalty == 1

    @property
    def cuts(self) -> bool:
        """Whether some tokens' probability is made zero."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def is_(kind, value) -> bool:
    """isinstance, where True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check(good: bool, option: str, value, wanted: str) -> None:
    """ValueError unless `good`."""
    if not good:
        raise ValueError(f"{option} must be {wanted}; got {value!r}")


def processed_logits(logits_BV: Tensor, samplings: list[Sampling], histories=None, banned=()) -> Tensor:
    """(B, V) float32 logits of the distribution sampled from: row b as `samplings[b]` asks, -inf where a token is cut.

    Where a temperature or a cut is asked for, all rows are shifted so that their largest is 0, which no probability
    notices and no temperature can overflow.
    histories: per row the ids that repetition_penalty speaks of; read only where a penalty is on.
    banned: (row, id) pairs that are cut before all else.
    """
    x_BV = logits_BV.float()
    if banned:
        cut = torch.tensor(banned, device=x_BV.device).t()
        x_BV = x_BV.index_put(tuple(cut), x_BV.new_tensor(-math.inf))
    if any(s.repetition_penalty != 1 for s in samplings):
        x_BV = _penalise(x_BV, histories, _column([s.repetition_penalty for s in samplings], x_BV))
    if any(s.temperature not in (0, 1) or s.cuts for s in samplings):
        x_BV = x_BV - x_BV.amax(-1, keepdim=True)
    if any(s.temperature not in (0, 1) for s in samplings):
        x_BV /= _column([s.temperature or 1.0 for s in samplings], x_BV)
    return _cut(x_BV, samplings) if any(s.cuts for s in samplings) else x_BV


def _column(values: list, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _penalise(x_BV: Tensor, histories: list[list[int]], penalties: Tensor) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858): a token seen gets less likely, once however often it was seen."""
    longest = max(map(len, histories))
    seen = torch.tensor([ids + ids[:1] * (longest - len(ids)) for ids in histories], device=x_BV.device)
    logits = x_BV.gather(1, seen)
    return x_BV.scatter(1, seen, torch.where(logits < 0, logits * penalties, logits / penalties))


def _cut(x_BV: Tensor, samplings: list[Sampling]) -> Tensor:
    """top_k, then top_p of what is left, then min_p. All are thresholds: tokens that tie are kept or cut together."""
    vocabulary = x_BV.shape[1]
    top_ks = [min(s.top_k, vocabulary) if s.cuts and s.top_k > 0 else vocabulary for s in samplings]
    if min(top_ks) < vocabulary:
        most = max(k for k in top_ks if k < vocabulary)
        largest = F.pad(x_BV.topk(most).values, (0, 1), value=-math.inf)  # the last column is for rows without top_k
        columns = torch.tensor([min(k, most + 1) - 1 for k in top_ks], device=x_BV.device)[:, None]
        x_BV = x_BV.masked_fill(x_BV < largest.gather(1, columns), -math.inf)
    top_ps = _column([s.top_p if s.cuts else 1.0 for s in samplings], x_BV).double()
    if (top_ps < 1).any():
        x_BV = x_BV.masked_fill(x_BV < _nucleus_threshold(x_BV, top_ps), -math.inf)
    min_ps = _column([s.min_p if s.cuts else 0.0 for s in samplings], x_BV)
    return x_BV.masked_fill(x_BV < min_ps.log(), -math.inf)  # the likeliest token's logit is 0


def _nucleus_threshold(x_BV: Tensor, top_ps: Tensor) -> Tensor:
    """(B, 1) the least likely logit of the nucleus (arXiv 1904.09751); -inf where top_p is 1.

    Sorting a vocabulary takes longer than a small model's layers, and the nucleus is nearly always in the first 1024.
    """
    mass = x_BV.exp().sum(-1, keepdim=True, dtype=torch.float64) * top_ps
    for width in (min(1024, x_BV.shape[1]), x_BV.shape[1]):
        largest = x_BV.topk(width).values
        likelihoods = largest.double().exp()
        reached = likelihoods.cumsum(-1)
        if ((reached[:, -1:] >= mass) | (top_ps == 1)).all():
            break
    # In: a token before which top_p is not yet reached; the likeliest, however small top_p is.
    last = ((reached - likelihoods < mass).sum(-1, keepdim=True) - 1).clamp(min=0)
    return largest.gather(1, last).masked_fill(top_ps == 1, -math.inf)


def draw(weights_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution: (B,) ids, and the (B,) float64 sums of the weights, which may be any.

    Summed in blocks first, so that only one block of each row is cumulated, and that in float64: a float32 sum over a
    vocabulary would lose its rare tokens. Taken is the first sum above u * total or, should rounding put that beyond
    the end, the first that reaches the last: either way one that rises, so no token of weight zero is ever drawn.
    """
    block = 256
    rows = torch.arange(len(weights_BV), device=weights_BV.device)
    blocks = F.pad(weights_BV, (0, -weights_BV.shape[1] % block)).view(len(rows), -1, block)
    sums = blocks.sum(-1).double().cumsum(-1)
    targets = (sums[:, -1] * uniforms_B)[:, None]
    chosen = _first_above(sums, targets)
    before = torch.where(chosen > 0, sums.gather(1, (chosen - 1).clamp(min=0)), 0.0)
    within = blocks[rows, chosen[:, 0]].double().cumsum(-1)
    ids = chosen * block + _first_above(within, targets - before)
    return ids[:, 0].clamp(max=weights_BV.shape[1] - 1), sums[:, -1]  # only NaNs lead beyond the end


def _first_above(sums: Tensor, targets: Tensor) -> Tensor:
    """(B, 1) index of the first of each row's rising sums above its target, or of the first that reaches the last."""
    last = sums[:, -1:]
    below_last = torch.nextafter(last, torch.zeros_like(last))
    return torch.searchsorted(sums, torch.minimum(targets, below_last), right=True).clamp(max=sums.shape[1] - 1)


def sample(logits_BV: Tensor, uniforms_B: Tensor, samplings, histories=None, banned=()) -> tuple[Tensor, Tensor]:
    """Draw one token per row: (B,) ids and (B,) float32 log-probs under the processed distribution.

    uniforms_B: float64 in [0, 1), one per row, on the logits' device. For the rest see `processed_logits`.
    """
    x_BV = processed_logits(logits_BV, samplings, histories, banned)
    probabilities_BV = x_BV.softmax(-1)
    ids_B, totals_B = draw(probabilities_BV, uniforms_B)
    if any(s.temperature == 0 for s in samplings):
        greedy_B = torch.tensor([s.temperature == 0 for s in samplings], device=ids_B.device)
        ids_B = torch.where(greedy_B, x_BV.argmax(-1), ids_B)
    return ids_B, (probabilities_BV.gather(1, ids_B[:, None])[:, 0].double() / totals_B).log().float()
