"""Time every kernel beside all other ways to compute the same, forward, backward and both:

    python -m benchmarks.kernels                        on a GPU if there is one
    python -m benchmarks.kernels --op attention --dtype bfloat16

On a GPU it writes benchmarks/results/kernels_NAME.json and draws kernels_NAME_OP.svg if matplotlib is installed. A row
has the median and the 20th and 80th percentile of the time (caches flushed between calls), the peak of memory above the
inputs, and the share of the bound: the time that the least traffic takes at the bandwidth measured on this very device,
or the arithmetic at the rate of its fastest matrix product, whichever is longer, over the median.

Baselines are plain PyTorch, torch.compile of it, and, as far as they are installed, liger-kernel, cut-cross-entropy,
flash-attn and torch's varlen_attn (benchmarks/kernel_cases.py). A way is timed only if on those very inputs it is as
exact as it has to be: at most twice as far from the truth as plain PyTorch in the same dtype.

Without a GPU it prints what can be known: least bytes and FLOPs, the time that they take at the published limits of
four GPUs, the counted bytes (benchmarks.kernel_bytes) and the compile report (benchmarks.compile_report) as far as
their results are there; and it times the CPU's path against its baselines, into kernels_cpu_THREADS.json.
"""

import argparse
import ctypes
import gc
import itertools
import json
import logging
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks import kernel_cases
from benchmarks.compile_report import RESULT as COMPILED
from benchmarks.compile_report import table
from benchmarks.kernel_bytes import RESULT as COUNTED
from minitrl import distributed

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the largest value: what any order of summation may cost.
ROUNDING = {torch.float32: 8e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}

# Makers' data sheets: bytes a second, and dense FLOPs a second in bfloat16 and float32 (without TF32).
GPUS = {
    "A100": (2.039e12, 312e12, 19.5e12),
    "H100": (3.35e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
    "MI300X": (5.3e12, 1307e12, 163e12),
}


# --- is it right? ----------------------------------------------------------------------------------------------------


def make(case, dtype, device: str) -> dict:
    """The case's inputs; leaves require gradients."""
    inputs = case.make(torch.Generator().manual_seed(0))
    for name, value in inputs.items():
        kind = dtype if value.is_floating_point() and name not in case.float32 else value.dtype
        inputs[name] = value.to(device, kind).requires_grad_(name in case.leaves)
    return inputs


def differentiated(found: dict) -> list:
    return [value for value in found.values() if value.requires_grad]


def upstream(outputs: list) -> list:
    """Ones for numbers by token; elsewhere numbers of both signs that are the same for every way."""
    numbers = (torch.arange(x.numel(), device=x.device).view(x.shape) % 7 - 3 for x in outputs)
    return [torch.ones_like(x) if x.dim() < 2 else number.to(x) for x, number in zip(outputs, numbers)]


def answer(way, inputs: dict, leaves) -> dict:
    """Outputs, their sum, and gradients, by name."""
    found = way(inputs)
    carrying = differentiated(found)
    gradients = torch.autograd.grad(carrying, [inputs[name] for name in leaves], upstream(carrying)) if leaves else ()
    found = {name: value.detach() for name, value in found.items()}
    if "logprobs" in found:
        found["sum"] = found["logprobs"].sum(dtype=torch.float64)
    return found | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}


def plain(case, inputs: dict, dtype) -> dict:
    """PyTorch's answer in a dtype, in pieces where the whole would not fit in memory; gradients then in that dtype."""
    cast = {n: x.detach().to(dtype if x.is_floating_point() else x.dtype) for n, x in inputs.items()}
    parts = [x.chunk(case.chunks) for x in (cast[name] for name in case.pieces)] if case.chunks > 1 else [()]
    answers = []
    for rows in zip(*parts) if case.chunks > 1 else [()]:
        given = cast | dict(zip(case.pieces, rows))
        given = {name: x.detach().requires_grad_(name in case.leaves) for name, x in given.items()}
        answers.append(answer(case.ways["PyTorch"], given, case.leaves))
    whole = answers.pop(0)
    for more in answers:
        for name, value in more.items():
            along = name.removeprefix("d_") in case.pieces or name in ("logprobs", "entropy")
            whole[name] = torch.cat([whole[name], value]) if along else whole[name] + value
    return whole


