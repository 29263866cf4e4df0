"""The Triton kernels of logits_logprob: token_logprob for those who hold the logits. Formulas: token_logprob.py.

One program computes one row, and a row's bits depend on that row alone.

    logits_logprob_fwd    reads the logits once, writes 16 T bytes
    logits_logprob_bwd    reads the logits of rows that have a gradient, writes the gradients of all
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matmul_triton import settled
from .targets import config
from .token_logprob import IGNORE
from .token_logprob_triton import LN2, LOG2_E, LOWEST, aligned_rows, upstream


@triton.jit(do_not_specialize=["T"])
def logits_logprob_fwd_kernel(
    logits, targets, logprobs, entropy, reference_out, log2_total_out, T, V, row_stride, inverse_temperature,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits (T, V), rows row_stride apart -> the same four numbers, a row per program. Each lane runs its own sums."""
    row = tl.program_id(0)
    target = tl.load(targets + row)
    if target == IGNORE:
        tl.store(logprobs + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(reference_out + row, 0.0)
        tl.store(log2_total_out + row, 0.0)
    else:
        logits += tl.cast(row, tl.int64) * row_stride
        scale = inverse_temperature * LOG2_E
        r = tl.full((BLOCK,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK,), tl.float32)
        u = tl.zeros((BLOCK,), tl.float32)
        z_chosen = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
            z = tl.where(columns < V, z, LOWEST)
            z_chosen += tl.where(columns == target, z, 0.0)
            peak = tl.maximum(r, z)
            drop = (r - peak) * scale
            z = (z - peak) * scale
            fade = tl.exp2(drop)
            p = tl.where(columns < V, tl.exp2(z), 0.0)
            u = fade * (u + drop * s) + p * z
            s = fade * s + p
            r = peak
        reference = tl.max(r, 0)
        r = (r - reference) * scale
        total = tl.sum(tl.exp2(r) * s, 0)
        weighted = tl.sum(tl.exp2(r) * (u + r * s), 0)
        log2_total = tl.log2(total)
        tl.store(logprobs + row, ((tl.sum(z_chosen, 0) - reference) * scale - log2_total) * LN2)
        tl.store(entropy + row, (log2_total - weighted / total) * LN2)
        tl.store(reference_out + row, reference)
        tl.store(log2_total_out + row, log2_total)


@triton.jit(do_not_specialize=["T"])
def logits_logprob_bwd_kernel(
    logits, targets, reference, log2_total, entropy, g, h, dz, T, V, row_stride, inverse_temperature,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz (T, V). Of a row that is ignored, or whose upstream gradients are 0, nothing is read."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    dz += tl.cast(row, tl.int64) * V
    d = tl.zeros((BLOCK,), tl.float32)
    if target != IGNORE:
        if (tl.load(g + row) != 0) | (tl.load(h + row) != 0):
            at = logits + tl.cast(row, tl.int64) * row_stride + columns
            z = tl.load(at, mask=columns < V, other=0.0).to(tl.float32)
            a, b, c = upstream(row, T, entropy, g, h, inverse_temperature)
            scale = inverse_temperature * LOG2_E
            log2_p = (z - tl.load(reference + row)) * scale - tl.load(log2_total + row)
            d = tl.exp2(log2_p) * (a + b * log2_p) + tl.where(columns == target, c, 0.0)
    tl.store(dz + columns, d.to(dz.dtype.element_ty), mask=columns < V)


def laid_out(logits: Tensor) -> tuple[Tensor, int]:
    """The logits, or a copy, with rows that have no gaps within them, and how far apart rows are: see `settled`."""
    if logits.stride(1) != 1 or logits.data_ptr() % 16:
        logits = settled(logits)
    return logits, logits.stride(0) if len(logits) > 1 else logits.shape[1]


@torch.library.custom_op("minitrl::logits_logprob", mutates_args=())
def logits_logprob_op(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-> (4, T), as token_logprob's."""
    T, V = logits.shape
    out = aligned_rows(T, logits.device)
    if T:
        logits, row_stride = laid_out(logits)
        rest = settled(targets), *out, T, V, row_stride, 1 / temperature
        tiles = config("logits_logprob_fwd")
        logits_logprob_fwd_kernel[(T,)](logits, *rest, IGNORE=IGNORE, enable_fp_fusion=False, **tiles)
    return out.contiguous()


@logits_logprob_op.register_fake
def _(logits, targets, temperature):
    return logits.new_empty((4, len(targets)), dtype=torch.float32)


@torch.library.custom_op("minitrl::logits_logprob_backward", mutates_args=())
def logits_logprob_backward_op(
    logits: Tensor, targets: Tensor, saved: Tensor, upstream: Tensor, temperature: float
) -> Tensor:
    """-> the gradient of the logits, in their dtype."""
    T, V = logits.shape
    dz = logits.new_empty(T, V)
    if T:
        logits, row_stride = laid_out(logits)
        vectors = [settled(x) for x in (targets, saved[2], saved[3], saved[1], upstream[0], upstream[1])]
        rest = *vectors, dz, T, V, row_stride, 1 / temperature
        tiles = config("logits_logprob_bwd")
        grid = T, triton.cdiv(V, tiles["BLOCK"])
        logits_logprob_bwd_kernel[grid](logits, *rest, IGNORE=IGNORE, enable_fp_fusion=False, **tiles)
    return dz


@logits_logprob_backward_op.register_fake
def _(logits, targets, saved, upstream, temperature):
    return logits.new_empty(logits.shape)


def _save_logits(ctx, inputs, output):
    logits, targets, ctx.temperature = inputs
    ctx.save_for_backward(logits, targets, output)


def _backward_logits(ctx, upstream):
    return logits_logprob_backward_op(*ctx.saved_tensors, upstream, ctx.temperature), None, None


logits_logprob_op.register_autograd(_backward_logits, setup_context=_save_logits)
