"""Compile every Triton kernel for every target, as the launchers would launch it, and read what came out. No GPU.

    python -m benchmarks.compile_report              # prints the table, writes benchmarks/results/compile.json
    python -m benchmarks.compile_report --case attention --target sm_90 --dtype bfloat16     # some of it

Nothing here says how a kernel is configured. Each op runs as in training (launches.py), and where it would launch a
kernel, Triton compiles it for a device that is not there: same arguments, same specialisation, same options. A kernel
is launched for 48, 49 and 1 rows of data; if Triton makes more than one binary of them, rows do not have the same bits
in every batch, and the column "binaries" shows it. Where a case launches a kernel in several ways, the worst is shown.

registers   of a thread, of 255 (on gfx942: 512).  spills: instructions that move what did not fit to memory and back
shared      bytes of shared memory of a block; the limit of the target is in LIMITS
blocks      that fit on one multiprocessor at once by registers, shared memory, threads and tensor memory
mma         matrix instructions: HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100, v_mfma on gfx942
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from benchmarks import launches
from minitrl.kernels import targets

RESULT = Path(__file__).parent / "results" / "compile.json"
ROWS = (48, 49, 1)  # Triton makes other binaries of integers that 16 divides, and of 1, unless it is told not to

KIB = 1024
# Shared memory of a block, of a multiprocessor, and its resident threads: CUDA programming guide, table of compute
# capabilities, and AMD's CDNA 3 instruction set manual. sm_80 and above take 1 KiB of each block's for themselves.
LIMITS = {
    "sm_80": (163 * KIB, 164 * KIB, 2048),
    "sm_90": (227 * KIB, 228 * KIB, 2048),
    "sm_100": (227 * KIB, 228 * KIB, 2048),
    "gfx942": (64 * KIB, 64 * KIB, 2048),
}

# What the peers' kernels compile to, with their own configurations, bfloat16: (kernel, target, registers, spills).
# Compiled with Triton 3.7.1 from: cut-cross-entropy 25.1.1, verl at 2026-01-29, liger-kernel at 2026-11.
PEERS = [
    ("cut-cross-entropy lse forward, 256x128x32", {"sm_80": (215, 0), "sm_90": (166, 0), "sm_100": (144, 0)}),
    ("cut-cross-entropy backward, 128x128x32", {"sm_80": (255, 0), "sm_90": (255, 0), "sm_100": (255, 126)}),
    ("verl linear cross entropy forward", {"sm_80": (255, 472), "sm_90": (255, 162), "sm_100": (255, 445)}),
    ("verl the same, by TMA", {"sm_90": (255, 44), "sm_100": (255, 331)}),
    ("liger grpo forward, N 2048", {"sm_80": (80, 0), "sm_90": (80, 0), "sm_100": (53, 0)}),
    ("liger grpo backward, N 4096", {"sm_80": (30, 0), "sm_90": (32, 0), "sm_100": (30, 0)}),
]


# --- compiling instead of launching ----------------------------------------------------------------------------------


class Absent:
    """What Triton asks the driver of a GPU, answered for one that is not there."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.device = targets.TARGETS.index(target)  # Triton keeps what it compiled by device
        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling(target: str):
    """Gives a list of (kernel's name, its binary), to which each launch in the block adds instead of being launched."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found, launch = [], JITFunction.run

    def run(kernel, *args, grid, warmup=False, **options):
        found.append((kernel.__name__, launch(kernel, *args, grid=grid, warmup=True, **options)))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(driver, "_active", Absent(target)),
        mock.patch.object(targets, "interpreted_as", target),
        mock.patch.object(torch, "empty", torch.zeros),  # nobody writes what kernels would: no garbage as indices
    ):
        yield found


# --- reading a binary ------------------------------------------------------------------------------------------------


def tool(name: str, *arguments) -> str:
    """The output of a program that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_facts(binary) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", file.name)
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
    names = [match.split(".")[0] for match in re.findall(pattern, sass, re.MULTILINE)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": names.count("LDL") + names.count("STL"),
        "mma": sum(bool(re.fullmatch(r"HMMA|DMMA|HGMMA|UTC\w*MMA", name)) for name in names),
        "tma": sum(bool(re.fullmatch(r"UTMA\w+|UBLKCP", name)) for name in names),
        "instructions": len(names),
        "hash": hashlib.sha256(
            "\n".join(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/.*", sass, re.MULTILINE)).encode()
        ).hexdigest(),
    }


def amd_facts(binary) -> dict:
    text = binary.asm["amdgcn"]
    names = re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|ds_\w+|scratch_\w+)", text, re.MULTILINE)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
        "mma": sum(name.startswith("v_mfma") for name in names),
        "tma": 0,
        "instructions": len(names),
        "hash": hashlib.sha256("\n".join(re.findall(r"^\s+\w.*", text, re.MULTILINE)).encode()).hexdigest(),
    }


