"""Sampling through servers: the same tokens as here, none lost and none twice, whatever happens to a server."""

import signal
import threading
import time

import pytest
import serving
import torch

from minitrl import checkpoint, distributed, transfer
from minitrl.rollout import Engine
from minitrl.rollout_client import Lost, RemoteEngine

import miniature  # isort: skip

WORLD = distributed.World(0, 1, torch.device("cpu"))
PROMPTS, SEEDS = [[2, 11, 3 + i % 5, 12] for i in range(12)], list(range(100, 112))
OPTIONS = {"n": 3, "max_tokens": 10, "temperature": 0.9, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "stop": ()}


def changed(tiny, factor=1.02):
    """The model, as after a step."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model, tokenizer


def same(ours, theirs) -> bool:
    """The same ids and reasons, and log-probs equal but for a batch's rounding."""
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            if (a.ids, a.text, a.finish_reason) != (b.ids, b.text, b.finish_reason):
                return False
            if max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs)) > 1e-5:
                return False
    return True


@pytest.fixture(scope="module")
def pair(tiny):
    with serving.here(tiny) as first, serving.here(tiny) as second:
        yield first, second


def test_samples_are_those_of_an_engine_here(tiny, pair):
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine([f"{pair[0].url},{pair[1].url}"], policy, tokenizer, WORLD, timeout_s=30)
    for _ in range(3):  # the weights change between the steps, and the servers follow
        samples = remote.generate(PROMPTS, seed=SEEDS, **OPTIONS)
        assert same(samples, Engine(policy, tokenizer).generate(PROMPTS, seed=SEEDS, **OPTIONS))
        for server in pair:
            assert server.worker.digest == transfer.digest(remote.weights.tensors)
        with torch.no_grad():
            policy.layers[0].o_proj.weight.mul_(1.1)
    assert remote.mismatch < 1e-4
    assert {c.versions[0][0] for group in samples for c in group} == {remote.weights.version}


def test_texts_messages_and_nothing(tiny, pair):
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30)
    assert remote.generate([]) == []
    assert pair[0].worker.digest == transfer.digest(remote.weights.tensors), "rank 0 has to send even with no prompt of its own"
    options = {"max_tokens": 9, "seed": 3}
    assert same(remote.generate(["1+2="], **options), Engine(policy, tokenizer).generate(["1+2="], **options))


def test_an_update_without_a_change_is_none(tiny, pair):
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30)
    remote.generate(PROMPTS[:1], max_tokens=9, seed=[1])
    before, route = pair[0].worker.version, remote.servers[0].route
    remote.generate(PROMPTS[:1], max_tokens=9, seed=[2])
    assert pair[0].worker.version == before and remote.servers[0].route is route


def test_another_rank_waits_until_rank_0_has_sent(tiny, pair):
    policy, tokenizer = changed(tiny, 0.97)
    first = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30)
    second = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30)
    second.world = second.weights.world = distributed.World(1, 2, torch.device("cpu"))
    second.weights.version = first.weights.version
    got = []
    thread = threading.Thread(target=lambda: got.append(second.generate(PROMPTS, seed=SEEDS, **OPTIONS)))
    thread.start()
    time.sleep(0.5)
    assert not got
    first.generate([])
    thread.join(30)
    assert same(got[0], Engine(policy, tokenizer).generate(PROMPTS, seed=SEEDS, **OPTIONS))


def test_a_server_that_changed_hands_serves_nothing_before_it_is_up_to_date(tiny, pair):
    """Another trainer takes the server, with weights of its own: the first one notices, and sends its own again."""
    engines = []
    for factor in (1.03, 1.04):
        policy, tokenizer = changed(tiny, factor)
        remote = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30)
        engines.append((remote, Engine(policy, tokenizer).generate(PROMPTS, seed=SEEDS, **OPTIONS)))
    assert not same(engines[0][1], engines[1][1])
    for remote, expected in engines * 2:
        assert same(remote.generate(PROMPTS, seed=SEEDS, **OPTIONS), expected)


