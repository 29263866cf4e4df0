"""GRPO: group relative policy optimisation (arXiv 2402.03300), from prompts to a better policy in one file.

    1  take the next `prompts_per_step` prompts
    2  sample G completions of each from the policy                                        experience.generate_and_score
    3  reward every completion
    4  advantage = (reward - its group's mean) / its group's standard deviation            experience.advantages
    5  divide the groups into micro-batches of so many tokens, each prompt standing once      packing.plan_micro_batches
    6  loss = -sum over tokens of min(r A, clip(r) A) / tokens, r = policy / policy that sampled   losses.grpo_loss
    7  sum the gradients over micro-batches and ranks, clip, take an AdamW step; 5 to 7 are done `num_iterations` times

The loss and its gradient are those of the whole step exactly, however it is divided: sums out, one division by counts
over the whole step.
Without --model and --dataset a tiny model learns a tiny task within minutes on a CPU:

    torchrun -m minitrl.grpo
    torchrun --nproc_per_node 8 -m minitrl.grpo --model Qwen/Qwen3-0.6B --dataset math.jsonl --reward rewards.py:correct
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import ahead, distributed, experience, lora, losses, parallel, rollout_client, runs, toy, training
from .config import parse
from .experience import PATIENCE, RolloutOptions, Rollouts

# Options of the loss that go to losses.grpo_loss as they are.
LOSS_OPTIONS = (
    "loss_type importance_sampling_level epsilon epsilon_high delta beta use_bias_correction_kl entropy_coef "
    "max_completion_length"
).split()

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass
class Config(RolloutOptions):
    """Train a language model with GRPO. Names and defaults are those of TRL 1.16 where it has the option."""

    lora_dropout: float = 0.0  # share of the adapters' inputs set to 0: the trainer is then not the sampler (TRL: 0.05)
    num_iterations: int = 1  # optimizer steps on each generation (mu)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"  # formulas: kernels/grpo_loss.py
    importance_sampling_level: Literal["token", "sequence"] = "token"  # GSPO: sequence, --loss_type grpo
    vllm_importance_sampling_correction: bool = True  # weigh tokens by how much likelier they are to the trainer
    vllm_importance_sampling_mode: Mode = "sequence_mask"  # whose weight; beyond the bounds it is cut to them, or 0
    vllm_importance_sampling_clip_max: float | None = 3.0  # upper bound of the weight; none: unbounded
    vllm_importance_sampling_clip_min: float | None = None  # lower bound of the weight; none: unbounded
    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: float | None = None  # and above 1 + epsilon_high; none: epsilon (cispo: above epsilon_high)
    delta: float | None = None  # bound above the ratio where the advantage is negative; none: unbounded
    beta: float = 0.0  # weight of the KL penalty; 0: no reference policy is held
    use_bias_correction_kl: bool = True  # multiply the penalty by the importance ratio
    entropy_coef: float = 0.0  # weight of the entropy bonus
    top_entropy_quantile: float = 1.0  # share of the step's tokens to train on, those of the highest entropy
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = "grpo"  # experience.advantages has formulas
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose standard deviation divides grpo's advantages
    mask_truncated_completions: bool = False  # leave out of the loss what ran into max_completion_length
    dynamic_sampling: int = 0  # generations that may follow in a step to replace groups without signal (DAPO)
    sync_ref_model: bool = False  # move the reference policy towards the policy now and then
    ref_model_mixup_alpha: float = 0.6  # reference = alpha * policy + (1 - alpha) * reference
    ref_model_sync_steps: int = 512  # optimizer steps between two such moves

    def __post_init__(self):
        super().__post_init__()
        check(self)


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 130 / 143 where SIGINT / SIGTERM ended the run, after a checkpoint."""
    config = parse(Config, argv, preset=lambda given: {} if "model" in given or "dataset" in given else toy.PRESET)
    world = distributed.start(config.device, config.timeout, config.mesh)
    run = runs.Run(config, world)
    policy, tokenizer, rows, functions, eval_rows, eval_functions = experience.load(config, run)
    reference = experience.reference_of(policy, config, world) if config.beta else None
    moving = parallel.own_parameters(reference) if config.sync_ref_model else {}
    mixture = {name: p.float() for name, p in moving.items()}
    policy.gradient_checkpointing = config.gradient_checkpointing
    optimizer = training.optimizer_of(policy, config, world)
    engine = rollout_client.engine_of(config, policy, tokenizer, world)
    samples = ahead.Ahead(engine, rows, config, run)
    total = training.total_steps(config, len(rows), config.prompts_per_step, config.num_iterations)
    given = experience.inputs(config, policy, rows, eval_rows, world)
    step, cursor, rollouts, known = experience.resume(run, total, given, [policy], optimizer, reference=mixture)
    for name, parameter in moving.items():
        parameter.copy_(mixture[name])

    def checkpoint_now() -> None:
        unused = rollouts if step % config.num_iterations else None
        experience.save(run, step, cursor, unused, known, optimizer, reference=mixture)

    whole = lambda: step if optimizer.whole else None
    with runs.Interrupt() as interrupt, run.rescued(whole, checkpoint_now), samples:
        if step == 0 and eval_rows:
            run.log_step(0, experience.evaluate(engine, eval_rows, eval_functions, config, world, 0))
        while step < total and not distributed.any_true(interrupt.wanted, world):
            if fresh := step % config.num_iterations == 0:  # rollouts from the policy as it is now, or was lately
                with run.timed("rollout"):
                    given = engine, rows, cursor, functions, config, run, step
                    rollouts, drawn = generate(*given, left_out := [], samples)
                known = {}
            with run.timed("train"):
                plan = micro_batches(rollouts, config, world)
                if fresh and reference:
                    with samples.still(), lora.as_reference(reference):
                        known["reference"] = experience.score(reference, rollouts, plan, config, world)[0]
                metrics = backward(policy, rollouts, known, plan, config, run, step)
                with samples.updating(step + 1):
                    metrics |= training.update(optimizer, run, step, lambda: rollouts.ids(plan[world.data.rank]))
            step, cursor = step + 1, drawn if fresh else cursor
            samples.ask(cursor, step)
            if config.sync_ref_model and step % config.ref_model_sync_steps == 0:
                mix(reference, mixture, policy, config.ref_model_mixup_alpha)
            metrics |= experience.rollout_metrics(rollouts, functions)
            metrics |= samples.metrics(rollouts, step - 1) if fresh else {}
            sampled = [rollouts, *left_out] if fresh else []  # in this step
            new_rows = [r for x in sampled for r in experience.completion_rows(x, tokenizer, functions, x is rollouts)]
            if fresh and config.dynamic_sampling:
                discarded = sum(len(part.lengths_PG) for part in left_out)
                metrics |= {"sampling/generations": len(left_out), "sampling/groups_discarded": discarded}
            try:
                if step == total or (config.eval_steps and step % config.eval_steps == 0):
                    with run.timed("evaluation"):
                        metrics |= experience.evaluate(engine, eval_rows, eval_functions, config, world, step)
            finally:  # an evaluation that fails costs no step: its row is written, and rescued() saves it
                run.log_step(step, metrics, new_rows, sum(part.num_tokens for part in sampled or [rollouts]))
            if step % config.save_steps == 0:
                checkpoint_now()
        checkpoint_now()
    return interrupt.exit_code if step < total else training.finish(run, {"final": policy}, tokenizer)


