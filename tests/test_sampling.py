"""Every option of sampling with every other: what is drawn, its log-probs, and that a seed says all of it.

The truth is `processed` below: float64, one row, each rule by itself in plain Python.
"""

import itertools
import math

import pytest
import serving
import torch
from test_rollout import END, Letters, expected_logprobs, full_logits, prompt_of, tiny

from minitrl import checkpoint
from minitrl.rollout import Engine
from minitrl.sampling import Sampling, draw, processed_logits, sample

SINGLE = {"temperature": 1.6, "top_k": 14, "top_p": 0.93, "min_p": 0.04, "repetition_penalty": 1.5, "min_tokens": 99}
COMBINATIONS = [
    {name: SINGLE[name] for name in names} for count in range(7) for names in itertools.combinations(SINGLE, count)
]
OTHERS = [
    {"temperature": 0.6}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"repetition_penalty": 0.7}, {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.5, "min_tokens": 99}, {"temperature": 0, "top_k": 4, "min_p": 0.5},
    {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.02, "top_p": 0.9},
]  # fmt: skip
ALL = COMBINATIONS + OTHERS


def processed(logits, seen, min_tokens=0, ends=END, temperature=1.0, **options) -> list[float]:
    """float64 log-probs of what is sampled from: end ids banned, and greedy told as at temperature 1 with nothing cut."""
    logits = [-math.inf if min_tokens and token in ends else float(x) for token, x in enumerate(logits)]
    if temperature == 0:
        options = {"repetition_penalty": options.get("repetition_penalty", 1.0)}
    return expected_logprobs(logits, seen, temperature or 1.0, **options)


LOGITS = 1.5 * torch.randn(300, generator=torch.Generator().manual_seed(11))
SEEN, ENDS = [3, 1, 4, 1, 7], (2, 17)
FREQUENCIES = [(33, options) for options in ALL] + [(300, options) for options in [*COMBINATIONS[:7], SINGLE]]


def slow(vocabulary, options):
    """Three to five options at a time take a minute together."""
    return pytest.param(vocabulary, options, marks=[pytest.mark.slow] if 3 <= len(options) < len(SINGLE) else [])


@pytest.mark.parametrize("vocabulary, options", [slow(*case) for case in FREQUENCIES], ids=str)
def test_frequencies_of_100_000_draws(vocabulary, options):
    """Pearson's chi-squared against exact probabilities, at a level of 1e-5; and every log-prob that comes back.

    A vocabulary of 300 is wider than a block of `draw`.
    """
    draws, logits = 100_000, LOGITS[:vocabulary]
    exact = torch.tensor(processed(logits, SEEN, ends=ENDS, **options), dtype=torch.float64)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(len(str(options))), dtype=torch.float64)
    sampling, counts = Sampling(**{name: value for name, value in options.items() if name != "min_tokens"}), 0
    for part in uniforms.split(10_000):
        rows = len(part)
        banned = [(b, token) for b in range(rows) for token in ENDS] if "min_tokens" in options else ()
        given = [sampling] * rows, [SEEN] * rows if "repetition_penalty" in options else None, banned
        ids, logprobs = sample(logits.expand(rows, -1), part, *given)
        torch.testing.assert_close(logprobs.double(), exact[ids], atol=2e-6, rtol=2e-6)
        counts = counts + torch.bincount(ids, minlength=vocabulary)
    if options.get("temperature") == 0:
        assert counts[exact.argmax()] == draws
        return
    wanted = exact.exp() * draws
    assert (counts[wanted == 0] == 0).all()
    rare = wanted < 5  # together one bin
    seen, wanted = (torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (counts, wanted))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    squares = ((seen - wanted) ** 2 / wanted).sum()
    if len(wanted) > 1:  # the chance of so much or more
        assert torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), squares / 2) > 1e-5


def test_the_combinations_are_many():
    """Options without effect beside others would prove nothing. Of cuts the deepest wins, so some do hide behind others."""
    different = [tuple(processed(LOGITS[:33], SEEN, ends=ENDS, **options)) for options in COMBINATIONS]
    assert len(set(different[:7])) == 7, "each one alone"
    assert len(set(different)) >= 40
    depths = [sum(x > -math.inf for x in row) for row in different]
    assert min(depths) > 3, "there is something to draw"


