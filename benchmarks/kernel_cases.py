"""What benchmarks/kernels.py times: each op on several shapes, by every way there is to compute it, ours first.

A way is a function from inputs to outputs by name. "sum" stands for a sum of log-probs, where a peer gives nothing
else. Ways of peers that are not installed are left out, and so are those that cannot run on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from minitrl.kernels import attention as attention_op
from minitrl.kernels import decode as decode_op
from minitrl.kernels import grpo_loss as grpo_loss_op
from minitrl.kernels import matmul as matmul_op
from minitrl.kernels import token_logprob as token_logprob_op


@dataclass
class Case:
    """One op at one shape."""

    op: str
    shape: str
    size: int  # what a plot has on its x axis: tokens, rows or sequences
    make: Callable[[torch.Generator], dict[str, Tensor]]  # float inputs are cast to the dtype, unless named in float32
    ways: dict[str, Callable[[dict], dict[str, Tensor]]]
    leaves: tuple[str, ...] = ()  # the inputs that get a gradient
    float32: tuple[str, ...] = ()
    bytes: Callable[[int], dict[str, int]] = field(default=dict)  # element size -> the least traffic of each part
    flops: dict[str, int] = field(default_factory=dict)
    chunks: int = 1  # the truth is computed in so many pieces along the first axis of `pieces`
    pieces: tuple[str, ...] = ()


def installed(*names: str) -> bool:
    return all(find_spec(name) for name in names)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def compiled(way: Callable) -> Callable:
    """The way by torch.compile, compiled when it first runs, for its shape alone."""
    return torch.compile(way, dynamic=False)


# --- hidden states or logits -> log-prob and entropy ----------------------------------------------------------------


def token_logprob(T: int, V: int, D: int) -> Case:
    def make(g):
        hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g) / D**0.5
        return {"hidden": hidden, "weight": 3 * weight, "targets": torch.randint(0, V, (T,), generator=g)}

    def ours(x):
        return outputs(token_logprob_op.token_logprob(x["hidden"], x["weight"], x["targets"]))

    def known(x):
        ones = torch.ones(len(x["hidden"]), device=x["hidden"].device)
        return {"sum": token_logprob_op.token_logprob_sum(x["hidden"], x["weight"], x["targets"], ones)[0]}

    def reference(x):
        return outputs(token_logprob_op.token_logprob_reference(x["hidden"], x["weight"], x["targets"]))

    def torch_linear_cross_entropy(x):
        loss = torch.nn.functional.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], reduction="none")
        return {"logprobs": -loss}

    def liger(x):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return {"sum": -LigerFusedLinearCrossEntropyLoss(reduction="sum")(x["weight"], x["hidden"], x["targets"])}

    def cut_cross_entropy(x):
        from cut_cross_entropy import linear_cross_entropy

        return {"logprobs": -linear_cross_entropy(x["hidden"], x["weight"], x["targets"], reduction="none")}

    ways = {"minitrl": ours, "minitrl, loss known": known, "PyTorch": reference, "torch.compile": compiled(reference)}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        ways["F.linear_cross_entropy"] = torch_linear_cross_entropy
    if on_gpu() and installed("liger_kernel"):
        ways["liger-kernel"] = liger
    if on_gpu() and installed("cut_cross_entropy"):
        ways["cut-cross-entropy"] = cut_cross_entropy
    product = T * V * D
    return Case(
        "token_logprob",
        f"T {T}, V {V}, D {D}",
        T,
        make,
        ways,
        leaves=("hidden", "weight"),
        bytes=lambda e: {"forward": e * (T + V) * D + 16 * T, "backward": 2 * e * (T + V) * D + 28 * T},
        flops={"forward": 2 * product, "backward": 6 * product},
        chunks=-(-T * V // 2**28),
        pieces=("hidden", "targets"),
    )


def logits_logprob(T: int, V: int) -> Case:
    def make(g):
        return {"logits": 3 * torch.randn(T, V, generator=g), "targets": torch.randint(0, V, (T,), generator=g)}

    def ours(x):
        return outputs(token_logprob_op.logits_logprob(x["logits"], x["targets"]))

    def reference(x):
        return outputs(token_logprob_op.logits_logprob_reference(x["logits"], x["targets"]))

    def liger(x):  # it writes the gradient over its input: a copy first, which is timed
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return {"sum": -LigerCrossEntropyLoss(reduction="sum")(x["logits"].clone(), x["targets"])}

    ways = {"minitrl": ours, "PyTorch": reference, "torch.compile": compiled(reference)}
    if on_gpu() and installed("liger_kernel"):
        ways["liger-kernel"] = liger
    traffic = lambda e: {"forward": e * T * V + 24 * T, "backward": 2 * e * T * V + 28 * T}
    shape = f"T {T}, V {V}"
    pieces = {"chunks": -(-T * V // 2**28), "pieces": ("logits", "targets")}
    return Case("logits_logprob", shape, T, make, ways, leaves=("logits",), bytes=traffic, **pieces)


def outputs(found) -> dict[str, Tensor]:
    """Of (log-probs, entropy), the log-probs carry the gradient, as without an entropy bonus."""
    return {"logprobs": found[0], "entropy": found[1].detach()}


# --- attention -------------------------------------------------------------------------------------------------------


def attention(name: str, lengths: list[int], prefixes: list[int], H: int, K: int, E: int) -> Case:
    T, longest = sum(lengths), max(lengths)

    def make(g):
        heads = {"q": H, "k": K, "v": K}
        return {name: torch.randn(T, n, E, generator=g) for name, n in heads.items()} | {
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "prefixes": torch.tensor(prefixes, dtype=torch.int32),
        }

    host = {"lengths": tuple(lengths), "prefixes": tuple(prefixes)}

    def ours(x):
        return {"out": attention_op.attention(x["q"], x["k"], x["v"], x["cu_seqlens"], x["prefixes"], **host)}

    def reference(x):
        return {"out": attention_op.attention_reference(x["q"], x["k"], x["v"], x["cu_seqlens"], x["prefixes"], **host)}

    def torch_varlen(x):
        from torch.nn.attention.varlen import varlen_attn

        ends = x["cu_seqlens"], x["cu_seqlens"], longest, longest
        return {"out": varlen_attn(x["q"], x["k"], x["v"], *ends, window_size=(-1, 0), enable_gqa=H != K)}

    def flash(x):
        from flash_attn import flash_attn_varlen_func

        ends = x["cu_seqlens"], x["cu_seqlens"], longest, longest
        return {"out": flash_attn_varlen_func(x["q"], x["k"], x["v"], *ends, causal=True)}

    def by_sequence(x):
        parts = zip(*(x[name].split(lengths) for name in "qkv"))
        heads = ([part.transpose(0, 1)[None] for part in sequence] for sequence in parts)
        attend = torch.nn.functional.scaled_dot_product_attention
        outs = [attend(*given, is_causal=True, enable_gqa=H != K)[0].transpose(0, 1) for given in heads]
        return {"out": torch.cat(outs)}

    ways = {"minitrl": ours, "PyTorch": reference, "torch.compile": compiled(reference)}
    if not on_gpu() and max(prefixes) < 0:
        ways["SDPA by sequence"] = by_sequence
    if on_gpu() and max(prefixes) < 0:  # no peer shares a prompt
        ways["torch varlen_attn"] = torch_varlen
        if installed("flash_attn"):
            ways["flash-attn"] = flash
    pairs = sum(n * (n + 1) // 2 + (n * lengths[p] if p >= 0 else 0) for n, p in zip(lengths, prefixes))
    traffic = {"forward": T * (2 * H + 2 * K) * E, "backward": T * (4 * H + 4 * K) * E}
    return Case(
        "attention",
        f"{name}, T {T}, heads {H}/{K} x {E}",
        T,
        make,
        ways,
        leaves=("q", "k", "v"),
        bytes=lambda e: {part: e * numbers for part, numbers in traffic.items()},
        flops={"forward": 4 * H * E * pairs, "backward": 10 * H * E * pairs},
    )


def decode(B: int, prompt: int, answer: int, group: int, H: int, K: int, E: int, page: int = 16) -> Case:
    """B rows in groups that share a prompt's pages."""
    first, own, groups = prompt // page, answer // page, B // group
    pages = groups * first + B * own

    def make(g):
        shared = torch.arange(groups * first).view(groups, first).repeat_interleave(group, 0)
        table = torch.cat([shared, groups * first + torch.arange(B * own).view(B, own)], 1).int()
        k_pages, v_pages = torch.randn(2, pages, K, page, E, generator=g)
        lengths = torch.full((B,), prompt + answer)
        return {"q": torch.randn(B, H, E, generator=g), "k": k_pages, "v": v_pages, "table": table, "lengths": lengths}

    def call(op, **options):
        return lambda x: {"out": op(x["q"], x["k"], x["v"], x["table"], x["lengths"], **options)}

    reference = call(decode_op.decode_reference)
    ways = {"minitrl": call(decode_op.decode), "PyTorch": reference, "torch.compile": compiled(reference)}
    if on_gpu():
        ways["minitrl, deterministic"] = call(decode_op.decode, deterministic=True)
    return Case(
        "decode",
        f"{B} rows in groups of {group}, {prompt} shared + {answer}, heads {H}/{K} x {E}",
        B,
        make,
        ways,
        bytes=lambda e: {"forward": e * (2 * pages * K * page * E + 2 * B * H * E)},
        flops={"forward": 4 * H * E * B * (prompt + answer)},
    )