def generate(
    engine, rows, cursor: int, functions, config: Config, run, step: int, left_out: list | None = None, samples=None
) -> tuple[Rollouts, int]:
    """Rollouts of the next prompts, with rewards and advantages, and the new cursor: prompts drawn so far.

    `left_out` gets the groups that were sampled and not kept: a Rollouts, perhaps of none, for each generation.
    `samples`: an `ahead.Ahead`, which may have been asked for them.

    With --dynamic_sampling (DAPO, arXiv 2503.14476 section 3.2) groups whose rewards are all equal are replaced by
    those of further prompts, a bounded number of times; what still lacks is filled up with them, so that every step
    has prompts_per_step groups.
    """
    parts, live, flat = [], [], []
    while len(live) < config.prompts_per_step and len(parts) <= config.dynamic_sampling:
        sampled = samples.take(cursor, step) if samples else None
        part = ahead.generate(engine, rows, cursor, functions, config, run, step, len(parts), sampled)
        cursor += config.prompts_per_step
        for p, signal in enumerate(experience.has_signal(part.rewards_PG).tolist()):
            (live if signal else flat).append((len(parts), p))
        parts.append(part)
    none = experience.warn(parts, config, run, step)
    kept, others = sorted((live + flat)[: config.prompts_per_step]), (live + flat)[config.prompts_per_step :]
    chosen = experience.select_groups(parts, kept)
    rollouts = experience.with_advantages(chosen, config.scale_rewards, config.advantage_estimator)
    if run.streak("flat", not rollouts.advantages_PG.any() and not none) == PATIENCE:
        run.warn_once("flat", f"step {step + 1}: all completions of a prompt got equal rewards, of every prompt, "
                      f"{PATIENCE} generations in a row; nothing is learnt from that: look at completions.jsonl, and "
                      "at the reward, the prompts' difficulty, --temperature and --num_generations")
    if left_out is not None:
        left_out += [experience.select_groups([part], [(0, p) for n, p in others if n == number])
                     for number, part in enumerate(parts)]  # fmt: skip
    return rollouts, cursor


