"""A vLLM as sampler: it has the weights before it samples, and whatever says that it may not have is believed."""

import threading
import time
from types import SimpleNamespace

import miniature
import pytest
import serving
import torch
import vllm_stand_in
from safetensors.torch import load
from test_rollout_client import OPTIONS, PROMPTS, SEEDS, WORLD, changed, same

from minitrl import checkpoint, disk, distributed, vllm, vllm_extension
from minitrl.remote import Lost
from minitrl.rollout import Engine
from minitrl.rollout_client import RemoteEngine


@pytest.fixture
def server(tiny):
    with vllm_stand_in.here(tiny) as running:
        yield running


def engine(tiny, *servers, factor=1.02, timeout_s=60):
    policy, tokenizer = changed(tiny, factor)
    return RemoteEngine([server.url for server in servers], policy, tokenizer, WORLD, timeout_s=timeout_s)


def expected(remote, prompts=PROMPTS, seeds=SEEDS, **options):
    return Engine(remote.policy, remote.tokenizer).generate(prompts, seed=seeds, **OPTIONS | options)


def test_samples_are_those_of_the_policy(tiny, server):
    remote = engine(tiny, server)
    for _ in range(3):
        samples = remote.generate(PROMPTS, seed=SEEDS, **OPTIONS)
        assert same(samples, expected(remote))
        assert {c.versions for group in samples for c in group} == {
            ((remote.weights.version, 0, len(c.ids)),) for group in samples for c in group
        }
        with torch.no_grad():
            remote.policy.layers[0].o_proj.weight.mul_(1.1)
            remote.policy.embed_tokens.weight.mul_(1.1)
    assert remote.mismatch < 1e-4
    assert server.version == f"minitrl {remote.weights.version}" and "default" not in server.asked


def test_the_order_of_an_update(tiny, server):
    """Held before anything changes, running again only when all is whole, and then compared."""
    engine(tiny, server).generate([])
    called = [path for path in server.asked if path not in ("/weight_info", "/v1/models")]
    assert called.pop().startswith("minitrl ")  # a completion, and by which weights
    assert called == ["/collective_rpc", "/pause?mode=keep", "/collective_rpc",
                      "/reset_prefix_cache?reset_running_requests=true", "/update_weight_version", "/resume"]  # fmt: skip


def test_all_that_shapes_a_distribution_is_told(tiny, server):
    """vLLM would fill in what the checkpoint's generation_config.json says."""
    engine(tiny, server).generate(PROMPTS[:1], n=2, max_tokens=5, seed=[7], temperature=0.5, stop=("b",))
    want = {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ["b"],
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [0], "logprobs": 0, "seed": 7, "n": 2,
            "return_token_ids": True, "prompt": PROMPTS[0], "max_tokens": 5, "min_tokens": 0, "ignore_eos": False}  # fmt: skip
    assert server.bodies[-1] == want
    remote = engine(tiny, server)
    remote.generate(PROMPTS[:1], max_tokens=5, ignore_eos=True)
    assert server.bodies[-1]["stop_token_ids"] == []
    with pytest.raises(ValueError, match="best_of: not passed on to a vLLM"):
        remote.generate(PROMPTS[:1], best_of=3)


def test_weights_with_adapters_and_texts(tiny, server):
    remote = engine(tiny, server)
    assert same(remote.generate(["1+2="], max_tokens=9, seed=3), expected(remote, ["1+2="], 3, n=1, max_tokens=9, temperature=1.0, top_p=1.0))


@pytest.mark.parametrize("faults, message", [
    ({"no dev mode"}, r"404: .*Not Found.*is started with VLLM_SERVER_DEV_MODE=1"),
    ({"no extension"}, r"no attribute 'minitrl_state'.*started with.*--worker-extension-cls minitrl.vllm_extension.Pull"),
])  # fmt: skip
def test_a_vllm_that_was_started_without(tiny, server, faults, message):
    server.faults |= faults
    with pytest.raises(ValueError, match=message):
        engine(tiny, server).generate(PROMPTS[:1])


