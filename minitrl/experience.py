"""From prompts to rollouts with advantages: generate, score, compare. What GRPO and PPO share, their options and all.

Every rank generates and scores its own share of the prompts; then all ranks hold the whole step, so that statistics
over the step and its division into micro-batches are the same computation everywhere, and no result depends on how
many ranks there are.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from . import checkpoint, data, lora, rewards, toy, training
from .config import CommonOptions, require
from .distributed import World, gather_ragged, print0, sum_, together
from .packing import Pack, pack_groups, plan_micro_batches
from .parallel import own_parameters
from .rollout import context_length
from .sampling import Sampling
from .state import read

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
PATIENCE = 5  # generations in a row without anything to learn from, before that is worth a warning


@dataclass
class RolloutOptions(CommonOptions):
    """The options of prompts, sampling and rewards. Names and defaults are TRL 1.16's where it has the option."""

    reward: tuple[str, ...] = ()  # reward functions, built-in names or file.py:function; several are added up
    reward_weights: tuple[float, ...] = ()  # one weight for each reward; none: 1 each
    reward_timeout: float = 60.0  # seconds a reward may take for a step's completions; in a thread: no signal.alarm
    eval_reward: tuple[str, ...] = ()  # rewards of the evaluation; none: those of training
    prompts_per_step: int = 8  # prompts in one generation, over all processes
    num_generations: int = 8  # completions of each prompt: the group whose rewards are compared
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted
    max_completion_length: int = 512  # tokens
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    top_p: float = 1.0  # sample from the smallest set of tokens that has this probability; 1: off
    top_k: int = 0  # sample from this many of the likeliest tokens; 0: off
    min_p: float = 0.0  # sample from tokens with at least this share of the likeliest one's probability; 0: off
    repetition_penalty: float = 1.0  # divides the logits of tokens that were there already; 1: off
    stop: tuple[str, ...] = ()  # strings that end a completion, beside the checkpoint's end tokens
    rollout_batch_size: int = 64  # sequences that a process decodes at a time
    rollout_server: tuple[str, ...] = ()  # URLs of servers that sample, of a vLLM vllm+http://...; none: this process
    rollout_timeout: float = 600.0  # seconds that a server's answer may take, and that a step waits for any server
    max_staleness: int = 0  # steps that weights may be behind which samples come from; 0: sample and train by turns
    rollout_tensor: int | None = None  # processes that divide every matrix of the sampler; none: --tensor
    rollout_cache_gib: float | None = None  # bound of the key/value cache of a process; none: as large as it gets
    deterministic: bool = False  # sampler and trainer compute the same to the bit, at up to twice the cost
    overlong_cache: int | None = None  # the reward falls by 1 over so many last tokens of max_completion_length (DAPO)

    def __post_init__(self):
        super().__post_init__()
        for name in "prompts_per_step max_prompt_length max_completion_length rollout_batch_size".split():
            self.must(getattr(self, name) >= 1, name, "at least 1")
        self.must(self.temperature > 0, "temperature", "above 0, or the completions of a group are all the same")
        Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty)  # checks its own
        for name in ("reward_timeout", "rollout_timeout"):
            self.must(0 < getattr(self, name) <= 1e6, name, "above 0 and at most 1e6 seconds")
        cache = self.max_completion_length if self.overlong_cache is None else self.overlong_cache
        self.must(0 < cache <= self.max_completion_length, "overlong_cache", "from 1 to --max_completion_length")
        longest = self.max_prompt_length + self.max_completion_length
        fits = self.tokens_per_microbatch >= longest
        rule = f"at least --max_prompt_length + --max_completion_length, {longest} tokens"
        self.must(fits, "tokens_per_microbatch", rule)
        count = len(self.reward)
        self.must(count > 0, "reward", "the name of a built-in reward, or file.py:function")
        self.must(len(self.reward_weights) in (0, count), "reward_weights", f"{count} numbers, one for each reward")
        for name in ("rollout_tensor", "rollout_cache_gib"):
            alone = getattr(self, name) is None or not self.rollout_server
            self.must(alone, name, "left out with --rollout_server, whose processes have their own")
        self.check_data()
        short = self.model is not None or self.max_prompt_length == 512
        self.must(short, "max_prompt_length", "left out without --model: its prompts are short")

    def check_mesh(self, world) -> None:
        super().check_mesh(world)
        parts = 1 if self.rollout_tensor is None else self.rollout_tensor
        divides, whole = parts >= 1 and world.size % parts == 0, self.use_peft or self.deterministic
        self.must(divides, "rollout_tensor", f"a divisor of {world.size}, the number of processes")
        self.must(parts == 1 or not whole, "rollout_tensor", "1 with --use_peft or --deterministic")


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
    versions_PG: Tensor  # int64, the step of the weights that the first token was sampled with
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
        spans = [self.span(p, g) for p, members in micro_batch for g in members] or [slice(0, 0)]
        indices = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        return pack_groups(prompts, completions, device), indices

    def per_token(self, values_PG: Tensor) -> Tensor:
        """(R,) each completion's value at each of its tokens."""
        return values_PG.flatten().repeat_interleave(self.lengths_PG.flatten())

    def ids(self, micro_batches) -> dict[str, list]:
        """Prompts and completions of micro-batches, for a file."""
        parts = [part for batch in micro_batches for part in batch]
        completions = [[self.completion(p, g) for g in members] for p, members in parts]
        return {"groups": [{"prompt": self.prompt(p), "completions": c} for (p, _), c in zip(parts, completions)]}

    def plan(self, chosen_PG: Tensor, capacity: int, world: World) -> list[list]:
        """Per rank of world.data its micro-batches, each [(p, [g, ...]), ...], of the chosen completions (bool)."""
        members = [row.nonzero()[:, 0].tolist() for row in chosen_PG]
        lengths = [self.lengths_PG[p, chosen].tolist() for p, chosen in enumerate(members)]
        ranks, even = world.data.size, world.shard.size > 1
        plan = plan_micro_batches(self.prompt_lengths_P.tolist(), lengths, capacity, ranks, even)
        return [[[(p, [members[p][i] for i in chosen]) for p, chosen in batch] for batch in rank] for rank in plan]