def counted(rollouts: Rollouts, config: Config) -> Tensor:
    """(P, G) bool: the completions in the loss and in what it is divided by."""
    return ~rollouts.truncated_PG if config.mask_truncated_completions else torch.ones_like(rollouts.truncated_PG)


def micro_batches(rollouts: Rollouts, config: Config, world) -> list[list]:
    """Per rank of world.data its micro-batches, each [(p, [g, ...]), ...], of the completions that have a gradient.

    Where nothing but the advantage pulls at a completion and that is 0, its gradient is exactly 0: no pass is spent on
    it. (It still counts in the normaliser. bnpo divides by each micro-batch's own tokens and the entropy quantile is
    one over all tokens: they keep everything.)
    """
    trained = counted(rollouts, config)
    if not config.beta and not config.entropy_coef and config.loss_type != "bnpo" and config.top_entropy_quantile == 1:
        trained = trained & (rollouts.advantages_PG != 0)
    return rollouts.plan(trained, config.tokens_per_microbatch, world)


def backward(policy, rollouts: Rollouts, known: dict[str, Tensor], plan, config: Config, run, step: int) -> dict:
    """Leave this rank's share of the gradient of the step's loss in the policy; returns the metrics of the whole step.

    known: log-probs (R,) that outlive an optimizer step: "reference", and where num_iterations > 1 "old", which the
    first iteration puts there: on policy they are those of its own forward pass, and no extra pass is spent on them.

    "old" is the policy as it was when this generation's updates began, never the one that sampled, which with
    --max_staleness is some steps older and may have changed amid a completion. The ratio policy / old bounds what these
    updates do, while the weight old / sampler, truncated, accounts for whose samples they are, token by token as each
    was drawn. Their product is the importance ratio; clipping all of it would hold the policy to stale weights
    (arXiv 2110.00641).
    """
    world, counted_PG = run.world, counted(rollouts, config)
    counts = {
        "tokens": int(rollouts.lengths_PG[counted_PG].sum()),
        "sequences": int(counted_PG.sum()),
        "micro_batches": sum(map(bool, itertools.chain(*plan))),  # the empty ones do not count
    }
    options = {name: getattr(config, name) for name in LOSS_OPTIONS}
    if config.top_entropy_quantile < 1:  # of the whole step: one more pass, before the first backward
        entropy_R = experience.score(policy, rollouts, plan, config, world)[1][rollouts.per_token(counted_PG)]
        if len(entropy_R):
            options["entropy_threshold"] = float(np.quantile(entropy_R.numpy(), 1 - config.top_entropy_quantile))
    on_policy = "old" not in known
    advantages_R = rollouts.per_token(rollouts.advantages_PG)
    per_token_R = {"advantages": advantages_R, "sampler": rollouts.sampler_logprobs_R, **known}
    new_R = torch.zeros(len(rollouts.tokens_R))
    sums, largest, offending = Counter(), torch.zeros(1), []
    for batch in plan[world.data.rank]:
        pack, index_C = rollouts.pack(batch, world.device)  # C: the micro-batch's completion tokens
        mask_T = pack.completion_T
        logprobs_T, entropy_T = policy.logprobs(pack, mask_T, config.temperature)
        given_T = experience.spread(per_token_R, index_C, mask_T, like_T=logprobs_T)
        old_T, advantages_T = logprobs_T.detach() if on_policy else given_T["old"], given_T["advantages"]
        if config.vllm_importance_sampling_correction:  # a weight is not negative: it may go into the advantage
            bounds = config.vllm_importance_sampling_clip_max, config.vllm_importance_sampling_clip_min
            given = old_T, given_T["sampler"], mask_T, pack.segments_T, config.vllm_importance_sampling_mode
            weights_T = losses.sampling_weights(*given, *bounds)
            advantages_T = advantages_T * weights_T
            sums["sampling/importance_sampling_ratio/mean"] += weights_T[mask_T].sum().item()
        loss, shares = losses.grpo_loss(
            logprobs_T,
            old_T,
            advantages_T,
            mask_T,
            ref_logprobs_T=given_T.get("reference"),
            entropy_T=entropy_T,
            segments_T=pack.segments_T,
            **counts,
            **options,
        )
        if not loss.isfinite():
            offending.append(batch)
        loss.backward()
        new_R[index_C] = logprobs_T.detach()[mask_T].float().cpu()
        if on_policy:
            difference_C = new_R[index_C] - rollouts.sampler_logprobs_R[index_C]
            largest = torch.cat([largest, difference_C.abs()]).amax(0, keepdim=True)
            sums["sampling/sampling_logp_difference/mean"] += difference_C.abs().sum().item()
            sums["sampling/kl"] += (difference_C.expm1() - difference_C).sum().item()  # k3 of KL(sampler, trainer)
        sums["entropy"] += entropy_T.detach().sum().item()
        sums["trained_tokens"] += len(index_C)
        sums["loss"] += loss.item()
        for name, share in shares.items():
            sums[name] += share.item()
    if on_policy and config.num_iterations > 1:
        distributed.sum_([new_R], world.data)
        known["old"] = new_R
    metrics = step_metrics(sums, largest, on_policy, config, world)
    if not math.isfinite(metrics["loss"]):  # a sum over all ranks: all stop
        training.stop_before_update(run, step, f"the loss is {metrics['loss']}", rollouts.ids(offending))
    return metrics


