"""From demonstrations to a policy that a reward model has taught: SFT, DPO, a reward model, and PPO and GRPO on it.

    python -m benchmarks.pipeline embedded                 the embedded task and model
    python -m benchmarks.pipeline real --data OUT          SmolLM2-135M-Instruct on sums; OUT: benchmarks.real, then
                                                           benchmarks.preferences

Each stage is one run of a script, from what the stages before it left; PPO and GRPO with each of the seeds. The reward
model learns from pairs of a right answer and a wrong one of the same form, and is all that PPO and GRPO are rewarded
by: they never see an answer. Whether answers get better is what the held-out questions say, whose answers are compared;
and what the same number of steps does with rewards drawn at random. Writes benchmarks/results/pipeline_NAME.json.

A reward model that has seen nothing but answers of one form can be pleased by anything of another form (longer and
longer ones, on the embedded task). So half of the embedded pairs' wrong answers are the fine-tuned model's own.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import minitrl
from minitrl import toy

RESULTS = Path(__file__).parent / "results"
PLAIN = "--no_gradient_checkpointing --lr_scheduler_type constant --logging_steps 20"
TOY = "--dtype float32 --no_gradient_checkpointing --logging_steps 100"
TOY_RL = "--reward_arm --eval_reward exact --prompts_per_step 256 --rollout_batch_size 256 --max_prompt_length 16"
TOY_RL += " --max_completion_length 8 --learning_rate 1e-3"
PPO = "--value_model reward/final --kl_coef 0.1 --missing_eos_penalty 3"
SUMS = "--dataset {data}/chain_sum_train.jsonl --eval_dataset {data}/chain_sum_test.jsonl"
SUMS += " --reward_arm --eval_reward number --max_steps 40 --eval_steps 20 --prompts_per_step 8 --num_generations 8 --max_completion_length 16"
SUMS += " --learning_rate 1e-5"
PAIRS = "--dataset {data}/chain_sum_pairs_train.jsonl --eval_dataset {data}/chain_sum_pairs_test.jsonl --max_length 64"
PAIRS += " --examples_per_step 16 --tokens_per_microbatch 1024"
EXAMPLES = "--dataset {data}/chain_sum_demonstrations_train.jsonl"
EXAMPLES += " --eval_dataset {data}/chain_sum_demonstrations_test.jsonl"
START = "--model sft/final"
EMBEDDED = {  # stage -> script and options, where reward/final and so on stand for what an earlier stage left
    "sft": "sft --max_steps 60 --logging_steps 20",
    "reward": f"reward {START} --dataset pairs_train.jsonl --eval_dataset pairs_test.jsonl {TOY} --learning_rate 1e-3"
    " --examples_per_step 64 --max_steps 1500",
    "ppo": f"ppo {START} --dataset train.jsonl --eval_dataset test.jsonl {TOY} {TOY_RL} {PPO} --vf_coef 0.5"
    " --max_steps 400",
}
REAL = {
    "sft": f"sft --model {{data}}/SmolLM2-135M-Instruct {EXAMPLES} {PLAIN} --max_length 64 --examples_per_step 16"
    " --learning_rate 1e-5 --max_steps 30 --tokens_per_microbatch 1024",
    "dpo": f"dpo {START} {PAIRS} {PLAIN} --learning_rate 5e-6 --max_steps 40",
    "reward": f"reward {START} {PAIRS} {PLAIN} --learning_rate 3e-5 --max_steps 100",
    "ppo": f"ppo {START} {SUMS} {PLAIN} {PPO}",
    "grpo": f"grpo {START} {SUMS} {PLAIN}",
}
HELD_OUT = ("eval/loss", "eval/accuracy", "eval/rewards/accuracies", "eval/reward", "eval/mean_token_accuracy")


def write_toy(folder: Path, seed: int) -> None:
    """The embedded task's prompts as anyone's data set would be."""
    for name, rows in zip(("train", "test"), toy.datasets(seed)):
        _write(folder / f"{name}.jsonl", [{"prompt": row["prompt"], **row["columns"]} for row in rows])


def write_toy_pairs(folder: Path, seed: int) -> None:
    """The embedded task's pairs, and as many whose rejected answer is a wrong one that the fine-tuned model samples."""
    model, tokenizer = minitrl.load(folder / "sft" / "final")
    engine = minitrl.Engine(model, tokenizer, max_batch=256)
    for name, pairs in zip(("train", "test"), toy.preferences(seed)):
        keys = ("prompt", "chosen", "rejected")
        rows = [{key: tokenizer.decode(pair[f"{key}_ids"]) for key in keys} for pair in pairs]
        sampled = engine.generate([row["prompt"] for row in rows], n=1, max_tokens=8, temperature=1.0, seed=seed)
        own = [row | {"rejected": group[0].text} for row, group in zip(rows, sampled)]
        _write(folder / f"pairs_{name}.jsonl", rows + [row for row in own if row["rejected"] != row["chosen"]])


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(stage: str, command: str, folder: Path, seed: int, data: str, reward: str = "reward/final") -> dict:
    """One stage: seconds, the held-out metrics before and after, and how the reward rose, with its standard error."""
    arm = stage if reward != "random" else f"{stage}, random reward"
    place = f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}" if "--reward_arm" in command else stage
    command = command.replace("--reward_arm", f"--reward {reward}").replace("{data}", data)
    words = f"python -m minitrl.{command} --seed {seed} --output_dir {place}".split()
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *words[1:]], check=True, cwd=folder, env=environment)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    metrics = [json.loads(line) for line in (folder / words[-1] / "metrics.jsonl").read_text().splitlines()]
    held_out = [{name: row[name] for name in HELD_OUT if name in row} for row in metrics]
    held_out = [row for row in held_out if row]
    row = {"stage": arm, "seed": seed, "command": " ".join(words).replace(data, "OUT"), "steps": metrics[-1]["step"]}
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    row |= {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(cpu, 1)}
    row |= {"before": held_out[0], "after": held_out[-1]}
    rewards = [metric["reward"] for metric in metrics if "reward" in metric]
    if rewards:
        row["reward"] = rise(rewards)
    print({name: value for name, value in row.items() if name not in ("command", "reward")}, flush=True)
    return row


