"""The generation engine: many completions at once from a paged key/value cache.

A prompt is *prefilled* once, several prompts packed into one pass, and its last token's hidden state is kept. Each of
its n completions then enters the batch when there is room: it shares the prompt's full pages (they are reference-
counted), gets a copy of the last, partly filled one, and draws its first token from the kept state. A *decoding step*
feeds the newest token of every running completion, writes its key and value into the page it has come to, and draws the
next. Whoever ends leaves the batch and gives its pages back, and waiting completions enter before the next step, so the
batch stays full whatever the lengths are.

    prompt, 21 tokens, pages of 16:     [ page 4: 16 tokens ] [ page 9: 5 tokens ]
    completion 0                          page 4 (shared)       page 7: a copy of 9, its own from there   page 12 ...
    completion 1, the group's last        page 4 (shared)       page 9 itself                             page 13 ...

What a completion draws depends on the logits and on (seed, its index in the group) alone, never on what else is in the
batch. Ids are what was sampled, never encoded again. Parameters are read in place: a weight update needs no call.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.attention import attention
from .kernels.decode import decode, sharing
from .kernels.linear import linear, packed_weights
from .packing import pack


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` is all that was sampled: the end token too, and what a stop string was made of."""

    ids: list[int]
    logprobs: list[float]  # of each id, under the distribution that it was drawn from
    text: str  # special tokens left out, cut before the stop string
    finish_reason: str  # "stop": an end token or a stop string; "length": max_tokens


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
        # A temperature below 1e-4 is greedy in all but name, and dividing by it could leave float32's range.
        good = _is(Real, t) and (t == 0 or 1e-4 <= t < math.inf)
        _check(good, "temperature", t, "0 (greedy) or at least 0.0001")
        _check(_is(Real, self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 = off)")
        _check(_is(Integral, self.top_k) and self.top_k >= -1, "top_k", self.top_k, "a positive integer, or 0 (off)")
        _check(_is(Real, self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        good = _is(Real, penalty) and 0 < penalty < math.inf
        _check(good, "repetition_penalty", penalty, "positive (1 = off)")

    @property
    def cuts(self) -> bool:
        """Whether some tokens' probability is made zero."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def _is(kind, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check(good: bool, option: str, value, wanted: str) -> None:
    if not good:
        raise ValueError(f"{option} must be {wanted}; got {value!r}")


def processed_logits(logits_BV: Tensor, samplings: list[Sampling], histories=None) -> Tensor:
    """(B, V) float32 logits of the distribution sampled from: row b as `samplings[b]` asks, -inf where a token is cut.

    Each row is shifted so that its largest is 0, which no probability notices and no temperature can overflow.
    histories: per row the ids that repetition_penalty speaks of; read only where a penalty is on.
    """
    x_BV = logits_BV.float()
    if any(s.repetition_penalty != 1 for s in samplings):
        x_BV = _penalise(x_BV, histories, _column([s.repetition_penalty for s in samplings], x_BV))
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
    size = (reached - likelihoods < mass).sum(-1, keepdim=True)  # in: a token before which top_p is not yet reached
    return largest.gather(1, size - 1).masked_fill(top_ps == 1, -math.inf)


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


def sample(logits_BV: Tensor, uniforms_B: Tensor, samplings, histories=None) -> tuple[Tensor, Tensor]:
    """Draw one token per row: (B,) ids and (B,) float32 log-probs under the processed distribution.

    uniforms_B: float64 in [0, 1), one per row, on the logits' device. For the rest see `processed_logits`.
    """
    x_BV = processed_logits(logits_BV, samplings, histories)
    ids_B, totals_B = draw(x_BV.exp(), uniforms_B)
    if any(s.temperature == 0 for s in samplings):
        greedy_B = torch.tensor([s.temperature == 0 for s in samplings], device=ids_B.device)
        ids_B = torch.where(greedy_B, x_BV.argmax(-1), ids_B)
    return ids_B, (x_BV.gather(1, ids_B[:, None])[:, 0] - totals_B.log()).float()


class PagePool:
    """Pages of keys and values, reference-counted; the memory behind them grows to what is in use, up to `max_pages`.

    A completion is admitted only when its longest possible form fits: `promised` counts the pages that running ones may
    still take, so nobody is ever stopped halfway for want of memory.
    """

    def __init__(self, config, page_size: int, max_pages: int | None, like: Tensor):
        self.page_size, self.max_pages = page_size, math.inf if max_pages is None else max_pages
        self.layers = config.num_hidden_layers
        self.shape = (config.num_key_value_heads, page_size, config.head_dim)
        self.like = like  # a parameter: pages have its dtype and device
        self.clear()

    def clear(self) -> None:
        """Forget every page and give the memory back."""
        self.references, self.free, self.promised = [], [], 0
        self._hold(self.like.new_zeros(2, self.layers, 0, *self.shape))

    def _hold(self, pages: Tensor) -> None:
        self.pages = pages  # (2, layers, pages, K, page_size, E): a head's tokens of one page lie side by side
        self.keys, self.values = pages[0].unbind(), pages[1].unbind()

    @property
    def in_use(self) -> int:
        return len(self.references) - len(self.free)

    def fits(self, count: int) -> bool:
        """Whether `count` more pages can be had beyond those in use and promised."""
        return self.in_use + self.promised + count <= self.max_pages

    def take(self, count: int) -> list[int]:
        """`count` pages of one reference each."""
        missing = count - len(self.free)
        if missing > 0:
            old = len(self.references)
            new = min(max(old + missing, 2 * old, 64), self.max_pages)  # doubling: each page is moved about once
            assert new >= old + missing, f"{self.in_use} of {self.max_pages} pages in use: admission let too many in"
            # Zeros, since slots beyond a sequence's length are read and masked, and a NaN would get through the mask.
            pages = self.like.new_zeros(2, self.layers, new, *self.shape)
            pages[:, :, :old] = self.pages
            self._hold(pages)
            self.references += [0] * (new - old)
            self.free += range(new - 1, old - 1, -1)
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self.references[page] += 1

    def release(self, pages: list[int]) -> None:
        """Give up one reference to each page; a page without references is free."""
        for page in pages:
            self.references[page] -= 1
            assert self.references[page] >= 0, f"page {page} was released twice"
            if self.references[page] == 0:
                self.free.append(page)

    def slots(self, pages: np.ndarray, positions: np.ndarray) -> Tensor:
        """(N * K,) where `write` puts N tokens: token i goes to page pages[i], at its position in the sequence."""
        kv_heads, size, _ = self.shape
        first = pages * (kv_heads * size) + positions % size
        return torch.from_numpy((first[:, None] + np.arange(kv_heads) * size).ravel()).to(self.like.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values, (N, K, E) each, at `slots`."""
        size = self.shape[-1]
        self.keys[layer].view(-1, size).index_copy_(0, slots, k.reshape(-1, size))
        self.values[layer].view(-1, size).index_copy_(0, slots, v.reshape(-1, size))

    def copy(self, sources: list[int], targets: list[int]) -> None:
        self.pages[:, :, targets] = self.pages[:, :, sources]


@dataclass
class _Group:
    """A prompt, what is asked of its completions, and, once prefilled, its pages and its last token's hidden state."""

    prompt: list[int]
    n: int
    seed: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    end_ids: frozenset[int]
    entered: int = 0  # completions that have entered the batch so far
    pages: list[int] | None = None
    hidden: Tensor | None = None  # (D,)
    results: dict[int, Completion] = field(default_factory=dict)


@dataclass
class _Sequence:
    """A running completion. Its newest token is not in the cache yet: the next step feeds it."""

    group: _Group
    index: int
    row: int  # of the page table
    pages: list[int]
    promised: int  # pages it may still take
    uniforms: np.ndarray  # (max_tokens,) float64
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""  # kept only where there are stop strings to look for
    decoded: tuple[int, int] = (0, 0)  # ids before the second are in `text`; those from the first on are its context

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self.group.prompt) + len(self.ids) - 1


class Engine:
    """Samples completions from a model.

    max_batch: completions decoded together.  page_size: tokens a page.  max_pages: the cache's bound, by default none;
    a page takes 2 * layers * K * page_size * E numbers of the weights' dtype.  prefill_tokens: prompts prefilled
    together hold at most so many tokens (a longer one goes alone).
    """

    def __init__(self, model, tokenizer, *, max_batch=64, page_size=16, max_pages=None, prefill_tokens=4096):
        sizes = {"max_batch": max_batch, "page_size": page_size, "prefill_tokens": prefill_tokens}
        for option, value in (sizes if max_pages is None else sizes | {"max_pages": max_pages}).items():
            _check(_is(Integral, value) and value > 0, option, value, "a positive integer")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.pool = PagePool(model.config, page_size, max_pages, like=model.head_weight.detach())

    def generate(
        self, prompts, n=1, max_tokens=256, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
        stop=(), seed=0, ignore_eos=False,
    ) -> list[list[Completion]]:  # fmt: skip
        """Sample n completions of each prompt; returns them per prompt.

        prompts: each a text, a list of ids, or a list of messages.  stop: strings that end a completion, looked for in
        its text without special tokens.  ignore_eos: the model's end tokens do not end a completion.
        seed: an int, or one per prompt. Completion g of a prompt with seed s draws with the random numbers of (s, g),
        so it does not depend on how prompts are divided over calls or processes.
        Raises ValueError for what cannot be sampled: an option out of range, an empty prompt, an id outside of the
        vocabulary, prompt and max_tokens beyond the model's positions or the cache's pages.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
        groups = self._groups(prompts, n, max_tokens, sampling, stop, seed, ignore_eos)
        waiting, running = deque(groups), []
        widest = max((self._pages(len(g.prompt) + max_tokens) for g in groups), default=0)
        self.free_rows, self.page_table = list(range(self.max_batch)), np.zeros((self.max_batch, widest), np.int64)
        try:
            with torch.inference_mode(), packed_weights():  # no weight changes while it generates
                while waiting or running:
                    if entering := self._admit(waiting):
                        running += self._draw(entering, torch.stack([s.group.hidden for s in entering]))
                    else:  # the batch is as full as it gets
                        running = self._draw(running, self._decode(running))
            assert self.pool.in_use == self.pool.promised == 0, f"{self.pool.in_use} pages leaked"
        finally:
            self.pool.clear()
        return [[group.results[g] for g in range(n)] for group in groups]

    def _groups(self, prompts, n, max_tokens, sampling, stop, seed, ignore_eos) -> list[_Group]:
        """Check everything that can be known before computing."""
        _check(isinstance(prompts, (list, tuple)), "prompts", prompts, "a list of prompts")
        _check(_is(Integral, n) and n > 0, "n", n, "a positive integer")
        _check(_is(Integral, max_tokens) and max_tokens > 0, "max_tokens", max_tokens, "a positive integer")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        _check(all(isinstance(s, str) and s for s in stop), "stop", stop, "strings that are not empty")
        seeds = [seed] * len(prompts) if isinstance(seed, Real) else list(seed)
        _check(len(seeds) == len(prompts), "seed", seed, f"an integer, or one for each of the {len(prompts)} prompts")
        _check(all(_is(Integral, s) and s >= 0 for s in seeds), "seed", seed, "an integer that is not negative")
        end_ids = frozenset() if ignore_eos else frozenset(self.tokenizer.end_ids)
        groups = []
        for p, prompt in enumerate(prompts):
            ids = self._prompt_ids(p, prompt)
            self._check_room(p, len(ids), n, max_tokens)
            groups.append(_Group(ids, n, int(seeds[p]), max_tokens, sampling, stop, end_ids))
        return groups

    def _prompt_ids(self, p: int, prompt) -> list[int]:
        tokens = isinstance(prompt, (list, tuple)) and all(_is(Integral, i) for i in prompt)
        ids = [int(i) for i in prompt] if tokens else self.tokenizer.prompt_ids(prompt)
        if not ids:
            raise ValueError(f"prompt {p} is empty: there is nothing to continue")
        vocabulary = self.model.config.vocab_size
        if not (0 <= min(ids) and max(ids) < vocabulary):
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise ValueError(f"prompt {p} holds token id {wrong}; the model's vocabulary is 0 to {vocabulary - 1}")
        return ids

    def _check_room(self, p: int, length: int, n: int, max_tokens: int) -> None:
        limit = context_length(self.model.config)
        asked = f"prompt {p} has {length} tokens: with max_tokens {max_tokens}"
        if length + max_tokens > limit:
            raise ValueError(f"{asked} it goes beyond the model's {limit} positions (max_position_embeddings); "
                             "shorten the prompt or lower max_tokens")  # fmt: skip
        needed = self._pages(length) + self._pages_ahead(length, max_tokens, last=n == 1)
        if needed > self.pool.max_pages:
            raise ValueError(f"{asked} it needs {needed} pages of {self.pool.page_size} tokens; "
                             f"max_pages is {self.pool.max_pages}")  # fmt: skip

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def _pages_ahead(self, length: int, max_tokens: int, last: bool) -> int:
        """Pages a completion may take beyond its prompt's: all but a group's last need a copy of the partial one."""
        # The last token of all is never fed, so its key and value are never stored.
        return self._pages(length + max_tokens - 1) - (self._pages(length) if last else length // self.pool.page_size)

    def _admit(self, waiting: deque) -> list[_Sequence]:
        """Let completions enter, first come first served, while there are rows and pages; prefill new prompts."""
        entering, new, sources, targets = [], [], [], []
        while waiting and self.free_rows:
            group = waiting[0]
            length, last = len(group.prompt), group.entered == group.n - 1
            ahead = self._pages_ahead(length, group.max_tokens, last)
            if not self.pool.fits(ahead + (self._pages(length) if group.pages is None else 0)):
                break
            if group.pages is None:
                if new and sum(len(g.prompt) for g in new) + length > self.prefill_tokens:
                    break
                group.pages = self.pool.take(self._pages(length))
                new.append(group)
            full = length // self.pool.page_size
            if last:  # takes over the group's own references
                pages = list(group.pages)
                waiting.popleft()
            else:
                self.pool.share(group.pages[:full])
                own = self.pool.take(len(group.pages) - full)
                pages = group.pages[:full] + own
                sources, targets, ahead = sources + group.pages[full:], targets + own, ahead - len(own)
            self.pool.promised += ahead
            row = self.free_rows.pop()
            self.page_table[row, : len(pages)] = pages
            uniforms = np.random.Generator(np.random.PCG64([group.seed, group.entered])).random(group.max_tokens)
            entering.append(_Sequence(group, group.entered, row, pages, ahead, uniforms))
            group.entered += 1
        if new:
            self._prefill(new)
        if sources:
            self.pool.copy(sources, targets)
        return entering

    def _prefill(self, groups: list[_Group]) -> None:
        """Compute the prompts' keys and values into their pages, and keep each one's last hidden state."""
        packed = pack([g.prompt for g in groups], device=self.pool.like.device)
        positions = [np.arange(len(g.prompt)) for g in groups]
        pages = [np.array(g.pages)[p // self.pool.page_size] for g, p in zip(groups, positions)]
        slots = self.pool.slots(np.concatenate(pages), np.concatenate(positions))
        layout = {"lengths": packed.lengths, "prefixes": packed.prefixes}

        def attend(layer, q, k, v):
            self.pool.write(layer, slots, k, v)
            window = self.model.config.windows[layer]
            return attention(q, k, v, packed.cu_seqlens, packed.prefixes_B, window=window, **layout)

        hidden_TD = self.model.hidden(packed.tokens_T, packed.positions_T, attend)
        for group, hidden in zip(groups, hidden_TD[packed.cu_seqlens[1:].long() - 1]):
            group.hidden = hidden

    def _decode(self, running: list[_Sequence]) -> Tensor:
        """Feed every sequence's newest token; (B, D) hidden states."""
        size = self.pool.page_size
        for s in running:
            if s.cached // size == len(s.pages):  # the newest token is the first of a page
                self.page_table[s.row, len(s.pages)] = page = self.pool.take(1)[0]
                s.pages.append(page)
                s.promised -= 1
                self.pool.promised -= 1
        cached, tokens = np.array([s.cached for s in running]), np.array([s.ids[-1] for s in running])
        table = self.page_table[[s.row for s in running], : cached.max() // size + 1]
        slots = self.pool.slots(table[np.arange(len(running)), cached // size], cached)
        tokens, positions, table = (torch.from_numpy(x).to(slots.device) for x in (tokens, cached, table))
        lengths = positions + 1
        shared = sharing(table, lengths, size)

        def attend(layer, q, k, v):
            self.pool.write(layer, slots, k, v)
            keys, values, window = self.pool.keys[layer], self.pool.values[layer], self.model.config.windows[layer]
            return decode(q, keys, values, table, lengths, window=window, shared=shared)

        return self.model.hidden(tokens, positions, attend)

    def _draw(self, sequences: list[_Sequence], hidden_BD: Tensor) -> list[_Sequence]:
        """Draw every sequence's next token; those that end leave. Returns those that go on."""
        logits_BV = linear(hidden_BD, self.model.head_weight)
        uniforms = [s.uniforms[len(s.ids)] for s in sequences]
        samplings = [s.group.sampling for s in sequences]
        penalised = any(sampling.repetition_penalty != 1 for sampling in samplings)
        histories = [s.group.prompt + s.ids for s in sequences] if penalised else None
        uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
        ids_B, logprobs_B = sample(logits_BV, uniforms_B, samplings, histories)
        going = []
        for s, token, logprob in zip(sequences, ids_B.tolist(), logprobs_B.tolist()):
            if not math.isfinite(logprob):
                raise FloatingPointError("the model's logits are not finite: look at its weights and their last update")
            s.ids.append(token)
            s.logprobs.append(logprob)
            if completion := self._completion(s):
                s.group.results[s.index] = completion
                self.pool.release(s.pages)
                self.pool.promised -= s.promised
                self.free_rows.append(s.row)
            else:
                going.append(s)
        return going

    def _completion(self, s: _Sequence) -> Completion | None:
        """The finished completion, or None while it goes on."""
        group = s.group
        ended, full = s.ids[-1] in group.end_ids, len(s.ids) == group.max_tokens
        if not (ended or full or (group.stop and self._stop_appeared(s))):
            return None
        text = self.tokenizer.decode(s.ids)
        cuts = [text.index(string) for string in group.stop if string in text]
        if not (ended or full or cuts):
            return None  # the whole reads differently from what its parts did
        return Completion(s.ids, s.logprobs, text[: min(cuts)] if cuts else text, "stop" if ended or cuts else "length")

    def _stop_appeared(self, s: _Sequence) -> bool:
        """Add the newest id's text to the sequence's, and look for a stop string where it could have appeared.

        Ids are decoded behind the few that came before them, since a tokenizer may spell one differently at the start;
        and a character whose bytes are not complete, decoded as U+FFFD, waits for the rest of them.
        """
        context, read = s.decoded
        before, after = self.tokenizer.decode(s.ids[context:read]), self.tokenizer.decode(s.ids[context:])
        if after.endswith("\ufffd"):
            return False
        new = after[len(before) :]
        s.text, s.decoded = s.text + new, (read, len(s.ids))
        return any(string in s.text[-(len(new) + len(string) - 1) :] for string in s.group.stop)


def context_length(config) -> int:
    """Positions a model can tell apart: max_position_embeddings, or what RoPE scaling makes of the original ones."""
    original = config.rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return max(config.max_position_embeddings, int(original * (config.rope.get("factor") or 1)))
