"""The engine between two steps: requests, memory, the prefix cache, weight updates; and the deterministic mode."""

import math
import os
import threading
from pathlib import Path

import miniature
import pytest
import torch
from processes import run_processes
from test_rollout import END, MODELS, Letters, assert_same, crowd, full_logprobs, ids_of, prompt_of, tiny

from minitrl.kernels.attention import attention
from minitrl.kernels.decode import extend, make_chunks
from minitrl.kernels.linear import HAS_ONEDNN, TILE, linear, packed_weights, swiglu
from minitrl.kernels.token_logprob import token_logprob
from minitrl.losses import sampling_weights
from minitrl.packing import pack, pack_groups
from minitrl.rollout import Engine, PagePool
from minitrl.sampling import Sampling
from minitrl.tokenizer import RENDERING, _limited_memory


def finish(engine):
    """Step until nothing is left; the finished requests in order."""
    done = []
    while not engine.idle:
        done += engine.step()
    return done


def count_fed(engine, monkeypatch):
    """A list that gets, for every step, what it feeds: (request, tokens)."""
    steps, forward = [], engine._forward
    spy = lambda feeding: steps.append([(s.request, count) for s, count in feeding]) or forward(feeding)  # noqa: E731
    monkeypatch.setattr(engine, "_forward", spy)
    return steps


def count_returns(engine, monkeypatch):
    """A list of the completions that had to leave and come back."""
    returned, enter = [], engine._enter

    def spy():
        s = enter()
        returned.extend([s] if s and s.ids else [])
        return s

    monkeypatch.setattr(engine, "_enter", spy)
    return returned


# Memory


