"""`python -m benchmarks.kernels`: it times nothing that is wrong, its truth is right in pieces, its bounds are sums."""

import json

import pytest
import torch

from benchmarks import kernel_cases, kernels, readme

CASES = {
    "token_logprob": lambda: kernel_cases.token_logprob(20, 300, 16),
    "logits_logprob": lambda: kernel_cases.logits_logprob(20, 300),
    "attention": lambda: kernel_cases.attention("3", [9, 5, 4], [-1, 0, 0], 4, 2, 8),
    "decode": lambda: kernel_cases.decode(4, 32, 16, 2, 4, 2, 8),
    "grpo_loss": lambda: kernel_cases.grpo_loss(100, "dapo", 17),
    "matmul": lambda: kernel_cases.matmul(20, 30, 40),
}


def small(op: str) -> kernel_cases.Case:
    """A case of the op, without what has to be compiled first."""
    case = CASES[op]()
    del case.ways["torch.compile" if "torch.compile" in case.ways else "minitrl"]
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_every_way_is_timed(op, dtype):
    case = small(op)
    rows = kernels.measure(case, dtype, "cpu", (1e10, 1e10), rounds=2)
    refused = {row["way"] for row in rows if "not_timed" in row}
    assert refused <= {"F.linear_cross_entropy"}, rows  # in bfloat16 it is less exact than plain PyTorch
    timed = {(row["way"], row["part"]) for row in rows if "not_timed" not in row}
    parts = ("forward", "backward", "both") if case.leaves else ("forward",)
    assert timed == {(way, part) for way in case.ways if way not in refused for part in parts}
    assert all(row["ms_20"] <= row["ms"] <= row["ms_80"] and row["share"] > 0 for row in rows if "part" in row)
    assert all(kernels.line(row) for row in rows)


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "raises"])
def test_what_is_wrong_is_not_timed(fault):
    case = small("matmul")

    def wrong(x):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        a = x["a"] * 1.01 if fault == "value" else x["a"] * torch.nan if fault == "nan" else x["a"].detach()
        return {"out": a @ x["b"] + 0 * x["a"].sum()}

    case.ways["wrong"] = wrong
    rows = [row for row in kernels.measure(case, torch.float32, "cpu", (1e10, 1e10), 2) if row["way"] == "wrong"]
    assert len(rows) == 1 and "part" not in rows[0]
    expected = {"value": "out is off", "gradient": "d_a is off", "nan": "out is off", "raises": "no such kernel"}
    assert expected[fault] in rows[0]["not_timed"] and "not timed" in kernels.line(rows[0])


def test_the_truth_in_pieces_is_the_whole():
    case = small("token_logprob")
    inputs = kernels.make(case, torch.float32, "cpu")
    whole = kernels.plain(case, inputs, torch.float64)
    case.chunks = 3
    pieces = kernels.plain(case, inputs, torch.float64)
    assert pieces.keys() == whole.keys() == {"logprobs", "entropy", "sum", "d_hidden", "d_weight"}
    for name, value in whole.items():
        assert torch.allclose(pieces[name], value, rtol=1e-12, atol=1e-14), name


def test_bounds():
    """H100, T 8192, V 151,936, D 2048 in bfloat16: 0.66 GB and 5.1 TFLOP forward (arithmetic bound)."""
    case = kernel_cases.token_logprob(8192, 151_936, 2048)
    forward, both = (row for row in kernels.predictions([case], [torch.bfloat16]) if row["part"] in ("forward", "both"))
    assert forward["bytes"] == pytest.approx(0.656e9, rel=0.01) and forward["flops"] == pytest.approx(5.1e12, rel=0.01)
    assert both["flops"] == 4 * forward["flops"] and forward["H100"] == pytest.approx(5.15, rel=0.01)
    assert kernels.bound(10, 1, 5.0, 1.0) == (2000.0, "bandwidth") and kernels.bound(1, 3, 1.0, 1.0)[1] == "arithmetic"


def test_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    names = {"op": "matmul", "dtype": "float32", "part": "both", "way": "minitrl"}
    names |= {"ms": 2.0, "ms_20": 1.0, "ms_80": 3.0}
    kernels.draw([names | {"shape": f"M {m}, N 5, K 6", "size": m} for m in (1, 10)], "here")
    assert (tmp_path / "kernels_here_matmul.svg").read_text().count("<svg") == 1


def test_tables_of_the_readme(tmp_path, monkeypatch):
    """kernels/README.md's tables from results, and what stands there before there are any."""
    text = "\n".join(f"<!-- table: kernel_{name} -->\n<!-- end -->" for name in ("bytes", "compile", "gpus", "cpu"))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.filled(text).count("Not made yet") == 2 and readme.filled(text).count("Not measured yet") == 2
    counted = {"whose": "minitrl", "kernel": "k", "shape": "T 1", "requested": 3e6, "touched": 2e6, "least": 2e6}
    compiled = {"kernel": "k", "case": "c", "dtype": "bfloat16", "registers": 99, "spills": 0, "blocks": 2, "mma": 8}
    case = small("matmul")
    timed = kernels.measure(case, torch.float32, "cpu", (1e10, 1e10), 2)
    timed.append({name: timed[0][name] for name in ("op", "shape", "dtype")} | {"way": "w", "not_timed": "it is wrong"})
    results = {
        "kernel_bytes": {"rows": [counted | {"workspace": 5e6}]},
        "compile": {"triton": "3.7.1", "rows": [compiled | {"target": "sm_90"}, compiled | {"target": "sm_80"}]},
        "kernels_cpu_2": {"command": "python -m benchmarks.kernels", "device": "cpu", "rows": timed},
        "kernels_H100": {"command": "the same", "device": "H100", "rows": [r | {"peak_bytes": 2**20} for r in timed]},
    }
    for name, value in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    filled = readme.filled(text)
    assert "| minitrl | `k` | T 1 | 3.00 | 2.00 | 2.00 | 1.000 | 5.00 |" in filled
    assert "| `k` | c | 99 / 0 / 2 / 8 | 99 / 0 / 2 / 8 | – | – |" in filled
    assert filled.count("not timed: it is wrong") == 2 and "1 MiB" in filled and "`the same` on H100" in filled
    assert readme.filled(filled) == filled
