"""x W^T + b: every product with a weight matrix, by the fastest way that this processor has.

On CUDA that is PyTorch's own. On a CPU PyTorch computes bfloat16 products with oneDNN but float32 ones with MKL, which
does not use the widest registers of every maker's processors; where it does not, oneDNN is twice as fast. There is no
switch for that, but there are the operators that torch.compile uses: one lays a weight out as oneDNN wants to read it
("packs" it), one multiplies by it.

* Training in float32 packs what it multiplies by each time, a few per cent of a product with FEW_ROWS rows:

      Y = X W^T + b        dX = dY W        dW = dY^T X        db = the sum of dY's rows

* Sampling multiplies by the same weights again and again. Within `packed_weights` these are packed once, and what comes
  after the product, a residual or the gate of an MLP, is done to it before it leaves the registers.

All is summed in the inputs' own precision, as by F.linear, in another order. In the deterministic mode a row's bits
depend on that row and the weight alone. On a GPU matmul.py sees to that. On a CPU TILE rows are multiplied at a time,
however many there are (zeros fill the last tile up), and exponentials are those of `exp`: PyTorch's silu and exp2 give
a number other bits in the last, unfilled vector of an array than elsewhere.
"""

import platform
import threading
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import matmul

FEW_ROWS = 256  # below, packing a weight for one product takes longer than it saves
SMALL = 2**18  # below so many numbers in a weight, so does the call
TILE = 16  # rows of a product in the deterministic mode
COLUMNS = 2048  # of a vocabulary that are multiplied at a time


class _Copies(threading.local):  # each thread's own: one that samples must not leave its copies to one that trains
    packed: dict[tuple, Tensor | list[Tensor]] | None = None  # a weight's address and shape -> its copy, or its halves'


_copies = _Copies()


def _has_onednn() -> bool:
    """Whether this PyTorch has the two operators, for this kind of processor."""
    names = ("mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise")
    schemas = [torch._C._jit_get_schemas_for_operator(name) for name in names]
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") and all(schemas)


HAS_ONEDNN = _has_onednn()
BFLOAT16 = (torch.bfloat16,) if HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
DTYPES = (torch.float32, *BFLOAT16)


@contextmanager
def packed_weights(copies: dict | None = None):
    """Keep packed copies of the weights, as large as they are, for products without gradients. No weight may change.

    copies: where to keep them, and to find those of an earlier time. By default they are forgotten in the end.
    """
    outer, _copies.packed = _copies.packed, {} if copies is None else copies
    try:
        yield
    finally:
        _copies.packed = outer


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, deterministic: bool = False
) -> Tensor:
    """x @ weight^T + bias + residual. x: (N, I).  weight: (O, I).  bias: (O,).  residual, result: (N, O).

    All of one dtype; differentiable. deterministic: see above.
    """
    if deterministic and x.is_cuda:
        y = matmul(x, weight.t())
        y = y if bias is None else y + bias
    elif deterministic and torch.is_grad_enabled():
        y = OneDNNLinear.apply(x, weight, bias, fixed_product)
    elif deterministic:
        y = fixed_product(x, weight, bias)
    elif _sampling(x, weight):
        packed = _packed_once(weight, _pack)
        return _multiply(x, packed, bias) if residual is None else _multiply_and(x, packed, bias, residual, "add")
    elif len(x) >= FEW_ROWS and x.dtype == torch.float32 and _suits_onednn(x, weight):
        y = OneDNNLinear.apply(x, weight, bias, product)
    else:
        y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def logits(hidden: Tensor, weight: Tensor, deterministic: bool = False) -> Tensor:
    """hidden @ weight^T, (N, V) float32. hidden: (N, D).  weight: (V, D).

    On CUDA the sums stay as they were added up, as in token_logprob's kernel; a CPU's bfloat16 product rounds them.
    """
    if deterministic:  # in the pieces that token_logprob multiplies by, so that those alone are packed
        pieces = weight.split(COLUMNS)
        return torch.cat([linear(hidden, piece, deterministic=True) for piece in pieces], dim=1).float()
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled():
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return linear(hidden, weight).float()