@pytest.mark.parametrize("max_batch, budget, deterministic", [(3, 16, False), (64, 16, False), (64, 1, False), (64, 16, True)])
def test_a_quarter_of_the_cache_finishes_everything_alike(monkeypatch, max_batch, budget, deterministic):
    """Deterministic: with the same bits."""
    model, options = tiny(), {"n": 3, "max_tokens": 40, "seed": 3, "ignore_eos": True, "temperature": 1.2}
    plenty = Engine(model, Letters(), page_size=4, deterministic=deterministic)
    most, take = [0], plenty.pool.take
    monkeypatch.setattr(plenty.pool, "take", lambda count: (take(count), most.append(plenty.pool.in_use))[0])
    expected = plenty.generate(crowd(), **options)
    few = Engine(model, Letters(), page_size=4, max_pages=max(most) // 4, max_batch=max_batch, prefill_tokens=budget)
    returned = count_returns(few, monkeypatch)
    assert_same(expected, few.generate(crowd(), **options), tolerance=0 if deterministic else 1e-5)
    assert len(returned) > 5 or max_batch == 3


def test_the_bound_in_bytes():
    model = tiny()
    token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, key heads, their size, bytes
    engine = Engine(model, Letters(), page_size=4, cache_gib=50.5 * 4 * token / 2**30)
    assert engine.pool.max_pages == 50
    engine.generate(crowd(), n=6, max_tokens=30, ignore_eos=True)
    request = engine.submit(prompt_of(80), max_tokens=40)
    finish(engine)
    assert len(request.results[0].ids) > 0 and engine.pool.pages.nbytes <= 50 * 4 * token
    with pytest.raises(ValueError, match="cache_gib must be at least .* one page"):
        Engine(model, Letters(), page_size=4, cache_gib=1e-9)
    with pytest.raises(ValueError, match="cache_gib must be left out where max_pages is given"):
        Engine(model, Letters(), cache_gib=1, max_pages=3)
    with pytest.raises(ValueError, match="cache_gib must be positive; got -1"):
        Engine(model, Letters(), cache_gib=-1)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, or the most there were, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def generate_within(bound: int) -> None:
    """More than twice what fits into the bound. A process may hold, beside it, one layer's keys and values of all rows,
    gathered, and once more since the allocator keeps some; logits, their float32 and float64; and 16 MiB of small
    things and holes."""
    model = tiny(num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096)
    engine = Engine(model, Letters(), cache_gib=bound / 2**30, max_batch=24, prefill_tokens=64)
    engine.generate([[1, 2]], max_tokens=3)  # from here on the process has its weights and libraries
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most there were begins anew
    engine.generate([prompt_of(8, seed=i) for i in range(24)], max_tokens=190, ignore_eos=True)
    gathered, logits = 24 * (190 + 8 + 16) * 2 * 4 * 64 * 4, 24 * 61 * (4 + 4 + 8)
    grown = resident("VmHWM") - before
    assert bound / 2 < grown < bound + 2 * gathered + logits + 2**24, f"{grown / 2**20} MiB of {bound / 2**20}"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's tables")
def test_the_process_stays_within_the_bound():
    """129 pages: one more than where the memory of an unbounded cache is doubled, which holds old and new for a moment."""
    run_processes(generate_within, 1, 129 * 16 * 2 * 16 * 4 * 64 * 4)


def test_growing_waits_for_a_rendering(monkeypatch):
    """While a chat template is rendered the whole process's memory is limited: a cache that grows would hit that."""
    monkeypatch.setattr("minitrl.tokenizer.MAX_TEMPLATE_MEMORY", 2**26)  # a thread takes some of it
    pool = PagePool(tiny().layers, 2**16, None, torch.zeros(1))  # 64 pages of it are some GiB, on which nobody writes
    thread = threading.Thread(target=pool.take, args=(1,))
    with RENDERING, _limited_memory():
        thread.start()
        thread.join(0.2)
        assert pool.pages.numel() == 0
    thread.join()
    assert len(pool.references) == 64


def test_a_bound_beyond_the_machine_is_refused():
    with pytest.raises(ValueError, match="cache_gib: 1e\\+06 GiB of keys and values are not to be had"):
        Engine(tiny(), Letters(), cache_gib=1e6).generate([[1, 2]], max_tokens=3)


@pytest.mark.parametrize("n", [1, 4])
def test_less_than_a_page_a_sequence_is_wasted(n):
    engine = Engine(tiny(), Letters(), page_size=8)
    for seed, prompt in enumerate(crowd()):
        engine.submit(prompt, n=n, max_tokens=30, seed=seed)
    while not engine.idle:
        engine.step()
        waste = [len(s.pages) * 8 - s.cached for s in engine.running]
        assert all(w < 8 for w in waste)
        assert engine.pool.in_use <= sum(len(s.pages) for s in engine.running)  # shared pages count once
    assert engine.pool.in_use == 0


def test_pages_of_a_name_are_forgotten_from_the_longest_unused_on():
    pool = PagePool(tiny().layers, 2, 4, torch.zeros(1))
    first, second = pool.take(2), pool.take(2)
    for pages, ids in ((first, [1, 2, 3, 4]), (second, [5, 6, 7, 8])):
        known = pool.name(pages[0], 0, tuple(ids[:2]))
        pool.name(pages[1], known, tuple(ids[2:]))
    pool.release(first)
    pool.release(second)
    assert pool.in_use == 0 and pool.find([1, 2, 3, 4, 9, 9])[0] == first  # now the first are the newer ones
    pool.release(first)
    assert pool.take(1) == [second[1]]  # and of the older ones the end goes first
    assert pool.find([5, 6, 7, 8])[0] == [second[0]] and pool.find([3, 4])[0] == []  # a name says what stands before
    pool.forget()
    assert pool.find([1, 2])[0] == []


def test_two_pages_alike_have_one_name():
    pool = PagePool(tiny().layers, 2, 9, torch.zeros(1))
    a, b, c = pool.take(3)
    assert pool.name(a, 0, (1, 2)) == pool.name(b, 0, (1, 2)) != pool.name(c, 0, (1, 3))
    pool.release([b])
    pool.release([a])
    assert pool.find([1, 2])[0] == [a] and set(pool.free) >= {b}


# Prefixes and chunks


def test_a_hit_is_a_miss_but_for_the_work(monkeypatch):
    model, prefix = tiny(), prompt_of(37)
    prompts = [prefix + prompt_of(length, seed=length) for length in (5, 1, 12)] + [prefix, prefix[:36]]
    engine = Engine(model, Letters(), page_size=4)
    steps = count_fed(engine, monkeypatch)
    for seed, prompt in enumerate(prompts):
        alone = Engine(model, Letters(), page_size=4).generate([prompt], n=2, max_tokens=9, seed=seed)
        steps.clear()
        request = engine.submit(prompt, n=2, max_tokens=9, seed=seed)
        finish(engine)
        assert_same(alone, [request.results])
        fed = steps[0][0][1]
        assert fed == (len(prompt) if seed == 0 else len(prompt) - (len(prompt) - 1) // 4 * 4 if seed > 2 else
                       len(prompt) - 36)  # all, or what follows the known pages: one token at least


def test_answers_are_prefixes_too(monkeypatch):
    """The next turn of a conversation computes what is new."""
    engine = Engine(tiny(), Letters(), page_size=4)
    turn = engine.submit(prompt_of(10), max_tokens=12, ignore_eos=True)
    finish(engine)
    steps = count_fed(engine, monkeypatch)
    engine.submit(prompt_of(10) + turn.results[0].ids + [1, 2], max_tokens=1)
    finish(engine)
    assert steps[0][0][1] == 24 - 20


@pytest.mark.parametrize("budget", [1, 3, 7, 50])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_chunks_are_prompts_at_once(name, budget):
    model, options = tiny(**MODELS[name]), {"n": 2, "max_tokens": 12, "seed": 4}
    whole = Engine(model, Letters(), page_size=4).generate(crowd(), **options)
    chunked = Engine(model, Letters(), page_size=4, prefill_tokens=budget)
    assert_same(whole, chunked.generate(crowd(), **options))


def test_a_long_prompt_stalls_nobody():
    engine, drawn = Engine(tiny(), Letters(), prefill_tokens=8), []
    engine.submit([1, 2], max_tokens=40, ignore_eos=True, on_token=lambda *_: drawn.append(1))
    engine.step()
    long = engine.submit(prompt_of(90), max_tokens=2, on_token=lambda *_: drawn.append(2))
    finish(engine)
    assert drawn[:12] == [1] * 12 and drawn.count(1) == 40 and long.finished
    assert 2 in drawn[12:15]


# Requests


def test_tokens_arrive_as_they_are_drawn():
    engine, seen = Engine(tiny(), Letters()), {}
    requests = [
        engine.submit(prompt, n=3, max_tokens=20, seed=p, sampling=Sampling(temperature=1.5), stop=("AB",),
                      on_token=lambda *told, p=p: seen.setdefault((p, told[0]), []).append(told[1:]))
        for p, prompt in enumerate(crowd())
    ]  # fmt: skip
    first = engine.step()
    assert len(seen) == 18 and all(len(told) == 1 for told in seen.values())
    assert set(first + finish(engine)) == set(requests)
    for p, request in enumerate(requests):
        for g, completion in enumerate(request.results):
            ids, logprobs, reasons = zip(*seen[p, g])
            assert (list(ids), list(logprobs)) == (completion.ids, completion.logprobs)
            assert reasons == (None,) * (len(ids) - 1) + (completion.finish_reason,)
    again = Engine(tiny(), Letters()).generate(crowd(), n=3, max_tokens=20, seed=range(6), temperature=1.5, stop="AB")
    assert_same(again, [request.results for request in requests])


def test_requests_that_come_later_change_nothing():
    model, engine = tiny(), Engine(tiny(), Letters(), page_size=4, max_batch=5, max_pages=60)
    requests = []
    for seed, prompt in enumerate(crowd()):
        requests.append(engine.submit(prompt, n=2, max_tokens=20, seed=seed))
        engine.step(), engine.step()
    finish(engine)
    alone = Engine(model, Letters()).generate(crowd(), n=2, max_tokens=20, seed=range(6))
    assert_same(alone, [request.results for request in requests])


@pytest.mark.parametrize("after", [0, 1, 2, 6])
def test_an_aborted_request_gives_all_back_at_once(after):
    options = {"n": 3, "max_tokens": 25, "ignore_eos": True}
    engine = Engine(tiny(), Letters(), page_size=4, max_batch=7, prefill_tokens=10)
    requests = [engine.submit(prompt, seed=seed, **options) for seed, prompt in enumerate(crowd())]
    for _ in range(after):
        engine.step()
    for request in (requests[1], requests[4]):
        engine.abort(request)
        assert request.finished and {c.finish_reason for c in request.results} == {"abort"}
        mine = [page for s in engine.running for page in s.pages]
        assert engine.pool.in_use == len(set(mine)) and all(s.row is None for s in request.sequences)
        rows = {s.row for s in engine.running} | {f.row for s in engine.running for f in s.followers}
        assert len(rows) + len(engine.free_rows) == 7
    done = finish(engine)
    assert {id(r) for r in done} == {id(r) for p, r in enumerate(requests) if p not in (1, 4)}
    assert engine.pool.in_use == 0 and len(engine.free_rows) == 7
    alone = Engine(tiny(), Letters()).generate(crowd(), seed=range(6), **options)
    for p, request in enumerate(requests):
        if p in (1, 4):  # what was sampled is not lost
            assert all(b.ids == a.ids[: len(b.ids)] for a, b in zip(alone[p], request.results))
        else:
            assert_same([alone[p]], [request.results])


def test_a_listener_may_abort():
    engine = Engine(tiny(), Letters(), page_size=4)
    other = engine.submit(prompt_of(7), n=2, max_tokens=20, ignore_eos=True)
    mine = engine.submit(prompt_of(9), n=3, max_tokens=20, ignore_eos=True, seed=1,
                         on_token=lambda g, *_: g == 1 and engine.abort(mine))  # fmt: skip
    assert finish(engine) == [other] and engine.pool.in_use == 0
    assert [(len(c.ids), c.finish_reason) for c in mine.results] == [(1, "abort"), (1, "abort"), (0, "abort")]
    assert [len(c.ids) for c in other.results] == [20, 20]


def test_what_is_refused_leaves_nothing_behind():
    engine = Engine(tiny(), Letters(), page_size=4, max_pages=5)
    for options, message in (
        ({"prompt": [1] * 10, "max_tokens": 12}, "the prompt has 10 tokens: with max_tokens 12 it needs 6 pages"),
        ({"prompt": [], "max_tokens": 2}, "the prompt is empty"),
        ({"prompt": [1], "max_tokens": 2, "min_tokens": 3}, "min_tokens must be an integer from 0 to max_tokens, 2"),
        ({"prompt": [1], "min_tokens": -1}, "min_tokens"),
        ({"prompt": [1], "max_tokens": 2, "seed": "a"}, "seed must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(**options)
    assert engine.idle and engine.step() == []


@pytest.mark.parametrize("deterministic", [False, True])
def test_min_tokens(deterministic):
    model, prompt = tiny(), prompt_of(5)
    if deterministic:
        model.make_deterministic()
    options = {"n": 60, "max_tokens": 12, "seed": 2, "temperature": 1.5}
    free = Engine(model, Letters()).generate([prompt], **options)[0]
    held = Engine(model, Letters()).generate([prompt], min_tokens=6, **options)[0]
    assert min(len(c.ids) for c in free) < 6 < min(len(c.ids) for c in held) <= 12
    for completion in held:
        assert not set(completion.ids[:6]) & set(END)
        logits = model.logits([prompt + completion.ids])[0][len(prompt) - 1 : -1] / 1.5
        logits[:6, list(END)] = -math.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_stop_strings_count_from_min_tokens_on(monkeypatch):
    engine = Engine(tiny(), Letters())
    said = iter([0, 1, 2, 0, 1, 2, 3] * 3)
    monkeypatch.setattr("minitrl.rollout.sample", lambda *_: (torch.tensor([next(said)]), torch.tensor([-1.0])))
    for least, text in ((0, ""), (2, "ABC"), (4, "ABC"), (5, "ABCABCD")):
        said = iter([0, 1, 2, 0, 1, 2, 3])
        (completion,) = engine.generate([[1]], max_tokens=7, stop="AB", min_tokens=least)[0]
        assert (completion.text, completion.finish_reason) == (text, "length" if least == 5 else "stop")


# Weight updates between two steps


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)


def test_every_token_knows_its_weights(monkeypatch):
    model = tiny()
    engine = Engine(model, Letters(), page_size=4, max_batch=9)
    requests = [engine.submit(prompt, n=2, max_tokens=20, seed=s, ignore_eos=True) for s, prompt in enumerate(crowd())]
    lengths = []
    for version in (3, 4):
        for _ in range(5):
            engine.step()
        changed(model)
        engine.weights_changed(version)
        lengths.append({s: len(s.ids) for r in requests for s in r.sequences})
    steps = count_fed(engine, monkeypatch)
    late = engine.submit(crowd()[4], max_tokens=9, ignore_eos=True, seed=4)
    finish(engine)
    assert [count for fed in steps for request, count in fed if request is late][0] == 21  # no page of old weights
    assert late.results[0].versions == ((4, 0, 9),)
    expected = full_logprobs(model, crowd()[4], late.results[0].ids)
    assert late.results[0].logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    for request in requests:
        for s, completion in zip(request.sequences, request.results):
            cuts = [0, lengths[0][s], lengths[1][s], 20]
            spans = [(v, a, b) for v, a, b in zip((0, 3, 4), cuts, cuts[1:]) if a < b]
            assert completion.versions == tuple(spans)
    assert {len(c.versions) for r in requests for c in r.results} >= {1, 3}


def test_keys_of_older_weights_get_no_name(monkeypatch):
    """A page that was begun with them is filled under the new ones: who begins with the same ids computes all anew."""
    engine = Engine(tiny(), Letters(), page_size=4)
    first = engine.submit(prompt_of(2), max_tokens=12, ignore_eos=True)
    engine.step()
    engine.weights_changed(1)
    finish(engine)
    steps = count_fed(engine, monkeypatch)
    engine.submit(prompt_of(2) + first.results[0].ids + [1], max_tokens=1)
    finish(engine)
    assert steps[0][0][1] == 15


def test_packed_weights_are_packed_anew():
    """A model whose matrices are large enough to be packed: copies of the old weights must not serve the new ones."""
    model = tiny(hidden_size=512, intermediate_size=600, num_hidden_layers=1)
    engine = Engine(model, Letters())
    for version in range(2):
        request = engine.submit(prompt_of(5), max_tokens=4, ignore_eos=True)
        finish(engine)
        logprobs = full_logprobs(model, prompt_of(5), request.results[0].ids)
        assert request.results[0].logprobs == pytest.approx(logprobs.tolist(), abs=1e-3)
        assert engine.packed or not HAS_ONEDNN
        changed(model)
        engine.weights_changed(version + 1)


def test_a_step_that_fails_leaves_no_page_named(monkeypatch):
    engine = Engine(tiny(), Letters(), page_size=4)
    request = engine.submit(prompt_of(30), max_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.abort(request)
    assert engine.pool.find(prompt_of(30))[0] == []
    again = engine.submit(prompt_of(30), max_tokens=5)
    finish(engine)
    assert_same(Engine(tiny(), Letters()).generate([prompt_of(30)], max_tokens=5), [again.results])


# The deterministic mode

DTYPES = [torch.float32, torch.bfloat16]
KINDS = MODELS | {"biases": {"model_type": "qwen2"}}


def rows_alone(function, *tensors):
    """function of all rows, and of each row in other company."""
    whole = function(*tensors)
    count = len(tensors[0])
    for some in ([3], list(range(count - 1, -1, -1)), [0, 1], list(range(2, count)), [5] * 40):
        assert torch.equal(function(*(x[some] for x in tensors)), whole[some]), some


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("I, O", [(7, 5), (64, 48), (1536, 130)])
def test_products_by_rows(I, O, dtype):  # noqa: E741
    g = torch.Generator().manual_seed(0)
    x, residual, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((35, I), (35, O), (O, I), (O,)))
    rows_alone(lambda x, r: linear(x, weight, bias, r, deterministic=True), x, residual)
    both, both_bias = torch.cat([weight, weight * 0.5]), torch.cat([bias, bias])
    rows_alone(lambda x: swiglu(x, both, both_bias, deterministic=True), x)
    with torch.no_grad(), packed_weights():
        packed = linear(x, weight, bias, residual, deterministic=True)
    assert torch.equal(packed, linear(x, weight, bias, residual, deterministic=True))
    assert len(x) % TILE


def gradients(function, *tensors):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    g = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=g)).sum().backward()
    return [out.detach(), *(x.grad for x in tensors)]


