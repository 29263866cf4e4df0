"""What the kernels compile to for GPUs that are not here, in the configurations that the launchers select."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.compile_report import LIMITS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = ["sm_80", "sm_90", "sm_100"]
WITHOUT_DOT = {""}


def report(folder, *options) -> list[dict]:
    out = folder / "compile.json"
    command = [sys.executable, "-m", "benchmarks.compile_report", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))["rows"]
