"""How good are these models, and is one better than the other: pass@k and accuracy on a data set, side by side.

    accuracy    share of completions whose first reward is at least 1, with Wilson's interval
    pass@k      chance that one of k completions is right, estimated from n without bias (arXiv 2107.03374, eq. 1):
                1 - C(n - c, k) / C(n, k) of a prompt with c right ones
    difference  of two models on the same prompts: McNemar's exact test of prompts that one alone got right (n = 1), or
                a sign-flip test on the prompts' shares (n > 1)

One completion a prompt is greedy, several are sampled. Prompts are what is independent, so intervals are over prompts.

    python -m minitrl.evaluate --model BASE OUT/final --dataset test.jsonl --reward number --num_generations 8
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from . import data, distributed, experience, lora, rewards, runs
from .config import parse, require
from .rollout import Engine

Z = 1.959963984540054  # two-sided 95 %
FLIPS = 100_000  # of the sign-flip test: its p-value is good to 0.0015


@dataclass
class Config:
    """Evaluate one model, or several on the same prompts."""

    model: tuple[str, ...]  # Hugging Face folders, adapters' folders or Hub ids; others are compared with the first
    dataset: str  # prompts, a .jsonl file
    reward: tuple[str, ...]  # built-in names or file.py:function; the first decides what is right
    num_generations: int = 1  # completions of each prompt
    temperature: float | None = None  # of sampling; none: 0 (greedy) for one completion, else 1
    top_p: float = 1.0  # sample from the smallest set of tokens that has this probability; 1: off
    top_k: int = 0  # sample from this many of the likeliest tokens; 0: off
    stop: tuple[str, ...] = ()  # strings that end a completion, beside the checkpoint's end tokens
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted
    max_completion_length: int = 512  # tokens
    reward_timeout: float = 60.0  # seconds a reward may take
    rollout_batch_size: int = 64  # sequences that a process decodes at a time
    seed: int = 42  # of every sampled token
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    output: str | None = None  # write the figures, and every prompt's count, to this .json file

    def __post_init__(self):
        for name in ("num_generations", "max_prompt_length", "max_completion_length", "rollout_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        greedy = self.temperature == 0 or (self.temperature is None and self.num_generations == 1)
        require(not greedy or self.num_generations == 1, "temperature", 0, "above 0 for several completions of a prompt")
        self.temperature = (0.0 if greedy else 1.0) if self.temperature is None else self.temperature


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print a table and write --output."""
    config = parse(Config, argv)
    world = distributed.start(config.device)
    functions = rewards.load_rewards(config.reward)
    found = [evaluate(name, functions, config, world) for name in config.model]
    for other in found[1:]:
        other["against_first"] = compare(found[0]["right"], other["right"], config.num_generations, config.seed)
    if world.rank == 0:
        for result in found:
            print(shown(result))
        if config.output:
            report = {"options": asdict(config), "models": found}
            Path(config.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def evaluate(name: str, functions, config: Config, world) -> dict:
    """One model's figures; `right` counts each prompt's right completions."""
    model, tokenizer = lora.open_model(name, dtype=getattr(torch, config.dtype), device=world.device)
    rows, dropped = data.load_prompts(config.dataset, tokenizer, config.max_prompt_length)
    rewards.check_columns(functions, rows[0]["columns"])
    n, sampling = config.num_generations, {key: getattr(config, key) for key in ("temperature", "top_p", "top_k", "stop")}
    rollouts = experience.generate_and_score(
        Engine(model, tokenizer, max_batch=config.rollout_batch_size), rows,
        [data.seed_of(config.seed, place) for place in range(len(rows))], functions, torch.ones(len(functions)), world,
        num_generations=n, step=0, timeout_s=config.reward_timeout,
        sampling=sampling | {"max_tokens": config.max_completion_length},
    )  # fmt: skip
    right_P = (rollouts.rewards_PGF[..., 0] >= 1).sum(1).numpy()
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    return {
        "model": name, "prompts": len(rows), "prompts_left_out": dropped, "accuracy": float(right_P.mean() / n),
        "interval": interval(right_P / n, n), "pass": {k: float(pass_at_k(n, right_P, k).mean()) for k in ks},
        **experience.rollout_metrics(rollouts, functions), "right": right_P.tolist(),
    }  # fmt: skip


def pass_at_k(n: int, right_P: np.ndarray, k: int) -> np.ndarray:
    """(P,) of n completions, right_P of them right: the chance that k of them, drawn without return, hold a right one."""
    wrong = n - np.asarray(right_P)[:, None] - np.arange(k)  # of those not drawn yet, one factor a draw
    return 1 - np.prod(np.maximum(wrong, 0) / (n - np.arange(k)), axis=1)


def interval(shares_P: np.ndarray, n: int) -> list[float]:
    """Wilson's 95 % interval of the mean share. Completions of a prompt are alike: they count as fewer (Kish's effect).

    The effective number of trials is what would give a binomial the variance that the mean has over prompts.
    """
    P, p = len(shares_P), float(shares_P.mean())
    variance = float(shares_P.var(ddof=1)) / P if P > 1 and n > 1 else 0.0
    trials = min(max(p * (1 - p) / variance, P), P * n) if variance > 0 else P
    centre, spread = p + Z**2 / (2 * trials), Z * math.sqrt(p * (1 - p) / trials + (Z / (2 * trials)) ** 2)
    return [(centre - spread) / (1 + Z**2 / trials), (centre + spread) / (1 + Z**2 / trials)]


def compare(first: list[int], other: list[int], n: int, seed: int = 0) -> dict[str, float]:
    """How much more of the prompts' completions the other got right, a 95 % interval, and a two-sided paired p-value."""
    difference_P = (np.asarray(other) - np.asarray(first)) / n
    mean, P = float(difference_P.mean()), len(difference_P)
    half = Z * float(difference_P.std(ddof=1)) / math.sqrt(P) if P > 1 else math.inf
    lost, won = int((difference_P < 0).sum()), int((difference_P > 0).sum())
    if n == 1:  # under the null each prompt that tells them apart is a fair coin
        tail = sum(math.comb(lost + won, i) for i in range(min(lost, won) + 1)) / 2 ** (lost + won)
        p = min(1.0, 2 * tail)
    else:
        generator, counts = np.random.default_rng(seed), np.round(np.abs(difference_P) * n).astype(np.int64)
        sizes = np.bincount(counts, minlength=n + 1)  # a sum of s flips of size d is d (2 binomial(s, 1/2) - s)
        sums = sum(d * (2 * generator.binomial(s, 0.5, FLIPS) - s) for d, s in enumerate(sizes))
        p = (1 + int((np.abs(sums) >= abs(round(mean * P * n))).sum())) / (1 + FLIPS)
    return {"difference": mean, "interval": [mean - half, mean + half], "p": p, "prompts_won": won, "prompts_lost": lost}


def shown(result: dict) -> str:
    """The figures in a few lines."""
    low, high = result["interval"]
    lines = [f"{result['model']}: {result['prompts']} prompts ({result['prompts_left_out']} too long, left out)",
             f"  accuracy {result['accuracy']:.4f}  95 % {low:.4f} to {high:.4f}  reward {result.get('reward', math.nan):.4f}",
             "  " + "  ".join(f"pass@{k} {value:.4f}" for k, value in result["pass"].items())]
    if against := result.get("against_first"):
        low, high = against["interval"]
        lines.append(f"  against the first {against['difference']:+.4f}  95 % {low:+.4f} to {high:+.4f}  p {against['p']:.2g}"
                     f"  ({against['prompts_won']} prompts better, {against['prompts_lost']} worse)")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.command(main)
