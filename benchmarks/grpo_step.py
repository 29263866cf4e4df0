"""A GRPO step, its rollouts and its training, against TRL and transformers, on a CPU:

    python -m benchmarks.grpo_step --model OUT/SmolLM2-135M-Instruct [--peers PYTHON]

Both sides load the same weights, each in a process of its own that stays alive, and take turns: one round of ours, one
of theirs, so that whatever else the machine does falls on both. PYTHON is an interpreter that has transformers and trl
(pip install -e '.[parity]').

    step      8 prompts x 4 completions x 32 new tokens, every group with different rewards, end tokens ignored, no gradient
              checkpointing, AdamW's step included            against trl.GRPOTrainer
    groups    4 prompts of 64 tokens x 4 completions x 64 new tokens, as GRPO samples them: against transformers'
              generate, which gets each prompt 4 times
    rollout   16 different prompts of 64 tokens, 64 new tokens each, so that nothing is shared: the same
    train     forward and backward of 16 x 256 tokens, ours in two packs of 2048: against transformers, and against the
              fastest product of a 4096 x 576 matrix with a 3072 x 576 weight that this machine does in the same run,
              weight packing included; 6 FLOPs a parameter and token are counted, so computing the head's logits again
              in the backward pass counts as lost

Writes benchmarks/results/grpo_step.json: medians over the rounds, the rounds themselves, and each side's peak memory.
Rows of sections that are not run this time stay, if they are of this machine.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
SECTIONS = {section: ("ours", "theirs") for section in ("step", "groups", "rollout")}
SECTIONS["train"] = ("ours", "theirs", "limit")
OWN = ("ours", "exact", "limit")  # sides that need no peer
TOKENS = {"step": 8 * 4 * 32, "groups": 16 * 64, "rollout": 16 * 64, "train": 16 * 256}  # new ones; of train, all
SETTINGS = {
    "ours": {"masters": "float32", "gradients": "float32", "attention": "packed, prompt shared", "logits": "in tiles"},
    "theirs": {"parameters, gradients and AdamW": "the dtype", "attention": "sdpa", "padding": "left, to the longest"},
}
QUESTIONS = [f"What is {a} + {a + 3}? Answer with just the number." for a in range(64)]


def rewards(completions, **_) -> list[float]:
    """Different within every group, whatever was sampled."""
    return [float(i % 4) for i in range(len(completions))]


def ours(section: str, dtype: str, model: str):
    """Our side: a function that does one round."""
    import torch

    import minitrl
    from minitrl import distributed, grpo, packing, training

    world = distributed.start("cpu")  # as every command does first
    policy, tokenizer = minitrl.load(model, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    if section in ("groups", "rollout"):
        engine, n = minitrl.Engine(policy, tokenizer), 4 if section == "groups" else 1
        prompts = torch.randint(100, 49000, (16 // n, 64), generator=generator).tolist()
        return lambda: engine.generate(prompts, n=n, max_tokens=64, ignore_eos=True)
    if section == "train":
        ids = torch.randint(100, 49000, (16, 256), generator=generator).tolist()
        packs = [packing.pack(ids[:8]), packing.pack(ids[8:])]

        def round_():
            policy.zero_grad()
            for pack in packs:
                logprobs, _ = policy.logprobs(pack, pack.predictors_T >= 0)
                (-logprobs.sum() / (16 * 255)).backward()

        return round_
    config = grpo.Config(
        model=model,
        dataset="-",
        reward=("rewards",),
        num_generations=4,
        max_prompt_length=128,
        max_completion_length=32,
        tokens_per_microbatch=400,
        dtype=dtype,
        output_dir=tempfile.mkdtemp(),
    )
    run = grpo.runs.Run(config, world)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows = [{"prompt": m, "prompt_ids": tokenizer.prompt_ids(m), "columns": {}} for m in messages]
    optimizer = training.Optimizer(policy, world)
    engine = minitrl.Engine(policy, tokenizer)
    engine.generate = lambda *args, sample=engine.generate, **kwargs: sample(*args, **kwargs, ignore_eos=True)
    state = {"step": 0, "cursor": 0}

    def step():  # the body of the loop of grpo.main
        rollouts, state["cursor"] = grpo.generate(
            engine, rows, state["cursor"], [("rewards", rewards)], config, run, state["step"]
        )
        plan = grpo.micro_batches(rollouts, config, world)
        grpo.backward(policy, rollouts, {}, plan, config, run, state["step"])
        optimizer.step(1e-6)
        state["step"] += 1
        assert rollouts.lengths_PG.sum() == TOKENS["step"] and all(map(len, plan))

    return step


def theirs(section: str, dtype: str, model: str):
    """Their side: a function that does one round, or for a step the trainer, which calls back before and after each."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    if section == "step":
        return trl_step(kind, model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    torch.manual_seed(0)
    if section in ("groups", "rollout"):
        ids = torch.randint(100, 49000, (16, 64))
        if section == "groups":
            ids = ids[:4].repeat_interleave(4, dim=0)
        options = dict(max_new_tokens=64, min_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)
        with_mask = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

        def rollout():
            with torch.no_grad():
                assert policy.eval().generate(**with_mask).shape == (16, 128)

        return rollout
    policy.train().config.use_cache = False
    ids = torch.randint(100, 49000, (16, 256))

    def train():
        policy.zero_grad(set_to_none=True)
        policy(input_ids=ids, labels=ids).loss.backward()

    return train


def trl_step(kind, model: str):
    """A GRPOTrainer whose steps begin when the driver says so."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            report(time.perf_counter() - self.began)

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_completion_length=32,
        generation_kwargs={"min_new_tokens": 32},
        max_steps=1000,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        beta=0.0,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": kind},
        disable_tqdm=True,
        logging_steps=1000,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS])
    GRPOTrainer(model=model, reward_funcs=rewards, args=config, train_dataset=data, callbacks=[TakeTurns()]).train()


def limit(section: str, dtype: str, model: str):
    """The fastest product of a training shape: plain, and through oneDNN with the packing of the weight counted."""
    import torch

    x, w = torch.randn(4096, 576).to(getattr(torch, dtype)), torch.randn(3072, 576).to(getattr(torch, dtype))

    def packed():
        weight = torch.ops.mkldnn._reorder_linear_weight(w, 4096)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def round_() -> float:
        seconds = []
        for product in (lambda: torch.nn.functional.linear(x, w), packed):
            product()
            times = []
            for _ in range(9):
                began = time.perf_counter()
                product()
                times.append(time.perf_counter() - began)
            seconds.append(statistics.median(times))
        return min(seconds)

    return round_


def wait() -> None:
    """Until the driver says go; the driver's end is ours."""
    if not sys.stdin.readline():
        os._exit(0)


def report(seconds: float, **more) -> None:
    unit = 2**20 if sys.platform == "linux" else 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps({"seconds": seconds, "peak_gib": peak} | more), file=sys.__stdout__, flush=True)


