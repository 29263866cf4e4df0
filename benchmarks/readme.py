"""Fill the tables of README.md and kernels/README.md from committed results and code: `python -m benchmarks.readme`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import ast
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from benchmarks import kernel_cases, kernels
from minitrl import dpo, grpo, ppo, reward, server, sft
from minitrl.config import CommonOptions, comments
from minitrl.experience import RolloutOptions
from minitrl.kernels.targets import TARGETS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

READING_ORDER = (
    "minitrl/grpo.py minitrl/experience.py minitrl/losses.py kernels/grpo_loss.py minitrl/packing.py minitrl/model.py "
    "kernels/token_logprob.py kernels/attention.py kernels/linear.py minitrl/rollout.py minitrl/sampling.py "
    "kernels/decode.py minitrl/ppo.py minitrl/sft.py minitrl/reward.py minitrl/dpo.py minitrl/pairs.py minitrl/lora.py "
    "minitrl/evaluate.py minitrl/chat.py minitrl/server.py minitrl/web.py minitrl/rollout_client.py minitrl/remote.py "
    "minitrl/transfer.py minitrl/vllm.py minitrl/vllm_extension.py "
    "kernels/targets.py kernels/grpo_loss_triton.py kernels/token_logprob_triton.py kernels/logits_logprob_triton.py "
    "kernels/attention_triton.py kernels/decode_triton.py kernels/matmul.py kernels/matmul_triton.py "
    "minitrl/distributed.py minitrl/parallel.py minitrl/layout.py minitrl/lockstep.py minitrl/ahead.py minitrl/plan.py "
    "minitrl/rewards.py minitrl/data.py minitrl/training.py minitrl/runs.py minitrl/console.py "
    "minitrl/checkpoint.py minitrl/state.py minitrl/disk.py minitrl/tokenizer.py minitrl/config.py minitrl/toy.py"
).split()

# TRL's defaults by version: huggingface/trl v1.16.0 and v0.16.0, grpo_config.py. None: TRL has no such option there.
TRL_DEFAULTS = {
    "beta": ("0.0", "0.04"),
    "delta": ("none", None),
    "dtype": ("bfloat16", "the model's"),
    "entropy_coef": ("0.0", None),
    "epsilon": ("0.2", "0.2"),
    "epsilon_high": ("none", "none"),
    "gradient_checkpointing": ("true", "false"),
    "importance_sampling_level": ("token", None),
    "learning_rate": ("1e-06", "1e-06"),
    "logging_steps": ("10", "500"),
    "loss_type": ("dapo", "bnpo, unnamed"),
    "lr_scheduler_type": ("linear", "linear"),
    "mask_truncated_completions": ("false", None),
    "max_completion_length": ("512", "256"),
    "max_grad_norm": ("1.0", "1.0"),
    "max_prompt_length": (None, "512"),
    "min_p": ("none", "none"),
    "num_generations": ("8", "8"),
    "num_iterations": ("1", "1"),
    "num_train_epochs": ("3.0", "3.0"),
    "ref_model_mixup_alpha": ("0.6", "0.6"),
    "ref_model_sync_steps": ("512", "512"),
    "repetition_penalty": ("1.0", "1.0"),
    "save_steps": ("500", "500"),
    "scale_rewards": ("group", "true"),
    "seed": ("42", "42"),
    "sync_ref_model": ("false", "false"),
    "temperature": ("1.0", "0.9"),
    "top_entropy_quantile": ("1.0", None),
    "top_k": ("0", "50"),
    "top_p": ("1.0", "1.0"),
    "lora_alpha": ("32", "32"),
    "lora_dropout": ("0.05", "0.05"),
    "lora_r": ("16", "16"),
    "lora_target_modules": ("PEFT's, by model", "PEFT's, by model"),
    "use_bias_correction_kl": ("true", None),
    "use_peft": ("false", "false"),
    "vllm_importance_sampling_clip_max": ("3.0", None),
    "vllm_importance_sampling_clip_min": ("none", None),
    "vllm_importance_sampling_correction": ("true", None),
    "vllm_importance_sampling_mode": ("sequence_mask", None),
    "warmup_steps": ("0", "0"),
    "weight_decay": ("0.0", "0.0"),
}


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def curves(name: str) -> str:
    """Held-out accuracy and mean reward of each arm."""
    rows = [
        [
            row["seed"],
            f"`{row['reward']}`" + (" (control)" if row["reward"] == "random" else ""),
            f"{row['accuracy_before']:.3f} → {row['accuracy_after']:.3f}",
            f"{row['reward_first']:.3f} → {row['reward_last']:.3f}",
            row["steps"],
            f"{row['seconds']:.0f} s ({row['cpu_seconds']:.0f} core-seconds)",
        ]
        for row in result(name)["rows"]
    ]
    head = ["seed", "reward", "held-out accuracy", "mean reward, first and last tenth", "steps", "whole command"]
    return markdown(head, rows) + f"\n\n`{result(name)['command']}`"


def grpo_step() -> str:
    """Both sides of each comparison, whichever is faster."""
    peers = {"step": "TRL 1.16", "groups": "transformers", "rollout": "transformers", "train": "transformers"}
    rows = []
    for row in result("grpo_step")["rows"]:
        limit = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "–"
        rows.append(
            [
                row["section"],
                row["dtype"],
                f"{row['ours_median']:.2f} s",
                f"{row['theirs_median']:.2f} s ({peers[row['section']]})",
                f"**{row['times_as_fast']:.2f}**",
                f"{row['ours_peak_gib']:.2f} / {row['theirs_peak_gib']:.2f} GiB",
                limit,
            ]
        )
    head = ["work", "dtype", "minitrl", "peer", "times as fast", "peak memory", "share of the fastest product's rate"]
    return markdown(head, rows)


def steps() -> str:
    """SFT's and DPO's optimizer steps against each of TRL's ways."""
    rows = []
    for name in ("sft_step", "dpo_step"):
        unit = result(name)["unit"]
        for row in result(name)["rows"]:
            ours, theirs = row["ours"], row[row["against"]]
            rates = [f"{side['per_second']:.{2 if unit == 'pairs' else 0}f} {unit}/s" for side in (ours, theirs)]
            memory = f"{ours['peak_gib']:.2f} / {theirs['peak_gib']:.2f} GiB"
            rows.append([name[:3].upper(), row["against"], *rates, f"**{row['times_as_fast']:.2f}**", memory])
    return markdown(["step", "TRL 1.16's way", "minitrl", "TRL", "times as fast", "peak memory"], rows)


