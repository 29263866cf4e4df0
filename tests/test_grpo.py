"""`python -m minitrl.grpo`, whole runs of it: what it trains on, what it divides by, and what it says to bad input.

The formulas are tested where they stand (test_losses, test_advantages and so on); here is whether the script puts them
together.
"""

import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from miniature import REWARDS, apart, launch, rows, run, steps, untimed
from safetensors.torch import load_file, save_file

from minitrl import checkpoint, distributed, experience, grpo, losses, model, packing, rewards, runs, training
from minitrl.experience import Rollouts, select_groups, with_advantages
from minitrl.rollout import Engine

ALONE = distributed.World(0, 1, torch.device("cpu"))
DRAWS = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def ends(argv, code=0):
    """Run it, and expect this exit status and no traceback."""
    outcome = run(argv)
    assert outcome.code == code and "Traceback" not in outcome.err, outcome
    return outcome


# One step on given rollouts: `micro_batches` and `backward` as the loop calls them

LOSSES = {
    "grpo": dict(loss_type="grpo", beta=0.1, delta=1.5),
    "dr_grpo": dict(loss_type="dr_grpo", entropy_coef=0.02),
    "dapo": dict(loss_type="dapo", beta=0.1, epsilon_high=0.28),
    "cispo": dict(loss_type="cispo", epsilon_high=1.2),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence"),
    "quantile": dict(loss_type="dapo", top_entropy_quantile=0.3),
    "truncated": dict(loss_type="grpo", mask_truncated_completions=True, beta=0.1, temperature=0.7),
}


def options(**given) -> grpo.Config:
    sizes = dict(max_prompt_length=16, max_completion_length=12, tokens_per_microbatch=32)
    sizes["vllm_importance_sampling_correction"] = False  # what these rollouts were sampled by is made up
    return grpo.Config(**{"model": "m", "dataset": "d", "reward": ("random",)} | sizes | given)


def rollouts() -> Rollouts:
    """6 groups of 4 random completions of 1 to 12 tokens; the third group without signal, some of them truncated."""
    generator = torch.Generator().manual_seed(3)
    prompt_lengths, lengths = torch.tensor([3, 7, 1, 5, 16, 4]), torch.randint(1, 13, (6, 4), generator=generator)
    rewards = torch.randint(0, 4, (6, 4), generator=generator).float()
    rewards[2] = 1.5
    total = int(lengths.sum())
    made = Rollouts(
        prompt_tokens=torch.randint(17, (int(prompt_lengths.sum()),), generator=generator),
        prompt_lengths_P=prompt_lengths,
        tokens_R=torch.randint(17, (total,), generator=generator),
        lengths_PG=lengths,
        sampler_logprobs_R=torch.randn(total, generator=generator),
        truncated_PG=lengths > 9,
        versions_PG=torch.zeros_like(lengths),
        rewards_PGF=rewards[..., None],
        rewards_PG=rewards,
        advantages_PG=torch.zeros(6, 4),
    )
    return with_advantages(made, "group")


def step(policy, r: Rollouts, config, known=None, plan=None, world=ALONE) -> dict:
    """The loss of the whole step and the gradient, summed over ranks, of every parameter."""
    policy.zero_grad()
    fake = SimpleNamespace(world=world, config=config)
    plan = plan or grpo.micro_batches(r, config, world)
    metrics = grpo.backward(policy, r, dict(known or {}), plan, config, fake, 0)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in policy.named_parameters()}
    distributed.sum_(list(grads.values()), world)
    return {name: torch.tensor(metrics[name], dtype=torch.float64) for name in ("loss", "entropy")} | grads


def known_logprobs(policy, r: Rollouts) -> dict:
    """Old and reference log-probs far enough from the policy's that ratios are clipped on both sides."""
    config = options()
    everything = packing.plan_micro_batches(r.prompt_lengths_P.tolist(), r.lengths_PG.tolist(), 1000)
    logprobs_R, _ = experience.score(policy, r, everything, config, ALONE)
    generator = torch.Generator().manual_seed(4)
    return {name: logprobs_R + 0.3 * torch.randn(len(logprobs_R), generator=generator) for name in ("old", "reference")}


def assert_same(got: dict, expected: dict, tolerance: float) -> None:
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (got[name] - value).abs().max() / scale <= tolerance, (name, (got[name] - value).abs().max() / scale)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_samplers_mismatch_is_corrected(policy, mode):
    """Every token twice as likely to the trainer as to the sampler: its weight is 2, a sequence's 2^length."""
    r = rollouts()
    plan = packing.plan_micro_batches(r.prompt_lengths_P.tolist(), r.lengths_PG.tolist(), 1000)
    r = replace(r, sampler_logprobs_R=experience.score(policy, r, plan, options(), ALONE)[0] - math.log(2))
    given = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode}
    exponents = r.lengths_PG.clamp(max=60) if mode.startswith("sequence") else torch.ones_like(r.lengths_PG)
    for bound in (1.5, 3.0, 20.0, None):
        plan = grpo.micro_batches(r, options(), ALONE)
        got = step(policy, r, options(**given, vllm_importance_sampling_clip_max=bound), plan=plan)
        weights_PG, most = 2.0**exponents, torch.inf if bound is None else bound
        beyond_PG = torch.full_like(weights_PG, most) if mode.endswith("truncate") else torch.zeros_like(weights_PG)
        weighted_PG = r.advantages_PG * torch.where(weights_PG > most, beyond_PG, weights_PG)
        assert_same(got, step(policy, replace(r, advantages_PG=weighted_PG), options(), plan=plan), 1e-4)


def all_steps(rank: int, folder, results) -> None:
    """Every loss in both precisions, on and off policy, on as many processes as there are."""
    world = distributed.start("cpu", 60)
    r, tensors = rollouts(), {}
    for dtype in (torch.float64, torch.float32):
        policy, _ = checkpoint.load(folder, dtype)
        known = known_logprobs(policy, r)
        for name, given in LOSSES.items():
            for which in ("off", "on") if "beta" not in given else ("off",):
                plan = grpo.micro_batches(r, options(**given), world)
                assert len(plan) == world.size and all(plan), "a process without work proves nothing"
                got = step(policy, r, options(**given), known if which == "off" else {}, plan, world)
                tensors |= {f"{dtype} {name} {which} {key}": value for key, value in got.items()}
    if rank == 0:
        save_file(tensors, results)
    distributed.stop()


