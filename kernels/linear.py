"""x W^T + b: every product with a weight matrix, by the fastest way that this processor has.

On CUDA that is PyTorch's own. On a CPU PyTorch computes bfloat16 products with oneDNN but float32 ones with MKL, which
does not use the widest registers of every maker's processors; where it does not, oneDNN is twice as fast. There is no
switch for that, but there are the operators that torch.compile uses: one lays a weight out as oneDNN wants to read it
("packs" it), one multiplies by it.

* Training in float32 packs what it multiplies by each time, a few per cent of a product with FEW_ROWS rows:

      Y = X W^T + b        dX = dY W        dW = dY^T X        db = the sum of dY's rows

* Decoding multiplies few rows by the same weights again and again. Within `packed_weights` these are packed once.

All is summed in the inputs' own precision, as by F.linear, in another order.
"""

import platform
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 256  # below, packing a weight for one product takes longer than it saves
SMALL = 2**18  # below so many numbers in a weight, so does the call

_packed: dict[Tensor, Tensor] | None = None  # weight -> its packed copy, within `packed_weights`


def _has_onednn() -> bool:
    """Whether this PyTorch has the two operators, for this kind of processor."""
    names = ("mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise")
    schemas = [torch._C._jit_get_schemas_for_operator(name) for name in names]
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") and all(schemas)


HAS_ONEDNN = _has_onednn()
BFLOAT16 = (torch.bfloat16,) if HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
DTYPES = (torch.float32, *BFLOAT16)


@contextmanager
def packed_weights():
    """Keep packed copies of the weights, as large as they are, for products of few rows. No weight may change in it."""
    global _packed
    outer, _packed = _packed, {}
    try:
        yield
    finally:
        _packed = outer


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. x: (N, I).  weight: (O, I).  bias: (O,).  Returns (N, O) in their dtype; differentiable."""
    if _packed is not None and len(x) < FEW_ROWS and _suits_onednn(x, weight) and not torch.is_grad_enabled():
        if weight not in _packed:
            _packed[weight] = _pack(weight)
        return _multiply(x, _packed[weight], bias)
    if len(x) >= FEW_ROWS and x.dtype == torch.float32 and _suits_onednn(x, weight):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype in DTYPES and weight.numel() >= SMALL


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `linear` computes, for use inside of an autograd.Function. Either matrix may be a transposed view."""
    if x.dtype == torch.float32 and _suits_onednn(x, weight):
        return _multiply(x, _pack(weight), bias)
    return F.linear(x, weight, bias)


class OneDNNLinear(torch.autograd.Function):
    """`linear` in float32 on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = product(dy.t(), x.t()) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum(0) if ctx.needs_input_grad[2] else None


def _pack(weight: Tensor) -> Tensor:
    # The layout depends on the rows it is for. One for all: the bits that come out must not depend on who came first.
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