def shown(value) -> str:
    """A default as a table has it."""
    plain = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return (plain.lower() if value is None or isinstance(value, bool) else plain) or "none"


def options(script, *common) -> str:
    """A script's options but those that `common` has with the same default, and what each means."""
    known = {field.name: field.default for base in common for field in fields(base)}
    rows = [
        [f"`{field.name}`", "required" if field.default is MISSING else shown(field.default), meaning]
        for field in fields(script.Config)
        if field.default != known.get(field.name, MISSING) and (meaning := comments(script.Config)[field.name])
    ]
    return markdown(["option", "default", "what"], rows)


def family() -> str:
    """What the embedded default of each algorithm comes to."""
    rows = [
        [
            row["algorithm"],
            f"`{row['command']}`",
            f"`{row['metric']}` {row['before']:.3f} → {row['after']:.3f}",
            row["steps"],
            f"{row['cpu_seconds']:.0f} core-seconds",
        ]
        for row in result("family")["rows"]
    ]
    head = ["algorithm", "command", "held out", "steps", "whole command"]
    return markdown(head, rows) + f"\n\n`{result('family')['command']}`"


def packing() -> str:
    """Packing and truncation of token counts alone, against TRL's own."""
    rows = []
    for row in result("packing")["rows"]:
        for name, seconds in row["medians"].items():
            share = row["occupancy"] if row["section"] == "million" else row.get("occupancy", {}).get(name)
            full = f"{share:.2%}" if isinstance(share, float) and name not in ("sort", "truncation") else "–"
            rows.append([row["section"], f"{row['documents']:,}", name, f"{seconds:.4f} s", full])
    return markdown(["work", "documents", "whose", "median", "rows filled"], rows)