def complaint(found: dict, ordinary: dict, truth: dict, dtype) -> str | None:
    """What is wrong with an answer: None, or which number is too far off."""
    for name, value in found.items():
        true = truth[name].double()
        scale = true.abs().max().clamp(min=1e-30)
        error, usual = ((x.double() - true).abs().max() / scale for x in (value, ordinary[name]))
        if not error <= 2 * usual + ROUNDING[dtype]:
            return f"{name} is off by {error:.1e} of its largest value, plain PyTorch by {usual:.1e}"
    return None


# --- how long does it take? ------------------------------------------------------------------------------------------


def parts(way, inputs: dict, leaves) -> dict:
    """Functions that do the forward pass, the backward pass, and both."""
    chosen = [inputs[name] for name in leaves]

    def forward():
        with torch.set_grad_enabled(bool(leaves)):
            return differentiated(way(inputs)) if leaves else way(inputs)

    if not leaves:
        return {"forward": forward}
    carrying = forward()
    given = upstream(carrying)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(carrying, chosen, given, retain_graph=True),
        "both": lambda: torch.autograd.grad(forward(), chosen, given),
    }


def timed_on_gpu(functions: dict) -> dict:
    """(way, part) -> milliseconds: median, 20th and 80th percentile."""
    from triton.testing import do_bench

    return {key: do_bench(f, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8]) for key, f in functions.items()}


def timed_on_cpu(functions: dict, rounds: int = 5) -> dict:
    """The same in turns, so that whatever else the machine does falls on all."""
    times = {key: [] for key in functions}
    for _, (key, function) in itertools.product(range(rounds), functions.items()):
        began = time.perf_counter()
        function()
        times[key].append(1000 * (time.perf_counter() - began))
    quantiles = {key: statistics.quantiles(spent, n=5, method="inclusive") for key, spent in times.items()}
    return {key: (statistics.median(times[key]), cuts[0], cuts[3]) for key, cuts in quantiles.items()}


def peak(function, device: str) -> int | None:
    """Bytes above those allocated before; on a CPU, of the process, where Linux counts them."""
    if device == "cpu":
        return peak_of_process(function) if sys.platform == "linux" else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_of_process(function) -> int:
    """The most memory that the process has held during the call, less what it held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would not count
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    before = memory_of_process("VmRSS")
    function()
    return memory_of_process("VmHWM") - before


def memory_of_process(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def head_memory(dtype, vocabulary: int, T: int = 512, D: int = 576) -> dict:
    """What token_logprob takes forward and backward, beyond the weight's gradient, and how large its logits would be."""
    case = kernel_cases.token_logprob(T, vocabulary, D)
    inputs = make(case, dtype, "cpu")
    both = parts(case.ways["minitrl"], inputs, case.leaves)["both"]
    weight = inputs["weight"]
    taken = peak_of_process(both) - weight.numel() * weight.element_size()
    row = {"T": T, "V": vocabulary, "D": D, "dtype": str(dtype).removeprefix("torch."), "peak_bytes": taken}
    return row | {"logits_bytes": 4 * T * vocabulary}