def test_one_that_does_not_fit_is_refused(tiny, server, monkeypatch):
    remote, worker = engine(tiny, server), server.worker
    chunked = SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=True))
    for holder, name, value, message in [
        (worker, "described", worker.described | {"hidden_size": 64}, "hidden_size is 64 there and not 32: it serves another model"),
        (worker.model_config, "dtype", torch.bfloat16, "dtype is bfloat16 there and not float32: .* another --dtype"),
        (worker.model_config, "logprobs_mode", "raw_logprobs", "logprobs_mode is raw_logprobs .* --logprobs-mode processed_"),
        (worker, "vllm_config", chunked, "--no-enable-chunked-prefill: on a CPU it dies"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(holder, name, value)
            remote.generate(PROMPTS[:1])
    assert "/pause?mode=keep" not in server.asked
    monkeypatch.setattr(worker, "vllm_config", chunked)
    monkeypatch.setattr(worker, "device", torch.device("cuda"))  # where it does not
    assert remote.generate(PROMPTS[:1], max_tokens=3)


def test_which_kind_a_url_speaks_of(tiny, server):
    """A kind is never guessed: each says what it is not."""
    policy, tokenizer = changed(tiny)
    with pytest.raises(ValueError, match="404.*a vLLM's is vllm.http://"):
        RemoteEngine([server.url.removeprefix("vllm+")], policy, tokenizer, WORLD, timeout_s=5).generate(PROMPTS[:1])
    with serving.here(tiny) as ours, pytest.raises(ValueError, match="no such route.*a vLLM is started with"):
        RemoteEngine([f"vllm+{ours.url}"], policy, tokenizer, WORLD, timeout_s=5).generate(PROMPTS[:1])
    for url in ("vllm+ftp://x", "vllm+http://x/v1", "vllm+localhost:80"):
        with pytest.raises(ValueError, match="--rollout_server .*must be as http"):
            RemoteEngine([url], policy, tokenizer, WORLD)


def test_what_a_vllm_cannot(tiny, server):
    remote = engine(tiny, server)
    remote.weights.senders = 2
    with pytest.raises(ValueError, match="goes without .*--shard and --tensor"):
        remote.generate(PROMPTS[:1])
    remote.weights.senders = 1
    remote.policy.make_deterministic()
    with pytest.raises(ValueError, match="goes without --deterministic"):
        remote.generate(PROMPTS[:1])


def test_the_key(tiny, monkeypatch):
    with vllm_stand_in.here(tiny, key="sesame") as server:
        with pytest.raises(ValueError, match="401.*Unauthorized"):
            engine(tiny, server).generate(PROMPTS[:1], max_tokens=3)
        monkeypatch.setenv("MINITRL_API_KEY", "sesame")
        assert engine(tiny, server).generate(PROMPTS[:1], max_tokens=3)


def test_another_rank_waits_until_rank_0_has_sent(tiny, server):
    first, second = engine(tiny, server), engine(tiny, server)
    second.world = second.weights.world = distributed.World(1, 2, torch.device("cpu"))
    second.weights.version = first.weights.version
    got = []
    thread = threading.Thread(target=lambda: got.append(second.generate(PROMPTS[:2], seed=SEEDS[:2], **OPTIONS)))
    thread.start()
    time.sleep(0.4)
    assert not got and server.version == "default"
    first.generate([])
    thread.join(60)
    assert same(got[0], expected(first, PROMPTS[:2], SEEDS[:2]))


def test_one_that_was_restarted_gets_the_weights_before_it_samples(tiny, server):
    """At the address of the one before, and with the weights on its disk: nobody was told."""
    remote = engine(tiny, server)
    remote.generate(PROMPTS[:1], max_tokens=3)
    server.load()
    assert same(remote.generate(PROMPTS, seed=SEEDS, **OPTIONS), expected(remote))
    assert "default" not in server.asked


def test_weights_that_change_under_a_completion(tiny, server):
    """Another trainer, say, while it is sampled: what comes is not taken, and asked for again."""
    remote, taken = engine(tiny, server), []
    remote.generate(PROMPTS[:1], max_tokens=3)

    def after(path, answer):
        if path == "/v1/completions" and not taken:
            taken.append(answer)
            server.version = "another's"
        return answer

    server.after = after
    (group,) = remote.generate(PROMPTS[:1], seed=[5], **OPTIONS)
    assert taken and same([group], expected(remote, PROMPTS[:1], [5]))
    assert "another's" not in server.asked and server.version.startswith("minitrl")


def test_a_head_that_stays_as_it_was_ends_the_run(tiny, server):
    """REAL vLLM's own: HTTP 200, and log-probs of the new embedding under the old head."""
    server.faults.add("stale head")
    with pytest.raises(ValueError, match="it does not sample from these weights"):
        engine(tiny, server, factor=1.3).generate(PROMPTS[:1])


def test_it_is_compared_before_there_is_a_prompt(tiny, server):
    """By the courier of the first weights, or by rank 0 that has none of the prompts: the others would sample."""
    server.faults.add("stale head")
    remote = engine(tiny, server, factor=1.3)
    with pytest.raises(ValueError, match="it does not sample from these weights"):
        remote.generate([])
    with remote.updating(0):
        pass
    time.sleep(0.5)
    assert not remote.servers[0].ready
    remote.close([])


@pytest.mark.parametrize("fault", ["worker", "cache"])
def test_an_update_that_fails_leaves_it_torn_and_awake(tiny, server, fault, monkeypatch):
    remote = engine(tiny, server, timeout_s=2)
    if fault == "cache":
        server.faults.add("cache kept")
    else:
        monkeypatch.setattr(vllm_extension, "fetch", lambda *_: 1 / 0)
    with pytest.raises(ConnectionError, match="cache of the old weights" if fault == "cache" else "ZeroDivisionError"):
        remote.generate(PROMPTS[:1])
    assert server.version == "torn" and server.open.is_set() and not server.bodies
    server.faults.clear()
    monkeypatch.undo()
    for known in remote.servers:
        known.again = 0.0
    assert same(remote.generate(PROMPTS[:2], seed=SEEDS[:2], **OPTIONS), expected(remote, PROMPTS[:2], SEEDS[:2]))


def test_a_resume_that_is_lost(tiny, server):
    """It has the right weights then, and would hold all requests for ever."""
    remote, lost = engine(tiny, server, timeout_s=5), []

    def after(path, answer):
        if path == "/resume" and not lost:
            lost.append(server.open.clear())
            return None
        return answer

    server.after = after
    assert same(remote.generate(PROMPTS[:2], seed=SEEDS[:2], **OPTIONS), expected(remote, PROMPTS[:2], SEEDS[:2]))
    assert lost


@pytest.mark.parametrize("amid, lost", [("/pause", False), ("/pause", True), ("/update_weight_version", False)])
def test_a_trainer_that_ends_amid_an_update_leaves_it_awake(tiny, server, amid, lost):
    remote, there = engine(tiny, server), threading.Event()

    def after(path, answer):
        if path != amid or there.is_set():
            return answer
        there.set()
        time.sleep(0.5)  # busy with a model's step
        return None if lost else answer

    server.after = after
    with remote.updating(0):
        pass
    assert there.wait(60)
    remote.close([])
    assert server.open.is_set()


def test_a_prompt_that_leaves_room_for_few_tokens(tiny, server):
    """A comparison asks for no more than fits."""
    assert engine(tiny, server, timeout_s=5).generate([PROMPTS[0] * 15], max_tokens=4)


def test_a_model_that_does_not_tell_its_head_dim(tiny, server):
    """A Qwen2's configuration has none: it follows from the others."""
    config = server.worker.described
    assert config.pop("head_dim") == config["hidden_size"] // config["num_attention_heads"]
    assert engine(tiny, server).generate(PROMPTS[:1], max_tokens=3)
    config["head_dim"] = 4
    with pytest.raises(ValueError, match="head_dim is 4 there"):
        engine(tiny, server).generate(PROMPTS[:1])


def test_one_of_two_goes_and_comes_back(tiny, server):
    """Amid completions, and then at the same address with the weights on its disk."""
    with vllm_stand_in.here(tiny) as other:
        remote, port = engine(tiny, server, other), other.server_address[1]
        remote.generate(PROMPTS[:1], max_tokens=3)
        other.after = lambda path, answer: None if path == "/v1/completions" else answer
        assert same(remote.generate(PROMPTS, seed=SEEDS, **OPTIONS), expected(remote))
        assert other.bodies and not remote.servers[1].ready
    with vllm_stand_in.here(tiny, port=port) as again:
        remote.servers[1].again = 0.0
        assert same(remote.generate(PROMPTS, seed=SEEDS, **OPTIONS), expected(remote))
        assert remote.servers[1].ready and again.version == server.version and "default" not in again.asked


def test_a_proxy_that_shares_connections_out_is_noticed(tiny, server):
    server.faults.add("closes")
    with pytest.raises(ConnectionError, match="no rollout server can be had: .*NotConnected"):
        engine(tiny, server, timeout_s=2).generate(PROMPTS[:1])


GOOD = {"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop", "text": ""}


@pytest.mark.parametrize("answer", [
    {}, [], 3, "text", {"choices": []}, {"choices": 3}, {"choices": [{}]}, {"choices": [None]},
    {"choices": [GOOD | {"token_ids": None}]}, {"choices": [GOOD | {"token_ids": [17]}]}, {"choices": [GOOD, GOOD]},
    {"choices": [GOOD | {"logprobs": None}]}, {"choices": [GOOD | {"logprobs": {"token_logprobs": [None]}}]},
    {"choices": [GOOD | {"finish_reason": "abort"}]}, {"choices": [GOOD | {"token_ids": [], "finish_reason": "stop"}]},
])  # fmt: skip
def test_an_answer_that_is_none(tiny, server, answer):
    remote = engine(tiny, server)
    remote.generate([])
    server.after = lambda path, given: answer if path == "/v1/completions" else given
    with pytest.raises(Lost):
        remote._completions(remote.servers[0], {"prompt": [1], "n": 1, "max_tokens": 4})
    server.after = lambda path, given: {"choices": [GOOD]} if path == "/v1/completions" else given
    assert remote._completions(remote.servers[0], {"prompt": [1], "n": 1, "max_tokens": 4})[0].ids == [1]


@pytest.mark.parametrize("path", ["/weight_info", "/collective_rpc", "/v1/models", "/reset_prefix_cache"])
@pytest.mark.parametrize("answer", [{}, [], "x", {"results": []}, {"results": [3]}, {"weight_version": []}])
def test_other_answers_that_are_none(tiny, server, path, answer):
    """Nothing is sampled, and nothing else than ConnectionError comes of it."""
    server.after = lambda asked, given: answer if asked == path else given
    if path == "/v1/models" and isinstance(answer, dict):
        return  # it is asked for the key's sake
    with pytest.raises(ConnectionError):
        engine(tiny, server, timeout_s=0.5).generate(PROMPTS[:1])
    assert not server.bodies


def test_grpo(tiny, tmp_path, server):
    """Three steps with an update before each: the completions of a run with an engine of its own."""
    options = {"seed": 5, "max_steps": 3}
    assert miniature.run(tiny.argv(tmp_path / "here", **options)).code == 0
    ended = miniature.run(tiny.argv(tmp_path / "there", rollout_server=server.url, **options))
    assert ended.code == 0, ended.err
    here, there = (miniature.rows(tmp_path / name, "completions") for name in ("here", "there"))
    assert [row["completion_ids"] for row in here] == [row["completion_ids"] for row in there]
    assert len({path for path in server.asked if path.startswith("minitrl")}) == 3


def test_grpo_that_samples_ahead(tiny, tmp_path, server):
    """Completions go on under new weights; each is told with the oldest that it may be of."""
    options = {"max_steps": 6, "max_staleness": 2, "tokens_per_microbatch": 64}
    ended = miniature.run(tiny.argv(tmp_path, rollout_server=server.url, **options))
    assert ended.code == 0, ended.err
    ages = [row["step"] - 1 - row["version"] for row in miniature.rows(tmp_path, "completions") if row["used"]]
    assert len(ages) == 48 and 0 <= min(ages) and 0 < max(ages) <= 2


def test_new_weights_of_the_same_trainer_amid_a_completion(tiny, server):
    """It is not asked for again, and counts as of the weights that it was asked for with."""
    remote, here, go_on = engine(tiny, server), threading.Event(), threading.Event()

    def before(path):
        if path == "/v1/completions" and not here.is_set():
            here.set()
            go_on.wait(60)

    with remote.updating(0):
        pass
    remote.ask(0, PROMPTS[:1], **OPTIONS).result(60)
    server.before, count = before, len(server.bodies)
    future = remote.ask(0, PROMPTS[1:2], seed=[9], **OPTIONS)
    assert here.wait(60)
    first = server.version
    with remote.updating(1), torch.no_grad():
        remote.policy.layers[0].o_proj.weight.mul_(1.2)
    deadline = time.monotonic() + 60
    while server.version == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.version != first
    go_on.set()
    (group,) = future.result(60)
    assert {c.versions for c in group} == {((0, 0, len(c.ids)),) for c in group}
    remote.close([])
    asked = [body["prompt"] for body in server.bodies[count:] if body["temperature"]]  # 0: a comparison's
    assert asked.count(PROMPTS[1]) == 1 and remote.too_old == 0


# The extension by itself.


@pytest.fixture
def offer(tiny):
    remote = RemoteEngine(["vllm+http://127.0.0.1:1"], *changed(tiny), WORLD)
    remote.weights.renew(None)
    remote.policy.folder = tiny.folder / "model"
    with vllm.offered(remote.weights, "127.0.0.1", 2) as where:
        yield remote, where


def test_what_is_fetched_is_a_checkpoint(offer, tiny, tmp_path):
    remote, where = offer
    checkpoint.save(remote.policy, remote.tokenizer, tmp_path / "saved")
    found = load(vllm_extension.fetch(**where))
    with disk.opened(tmp_path / "saved" / "model.safetensors") as saved:
        assert set(saved.keys()) == set(found)
        assert all(torch.equal(saved.get_tensor(name), tensor) for name, tensor in found.items())


def test_what_is_fetched_is_what_was_told(offer):
    where = offer[1]
    for wrong, message in [({"key": "0" * 32}, "401"), ({"size": where["size"] - 1}, "or others"),
                           ({"size": where["size"] + 1}, None), ({"digest": "0" * 64}, "200: .* or others")]:  # fmt: skip
        if message is None:
            assert len(vllm_extension.fetch(**where | wrong)) == where["size"]  # no more than there is
            continue
        with pytest.raises(ValueError, match=message):
            vllm_extension.fetch(**where | wrong)
    host, port = where["host"], where["port"]
    assert serving.ask(f"http://{host}:{port}", "/else", Authorization=f"Bearer {where['key']}")[0] == 404


def test_the_offer_ends_with_the_update(tiny):
    remote = RemoteEngine(["vllm+http://127.0.0.1:1"], *changed(tiny), WORLD)
    remote.weights.renew(None)
    with vllm.offered(remote.weights, "127.0.0.1", 1) as where:
        pass
    with pytest.raises(ConnectionRefusedError):
        vllm_extension.fetch(**where)


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_bit_that_falls_over_is_noticed(offer, monkeypatch, place):
    """And the model is left as it was."""
    send, worker = vllm.web.Connection.send, vllm_stand_in.Worker(checkpoint.load(offer[0].policy.folder)[0], set())
    before = [p.clone() for p in worker.model.parameters()]

    def flip(self, content):
        content = bytearray(content)
        if len(content) > 1000:
            content[place] ^= 1
        send(self, bytes(content))

    monkeypatch.setattr(vllm.web.Connection, "send", flip)
    assert "or others than were sent" in worker.minitrl_pull(**offer[1])["error"]
    assert all(map(torch.equal, before, worker.model.parameters()))
    monkeypatch.undo()
    assert worker.minitrl_pull(**offer[1]) == {"tensors": 20} and not torch.equal(before[0], next(worker.model.parameters()))


@pytest.mark.parametrize("body", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"{}x", b"\x80\x04N."])
def test_a_body_that_is_no_safetensors_is_not_loaded(tiny, monkeypatch, body):
    monkeypatch.setattr(vllm_extension, "fetch", lambda *_: body)
    worker = vllm_stand_in.Worker(checkpoint.load(tiny.folder / "model")[0], set())
    assert "SafetensorError" in worker.minitrl_pull("", 0, "", 0, "", 0.0)["error"]


def test_only_heads_are_packed_again():
    packed = []

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cpu_linear, self.quant_method = None, SimpleNamespace(process_weights_after_loading=packed.append)

    class VocabParallelEmbedding(Linear):
        pass

    class ParallelLMHead(Linear):
        pass

    class Bare(ParallelLMHead):  # as on a GPU
        def __init__(self):
            super().__init__()
            del self.cpu_linear

    modules = [Linear(), VocabParallelEmbedding(), ParallelLMHead(), Bare()]
    vllm_extension.pack_heads(torch.nn.ModuleList(modules))
    assert packed == modules[1:3]


def test_errors_are_told(tiny):
    """A worker that raised would take vLLM down, or say nothing."""
    worker = vllm_stand_in.Worker(checkpoint.load(tiny.folder / "model")[0], set())
    found = worker.minitrl_pull("127.0.0.1", serving.closed_port(), "key", 10, "", 1.0)
    assert "ConnectionRefusedError" in found["error"]
