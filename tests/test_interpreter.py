"""The interpreter that proves the kernels is itself proven: it computes what a GPU would, and each detector fires."""

import pytest
import torch

pytest.importorskip("triton")
import interpreter
import triton
import triton.language as tl
from interpreter import Endless, OutOfBounds, Race, interpreted
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from minitrl.kernels import targets

BLOCK = 64


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr, SHIFT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out + at, tl.load(x + at + SHIFT, mask=at < n, other=0.0), mask=at < n)
    else:
        tl.store(out + at, tl.load(x + at + SHIFT), mask=at < n)


def copy(n, view=None, masked=True, shift=0, **options):
    x = torch.randn(n) if view is None else view
    out = torch.empty(n)
    with interpreted(**options) as log:
        copy_kernel[(triton.cdiv(n, BLOCK),)](x, out, n, BLOCK, masked, shift, num_warps=4)
    return x, out, log


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_copy():
    x, out, log = copy(100)
    assert torch.equal(x, out)
    assert log.names() == ["copy_kernel"] and log["copy_kernel"].programs == 2
    x_count, out_count = log["copy_kernel"].arguments["x"], log["copy_kernel"].arguments["out"]
    assert (x_count.loaded, x_count.stored, x_count.touched, x_count.size) == (400, 0, 400, 400)
    assert (out_count.loaded, out_count.stored, out_count.touched) == (0, 400, 400)
    assert log["copy_kernel"].requested == log["copy_kernel"].touched == 800
    assert log.launches[0].options == {"num_warps": 4} and log.launches[0].values["BLOCK"] == BLOCK


