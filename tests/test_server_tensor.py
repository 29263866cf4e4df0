"""A model in slices: engines in lockstep, one server on several processes, weights to each slice, and its faults."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import serving
import torch
from miniature import CHARACTERS, apart, backend_of
from processes import run_processes
from serving import ask

from minitrl import checkpoint, distributed, lockstep, parallel, rollout, runs, transfer
from minitrl.distributed import ALONE
from minitrl.kernels.token_logprob import SPLIT
from minitrl.lockstep import aside
from minitrl.model import Model, ModelConfig
from minitrl.packing import pack_groups
from minitrl.rollout import Engine
from minitrl.rollout_client import RemoteEngine
from minitrl.sampling import Sampling, sample
from minitrl.server import Config, main
from minitrl.tokenizer import Tokenizer

PROMPTS = [[2, 11, 3 + i % 5, 12] for i in range(6)]
OPTIONS = {"n": 3, "max_tokens": 12, "temperature": 0.9, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of a vocabulary that two processes can share."""
    vocabulary = {c: i for i, c in enumerate(["<eos>", *CHARACTERS])} | {f"t{i}": i for i in range(17, 2 * SPLIT + 40)}
    backend = backend_of(vocabulary)
    config = ModelConfig.from_hf({
        "model_type": "qwen2", "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "eos_token_id": 0,
    })  # fmt: skip
    model, generator = Model(config), torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator) if p.dim() > 1 else torch.nn.init.ones_(p)
    path = tmp_path_factory.mktemp("sliced") / "model"
    checkpoint.save(model, Tokenizer(backend, [0]), path)
    return path


def close(ours, theirs) -> bool:
    """The same ids, and log-probs equal but for the order of sums; which may now and then tip a draw."""
    pairs = [(a, b) for mine, others in zip(ours, theirs, strict=True) for a, b in zip(mine, others, strict=True)]
    alike = [(a.logprobs, b.logprobs) for a, b in pairs if a.ids == b.ids]
    near = all(abs(x - y) < 1e-4 for a, b in alike for x, y in zip(a, b))
    return near and len(alike) >= len(pairs) - 1 - len(pairs) // 10


def mostly(ours, theirs) -> bool:
    """The same for ids alone."""
    pairs = [(a, b) for mine, others in zip(ours, theirs, strict=True) for a, b in zip(mine, others, strict=True)]
    return sum(a == b for a, b in pairs) >= len(pairs) - 2


def sliced_engine(folder, size, **options):
    world = distributed.start("cpu", 60, (1, 1, size))
    model, tokenizer = checkpoint.load(folder, world=world)
    return world, Engine(model, tokenizer, **options)


def in_lockstep(folder, options):
    world, engine = sliced_engine(folder, 2, max_batch=4, page_size=4, prefill_tokens=9, max_pages=60)
    assert engine.tensor is world.tensor and engine.pool.shape[0] == 1, "one of two heads of keys and values"
    whole = Engine(*checkpoint.load(folder), max_batch=4, page_size=4, prefill_tokens=9, max_pages=60)
    if world.rank == 1:  # what it draws itself does not count, or the two would part at a rounding
        rollout.sample = lambda logits, *_: (torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits)))
    got = engine.generate(PROMPTS, seed=list(range(6)), **options)
    rollout.sample = sample
    assert close(got, whole.generate(PROMPTS, seed=list(range(6)), **options))
    assert len({tuple(c.ids) for group in got for c in group}) > 10
    distributed.stop()


def test_engines_of_slices_sample_what_the_whole_does(folder):
    run_processes(in_lockstep, 2, folder, OPTIONS)


def led(folder):
    """Requests that come, go, and are given up while others run; the leader alone decides."""
    world, engine = sliced_engine(folder, 2, max_batch=4, page_size=4)
    if world.rank == 1:
        lockstep.follow(engine, {"more": lambda *given: seen.append(given)})
        assert engine.idle and seen == [(1, "x")]
        return distributed.stop()
    leader = lockstep.Leader(engine)
    sampling = Sampling(temperature=0.9)
    prompts = [PROMPTS[i % 4] * 3 for i in range(6)]  # the last two begin like others, with pages that are known
    asked = [leader.prepare(p, n=2, max_tokens=20, seed=i, sampling=sampling) for i, p in enumerate(prompts)]
    for request in asked[:4]:
        leader.enqueue(request)
    for _ in range(3):
        leader.step()
    leader.abort(asked[1])
    leader.abort(asked[1])  # as whoever closes a job may
    leader.weights_changed(5)  # and known no more
    lockstep.tell(leader, "more", 1, "x")
    for request in asked[4:]:
        leader.enqueue(request)
    while not leader.idle:
        leader.step()
    lockstep.tell(leader, "stop")
    whole = Engine(*checkpoint.load(folder))
    for i, request in enumerate(asked):
        (expected,) = whole.generate([prompts[i]], n=2, max_tokens=20, seed=i, temperature=0.9)
        if i != 1:
            assert close([request.results], [expected])
    assert asked[1].results[0].finish_reason == "abort" and not leader.numbers
    assert asked[0].results[0].versions[-1][0] == 5
    distributed.stop()