def step_metrics(sums: Counter, largest: Tensor, on_policy: bool, config: Config, world) -> dict[str, float]:
    """Over all ranks: shares of the loss add up; means are over the tokens trained on, absent where there are none."""
    shares = ["loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    shares += ["kl"] * bool(config.beta)
    means = ["entropy"] + ["sampling/sampling_logp_difference/mean", "sampling/kl"] * on_policy
    means += ["sampling/importance_sampling_ratio/mean"] * config.vllm_importance_sampling_correction
    names = ["trained_tokens", *shares, *means]
    totals = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=world.device)
    distributed.sum_([totals], world.data)
    tokens, *totals = totals.tolist()
    metrics = {"trained_tokens": int(tokens)} | dict(zip(shares, totals))
    if tokens:
        metrics |= {name: total / tokens for name, total in zip(means, totals[len(shares) :])}
        if on_policy:
            largest = torch.cat(distributed.gather_ragged(largest, world)).max()
            metrics["sampling/sampling_logp_difference/max"] = largest.item()
    return metrics


@torch.no_grad()
def mix(reference, mixture: dict[str, Tensor], policy, alpha: float) -> None:
    """reference = alpha * policy + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656; TRL: SyncRefModelCallback).

    The float32 `mixture` adds up what a bfloat16 reference would round away, all of it at a small alpha.
    """
    theirs = parallel.own_parameters(policy)
    for name, ours in parallel.own_parameters(reference).items():
        ours.copy_(mixture[name].lerp_(theirs[name].to(mixture[name].dtype), alpha))


