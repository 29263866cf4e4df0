"""The generation engine against the full forward pass, exact distributions, and itself in other company."""

import math
import random

import pytest
import torch

from minitrl.model import Model, ModelConfig
from minitrl.rollout import Engine, PagePool, context_length
from minitrl.sampling import Sampling, draw, processed_logits, sample

V = 61  # an odd vocabulary: not a multiple of anything that is blocked
END = (57, 59)


class Letters:
    """A tokenizer of single characters; ids 40 to 43 are the bytes of two more, and the ids in END are special."""

    end_ids = END
    bytes_of = {40: b"\xc3", 41: b"\xa9", 42: b"\xc3", 43: b"\xa0"}

    def decode(self, ids, skip_special_tokens=True):
        assert skip_special_tokens
        spelled = [self.bytes_of.get(i, bytes([65 + i % 58])) for i in ids if i not in END]
        return b"".join(spelled).decode(errors="replace")

    def prompt_ids(self, prompt):
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        return [ord(character) - 65 for character in text]


def tiny(dtype=torch.float32, seed=0, **changes) -> Model:
    """A random model whose next-token distributions are neither flat nor certain."""
    shape = {
        "model_type": "qwen3", "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Model(ModelConfig.from_hf({**shape, **changes}))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.7, 1.3)
    return model.to(dtype).requires_grad_(False)


def prompt_of(length, seed=0):
    return random.Random(seed).choices([i for i in range(V) if i not in END], k=length)


def full_logits(model, prompt, ids):
    """(tokens, V): the logits that predict each of `ids`, from one uncached pass."""
    return model.logits([prompt + ids])[0][len(prompt) - 1 : -1]


def full_logprobs(model, prompt, ids):
    return full_logits(model, prompt, ids).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def ids_of(groups):
    return [[completion.ids for completion in group] for group in groups]


def assert_same(some, others, tolerance=1e-5):
    assert ids_of(some) == ids_of(others)
    for a, b in zip(sum(some, []), sum(others, []), strict=True):
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=tolerance)


# The cache

LENGTHS = [1, 15, 16, 17, 33]
MODELS = {
    "qwen3": {},
    "llama": {"model_type": "llama", "num_key_value_heads": 6},
    "window": {"model_type": "mistral", "sliding_window": 9},
    "windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
}


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("name", MODELS)
def test_cached_logprobs_are_those_of_the_full_forward_pass(name, page_size):
    """Prompts one short of, at and beyond a page's end; completions over several more pages; packs of two prompts."""
    model = tiny(**MODELS[name])
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    engine = Engine(model, Letters(), page_size=page_size, max_batch=4, prefill_tokens=33)
    groups = engine.generate(prompts, n=3, max_tokens=40, seed=1, ignore_eos=True)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            assert len(completion.ids) == len(completion.logprobs) == 40
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), full_logprobs(model, prompt, completion.ids), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_full_forward_pass(name):
    model = tiny(**MODELS[name])
    for length in LENGTHS:
        prompt = prompt_of(length)
        (completion,) = Engine(model, Letters()).generate([prompt], max_tokens=30, temperature=0, ignore_eos=True)[0]
        logits = full_logits(model, prompt, completion.ids)
        assert completion.ids == logits.argmax(-1).tolist()
        assert completion.logprobs == pytest.approx(logits.log_softmax(-1).amax(-1).tolist(), abs=1e-5)


def test_a_shared_prompt_is_the_same_as_a_repeated_one():
    engine = Engine(tiny(), Letters(), page_size=4)
    for length in (3, 4, 5, 18):
        prompt = prompt_of(length)
        shared = engine.generate([prompt], n=4, max_tokens=12, seed=5)[0]
        # Completion g draws with the random numbers of (seed, g): the last of g + 1 shares its prompt with fewer.
        repeated = [engine.generate([prompt], n=g + 1, max_tokens=12, seed=5)[0][g] for g in range(4)]
        assert_same([shared], [repeated])


def test_a_prompt_is_prefilled_once_and_its_full_pages_are_shared(monkeypatch):
    model, fed, most = tiny(), [], 0
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: fed.append(len(tokens)) or hidden(tokens, *rest))
    engine = Engine(model, Letters(), page_size=4)
    take = engine.pool.take

    def watched(count):
        nonlocal most
        pages = take(count)
        most = max(most, engine.pool.in_use)
        return pages

    monkeypatch.setattr(engine.pool, "take", watched)
    engine.generate([prompt_of(18)], n=8, max_tokens=2, ignore_eos=True)
    assert fed == [18, 8]  # one pass over the prompt, one step of eight
    assert most == 4 + 8  # four full pages for all, and each one's own fifth: the last inherits the prompt's


