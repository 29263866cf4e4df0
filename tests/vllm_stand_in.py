"""What answers as a real vLLM 0.32 does (recorded from one), with our engine behind it and the real extension in its
worker, so that what a trainer does with a vLLM can be tried where none is installed.

A fault is a name in `faults`:
    no dev mode, no extension    as a server that was started without
    stale head                   a reload leaves the packed copy of a tied head as it was, and nobody renews it
    cache kept                   the prefix cache is not reset
    closes                       after each answer, the connection
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch

from minitrl import checkpoint, vllm_extension
from minitrl.layout import hf_tensors
from minitrl.model import Model
from minitrl.rollout import Engine


class Served(Model):
    """A model that is tied, but whose head is a copy, as vLLM's on a CPU is: packed when the weights were loaded."""

    head_weight = property(lambda self: self.packed)


class ParallelLMHead(torch.nn.Module):
    """What holds that copy in a vLLM, and makes it."""

    def __init__(self, model):
        super().__init__()
        self.quant_method, self.cpu_linear, self.model = self, None, [model]
        self.process_weights_after_loading(self)

    def process_weights_after_loading(self, module) -> None:
        self.model[0].packed = self.model[0].embed_tokens.weight.detach().clone()


class Worker(vllm_extension.Pull):
    """vLLM's, as far as the extension sees it: `model_config`, and a `model_runner` with two methods."""

    def __init__(self, model, faults: set):
        model.__class__ = Served
        self.model, self.model_runner, self.faults, self.head = model, self, faults, ParallelLMHead(model)
        self.described = vars(model.config) | {"torch_dtype": "float16"}  # the checkpoint's, not what it is served in
        self.model_config = SimpleNamespace(
            logprobs_mode="processed_logprobs", hf_text_config=SimpleNamespace(to_dict=lambda: self.described),
            dtype=model.head_weight.dtype,
        )  # fmt: skip
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=False))
        self.device = torch.device("cpu")

    def get_model(self):
        return torch.nn.ModuleList([] if "stale head" in self.faults else [self.head])

    @torch.no_grad()
    def reload_weights(self, weights_iterator) -> None:
        parameters, places = dict(self.model.named_parameters()), hf_tensors(self.model.config)
        for name, tensor in weights_iterator:
            parameter, rows, shape = places.pop(name)
            parameters[parameter][rows or slice(None)].copy_(tensor)
        assert not places, f"not there: {sorted(places)}"


class Server(ThreadingHTTPServer):
    """`asked`: the paths in order, each completion's with the version it was sampled with."""

    daemon_threads = True

    def __init__(self, folder, port=0, key=None, faults=()):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.key, self.faults, self.asked, self.bodies = folder, key, set(faults), [], []
        self.lock, self.open = threading.Condition(), threading.Event()
        self.before, self.after = None, None  # called before, or after, what is asked for at a path is done
        self.open.set()
        self.load()

    def load(self) -> None:
        """As a server that was started just now."""
        model, tokenizer = checkpoint.load(self.folder)
        self.worker, self.version = Worker(model, self.faults), "default"
        self.engine = Engine(model, tokenizer)

    @property
    def url(self) -> str:
        return f"vllm+http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        pass

    def complete(self, body: dict) -> dict:
        self.open.wait(30)
        with self.lock:
            self.asked.append(self.version)
            self.bodies.append(body)
            known = set("prompt n seed max_tokens temperature top_p top_k min_p repetition_penalty stop ignore_eos".split())
            options = {name: value for name, value in body.items() if name in known - {"prompt"}}
            options["stop"] = tuple(options["stop"])
            (group,) = self.engine.generate([body["prompt"]], **options)
        choices = [
            {"index": i, "text": c.text, "finish_reason": c.finish_reason, "stop_reason": None, "token_ids": c.ids,
             "prompt_token_ids": body["prompt"], "prompt_logprobs": None, "routed_experts": None,
             "logprobs": {"token_logprobs": c.logprobs, "tokens": [], "text_offset": [],
                          "top_logprobs": []}}
            for i, c in enumerate(group)
        ]  # fmt: skip
        return {"id": "cmpl-1", "object": "text_completion", "choices": choices, "system_fingerprint": "vllm-0.32.0-a387e5ec"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        path, server = self.path.partition("?")[0], self.server
        if server.before:
            server.before(path)
        if path != "/v1/completions":
            server.asked.append(self.path)
        if path.startswith("/v1") and server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            status, answer = 401, {"error": "Unauthorized"}
        else:
            status, answer = self.answers(path, body)
        if server.after:
            answer = server.after(path, answer)
        if answer is None:
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if "closes" in server.faults:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def answers(self, path: str, body: dict) -> tuple[int, dict]:
        server, worker = self.server, self.server.worker
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "vllm"}]}
        if path == "/v1/completions":
            if len(body["prompt"]) + body["max_tokens"] > 64:
                return 400, {"error": {"message": "max_tokens cannot be greater than max_model_len=64", "code": 400}}
            return 200, server.complete(body)
        if "no dev mode" in server.faults:
            return 404, {"detail": "Not Found"}
        if path == "/weight_info":
            return 200, {"weight_version": server.version}
        if path == "/pause":
            server.open.clear()
            return 200, {"status": "paused"}
        if path == "/resume":
            server.open.set()
            return 200, {"status": "resumed"}
        if path == "/update_weight_version":
            server.version = body["new_version"]
            return 200, {"success": True, "new_version": server.version}
        if path == "/reset_prefix_cache":
            server.engine.weights_changed(server.engine.version + 1)
            return 200, {"success": "cache kept" not in server.faults}
        if path == "/collective_rpc":
            method = getattr(worker, body["method"], None)
            if method is None or "no extension" in server.faults:
                error = f"Worker failed with error ''CPUWorker' object has no attribute '{body['method']}''"
                return 500, {"error": {"message": f"Call to collective_rpc method failed: {error}", "code": 500}}
            with server.lock:
                return 200, {"results": [method(**body["kwargs"])]}
        return 404, {"detail": "Not Found"}


@contextmanager
def here(tiny, **options):
    """One with the tiny model, in a thread."""
    with Server(tiny.folder / "model", **options) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()
