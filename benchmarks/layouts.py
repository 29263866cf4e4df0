"""Which layout for which model on how many GPUs, by minitrl.plan: `python -m benchmarks.layouts [MODEL ...]`.

For each model and number of GPUs the fastest of some layouts that fit is looked for: by what 4 and 6 of its layers ask
for, and then by a plan of the whole model. Writes benchmarks/results/layouts.json row by row; rows that are there
already stay, so that it can be stopped and called again.

`torchrun --nproc_per_node N -m benchmarks.layouts check [--shard N ...]` runs one step on N real processes and on N
pretended ones, of a model of 32 million parameters, and writes both into benchmarks/results/plan_check.json.
"""

import json
import math
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from minitrl import distributed, layout, plan
from minitrl.config import parse
from minitrl.kernels import attention
from minitrl.model import ModelConfig

RESULTS = Path(__file__).parent / "results"
GPUS = (1, 8, 64, 512)
# A sampler has at most as many slices as there are key/value heads: an eighth of 405B is 94 GiB in bfloat16.
LARGER = {"Llama-3.1-405B": "B200"}  # than an H100
MACHINE = 2**41  # bytes of its own memory that a machine has for --cpu_offload

# Layers, width, feed-forward, heads, key/value heads, size of a head, vocabulary, whether the head is the embedding.
SHAPES = {
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 2, 64, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, True),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False),
    "Qwen2.5-14B": ("qwen2", 48, 5120, 13824, 40, 8, 128, 152064, False),
    "Qwen2.5-32B": ("qwen2", 64, 5120, 27648, 40, 8, 128, 152064, False),
    "Qwen2.5-72B": ("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, False),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, True),
    "Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
    "Qwen3-14B": ("qwen3", 40, 5120, 17408, 40, 8, 128, 151936, False),
    "Qwen3-32B": ("qwen3", 64, 5120, 25600, 64, 8, 128, 151936, False),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "Llama-3.1-70B": ("llama", 80, 8192, 28672, 64, 8, 128, 128256, False),
    "Llama-3.1-405B": ("llama", 126, 16384, 53248, 128, 8, 128, 128256, False),
}
MODELS = (
    "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-4B", "Llama-3.1-8B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B",
    "Llama-3.1-405B",
)  # fmt: skip


def description(name: str) -> dict:
    """The config.json of one of SHAPES, as far as it says something of its size."""
    kind, layers, width, ffn, heads, kv_heads, size, vocabulary, tied = SHAPES[name]
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768,
    }  # fmt: skip