# --- the loss, and the product ----------------------------------------------------------------------------------------


def grpo_loss(T: int, name: str, numbers: int, **options) -> Case:
    """numbers: bytes that a token costs forward."""
    given = {"old": "old_logprobs_T", "reference": "ref_logprobs_T", "entropy": "entropy_T"}
    given |= {"logprobs": "logprobs_T", "advantages": "advantages_T", "mask": "mask_T", "segments": "segments_T"}

    def make(g):
        logprobs = -torch.randn(T, generator=g).exp()
        near = {name: logprobs + 0.3 * torch.randn(T, generator=g) for name in ("old", "reference")}
        others = {"advantages": torch.randn(T, generator=g), "entropy": torch.rand(T, generator=g)}
        counted = {"mask": torch.ones(T, dtype=torch.bool), "segments": torch.arange(T) // 512}
        return {"logprobs": logprobs, **near, **others, **counted}

    def call(op):
        counts = {"tokens": T, "sequences": -(-T // 512)}
        return lambda x: {"loss": op(**{given[name]: value for name, value in x.items()}, **counts, **options)[0]}

    reference = call(grpo_loss_op.grpo_loss_reference)
    ways = {"minitrl": call(grpo_loss_op.grpo_loss), "PyTorch": reference, "torch.compile": compiled(reference)}
    every = ("logprobs", "old", "reference", "advantages", "entropy")
    traffic = lambda e: {"forward": numbers * T, "backward": 8 * T}
    return Case("grpo_loss", f"T {T}, {name}", T, make, ways, leaves=("logprobs",), float32=every, bytes=traffic)


def matmul(M: int, N: int, K: int) -> Case:
    def make(g):
        return {"a": torch.randn(M, K, generator=g), "b": torch.randn(K, N, generator=g) / K**0.5}

    ways = {
        "minitrl": lambda x: {"out": matmul_op.matmul(x["a"], x["b"])},
        "PyTorch": lambda x: {"out": x["a"] @ x["b"]},
    }
    traffic = {"forward": M * K + K * N + M * N, "backward": 2 * (M * K + K * N) + M * N}
    return Case(
        "matmul",
        f"M {M}, N {N}, K {K}",
        M,
        make,
        ways,
        leaves=("a", "b"),
        bytes=lambda e: {part: e * numbers for part, numbers in traffic.items()},
        flops={"forward": 2 * M * N * K, "backward": 4 * M * N * K},
    )


def cases(gpu: bool) -> list[Case]:
    """Those of a GPU, or the few that a CPU does in seconds."""
    ragged = [32 + 432 * i // 15 for i in range(16)]
    by_sequence = {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1}
    if not gpu:
        return [
            *(token_logprob(T, V, 576) for T, V in ((512, 49_152), (128, 151_936))),
            attention("16 of 32 to 464", ragged, [-1] * 16, 9, 3, 64),
            attention("8 of 128 behind 512 shared", [512, *[128] * 8], [-1, *[0] * 8], 9, 3, 64),
            attention("8 of 128 behind 512 repeated", [640] * 8, [-1] * 8, 9, 3, 64),
            decode(64, 256, 64, 8, 9, 3, 64),
            grpo_loss(16_384, "dapo", 17),
            grpo_loss(16_384, "grpo, sequence ratios, beta", 29, **by_sequence),
        ]
    heads = ((9, 3, 64), (32, 8, 128))
    mixed = [4096, 2048, 2048, *[1024] * 4, *[256] * 16]
    return [
        *(token_logprob(T, *sizes) for sizes in ((49_152, 576), (151_936, 2048)) for T in (1024, 4096, 16_384)),
        *(logits_logprob(T, 151_936) for T in (1024, 4096)),
        *(attention(f"{n} of 1024", [1024] * n, [-1] * n, *h) for h in heads for n in (4, 16)),
        *(attention("mixed 256 to 4096", mixed, [-1] * len(mixed), *h) for h in heads),
        *(attention("8 of 256 behind 1024 shared", [1024, *[256] * 8], [-1, *[0] * 8], *h) for h in heads),
        *(attention("8 of 256 behind 1024 repeated", [1280] * 8, [-1] * 8, *h) for h in heads),
        *(decode(B, 1024, 256, 8, *h) for h in heads for B in (8, 64, 256)),
        *(grpo_loss(T, "dapo", 17) for T in (16_384, 1_048_576)),
        *(grpo_loss(T, "grpo, sequence ratios, beta", 29, **by_sequence) for T in (16_384, 1_048_576)),
        *(matmul(M, 2048, 2048) for M in (64, 1024, 8192)),
    ]