def test_prefill_is_bounded_by_its_token_budget(monkeypatch):
    model, fed = tiny(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: fed.append(len(tokens)) or hidden(tokens, *rest))
    prompts = [prompt_of(length, seed=length) for length in (10, 10, 10, 61, 5)]
    some = Engine(model, Letters(), prefill_tokens=25).generate(prompts, max_tokens=1)
    assert fed == [25, 25, 25, 21]  # two prompts and a half; the rest, and 20 of the long one; ...
    assert_same(some, Engine(model, Letters()).generate(prompts, max_tokens=1))


# Company

def crowd():
    return [prompt_of(length, seed=length) for length in (2, 9, 16, 3, 21, 1)]


@pytest.mark.parametrize("max_batch", [1, 2, 5, 7])
def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(max_batch):
    model, seeds = tiny(), [10, 11, 12, 13, 14, 15]
    options = {"n": 3, "max_tokens": 25, "temperature": 1.2}
    together = Engine(model, Letters()).generate(crowd(), seed=seeds, **options)
    assert len({len(c.ids) for group in together for c in group}) > 5  # they leave at different times
    small = Engine(model, Letters(), max_batch=max_batch, page_size=4)
    assert_same(together, small.generate(crowd(), seed=seeds, **options))
    alone = [small.generate([prompt], seed=seed, **options)[0] for prompt, seed in zip(crowd(), seeds)]
    assert_same(together, alone)
    backwards = small.generate(crowd()[::-1], seed=seeds[::-1], **options)[::-1]
    assert_same(together, backwards)


def test_finished_sequences_leave_and_waiting_ones_enter_between_steps(monkeypatch):
    model, sizes = tiny(), []
    engine = Engine(model, Letters(), max_batch=4)
    step = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda fed: sizes.append([bool(s.ids) for s, _ in fed]) or step(fed))
    groups = engine.generate(crowd(), n=4, max_tokens=30, temperature=1.5, seed=2)
    fed = sum(len(completion.ids) - 1 for group in groups for completion in group)
    assert max(map(len, sizes)) == 4 and sum(map(sum, sizes)) == fed  # nothing is computed for one that has ended
    assert sum(len(rows) == 4 for rows in sizes) > 0.7 * len(sizes) > 70  # and few wait while there is room


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_few_pages_change_when_but_not_what(spare):
    prompts, options = crowd(), {"n": 3, "max_tokens": 25, "seed": 3}
    model = tiny()
    plenty = Engine(model, Letters(), page_size=4).generate(prompts, **options)
    engine = Engine(model, Letters(), page_size=4, max_pages=12 + spare)  # the longest: 21 + 24 tokens are fed
    assert_same(plenty, engine.generate(prompts, **options))
    with pytest.raises(ValueError, match="prompt 4 has 21 tokens: with max_tokens 25 it needs 12 pages.* is 11"):
        Engine(model, Letters(), page_size=4, max_pages=11).generate(prompts, **options)