def candidates(name: str, gpus: int):
    """Configs worth a look: divided over nothing, a machine, or all; whole matrices or as many slices as there can be.

    Each a sampler that takes a quarter of a GPU at most; smaller micro-batches and offload where all is divided.
    """
    shape, gpu = ModelConfig.from_hf(description(name)), LARGER.get(name, "H100")
    memory = plan.GPUS[gpu].memory
    parameters = sum(math.prod(box.shape) for box in layout.boxes(shape))
    nodes, each = math.ceil(gpus / 8), min(gpus, 8)
    slices = [n for n in (1, 2, 4, 8) if shape.num_key_value_heads % n == 0 and n <= each]
    thrifty = next((n for n in slices if 2 * parameters / n < memory / 4), slices[-1])
    for tensor in sorted({1, slices[-1]}):
        for shard in sorted({1, each // tensor, min(gpus, 64) // tensor, gpus // tensor}):
            for offload, tokens in ((False, 8192), (False, 4096), (True, 8192)):
                state = 0 if offload else (18 if shard == 1 else 16) * parameters / shard / tensor
                sampler = 0 if shard == 1 and thrifty == tensor else 2 * parameters / thrifty
                last = shard == gpus // tensor
                if offload and (shard == 1 or each * 16 * parameters / shard / tensor > MACHINE):
                    continue
                if state + sampler < memory and (last or tokens == 8192):
                    yield plan.Config(
                        model=name, nodes=nodes, gpus_per_node=each, shard=shard, tensor=tensor, cpu_offload=offload,
                        rollout_tensor=thrifty, tokens_per_microbatch=tokens, max_completion_length=1024, gpu=gpu,
                    )  # fmt: skip


def sketch(config: plan.Config, shape: ModelConfig) -> tuple[float, float]:
    """(peak bytes, a GPU's seconds for a token) from 4 and 6 layers: with fewer, FSDP2 does not yet gather ahead."""
    few = [replace(shape, num_hidden_layers=n, windows=shape.windows[:n]) for n in (4, 6)]
    found = [plan.plan(replace(config, num_micro_batches=1), some) for some in few]
    share = config.tensor / config.tokens_per_microbatch
    pairs = [(x["memory"]["peak"], x["seconds"][config.gpu]["step"] * share) for x in found]
    return tuple(six + (shape.num_hidden_layers - 6) * (six - four) / 2 for four, six in zip(*pairs))


def best(name: str, gpus: int) -> dict | None:
    """The plan of the fastest layout that fits, with smaller micro-batches or offload where nothing else does."""
    shape, every, share = ModelConfig.from_hf(description(name)), list(candidates(name, gpus)), 1 - plan.HEADROOM
    for offload, tokens in ((False, 8192), (False, 4096), (True, 8192)):
        some = [x for x in every if (x.cpu_offload, x.tokens_per_microbatch) == (offload, tokens)]
        sketched = [(*sketch(config, shape), config) for config in some]
        for peak, _, config in sorted(sketched, key=lambda row: row[1]):
            room = share * plan.GPUS[config.gpu].memory
            if peak <= room and (found := plan.plan(config, shape))["fits"]:
                return found
    return None


def main(models: list[str]) -> None:
    path = RESULTS / "layouts.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    done = {(row["model"], row["gpus"]) for row in rows}
    for name, gpus in ((name, gpus) for name in models or MODELS for gpus in GPUS):
        began = time.process_time()
        if (name, gpus) in done or not (found := best(name, gpus)):
            continue
        rows.append(found | {"gpus": gpus})
        rows.sort(key=lambda row: (row["parameters"], row["model"], row["gpus"]))
        body = {"command": "python -m benchmarks.layouts", "torch": torch.__version__, "rows": rows}
        path.write_text(json.dumps(body, indent=1) + "\n")
        print(f"{name} on {gpus}: {time.process_time() - began:.0f} s of CPU", found["options"], flush=True)


def check(argv: list[str]) -> None:
    """A real step beside a pretended one, of the plain PyTorch ops, which run here."""
    os.environ["MINITRL_KERNELS"] = "reference"
    small = ("llama", 8, 512, 1408, 8, 4, 64, 8192, False)
    SHAPES["small"] = small
    shape = ModelConfig.from_hf(description("small"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    options = ["--model", "small", "--gpus_per_node", str(size), "--tokens_per_microbatch", "2048"]
    config = parse(plan.Config, options + ["--max_prompt_length", "256", "--max_completion_length", "256"] + argv)

    def rss() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = rss()
    world = distributed.start("cpu", 600, config.mesh)
    real, grown = plan.measure(config, shape, world), rss() - before
    distributed.stop()
    if world.rank:
        return
    attention.tiles.cache_clear()  # what is cached would not be made again, and not be counted
    with plan.pretended(size, config.mesh) as world:
        pretended = plan.measure(config, shape, world)
    row = {"processes": size, "mesh": config.mesh, "rss_grown": grown}
    for name, found in (("real", real), ("pretended", pretended)):
        row[name] = {
            "peak": max(sum(reading["peak"].values()) for reading in found.values()),
            "flops": sum(reading["flops"] for reading in found.values()),
            "sent": sum(sum(reading["traffic"].values()) for reading in found.values()),
        }
    path = RESULTS / "plan_check.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [other for other in rows if tuple(other["mesh"]) != config.mesh] + [row]
    command = "torchrun --nproc_per_node N -m benchmarks.layouts check --shard ... --tensor ..."
    path.write_text(json.dumps({"command": command, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    check(sys.argv[2:]) if sys.argv[1:2] == ["check"] else main(sys.argv[1:])
