"""Run Triton kernels on CPU tensors, exactly as written, and watch every byte that they touch.

    with interpreted() as log:              # whatever launches a kernel in here, launches it interpreted
        attention(q, k, v, ...)
    log["attention_forward"].touched        # and .requested .flops .arguments["q"].loaded ...

Outside of the block the same kernels are ordinary ones, which compile ahead of time for any GPU. No environment
variable is needed, and nothing has to be imported in any order.

Triton's own interpreter walks through a kernel, one program after another, with numpy arrays as tensors. Added here:

* bfloat16 is right. Triton's multiplies the raw bits as integers in tl.dot, and truncates where a GPU rounds.
* A product in float32 rounds its operands to TF32, as a GPU does unless it is told input_precision="ieee".
* Bytes. Of every argument: "requested", what the programs ask the L2 cache for, summed over all lanes whose mask is
  set, and "touched", the distinct bytes among these: the least that DRAM must move if each crosses once.
* Bounds. A pointer carries the number of its argument in its upper 16 bits, through any arithmetic. An access outside
  of that argument's view is an error, be it in the gap between two rows or in the middle of another tensor.
* Races. Two programs write one byte, or one reads what another writes: an error, for a GPU runs them in any order.
* Order. schedule="reverse" or "shuffle" runs the programs in another order: results must not change in a bit.
* Poison. torch.empty gives NaN, and so does a masked load in the lanes that it leaves undefined: what a kernel
  forgot to write or to mask shows in the result.
* Arithmetic on 32-bit integers that overflows is an error, and so is a program that does not end.

What it cannot show: the order in which a tensor core sums, the last bit of a GPU's exp2, a missing barrier within a
program.
"""

import ast
import builtins
import dataclasses
import random
import types
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

# Triton imports this one when it first compiles. Imported while `tl` is patched, it would keep the patched functions.
import triton.compiler.code_generator  # noqa: F401
import triton.language as tl
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from minitrl.kernels import targets

ADDRESS = np.uint64((1 << 48) - 1)  # a pointer's lower bits; above them stands 1 + the number of its argument
ACCESSES = 100_000  # of one program, tile by tile: about ten seconds
LATEST = 2**31 - 1  # above any program's number
OPTIONS = {option.name for options in (CUDAOptions, HIPOptions) for option in dataclasses.fields(options)}


class OutOfBounds(Exception):
    """A program touched memory outside of the argument whose pointer it used."""


class Endless(Exception):
    """A program reads and writes more often than any that is meant to end."""


class Race(Exception):
    """What a launch does depends on which of two programs comes first."""


# --- what a launch did -----------------------------------------------------------------------------------------------


