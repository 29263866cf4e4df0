"""DPO: direct preference optimisation (arXiv 2305.18290), from pairs of answers to a better policy in one file.

    1  read pairs: the token ids of a prompt, a chosen and a rejected answer             pairs.load_preferences
    2  the policy as it starts is the reference: its log-probs of all answers, once, kept on disk     reference_logprobs
    3  take the next `examples_per_step` pairs, divide them into micro-batches of so many tokens, each prompt standing
       once before both answers                                                          pairs.batches
    4  loss = -sum over pairs of log sigmoid(beta (r(chosen) - r(rejected))) / pairs,
       r(answer) = log-prob under the policy - log-prob under the reference              losses.dpo_loss
    5  sum the gradients over micro-batches and ranks, clip, take an AdamW step          training.fit

Since the reference never moves, no second model is held, and no second forward pass made in a step.
Most losses are a sum over pairs: a micro-batch's share is computed where its log-probs are. Three compare pairs with
each other (losses.WHOLE_STEP: aot, aot_pair, bco_pair). There the log-probs of the whole step come first, by one pass
more, and with them d loss / d log-prob of each answer; then each micro-batch goes backward with its own. So these
losses, too, do not depend on how a step is divided.
Without --model and --dataset a tiny model gets better at a tiny task within a minute on a CPU:

    torchrun -m minitrl.dpo
    torchrun --nproc_per_node 8 -m minitrl.dpo --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --eval_dataset held.jsonl
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import checkpoint, data, distributed, lora, losses, pairs, runs, toy, training
from .config import parse
from .rollout import context_length
from .state import load_state, save_state


@dataclass
class Config(pairs.PairOptions):
    """Train a language model with DPO. Names and defaults are those of TRL 1.16 where it has the option."""

    loss_type: tuple[Literal[tuple(losses.DPO_LOSS_TYPES)], ...] = ("sigmoid",)  # formulas: losses.py; several: added
    loss_weights: tuple[float, ...] = ()  # one weight for each loss; none: 1 each
    beta: float = 0.1  # how strongly the policy is held to the reference; ipo's tau
    label_smoothing: float = 0.0  # the probability that a pair stands the wrong way round
    discopop_tau: float = 0.05  # temperature of discopop's blend
    reference_free: bool = False  # as if the reference gave all answers the same probability
    reference_cache: str | None = None  # folder for the reference's log-probs, which runs may share; none: --output_dir

    def __post_init__(self):
        super().__post_init__()
        known, count = ", ".join(losses.DPO_LOSS_TYPES), len(self.loss_type)
        self.must(count > 0, "loss_type", f"one or several of {known}")
        self.must(len(self.loss_weights) in (0, count), "loss_weights", f"{count} numbers, one for each loss")
        self.must(self.beta > 0, "beta", "above 0")
        self.must(0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and below 0.5")
        smooths = self.label_smoothing == 0 or any(kind in losses.SMOOTHED for kind in self.loss_type)
        rule = f"0 but with one of {', '.join(losses.SMOOTHED)}; the others take none"
        self.must(smooths, "label_smoothing", rule)
        self.must(self.discopop_tau > 0, "discopop_tau", "above 0")


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 130 / 143 where SIGINT / SIGTERM ended the run, after a checkpoint."""
    config = parse(Config, argv, preset=lambda given: {} if "model" in given or "dataset" in given else toy.DPO_PRESET)
    world = distributed.start(config.device, config.timeout, config.mesh)
    run = runs.Run(config, world)
    policy, tokenizer, rows, held_out = load(config, run)
    optimizer = training.optimizer_of(policy, config, world)
    inputs = {"--dataset": data.fingerprint(rows), "--eval_dataset": data.fingerprint(held_out)}
    if config.model is not None:  # the embedded model is made anew each time, on another machine to the last bit or so
        inputs["--model"] = training.fingerprint(policy, config, world)
    reference = reference_logprobs(policy, rows + held_out, config, run)
    policy.gradient_checkpointing = config.gradient_checkpointing
    state = {"delta": 0.0}

    def backward(indices: list[int], step: int) -> dict:
        return learn(policy, [rows[i] for i in indices], reference[indices], indices, config, world, state, step)

    @torch.no_grad()
    def evaluate(step: int) -> dict:
        if not held_out:
            return {}
        metrics = learn(policy, held_out, reference[len(rows) :], [], config, world, state, None)
        return {f"eval/{name}": value for name, value in metrics.items() if name not in pairs.OF_A_STEP}

    return training.fit(
        run,
        policy,
        tokenizer,
        optimizer,
        len(rows),
        config.examples_per_step,
        inputs=inputs,
        backward=backward,
        evaluate=evaluate,
        describe=lambda i: pairs.describe(rows[i]),
        plotted=("rewards/accuracies", "eval/rewards/accuracies"),
        state=state,
    )


def load(config: Config, run):
    """(policy, tokenizer, pairs to train on, held-out pairs): of --model and --dataset, or the embedded default."""
    world = run.world
    if config.model is None:
        policy, tokenizer = toy.build(config.seed, world.device, log=lambda text: distributed.print0(world, text))
        policy = checkpoint.divided(policy, torch.float32, world, config.cpu_offload)
        return policy, tokenizer, *toy.preferences(config.seed)
    policy, tokenizer = training.load_model(config, world)
    lora.adapt(policy, config, world)
    tokenizer.now = run.began
    return policy, tokenizer, *pairs.load(config, tokenizer, context_length(policy.config), world)


