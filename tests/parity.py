"""Three optimizer steps of GRPO on the same tiny Llama and the same completions, by three hands, and all their numbers.

    ours      `grpo.main`, as from the command line
    trl_1_16  the installed TRL's `GRPOTrainer.train`, run for real
    trl_0_16  the formulas of TRL 0.16.0, written down here on padded rows

Sampling alone is replaced, by completions of unequal lengths, some of them truncated.
"""

import copy
import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import datasets
import numpy
import pytest
import tokenizers
import torch
import transformers
import trl
from safetensors.torch import load_file
from torch import Tensor

from minitrl import distributed, grpo, losses, rewards, rollout_client
from minitrl.layout import hf_tensors
from minitrl.rollout import Completion

transformers.utils.logging.disable_progress_bar()

VOCABULARY, EOS, MAX_COMPLETION, G = 40, 1, 12, 4
ROWS = [
    {"prompt": "t3 t4 t5", "domain": "odd"},
    {"prompt": "t7", "domain": "flat"},  # equal rewards: no signal
    {"prompt": "t9 t3", "domain": "any"},
    {"prompt": "t8 t8 t2 t6", "domain": "odd"},
]
REWARDS = '''
def variety(completion_ids, domain, **_):
    """How many tokens differ; the same for all of the domain "flat"."""
    return [0.25 if d == "flat" else len(set(ids)) / 4 for ids, d in zip(completion_ids, domain)]

def parity(completion_ids, domain, **_):
    """A reward that applies to one domain alone."""
    return [float(ids[0] % 2) if d == "odd" else None for ids, d in zip(completion_ids, domain)]

def sparse(completion_ids, **_):
    """A reward that applies to some completions of a group."""
    return [None if ids[0] % 3 == 0 else ids[0] / 40 for ids in completion_ids]

def constant(completion_ids, domain, **_):
    """Equal within a group, and no sum of binary fractions."""
    return [0.43 if d == "odd" else 0.9 for d in domain]
'''
COMMON = {
    "temperature": 0.7,
    "learning_rate": 0.003,  # moves ratios out of their clipping range
    "adam_epsilon": 1e-3,  # at 1e-8 a gradient that is all rounding moves its weight as far as any other
    "max_grad_norm": 0.5,  # scales gradients down
    "max_steps": 3,
    "seed": 1,
    "num_generations": G,
}


@dataclass
class Step:
    """One optimizer step's numbers. A completion's key is (prompt ids, completion ids)."""

    loss: float = 0.0
    metrics: dict = field(default_factory=dict)
    advantages: dict = field(default_factory=dict)  # key -> float
    logprobs: dict = field(default_factory=dict)  # key -> (length,), before the update
    entropies: dict = field(default_factory=dict)
    losses: dict = field(default_factory=dict)  # key -> (length,), each token's own, before it is divided by anything
    gradients: dict = field(default_factory=dict)  # name in the checkpoint -> tensor, before clipping
    split: list = field(default_factory=list)  # the keys of each micro-batch


@dataclass
class World:
    """What both sides load: a checkpoint, data, rewards, and the completions of each prompt."""

    folder: str
    data: str
    rewards: str
    completions: dict  # prompt ids -> G completions