def test_bad_requests_are_the_users(tiny, pair):
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30)
    with pytest.raises(ValueError, match="max_tokens"):
        remote.generate(PROMPTS[:1], max_tokens=1000)
    for url in ("localhost", "ftp://localhost", "http://", "http://localhost/path", "http://localhost?x=1"):
        with pytest.raises(ValueError, match="--rollout_server"):
            RemoteEngine([url], policy, tokenizer, WORLD)
    with pytest.raises(ValueError, match="twice"):
        RemoteEngine(["http://localhost,http://localhost/"], policy, tokenizer, WORLD)


def test_another_model_is_refused(tiny, pair, tmp_path):
    policy, tokenizer = checkpoint.load(tiny.folder / "model", torch.bfloat16)
    for rank in (0, 1):  # who waits for rank 0 would keep its error back
        remote = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=3)
        remote.world = remote.weights.world = distributed.World(rank, 2, torch.device("cpu"))
        with pytest.raises(ValueError, match=r"serves another model, or in another --dtype: tensor .* is float32"):
            remote.generate(PROMPTS[:1])


def test_what_the_system_refuses_is_tried_again(tiny, pair, monkeypatch):
    """In the background, too: no port to meet at, just now."""
    policy, tokenizer = changed(tiny, 1.21)
    remote, listen, calls = RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30), transfer.listen, []

    def refused(*given):
        calls.append(given)
        if len(calls) < 3:
            raise OSError(24, "Too many open files")
        return listen(*given)

    monkeypatch.setattr(transfer, "listen", refused)
    with remote.updating(0):
        pass
    assert remote.ask(0, PROMPTS[:1], **OPTIONS).result(30) and len(calls) == 3
    remote.close([])


def test_a_server_that_lies_about_its_weights_ends_the_run(tiny, pair, monkeypatch):
    """As a server that reloads only part of them does: HTTP 200, and other log-probs."""
    policy, tokenizer = changed(tiny, 1.3)
    monkeypatch.setattr(transfer, "install", lambda new, tensors: None)
    with pytest.raises(ValueError, match="it does not sample from these weights"):
        RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30).generate(PROMPTS[:1])
    monkeypatch.undo()
    pair[0].worker.digest = ""


def test_no_server_at_all(tiny):
    policy, tokenizer = changed(tiny)
    url = f"http://127.0.0.1:{serving.closed_port()}"
    with pytest.raises(ConnectionError, match=f"no rollout server can be had: {url} .ConnectionRefusedError"):
        RemoteEngine([url], policy, tokenizer, WORLD, timeout_s=1).generate(PROMPTS)


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"choices": []}, {"choices": 3}, {"choices": [{}]}, [], "text",
        {"choices": [{"index": 0, "token_ids": [99], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop",
                      "text": "", "weight_versions": [[1, 0, 1]]}]},
        {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": [None]}, "finish_reason": "stop",
                      "text": "", "weight_versions": [[1, 0, 1]]}]},
        {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort",
                      "text": "", "weight_versions": [[1, 0, 1]]}]},
        {"choices": [{"index": 0, "token_ids": [1, 1], "logprobs": {"token_logprobs": [-1.0, -1.0]},
                      "finish_reason": "stop", "text": "", "weight_versions": [[1, 0, 1], [2, 1, 2]]}]},
    ],
)  # fmt: skip
def test_an_answer_that_is_none(tiny, monkeypatch, answer):
    policy, tokenizer = changed(tiny)
    remote = RemoteEngine(["http://127.0.0.1:1"], policy, tokenizer, WORLD)
    monkeypatch.setattr(remote.servers[0], "ask", lambda *_: answer)
    with pytest.raises(Lost):
        remote._completions(remote.servers[0], {"prompt": [1], "n": 1, "max_tokens": 4})


