"""SFT, then a reward model, then PPO, each from what the one before left, on the embedded task: four commands.

    python -m benchmarks.pipeline [--seeds 0 1]

The reward model learns from pairs of a right answer and one with a letter changed, of the same length and form, and is
PPO's only reward and where its value model starts; PPO never sees an answer. What counts is the held-out accuracy, by
`exact`, of PPO and of the same PPO rewarded by the toss of a coin. Writes benchmarks/results/pipeline.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minitrl import toy

RESULT = Path(__file__).parent / "results" / "pipeline.json"
PLAIN = "--dtype float32 --no_gradient_checkpointing --logging_steps 100".split()
SFT = "--max_steps 60 --logging_steps 20".split()
REWARD = [*PLAIN, *"--learning_rate 1e-3 --examples_per_step 64 --max_steps 300".split()]
SIZES = "--prompts_per_step 256 --rollout_batch_size 256 --max_prompt_length 16 --max_completion_length 8".split()
PPO = [*PLAIN, *SIZES, *"--learning_rate 5e-4 --vf_coef 0.5 --kl_coef 0.02 --max_steps 400".split()]


def write_data(folder: Path, seed: int) -> None:
    """The embedded task's prompts and pairs as the data sets that anyone would have."""
    decode = toy.make_tokenizer().decode
    for name, prompts in zip(("prompts", "held_prompts"), toy.datasets(seed)):
        rows = [{"prompt": row["prompt"], **row["columns"]} for row in prompts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, pairs in zip(("pairs", "held_pairs"), toy.preferences(seed)):
        rows = [{key: decode(pair[f"{key}_ids"]) for key in ("prompt", "chosen", "rejected")} for pair in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(script: str, output_dir: Path, seed: int, options: list) -> dict:
    """Seconds of wall clock and of processor, and the held-out metrics before and after."""
    argv = [*options, "--seed", seed, "--output_dir", output_dir]
    print("python -m", f"minitrl.{script}", *argv, flush=True)
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", f"minitrl.{script}", *map(str, argv)], check=True)
    wall, now = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    held_out = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in rows]
    held_out = [row for row in held_out if row]
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    seconds = {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
    return {"arm": output_dir.name, "seed": seed, **seconds, "before": held_out[0], "after": held_out[-1]}


def main() -> None:
    """All commands for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    rows = []
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder, seed)
            rows.append(run("sft", folder / "sft", seed, SFT))
            model = ["--model", folder / "sft" / "final"]
            pairs = ["--dataset", folder / "pairs.jsonl", "--eval_dataset", folder / "held_pairs.jsonl"]
            rows.append(run("reward", folder / "reward", seed, [*model, *pairs, *REWARD]))
            scorer = folder / "reward" / "final"
            prompts = ["--dataset", folder / "prompts.jsonl", "--eval_dataset", folder / "held_prompts.jsonl"]
            for arm, reward in (("ppo", scorer), ("control", "random")):
                rewards = ["--reward", reward, "--value_model", scorer, "--eval_reward", "exact"]
                rows.append(run("ppo", folder / arm, seed, [*model, *prompts, *rewards, *PPO]))
    settings = {"sft": SFT, "reward": REWARD, "ppo": PPO, "threads": os.environ.get("OMP_NUM_THREADS")}
    found = {"command": "python -m benchmarks.pipeline", "settings": settings, "rows": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