def test_one_two_and_four_processes_take_the_same_step(tiny, tmp_path):
    """Real processes over gloo: loss and every gradient, to 1e-12 in float64 and 1e-5 in float32."""
    results = {}
    for world in (1, 2, 4):
        outcome = apart(all_steps, world, tiny.folder / "model", tmp_path / f"{world}")
        assert outcome.codes == [0] * world, outcome.err
        results[world] = load_file(tmp_path / f"{world}")
    assert len(results[1]) > 200
    for world, (dtype, tolerance) in itertools.product((2, 4), {"torch.float64": 1e-12, "torch.float32": 1e-5}.items()):
        one, other = ({k: v for k, v in results[w].items() if k.startswith(dtype)} for w in (1, world))
        assert_same(other, one, tolerance)


@pytest.fixture(scope="module")
def policy(tiny):
    return checkpoint.load(tiny.folder / "model", torch.float64)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_no_division_and_no_order_changes_the_step(policy, name):
    """The entropy quantile among them: it is one threshold over the whole step."""
    r, config = rollouts(), options(**LOSSES[name])
    known = known_logprobs(policy, r)
    whole = step(policy, r, replace_option(config, tokens_per_microbatch=1000), known)
    assert_same(step(policy, r, config, known), whole, 1e-12)
    alone = [[[(p, [g])] for p, members in sum(grpo.micro_batches(r, config, ALONE)[0], []) for g in members]]
    assert_same(step(policy, r, config, known, alone), whole, 1e-12)
    order = [4, 2, 0, 5, 1, 3]
    index_R = torch.cat([torch.arange(r.span(p, 0).start, r.span(p, 3).stop) for p in order])
    shuffled = select_groups([r], [(0, p) for p in order])
    assert_same(step(policy, shuffled, config, {k: v[index_R] for k, v in known.items()}), whole, 1e-12)


def replace_option(config, **changes):
    return options(**{name: getattr(config, name) for name in vars(config)} | changes)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_groups_without_signal_are_skipped_and_counted(policy, name):
    r = rollouts()
    config = options(**LOSSES[name] | {"beta": 0.0, "entropy_coef": 0.0})
    known = known_logprobs(policy, r)
    plan = grpo.micro_batches(r, config, ALONE)
    assert {p for batch in plan[0] for p, _ in batch} == {0, 1, 3, 4, 5}
    everything = packing.plan_micro_batches(r.prompt_lengths_P.tolist(), r.lengths_PG.tolist(), 32)
    skipped, whole = step(policy, r, config, known, plan), step(policy, r, config, known, everything)
    assert_same(skipped, {key: value for key, value in whole.items() if key != "entropy"}, 1e-12)
    flat = step(policy, r, config, known, [[[(2, [0, 1, 2, 3])]]])
    assert all(value.eq(0).all() for key, value in flat.items() if key != "entropy")
    without = select_groups([r], [(0, p) for p in (0, 1, 3, 4, 5)])  # never sampled: the other tokens weigh more
    index_R = torch.cat([torch.arange(r.span(p, 0).start, r.span(p, 3).stop) for p in (0, 1, 3, 4, 5)])
    fewer = step(policy, without, config, {k: v[index_R] for k, v in known.items()})
    share = (len(without.tokens_R) / len(r.tokens_R)) if name in ("dapo", "cispo") else 20 / 24
    assert skipped["loss"].item() == pytest.approx(share * fewer["loss"].item(), rel=1e-9)


def test_nothing_is_skipped_that_something_else_pulls_at():
    r = rollouts()
    everything = set(itertools.product(range(6), range(4)))
    for given in (dict(beta=0.1), dict(entropy_coef=0.1), dict(loss_type="bnpo"), dict(top_entropy_quantile=0.5)):
        plan = grpo.micro_batches(r, options(**given), ALONE)
        assert {(p, g) for batch in plan[0] for p, members in batch for g in members} == everything


def test_truncated_completions_are_masked_and_not_counted(policy):
    """On policy the loss is minus the mean advantage of the tokens that are left."""
    r, config = rollouts(), options(loss_type="dapo", mask_truncated_completions=True)
    got = step(policy, r, config)["loss"]
    kept = ~r.truncated_PG
    assert 0 < r.truncated_PG.sum() < 24
    expected = -(r.advantages_PG * r.lengths_PG)[kept].double().sum() / r.lengths_PG[kept].sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_quantile_takes_the_tokens_of_highest_entropy(policy):
    """On policy the ratio is 1, so the loss is the sum of minus the advantages of the tokens that are kept."""
    r, config = rollouts(), options(top_entropy_quantile=0.25)
    everything = packing.plan_micro_batches(r.prompt_lengths_P.tolist(), r.lengths_PG.tolist(), 1000)
    _, entropy_R = experience.score(policy, r, everything, config, ALONE)
    kept_R = entropy_R >= numpy.quantile(entropy_R.numpy(), 0.75)
    assert abs(kept_R.sum() / len(kept_R) - 0.25) < 0.02
    expected = -(r.per_token(r.advantages_PG) * kept_R).sum() / len(kept_R)
    assert step(policy, r, config)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


# Whole runs


def recorded(monkeypatch, owner, name: str) -> list:
    """(arguments, result) of every call of owner.name from now on."""
    calls, original = [], getattr(owner, name)

    def wrapper(*arguments, **named):
        result = original(*arguments, **named)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_the_ids_trained_on_are_the_ids_sampled(tiny, tmp_path, monkeypatch):
    """End tokens too, and behind the prompt that they were sampled from."""
    sampled = recorded(monkeypatch, Engine, "generate")
    trained = recorded(monkeypatch, model.Model, "logprobs")
    ends(tiny.argv(tmp_path, reward="tagged", prompts_per_step=4, beta=0.1))  # which skips none
    drawn, seen = set(), set()
    for (_, prompts), groups in sampled:
        drawn |= {(*prompt, -1, *c.ids) for prompt, group in zip(prompts, groups) for c in group}
        assert all(c.ids[-1] == 0 for group in groups for c in group if c.finish_reason == "stop")
    for (_, pack, scored_T, temperature), _ in trained:
        bounds, tokens = pack.cu_seqlens.tolist(), pack.tokens_T.tolist()
        texts = [tokens[start:end] for start, end in itertools.pairwise(bounds)]
        seen |= {(*texts[prefix], -1, *text) for text, prefix in zip(texts, pack.prefixes) if prefix >= 0}
        assert scored_T.tolist() == [prefix >= 0 for prefix, text in zip(pack.prefixes, texts) for _ in text]
        assert temperature == 1.0
    assert seen == drawn and len(drawn) > 60 and any(ids[-1] == 0 for ids in seen)
    written = {tuple(row["completion_ids"]) for row in rows(tmp_path, "completions")}
    assert written == {ids[ids.index(-1) + 1 :] for ids in seen}


