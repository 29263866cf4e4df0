"""The server's answers: OpenAI's form, TRL's endpoints, streams, versions, and weights that change under way."""

import json
import threading
import time
import urllib.request

import pytest
import serving
import torch
from serving import ask

from minitrl import checkpoint, transfer
from minitrl.rollout import Engine

PROMPT = [2, 11, 3, 12]  # 1+2=


@pytest.fixture(scope="module")
def server(tiny):
    with serving.here(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(*checkpoint.load(tiny.folder / "model"))


def sse(url, path, body, timeout=60):
    """The events of a stream."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        parts = response.read().decode().split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_completions(server, engine):
    body = {"prompt": "1+2=", "n": 3, "max_tokens": 12, "seed": 7, "temperature": 0.8, "top_p": 0.9, "top_k": 9,
            "min_p": 0.01, "repetition_penalty": 1.1, "logprobs": 0, "return_token_ids": True}  # fmt: skip
    status, answer = ask(server.url, "/v1/completions", body)
    assert status == 200, answer
    options = {name: body[name] for name in "n max_tokens seed temperature top_p top_k min_p repetition_penalty".split()}
    (expected,) = engine.generate([PROMPT], **options)
    assert [c["token_ids"] for c in answer["choices"]] == [e.ids for e in expected]
    assert [c["text"] for c in answer["choices"]] == [e.text for e in expected]
    assert [c["finish_reason"] for c in answer["choices"]] == [e.finish_reason for e in expected]
    for choice, e in zip(answer["choices"], expected):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(e.logprobs, abs=1e-5)
        assert choice["prompt_token_ids"] == PROMPT and choice["weight_versions"] == [[0, 0, len(e.ids)]]
    sampled = sum(len(e.ids) for e in expected)
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": sampled, "total_tokens": 4 + sampled}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]


def test_prompts_in_all_forms(server, engine):
    one = {"max_tokens": 6, "seed": 3, "return_token_ids": True}
    ids = [ask(server.url, "/v1/completions", one | {"prompt": p})[1]["choices"] for p in ("1+2=", PROMPT)]
    assert ids[0][0]["token_ids"] == ids[1][0]["token_ids"] == engine.generate([PROMPT], max_tokens=6, seed=3)[0][0].ids
    many = ask(server.url, "/v1/completions", one | {"prompt": ["1+2=", "3"], "n": 2, "seed": [3, 4]})[1]["choices"]
    expected = engine.generate([PROMPT, [4]], n=2, max_tokens=6, seed=[3, 4])
    assert [c["token_ids"] for c in many] == [e.ids for group in expected for e in group]
    assert [c["index"] for c in many] == [0, 1, 2, 3] and "logprobs" in many[0] and many[0]["logprobs"] is None
    nested = ask(server.url, "/v1/completions", one | {"prompt": [PROMPT, [4]]})[1]["choices"]
    assert [c["token_ids"] for c in nested] == [g[0].ids for g in engine.generate([PROMPT, [4]], max_tokens=6, seed=3)]


def test_without_a_seed_each_request_draws_anew(server):
    body = {"prompt": ["1+2="] * 8, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    seen = {tuple(c["token_ids"]) for _ in range(2) for c in ask(server.url, "/v1/completions", body)[1]["choices"]}
    assert len(seen) == 16


def test_defaults_are_openais(server, engine):
    answer = ask(server.url, "/v1/completions", {"prompt": "1+2=", "ignore_eos": True})[1]
    assert answer["usage"]["completion_tokens"] == 16


def test_end_tokens_and_stop_strings(server, engine):
    for stop in ("9", ["ab", "4 "], ["zz"]):
        for seed in range(6):
            body = {"prompt": "1+2=", "max_tokens": 20, "seed": seed, "stop": stop}
            choice = ask(server.url, "/v1/completions", body)[1]["choices"][0]
            ((expected,),) = engine.generate([PROMPT], max_tokens=20, seed=seed, stop=stop)
            assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
            events = sse(server.url, "/v1/completions", body | {"stream": True})
            assert "".join(e["choices"][0]["text"] for e in events) == expected.text
            assert [e["choices"][0]["finish_reason"] for e in events][-1] == expected.finish_reason


def test_a_stream_is_the_answer_in_parts(server):
    body = {"prompt": ["1+2=", "3"], "n": 2, "max_tokens": 9, "seed": 5, "logprobs": 0, "return_token_ids": True}
    whole = ask(server.url, "/v1/completions", body)[1]
    events = sse(server.url, "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert events[-1]["usage"] == whole["usage"] and events[-1]["choices"] == []
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert "".join(part["text"] for part in parts) == choice["text"]
        logprobs = [x for part in parts for x in part["logprobs"]["token_logprobs"]]
        assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[-1]["weight_versions"] == choice["weight_versions"]


def test_chat(tiny, tmp_path):
    """A chat template of the tiny model's own."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}+{% endfor %}="
    checkpoint.save(model, tokenizer, tmp_path / "model")

    class Chatty:
        folder = tmp_path

    with serving.here(Chatty) as chatty:
        body = {"messages": [{"role": "user", "content": "12"}], "seed": 4, "max_tokens": 7, "logprobs": True,
                "return_token_ids": True, "model": "tiny"}  # fmt: skip
        answer = ask(chatty.url, "/v1/chat/completions", body)[1]
        ((expected,),) = Engine(model, tokenizer).generate(["12+="], seed=4, max_tokens=7)
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text}
        assert choice["token_ids"] == expected.ids and answer["object"] == "chat.completion"
        assert [t["logprob"] for t in choice["logprobs"]["content"]] == pytest.approx(expected.logprobs, abs=1e-5)
        events = sse(chatty.url, "/v1/chat/completions", body | {"stream": True})
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "role" not in events[1]["choices"][0]["delta"] and events[0]["object"] == "chat.completion.chunk"
        assert "".join(e["choices"][0]["delta"]["content"] for e in events) == expected.text
        rest = ask(chatty.url, "/v1/chat/completions", {"messages": body["messages"], "ignore_eos": True})[1]
        assert rest["usage"]["completion_tokens"] == 64 - 4, "without a limit a chat may take what is left"
        both = body | {"max_completion_tokens": 3, "ignore_eos": True}
        del both["max_tokens"]
        assert ask(chatty.url, "/v1/chat/completions", both)[1]["usage"]["completion_tokens"] == 3


