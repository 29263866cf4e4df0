"""What the kernels compile to for GPUs that are not here, in the configurations that the launchers select."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import launches  # noqa: E402
from benchmarks.compile_report import LIMITS, compiled  # noqa: E402

from minitrl.kernels.targets import CONFIGS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = ["sm_80", "sm_90", "sm_100"]


def report(folder, *options) -> list[dict]:
    out = folder / "compile.json"
    command = [sys.executable, "-m", "benchmarks.compile_report", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What most trainings launch. One subprocess compiles it all: about a minute on two cores."""
    return report(tmp_path_factory.mktemp("fast"), "--dtype", "bfloat16", "--target", *NVIDIA, "--not", "256")


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory):
    return report(tmp_path_factory.mktemp("all"))


def offenders(rows: list[dict], wrong) -> list[str]:
    return [f"{row['kernel']} ({row['case']}, {row['dtype']}, {row['target']}): {row}" for row in rows if wrong(row)]


def test_every_kernel_is_there(rows):
    """Nothing is green because it was not compiled."""
    sources = (ROOT / "kernels").glob("*_triton.py")
    defined = {
        name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    assert defined and {row["kernel"] for row in rows} == defined
    assert {f"{name.split('/')[0]}_kernel" for name in CONFIGS} == defined
    assert {row["target"] for row in rows} == set(NVIDIA)


def test_nothing_spills(rows):
    assert not offenders(rows, lambda row: row["spills"])


def test_shared_memory_is_within_the_limit(rows):
    assert not offenders(rows, lambda row: row["shared"] > LIMITS[row["target"]][0] or row["blocks"] < 1)


def test_dots_are_matrix_instructions(rows):
    assert any(row["dots"] for row in rows)
    assert not offenders(rows, lambda row: row["dots"] and not row["mma"])


def test_one_binary_for_any_number_of_rows(rows):
    assert not offenders(rows, lambda row: row["binaries"] != 1)


def test_token_logprob_shares_a_processor_or_asks_for_no_more_than_the_best_peer(rows):
    """cut-cross-entropy's tiles of 256 by 128 ask for 2 T V D (1 / 256 + 1 / 128) bytes."""
    for target in NVIDIA:
        wide = CONFIGS["token_logprob_fwd"][target]
        assert 1 / wide["ROWS"] + 1 / wide["COLUMNS"] <= 1 / 256 + 1 / 128
    narrow = [r for r in rows if (r["kernel"], r["case"]) == ("token_logprob_fwd_kernel", "token_logprob narrow")]
    assert len(narrow) == len(NVIDIA) and not offenders(narrow, lambda row: row["blocks"] < 2)


def test_deterministic_decoding_is_the_attention_kernel(rows):
    """Its bits are those of training because it is the same binary."""
    kernels = [row for row in rows if row["kernel"] == "attention_fwd_kernel"]
    for target in NVIDIA:
        decoding, training = (
            [row["hashes"] for row in kernels if (row["case"], row["target"]) == (case, target)]
            for case in ("decode 64 as attention", "attention 64")
        )
        assert len(decoding) == len(training) == 1 and decoding == training


@pytest.mark.slow
def test_all_dtypes_sizes_and_targets(all_rows):
    """On a target as a launcher finds it, every kernel runs: in its shared memory, a binary for any number of rows."""
    assert {row["target"] for row in all_rows} == set(LIMITS)
    assert not offenders(all_rows, lambda row: row["shared"] > LIMITS[row["target"]][0] or row["blocks"] < 1)
    assert not offenders(all_rows, lambda row: row["binaries"] != 1)
    halves = [row for row in all_rows if row["dtype"] != "float32" and row["dots"]]
    assert halves and not offenders(halves, lambda row: not row["mma"])


# A kernel with every fault that the report is there to find.
FAULTY = """
import torch, triton, triton.language as tl
from minitrl.kernels.targets import config

@triton.jit
def faulty_kernel(x, out, T, N: tl.constexpr):
    x += tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x)
    tl.store(out + tl.arange(0, N), tl.sum(tile, 0) + T)
    tl.store(x, tile)

def faulty(dtype, rows):
    x = torch.zeros(64, 64)
    faulty_kernel[(1,)](x, x, rows, 64, num_warps=1, maxnreg=32)
"""


def test_the_report_finds_spills_and_second_binaries(tmp_path, monkeypatch):
    """One for a single row, which Triton then compiles into the code, and one for all other numbers."""
    (tmp_path / "faulty_module.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    import faulty_module

    monkeypatch.setattr(launches, "cases", lambda: {"faulty": faulty_module.faulty})
    [row] = compiled(("faulty", "sm_90", "float32"))
    assert row["spills"] > 0 and row["binaries"] == 2 and row["dots"] == row["mma"] == 0
