"""PPO: proximal policy optimisation (arXiv 1707.06347, 1909.08593) with a value model, from prompts to a better policy.

    1  take the next `prompts_per_step` prompts, sample completions, reward them                        ahead.generate
    2  log-probs of their tokens under the policy and under the policy at the start of training, which is the reference,
       and before each token a value: the value model's guess of the reward that is still to come              judge
    3  a token's reward = -kl_coef times its share of KL(policy || reference); at the last token, + the completion's
    4  advantages and returns by GAE, the advantages whitened over all tokens                  losses.gae, losses.whiten
    5  divide the completions into `num_mini_batches`, and each of these into micro-batches of so many tokens
    6  loss = mean over the minibatch's tokens of the clipped policy loss + vf_coef times the clipped value loss
    7  sum the gradients over micro-batches and ranks, clip, take an AdamW step: 5 to 7 for each minibatch, and all
       minibatches `num_ppo_epochs` times

Policy and value model are two models under one optimizer and one norm of gradients. All is as exact as in grpo.py,
which is read first: statistics and divisions are over the tokens of all ranks. Each optimizer step is a step.
Without --model and --dataset a tiny model learns a tiny task within minutes on a CPU:

    torchrun -m minitrl.ppo
    torchrun --nproc_per_node 8 -m minitrl.ppo --model sft --reward rm/final --value_model rm/final --dataset math.jsonl
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from . import ahead, checkpoint, data, distributed, experience, lora, losses, rollout_client, runs, toy, training
from .config import parse, require
from .experience import RolloutOptions, Rollouts
from .model import with_scalar_head
from .rollout import context_length

# What losses.ppo_loss says of each minibatch, in TRL 0.16.0's names where it has it.
MEANS = (
    "loss loss/policy_avg loss/value_avg policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg val/clipfrac_avg "
    "val/ratio val/ratio_squared"
).split()


@dataclass
class Config(RolloutOptions):
    """Train a language model with PPO. Names and defaults are TRL 0.16.0's, and of what PPO shares with GRPO 1.16's."""

    num_generations: int = 1  # completions of each prompt
    value_model: str | None = None  # folder to start the value model from, say the reward model's; none: the policy's
    num_ppo_epochs: int = 4  # passes over each generation
    num_mini_batches: int = 1  # optimizer steps in each pass
    kl_coef: float = 0.05  # weight of the KL penalty in the rewards; 0: no reference policy is held
    kl_estimator: Literal["k1", "k3"] = "k1"  # formulas: losses.kl_estimate
    missing_eos_penalty: float | None = None  # taken off the reward of what ran into max_completion_length
    whiten_rewards: bool = False  # scale the tokens' rewards to deviation 1
    gamma: float = 1.0  # discount from a token to the one before
    lam: float = 0.95  # GAE's lambda: 0 trusts the values, 1 the rewards
    cliprange: float = 0.2  # the ratio is clipped to 1 - cliprange .. 1 + cliprange
    cliprange_value: float = 0.2  # the value is clipped to as much around what it was when sampled
    vf_coef: float = 0.1  # weight of the value loss
    lora_dropout: float = 0.0  # share of the adapters' inputs set to 0: ratios would not begin at 1 (TRL: no dropout)

    def __post_init__(self):
        super().__post_init__()
        check(self)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 130 / 143 where SIGINT / SIGTERM ended the run, after a checkpoint."""
    config = parse(Config, argv, preset=lambda given: {} if "model" in given or "dataset" in given else toy.PPO_PRESET)
    world = distributed.start(config.device, config.timeout, config.mesh)
    run = runs.Run(config, world)
    policy, tokenizer, rows, functions, eval_rows, eval_functions = experience.load(config, run)
    value_model = load_value_model(policy, tokenizer, config, world)
    reference = experience.reference_of(policy, config, world) if config.kl_coef else None
    policy.gradient_checkpointing = value_model.gradient_checkpointing = config.gradient_checkpointing
    optimizer = training.optimizer_of(nn.ModuleDict({"policy": policy, "value": value_model}), config, world)
    engine = rollout_client.engine_of(config, policy, tokenizer, world)
    each = config.num_ppo_epochs * config.num_mini_batches  # steps on each generation
    total = training.total_steps(config, len(rows), config.prompts_per_step, each)
    given = experience.inputs(config, policy, rows, eval_rows, world)
    if config.value_model is not None:
        given["--value_model"] = training.fingerprint(value_model, config, world)
    step, cursor, rollouts, known = experience.resume(run, total, given, [policy, value_model], optimizer)

    def checkpoint_now() -> None:
        experience.save(run, step, cursor, rollouts if step % each else None, known, optimizer)

    with runs.Interrupt() as interrupt, run.rescued(lambda: step if optimizer.whole else None, checkpoint_now):
        if step == 0 and eval_rows:
            run.log_step(0, experience.evaluate(engine, eval_rows, eval_functions, config, world, 0))
        while step < total and not distributed.any_true(interrupt.wanted, world):
            if fresh := step % each == 0:  # rollouts from the policy as it is now
                with run.timed("rollout"):
                    rollouts = ahead.generate(engine, rows, cursor, functions, config, run, step)
                    experience.warn([rollouts], config, run, step)
                with run.timed("judge"):
                    rollouts, known = judge(policy, reference, value_model, rollouts, config, world)
            with run.timed("train"):
                plan = minibatch(rollouts, step, config, world)
                metrics = backward(policy, value_model, rollouts, known, plan, config, run, step)
                metrics |= training.update(optimizer, run, step, lambda: rollouts.ids(plan[world.data.rank]))
            step, cursor = step + 1, cursor + fresh * config.prompts_per_step
            metrics |= experience.rollout_metrics(rollouts, functions) | objective(rollouts, known, config)
            metrics["episode"] = cursor * config.num_generations
            new_rows = experience.completion_rows(rollouts, tokenizer, functions) if fresh else []
            try:
                if step == total or (config.eval_steps and step % config.eval_steps == 0):
                    with run.timed("evaluation"):
                        metrics |= experience.evaluate(engine, eval_rows, eval_functions, config, world, step)
            finally:  # an evaluation that fails costs no step: its row is written, and rescued() saves it
                run.log_step(step, metrics, new_rows, rollouts.num_tokens)
            if step % config.save_steps == 0:
                checkpoint_now()
        checkpoint_now()
    trained = {"final": policy, "value_model": value_model}
    return interrupt.exit_code if step < total else training.finish(run, trained, tokenizer)


