"""Learning curves, each beside a control arm that is rewarded at random:

    python -m benchmarks.curves toy                    the embedded default, seeds 0, 1, 2              about 15 minutes on 2 cores
    python -m benchmarks.curves chain_sum --data OUT   SmolLM2-135M-Instruct on sums                    about 1 hour
    python -m benchmarks.curves gsm8k --data OUT       the same model, a few steps of real word problems

OUT is what `python -m benchmarks.real OUT` made. Every arm is one run of `python -m minitrl.grpo`, by the command that stands in the result.
Writes benchmarks/results/NAME.json and NAME.svg.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

CHAIN_SUM = "--model {data}/SmolLM2-135M-Instruct --dataset {data}/chain_sum_train.jsonl --eval_dataset {data}/chain_sum_test.jsonl --eval_reward number"
CHAIN_SUM += " --max_steps 100 --prompts_per_step 8 --num_generations 8 --max_completion_length 32 --learning_rate 1e-5"
CHAIN_SUM += " --lr_scheduler_type constant --no_gradient_checkpointing --logging_steps 5 --seed {seed}"
GSM8K = "--model {data}/SmolLM2-135M-Instruct --dataset {data}/gsm8k.jsonl --max_steps 3 --prompts_per_step 4 --num_generations 4"
GSM8K += " --max_completion_length 200 --logging_steps 1 --no_gradient_checkpointing --seed {seed}"
EXPERIMENTS = {  # name -> (command line, seeds, rewards: the task's, and the control's)
    "toy": ("--seed {seed}", (0, 1, 2), ("exact", "random")),
    "chain_sum": (CHAIN_SUM, (0,), ("number", "random")),
    "gsm8k": (GSM8K, (0,), ("number",)),
}


def run(arguments: str, folder: str) -> dict:
    """One run: its metrics by step, and how long the whole command took."""
    command = f"-m minitrl.grpo {arguments}"
    began = time.perf_counter()
    subprocess.run([sys.executable, *command.split(), "--output_dir", folder], check=True)
    seconds = time.perf_counter() - began
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return {"command": f"python {command}", "seconds": seconds, "metrics": [json.loads(line) for line in lines]}


def summary(reward: str, seed: int, result: dict) -> dict:
    """What the README's tables show of a run: held-out accuracy before and after, and the mean reward of the first and last tenth of its steps."""
    metrics = result["metrics"]
    evaluations = [row for row in metrics if "eval/accuracy" in row]
    rewards = [row["reward"] for row in metrics if "reward" in row]
    tenth = max(1, len(rewards) // 10)
    row = {"reward": reward, "seed": seed, "steps": len(rewards), "seconds": round(result["seconds"], 1)}
    if evaluations:
        row |= {"accuracy_before": evaluations[0]["eval/accuracy"], "accuracy_after": evaluations[-1]["eval/accuracy"]}
    row |= {"reward_first": sum(rewards[:tenth]) / tenth, "reward_last": sum(rewards[-tenth:]) / tenth}
    return row | {"command": result["command"], "rewards": rewards}


def draw(name: str, rows: list[dict]) -> None:
    """The reward of every step; the control arm in grey."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "minitrl"  # the same curve gives the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    for row in rows:
        control = row["reward"] == "random"
        axes.plot(row["rewards"], color="0.7" if control else None, linewidth=1.2, label=f"reward {row['reward']}, seed {row['seed']}")
    axes.set(xlabel="step", ylabel="mean reward of the step", title=name)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", default="OUT", help="folder that benchmarks.real made")
    options = parser.parse_args()
    arguments, seeds, arms = EXPERIMENTS[options.experiment]
    rows = []
    for seed in seeds:
        for reward in arms:
            with tempfile.TemporaryDirectory() as folder:
                filled = arguments.format(seed=seed, data=options.data) + f" --reward {reward}"
                rows.append(summary(reward, seed, run(filled, f"{folder}/run")))
                rows[-1]["command"] = rows[-1]["command"].replace(options.data, "OUT")
                print({key: value for key, value in rows[-1].items() if key not in ("rewards", "command")}, flush=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    value = {"command": f"python -m benchmarks.curves {options.experiment}", "machine": machine, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.experiment}.json").write_text(json.dumps(value, indent=1) + "\n")
    draw(options.experiment, rows)


if __name__ == "__main__":
    main()
