"""x W^T with tiles that do not depend on the number of rows: the product of the deterministic mode on a GPU.

    C = A B        dA = dC B^T        dB = A^T dC        sums in float32, results in the inputs' dtype

A library picks its tiles, and whether it splits the sum over K, by the shape of the product, so that a row's bits
change with the number of rows beside it: then the log-probs that a model samples by, a few rows at a time, are not
those that it is trained on. Here a tile of C is always the same size, is computed by one program, and its K is summed
in order. What that costs is speed where there are few rows, so nothing but the deterministic mode uses it.

Least traffic: A and B read and C written, once. FLOPs: 2 M N K.
"""

from torch import Tensor

from .targets import use_triton


def matmul_reference(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """The same in plain PyTorch: its bits may depend on M."""
    return a_MK @ b_KN


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b. A row of the result depends, to the bit, on that row of `a` and on `b` alone. Differentiable.

    a_MK: (M, K).  b_KN: (K, N), of the same dtype. Either may be a transposed view, as in matmul(x, weight.t()).
    """
    if a_MK.dtype != b_KN.dtype or a_MK.shape[1] != b_KN.shape[0]:
        raise ValueError(f"matmul of {tuple(a_MK.shape)} {a_MK.dtype} and {tuple(b_KN.shape)} {b_KN.dtype}")
    if use_triton(a_MK):
        from .matmul_triton import matmul_op

        return matmul_op(a_MK, b_KN, False)
    return matmul_reference(a_MK, b_KN)
