"""The generation engine: many completions at once from a paged key/value cache.

`Engine.submit` queues a request, a prompt and its n completions; each `Engine.step` schedules, runs the model once, and
draws. A step feeds the newest token of every completion that is decoding, and chunks of the prompts that are not
computed yet, up to a budget, so that a long prompt does not hold the others up. Whoever ends leaves and gives its pages
back, and waiting completions enter at the next step. A prompt is computed once: its other completions fork off the
first, sharing its full pages (they are reference-counted) with a copy of the last, partly filled one.

    prompt, 21 tokens, pages of 16:     [ page 4: 16 tokens ] [ page 9: 5 tokens ]
    completion 0                          page 4 (shared)       page 9                                    page 13 ...
    completion 1                          page 4 (shared)       page 7: a copy of 9, its own from there   page 12 ...

A full page is known by its ids and those before it, and stays after its completion until the room is needed: whatever
begins with the same ids shares it. Pages are taken when a token needs one. When there is none, the longest unused one
is forgotten; when all are used, the newest completion leaves, and comes back later: its own ids are then a longer
prompt. So memory is bounded, and what is asked for alone has to fit.

What a completion draws depends on the logits and on (seed, its index in the group) alone, never on what else is in the
batch. Ids are what was sampled, never encoded again. Parameters are read in place: for `generate` a weight update needs
no call; between two steps, say `weights_changed`.

Processes that hold a slice of the model each (Engine.tensor) have an engine each, with the keys and values of their own
heads, and call the same in the same order.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from .distributed import gather_ragged
from .kernels.decode import decode, extend, make_chunks, make_layout
from .kernels.linear import packed_weights
from .kernels.token_logprob import token_logprob
from .model import context_length
from .sampling import Sampling, check, is_, sample
from .tokenizer import RENDERING


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` is all that was sampled: the end token too, and what a stop string was made of."""

    ids: list[int]
    logprobs: list[float]  # of each id, under the distribution that it was drawn from
    text: str  # special tokens left out, cut before the stop string
    finish_reason: str  # "stop": an end token or a stop string; "length": max_tokens; "abort"
    versions: tuple[tuple[int, int, int], ...] = ()  # (weight version, first token, last + 1), in order


