"""Rollouts, rewards combined, advantages; and that each completion keeps its own prompt, row and reward throughout."""

import math
import threading
from dataclasses import dataclass, fields

import pytest
import torch
from faults import mutant

from minitrl import distributed, experience
from minitrl.distributed import World
from minitrl.experience import (
    Rollouts,
    advantages,
    deviations,
    generate_and_score,
    has_signal,
    select_groups,
    weighted_rewards,
    with_advantages,
)
from minitrl.packing import plan_micro_batches

NONE = math.nan  # a sample to which no reward applies
ALONE = World(0, 1, torch.device("cpu"))


# Rewards and advantages


def test_weighted_rewards():
    rewards_NF = torch.tensor([[1.0, 2.0], [NONE, 2.0], [1.0, NONE], [NONE, NONE], [0.0, 0.0]])
    got = weighted_rewards(rewards_NF, torch.tensor([1.0, 0.5]))
    assert got[:3].tolist() == [2.0, 1.0, 1.0] and got[3].isnan() and got[4] == 0
    assert weighted_rewards(torch.empty(0, 2), torch.ones(2)).shape == (0,)


def by_hand(group: list[float], scale: float | None) -> list[float]:
    """One group's advantages, in the plainest Python. `scale`: the deviation to divide by; None = this group's own."""
    known = [r for r in group if not math.isnan(r)]
    if not known:
        return [0.0] * len(group)
    mean = sum(known) / len(known)
    if scale is None:
        scale = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1)) if len(known) > 1 else 0.0
    return [0.0 if math.isnan(r) else (r - mean) / (scale + 1e-4) for r in group]


def some_rewards(seed: int, P: int = 6, G: int = 5) -> torch.Tensor:
    """Rewards of few values, so that ties occur, with samples left out here and there."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (P, G), generator=g) * 0.37 - 0.5
    return torch.where(torch.rand(P, G, generator=g) < 0.2, NONE, rewards)


@pytest.mark.parametrize("seed", range(5))
def test_advantages(seed):
    """TRL: (r - mean) / (std + 1e-4), the deviation unbiased and without the samples that have no reward."""
    rewards = some_rewards(seed)
    known = rewards[~rewards.isnan()].double()
    for scaling, scale in (("group", None), ("batch", known.std().item()), ("none", 1 - 1e-4)):
        expected = torch.tensor([by_hand(group, scale) for group in rewards.tolist()])
        got = advantages(rewards, scaling)
        assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=1e-5, atol=1e-6), scaling
        assert got[rewards.isnan()].eq(0).all()
        assert torch.allclose(got.sum(1), torch.zeros(6), atol=1e-5)


def test_advantages_of_a_pair():
    """Rewards 0 and 1: deviation 1 / sqrt(2), so +-0.7071 and not +-1, which the biased one would give."""
    assert advantages(torch.tensor([[0.0, 1.0]])).tolist()[0] == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-3)
    assert advantages(torch.tensor([[0.0, 1.0]]), "none").tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -0.7, 1e-8, 1e8, 123.456])
@pytest.mark.parametrize("G", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_0(value, G, scaling):
    """Rounding would leave a mean of 0.1 that is not 0.1, and noise over 1e-4 would train."""
    rewards = torch.full((3, G), value)
    rewards[0, 0] = NONE
    rewards[2] = torch.arange(G) * 0.3  # beside a group that has signal
    assert has_signal(rewards).tolist() == [False, False, True]
    got = advantages(rewards, scaling)
    assert got[:2].eq(0).all() and got[2].ne(0).any()


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_groups_that_can_not_be_compared(scaling):
    """One valid sample, or none: no baseline, no advantage, no NaN."""
    rewards = torch.tensor([[NONE, 3.0, NONE], [NONE, NONE, NONE], [1.0, 2.0, NONE]])
    got = advantages(rewards, scaling)
    assert got[:2].eq(0).all() and got[2, 2] == 0 and got[2, 0] == -got[2, 1] != 0
    assert has_signal(rewards).tolist() == [False, False, True]
    alone = advantages(torch.full((2, 3), NONE), scaling)
    assert alone.eq(0).all()
    assert advantages(rewards[:1], scaling).eq(0).all()


def test_a_left_out_sample_does_not_pull_the_mean():
    """TRL 0.16.0 counted it as 0: the others would get advantages that depend on a sample nobody scored."""
    got = advantages(torch.tensor([[5.0, 6.0, NONE]]))
    assert torch.equal(got[:, :2], advantages(torch.tensor([[5.0, 6.0]])))


def leave_one_out(group: list[float]) -> list[float]:
    """RLOO, arXiv 2402.14740: the baseline is the mean of the group's other samples."""
    found = []
    for i, reward in enumerate(group):
        others = [r for j, r in enumerate(group) if j != i and not math.isnan(r)]
        found.append(0.0 if math.isnan(reward) or not others else reward - sum(others) / len(others))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_rloo(seed):
    rewards = some_rewards(seed)
    got = advantages(rewards, estimator="rloo")
    expected = torch.tensor([leave_one_out(group) for group in rewards.tolist()])
    assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