def test_a_request_that_every_server_fails_at_ends(tiny, monkeypatch):
    """The servers are well otherwise, so time without any never passes."""
    policy, tokenizer = checkpoint.load(tiny.folder / "model")
    with serving.here(tiny) as server:
        draw = server.worker.engine._draw

        def fail(sequences, hidden_BD):
            if any(s.request.prompt == [5, 5] for s in sequences):
                time.sleep(0.7)
                raise FloatingPointError
            return draw(sequences, hidden_BD)

        monkeypatch.setattr(server.worker.engine, "_draw", fail)
        remote, errors = RemoteEngine([server.url], policy, tokenizer, WORLD, timeout_s=3), []

        def generate():
            try:
                remote.generate([[1], [5, 5]], max_tokens=3)
            except ConnectionError as error:
                errors.append(str(error))

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive() and "the engine failed" in errors[0]


def slow():
    """In a server's process: every step of the engine takes longer."""
    step = Engine.step

    def slower(self):
        time.sleep(0.02)
        return step(self)

    Engine.step = slower


def test_one_of_two_is_killed_and_comes_back(tiny):
    """kill -9 amid generation: the run goes on with the other, then with both; nothing is lost, doubled or different."""
    policy, tokenizer = changed(tiny)
    with serving.Process(tiny, slow) as first, serving.Process(tiny, slow) as second:
        remote = RemoteEngine([first.url, second.url], policy, tokenizer, WORLD, timeout_s=60)
        remote.generate(PROMPTS[:2], seed=SEEDS[:2], **OPTIONS)
        prompts, seeds = PROMPTS * 6, list(range(6 * len(PROMPTS)))
        options = OPTIONS | {"max_tokens": 40, "ignore_eos": True}
        expected = Engine(policy, tokenizer).generate(prompts, seed=seeds, **options)
        got = []
        thread = threading.Thread(target=lambda: got.append(remote.generate(prompts, seed=seeds, **options)))
        thread.start()
        deadline = time.monotonic() + 30
        while not remote.servers[1].load and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert remote.servers[1].load > 0 and not got
        second.kill()
        second.start()  # with the weights on its disk, which are old
        thread.join(120)
        assert same(got[0], expected)
        for server in remote.servers:
            server.again = 0.0
        assert same(remote.generate(prompts, seed=seeds, **options), expected)
        assert all(server.ready for server in remote.servers)
        status, state = serving.ask(second.url, "/weights")
        assert status == 200 and state["digest"] == remote.weights.digest


def test_a_server_that_hangs_is_left_out(tiny):
    policy, tokenizer = changed(tiny)
    with serving.Process(tiny) as first, serving.Process(tiny) as second:
        remote = RemoteEngine([first.url, second.url], policy, tokenizer, WORLD, timeout_s=30)
        remote.generate(PROMPTS[:2], seed=SEEDS[:2], **OPTIONS)
        remote.timeout_s = 2.0
        second.process.is_alive() and __import__("os").kill(second.process.pid, signal.SIGSTOP)
        samples = remote.generate(PROMPTS, seed=SEEDS, **OPTIONS)
        assert same(samples, Engine(policy, tokenizer).generate(PROMPTS, seed=SEEDS, **OPTIONS))
        assert not remote.servers[1].ready and "timed out" in remote.servers[1].why


def here_and_there(tiny, tmp_path, world=1, script="grpo", serve=(), **options):
    """The same run with an engine of its own and with a server's; returns how many updates the server got."""
    argv = {"seed": 5, "max_steps": 3, **options}
    assert miniature.launch(tiny.argv(tmp_path / "here", **argv), world).codes == [0] * world
    with serving.Process(tiny, **dict(serve)) as server:
        remote = miniature.launch(tiny.argv(tmp_path / "there", rollout_server=server.url, **argv), world)
        assert remote.codes == [0] * world, remote.err
        version = serving.ask(server.url, "/weights")[1]["version"] % 2**20  # above it, the run
    here, there = (miniature.rows(tmp_path / name, "completions") for name in ("here", "there"))
    assert [row["completion_ids"] for row in here] == [row["completion_ids"] for row in there]
    return version


