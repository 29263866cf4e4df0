"""A GRPO step is one computation: its loss and every gradient are the same however its tokens are packed and divided.

To 1e-12 of the largest value in float64 and to 1e-5 in float32, for every loss type; for bnpo, which depends on the
division by definition, only where the division is the same.
"""

import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from faults import mutant
from torch import Tensor

from minitrl import distributed, experience, grpo, losses, packing
from minitrl import model as model_module
from minitrl.distributed import World
from minitrl.experience import Rollouts
from minitrl.losses import LOSS_TYPES, grpo_loss
from minitrl.model import Model, ModelConfig
from minitrl.packing import Pack, pack, plan_micro_batches

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TEMPERATURE, MAX_LENGTH, VOCABULARY = 0.9, 12, 31
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "qwen3, tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2, window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,  # shorter than prompts and completions
        "max_window_layers": 1,
        "num_key_value_heads": 1,
    },
}
OPTIONS = {"epsilon": 0.15, "epsilon_high": 0.5, "beta": 0.1, "entropy_coef": 0.03, "entropy_threshold": 2.0}
Batch = list[tuple[int, list[int]]]  # [(prompt, [completion, ...]), ...]: a micro-batch as plan_micro_batches gives it


def tiny(name: str, dtype: torch.dtype) -> Model:
    """Weights large enough that attention is not flat: an error in what is attended to shows."""
    torch.manual_seed(0)
    model = Model(ModelConfig.from_hf(SHAPE | MODELS[name]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.to(dtype)


def rollouts() -> Rollouts:
    """4 prompts with 4 completions each: of one token, empty, and longer than the window; one group without signal."""
    g = torch.Generator().manual_seed(1)
    prompt_lengths = torch.tensor([3, 1, 9, 5])
    lengths = torch.tensor([[1, 4, 7, 12], [2, 0, 1, 3], [5, 5, 1, 11], [8, 2, 6, 1]])
    advantages = torch.randn(4, 4, generator=g)
    advantages[3] = 0
    R = int(lengths.sum())
    return Rollouts(
        prompt_tokens=torch.randint(VOCABULARY, (int(prompt_lengths.sum()),), generator=g),
        prompt_lengths_P=prompt_lengths,
        tokens_R=torch.randint(VOCABULARY, (R,), generator=g),
        lengths_PG=lengths,
        sampler_logprobs_R=torch.zeros(R),
        truncated_PG=torch.zeros(4, 4, dtype=torch.bool),
        versions_PG=torch.zeros_like(lengths),
        rewards_PGF=torch.zeros(4, 4, 1),
        rewards_PG=torch.zeros(4, 4),
        advantages_PG=advantages,
    )


EVERYTHING: Batch = [(p, [0, 1, 2, 3]) for p in range(4)]


def shared(r: Rollouts, batch: Batch) -> tuple[Pack, Tensor, Tensor]:
    """(pack, which of its tokens are scored, where these stand in R): each prompt once, as training has it."""
    packed, index_C = r.pack(batch)
    return packed, packed.completion_T, index_C


def repeated(r: Rollouts, batch: Batch) -> tuple[Pack, Tensor, Tensor]:
    """The same with the prompt written out before each completion: sequences that share nothing."""
    pairs = [(p, g) for p, members in batch for g in members]
    packed = pack([r.prompt(p) + r.completion(p, g) for p, g in pairs])
    starts = torch.tensor([len(r.prompt(p)) for p, _ in pairs])
    scored_T = packed.positions_T >= starts[packed.segments_T]
    index_C = torch.cat([torch.arange(r.span(p, g).start, r.span(p, g).stop) for p, g in pairs])
    return packed, scored_T, index_C


def scores(model: Model, packed: Pack, scored_T: Tensor) -> tuple[Tensor, Tensor]:
    return model.logprobs(packed, scored_T, TEMPERATURE)


def scores_from_whole_logits(model: Model, packed: Pack, scored_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by log_softmax of all logits, of sequences without prefixes: nothing is shared."""
    logprobs_TV = (model(packed) @ model.head_weight.t() / TEMPERATURE).log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    before = torch.arange(len(scored_T)) - 1
    chosen_T = logprobs_TV[before, packed.tokens_T]
    return torch.where(scored_T, chosen_T, 0), torch.where(scored_T, entropy_T[before], 0)


def known_logprobs(model: Model, r: Rollouts) -> dict[str, Tensor]:
    """Old and reference log-probs (R,), off the policy's by enough that some tokens are clipped and the KL is felt."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        packed, scored_T, index_C = repeated(r, EVERYTHING)
        logprobs_R = torch.empty(len(r.tokens_R), dtype=model.norm.weight.dtype)
        logprobs_R[index_C] = scores(model, packed, scored_T)[0][scored_T]
    return {
        name: logprobs_R + size * torch.randn(len(logprobs_R), generator=g).to(logprobs_R)
        for name, size in (("old", 0.3), ("ref", 0.5))
    }


def step(model: Model, r: Rollouts, batches: list[Batch], layout=shared, scores=scores, known=None, **options) -> dict:
    """Loss, gradients by parameter, and metrics of a step, added up over micro-batches as training does it."""
    known = known or known_logprobs(model, r)
    options = OPTIONS | {"max_completion_length": MAX_LENGTH} | options
    counts = {"tokens": len(r.tokens_R), "sequences": r.lengths_PG.numel(), "micro_batches": len(batches)}
    model.zero_grad()
    totals = {}
    for batch in batches:
        packed, scored_T, index_C = layout(r, batch)
        logprobs_T, entropy_T = scores(model, packed, scored_T)

        def spread(values_R):
            return torch.zeros_like(logprobs_T).masked_scatter(scored_T, values_R[index_C].to(logprobs_T.dtype))

        loss, metrics = grpo_loss(
            logprobs_T,
            spread(known["old"]),
            spread(r.per_token(r.advantages_PG)),
            scored_T,
            ref_logprobs_T=spread(known["ref"]),
            entropy_T=entropy_T,
            segments_T=packed.segments_T,
            **counts,
            **options,
        )
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0) + value
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return totals | grads


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCE[dtype], f"{name} differs by {error:.2g} of its largest value"


def divisions(r: Rollouts) -> Iterator[list[Batch]]:
    """Micro-batches of every capacity, over 1, 2 and 4 ranks, of groups and completions in every sort of order."""
    prompts, lengths = r.prompt_lengths_P.tolist(), r.lengths_PG.tolist()
    for capacity in (1, 10, 15, 20, 27, 40, 70, 1000):
        yield plan_micro_batches(prompts, lengths, capacity)[0]
    for ranks in (2, 4):
        yield [batch for share in plan_micro_batches(prompts, lengths, 30, ranks) for batch in share]
    rng = random.Random(0)
    for _ in range(5):
        pairs = [(p, g) for p, members in EVERYTHING for g in members]
        rng.shuffle(pairs)
        cuts = sorted(rng.sample(range(1, len(pairs)), rng.randint(0, 5)))
        yield [[(p, [g]) for p, g in pairs[i:j]] for i, j in zip([0, *cuts], [*cuts, len(pairs)])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prompt_is_a_repeated_prompt(name, loss_type, level, dtype):
    """Prompts once, against prompts before each completion, against log_softmax of the whole logits of the latter."""
    model, r = tiny(name, dtype), rollouts()
    options = {"loss_type": loss_type, "importance_sampling_level": level, "known": known_logprobs(model, r)}
    once = step(model, r, [EVERYTHING], **options)
    assert_same(step(model, r, [EVERYTHING], repeated, **options), once, dtype)
    assert_same(step(model, r, [EVERYTHING], repeated, scores_from_whole_logits, **options), once, dtype)
    assert once["kl"] > 0 and (level == "sequence" or 0 < once["clip_ratio/region_mean"] < 0.9)
    for parameter, _ in model.named_parameters():
        assert once[parameter].abs().max() > 1e-4, f"{parameter} has no gradient to compare"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "bnpo"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_one_by_one(name, loss_type, dtype):
    model, r = tiny(name, dtype), rollouts()
    options = {"loss_type": loss_type, "known": known_logprobs(model, r)}
    whole = step(model, r, [EVERYTHING], **options)
    alone = [[(p, [g])] for p, members in EVERYTHING for g in members]
    for layout in (shared, repeated):
        assert_same(step(model, r, alone, layout, **options), whole, dtype)
    assert_same(step(model, r, alone, repeated, scores_from_whole_logits, **options), whole, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "bnpo"])
def test_every_division_and_every_order(loss_type, dtype):
    model, r = tiny("qwen2, window", dtype), rollouts()
    options = {"loss_type": loss_type, "known": known_logprobs(model, r)}
    whole = step(model, r, [EVERYTHING], **options)
    counts = set()
    for batches in divisions(r):
        counts.add(len(batches))
        assert_same(step(model, r, batches, **options), whole, dtype)
    assert len(counts) >= 6 and max(counts) >= 14


def test_bnpo_does_depend_on_the_division():
    model, r = tiny("llama", torch.float64), rollouts()
    losses = [step(model, r, batches, loss_type="bnpo")["loss"].item() for batches in divisions(r)]
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.parametrize("loss_type", [loss_type for loss_type in LOSS_TYPES if loss_type != "bnpo"])
def test_completions_without_advantage_may_be_left_out(loss_type):
    """Where nothing else pulls at them their gradient is exactly 0: skipping their passes changes nothing."""
    model, r = tiny("llama", torch.float64), rollouts()
    options = {"loss_type": loss_type, "known": known_logprobs(model, r), "beta": 0.0, "entropy_coef": 0.0}
    with_them, without = step(model, r, [EVERYTHING], **options), step(model, r, [EVERYTHING[:3]], **options)
    assert_same(without, with_them, torch.float64)
    only_them = step(model, r, [EVERYTHING[3:]], **options)
    assert all(value.eq(0).all() for value in only_them.values())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_trainer_adds_up_the_same(loss_type, ranks, monkeypatch):
    """`grpo.backward` itself, rank by rank, with what its ranks would add up over the network added up here."""
    model, r, totals = tiny("qwen3, tied", torch.float32), rollouts(), Counter()
    known = known_logprobs(model, r)
    options = {"loss_type": loss_type, "epsilon": 0.15, "epsilon_high": 0.5, "beta": 0.1, "entropy_coef": 0.03}
    config = grpo.Config(
        model="a folder",
        dataset="a file",
        reward=("number",),
        temperature=TEMPERATURE,
        max_prompt_length=9,
        max_completion_length=MAX_LENGTH,
        tokens_per_microbatch=30,
        vllm_importance_sampling_correction=False,  # nobody sampled these
        **options,
    )
    monkeypatch.setattr(distributed, "sum_", lambda tensors, world: None)
    plan = grpo.micro_batches(r, config, World(0, ranks, torch.device("cpu")))
    assert len(plan) == ranks and all(plan)
    batches = sum(plan, []) if loss_type == "bnpo" else [EVERYTHING]
    whole = step(model, r, batches, known=known, **options | {"entropy_threshold": None})
    model.zero_grad()
    for rank in range(ranks):
        run = SimpleNamespace(world=World(rank, ranks, torch.device("cpu")), config=config)
        totals.update(grpo.backward(model, r, {"old": known["old"], "reference": known["ref"]}, plan, config, run, 0))
    metrics = {name: torch.tensor(totals[name]) for name in whole if name in totals}
    assert metrics.keys() >= {"loss", "kl", "clip_ratio/region_mean"}
    assert_same(metrics | {name: p.grad for name, p in model.named_parameters()}, whole, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_no_bit(name):
    model, r = tiny(name, torch.float32), rollouts()
    kept = step(model, r, [EVERYTHING])
    model.gradient_checkpointing = True
    again = step(model, r, [EVERYTHING])
    assert all(torch.equal(again[key], value) for key, value in kept.items())


@pytest.mark.parametrize("name", MODELS)
def test_no_group_hears_of_another(name):
    """Other tokens in one group change no bit of the others' log-probs, and these have no gradient to its tokens."""
    model, r = tiny(name, torch.float32), rollouts()
    packed, scored_T, _ = shared(r, EVERYTHING)
    embedded = []
    hook = model.embed_tokens.register_forward_hook(lambda module, args, out: embedded.append(out) or out)
    logprobs_T, entropy_T = scores(model, packed, scored_T)
    hook.remove()
    bounds = packed.cu_seqlens[[0, 5, 10, 15, 20]].tolist()
    for p in range(4):
        mine = slice(bounds[p], bounds[p + 1])
        total = logprobs_T[mine].sum() + entropy_T[mine].sum()
        [reach] = torch.autograd.grad(total, embedded, retain_graph=True)
        assert reach[mine].ne(0).any()
        reach[mine] = 0
        assert reach.eq(0).all()
        other_T = packed.tokens_T.clone()
        other_T[mine] = (other_T[mine] + 1) % VOCABULARY
        changed = scores(model, pack_with(packed, other_T), scored_T)
        for before, after in zip((logprobs_T, entropy_T), changed):
            same = before == after
            assert not same[mine][scored_T[mine]].all()
            same[mine] = True
            assert same.all()


def pack_with(packed: Pack, tokens_T: Tensor) -> Pack:
    return Pack(**{**vars(packed), "tokens_T": tokens_T})


@pytest.mark.parametrize("name", MODELS)
def test_nothing_sees_what_comes_after_it(name):
    """Changing the last token of a completion changes no log-prob but its own; ids after the end have no gradient."""
    model, r = tiny(name, torch.float32), rollouts()
    packed, scored_T, _ = shared(r, EVERYTHING)
    with torch.no_grad():
        logprobs_T, _ = scores(model, packed, scored_T)
        for end in packed.cu_seqlens[2:5].tolist():  # of the first prompt's first three completions
            other_T = packed.tokens_T.clone()
            other_T[end - 1] = (other_T[end - 1] + 1) % VOCABULARY
            changed, _ = scores(model, pack_with(packed, other_T), scored_T)
            assert (changed != logprobs_T).nonzero().flatten().tolist() == [end - 1]


# Faults that the tests above must see


def sharing():
    test_a_shared_prompt_is_a_repeated_prompt("qwen2, window", "dapo", "token", torch.float32)


FAULTS = [  # in packing: what is right, what is wrong
    (
        "starts[prefix + 1] - 1 if prefix >= 0",
        "start - 1 if prefix >= 0",
    ),  # predicted by what stands before it in the pack
    ("starts[prefix + 1] - 1 if prefix >= 0", "starts[prefix] if prefix >= 0"),  # by the prompt's first token
    ("(lengths[prefix] if prefix >= 0 else 0)", "0"),  # positions that begin anew
    ("(lengths[prefix] if prefix >= 0 else 0)", "(lengths[prefix] - 1 if prefix >= 0 else 0)"),
    ("prefixes += [-1] + [len(sequences)] * len(answers)", "prefixes += [-1] + [0] * len(answers)"),  # the first prompt
    ("prefixes_B=torch.tensor(prefixes, dtype=torch.int32)", "prefixes_B=torch.tensor([-1] * len(prefixes))"),
]


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_faults_in_packs_are_seen(right, wrong, monkeypatch):
    monkeypatch.setattr(experience, "pack_groups", mutant(packing, right, wrong).pack_groups)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        sharing()


def no_prefix(attention, q, k, v, cu_seqlens, prefixes_B, *, prefixes, **options):
    return attention(q, k, v, cu_seqlens, prefixes_B.clamp(max=-1), prefixes=(-1,) * len(prefixes), **options)


def prefix_without_gradient(attention, q, k, v, cu_seqlens, prefixes_B, *, lengths, prefixes, **options):
    shared_T = torch.cat([torch.full((n, 1, 1), b in prefixes) for b, n in enumerate(lengths)])
    k, v = torch.where(shared_T, k.detach(), k), torch.where(shared_T, v.detach(), v)
    return attention(q, k, v, cu_seqlens, prefixes_B, lengths=lengths, prefixes=prefixes, **options)


@pytest.mark.parametrize("fault", [no_prefix, prefix_without_gradient])
def test_faults_in_attention_are_seen(fault, monkeypatch):
    right = model_module.attention
    monkeypatch.setattr(model_module, "attention", lambda *args, **options: fault(right, *args, **options))
    with pytest.raises(AssertionError, match="differs"):
        sharing()


def local_mean(logprobs_T, old_T, advantages_T, mask_T, **options):
    return losses.grpo_loss(logprobs_T, old_T, advantages_T, mask_T, **options | {"tokens": None})


def last_token_forgotten(logprobs_T, old_T, advantages_T, mask_T, **options):
    mask_T = mask_T & (torch.arange(len(mask_T)) < len(mask_T) - 1)
    return losses.grpo_loss(logprobs_T, old_T, advantages_T, mask_T, **options)


@pytest.mark.parametrize("fault", [local_mean, last_token_forgotten])
def test_faults_in_sums_are_seen(fault, monkeypatch):
    monkeypatch.setitem(globals(), "grpo_loss", fault)
    with pytest.raises(AssertionError, match="differs"):
        test_packed_is_one_by_one("llama", "dapo", torch.float32)
