"""Preferences: what reward.py and dpo.py share, from their options and their data to the packs of a step.

    {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"}                           all text, or all messages
    {"chosen": [...], "rejected": [...]}                                              whole conversations, or texts

In a pack a pair is three segments, the prompt once and both answers behind it, so that the prompt is computed once, and
neither answer sees the other:

    | prompt | chosen | rejected | prompt | chosen | ...
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data
from .config import CommonOptions, require
from .distributed import World, print0
from .packing import Pack, pack_groups, plan_micro_batches

FLOAT32_MAX = torch.finfo(torch.float32).max
OF_A_STEP = ("tokens", "offending", "state")  # what training.fit wants of a step beside its metrics


@dataclass
class PairOptions(CommonOptions):
    """The options of data that are preferences. Names and defaults are TRL 1.16's where it has the option."""

    examples_per_step: int = 8  # pairs in one optimizer step, over all processes
    lora_dropout: float = 0.0  # share of adapters' inputs that training sets to 0 (TRL: off by disable_dropout)
    max_length: int = 1024  # tokens of a prompt and either answer; pairs that have more are left out, and counted

    def __post_init__(self):
        super().__post_init__()
        self.must(self.examples_per_step >= 1, "examples_per_step", "at least 1")
        self.must(self.max_length >= 2, "max_length", "at least 2")
        both = 2 * self.max_length  # prompt, chosen and rejected are never divided over two micro-batches
        rule = f"at least 2 * --max_length = {both}, for a pair's two answers"
        self.must(self.tokens_per_microbatch >= both, "tokens_per_microbatch", rule)
        self.must(not self.log_completions, "log_completions", "off: there are none")
        self.check_data()


def load_preferences(path: str | Path, tokenizer, max_length: int | None) -> tuple[list[dict[str, Any]], int]:
    """Rows {"prompt_ids", "chosen_ids", "rejected_ids", "margin"} for reward models and DPO; how many were too long.

    Ids are arrays of 4 bytes each; a list takes nine times as much.
    Answers have their end token. A row without "prompt" has two whole conversations, whose shared messages up to the
    first answer that differs are the prompt; or two whole texts, and the tokens that they both begin with. "margin" is
    a number, 0 where it is not given; other keys are passed over. A pair whose prompt and longer answer have more than
    max_length tokens is left out and counted, and the caller prints the count: an answer that is cut has no end.
    """
    rows, dropped = [], 0
    for line, row in data.numbered_rows(Path(path)):
        try:
            prompt_ids, chosen_ids, rejected_ids = _preference(row, tokenizer)
            if not prompt_ids:
                raise ValueError("chosen and rejected have no prompt, nor a beginning in common that could be one")
            margin = row.get("margin", 0.0)
            if type(margin) not in (int, float) or abs(margin) > FLOAT32_MAX:
                raise ValueError(f"margin must be a number, not {margin!r:.60}")
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if max_length is not None and len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > max_length:
            dropped += 1
        else:
            ids = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            rows.append({name: array("i", found) for name, found in ids.items()} | {"margin": float(margin)})
    if not rows:
        raise ValueError(f"{path}: all {dropped} pairs are longer than --max_length {max_length}; raise it")
    return rows, dropped


def _preference(row: dict, tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The ids of a row's prompt, chosen and rejected answer."""
    absent = [name for name in ("chosen", "rejected") if name not in row]
    if absent:
        raise ValueError(f'no "{absent[0]}"; this row has {", ".join(row) or "no keys"}')
    both = [row["chosen"], row["rejected"]]
    if "prompt" in row:
        prompt = data.checked_prompt({"prompt": row["prompt"]})
    elif all(isinstance(answer, str) for answer in both):
        chosen, rejected = (data.ended(tokenizer, tokenizer.encode(answer)) for answer in both)
        shared = _shared(chosen[:-1], rejected[:-1])
        return chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        for name in ("chosen", "rejected"):
            data.check_messages(row[name], name)
        shared = _shared(*both)
        while shared and both[0][shared - 1]["role"] == "assistant":  # the same answer twice, then another turn
            shared -= 1
        prompt, both = both[0][:shared], [answer[shared:] for answer in both]
        if not prompt:
            return [], [], []
    (prompt_ids, chosen), (_, rejected) = (answered(tokenizer, prompt, answer) for answer in both)
    return prompt_ids, chosen, rejected


def answered(tokenizer, prompt: str | list, answer: str | list) -> tuple[list[int], list[int]]:
    """The ids of a prompt, as it is sampled from, and of an answer to it, its end token last; both text or messages.

    What a chat template writes behind the end token, a newline mostly, is never sampled, and left out.
    """
    if isinstance(prompt, str):
        if not isinstance(answer, str):
            raise ValueError("the prompt is text: the answers to it must be text too, not messages")
        before, whole = prompt, prompt + answer
    else:
        data.check_messages(answer, "an answer to messages")
        before, whole = tokenizer.render(prompt), tokenizer.render(prompt + answer, add_generation_prompt=False)
        if not whole.startswith(before):
            raise ValueError("the chat template writes the prompt in another way alone than before an answer, so where "
                             "the answer begins can't be told; use another template, or prompts and answers as text")
    ids, mask = data.encode_pieces(tokenizer, [(before, False), (whole[len(before) :], True)])
    ids, prompt_ids = ids[mask.count(0) :], ids[: mask.count(0)]
    last = max((i for i, token in enumerate(ids) if token in tokenizer.end_ids), default=-1) + 1
    if last and not tokenizer.decode(ids[last:]).strip():
        ids = ids[:last]
    return prompt_ids, data.ended(tokenizer, ids)


def _shared(left: list, right: list) -> int:
    """How many items two lists have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def load(config: PairOptions, tokenizer, positions: int, world: World) -> tuple[list[dict], list[dict]]:
    """The pairs of --dataset and --eval_dataset; `positions` is how many the model has."""
    found = []
    for path in (config.dataset, config.eval_dataset):
        rows, dropped = load_preferences(path, tokenizer, config.max_length) if path else ([], 0)
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
    """This process's micro-batches of the rows: which rows each has, maybe none, and its pack."""
    lengths = [len(row["prompt_ids"]) for row in rows], [answers(row) for row in rows]
    plan = plan_micro_batches(*lengths, config.tokens_per_microbatch, world.data.size, world.shard.size > 1)
    for batch in plan[world.data.rank]:
        assert all(len(both) == 2 for _, both in batch), "a pair was divided"
        members = [p for p, _ in batch]
        prompts = [rows[p]["prompt_ids"] for p in members]
        completions = [[rows[p]["chosen_ids"], rows[p]["rejected_ids"]] for p in members]
        yield members, pack_groups(prompts, completions, world.device)


def of_answers(values_B: Tensor, pack: Pack) -> Tensor:
    """(P, 2): of a value per segment, those of each pair's chosen and rejected answer."""
    return values_B[pack.prefixes_B >= 0].view(-1, 2)


def tokens(rows: list[dict]) -> int:
    """Tokens that go through the model, a prompt's once."""
    return sum(len(row["prompt_ids"]) + sum(answers(row)) for row in rows)


def describe(row: dict) -> dict:
    """A row's token ids, for the file that NaN or infinity leaves behind."""
    return {name: list(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