def limits(device: str, dtype) -> tuple[float, float]:
    """Bytes a second of a copy, and FLOPs a second of a large product, on this device now."""
    n = 4096 if device == "cpu" and dtype == torch.float32 else 2048 if device == "cpu" else 8192
    source = torch.ones(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n // 2, n // 2, device=device).to(dtype)
    functions = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    for function in functions.values():
        function()
    times = (timed_on_cpu if device == "cpu" else timed_on_gpu)(functions)
    return 2e3 * source.numel() / times["copy"][0], 2e3 * (n // 2) ** 3 / times["product"][0]


def bound(traffic: int, flops: int, bandwidth: float, rate: float) -> tuple[float, str]:
    """Milliseconds that nothing can be faster than, and why."""
    by_traffic, by_arithmetic = 1e3 * traffic / bandwidth, 1e3 * flops / rate
    return (by_traffic, "bandwidth") if by_traffic >= by_arithmetic else (by_arithmetic, "arithmetic")


def needs(case, dtype) -> dict:
    """Least bytes and FLOPs of each part of a case."""
    size = torch.empty(0, dtype=dtype).element_size()
    found = {part: [traffic, case.flops.get(part, 0)] for part, traffic in case.bytes(size).items()}
    if case.leaves:
        found["both"] = [sum(numbers) for numbers in zip(*found.values())]
    return found


def measure(case, dtype, device: str, limit: tuple[float, float], rounds: int) -> list[dict]:
    """A row for each way and part of a case, or why there is none."""
    inputs = make(case, dtype, device)
    names = {"op": case.op, "shape": case.shape, "size": case.size, "dtype": str(dtype).removeprefix("torch.")}
    truth = plain(case, inputs, torch.float64 if dtype == torch.float32 else torch.float32)
    ordinary = plain(case, inputs, dtype if not case.float32 else torch.float32)
    functions, rows = {}, []
    for name, way in case.ways.items():
        try:
            wrong = complaint(answer(way, inputs, case.leaves), ordinary, truth, dtype)
            if wrong is None:
                functions |= {(name, part): function for part, function in parts(way, inputs, case.leaves).items()}
                if device != "cpu":  # one way at a time: what it keeps for its backward pass is gone before the next
                    rows += timed(names, timed_on_gpu(functions), functions, needs(case, dtype), limit, device)
        except Exception as error:  # peers fail in many ways; the row says how
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if wrong is not None:
            rows.append(names | {"way": name, "not_timed": wrong})
        if device != "cpu":
            functions.clear()
            torch.cuda.empty_cache()
    if device == "cpu":
        rows += timed(names, timed_on_cpu(functions, rounds), functions, needs(case, dtype), limit, device)
    return rows


def timed(
    names: dict, times: dict, functions: dict, least: dict, limit: tuple[float, float], device: str
) -> list[dict]:
    """The rows of what was timed."""
    rows = []
    for (name, part), (median, low, high) in times.items():
        fastest, why = bound(*least[part], *limit)
        row = names | {"way": name, "part": part, "ms": median, "ms_20": low, "ms_80": high}
        rows.append(row | {"share": fastest / median, "bound": why, "peak_bytes": peak(functions[name, part], device)})
    return rows


# --- what is printed -------------------------------------------------------------------------------------------------


def line(row: dict) -> str:
    start = f"{row['op']:15}{row['dtype']:10}{row['shape']:60}{row['way']:24}"
    if "not_timed" in row:
        return f"{start}not timed: {row['not_timed']}"
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:10.0f} MiB"
    spread = f"{row['ms']:10.3f} ms ({row['ms_20']:.3f} to {row['ms_80']:.3f})"
    return f"{start}{row['part']:9}{spread:40}{row['share']:6.0%} of {row['bound']}{memory}"


def predictions(found: list, dtypes: list) -> list[dict]:
    """Least bytes and FLOPs of each case, and the milliseconds that four GPUs cannot go below."""
    rows = []
    for case, dtype in itertools.product(found, dtypes):
        for part, (traffic, flops) in needs(case, dtype).items():
            row = {"op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch."), "part": part}
            row |= {"bytes": traffic, "flops": flops}
            for gpu, (bandwidth, half, single) in GPUS.items():
                row[gpu] = bound(traffic, flops, bandwidth, single if dtype == torch.float32 else half)[0]
            rows.append(row)
    return rows


def predicted_table(rows: list[dict]) -> str:
    lines = [f"{'least time at the published limits, ms':98}{'MB':>10}{'GFLOP':>10}" + "".join(f"{g:>9}" for g in GPUS)]
    for row in rows:
        start = f"{row['op']:15}{row['dtype']:10}{row['shape']:64}{row['part']:9}"
        numbers = f"{row['bytes'] / 1e6:10.1f}{row['flops'] / 1e9:10.1f}" + "".join(f"{row[g]:9.4f}" for g in GPUS)
        lines.append(start + numbers)
    return "\n".join(lines)


def known_without_gpu() -> str:
    """The tables of the byte counter and of the compile report, if they were made."""
    from benchmarks.kernel_bytes import line as counted_line

    texts = []
    for path, command, show in (
        (COUNTED, "kernel_bytes", lambda rows: "\n".join(map(counted_line, rows))),
        (COMPILED, "compile_report", table),
    ):
        if path.exists():
            texts.append(f"{path.name}:\n{show(json.loads(path.read_text())['rows'])}")
        else:
            texts.append(f"{path.name} is not there: python -m benchmarks.{command} makes it")
    return "\n\n".join(texts)