@triton.jit
def rows_kernel(x, out, rows, COLUMNS: tl.constexpr):
    """Every program reads all of x: requested again and again, touched once."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.range(0, rows):
        total += tl.load(x + i * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def test_requested_counts_again_what_touched_counts_once():
    x, out = torch.randn(3, 16), torch.empty(5)
    with interpreted() as log:
        rows_kernel[(5,)](x, out, 3, 16)
        rows_kernel[(5,)](x, out, 3, 16)
    assert out.allclose(x.sum(), atol=1e-5)
    count = log["rows_kernel"].arguments["x"]
    assert (count.requested, count.touched) == (2 * 5 * x.nbytes, 2 * x.nbytes)  # of two launches
    assert len(log.launches) == 2 and log.launches[0].arguments["x"].touched == x.nbytes


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_forgotten_mask():
    """Even where the memory behind belongs to the same tensor, of which the kernel got a part."""
    with pytest.raises(OutOfBounds, match=r"copy_kernel, program 1 of \(2, 1, 1\): loaded byte \+400 of 'x'"):
        copy(100, view=torch.randn(128)[:100], masked=False)


def test_underrun():
    with pytest.raises(OutOfBounds, match="byte -4 of 'x'"):
        copy(100, view=torch.randn(128)[28:], shift=-1)


@triton.jit
def strided_kernel(x, ROWS: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(x + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :], 1.0)


def test_the_gap_between_rows_is_out_of_bounds():
    x = torch.zeros(4, 12)
    with interpreted():
        strided_kernel[(1,)](x[:, :8], 4, 12, 8)
        with pytest.raises(OutOfBounds, match="stored byte [+]32 of 'x'"):
            strided_kernel[(1,)](x[:, :8], 4, 12, 16)
    assert x.sum() == 32


@triton.jit
def foreign_kernel(x, address):
    tl.store(x, tl.load(address.to(tl.pointer_type(tl.float32))))


def test_a_pointer_of_no_argument():
    x = torch.zeros(4)
    with interpreted(), pytest.raises(OutOfBounds, match="no argument"):
        foreign_kernel[(1,)](x, x.data_ptr())


# --- races and order -------------------------------------------------------------------------------------------------


@triton.jit
def accumulate_kernel(x, total, ATOMIC: tl.constexpr):
    value = tl.load(x + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(total, value)
    else:
        tl.store(total, tl.load(total) + value)


@triton.jit
def neighbour_kernel(x, STEP: tl.constexpr):
    """Program 1 overwrites what program 0 reads, or reads what it has written."""
    i = tl.program_id(0)
    value = tl.load(x + (i + STEP) % 2)
    tl.store(x + i, value)


@triton.jit
def reread_kernel(x, WRITER: tl.constexpr):
    """All read, and the one that writes is itself among the readers, as the first or as the last."""
    value = tl.load(x)
    if tl.program_id(0) == WRITER:
        tl.store(x, value)


@triton.jit
def overwrite_kernel(x):
    tl.store(x, tl.program_id(0).to(tl.float32))


@triton.jit
def scatter_kernel(x, at):
    tl.store(x + tl.load(at + tl.arange(0, 4)), 1.0)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "shuffle"])
def test_races(schedule):
    x = torch.randn(8)
    with interpreted(schedule):
        with pytest.raises(Race, match="'total': reads what program . writes"):
            accumulate_kernel[(8,)](x, torch.zeros(1), False)
        with pytest.raises(Race, match="float atomics"):
            accumulate_kernel[(8,)](x, torch.zeros(1), True)
        with pytest.raises(Race, match="'x': (overwrites what program . reads|reads what program . writes)"):
            neighbour_kernel[(2,)](x, 1)
        for writer in (0, 2):
            with pytest.raises(Race, match="'x': (overwrites what program . reads|reads what program . writes)"):
                reread_kernel[(3,)](x, writer)
        with pytest.raises(Race, match="'x': writes what program . writes"):
            overwrite_kernel[(2,)](x)
        with pytest.raises(Race, match="twice"):
            scatter_kernel[(1,)](x, torch.tensor([0, 1, 2, 1]))
        scatter_kernel[(1,)](x, torch.tensor([3, 1, 2, 0]))
        neighbour_kernel[(2,)](x, 0)  # each to itself


def test_a_race_through_two_arguments_that_share_memory():
    x = torch.randn(128)
    with interpreted(), pytest.raises(Race, match="'out': overwrites what program 0 reads"):
        copy_kernel[(2,)](x[8:], x[:120], 56, 16, True, 0)


@triton.jit
def order_kernel(x, turn, out):
    """Which program comes when, by an integer atomic: the one way to depend on it that is no race."""
    tl.store(out + tl.program_id(0), tl.atomic_add(turn, 1))


def test_programs_run_in_the_order_asked_for():
    orders = {}
    for schedule in ("forward", "reverse", "shuffle"):
        out = torch.empty(6, dtype=torch.int32)
        with interpreted(schedule):
            order_kernel[(6,)](out, torch.zeros(1, dtype=torch.int32), out)
        orders[schedule] = out.tolist()
    assert orders["forward"] == [0, 1, 2, 3, 4, 5] and orders["reverse"] == [5, 4, 3, 2, 1, 0]
    assert sorted(orders["shuffle"]) == [0, 1, 2, 3, 4, 5] and orders["shuffle"] not in list(orders.values())[:2]


# --- poison ----------------------------------------------------------------------------------------------------------


@triton.jit
def undefined_kernel(x, out, n, DEFINED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if DEFINED:
        value = tl.load(x + at, mask=at < n, other=0.0)
    else:
        value = tl.load(x + at, mask=at < n)
    tl.store(out, tl.sum(value.to(tl.float32), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_undefined_lanes_are_poisoned(dtype):
    x, defined, undefined = torch.ones(5, dtype=dtype), torch.zeros(1), torch.zeros(1)
    with interpreted():
        undefined_kernel[(1,)](x, defined, 5, True, 8)
        undefined_kernel[(1,)](x, undefined, 5, False, 8)
    assert defined.item() == 5 and undefined.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unwritten_outputs_are_poisoned(dtype):
    with interpreted():
        out = torch.empty(3, dtype=dtype)
        assert out.isnan().all() and out.new_empty(2).isnan().all() and torch.empty_like(out).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@triton.jit
def offsets_kernel(x, rows, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    row = rows.to(tl.int64) if WIDE else rows
    tl.store(x, row * STRIDE)


def test_integers_that_overflow():
    x = torch.zeros(1, dtype=torch.int64)
    with interpreted():
        offsets_kernel[(1,)](x, 70_000, 65_536, True)
        assert x.item() == 70_000 * 65_536
        with pytest.raises(OverflowError, match="4587520000 in 32 bits"):
            offsets_kernel[(1,)](x, 70_000, 65_536, False)


@triton.jit
def wait_kernel(x):
    while tl.load(x) == 0:
        tl.store(x + 1, 1.0)


def test_a_program_that_does_not_end(monkeypatch):
    monkeypatch.setattr(interpreter, "ACCESSES", 50)
    with interpreted(), pytest.raises(Endless, match="wait_kernel, program 0"):
        wait_kernel[(1,)](torch.zeros(2))


def test_wrong_launches():
    x = torch.zeros(64)
    with interpreted():
        with pytest.raises(AssertionError, match="knows no .'num_wraps'"):
            copy_kernel[(1,)](x, x, 0, BLOCK, True, 0, num_wraps=4)
        with pytest.raises(AssertionError, match="no GPU takes a grid"):
            copy_kernel[(1, 65536)](x, x, 0, BLOCK, True, 0)
        with pytest.raises(TypeError, match="SHIFT"):
            copy_kernel[(1,)](x, x, 0, BLOCK, True)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def cast_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_as_pytorch_does(dtype):
    """To nearest, ties to even: half of all values end otherwise where casts truncate."""
    torch.manual_seed(0)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    bits = torch.randint(-(2**31), 2**31, (8192 - len(special),)).to(torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(special), bits])
    out, back = torch.empty(8192, dtype=dtype), torch.empty(8192)
    with interpreted():
        cast_kernel[(1,)](x, out, 8192)
        cast_kernel[(1,)](out, back, 8192)
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))
    assert torch.equal(back.nan_to_num(7), expected.float().nan_to_num(7))


@triton.jit
def arithmetic_kernel(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = tl.load(y + at)
    tl.store(out + at, tl.where(a > b, a * b, _twice(a) - b))


def test_bfloat16_arithmetic():
    torch.manual_seed(0)
    x, y = torch.randn(2, 512).bfloat16()
    out = torch.empty(512, dtype=torch.bfloat16)
    with interpreted():
        arithmetic_kernel[(1,)](x, y, out, 512)
    assert torch.equal(out, torch.where(x > y, x * y, (x + x) - y))


@triton.jit
def fma_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    tl.store(out + at, tl.fma(a, a, -(a * a)))


def test_fma_rounds_once():
    """So that a product minus itself, rounded, leaves the rounding."""
    torch.manual_seed(0)
    x, out = torch.randn(256), torch.empty(256)
    with interpreted():
        fma_kernel[(1,)](x, out, 256)
    assert torch.equal(out, (x.double() ** 2 - (x * x)).float()) and out.count_nonzero() > 200


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    x = tl.load(a + m * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, K)[:, None] * N + n)
    tl.store(out + m * N + n, tl.dot(x, y, input_precision=PRECISION))


def dot(a, b, precision="ieee"):
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n)
    with interpreted() as log:
        dot_kernel[(1,)](a, b, out, m, n, k, precision)
    assert log["dot_kernel"].flops == 2 * m * n * k
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_exact(dtype):
    """On small integers, where no order of summation rounds."""
    torch.manual_seed(0)
    a, b = torch.randint(-8, 9, (32, 64)), torch.randint(-8, 9, (64, 16))
    assert torch.equal(dot(a.to(dtype), b.to(dtype)), (a @ b).float())


def test_dot_accumulates_in_float32():
    torch.manual_seed(0)
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    assert (dot(a, b) - a.double() @ b.double()).abs().max() < 1e-5


def test_float32_products_are_tf32_unless_told_otherwise():
    torch.manual_seed(0)
    a, b = torch.randn(64, 128), torch.randn(128, 64)
    truth = a.double() @ b.double()
    assert (dot(a, b, "ieee") - truth).abs().max() < 2e-5
    assert 1e-3 < (dot(a, b, "tf32") - truth).abs().max() < 5e-2


@triton.jit
def device_descriptor_kernel(x, out, rows, columns, M: tl.constexpr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, columns], [columns, 1], [M, N])
    target = tl.make_tensor_descriptor(out, [rows, columns], [columns, 1], [M, N])
    target.store([tl.program_id(0) * M, 0], source.load([tl.program_id(0) * M, 0]))


@triton.jit
def host_descriptor_kernel(source, target, M: tl.constexpr):
    target.store([tl.program_id(0) * M, 0], source.load([tl.program_id(0) * M, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensor_descriptors(dtype):
    """Made on the device or on the host: what is out of the tensor is neither touched nor counted."""
    x = torch.randn(20, 24).to(dtype)
    out, again = torch.empty_like(x), torch.empty_like(x)
    with interpreted() as log:
        device_descriptor_kernel[(2,)](x, out, 20, 24, 16, 32)
        source, target = (TensorDescriptor.from_tensor(t, [16, 32]) for t in (x, again))
        host_descriptor_kernel[(2,)](source, target, 16)
    assert torch.equal(x, out) and torch.equal(x, again)
    for name, argument in (("device_descriptor_kernel", "x"), ("host_descriptor_kernel", "source")):
        assert log[name].arguments[argument].touched == log[name].arguments[argument].loaded == x.nbytes


# --- what surrounds it -----------------------------------------------------------------------------------------------


def compiled():
    signature = {"x": "*fp32", "out": "*fp32", "rows": "i32", "COLUMNS": "constexpr"}
    source = ASTSource(rows_kernel, signature=signature, constexprs={"COLUMNS": 16})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


def test_interpreting_and_compiling_in_one_process():
    """A kernel with a device function of Triton's own (tl.sum), before, between and after."""
    before = compiled()
    test_requested_counts_again_what_touched_counts_once()
    assert compiled() == before and ".entry rows_kernel" in before
    test_requested_counts_again_what_touched_counts_once()
    assert not hasattr(rows_kernel.fn, "interpreter_semantic") and "_to_tensor" not in rows_kernel.fn.__globals__


