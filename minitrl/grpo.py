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

import copy
import math
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, data, distributed, experience, losses, packing, rewards, runs, toy, training
from .config import CommonOptions, parse, require
from .experience import Rollouts
from .rollout import Engine, Sampling, context_length


# Options of the loss that go to losses.grpo_loss as they are.
LOSS_OPTIONS = (
    "loss_type importance_sampling_level epsilon epsilon_high delta beta use_bias_correction_kl entropy_coef "
    "max_completion_length"
).split()


PATIENCE = 5  # generations in a row without anything to learn from, before that is worth a warning


@dataclass
class Config(CommonOptions):
    """Train a language model with GRPO. Names and defaults are those of TRL 1.16 where it has the option."""

    reward: tuple[str, ...] = ()  # reward functions, built-in names or file.py:function; several are added up
    reward_weights: tuple[float, ...] = ()  # one weight for each reward; none: 1 each
    reward_timeout: float = 60.0  # seconds a reward may take for a step's completions; in a thread: no signal.alarm
    eval_reward: tuple[str, ...] = ()  # rewards of the evaluation; none: those of training
    prompts_per_step: int = 8  # prompts in one generation, over all processes
    num_generations: int = 8  # completions of each prompt: the group whose rewards are compared
    num_iterations: int = 1  # optimizer steps on each generation (mu)
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted
    max_completion_length: int = 512  # tokens
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    top_p: float = 1.0  # sample from the smallest set of tokens that has this probability; 1: off
    top_k: int = 0  # sample from this many of the likeliest tokens; 0: off
    min_p: float = 0.0  # sample from tokens with at least this share of the likeliest one's probability; 0: off
    repetition_penalty: float = 1.0  # divides the logits of tokens that were there already; 1: off
    stop: tuple[str, ...] = ()  # strings that end a completion, beside the checkpoint's end tokens
    rollout_batch_size: int = 64  # sequences that a process decodes at a time
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"  # formulas: kernels/grpo_loss.py
    importance_sampling_level: Literal["token", "sequence"] = "token"  # GSPO: sequence, --loss_type grpo
    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: float | None = None  # and above 1 + epsilon_high; none: epsilon (cispo: above epsilon_high)
    delta: float | None = None  # bound above the ratio where the advantage is negative; none: unbounded
    beta: float = 0.0  # weight of the KL penalty; 0: no reference policy is held
    use_bias_correction_kl: bool = True  # multiply the penalty by the importance ratio
    entropy_coef: float = 0.0  # weight of the entropy bonus
    top_entropy_quantile: float = 1.0  # share of the step's tokens to train on, those of the highest entropy
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose standard deviation divides the advantages
    mask_truncated_completions: bool = False  # leave out of the loss what ran into max_completion_length
    overlong_cache: int | None = None  # the reward falls by 1 over so many last tokens of max_completion_length (DAPO)
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
    world = distributed.start(config.device, config.timeout)
    run = runs.Run(config, world)
    functions = rewards.load_rewards(config.reward)
    eval_functions = rewards.load_rewards(config.eval_reward, "--eval_reward") if config.eval_reward else functions
    policy, tokenizer, rows, eval_rows = load(config, functions, eval_functions, run)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta else None
    mixture = {name: p.float() for name, p in reference.named_parameters()} if config.sync_ref_model else {}
    policy.gradient_checkpointing = config.gradient_checkpointing
    optimizer = training.Optimizer(
        policy,
        world,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
    )
    engine = Engine(policy, tokenizer, max_batch=config.rollout_batch_size)
    total = training.total_steps(config, len(rows), config.prompts_per_step, config.num_iterations)
    given = inputs(config, policy, rows, eval_rows)
    step, cursor, rollouts, known = resume(run, total, given, policy, reference, mixture, optimizer)

    def checkpoint_now() -> None:
        save(run, step, cursor, rollouts, known, mixture, optimizer)

    with runs.Interrupt() as interrupt, run.rescued(lambda: step if optimizer.whole else None, checkpoint_now):
        if step == 0 and eval_rows:
            run.log_step(0, evaluate(engine, eval_rows, eval_functions, config, world, 0))
        while step < total and not distributed.any_true(interrupt.wanted, world):
            if fresh := step % config.num_iterations == 0:  # rollouts from the policy as it is now
                with run.timed("rollout"):
                    rollouts, drawn = generate(engine, rows, cursor, functions, config, run, step, left_out := [])
                known = {}
            with run.timed("train"):
                plan = micro_batches(rollouts, config, world)
                if fresh and reference:
                    known["reference"] = score(reference, rollouts, plan, config, world)[0]
                metrics = backward(policy, rollouts, known, plan, config, run, step)
                factor = training.schedule(config.lr_scheduler_type, step, config.warmup_steps, total)
                rate = config.learning_rate * factor
                metrics |= {"grad_norm": update(optimizer, rate, run, step, rollouts, plan), "learning_rate": rate}
            step, cursor = step + 1, drawn if fresh else cursor
            if config.sync_ref_model and step % config.ref_model_sync_steps == 0:
                mix(reference, mixture, policy, config.ref_model_mixup_alpha)
            metrics |= experience.rollout_metrics(rollouts, functions)
            sampled = [rollouts, *left_out] if fresh else []  # in this step
            new_rows = [r for x in sampled for r in experience.completion_rows(x, tokenizer, functions, x is rollouts)]
            if fresh and config.dynamic_sampling:
                discarded = sum(len(part.lengths_PG) for part in left_out)
                metrics |= {"sampling/generations": len(left_out), "sampling/groups_discarded": discarded}
            try:
                if step == total or (config.eval_steps and step % config.eval_steps == 0):
                    with run.timed("evaluation"):
                        metrics |= evaluate(engine, eval_rows, eval_functions, config, world, step)
            finally:  # an evaluation that fails costs no step: its row is written, and rescued() saves it
                run.log_step(step, metrics, new_rows, sum(part.num_tokens for part in sampled or [rollouts]))
            if step % config.save_steps == 0:
                checkpoint_now()
        checkpoint_now()
    if step < total:
        return interrupt.exit_code
    if world.rank == 0:
        checkpoint.save(policy, tokenizer, f"{config.output_dir}/final")
        if config.plot:
            runs.draw(config.output_dir, config.plot)
        print(f"done: {config.output_dir}/final is a Hugging Face folder", flush=True)
    return 0