def over_tokens(rewards: list[list[float]], lengths: list[list[int]]) -> list[list[float]]:
    """REINFORCE++, arXiv 2501.03262: normalised over all tokens of the batch, each with its completion's reward."""
    pairs = [(r, n) for group, row in zip(rewards, lengths) for r, n in zip(group, row) if not math.isnan(r)]
    tokens = [r for r, n in pairs for _ in range(n)]
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in tokens) / (len(tokens) - 1))
    return [[0.0 if math.isnan(r) else (r - mean) / deviation for r in group] for group in rewards]


@pytest.mark.parametrize(("seed", "G"), [(0, 5), (1, 5), (2, 1), (3, 2)])
def test_reinforce_plus_plus(seed, G):
    """Also of one completion a prompt: the baseline is the batch's."""
    rewards = some_rewards(seed, G=G)
    lengths = torch.randint(1, 20, rewards.shape, generator=torch.Generator().manual_seed(seed))
    got = advantages(rewards, estimator="reinforce_plus_plus", lengths_PG=lengths)
    expected = torch.tensor(over_tokens(rewards.tolist(), lengths.tolist()))
    assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got[rewards.isnan()].eq(0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -0.7, 1e8])
def test_equal_rewards_give_exactly_0_with_every_estimator(value):
    rewards, lengths = torch.full((3, 4), value), torch.tensor([[1, 2, 3, 4]] * 3)
    rewards[0, 0] = NONE
    for estimator in ("rloo", "reinforce_plus_plus"):
        assert advantages(rewards, estimator=estimator, lengths_PG=lengths).eq(0).all(), estimator
        alone = advantages(rewards[:1, :1], estimator=estimator, lengths_PG=lengths[:1, :1])
        assert alone.eq(0).all() and not alone.isnan().any()
    rewards[2, 1] += 1 + abs(value)  # one group has signal: the others learn from it with the batch's baseline alone
    got = {e: advantages(rewards, estimator=e, lengths_PG=lengths) for e in ("rloo", "reinforce_plus_plus")}
    assert got["rloo"][:2].eq(0).all() and got["rloo"][2].ne(0).all()
    assert got["reinforce_plus_plus"][1].lt(0).all() and got["reinforce_plus_plus"][0, 0] == 0


def test_deviations():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, NONE, 2.0], [NONE, 1.0, NONE], [NONE, NONE, NONE]])
    got = deviations(rewards)
    assert got[0].item() == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())
    assert got[1].item() == pytest.approx(0.5**0.5) and got[2:].isnan().all()


def test_groups_do_not_see_each_other():
    """Advantages of a group are the same whatever stands beside it, and in whatever order (but for "batch")."""
    rewards = some_rewards(0)
    for scaling in ("group", "none"):
        whole = advantages(rewards, scaling)
        for p in range(len(rewards)):
            assert torch.equal(advantages(rewards[p : p + 1], scaling)[0], whole[p])
        order = torch.randperm(5)
        assert torch.allclose(advantages(rewards[:, order], scaling), whole[:, order], atol=1e-6)


def test_small_differences_of_large_rewards_survive():
    """float32 keeps 1e6 and 1e6 + 1 apart; their squares only float64."""
    got = advantages(torch.tensor([[1e6, 1e6 + 1, 1e6 + 2]]))
    assert got.tolist()[0] == pytest.approx([-1, 0, 1], rel=1e-3, abs=1e-6)


# Rollouts


def rollouts(seed: int = 0, P: int = 3, G: int = 4) -> Rollouts:
    """Every id, log-prob and reward is another number, so each says whose it is. Some completions are empty."""
    g = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, 5, (P,), generator=g)
    lengths = torch.randint(0, 6, (P, G), generator=g)
    N, R, Q = P * G, int(lengths.sum()), int(prompt_lengths.sum())
    base = 10_000 * seed
    return Rollouts(
        prompt_tokens=base + torch.arange(Q),
        prompt_lengths_P=prompt_lengths,
        tokens_R=base + 1000 + torch.arange(R),
        lengths_PG=lengths,
        sampler_logprobs_R=-torch.rand(R, generator=g),
        truncated_PG=torch.rand(P, G, generator=g) < 0.3,
        versions_PG=torch.zeros_like(lengths),
        rewards_PGF=torch.randn(P, G, 2, generator=g),
        rewards_PG=torch.randn(P, G, generator=g),
        advantages_PG=torch.arange(1.0, N + 1).view(P, G),
    )


