"""Packs, best-fit packing and the division into micro-batches."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from minitrl import packing
from minitrl.packing import Pack, pack, pack_groups, pack_lengths, plan_micro_batches


PROMPTS = [[10, 11, 12], [20, 21]]  # the groups of the picture, p0 = 10, q0 = 20, a0 = 30, ...
COMPLETIONS = [[[30, 31], [40, 41, 42]], [[50, 51]]]


def picture() -> dict[str, list]:
    """The picture in packing's docstring, row by row: {"tokens_T": ["p0", "p1", ...], "segments_T": [0, 0, ...]}."""
    rows = {}
    for line in packing.__doc__.splitlines():
        name, bar, cells = line.strip().partition("|")
        if bar:
            values = cells.replace("|", " ").split()
            rows[name.strip()] = values if name.strip() == "tokens_T" else [int(value) for value in values]
    return rows


def test_layout_is_the_picture_in_the_docstring():
    rows = picture()
    ids = {"p": 10, "q": 20, "a": 30, "b": 40, "c": 50}
    got = pack_groups(PROMPTS, COMPLETIONS)
    assert got.tokens_T.tolist() == [ids[name[0]] + int(name[1:]) for name in rows["tokens_T"]]
    for name in ("segments_T", "positions_T", "predictors_T", "prefixes_B"):
        assert getattr(got, name).tolist() == rows[name], name
    assert got.cu_seqlens.tolist() == [0, 3, 5, 8, 10, 12]
    assert got.lengths == (3, 2, 3, 2, 2) and got.prefixes == (-1, 0, 0, -1, 3)
    assert got.completion_T.tolist() == [rows["prefixes_B"][segment] >= 0 for segment in rows["segments_T"]]


