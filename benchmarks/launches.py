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
    """X W^T and dY W, of which a row belongs to a token."""
    from minitrl.kernels.matmul import matmul as op

    x, weight = torch.randn(rows, 256, dtype=dtype, requires_grad=True), torch.randn(512, 256, dtype=dtype)
    out = op(x, weight.t())
    out.backward(torch.ones_like(out))


def matmul_weight(dtype, rows):
    """dY^T X, a sum over tokens: in another batch it is another sum, and may take another binary."""
    from minitrl.kernels.matmul import matmul as op

    op(torch.randn(64, 512, dtype=dtype).t(), torch.randn(64, 256, dtype=dtype))


def decode(size: int, deterministic: bool = False) -> Callable:
    from minitrl.kernels.decode import decode as op

    def run(dtype, rows):
        q = torch.randn(rows, 8, size, dtype=dtype)
        k_pages, v_pages = torch.randn(2, 40, 2, 16, size, dtype=dtype)  # 40 pages of 16 tokens
        table, lengths = torch.arange(40, dtype=torch.int32).expand(rows, -1), torch.full((rows,), 600)
        op(q, k_pages, v_pages, table, lengths, deterministic=deterministic)

    return run


def grpo_loss(**options) -> Callable:
    from minitrl.kernels.grpo_loss import grpo_loss as op

    def run(dtype, rows):
        logprobs, entropy = (torch.randn(rows, requires_grad=True) for _ in range(2))
        old, reference, advantages = torch.randn(3, rows).unbind()
        mask, segments = torch.ones(rows, dtype=torch.bool), torch.arange(rows) // 20
        given = {"ref_logprobs_T": reference, "entropy_T": entropy, "segments_T": segments}
        op(logprobs, old, advantages, mask, **given, **options)[0].backward()

    return run


def cases() -> dict[str, Callable[[torch.dtype, int], None]]:
    """What is called by its name: a function of a dtype and the number of tokens (for decoding: of sequences)."""
    by_sequence = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    return {
        **{f"attention {size}": attention(size) for size in (64, 128, 256)},
        "attention 64 window": attention(64, 20),
        **{f"decode {size}": decode(size) for size in (64, 128, 256)},
        "decode 64 as attention": decode(64, deterministic=True),
        "token_logprob": token_logprob(1024),
        "token_logprob narrow": token_logprob(256),
        "token_logprob known": token_logprob(1024, known=True),
        "logits_logprob": logits_logprob,
        "matmul": matmul,
        "matmul dW": matmul_weight,
        "grpo_loss": grpo_loss(),
        "grpo_loss all": grpo_loss(beta=0.1, entropy_coef=0.1, entropy_threshold=0.5, delta=2.0),
        "grpo_loss by length": grpo_loss(loss_type="grpo"),
        "grpo_loss sequence ratios": grpo_loss(**by_sequence, beta=0.1, entropy_coef=0.1),
        "grpo_loss cispo": grpo_loss(**by_sequence | {"loss_type": "cispo"}, beta=0.1, entropy_threshold=0.5),
    }
