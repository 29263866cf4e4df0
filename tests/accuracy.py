"""How exact an operation must be: judged against float64, relative to what plain PyTorch loses in the same dtype."""

import torch
from torch import Tensor

# Of the largest value (or of 1): what any order of summation may cost. In float64 the truth has such errors itself.
ROUNDING = {torch.float64: 1e-12, torch.float32: 8e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_as_exact_as_plain(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """max |got - truth| <= 2 max |plain - truth| + rounding, for each named tensor.

    The maximum and not element by element: plain PyTorch is often exactly right in one place, where nobody else is.
    """
    assert got.keys() == plain.keys() == truth.keys()
    for name, true in truth.items():
        ours, theirs = got[name], plain[name]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == true.shape, name
        assert true.dtype == torch.float64 and true.isfinite().all(), f"{name}: the truth itself is broken"
        assert ours.isfinite().all(), f"{name} is not finite"
        if not true.numel():
            continue
        rounding = ROUNDING[ours.dtype] * true.abs().max().clamp(min=1)
        error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max() + rounding
        assert error <= allowed, (
            f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest value {true.abs().max():.3g}"
        )
