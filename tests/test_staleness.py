"""--max_staleness: sampling goes on while the policy is trained; what is older than the bound is never trained on."""

import functools
import os
import signal
import threading
import time
from concurrent.futures import Future, wait
from types import SimpleNamespace

import miniature
import pytest
import serving
import torch
from miniature import rows, steps
from test_rollout_client import OPTIONS, PROMPTS, SEEDS, changed, same
from test_rollout_client import slow as slow_server

from minitrl import ahead, checkpoint, distributed, grpo, losses, ppo, rollout_client, transfer
from minitrl.rollout import Completion, Engine
from minitrl.rollout_client import Lost, RemoteEngine

WORLD = distributed.World(0, 1, torch.device("cpu"))
LONG = OPTIONS | {"max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny):
    with serving.here(tiny) as running:
        yield running


def scaled(policy, factor=1.02) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(factor)


def arguments(tiny, folder, url, **options) -> list[str]:
    options = {"max_staleness": 1, "max_steps": 6, "tokens_per_microbatch": 64, **options}
    return tiny.argv(folder, rollout_server=url, **options)


def train(tiny, folder, url, **options) -> miniature.Outcome:
    outcome = miniature.run(arguments(tiny, folder, url, **options))
    assert outcome.code == 0, outcome.err
    return outcome


def prompts(folder) -> list[tuple[int, str]]:
    return [(row["step"], row["prompt"]) for row in rows(folder, "completions")]


def ages(folder) -> list[int]:
    """Of each completion that was trained on: steps between the weights of its first token and those it trained."""
    return [row["step"] - 1 - row["version"] for row in rows(folder, "completions") if row["used"]]


def slow_trainer(monkeypatch) -> None:
    """All that is on its way is there before a step's weights change."""
    updating = ahead.Ahead.updating

    def later(self, step):
        wait(self.asked.values(), 60)
        return updating(self, step)

    monkeypatch.setattr(ahead.Ahead, "updating", later)


@pytest.fixture(scope="module")
def synchronous(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synchronous") / "run"
    assert miniature.run(tiny.argv(folder, max_steps=6)).code == 0
    return folder


def test_what_cannot_be_asked_for(tmp_path, tiny):
    url = {"rollout_server": "http://127.0.0.1:1"}
    for options, message in [
        ({}, "--max_staleness 1: must be 0 without --rollout_server: one process samples and trains by turns"),
        (url | {"max_staleness": -1}, "--max_staleness -1: must be at least 0"),
        (url | {"vllm_importance_sampling_correction": False}, "must be on with --max_staleness"),
    ]:
        outcome = miniature.run(tiny.argv(tmp_path, **{"max_staleness": 1, **options}))
        assert outcome.code == 2 and message in outcome.err
    argv = tiny.argv(tmp_path, max_staleness=1, **url)
    outcome = miniature.run(argv, ppo)
    assert outcome.code == 2 and "--max_staleness 1: must be 0: PPO has no correction for samples" in outcome.err


def test_without_staleness_every_sample_is_of_its_step(tiny, tmp_path, synchronous, server):
    assert ages(synchronous) == [0] * 48 and not any("sampling/staleness/max" in row for row in steps(synchronous))
    train(tiny, tmp_path, server.url, max_staleness=0)
    assert rows(tmp_path, "completions") == rows(synchronous, "completions")


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_a_slow_trainer_trains_on_samples_as_old_as_may_be(tiny, tmp_path, monkeypatch, synchronous, server, bound):
    """Generations are there long before they are needed: each is of the weights that it was asked for with."""
    slow_trainer(monkeypatch)
    train(tiny, tmp_path, server.url, max_staleness=bound)
    assert ages(tmp_path) == [min(step, bound) for step in range(6) for _ in range(8)]
    assert prompts(tmp_path) == prompts(synchronous)
    for step, row in enumerate(steps(tmp_path)):
        assert row["sampling/staleness/mean"] == row["sampling/staleness/max"] == min(step, bound)
        assert row["sampling/too_old"] == 0
        assert (row["sampling/kl"] > 1e-6) == (step > 0)  # the samplers' log-probs are of the older weights


def test_a_slow_server_gets_new_weights_amid_its_completions(tiny, tmp_path, synchronous):
    options = {"max_staleness": 2, "max_completion_length": 24, "max_steps": 5}
    with serving.Process(tiny, slow_server) as process:
        train(tiny, tmp_path, process.url, **options)
    found = ages(tmp_path)
    assert 0 < max(found) <= 2 and prompts(tmp_path) == prompts(synchronous)[:40]
    for row in steps(tmp_path):
        assert row["sampling/staleness/max"] <= 2 and row["sampling/too_old"] == 0


@pytest.mark.parametrize("options, oldest", [
    ({"num_iterations": 2}, 1), ({"num_iterations": 2, "max_staleness": 2}, 2),
    ({"dynamic_sampling": 2, "reward": "rare"}, 1), ({"beta": 0.1, "use_peft": True, "lora_r": 4}, 1),
    ({"learning_rate": 0.0}, 1),
])  # fmt: skip
def test_with_other_options(tiny, tmp_path, monkeypatch, server, options, oldest):
    """Steps are optimizer steps; groups without signal are replaced from what is ahead; weights that do not change are
    those of the newest step, or nothing would be new enough."""
    slow_trainer(monkeypatch)
    train(tiny, tmp_path / "here", server.url, **options)
    assert miniature.run(tiny.argv(tmp_path / "there", **options | {"max_steps": 6, "max_staleness": 0})).code == 0
    if "reward" not in options:  # which groups have signal is up to the samples
        assert prompts(tmp_path / "here") == prompts(tmp_path / "there")
    drawn = [row["prompt"] for row in rows(tmp_path / "here", "completions")]
    assert len(set(drawn)) * 4 == len(drawn), "a prompt was drawn twice"
    assert max(ages(tmp_path / "here")) == oldest


def test_requests_go_on_with_new_weights_of_the_same_trainer(tiny, monkeypatch, server):
    """None is dropped: each is asked once, though two updates come amid its tokens."""
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine([server.url], policy, tokenizer, WORLD, timeout_s=30)
    with remote.updating(0):
        pass
    first = remote.ask(0, PROMPTS[:1], **OPTIONS)  # it brings the weights over
    first.result(30)
    asked, submit, step = [], server.worker.submit, server.worker.engine.step
    monkeypatch.setattr(server.worker, "submit", lambda job: asked.append(job) or submit(job))
    monkeypatch.setattr(server.worker.engine, "step", lambda: time.sleep(0.05) or step())
    future = remote.ask(0, PROMPTS, seed=SEEDS, **LONG)
    short = OPTIONS | {"max_tokens": 2}
    for number in (1, 2):
        time.sleep(0.2)
        with remote.updating(number):
            scaled(policy)
        other = remote.ask(number, PROMPTS[:1], seed=5, **short)
        assert {c.versions[0][0] for group in other.result(30) for c in group} == {number}
    groups = future.result(30)
    longest = max((c.versions for group in groups for c in group), key=len)
    assert [version for version, _, _ in longest] == [0, 1, 2]
    assert [a for _, a, _ in longest[1:]] == [b for _, _, b in longest[:-1]] and longest[-1][2] == 40
    assert sum(len(job.requests) for job in asked if len(job.requests[0].results) == 3) == len(PROMPTS) + 2
    assert same(other.result(), Engine(policy, tokenizer).generate(PROMPTS[:1], seed=5, **short))


def test_another_trainers_weights_end_them(tiny, monkeypatch, server):
    """They are asked again, and come from this trainer's weights alone."""
    step = server.worker.engine.step
    engines = []
    for factor in (1.05, 1.1):
        policy, tokenizer = changed(tiny, factor)
        engines.append(RemoteEngine([server.url], policy, tokenizer, WORLD, timeout_s=30))
    remote, other = engines
    with remote.updating(3):
        pass
    monkeypatch.setattr(server.worker.engine, "step", lambda: time.sleep(0.02) or step())
    future = remote.ask(3, PROMPTS, seed=SEEDS, **LONG)
    while not remote.servers[0].ready or not server.worker.pending:
        time.sleep(0.02)
    time.sleep(0.1)
    other.generate(PROMPTS[:1], **OPTIONS)
    monkeypatch.undo()
    assert same(future.result(60), Engine(remote.policy, tokenizer).generate(PROMPTS, seed=SEEDS, **LONG))


def test_another_run_of_the_same_beginning_is_not_taken_for_this_one(tiny, monkeypatch, server):
    """What it sends amid our completions, before we have newer weights ourselves, is none of our steps."""
    engines, step = [], server.worker.engine.step
    for _ in range(2):
        policy, tokenizer = changed(tiny, 1.05)
        engines.append(RemoteEngine([server.url], policy, tokenizer, WORLD, timeout_s=30))
        with engines[-1].updating(0):
            pass
        engines[-1].ask(0, PROMPTS[:1], **OPTIONS).result(30)
    other, remote = engines
    monkeypatch.setattr(server.worker.engine, "step", lambda: time.sleep(0.02) or step())
    future = remote.ask(0, PROMPTS, seed=SEEDS, **LONG)
    while not remote.servers[0].ready or not server.worker.pending:
        time.sleep(0.02)
    before = server.worker.version
    with other.updating(1):
        scaled(other.policy, 1.5)
    while server.worker.version == before:
        time.sleep(0.02)
    monkeypatch.setattr(remote, "revive", lambda: None)  # it comes to that only later
    with remote.updating(1):
        scaled(remote.policy)
    while server.worker.pending:
        time.sleep(0.02)
    monkeypatch.undo()
    assert same(future.result(60), Engine(policy, tokenizer).generate(PROMPTS, seed=SEEDS, **LONG)), "asked again"
    for engine in engines:
        engine.close([])


def test_it_ends_while_connections_are_opened(tiny):
    """A set that another thread adds to meanwhile cannot be gone through; its next turn can."""
    turns, future = [], Future()

    class Changing:
        def __iter__(self):
            turns.append(1)
            if len(turns) < 3:
                raise RuntimeError("Set changed size during iteration")
            future.set_result([[]])
            return iter(())

    remote = RemoteEngine(["http://127.0.0.1:1"], *changed(tiny), WORLD)
    remote.servers[0].sockets = Changing()
    remote.close([future])
    assert len(turns) == 3


def test_what_is_too_old_is_dropped_counted_and_asked_again(tiny, monkeypatch):
    """A server that heeds no bound: it has the new weights only later."""
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine(["http://127.0.0.1:1"], policy, tokenizer, WORLD, timeout_s=20)
    for number in (6, 7):
        with remote.updating(number):
            scaled(policy)
    old, new = remote.weights.known
    answers = iter([[[old, 0, 2]], [[new + 7, 0, 2]], [[old, 0, 1], [new, 1, 2]], [[new, 0, 2]]])

    def ask(method, path, body, timeout):
        assert body["weights"] == [remote.weights.known[new][0]], "a request names the digests that it may begin with"
        logprobs = {"token_logprobs": [-1.0, -1.0]}
        return {"choices": [{"index": 0, "token_ids": [1, 2], "logprobs": logprobs, "finish_reason": "length",
                             "text": "", "weight_versions": next(answers)}]}  # fmt: skip

    server = remote.servers[0]
    monkeypatch.setattr(server, "ask", ask)
    monkeypatch.setattr(remote, "revive", lambda: setattr(server, "ready", True))
    future = remote.ask(7, [[1]], max_tokens=2)
    assert future.result(20) == [[Completion([1, 2], [-1.0, -1.0], "", "length", ((7, 0, 2),))]]
    assert remote.too_old == 3
    monkeypatch.setattr(remote.servers[0], "ask", lambda *_: {"choices": [{"weight_versions": [[[], 0, 1]]}]})
    with pytest.raises(Lost):
        remote._completions(remote.servers[0], {"n": 1, "max_tokens": 2}, 7)


def test_a_server_refuses_what_it_is_too_old_for(tiny, server):
    body = {"prompt": [1, 2], "max_tokens": 2, "weights": ["0" * 64, "1" * 64]}
    status, answer = serving.ask(server.url, "/v1/completions", body)
    assert status == 409 and "the server holds" in str(answer)
    assert serving.ask(server.url, "/v1/completions", body | {"weights": []})[0] == 409
    assert serving.ask(server.url, "/v1/completions", body | {"weights": ["1", server.worker.digest]})[0] == 200
    assert serving.ask(server.url, "/v1/completions", body | {"weights": 3})[0] == 400


def test_weights_do_not_change_while_they_are_sent(tiny, monkeypatch, server):
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine([server.url], policy, tokenizer, WORLD, timeout_s=30)
    events, send = [], transfer.send

    def slower(*given):
        events.append("sending")
        time.sleep(0.4)
        result = send(*given)
        events.append("sent")
        return result

    monkeypatch.setattr(transfer, "send", slower)
    with remote.updating(0):
        pass
    while not events:
        time.sleep(0.01)
    with remote.updating(1):
        events.append("changing")
        scaled(policy, 1.5)
    remote.ask(1, PROMPTS[:2], **OPTIONS).result(30)
    assert events == ["sending", "sent", "changing", "sending", "sent"]


def test_evaluation_is_of_the_weights_as_they_are(tiny, tmp_path, monkeypatch, server):
    options = {"eval_dataset": tiny.folder / "data.jsonl", "eval_steps": 2}
    slow_trainer(monkeypatch)
    train(tiny, tmp_path, server.url, **options)
    expected = Engine(*checkpoint.load(tmp_path / "final")).generate(
        [f"{i}+{i % 7}=" for i in range(50)], temperature=0.0, max_tokens=12
    )
    lengths = [len(completion.ids) for (completion,) in expected]
    evaluations = [row for row in rows(tmp_path) if "eval/completions/mean_length" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    assert evaluations[-1]["eval/completions/mean_length"] == sum(lengths) / 50


def test_a_server_that_dies_and_returns(tiny, tmp_path, synchronous):
    """kill -9 amid generations; it comes back with the weights on its disk, and serves nothing before it has newer."""
    with serving.Process(tiny, slow_server) as process:
        outcomes = []
        run = functools.partial(miniature.launch, arguments(tiny, tmp_path, process.url, max_completion_length=30))
        thread = threading.Thread(target=lambda: outcomes.append(run()))
        thread.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not (tmp_path / "metrics.jsonl").exists() or len(steps(tmp_path)) < 2):
            time.sleep(0.02)
        process.kill()
        process.start()
        thread.join(120)
    assert outcomes and outcomes[0].code == 0, outcomes
    assert prompts(tmp_path) == prompts(synchronous) and max(ages(tmp_path)) == 1
    assert all(row["sampling/kl"] < 0.5 for row in steps(tmp_path) if "sampling/kl" in row)


def begin_again(tiny, folder, url, **options) -> None:
    assert "going on after step" in train(tiny, folder, url, resume=True, **options).out


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "max_staleness": 2}])
def test_a_resumed_run_asks_again_for_what_was_on_its_way(tiny, tmp_path, monkeypatch, server, options):
    """Data order and versions are as if it had not stopped, but that what was on its way is of the newest weights."""
    slow_trainer(monkeypatch)
    for name, limits in (("whole", [6]), ("parts", [3, 6])):
        for part, limit in enumerate(limits):
            more = {"max_steps": limit, "resume": part > 0, "lr_scheduler_type": "constant", **options}
            train(tiny, tmp_path / name, server.url, **more)
    assert prompts(tmp_path / "whole") == prompts(tmp_path / "parts")
    whole, parts = (rows(tmp_path / name, "completions") for name in ("whole", "parts"))
    before = sum(row["step"] <= 3 for row in whole)
    assert [row["completion_ids"] for row in whole[:before]] == [row["completion_ids"] for row in parts[:before]]
    assert parts[before]["version"] == (4 if options else 3)
    assert max(ages(tmp_path / "parts")) == max(ages(tmp_path / "whole"))