def server_load() -> str:
    """What came of the server under load."""
    found = result("server_load")
    done, health, memory = found["completions"], found["health"], found["rss_mib"]
    rows = [
        ["seconds", f"{found['seconds']:.0f}"],
        ["completions that were right", f"{done['right']:,}"],
        ["and over a weight update", done["right, over a weight update"]],
        ["wrong", sum(n for kind, n in (done | found["attacks"]).items() if kind.startswith("WRONG"))],
        ["attacks", f"{sum(found['attacks'].values()):,} ({', '.join(found['attacks'])})"],
        ["/health, ms: median, 99 %, longest", ", ".join(f"{health[k]:.0f}" for k in ("p50_ms", "p99_ms", "max_ms"))],
        ["memory after a quarter, at the end", f"{memory['after a quarter']}, {memory['at the end']} MiB"],
    ]  # fmt: skip
    return markdown(["", ""], rows) + f"\n\n`{found['command']}`"


def vllm() -> str:
    """GRPO through a real vLLM, and its server beside ours."""
    found, rows = result("vllm"), []
    if run := found.get("train"):
        rows += [["GRPO steps, weights sent before each", run["steps"]]]
        rows += [["mean reward, first and second half", f"{run['first_half']:.3f} → {run['second_half']:.3f}"]]
        off = f"{run['mismatch_largest']:.3f}, {run['mismatch_median']:.3f} nats"
        rows += [["log-probs of 8 greedy tokens off after an update: most, median", off]]
    for row in found.get("serve", []):
        how = "compiled" if row["compiled"] else "eager"
        both = f"{row['ours_tokens_per_second']:.0f}, {row['theirs_tokens_per_second']:.0f}"
        times = f"{both} tokens/s: **{row['times_as_fast']:.2f}** times as fast"
        rows += [[f"{row['requests']} requests at once, minitrl.server and vLLM ({how}), bfloat16", times]]
    return markdown(["", ""], rows)


def defaults() -> str:
    """Every option of grpo.py, with TRL's default where it has the option."""
    rows = []
    for field in fields(grpo.Config):
        new, old = TRL_DEFAULTS.get(field.name, (None, None))
        rows.append([f"`{field.name}`", shown(field.default), new or "–", old or "–"])
    return markdown(["option", "minitrl", "TRL 1.16", "TRL 0.16.0"], rows)


def layouts() -> str:
    """The layout for each model and number of GPUs, H100 where nothing else is said, as minitrl.plan has it."""
    rows = []
    for row in result("layouts")["rows"]:
        options, memory = row["options"], row["memory"]
        gpus, took = f"{row['gpus']} {options['gpu']}".removesuffix(" H100"), row["seconds"][options["gpu"]]
        mesh = " ".join(f"--{name} {options[name]}" for name in ("replicate", "shard", "tensor") if options[name] > 1)
        mesh += " --cpu_offload" * options["cpu_offload"]
        tokens = options["tokens_per_microbatch"] * options["num_micro_batches"] / options["tensor"]
        rate = f"{tokens / took['step']:,.0f}"
        sampler = f"--rollout_tensor {options['rollout_tensor']}"
        cells = [f"{memory['peak'] / 2**30:.1f} GiB", f"{options['tokens_per_microbatch']:,}", rate]
        rows.append([row["model"], gpus, f"`{mesh or '(one process)'}`", f"`{sampler}`", *cells])
    head = ["model", "GPUs", "trainer", "sampler", "peak of a GPU", "tokens a micro-batch", "tokens/s of a GPU"]
    return markdown(head, rows) + f"\n\n`{result('layouts')['command']}`"


def plan_check() -> str:
    """A real step beside a pretended one."""
    rows = []
    for row in result("plan_check")["rows"]:
        mesh = " x ".join(map(str, row["mesh"]))
        sides, units = (row["real"], row["pretended"]), {"peak": 2**20, "sent": 2**20, "flops": 1e9}
        cells = [" / ".join(f"{side[key] / unit:,.1f}" for side in sides) for key, unit in units.items()]
        rows.append([row["processes"], mesh, *cells, f"{row['rss_grown'] / 2**20:,.0f}"])
    head = ["processes", "replicate x shard x tensor", "peak, MiB: real / pretended", "sent, MiB", "GFLOP", "RSS, MiB"]
    return markdown(head, rows) + f"\n\n`{result('plan_check')['command']}`"