def test_spans_cut_what_lies_end_to_end():
    r = rollouts()
    assert [token for p in range(3) for token in r.prompt(p)] == r.prompt_tokens.tolist()
    assert [len(r.prompt(p)) for p in range(3)] == r.prompt_lengths_P.tolist()
    places = [(p, g) for p in range(3) for g in range(4)]
    assert [token for p, g in places for token in r.completion(p, g)] == r.tokens_R.tolist()
    assert [len(r.completion(p, g)) for p, g in places] == r.lengths_PG.flatten().tolist()
    assert 0 in r.lengths_PG
    for p, g in places:
        assert r.tokens_R[r.span(p, g)].tolist() == r.completion(p, g)


def test_per_token():
    r = rollouts()
    got = r.per_token(r.advantages_PG)
    assert got.shape == r.tokens_R.shape
    for p in range(3):
        for g in range(4):
            assert got[r.span(p, g)].eq(r.advantages_PG[p, g]).all()


@pytest.mark.parametrize("capacity", [1, 9, 14, 1000])
def test_pack_says_where_its_tokens_come_from(capacity):
    """Through every division into micro-batches, each completion token of each pack finds its own numbers again."""
    r = rollouts()
    prompts, lengths = r.prompt_lengths_P.tolist(), r.lengths_PG.tolist()
    [plan] = plan_micro_batches(prompts, lengths, capacity)
    seen = []
    for micro_batch in plan:
        pack, indices = r.pack(micro_batch)
        assert indices.dtype == torch.int64
        assert torch.equal(pack.tokens_T[pack.completion_T], r.tokens_R[indices])
        seen += indices.tolist()
        segment = 0
        for p, members in micro_batch:
            starts = pack.cu_seqlens.tolist()
            assert pack.tokens_T[starts[segment] : starts[segment + 1]].tolist() == r.prompt(p)
            for i, g in enumerate(members, segment + 1):
                assert pack.prefixes[i] == segment
                assert pack.tokens_T[starts[i] : starts[i + 1]].tolist() == r.completion(p, g)
            segment += 1 + len(members)
    assert sorted(seen) == list(range(len(r.tokens_R)))


def test_select_groups():
    """What dynamic sampling keeps: whole groups, of several generations, everything that belongs to them with them."""
    parts, chosen = [rollouts(1), rollouts(2, P=5)], [(1, 4), (0, 2), (1, 0)]
    got = select_groups(parts, chosen)
    assert got.lengths_PG.shape == (3, 4)
    for i, (part, p) in enumerate(chosen):
        source = parts[part]
        assert got.prompt(i) == source.prompt(p)
        for name in ("truncated_PG", "rewards_PGF", "rewards_PG", "advantages_PG", "lengths_PG"):
            assert torch.equal(getattr(got, name)[i], getattr(source, name)[p]), name
        for g in range(4):
            assert got.completion(i, g) == source.completion(p, g)
            ours, theirs = got.sampler_logprobs_R[got.span(i, g)], source.sampler_logprobs_R[source.span(p, g)]
            assert torch.equal(ours, theirs)
    for field in fields(Rollouts):
        assert getattr(got, field.name).dtype == getattr(parts[0], field.name).dtype, field.name


def test_select_all_groups_is_the_same_rollouts():
    r = rollouts()
    got = select_groups([r], [(0, p) for p in range(3)])
    for field in fields(Rollouts):
        assert torch.equal(getattr(got, field.name), getattr(r, field.name)), field.name


def test_with_advantages():
    r = rollouts()
    got = with_advantages(r, "none")
    assert torch.equal(got.advantages_PG, advantages(r.rewards_PG, "none"))
    assert got.tokens_R is r.tokens_R and r.advantages_PG[0, 0] == 1  # a new object, the old one as it was


# Generate and score


@dataclass(frozen=True)
class Sample:
    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


