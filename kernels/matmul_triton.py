"""The Triton kernel of matmul.py: C = A B, each tile of C by one program, its sum over K in one fixed order.

Tiles are those of targets.CONFIGS and never depend on the number of rows, nor does the binary: so a row of C has the
same bits alone and in any batch, on any day. Rows and columns past the end are read as copies of the last one and never
stored, which costs no registers for masks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .targets import config


@triton.jit
def grouped(program, blocks, others, GROUP: tl.constexpr):
    """Which (block, other) a program computes: GROUP blocks with all others, then the next: both stay in L2."""
    group = program // (GROUP * others)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program - group * GROUP * others
    return group * GROUP + inside % size, inside // size


@triton.jit
def load_tile(
    x, place, k, size, K, step, SIZE: tl.constexpr, DEPTH: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """(SIZE, DEPTH) numbers of a (size, K) matrix from (place, k) on; rows are `step` apart, or columns if ACROSS.

    x: a tensor descriptor if TMA, else a pointer. Behind K stands 0; behind size whatever.
    """
    if TMA:
        if ACROSS:
            tile = x.load([k, place]).T
        else:
            tile = x.load([place, k])
    else:
        rows, depth = tl.minimum(tl.arange(0, SIZE), size - 1 - place), tl.arange(0, DEPTH)
        # One 64-bit number for the corner, so that 32 bits do for each element.
        if ACROSS:
            at = x + tl.cast(k, tl.int64) * step + place + (depth[None, :] * step + rows[:, None])
        else:
            at = x + tl.cast(place, tl.int64) * step + k + (rows[:, None] * step + depth[None, :])
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(k + depth < K)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["M", "N", "K"])
def matmul_kernel(
    a, b, c, M, N, K, a_step, b_step,
    A_ACROSS: tl.constexpr, B_ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """a: (M, K), b: (N, K), c: (M, N) = a b^T. ACROSS: that matrix lies in memory as its transpose."""
    block, other = grouped(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    row, column = block * ROWS, other * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, DEPTH):
        left = load_tile(a, row, k, M, K, a_step, ROWS, DEPTH, A_ACROSS, TMA, EVEN)
        right = load_tile(b, column, k, N, K, b_step, COLUMNS, DEPTH, B_ACROSS, TMA, EVEN)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    c += rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(c, total.to(c.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def rows_of(dtype: torch.dtype) -> str:
    """The table of tiles has rows of its own for float32, which takes more shared memory, and no tensor cores."""
    return "/float32" if dtype == torch.float32 else ""


def settled(x: Tensor) -> Tensor:
    """x, or a copy, as every launch takes it: rows without gaps, on an address that whole vectors can be read from.

    Triton makes another binary of a kernel for each kind of stride and alignment: here all calls share one.
    """
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def described(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The descriptor by which a matrix without gaps is copied in blocks. A single row's own stride may be anything."""
    return TensorDescriptor(x, x.shape, [x.shape[1], 1], list(block))


@torch.library.custom_op("minitrl::matmul", mutates_args=())
def matmul_op(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """a @ b; in float32 if `wide`, whatever they are."""
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty((M, N), dtype=torch.float32 if wide else a.dtype)
    if not c.numel() or not K:
        return c.zero_()
    tiles = config(f"matmul{rows_of(a.dtype)}")
    sides, across, tma = [], [], tiles["TMA"]
    for x in (a, b.t()):
        # By its strides, so that a gradient of one row, transposed, lies as that of many does.
        across.append(len(x) > 1 and x.stride(0) == 1 and x.t().is_contiguous())
        sides.append(settled(x.t() if across[-1] else x))
        tma = tma and sides[-1].shape[1] * x.element_size() % 16 == 0  # else rows do not begin where vectors do
    steps = [side.shape[1] for side in sides]
    if tma:
        shapes = [(tiles[name], tiles["DEPTH"]) for name in ("ROWS", "COLUMNS")]
        sides = [described(x, shape[::-1] if t else shape) for x, t, shape in zip(sides, across, shapes)]
    grid = (triton.cdiv(M, tiles["ROWS"]) * triton.cdiv(N, tiles["COLUMNS"]),)
    tiles = tiles | {"TMA": tma, "EVEN": K % tiles["DEPTH"] == 0}
    matmul_kernel[grid](*sides, c, M, N, K, *steps, *across, **tiles)
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