def weighted_rewards(rewards_NF: Tensor, weights_F: Tensor) -> Tensor:
    """(N,) sum of weight times reward over the functions that apply; NaN where none does.

    TRL 0.16.0 gives such a sample 0, which then pulls its group's mean; here, as in TRL 1.16, it is left out of it.
    """
    total = (rewards_NF * weights_F).nansum(1)
    return torch.where(rewards_NF.isnan().all(1), torch.nan, total)


def advantages(rewards_PG: Tensor, scale_rewards: str = "group", estimator: str = "grpo", lengths_PG=None) -> Tensor:
    """(P, G) advantages, float32.

    grpo: reward minus its group's mean, over the deviation of the group, of the batch, or over 1 (scale_rewards).
        TRL: GRPOTrainer._generate_and_score_completions (unbiased deviation, 1e-4 added).
    rloo: reward minus the mean of the group's n - 1 others, which is n / (n - 1) times reward minus the group's mean
        (arXiv 2402.14740; TRL: RLOOTrainer).
    reinforce_plus_plus: reward minus the mean over the batch, over its deviation, of tokens and not of completions
        (lengths_PG; arXiv 2501.03262).

    Samples without a reward (NaN) are left out of mean and deviation and get 0. A group whose rewards are all equal, or
    for reinforce_plus_plus such a batch, gets exactly 0, where rounding would leave 1e-8 / 1e-4.
    """
    rewards = rewards_PG.double()
    if estimator == "reinforce_plus_plus":
        weights = torch.where(rewards.isnan(), 0.0, lengths_PG.double())
        values, total = rewards.nan_to_num(nan=0.0), weights.sum().clamp(min=1)
        centred = torch.where(rewards.isnan(), 0.0, values - (weights * values).sum() / total)
        deviation = ((weights * centred.square()).sum() / (total - 1).clamp(min=1)).sqrt()
        return torch.where(has_signal(rewards_PG.reshape(1, -1)), centred / (deviation + 1e-8), 0.0).float()
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(nan=0.0)
    if estimator == "rloo":
        known = (~rewards.isnan()).sum(1, keepdim=True)
        centred = centred * known / (known - 1).clamp(min=1)
    elif scale_rewards == "group":
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