def answers_of(tiny) -> dict[str, int]:
    lines = (tiny.folder / "data.jsonl").read_text().splitlines()
    return {row["prompt"]: int(row["answer"]) for row in map(json.loads, lines)}


@pytest.mark.parametrize("world", [1, 2])
def test_rewards_stay_with_their_prompts(tiny, tmp_path, world):
    """The reward is a function of row and completion: work it out again from completions.jsonl, group by group."""
    outcome = launch(tiny.argv(tmp_path, reward="tagged", prompts_per_step=5, dynamic_sampling=1, eval_steps=2,
                               eval_dataset=tiny.folder / "data.jsonl"), world)  # fmt: skip
    assert outcome.codes == [0] * world, outcome.err
    answers = answers_of(tiny)
    everything = rows(tmp_path, "completions")
    written = [row for row in everything if row["used"]]
    assert len(written) == 4 * 5 * 4
    for row in everything:
        text = row["completion"].removesuffix("<eos>")
        expected = len(text) + answers[row["prompt"]] / 100 + len(row["prompt"]) / 1000
        assert row["reward"] == row["rewards"]["tagged"] == pytest.approx(expected)
    for start in range(0, len(written), 4):
        group = written[start : start + 4]
        assert len({row["prompt"] for row in group}) == 1
        rewards = torch.tensor([[row["reward"] for row in group]])
        torch.testing.assert_close(torch.tensor([[row["advantage"] for row in group]]), experience.advantages(rewards))
    assert len({row["prompt"] for row in written}) == 20  # no prompt twice before all of the 50 were there


def test_torchrun_with_two_processes_does_what_one_does(tiny, tmp_path):
    """The same completions in the first step, and metrics that differ by rounding alone."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = tiny.argv(tmp_path / "two", beta=0.05, num_iterations=2, eval_dataset=tiny.folder / "data.jsonl")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*torchrun, "-m", "minitrl.grpo", *argv], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1  # only one process speaks
    ends(replaced(argv, output_dir=tmp_path / "one"))
    one, two = (rows(tmp_path / name, "completions") for name in ("one", "two"))
    assert [row["completion_ids"] for row in one[:8]] == [row["completion_ids"] for row in two[:8]]
    for ours, theirs in zip(untimed(tmp_path / "one")[:3], untimed(tmp_path / "two")[:3], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in ours.items())


def replaced(argv: list[str], **options) -> list[str]:
    argv = list(argv)
    for name, value in options.items():
        argv[argv.index(f"--{name}") + 1] = str(value)
    return argv


def test_the_loss_on_policy_is_minus_the_mean_advantage(tiny, tmp_path):
    """-sum A L / sum L, over all tokens, also those of groups without signal; the ratio is 1 and nothing is clipped."""
    ends(tiny.argv(tmp_path, reward="rare", prompts_per_step=4))
    for row in steps(tmp_path):
        group = [r for r in rows(tmp_path, "completions") if r["step"] == row["step"]]
        lengths = [len(r["completion_ids"]) for r in group]
        expected = -sum(r["advantage"] * n for r, n in zip(group, lengths)) / sum(lengths)
        assert row["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert row["trained_tokens"] == sum(n for r, n in zip(group, lengths) if r["advantage"])
        assert row["clip_ratio/region_mean"] == 0
        assert row.get("sampling/sampling_logp_difference/max", 0) < 1e-4  # float32: sampler and trainer agree
        assert row.get("sampling/kl", 0) < 1e-8
    assert {row["frac_reward_zero_std"] for row in steps(tmp_path)} > {0.5}  # some with, some without


def test_the_temperature_is_that_of_sampling(tiny, tmp_path):
    """The log-probs that are trained, and the reference's, are of the distribution that was sampled from."""
    ends(tiny.argv(tmp_path, reward="tagged", temperature=0.6, beta=0.1))
    assert abs(steps(tmp_path)[0]["kl"]) < 1e-9
    assert max(row["sampling/sampling_logp_difference/max"] for row in steps(tmp_path)) < 1e-4


def test_later_iterations_are_off_policy(tiny, tmp_path, monkeypatch):
    """The old log-probs are those from before the first update: the second iteration clips. The reference's log-probs are
    worked out once for a generation."""
    passes = recorded(monkeypatch, experience, "score")
    options = dict(num_iterations=3, max_steps=6, lr_scheduler_type="constant", beta=0.05)
    ends(tiny.argv(tmp_path, reward="tagged", **options))
    assert len(passes) == 2
    clipped = [row["clip_ratio/region_mean"] for row in steps(tmp_path)]
    assert clipped[0] == clipped[3] == 0 and min(clipped[1:3] + clipped[4:]) > 0.01
    assert [row["step"] for row in rows(tmp_path, "completions")] == [1] * 8 + [4] * 8
    assert ["sampling/kl" in row for row in steps(tmp_path)] == [True, False, False] * 2
    tokens = [row["num_tokens"] for row in steps(tmp_path)]  # counted once, however often they are trained on
    assert tokens[0] == tokens[2] < tokens[3] == tokens[5]