def test_dtypes_are_as_declared():
    got = pack_groups(PROMPTS, COMPLETIONS)
    for name in ("tokens_T", "positions_T", "segments_T", "predictors_T"):
        assert getattr(got, name).dtype == torch.int64, name
    for name in ("cu_seqlens", "prefixes_B"):
        assert getattr(got, name).dtype == torch.int32, name


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_predicted_by_the_token_before_it_in_its_own_sequence(seed):
    """Against a walk over the sequences written out one by one, empty completions and prompts without any included."""
    rng = random.Random(seed)
    token = iter(range(10_000))  # every token is another one, so an id says where it stands

    def fresh(length: int) -> list[int]:
        return [next(token) for _ in range(length)]

    prompts = [fresh(rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
    completions = [[fresh(rng.randint(0, 4)) for _ in range(rng.randint(0, 3))] for _ in prompts]
    got = pack_groups(prompts, completions)

    before, position = {}, {}
    for prompt, answers in zip(prompts, completions):
        for answer in [[], *answers]:
            for i, (previous, t) in enumerate(zip([None, *prompt, *answer], prompt + answer)):
                before[t], position[t] = previous, i
    tokens = got.tokens_T.tolist()
    assert sorted(tokens) == sorted(before)  # each prompt stands once
    for t, predictor, place in zip(tokens, got.predictors_T.tolist(), got.positions_T.tolist()):
        assert (tokens[predictor] if predictor >= 0 else None) == before[t]
        assert place == position[t]


def test_pack_without_prefixes_and_with_nothing_in_it():
    alone = pack([[], [7, 8], [9], []])
    assert alone.predictors_T.tolist() == [-1, 0, -1]
    assert alone.positions_T.tolist() == [0, 1, 0] and alone.segments_T.tolist() == [1, 1, 2]
    assert not alone.completion_T.any()
    nothing = pack([])
    assert len(nothing.tokens_T) == 0 and nothing.cu_seqlens.tolist() == [0] and not nothing.lengths


@pytest.mark.parametrize(
    ("sequences", "prefixes"),
    [
        ([[1], [2], [3]], [-1, 1, -1]),  # itself
        ([[1], [2], [3]], [2, -1, -1]),  # one that comes later
        ([[1], [2], [3]], [-1, 0, 1]),  # a prefix of a prefix
        ([[], [2]], [-1, 0]),  # an empty one: nothing would predict the token behind it
        ([[1], [2], [3]], [-1, 0]),
    ],
)
def test_bad_prefixes_are_refused(sequences, prefixes):
    with pytest.raises(AssertionError, match="prefix"):
        pack(sequences, prefixes)


def test_prompts_and_completions_must_match():
    with pytest.raises(ValueError):
        pack_groups([[1], [2]], [[[3]]])


def test_lengths_cut_a_pack_into_its_segments():
    packed = pack_groups(PROMPTS, COMPLETIONS)
    values = torch.arange(24.0).view(12, 2).requires_grad_()
    parts = values.split(packed.lengths)
    assert [part[:, 0].tolist() for part in parts] == [[0, 2, 4], [6, 8], [10, 12, 14], [16, 18], [20, 22]]
    parts[2].sum().backward()
    assert values.grad[:, 0].tolist() == [0] * 5 + [1] * 3 + [0] * 4
    assert [part.tolist() for part in packed.tokens_T.split(packed.lengths)][2] == [40, 41, 42]


def test_to_moves_every_tensor_and_keeps_the_host_copies():
    packed = pack_groups(PROMPTS, COMPLETIONS)
    moved = packed.to("meta")
    tensors = [name for name, value in vars(packed).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert all(getattr(packed, name).device.type == "cpu" for name in tensors)
    assert moved.lengths == packed.lengths and moved.prefixes == packed.prefixes
    with pytest.raises(AttributeError):
        packed.tokens_T = None
    assert isinstance(moved, Pack)


# Best-fit decreasing


def brute_force(lengths: list[int], capacity: int) -> list[int]:
    """Loads of the bins that the textbook's loop makes: longest first, each into the fullest bin that takes it."""
    loads = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=loads.__getitem__)] += length
        else:
            loads.append(length)
    return sorted(loads)


def some_lengths(seed: int) -> tuple[list[int], int]:
    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 64, 1000])
    kind = rng.choice(["uniform", "short", "long", "equal", "over"])
    high = {"uniform": capacity, "short": max(1, capacity // 8), "long": capacity, "equal": 1, "over": 2 * capacity}[
        kind
    ]
    low = {"long": max(1, capacity // 2), "equal": 1}.get(kind, 0)
    return [rng.randint(low, high) for _ in range(rng.choice([0, 1, 2, 50, 400]))], capacity


@pytest.mark.parametrize("seed", range(60))
def test_pack_lengths_is_best_fit_decreasing(seed):
    lengths, capacity = some_lengths(seed)
    bins, count = pack_lengths(lengths, capacity)
    assert bins.dtype == np.int64 and bins.shape == (len(lengths),)
    loads = Counter()
    for length, b in zip(lengths, bins.tolist()):
        loads[b] += length
    assert sorted(loads) == list(range(count))  # bins are numbered without a gap
    for b, load in loads.items():
        longest = max(length for length, of in zip(lengths, bins) if of == b)
        assert load <= capacity or load == longest  # beside an over-long document stand at most empty ones
    # Bins of equal space are interchangeable, so loads are compared, not which bin a document is in.
    assert sorted(loads.values()) == brute_force(lengths, capacity)


def test_pack_lengths_fills_bins():
    """Documents up to a quarter of the capacity: best-fit decreasing leaves less than a per cent empty."""
    rng = random.Random(0)
    lengths = [rng.randint(1, 512) for _ in range(4000)]
    _, count = pack_lengths(lengths, 2048)
    assert sum(lengths) / (count * 2048) > 0.99


def test_pack_lengths_of_many_documents_is_fast():
    """Half a million in well under a minute: the loop over open bins would take hours."""
    lengths = np.random.default_rng(0).integers(1, 4096, 500_000)
    bins, count = pack_lengths(lengths, 4096)
    assert np.bincount(bins, weights=lengths, minlength=count).max() <= 4096
    assert lengths.sum() / (count * 4096) > 0.99


def test_over_long_documents_stand_alone():
    bins, count = pack_lengths([3, 12, 7, 10, 11], 10)
    assert count == 4
    assert bins[0] == bins[2] and len({bins[1], bins[3], bins[4], bins[0]}) == 4


def test_pack_lengths_takes_arrays_and_names_an_unknown_strategy():
    assert pack_lengths(np.array([4, 4, 4]), 8)[1] == pack_lengths(torch.tensor([4, 4, 4]), 8)[1] == 2
    with pytest.raises(ValueError, match="'wrapped'"):
        pack_lengths([1], 8, strategy="wrapped")


# Micro-batches


def some_groups(seed: int) -> tuple[list[int], list[list[int]]]:
    rng = random.Random(seed)
    prompts = [rng.randint(1, 30) for _ in range(rng.randint(1, 12))]
    return prompts, [[rng.randint(0, 60) for _ in range(rng.choice([0, 1, 4, 8]))] for _ in prompts]


def tokens_of(part: tuple[int, list[int]], prompts: list[int], completions: list[list[int]]) -> int:
    p, members = part
    return prompts[p] + sum(completions[p][g] for g in members)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("capacity", [1, 40, 100, 300, 100_000])
@pytest.mark.parametrize("seed", range(5))
def test_plan_has_every_completion_once_within_the_budget(seed, capacity, ranks):
    prompts, completions = some_groups(seed)
    plan = plan_micro_batches(prompts, completions, capacity, ranks)
    assert len(plan) == ranks
    parts = [part for share in plan for micro_batch in share for part in micro_batch]
    placed = [(p, g) for p, members in parts for g in members]
    assert sorted(placed) == [(p, g) for p, lengths in enumerate(completions) for g in range(len(lengths))]
    assert all(members for _, members in parts)  # a prompt that nothing follows costs tokens for nothing
    assert all(micro_batch for share in plan for micro_batch in share)
    for micro_batch in (micro_batch for share in plan for micro_batch in share):
        tokens = sum(tokens_of(part, prompts, completions) for part in micro_batch)
        # Over the budget only where one prompt and one completion are (empty completions beside it cost nothing).
        alone = len(micro_batch) == 1 and sum(completions[micro_batch[0][0]][g] > 0 for g in micro_batch[0][1]) <= 1
        assert tokens <= capacity or alone
    loads = [sum(tokens_of(part, prompts, completions) for mb in share for part in mb) for share in plan]
    biggest = max((tokens_of(part, prompts, completions) for part in parts), default=0)
    assert max(loads) - min(loads) <= biggest


def test_plan_keeps_a_group_whole_and_its_prompt_once_where_the_budget_allows():
    prompts, completions = [10, 10, 10], [[5] * 8, [7] * 4, []]
    [share] = plan_micro_batches(prompts, completions, capacity=50)
    assert sorted((p, sorted(members)) for mb in share for p, members in mb) == [(0, list(range(8))), (1, [0, 1, 2, 3])]
    [share] = plan_micro_batches(prompts, completions, capacity=88)
    assert len(share) == 1 and len(share[0]) == 2  # 50 + 38 tokens: both groups in one
    [share] = plan_micro_batches(prompts, completions, capacity=30)
    assert Counter(p for mb in share for p, _ in mb) == {0: 2, 1: 2}  # cut in two parts each, the prompt in both


def test_plan_balances_ranks_within_a_few_per_cent():
    rng = random.Random(1)
    prompts = [rng.randint(20, 200) for _ in range(64)]
    completions = [[min(512, int(rng.expovariate(1 / 150)) + 1) for _ in range(8)] for _ in prompts]
    plan = plan_micro_batches(prompts, completions, capacity=4096, ranks=4)
    loads = [sum(tokens_of(part, prompts, completions) for mb in share for part in mb) for share in plan]
    assert max(loads) / min(loads) < 1.05


def test_plan_is_the_same_on_every_rank():
    """It is computed everywhere and never sent, so equal parts must not depend on the order of a set or on memory."""
    prompts, completions = [5] * 6, [[3] * 4] * 6
    plans = [plan_micro_batches(list(prompts), [list(lengths) for lengths in completions], 40, 3) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


def test_more_ranks_than_parts_leaves_some_without_work():
    plan = plan_micro_batches([4], [[2, 2]], capacity=100, ranks=3)
    assert [len(share) for share in plan] == [1, 0, 0]
    assert plan_micro_batches([4], [[]], capacity=100, ranks=2) == [[], []]