def test_gradients_are_those_of_the_other_mode():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((35, 24), (40, 24), (40,)))
    q, k, v = (torch.randn(9, heads, 8, generator=g) for heads in (4, 2, 2))
    layout = pack([[1] * 4, [1] * 5], prefixes=(-1, 0))
    targets = torch.arange(35) % 40
    for function, given in (
        (lambda mode, x, w, b: linear(x, w, b, deterministic=mode), (x, weight, bias)),
        (lambda mode, x, w, b: swiglu(x, w, b, deterministic=mode), (x, weight, bias)),
        (lambda mode, *qkv: attention(*qkv, layout.cu_seqlens, layout.prefixes_B, deterministic=mode), (q, k, v)),
        (lambda mode, x, w: torch.stack(token_logprob(x, w, targets, deterministic=mode)), (x, weight)),
    ):
        some, other = (gradients(lambda *xs, mode=mode: function(mode, *xs), *given) for mode in (True, False))
        for a, b in zip(some, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9, 70])
def test_attention_from_pages_has_the_packs_bits(dtype, window):
    """Chunks that begin and end anywhere, of a completion behind a shared prompt."""
    g, prompt, size = torch.Generator().manual_seed(0), 75, 5
    packed = pack([[1] * prompt, [1] * 20, [1] * 70], prefixes=(-1, 0, 0))
    q, k, v = (torch.randn(165, heads, 16, generator=g).to(dtype) for heads in (6, 2, 2))
    whole = attention(q, k, v, packed.cu_seqlens, packed.prefixes_B, window=window, deterministic=True)
    rows = torch.cat([torch.arange(prompt), torch.arange(95, 165)])  # the second completion's tokens
    pages = [x[rows].view(-1, size, 2, 16).transpose(1, 2).contiguous() for x in (k, v)]
    table = torch.arange(29)[None]
    for start, end in ((0, 145), (0, 75), (75, 145), (144, 145), (3, 6), (76, 143), (63, 66)):
        chunks = make_chunks([start], [end - start], table, pages[0], 6, window, True)
        out = extend(q[rows[start:end]], *pages, chunks, window=window, deterministic=True)
        assert torch.equal(out, whole[rows[start:end]]), (start, end)