def test_rare_tokens_are_not_lost_in_the_sum():
    """131,072 tokens of 1e-9 behind one of 1: a float32 sum over the vocabulary moves in steps of a hundred of them."""
    weights = torch.full((2**17,), 1e-9)
    weights[:256] = 0
    weights[7] = 1
    wanted = torch.arange(256, 2**17, 2003)
    targets = 1 + (wanted.double() - 256 + 0.5) * weights[-1].double()
    ids, totals = draw(weights.expand(len(wanted), -1), targets / weights.double().sum())
    assert ids.tolist() == wanted.tolist()
    torch.testing.assert_close(totals, weights.double().sum().expand(len(wanted)), rtol=1e-11, atol=0)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_what_an_engine_says_is_float64s(options):
    """Prompt, cache and all: each token's log-prob, recomputed from the full forward pass's logits."""
    model, prompt = tiny(), prompt_of(6)
    options = options | ({"min_tokens": 12} if "min_tokens" in options else {})
    for completion in Engine(model, Letters(), page_size=4).generate([prompt], n=3, max_tokens=12, seed=9, **options)[0]:
        logits = full_logits(model, prompt, completion.ids)
        for i, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs)):
            exact = processed(logits[i], prompt + completion.ids[:i], **options)
            assert logprob == pytest.approx(exact[token], abs=2e-5)


def asked(vocabulary):
    """One request for each combination: (prompt, seed, options), of lengths that differ."""
    for i, options in enumerate(ALL):
        options = options | ({"min_tokens": 7} if "min_tokens" in options else {})
        prompt = [2 + (7 * i + 3 * k) % (vocabulary - 2) for k in range(1 + i % 19)]
        yield prompt, 1000 + i, options | {"n": 2, "max_tokens": 20, "ignore_eos": i % 2 == 0}


def submitted(engine, requests):
    """All of them at once through one engine; per request its completions."""
    given = []
    for prompt, seed, options in requests:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        sampling = Sampling(**{name: options[name] for name in names if name in options})
        rest = {name: value for name, value in options.items() if name not in names}
        given.append(engine.submit(prompt, seed=seed, sampling=sampling, **rest))
    while not engine.idle:
        engine.step()
    return [request.results for request in given]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_seed_says_all(tiny, monkeypatch, deterministic):
    """Every combination alone, in a batch of all, after it had to leave and come back, and through a server."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    requests, size = list(asked(17)), {"page_size": 4, "deterministic": deterministic}
    alone = Engine(model, tokenizer, **size)
    expected = [alone.generate([prompt], seed=seed, **options)[0] for prompt, seed, options in requests]
    few, enter, returned = Engine(model, tokenizer, max_pages=20, **size), Engine._enter, set()

    def spy(self):
        s = enter(self)
        returned.update([s.request.seed] if s and s.ids else [])
        return s

    monkeypatch.setattr(Engine, "_enter", spy)
    crowded = submitted(few, requests)
    monkeypatch.undo()
    assert len(returned) > 30, "few had to leave"
    ways = [submitted(Engine(model, tokenizer, **size), requests), crowded]
    for way in ways:
        for theirs, ours in zip(sum(way, []), sum(expected, []), strict=True):
            assert (theirs.ids, theirs.text, theirs.finish_reason) == (ours.ids, ours.text, ours.finish_reason)
            assert theirs.logprobs == (ours.logprobs if deterministic else pytest.approx(ours.logprobs, abs=1e-5))
    with serving.here(tiny, deterministic=deterministic) as server:
        for (prompt, seed, options), completions in zip(requests, expected, strict=True):
            body = {"prompt": prompt, "seed": seed, "logprobs": 0, "return_token_ids": True, **options}
            status, answer = serving.ask(server.url, "/v1/completions", body)
            assert status == 200, answer
            for choice, ours in zip(answer["choices"], completions, strict=True):
                assert (choice["token_ids"], choice["finish_reason"]) == (ours.ids, ours.finish_reason)
                theirs = choice["logprobs"]["token_logprobs"]
                assert theirs == (ours.logprobs if deterministic else pytest.approx(ours.logprobs, abs=1e-5))


def test_a_row_is_processed_as_if_alone():
    """All combinations as the rows of one batch, which turns every option on for all: each row as without the others."""
    samplings = [Sampling(**{name: x for name, x in o.items() if name != "min_tokens"}) for o in ALL]
    logits = torch.randn(len(ALL), 61, generator=torch.Generator().manual_seed(2)) * 3
    histories = [prompt_of(i + 1, seed=i) for i in range(len(ALL))]
    banned = [(b, token) for b, options in enumerate(ALL) if "min_tokens" in options for token in END]
    together = processed_logits(logits, samplings, histories, banned).softmax(-1)
    for b, sampling in enumerate(samplings):
        mine = [(0, token) for row, token in banned if row == b]
        alone = processed_logits(logits[b : b + 1], [sampling], [histories[b]], mine).softmax(-1)
        assert torch.equal(together[b : b + 1], alone)