class PagePool:
    """Pages of keys and values, reference-counted. The memory behind them grows to what is in use, or is `max_pages`.

    A full page may have a name, (the name's number of the page before it, its ids), by which `find` finds it. With a
    name it outlives its last reference, until its room is needed: the one that is out of use the longest goes first.
    """

    def __init__(self, blocks, page_size: int, max_pages: int | None, like: Tensor):
        self.page_size, self.max_pages = page_size, math.inf if max_pages is None else max_pages
        self.layers = len(blocks)
        self.shape = (blocks[0].kv_heads, page_size, blocks[0].head_dim)
        self.like = like  # a parameter: pages have its dtype and device
        self.named = 0  # names given so far; a number is never used again
        self.clear()

    def clear(self) -> None:
        """Forget every page and give the memory back."""
        self.references, self.free = [], []
        self.names, self.found, self.unused = {}, {}, {}  # page -> name; name -> (page, number); pages, oldest first
        self._hold(self._zeros(0))

    def _zeros(self, pages: int) -> Tensor:
        """Zeros, since slots beyond a sequence's length are read and masked, and a NaN would get through the mask."""
        shape = 2, self.layers, pages, *self.shape
        if self.like.device.type != "cpu" or not pages:
            return self.like.new_zeros(shape)
        # NumPy's take no memory before they are written to.
        size = math.prod(shape) * self.like.itemsize
        try:
            memory = np.zeros(size, np.uint8)
        except MemoryError:
            raise ValueError(f"cache_gib: {size / 2**30:.3g} GiB of keys and values are not to be had") from None
        return torch.from_numpy(memory).view(self.like.dtype).view(shape)

    def _hold(self, pages: Tensor) -> None:
        self.pages = pages  # (2, layers, pages, K, page_size, E): a head's tokens of one page lie side by side
        self.keys, self.values = pages[0].unbind(), pages[1].unbind()

    @property
    def in_use(self) -> int:
        return len(self.references) - len(self.free) - len(self.unused)

    @property
    def available(self) -> float:
        """How many pages can be taken."""
        return self.max_pages - self.in_use

    def take(self, count: int) -> list[int]:
        """`count` pages of one reference each."""
        assert count <= self.available, f"{count} pages are not to be had, {self.in_use} of {self.max_pages} are in use"
        if self.max_pages < math.inf:  # within a bound nothing is forgotten before that is reached
            self._grow(min(len(self.references) + count - len(self.free), self.max_pages))
        while len(self.free) < count and self.unused:
            self._forget(next(iter(self.unused)))
        self._grow(len(self.references) + count - len(self.free))
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
        return taken

    def _grow(self, needed: int) -> None:
        old = len(self.references)
        if needed > old:
            # Doubling moves each page about once, and holds old and new for a moment. A bound leaves no room for that.
            new = max(needed, 2 * old, 64) if self.max_pages == math.inf else self.max_pages
            with RENDERING:
                pages = self._zeros(new)
            pages[:, :, :old] = self.pages
            self._hold(pages)
            self.references += [0] * (new - old)
            self.free += range(new - 1, old - 1, -1)

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self.references[page] += 1
            self.unused.pop(page, None)

    def release(self, pages: list[int]) -> None:
        """Give up one reference to each page; a page without references is free, or if it has a name out of use."""
        for page in reversed(pages):  # the end of a sequence is forgotten before its beginning
            self.references[page] -= 1
            assert self.references[page] >= 0, f"page {page} was released twice"
            if self.references[page] == 0:
                if page in self.names:
                    self.unused[page] = None
                else:
                    self.free.append(page)

    def name(self, page: int, before: int, ids: tuple[int, ...]) -> int:
        """Make a full page known; the number by which the next page's name refers to it."""
        if (before, ids) not in self.found:  # two may have computed the same at the same time
            self.named += 1
            self.found[before, ids], self.names[page] = (page, self.named), (before, ids)
        return self.found[before, ids][1]

    def find(self, ids: list[int]) -> tuple[list[int], int]:
        """The known pages that a sequence begins with, one reference to each taken, and the last one's number."""
        pages, before, size = [], 0, self.page_size
        for end in range(size, len(ids) + 1, size):
            if (found := self.found.get((before, tuple(ids[end - size : end])))) is None:
                break
            page, before = found
            pages.append(page)
        self.share(pages)
        return pages, before

    def _forget(self, page: int) -> None:
        del self.found[self.names.pop(page)], self.unused[page]
        self.free.append(page)

    def forget(self) -> None:
        """Take all names away: the weights are others, or what was to be computed was not."""
        self.free += self.unused
        self.names, self.found, self.unused = {}, {}, {}

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


@dataclass(eq=False)
class Request:
    """A prompt and what is asked of its n completions; `Engine.submit` makes it."""

    prompt: list[int]
    n: int
    max_tokens: int
    min_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    seed: int
    end_ids: frozenset[int]
    on_token: Callable[[int, int, float, str | None], None] | None  # (index, id, logprob, finish_reason or None)
    results: list[Completion | None] = field(default_factory=list)  # n, those that have ended filled in
    sequences: list["_Sequence"] = field(default_factory=list)
    leader: "_Sequence | None" = None  # the completion that computes the prompt, where others wait for it

    @property
    def finished(self) -> bool:
        """Whether all completions have ended; an aborted request's have, too."""
        return None not in self.results


@dataclass(eq=False)
class _Sequence:
    """A completion. Running, it has a row, and `cached` < tokens: what is missing is fed before the next is drawn."""

    request: Request
    index: int
    row: int | None = None  # of the page table
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache
    known: int | None = 0  # the number of its last full page's name; None: its pages get no names
    followers: list["_Sequence"] = field(default_factory=list)  # they have a row, and fork off when the prompt is done
    random: np.random.Generator | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    text: str = ""  # kept only where there are stop strings to look for
    decoded: tuple[int, int] = (0, 0)  # ids before the second are in `text`; those from the first on are its context

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.ids)

    @property
    def tokens(self) -> list[int]:
        return self.request.prompt + self.ids


