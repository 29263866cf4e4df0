"""The product with a weight, by oneDNN where that is faster: as exact as PyTorch's own, never of an old weight."""

import threading

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_plain

from minitrl.kernels import linear as file
from minitrl.kernels.linear import FEW_ROWS, SMALL, linear, packed_weights, product

ONEDNN = pytest.mark.skipif(not file.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
SHAPES = [(SMALL // 256, 256), (700, 1025), (8, 24)]  # the last is too small to be worth a call


def inputs(rows: int, shape: tuple[int, int], dtype, bias: bool = True) -> dict:
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, shape[1]), shape, shape[:1]))
    return {"x": x.to(dtype), "weight": weight.to(dtype)} | ({"bias": b.to(dtype)} if bias else {})


def run(op, given: dict) -> dict:
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    out = op(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(upstream.to(out.dtype))
    return {"out": out.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, FEW_ROWS - 1, FEW_ROWS, 611])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, rows, bias, dtype):
    given = inputs(rows, shape, dtype, bias)
    exact = {name: value.double() for name, value in given.items()}
    got, plain, truth = run(linear, given), run(F.linear, given), run(F.linear, exact)
    if dtype == torch.float32:  # summed in another order over up to 1025 terms: allow that much more rounding
        plain = {name: value + 1e-6 * truth[name].abs().max() for name, value in plain.items()} if rows else plain
    assert_as_exact_as_plain(got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_product_takes_transposed_views(dtype):
    x, weight = torch.randn(611, 300).to(dtype), torch.randn(1000, 611).to(dtype)
    got, plain, truth = product(x.t(), weight), F.linear(x.t(), weight), F.linear(x.t().double(), weight.double())
    assert_as_exact_as_plain({"out": got}, {"out": plain}, {"out": truth})


@ONEDNN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, FEW_ROWS - 1])
def test_packed_weights(dtype, rows, monkeypatch):
    """Each weight is packed once; the numbers are those of F.linear."""
    packed = []
    monkeypatch.setattr(file, "_pack", lambda weight, pack=file._pack: packed.append(weight) or pack(weight))
    given = inputs(rows, SHAPES[1], dtype)
    with torch.inference_mode(), packed_weights():
        outs = [linear(**given) for _ in range(3)]
    assert len(packed) == 1 and packed[0] is given["weight"]
    exact = F.linear(**{name: value.double() for name, value in given.items()})
    rounding = (5e-6 if dtype == torch.float32 else 2**-8) * exact.abs().max()
    bound = 2 * (F.linear(**given) - exact).abs().max() + rounding
    assert all((out - exact).abs().max() <= bound for out in outs)


def test_weights_may_change_between_two_uses():
    """What no version counter sees, a write through .data or a fused optimizer, is seen."""
    weight = torch.nn.Parameter(torch.randn(SHAPES[0]))
    x = torch.randn(4, weight.shape[1])
    for _ in range(2):
        with torch.no_grad(), packed_weights():
            got, plain, truth = linear(x, weight), F.linear(x, weight), F.linear(x.double(), weight.double())
            assert_as_exact_as_plain({"out": got}, {"out": plain}, {"out": truth})
        weight.data.normal_()
        weight.grad = torch.randn_like(weight)
        torch.optim.AdamW([weight], lr=1.0, fused=True).step()


def test_training_within_the_context():
    """Where a gradient is wanted, no packed copy is used."""
    given = inputs(4, SHAPES[0], torch.float32)
    with packed_weights():
        got = run(linear, given)
    for name, value in run(F.linear, given).items():
        assert torch.equal(got[name], value), name


def test_the_context_ends_with_an_error():
    with pytest.raises(KeyError), packed_weights():
        raise KeyError
    assert file._copies.packed is None


def test_frozen_inputs():
    given = inputs(FEW_ROWS, SHAPES[0], torch.float32)
    whole = run(linear, given)
    for name in given:
        leaf = given[name].detach().requires_grad_()
        out = linear(**given | {name: leaf})
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
        assert torch.equal(leaf.grad, whole[f"d_{name}"])
    assert not linear(**given).requires_grad


@ONEDNN
def test_a_thread_that_samples_leaves_its_copies_to_nobody():
    """Another thread's copies, stale ones at that, are never multiplied by: not amid its sampling, and not after."""
    given, entered, leave = inputs(8, SHAPES[0], torch.float32), threading.Event(), threading.Event()
    key = given["weight"].data_ptr(), given["weight"].shape
    stale = {key: file._pack(given["weight"] + 1)}

    def sample():
        with torch.inference_mode(), packed_weights(stale):
            entered.set()
            assert leave.wait(60)

    with torch.no_grad():
        expected = linear(**given)
        other = threading.Thread(target=sample)
        with packed_weights():
            other.start()
            assert entered.wait(60)
            torch.testing.assert_close(linear(**given), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(linear(**given), expected)
        leave.set()
        other.join()
        assert torch.equal(linear(**given), expected)
