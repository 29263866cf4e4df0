"""How good are these models, and is one better than the other: accuracy and pass@k on a data set, side by side.

    accuracy    share of completions whose first reward is at least 1, with Wilson's interval
    pass@k      chance that one of k completions is right, from n of them without bias (arXiv 2107.03374, eq. 1):
                1 - C(n - c, k) / C(n, k) of a prompt with c right ones
    difference  of two models on the same prompts; p by McNemar's exact test (n = 1), or by flipping signs (n > 1)

One completion a prompt is greedy, several are sampled. Intervals are of 95 %, over prompts: they alone are independent.

    python -m minitrl.evaluate --model BASE OUT/final --dataset test.jsonl --reward number --num_generations 8
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from . import data, distributed, experience, lora, rewards, runs
from .config import parse, require
from .rollout import Engine

Z = 1.959963984540054  # of a two-sided 95 %
FLIPS = 100_000  # of the sign-flip test


@dataclass
class Config:
    """Evaluate one model, or several on the same prompts."""

    model: tuple[str, ...]  # Hugging Face folders, adapters' folders or Hub ids; the others are compared with the first
    dataset: str  # prompts, a .jsonl file
    reward: tuple[str, ...]  # built-in names, file.py:function, reward models' folders; the first decides what is right
    num_generations: int = 1  # completions of each prompt
    temperature: float | None = None  # of sampling; none: 0 (greedy) for one completion, 1 for several
    top_p: float = 1.0  # sample from the smallest set of tokens that has this probability; 1: off
    stop: tuple[str, ...] = ()  # strings that end a completion, beside the checkpoint's end tokens
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted
    max_completion_length: int = 512  # tokens
    reward_timeout: float = 60.0  # seconds that a reward may take
    rollout_batch_size: int = 64  # sequences that a process decodes at a time
    seed: int = 42  # of every sampled token
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    output: str | None = None  # write the options, figures and every prompt's count to this .json file

    def __post_init__(self):
        for name in ("num_generations", "max_prompt_length", "max_completion_length", "rollout_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.temperature is None:
            self.temperature = float(self.num_generations > 1)
        rule = "above 0 for several completions, which would be all the same"
        require(self.temperature > 0 or self.num_generations == 1, "temperature", self.temperature, rule)


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print the figures, write --output."""
    config = parse(Config, argv)
    world = distributed.start(config.device)
    found = [evaluate(name, rewards.load_rewards(config.reward), config, world) for name in config.model]
    for result in found:
        if result is not found[0]:
            result["against_first"] = compare(found[0], result, config.num_generations, config.seed)
        shown = {name: value for name, value in result.items() if name not in ("right", "digest")}
        distributed.print0(world, "\n  ".join(f"{name}: {value}" for name, value in shown.items()))
    if world.rank == 0 and config.output:
        text = json.dumps({"options": asdict(config), "models": found}, indent=1)
        Path(config.output).write_text(text + "\n", encoding="utf-8")
    return 0


def evaluate(name: str, functions, config: Config, world) -> dict:
    """One model's figures; `right` counts each prompt's right completions, `digest` is of the prompts."""
    model, tokenizer = lora.open_model(name, dtype=getattr(torch, config.dtype), device=world.device)
    rows, dropped = data.load_prompts(config.dataset, tokenizer, config.max_prompt_length)
    rewards.check_columns(functions, rows[0]["columns"])
    rewards.open_models(functions, tokenizer, world.device, partial(distributed.print0, world))
    seeds = [data.seed_of(config.seed, place) for place in range(len(rows))]
    engine, n = Engine(model, tokenizer, max_batch=config.rollout_batch_size), config.num_generations
    sampling = {key: getattr(config, key) for key in ("temperature", "top_p", "stop")}
    rollouts = experience.generate_and_score(
        engine, rows, seeds, functions, torch.ones(len(functions)), world, num_generations=n, step=0,
        timeout_s=config.reward_timeout, sampling=sampling | {"max_tokens": config.max_completion_length},
    )  # fmt: skip
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    right_P = (rollouts.rewards_PGF[..., 0] >= 1).sum(1).numpy()
    return {
        "model": name, "prompts": len(rows), "prompts_left_out": dropped, "accuracy": float(right_P.mean() / n),
        "interval": interval(right_P / n, n),
        **{f"pass@{k}": float(pass_at_k(n, right_P, k).mean()) for k in ks},
        **experience.rollout_metrics(rollouts, functions), "right": right_P.tolist(),
        "digest": data.fingerprint([{"text": row["prompt"]} for row in rows]),
    }  # fmt: skip


def pass_at_k(n: int, right_P, k: int) -> np.ndarray:
    """(P,) the chance that k of n completions, right_P of them right, hold a right one."""
    wrong = np.maximum(n - np.asarray(right_P)[:, None] - np.arange(k), 0)  # those left before each draw
    return 1 - np.prod(wrong / (n - np.arange(k)), axis=1)


def interval(shares_P: np.ndarray, n: int) -> list[float]:
    """Wilson's, for as many trials, from P to P n, as would give the mean the variance that it has over prompts."""
    P, p = len(shares_P), float(shares_P.mean())
    variance = float(shares_P.var(ddof=1)) / P if P > 1 and n > 1 else 0.0
    trials = min(max(p * (1 - p) / variance, P), P * n) if variance > 0 else P
    centre, half = p + Z**2 / (2 * trials), Z * math.sqrt(p * (1 - p) / trials + (Z / (2 * trials)) ** 2)
    return [(centre - half) / (1 + Z**2 / trials), (centre + half) / (1 + Z**2 / trials)]


def compare(first: dict, other: dict, n: int, seed: int = 0) -> dict:
    """What the other model gained over the first in accuracy, its interval, and the two-sided p-value (see above)."""
    if first["digest"] != other["digest"]:
        raise ValueError("--max_prompt_length: the models' tokenizers leave out different prompts; raise it")
    gained_P = np.asarray(other["right"]) - np.asarray(first["right"])
    P, mean = len(gained_P), float(gained_P.mean() / n)
    half = Z * float(gained_P.std(ddof=1)) / n / math.sqrt(P) if P > 1 else math.inf
    won, lost = int((gained_P > 0).sum()), int((gained_P < 0).sum())
    if n == 1:  # had both the same chance, each prompt that tells them apart would be a fair coin
        tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
        p = min(1.0, tail / 2 ** (won + lost - 1)) if won + lost else 1.0
    else:  # the sum of m sign-flips of size d is d (2 binomial(m, 1/2) - m)
        draw, counts = np.random.default_rng(seed), np.bincount(np.abs(gained_P))
        sums = sum(d * (2 * draw.binomial(m, 0.5, FLIPS) - m) for d, m in enumerate(counts))
        p = (1 + int((np.abs(sums) >= abs(gained_P.sum())).sum())) / (1 + FLIPS)
    bounds = [max(mean - half, -1.0), min(mean + half, 1.0)]
    return {"difference": mean, "interval": bounds, "p": p, "won": won, "lost": lost}


if __name__ == "__main__":
    runs.command(main)
