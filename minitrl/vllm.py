"""A vLLM server as a trainer's sampler: --rollout_server vllm+http://127.0.0.1:8000. vLLM itself is not imported.

    trainer -> server    /pause?mode=keep, which holds requests; they go on with the new weights
    trainer -> workers   /collective_rpc minitrl_pull: where to fetch them, size and digest, a key for this once
    workers -> trainer   GET /weights, one safetensors body; loaded when it is whole
    trainer -> server    /reset_prefix_cache    its weight version becomes ours, or `torn` where it failed    /resume

One that was restarted has the version `default`, and completions do not tell theirs. So it is asked for before and
after each, on the connection that brings the completion: one process has answered all three. A proxy that shares
connections out may not stand between.
"""

import hashlib
import secrets
import threading
from contextlib import contextmanager
from functools import partial

from safetensors.torch import save

from . import transfer, web
from .layout import hf_tensors
from .remote import Lost, Server, Weights

SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    tie_word_embeddings""".split()
REMEDIES = {  # else it serves another model
    "logprobs_mode": "start it with --logprobs-mode processed_logprobs, which are of the distribution sampled from",
    "chunks_on_cpu": "start it with --no-enable-chunked-prefill: on a CPU it dies of a seeded prompt computed in parts",
}
# vLLM would take what is not told from the checkpoint's generation_config.json, and passes over what it does not know.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": [],
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": False}  # fmt: skip
ASKED = {"prompt", "seed", "n", "max_tokens", "logprobs", "return_token_ids"}


class VLLM(Server):
    """A vLLM."""

    kind = "a vLLM is started with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls minitrl.vllm_extension.Pull"

    def state(self) -> tuple[bool, dict]:
        policy, here = self.weights.policy, f"--rollout_server {self.url}: "
        if policy.deterministic or self.weights.senders > 1:
            raise ValueError(f"{here}a vLLM goes without --deterministic, --shard and --tensor")
        self.ask("GET", "/v1/models", None, 30.0)  # wants the key; the others take anybody
        expected = {name: getattr(policy.config, name) for name in SIZES}
        dtype = str(policy.head_weight.dtype).removeprefix("torch.")
        expected |= {"dtype": dtype, "logprobs_mode": "processed_logprobs", "chunks_on_cpu": False}
        implied = {"head_dim": policy.config.hidden_size // policy.config.num_attention_heads}  # a Qwen2 does not tell
        for worker in (workers := self._workers("minitrl_state", 30.0)):
            for name, ours in expected.items():
                if (theirs := (implied | worker).get(name)) != ours:
                    remedy = REMEDIES.get(name, "it serves another model, or in another --dtype")
                    raise ValueError(f"{here}{name} is {str(theirs)[:40]} there and not {ours}: {remedy}")
        return self._version() in self._names(None) and not self.held, {"workers": len(workers)}

    def update(self, state: dict, timeout_s: float) -> None:
        tell, version, self.held = partial(self.ask, "POST", timeout_s=timeout_s), "torn", True
        try:
            tell("/pause?mode=keep", {})  # which it may do though its answer is lost
            with offered(self.weights, transfer.local_address(self.host, self.port), state["workers"]) as where:
                for worker in self._workers("minitrl_pull", timeout_s, **where):
                    if "error" in worker:
                        raise Lost(f"did not take the weights: {str(worker['error'])[:300]}")
            if tell("/reset_prefix_cache?reset_running_requests=true", {}).get("success") is not True:
                raise Lost("keeps a prefix cache of the old weights")
            (version,) = self._names(None)
        finally:  # a server that cannot be told is not woken up
            tell("/update_weight_version", {"new_version": version})
            tell("/resume", {})
            self.held = False

    def answer(self, body: dict, least: int | None, timeout_s: float) -> tuple[dict, int]:
        if unknown := body.keys() - DEFAULTS.keys() - ASKED:
            raise ValueError(f"{min(unknown)}: not passed on to a vLLM")
        ends = [] if body.get("ignore_eos") else list(self.weights.end_ids)
        body, names = DEFAULTS | body | {"stop_token_ids": ends}, self._names(least)
        with self.connection(timeout_s) as connection:
            connection.auto_open = 0  # a second one may lead to another process
            before = self._version(connection)
            answer = self.ask("POST", "/v1/completions", body, timeout_s, connection) if before in names else {}
            after = self._version(connection)
        if before not in names or after not in self._names(least) or (after != before and least is None):
            raise Lost(f"holds the weights {before!r}, and then {after!r}")
        return answer, names[before]  # where it changed meanwhile, the oldest: more is not known

    def _names(self, least: int | None) -> dict[str, int]:
        """{what the server calls a version: its number} of those that a completion may be of."""
        return {f"minitrl {version}": version for version in self.weights.allowed(least)}

    def _version(self, connection=None) -> str:
        return str(self.ask("GET", "/weight_info", None, 30.0, connection).get("weight_version"))[:200]

    def _workers(self, method: str, limit: float, **arguments) -> list[dict]:
        """What each worker answers to a call of the extension's."""
        results = self.ask("POST", "/collective_rpc", {"method": method, "kwargs": arguments}, limit).get("results")
        if not (isinstance(results, list) and results and all(isinstance(result, dict) for result in results)):
            raise Lost(f"{method}: {str(results)[:100]} is not an answer of our extension")
        return results


@contextmanager
def offered(weights: Weights, host: str, takers: int):
    """Inside, whoever has the key may fetch the weights at `host`, an address of this machine; yields what it needs."""
    places = hf_tensors(weights.policy.config).items()
    body = save({name: weights.tensors[ours][rows or slice(None)].detach().cpu() for name, (ours, rows, _) in places})

    class Offer(web.Connection):
        def give(self, _: web.Fields) -> None:
            self.send_head(200, **{"Content-Length": len(body)})
            for begin in range(0, len(body), 2**24):  # bytes, to be sent within web.SEND_SECONDS
                self.send(memoryview(body)[begin : begin + 2**24])

        routes = {("GET", "/weights"): give}

    key = secrets.token_hex(16)
    with web.Server(host, 0, Offer, key, max_body=0, max_connections=takers + 4) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield {"host": host, "port": server.server_address[1], "key": key, "size": len(body),
                   "digest": hashlib.sha256(body).hexdigest(), "timeout_s": weights.timeout_s}  # fmt: skip
        finally:
            server.shutdown()