def test_pages_all_come_back(monkeypatch):
    engine = Engine(tiny(), Letters(), page_size=4, max_pages=40)
    pool, clear, held = engine.pool, engine.pool.clear, []
    monkeypatch.setattr(pool, "clear", lambda: held.append(pool.in_use) or clear())
    for n in (1, 3):
        engine.generate(crowd(), n=n, max_tokens=20, temperature=1.4, seed=n)
    assert held == [0, 0] and not pool.references and pool.pages.numel() == 0


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch):
    engine = Engine(tiny(), Letters(), page_size=4, max_pages=40)
    before = engine.generate(crowd(), n=2, max_tokens=20)
    calls = iter(range(5))
    with monkeypatch.context() as patch:
        step = engine._forward
        patch.setattr(engine, "_forward", lambda fed: step(fed) if next(calls) < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(crowd(), n=2, max_tokens=20)
    assert engine.idle and engine.pool.in_use == 0 and len(engine.free_rows) == 64
    assert_same(before, engine.generate(crowd(), n=2, max_tokens=20))


def test_many_pages_and_then_few():
    """The page table still names pages that went back with the memory behind them: nobody may look those up."""
    engine, uneven = Engine(tiny(), Letters(), page_size=2), [[1, 2], prompt_of(20)]
    engine.generate([[1, 2]], n=16, max_tokens=60, ignore_eos=True)
    expected = Engine(tiny(), Letters(), page_size=2).generate(uneven, max_tokens=5)
    assert_same(expected, engine.generate(uneven, max_tokens=5))


def test_pages_are_counted():
    pool = PagePool(tiny().layers, 4, 5, torch.zeros(1))
    pages = pool.take(3)
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.in_use == 2 and pool.available == 3
    assert set(pool.take(3)) & set(pages[:2]) == set()
    with pytest.raises(AssertionError, match="1 pages are not to be had, 5 of 5 are in use"):
        pool.take(1)
    pool.release(pages[:2])
    with pytest.raises(AssertionError, match="twice"):
        pool.release(pages[:1])


# Random numbers

def test_seeds_reproduce_and_differ():
    engine = Engine(tiny(), Letters())
    options = {"n": 4, "max_tokens": 16, "ignore_eos": True}
    prompt = prompt_of(5)
    some = engine.generate([prompt], seed=1, **options)
    assert_same(some, engine.generate([prompt], seed=1, **options), tolerance=0)
    other = engine.generate([prompt], seed=2, **options)
    everything = [tuple(c.ids) for c in some[0] + other[0]]
    assert len(set(everything)) == 8
    assert ids_of(engine.generate([prompt, prompt], seed=[2, 1], **options)) == ids_of([other[0], some[0]])
    # Same seed, same index, another length: the shorter is the beginning of the longer.
    shorter = engine.generate([prompt], seed=1, n=2, max_tokens=7, ignore_eos=True)[0]
    assert [c.ids for c in shorter] == [c.ids[:7] for c in some[0][:2]]


def test_draw_inverts_the_cumulative_distribution():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 255, 256, 257, 1000):
        weights = torch.rand(40, width, generator=generator) * (torch.rand(40, width, generator=generator) < 0.4)
        weights[torch.arange(40), torch.randint(width, (40,), generator=generator)] += 0.1
        uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
        ids, totals = draw(weights, uniforms)
        sums = weights.double().cumsum(-1)
        expected = (sums > uniforms[:, None] * sums[:, -1:]).int().argmax(-1)
        assert ids.tolist() == expected.tolist()
        torch.testing.assert_close(totals, sums[:, -1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, 1 - 2**-24, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    """At both ends of the interval, and where float32 sums of blocks and float64 sums within one do not quite agree."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(200, 3000, generator=generator) ** 20
    weights[:, :5] = weights[:, -300:] = weights[:, 512:768] = 0
    weights[::2] *= torch.rand(100, 3000, generator=generator) < 0.01
    weights[:, 700] = 1e-12
    ids, _ = draw(weights, torch.full((200,), uniform, dtype=torch.float64))
    assert (weights.gather(1, ids[:, None]) > 0).all()
    likely = torch.where(weights > 0, torch.arange(3000), -1)
    if uniform > 0.9999:
        assert (ids >= likely.max(-1).values - 2500).all() and ids.max() < 2700


# Distributions

OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.75},
    {"min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 1.6, "top_p": 0.8},
    {"temperature": 1.6, "min_p": 0.3},
    {"top_k": 7, "top_p": 0.9},
    {"top_k": 5, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.7, "repetition_penalty": 1.5},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
]


def expected_logprobs(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The processed distribution of one row, token by token in plain Python and float64."""
    logits = [float(x) for x in logits]
    for token in set(seen):
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = order[:top_k] if top_k > 0 else order
    mass, nucleus, total = 0.0, [], sum(weights[token] for token in kept)
    for token in kept:
        if mass < top_p * total:
            nucleus.append(token)
        mass += weights[token]
    kept = [token for token in nucleus if weights[token] >= min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [math.log(weights[token] / total) if token in kept else -math.inf for token in range(len(weights))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_returned_logprobs_are_of_the_processed_distribution(options):
    model, prompt = tiny(), prompt_of(6)
    engine = Engine(model, Letters(), page_size=4)
    cut = 0
    for completion in engine.generate([prompt], n=4, max_tokens=20, seed=9, ignore_eos=True, **options)[0]:
        logits = full_logits(model, prompt, completion.ids)
        for i, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs)):
            expected = expected_logprobs(logits[i], prompt + completion.ids[:i], **options)
            assert logprob == pytest.approx(expected[token], abs=2e-5)
            cut += expected.count(-math.inf)
    assert (cut > 0) == bool({"top_k", "top_p", "min_p"} & set(options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies_are_the_processed_distribution(options):
    """Pearson's chi-square over 20,000 first tokens; with 20 degrees of freedom it exceeds 60 once in 10^5."""
    model, prompt, draws = tiny(vocab_size=21), [3, 1, 4, 1], 20_000
    logits = model.logits([prompt])[0][-1].expand(draws, -1)
    generator = torch.Generator().manual_seed(4)
    uniforms = torch.rand(draws, generator=generator, dtype=torch.float64)
    ids, logprobs = sample(logits, uniforms, [Sampling(**options)] * draws, [prompt] * draws)
    expected = torch.tensor(expected_logprobs(logits[0], prompt, **options))
    torch.testing.assert_close(logprobs, expected[ids], atol=1e-5, rtol=1e-5)
    counts, wanted = torch.bincount(ids, minlength=21), expected.exp() * draws
    assert (counts[wanted == 0] == 0).all()
    often = wanted > 5
    assert ((counts - wanted)[often] ** 2 / wanted[often]).sum() < 60
    assert counts[~often].sum() <= 25


def test_the_engine_draws_from_its_own_distribution():
    """End to end: the first of two tokens of 4,000 completions."""
    model, prompt, n = tiny(vocab_size=21), [3, 1, 4, 1], 4000
    completions = Engine(model, Letters(), max_batch=500).generate([prompt], n=n, max_tokens=2, seed=6)[0]
    counts = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=21)
    wanted = model.logits([prompt])[0][-1].softmax(-1) * n
    often = wanted > 5
    assert ((counts - wanted)[often] ** 2 / wanted[often]).sum() < 60


def test_rows_may_differ_in_their_options():
    generator = torch.Generator().manual_seed(2)
    samplings = [Sampling(**options) for options in OPTIONS] + [Sampling(temperature=0, top_k=2)]
    logits = torch.randn(len(samplings), V, generator=generator) * 3
    histories = [prompt_of(i + 1, seed=i) for i in range(len(samplings))]
    together = processed_logits(logits, samplings, histories)
    for b, sampling in enumerate(samplings):
        alone = processed_logits(logits[b : b + 1], [sampling], [histories[b]])
        assert torch.equal(together[b : b + 1].softmax(-1), alone.softmax(-1))
    assert together[-1].isfinite().all()  # greedy: nothing is cut


def test_a_nucleus_wider_than_the_first_guess_is_found():
    """5,000 tokens, nearly flat: 90 % of the mass are far more than the 1024 likeliest."""
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3)) * 0.1
    logits[1] *= 50
    kept = processed_logits(logits, [Sampling(top_p=0.9)] * 2).isfinite()
    for b in range(2):
        expected = expected_logprobs(logits[b], [], top_p=0.9)
        assert kept[b].tolist() == [x > -math.inf for x in expected]
    assert kept[0].sum() > 4000 > 1024 > kept[1].sum()


def test_ties_are_kept_or_cut_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
        assert processed_logits(logits, [sampling]).isfinite().tolist() == [[True, True, True, True, False]]


def test_extreme_options():
    logits = torch.tensor([[1e30, 0.0, -1e30, 5.0], [-60.0, -61.0, -60.0, -1e4]])
    uniforms = torch.tensor([0.99, 0.99], dtype=torch.float64)
    for options in ({"temperature": 1e-4}, {"temperature": 1e6}, {"top_k": 100}, {"top_p": 1e-9}, {"min_p": 1.0}):
        ids, logprobs = sample(logits, uniforms, [Sampling(**options)] * 2)
        assert logprobs.isfinite().all() and (logprobs <= 0).all() and ids[0] in (0, 1, 3)
    assert logprobs.tolist() == [0.0, pytest.approx(-math.log(2))]
    for options in ({"top_p": 1e-300}, {"top_p": 5e-324, "temperature": 1e-4}, {"repetition_penalty": 1e-4},
                    {"repetition_penalty": 1e4, "temperature": 1e-4}, {"temperature": 1e6}):  # fmt: skip
        banned, histories = [(0, 1), (1, 3)], [[0, 1, 2, 3]] * 2
        ids, logprobs = sample(logits, uniforms, [Sampling(**options)] * 2, histories, banned)
        assert logprobs.isfinite().all() and ids[0] != 1 and ids[1] != 3


# Ends

def test_every_end_id_ends_and_is_included():
    model = tiny()
    groups = Engine(model, Letters()).generate(crowd(), n=30, max_tokens=40, temperature=1.5, seed=4)
    completions = [c for group in groups for c in group]
    for c in completions:
        ends = [i for i, token in enumerate(c.ids) if token in END]
        assert ends == ([len(c.ids) - 1] if c.finish_reason == "stop" else [])
        assert c.finish_reason == "stop" or len(c.ids) == 40
        assert c.text == Letters().decode([token for token in c.ids if token not in END])
    assert {c.ids[-1] for c in completions if c.finish_reason == "stop"} == set(END)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert min(len(c.ids) for c in completions) == 1  # also the token that comes from the prefill

    ignored = Engine(model, Letters()).generate(crowd(), n=30, max_tokens=40, temperature=1.5, seed=4, ignore_eos=True)
    for c, longer in zip(completions, sum(ignored, [])):
        assert longer.finish_reason == "length" and len(longer.ids) == 40
        assert longer.ids[: len(c.ids)] == c.ids


def test_an_end_token_at_the_very_limit_is_a_stop():
    engine = Engine(tiny(), Letters())
    completion = next(
        c for c in engine.generate([prompt_of(4)], n=60, max_tokens=12, temperature=1.5)[0] if c.finish_reason == "stop"
    )
    index = engine.generate([prompt_of(4)], n=60, max_tokens=12, temperature=1.5)[0].index(completion)
    again = engine.generate([prompt_of(4)], n=60, max_tokens=len(completion.ids), temperature=1.5)[0][index]
    assert again == completion


def says(monkeypatch, script, **options):
    """An engine that says `script`: drawing is the one place where ids come from."""
    engine = Engine(tiny(), Letters(), **options)
    said = iter(script)
    monkeypatch.setattr("minitrl.rollout.sample", lambda *_: (torch.tensor([next(said)]), torch.tensor([-1.0])))
    return engine


def spell(text):
    return [ord(character) - 65 for character in text]


@pytest.mark.parametrize("stop, text, ids", [
    (("CDE",), "AB", 5),           # over three tokens; the ids keep them
    (("DE", "BCD"), "A", 4),       # whichever appears first
    (("E", "DE"), "ABC", 5),       # both at once: cut before the longer
    (("XYZ",), "ABCDEFGH", 8),     # not said
    (("A",), "", 1),               # the very first token
    (("H",), "ABCDEFG", 8),        # at max_tokens: a stop, not a length
])  # fmt: skip
def test_stop_strings(monkeypatch, stop, text, ids):
    engine = says(monkeypatch, spell("ABCDEFGH"))
    (completion,) = engine.generate([[1]], max_tokens=8, stop=stop)[0]
    assert (completion.text, completion.ids) == (text, spell("ABCDEFGH")[:ids])
    assert completion.finish_reason == ("length" if stop == ("XYZ",) else "stop")
    assert len(completion.logprobs) == ids


def test_stop_strings_of_characters_that_take_two_tokens(monkeypatch):
    engine = says(monkeypatch, [0, 40, 41, 42, 43, 1, 2])
    (completion,) = engine.generate([[1]], max_tokens=7, stop=("à",))[0]
    assert (completion.text, completion.ids) == ("Aé", [0, 40, 41, 42, 43])


def test_stop_strings_across_a_special_token(monkeypatch):
    """Special tokens are no text: with end tokens ignored, a stop string is read across them."""
    engine = says(monkeypatch, [0, 1, 57, 2, 3])
    (completion,) = engine.generate([[1]], max_tokens=5, stop=("BC",), ignore_eos=True)[0]
    assert (completion.text, completion.ids) == ("A", [0, 1, 57, 2])


def test_stop_strings_end_only_their_own_completion():
    engine, options = Engine(tiny(), Letters()), {"n": 6, "max_tokens": 30, "temperature": 1.5, "seed": 8}
    free = engine.generate(crowd(), **options)
    stopped = engine.generate(crowd(), stop=("B", "AA"), **options)
    ended = 0
    for a, b in zip(sum(free, []), sum(stopped, [])):
        assert a.ids[: len(b.ids)] == b.ids
        at = min((a.text.index(s) for s in ("B", "AA") if s in a.text), default=len(a.text))
        assert b.text == a.text[:at]
        ended += len(b.ids) < len(a.ids)
    assert ended > 5


def test_a_partial_character_at_the_end_is_no_trouble(monkeypatch):
    engine = says(monkeypatch, [0, 40])
    (completion,) = engine.generate([[1]], max_tokens=2, stop=("é",))[0]
    assert (completion.text, completion.finish_reason) == ("A\ufffd", "length")


# Weights and number formats

def test_an_update_of_the_weights_in_place_is_seen():
    model = tiny()
    engine = Engine(model, Letters())
    before = engine.generate([prompt_of(9)], n=2, max_tokens=10, ignore_eos=True)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    after = engine.generate([prompt_of(9)], n=2, max_tokens=10, ignore_eos=True)[0]
    for completion in after:
        expected = full_logprobs(model, prompt_of(9), completion.ids)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert before != after


def test_generating_leaves_training_possible():
    """Nothing that a forward pass saves for backward was made in inference mode."""
    model = tiny().requires_grad_()
    Engine(model, Letters()).generate([prompt_of(9)], max_tokens=4)
    model.logits([prompt_of(9)])[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16():
    model = tiny(torch.bfloat16)
    prompts = [prompt_of(length) for length in LENGTHS]
    for prompt, group in zip(prompts, Engine(model, Letters()).generate(prompts, n=3, max_tokens=30, ignore_eos=True)):
        for completion in group:
            truth = full_logprobs(tiny().to(torch.bfloat16).float(), prompt, completion.ids)
            other = full_logprobs(model, prompt, completion.ids)
            # As near to float32 as the uncached bfloat16 pass is, not nearer: both round at every layer.
            mine = torch.tensor(completion.logprobs)
            assert (mine - truth).abs().mean() <= 2 * (other - truth).abs().mean() + 1e-3


def test_logits_that_are_not_finite_are_refused():
    model = tiny()
    model.norm.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        Engine(model, Letters()).generate([prompt_of(3)], max_tokens=4)


# Bad input

@pytest.mark.parametrize("options, message", [
    ({"temperature": -1.0}, "temperature must be 0 .* got -1.0"),
    ({"temperature": 1e-6}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": "1"}, "temperature .* got '1'"),
    ({"top_p": 0}, "top_p must be above 0"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty must be from 0.0001 to 10000"),
    ({"repetition_penalty": 1e300}, "repetition_penalty"),
    ({"temperature": 1e300}, "temperature must be 0 .* got 1e\\+300"),
    ({"n": 0}, "n must be a positive integer; got 0"),
    ({"n": True}, "n must"),
    ({"max_tokens": 0}, "max_tokens must be a positive integer; got 0"),
    ({"stop": ("",)}, "stop must be strings that are not empty"),
    ({"stop": (3,)}, "stop"),
    ({"seed": -1}, "seed"),
    ({"seed": [1, 2]}, "seed must be an integer, or one for each of the 1 prompts"),
    ({"seed": [0.5]}, "seed"),
    ({"max_tokens": 127}, "prompt 0 has 2 tokens: with max_tokens 127 it goes beyond the model's 128 positions"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny(), Letters()).generate([[1, 2]], **options)


@pytest.mark.parametrize("prompts, message", [
    ([[1], []], "prompt 1 is empty"),
    ([[1], ""], "prompt 1 is empty"),
    ([[1, V]], f"prompt 0 holds token id {V}; the model's vocabulary is 0 to {V - 1}"),
    ([[1, -1]], "prompt 0 holds token id -1"),
    ("text", "prompts must be a list of prompts; got 'text'"),
])  # fmt: skip
def test_prompts_that_cannot_be_continued(prompts, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny(), Letters()).generate(prompts, max_tokens=4)


@pytest.mark.parametrize("option", ["max_batch", "page_size", "max_pages", "prefill_tokens"])
def test_sizes_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be a positive integer; got 0"):
        Engine(tiny(), Letters(), **{option: 0})


def test_prompts_are_texts_ids_or_messages():
    engine = Engine(tiny(), Letters())
    groups = engine.generate(["BCD", [1, 2, 3], (1, 2, 3), [{"role": "user", "content": "BCD"}]], max_tokens=5)
    assert ids_of(groups) == ids_of([groups[0]] * 4)
    assert engine.generate([]) == []


def test_scaled_rope_reaches_further():
    assert context_length(tiny().config) == 128
    assert context_length(tiny(rope_scaling={"rope_type": "linear", "factor": 2.0}).config) == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert context_length(tiny(rope_scaling=yarn).config) == 128
