"""The Triton kernel of matmul.py: C = A B, each tile of C by one program, its sum over K in one fixed order.

Tiles are those of targets.CONFIGS and never depend on the number of rows, nor does the binary: so a row of C has the
same bits alone and in any batch, on any day. Rows and columns past the end are read as copies of the last one and never
stored, which costs no registers for masks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .targets import config


@triton.jit
def grouped(program, blocks, others, GROUP: tl.constexpr):
    """Which (block, other) a program computes: GROUP blocks with all others, then the next: both stay in L2."""
    group = program // (GROUP * others)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program - group * GROUP * others
    return group * GROUP + inside % size, inside // size


@triton.jit(do_not_specialize=["M", "N", "K"])
def matmul_kernel(
    a, b, c, M, N, K, a_row, a_column, b_row, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """a: (M, K), b: (K, N), with the strides a_row ... b_column, of which one each is 1; c: (M, N) contiguous."""
    block, other = grouped(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    rows, columns = block * ROWS + tl.arange(0, ROWS), other * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    a += tl.minimum(rows, M - 1).to(tl.int64)[:, None] * a_row + depth.to(tl.int64)[None, :] * a_column
    b += tl.minimum(columns, N - 1).to(tl.int64)[None, :] * b_column + depth.to(tl.int64)[:, None] * b_row
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, K, DEPTH):
        inside = first + depth < K
        left = tl.load(a, mask=inside[None, :], other=0.0)
        right = tl.load(b, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        a += DEPTH * tl.cast(a_column, tl.int64)
        b += DEPTH * tl.cast(b_row, tl.int64)
    c += rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(c, total.to(c.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def rows_of(dtype: torch.dtype) -> str:
    """Rows of the table of tiles for float32 have a name of their own: it needs twice the shared memory."""
    return "/float32" if dtype == torch.float32 else ""


def signatures(dtype: torch.dtype, target: str) -> list[tuple]:
    """What the compile report compiles: the product with a weight matrix (O, I), as x W^T."""
    kind = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys("abc", kind) | dict.fromkeys("MNK", "i32") | {"a_row": "i32:16", "b_column": "i32:16"}
    return [(matmul_kernel, f"matmul{rows_of(dtype)}", types, {"a_column": 1, "b_row": 1})]


def strided(x: Tensor) -> tuple[Tensor, int, int]:
    """x, or a copy of it, with strides that do not depend on how many rows there are, and one of which is 1."""
    if x.data_ptr() % 16 or not (x.is_contiguous() or x.t().is_contiguous()):
        x = x.clone(memory_format=torch.contiguous_format)
    return (x, x.shape[1], 1) if x.is_contiguous() else (x, 1, x.shape[0])


@torch.library.custom_op("minitrl::matmul", mutates_args=())
def matmul_op(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """a @ b; in float32 if `wide`, whatever they are."""
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty((M, N), dtype=torch.float32 if wide else a.dtype)
    if c.numel():
        tiles = config(f"matmul{rows_of(a.dtype)}")
        a, *a_strides = strided(a)
        b, *b_strides = strided(b)
        grid = (triton.cdiv(M, tiles["ROWS"]) * triton.cdiv(N, tiles["COLUMNS"]),)
        matmul_kernel[grid](a, b, c, M, N, K, *a_strides, *b_strides, **tiles)
    return c


@matmul_op.register_fake
def _(a, b, wide):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32 if wide else a.dtype)


def _save(ctx, inputs, output):
    a, b, ctx.wide = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx, dc):
    a, b = ctx.saved_tensors
    dc = dc.to(a.dtype)
    da = matmul_op(dc, b.t(), False) if ctx.needs_input_grad[0] else None
    db = matmul_op(a.t(), dc, False) if ctx.needs_input_grad[1] else None
    return da, db, None


matmul_op.register_autograd(_backward, setup_context=_save)