def test_the_reference_policy_is_where_training_began(tiny, tmp_path):
    """KL 0 at first, above it later; with --sync_ref_model and a mixture of 1 it is the policy of the step before."""
    ends(tiny.argv(tmp_path / "a", beta=0.05))
    kl = [row["kl"] for row in steps(tmp_path / "a")]
    assert abs(kl[0]) < 1e-9 and min(kl[1:]) > 1e-4
    ends(tiny.argv(tmp_path / "b", beta=0.05, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0))
    assert max(abs(row["kl"]) for row in steps(tmp_path / "b")) < 1e-9
    ends(tiny.argv(tmp_path / "c", beta=0.0))
    assert "kl" not in steps(tmp_path / "c")[0]


def test_a_bfloat16_reference_moves_by_small_mixtures():
    """A thousandth of the way, a thousand times; a bfloat16 weight of 1 cannot take a single one of these steps."""
    reference, policy = (torch.nn.Linear(3, 3, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2))
    for made, value in ((reference, 1.0), (policy, 1.5)):
        for p in made.parameters():
            p.fill_(value)
    mixture = {name: p.float() for name, p in reference.named_parameters()}
    for _ in range(1000):
        grpo.mix(reference, mixture, policy, 1e-3)
    for name, p in reference.named_parameters():
        assert mixture[name].mean().item() == pytest.approx(1.5 - 0.5 * 0.999**1000, rel=1e-4)
        assert torch.equal(p, mixture[name].bfloat16())


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("reward", ["equal", "never"])
def test_rewards_that_say_nothing_move_nothing(tiny, tmp_path, reward):
    """All equal, or None for every sample: gradient 0, no NaN, weights as they were."""
    outcome = ends(tiny.argv(tmp_path, reward=reward, log_completions=True, eval_dataset=tiny.folder / "data.jsonl"))
    for row in steps(tmp_path):
        assert row["loss"] == row["grad_norm"] == 0 and row["trained_tokens"] == 0
        assert row["frac_reward_zero_std"] == 1 and row["frac_reward_none"] == (reward == "never")
        assert None not in row.values()
    assert all(row["advantage"] == 0 for row in rows(tmp_path, "completions"))
    before, after = weights(tiny.folder / "model"), weights(tmp_path / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ("reward" in steps(tmp_path)[0]) == (reward == "equal") and ("none  " in outcome.out) == (reward == "never")


def test_equal_rewards_with_a_kl_penalty_are_still_finite(tiny, tmp_path):
    ends(tiny.argv(tmp_path, reward="equal", beta=0.1, scale_rewards="batch"))
    assert all(row["loss"] == pytest.approx(0, abs=1e-6) and row["trained_tokens"] > 0 for row in steps(tmp_path))


@pytest.mark.parametrize("estimator, generations", [("rloo", 4), ("reinforce_plus_plus", 4), ("reinforce_plus_plus", 1)])
def test_other_advantages(tiny, tmp_path, estimator, generations):
    """The advantages of the named estimator are those that are written down, and that the loss is made of."""
    ends(tiny.argv(tmp_path, reward="tagged", advantage_estimator=estimator, num_generations=generations,
                   prompts_per_step=4))  # fmt: skip
    for row in steps(tmp_path):
        group = [r for r in rows(tmp_path, "completions") if r["step"] == row["step"]]
        rewards = torch.tensor([r["reward"] for r in group]).view(4, generations)
        lengths = torch.tensor([len(r["completion_ids"]) for r in group]).view(4, generations)
        expected = experience.advantages(rewards, estimator=estimator, lengths_PG=lengths)
        got = torch.tensor([r["advantage"] for r in group]).view(4, generations)
        torch.testing.assert_close(got, expected)
        assert got.ne(0).any() and row["reward_std"] > 0
        assert row["loss"] == pytest.approx(-(got * lengths).sum().item() / lengths.sum().item(), rel=1e-4, abs=5e-6)


def test_several_rewards_are_weighted(tiny, tmp_path):
    ends(tiny.argv(tmp_path, reward="share_of_a tagged", reward_weights=(2, -0.5)))
    for row in rows(tmp_path, "completions"):
        expected = 2 * row["rewards"]["share_of_a"] - 0.5 * row["rewards"]["tagged"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
    last = [row for row in rows(tmp_path, "completions") if row["step"] == 4]
    for name in ("share_of_a", "tagged"):
        values = torch.tensor([row["rewards"][name] for row in last])
        assert steps(tmp_path)[-1][f"rewards/{name}/mean"] == pytest.approx(values.mean().item(), abs=1e-5)
        assert steps(tmp_path)[-1][f"rewards/{name}/std"] == pytest.approx(values.std().item(), abs=1e-5)


def test_a_reward_for_each_domain(tiny, tmp_path):
    """None where a reward does not apply; a sample to which none applies is left out of its group and counted."""
    ends(tiny.argv(tmp_path, reward="even odd", prompts_per_step=8))
    answers = answers_of(tiny)
    for row in rows(tmp_path, "completions"):
        wanted, other = ("even", "odd") if answers[row["prompt"]] % 2 == 0 else ("odd", "even")
        assert row["rewards"][other] is None
        assert row["rewards"][wanted] == row["reward"] == row["completion"].count("a" if wanted == "even" else "b")
    assert {row["frac_reward_none"] for row in steps(tmp_path)} == {0.0}
    ends(tiny.argv(tmp_path / "even", reward="even", prompts_per_step=8))
    none = [row for row in rows(tmp_path / "even", "completions") if row["reward"] is None]
    assert none and all(row["advantage"] == 0 for row in none)
    assert sum(row["frac_reward_none"] for row in steps(tmp_path / "even")) == pytest.approx(len(none) / 32)


def test_dynamic_sampling_replaces_groups_without_signal(tiny, tmp_path, monkeypatch):
    """A group of `rare` in five has signal: in four more generations a step finds its four."""
    argv = tiny.argv(tmp_path / "with", reward="rare", prompts_per_step=4, dynamic_sampling=6)
    generations = recorded(monkeypatch, experience, "generate_and_score")
    ends(argv)
    many = len(generations)
    assert 4 < many <= 4 * 7
    ends(tiny.argv(tmp_path / "without", reward="rare", prompts_per_step=4))
    assert len(generations) == many + 4
    flat = {name: [row["frac_reward_zero_std"] for row in steps(tmp_path / name)] for name in ("with", "without")}
    assert sum(flat["with"]) <= 0.25 and sum(flat["without"]) >= 2
    for number in range(1, 5):
        written = [row for row in rows(tmp_path / "with", "completions") if row["step"] == number]
        group = [row["prompt"] for row in written if row["used"]]
        assert len(group) == 16 and len(set(group)) == 4
    assert "sampling/generations" not in steps(tmp_path / "without")[0]


def test_dynamic_sampling_is_bounded(tiny, tmp_path, monkeypatch):
    generations = recorded(monkeypatch, experience, "generate_and_score")
    scored = recorded(monkeypatch, rewards, "score")
    ends(tiny.argv(tmp_path, reward="equal", max_steps=2, dynamic_sampling=3))
    assert len(generations) == 2 * (1 + 3)
    assert [arguments[7] for arguments, _ in scored] == [0, 8, 16, 24] * 2  # so a coin is tossed anew for each
    written = rows(tmp_path, "completions")
    used = [row for row in written if row["used"]]
    assert len(used) == 2 * 8  # filled up: a step has as many groups as was asked for
    assert len(written) == 2 * 4 * 8 and all(row["advantage"] is None for row in written if not row["used"])
    tokens = sum(len(row["completion_ids"]) for row in written) + sum(len(row["prompt"]) for row in written) / 4
    assert steps(tmp_path)[-1]["num_tokens"] == tokens
    for row in steps(tmp_path):
        assert row["sampling/generations"] == 4 and row["sampling/groups_discarded"] == 6
        assert row["tokens_per_second"] * row["step_time"] > 2.5 * tokens / 8


def test_all_completions_truncated(tiny, tmp_path, monkeypatch):
    """With --mask_truncated_completions nothing is left to learn from: loss 0, no NaN, and a warning that says why."""
    original = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *a, **named: original(*a, **named, ignore_eos=True))
    outcome = ends(tiny.argv(tmp_path, reward="tagged", mask_truncated_completions=True, max_completion_length=7))
    assert outcome.out.count("warning") == 1
    assert "100% of the completions ran into --max_completion_length 7" in outcome.out
    for row in steps(tmp_path):
        assert row["loss"] == row["grad_norm"] == row["trained_tokens"] == 0 and row["completions/clipped_ratio"] == 1
        assert None not in row.values() and "completions/mean_terminated_length" not in row


def test_completions_of_one_token(tiny, tmp_path):
    """The end token at once, or nothing but a truncated token."""
    ends(tiny.argv(tmp_path, max_completion_length=1, reward="tagged"))
    assert {len(row["completion_ids"]) for row in rows(tmp_path, "completions")} == {1}
    assert {row["finish_reason"] for row in rows(tmp_path, "completions")} == {"length", "stop"}


def test_the_overlong_penalty_is_part_of_the_reward(tiny, tmp_path):
    ends(tiny.argv(tmp_path, reward="equal", overlong_cache=4))
    for row in rows(tmp_path, "completions"):
        assert row["rewards"]["equal"] == pytest.approx(0.1)
        assert row["reward"] == pytest.approx(0.1 + min(0, (8 - len(row["completion_ids"])) / 4))


def test_gradient_checkpointing_changes_no_bit(tiny, tmp_path, monkeypatch):
    layers = recorded(monkeypatch, model, "checkpoint")
    for name in ("off", "on"):
        assert not layers
        ends(tiny.argv(tmp_path / name, beta=0.1, num_iterations=2, gradient_checkpointing=name == "on"))
    assert layers
    assert untimed(tmp_path / "on") == untimed(tmp_path / "off")
    on, off = weights(tmp_path / "on" / "final"), weights(tmp_path / "off" / "final")
    assert all(torch.equal(on[name], off[name]) for name in on)


def test_bfloat16_trains_too(tiny, tmp_path):
    ends(tiny.argv(tmp_path, dtype="bfloat16", gradient_checkpointing=False))
    for row in steps(tmp_path):
        name = "sampling/sampling_logp_difference"
        assert 0 < row[f"{name}/mean"] < 0.05 and row[f"{name}/mean"] < row[f"{name}/max"] and row["sampling/kl"] < 1e-2
    assert {tensor.dtype for tensor in weights(tmp_path / "final").values()} == {torch.bfloat16}


def test_fewer_prompts_than_a_step_takes(tiny, tmp_path):
    """Epochs run into each other: one row is drawn again and again, with other random numbers."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    ends(tiny.argv(tmp_path / "run", dataset=tmp_path / "one.jsonl", max_steps=None, num_train_epochs=4))
    assert len(steps(tmp_path / "run")) == 2  # 4 epochs of one row, two prompts a step
    assert len({tuple(row["completion_ids"]) for row in rows(tmp_path / "run", "completions")}) > 8


def test_prompts_that_are_too_long_are_left_out_and_counted(tiny, tmp_path):
    prompts = ["1+1=", "1" * 17, "2+2=", "1" * 16, "3" * 40]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    outcome = ends(tiny.argv(tmp_path / "run", dataset=tmp_path / "long.jsonl", reward="tagged"))
    assert "long.jsonl: 2 prompts are above --max_prompt_length 16 and left out" in outcome.out
    assert {row["prompt"] for row in rows(tmp_path / "run", "completions")} == {"1+1=", "2+2=", "1" * 16}


def test_cut_sampling_is_said(tiny, tmp_path):
    outcome = ends(tiny.argv(tmp_path, top_k=3, max_steps=1))
    assert "warning: --top_p, --top_k, --min_p and --repetition_penalty change what is sampled" in outcome.out
    assert steps(tmp_path)[0]["sampling/kl"] > 0.01


@pytest.mark.parametrize("reward, words", [("equal", "got equal rewards"), ("never", "no reward applied")])
def test_rewards_that_go_on_saying_nothing_are_said(tiny, tmp_path, reward, words):
    outcome = ends(tiny.argv(tmp_path, reward=reward, max_steps=7, max_completion_length=4))
    assert outcome.out.count("generations in a row") == 1
    assert re.search(f"warning: step 5: .*{words}.*5 generations in a row", outcome.out), outcome.out


def test_the_curve_is_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    ends(tiny.argv(tmp_path / "run", plot=tmp_path / "curve.svg"))
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def mean_rewards(folder) -> tuple[float, float]:
    """Of the first and of the last five steps."""
    values = [row["reward"] for row in steps(folder)]
    return sum(values[:5]) / 5, sum(values[-5:]) / 5


def test_learns(tiny, tmp_path):
    """Rewarded for the letter a, within 25 steps most of what is written is a; by the toss of a coin, it is not."""
    options = dict(max_steps=25, prompts_per_step=4, num_generations=8, tokens_per_microbatch=512)
    ends(tiny.argv(tmp_path / "a", **options))
    first, last = mean_rewards(tmp_path / "a")
    assert first < 0.5 and last > 0.8, (first, last)
    ends(tiny.argv(tmp_path / "b", **options | {"reward": "random"}))
    written = [row["completion"].removesuffix("<eos>") for row in rows(tmp_path / "b", "completions")[-160:]]
    assert sum(text.count("a") for text in written) / max(1, sum(map(len, written))) < 0.4


# Bad input: one line that names the option, no traceback, and nothing left behind that looks like a run


def said(outcome, code: int = 1) -> str:
    assert outcome.code == code and outcome.err.count("\n") == 1 and "error: " in outcome.err, outcome
    return outcome.err


EMBEDDED = dict(model=None, dataset=None, max_prompt_length=None, tokens_per_microbatch=1000)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(learning_rte=1), "--learning_rte: .*--learning_rate"),
        (dict(num_generations=1), "--num_generations 1: must be at least 2"),
        (dict(advantage_estimator="gae"), "--advantage_estimator.*'gae'.*grpo, rloo, reinforce_plus_plus"),
        (dict(num_generations=1, advantage_estimator="rloo"), "--num_generations 1: must be at least 2"),
        (dict(num_generations=0, advantage_estimator="reinforce_plus_plus"), "--num_generations 0: must be at least 1"),
        (dict(scale_rewards="batch", advantage_estimator="rloo"), "--scale_rewards batch: must be left out with"),
        (dict(dynamic_sampling=1, advantage_estimator="reinforce_plus_plus"), "--dynamic_sampling 1: must be left out"),
        (dict(tokens_per_microbatch=27), "--tokens_per_microbatch 27: must be at least .*28"),
        (dict(max_steps=0), "--max_steps 0"),
        (dict(temperature=0), "--temperature 0.0: must be above 0"),
        (dict(epsilon=-1), "--epsilon -1"),
        (dict(beta="nan"), "--beta"),
        (dict(beta=-0.1), "--beta -0.1"),
        (dict(loss_type="gspo"), "--loss_type.*'gspo'.*dapo"),
        (dict(loss_type="cispo"), "--epsilon_high None: must be given for cispo"),
        (dict(delta=1.1), "--delta 1.1: must be above 1 \\+ epsilon"),
        (dict(reward_weights=(1, 2)), "--reward_weights .*: must be 1 numbers"),
        (dict(sync_ref_model=True), "--sync_ref_model True: must be off at --beta 0"),
        (dict(top_entropy_quantile=0), "--top_entropy_quantile 0.0"),
        (dict(overlong_cache=13), "--overlong_cache 13"),
        (dict(dynamic_sampling=-1), "--dynamic_sampling -1"),
        (dict(reward_timeout=0), "--reward_timeout 0.0"),
        (dict(reward_timeout=1e10), "--reward_timeout 10000000000.0: must be above 0 and at most 1e6"),
        (dict(delta=1.25, epsilon_high=0.28), "--delta 1.25: must be above 1 \\+ epsilon_high = 1.28"),
        (dict(delta=7, loss_type="cispo", epsilon_high=5), "--delta 7.0: must be left out"),
        (dict(EMBEDDED, max_prompt_length=16), "--max_prompt_length 16: must be left out without --model"),
        (dict(EMBEDDED, dtype="bfloat16"), "--dtype bfloat16: must be float32 without --model"),
        (dict(EMBEDDED, eval_dataset="x.jsonl"), "--eval_dataset x.jsonl: must be left out without --model"),
        (dict(eval_steps=1), "--eval_steps 1: must be given with --eval_dataset"),
        (dict(dataset=None), "--model .*: must be given together with --dataset"),
        (dict(model=None), "--dataset .*: must be given together with --model"),
        (dict(plot="curve.gif"), "--plot curve.gif"),
    ],
)  # fmt: skip
def test_bad_options(tiny, tmp_path, given, words):
    """Said before anything is touched."""
    assert re.search(words, said(run(tiny.argv(tmp_path / "run", **given)), 2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(reward="no_such"), r"rewards.py has no function 'no_such'"),
        (dict(reward="share_of_b"), r"has no function 'share_of_b'; did you mean 'share_of_a'"),
        (dict(eval_reward="no_such"), r"--eval_reward no_such: neither file.py:function"),
        pytest.param(dict(plot="/nowhere/curve.svg"), r"cannot write /nowhere/curve.svg", marks=DRAWS),
        (dict(reward="wants"), r"reward 'wants' asks for solution, but the data set's columns are answer"),
        (dict(model="/nowhere/model"), r"--model '/nowhere/model': no such folder"),
        (dict(dataset="/nowhere/data.jsonl"), r"/nowhere/data.jsonl: no such file"),
        (dict(max_prompt_length=3), r"data.jsonl: all 50 prompts are longer than --max.prompt.length 3"),
        (dict(max_completion_length=60, tokens_per_microbatch=99), r"--max_completion_length 60: must be at most 59"),
    ],
)  # fmt: skip
def test_bad_places_and_lengths(tiny, tmp_path, given, words):
    assert re.search(words, said(run(tiny.argv(tmp_path / "run", **given))))
    ends(tiny.argv(tmp_path / "run", max_steps=1))  # the folder can be used for a run that works


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"prompt": "1+1="}\n{"prompt": "1+1="\n', r"bad.jsonl:2: bad JSON"),
        ('\n\n[1]\n', r"bad.jsonl:3: one JSON object a line"),
        ('{"prompt": "1+1=", "x": NaN}\n', r"bad.jsonl:1: NaN is not JSON"),
        ('{"prompt": null}\n', r"bad.jsonl:1: prompt must be text"),
        ('{"question": "1+1="}\n', r"bad.jsonl:1: no \"prompt\""),
        ('{"prompt": [{"role": "robot", "content": "hi"}]}\n', r"bad.jsonl:1: role must be one of"),
        ('{"prompt": [{"role": "user", "content": "hi"}]}\n', r"bad.jsonl:1: .*chat.template"),
        ('{"prompt": "\\ud800"}\n', r"bad.jsonl:1: "),
        ("", r"bad.jsonl: no rows; the file is empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["dataset", "eval_dataset"])
def test_bad_data(tiny, tmp_path, content, words, which):
    (tmp_path / "bad.jsonl").write_text(content)
    assert re.search(words, said(run(tiny.argv(tmp_path / "run", **{which: tmp_path / "bad.jsonl"}))))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_without_weights(tiny, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (tiny.folder / "model").glob("*.json"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    assert "safetensors" in said(run(tiny.argv(tmp_path / "run", model=tmp_path / "model")))
    (tmp_path / "model" / "config.json").unlink()
    assert "config.json" in said(run(tiny.argv(tmp_path / "run", model=tmp_path / "model")))


@pytest.mark.parametrize(
    "reward, words",
    [
        ("raises", r"reward 'raises' raised KeyError: 'no such key' \(.*rewards.py:\d+\)"),
        ("hangs", r"reward 'hangs' did not return within 0.5 s \(--reward.timeout\)"),
        ("too_few", r"reward 'too_few' returned 1 values for 8 samples"),
        ("not_a_number", r"reward 'not_a_number' gave sample 0 nan; return None"),
        ("words", r"reward 'words' gave sample 0 'good', which is neither a number nor None"),
    ],
)  # fmt: skip
def test_bad_rewards(tiny, tmp_path, reward, words):
    assert re.search(words, said(run(tiny.argv(tmp_path, reward=reward, reward_timeout=0.5))))


def test_a_reward_that_fails_later_can_be_mended(tiny, tmp_path):
    """It raises in the third step: what is saved is whole, and with the file mended the run goes on to the same end."""
    good = "def mine(completions, step):\n    return [c.count('a') / 9 for c in completions]\n"
    (tmp_path / "mine.py").write_text(good)
    argv = replaced(tiny.argv(tmp_path / "run", save_steps=1), reward=f"{tmp_path / 'mine.py'}:mine")
    assert launch(replaced(argv, output_dir=tmp_path / "whole")).code == 0
    (tmp_path / "mine.py").write_text(good.replace("c in", "c in [None] * (step == 2) +"))
    assert re.search(r"'mine' raised AttributeError: .*mine.py:2\)", said(launch(argv)))
    assert steps(tmp_path / "run")[-1]["step"] == 2
    (tmp_path / "mine.py").write_text(good)
    assert launch([*argv, "--resume"]).code == 0
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert weights(tmp_path / "run" / "final").keys() == weights(tmp_path / "whole" / "final").keys()


def poisoned_loss(which: int) -> None:
    """The loss of micro-batch number `which` of the run is NaN."""
    original, count = losses.grpo_loss, itertools.count(1)

    def poisoned(*arguments, **named):
        loss, metrics = original(*arguments, **named)
        return (loss * float("nan") if next(count) == which else loss), metrics

    losses.grpo_loss = poisoned


def poisoned_gradient(which: int) -> None:
    """Update number `which` finds an infinite gradient."""
    original, count = training.Optimizer.step, itertools.count(1)

    def poisoned(self, rate):
        if next(count) == which:
            next(iter(self.parameters.values())).grad[0, 0] = float("inf")
        return original(self, rate)

    training.Optimizer.step = poisoned


@pytest.mark.parametrize(
    "poison, words",
    [(poisoned_loss, "the loss is nan"), (poisoned_gradient, "the gradient's norm is (inf|nan)")],
)
def test_not_finite_stops_before_the_update(tiny, tmp_path, monkeypatch, poison, words):
    for owner, name in ((losses, "grpo_loss"), (training.Optimizer, "step")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    argv = tiny.argv(tmp_path, reward="tagged", save_steps=1, tokens_per_microbatch=1000)  # one micro-batch a step
    saved, backward = [], grpo.backward

    def watched(policy, *arguments):
        saved[:] = policy, {name: p.detach().clone() for name, p in policy.named_parameters()}
        return backward(policy, *arguments)

    monkeypatch.setattr(grpo, "backward", watched)
    poison(3)
    line = said(run(argv))
    assert re.search(f"error: step 3: {words}; nothing was updated, .* {tmp_path}/not_finite_step_3_rank_", line)
    policy, before = saved
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    dump = json.loads((tmp_path / "not_finite_step_3_rank_0.json").read_text())
    assert dump["step"] == 3 and re.match(words, dump["error"])
    assert [len(group["completions"]) for group in dump["groups"]] == [4, 4]
    assert [row["step"] for row in steps(tmp_path)] == [1, 2]
    monkeypatch.undo()
    assert run([*argv, "--resume"]).code == 0
    again = [row["completion_ids"] for row in rows(tmp_path, "completions") if row["step"] == 3]
    assert sorted(again) == sorted(ids for group in dump["groups"] for ids in group["completions"])


@pytest.mark.parametrize("poison", [poisoned_loss, poisoned_gradient])
def test_not_finite_on_one_process_stops_both(tiny, tmp_path, poison):
    argv = tiny.argv(tmp_path, reward="tagged", tokens_per_microbatch=1000)
    outcome = launch(argv, 2, hooks={1: functools.partial(poison, 2)})
    assert outcome.codes == [1, 1] and "Traceback" not in outcome.err
    [number] = {int(number) for number in re.findall(r"error: step (\d): the ", outcome.err)}
    assert outcome.err.count("\n") == 2 and steps(tmp_path)[-1]["step"] == number - 1
    assert (tmp_path / f"not_finite_step_{number}_rank_1.json").exists()


def test_a_reward_that_raises_on_one_process_of_two(tiny, tmp_path):
    """The other says in one line where it stood, no process is left waiting, and the steps before are saved."""
    (tmp_path / "mine.py").write_text(
        "def mine(completions, first_index, step):\n"
        "    return [1.0 / (1 - (first_index > 0 and step == 2))] * len(completions)\n"
    )
    argv = replaced(tiny.argv(tmp_path / "run"), reward=f"{tmp_path / 'mine.py'}:mine")
    outcome = launch(argv, 2)
    assert outcome.codes == [1, 1] and "Traceback" not in outcome.err
    other = "error: rank 0 of 2, sampling and scoring: another process failed"
    for line in ("error: reward 'mine' raised ZeroDivisionError", other):
        assert line in outcome.err
    assert "step 2 is saved; --resume goes on from there" in outcome.out
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "state.json").exists()


def test_an_evaluation_that_fails_costs_no_step(tiny, tmp_path):
    mine = "def mine(completions, step):\n    return [1.0 / (2 - step)] * len(completions)\n"
    (tmp_path / "mine.py").write_text(mine)
    argv = tiny.argv(tmp_path / "run", eval_dataset=tiny.folder / "data.jsonl", eval_steps=2,
                     eval_reward=f"{tmp_path / 'mine.py'}:mine")  # fmt: skip
    outcome = run(argv)
    assert "'mine' raised ZeroDivisionError" in said(outcome) and "step 2 is saved" in outcome.out
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    (tmp_path / "mine.py").write_text(mine.replace("/ (2 - step)", ""))
    assert "going on after step 2" in launch([*argv, "--resume"]).out
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_weights_that_are_not_whole_are_not_saved(tiny, tmp_path, monkeypatch):
    """The error comes amid the third update."""
    original, count = training.Optimizer._round_masters, itertools.count(1)

    def breaks(self):
        if next(count) == 3:
            raise ArithmeticError("broken")
        original(self)

    monkeypatch.setattr(training.Optimizer, "_round_masters", breaks)
    assert "broken" in said(run(tiny.argv(tmp_path)))
    assert len(steps(tmp_path)) == 2 and not (tmp_path / "checkpoints").exists()


# What has to be the same: on all processes, and before and after a resume


def train_each(rank: int, argvs) -> None:
    runs.command(functools.partial(grpo.main, argvs[rank]))


def test_processes_that_are_not_of_one_run_are_refused(tiny, tmp_path):
    """Other options, rows and weights; then, in a resumed run, no checkpoint where the other has one."""
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    data = (tiny.folder / "data.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(data.replace('"answer": "9"', '"answer": "8"'))
    argv = tiny.argv(tmp_path / "run", save_steps=2)
    other = replaced(argv, learning_rate=0.02, model=tmp_path / "model", dataset=tmp_path / "data.jsonl")
    outcome = apart(train_each, 2, [argv, other])
    assert outcome.codes == [1, 1] and outcome.err.count("error: the processes are not of one run: ") == 2, outcome
    assert "--learning_rate is 0.01 on rank 0 and 0.02 on rank 1" in outcome.err
    assert all(f"{name} is " in outcome.err for name in ("--dataset", "--model", "a digest of the weights"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

    ends(replaced(argv, max_steps=2))
    outcome = apart(train_each, 2, [[*argv, "--resume"], [*replaced(argv, output_dir=tmp_path / "apart"), "--resume"]])
    assert outcome.codes == [1, 1] and "an --output_dir that all machines share" in outcome.err
    assert outcome.err.count("the newest checkpoint's step is 2 on rank 0 and None on rank 1") == 2, outcome
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_a_resume_with_other_data_is_refused_by_name(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "tiny")
    places = {name: tmp_path / "tiny" / file for name, file in
              dict(dataset="data.jsonl", eval_dataset="eval.jsonl", model="model", reward="rewards.py").items()}
    shutil.copy(places["dataset"], places["eval_dataset"])
    options = {name: places[name] for name in ("dataset", "eval_dataset", "model")} | {"max_steps": 1}
    argv = replaced(tiny.argv(tmp_path / "run", **options), reward=f"{places['reward']}:share_of_a")
    ends(argv)
    argv = [*replaced(argv, max_steps=2), "--resume"]
    config = places["model"] / "config.json"
    for name, file, old, new in (
        ("--dataset", places["dataset"], '"answer": "9"', '"answer": "8"'),
        ("--eval_dataset", places["eval_dataset"], '"1+1="', '"1+2="'),
        ("--model", config, '"max_position_embeddings": 64', '"max_position_embeddings": 63'),
    ):
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new))
        line = said(run(argv))
        assert f"--resume: changed since the run began: what is in {name}. Put the old contents back" in line
        file.write_text(before)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]
    places["reward"].write_text(REWARDS + "# mended")
    assert f"--resume: --reward {places['reward']} was changed since step 1" in ends(argv).out


def test_fewer_steps_than_are_done_are_refused(tiny, tmp_path):
    ends(tiny.argv(tmp_path, max_steps=3))
    before = (tmp_path / "config.json").read_bytes()
    assert "the checkpoint is of step 3, but --max_steps" in said(run([*tiny.argv(tmp_path, max_steps=2), "--resume"]))
    assert before == (tmp_path / "config.json").read_bytes()


def test_a_foreign_file_in_the_final_folder_is_found_at_once(tiny, tmp_path):
    ends(tiny.argv(tmp_path, max_steps=1))
    (tmp_path / "final" / "notes.txt").write_text("mine")
    assert re.search(r"final holds other files \(notes.txt\)", said(run([*tiny.argv(tmp_path), "--resume"])))
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_a_template_sees_the_time_at_which_the_run_began(tiny, tmp_path):
    """Prompts that hold the time are the same after a resume, or the data would be other data."""
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ strftime_now('%H%M%S') }}{{ messages[0].content }}")
    (tmp_path / "data.jsonl").write_text('{"prompt": [{"role": "user", "content": "+"}]}\n')
    options = dict(model=tmp_path / "model", dataset=tmp_path / "data.jsonl")
    ends(tiny.argv(tmp_path / "run", max_steps=1, **options))
    time.sleep(1.1)
    ends([*tiny.argv(tmp_path / "run", max_steps=2, **options), "--resume"])
    assert len({row["prompt"] for row in rows(tmp_path / "run", "completions")}) == 1


def test_the_module_is_a_command(tiny, tmp_path):
    """`python -m minitrl.grpo`: its exit status and the one line, of a process that nobody prepared."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "minitrl.grpo", *tiny.argv(tmp_path / "run", model=tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and re.fullmatch(r"error: --model .*: no such folder.*\n", done.stderr), done.stderr