class FakeEngine:
    """Completions that say whose they are: of prompt [p] with seed s, number g has the ids [100 p + s, g, ...]."""

    def __init__(self, tensor: World = ALONE):
        self.asked, self.tensor = [], tensor

    def generate(self, prompts, n, seed, **sampling):
        self.asked.append((prompts, n, seed, sampling))
        return [[self.complete(prompt, s, g) for g in range(n)] for prompt, s in zip(prompts, seed, strict=True)]

    def complete(self, prompt, seed, g):
        ids = [100 * prompt[0] + seed] + [g] * ((prompt[0] + g) % 3)
        reason = "length" if len(ids) == 3 else "stop"
        return Sample(ids, [-1.0 - i for i in range(len(ids))], f"{prompt[0]} {seed} {g}", reason)


def rows(P: int) -> list[dict]:
    return [
        {"prompt": f"prompt {p}", "prompt_ids": [p] * (1 + p % 2), "columns": {"answer": 7 * p, "row": p}}
        for p in range(P)
    ]


def tagged(prompts, completions, completion_ids, answer, step):
    """A number that names prompt, completion and step, after a check that completion, ids and column fit."""
    scores = []
    for prompt, completion, ids, a in zip(prompts, completions, completion_ids, answer, strict=True):
        p, seed, g = map(int, completion.split())
        assert prompt == f"prompt {p}" and a == 7 * p and ids[0] == 100 * p + seed and all(i == g for i in ids[1:])
        scores.append(10 * p + g + step / 1000)
    return scores


def even_rows(completions, row):
    return [1.0 if r % 2 == 0 else None for r in row]


def generated(
    P: int = 5, G: int = 3, world: World = ALONE, engine=None, functions=None, weights=(1.0, 100.0), **options
):
    functions = functions or [("tagged", tagged), ("even_rows", even_rows)]
    options = {
        "num_generations": G,
        "step": 4,
        "timeout_s": 20,
        "sampling": {"temperature": 0.5, "max_tokens": 3},
    } | options
    seeds = [11 + p for p in range(P)]
    return generate_and_score(
        engine or FakeEngine(), rows(P), seeds, functions, torch.tensor(weights), world, **options
    )


def test_each_completion_keeps_its_prompt_and_its_rewards():
    engine = FakeEngine()
    got = generated(engine=engine)
    assert engine.asked == [
        ([row["prompt_ids"] for row in rows(5)], 3, [11, 12, 13, 14, 15], {"temperature": 0.5, "max_tokens": 3})
    ]
    for p in range(5):
        assert got.prompt(p) == rows(5)[p]["prompt_ids"]
        for g in range(3):
            sample = engine.complete([p], 11 + p, g)
            assert got.completion(p, g) == sample.ids
            assert got.sampler_logprobs_R[got.span(p, g)].tolist() == sample.logprobs
            assert got.truncated_PG[p, g] == (sample.finish_reason == "length")
            even = 1.0 if p % 2 == 0 else NONE
            assert got.rewards_PGF[p, g].tolist() == pytest.approx([10 * p + g + 0.004, even], nan_ok=True)
            assert got.rewards_PG[p, g].item() == pytest.approx(10 * p + g + 0.004 + (100 if p % 2 == 0 else 0))
    assert got.advantages_PG.shape == (5, 3) and got.advantages_PG.eq(0).all()
    dtypes = {
        name: getattr(got, name).dtype for name in ("prompt_tokens", "prompt_lengths_P", "tokens_R", "lengths_PG")
    }
    assert set(dtypes.values()) == {torch.int64}
    floats = (got.sampler_logprobs_R, got.rewards_PGF, got.rewards_PG, got.advantages_PG)
    assert all(values.dtype == torch.float32 for values in floats) and got.truncated_PG.dtype == torch.bool


def test_a_sample_without_reward_stays_without():
    got = generated(functions=[("even_rows", even_rows)], weights=(2.0,), overlong=(3, 2))
    assert got.rewards_PG[1::2].isnan().all() and not got.rewards_PG[::2].isnan().any()


def test_overlong_penalty_is_added():
    """Lengths 1, 2, 3 with max_completion_length 3 and a cache of 2: 0, -0.5, -1, on top of the weighted sum."""
    plain, soft = generated(), generated(overlong=(3, 2))
    assert torch.allclose(soft.rewards_PG - plain.rewards_PG, -(plain.lengths_PG - 1) / 2, atol=1e-5)
    assert torch.equal(soft.rewards_PGF.nan_to_num(-1), plain.rewards_PGF.nan_to_num(-1))