def weights(folder):
    return dict(checkpoint.load(folder)[0].named_parameters())


@pytest.mark.parametrize("world", [1, 2])
def test_grpo_against_a_server_is_grpo(tiny, tmp_path, world):
    """Three steps with a weight update before each: the same completions, and the same weights but for rounding."""
    assert here_and_there(tiny, tmp_path, world) == 3
    ours, theirs = (weights(tmp_path / name / "final") for name in ("here", "there"))
    for name, p in ours.items():
        torch.testing.assert_close(theirs[name], p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, steps", [
    ("bfloat16", 5), pytest.param("float32", 20, marks=pytest.mark.slow), pytest.param("bfloat16", 20, marks=pytest.mark.slow)
])  # fmt: skip
def test_deterministic_steps_against_a_server_are_the_same_to_the_bit(tiny, tmp_path, dtype, steps):
    """--deterministic on both sides: nothing depends on what was in a server's batch; KL(sampler, trainer) is 0."""
    flag = {"deterministic": True, "dtype": dtype}
    serve = {"deterministic": None, "dtype": dtype}
    assert here_and_there(tiny, tmp_path, serve=serve, max_steps=steps, **flag) == steps
    assert miniature.untimed(tmp_path / "here") == miniature.untimed(tmp_path / "there")
    ours, theirs = (weights(tmp_path / side / "final") for side in ("here", "there"))
    assert all(torch.equal(theirs[name], p) for name, p in ours.items())
    kls = [row["sampling/kl"] for row in miniature.steps(tmp_path / "there") if "sampling/kl" in row]
    assert len(kls) > steps // 4 and set(kls) == {0.0}


def test_adapters_are_merged_into_what_is_sent(tiny, tmp_path):
    assert here_and_there(tiny, tmp_path, use_peft=True, lora_r=4, learning_rate=0.05) == 3


def test_a_resumed_run_samples_from_its_own_weights(tiny, tmp_path):
    """The server was started anew, with the weights on its disk: the run sends its own before it asks."""
    options = {"lr_scheduler_type": "constant"}
    assert miniature.run(tiny.argv(tmp_path / "whole", **options)).code == 0
    for steps, resume in ((2, False), (4, True)):
        with serving.Process(tiny) as server:
            options |= {"max_steps": steps, "resume": resume, "rollout_server": server.url}
            done = miniature.run(tiny.argv(tmp_path / "parts", **options))
            assert done.code == 0, done.err
    whole, parts = (miniature.rows(tmp_path / name, "completions") for name in ("whole", "parts"))
    assert [row["completion_ids"] for row in whole][16:24] == [row["completion_ids"] for row in parts][16:24]


def test_deterministic_on_one_side_alone_is_refused(tiny, pair):
    policy, tokenizer = changed(tiny)
    policy.make_deterministic()
    with pytest.raises(ValueError, match="give both --deterministic, or neither"):
        RemoteEngine([pair[0].url], policy, tokenizer, WORLD, timeout_s=30).generate(PROMPTS[:1])


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_divided_policy_against_a_server(tiny, tmp_path, staleness):
    """FSDP2's shards: both processes send their own, also amid training; as with one process that has the whole."""
    options = {"seed": 5, "max_steps": 3, "max_staleness": staleness}
    rows = []
    for name, world, more in (("whole", 1, {}), ("divided", 2, {"shard": 2})):
        with serving.Process(tiny) as server:
            ended = miniature.launch(tiny.argv(tmp_path / name, rollout_server=server.url, **options, **more), world)
            assert ended.codes == [0] * world, ended.err
            assert serving.ask(server.url, "/weights")[1]["version"] >= 3
        rows.append([row["completion_ids"] for row in miniature.rows(tmp_path / name, "completions")])
    assert rows[0][:8] == rows[1][:8] and len(rows[0]) == len(rows[1]) == 24
    if not staleness:
        assert rows[0] == rows[1]
