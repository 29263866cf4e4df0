"""Packs: sequences of unequal length on one axis, without padding, each prompt standing once.

Legend, here and everywhere: B segments in a pack, T packed tokens, P prompts, G completions per prompt, N = P * G
completions, D width, H query heads, K key/value heads, E head size, F feed-forward width, V vocabulary.

A group of one prompt and two completions, and a second prompt with one completion, make one pack of B = 5 segments:

    tokens_T     | p0 p1 p2 | a0 a1 | b0 b1 b2 | q0 q1 | c0 c1 |
    segments_T   |  0  0  0 |  1  1 |  2  2  2 |  3  3 |  4  4 |
    positions_T  |  0  1  2 |  3  4 |  3  4  5 |  0  1 |  2  3 |
    predictors_T | -1  0  1 |  2  3 |  2  5  6 | -1  8 |  9 10 |
    prefixes_B   |    -1    |   0   |    0     |  -1   |   3   |

A completion attends to its prompt and to itself; both a0 and b0 are predicted at p2. `predictors_T` is the one place
where the shift from predicted token to predicting position is made: every per-token tensor has length T, and its index
t speaks about token t.
"""

import bisect
import heapq
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Packed tokens and what is known of their layout. All integer tensors; see the picture above."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, position in the token's own sequence, its prompt included
    segments_T: Tensor  # int64, the segment that a token stands in
    predictors_T: Tensor  # int64, the index whose hidden state predicts token t; -1 where nothing stands before it
    cu_seqlens: Tensor  # int32 (B + 1,), where segments begin and end
    prefixes_B: Tensor  # int32, the segment in front of segment b, or -1
    lengths: tuple[int, ...]  # the host's copies of the last two, so that no kernel launch waits for the device
    prefixes: tuple[int, ...]

    @property
    def completion_T(self) -> Tensor:
        """bool (T,): the tokens of segments that have a prompt in front of them."""
        return self.prefixes_B[self.segments_T] >= 0

    def to(self, device) -> "Pack":
        """The same pack on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(sequences, prefixes=None, device="cpu") -> Pack:
    """Concatenate id lists into a Pack. `prefixes[b]` is the segment that stands in front of segment b, or -1.

    A prefix is an earlier segment that has no prefix itself, and it may not be empty: something has to predict the
    first token behind it.
    """
    prefixes = tuple(prefixes) if prefixes is not None else (-1,) * len(sequences)
    assert len(prefixes) == len(sequences), f"{len(prefixes)} prefixes for {len(sequences)} sequences"
    lengths = tuple(len(sequence) for sequence in sequences)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    tokens, positions = np.empty(total, np.int64), np.empty(total, np.int64)
    predictors = np.arange(-1, total - 1, dtype=np.int64)
    for b, (sequence, prefix) in enumerate(zip(sequences, prefixes)):
        start, end = starts[b], starts[b + 1]
        sound = prefix < 0 or (prefix < b and prefixes[prefix] < 0 and lengths[prefix] > 0)
        assert sound, f"segment {b} has a bad prefix {prefix}"
        tokens[start:end] = sequence
        positions[start:end] = np.arange(end - start) + (lengths[prefix] if prefix >= 0 else 0)
        if end > start:
            predictors[start] = starts[prefix + 1] - 1 if prefix >= 0 else -1
    host = Pack(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        segments_T=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        predictors_T=torch.from_numpy(predictors),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        prefixes_B=torch.tensor(prefixes, dtype=torch.int32),
        lengths=lengths,
        prefixes=prefixes,
    )
    return host.to(device)


def pack_groups(prompts, completions, device="cpu") -> Pack:
    """Prompt 0, its completions, prompt 1, its completions, ...; `completions[p]` lists those of prompt p.

    Without prompts one token of no meaning, which nothing is asked about: what every rank computes is never nothing.
    """
    prompts, completions = (prompts, completions) if len(prompts) else ([[0]], [[]])
    sequences, prefixes = [], []
    for prompt, answers in zip(prompts, completions, strict=True):
        prefixes += [-1] + [len(sequences)] * len(answers)
        sequences += [prompt, *answers]
    return pack(sequences, prefixes, device)


def pack_lengths(lengths, capacity: int, strategy: str = "bfd"):
    """Best-fit-decreasing bin packing: the bin of each document (int64 array), and how many bins there are.

    Longest first, each document goes into the fullest bin that still takes it, so every bin but an over-long document's
    own holds at most `capacity` tokens. A document longer than `capacity` stands alone: whether to refuse or cut it is
    the caller's decision.

    Documents of one length go together, and bins with one amount of space: the fullest bin that takes a document takes
    the next of its length too, until it is too full. So the loop is over lengths and spaces, not documents.
    """
    if strategy != "bfd":
        raise ValueError(f"packing strategy {strategy!r} is unknown; choose 'bfd'")
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return np.empty(0, np.int64), 0
    shorter = lengths.max() - lengths
    order = np.argsort(shorter.astype(np.min_scalar_type(shorter.max())), kind="stable")  # 16 bits are sorted by radix
    sizes, counts = np.unique(lengths, return_counts=True)
    bins, spaces, by_space, count = np.empty(len(lengths), np.int64), [], {}, 0

    def leave(space: int, some: np.ndarray) -> None:
        """Note bins that have so much space left; a full bin stays open: it takes empty documents."""
        if len(some):
            if space not in by_space:
                bisect.insort(spaces, space)
            by_space.setdefault(space, []).append(some)

    for size, documents in zip(sizes[::-1].tolist(), np.split(order, np.cumsum(counts[::-1])[:-1])):
        while len(documents):
            at = bisect.bisect_left(spaces, size)  # the tightest open space that takes one
            space = spaces.pop(at) if at < len(spaces) else max(capacity, size)
            each = space // size if size else len(documents)  # so many go into one bin
            needed = -(-len(documents) // each)
            some = np.concatenate(by_space.pop(space)) if space in by_space else np.arange(count, count + needed)
            count = max(count, int(some.max()) + 1)
            used, placed = some[:needed], min(len(documents), len(some) * each)
            bins[documents[:placed]] = np.repeat(used, each)[:placed]
            leave(space - each * size, used[:-1])
            leave(space - (placed - (len(used) - 1) * each) * size, used[-1:])
            leave(space, some[needed:])
            documents = documents[placed:]
    return bins, count


def rows_of(bins: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents bin by bin, and the (count + 1,) places in that list where bins begin and the last ends."""
    narrow = bins.astype(np.min_scalar_type(count))
    return np.argsort(narrow, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))])