@dataclass
class Count:
    """Bytes of one argument. loaded, stored and atomic are requested; touched are distinct; size is the view's."""

    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    touched: int = 0
    size: int = 0

    @property
    def requested(self) -> int:
        return self.loaded + self.stored + self.atomic

    def __add__(self, other):
        return Count(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclass
class Launch:
    """One launch of a kernel, or the sum of several."""

    kernel: JITFunction | None = None
    grid: tuple = ()
    values: dict = field(default_factory=dict)  # argument -> its value, as launched
    options: dict = field(default_factory=dict)  # num_warps and the like
    programs: int = 0
    flops: int = 0  # in tl.dot, masked lanes included
    arguments: dict[str, Count] = field(default_factory=dict)

    @property
    def requested(self) -> int:
        return sum(count.requested for count in self.arguments.values())

    @property
    def touched(self) -> int:
        return sum(count.touched for count in self.arguments.values())


@dataclass
class Log:
    """All launches of an `interpreted` block, in their order; log["name"] is the sum over those of one kernel."""

    launches: list[Launch] = field(default_factory=list)

    def names(self) -> list[str]:
        return list(dict.fromkeys(launch.kernel.__name__ for launch in self.launches))

    def __getitem__(self, name: str) -> Launch:
        found = [launch for launch in self.launches if launch.kernel.__name__ == name]
        if not found:
            raise KeyError(f"{name} was not launched, but {self.names()}")
        total = Launch(found[0].kernel)
        for launch in found:
            total.programs += launch.programs
            total.flops += launch.flops
            for argument, count in launch.arguments.items():
                total.arguments[argument] = total.arguments.get(argument, Count()) + count
        return total


# --- memory ----------------------------------------------------------------------------------------------------------


class Storage:
    """Which programs read and wrote each unit of a piece of memory during a launch; several arguments may share it."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.start = tensors[0].untyped_storage().data_ptr()
        self.unit = min(tensor.element_size() for tensor in tensors)
        units = -(-tensors[0].untyped_storage().nbytes() // self.unit)
        # 0: nobody. Else 1 + the program that wrote, 1 + the last that read, and LATEST - the first that read.
        self.writer, self.last_reader, self.first_reader = np.zeros((3, units), np.int32)

    def load(self, at: np.ndarray, program: int) -> None:
        self._check_writers(at, program, "reads")
        self.last_reader[at] = np.maximum(self.last_reader[at], 1 + program)
        self.first_reader[at] = np.maximum(self.first_reader[at], LATEST - program)

    def store(self, at: np.ndarray, program: int) -> None:
        if len(np.unique(at)) < len(at):
            raise Race("one store writes twice to the same place")
        self._check_writers(at, program, "writes")
        for readers in (self.last_reader[at] - 1, LATEST - self.first_reader[at]):
            others = readers[(readers >= 0) & (readers < LATEST) & (readers != program)]
            if len(others):
                raise Race(f"overwrites what program {others[0]} reads")
        self.writer[at] = 1 + program

    def _check_writers(self, at: np.ndarray, program: int, does: str) -> None:
        writers = self.writer[at] - 1
        others = writers[(writers >= 0) & (writers != program)]
        if len(others):
            raise Race(f"{does} what program {others[0]} writes")


class Argument:
    """A tensor that a launch got: the memory that it may touch, and what was touched of it."""

    def __init__(self, name: str, tensor: torch.Tensor, storage: Storage):
        self.name, self.storage, self.count = name, storage, Count(size=tensor.numel() * tensor.element_size())
        self.start, self.unit = tensor.data_ptr(), tensor.element_size()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.inside = np.zeros(1 + reach if tensor.numel() else 0, bool)
        if tensor.numel():  # not what stands between the rows of a strided view
            torch.from_numpy(self.inside).as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.touched = np.zeros(len(self.inside), bool)

    def access(self, kind: str, addresses: np.ndarray, size: int, launch: "Running") -> None:
        """Bounds, bytes and races of `size` bytes at each address. kind: loaded, stored or atomic."""
        offsets = addresses.astype(np.int64) - self.start
        elements = (offsets // self.unit)[:, None] + np.arange(max(1, size // self.unit))
        elements = elements.ravel() if size > self.unit else elements[:, 0]
        outside = (elements < 0) | (elements >= len(self.inside))
        outside[~outside] = ~self.inside[elements[~outside]]
        if outside.any():
            place = int(elements[outside][0]) * self.unit
            raise OutOfBounds(
                f"{launch.where()}: {kind} byte {place:+d} of {self.name!r}, "
                f"whose view has {self.count.size} bytes and reaches up to {len(self.inside) * self.unit}"
            )
        setattr(self.count, kind, getattr(self.count, kind) + len(addresses) * size)
        self.touched[elements] = True
        if launch.strict and kind != "atomic":
            first = (addresses.astype(np.int64) - self.storage.start) // self.storage.unit
            places = (first[:, None] + np.arange(max(1, size // self.storage.unit))).ravel()
            try:
                (self.storage.store if kind == "stored" else self.storage.load)(places, launch.program)
            except Race as race:
                raise Race(f"{launch.where()}, argument {self.name!r}: {race}") from None


class Running:
    """The launch that is under way."""

    def __init__(self, record: Launch, tensors: dict[str, torch.Tensor], strict: bool):
        self.record, self.strict, self.program, self.accesses = record, strict, 0, 0
        shared: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors.values():
            shared.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        storages = {pointer: Storage(group) for pointer, group in shared.items()}
        self.arguments = [Argument(n, t, storages[t.untyped_storage().data_ptr()]) for n, t in tensors.items()]

    def where(self) -> str:
        return f"{self.record.kernel.__name__}, program {self.program} of {self.record.grid}"

    def tag(self, name: str) -> np.uint64:
        """What to add to a pointer to the argument."""
        number = next(i for i, argument in enumerate(self.arguments) if argument.name == name)
        return np.uint64((number + 1) << 48)

    def access(self, kind: str, handle: TensorHandle, mask: np.ndarray) -> np.ndarray:
        """Check and count an access; returns the addresses without the tags."""
        self.accesses += 1
        if self.accesses > ACCESSES:
            raise Endless(self.where())
        pointers, mask = np.broadcast_arrays(handle.data, mask)
        addresses = np.ascontiguousarray(pointers & ADDRESS)
        used, tags = addresses[mask], pointers[mask] >> np.uint64(48)
        for tag in np.unique(tags).tolist():
            if not 0 < tag <= len(self.arguments):
                raise OutOfBounds(f"{self.where()}: {kind} through a pointer that belongs to no argument")
            size = max(1, handle.get_element_ty().primitive_bitwidth // 8)
            self.arguments[tag - 1].access(kind, used[tags == tag], size, self)
        return addresses

    def finish(self) -> None:
        for argument in self.arguments:
            argument.count.touched = int(argument.touched.sum()) * argument.unit
            self.record.arguments[argument.name] = argument.count


# --- arithmetic ------------------------------------------------------------------------------------------------------


def widen(handle):
    """A bfloat16 tensor, which numpy knows only as bits, as the float32 tensor of the same values."""
    if not isinstance(handle, TensorHandle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def narrow(handle: TensorHandle) -> TensorHandle:
    """A float32 tensor rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    kept = np.where(np.isnan(handle.data), upper | np.uint32(0x40), rounded)  # rounding could make a NaN an infinity
    return TensorHandle(kept.astype(np.uint16), tl.bfloat16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 with the lower 13 bits of the fraction rounded away."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)).view(
        np.float32
    )


def in_float32(method):
    """What computes on bfloat16 computes in float32, and rounds."""

    def computed(self, *args):
        if not any(widen(arg) is not arg for arg in args):
            return method(self, *args)
        result = method(self, *map(widen, args))
        return result if result.data.dtype == bool else narrow(result)

    return computed


class Builder(stock.InterpreterBuilder):
    """Triton's interpreter of single operations, put right where it is wrong, and watched where it uses memory."""

    launch: Running | None = None
    strict = True

    unary_op = in_float32(stock.InterpreterBuilder.unary_op)
    create_clampf = in_float32(stock.InterpreterBuilder.create_clampf)

    @in_float32
    def binary_op(self, left, right, operation):
        result = super().binary_op(left, right, operation)
        if self.strict and result.data.dtype == np.int32 and operation in (np.add, np.subtract, np.multiply):
            wide = operation(left.data.astype(np.int64), right.data)
            if not np.array_equal(wide, result.data):
                raise OverflowError(f"{self.launch.where()}: {wide.max()} in 32 bits")
        return result

    @in_float32
    def create_fma(self, x, y, z):
        exact = np.float64 if z.data.dtype == np.float32 else z.data.dtype  # the product is, and the sum all but always
        return TensorHandle((x.data.astype(exact) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)

    def get_bf16(self, value):
        return narrow(TensorHandle(np.array([value], np.float32), tl.float32))

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16:
            return narrow(super().cast_impl(widen(source), tl.float32))
        return super().cast_impl(widen(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        assert 8 not in (source.dtype.primitive_bitwidth, target.scalar.primitive_bitwidth), "8-bit floats: not here"
        return self.cast_impl(source, target)

    def create_dot(self, a, b, accumulator, precision, _):
        assert a.dtype.primitive_bitwidth > 8, "8-bit floats: not here"
        dtype = np.float64 if a.dtype.scalar == tl.float64 else np.float32
        x, y = (widen(operand).data.astype(dtype) for operand in (a, b))
        if a.dtype.scalar == tl.float32 and precision.name == "TF32":
            x, y = to_tf32(x), to_tf32(y)
        self.launch.record.flops += 2 * x.size * y.shape[-1]
        # torch.tensor copies to aligned memory: the order in which a product sums may depend on how its input lies.
        product = torch.matmul(torch.tensor(np.ascontiguousarray(x)), torch.tensor(np.ascontiguousarray(y))).numpy()
        return TensorHandle((product + accumulator.data).astype(accumulator.data.dtype), accumulator.dtype.scalar)

    def create_masked_load(self, pointers, mask, other, *rest, **named):
        addresses, mask = self._access("loaded", pointers, mask)
        if other is not None:
            other = TensorHandle(np.ascontiguousarray(np.broadcast_to(other.data, mask.data.shape)), other.dtype)
        loaded = super().create_masked_load(addresses, mask, other, *rest, **named)
        if self.strict and other is None and not mask.data.all():
            loaded.data[~mask.data] = _poison(loaded)
        return loaded

    def create_masked_store(self, pointers, value, mask, *rest, **named):
        addresses, mask = self._access("stored", pointers, mask)
        value = TensorHandle(np.ascontiguousarray(np.broadcast_to(value.data, mask.data.shape)), value.dtype)
        super().create_masked_store(addresses, value, mask, *rest, **named)

    def _access(self, kind, pointers, mask):
        """Check and count; returns pointers without their tags and the mask, of one shape."""
        mask = np.asarray(mask.data if isinstance(mask, TensorHandle) else mask, bool)
        addresses = self.launch.access(kind, pointers, mask)
        mask = np.ascontiguousarray(np.broadcast_to(mask, addresses.shape))
        return TensorHandle(addresses, pointers.dtype), TensorHandle(mask, tl.int1)

    def create_atomic_rmw(self, operation, pointers, value, mask, *rest):
        if self.strict and value.dtype.scalar.is_floating():
            raise Race(f"{self.launch.where()}: the sum of float atomics depends on the order of programs")
        assert value.dtype.scalar != tl.bfloat16, "bfloat16 atomics: not here"
        return super().create_atomic_rmw(operation, self._access("atomic", pointers, mask)[0], value, mask, *rest)

    def create_atomic_cas(self, pointers, *rest):
        return super().create_atomic_cas(self._access("atomic", pointers, True)[0], *rest)


def _poison(handle: TensorHandle):
    """NaN, or the largest integer, as a lane that a load left undefined might hold."""
    dtype = handle.data.dtype
    if handle.dtype.scalar == tl.bfloat16:
        return 0x7FC0
    return np.nan if dtype.kind == "f" else True if dtype == bool else np.iinfo(dtype).max


builder = Builder()
semantic = TritonSemantic(builder)


# --- launching -------------------------------------------------------------------------------------------------------


class _Assignments(ast.NodeTransformer):
    """x = 1 makes a tensor of the number, as it does when Triton compiles."""

    def visit_Assign(self, node):
        keep = ast.Constant(False)  # do not complain about what is no number
        node.value = ast.Call(ast.Name("_to_tensor", ast.Load()), [self.visit(node.value), keep], [])
        return node


_rewritten: dict = {}


def python_function(kernel: JITFunction):
    """A kernel's or device function's source as Python that the interpreter can call. Its globals stay what they are."""
    function = kernel.fn
    if function not in _rewritten:
        tree = _Assignments().visit(kernel.parse())
        definition = tree.body[0]  # without what would be computed where it stands, not where it is called
        definition.decorator_list, definition.returns, definition.args.defaults = [], None, []
        for argument in definition.args.args:
            argument.annotation = None
        above = next(i for i, line in enumerate(kernel.raw_src) if line.lstrip().startswith("def "))
        ast.increment_lineno(ast.fix_missing_locations(tree), kernel.starting_line_number + above - 1)
        scratch: dict = {}
        exec(compile(tree, function.__code__.co_filename, "exec"), scratch)
        made = scratch[function.__name__].__code__, function.__globals__, function.__name__, function.__defaults__
        _rewritten[function] = types.FunctionType(*made)
    return _rewritten[function]


def call_device_function(kernel: JITFunction, *args, **kwargs):
    return python_function(kernel)(*args, **kwargs)


def as_argument(name: str, value, running: Running):
    """A launch's argument as the kernel sees it: a tensor of pointers or of one number."""
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    made = stock._implicit_cvt(value)
    if isinstance(value, torch.Tensor):
        made.handle.data = made.handle.data | running.tag(name)
    elif isinstance(value, TensorDescriptor):
        made.handle.base.data = made.handle.base.data | running.tag(name)
    return made


def ordered(programs: list, schedule: str) -> list:
    if schedule == "shuffle":
        return random.Random(0).sample(programs, len(programs))
    return programs if schedule == "forward" else programs[::-1]


def launch(kernel: JITFunction, log: Log, schedule: str, strict: bool, args: tuple, kwargs: dict, grid) -> None:
    """One launch, program after program."""
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    assert options.keys() <= OPTIONS, f"{kernel.__name__} knows no {sorted(options.keys() - OPTIONS)}"
    bound = kernel.signature.bind(*args, **{name: kwargs[name] for name in kwargs.keys() - options.keys()})
    bound.apply_defaults()
    values = bound.arguments
    grid = grid(values) if callable(grid) else grid
    x, y, z = grid = (*map(int, grid), 1, 1)[:3]
    assert x < 2**31 and max(y, z) < 2**16, f"{kernel.__name__}: no GPU takes a grid of {grid}"
    record = Launch(kernel, grid, dict(values), options)
    log.launches.append(record)
    bases = {name: value.base if isinstance(value, TensorDescriptor) else value for name, value in values.items()}
    running = Running(record, {n: t for n, t in bases.items() if isinstance(t, torch.Tensor)}, strict)
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    outer = builder.launch
    builder.launch = running
    builder.set_grid_dim(*grid)
    try:
        values = {n: value if n in constants else as_argument(n, value, running) for n, value in values.items()}
        programs = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]  # in a GPU's order
        for i, j, k in ordered(programs, schedule):
            running.program, running.accesses = i + x * (j + y * k), 0
            builder.set_grid_idx(i, j, k)
            python_function(kernel)(**values)
        record.programs = len(programs)
    finally:
        running.finish()
        builder.launch = outer


@contextmanager
def interpreted(schedule: str = "forward", target: str = "sm_90", strict: bool = True):
    """Interpret every launch in the block; gives the Log of them.

    schedule: the order of programs, forward, reverse or shuffle.  target: whose tiles the launchers take.
    strict: races, undefined lanes and integer overflow are found; without it, bytes are counted and bounds checked.
    """
    assert schedule in ("forward", "reverse", "shuffle") and target in targets.TARGETS
    log = Log()

    def run(kernel, *args, grid, warmup=False, **kwargs):
        launch(kernel, log, schedule, strict, args, kwargs, grid)

    deterministic, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    with ExitStack() as stack:

        def patch(where, name, value):
            stack.enter_context(mock.patch.object(where, name, value, create=True))

        patch(targets, "interpreted_as", target)
        patch(stock, "interpreter_builder", builder)
        patch(stock, "interpreter_semantic", semantic)
        patch(builder, "strict", strict)
        patch(builder, "options", stock.InterpreterOptions(sanitize_overflow=False))  # slower than what is done here
        patch(JITFunction, "run", run)
        patch(JITFunction, "__call__", call_device_function)
        patch(builtins, "_to_tensor", semantic.to_tensor)
        language = stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(language.restore)
        stack.enter_context(np.errstate(all="ignore"))
        torch.set_deterministic_debug_mode("warn")  # fills new memory with NaN
        stack.callback(torch.set_deterministic_debug_mode, deterministic)
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        yield log
