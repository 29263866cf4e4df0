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

from . import checkpoint, data, distributed, lora, packing, runs, toy, training
from .config import CommonOptions, parse, require
from .data import Documents
from .rollout import context_length


MEANS = ("loss", "mean_token_accuracy", "entropy")  # metrics that are means over the learnt tokens


@dataclass
class Config(CommonOptions):
    """Fine-tune a language model on demonstrations. Names and defaults are TRL 1.16's where it has the option."""

    learning_rate: float = 2e-5  # AdamW's, at the top of the schedule
    examples_per_step: int = 8  # rows in one optimizer step, over all processes; a row: a document, or a packed row
    max_length: int | None = 1024  # tokens; what a document has beyond is cut off, and counted; none: nothing is cut
    packing: bool = False  # fill each row with documents, up to max_length tokens
    packing_strategy: Literal["bfd", "wrapped"] = "bfd"  # bfd: best fit, documents whole; wrapped: cut at rows' ends
    completion_only_loss: bool | None = None  # learn the completion and not the prompt; none: where there are prompts
    assistant_only_loss: bool = False  # of messages, learn what the assistant says alone
    cache_dir: str | None = None  # folder to keep token ids in, mapped into memory: for data that is large

    def __post_init__(self):
        super().__post_init__()
        check(self)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 130 / 143 where SIGINT / SIGTERM ended the run, after a checkpoint."""
    config = parse(Config, argv, preset=lambda given: {} if "model" in given or "dataset" in given else toy.SFT_PRESET)
    world = distributed.start(config.device, config.timeout, config.mesh)
    run = runs.Run(config, world)
    model, tokenizer, documents, held_out = load(config, run)
    model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = training.optimizer_of(model, config, world)
    inputs = {"--dataset": documents.digest} | ({"--eval_dataset": held_out.digest} if held_out else {})
    if config.model is not None:  # the embedded model is made anew each time, on another machine to the last bit or so
        inputs["--model"] = training.fingerprint(model, config, world)
    documents, members, starts = rows(documents, config)
    distributed.print0(world, f"{len(documents)} documents, {documents.lengths.sum():,} tokens, {len(starts) - 1} rows")

    def backward(indices: list[int], step: int) -> dict:
        of_rows = [members[starts[i] : starts[i + 1]] for i in indices]
        metrics, not_finite = learn(model, documents, np.concatenate(of_rows), config, world)
        row_of = np.repeat(indices, list(map(len, of_rows)))
        return metrics | {"offending": sorted(set(row_of[not_finite].tolist()))}

    @torch.no_grad()
    def evaluate(step: int) -> dict:
        metrics = learn(model, held_out, np.arange(len(held_out)), config, world)[0] if held_out else {}
        return {f"eval/{name}": metrics[name] for name in MEANS if name in metrics}

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
        model = checkpoint.divided(model, torch.float32, world, config.cpu_offload)
        return model, tokenizer, *toy.demonstrations(config.seed)
    model, tokenizer = training.load_model(config, world)
    lora.adapt(model, config, world)
    tokenizer.now = run.began
    room = context_length(model.config)
    fits = config.max_length is None or config.max_length <= room
    require(fits, "max_length", config.max_length, f"at most {room}, for which the model has positions")
    found, limit = [], config.max_length
    for name in ("dataset", "eval_dataset"):
        path = getattr(config, name)
        whole = kept = path and data.load_demonstrations(
            path, tokenizer, config.completion_only_loss, config.assistant_only_loss, config.cache_dir
        )
        if whole and not (config.packing and config.packing_strategy == "wrapped" and name == "dataset"):
            longest, most = int(whole.lengths.max()), min(room, config.tokens_per_microbatch)
            rule = f"given, at most {most}: a document of {path} has {longest} tokens"
            require(limit is not None or longest <= most, "max_length", limit, rule)
            kept = whole.truncated(limit)
            cut, gone = int((whole.lengths > (limit or math.inf)).sum()), len(whole) - len(kept)
            if cut or gone:
                distributed.print0(world, f"{path}: {cut} of {len(whole)} documents are above --max_length {limit} and "
                                   f"cut; {gone} in which nothing is left to learn are left out")
        learnable = path is None or len(kept.truncated(None)) > 0
        require(learnable, name, path, "a file with something to learn before --max_length")
        found.append(kept)
    return model, tokenizer, *found


def rows(documents: Documents, config: Config) -> tuple[Documents, np.ndarray, np.ndarray]:
    """(documents, their numbers row by row, the places in that list where rows begin and the last ends)."""
    if not config.packing:
        return documents, np.arange(len(documents)), np.arange(len(documents) + 1)
    if config.packing_strategy == "wrapped":
        pieces, starts = documents.wrapped(config.max_length)
        return pieces, np.arange(len(pieces)), starts
    return documents, *packing.rows_of(*packing.pack_lengths(documents.lengths, config.max_length))


def learn(model, documents: Documents, chosen: np.ndarray, config: Config, world) -> tuple[dict, list[int]]:
    """The loss of the chosen documents, and its gradient in the model where gradients are on.

    All processes call it with the same documents, share the work, and get the metrics of the whole; also returns which
    of the chosen were, on this process, in a micro-batch whose loss is not finite.
    """
    lengths, masks = documents.lengths[chosen].tolist(), [documents.mask(d) for d in chosen]
    learnt = sum(int(mask.sum()) for mask in masks)  # over all micro-batches and processes
    count = max(1, learnt)
    one_each = [0] * len(lengths), [[length] for length in lengths]
    ranks, even = world.data.size, world.shard.size > 1
    plan = packing.plan_micro_batches(*one_each, config.tokens_per_microbatch, ranks, even)
    sums, not_finite = np.zeros(len(MEANS)), []
    for batch in plan[world.data.rank]:
        places = [place for place, _ in batch]
        pack = packing.pack_groups([documents.ids(chosen[place]) for place in places], [[]] * len(places), world.device)
        mask_T = torch.from_numpy(np.concatenate([masks[place] for place in places] or [[False]])).to(world.device)
        loss, _, entropy_T, top_T = model.logprob_sum(pack, mask_T.float() / -count)
        if torch.is_grad_enabled():
            loss.backward()
        shares = torch.stack([loss.detach(), top_T.sum() / count, entropy_T.sum() / count]).tolist()
        sums += shares
        not_finite += places if not math.isfinite(shares[0]) else []
    metrics = training.total(dict(zip(MEANS, sums)), world.data)
    return metrics | {"trained_tokens": learnt, "tokens": sum(lengths)}, not_finite


def check(config: Config) -> None:
    """ValueError for a value, or a combination of values, that can't be run."""

    def must(hold: bool, name: str, rule: str) -> None:
        require(hold, name, getattr(config, name), rule)

    must(config.examples_per_step >= 1, "examples_per_step", "at least 1")
    must(config.max_length is None or config.max_length >= 2, "max_length", "at least 2")
    must(config.max_length is not None or not config.packing, "max_length", "given with --packing: how long a row is")
    fits = config.max_length is None or config.tokens_per_microbatch >= config.max_length
    must(fits, "tokens_per_microbatch", f"at least --max_length, {config.max_length} tokens")
    config.check_data()
    must(not config.log_completions, "log_completions", "off: there are none")


if __name__ == "__main__":
    runs.command(main)