def plan_micro_batches(prompt_lengths, completion_lengths, capacity: int, ranks: int = 1, even: bool = False):
    """Divide P groups over ranks and micro-batches of at most `capacity` tokens.

    prompt_lengths: P ints.
    completion_lengths: per prompt the lengths of the completions to train on; an empty list leaves the prompt out.
    Returns, per rank, a list of micro-batches; a micro-batch is a list of (p, [g, ...]). A group that is too big for
    one micro-batch is cut into parts, and its prompt stands once in each. One sequence longer than `capacity` makes a
    micro-batch of its own.
    Parts go to the rank with the fewest tokens so far, longest first: within a few per cent of the best division.
    even: empty micro-batches, [], make all ranks' lists as long as the longest (FSDP2 needs as many passes of each).
    """
    parts = []  # (tokens, p, [g, ...])
    for p, (prompt, lengths) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        whole = prompt + sum(lengths) <= capacity and len(lengths) > 0  # most are
        bins, count = (np.zeros(len(lengths)), 1) if whole else pack_lengths(lengths, max(1, capacity - prompt))
        for b in range(count):
            members = np.flatnonzero(bins == b).tolist()
            parts.append((prompt + sum(lengths[g] for g in members), p, members))
    parts.sort(key=lambda part: (-part[0], part[1], part[2]))
    loads, shares = [(0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    for part in parts:
        load, rank = heapq.heappop(loads)
        shares[rank].append(part)
        heapq.heappush(loads, (load + part[0], rank))
    plan = []
    for share in shares:
        bins, count = pack_lengths([tokens for tokens, _, _ in share], capacity)
        micro_batches = [[] for _ in range(count)]
        for (_, p, members), b in zip(share, bins):
            micro_batches[b].append((p, members))
        plan.append(micro_batches)
    most = max(map(len, plan)) if even else 0
    return [micro_batches + [[]] * (most - len(micro_batches)) for micro_batches in plan]