def swiglu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, deterministic: bool = False
) -> Tensor:
    """silu(x Wg^T + bg) * (x Wu^T + bu) (arXiv 2002.05202): the gates' rows of the weight, then as many of the ups.

    x: (N, I).  weight: (2 F, I).  bias: (2 F,).  residual: (N, 2 F), added to both products before anything else.
    Returns (N, F); differentiable.
    """
    if residual is None and not deterministic and _sampling(x, weight):
        gates, ups = _packed_once(weight, lambda both: [_pack(half) for half in both.chunk(2)])
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return _multiply_and(x, ups, up_bias, _multiply(x, gates, gate_bias, "swish"), "mul")
    return SwiGLU.apply(linear(x, weight, bias, residual, deterministic), deterministic)


def _sampling(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight is multiplied by its packed copy."""
    return _copies.packed is not None and _suits_onednn(x, weight) and not torch.is_grad_enabled()


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype in DTYPES and weight.numel() >= SMALL


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `linear` computes, for use inside of an autograd.Function. Either matrix may be a transposed view."""
    if len(x) >= FEW_ROWS and x.dtype == torch.float32 and _suits_onednn(x, weight):
        return _multiply(x, _pack(weight), bias)
    return F.linear(x, weight, bias)


def fixed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` in tiles of rows, for the deterministic mode on a CPU."""
    if not HAS_ONEDNN or x.dtype not in DTYPES:
        kinds = " or ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"deterministic: on a CPU it is there for x86-64 and {kinds}, not {x.dtype}, with oneDNN")
    packed = _pack(weight) if _copies.packed is None else _packed_once(weight, _pack)
    whole = x if len(x) % TILE == 0 else F.pad(x, (0, 0, 0, -len(x) % TILE))
    out = [_multiply(tile, packed, bias) for tile in whole.split(TILE)]
    return (out[0] if len(out) == 1 else torch.cat(out))[: len(x)]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of a (N, 2 F) matrix of gates and ups, keeping nothing but that matrix."""

    @staticmethod
    def forward(ctx, gate_up, deterministic):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if not deterministic:
            return F.silu(gate).mul_(up)
        wide = gate.float()
        return wide.div(wide.neg().exp_().add_(1)).to(gate.dtype).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate_up = ctx.saved_tensors[0]
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu_backward(dy * up, gate, grad_input=d_gate)
        torch.mul(dy, F.silu(gate), out=d_up)
        return d_gate_up, None


class OneDNNLinear(torch.autograd.Function):
    """`linear` in float32 on a CPU, or with another product than that function's."""

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1] and not (x.dtype == torch.float32 and _suits_onednn(x, weight)):
            dw = product(dy.t(), x.t())
        elif ctx.needs_input_grad[1]:  # oneDNN's own, which needs no transposed copies
            dense = dy.to_mkldnn(), x.to_mkldnn(), weight.to_mkldnn()
            dw = torch.ops.aten.mkldnn_linear_backward_weights(*dense, False)[0].to_dense()
        return dx, dw, dy.sum(0) if ctx.needs_input_grad[2] else None, None


def _pack(weight: Tensor) -> Tensor:
    # The layout depends on the rows it is for. One for all: the bits that come out must not depend on who came first.
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)


def _packed_once(weight: Tensor, pack):
    """What `pack` makes of the weight, made at its first use within `packed_weights`."""
    key = weight.data_ptr(), weight.shape
    if key not in _copies.packed:
        _copies.packed[key] = pack(weight)
    return _copies.packed[key]


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "")


def _multiply_and(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor, operation: str) -> Tensor:
    """The product, and then `operation` ("add" or "mul") with another matrix."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, operation)
