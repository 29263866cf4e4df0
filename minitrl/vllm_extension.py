"""What a vLLM takes a policy's weights with: `--worker-extension-cls minitrl.vllm_extension.Pull`.

It runs in vLLM's workers, and imports neither vLLM nor the rest of minitrl. A worker fetches one safetensors body from
the trainer (vllm.py), which told it where, with what key, and which size and digest; nothing of the model changes
before it is whole. It needs room for the checkpoint twice meanwhile. Nothing is unpickled.
"""

import hashlib
import http.client
import re
from contextlib import closing

from safetensors.torch import load


class Pull:
    """Methods that vLLM adds to its workers; `/collective_rpc` calls them."""

    def minitrl_state(self) -> dict:
        """What a trainer has to know of the model that is served."""
        model, chunks = self.model_config, self.vllm_config.scheduler_config.enable_chunked_prefill
        sizes = {name: value for name, value in model.hf_text_config.to_dict().items() if isinstance(value, (int, str))}
        return sizes | {"dtype": str(model.dtype).removeprefix("torch."), "logprobs_mode": str(model.logprobs_mode),
                        "chunks_on_cpu": bool(chunks) and self.device.type == "cpu"}  # fmt: skip

    def minitrl_pull(self, host: str, port: int, key: str, size: int, digest: str, timeout_s: float) -> dict:
        """Fetch `size` bytes of safetensors and load them. What goes wrong is told: {"error": ...}."""
        try:
            weights = load(fetch(host, port, key, size, digest, timeout_s))
            self.model_runner.reload_weights(weights_iterator=iter(weights.items()))
            pack_heads(self.model_runner.get_model())
        except Exception as error:  # vLLM's own answer does not say enough
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        return {"tensors": len(weights)}


def fetch(host: str, port: int, key: str, size: int, digest: str, timeout_s: float) -> bytes:
    """The body at http://host:port/weights, whose digest was right; ValueError otherwise."""
    with closing(http.client.HTTPConnection(host, port, timeout=timeout_s)) as connection:
        connection.request("GET", "/weights", headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        body = response.read(size)
    if hashlib.sha256(body).hexdigest() != digest:
        raise ValueError(f"{response.status}: {len(body)} bytes of {size} came, or others than were sent")
    return body


def pack_heads(model) -> None:
    """Make a head that is tied to the embedding anew of its weight. On CPUs vLLM multiplies by a packed copy, which a
    reload renews for all layers but this: the model would embed by the new weights and predict by the old ones."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and re.search("Embedding|LMHead", type(module).__name__):
            module.quant_method.process_weights_after_loading(module)