seen = []


def test_followers_repeat_what_the_leader_does(folder):
    run_processes(led, 2, folder)


def served(folder, world=2, **options):
    return serving.Process(SimpleNamespace(folder=folder.parent), world=world, served_model_name="sliced", **options)


BODY = {"n": 3, "max_tokens": 12, "temperature": 0.9, "ignore_eos": True, "logprobs": 0, "return_token_ids": True}


def answers(url, **changes) -> list[list[int]]:
    """What many clients get at the same time, by prompt."""
    got = {}
    bodies = [BODY | {"prompt": prompt, "seed": i} | changes for i, prompt in enumerate(PROMPTS)]
    threads = [threading.Thread(target=lambda i=i: got.update({i: ask(url, "/v1/completions", bodies[i])}))
               for i in range(len(bodies))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in got.values()} == {200}, got
    return [[choice["token_ids"] for choice in got[i][1]["choices"]] for i in range(len(bodies))]


def expected(model, tokenizer) -> list[list[int]]:
    options = {name: BODY[name] for name in ("n", "max_tokens", "temperature", "ignore_eos")}
    groups = Engine(model, tokenizer).generate(PROMPTS, seed=list(range(len(PROMPTS))), **options)
    return [[completion.ids for completion in group] for group in groups]


def changed(folder, factor=1.1):
    model, tokenizer = checkpoint.load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model, tokenizer


def test_one_server_on_two_processes(folder):
    """It answers as one on one does, takes new weights in slices, and ends without leaving anyone behind."""
    with served(folder) as server:
        assert ask(server.url, "/get_tensor_parallel_size/") == (200, {"tensor_parallel_size": 2})
        assert mostly(answers(server.url), expected(*checkpoint.load(folder)))
        model, tokenizer = changed(folder)
        remote = RemoteEngine([server.url], model, tokenizer, ALONE, timeout_s=60)
        options = {"n": 3, "max_tokens": 12, "temperature": 0.9, "ignore_eos": True}
        for _ in range(2):
            samples = remote.generate(PROMPTS, seed=list(range(6)), **options)
            assert mostly([[c.ids for c in group] for group in samples], expected(model, tokenizer))
            with torch.no_grad():
                model.layers[0].o_proj.weight.mul_(1.1)
        assert remote.mismatch < 1e-4
        assert ask(server.url, "/init_communicator/", {"host": "0.0.0.0", "port": 5, "world_size": 3})[0] == 400
        os.kill(server.process.pid, signal.SIGTERM)
        for process in server.processes:
            process.join(30)
        assert [process.exitcode for process in server.processes] == [0, 0], server.log.read_text()


def test_weights_arrive_in_the_middle_of_generation(folder):
    with served(folder, max_batch=4) as server:
        model, _ = changed(folder, 1.2)
        got = []
        body = BODY | {"prompt": PROMPTS[0], "max_tokens": 100}
        thread = threading.Thread(target=lambda: got.append(ask(server.url, "/v1/completions", body)))
        thread.start()
        serving.send_weights(server.url, model.config, dict(model.named_parameters()), 7)
        thread.join()
        assert got[0][0] == 200
        assert all(c["weight_versions"][-1][0] == 7 for c in got[0][1]["choices"])
        assert mostly(answers(server.url), expected(model, checkpoint.load(folder)[1]))