def load_policy(config: RolloutOptions, world: World):
    """(policy, tokenizer) as training starts: --model's, or the embedded default's."""
    if config.model is None:
        policy, tokenizer = toy.build(config.seed, world.device, log=partial(print0, world))
        return checkpoint.divided(policy, torch.float32, world, config.cpu_offload), tokenizer
    policy, tokenizer = training.load_model(config, world)
    lora.adapt(policy, config, world)
    return policy, tokenizer


def reference_of(policy, config: RolloutOptions, world: World):
    """`lora.reference_of`, before training; what is divided among processes cannot be copied, and is loaded again."""
    return load_policy(config, world)[0].requires_grad_(False) if world.divides else lora.reference_of(policy)


def load(config: RolloutOptions, run):
    """(policy, tokenizer, rows and reward functions to train with, those to evaluate with): as asked, or embedded."""
    world = run.world
    functions = rewards.load_rewards(config.reward)
    eval_functions = rewards.load_rewards(config.eval_reward, "--eval_reward") if config.eval_reward else functions
    policy, tokenizer = load_policy(config, world)
    tokenizer.now = run.began
    rows, eval_rows = toy.datasets(config.seed) if config.model is None else ([], [])
    for path, into in ((config.dataset, rows), (config.eval_dataset, eval_rows)):
        if path:
            loaded, dropped = data.load_prompts(path, tokenizer, config.max_prompt_length)
            into += loaded
            if dropped:
                limit = f"--max_prompt_length {config.max_prompt_length}"
                print0(world, f"{path}: {dropped} prompts are above {limit} and left out")
    if config.deterministic:
        policy.make_deterministic()
    longest = max(len(row["prompt_ids"]) for row in rows + eval_rows)
    room = context_length(policy.config) - longest
    require(config.max_completion_length <= room, "max_completion_length", config.max_completion_length,
            f"at most {room}: the longest prompt has {longest} tokens, the model positions for {longest + room}")
    rewards.open_models(functions + eval_functions, tokenizer, world.device, partial(print0, world))
    rewards.check_columns(functions, rows[0]["columns"])
    if eval_rows:
        rewards.check_columns(eval_functions, eval_rows[0]["columns"])
    if config.top_p < 1 or config.top_k > 0 or config.min_p > 0 or config.repetition_penalty != 1:
        print0(world, "warning: --top_p, --top_k, --min_p and --repetition_penalty change what is sampled; the policy "
               "is trained on its log-probs without them (temperature alone), and sampling/sampling_logp_difference "
               "shows the change")
    return policy, tokenizer, rows, functions, eval_rows, eval_functions


def inputs(config: RolloutOptions, policy, rows, eval_rows, world: World) -> dict[str, str]:
    """Digests of all that the options only point to: on every rank, and after a resume, it has to be the same."""
    found = {"--dataset": data.fingerprint(rows), "--eval_dataset": data.fingerprint(eval_rows)}
    if config.model is not None:  # the embedded model is made anew each time, on another machine to the last bit or so
        found["--model"] = training.fingerprint(policy, config, world)
    return found | rewards.fingerprints(config.reward + config.eval_reward)