def trained(model, prompts, groups, temperature):
    """The log-probs that the trainer computes, of all completions end to end."""
    packed = pack_groups(prompts, [[completion.ids for completion in group] for group in groups])
    return model.logprobs(packed, packed.completion_T, temperature)[0].detach()[packed.completion_T]


def sampled(groups):
    return torch.tensor([logprob for group in groups for completion in group for logprob in completion.logprobs])


COMPANY = {
    "all at once": {},
    "few rows": {"max_batch": 2},
    "chunks": {"prefill_tokens": 7, "page_size": 4},
    "preempted": {"max_pages": 22, "page_size": 4, "prefill_tokens": 11},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_trainer_agree_to_the_bit(kind, dtype, monkeypatch):
    model = tiny(dtype, **KINDS[kind]).requires_grad_()
    prompts = [prompt_of(length, seed=length) for length in (1, 16, 21, 70)]
    options = {"n": 2, "max_tokens": 10, "seed": 1, "temperature": 1.3}
    groups = {}
    for name, company in COMPANY.items():
        engine = Engine(model, Letters(), deterministic=True, **company)
        returned = count_returns(engine, monkeypatch)
        groups[name] = engine.generate(prompts, ignore_eos=True, **options)
        assert bool(returned) == (name == "preempted")
    alone = Engine(model, Letters())  # the mode is the model's
    groups["one by one"] = [alone.generate([p], ignore_eos=True, **options)[0] for p in prompts]
    prefix = Engine(model, Letters(), page_size=4)
    for _ in range(2):  # the second time all is in the prefix cache
        requests = [
            prefix.submit(p, n=2, max_tokens=10, seed=1, sampling=Sampling(1.3), ignore_eos=True) for p in prompts
        ]
        finish(prefix)
    groups["prefix hits"] = [request.results for request in requests]
    truth = trained(model, prompts, groups["all at once"], 1.3)
    one_by_one = [trained(model, [p], [group], 1.3) for p, group in zip(prompts, groups["all at once"])]
    assert torch.equal(torch.cat(one_by_one), truth)
    for name, found in groups.items():
        assert ids_of(found) == ids_of(groups["all at once"]) and torch.equal(sampled(found), truth), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_the_mode_they_do_not(dtype):
    model = tiny(dtype)
    groups = Engine(model, Letters()).generate(crowd(), n=3, max_tokens=16, ignore_eos=True)
    difference = (sampled(groups) - trained(model, crowd(), groups, 1.0)).abs()
    assert 0 < difference.max() < (1e-4 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_change_no_bit(dtype):
    """Of a model whose products are large enough to be divided."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
    model, prompts = tiny(dtype, **wide), [prompt_of(3), prompt_of(60)]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            engine = Engine(model, Letters(), deterministic=True)
            groups = engine.generate(prompts, n=2, max_tokens=4, ignore_eos=True, temperature=1.3)
            found.append((ids_of(groups), sampled(groups).tolist(), trained(model, prompts, groups, 1.3).tolist()))
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1] and found[0][1] == found[0][2]


def test_deterministic_in_float64_is_refused():
    with pytest.raises(ValueError, match="deterministic: on a CPU it is there for .* not torch.float64"):
        Engine(tiny(torch.float64), Letters(), deterministic=True).generate([[1]], max_tokens=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_prints_zero(tiny, tmp_path, dtype):
    """KL(sampler, trainer) through a run, whatever the micro-batches; and above zero without the mode."""
    for mode in (True, False):
        assert miniature.run(tiny.argv(tmp_path / str(mode), dtype=dtype, deterministic=mode)).code == 0
        steps = miniature.steps(tmp_path / str(mode))
        names = ["sampling/kl", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"]
        values = [step[name] for step in steps for name in names if name in step]
        assert len(values) >= 6 and all((value == 0) == mode for value in values)
        assert not mode or all(step["sampling/importance_sampling_ratio/mean"] == 1 for step in steps)


# What corrects for a mismatch


def test_sampling_weights():
    old, sampler = torch.tensor([-1.0, -2.0, -3.0, -1.0, -9.0]), torch.tensor([-1.5, -2.0, -2.0, math.nan, -1.0])
    mask, segments = torch.tensor([True, True, True, True, False]), torch.tensor([0, 0, 1, 1, 2])
    ratios, sums = [math.exp(0.5), 1.0, math.exp(-1), 1.0, 1.0], [math.exp(0.5)] * 2 + [math.exp(-1)] * 2 + [1.0]
    for mode, bounds, expected in (
        ("token_truncate", (1.2, 0.5), [1.2, 1.0, 0.5, 1.0, 1.0]),
        ("token_truncate", (None, None), ratios),
        ("token_mask", (1.2, 0.5), [0.0, 1.0, 0.0, 1.0, 1.0]),
        ("token_mask", (None, 0.5), [math.exp(0.5), 1.0, 0.0, 1.0, 1.0]),
        ("sequence_truncate", (1.2, 0.5), [1.2, 1.2, 0.5, 0.5, 1.0]),
        ("sequence_mask", (1.2, None), [0.0, 0.0, math.exp(-1), math.exp(-1), 1.0]),
        ("sequence_mask", (3.0, None), sums),
    ):
        weights = sampling_weights(old, sampler, mask, segments, mode, *bounds)
        assert weights.tolist() == pytest.approx(expected), (mode, bounds)
