"""From prompts to rollouts with advantages: generate, score, compare. What GRPO and PPO share.

Every rank generates and scores its own share of the prompts; then all ranks hold the whole step, so that statistics
over the step and its division into micro-batches are the same computation everywhere, and no result depends on how
many ranks there are.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from . import rewards
from .distributed import World, gather_ragged, together
from .packing import Pack, pack_groups


@dataclass(frozen=True)
class Rollouts:
    """A step's prompts, completions and what is known of them. Completions lie in prompt order; R sums their lengths.

    Tensors only, on the CPU, so that a checkpoint can hold them; `prompt` and `completion` give one out.
    """

    prompt_tokens: Tensor  # int64, prompts end to end
    prompt_lengths_P: Tensor  # int64
    tokens_R: Tensor  # int64, completions end to end: the ids that were sampled, the end token included
    lengths_PG: Tensor  # int64
    sampler_logprobs_R: Tensor  # float32, under the distribution sampled from
    truncated_PG: Tensor  # bool, stopped by max_completion_length
    rewards_PGF: Tensor  # float32, each reward function's; NaN where it does not apply
    rewards_PG: Tensor  # float32, their weighted sum; NaN where none applies
    advantages_PG: Tensor  # float32

    @cached_property
    def _prompt_ends(self) -> list[int]:
        return [0, *self.prompt_lengths_P.cumsum(0).tolist()]

    @cached_property
    def _ends(self) -> list[int]:
        return [0, *self.lengths_PG.flatten().cumsum(0).tolist()]

    def prompt(self, p: int) -> list[int]:
        """The ids of prompt p."""
        return self.prompt_tokens[self._prompt_ends[p] : self._prompt_ends[p + 1]].tolist()

    def span(self, p: int, g: int) -> slice:
        """Where completion g of prompt p stands in the tensors of length R."""
        i = p * self.lengths_PG.shape[1] + g
        return slice(self._ends[i], self._ends[i + 1])

    def completion(self, p: int, g: int) -> list[int]:
        """The ids of completion g of prompt p."""
        return self.tokens_R[self.span(p, g)].tolist()

    @property
    def num_tokens(self) -> int:
        """Prompt tokens, once per group, and completion tokens."""
        return len(self.prompt_tokens) + len(self.tokens_R)

    def pack(self, micro_batch, device="cpu") -> tuple[Pack, Tensor]:
        """A micro-batch [(p, [g, ...]), ...] as a Pack, and where in R its completion tokens stand, in pack order."""
        prompts = [self.prompt(p) for p, _ in micro_batch]
        completions = [[self.completion(p, g) for g in members] for p, members in micro_batch]
        spans = [self.span(p, g) for p, members in micro_batch for g in members]
        indices = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        return pack_groups(prompts, completions, device), indices

    def per_token(self, values_PG: Tensor) -> Tensor:
        """(R,) each completion's value at each of its tokens."""
        return values_PG.flatten().repeat_interleave(self.lengths_PG.flatten())


def weighted_rewards(rewards_NF: Tensor, weights_F: Tensor) -> Tensor:
    """(N,) sum of weight times reward over the functions that apply; NaN where none does.

    TRL 0.16.0 gives such a sample 0, which then pulls its group's mean; here, as in TRL 1.16, it is left out of it.
    """
    total = (rewards_NF * weights_F).nansum(1)
    return torch.where(rewards_NF.isnan().all(1), torch.nan, total)


def advantages(rewards_PG: Tensor, scale_rewards: str = "group") -> Tensor:
    """(P, G) advantages: reward minus its group's mean, over the deviation of the group, of the batch, or over 1.

    TRL: GRPOTrainer._generate_and_score_completions (unbiased deviation, 1e-4 added). Samples without a reward
    (NaN) are left out of mean and deviation and get 0. A group whose rewards are all equal gets exactly 0, where
    rounding would leave 1e-8 / 1e-4.
    """
    rewards = rewards_PG.double()
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(nan=0.0)
    if scale_rewards == "group":
        centred = centred / (deviations(rewards).nan_to_num(nan=0.0)[:, None] + 1e-4)
    elif scale_rewards == "batch":
        centred = centred / (deviations(rewards.reshape(1, -1)).nan_to_num(nan=0.0) + 1e-4)
    return torch.where(has_signal(rewards_PG)[:, None], centred, 0.0).float()


def deviations(rewards_PG: Tensor) -> Tensor:
    """(P,) float64 unbiased deviation of each group's rewards, NaN left out; NaN where fewer than two are there."""
    rewards = rewards_PG.double()
    squares = (rewards - rewards.nanmean(1, keepdim=True)).square()
    return (squares.nansum(1) / ((~rewards.isnan()).sum(1) - 1).clamp(min=0)).sqrt()


def has_signal(rewards_PG: Tensor) -> Tensor:
    """(P,) bool: whether two samples of the group got different rewards. Without that it gives no policy gradient."""
    highest = rewards_PG.nan_to_num(nan=-torch.inf).amax(1)
    lowest = rewards_PG.nan_to_num(nan=torch.inf).amin(1)
    return highest > lowest