def rise(rewards: list[float]) -> dict:
    """Mean rewards of the first and of the last half of the generations, of which several steps may have been made."""
    each = [value for before, value in zip([None, *rewards], rewards) if value != before]
    half = len(each) // 2
    first, last = each[:half], each[-half:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / half)
    found = {"first_half": statistics.mean(first), "last_half": statistics.mean(last)}
    return found | {"standard_error_of_the_difference": error, "generations": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["embedded", "real"])
    parser.add_argument("--data", default="OUT", help="the folder that benchmarks.real was given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    data, rows = str(Path(options.data).resolve()), []
    stages = EMBEDDED if options.name == "embedded" else REAL
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    value = {"command": f"python -m benchmarks.pipeline {options.name}", "machine": machine, "rows": rows}
    with tempfile.TemporaryDirectory() as name:
        folder, first = Path(name), options.seeds[0]
        if options.name == "embedded":
            write_toy(folder, first)
        cases = [(stage, first, "reward/final") for stage, command in stages.items() if "--reward_arm" not in command]
        for seed in options.seeds:
            arms = [stage for stage, command in stages.items() if "--reward_arm" in command]
            cases += [(stage, seed, "reward/final") for stage in arms] + [(arms[-1], seed, "random")]
        for stage, seed, reward in cases:
            rows.append(run(stage, stages[stage], folder, seed, data, reward))
            if options.name == "embedded" and stage == "sft":
                write_toy_pairs(folder, first)
            (RESULTS / f"pipeline_{options.name}.json").write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