def reference_logprobs(policy, rows: list[dict], config: Config, run) -> Tensor:
    """(N, 2) float32: the log-probs of each pair's answers under the policy as it is now; zeros with --reference_free.

    Computed once for each model and data set: the folder they are kept in is named by digests of both, and what is read
    back is checked by a digest of its own.
    """
    if config.reference_free:
        return torch.zeros(len(rows), 2)
    key = {"model": training.fingerprint(policy, config, run.world), "data": data.fingerprint(rows)}
    name = hashlib.sha256("".join(key.values()).encode()).hexdigest()[:16]
    folder = f"{config.reference_cache or f'{config.output_dir}/reference'}/{name}"
    try:
        found = load_state(folder)
    except ValueError as error:
        distributed.print0(run.world, f"reference: computed again, since {error}")
        found = None
    if not distributed.any_true(found is None or found[2] != key, run.world):
        distributed.print0(run.world, f"reference: log-probs read from {folder}")
        return found[1]["reference"]["logprobs"]
    with run.timed("reference"):
        logprobs_N2 = score(policy, rows, config, run.world)
    if run.world.rank == 0:
        try:
            save_state(folder, 0, {"reference": {"logprobs": logprobs_N2}}, key)
        except OSError as error:  # another run on the same folder, or no room: the next one computes them again
            print(f"reference: its log-probs are not kept: {error}", flush=True)
    return logprobs_N2


@torch.no_grad()
def score(policy, rows: list[dict], config: Config, world) -> Tensor:
    """(N, 2) float32 on the CPU: the log-probs of each row's answers under the policy, the same on every rank."""
    logprobs_N2 = torch.zeros(len(rows), 2, device=world.device)
    for members, pack in pairs.batches(rows, config, world):
        logprobs_N2[members] = answer_logprobs(policy, pack)[0].float()
    distributed.sum_([logprobs_N2], world.data)
    return logprobs_N2.cpu()


def answer_logprobs(policy, pack) -> tuple[Tensor, Tensor]:
    """(P, 2) float32, the log-probs of the pack's chosen and rejected answers; and the sum of all tokens' entropies."""
    logprobs_T, entropy_T = policy.logprobs(pack, pack.completion_T)
    sums_B = torch.stack([part.sum() for part in logprobs_T.split(pack.lengths)])
    return pairs.of_answers(sums_B, pack), entropy_T.detach().sum()


def learn(policy, rows, reference_P2, indices, config: Config, world, state: dict, step: int | None) -> dict:
    """Leave this process's share of the gradient of the rows' loss in the policy; returns the metrics of all rows.

    indices: the rows' numbers in the data set. state: bco_pair's running mean; step: the steps that it is of.
    Under no_grad, for held-out rows, step is None, and neither moves.
    """
    lengths_P2 = pairs.lengths(rows)
    counts = {"pairs": len(rows), "chosen_tokens": lengths_P2[:, 0].sum().item()}
    names = ("loss_type", "loss_weights", "beta", "label_smoothing", "discopop_tau")
    options = {name: getattr(config, name) for name in names} | {"delta": state["delta"]}

    def loss_of(logprobs_P2: Tensor, members=slice(None)) -> Tensor:
        given = [x[members].to(logprobs_P2.device).unbind(1) for x in (reference_P2, lengths_P2)]
        return losses.dpo_loss(*logprobs_P2.unbind(1), *given[0], *given[1], **counts, **options)

    whole = any(kind in losses.WHOLE_STEP for kind in config.loss_type) and step is not None
    if whole:
        known_P2 = score(policy, rows, config, world)
        mean = config.beta * (known_P2 - reference_P2).mean().item()
        options["delta"] += (mean - options["delta"]) / (step + 1)
        [pull_P2] = torch.autograd.grad(loss_of(known_P2.requires_grad_()), known_P2)
    logprobs_P2, entropy = torch.zeros(len(rows), 2, device=world.device), torch.zeros(1, device=world.device)
    offending = []
    for members, pack in pairs.batches(rows, config, world):
        logprobs, entropies = answer_logprobs(policy, pack)
        if step is not None:
            share = (logprobs * pull_P2[members].to(logprobs.device)).sum() if whole else loss_of(logprobs, members)
            share.backward()
        logprobs_P2[members] = logprobs.detach().float()
        entropy += entropies.float()
        offending += [p for p, sound in zip(members, logprobs.isfinite().all(1).tolist()) if not sound]
    distributed.sum_([logprobs_P2, entropy], world.data)
    logprobs_P2 = logprobs_P2.cpu()
    rewards_P2 = config.beta * (logprobs_P2 - reference_P2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    return {
        "loss": loss_of(logprobs_P2).item(),
        "rewards/chosen": rewards_P2[:, 0].mean().item(),
        "rewards/rejected": rewards_P2[:, 1].mean().item(),
        "rewards/accuracies": (margins_P > 0).double().mean().item(),
        "rewards/margins": margins_P.mean().item(),
        "logps/chosen": logprobs_P2[:, 0].mean().item(),
        "logps/rejected": logprobs_P2[:, 1].mean().item(),
        "entropy": entropy.item() / lengths_P2.sum().item(),
        "tokens": pairs.tokens(rows),
        "offending": [indices[p] for p in offending] if indices else [],
        "state": {"delta": options["delta"]},
    }


if __name__ == "__main__":
    runs.command(main)