def test_no_chat_template(server):
    status, answer = ask(server.url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}]})
    assert status == 400 and "no chat template" in answer["error"]["message"]


def test_models_and_health(server):
    assert ask(server.url, "/health") == ask(server.url, "/health/") == (200, {"status": "ok"})
    (model,) = ask(server.url, "/v1/models")[1]["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 64)


def test_trl_0_16_generates(server, engine):
    """The requests of TRL 0.16.0's VLLMClient, byte for byte what its `generate` sends."""
    assert ask(server.url, "/get_tensor_parallel_size/") == (200, {"tensor_parallel_size": 1})
    body = {"prompts": ["1+2=", "3"], "n": 2, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
            "min_p": 0.0, "max_tokens": 16, "guided_decoding_regex": None}  # fmt: skip
    status, answer = ask(server.url, "/generate/", body)
    assert status == 200 and list(answer) == ["completion_ids"] and len(answer["completion_ids"]) == 4
    assert all(1 <= len(ids) <= 16 for ids in answer["completion_ids"])
    greedy = ask(server.url, "/generate/", {"prompts": ["1+2=", "3"], "n": 2, "temperature": 0.0, "max_tokens": 5})[1]
    expected = engine.generate([PROMPT, [4]], n=2, temperature=0.0, max_tokens=5)
    assert greedy["completion_ids"] == [e.ids for group in expected for e in group], "prompt-major"
    assert len(ask(server.url, "/generate/", {"prompts": ["1"] * 8, "n": 2})[1]["completion_ids"]) == 16
    status, answer = ask(server.url, "/generate/", body | {"guided_decoding_regex": "a+"})
    assert status == 400 and answer["error"]["param"] == "guided_decoding_regex"


def trl_update(url, named, group_port, version_of, tensors_sent=None):
    """What VLLMClient does with its group, over torch's own instead of vLLM's: join, one tensor at a time, barrier."""
    body = {"host": "0.0.0.0", "port": group_port, "world_size": 2}
    assert ask(url, "/init_communicator/", body)[0] == 200
    bridge = transfer.Bridge("127.0.0.1", group_port, 1, 2, generation=0, timeout_s=20)
    for name, tensor in list(named.items())[:tensors_sent]:
        body = {"name": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        assert ask(url, "/update_named_param/", body)[0] == 200
        bridge.finish(bridge.broadcast(tensor.contiguous(), 1), "sending")
        bridge.finish(bridge.broadcast(torch.zeros(1, dtype=torch.uint8), 0), "the barrier")
    answer = ask(url, "/reset_prefix_cache/", method="POST", body=b"")
    assert answer == (200, {"message": "Request received, resetting prefix cache status: True"})
    assert ask(url, "/close_communicator/", method="POST", body=b"")[0] == 200
    bridge.close()


def test_trl_0_16_updates_weights_as_a_whole(tiny):
    """Tensor by tensor in the checkpoint's names; the old weights serve until the last one is there."""
    from safetensors.torch import load_file

    named = {k: (v * 1.05).to(torch.float32) for k, v in load_file(tiny.folder / "model" / "model.safetensors").items()}
    with serving.here(tiny) as server:
        old = server.worker.digest
        trl_update(server.url, named, serving.closed_port(), server, tensors_sent=len(named) - 1)
        assert server.worker.digest == old == transfer.digest(server.worker.tensors) and server.worker.version == 0
        trl_update(server.url, named, serving.closed_port(), server)
        assert server.worker.version == 1
        model, tokenizer = checkpoint.load(tiny.folder / "model")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
        assert server.worker.digest == transfer.digest(dict(model.named_parameters()))
        greedy = ask(server.url, "/generate/", {"prompts": ["1+2="], "temperature": 0.0})[1]["completion_ids"]
        assert greedy == [Engine(model, tokenizer).generate([PROMPT], temperature=0.0, max_tokens=16)[0][0].ids]


def test_a_trl_client_comes_again_to_the_same_port(tiny):
    """After a kill -9 nobody has closed the communicator, and TRL's port is always the same."""
    port = serving.closed_port()
    body = {"host": "0.0.0.0", "port": port, "world_size": 2}
    with serving.here(tiny) as server:
        assert ask(server.url, "/init_communicator/", body)[0] == 200  # nobody comes
        for _ in range(2):
            assert ask(server.url, "/init_communicator/", body)[0] == 200
            bridge = transfer.Bridge("127.0.0.1", port, 1, 2, generation=0, timeout_s=20)
            while server.weights.bridge is None:
                time.sleep(0.01)
            bridge.group.abort()  # and nobody says goodbye


class StatelessProcessGroup:
    """In place of vLLM's, which TRL's client insists on: torch's own, over our bridge."""

    @staticmethod
    def create(host, port, rank, world_size):
        return transfer.Bridge(host, port, rank, world_size, generation=0, timeout_s=20)


class PyNcclCommunicator:
    def __init__(self, group, device):
        self.bridge, self.group = group, self

    def broadcast(self, tensor, src, stream):
        self.bridge.finish(self.bridge.broadcast(tensor, src), "sending")

    def barrier(self):
        self.bridge.finish(self.bridge.broadcast(torch.zeros(1, dtype=torch.uint8), 0), "the barrier")


def test_trl_0_16s_own_client(tiny, monkeypatch):
    """VLLMClient itself, from `pip install --no-deps trl==0.16.0`; of vllm there are stand-ins for two classes."""
    import importlib.metadata
    import sys
    import types

    pytest.importorskip("requests")
    pytest.importorskip("transformers")
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found.startswith("0.16."):
        pytest.skip("needs TRL 0.16")
    import trl.import_utils

    for name in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators", "vllm.distributed.utils",
                 "vllm.distributed.device_communicators.pynccl"):  # fmt: skip
        module = types.ModuleType(name)
        module.StatelessProcessGroup, module.PyNcclCommunicator = StatelessProcessGroup, PyNcclCommunicator
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trl.import_utils, "is_vllm_available", lambda: True)
    from trl.extras.vllm_client import VLLMClient

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder / "model", dtype=torch.float32)
    with serving.here(tiny) as server:
        port = server.server_address[1]
        client = VLLMClient(server_port=port, group_port=serving.closed_port(), connection_timeout=5)
        ids = client.generate(["1+2=", "3"], n=2, temperature=0.0, max_tokens=5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.07)
        client.update_model_params(model)
        client.reset_prefix_cache()
        changed = client.generate(["1+2=", "3"], n=2, temperature=0.0, max_tokens=5)
        client.close_communicator()
        version = server.worker.version
    ours, tokenizer = checkpoint.load(tiny.folder / "model")
    expected = Engine(ours, tokenizer).generate([PROMPT, [4]], n=2, temperature=0.0, max_tokens=5)
    assert ids == [e.ids for group in expected for e in group] and version == 1
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.07)
    expected = Engine(ours, tokenizer).generate([PROMPT, [4]], n=2, temperature=0.0, max_tokens=5)
    assert changed == [e.ids for group in expected for e in group]


