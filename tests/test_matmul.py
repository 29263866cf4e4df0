"""The product of the deterministic mode: exact, the same bits for a row in any batch, and no byte too many."""

import pytest
import torch
from accuracy import assert_as_exact_as_plain
from faults import plant

pytest.importorskip("triton")
from interpreter import OutOfBounds, Race, interpreted  # noqa: E402
from minitrl.kernels.matmul import matmul, matmul_reference  # noqa: E402

from minitrl.kernels import matmul_triton  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def matrices(M: int, N: int, K: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, a weight to be multiplied by as x W^T, and the gradient of the result."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((M, K), (N, K), (M, N))]


def run(op, x, weight, upstream) -> dict:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = op(x, weight.t())
    out.backward(upstream)
    return {"out": out.detach(), "dx": x.grad, "d_weight": weight.grad}


def exact(given, target: str = "sm_90") -> dict:
    with interpreted(target=target):
        got = run(matmul, *given)
    assert_as_exact_as_plain(got, run(matmul_reference, *given), run(matmul_reference, *(x.double() for x in given)))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (1, 200, 40), (63, 33, 129), (129, 136, 72), (2, 3, 300)])
def test_as_exact_as_plain_pytorch(M, N, K, dtype):
    """Rows that begin where vectors do, by tensor descriptors, and others; both by pointers on sm_80."""
    for target in ("sm_90", "sm_80"):
        exact(matrices(M, N, K, dtype), target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_row_alone_and_in_any_batch_and_order(target):
    x, weight, upstream = matrices(150, 140, 96, torch.bfloat16)
    with interpreted(target=target):
        whole = run(matmul, x, weight, upstream)
    for some in (torch.tensor([149]), torch.arange(60, 145), torch.randperm(150)):
        with interpreted("shuffle", target=target):
            part = run(matmul, x[some], weight, upstream[some])
        assert torch.equal(part["out"], whole["out"][some]) and torch.equal(part["dx"], whole["dx"][some])
    with interpreted("reverse", target=target):
        assert torch.equal(run(matmul, x, weight, upstream)["d_weight"], whole["d_weight"])


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_how_matrices_lie_in_memory_changes_no_bit(target):
    x, weight, _ = matrices(70, 48, 96, torch.bfloat16)
    wide, late = torch.full((70, 192), torch.nan).bfloat16(), torch.cat([x.new_zeros(1), x.flatten()])[1:].view(70, 96)
    wide[:, ::2] = x
    with interpreted(target=target):
        true = matmul(x, weight.t())
        for other in (wide[:, ::2], late, x.t().contiguous().t()):
            assert torch.equal(matmul(other, weight.t()), true)
        assert torch.equal(matmul(x, weight.t().contiguous()), true)


@pytest.mark.parametrize("M, N, K", [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_empty(M, N, K):
    given = matrices(M, N, K, torch.float32)
    with interpreted():
        got, true = run(matmul, *given), run(matmul_reference, *given)
    assert all(torch.equal(got[name], true[name]) for name in true)


def test_bytes():
    M, N, K = 256, 384, 512
    x, weight, _ = matrices(M, N, K, torch.bfloat16)
    with interpreted(strict=False) as log:
        matmul(x, weight.t())
    launch = log["matmul_kernel"]
    assert launch.touched == 2 * (M * K + N * K + M * N) and launch.flops == 2 * M * N * K
    assert launch.requested == 2 * (M * K * N // 128 + N * K * M // 128 + M * N)


def test_operator_is_registered_right():
    x, weight, _ = matrices(5, 4, 16, torch.float32)
    with interpreted():
        for wide in (False, True):
            torch.library.opcheck(matmul_triton.matmul_op, (x.requires_grad_(), weight.t().detach(), wide))


def test_what_cannot_be_multiplied_is_told():
    x, weight, _ = matrices(5, 4, 16, torch.float32)
    for bad in (weight, weight.t().bfloat16()):
        with pytest.raises(ValueError, match=r"matmul of \(5, 16\) torch.float32 and"):
            matmul(x, bad)


FAULTS = {
    "last step lost": ("for k in range(0, K, DEPTH):", "for k in range(0, K - DEPTH, DEPTH):"),
    "a column of K too many": ("mask=(k + depth < K)", "mask=(k + depth <= K)"),
    "rows past the end stored": ("mask=(rows < M)[:, None] &", "mask=(rows < M + 1)[:, None] &"),
    "sides swapped": ("A_ACROSS, TMA, EVEN)\n", "B_ACROSS, TMA, EVEN)\n"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    plant(monkeypatch, matmul_triton, *FAULTS[fault])
    with pytest.raises((AssertionError, OutOfBounds, Race)):
        exact(matrices(63, 33, 129, torch.bfloat16), "sm_80")