def check(config: Config) -> None:
    """ValueError for a value, or a combination of values, that can't be run."""
    must = config.must
    must(config.num_iterations >= 1, "num_iterations", "at least 1")
    estimator = config.advantage_estimator
    grouped = estimator != "reinforce_plus_plus"  # which compares with all completions of the step
    enough = "at least 2, since completions of a group are compared" if grouped else "at least 1"
    must(config.num_generations >= 1 + grouped, "num_generations", enough)
    left_out = f"left out with --advantage_estimator {estimator}"
    must(estimator == "grpo" or config.scale_rewards == "group", "scale_rewards", f"{left_out}, which has its own")
    must(grouped or not config.dynamic_sampling, "dynamic_sampling", f"{left_out}, which compares no groups")
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    must(high is None or 0 < high, "vllm_importance_sampling_clip_max", "above 0")
    below = low is None or 0 <= low < (math.inf if high is None else high)
    must(below, "vllm_importance_sampling_clip_min", "at least 0 and below --vllm_importance_sampling_clip_max")
    corrects, noisy = config.vllm_importance_sampling_correction, config.use_peft and config.lora_dropout > 0
    rule = "off with --lora_dropout, whose noise it would take for the sampler's"
    must(config.max_staleness >= 0, "max_staleness", "at least 0")
    apart = "0 without --rollout_server: one process samples and trains by turns, there is nothing to overlap"
    must(not config.max_staleness or config.rollout_server, "max_staleness", apart)
    must(corrects or not config.max_staleness, "vllm_importance_sampling_correction",
         "on with --max_staleness: it is what accounts for samples of older weights")
    must(not (corrects and noisy), "vllm_importance_sampling_correction", rule)
    must(0 <= config.epsilon < 1, "epsilon", "at least 0 and below 1")
    must(config.epsilon_high is None or config.epsilon_high >= 0, "epsilon_high", "at least 0")
    must(config.loss_type != "cispo" or config.epsilon_high is not None, "epsilon_high", "given for cispo, say 5.0")
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    above = f"above 1 + epsilon_high = {1 + high}, or it would bound the ratio where the advantage is positive too"
    must(config.delta is None or config.loss_type != "cispo", "delta", "left out with cispo, which has no such bound")
    must(config.delta is None or config.delta > 1 + high, "delta", above)
    must(config.beta >= 0, "beta", "at least 0")
    must(0 < config.top_entropy_quantile <= 1, "top_entropy_quantile", "above 0 and at most 1")
    must(0 <= config.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha", "from 0 to 1")
    must(config.ref_model_sync_steps >= 1, "ref_model_sync_steps", "at least 1")
    must(config.beta > 0 or not config.sync_ref_model, "sync_ref_model", "off at --beta 0, where there is no reference")
    moves = "off with --use_peft, where the reference policy is the frozen model itself"
    must(not (config.use_peft and config.sync_ref_model), "sync_ref_model", moves)
    must(config.dynamic_sampling >= 0, "dynamic_sampling", "at least 0")


if __name__ == "__main__":
    runs.command(main)