def test_64_clients_get_what_one_would(server, engine):
    bodies = [{"prompt": [2 + i % 9, 11, 3], "seed": i, "n": 1 + i % 3, "max_tokens": 5 + i % 20, "ignore_eos": i % 2 == 0,
               "temperature": 0.5 + (i % 4) / 4, "return_token_ids": True} for i in range(64)]  # fmt: skip
    answers = [None] * 64

    def client(i):
        if i % 4:
            answers[i] = [c["token_ids"] for c in ask(server.url, "/v1/completions", bodies[i])[1]["choices"]]
        else:
            answers[i] = [[] for _ in range(bodies[i]["n"])]
            for event in sse(server.url, "/v1/completions", bodies[i] | {"stream": True}):
                answers[i][event["choices"][0]["index"]] += event["choices"][0]["token_ids"]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for body, answer in zip(bodies, answers):
        options = {name: body[name] for name in ("seed", "n", "max_tokens", "ignore_eos", "temperature")}
        assert answer == [e.ids for e in engine.generate([body["prompt"]], **options)[0]]
    assert server.worker.pending == 0 and not server.worker.jobs


def send_weights(server, tensors, version):
    serving.send_weights(server.url, server.worker.engine.model.config, tensors, version)


def test_an_update_amid_generation_drops_nothing_and_tells_each_tokens_version(tiny):
    """Every token is from the one set of weights or the other, as its version says, and never from a mixture."""
    old, tokenizer = checkpoint.load(tiny.folder / "model")
    new, _ = checkpoint.load(tiny.folder / "model")
    with torch.no_grad():
        for p in new.parameters():
            p.mul_(1.2)
    with serving.here(tiny) as server:
        step, begun = server.worker.engine.step, threading.Event()

        def slowly():
            begun.set()
            time.sleep(0.02)
            return step()

        server.worker.engine.step = slowly
        body = {"prompt": PROMPT, "seed": 1, "n": 8, "max_tokens": 50, "ignore_eos": True, "logprobs": 0,
                "return_token_ids": True}  # fmt: skip
        got = []
        thread = threading.Thread(target=lambda: got.append(ask(server.url, "/v1/completions", body)))
        thread.start()
        assert begun.wait(20)
        time.sleep(0.2)
        send_weights(server, dict(new.named_parameters()), 7)
        thread.join()
        later = ask(server.url, "/v1/completions", body | {"max_tokens": 3})[1]["choices"][0]
    status, answer = got[0]
    assert status == 200 and len(answer["choices"]) == 8
    for choice in answer["choices"]:
        (a, start, middle), (b, again, end) = choice["weight_versions"]
        assert (a, start, b, end) == (0, 0, 7, 50) and 0 < middle == again < 50
        # Up to the change the log-probs are the old model's to rounding, so no token before it saw the new one.
        pack = [PROMPT + choice["token_ids"][:middle]]
        expected = old.logits(pack)[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
        ids = torch.tensor(choice["token_ids"][:middle])
        given = torch.tensor(choice["logprobs"]["token_logprobs"][:middle])
        torch.testing.assert_close(given, expected.gather(1, ids[:, None])[:, 0].detach(), rtol=0, atol=1e-4)
    assert later["weight_versions"] == [[7, 0, 3]]
    assert later["token_ids"] == Engine(new, tokenizer).generate([PROMPT], seed=1, max_tokens=3, ignore_eos=True)[0][0].ids


def test_new_weights_forget_what_the_old_computed(tiny):
    """A prompt of several pages, which the server knows, is computed anew."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    body = {"prompt": [2 + i % 9 for i in range(40)], "return_token_ids": True, "logprobs": 0, **options}
    with serving.here(tiny) as server:
        before = ask(server.url, "/v1/completions", body)[1]["choices"][0]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)
        serving.send_weights(server.url, model.config, dict(model.named_parameters()), 1)
        after = ask(server.url, "/v1/completions", body)[1]["choices"][0]
    ours = Engine(model, tokenizer).generate([body["prompt"]], **options)[0][0]
    assert after["token_ids"] == ours.ids
    assert after["logprobs"]["token_logprobs"] == pytest.approx(ours.logprobs, abs=1e-5)
    assert before["logprobs"] != after["logprobs"]


def test_a_request_may_insist_on_its_weights(server):
    state = ask(server.url, "/weights")[1]
    assert state["tensors"] == transfer.describe(server.worker.engine.model.config, torch.float32)
    body = {"prompt": PROMPT, "max_tokens": 2}
    assert ask(server.url, "/v1/completions", body | {"weights": state["digest"]})[0] == 200
    status, answer = ask(server.url, "/v1/completions", body | {"weights": "0" * 64})
    assert status == 409 and state["digest"] in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_weights_that_are_insisted_on_and_replaced(tiny, stream):
    """A request that still waits would be answered with the new ones, in one version, and nobody could tell."""
    with serving.here(tiny, max_batch=1) as server:
        step, got = server.worker.engine.step, {}
        server.worker.engine.step = lambda: time.sleep(0.02) or step()
        body = {"prompt": PROMPT, "max_tokens": 50, "ignore_eos": True}
        bodies = [body, body | {"weights": server.worker.digest, "max_tokens": 3, "stream": stream}]
        threads = [threading.Thread(target=lambda n=n: got.update({n: ask(server.url, "/v1/completions", bodies[n])}))
                   for n in range(2)]  # fmt: skip
        for n, thread in enumerate(threads, 1):
            thread.start()
            while server.worker.pending < n:
                time.sleep(0.01)
        send_weights(server, {name: 1.2 * tensor for name, tensor in server.worker.tensors.items()}, 7)
        for thread in threads:
            thread.join()
    (others, whole), (status, answer) = got[0], got[1]
    assert others == 200 and whole["usage"]["completion_tokens"] == 50, "who does not insist is served on"
    assert status == (200 if stream else 409) and "replaced" in str(answer)


def test_the_openai_package_completes_and_streams(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    options = {"model": "tiny", "prompt": "1+2=", "max_tokens": 8, "seed": 3, "n": 2}
    whole = client.completions.create(**options, logprobs=0, extra_body={"return_token_ids": True})
    assert len(whole.choices) == 2 and whole.usage.prompt_tokens == 4 and whole.choices[0].logprobs.token_logprobs
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(**options, logit_bias={"5": 100})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**options | {"model": "../etc"})


def test_sigterm_drains(tiny):
    """What runs is finished, what comes is refused, and the exit status is 0."""
    with serving.Process(tiny, slow_steps, drain_timeout=30) as process:
        body = {"prompt": PROMPT, "n": 4, "max_tokens": 40, "seed": 1, "ignore_eos": True, "return_token_ids": True}
        got = []
        thread = threading.Thread(target=lambda: got.append(ask(process.url, "/v1/completions", body)))
        thread.start()
        time.sleep(0.5)
        process.process.terminate()
        statuses, deadline = set(), time.monotonic() + 20
        while thread.is_alive() and time.monotonic() < deadline and 503 not in statuses:
            statuses.add(ask(process.url, "/v1/completions", body | {"max_tokens": 1})[0])
        thread.join()
        process.process.join(30)
        assert 503 in statuses
        assert got[0][0] == 200 and [len(c["token_ids"]) for c in got[0][1]["choices"]] == [40] * 4
        assert process.process.exitcode == 0, process.log.read_text()


def slow_steps():
    step = Engine.step

    def slower(self):
        time.sleep(0.05)
        return step(self)

    Engine.step = slower


def test_options_that_cannot_be(tiny, capsys):
    from minitrl import config, server

    model = str(tiny.folder / "model")
    for argv, message in [
        (["--tensor_parallel_size", "0"], "--tensor_parallel_size 0: must be at least 1"),
        (["--port", "70000"], "--port 70000"),
        (["--max_n", "0"], "--max_n 0"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: must be 127.0.0.1"),
    ]:
        with pytest.raises(SystemExit):
            config.parse(server.Config, ["--model", model, *argv])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--tensor_parallel_size 2: 1 processes were started"):
        server.main(["--model", model, "--tensor-parallel-size", "2"])
    with pytest.raises(SystemExit):
        config.parse(server.Config, [])
    assert "--model None: must be given with --dtype bfloat16 or" in capsys.readouterr().err


def test_the_engine_is_as_the_options_say(tiny, monkeypatch):
    from minitrl import server

    def engine(model, tokenizer, **options):
        raise ValueError(f"{model.head_weight.dtype} {sorted(options.items())}")

    monkeypatch.setattr(server, "Engine", engine)
    argv = ["--model", str(tiny.folder / "model"), "--max_batch", "3", "--cache_gib", "0.5", "--prefill_tokens", "7"]
    asked = [("cache_gib", 0.5), ("deterministic", False), ("max_batch", 3), ("prefill_tokens", 7)]
    for more, dtype, options in (
        ([], "torch.bfloat16", asked),
        (["--deterministic", "--dtype", "float32"], "torch.float32", [("deterministic", True) if name == "deterministic" else
                                                                       (name, value) for name, value in asked]),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            server.main([*argv, *more])
        assert str(error.value) == f"{dtype} {options}"
