"""SFT: supervised fine-tuning, demonstrations to a model that speaks like them, in one file.

    1  read demonstrations: token ids, and which of them are learnt            data.load_demonstrations
    2  cut what is too long, and with --packing put documents into rows of max_length tokens     packing.pack_lengths
    3  take the next `examples_per_step` rows, divide their documents into micro-batches of so many tokens
    4  loss = -sum over learnt tokens of log p(token | what stands before it in its document) / learnt tokens
    5  sum the gradients over micro-batches and ranks, clip, take an AdamW step                   training.fit

Nothing is padded, and no document sees another: the loss is that of the documents one by one, whatever shares a row,
a micro-batch or a step's ranks. The division is by the learnt tokens of the whole step.
Without --model and --dataset a tiny model learns a tiny task within a minute on a CPU:

    torchrun -m minitrl.sft
    torchrun --nproc_per_node 8 -m minitrl.sft --model Qwen/Qwen3-0.6B --dataset chats.jsonl --assistant_only_loss
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from . import checkpoint, data, distributed, packing, runs, toy, training
from .config import CommonOptions, parse, require
from .data import Documents
from .rollout import context_length


@dataclass
class Config(CommonOptions):
    """Fine-tune a language model on demonstrations. Names and defaults are TRL 1.16's where it has the option."""

    learning_rate: float = 2e-5  # AdamW's, at the top of the schedule
    examples_per_step: int = 8  # rows in one optimizer step, over all processes; a row: a document, or a packed row
    max_length: int | None = 1024  # tokens; the rest of a longer document is cut off, and counted; none: nothing is cut
    packing: bool = False  # fill rows with documents up to max_length tokens
    packing_strategy: Literal["bfd", "wrapped"] = "bfd"  # bfd: best fit, documents whole; wrapped: cut at rows' ends
    completion_only_loss: bool | None = None  # learn the completion, not the prompt; none: where there are prompts
    assistant_only_loss: bool = False  # of messages, learn what the assistant says alone

    def __post_init__(self):
        super().__post_init__()
        check(self)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 130 / 143 where SIGINT / SIGTERM ended the run, after a checkpoint."""
    config = parse(Config, argv, preset=lambda given: {} if "model" in given or "dataset" in given else toy.SFT_PRESET)
    world = distributed.start(config.device, config.timeout)
    run = runs.Run(config, world)
    model, tokenizer, documents, held_out = load(config, run)
    model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = training.optimizer_of(model, config, world)
    inputs = {"--dataset": documents.digest} | ({"--eval_dataset": held_out.digest} if held_out else {})
    if config.model is not None:  # the embedded model is made anew each time
        inputs["--model"] = checkpoint.fingerprint(model)
    members, starts = rows(documents, config)

    def backward(indices: list[int], step: int) -> dict:
        chosen = np.concatenate([members[starts[i] : starts[i + 1]] for i in indices])
        return learn(model, documents, chosen.tolist(), config, world)

    @torch.no_grad()
    def evaluate(step: int) -> dict:
        if not held_out:
            return {}
        metrics = learn(model, held_out, range(len(held_out)), config, world)
        return {f"eval/{name}": metrics[name] for name in ("loss", "entropy")}

    return training.fit(
        run,
        model,
        tokenizer,
        optimizer,
        len(starts) - 1,
        config.examples_per_step,
        inputs=inputs,
        backward=backward,
        evaluate=evaluate,
        describe=lambda i: [documents.ids(d).tolist() for d in members[starts[i] : starts[i + 1]]],
    )


def load(config: Config, run):
    """(model, tokenizer, documents to train on, held-out documents or None): of --model, or the embedded default."""
    world = run.world
    if config.model is None:
        tokenizer = toy.make_tokenizer()
        model = toy.make_model(config.seed, tokenizer.vocab_size).to(world.device)
        return model, tokenizer, *toy.demonstrations(config.seed)
    model, tokenizer = checkpoint.load(config.model, getattr(torch, config.dtype), world.device)
    tokenizer.now = run.began
    found = []
    for path in (config.dataset, config.eval_dataset):
        if path is None:
            found.append(None)
            continue
        read = data.load_demonstrations(path, tokenizer, config.completion_only_loss, config.assistant_only_loss)
        kept = read.truncated(config.max_length)
        cut = int((read.lengths > (config.max_length or math.inf)).sum())
        if cut or len(kept) < len(read):
            left_out = f"{len(read) - len(kept)} have nothing to learn and are left out"
            distributed.print0(world, f"{path}: {cut} of {len(read)} documents are above --max_length "
                               f"{config.max_length} and cut; {left_out}")
        require(len(kept) > 0, "dataset", path, "documents of which something is left to learn")
        longest, room = int(kept.lengths.max()), context_length(model.config)
        require(longest <= room, "max_length", config.max_length, f"at most {room}, for which the model has positions")
        found.append(kept)
    return model, tokenizer, *found


def rows(documents: Documents, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(documents in the order of their rows, where in it each row begins and the last ends)."""
    if not config.packing:
        return np.arange(len(documents)), np.arange(len(documents) + 1)
    bins, count = packing.pack_lengths(documents.lengths, config.max_length)
    return np.argsort(bins, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))])


def learn(model, documents: Documents, chosen, config: Config, world) -> dict:
    """Loss of the chosen documents, and its gradient in the model unless under no_grad; metrics over all processes."""
    lengths = documents.lengths[chosen].tolist()
    one_each = [0] * len(lengths), [[n] for n in lengths]
    plan = packing.plan_micro_batches(*one_each, config.tokens_per_microbatch, world.size)
    count = sum(int(documents.mask(d).sum()) for d in chosen)
    sums = dict.fromkeys(("loss", "entropy"), 0.0)
    for batch in plan[world.rank]:
        mine = [chosen[p] for p, _ in batch]
        pack = packing.pack([documents.ids(d) for d in mine], device=world.device)
        mask_T = torch.from_numpy(np.concatenate([documents.mask(d) for d in mine])).to(world.device)
        logprobs_T, entropy_T = model.logprobs(pack, mask_T)
        loss = -logprobs_T.sum() / count
        if torch.is_grad_enabled():
            loss.backward()
        sums["loss"] += loss.item()
        sums["entropy"] += entropy_T.sum().item() / count
    return training.total(sums, world) | {"trained_tokens": count, "tokens": sum(lengths)}


def check(config: Config) -> None:
    """ValueError for a value, or a combination of values, that can't be run."""

    def must(hold: bool, name: str, rule: str) -> None:
        require(hold, name, getattr(config, name), rule)

    must(config.examples_per_step >= 1, "examples_per_step", "at least 1")
    must(config.max_length is None or config.max_length >= 2, "max_length", "at least 2")
    for given, other in (("model", "dataset"), ("dataset", "model")):
        both = getattr(config, given) is None or getattr(config, other) is not None
        must(both, given, f"given together with --{other}; without both, the embedded default runs")


if __name__ == "__main__":
    runs.command(main)