class Exchange:
    """The collectives for ranks that are threads of this process."""

    def __init__(self, size: int):
        self.barrier, self.slots = threading.Barrier(size), [None] * size

    def gather(self, tensor, world):
        self.slots[world.rank] = tensor
        self.barrier.wait(30)
        gathered = list(self.slots)
        self.barrier.wait(30)
        return gathered


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_any_number_of_ranks_holds_the_same_whole_step(size, monkeypatch):
    """Five prompts over 2, 3, 4 and 7 ranks: some ranks have more than others, some nothing at all."""
    expected, exchange = generated(), Exchange(size)
    monkeypatch.setattr(experience, "gather_ragged", exchange.gather)
    monkeypatch.setattr(distributed, "any_true", lambda flag, world: any(exchange.gather(flag, world)))
    engines, results = [FakeEngine() for _ in range(size)], [None] * size

    def rank(r):
        try:
            results[r] = generated(world=World(r, size, torch.device("cpu")), engine=engines[r])
        except BaseException:
            exchange.barrier.abort()
            raise

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        for field in fields(Rollouts):
            ours, theirs = getattr(got, field.name), getattr(expected, field.name)
            assert torch.equal(ours.nan_to_num(-9.0), theirs.nan_to_num(-9.0)), field.name
    asked = [prompt[0] for engine in engines for prompts, *_ in engine.asked for prompt in prompts]
    assert asked == [0, 1, 2, 3, 4]  # each prompt is sampled on one rank


# Faults that the tests above must see


def equal_rewards():
    test_equal_rewards_give_exactly_0(0.1, 7, "group")


def any_rewards():
    test_advantages(0)


def left_out():
    test_a_sample_without_reward_stays_without()


def packs():
    test_pack_says_where_its_tokens_come_from(14)


def kept_together():
    test_each_completion_keeps_its_prompt_and_its_rewards()


NAIVE = """naive = (rewards_PG - rewards_PG.nanmean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)
    return naive.nan_to_num(nan=0.0)
    if"""
FAULTS = [  # what is right, what is wrong, and which test sees it
    ("rewards = rewards_PG.double()\n    if", NAIVE, equal_rewards),
    ("(~rewards.isnan()).sum(1) - 1)", "(~rewards.isnan()).sum(1))", test_advantages_of_a_pair),
    ("centred * known / (known - 1)", "centred * (known - 1) / (known - 1)", lambda: test_rloo(0)),
    ("known = (~rewards.isnan())", "known = torch.ones_like(rewards)", lambda: test_rloo(0)),
    ("0.0, lengths_PG.double())", "0.0, 1.0)", lambda: test_reinforce_plus_plus(0, 5)),
    ("/ (total - 1).clamp(min=1)", "/ total", lambda: test_reinforce_plus_plus(3, 2)),
    ("rewards - rewards.nanmean(1, keepdim=True)).nan_to_num", "rewards - rewards.nanmean()).nan_to_num", any_rewards),
    (
        "rewards - rewards.nanmean(1, keepdim=True)).nan_to_num",
        "rewards - rewards.nan_to_num().mean(1, True)).nan_to_num",
        any_rewards,
    ),
    ("torch.where(rewards_NF.isnan().all(1), torch.nan, total)", "total", left_out),
    ("(rewards_NF * weights_F).nansum(1)", "rewards_NF.nansum(1)", test_weighted_rewards),
    ("slice(self._ends[i], self._ends[i + 1])", "slice(self._ends[i], self._ends[i + 1] - 1)", packs),  # the end token
    ("for span in spans]", "for span in sorted(spans, key=lambda s: -s.start)]", packs),
    ("p * self.lengths_PG.shape[1] + g", "g * self.lengths_PG.shape[0] + p", test_spans_cut_what_lies_end_to_end),
    ("values_PG.flatten().repeat_interleave", "values_PG.t().flatten().repeat_interleave", test_per_token),
    ("for row in mine for _ in range(G)]", "for _ in range(G) for row in mine]", kept_together),
    ('row["columns"][name] for row in repeated', 'row["columns"][name] for row in repeated[::-1]', kept_together),
    ('finish_reason == "length"', 'finish_reason != "length"', kept_together),
    ("whole[tokens] if", "whole[: tokens.stop - tokens.start] if", test_select_groups),
    ("whole[p : p + 1])", "whole[part : part + 1])", test_select_groups),
]


@pytest.mark.parametrize(("right", "wrong", "check"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_seen(right, wrong, check, monkeypatch):
    wrong_module = mutant(experience, right, wrong)
    for name, value in list(globals().items()):
        if getattr(value, "__module__", None) == experience.__name__:
            monkeypatch.setitem(globals(), name, getattr(wrong_module, name))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check()
