"""One decoder for Llama, Mistral, Qwen2 and Qwen3 checkpoints, on packed tokens.

    x = embed(tokens)
    per layer:  q, k, v = split(qkv_proj(rms_norm(x)))        Qwen3 normalises q and k per head
                x += o_proj(attend(rope(q), rope(k), v))
                gate, up = split(gate_up_proj(rms_norm(x)))
                x += down_proj(silu(gate) * up)
    hidden = rms_norm(x);  logits = hidden @ head^T           only in `logits`: training goes through token_logprob
                           values = hidden @ score^T          where the head is a scalar: reward and value models

There is one forward pass. What differs between training, prefill and decoding is the function `attend` that it is
given: attention over a pack, or the same with keys and values written to and read from a cache. The q, k, v and the
gate, up matrices are stored as one matrix each, since a few large products are faster than many small ones;
layout.py says which rows of ours are which tensor of a checkpoint.

Several processes can hold a slice of every matrix each and compute together (`tensor`; Megatron's form, arXiv
1909.08053 and 2205.05198): q, k, v, gate and up by heads and rows, o and down by columns, embedding and head by tokens
of the vocabulary. Between the matrices each has a part of the rows of x:

    x (N / n, D) -> norm -> gather -> q, k, v of its own heads -> attend -> o_proj's share of the sum -> scatter -> + x
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .distributed import ALONE, World
from .kernels.attention import attention
from .kernels.linear import linear, logits, swiglu
from .kernels.token_logprob import SPLIT, cuts, token_logprob, token_logprob_sum
from .packing import Pack, pack
from .parallel import collect, gather, local, scatter

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, read from a Hugging Face config.json by `from_hf`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict  # transformers 5's `rope_parameters`: rope_type, rope_theta, and what the type needs
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]  # per layer, how many tokens back a query sees, itself counted; None = all
    scalar_head: bool  # one number a token in place of the vocabulary: XForSequenceClassification with one label
    source: dict  # the config.json

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are RMS-normalised per head before RoPE."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, source: dict) -> "ModelConfig":
        """Read a config.json's dictionary, in transformers' old and new spelling.

        Raises ValueError for what this decoder does not compute.
        """
        model_type = source.get("model_type")
        if model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"config.json: model_type {model_type!r} is not supported; known are {known}")
        expected = ARCHITECTURES[model_type]
        classifier = expected.replace("CausalLM", "SequenceClassification")
        architectures = source.get("architectures") or [expected]
        if architectures not in ([expected], [classifier]):
            known = f"{expected!r} or {classifier!r}"
            raise ValueError(f"config.json: architectures {architectures} is not supported; expected {known}")
        scalar, names = architectures == [classifier], source.get("id2label")
        labels = len(names) if isinstance(names, dict) else source.get("num_labels", 2)
        if scalar and labels != 1:
            raise ValueError(f"config.json: {classifier} with {labels} labels (id2label) is not supported, only with 1")
        required = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
        ).split()
        counts = (*required, *(key for key in ("num_key_value_heads", "head_dim") if source.get(key) is not None))
        wrong = [key for key in counts if type(source.get(key)) is not int or source[key] < 1]  # True is an int too
        if wrong:
            raise ValueError(f"config.json: {', '.join(wrong)} must be given as integers of at least 1")
        if source.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act {source['hidden_act']!r} is not supported, only 'silu'")
        heads, layers = source["num_attention_heads"], source["num_hidden_layers"]
        kv_heads = source.get("num_key_value_heads") or {"llama": heads, "mistral": 8}.get(model_type, 32)
        head_dim = source.get("head_dim") or (128 if model_type == "qwen3" else source["hidden_size"] // heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        bias = bool(source.get("attention_bias", False)) and model_type in ("llama", "qwen3")
        return cls(
            model_type=model_type,
            **{key: source[key] for key in required},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(source.get("rms_norm_eps", 1e-6)),
            rope=_rope_parameters(source),
            tie_word_embeddings=bool(source.get("tie_word_embeddings", False)),
            qkv_bias=bias or model_type == "qwen2",
            o_bias=bias,
            mlp_bias=bool(source.get("mlp_bias", False)) and model_type == "llama",
            windows=_windows(source, model_type, layers),
            scalar_head=scalar,
            source=source,
        )

    def to_hf(self) -> dict:
        """The config.json it came from, without `auto_map`: what minitrl writes asks nobody to run code."""
        description = {key: value for key, value in self.source.items() if key != "auto_map"}
        architecture = ARCHITECTURES[self.model_type]
        if self.scalar_head:
            architecture = architecture.replace("CausalLM", "SequenceClassification")
            description |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return description | {"architectures": [architecture]}


def _rope_parameters(source: dict) -> dict:
    """RoPE's parameters in transformers 5's spelling, `rope_type` and `rope_theta` always present."""
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: RoPE's parameters must be an object, not {type(rope).__name__}")
    rope = dict(rope)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or source.get("rope_theta") or 10000.0
    if rope["rope_type"] not in ROPE_TYPES:
        # dynamic and longrope change the angles with the length: keys in a cache would not be those of the full forward
        known = ", ".join(ROPE_TYPES)
        raise ValueError(f"config.json: rope_type {rope['rope_type']!r} is not supported; known are {known}")
    if rope.get("partial_rotary_factor", source.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not supported, all of a head is rotated")
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", source["max_position_embeddings"])
        if "original_max_position_embeddings" in source:  # beside the parameters, as some checkpoints have it, it wins
            rope["original_max_position_embeddings"] = source["original_max_position_embeddings"]
    needed = {"linear": "factor", "llama3": "factor low_freq_factor high_freq_factor"}.get(rope["rope_type"], "")
    optional = "factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale mscale_all_dim"
    for key in ("rope_theta", *needed.split(), *filter(rope.get, optional.split())):
        value = rope.get(key)
        if type(value) not in (int, float) or not value > 0:
            raise ValueError(f"config.json: rope_type {rope['rope_type']!r} needs a positive {key}, not {value!r}")
    rope["rope_theta"] = float(rope["rope_theta"])
    return rope


def _windows(source: dict, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, by the model's own rule (transformers: configuration_{mistral,qwen2}.py)."""
    if model_type == "mistral":
        return (source.get("sliding_window", 4096),) * layers
    if model_type == "llama" or not source.get("use_sliding_window", False):
        return (None,) * layers
    window, first = source.get("sliding_window", 4096), source.get("max_window_layers", 28)
    sliding = [i >= first for i in range(layers)]
    if source.get("layer_types"):
        if len(source["layer_types"]) != layers:
            raise ValueError(f"config.json: layer_types has {len(source['layer_types'])} entries for {layers} layers")
        sliding = [kind == "sliding_attention" for kind in source["layer_types"]]
    return tuple(window if slides else None for slides in sliding)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(E / 2,) float32 angles per position, and the factor on cos and sin (transformers: modeling_rope_utils.py)."""
    rope, size = config.rope, config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies, 1.0
    factor = rope.get("factor")
    if kind == "linear":  # positions interpolated, arXiv 2306.15595
        return frequencies / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":  # long waves interpolated, short ones kept, a linear blend between
        turns = original * frequencies / (2 * math.pi)  # how often a frequency turns within the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequencies / factor, frequencies, blend), 1.0
    # yarn, arXiv 2309.00071: the blend is linear in the dimension, from that which turns beta_fast to beta_slow times
    factor = factor or config.max_position_embeddings / original

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return torch.lerp(frequencies, frequencies / factor, ramp), float(attention_factor)


def context_length(config: ModelConfig) -> int:
    """Positions a model can tell apart: max_position_embeddings, or what RoPE scaling makes of the original ones."""
    original = config.rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return max(config.max_position_embeddings, int(original * (config.rope.get("factor") or 1)))


class Linear(nn.Linear):
    """nn.Linear by way of `linear`, and the place for an adapter (lora.py).

    tensor: the processes that hold the weight's columns together; the product's rows are then divided among them.
    """

    def __init__(self, *sizes: int, bias: bool, tensor: World = ALONE):
        super().__init__(*sizes, bias=bias)
        self.adapter, self.deterministic, self.tensor = None, False, tensor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.tensor.size == 1:
            return linear(x, self.weight, self.bias, self.on_top(x, residual), self.deterministic)
        y = scatter(linear(x, self.weight), self.tensor)
        y = y if self.bias is None else y + self.bias
        return y if residual is None else y + residual

    def on_top(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        """What is added to the product: the residual, and what the adapter makes of x."""
        adapted = None if self.adapter is None else self.adapter(x)
        return residual if adapted is None else adapted if residual is None else residual + adapted


class Normalise(torch.autograd.Function):
    """y = n weight, n = x / rms(x), for training on a CPU.

    It takes two thirds of the time of PyTorch's own there, and keeps x alone, not two float32 copies of it as well:

        dweight = sum over rows of dy n        dx = (dy weight - n mean(dy weight n)) / rms(x)
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        n, wide_weight = x * inverse, weight.to(inverse.dtype)
        product = dy * n
        mean = (product @ wide_weight)[..., None] / len(weight)
        dx = (dy * wide_weight).addcmul_(n, mean, value=-1).mul_(inverse)
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps, self.deterministic = nn.Parameter(torch.ones(size)), eps, False

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and (torch.is_grad_enabled() or self.deterministic):
            return Normalise.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864), rotating halves (a, b) to (a cos - b sin, b cos + a sin) as Llama checkpoints expect.

    cos, sin: (N, 1, E), [cos, cos] and [-sin, sin] of the angles.
    """
    return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1) * sin)


class Block(nn.Module):
    """One decoder layer: attention and gated MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, tensor: World = ALONE):
        super().__init__()
        self.tensor = tensor
        width, size, ffn = config.hidden_size, config.head_dim, config.intermediate_size // tensor.size
        self.heads, self.kv_heads = config.num_attention_heads // tensor.size, config.num_key_value_heads // tensor.size
        self.head_dim = size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.qkv_proj = Linear(width, (self.heads + 2 * self.kv_heads) * size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.o_proj = Linear(self.heads * size, width, bias=config.o_bias, tensor=tensor)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.gate_up_proj = Linear(width, 2 * ffn, bias=config.mlp_bias)
        self.down_proj = Linear(ffn, width, bias=config.mlp_bias, tensor=tensor)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend) -> Tensor:
        heads = [self.heads, self.kv_heads]
        y = gather(self.input_layernorm(x), len(cos), self.tensor)
        qkv = self.qkv_proj(y).unflatten(-1, (-1, self.head_dim))  # (N, H + 2 K, E)
        qk, v = qkv.split([sum(heads), self.kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split(heads, dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        q, k = rotate(qk, cos, sin).split(heads, dim=1)
        x = self.o_proj(attend(layer, q, k, v).flatten(1), x)
        y, up = gather(self.post_attention_layernorm(x), len(cos), self.tensor), self.gate_up_proj
        return self.down_proj(swiglu(y, up.weight, up.bias, up.on_top(y), up.deterministic), x)


class Model(nn.Module):
    """The decoder, or this process's slice of it. `checkpoint.load` makes it under `torch.device("meta")` and fills it.

    tensor: the processes that have a slice each. They call the same methods with the same arguments, and get the same.
    Raises ValueError for a model that cannot be sliced so.
    """

    def __init__(self, config: ModelConfig, tensor: World = ALONE):
        super().__init__()
        _check_slices(config, tensor.size, tensor.option)
        self.config, self.tensor = config, tensor
        self.deterministic = False  # `make_deterministic` sets it
        self.gradient_checkpointing = False  # keep each layer's input only, and compute the layer again backward
        self.adapters = None  # what lora.py's adapters have in common, where there are any
        self.bounds = cuts(config.vocab_size, tensor.size)[tensor.rank : tensor.rank + 2]  # of the vocabulary's part
        vocabulary = self.bounds[1] - self.bounds[0]
        self.embed_tokens = nn.Embedding(vocabulary, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, tensor) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        width, untied = config.hidden_size, not (config.tie_word_embeddings or config.scalar_head)
        self.lm_head = Linear(width, vocabulary, bias=False) if untied else None
        self.score = Linear(width, 1, bias=False) if config.scalar_head else None
        with torch.device("cpu"):
            self.frequencies, self.rope_factor = rope_frequencies(config)  # no buffer: float32 whatever the model is

    def shares(self) -> set[str]:
        """The parameters that all processes of `tensor` hold whole, and of whose gradient each has a share to be added.

        They are used on a part of the rows, or of the heads. (A scalar head is whole too, and so is its gradient.)
        """
        ends = ("norm.weight", "o_proj.bias", "down_proj.bias")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding's own where the checkpoint ties them; of a sliced model its own tokens' rows."""
        assert self.score is None, "a model with a scalar head predicts no tokens"
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def make_deterministic(self) -> None:
        """From now on a token's numbers are the same to the bit whatever is computed beside it, and however.

        Raises ValueError for adapters, whose products are not made for it, and for a slice of a model.
        """
        if self.tensor.size > 1:
            raise ValueError(f"--deterministic: a model cut by {self.tensor.option} has no such mode; leave one out")
        if self.adapters is not None:
            raise ValueError("deterministic: a model with LoRA adapters has no such mode; train all of it")
        for module in self.modules():
            module.deterministic = True

    def hidden(self, tokens_N: Tensor, positions_N: Tensor, attend) -> Tensor:
        """(N, D) hidden states after the last norm. attend(layer, q (N, H, E), k and v (N, K, E)) -> (N, H, E)."""
        x = self._embedded(tokens_N)
        angles = positions_N[:, None, None].float() * self.frequencies.to(positions_N.device)  # (N, 1, E / 2)
        cos, sin = (angles.cos() * self.rope_factor).to(x.dtype), (angles.sin() * self.rope_factor).to(x.dtype)
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        for layer, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layer, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, layer, attend)
        return collect(self.norm(x), len(tokens_N), self.tensor)

    def _embedded(self, tokens_N: Tensor) -> Tensor:
        """(N, D), or this process's part of the rows."""
        if self.tensor.size == 1:
            return self.embed_tokens(tokens_N)
        mine = (tokens_N >= self.bounds[0]) & (tokens_N < self.bounds[1])
        rows = self.embed_tokens(torch.where(mine, tokens_N - self.bounds[0], 0))
        return scatter(rows * mine[:, None], self.tensor)

    @property
    def _head(self) -> dict:
        """What token_logprob has to know about the vocabulary."""
        shared = self.tensor.size > 1
        return {"vocabulary": self.config.vocab_size, "group": self.tensor.group} if shared else {}

    def forward(self, pack: Pack) -> Tensor:
        """(T, D) hidden states of a pack; completions read their shared prompt."""
        if self.adapters is not None:
            self.adapters.prepare(pack)

        def attend(layer, q, k, v):
            options = {"window": self.config.windows[layer], "deterministic": self.deterministic}
            layout = {"lengths": pack.lengths, "prefixes": pack.prefixes}
            return attention(q, k, v, pack.cu_seqlens, pack.prefixes_B, **layout, **options)

        return self.hidden(pack.tokens_T, pack.positions_T, attend)

    def logprobs(self, pack: Pack, scored_T: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy, float32 (T,), of the tokens where `scored_T` (bool) is set; 0 elsewhere.

        Only the states that predict those are projected to the vocabulary.
        """
        scored = scored_T.nonzero()[:, 0]
        hidden = self.forward(pack).index_select(0, pack.predictors_T[scored])
        options = {"temperature": temperature, "deterministic": self.deterministic} | self._head
        scores = token_logprob(hidden, self.head_weight, pack.tokens_T[scored], **options)
        return tuple(x.new_zeros(len(scored_T)).index_copy(0, scored, x) for x in scores)

    def logprob_sum(self, pack: Pack, weights_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sum of weights_T times log-prob, and detached (T,): log-prob, entropy, whether the token is the likeliest).

        For losses whose weights are known before the forward pass: cheaper than `logprobs`. Only tokens whose weight is
        not 0 are looked at; those without a predictor must have weight 0.
        """
        scored = weights_T.nonzero()[:, 0]
        hidden = self.forward(pack).index_select(0, pack.predictors_T[scored])
        given = hidden, self.head_weight, pack.tokens_T[scored], weights_T[scored]
        total, *found = token_logprob_sum(*given, **self._head)
        return total, *(x.new_zeros(len(weights_T)).index_copy(0, scored, x) for x in found)

    def values(self, pack: Pack) -> Tensor:
        """(T,) float32, what the scalar head says at each token: a reward model's score at the last, a critic's at all.

        transformers' XForSequenceClassification has the same number as its logit.
        """
        assert self.score is not None, "a model with a vocabulary head has no values; load it with scalar_head=True"
        wide = torch.promote_types(self.score.weight.dtype, torch.float32)
        return (self.forward(pack).to(wide) @ self.score.weight.to(wide).T)[:, 0].clone()  # FSDP2 warns of a view

    def logits(self, sequences: list[list[int]]) -> list[Tensor]:
        """Per id list its (length, V) float32 logits: for inspection and tests; training never holds them."""
        packed = pack(sequences, device=self.embed_tokens.weight.device)
        return list(self.project(self.forward(packed)).split(packed.lengths))

    def project(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) float32 logits, the same on all processes that have a slice: for sampling."""
        part = logits(hidden_ND, self.head_weight, self.deterministic)
        if self.tensor.size == 1:
            return part
        sizes = [stop - start for start, stop in pairwise(cuts(self.config.vocab_size, self.tensor.size))]
        padded = F.pad(part.T, (0, 0, 0, max(sizes) - part.shape[1]))
        parts = collect(padded, max(sizes) * len(sizes), self.tensor).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes)]).T


def _check_slices(config: ModelConfig, parts: int, option: str) -> None:
    """ValueError where a model cannot be cut into so many slices."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % parts:
            raise ValueError(f"{option} {parts}: does not divide the model's {name}, {size}; choose one that does")
    bounds = cuts(config.vocab_size, parts)
    if min(stop - start for start, stop in pairwise(bounds)) < 1:
        raise ValueError(f"{option} {parts}: the model's vocab_size, {config.vocab_size}, is too small to be cut into "
                         f"so many parts of {SPLIT} tokens or more; choose fewer")  # fmt: skip


def with_scalar_head(model: Model, seed: int) -> Model:
    """Give a language model a fresh scalar head in place of its own."""
    weight, model.lm_head = model.head_weight, None
    model.config = replace(model.config, scalar_head=True)
    model.score = Linear(model.config.hidden_size, 1, bias=False).to(weight)
    fill_scalar_head(model, seed)
    return model


@torch.no_grad()
def fill_scalar_head(model: Model, seed: int) -> None:
    """What the fresh head is follows from the seed alone; where FSDP2 divides it, its one row is the first rank's."""
    weight = local(model.score.weight)
    draw = torch.Generator().manual_seed(seed)  # in float32 on the CPU, so that it is the same everywhere
    weight.copy_(0.02 * torch.randn(1, weight.shape[1], generator=draw)[: len(weight)])