def kind_of(row: dict) -> tuple[str, str]:
    """Rows that differ in their size alone are one kind."""
    return row["dtype"], re.sub(r"\b(T|M) \d+|^\d+ ", "", row["shape"]).strip(", ")


def draw(rows: list[dict], name: str) -> None:
    """For each op the time of forward and backward over its sizes, by way; the bands are 20 to 80 %."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.get("part") in ("both", "forward")]
    for op in dict.fromkeys(row["op"] for row in timed):
        mine = [row for row in timed if row["op"] == op]
        last = "both" if any(row["part"] == "both" for row in mine) else "forward"
        mine = [row for row in mine if row["part"] == last]
        kinds = list(dict.fromkeys(map(kind_of, mine)))
        figure = Figure(figsize=(5 * len(kinds), 4), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
            shown = [row for row in mine if kind_of(row) == kind]
            for way in dict.fromkeys(row["way"] for row in shown):
                points = sorted((r["size"], r["ms"], r["ms_20"], r["ms_80"]) for r in shown if r["way"] == way)
                sizes, medians, lows, highs = zip(*points)
                axes.plot(sizes, medians, marker="o", label=way)
                axes.fill_between(sizes, lows, highs, alpha=0.2)
            axes.set(title=f"{op}, {last}\n{kind[0]}, {kind[1]}", xlabel="size", ylabel="ms")
            axes.loglog()
            axes.legend(fontsize=7)
        figure.savefig(RESULTS / f"kernels_{name}_{op}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    found = kernel_cases.cases(gpu)
    ops = list(dict.fromkeys(case.op for case in found))
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5, help="on a CPU: how often each way is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: percentiles need at least 2")
    if os.environ.get("MINITRL_KERNELS"):
        raise SystemExit("MINITRL_KERNELS is set: unset it, or plain PyTorch would be timed under the kernels' name")
    distributed.start("cuda" if gpu else "cpu")  # as every command does first
    torch.set_num_threads(options.threads)
    torch._functorch.config.donated_buffer = False  # torch.compile's backward pass is run again and again
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # says where the reference breaks its graph
    device = "cuda" if gpu else "cpu"
    dtypes = [DTYPES[name] for name in options.dtype]
    found = [case for case in found if case.op in options.op]
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name()) if gpu else f"cpu_{options.threads}"
    threads = "" if gpu else f" --threads {options.threads}"
    value = {"command": f"python -m benchmarks.kernels --dtype {' '.join(options.dtype)}{threads}", "torch": torch.__version__}
    value |= {"device": name if gpu else f"a CPU, threads: {options.threads}", "limits": {}, "rows": []}
    value |= {} if gpu else {"memory": []}
    if not gpu:
        value["predicted"] = predictions([c for c in kernel_cases.cases(True) if c.op in options.op], dtypes)
        print(predicted_table(value["predicted"]), known_without_gpu(), sep="\n\n", end="\n\n", flush=True)
    else:
        import triton

        value["triton"] = triton.__version__
    for dtype in dtypes:
        limit = limits(device, dtype)
        value["limits"][str(dtype)] = limit
        print(f"{name}, {dtype}: copies at {limit[0] / 1e9:.0f} GB/s, products at {limit[1] / 1e12:.2f} TFLOP/s")
        if not gpu and "token_logprob" in options.op:
            for row in (head_memory(dtype, V) for V in (32_768, 151_936, 262_144)):
                value["memory"].append(row)
                print("token_logprob forward and backward, V {V}, {dtype}: ".format(**row), end="")
                print("{:.0f} MiB above the weight and its gradient".format(row["peak_bytes"] / 2**20))
        for case in found:
            if dtype != torch.float32 and len(case.float32) and torch.float32 in dtypes:
                continue  # its inputs are float32 whatever the model's dtype is
            for row in measure(case, dtype, device, limit, options.rounds):
                value["rows"].append(row | ({} if gpu else {"load_average": os.getloadavg()[0]}))
                print(line(row), flush=True)
            if options.op == ops:  # what is done is kept
                (RESULTS / f"kernels_{name}.json").write_text(json.dumps(value).replace('{"op"', '\n{"op"') + "\n")
    if options.op == ops:
        try:
            draw(value["rows"], name)
        except ModuleNotFoundError:
            print("no plots: pip install matplotlib")


if __name__ == "__main__":
    main()