class Engine:
    """Samples completions from a model. One thread uses it; `submit`, `abort` and `weights_changed` go between steps.

    max_batch: completions decoded together.  page_size: tokens a page.
    max_pages, or cache_gib: the cache's bound, by default none; a page takes 2 * layers * K * page_size * E numbers of
    the weights' dtype.
    prefill_tokens: so many tokens of prompts are computed in a step at most.
    deterministic: log-probs are those that the model's own `logprobs` gives, to the bit, in whatever company a token is
    sampled; the model is in that mode from here on. (Where top_k, top_p, min_p, repetition_penalty or min_tokens change
    the distribution they are, as always, of what was sampled from.)
    """

    def __init__(
        self, model, tokenizer, *, max_batch=64, page_size=16, max_pages=None, cache_gib=None, prefill_tokens=4096,
        deterministic=False,
    ):  # fmt: skip
        if deterministic:
            model.make_deterministic()
        like = model.head_weight.detach()
        if cache_gib is not None:
            check(max_pages is None, "cache_gib", cache_gib, "left out where max_pages is given")
            check(is_(Real, cache_gib) and 0 < cache_gib < math.inf, "cache_gib", cache_gib, "positive")
            token = 2 * len(model.layers) * model.layers[0].kv_heads * model.layers[0].head_dim * like.itemsize
            max_pages = int(cache_gib * 2**30 / (token * page_size))
            check(max_pages > 0, "cache_gib", cache_gib, f"at least {token * page_size / 2**30:.3g}, one page")
        sizes = {"max_batch": max_batch, "page_size": page_size, "prefill_tokens": prefill_tokens}
        for option, value in (sizes if max_pages is None else sizes | {"max_pages": max_pages}).items():
            check(is_(Integral, value) and value > 0, option, value, "a positive integer")
        self.model, self.tokenizer, self.tensor, self.version = model, tokenizer, model.tensor, 0
        self.prefill_tokens = prefill_tokens
        self.pool = PagePool(model.layers, page_size, max_pages, like)
        self.waiting, self.running = deque(), []  # first come, first served; the oldest first
        self.free_rows = list(range(max_batch))
        self.page_table = np.zeros((max_batch, self._pages(context_length(model.config))), np.int64)
        self.packed = {}  # weights as the processor likes them

    def generate(
        self, prompts, n=1, max_tokens=256, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
        stop=(), seed=0, ignore_eos=False, min_tokens=0,
    ) -> list[list[Completion]]:  # fmt: skip
        """Sample n completions of each prompt; returns them per prompt.

        prompts: each a text, a list of ids, or a list of messages.  stop: strings that end a completion, looked for in
        its text without special tokens.  ignore_eos: the model's end tokens do not end a completion.
        seed: an int, or one per prompt. Completion g of a prompt with seed s draws with the random numbers of (s, g),
        so it does not depend on how prompts are divided over calls or processes.
        min_tokens: so many tokens are no end tokens, and stop strings within them end nothing.
        Raises ValueError for what cannot be sampled: an option out of range, an empty prompt, an id outside of the
        vocabulary, prompt and max_tokens beyond the model's positions or the cache's pages.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
        check(isinstance(prompts, (list, tuple)), "prompts", prompts, "a list of prompts")
        seeds = [seed] * len(prompts) if isinstance(seed, Real) else list(seed)
        check(len(seeds) == len(prompts), "seed", seed, f"an integer, or one for each of the {len(prompts)} prompts")
        asked = n, max_tokens, min_tokens, sampling, stop
        requests = [
            self._request(f"prompt {p}", prompt, *asked, seeds[p], ignore_eos, None) for p, prompt in enumerate(prompts)
        ]
        try:
            for request in requests:
                self.enqueue(request)
            open_requests = set(requests)
            while open_requests:
                open_requests.difference_update(self.step())
        finally:
            for request in requests:
                self.abort(request)  # what is finished stays as it is
            self.weights_changed(self.version)  # they may, from here on
            if self.idle:
                assert self.pool.in_use == 0, f"{self.pool.in_use} pages leaked"
                self.pool.clear()
                self.page_table.fill(0)  # what a row holds beyond its length is looked up, and hidden
        return [request.results for request in requests]

    def submit(self, prompt, **options) -> Request:
        """Queue n completions of one prompt; `step` works on them. For options and errors see `prepare`."""
        return self.enqueue(self.prepare(prompt, **options))

    def prepare(
        self, prompt, *, n=1, max_tokens=256, min_tokens=0, sampling=Sampling(), stop=(), seed=0, ignore_eos=False,
        on_token=None,
    ) -> Request:  # fmt: skip
        """Check what is asked of one prompt, in any thread, for `enqueue`. For arguments and errors see `generate`.

        on_token(index, id, logprob, finish_reason or None) is called for every token as it is drawn. It may abort
        requests; what it raises ends the step.
        """
        asked = n, max_tokens, min_tokens, sampling, stop
        return self._request("the prompt", prompt, *asked, seed, ignore_eos, on_token)

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self.waiting and not self.running

    def step(self) -> list[Request]:
        """One pass of the model, and a token for every completion that is due one. Returns the requests it finished.

        Raises FloatingPointError for logits that are not finite; abort the requests then, as after any error.
        """
        try:
            with torch.inference_mode(), packed_weights(self.packed):
                feeding = self._schedule()
                hidden_ND = self._forward(feeding) if feeding else None
                return self._draw(*self._fork(feeding, hidden_ND)) if feeding else []
        except BaseException:
            self.pool.forget()  # pages were named that may not have been filled
            raise

    def abort(self, request: Request) -> None:
        """Give a request's rows and pages back at once. Its unfinished completions end here, as "abort"."""
        for s in [s for s in self.running if s.request is request]:
            self._leave(s)
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        for s in request.sequences:
            if request.results[s.index] is None:
                request.results[s.index] = self._result(s, "abort")

    def weights_changed(self, version: int) -> None:
        """The model's parameters are others: go on with these, over the keys and values that there are.

        version: what the tokens drawn from now on are said to be from (`Completion.versions`).
        """
        self.version, self.packed = version, {}
        self.pool.forget()
        for s in self.running:
            s.known = None

    def _request(
        self, what: str, prompt, n, max_tokens, min_tokens, sampling, stop, seed, ignore_eos, on_token
    ) -> Request:
        """Check everything that can be known before computing."""
        check(is_(Integral, n) and n > 0, "n", n, "a positive integer")
        check(is_(Integral, max_tokens) and max_tokens > 0, "max_tokens", max_tokens, "a positive integer")
        good = is_(Integral, min_tokens) and 0 <= min_tokens <= max_tokens
        check(good, "min_tokens", min_tokens, f"an integer from 0 to max_tokens, {max_tokens}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        check(all(isinstance(s, str) and s for s in stop), "stop", stop, "strings that are not empty")
        check(is_(Integral, seed) and seed >= 0, "seed", seed, "an integer that is not negative")
        end_ids = frozenset() if ignore_eos else frozenset(self.tokenizer.end_ids)
        ids = self._prompt_ids(what, prompt)
        self._check_room(what, len(ids), max_tokens)
        return Request(ids, int(n), max_tokens, min_tokens, sampling, stop, int(seed), end_ids, on_token)

    def _prompt_ids(self, what: str, prompt) -> list[int]:
        tokens = isinstance(prompt, (list, tuple)) and all(is_(Integral, i) for i in prompt)
        ids = [int(i) for i in prompt] if tokens else self.tokenizer.prompt_ids(prompt)
        if not ids:
            raise ValueError(f"{what} is empty: there is nothing to continue")
        vocabulary = self.model.config.vocab_size
        if not (0 <= min(ids) and max(ids) < vocabulary):
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise ValueError(f"{what} holds token id {wrong}; the model's vocabulary is 0 to {vocabulary - 1}")
        return ids

    def _check_room(self, what: str, length: int, max_tokens: int) -> None:
        limit = context_length(self.model.config)
        asked = f"{what} has {length} tokens: with max_tokens {max_tokens}"
        if length + max_tokens > limit:
            raise ValueError(f"{asked} it goes beyond the model's {limit} positions (max_position_embeddings); "
                             "shorten the prompt or lower max_tokens")  # fmt: skip
        needed = self._pages(length + max_tokens - 1)  # the last token of all is never fed
        if needed > self.pool.max_pages:
            raise ValueError(f"{asked} it needs {needed} pages of {self.pool.page_size} tokens; "
                             f"max_pages is {self.pool.max_pages}")  # fmt: skip

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def enqueue(self, request: Request) -> Request:
        request.results = [None] * request.n
        request.sequences = [_Sequence(request, g) for g in range(request.n)]
        self.waiting += request.sequences
        return request

    def _schedule(self) -> list[tuple[_Sequence, int]]:
        """(completion, how many of its tokens) that this step feeds: those that decode, and then as the budget allows.

        Pages are named here, before they are filled: within a layer all keys are written before the first is read.
        """
        feeding, budget = [], self.prefill_tokens
        for s in self.running.copy():
            if s.row is not None and s.length - s.cached == 1 and self._make_room(s):
                feeding.append((s, 1))
        unfinished = [s for s in self.running if s.length - s.cached > 1]
        while budget and (unfinished or (self.free_rows and self.waiting)):
            if unfinished:
                s = unfinished.pop(0)
            elif (leader := self.waiting[0].request.leader) is not None:
                follower = self.waiting.popleft()
                follower.row = self.free_rows.pop()
                leader.followers.append(follower)
                continue
            elif (s := self._enter()) is None:
                break
            count = min(s.length - s.cached, budget)
            budget -= count
            feeding.append((s, count))
        for s, count in feeding:
            s.cached += count
            self._name(s, count)
        return feeding

    def _make_room(self, s: _Sequence) -> bool:
        """A page for the token that is fed next. The newest completions may have to leave for it, and be it itself."""
        if s.cached // self.pool.page_size < len(s.pages):
            return True
        while not self.pool.available:
            newest = self.running[-1]
            self._leave(newest)
            self.waiting.appendleft(newest)
            if newest is s:
                return False
        self._give(s, self.pool.take(1))
        return True

    def _enter(self) -> _Sequence | None:
        """The first in the queue, if there is room for all of its tokens."""
        s = self.waiting[0]
        tokens = s.tokens
        pages, known = self.pool.find(tokens[:-1])  # the last is fed whatever is known: something has to be drawn from
        needed = self._pages(len(tokens)) - len(pages)
        if needed + len(self.running) > self.pool.available and self.running:  # leave one for each that is there
            self.pool.release(pages)
            return None
        self.waiting.popleft()
        s.row, s.cached, s.known = self.free_rows.pop(), len(pages) * self.pool.page_size, known
        self._give(s, pages + self.pool.take(needed))
        self.running.append(s)
        if not s.ids:
            s.request.leader = s
        return s

    def _leave(self, s: _Sequence) -> None:
        """Out of the batch: a completion that has ended, or that shall come back later."""
        self.pool.release(s.pages)
        self.free_rows.append(s.row)
        s.row, s.pages, s.cached, s.known = None, [], 0, 0
        if s in self.running:  # a follower is not
            self.running.remove(s)
        self._disband(s, s.followers)

    def _disband(self, s: _Sequence, followers: list[_Sequence]) -> None:
        """Followers that cannot fork off wait again, in front of the others, and find the prompt's pages later."""
        for follower in reversed(followers):
            self.free_rows.append(follower.row)
            follower.row = None
            self.waiting.appendleft(follower)
        s.followers = []
        if s.request.leader is s:
            s.request.leader = None

    def _give(self, s: _Sequence, pages: list[int]) -> None:
        self.page_table[s.row, len(s.pages) : len(s.pages) + len(pages)] = pages
        s.pages += pages

    def _name(self, s: _Sequence, count: int) -> None:
        """Make the pages known that the `count` tokens fed last fill."""
        size = self.pool.page_size
        filled = range((s.cached - count) // size, s.cached // size)
        tokens = s.tokens if filled and s.known is not None else []
        for page in filled if tokens else ():
            s.known = self.pool.name(s.pages[page], s.known, tuple(tokens[page * size : (page + 1) * size]))

    def _forward(self, feeding: list[tuple[_Sequence, int]]) -> Tensor:
        """Feed tokens, those of completions that feed one first; (N, D) hidden states of each one's last token."""
        feeding.sort(key=lambda fed: fed[1] > 1)
        rows, counts = np.array([s.row for s, _ in feeding]), np.array([count for _, count in feeding])
        ends = np.array([s.cached for s, _ in feeding])
        fed = [s.ids[-1:] if count == 1 and s.cached == s.length else [] for s, count in feeding]
        fed = [ids or s.tokens[s.cached - count : s.cached] for ids, (s, count) in zip(fed, feeding)]
        tokens = np.concatenate(fed)
        last = counts.cumsum() - 1
        positions = np.repeat(ends - 1 - last, counts) + np.arange(len(tokens))
        # In the deterministic mode all are chunks, since their kernel is the one that has the trainer's bits.
        size, single = self.pool.page_size, 0 if self.model.deterministic else int((counts == 1).sum())
        slots = self.pool.slots(self.page_table[np.repeat(rows, counts), positions // size], positions)
        table = torch.from_numpy(self.page_table[rows, : ends.max() // size + 1])
        tokens, positions, last = (torch.from_numpy(x).to(slots.device) for x in (tokens, positions, last))
        attend = self._attend(slots, table, positions[:single] + 1, counts[single:].tolist(), ends[single:].tolist())
        return self.model.hidden(tokens, positions, attend)[last]

    def _attend(self, slots: Tensor, table: Tensor, lengths: Tensor, counts: list[int], ends: list[int]):
        """The `attend` of a step that feeds one token of len(lengths) sequences and then counts[i] of others."""
        single, heads, windows = len(lengths), self.model.layers[0].heads, self.model.config.windows
        (kv_heads, size, _), dtype = self.pool.shape, self.pool.like.dtype
        # As wide as these rows need: a long prompt beside them must not cost them anything.
        own = table[:single, : -(-int(lengths.max()) // size) if single else 0].to(slots.device)
        starts = [end - count for end, count in zip(ends, counts)]
        layouts, chunks = {}, {}
        for window in set(windows):
            if single:
                layouts[window] = make_layout(own, lengths, kv_heads, size, window, dtype)
            if counts:
                given = starts, counts, table[single:], self.pool.keys[0], heads, window, self.model.deterministic
                chunks[window] = make_chunks(*given)

        def attend(layer, q, k, v):
            self.pool.write(layer, slots, k, v)
            keys, values, window = self.pool.keys[layer], self.pool.values[layer], windows[layer]
            outs = []
            if single:
                options = {"window": window, "layout": layouts[window]}
                outs.append(decode(q[:single], keys, values, own, lengths, **options))
            if counts:
                options = {"window": window, "deterministic": self.model.deterministic}
                outs.append(extend(q[single:], keys, values, chunks[window], **options))
            return torch.cat(outs) if len(outs) > 1 else outs[0]

        return attend

    def _fork(self, feeding: list[tuple[_Sequence, int]], hidden_ND: Tensor) -> tuple[list[_Sequence], Tensor]:
        """The completions that draw now, those among them that leave a prompt here, and the states they draw from."""
        size, drawing, sources, targets = self.pool.page_size, [], [], []
        for i, (s, _) in enumerate(feeding):
            if s.cached < s.length:
                continue
            drawing.append((s, i))
            full, followers = len(s.request.prompt) // size, s.followers
            while followers and self.pool.available >= len(s.pages) - full:
                follower = followers.pop(0)
                self.pool.share(s.pages[:full])
                own = self.pool.take(len(s.pages) - full)
                sources, targets = sources + s.pages[full:], targets + own
                follower.cached, follower.known = s.cached, s.known
                self._give(follower, s.pages[:full] + own)
                self.running.append(follower)
                drawing.append((follower, i))
            self._disband(s, followers)
        if sources:
            self.pool.copy(sources, targets)
        sequences, rows = [s for s, _ in drawing], [i for _, i in drawing]
        return sequences, hidden_ND[rows]

    def _draw(self, sequences: list[_Sequence], hidden_BD: Tensor) -> list[Request]:
        """Draw every sequence's next token; those that end leave. Returns the requests that are finished by that."""
        if not sequences:
            return []
        deterministic, logits_BV = self.model.deterministic, self.model.project(hidden_BD)
        for s in sequences:
            if s.random is None:
                s.random = np.random.Generator(np.random.PCG64([s.request.seed, s.index]))
        uniforms = [s.random.random() for s in sequences]
        samplings = [s.request.sampling for s in sequences]
        penalised = any(sampling.repetition_penalty != 1 for sampling in samplings)
        histories = [s.tokens for s in sequences] if penalised else None
        early = [(b, s.request) for b, s in enumerate(sequences) if len(s.ids) < s.request.min_tokens]
        banned = [(b, token) for b, request in early for token in request.end_ids]
        uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
        ids_B, logprobs_B = sample(logits_BV, uniforms_B, samplings, histories, banned)
        if deterministic:
            logprobs_B = self._as_trained(sequences, hidden_BD, logits_BV, ids_B, logprobs_B)
        if self.tensor.size > 1:  # the first's word goes: one id drawn differently, and they would wait for ever
            drawn = gather_ragged(torch.stack([ids_B.double(), logprobs_B.double()]), self.tensor)[0]
            ids_B, logprobs_B = drawn[0].long(), drawn[1].float()
        if not logprobs_B.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: look at its weights and their last update")
        finished = []
        for s, token, logprob in zip(sequences, ids_B.tolist(), logprobs_B.tolist()):
            if s.row is None:  # aborted by the one before
                continue
            s.ids.append(token)
            s.logprobs.append(logprob)
            if not s.versions or s.versions[-1][0] != self.version:
                s.versions.append([self.version, len(s.ids) - 1, 0])
            s.versions[-1][2] = len(s.ids)
            request, completion = s.request, self._completion(s)
            if completion:
                request.results[s.index] = completion
                self._leave(s)
            if request.on_token:
                request.on_token(s.index, token, logprob, completion and completion.finish_reason)
            if completion and request.finished:
                finished.append(request)
        return finished

    def _as_trained(self, sequences, hidden_BD, logits_BV, ids_B, logprobs_B) -> Tensor:
        """The log-probs by the trainer's arithmetic, where the temperature is all that changed the distribution."""
        plain = [s.request.sampling.untouched and len(s.ids) >= s.request.min_tokens for s in sequences]
        temperatures = [(s.request.sampling.temperature or 1.0) * mine for s, mine in zip(sequences, plain)]
        for temperature in set(temperatures) - {0.0}:
            options = {"temperature": temperature, "deterministic": True, "logits_TV": logits_BV}
            trained_B, _ = token_logprob(hidden_BD, self.model.head_weight, ids_B, **options)
            mine_B = torch.tensor([other == temperature for other in temperatures], device=ids_B.device)
            logprobs_B = torch.where(mine_B, trained_B, logprobs_B)
        return logprobs_B

    def _completion(self, s: _Sequence) -> Completion | None:
        """The finished completion, or None while it goes on."""
        request, count = s.request, len(s.ids)
        ended, full = s.ids[-1] in request.end_ids, count == request.max_tokens
        appeared = bool(request.stop) and self._stop_appeared(s) and count > request.min_tokens
        if not (ended or full or appeared):
            return None
        cuts = self._cuts(s)
        if not (ended or full or cuts):
            return None  # the whole reads differently from what its parts did
        return self._result(s, "stop" if ended or cuts else "length", cuts)

    def _cuts(self, s: _Sequence) -> list[int]:
        """Where in the text each stop string begins that ends it, which none does within its first min_tokens."""
        if not s.request.stop:
            return []
        text, least = self.tokenizer.decode(s.ids), s.request.min_tokens
        first = len(self.tokenizer.decode(s.ids[:least])) + 1 if least else 0  # where one may end at the earliest
        places = [text.find(string, max(0, first - len(string))) for string in s.request.stop]
        return [place for place in places if place >= 0]

    def _result(self, s: _Sequence, reason: str, cuts=()) -> Completion:
        text, versions = self.tokenizer.decode(s.ids), tuple(map(tuple, s.versions))
        return Completion(s.ids, s.logprobs, text[: min(cuts)] if cuts else text, reason, versions)

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
        return any(string in s.text[-(len(new) + len(string) - 1) :] for string in s.request.stop)