def load_value_model(policy, tokenizer, config: Config, world):
    """The value model: that of --value_model, or the policy's layers and a fresh head, which guesses near 0."""
    checkpoint.refuse_strangers(f"{config.output_dir}/value_model")  # what would fail at the very end
    if config.value_model is None and world.divides and config.model is not None:
        return training.load_model(config, world, scalar_head=True)[0]  # what is divided cannot be copied
    if config.value_model is None:
        whole = toy.build(config.seed, world.device, log=str)[0] if world.divides else copy.deepcopy(policy)
        value_model = with_scalar_head(whole, config.seed)
        return checkpoint.divided(value_model, torch.float32, world, config.cpu_offload)
    value_model, its = training.load_model(config, world, config.value_model, scalar_head=True)
    same = its.backend.get_vocab() == tokenizer.backend.get_vocab()  # it reads the ids that the policy writes
    require(same, "value_model", config.value_model, "a model with --model's tokenizer")
    lora.adapt(value_model, replace(config, adapter=None, model=config.value_model), world)
    longest = config.max_prompt_length + config.max_completion_length
    room = context_length(value_model.config)
    require(longest <= room, "value_model", config.value_model, f"a model with {longest} positions; it has {room}")
    return value_model


def judge(policy, reference, value_model, rollouts: Rollouts, config: Config, world) -> tuple[Rollouts, dict]:
    """What stays as it is while the rollouts are trained on, the same on every rank: (rollouts, {name: (R,) float32}).

    old, kl: each token's log-prob under the policy that sampled it, and the KL estimate where there is a reference.
    values, advantages, returns: before each token; the rollouts get each completion's mean advantage, for the record.
    A completion to which no reward applies is left out of all, and not trained on.
    """
    scored_PG = ~rollouts.rewards_PG.isnan()
    plan = rollouts.plan(scored_PG, config.tokens_per_microbatch, world)
    old_R, _ = experience.score(policy, rollouts, plan, config, world)
    values_of = lambda pack, _: [values_before(value_model, pack)]
    [values_R] = experience.measure(value_model, values_of, 1, rollouts, plan, world)
    known, rewards_R = {"old": old_R, "values": values_R}, torch.zeros(len(old_R), dtype=torch.float64)
    if reference:
        with lora.as_reference(reference):
            reference_R, _ = experience.score(reference, rollouts, plan, config, world)
        known["kl"] = losses.kl_estimate(old_R, reference_R, config.kl_estimator)
        rewards_R -= config.kl_coef * known["kl"]
    lengths_N = rollouts.lengths_PG.flatten()
    assert lengths_N.min() > 0, "a completion has at least the token that ends it"
    last_N = lengths_N.cumsum(0) - 1  # the token at which a completion ends: its end token, or where it was cut
    rewards_R[last_N] += scores(rollouts, config).flatten().nan_to_num(nan=0.0)
    kept_R = rollouts.per_token(scored_PG)
    if config.whiten_rewards:
        rewards_R[kept_R] = losses.whiten(rewards_R[kept_R], shift_mean=False)
    advantages_R, returns_R = losses.gae(rewards_R, values_R, lengths_N.tolist(), config.gamma, config.lam)
    advantages_R[kept_R] = losses.whiten(advantages_R[kept_R])
    known |= {"advantages": advantages_R.to(old_R), "returns": returns_R.to(old_R)}
    sums_N = torch.zeros(len(lengths_N), dtype=torch.float64)
    sums_N.index_add_(0, torch.arange(len(lengths_N)).repeat_interleave(lengths_N), advantages_R)
    mean_PG = (sums_N / lengths_N).float().view_as(scored_PG)
    return replace(rollouts, advantages_PG=torch.where(scored_PG, mean_PG, 0.0)), known