def staleness() -> str:
    """Sampling ahead beside sampling and training by turns."""
    rows = []
    for row in result("staleness")["rows"]:
        curve = ", ".join(f"{step}: {accuracy:.3f}" for step, accuracy in row["accuracies"])
        rows.append([row["max_staleness"], row["seed"], curve, f"{row['step_time']:.3f} s"])
    head = ["`max_staleness`", "seed", "held-out accuracy by step", "median step"]
    return markdown(head, rows) + f"\n\n`{result('staleness')['command']}`"


def transfer() -> str:
    """Both ways of sending weights."""
    found = result("transfer")
    seconds, ratio, load = found["median"], found["theirs / ours"], found["load_average"]
    rows = [["shard to shard", f"{seconds['ours']:.3f} s"], ["parameter by parameter", f"{seconds['theirs']:.3f} s"]]
    rows += [["ratio", f"**{ratio:.2f}**"], ["bytes that a sampler gets", f"{found['ranks'][-1]['ours']['received']:,}"]]
    return markdown(["", ""], rows) + f"\n\n`{found['command']}` (load average {load:.0f} on {found['cores']} cores)"


def by_hand() -> str:
    """A layout's step, ours and a script's."""
    rows = []
    for row in result("by_hand")["rows"]:
        seconds, ratio = row["seconds"], row["ours over by hand"]
        rows.append([row["layout"], *(f"{seconds[side]:.2f} s" for side in ("ours", "by hand")), f"**{ratio:.2f}**"])
    head = ["layout, 2 processes", "minitrl", "by hand", "ours / by hand"]
    return markdown(head, rows) + f"\n\n`{result('by_hand')['command']}`"


def pipeline(name: str) -> str:
    """Stages, what each did to its held-out data, and how rewards rose."""
    rows = []
    for row in result(f"pipeline_{name}")["rows"]:
        held_out = [f"{n.removeprefix('eval/')} {row['before'][n]:.3f} → {row['after'][n]:.3f}" for n in row["before"]]
        reward, rose = row.get("reward"), ""
        if reward:
            rise = reward["last_half"] - reward["first_half"]
            rose = f"{rise:+.3f} ± {reward['standard_error_of_the_difference']:.3f}"
        spent = f"{row['cpu_seconds']:.0f} core-seconds"
        rows.append([row["stage"], row["seed"], ", ".join(held_out), rose, row["steps"], spent])
    head = ["stage", "seed", "held-out, before → after", "reward, last less first half", "steps", "whole command"]
    return markdown(head, rows) + f"\n\n`{result(f'pipeline_{name}')['command']}`"


def first_sentence(path: str) -> str:
    text = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def files() -> str:
    counts = {path: len((ROOT / path).read_text().splitlines()) for path in READING_ORDER}
    rows = [[f"[{path}]({path})", lines, first_sentence(path)] for path, lines in counts.items()]
    return markdown(["file", "lines", "what"], rows)


def tests() -> str:
    paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    return markdown(["file", "what it proves"], [[f"[{path}]({path})", first_sentence(path)] for path in paths])


def kernel_bytes() -> str:
    """Every kernel's traffic, ours and the peers'."""
    rows = []
    for row in result("kernel_bytes")["rows"]:
        moved = [f"{row[kind] / 1e6:.2f}" for kind in ("requested", "touched", "least")]
        share = f"{row['touched'] / row['least']:.3f}"
        rows.append([row["whose"], f"`{row['kernel']}`", row["shape"], *moved, share, f"{row['workspace'] / 1e6:.2f}"])
    head = ["whose", "kernel", "shape", "requested", "touched", "least", "touched / least", "workspace"]
    return markdown(head, rows)