def load(config: Config, functions, eval_functions, run):
    """(policy, tokenizer, rows to train on, rows to evaluate on): of --model and --dataset, or the embedded default."""
    world = run.world
    if config.model is None:
        policy, tokenizer = toy.build(config.seed, world.device, log=lambda text: distributed.print0(world, text))
        rows, eval_rows = toy.datasets(config.seed)
    else:
        policy, tokenizer = checkpoint.load(config.model, getattr(torch, config.dtype), world.device)
        tokenizer.now = run.began
        rows, eval_rows = [], []
        for path, into in ((config.dataset, rows), (config.eval_dataset, eval_rows)):
            if path:
                loaded, dropped = data.load_prompts(path, tokenizer, config.max_prompt_length)
                into += loaded
                if dropped:
                    limit = f"--max_prompt_length {config.max_prompt_length}"
                    distributed.print0(world, f"{path}: {dropped} prompts are above {limit} and left out")
    longest = max(len(row["prompt_ids"]) for row in rows + eval_rows)
    room = context_length(policy.config) - longest
    require(config.max_completion_length <= room, "max_completion_length", config.max_completion_length,
            f"at most {room}: the longest prompt has {longest} tokens, the model positions for {longest + room}")
    rewards.open_models(functions + eval_functions, tokenizer, world.device, partial(distributed.print0, world))
    rewards.check_columns(functions, rows[0]["columns"])
    if eval_rows:
        rewards.check_columns(eval_functions, eval_rows[0]["columns"])
    if config.top_p < 1 or config.top_k > 0 or config.min_p > 0 or config.repetition_penalty != 1:
        distributed.print0(
            world,
            "warning: --top_p, --top_k, --min_p and --repetition_penalty change what is sampled; the policy is trained "
            "on its log-probs without them (temperature alone), and sampling/sampling_logp_difference shows the change",
        )
    return policy, tokenizer, rows, eval_rows