def scores(rollouts: Rollouts, config: Config) -> Tensor:
    """(P, G) float64 rewards, less what an end token that did not come costs; NaN where no reward applies."""
    return rollouts.rewards_PG.double() - (config.missing_eos_penalty or 0.0) * rollouts.truncated_PG


def values_before(value_model, pack) -> Tensor:
    """(T,) float32 at each completion token the value of what stands before it; 0 elsewhere."""
    values_T = value_model.values(pack)
    return torch.where(pack.completion_T, values_T[pack.predictors_T.clamp(min=0)], 0.0)


def minibatch(rollouts: Rollouts, step: int, config: Config, world) -> list[list]:
    """Per rank of world.data the micro-batches of this step: its part of a permutation of all completions, a new one
    each epoch."""
    scored_PG = ~rollouts.rewards_PG.isnan()
    N, M = scored_PG.numel(), config.num_mini_batches
    epoch, part = divmod(step, M)
    order = data.order(N, epoch * N, N, config.seed)
    chosen_N = torch.zeros(N, dtype=torch.bool)
    chosen_N[order[N * part // M : N * (part + 1) // M]] = True
    return rollouts.plan(scored_PG & chosen_N.view_as(scored_PG), config.tokens_per_microbatch, world)


def backward(policy, value_model, rollouts: Rollouts, known: dict, plan, config: Config, run, step: int) -> dict:
    """Leave this rank's share of the gradient of the minibatch's loss in both models; the whole minibatch's metrics."""
    world, offending = run.world, []
    tokens = sum(int(rollouts.lengths_PG[p, members].sum()) for rank in plan for batch in rank for p, members in batch)
    sums = dict.fromkeys(MEANS, 0.0)
    for batch in plan[world.data.rank]:
        pack, index_C = rollouts.pack(batch, world.device)
        mask_T = pack.completion_T
        logprobs_T, entropy_T = policy.logprobs(pack, mask_T, config.temperature)
        given_T = experience.spread(known, index_C, mask_T, like_T=logprobs_T)
        loss, shares = losses.ppo_loss(
            logprobs_T,
            given_T["old"],
            given_T["advantages"],
            values_before(value_model, pack),
            given_T["values"],
            given_T["returns"],
            mask_T,
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            tokens=tokens,
        )
        if not loss.isfinite():
            offending.append(batch)
        loss.backward()
        shares |= {"loss": loss.detach(), "policy/entropy_avg": entropy_T.detach().sum() / tokens}
        for name in MEANS:
            sums[name] += shares[name].item()
    metrics = training.total(sums, world.data)
    if not math.isfinite(metrics["loss"]):  # a sum over all ranks: all stop
        training.stop_before_update(run, step, f"the loss is {metrics['loss']}", rollouts.ids(offending))
    metrics["val/ratio_var"] = max(0.0, metrics.pop("val/ratio_squared") - metrics["val/ratio"] ** 2)
    return {"trained_tokens": tokens} | metrics


def objective(rollouts: Rollouts, known: dict, config: Config) -> dict[str, float]:
    """What the rollouts were worth: means over completions, of sums over their tokens (TRL 0.16.0's names)."""
    scored_PG = ~rollouts.rewards_PG.isnan()
    metrics = {"val/num_eos_tokens": int((~rollouts.truncated_PG).sum())}
    if scored_PG.any():
        count = int(scored_PG.sum())
        mean = scores(rollouts, config)[scored_PG].mean().item()
        kl = known["kl"].sum(dtype=torch.float64).item() / count if "kl" in known else 0.0
        metrics |= {"objective/kl": kl} if "kl" in known else {}
        metrics |= {
            "objective/entropy": -known["old"].sum(dtype=torch.float64).item() / count,
            "objective/non_score_reward": -config.kl_coef * kl,
            "objective/scores": mean,
            "objective/rlhf_reward": mean - config.kl_coef * kl,
        }
    return metrics


def check(config: Config) -> None:
    """ValueError for a value, or a combination of values, that can't be run."""
    for name in "num_generations num_ppo_epochs num_mini_batches".split():
        config.must(getattr(config, name) >= 1, name, "at least 1")
    rule = "0: PPO has no correction for samples of older weights, GRPO has"
    config.must(config.max_staleness == 0, "max_staleness", rule)
    completions = config.prompts_per_step * config.num_generations
    enough = config.num_mini_batches <= completions
    config.must(enough, "num_mini_batches", f"at most {completions}, the completions of a generation")
    for name in "kl_coef vf_coef".split():
        config.must(getattr(config, name) >= 0, name, "at least 0")
    for name in "gamma lam".split():
        config.must(0 <= getattr(config, name) <= 1, name, "from 0 to 1")
    config.must(0 < config.cliprange < 1, "cliprange", "above 0 and below 1")
    config.must(config.cliprange_value > 0, "cliprange_value", "above 0")
    config.must((config.missing_eos_penalty or 0) >= 0, "missing_eos_penalty", "at least 0: it is taken off")
    with_model = config.model is not None or config.value_model is None
    config.must(with_model, "value_model", "left out without --model: the embedded default has its own")


if __name__ == "__main__":
    runs.command(main)