def test_kernels_inside_custom_ops():
    @torch.library.custom_op("minitrl_tests::copied", mutates_args=())
    def copied(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        copy_kernel[(triton.cdiv(len(x), BLOCK),)](x, out, len(x), BLOCK, True, 0, **targets.config("copy"))
        return out

    @copied.register_fake
    def _(x):
        return torch.empty_like(x)

    x = torch.randn(100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "CONFIGS", {"copy": {"sm_80": {"num_warps": 2}, "sm_90": {"num_warps": 8}}})
        with interpreted(target="sm_80") as log:
            assert targets.use_triton(x) and torch.equal(copied(x), x)
        assert log.launches[0].options == {"num_warps": 2}
    assert not targets.use_triton(x)


def test_without_strictness_it_only_counts():
    """For the kernels of others, which use locks and read what they do not need."""
    x, total, undefined = torch.ones(8), torch.zeros(1), torch.zeros(1)
    with interpreted(strict=False) as log:
        accumulate_kernel[(8,)](x, total, False)
        accumulate_kernel[(8,)](x, total, True)
        undefined_kernel[(1,)](x, undefined, 5, False, 8)
        with pytest.raises(OutOfBounds):
            copy_kernel[(1,)](x, x, 8, BLOCK, False, 0)
    assert total.item() == 16 and undefined.item() == 5
    count = log["accumulate_kernel"].arguments["total"]
    assert (count.loaded, count.stored, count.atomic, count.touched) == (32, 32, 32, 8)


def test_faults_planted_in_kernels_are_interpreted():
    """A mutated module's kernels run as mutated: Triton reads their source again."""
    import sys

    from faults import mutant

    faulty = mutant(sys.modules[__name__], "return x + x" + "\n", "return x * x\n")
    out = torch.empty(2)
    with interpreted():
        faulty.arithmetic_kernel[(1,)](torch.tensor([1.0, 3.0]), torch.tensor([4.0, 5.0]), out, 2)
    assert out.tolist() == [1 - 4, 9 - 5]