def work(side: str, section: str, dtype: str, model: str) -> None:
    """A side's process: a round for each line of input."""
    sys.stdout = sys.stderr  # what libraries print is not a report
    round_ = {"ours": ours, "theirs": theirs, "limit": limit}[side](section, dtype, model)
    while True:
        wait()
        began = time.perf_counter()
        seconds = round_()
        report(seconds if isinstance(seconds, float) else time.perf_counter() - began)


def take_turns(file: str, sides, options, *work: str) -> dict[str, list[dict]]:
    """What each side's process reports of its rounds, made in turn. Every turn is two rounds, the second of which counts:
    memory that a process left alone while the other had its turn may have been taken from it by the system.

    A process is `file --worker SIDE *work`, by the peers' interpreter unless the side is one of OWN.
    """
    processes = {}
    for side in sides:
        python = sys.executable if side in OWN else options.peers
        command = [python, file, "--worker", side, *work, "--model", options.model]
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[side] = subprocess.Popen(command, env=os.environ | quiet, stderr=subprocess.DEVNULL, **pipes)
    rounds = {side: [] for side in processes}
    for side, process in list(processes.items()) * options.rounds:
        for _ in range(2):
            process.stdin.write("go\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the process of {side} ended; try: {' '.join(process.args)} and type go")
        rounds[side].append(json.loads(line))
    for process in processes.values():
        process.kill()
        process.wait()  # its memory is for whoever comes next
    return rounds