def blocks(target: str, facts: dict, threads: int, tensor_columns: int) -> int:
    """How many blocks fit on one multiprocessor."""
    _, shared, resident = LIMITS[target]
    if target == "gfx942":  # 4 SIMDs of 8 waves; 512 registers a lane, dealt out by 8
        waves = 4 * min(8, 512 // (-(-max(1, facts["registers"]) // 8) * 8))
        return min(waves // (threads // 64), shared // max(1, facts["shared"]))
    registers = -(-facts["registers"] // 8) * 8  # dealt out to a warp by 256
    by_tensor_memory = 512 // tensor_columns if tensor_columns else 32
    return min(
        65536 // (registers * threads), shared // (facts["shared"] + KIB), resident // threads, by_tensor_memory, 32
    )


def read(target: str, binary) -> dict:
    facts = nvidia_facts(binary) if target.startswith("sm_") else amd_facts(binary)
    metadata = binary.metadata
    facts["shared"], facts["dots"] = metadata.shared, binary.asm["ttir"].count("tt.dot ")
    facts["warps"], facts["stages"] = metadata.num_warps, metadata.num_stages
    threads = metadata.num_warps * (64 if target == "gfx942" else 32)
    return facts | {"blocks": blocks(target, facts, threads, getattr(metadata, "tmem_size", 0) or 0)}


# --- the report ------------------------------------------------------------------------------------------------------


def compiled(unit: tuple[str, str, str]) -> list[dict]:
    """One case for one target and dtype: a row of the report for each of its kernels."""
    name, target, dtype = unit
    torch.set_num_threads(1)
    case = launches.cases()[name]
    runs = []
    for rows in ROWS:
        with compiling(target) as found:
            case(launches.DTYPES[dtype], rows)
        runs.append(found)
    report = []
    for kernel in dict.fromkeys(kernel for kernel, _ in runs[0]):
        # The first launch of the kernel for each count of rows, the second for each, ...
        alike = list(zip(*([binary for other, binary in found if other == kernel] for found in runs)))
        facts = {id(binary): read(target, binary) for binary in {id(b): b for some in alike for b in some}.values()}
        worst = {fact: WORST[fact](one[fact] for one in facts.values()) for fact in WORST}
        worst["binaries"] = max(len({facts[id(binary)]["hash"] for binary in some}) for some in alike)
        worst["hashes"] = sorted({one["hash"] for one in facts.values()})
        report.append({"kernel": kernel, "case": name, "dtype": dtype, "target": target} | worst)
    return report


# Of the binaries of a kernel that a case launches in several ways (x W^T, dY W, dY^T X), the report says the worst.
WORST = dict.fromkeys(("warps", "stages", "registers", "spills", "shared", "dots", "instructions"), max)
WORST |= dict.fromkeys(("blocks", "mma", "tma"), min)


def collect(wanted, dtypes, cases, processes: int = 2) -> list[dict]:
    """The rows of the report, each binary compiled once, by several processes."""
    units = [(case, target, dtype) for target in wanted for dtype in dtypes for case in cases]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        rows = [row for rows in pool.map(compiled, units) for row in rows]
    rows.sort(key=lambda row: (row["kernel"], row["case"], row["dtype"], targets.TARGETS.index(row["target"])))
    return rows


COLUMNS = ("kernel", "case", "dtype", "target", "warps", "stages", "registers", "spills", "shared", "blocks", "mma")


def table(rows: list[dict], columns=(*COLUMNS, "tma", "instructions", "binaries")) -> str:
    lines = [columns, *([f"{row[c]:,}" if isinstance(row[c], int) else row[c] for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    numeric = [bool(rows) and isinstance(rows[0][c], int) for c in columns]
    cells = ([x.rjust(w) if n else x.ljust(w) for x, w, n in zip(line, widths, numeric)] for line in lines)
    return "\n".join("  ".join(line) for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=[""], help="only cases whose name begins with one of these")
    parser.add_argument("--not", dest="without", help="no cases whose name contains this")
    parser.add_argument("--target", nargs="+", default=targets.TARGETS, choices=targets.TARGETS)
    parser.add_argument("--dtype", nargs="+", default=list(launches.DTYPES), choices=launches.DTYPES)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/compile.json, if nothing is left out")
    options = parser.parse_args()
    import triton

    known = launches.cases()
    cases = [name for name in known if name.startswith(tuple(options.case))]
    cases = [name for name in cases if not options.without or options.without not in name]
    rows = collect(options.target, options.dtype, cases, options.processes)
    print(f"Triton {triton.__version__}\n{table(rows)}\n\npeers, bfloat16, as they ship: registers / spills")
    for name, facts in PEERS:
        print(f"{name:45}", "  ".join(f"{target} {regs} / {spills}" for target, (regs, spills) in facts.items()))
    whole = (len(cases), len(options.target), len(options.dtype)) == (
        len(known),
        len(targets.TARGETS),
        len(launches.DTYPES),
    )
    if options.out or whole:
        peers = [{"kernel": name, "registers, spills": facts} for name, facts in PEERS]
        text = json.dumps({"triton": triton.__version__, "torch": torch.__version__, "rows": rows, "peers": peers})
        (options.out or RESULT).write_text(text.replace('{"kernel"', '\n{"kernel"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