def generate_and_score(
    engine, rows, seeds, functions, weights, world: World, *, num_generations, step, timeout_s, sampling, overlong=None,
    first_index=0,
) -> Rollouts:
    """Sample `num_generations` completions of each row's prompt and reward them; the advantages are left at 0.

    An error on one rank, say in a reward, is an error on all.

    rows: P rows of `data.load_prompts`, the same on every rank.
    seeds: P ints; a completion depends on its prompt's seed and its own number.
    functions, weights: the rewards (`rewards.load_rewards`) and their weights.
    sampling: keyword arguments of `Engine.generate`.
    overlong: (max_completion_length, cache) adds `rewards.overlong_penalty` to the rewards.
    first_index: completions that were sampled in this step before these.
    """
    P, G = len(rows), num_generations
    first, last = P * world.rank // world.size, P * (world.rank + 1) // world.size
    mine = rows[first:last]
    prompts = [row["prompt_ids"] for row in mine]
    repeated = [row for row in mine for _ in range(G)]
    names = repeated[0]["columns"] if repeated else {}
    with together("sampling and scoring", world):
        groups = engine.generate(prompts, n=G, seed=seeds[first:last], **sampling) if mine else []
        completions = [completion for group in groups for completion in group]
        rewards_NF = rewards.score(
            functions,
            timeout_s,
            [row["prompt"] for row in repeated],
            [completion.text for completion in completions],
            [completion.ids for completion in completions],
            {name: [row["columns"][name] for row in repeated] for name in names},
            step,
            first_index + first * G,
        ) if repeated else torch.empty(0, len(functions))
    lengths_N = torch.tensor([len(completion.ids) for completion in completions], dtype=torch.int64)
    rewards_N = weighted_rewards(rewards_NF, weights)
    if overlong is not None:
        rewards_N = rewards_N + rewards.overlong_penalty(lengths_N, *overlong)

    def whole(values, dtype) -> Tensor:
        return torch.cat(gather_ragged(torch.as_tensor(values, dtype=dtype), world))

    tokens = [token for completion in completions for token in completion.ids]
    logprobs = [logprob for completion in completions for logprob in completion.logprobs]
    return Rollouts(
        prompt_tokens=torch.tensor([token for row in rows for token in row["prompt_ids"]]),
        prompt_lengths_P=torch.tensor([len(row["prompt_ids"]) for row in rows]),
        tokens_R=whole(tokens, torch.int64),
        lengths_PG=whole(lengths_N, torch.int64).view(P, G),
        sampler_logprobs_R=whole(logprobs, torch.float32),
        truncated_PG=whole([completion.finish_reason == "length" for completion in completions], torch.bool).view(P, G),
        rewards_PGF=whole(rewards_NF, torch.float32).view(P, G, -1),
        rewards_PG=whole(rewards_N, torch.float32).view(P, G),
        advantages_PG=torch.zeros(P, G),
    )


def with_advantages(rollouts: Rollouts, scale_rewards: str) -> Rollouts:
    """The same rollouts with their advantages filled in; "batch" is over all of them."""
    return replace(rollouts, advantages_PG=advantages(rollouts.rewards_PG, scale_rewards))


def select_groups(parts: list[Rollouts], chosen: list[tuple[int, int]]) -> Rollouts:
    """One Rollouts of the groups [(part, p), ...], maybe none: what dynamic sampling keeps of several generations."""
    picked = {field.name: [getattr(parts[0], field.name)[:0]] for field in fields(Rollouts)}
    for part, p in chosen:
        rollouts = parts[part]
        G = rollouts.lengths_PG.shape[1]
        tokens = slice(rollouts.span(p, 0).start, rollouts.span(p, G - 1).stop)
        for name, values in picked.items():
            whole = getattr(rollouts, name)
            if name == "prompt_tokens":
                values.append(torch.tensor(rollouts.prompt(p)))
            else:
                values.append(whole[tokens] if name.endswith("_R") else whole[p : p + 1])
    return Rollouts(**{name: torch.cat(values) for name, values in picked.items()})


def rollout_metrics(rollouts: Rollouts, functions) -> dict[str, float]:
    """What the completions were like, in TRL's names; rewards that apply to no sample are left out."""
    lengths, truncated, rewards_PG = rollouts.lengths_PG.double(), rollouts.truncated_PG, rollouts.rewards_PG.double()
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.double().mean(),
        "frac_reward_zero_std": 1 - has_signal(rollouts.rewards_PG).double().mean(),
        "frac_reward_none": rewards_PG.isnan().double().mean(),
    }
    if not truncated.all():
        metrics["completions/mean_terminated_length"] = lengths[~truncated].mean()
    if not rewards_PG.isnan().all():
        metrics["reward"] = rewards_PG.nanmean()
        metrics["reward_std"] = deviations(rewards_PG).nanmean()
    for f, (name, _) in enumerate(functions):
        values = rollouts.rewards_PGF[..., f].double()
        values = values[~values.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=min(1, len(values) - 1))
    return {name: float(value) for name, value in metrics.items()}


def completion_rows(rollouts: Rollouts, tokenizer, functions, used: bool = True) -> list[dict]:
    """What completions.jsonl says of each completion. used: whether the step trains on them."""
    rows = []
    for p in range(rollouts.lengths_PG.shape[0]):
        for g in range(rollouts.lengths_PG.shape[1]):
            scores = [None if value != value else value for value in rollouts.rewards_PGF[p, g].tolist()]
            rows.append({
                "prompt": tokenizer.decode(rollouts.prompt(p), skip_special_tokens=False),
                "completion": tokenizer.decode(rollouts.completion(p, g), skip_special_tokens=False),
                "completion_ids": rollouts.completion(p, g),
                "reward": None if (reward := rollouts.rewards_PG[p, g].item()) != reward else reward,
                "rewards": dict(zip([name for name, _ in functions], scores)),
                "advantage": rollouts.advantages_PG[p, g].item() if used else None,
                "used": used,
                "finish_reason": "length" if rollouts.truncated_PG[p, g] else "stop",
            })
    return rows
