"""Count the bytes that our kernels and the peers' move at the same shapes. Exact, and no GPU is needed.

    python -m benchmarks.kernel_bytes                  # prints the table, writes benchmarks/results/kernel_bytes.json
    python -m benchmarks.kernel_bytes --only attention

The kernels run under the interpreter of tests/interpreter.py, with the tiles of the target given (sm_90).

requested   what the programs ask the L2 cache for, summed over all lanes that are not masked
touched     distinct bytes of each argument among these: what crosses DRAM if nothing is fetched twice
least       what any kernel must move for the same result: its inputs in, its outputs out, once, by formula
workspace   touched bytes that are neither input nor output of the op: partial sums, lists of tiles
kv          touched bytes of keys and values, in the JSON
FLOPs       of tl.dot, those of masked lanes included

Touched is compared with least without the workspace. Peers are measured if they are installed: pip install -e
'.[peers]'.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

from minitrl.kernels import targets

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
RESULT = ROOT / "benchmarks" / "results" / "kernel_bytes.json"
BF16 = torch.bfloat16


def measure(shape: str, run: Callable, least: dict, workspace: dict, target: str, whose: str = "minitrl") -> list[dict]:
    """A row for each kernel that `run` launches. least: by kernel, bytes. workspace: by kernel, its arguments' names."""
    from interpreter import interpreted

    with interpreted(target=target, strict=whose == "minitrl") as log:
        run()
    assert set(log.names()) == set(least), (log.names(), list(least))
    rows = []
    for kernel in log.names():
        launch = log[kernel]
        unknown = set(workspace.get(kernel, ())) - set(launch.arguments)
        assert not unknown, f"{kernel} has no arguments {unknown}"
        extra = sum(launch.arguments[name].touched for name in workspace.get(kernel, ()))
        row = {"whose": whose, "kernel": kernel, "shape": shape, "requested": launch.requested}
        row |= {"touched": launch.touched - extra, "least": least[kernel], "workspace": extra}
        kv = sum(count.touched for name, count in launch.arguments.items() if name in ("k", "v"))
        rows.append(row | {"kv": kv, "flops": launch.flops, "programs": launch.programs})
    return rows


# --- hidden states or logits -> log-prob -----------------------------------------------------------------------------


def token_logprob(target: str, T=512, V=4096, D=512) -> list[dict]:
    """Forward and backward. The two products of the backward pass are a library's: matmul.py stands in for it."""
    from minitrl.kernels.matmul import matmul
    from minitrl.kernels.token_logprob import token_logprob as op

    torch.manual_seed(0)
    hidden, weight = torch.randn(T, D).to(BF16).requires_grad_(), torch.randn(V, D).to(BF16).requires_grad_()
    y, ones, both = torch.randint(0, V, (T,)), torch.ones(T), 2 * (T + V) * D
    dz, shape = torch.randn(T, V).to(BF16), f"T {T}, V {V}, D {D}, bfloat16"
    least = {
        "token_logprob_fwd_kernel": both + 8 * T,
        "token_logprob_fold_kernel": 16 * T,
        "token_logprob_bwd_kernel": both + 8 * T + 20 * T,
    }
    workspace = {
        "token_logprob_fwd_kernel": ["partials", "chosen"],
        "token_logprob_fold_kernel": ["partials", "chosen"],
        "token_logprob_bwd_kernel": ["dz"],
    }
    run = lambda: torch.autograd.backward(op(hidden, weight, y), [ones, ones])
    rows = measure(shape, run, least, workspace, target)
    with torch.no_grad():
        products = {"dX": (dz, weight), "dW": (dz.t(), hidden)}
        for name, (a, b) in products.items():
            moved = {"matmul_kernel": a.nbytes + b.nbytes + 2 * a.shape[0] * b.shape[1]}
            rows += measure(f"{name}, {shape}", lambda a=a, b=b: matmul(a, b), moved, {}, target)
    if find_spec("cut_cross_entropy"):
        rows += cut_cross_entropy(hidden, weight, y, shape, target)
    return rows


