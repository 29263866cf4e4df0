"""The generation engine against transformers' generate, against what its matrix products alone take, and against its own
deterministic mode, on a CPU:

    python -m benchmarks.rollouts --model OUT/SmolLM2-135M-Instruct [--peers PYTHON]

    16, 64    so many requests at once, prompts of 16 to 128 random tokens, 64 new tokens each, end tokens ignored
    group     8 completions of one prompt of 1,024 tokens, 64 new tokens each

Each side is a process of its own that stays alive, and they take turns, so that whatever else the machine does falls on
all (grpo_step.py). `ours` gets the requests by `Engine.submit`, and notes when each token is there; `exact` is the same
with deterministic=True; `theirs` gets them as one batch, padded on the left. `limit` multiplies by the packed weights of
the model, and does nothing else: all prompt tokens (of the group's prompt: once), and then 63 times as many rows as there
are requests, the head's product included.

Writes benchmarks/results/rollouts.json: medians over the rounds, and the rounds themselves.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.grpo_step import RESULTS, report, take_turns, wait  # noqa: E402

SECTIONS = {"16": ("ours", "exact", "theirs", "limit"), "64": ("ours", "exact", "theirs", "limit")}
SECTIONS["group"] = ("ours", "theirs", "limit")
NEW = 64  # tokens


def prompts(section: str):
    """Per request its prompt's ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = 1 if section == "group" else int(section)
    lengths = [1024] if section == "group" else torch.randint(16, 129, (count,), generator=generator).tolist()
    return [torch.randint(100, 49000, (length,), generator=generator).tolist() for length in lengths]


def ours(section: str, dtype: str, model: str, deterministic: bool):
    """A round with the engine; what it reports beside its seconds are milliseconds, and tokens of prompts computed."""
    import torch

    import minitrl
    from minitrl import distributed

    distributed.start("cpu")  # as every command does first
    policy, tokenizer = minitrl.load(model, dtype=getattr(torch, dtype))
    engine, given = minitrl.Engine(policy, tokenizer, deterministic=deterministic), prompts(section)
    n, fed, forward = 8 if section == "group" else 1, [], policy.hidden
    policy.hidden = lambda tokens, *rest: fed.append(len(tokens)) or forward(tokens, *rest)

    def round_() -> dict:
        arrivals, began = {}, time.perf_counter()
        fed.clear()
        for p, prompt in enumerate(given):
            arrived = lambda g, *_, p=p: arrivals.setdefault((p, g), []).append(time.perf_counter() - began)  # noqa: E731
            engine.submit(prompt, n=n, max_tokens=NEW, ignore_eos=True, seed=p, on_token=arrived)
        while not engine.idle:
            engine.step()
        engine.weights_changed(engine.version + 1)  # nothing is left for the next round
        firsts = sorted(times[0] for times in arrivals.values())
        gaps = sorted(b - a for times in arrivals.values() for a, b in zip(times, times[1:]))
        assert len(gaps) == len(given) * n * (NEW - 1)
        found = {"first": firsts[len(firsts) // 2], "token": gaps[len(gaps) // 2], "token_p99": gaps[len(gaps) * 99 // 100]}
        more = {f"{name}_ms": round(1e3 * seconds, 2) for name, seconds in found.items()}
        return more | {"prompt_tokens": sum(fed) - len(gaps)}

    return round_


def theirs(section: str, dtype: str, model: str):
    """A round with transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM

    policy, given = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval(), prompts(section)
    given = given * 8 if section == "group" else given
    longest = max(map(len, given))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in given])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in given])
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0, pad_token_id=0)

    def round_() -> dict:
        with torch.no_grad():
            out = policy.generate(input_ids=ids, attention_mask=mask, **options)
        assert out.shape == (len(given), longest + NEW)
        return {}

    return round_


def limit(section: str, dtype: str, model: str):
    """A round of the products alone."""
    import torch

    import minitrl
    from minitrl.kernels.linear import HAS_ONEDNN

    assert HAS_ONEDNN, "the limit is that of oneDNN's packed products"
    policy, _ = minitrl.load(model, dtype=getattr(torch, dtype))
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    blocks = [(layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj) for layer in policy.layers]
    weights = [projection.weight.detach() for block in blocks for projection in block]
    packed, head = [pack(weight, 32) for weight in weights], pack(policy.head_weight.detach(), 32)
    given = prompts(section)
    rows = 8 if section == "group" else len(given)

    def products(count: int) -> None:
        inputs = {weight.shape[1]: torch.ones(count, weight.shape[1], dtype=weight.dtype) for weight in weights}
        for weight, ready in zip(weights, packed):
            multiply(inputs[weight.shape[1]], ready, None, "none", [], "")

    def round_() -> dict:
        with torch.inference_mode():
            products(sum(map(len, given)))
            for step in range(NEW):
                if step:
                    products(rows)
                states = torch.ones(rows, policy.head_weight.shape[1], dtype=policy.head_weight.dtype)
                multiply(states, head, None, "none", [], "")
        return {}

    return round_


def work(side: str, section: str, dtype: str, model: str) -> None:
    """A side's process: a round for each line of input."""
    sys.stdout = sys.stderr  # what libraries print is not a report
    made = {
        "ours": lambda *given: ours(*given, False),
        "exact": lambda *given: ours(*given, True),
        "theirs": theirs,
        "limit": limit,
    }
    round_ = made[side](section, dtype, model)
    while True:
        wait()
        began = time.perf_counter()
        more = round_()
        report(time.perf_counter() - began, **more)


def compare(section: str, dtype: str, options) -> dict:
    """One row of the table."""
    rounds = take_turns(__file__, SECTIONS[section], options, section, dtype)
    tokens = NEW * (8 if section == "group" else int(section))
    row = {"section": section, "dtype": dtype}
    for side, results in rounds.items():
        row[f"{side}_seconds"] = [round(result["seconds"], 4) for result in results]
        row[f"{side}_median"] = median = statistics.median(result["seconds"] for result in results)
        row[f"{side}_tokens_per_second"] = round(tokens / median, 1)
        row[f"{side}_peak_gib"] = round(max(result["peak_gib"] for result in results), 2)
    for name in ("first_ms", "token_ms", "token_p99_ms", "prompt_tokens"):
        row[name] = statistics.median(result[name] for result in rounds["ours"])
    row["times_as_fast"] = row["theirs_median"] / row["ours_median"]
    row["share_of_limit"] = row["limit_median"] / row["ours_median"]
    if "exact" in rounds:
        row["cost_of_exactness"] = row["exact_median"] / row["ours_median"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--output", default=RESULTS / "rollouts.json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(*options.worker, options.model)

    import torch

    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    value = {
        "command": "python -m benchmarks.rollouts --model OUT/SmolLM2-135M-Instruct --peers PYTHON",
        "machine": machine | {"torch": torch.__version__},
        "settings": {
            "ours": "Engine(max_batch=64, page_size=16, prefill_tokens=4096), temperature 1",
            "theirs": "generate, sdpa, one batch padded on the left, temperature 1",
        },
        "rows": [],
    }
    for section in options.sections:
        for dtype in options.dtypes:
            row = compare(section, dtype, options) | {"load_average": os.getloadavg()[0]}
            print({key: value for key, value in row.items() if not key.endswith("_seconds")}, flush=True)
            value["rows"].append(row)
            options.output.write_text(json.dumps(value, indent=1) + "\n")  # what is done is kept


if __name__ == "__main__":
    main()
