"""Every op, called as a trainer calls it, forward and backward, on inputs so small that a CPU can make them.

What launches no kernel itself can still watch the launches: the compile report, which compiles them instead.
"""

from collections.abc import Callable

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARY = 1040  # two splits, and 16 divides it as it divides most real ones


def attention(size: int, window: int | None = None) -> Callable:
    from minitrl.kernels.attention import attention as op

    def run(dtype, rows):
        heads, lengths = 8, [rows - rows // 2, rows // 2] if rows > 1 else [rows]
        q, k, v = (torch.randn(rows, n, size, dtype=dtype, requires_grad=True) for n in (heads, 2, 2))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        prefixes = torch.tensor([-1, 0][: len(lengths)], dtype=torch.int32)  # the second continues the first
        out = op(q, k, v, cu_seqlens, prefixes, window=window)
        out.backward(torch.ones_like(out))

    return run


def token_logprob(width: int, known: bool = False) -> Callable:
    """known: the loss is, before the forward pass."""
    from minitrl.kernels import token_logprob as ops

    def run(dtype, rows):
        hidden, weight = (torch.randn(n, width, dtype=dtype, requires_grad=True) for n in (rows, VOCABULARY))
        targets, ones = torch.arange(rows), torch.ones(rows)
        if known:
            ops.token_logprob_sum(hidden, weight, targets, ones, entropy_weights_T=ones)[0].backward()
        else:
            torch.autograd.backward(ops.token_logprob(hidden, weight, targets), [ones, ones])

    return run


def logits_logprob(dtype, rows):
    from minitrl.kernels.token_logprob import logits_logprob as op

    logits, ones = torch.randn(rows, VOCABULARY, dtype=dtype, requires_grad=True), torch.ones(rows)
    torch.autograd.backward(op(logits, torch.arange(rows)), [ones, ones])


def matmul(dtype, rows):
    from minitrl.kernels.matmul import matmul as op

    x, weight = (torch.randn(n, 256, dtype=dtype, requires_grad=True) for n in (rows, 512))
    out = op(x, weight.t())
    out.backward(torch.ones_like(out))


def cases() -> dict[str, Callable[[torch.dtype, int], None]]:
    """What is called by its name: a function of a dtype and the number of tokens (for decoding: of sequences)."""
    return {
        **{f"attention {size}": attention(size) for size in (64, 128, 256)},
        "attention 64 window": attention(64, 20),
        "token_logprob": token_logprob(1024),
        "token_logprob narrow": token_logprob(256),
        "token_logprob known": token_logprob(1024, known=True),
        "logits_logprob": logits_logprob,
        "matmul": matmul,
    }
