"""Reward model: preferences to a model that scores an answer with one number, in one file.

    1  read pairs: the token ids of a prompt, a chosen and a rejected answer             pairs.load_preferences
    2  a language model's trunk with a fresh scalar head                                 checkpoint.load, Model.values
    3  take the next `examples_per_step` pairs, divide them into micro-batches of so many tokens, each prompt standing
       once before both answers                                                          pairs.batches
    4  an answer's score is the value at its last token, the end token; prompts, answers and padding have no other say
    5  loss = -sum over pairs of log sigmoid(score(chosen) - score(rejected) - margin) / pairs        losses.reward_loss
    6  sum the gradients over micro-batches and ranks, clip, take an AdamW step                       training.fit

The final folder is an XForSequenceClassification of one label, for transformers as well, and serves as a reward:
`--reward FOLDER` of grpo.py and ppo.py.
Without --model and --dataset a tiny model learns to tell right from wrong within half a minute on a CPU:

    torchrun -m minitrl.reward
    torchrun --nproc_per_node 8 -m minitrl.reward --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --eval_dataset out.jsonl
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checkpoint, data, distributed, lora, losses, pairs, runs, toy, training
from .config import parse
from .model import with_scalar_head
from .rollout import context_length


@dataclass
class Config(pairs.PairOptions):
    """Train a reward model on preferences. Names and defaults are those of TRL 1.16 where it has the option."""

    learning_rate: float = 1e-4  # AdamW's, at the top of the schedule
    center_rewards_coefficient: float = 0.0  # weight of (chosen + rejected)^2, which keeps scores around 0; say 0.01

    def __post_init__(self):
        super().__post_init__()
        self.must(self.center_rewards_coefficient >= 0, "center_rewards_coefficient", "at least 0")


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 130 / 143 where SIGINT / SIGTERM ended the run, after a checkpoint."""
    embedded = lambda given: {} if "model" in given or "dataset" in given else toy.REWARD_PRESET  # noqa: E731
    config = parse(Config, argv, preset=embedded)
    world = distributed.start(config.device, config.timeout, config.mesh)
    run = runs.Run(config, world)
    model, tokenizer, rows, held_out = load(config, run)
    model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = training.optimizer_of(model, config, world)
    inputs = {"--dataset": data.fingerprint(rows), "--eval_dataset": data.fingerprint(held_out)}
    if config.model is not None:  # the embedded model is made anew each time
        inputs["--model"] = training.fingerprint(model, config, world)

    def backward(indices: list[int], step: int) -> dict:
        return learn(model, [rows[i] for i in indices], indices, config, world)

    @torch.no_grad()
    def evaluate(step: int) -> dict:
        metrics = learn(model, held_out, [], config, world) if held_out else {}
        return {f"eval/{name}": value for name, value in metrics.items() if name not in pairs.OF_A_STEP}

    return training.fit(
        run,
        model,
        tokenizer,
        optimizer,
        len(rows),
        config.examples_per_step,
        inputs=inputs,
        backward=backward,
        evaluate=evaluate,
        describe=lambda i: pairs.describe(rows[i]),
        plotted=("accuracy", "eval/accuracy"),
    )


def load(config: Config, run):
    """(model, tokenizer, pairs to train on, held-out pairs): of --model and --dataset, or the embedded default."""
    world = run.world
    if config.model is None:
        policy, tokenizer = toy.build(config.seed, world.device, log=lambda text: distributed.print0(world, text))
        model = with_scalar_head(policy, config.seed)
        model = checkpoint.divided(model, torch.float32, world, config.cpu_offload)
        return model, tokenizer, *toy.preferences(config.seed)
    model, tokenizer = training.load_model(config, world, scalar_head=True)
    lora.adapt(model, config, world)
    tokenizer.now = run.began
    return model, tokenizer, *pairs.load(config, tokenizer, context_length(model.config), world)


def learn(model, rows: list[dict], indices: list[int], config: Config, world) -> dict:
    """Leave this process's share of the gradient of the rows' loss in the model, unless under no_grad; returns the
    metrics of all rows."""
    scores_P2 = torch.zeros(len(rows), 2, device=world.device)
    margins_P = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
    centre, offending = config.center_rewards_coefficient, []
    for members, pack in pairs.batches(rows, config, world):
        scores = pairs.of_answers(model.values(pack)[pack.cu_seqlens[1:] - 1], pack)  # of their last tokens
        loss = losses.reward_loss(*scores.unbind(1), margins_P[members].to(world.device), centre, len(rows))
        if loss.requires_grad:
            loss.backward()
        offending += [p for p, sound in zip(members, scores.isfinite().all(1).tolist()) if not sound]
        scores_P2[members] = scores.detach().float()
    distributed.sum_([scores_P2], world.data)
    scores_P2 = scores_P2.cpu()
    metrics = {"loss": losses.reward_loss(*scores_P2.unbind(1), margins_P, centre).item()}
    metrics |= statistics(scores_P2, pairs.lengths(rows)) | {"tokens": pairs.tokens(rows)}
    return metrics | {"offending": [indices[p] for p in offending] if indices else []}


def statistics(scores_P2: Tensor, lengths_P2: Tensor) -> dict[str, float]:
    """What the scores are like, in TRL's names; length_correlation: how much longer answers score higher, -1 to 1."""
    difference = scores_P2[:, 0] - scores_P2[:, 1]
    metrics = {
        "accuracy": (difference > 0).double().mean().item(),
        "margin": difference.mean().item(),
        "min_reward": scores_P2.min().item(),
        "mean_reward": scores_P2.mean().item(),
        "max_reward": scores_P2.max().item(),
    }
    both = torch.stack([scores_P2.flatten(), lengths_P2.flatten()]).double()
    if (both.std(1) > 0).all():  # of answers of one length there is none
        metrics["length_correlation"] = torch.corrcoef(both)[0, 1].item()
    return metrics


if __name__ == "__main__":
    runs.command(main)