def kernel_compile() -> str:
    """Registers, spills, resident blocks and matrix instructions by target."""
    found = {}
    for row in result("compile")["rows"]:
        if row["dtype"] == "bfloat16":
            cell = f"{row['registers']} / {row['spills']} / {row['blocks']} / {row['mma']}"
            found.setdefault((row["kernel"], row["case"]), {})[row["target"]] = cell
    rows = [[f"`{kernel}`", case, *(cells.get(t, "–") for t in TARGETS)] for (kernel, case), cells in found.items()]
    return markdown(["kernel", "case", *TARGETS], rows) + f"\n\nTriton {result('compile')['triton']}"


def kernel_peers() -> str:
    rows = []
    for row in result("compile")["peers"]:
        cells = row["registers, spills"]
        rows.append([row["kernel"], *("{} / {}".format(*cells[t]) if t in cells else "–" for t in TARGETS[:3])])
    return markdown(["kernel", *TARGETS[:3]], rows)


def kernel_bounds() -> str:
    """By formula: what benchmarks/kernels.py predicts for the shapes that it times on a GPU."""
    rows = []
    for row in kernels.predictions(kernel_cases.cases(True), [torch.bfloat16]):
        if row["part"] == ("forward" if row["op"] == "decode" else "both"):
            times = [f"{1000 * row[gpu]:,.1f}" for gpu in kernels.GPUS]
            rows.append([row["op"], row["shape"], f"{row['bytes'] / 1e6:,.1f}", f"{row['flops'] / 1e9:,.1f}", *times])
    return markdown(["op", "shape", "MB", "GFLOP", *kernels.GPUS], rows)


def kernel_times(name: str) -> str:
    """Forward and backward by every way; decoding, forward."""
    rows = []
    for row in result(name)["rows"]:
        where = [row["op"], row["dtype"], row["shape"], row["way"]]
        if "not_timed" in row:
            rows.append([*where, f"not timed: {row['not_timed']}", "", ""])
        elif row["part"] == ("forward" if row["op"] == "decode" else "both"):
            memory = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
            spread = f"{row['ms']:.3f} ({row['ms_20']:.3f} to {row['ms_80']:.3f})"
            rows.append([*where, spread, f"{row['share']:.0%} of {row['bound']}", memory])
    head = ["op", "dtype", "shape", "way", "ms, median (20 to 80 %)", "share of the bound", "peak memory"]
    return markdown(head, rows) + f"\n\n`{result(name)['command']}` on {result(name)['device']}"


def kernel_devices(cpu: bool) -> str:
    names = sorted(path.stem for path in RESULTS.glob("kernels_*.json"))
    names = [name for name in names if name.startswith("kernels_cpu_") == cpu]
    return "\n\n".join(kernel_times(name) for name in names) or "*Not measured yet.*"


TABLES = {
    "toy": lambda: curves("toy"),
    "chain_sum": lambda: curves("chain_sum"),
    "grpo_step": grpo_step,
    "steps": steps,
    "files": files,
    "defaults": defaults,
    "tests": tests,
    "family": family,
    "layouts": layouts,
    "plan_check": plan_check,
    "by_hand": by_hand,
    "transfer": transfer,
    "staleness": staleness,
    "pipeline_embedded": lambda: pipeline("embedded"),
    "pipeline_real": lambda: pipeline("real"),
    "packing": packing,
    "server_load": server_load,
    "vllm": vllm,
    "options_sft": lambda: options(sft, CommonOptions),
    "options_reward": lambda: options(reward, CommonOptions),
    "options_dpo": lambda: options(dpo, CommonOptions),
    "options_ppo": lambda: options(ppo, RolloutOptions),
    "options_server": lambda: options(server),
    "kernel_bytes": kernel_bytes,
    "kernel_compile": kernel_compile,
    "kernel_peers": kernel_peers,
    "kernel_bounds": kernel_bounds,
    "kernel_gpus": lambda: kernel_devices(cpu=False),
    "kernel_cpu": lambda: kernel_devices(cpu=True),
}


def filled(text: str) -> str:
    """A README with every table as it should be."""

    def table(match: re.Match) -> str:
        try:
            lines = TABLES[match[1]]()
        except FileNotFoundError as error:
            lines = f"*Not made yet: {Path(error.filename).name} is not there.*"
        return f"<!-- table: {match[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    for path in (ROOT / "README.md", ROOT / "minitrl" / "README.md", ROOT / "kernels" / "README.md"):
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