def cut_cross_entropy(hidden, weight, y, shape, target) -> list[dict]:
    """Its kernels as they ship, unfiltered: what the filter drops, the gradient lacks."""
    import triton.language as tl
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel
    from cut_cross_entropy.indexed_dot import indexed_neg_dot_forward_kernel
    from triton.language.extra import libdevice

    (T, D), V = hidden.shape, len(weight)
    least = {
        "_cce_lse_forward_kernel": 2 * (T + V) * D + 4 * T,
        "_indexed_neg_dot_forward_kernel": 2 * T * D + 2 * len(y.unique()) * D + 8 * T + 4 * T,
        "_cce_backward_kernel": 4 * (T + V) * D + 8 * T + 4 * T + 4,
    }

    def run():
        with mock.patch.object(libdevice, "log1p", lambda x: tl.log(1.0 + x)):
            lse = cce_lse_forward_kernel(hidden.detach(), weight)
            indexed_neg_dot_forward_kernel(hidden.detach(), weight.detach(), y, out_dtype=torch.float32)
            cce_backward_kernel(torch.ones(1), hidden.detach(), weight, lse, None, None, None, y)

    locks = {"_cce_lse_forward_kernel": ["Locks"], "_cce_backward_kernel": ["dELocks", "dCLocks"]}
    return measure(shape, run, least, locks, target, "cut-cross-entropy")


def logits_logprob(target: str, T=32, live=23, V=32_000) -> list[dict]:
    """Logits at hand; all tokens scored, and some."""
    from minitrl.kernels.token_logprob import IGNORE
    from minitrl.kernels.token_logprob import logits_logprob as op

    torch.manual_seed(0)
    rows = []
    for scored in (T, live):
        logits, y, ones = torch.randn(T, V).to(BF16).requires_grad_(), torch.randint(0, V, (T,)), torch.ones(T)
        y[scored:] = IGNORE
        read, shape = 2 * scored * V, f"T {T}, of which {scored} scored, V {V}, bfloat16"
        least = {
            "logits_logprob_fwd_kernel": read + 8 * T + 16 * T,
            "logits_logprob_bwd_kernel": read + 2 * T * V + 8 * T + 20 * scored,
        }
        rows += measure(shape, lambda: torch.autograd.backward(op(logits, y), [ones, ones]), least, {}, target)
        if find_spec("liger_kernel"):
            rows += liger(logits.detach(), y, scored, shape, target)
    return rows


def liger(logits, y, scored: int, shape: str, target: str) -> list[dict]:
    """Its cross-entropy if all tokens are scored, else its GRPO loss, both on logits. Neither has the entropy."""
    (T, V), read = logits.shape, 2 * scored * logits.shape[1]
    if scored == T:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        def run():
            LigerCrossEntropyFunction.apply(logits.clone().requires_grad_(), y, None, -100, 0.0, 0.0, "sum")

        least = {"liger_cross_entropy_kernel": 2 * read + 8 * T + 2 * T}
    else:
        from liger_kernel.ops.grpo_loss import GrpoLossFunction

        whole = torch.cat([logits, logits[:1]])[None].clone().requires_grad_()  # (1, T + 1, V), as it wants them
        ids, mask = y.clamp(min=0)[None].contiguous(), (torch.arange(T) < scored).int()[None]

        def run():
            old, advantages = torch.full((1, T), -10.0), torch.ones(1)
            loss, *_ = GrpoLossFunction.apply(whole, old, None, ids, advantages, mask, 1.0, 0.0, 0.2, 0.2, False)
            loss.backward()

        least = {"_grpo_loss_fwd_kernel": read, "_grpo_loss_bwd_kernel": read + 2 * T * V}
    return measure(shape, run, least, {}, target, "liger-kernel")


# --- attention -------------------------------------------------------------------------------------------------------


def packed(lengths: list[int], prefixes: list[int], H: int, K: int, E: int):
    T = sum(lengths)
    q, k, v = (torch.randn(T, n, E).to(BF16).requires_grad_() for n in (H, K, K))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int(), torch.tensor(prefixes, dtype=torch.int32)


def attend(target: str, shape: str, lengths, prefixes, H: int, K: int, E: int) -> list[dict]:
    from minitrl.kernels.attention import attention as op

    torch.manual_seed(0)
    inputs, T = packed(lengths, prefixes, H, K, E), sum(lengths)

    def run():
        out = op(*inputs)
        out.backward(torch.ones_like(out))

    least = {
        "attention_fwd_kernel": 2 * T * (2 * H + 2 * K) * E + 4 * T * H,
        "attention_dq_kernel": 2 * T * (4 * H + 2 * K) * E + 8 * T * H,
        "attention_dkv_kernel": 2 * T * (2 * H + 4 * K) * E + 8 * T * H,
    }
    lists = {kernel: ["tiles"] for kernel in least} | {"attention_dkv_kernel": ["tiles", "runs"]}
    return measure(shape, run, least, lists, target)


def attention(target: str) -> list[dict]:
    lengths = [700, 300, 129, 64, 14, 1]  # 1208 tokens
    return attend(target, "T 1208 in 6, heads 9/3 x 64, bfloat16", lengths, [-1] * 6, 9, 3, 64)