def share(count: int, world: World, engine) -> slice:
    """Which of so many prompts this process samples for, with those that it divides the sampler with."""
    teams, team = world.size // engine.tensor.size, world.rank // engine.tensor.size
    return slice(count * team // teams, count * (team + 1) // teams)


def warn(parts: list[Rollouts], config: RolloutOptions, run, step: int) -> bool:
    """Say what would leave a step's generations without effect, once; returns whether no reward applied at all."""
    truncated = torch.cat([part.truncated_PG for part in parts]).double().mean().item()
    if truncated > 0.5:
        limit = f"--max_completion_length {config.max_completion_length}"
        run.warn_once("truncated", f"step {step + 1}: {truncated:.0%} of the completions ran into {limit}; raise it")
    none = all(part.rewards_PG.isnan().all() for part in parts)
    if run.streak("none", none) == PATIENCE:
        run.warn_once("none", f"step {step + 1}: no reward applied to any completion, {PATIENCE} generations in a row; "
                      "look at the reward functions and the columns that they read")
    return none


def generate_and_score(
    engine, rows, seeds, functions, weights, world: World, *, num_generations, step, timeout_s, sampling, overlong=None,
    first_index=0, sampled=None,
) -> Rollouts:
    """Sample `num_generations` completions of each row's prompt and reward them; the advantages are left at 0.

    The processes that divide a model among them (engine.tensor) sample together, and the first of them rewards. An
    error on one rank, say in a reward, is an error on all.

    rows: P rows of `data.load_prompts`, the same on every rank.
    seeds: P ints; a completion depends on its prompt's seed and its own number.
    functions, weights: the rewards (`rewards.load_rewards`) and their weights.
    sampling: keyword arguments of `Engine.generate`.
    overlong: (max_completion_length, cache) adds `rewards.overlong_penalty` to the rewards.
    first_index: completions that were sampled in this step before these.
    sampled: in place of the engine's `generate`, gives this process's completions; their versions are steps.
    """
    P, G = len(rows), num_generations
    part = share(P, world, engine)
    mine = rows[part]
    prompts = [row["prompt_ids"] for row in mine]
    repeated = [row for row in mine for _ in range(G)] if engine.tensor.rank == 0 else []
    names = repeated[0]["columns"] if repeated else {}
    groups = None
    # A team waits for each other in sampling. Where weights are divided it may last until --timeout: all save together.
    tells = lambda: groups is not None or engine.tensor.size == 1 or world.divides
    with together("sampling and scoring", world, tells):
        groups = sampled() if sampled else engine.generate(prompts, n=G, seed=seeds[part], **sampling)
        completions = [completion for group in groups for completion in group if engine.tensor.rank == 0]
        rewards_NF = rewards.score(
            functions,
            timeout_s,
            [row["prompt"] for row in repeated],
            [completion.text for completion in completions],
            [completion.ids for completion in completions],
            {name: [row["columns"][name] for row in repeated] for name in names},
            step,
            first_index + part.start * G,
        ) if repeated else torch.empty(0, len(functions))
    lengths_N = torch.tensor([len(completion.ids) for completion in completions], dtype=torch.int64)
    rewards_N = weighted_rewards(rewards_NF, weights)
    if overlong is not None:
        rewards_N = rewards_N + rewards.overlong_penalty(lengths_N, *overlong)

    def whole(values, dtype) -> Tensor:
        return torch.cat(gather_ragged(torch.as_tensor(values, dtype=dtype), world))

    tokens = [token for completion in completions for token in completion.ids]
    logprobs = [logprob for completion in completions for logprob in completion.logprobs]
    versions = [completion.versions[0][0] if sampled else step for completion in completions]
    return Rollouts(
        prompt_tokens=torch.tensor([token for row in rows for token in row["prompt_ids"]]),
        prompt_lengths_P=torch.tensor([len(row["prompt_ids"]) for row in rows]),
        tokens_R=whole(tokens, torch.int64),
        lengths_PG=whole(lengths_N, torch.int64).view(P, G),
        sampler_logprobs_R=whole(logprobs, torch.float32),
        truncated_PG=whole([completion.finish_reason == "length" for completion in completions], torch.bool).view(P, G),
        versions_PG=whole(versions, torch.int64).view(P, G),
        rewards_PGF=whole(rewards_NF, torch.float32).view(P, G, -1),
        rewards_PG=whole(rewards_N, torch.float32).view(P, G),
        advantages_PG=torch.zeros(P, G),
    )


@torch.no_grad()
def measure(model, compute, count: int, rollouts: Rollouts, plan, world: World) -> list[Tensor]:
    """`count` tensors (R,) about the planned completions' tokens, the same on every rank; 0 for the others.

    compute(pack, completion_T) gives them for a micro-batch, as (T,). float32, or float64 where the model is.
    """
    dtype = torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)
    found = torch.zeros(count, len(rollouts.tokens_R), dtype=dtype)
    for batch in plan[world.data.rank]:
        pack, index_C = rollouts.pack(batch, world.device)
        scored_T = pack.completion_T
        found[:, index_C] = torch.stack([x_T[scored_T].cpu() for x_T in compute(pack, scored_T)])
    own_parameters(model)  # of a reference no backward pass follows, after which FSDP2 would let go of them
    sum_([found], world.data)
    return list(found)


def score(model, rollouts: Rollouts, plan, config: RolloutOptions, world: World) -> list[Tensor]:
    """[logprobs_R, entropy_R] of the planned completions under `model`; see `measure`."""
    return measure(model, lambda *packed: model.logprobs(*packed, config.temperature), 2, rollouts, plan, world)


