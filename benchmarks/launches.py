"""Every op, called as a trainer calls it, forward and backward, on inputs so small that a CPU can make them.

What launches no kernel itself can still watch the launches: the compile report, which compiles them instead.
"""

from collections.abc import Callable

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


def grpo_loss(**options) -> Callable:
    from minitrl.kernels.grpo_loss import grpo_loss as op

    def run(dtype, rows):
        logprobs, entropy = (torch.rand(rows, dtype=dtype, requires_grad=True) for _ in range(2))
        given = {"ref_logprobs_T": logprobs.detach(), "entropy_T": entropy, "segments_T": torch.arange(rows) // 20}
        mask, counts = torch.ones(rows, dtype=torch.bool), {"tokens": rows, "sequences": 1}
        loss, _ = op(logprobs, logprobs.detach(), torch.ones(rows), mask, **given, **counts, **options)
        loss.backward()

    return run


GRPO_LOSSES = {  # from the leanest form to the fullest
    "": {},
    " everything": dict(beta=0.1, entropy_coef=0.1, entropy_threshold=0.5, delta=2.0),
    " by length": dict(loss_type="grpo"),
    " of sequences": dict(loss_type="grpo", importance_sampling_level="sequence", beta=0.1, entropy_coef=0.1),
    " cispo": dict(loss_type="cispo", importance_sampling_level="sequence", beta=0.1, entropy_threshold=0.5),
}


def cases() -> dict[str, Callable[[torch.dtype, int], None]]:
    """What is called by its name: a function of a dtype and the number of tokens (for decoding: of sequences)."""
    return {f"attention {size}": attention(size) for size in (64, 128, 256)} | {
        "attention 64 window": attention(64, 20),
        **{f"grpo_loss{name}": grpo_loss(**options) for name, options in GRPO_LOSSES.items()},
    }