def shared_prefix(target: str, prompt=1024, answer=256, group=8, H=2, K=1, E=64) -> list[dict]:
    """A group of completions behind one prompt, and each behind a copy of it."""
    what = f"{group} answers of {answer} to a prompt of {prompt}, heads {H}/{K} x {E}, bfloat16"
    one = attend(target, f"{what}, shared", [prompt, *[answer] * group], [-1, *[0] * group], H, K, E)
    many = attend(target, f"{what}, repeated", [prompt + answer] * group, [-1] * group, H, K, E)
    return one + many


def decode(target: str, prompt=1024, answer=256, group=8, H=9, K=3, E=64, page=16) -> list[dict]:
    """A group's rows read the prompt's pages, then each its own."""
    from minitrl.kernels.decode import decode as op

    torch.manual_seed(0)
    first, own = prompt // page, answer // page
    k_pages, v_pages = torch.randn(2, first + group * own, K, page, E).to(BF16)
    mine = first + torch.arange(group * own).view(group, own)
    table = torch.cat([torch.arange(first).expand(group, -1), mine], 1).int()
    lengths, q = torch.full((group,), prompt + answer), torch.randn(group, H, E).to(BF16)
    least = {
        "decode_split_kernel": 2 * 2 * len(k_pages) * page * K * E + q.nbytes + table.nbytes + lengths.nbytes,
        "decode_fold_kernel": q.nbytes + lengths.nbytes,
    }
    parts = ["best", "total"]
    workspace = {
        "decode_split_kernel": [*parts, "out", "order", "rank"],
        "decode_fold_kernel": [*parts, "parts"],
    }
    shape = f"{group} rows of {prompt} shared and {answer} own, heads {H}/{K} x {E}, pages of {page}, bfloat16"
    return measure(shape, lambda: op(q, k_pages, v_pages, table, lengths), least, workspace, target)


# --- the loss --------------------------------------------------------------------------------------------------------


def grpo_loss(target: str, T=8192) -> list[dict]:
    from minitrl.kernels.grpo_loss import grpo_loss as op

    torch.manual_seed(0)
    logprobs, entropy = torch.randn(T).requires_grad_(), torch.rand(T).requires_grad_()
    old, reference, advantages = torch.randn(3, T).unbind()
    mask, segments = torch.ones(T, dtype=torch.bool), torch.arange(T) // 512
    variants = {
        "dapo": ({}, 13 + 4),
        "grpo, sequence ratios, beta, entropy": (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "entropy_coef": 0.1},
            13 + 8 + 8 + 4,
        ),
    }
    rows = []
    for name, (options, bytes_each) in variants.items():
        given = {"ref_logprobs_T": reference, "entropy_T": entropy, "segments_T": segments}
        least = {"grpo_loss_tiles_kernel": bytes_each * T, "grpo_loss_sums_kernel": 28}
        workspace = {"grpo_loss_tiles_kernel": ["sums"], "grpo_loss_sums_kernel": ["sums"]}
        run = lambda: op(logprobs, old, advantages, mask, **given, **options)[0].backward()
        rows += measure(f"T {T}, {name}", run, least, workspace, target)
    return rows


MEASURED = {
    "token_logprob": token_logprob,
    "token_logprob wide": lambda target: token_logprob(target, D=1024),
    "logits_logprob": logits_logprob,
    "attention": attention,
    "shared_prefix": shared_prefix,
    "decode": decode,
    "grpo_loss": grpo_loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASURED, nargs="+", default=list(MEASURED), help="nothing is written")
    parser.add_argument("--target", choices=targets.TARGETS, default="sm_90", help="whose tiles")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.only:
        found = MEASURED[name](options.target)
        rows += found
        for row in found:
            print(line(row), flush=True)
    if options.only == list(MEASURED):
        text = json.dumps({"target": options.target, "torch": torch.__version__, "rows": rows})
        RESULT.write_text(text.replace('{"whose"', '\n{"whose"') + "\n", encoding="utf-8")


def line(row: dict) -> str:
    million = {name: f"{row[name] / 1e6:9.3f}" for name in ("requested", "touched", "least", "workspace")}
    more = f"{row['flops'] / 1e9:7.2f} GFLOP  touched / least {row['touched'] / row['least']:.3f}"
    return f"{row['whose']:18}{row['kernel']:33}" + "  ".join(million.values()) + f" MB  {more}  {row['shape']}"


if __name__ == "__main__":
    main()