@pytest.mark.parametrize("receiver", [1, 2])
def test_one_bad_slice_keeps_all_the_old_ones(folder, receiver):
    """A bit flips on the way to one of the two: neither installs."""
    with served(folder) as server:
        model, tokenizer = changed(folder)
        tensors, state = {name: p.detach() for name, p in model.named_parameters()}, ask(server.url, "/weights")[1]
        route = serving.meet(server.url, model.config, 3)
        thread, got = serving.announce(server.url, route, tensors, 7)
        streams = {rank: list(route._give(moves, tensors, torch.float32, transfer.BUCKET // 4, True))
                   for rank, moves in route.sends.items()}  # fmt: skip
        streams[receiver][0].view(torch.uint8)[1234] ^= 1
        with pytest.raises(ConnectionError):
            for pieces in zip(*streams.values()):
                sending = [(rank, True, piece) for rank, piece in zip(streams, pieces) if piece is not None]
                route.link.finish(route.link.exchange(sending), "sending")
            route.link.agree("waiting until all have verified")
        thread.join()
        assert got[0][0] == 409 and "the old weights serve on" in str(got[0][1])
        assert ask(server.url, "/weights")[1]["digest"] == state["digest"]
        assert mostly(answers(server.url), expected(*checkpoint.load(folder)))
        serving.send_weights(server.url, model.config, tensors, 8)
        assert mostly(answers(server.url), expected(model, tokenizer))


def test_a_slice_that_does_not_come_keeps_nobody_waiting(folder):
    """One of two gets all of its own, the other nothing: the server answers on, and then gives the update up."""
    with served(folder, transfer_timeout=15) as server:
        model, _ = changed(folder)
        tensors, state = {name: p.detach() for name, p in model.named_parameters()}, ask(server.url, "/weights")[1]
        route = serving.meet(server.url, model.config, 3)
        thread, got = serving.announce(server.url, route, tensors, 7)
        for piece in route._give(route.sends[1], tensors, torch.float32, transfer.BUCKET // 4, True):
            if piece is not None:
                route.link.finish(route.link.exchange([(1, True, piece)]), "sending")
        time.sleep(0.5)
        assert mostly(answers(server.url), expected(*checkpoint.load(folder)))
        assert not got, "it answered only when the update was given up"
        thread.join()
        assert got[0][0] == 409 and ask(server.url, "/weights")[1]["digest"] == state["digest"]
        assert mostly(answers(server.url), expected(*checkpoint.load(folder)))


@pytest.mark.parametrize("victim, busy", [(1, False), (1, True), (0, True)])
def test_a_killed_process_ends_the_others(folder, victim, busy):
    """Nobody stays behind, and what is left says which rank it was and where it stood."""
    with served(folder) as server:
        if busy:
            body = BODY | {"prompt": PROMPTS[0], "max_tokens": 100, "n": 64}
            thread = threading.Thread(target=lambda: suppressed(ask, server.url, "/v1/completions", body), daemon=True)
            thread.start()
            time.sleep(0.3)
        server.processes[victim].kill()
        began = time.monotonic()
        other = server.processes[1 - victim]
        other.join(30)
        assert other.exitcode == 1 and time.monotonic() - began < 30
        assert f"error: rank {1 - victim} of 2, " in server.log.read_text()
        assert "another process is gone or too late" in server.log.read_text()


def suppressed(function, *arguments):
    with suppress(Exception):
        function(*arguments)


def broken():
    """In the server's second process: its engine fails in a way that the first one's does not."""
    if os.environ["RANK"] == "1":
        Engine._schedule = lambda self: [][0]


def not_finite():
    """In both: the logits of some prompts are not finite."""
    project = Model.project

    def spoiled(self, hidden_ND):
        logits = project(self, hidden_ND)
        return logits * float("nan") if len(logits) == 5 else logits

    Model.project = spoiled


def test_an_error_of_one_engine_alone_ends_the_server(folder):
    with served(folder, hook=broken) as server:
        status, _ = ask(server.url, "/v1/completions", BODY | {"prompt": PROMPTS[0]})
        assert status in (500, 503)
        for process in server.processes:
            process.join(30)
            assert process.exitcode == 1


def test_an_error_that_all_meet_ends_the_request(folder):
    with served(folder, hook=not_finite) as server:
        body = BODY | {"prompt": PROMPTS[0]}
        assert ask(server.url, "/v1/completions", body | {"n": 5})[0] == 500
        assert ask(server.url, "/v1/completions", body | {"n": 4})[0] == 200
        assert ask(server.url, "/v1/completions", body | {"n": 5})[0] == 500
        assert mostly(answers(server.url), expected(*checkpoint.load(folder)))


@pytest.mark.parametrize("size, options, message", [
    (4, {}, "--tensor_parallel_size 4: does not divide the model's num_key_value_heads, 2"),
    (2, {"deterministic": None}, "--deterministic: a model cut by --tensor_parallel_size has no such mode"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(folder, size, options, message):
    argv = ["--model", str(folder), "--port", "0", "--tensor_parallel_size", str(size)]
    argv += [f"--{name}" for name in options]
    ended = apart(refused, size, argv)
    assert ended.codes == [1] * size and ended.err.count(f"error: {message}") == size


def test_a_timeout_has_to_outlast_the_heartbeat():
    with pytest.raises(ValueError, match="--transfer_timeout 5: must be at least 15 with --tensor_parallel_size"):
        Config(model="any", tensor_parallel_size=2, transfer_timeout=5)


def refused(rank, argv):
    runs.command(functools.partial(main, argv))


def trained(folder, url, mesh, dtype):
    """Two trainers, each with a part of the policy, and a server of two slices: neither ever has the whole."""
    world = distributed.start("cpu", 60, mesh)
    model, tokenizer = checkpoint.load(folder, world=world)
    whole, _ = checkpoint.load(folder)
    remote = RemoteEngine([url], model, tokenizer, world, timeout_s=60)
    for factor in (1.1, 0.9):
        with torch.no_grad():
            for p in (*model.parameters(), *whole.parameters()):
                parallel.local(p).mul_(factor)
        mine = PROMPTS[3 * world.rank : 3 * world.rank + 3]
        seeds = list(range(3 * world.rank, 3 * world.rank + 3))
        samples = remote.generate(mine, seed=seeds, **OPTIONS)
        if dtype == torch.float32:
            assert close(samples, Engine(whole, tokenizer).generate(mine, seed=seeds, **OPTIONS))
        else:  # which rounds
            pack = pack_groups(mine, [[c.ids for c in group] for group in samples], "cpu")
            ours = whole.logprobs(pack, pack.completion_T, 0.9)[0][pack.completion_T]
            theirs = torch.tensor([x for group in samples for c in group for x in c.logprobs])
            assert 1e-5 < (ours - theirs).abs().mean() < 0.1
        distributed.barrier(world)
    distributed.stop()


@pytest.mark.parametrize("mesh, dtype", [((1, 2, 1), "float32"), ((1, 2, 1), "bfloat16"), ((1, 1, 2), "float32")])
def test_two_trainers_and_two_slices(folder, mesh, dtype):
    """FSDP2's masters are in float32, whatever the server has."""
    with served(folder, dtype=dtype) as server:
        run_processes(trained, 2, folder, server.url, mesh, getattr(torch, dtype))
        assert ask(server.url, "/weights")[1]["version"] % 2**20 == 2  # above it, the run




def slow():
    """In a server's process: every step of the engine takes longer."""
    step = Engine.step
    Engine.step = lambda self: time.sleep(0.03) or step(self)


def through_a_loss(folder, url):
    world = distributed.start("cpu", 60, (1, 2, 1))
    model, tokenizer = checkpoint.load(folder, world=world)
    whole, _ = changed(folder)
    with torch.no_grad():
        for p in model.parameters():
            parallel.local(p).mul_(1.1)
    remote = RemoteEngine([url], model, tokenizer, world, timeout_s=100)
    mine, options = [PROMPTS[world.rank]], OPTIONS | {"max_tokens": 80}
    samples = remote.generate(mine, seed=7, **options)
    assert close(samples, Engine(whole, tokenizer).generate(mine, seed=7, **options))
    distributed.barrier(world)
    distributed.stop()


def test_the_only_server_is_killed_and_comes_back(folder):
    """Amid generation: both trainers send their parts to the new one, wherever they are, and nothing is lost."""
    with served(folder, world=1, hook=slow) as server:
        ended = aside(run_processes, through_a_loss, 2, folder, server.url)
        deadline = time.monotonic() + 60
        while ask(server.url, "/weights")[1]["version"] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert not ended.done()
        server.kill()
        server.start()  # with the weights on its disk
        assert ended.result(120) is None
        assert ask(server.url, "/weights")[1]["version"] % 2**20 == 1


@pytest.mark.slow
def test_under_torchrun(folder):
    """The README's command; SIGTERM to the launcher ends all of it, and nobody stays behind."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "minitrl.server",
            "--model", str(folder), "--dtype", "float32", "--port", "0", "--tensor-parallel-size", "2"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True) as process:
        try:
            url = next(line.split()[-1] for line in process.stdout if line.startswith("serving"))
            assert mostly(answers(url), expected(*checkpoint.load(folder)))
            members = [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent_of(path) == process.pid]
            assert len(members) == 2
            process.terminate()
            process.wait(60)
            assert not [pid for pid in members if Path(f"/proc/{pid}").exists()]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def parent_of(path) -> int:
    with suppress(OSError):
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0
