"""Preferences in a step: what reward.py and dpo.py share, from their options to the packs of a step.

A pair is a row of `data.load_preferences`. In a pack it is three segments, the prompt once and both answers behind it,
so that the prompt is computed once, and neither answer sees the other:

    | prompt | chosen | rejected | prompt | chosen | ...
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import data
from .config import CommonOptions, require
from .distributed import World, print0
from .packing import Pack, pack_groups, plan_micro_batches


@dataclass
class PairOptions(CommonOptions):
    """The options of data that are preferences. Names and defaults are TRL 1.16's where it has the option."""

    examples_per_step: int = 8  # pairs in one optimizer step, over all processes
    lora_dropout: float = 0.0  # share of adapters' inputs that training sets to 0 (TRL: off by disable_dropout)
    max_length: int = 1024  # tokens of a prompt and either answer; pairs that have more are left out, and counted

    def __post_init__(self):
        super().__post_init__()
        require(self.examples_per_step >= 1, "examples_per_step", self.examples_per_step, "at least 1")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        # prompt, chosen and rejected are never divided over two micro-batches
        require(self.tokens_per_microbatch >= 2 * self.max_length, "tokens_per_microbatch", self.tokens_per_microbatch,
                f"at least 2 * --max_length = {2 * self.max_length}, for a pair's two answers")
        for given, other in (("model", "dataset"), ("dataset", "model")):
            both = getattr(self, given) is None or getattr(self, other) is not None
            rule = f"given together with --{other}; without both, the embedded default runs"
            require(both, given, getattr(self, given), rule)
        if self.model is None:
            require(self.dtype == "float32", "dtype", self.dtype, "float32 without --model: the embedded default is")
            require(self.eval_dataset is None, "eval_dataset", self.eval_dataset,
                    "left out without --model: the embedded default has its own")
        require(self.model is None or self.eval_dataset is not None or not self.eval_steps, "eval_steps",
                self.eval_steps, "given with --eval_dataset")


def load(config: PairOptions, tokenizer, positions: int, world: World) -> tuple[list[dict], list[dict]]:
    """The pairs of --dataset and --eval_dataset; `positions` is how many the model has."""
    found = []
    for path in (config.dataset, config.eval_dataset):
        rows, dropped = data.load_preferences(path, tokenizer, config.max_length) if path else ([], 0)
        if dropped:
            print0(world, f"{path}: {dropped} pairs are above --max_length {config.max_length} and left out")
        longest = max((len(row["prompt_ids"]) + max(answers(row)) for row in rows), default=0)
        require(longest <= positions, "max_length", config.max_length, f"at most {positions}: the model has no more")
        found.append(rows)
    return tuple(found)


def answers(row: dict) -> list[int]:
    """The tokens of a pair's chosen and rejected answer."""
    return [len(row["chosen_ids"]), len(row["rejected_ids"])]


def lengths(rows: list[dict]) -> Tensor:
    """(P, 2) float32: the tokens of each pair's chosen and rejected answer."""
    return torch.tensor([answers(row) for row in rows], dtype=torch.float32)


def batches(rows: list[dict], config: PairOptions, world: World) -> Iterator[tuple[list[int], Pack]]:
    """This process's micro-batches of the rows: which rows each has, and its pack."""
    prompts = [len(row["prompt_ids"]) for row in rows]
    plan = plan_micro_batches(prompts, [answers(row) for row in rows], config.tokens_per_microbatch, world.size)
    for batch in plan[world.rank]:
        assert all(len(both) == 2 for _, both in batch), "a pair was divided"
        members = [p for p, _ in batch]
        prompts = [rows[p]["prompt_ids"] for p in members]
        completions = [[rows[p]["chosen_ids"], rows[p]["rejected_ids"]] for p in members]
        yield members, pack_groups(prompts, completions, world.device)


def tokens(rows: list[dict]) -> int:
    """Tokens that go through the model, a prompt's once."""
    return sum(len(row["prompt_ids"]) + sum(answers(row)) for row in rows)


def describe(row: dict) -> dict:
    """A row's token ids, for the file that NaN or infinity leaves behind."""
    return {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