def versus(file: str, doc: str, settings: dict, ours, theirs, unit: str) -> None:
    """The command of a script that has `ours` by turns with each other side, two processes at a time.

    A round reports its seconds, how many of `unit` it did, and the peak of memory so far. Rates are compared, since
    sides may have orders of their own. Writes results/NAME.json after each side.
    """
    import torch

    others = [side for side in settings if side != "ours"]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has transformers and trl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=others, default=others)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.stdout = sys.stderr  # what libraries print is not a report
        return ours(options.model) if options.worker == "ours" else theirs(options.worker, options.model)
    name = Path(file).stem
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    value = {
        "command": f"python -m benchmarks.{name} --model OUT/SmolLM2-135M-Instruct --peers PYTHON",
        "machine": machine | {"torch": torch.__version__, "load_average": os.getloadavg()[0]},
        "unit": unit,
        "rows": [],
    }
    for side in options.sides:
        rounds, row = take_turns(file, ("ours", side), options), {"against": side}
        for who, results in rounds.items():
            rate = statistics.median(result[unit] / result["seconds"] for result in results)
            peak = max(result["peak_gib"] for result in results)
            row[who] = {"per_second": rate, "peak_gib": peak, "settings": settings[who], "rounds": results}
            print(f"{who:>12}: {rate:7.2f} {unit}/s, {peak:.2f} GiB", flush=True)
        row["times_as_fast"] = row["ours"]["per_second"] / row[side]["per_second"]
        row["share_of_memory"] = row["ours"]["peak_gib"] / row[side]["peak_gib"]
        print(f"{row['times_as_fast']:.2f} times as fast as {side}, {row['share_of_memory']:.2f} of its memory", flush=True)
        value["rows"].append(row)
        (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")  # what is done is kept


def compare(section: str, dtype: str, options) -> dict:
    """The medians of both sides."""
    rounds = take_turns(__file__, SECTIONS[section], options, section, dtype)
    row = {"section": section, "dtype": dtype}
    for side, results in rounds.items():
        row[f"{side}_seconds"] = [round(result["seconds"], 5) for result in results]
        row[f"{side}_median"] = statistics.median(result["seconds"] for result in results)
        row[f"{side}_peak_gib"] = round(max(result["peak_gib"] for result in results), 2)
    row["times_as_fast"] = row["theirs_median"] / row["ours_median"]
    row["share_of_memory"] = row["ours_peak_gib"] / row["theirs_peak_gib"]
    row["ours_tokens_per_second"] = TOKENS[section] / row["ours_median"]
    row["theirs_tokens_per_second"] = TOKENS[section] / row["theirs_median"]
    if section == "train":
        rate = 6 * parameters(options.model) * TOKENS[section] / row["ours_median"]
        row["share_of_limit"] = rate / (2 * 4096 * 576 * 3072 / row["limit_median"])
    return row


def parameters(model: str) -> int:
    """Numbers in the checkpoint's tensors."""
    from safetensors import safe_open

    with safe_open(f"{model}/model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has transformers and trl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(*options.worker, options.model)

    import torch

    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    value = {
        "command": "python -m benchmarks.grpo_step --model OUT/SmolLM2-135M-Instruct --peers PYTHON",
        "machine": machine | {"torch": torch.__version__},
        "settings": SETTINGS,
        "rows": [],
    }
    results = RESULTS / "grpo_step.json"
    wanted = [(section, dtype) for section in options.sections for dtype in options.dtypes]
    if results.exists() and (old := json.loads(results.read_text()))["machine"] == value["machine"]:
        value["rows"] = [row for row in old["rows"] if (row["section"], row["dtype"]) not in wanted]
    for section, dtype in wanted:
        row = compare(section, dtype, options) | {"load_average": os.getloadavg()[0]}
        print({key: value for key, value in row.items() if not key.endswith("_seconds")}, flush=True)
        value["rows"].append(row)
        results.write_text(json.dumps(value, indent=1) + "\n")  # what is done is kept


if __name__ == "__main__":
    main()