def inputs(config: Config, policy, rows, eval_rows) -> dict[str, str]:
    """Digests of all that the options only point to: on every rank, and after a resume, it has to be the same."""
    found = {"--dataset": data.fingerprint(rows), "--eval_dataset": data.fingerprint(eval_rows)}
    if config.model is not None:  # the embedded model is made anew each time, on another machine to the last bit or so
        found["--model"] = checkpoint.fingerprint(policy)
    return found | rewards.fingerprints(config.reward + config.eval_reward)


def generate(
    engine, rows, cursor: int, functions, config: Config, run, step: int, left_out: list | None = None
) -> tuple[Rollouts, int]:
    """Rollouts of the next prompts, with rewards and advantages, and the new cursor: prompts drawn so far.

    `left_out` gets the groups that were sampled and not kept: a Rollouts, perhaps of none, for each generation.

    With --dynamic_sampling (DAPO, arXiv 2503.14476 section 3.2) groups whose rewards are all equal are replaced by
    those of further prompts, a bounded number of times; what still lacks is filled up with them, so that every step
    has prompts_per_step groups.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
    sampling = {name: getattr(config, name) for name in names} | {"max_tokens": config.max_completion_length}
    weights = torch.tensor(config.reward_weights or (1.0,) * len(functions))
    parts, live, flat = [], [], []
    while len(live) < config.prompts_per_step and len(parts) <= config.dynamic_sampling:
        places = range(cursor, cursor + config.prompts_per_step)
        cursor = places.stop
        chosen = data.order(len(rows), places.start, len(places), config.seed)
        part = experience.generate_and_score(
            engine,
            [rows[i] for i in chosen],
            [data.seed_of(config.seed, place) for place in places],
            functions,
            weights,
            run.world,
            num_generations=config.num_generations,
            step=step,
            timeout_s=config.reward_timeout,
            sampling=sampling,
            overlong=config.overlong_cache and (config.max_completion_length, config.overlong_cache),
            first_index=len(parts) * config.prompts_per_step * config.num_generations,
        )
        for p, signal in enumerate(experience.has_signal(part.rewards_PG).tolist()):
            (live if signal else flat).append((len(parts), p))
        parts.append(part)
    truncated = torch.cat([part.truncated_PG for part in parts]).double().mean().item()
    if truncated > 0.5:
        limit = f"--max_completion_length {config.max_completion_length}"
        run.warn_once("truncated", f"step {step + 1}: {truncated:.0%} of the completions ran into {limit}; raise it")
    none = all(part.rewards_PG.isnan().all() for part in parts)
    if run.streak("none", none) == PATIENCE:
        run.warn_once("none", f"step {step + 1}: no reward applied to any completion, {PATIENCE} generations in a row; "
                      "look at the reward functions and the columns that they read")
    if run.streak("flat", not live and not none) == PATIENCE:
        run.warn_once("flat", f"step {step + 1}: all completions of a prompt got equal rewards, of every prompt, "
                      f"{PATIENCE} generations in a row; nothing is learnt from that: look at completions.jsonl, and "
                      "at the reward, the prompts' difficulty, --temperature and --num_generations")
    kept, others = sorted((live + flat)[: config.prompts_per_step]), (live + flat)[config.prompts_per_step :]
    if left_out is not None:
        left_out += [experience.select_groups([part], [(0, p) for n, p in others if n == number])
                     for number, part in enumerate(parts)]  # fmt: skip
    return experience.with_advantages(experience.select_groups(parts, kept), config.scale_rewards), cursor


def counted(rollouts: Rollouts, config: Config) -> Tensor:
    """(P, G) bool: the completions in the loss and in what it is divided by."""
    return ~rollouts.truncated_PG if config.mask_truncated_completions else torch.ones_like(rollouts.truncated_PG)


def micro_batches(rollouts: Rollouts, config: Config, world) -> list[list]:
    """Per rank its micro-batches, each [(p, [g, ...]), ...], of the completions that have a gradient.

    Where nothing but the advantage pulls at a completion and that is 0, its gradient is exactly 0: no pass is spent on
    it. (It still counts in the normaliser. bnpo divides by each micro-batch's own tokens and the entropy quantile is
    one over all tokens: they keep everything.)
    """
    trained = counted(rollouts, config)
    if not config.beta and not config.entropy_coef and config.loss_type != "bnpo" and config.top_entropy_quantile == 1:
        trained = trained & (rollouts.advantages_PG != 0)
    members = [row.nonzero()[:, 0].tolist() for row in trained]
    lengths = [rollouts.lengths_PG[p, chosen].tolist() for p, chosen in enumerate(members)]
    prompt_lengths = rollouts.prompt_lengths_P.tolist()
    plan = packing.plan_micro_batches(prompt_lengths, lengths, config.tokens_per_microbatch, world.size)
    return [[[(p, [members[p][i] for i in chosen]) for p, chosen in batch] for batch in rank] for rank in plan]


@torch.no_grad()
def score(model, rollouts: Rollouts, plan, config: Config, world) -> tuple[Tensor, Tensor]:
    """(logprobs_R, entropy_R) of the planned completions under `model`, the same on every rank; 0 for the others."""
    logprobs_R, entropy_R = torch.zeros(len(rollouts.tokens_R)), torch.zeros(len(rollouts.tokens_R))
    for batch in plan[world.rank]:
        pack, index_C = rollouts.pack(batch, world.device)
        scores = model.logprobs(pack, pack.completion_T, config.temperature)
        logprobs_R[index_C], entropy_R[index_C] = (score_T[pack.completion_T].float().cpu() for score_T in scores)
    distributed.sum_([logprobs_R, entropy_R], world)
    return logprobs_R, entropy_R


def backward(policy, rollouts: Rollouts, known: dict[str, Tensor], plan, config: Config, run, step: int) -> dict:
    """Leave this rank's share of the gradient of the step's loss in the policy; returns the metrics of the whole step.

    known: log-probs (R,) that outlive an optimizer step: "reference", and where num_iterations > 1 "old", which the
    first iteration puts there: on policy they are those of its own forward pass, and no extra pass is spent on them.
    """
    world, counted_PG = run.world, counted(rollouts, config)
    counts = {
        "tokens": int(rollouts.lengths_PG[counted_PG].sum()),
        "sequences": int(counted_PG.sum()),
        "micro_batches": sum(map(len, plan)),
    }
    options = {name: getattr(config, name) for name in LOSS_OPTIONS}
    if config.top_entropy_quantile < 1:  # of the whole step: one more pass, before the first backward
        entropy_R = score(policy, rollouts, plan, config, world)[1][rollouts.per_token(counted_PG)]
        if len(entropy_R):
            options["entropy_threshold"] = float(np.quantile(entropy_R.numpy(), 1 - config.top_entropy_quantile))
    on_policy = "old" not in known
    per_token_R = {"advantages": rollouts.per_token(rollouts.advantages_PG), **known}
    new_R = torch.zeros(len(rollouts.tokens_R))
    sums, largest, offending = Counter(), torch.zeros(1), []
    for batch in plan[world.rank]:
        pack, index_C = rollouts.pack(batch, world.device)  # C: the micro-batch's completion tokens
        mask_T = pack.completion_T
        zeros_T = torch.zeros(len(mask_T), device=world.device)
        given_T = {
            name: zeros_T.masked_scatter(mask_T, values_R[index_C].to(world.device))
            for name, values_R in per_token_R.items()
        }
        logprobs_T, entropy_T = policy.logprobs(pack, mask_T, config.temperature)
        loss, shares = losses.grpo_loss(
            logprobs_T,
            logprobs_T.detach() if on_policy else given_T["old"],
            given_T["advantages"],
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
            largest = torch.maximum(largest, difference_C.abs().max())
            sums["sampling/sampling_logp_difference/mean"] += difference_C.abs().sum().item()
            sums["sampling/kl"] += (difference_C.expm1() - difference_C).sum().item()  # k3 of KL(sampler, trainer)
        sums["entropy"] += entropy_T.detach().sum().item()
        sums["trained_tokens"] += len(index_C)
        sums["loss"] += loss.item()
        for name, share in shares.items():
            sums[name] += share.item()
    if on_policy and config.num_iterations > 1:
        distributed.sum_([new_R], world)
        known["old"] = new_R
    metrics = step_metrics(sums, largest, on_policy, config, world)
    if not math.isfinite(metrics["loss"]):  # a sum over all ranks: all stop
        stop_before_update(run, step, f"the loss is {metrics['loss']}", rollouts, offending)
    return metrics


def update(optimizer, rate: float, run, step: int, rollouts: Rollouts, plan) -> float:
    """The optimizer's step; returns the gradient's norm before clipping."""
    try:
        return optimizer.step(rate)
    except training.NotFinite as error:
        stop_before_update(run, step, str(error), rollouts, plan[run.world.rank])


def stop_before_update(run, step: int, what: str, rollouts: Rollouts, batches):
    """NaN or infinity: save the ids it came with and stop all ranks; the weights are still those of the step before."""
    groups = [
        {"prompt": rollouts.prompt(p), "completions": [rollouts.completion(p, g) for g in members]}
        for batch in batches
        for p, members in batch
    ]
    name = f"not_finite_step_{step + 1}_rank_"
    if groups:  # other ranks may have them
        run.dump(f"{name}{run.world.rank}.json", {"step": step + 1, "error": what, "groups": groups})
    files = f"{run.config.output_dir}/{name}*.json"
    remedy = "lower --learning_rate or --max_grad_norm"
    raise training.NotFinite(f"step {step + 1}: {what}; nothing was updated, the token ids are in {files}; {remedy}")


def step_metrics(sums: Counter, largest: Tensor, on_policy: bool, config: Config, world) -> dict[str, float]:
    """Over all ranks: shares of the loss add up; means are over the tokens trained on, absent where there are none."""
    shares = ["loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    shares += ["kl"] * bool(config.beta)
    means = ["entropy"] + ["sampling/sampling_logp_difference/mean", "sampling/kl"] * on_policy
    names = ["trained_tokens", *shares, *means]
    totals = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=world.device)
    distributed.sum_([totals], world)
    tokens, *totals = totals.tolist()
    metrics = {"trained_tokens": int(tokens)} | dict(zip(shares, totals))
    if tokens:
        metrics |= {name: total / tokens for name, total in zip(means, totals[len(shares) :])}
        if on_policy:
            largest = torch.cat(distributed.gather_ragged(largest, world)).max()
            metrics["sampling/sampling_logp_difference/max"] = largest.item()
    return metrics


def evaluate(engine, rows, functions, config: Config, world, step: int) -> dict[str, float]:
    """Greedy completions of held-out prompts. eval/accuracy is the share whose first reward is at least 1."""
    if not rows:
        return {}
    rollouts = experience.generate_and_score(
        engine,
        rows,
        [0] * len(rows),
        functions,
        torch.ones(len(functions)),
        world,
        num_generations=1,
        step=step,
        timeout_s=config.reward_timeout,
        sampling={"temperature": 0.0, "max_tokens": config.max_completion_length, "stop": config.stop},
    )
    names = ["reward", "completions/mean_length", "completions/clipped_ratio"]
    names += [f"rewards/{name}/mean" for name, _ in functions]
    found = experience.rollout_metrics(rollouts, functions)
    metrics = {f"eval/{name}": value for name, value in found.items() if name in names}
    return metrics | {"eval/accuracy": (rollouts.rewards_PGF[:, 0, 0] >= 1).double().mean().item()}


@torch.no_grad()
def mix(reference, mixture: dict[str, Tensor], policy, alpha: float) -> None:
    """reference = alpha * policy + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656; TRL: SyncRefModelCallback).

    The float32 `mixture` adds up what a bfloat16 reference would round away, all of it at a small alpha.
    """
    theirs = dict(policy.named_parameters())
    for name, ours in reference.named_parameters():
        ours.copy_(mixture[name].lerp_(theirs[name].to(mixture[name].dtype), alpha))


def save(run, step: int, cursor: int, rollouts: Rollouts, known: dict[str, Tensor], mixture: dict, optimizer) -> None:
    """A checkpoint from which `resume` goes on to the bit: weights, optimizer, place in the data, unused rollouts."""
    tensors = {"optimizer": optimizer.state_tensors()}
    if step % run.config.num_iterations:
        tensors["rollouts"] = {field.name: getattr(rollouts, field.name) for field in fields(Rollouts)}
        tensors["known"] = known
    if mixture:
        tensors["reference"] = mixture
    run.save(step, tensors, {"cursor": cursor})


@torch.no_grad()
def resume(run, total: int, given: dict, policy, reference, mixture: dict, optimizer):
    """(steps done, cursor, rollouts in use, their known log-probs): of the newest whole checkpoint, or of none."""
    step, tensors, state = run.load(total, given) or (0, {}, {"cursor": 0})
    if step:
        optimizer.load_state_tensors(tensors["optimizer"])
    for name, parameter in (reference.named_parameters() if mixture and step else ()):
        parameter.copy_(mixture[name].copy_(tensors["reference"][name]))
    run.begin(checkpoint.fingerprint(policy))
    rollouts = Rollouts(**tensors["rollouts"]) if "rollouts" in tensors else None
    return step, state["cursor"], rollouts, tensors.get("known", {})


def check(config: Config) -> None:
    """ValueError for a value, or a combination of values, that can't be run."""

    def must(hold: bool, name: str, rule: str) -> None:
        require(hold, name, getattr(config, name), rule)

    for name in "prompts_per_step num_iterations max_prompt_length max_completion_length rollout_batch_size".split():
        must(getattr(config, name) >= 1, name, "at least 1")
    must(config.num_generations >= 2, "num_generations", "at least 2, since completions of a group are compared")
    must(config.temperature > 0, "temperature", "above 0, or the completions of a group are all the same")
    Sampling(config.temperature, config.top_p, config.top_k, config.min_p, config.repetition_penalty)  # checks its own
    must(0 < config.reward_timeout <= 1e6, "reward_timeout", "above 0 and at most 1e6 seconds")
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
    must(config.dynamic_sampling >= 0, "dynamic_sampling", "at least 0")
    cache = config.max_completion_length if config.overlong_cache is None else config.overlong_cache
    must(0 < cache <= config.max_completion_length, "overlong_cache", "from 1 to --max_completion_length")
    longest = config.max_prompt_length + config.max_completion_length
    fits = config.tokens_per_microbatch >= longest
    must(fits, "tokens_per_microbatch", f"at least --max_prompt_length + --max_completion_length, {longest} tokens")
    rewards_count = len(config.reward)
    must(rewards_count > 0, "reward", "the name of a built-in reward, or file.py:function")
    numbers = f"{rewards_count} numbers, one for each reward"
    must(len(config.reward_weights) in (0, rewards_count), "reward_weights", numbers)
    for given, other in (("model", "dataset"), ("dataset", "model")):
        both = getattr(config, given) is None or getattr(config, other) is not None
        must(both, given, f"given together with --{other}; without both, the embedded default runs")
    if config.model is None:
        must(config.eval_dataset is None, "eval_dataset", "left out without --model: the embedded default has its own")
        must(config.dtype == "float32", "dtype", "float32 without --model: the embedded default is")
        must(config.max_prompt_length == 512, "max_prompt_length", "left out without --model: its prompts are short")
    evaluates = config.model is None or config.eval_dataset is not None
    must(evaluates or not config.eval_steps, "eval_steps", "given with --eval_dataset")


if __name__ == "__main__":
    runs.command(main)