def interrupted() -> None:
    """In the trainer's process: SIGINT comes while step 3 is trained, and generations are on their way."""
    backward = grpo.backward

    def signalled(*given):
        if given[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(*given)

    grpo.backward = signalled


def failing() -> None:
    backward = grpo.backward

    def fails(*given):
        if given[-1] == 2:
            raise ArithmeticError("broken")
        return backward(*given)

    grpo.backward = fails


@pytest.mark.parametrize("hook, code, done", [(interrupted, 130, 3), (failing, 1, 2)])
def test_ctrl_c_and_errors_end_at_once(tiny, tmp_path, synchronous, hook, code, done):
    """Nothing waits for what the servers are at work on, and a resumed run goes on behind the last step."""
    with serving.Process(tiny, slow_server) as process:
        argv = arguments(tiny, tmp_path, process.url, max_completion_length=40)
        began = time.monotonic()
        outcome = miniature.launch(argv, hooks={0: hook})
        assert outcome.code == code and len(steps(tmp_path)) == done, outcome
        assert time.monotonic() - began < 60
        deadline = time.monotonic() + 20  # the server has dropped what nobody waits for
        again = miniature.launch([*argv, "--resume"])
        assert again.code == 0 and time.monotonic() < deadline + 60, again
    assert prompts(tmp_path) == prompts(synchronous) and max(ages(tmp_path)) == 1


def test_two_processes(tiny, tmp_path, server):
    """Each asks for its share; rank 0 sends the weights."""
    outcome = miniature.launch(arguments(tiny, tmp_path, server.url, max_staleness=2), 2)
    assert outcome.codes == [0, 0], outcome.err
    assert 0 < max(ages(tmp_path)) <= 2
    drawn = [row["prompt"] for row in rows(tmp_path, "completions")]
    assert len(drawn) == 48 and len(set(drawn)) == 12


def test_weights_correct_the_mean_for_samples_of_another_policy():
    """Over all tokens that an older policy q samples, old / q times the policy's gradient is the gradient under the
    policy itself, at its start (ratio 1), to rounding: nothing of q is left."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    q = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    mask, segments = torch.ones(6, dtype=torch.bool), torch.arange(6)
    weights = losses.sampling_weights(logprobs.detach(), q, mask, segments, "sequence_mask", clip_max=None)
    surrogate = (q.exp() * weights * advantages * (logprobs - logprobs.detach()).exp()).sum()
    [found] = torch.autograd.grad(surrogate, logits)
    [expected] = torch.autograd.grad((logits.softmax(0) * advantages).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bound, each, expected", [
    (1, 1, [[(0, 0), (2, 0)], [(4, 1)], [(6, 2)], [(8, 3)], [], []]),
    (3, 1, [[(0, 0), (2, 0), (4, 0), (6, 0)], [(8, 1)], [], [], [], []]),
    (1, 2, [[(0, 0)], [(2, 1)], [], [(4, 3)], [], []]),
    (2, 2, [[(0, 0), (2, 0)], [], [(4, 2)], [], [], []]),
])  # fmt: skip
def test_which_generation_is_asked_for_when(bound, each, expected):
    """(place in the data, oldest step) after 0, 1, ... of 5 steps, each generation being used for `each` of them."""
    config = grpo.Config(model="m", dataset="d", reward=("random",), prompts_per_step=2, num_iterations=each,
                         max_staleness=bound, rollout_server=("http://127.0.0.1:1",))  # fmt: skip
    asked = []
    engine = SimpleNamespace(weights=SimpleNamespace(known={1: ("", 0)}), tensor=WORLD)
    engine.ask = lambda least, prompts, **options: asked[-1].append(least)
    samples = ahead.Ahead(engine, [{"prompt_ids": [0]}] * 20, config, SimpleNamespace(world=WORLD, total_steps=5))
    for step in range(6):
        asked.append([])
        samples.ask(-(-step // each) * 2, step)
    assert asked == [[least for _, least in new] for new in expected]
    assert list(samples.asked) == [place for new in expected for place, _ in new]
