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


def cases() -> dict[str, Callable[[torch.dtype, int], None]]:
    """What is called by its name: a function of a dtype and the number of tokens (for decoding: of sequences)."""
    return {f"attention {size}": attention(size) for size in (64, 128, 256)} | {
        "attention 64 window": attention(64, 20)
    }