def spread(values_R: dict[str, Tensor], index_C: Tensor, mask_T: Tensor, like_T: Tensor) -> dict[str, Tensor]:
    """Of each tensor (R,) what belongs to a micro-batch's completion tokens (`Rollouts.pack`), as (T,), 0 elsewhere."""
    zeros_T = torch.zeros_like(like_T, requires_grad=False)
    return {name: zeros_T.masked_scatter(mask_T, x_R[index_C].to(like_T)) for name, x_R in values_R.items()}


def with_advantages(rollouts: Rollouts, scale_rewards: str, estimator: str = "grpo") -> Rollouts:
    """The same rollouts with their advantages filled in; a batch is all of them."""
    filled = advantages(rollouts.rewards_PG, scale_rewards, estimator, rollouts.lengths_PG)
    return replace(rollouts, advantages_PG=filled)


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


def evaluate(engine, rows, functions, config: RolloutOptions, world, step: int) -> dict[str, float]:
    """Greedy completions of held-out prompts. eval/accuracy is the share whose first reward is at least 1."""
    if not rows:
        return {}
    rollouts = generate_and_score(
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
    found = rollout_metrics(rollouts, functions)
    metrics = {f"eval/{name}": value for name, value in found.items() if name in names}
    return metrics | {"eval/accuracy": (rollouts.rewards_PGF[:, 0, 0] >= 1).double().mean().item()}


def rollout_metrics(rollouts: Rollouts, functions) -> dict[str, float]:
    """What the completions were like, in TRL's names, less what too few rewards are there for."""
    lengths, truncated, rewards_PG = rollouts.lengths_PG.double(), rollouts.truncated_PG, rollouts.rewards_PG.double()
    compared = rewards_PG if rewards_PG.shape[1] > 1 else rewards_PG.T  # single completions, with each other
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.double().mean(),
        "frac_reward_zero_std": 1 - has_signal(compared).double().mean(),
        "frac_reward_none": rewards_PG.isnan().double().mean(),
    }
    if not truncated.all():
        metrics["completions/mean_terminated_length"] = lengths[~truncated].mean()
    if not rewards_PG.isnan().all():
        metrics["reward"] = rewards_PG.nanmean()
        metrics["reward_std"] = deviations(compared).nanmean()  # NaN where there is one in each group
    for f, (name, _) in enumerate(functions):
        values = rollouts.rewards_PGF[..., f].double()
        values = values[~values.isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=min(1, len(values) - 1))
    return {name: float(value) for name, value in metrics.items() if value == value}


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
                "version": rollouts.versions_PG[p, g].item(),
                "finish_reason": "length" if rollouts.truncated_PG[p, g] else "stop",
            })
    return rows


def save(run, step: int, cursor: int, rollouts: Rollouts | None, known: dict[str, Tensor], optimizer, **more) -> None:
    """A checkpoint from which `resume` goes on to the bit: weights, optimizer, place in the data, unused rollouts.

    rollouts: None where the next step makes its own.  known: tensors (R,) about them.  more: dicts of further tensors.
    """
    tensors = {"optimizer": optimizer.state_tensors()} | {name: named for name, named in more.items() if named}
    if rollouts is not None:
        tensors["rollouts"] = {field.name: getattr(rollouts, field.name) for field in fields(Rollouts)}
        tensors["known"] = known
    run.save(step, tensors, {"cursor": cursor}, optimizer.held)


@torch.no_grad()
def resume(run, total: int, given: dict, models: list, optimizer, **more):
    """(steps done, cursor, rollouts in use, what is known of them): of the newest whole checkpoint, or of none.

    The optimizer, and with it the models, and the tensors in `more` are put back in place.
    """
    step, tensors, state = run.load(total, given, optimizer.held) or (0, {}, {"cursor": 0})
    if step:
        optimizer.load_state_tensors(tensors["optimizer"])
        for name, named in more.items():
            for key, tensor in named.items():
                tensor.copy_(read(tensors[name][key]))
    run.begin(" ".join(training.fingerprint(model, run.config, run.world) for model in models))
    rollouts = Rollouts(**tensors["rollouts"]) if "rollouts" in tensors else None
    return step, state["cursor"], rollouts, tensors.get("known", {})