def make_world(folder) -> World:
    """Write them into `folder`."""
    words = {"<pad>": 0, "<eos>": EOS} | {f"t{i}": i for i in range(2, VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.12,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rewards.py").write_text(REWARDS)
    draw = random.Random(5)
    completions = {}
    for i, row in enumerate(ROWS):
        lengths = [draw.randint(1, MAX_COMPLETION - 1) for _ in range(G)]
        answers = [[draw.randint(2, VOCABULARY - 1) for _ in range(length)] + [EOS] for length in lengths]
        if i % 2 == 0:
            answers[i] = [draw.randint(2, VOCABULARY - 1) for _ in range(MAX_COMPLETION)]  # truncated
        completions[tuple(tokenizer(row["prompt"])["input_ids"])] = answers
    return World(str(folder / "model"), str(folder / "data.jsonl"), str(folder / "rewards.py"), completions)


def truncated(ids: list[int]) -> bool:
    return ids[-1] != EOS


def reward_names(world: World, options: dict) -> list[str]:
    return [f"{world.rewards}:{name}" for name in options.get("reward", ("variety", "parity"))]


# Ours


class FixedEngine:
    """Stands in for rollout.Engine and answers with the completions that are given."""

    tensor = distributed.ALONE

    def __init__(self, world: World, tokenizer):
        self.world, self.tokenizer = world, tokenizer

    def generate(self, prompts, n, **_):
        def completion(ids):
            text = self.tokenizer.decode(ids)
            return Completion(ids, [0.0] * len(ids), text, "length" if truncated(ids) else "stop")

        return [[completion(ids) for ids in self.world.completions[tuple(prompt)][:n]] for prompt in prompts]


def ours(world: World, output_dir, options: dict, splits: list | None = None) -> tuple[list[Step], dict[str, Tensor]]:
    """Run `grpo.main` and watch it: its steps, and the weights in `final`. `splits` are its micro-batches, by step."""
    steps, terms = [], []
    backward, objective = grpo.backward, losses.grpo_loss

    def watched_objective(logprobs_T, old_T, advantages_T, mask_T, **given):
        """Note each token's own loss: the objective of that token alone, every divisor 1."""
        alone = {"tokens": 1, "sequences": 1, "micro_batches": 1, "max_completion_length": 1, "entropy_coef": 0.0}
        values = []
        for t in mask_T.nonzero()[:, 0] if per_token(options) else ():
            single = torch.zeros_like(mask_T).index_fill(0, t, True)
            values.append(objective(logprobs_T.detach(), old_T, advantages_T, single, **given | alone)[0].item())
        terms.append((logprobs_T.detach()[mask_T], given["entropy_T"].detach()[mask_T], torch.tensor(values)))
        return objective(logprobs_T, old_T, advantages_T, mask_T, **given)

    def watched_backward(policy, rollouts, known, plan, *rest):
        terms.clear()
        metrics = backward(policy, rollouts, known, plan, *rest)
        step = Step(metrics["loss"], metrics)
        for (p, g), key in keys(rollouts).items():
            step.advantages[key] = rollouts.advantages_PG[p, g].item()
        for batch, columns in zip(plan[0], terms, strict=True):
            members = [keys(rollouts)[p, g] for p, chosen in batch for g in chosen]
            lengths = [len(completion) for _, completion in members]
            for per_key, values in zip((step.logprobs, step.entropies, step.losses), columns):
                if len(values):
                    per_key |= dict(zip(members, values.split(lengths)))
            step.split.append(members)
        for name, (parameter, rows, _) in hf_tensors(policy.config).items():
            grad = policy.get_parameter(parameter).grad
            step.gradients[name] = torch.zeros(()) if grad is None else (grad if rows is None else grad[rows]).clone()
        steps.append(step)
        return metrics

    def given_plan(rollouts, *_):
        places = {key: place for place, key in keys(rollouts).items()}
        plan = []
        for split in splits[len(steps)]:
            members = defaultdict(list)
            for p, g in map(places.get, split):
                members[p].append(g)
            plan.append(list(members.items()))
        return [plan]

    values = COMMON | options | {
        "model": world.folder,
        "dataset": world.data,
        "reward": reward_names(world, options),
        "output_dir": str(output_dir),
        "prompts_per_step": len(ROWS),
        "max_prompt_length": 4,
        "max_completion_length": MAX_COMPLETION,
        "dtype": "float32",
        "device": "cpu",
        "vllm_importance_sampling_correction": False,  # TRL's is for vLLM, which does not sample here
    }
    output_dir.mkdir(parents=True)
    (output_dir / "given.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_client, "engine_of", lambda _config, _policy, tokenizer, _: FixedEngine(world, tokenizer))
        patch.setattr(grpo, "backward", watched_backward)
        patch.setattr(losses, "grpo_loss", watched_objective)
        if splits:
            patch.setattr(grpo, "micro_batches", given_plan)
        assert grpo.main(["--config", str(output_dir / "given.json")]) == 0
    for step, line in zip(steps, (output_dir / "metrics.jsonl").read_text().splitlines()[-len(steps) :], strict=True):
        step.metrics = json.loads(line)
    return steps, load_file(output_dir / "final" / "model.safetensors")


def keys(rollouts) -> dict:
    """(p, g) -> key."""
    P, sizes = len(rollouts.prompt_lengths_P), range(rollouts.lengths_PG.shape[1])
    return {(p, g): (tuple(rollouts.prompt(p)), tuple(rollouts.completion(p, g))) for p in range(P) for g in sizes}


def per_token(options: dict) -> bool:
    """Whether a token's loss is its own: neither a ratio of its sequence nor a quantile over the others."""
    return options.get("importance_sampling_level") != "sequence" and options.get("top_entropy_quantile", 1) == 1


# TRL 1.16


class Watched(trl.GRPOTrainer):
    """TRL's trainer with completions given to it; what it computes is its own, and noted."""

    def __init__(self, world: World, options: dict, **arguments):
        self.world, self.noted, self.per_token = world, [], per_token(options)
        super().__init__(**arguments)

    def _generate_single_turn(self, prompt_ids, *_):
        asked, answers = Counter(), []
        for prompt in map(tuple, prompt_ids):
            answers.append(list(self.world.completions[prompt][asked[prompt]]))
            asked[prompt] += 1
        return answers, None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.scores

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self.noted.append(Step())
        step = self.noted[-1]
        metrics = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        rows = [rows[mask.bool()] for rows, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"])]
        # the loss's own mask lacks what mask_truncated_completions takes out, and a padded row ends with ids of 0
        ids = [row[: row.nonzero()[-1] + 1] for row in inputs["completion_ids"]]
        members = [(tuple(row.tolist()), tuple(answer.tolist())) for row, answer in zip(rows, ids)]
        step.split.append(members)
        step.loss += loss.item()
        tokens = int(inputs["completion_mask"].sum())
        step.metrics["tokens"] = step.metrics.get("tokens", 0) + tokens
        for name, value in metrics.items():
            if name in ("kl", "entropy") or "clip_ratio" in name:  # a token mean of the micro-batch
                step.metrics[name] = step.metrics.get(name, 0.0) + value * tokens
        step.advantages |= dict(zip(members, inputs["advantages"].tolist()))
        for per_key, values in zip((step.logprobs, step.entropies), self.scores[:2]):
            per_key |= {key: row[: len(key[1])].detach() for key, row in zip(members, values)}
        if self.per_token:
            step.losses |= {key: row[: len(key[1])] for key, row in zip(members, self.token_losses(model, inputs))}
        return loss

    def token_losses(self, model, inputs):
        """(B, C) each token's own loss: the derivative by its mask, in which dapo's loss is linear."""
        loss_type, bonus = self.loss_type, self._entropy_bonus_enabled
        self.loss_type, self._entropy_bonus_enabled = "cispo" if loss_type == "cispo" else "dapo", False
        mask = torch.ones(inputs["completion_ids"].shape, requires_grad=True)
        loss = super()._compute_loss(model, inputs | {"tool_mask": mask, "num_items_in_batch": torch.tensor(1.0)})
        self.loss_type, self._entropy_bonus_enabled = loss_type, bonus
        return torch.autograd.grad(loss, mask)[0]

    def training_step(self, model, *rest):
        loss = super().training_step(model, *rest)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self.noted[-1].gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return loss


def trainer(world: World, output_dir, options: dict, micro_batches: int = 1) -> Watched:
    arguments = trl.GRPOConfig(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=len(ROWS) * options.get("num_generations", G) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_completion_length=MAX_COMPLETION,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **COMMON | {name: value for name, value in options.items() if name != "reward"},
    )
    made = Watched(
        world,
        options,
        model=world.folder,
        reward_funcs=[function for _, function in rewards.load_rewards(reward_names(world, options))],
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def trl_1_16(world: World, output_dir, options: dict, micro_batches: int = 1) -> tuple[list[Step], dict[str, Tensor]]:
    """Train for real. Its steps, with token means over the whole step, and the weights at the end."""
    trained = trainer(world, output_dir, options, micro_batches)
    trained.train()
    assert [len(step.split) for step in trained.noted] == [micro_batches] * COMMON["max_steps"]
    logged = [row for row in trained.state.log_history if "grad_norm" in row]
    for step, row in zip(trained.noted, logged, strict=True):
        tokens = step.metrics.pop("tokens")
        step.metrics = {name: value / tokens for name, value in step.metrics.items()}
        step.metrics |= {name: float(row[name]) for name in ("grad_norm", "learning_rate")}
    return trained.noted, trained.model.state_dict()


# TRL 0.16.0


def trl_0_16(world: World, options: dict, micro_batches: int = 1) -> tuple[list[Step], dict[str, Tensor]]:
    """TRL 0.16.0's GRPOTrainer, on padded rows: a micro-batch's loss is the mean over its own tokens."""
    beta, mu, epsilon = options["beta"], options["num_iterations"], 0.2
    policy = transformers.LlamaForCausalLM.from_pretrained(world.folder, dtype=torch.float32)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), eps=COMMON["adam_epsilon"], weight_decay=0.0)
    members = [(prompt, tuple(ids)) for prompt, answers in world.completions.items() for ids in answers]
    advantages_N = advantages_0_16(scores(world, options), torch.tensor(options["reward_weights"]))
    rows = torch.arange(len(members)).chunk(micro_batches)
    batches = [padded([members[i] for i in chosen]) for chosen in rows]
    steps = []
    for iteration in range(COMMON["max_steps"]):
        if iteration % mu == 0:
            with torch.no_grad():
                old = [logprobs_0_16(policy, *batch) for batch in batches]
                known = [logprobs_0_16(reference, *batch) for batch in batches]
        step = Step(advantages=dict(zip(members, advantages_N.tolist())), metrics={"kl": 0.0} if beta else {})
        for chosen, batch, old_BC, known_BC in zip(rows, batches, old, known):
            mask = batch[2]
            new_BC = logprobs_0_16(policy, *batch)
            ratio = (new_BC - (old_BC if mu > 1 else new_BC.detach())).exp()
            A = advantages_N[chosen, None]
            losses_BC = -torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
            if beta:
                kl = (known_BC - new_BC).exp() - (known_BC - new_BC) - 1
                losses_BC = losses_BC + beta * kl
                step.metrics["kl"] += (kl * mask).sum().item() / sum(int(batch[2].sum()) for batch in batches)
            loss = (losses_BC * mask).sum() / mask.sum() / micro_batches
            loss.backward()
            step.loss += loss.item()
            step.split.append([members[i] for i in chosen])
            for per_key, values in ((step.logprobs, new_BC), (step.losses, losses_BC)):
                per_key |= {key: row[: len(key[1])].detach() for key, row in zip(step.split[-1], values)}
        step.gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
        step.metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), COMMON["max_grad_norm"]).item()
        optimizer.param_groups[0]["lr"] = COMMON["learning_rate"] * (1 - iteration / COMMON["max_steps"])
        optimizer.step()
        optimizer.zero_grad()
        steps.append(step)
    return steps, policy.state_dict()


def scores(world: World, options: dict) -> Tensor:
    """(N, F) each reward function's value, NaN for None."""
    given = {"completion_ids": [], "domain": []}
    for row, answers in zip(ROWS, world.completions.values()):
        given["completion_ids"] += answers
        given["domain"] += [row["domain"]] * G
    values = [function(**given) for _, function in rewards.load_rewards(reward_names(world, options))]
    return torch.from_numpy(numpy.array(values, numpy.float32).T)  # None becomes NaN


def advantages_0_16(rewards_NF: Tensor, weights_F: Tensor) -> Tensor:
    """None counts nothing in the sum, so a row to which no reward applies has 0."""
    rewards_PG = (rewards_NF * weights_F).nansum(1).view(-1, G)
    return ((rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten()


def padded(members: list) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, P + C), attention mask, completion mask (B, C): prompts padded on the left, completions on the right."""
    P, C = (max(len(ids) for ids in column) for column in zip(*members))
    ids = [[0] * (P - len(prompt)) + [*prompt, *answer] + [0] * (C - len(answer)) for prompt, answer in members]
    ids = torch.tensor(ids)
    return ids, (ids != 0).long(), (ids[:, P:] != 0).float()


def logprobs_0_16(model, ids, attention_mask, mask) -> Tensor:
    """(B, C), from whole logits."""
    C = mask.shape[1]
    logits = model(ids, attention_mask=attention_mask).logits[:, -C - 1 : -1] / COMMON["temperature"]
    return logits.log_softmax(-1).gather(2, ids[:, -C:, None])[..., 0]
