"""Learning curves, each beside a control arm that is rewarded at random:

    python -m benchmarks.curves toy                    the embedded default, seeds 0, 1, 2
    python -m benchmarks.curves chain_sum --data OUT   SmolLM2-135M-Instruct on sums
    python -m benchmarks.curves gsm8k --data OUT       the same model, a few steps of real word problems
    python -m benchmarks.curves family                 the embedded default of every other algorithm

OUT is what `python -m benchmarks.real OUT` made. Every arm is one run of a script, by the command that stands in the
result.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

CHAIN_SUM = "--model {data}/SmolLM2-135M-Instruct --dataset {data}/chain_sum_train.jsonl"
CHAIN_SUM += " --eval_dataset {data}/chain_sum_test.jsonl --eval_reward number"
CHAIN_SUM += " --max_steps 100 --prompts_per_step 8 --num_generations 8 --max_completion_length 32 --learning_rate 1e-5"
CHAIN_SUM += " --lr_scheduler_type constant --eval_steps 20 --no_gradient_checkpointing --logging_steps 5 --seed {seed}"
GSM8K = "--model {data}/SmolLM2-135M-Instruct --dataset {data}/gsm8k.jsonl"
GSM8K += " --max_steps 3 --prompts_per_step 4 --num_generations 4 --max_completion_length 200"
GSM8K += " --logging_steps 1 --no_gradient_checkpointing --seed {seed}"
EXPERIMENTS = {  # name -> (command line, seeds, rewards: the task's, and the control's)
    "toy": ("--seed {seed}", (0, 1, 2), ("exact", "random")),
    "chain_sum": (CHAIN_SUM, (0,), ("number", "random")),
    "gsm8k": (GSM8K, (0,), ("number",)),
}
FAMILY = {  # algorithm -> its script and options, and what of a held-out evaluation it is to raise
    "SFT": ("sft", "eval/mean_token_accuracy"),
    "reward model": ("reward", "eval/accuracy"),
    "DPO": ("dpo", "eval/rewards/accuracies"),
    "PPO": ("ppo", "eval/accuracy"),
    "PPO, random reward": ("ppo --reward random", "eval/accuracy"),
    "RLOO": ("grpo --advantage_estimator rloo", "eval/accuracy"),
    "REINFORCE++": ("grpo --advantage_estimator reinforce_plus_plus", "eval/accuracy"),
}


def run(arguments: str, threads: int) -> dict:
    """One run of a script: its metrics by step, the seconds that the command took, and those of all cores together."""
    command = f"-m minitrl.{arguments}"
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen([sys.executable, *command.split(), "--output_dir", f"{folder}/run"], env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise SystemExit(f"python {command} failed")
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    spent = usage.ru_utime + usage.ru_stime  # on a machine with other work, less than the wall clock says
    return {"command": f"python {command}", "seconds": seconds, "cpu_seconds": spent, "metrics": metrics}


def summary(reward: str, seed: int, result: dict) -> dict:
    """A run's row: held-out accuracy before and after, and the mean reward of the first and last tenth of its steps."""
    metrics = result["metrics"]
    evaluations = [row for row in metrics if "eval/accuracy" in row]
    rewards = [row["reward"] for row in metrics if "reward" in row]
    tenth = max(1, len(rewards) // 10)
    row = {"reward": reward, "seed": seed, "steps": len(rewards)}
    row |= {name: round(result[name], 1) for name in ("seconds", "cpu_seconds")}
    if evaluations:
        row |= {"accuracy_before": evaluations[0]["eval/accuracy"], "accuracy_after": evaluations[-1]["eval/accuracy"]}
    row |= {"reward_first": sum(rewards[:tenth]) / tenth, "reward_last": sum(rewards[-tenth:]) / tenth}
    accuracies = [[row["step"], row["eval/accuracy"]] for row in evaluations]
    return row | {"command": result["command"], "rewards": rewards, "accuracies": accuracies}


def draw(name: str, rows: list[dict]) -> None:
    """The reward that each arm was trained on, and what the held-out questions say; the control arms in grey."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "minitrl"  # the same curve gives the same file
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        look = {"color": "0.7"} if row["reward"] == "random" else {}
        left.plot(range(1, len(row["rewards"]) + 1), row["rewards"], linewidth=1.2, **look)
        label = f"reward {row['reward']}, seed {row['seed']}"
        right.plot(*zip(*row["accuracies"]), linewidth=1.2, marker=".", label=label, **look)
    left.set(xlabel="step", ylabel="mean reward of the step")
    right.set(xlabel="step", ylabel="held-out greedy accuracy", ylim=(0, 1))
    if right.lines:  # not every experiment has held-out data
        right.legend(fontsize=7)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


def relative(name: str, threads: int) -> dict:
    """A row of the family: what the embedded default of an algorithm makes of its held-out data."""
    arguments, metric = FAMILY[name]
    result = run(f"{arguments} --seed 0", threads)
    values = [row[metric] for row in result["metrics"] if row.get(metric) is not None]
    row = {"algorithm": name, "command": result["command"], "metric": metric, "before": values[0], "after": values[-1]}
    row |= {"steps": result["metrics"][-1]["step"]} | {n: round(result[n], 1) for n in ("seconds", "cpu_seconds")}
    print(row, flush=True)
    return row


def write(options, rows: list[dict]) -> None:
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    command = f"python -m benchmarks.curves {options.experiment} --jobs {options.jobs}"
    value = {"command": command, "machine": machine, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.experiment}.json").write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "family"])
    parser.add_argument("--data", default="OUT", help="folder that benchmarks.real made")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    options = parser.parse_args()
    if options.experiment == "family":
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(lambda name: relative(name, os.cpu_count() // options.jobs), FAMILY))
        return write(options, rows)
    arguments, seeds, arms = EXPERIMENTS[options.experiment]
    filled = arguments.replace("{data}", options.data)
    cases = [(reward, seed) for seed in seeds for reward in arms]

    def case(reward: str, seed: int) -> dict:
        result = run(f"grpo {filled.format(seed=seed)} --reward {reward}", os.cpu_count() // options.jobs)
        row = summary(reward, seed, result)
        print({key: value for key, value in row.items() if key not in ("rewards", "accuracies", "command")}, flush=True)
        return row | {"command": row["command"].replace(options.data, "OUT")}

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(case, *zip(*cases)))
    write(options, rows)
    draw(options.experiment, rows)


if __name__ == "__main__":
    main()
