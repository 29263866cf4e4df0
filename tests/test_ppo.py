"""`python -m minitrl.ppo`: GAE, whitening and the clipped losses by their formulas, the whole update against a second
derivation in plain padded PyTorch, and whole runs: resumed, divided, on several processes, on bad input.

Many tests are a line each of the public lists of implementation details of RLHF with PPO (arXiv 2403.17031).
"""

import functools
import itertools
import json
import math
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from faults import mutant
from miniature import apart, launch, rows, run, steps, untimed
from safetensors.torch import load_file, save_file
from test_resume import at, die

from minitrl import checkpoint, distributed, experience, losses, ppo, toy, training
from minitrl.experience import Rollouts
from minitrl.model import with_scalar_head
from minitrl.packing import pack

ALONE = distributed.World(0, 1, torch.device("cpu"))


# The formulas


def series(seed: int = 0, lengths=(5, 1, 3, 8)) -> tuple:
    g = torch.Generator().manual_seed(seed)
    return *torch.randn(2, sum(lengths), generator=g, dtype=torch.float64), list(lengths)


def by_definition(rewards, values, lengths, gamma: float, lam: float) -> list[float]:
    """A_t as the sum over l of (gamma lam)^l delta_{t+l}, completion by completion."""
    found, start = [], 0
    for n in lengths:
        r, v = rewards[start : start + n].tolist(), [*values[start : start + n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        found += [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        start += n
    return found


def check_gae():
    for seed, gamma, lam in itertools.product(range(3), (1.0, 0.9, 0.0), (1.0, 0.95, 0.5, 0.0)):
        rewards, values, lengths = series(seed)
        advantages, returns = losses.gae(rewards, values, lengths, gamma, lam)
        assert advantages.tolist() == pytest.approx(by_definition(rewards, values, lengths, gamma, lam), abs=1e-12)
        assert torch.equal(returns, advantages + values)


def test_gae_is_the_sum_over_deltas():
    check_gae()


def test_gae_with_gamma_and_lambda_1_is_the_reward_to_go():
    rewards, values, lengths = series()
    _, returns = losses.gae(rewards, values, lengths, 1.0, 1.0)
    to_go = [part.flip(0).cumsum(0).flip(0) for part in rewards.split(lengths)]
    torch.testing.assert_close(returns, torch.cat(to_go))


def test_gae_with_lambda_0_is_the_temporal_difference():
    rewards, values, lengths = series()
    advantages, _ = losses.gae(rewards, values, lengths, 0.9, 0.0)
    following = torch.cat([torch.cat([part[1:], torch.zeros(1)]) for part in values.split(lengths)])
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


def test_gae_of_nothing_and_of_empty_completions():
    rewards, values, _ = series(0, (3, 2))
    with_empty, without = (losses.gae(rewards, values, n)[0] for n in ([0, 3, 0, 2, 0], [3, 2]))
    assert torch.equal(with_empty, without)
    assert losses.gae(torch.zeros(0), torch.zeros(0), [])[0].shape == (0,)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean):
    x = torch.randn(1000, dtype=torch.float64) * 3 + 5
    got = losses.whiten(x, shift_mean)
    assert got.std().item() == pytest.approx(1, rel=1e-6)  # the unbiased one
    assert got.mean().item() == pytest.approx(0 if shift_mean else x.mean().item(), abs=1e-9)
    assert losses.whiten(x[:1], shift_mean).tolist() == pytest.approx([0 if shift_mean else x[0].item()])
    assert losses.whiten(x[:0], shift_mean).shape == (0,)


def test_kl_estimates():
    """k1 = the log-ratio; k3 = exp(-k1) - 1 + k1, never negative. -5 against -15 is k3's known explosion."""
    logprobs, reference = torch.tensor([-1.0, -2.0, -3.0, -15.0]), torch.tensor([-1.5, -2.0, -1.0, -5.0])
    assert losses.kl_estimate(logprobs, reference).tolist() == [0.5, 0.0, -2.0, -10.0]
    k3 = losses.kl_estimate(logprobs, reference, "k3").tolist()
    assert k3 == pytest.approx([math.exp(-0.5) - 0.5, 0.0, math.exp(2) - 3, math.exp(10) - 11], rel=1e-5)
    assert k3[1] == 0 and k3[3] == pytest.approx(22015.5, rel=1e-4)


def a_batch(rows: int = 12, longest: int = 9, seed: int = 0) -> dict:
    """Padded (B, C): old and new log-probs and values far enough apart that both are clipped here and there."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(rows, longest, generator=g, dtype=torch.float64)

    old, old_values = -normal().exp(), normal()
    lengths = torch.randint(1, longest + 1, (rows,), generator=g)
    return {
        "old_logprobs": old,
        "logprobs": (old + 0.3 * normal()).requires_grad_(),
        "advantages": normal(),
        "old_values": old_values,
        "values": (old_values + 0.3 * normal()).requires_grad_(),
        "returns": old_values + normal(),
        "mask": torch.arange(longest) < lengths[:, None],
    }


def trl(b: dict, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1) -> tuple:
    """TRL 0.16.0's loss (PPOTrainer.train) of one micro-batch on one rank, on padded tensors, and its metrics."""

    def masked_mean(x):
        return (x * b["mask"]).sum() / b["mask"].sum()

    clipped = torch.clamp(b["values"], b["old_values"] - cliprange_value, b["old_values"] + cliprange_value)
    vf1, vf2 = torch.square(b["values"] - b["returns"]), torch.square(clipped - b["returns"])
    value = 0.5 * masked_mean(torch.max(vf1, vf2))
    difference = b["logprobs"] - b["old_logprobs"]
    ratio = torch.exp(difference)
    pg1, pg2 = -b["advantages"] * ratio, -b["advantages"] * torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
    policy = masked_mean(torch.max(pg1, pg2))
    return policy + vf_coef * value, {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/approxkl_avg": 0.5 * masked_mean(difference**2),
        "policy/clipfrac_avg": masked_mean((pg2 > pg1).double()),
        "val/clipfrac_avg": masked_mean((vf2 > vf1).double()),
        "val/ratio": masked_mean(ratio),
        "val/ratio_squared": masked_mean(ratio**2),
    }


def packed(b: dict, filler: float = math.nan) -> dict:
    """The same on one axis, with a token of prompt before each completion and `filler` wherever nothing counts."""
    mask_T = torch.cat([torch.cat([torch.zeros(1, dtype=torch.bool), row[row]]) for row in b["mask"]])
    spread = {
        f"{name}_T": torch.full(mask_T.shape, filler, dtype=x.dtype).masked_scatter(mask_T, x.detach()[b["mask"]])
        for name, x in b.items() if name != "mask"
    }  # fmt: skip
    return spread | {"mask_T": mask_T, **{n: spread[n].requires_grad_() for n in ("logprobs_T", "values_T")}}


def check_ppo_loss():
    for seed, options in itertools.product(range(3), ({}, dict(cliprange=0.1, cliprange_value=0.4, vf_coef=1.5))):
        b = a_batch(seed=seed)
        expected, its = trl(b, **options)
        given = packed(b)
        loss, metrics = losses.ppo_loss(**given, **options)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
            {name: value.item() for name, value in its.items()}, rel=1e-12
        )
        assert 0 < metrics["policy/clipfrac_avg"] < 1 and 0 < metrics["val/clipfrac_avg"] < 1, "proves nothing"
        theirs = torch.autograd.grad(expected, (b["logprobs"], b["values"]))
        ours = torch.autograd.grad(loss, (given["logprobs_T"], given["values_T"]))
        for its, mine in zip(theirs, ours):
            torch.testing.assert_close(mine[given["mask_T"]], its[b["mask"]], rtol=1e-10, atol=1e-14)
            assert mine[~given["mask_T"]].eq(0).all()


def test_the_loss_is_trls():
    """Values and gradients, with NaN wherever nothing counts."""
    check_ppo_loss()


def test_the_loss_of_parts_adds_up():
    b = a_batch()
    whole, metrics = losses.ppo_loss(**packed(b))
    tokens, parts = int(b["mask"].sum()), [slice(0, 1), slice(1, 7), slice(7, 12)]
    each = [losses.ppo_loss(**packed({n: x[part] for n, x in b.items()}), tokens=tokens) for part in parts]
    assert sum(loss for loss, _ in each).item() == pytest.approx(whole.item(), rel=1e-12)
    for name, value in metrics.items():
        assert sum(shares[name] for _, shares in each).item() == pytest.approx(value.item(), rel=1e-12)


def test_value_clipping_by_hand():
    """V_old 0, V 0.5, clip 0.2. Return 1: clipped to 0.2 the error is larger: it counts, and nothing pulls. Return -1:
    the error as it is is the larger one, and pulls V down."""
    zero, true = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    values = torch.tensor([0.5, 0.5]).requires_grad_()
    loss, metrics = losses.ppo_loss(zero, zero, zero, values, zero, torch.tensor([1.0, -1.0]), true, vf_coef=1.0)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 1.5**2) / 2)
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([0.0, 1.5 / 2])
    assert metrics["val/clipfrac_avg"] == 0.5


def test_extreme_ratios_are_finite():
    new = torch.tensor([1e4, -1e4, 0.0]).requires_grad_()
    zero, A = torch.zeros(3), torch.tensor([1.0, 1.0, 1.0])
    loss, metrics = losses.ppo_loss(new, zero, A, zero, zero, zero, torch.ones(3, dtype=torch.bool))
    assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all()
    assert metrics["policy/clipfrac_avg"].item() == pytest.approx(1 / 3) and metrics["val/ratio"].isfinite()


def test_nothing_to_train_on():
    empty, none = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    loss, metrics = losses.ppo_loss(*[empty.clone().requires_grad_() for _ in range(6)], none)
    assert loss == 0 and all(value == 0 for value in metrics.values())


# The whole update, derived again: per sequence, padded, every sum written out

UPDATES = {
    "as TRL's": dict(),
    "two epochs, three minibatches": dict(num_ppo_epochs=2, num_mini_batches=3, kl_coef=0.2, temperature=0.7),
    "all": dict(kl_estimator="k3", whiten_rewards=True, gamma=0.9, lam=0.6, missing_eos_penalty=0.7, cliprange=0.05,
                cliprange_value=0.02, vf_coef=0.7, num_mini_batches=2, weight_decay=0.1, adam_epsilon=1e-5),
    "without a reference": dict(kl_coef=0.0, max_grad_norm=0.0),
}  # fmt: skip


def options(**given) -> ppo.Config:
    sizes = dict(max_prompt_length=16, max_completion_length=12, tokens_per_microbatch=32, learning_rate=1e-3)
    batch = dict(prompts_per_step=6, num_generations=2)
    return ppo.Config(**{"model": "m", "dataset": "d", "reward": ("random",)} | sizes | batch | given)


def rollouts(unscored: bool = False) -> Rollouts:
    """6 prompts with 2 random completions each of 1 to 12 tokens, a few of them truncated."""
    g = torch.Generator().manual_seed(3)
    prompt_lengths, lengths = torch.tensor([3, 7, 1, 5, 16, 4]), torch.randint(1, 13, (6, 2), generator=g)
    rewards, total = torch.randn(6, 2, generator=g), int(lengths.sum())
    if unscored:
        rewards[1, 0] = rewards[4, 1] = math.nan
    return Rollouts(
        prompt_tokens=torch.randint(17, (int(prompt_lengths.sum()),), generator=g),
        prompt_lengths_P=prompt_lengths,
        tokens_R=torch.randint(17, (total,), generator=g),
        lengths_PG=lengths,
        sampler_logprobs_R=torch.randn(total, generator=g),
        truncated_PG=lengths > 9,
        versions_PG=torch.zeros_like(lengths),
        rewards_PGF=rewards[..., None],
        rewards_PG=rewards,
        advantages_PG=torch.zeros(6, 2),
    )


def models(folder, dtype) -> tuple:
    """Policy, reference and value model, each with weights of its own."""
    policy, value_model, reference = (checkpoint.load(folder, dtype)[0] for _ in range(3))
    g = torch.Generator().manual_seed(5)
    for p in reference.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g).to(dtype)
    value_model = with_scalar_head(value_model, 1)
    value_model.score.weight.data *= 10  # so that values are not all but 0
    return policy, reference.requires_grad_(False), value_model


def update(policy, reference, value_model, r: Rollouts, config, world=ALONE) -> list[dict]:
    """The body of ppo.main's loop until the rollouts are used up: the metrics of each step."""
    optimizer = training.optimizer_of(torch.nn.ModuleDict({"policy": policy, "value": value_model}), config, world)
    fake, found = SimpleNamespace(world=world, config=config), []
    r, known = ppo.judge(policy, reference if config.kl_coef else None, value_model, r, config, world)
    for step in range(config.num_ppo_epochs * config.num_mini_batches):
        plan = ppo.minibatch(r, step, config, world)
        metrics = ppo.backward(policy, value_model, r, known, plan, config, fake, step)
        metrics["grad_norm"] = optimizer.step(config.learning_rate)
        found.append(metrics | ppo.objective(r, known, config))
    return found


def per_sequence(policy, value_model, sequences, temperature: float) -> tuple:
    """(B, C) log-probs, values and entropies, padded with 0: every sequence alone, from its whole logits."""
    longest = max(len(completion) for _, completion in sequences)
    found = []
    for prompt, completion in sequences:
        n, alone = len(completion), pack([prompt + completion])
        before = slice(len(prompt) - 1, -1)  # what predicts the completion's tokens
        logits = (policy(alone) @ policy.head_weight.T)[before] / temperature
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        chosen = torch.stack([log_p[t, completion[t]] for t in range(n)])
        entropy = -(log_p.exp() * log_p).sum(1)
        value = torch.zeros(n) if value_model is None else (value_model(alone) @ value_model.score.weight[0])[before]
        found.append([torch.nn.functional.pad(x, (0, longest - n)) for x in (chosen, value, entropy)])
    return [torch.stack(x) for x in zip(*found)]


def update_again(policy, reference, value_model, r: Rollouts, config) -> list[dict]:
    """The same update in the plainest way, from the papers' formulas; `order` alone is taken from minitrl."""
    kept = [(p, g) for p in range(6) for g in range(2) if not math.isnan(r.rewards_PG[p, g])]
    sequences = [(r.prompt(p), r.completion(p, g)) for p, g in kept]
    n = [len(completion) for _, completion in sequences]
    mask = torch.arange(max(n)) < torch.tensor(n)[:, None]
    tokens = [(i, t) for i in range(len(n)) for t in range(n[i])]
    with torch.no_grad():
        old, values, _ = per_sequence(policy, value_model, sequences, config.temperature)
        kl = torch.zeros_like(old)
        if config.kl_coef:
            ref, _, _ = per_sequence(reference, None, sequences, config.temperature)
            kl = old - ref if config.kl_estimator == "k1" else (ref - old).exp() - 1 - (ref - old)
    score = torch.tensor([r.rewards_PG[p, g].item() for p, g in kept], dtype=torch.float64)
    score -= (config.missing_eos_penalty or 0) * torch.tensor([r.truncated_PG[p, g].item() for p, g in kept])
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for i, t in tokens:
        rewards[i, t] = -config.kl_coef * kl[i, t] + (score[i] if t == n[i] - 1 else 0)

    def whitened(x, shift):
        mean = sum(x[i, t] for i, t in tokens) / len(tokens)
        variance = sum((x[i, t] - mean) ** 2 for i, t in tokens) / (len(tokens) - 1)
        return (x - mean) / (variance + 1e-8).sqrt() + (0 if shift else mean)

    if config.whiten_rewards:
        rewards = whitened(rewards, False)
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for i, t in tokens:
        for k in range(t, n[i]):
            following = values[i, k + 1] if k + 1 < n[i] else 0
            delta = rewards[i, k] + config.gamma * following - values[i, k]
            advantages[i, t] += (config.gamma * config.lam) ** (k - t) * delta
    returns, advantages = advantages + values, whitened(advantages, True)

    parameters = [*policy.parameters(), *value_model.parameters()]
    moments, found = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters], []
    M, count = config.num_mini_batches, 0
    for epoch in range(config.num_ppo_epochs):
        order = experience.data.order(12, 12 * epoch, 12, config.seed)
        for part in range(M):
            chosen = [divmod(j, 2) for j in order[12 * part // M : 12 * (part + 1) // M]]
            mine = [kept.index(pair) for pair in chosen if pair in kept]
            new, V, entropy = per_sequence(policy, value_model, [sequences[i] for i in mine], config.temperature)
            width = new.shape[1]
            b = {"logprobs": new, "values": V, "mask": mask[mine][:, :width]}
            given = dict(old_logprobs=old, old_values=values, advantages=advantages, returns=returns)
            b |= {name: x[mine][:, :width].to(new.dtype) for name, x in given.items()}
            loss, metrics = trl(b, config.cliprange, config.cliprange_value, config.vf_coef)
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
            norm = sum((g**2).sum() for g in grads).sqrt()
            scale = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm else 1.0
            count += 1
            with torch.no_grad():
                for p, g, (m, v) in zip(parameters, grads, moments):
                    g = g * scale
                    m.lerp_(g, 1 - config.adam_beta1)
                    v.lerp_(g * g, 1 - config.adam_beta2)
                    if p.dim() > 1:
                        p -= config.learning_rate * config.weight_decay * p
                    m_hat, v_hat = m / (1 - config.adam_beta1**count), v / (1 - config.adam_beta2**count)
                    p -= config.learning_rate * m_hat / (v_hat.sqrt() + config.adam_epsilon)
            squared = metrics.pop("val/ratio_squared")
            metrics |= {
                "loss": loss,
                "policy/entropy_avg": (entropy * b["mask"]).sum() / b["mask"].sum(),
                "val/ratio_var": squared - metrics["val/ratio"] ** 2,
                "grad_norm": norm,
                "objective/kl": (kl * mask).sum(1).mean(),
                "objective/entropy": -(old * mask).sum(1).mean(),
                "objective/non_score_reward": -config.kl_coef * (kl * mask).sum(1).mean(),
                "objective/scores": score.mean(),
                "objective/rlhf_reward": score.mean() - config.kl_coef * (kl * mask).sum(1).mean(),
            }
            found.append({name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()})
    return found


def check_update(folder, name: str, dtype, tolerance: float, unscored: bool = True) -> None:
    config = options(**UPDATES[name])
    ours, theirs = models(folder, dtype), models(folder, dtype)
    got, expected = (f(*its, rollouts(unscored), config) for f, its in ((update, ours), (update_again, theirs)))
    assert len(got) == len(expected) == config.num_ppo_epochs * config.num_mini_batches
    for mine, its in zip(got, expected):
        assert its.keys() - mine.keys() <= {"objective/kl"} and ("objective/kl" in mine) == (config.kl_coef > 0)
        for key in its.keys() & mine.keys():
            assert abs(mine[key] - its[key]) <= tolerance * max(1, abs(its[key])), (key, mine[key], its[key])
    before = models(folder, dtype)
    for which in (0, 2):
        a_, b_, c_ = (its[which].named_parameters() for its in (ours, theirs, before))
        for (key, a), (_, b), (_, c) in zip(a_, b_, c_):
            assert (a - b).abs().max() <= tolerance * 10, (which, key, (a - b).abs().max())
            assert (a - c).abs().max() > 3e-4, (which, key)


@pytest.mark.parametrize("name", UPDATES)
def test_the_whole_update_is_that_of_the_formulas(tiny, name):
    """Every metric of every step to 1e-10, and all weights behind it. Some completions have no reward, some no end."""
    check_update(tiny.folder / "model", name, torch.float64, 1e-10)


def test_the_whole_update_in_float32(tiny):
    check_update(tiny.folder / "model", "two epochs, three minibatches", torch.float32, 1e-5, unscored=False)


def test_faults_in_the_update_are_seen(tiny, monkeypatch):
    """Details that are easily got wrong: each, planted, breaks the equality above, or a test of a formula."""
    whole = functools.partial(check_update, tiny.folder / "model", "all", torch.float64, 1e-10)
    faults = [
        (ppo, "lengths_N.cumsum(0) - 1", "(lengths_N.cumsum(0) - 2).clamp(min=0)", whole),  # not the last token
        (ppo, "pack.predictors_T.clamp(min=0)", "torch.arange(len(values_T))", whole),  # the value behind the token
        (ppo, "shift_mean=False", "shift_mean=True", whole),
        (ppo, "* rollouts.truncated_PG", "* ~rollouts.truncated_PG", whole),
        (ppo, "rewards_R -= config", "rewards_R += config", whole),
        (ppo, "losses.whiten(advantages_R[kept_R])", "advantages_R[kept_R]", whole),
        (ppo, "losses.whiten(advantages_R[kept_R])", "losses.whiten(advantages_R)[kept_R]", whole),
        (ppo, "tokens=tokens,", "", whole),
        (ppo, "epoch * N, N, config.seed", "0, N, config.seed", whole),
        (losses, "else kernel.k3(-log_ratio_R)[0]", "else kernel.k3(log_ratio_R)[0]", whole),
        (losses, "gamma * following - values[t]", "following - values[t]", check_gae),
        (losses, "gamma * lam * advantage", "lam * advantage", check_gae),
        (losses, "        advantage = following = 0.0\n", "        advantage, following = 0.0, 1.0\n", check_gae),
        (losses, "torch.maximum(free, bound)", "torch.minimum(free, bound)", check_ppo_loss),
        (losses, "torch.maximum(free, bound)", "free", check_ppo_loss),
        (losses, "(values - old_values).clamp", "(values - returns).clamp", check_ppo_loss),
        (losses, "value = 0.5 * ", "value = ", check_ppo_loss),
    ]
    for module, right, wrong, check in faults:
        faulty = mutant(module, right, wrong)
        with monkeypatch.context() as patch:
            for name in ("judge", "scores", "values_before", "minibatch", "backward") if module is ppo else (
                "kl_estimate", "gae", "whiten", "ppo_loss"
            ):  # fmt: skip
                patch.setattr(module, name, getattr(faulty, name))
            with pytest.raises((AssertionError, RuntimeError)):
                check()
                pytest.fail(f"not seen: {wrong}", pytrace=False)


# Divisions, processes


def step_of(models_, r, config, world, plan=None) -> dict:
    """Metrics and gradients, summed over ranks, of one minibatch."""
    policy, reference, value_model = models_
    r, known = ppo.judge(policy, reference, value_model, r, config, world)
    g = torch.Generator().manual_seed(7)
    known["old"] = known["old"] + 0.3 * torch.randn(len(known["old"]), generator=g).to(known["old"])  # off policy
    plan = plan or ppo.minibatch(r, 1, config, world)
    assert world.size == 1 or all(plan), "a process without work proves nothing"
    for model in (policy, value_model):
        model.zero_grad()
    metrics = ppo.backward(policy, value_model, r, known, plan, config, SimpleNamespace(world=world, config=config), 0)
    named = {f"{i}.{n}": p for i, model in enumerate((policy, value_model)) for n, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in named.items()}
    distributed.sum_(list(grads.values()), world)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()} | grads | known


def assert_same(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (got[name] - value).abs().max() / scale <= tolerance, (name, (got[name] - value).abs().max() / scale)


@pytest.mark.parametrize("name", ["as TRL's", "all"])
def test_no_division_changes_the_step(tiny, name):
    r, its = rollouts(True), models(tiny.folder / "model", torch.float64)
    config = options(**UPDATES[name])
    whole = step_of(its, r, options(**UPDATES[name] | {"tokens_per_microbatch": 1000}), ALONE)
    assert_same(step_of(its, r, config, ALONE), whole, 1e-12)
    alone = [[[(p, [g])] for batch in ppo.minibatch(r, 1, config, ALONE)[0] for p, members in batch for g in members]]
    assert_same(step_of(its, r, config, ALONE, alone), whole, 1e-12)


def one_step(rank: int, folder, results) -> None:
    world = distributed.start("cpu", 60)
    found = {}
    for dtype, name in itertools.product((torch.float64, torch.float32), ("as TRL's", "all")):
        got = step_of(models(folder, dtype), rollouts(True), options(**UPDATES[name]), world)
        found |= {f"{dtype} {name} {key}": value for key, value in got.items()}
    if rank == 0:
        save_file({name: value.clone() for name, value in found.items()}, results)
    distributed.stop()


def test_one_and_two_processes_take_the_same_step(tiny, tmp_path):
    """Real processes over gloo: whitened advantages, metrics and gradients, 1e-12 in float64 and 1e-5 in float32."""
    results = {}
    for world in (1, 2):
        outcome = apart(one_step, world, tiny.folder / "model", tmp_path / f"{world}")
        assert outcome.codes == [0] * world, outcome.err
        results[world] = load_file(tmp_path / f"{world}")
    assert len(results[1]) > 100
    for dtype, tolerance in {"torch.float64": 1e-12, "torch.float32": 1e-5}.items():
        one, two = ({k: v for k, v in results[w].items() if k.startswith(dtype)} for w in (1, 2))
        assert_same(two, one, tolerance)


# Whole runs

SMALL = dict(num_ppo_epochs=2, num_mini_batches=2, max_steps=8, prompts_per_step=4, num_generations=1)


def argv(tiny, output_dir, **given) -> list[str]:
    return tiny.argv(output_dir, **SMALL | given)


def ends(arguments, code: int = 0):
    outcome = run(arguments, ppo)
    assert outcome.code == code and "Traceback" not in outcome.err, outcome
    return outcome


def recorded(monkeypatch, owner, name: str) -> list:
    """(arguments, result) of every call of owner.name from now on."""
    calls, original = [], getattr(owner, name)

    def wrapper(*arguments, **named):
        result = original(*arguments, **named)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_every_completion_is_trained_on_once_in_each_epoch(tiny, tmp_path, monkeypatch):
    plans = recorded(monkeypatch, ppo, "minibatch")
    ends(argv(tiny, tmp_path))
    chosen = [sorted((p, g) for batch in plan[0] for p, members in batch for g in members) for _, plan in plans]
    everything = [(p, 0) for p in range(4)]
    assert len(chosen) == 8 and all(len(part) == 2 for part in chosen)
    assert all(sorted(a + b) == everything for a, b in zip(chosen[::2], chosen[1::2]))
    assert len({str(part) for part in chosen}) > 2  # shuffled anew
    assert [row["step"] for row in rows(tmp_path, "completions")] == [1] * 4 + [5] * 4
    assert [row["episode"] for row in steps(tmp_path)] == [4] * 4 + [8] * 4
    tokens = [row["num_tokens"] for row in steps(tmp_path)]
    assert tokens[0] == tokens[3] < tokens[4] == tokens[7]


def test_the_reference_is_the_policy_at_the_start(tiny, tmp_path, monkeypatch):
    """KL 0 in the first rollouts, at any temperature; other than 0 later. At kl_coef 0 no reference is held."""
    ends(argv(tiny, tmp_path / "with", temperature=0.7))
    kl = [row["objective/kl"] for row in steps(tmp_path / "with")]
    assert abs(kl[0]) < 1e-6 and abs(kl[4]) > 1e-4 and kl[:4] == kl[:1] * 4
    first = steps(tmp_path / "with")[0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6) and first["policy/clipfrac_avg"] == 0
    copies = recorded(monkeypatch, ppo.copy, "deepcopy")
    ends(argv(tiny, tmp_path / "without", kl_coef=0))
    assert "objective/kl" not in steps(tmp_path / "without")[0]
    assert sum(isinstance(found, type(ppo.checkpoint.load(tiny.folder / "model")[0])) for _, found in copies) == 1


def test_metrics_have_trls_names(tiny, tmp_path):
    ends(argv(tiny, tmp_path, eval_dataset=tiny.folder / "data.jsonl"))
    wanted = """objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
        policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg
        val/ratio val/ratio_var val/num_eos_tokens episode reward reward_std learning_rate grad_norm""".split()
    for row in steps(tmp_path):
        assert not set(wanted) - row.keys() and None not in row.values()
        sums = row["objective/scores"] + row["objective/non_score_reward"]
        assert row["objective/rlhf_reward"] == pytest.approx(sums)
    assert [row["step"] for row in rows(tmp_path) if "eval/accuracy" in row] == [0, 8]


def test_the_value_model_has_its_own_layers(tiny, tmp_path):
    """Its loss moves none of the policy's weights, and the policy's none of its; both are saved, and load again."""
    policy, _, value_model = models(tiny.folder / "model", torch.float32)
    r = rollouts()
    ppo.values_before(value_model, r.pack([(0, [0, 1])])[0]).sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert all(p.grad is not None for p in value_model.parameters())
    ends(argv(tiny, tmp_path / "a", max_steps=4))
    saved, _ = checkpoint.load(tmp_path / "a" / "value_model", scalar_head=True)
    assert saved.config.scalar_head and not checkpoint.load(tmp_path / "a" / "final")[0].config.scalar_head
    ends(argv(tiny, tmp_path / "b", max_steps=4, value_model=tmp_path / "a" / "value_model"))
    losses_ = [steps(tmp_path / name)[0]["loss/value_avg"] for name in "ab"]
    assert losses_[0] != losses_[1]


def test_adapters(tiny, tmp_path):
    """Of both models the adapters alone are trained (and the value model's head), and the reference is the base."""
    given = dict(use_peft=True, lora_target_modules=("all-linear",), save_steps=3)
    ends(argv(tiny, tmp_path / "a", **given))
    first, later = steps(tmp_path / "a")[0], steps(tmp_path / "a")[4]
    assert first["objective/kl"] == 0 and first["val/ratio"] == pytest.approx(1, abs=1e-6) and later["objective/kl"] != 0
    trained = load_file(tmp_path / "a/checkpoints/step_8/optimizer.safetensors")
    assert {name.split(".")[1] for name in trained if "." in name} == {"policy", "value"}
    assert all(".adapter." in name or name.endswith("value.score.weight") for name in trained if name != "step")
    for name in ("final", "value_model"):
        assert (tmp_path / "a" / name / "adapter_model.safetensors").exists()
    value_model = with_scalar_head(checkpoint.load(tiny.folder / "model")[0], 1)
    checkpoint.save(value_model, checkpoint.load(tiny.folder / "model")[1], tmp_path / "value")
    ends(argv(tiny, tmp_path / "b", value_model=tmp_path / "value", **given))
    described = json.loads((tmp_path / "b/value_model/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "value") and described["task_type"] == "SEQ_CLS"


def test_a_fresh_value_model_guesses_near_0(tiny):
    policy, _ = checkpoint.load(tiny.folder / "model")
    value_model = ppo.load_value_model(policy, None, options(), ALONE)
    assert value_model.score.weight.abs().max() < 0.1
    theirs = dict(value_model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in policy.named_parameters() if name in theirs)
    assert all(p is not theirs.get(name) for name, p in policy.named_parameters())


def test_one_folder_is_reward_and_value_model(tiny, tmp_path):
    """The reward is what the model says at the last token; training the value model does not move it."""
    policy, tokenizer = checkpoint.load(tiny.folder / "model")
    scorer = with_scalar_head(policy, 1)
    scorer.score.weight.data *= 20
    checkpoint.save(scorer, tokenizer, tmp_path / "scorer")
    arguments = argv(tiny, tmp_path / "run", value_model=tmp_path / "scorer")
    arguments[arguments.index("--reward") + 1] = str(tmp_path / "scorer")
    ends(arguments)
    written = rows(tmp_path / "run", "completions")
    assert {row["step"] for row in written} == {1, 5}
    for row in written:
        ids = tokenizer.encode(row["prompt"]) + row["completion_ids"]
        assert row["reward"] == pytest.approx(scorer.values(pack([ids]))[-1].item(), rel=1e-4, abs=1e-5)
    moved, _ = checkpoint.load(tmp_path / "run" / "value_model", scalar_head=True)
    assert (moved.score.weight - scorer.score.weight).abs().max() > 1e-3


def test_the_missing_end_token_costs(tiny, tmp_path):
    """The penalty is taken off where no end token came, from what is trained on and not from what is written down."""
    ends(argv(tiny, tmp_path, missing_eos_penalty=2.0, max_completion_length=6, max_steps=1, prompts_per_step=16))
    written, row = rows(tmp_path, "completions"), steps(tmp_path)[0]
    cut = sum(r["finish_reason"] == "length" for r in written)
    assert 0 < cut < 16 and row["val/num_eos_tokens"] == 16 - cut
    mean = sum(r["reward"] for r in written) / 16
    assert row["reward"] == pytest.approx(mean) and row["objective/scores"] == pytest.approx(mean - 2 * cut / 16)


def test_a_completion_without_reward_is_left_out(tiny, tmp_path):
    ends(argv(tiny, tmp_path, reward="even", prompts_per_step=8, num_mini_batches=1, num_ppo_epochs=1, max_steps=2))
    for row in steps(tmp_path):
        written = [r for r in rows(tmp_path, "completions") if r["step"] == row["step"]]
        kept = [r for r in written if r["reward"] is not None]
        assert 0 < len(kept) < 8 and row["trained_tokens"] == sum(len(r["completion_ids"]) for r in kept)
        assert all(r["advantage"] == 0 for r in written if r["reward"] is None)
        assert row["objective/scores"] == pytest.approx(sum(r["reward"] for r in kept) / len(kept))


def test_no_reward_at_all_moves_nothing(tiny, tmp_path):
    outcome = ends(argv(tiny, tmp_path, reward="never", max_steps=20, max_completion_length=4))
    assert re.search("warning: .*no reward applied to any completion, 5 generations", outcome.out)
    for row in steps(tmp_path):
        assert row["loss"] == row["grad_norm"] == row["trained_tokens"] == 0 and None not in row.values()
    before, after = (load_file(f / "model.safetensors") for f in (tiny.folder / "model", tmp_path / "final"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_and_gradient_checkpointing(tiny, tmp_path):
    for name in ("on", "off"):
        ends(argv(tiny, tmp_path / name, dtype="bfloat16", gradient_checkpointing=name == "on"))
    assert untimed(tmp_path / "on") == untimed(tmp_path / "off")
    for name in ("final", "value_model"):
        tensors = load_file(tmp_path / "on" / name / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_learns(tiny, tmp_path):
    """Rewarded for the letter a, within 60 steps most of what is written is a; by the toss of a coin, it is not."""
    given = dict(max_steps=60, prompts_per_step=32, tokens_per_microbatch=1024, num_mini_batches=1, vf_coef=1.0)
    for reward in ("share_of_a", "random"):
        ends(argv(tiny, tmp_path / reward, reward=reward, **given))
        written = [row["completion"].removesuffix("<eos>") for row in rows(tmp_path / reward, "completions")[-64:]]
        share = sum(text.count("a") for text in written) / max(1, sum(map(len, written)))
        assert share > 0.7 if reward == "share_of_a" else share < 0.4, (reward, share)


FAULTS = {  # where the process dies: function, after which step, at which call
    "rollout": ("minitrl.sampling:draw", 4, 3),
    "judge": ("minitrl.losses:gae", 4, 1),
    "backward": ("minitrl.losses:ppo_loss", 6, 1),
    "optimizer": ("minitrl.training:Optimizer._round_masters", 3, 1),
    "rename": ("os:rename", 6, 1),
    "value model": ("minitrl.checkpoint:_save_weights", 8, 2),
}


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    @functools.cache
    def folder(dtype: str, world: int = 1):
        path = tmp_path_factory.mktemp("undisturbed") / "run"
        outcome = launch(argv(tiny, path, save_steps=3, dtype=dtype), world, main=ppo.main)
        assert outcome.codes == [0] * world, outcome
        return path

    return folder


def assert_same_end(one, other) -> None:
    assert untimed(one) == untimed(other)
    files = "completions.jsonl final/model.safetensors value_model/model.safetensors"
    for file in [*files.split(), "checkpoints/step_8/optimizer.safetensors"]:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("where", FAULTS)
def test_kill_9(tiny, tmp_path, undisturbed, where):
    """Checkpoints fall amid rollouts: they, and what is known of them, outlive it. All is the same to the bit."""
    dtype = "bfloat16" if where in ("backward", "rename") else "float32"
    arguments = argv(tiny, tmp_path, save_steps=3, dtype=dtype)
    hook = functools.partial(at, *FAULTS[where], die)
    assert launch(arguments, hooks={0: hook}, main=ppo.main).code == -signal.SIGKILL
    outcome = launch([*arguments, "--resume"], main=ppo.main)
    saved = {"backward": "(3|6)", "value model": "8"}.get(where, "3")  # step 6 was being written while 7 computed
    assert outcome.code == 0 and re.search(f"--resume: going on after step {saved}\n", outcome.out), outcome
    assert_same_end(undisturbed(dtype), tmp_path)


def test_kill_9_of_one_process_of_two(tiny, tmp_path, undisturbed):
    arguments = argv(tiny, tmp_path, save_steps=3, dtype="float32")
    hook = functools.partial(at, *FAULTS["backward"], die)
    assert launch(arguments, 2, {1: hook}, main=ppo.main).codes[1] == -signal.SIGKILL
    assert launch([*arguments, "--resume"], 2, main=ppo.main).codes == [0, 0]
    assert_same_end(undisturbed("float32", 2), tmp_path)
    one, two = (untimed(undisturbed("float32", world)) for world in (1, 2))
    for ours, theirs in zip(one[:2], two[:2]):  # and in the first steps, two processes do what one does
        assert all(theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in ours.items())


# Bad input


def said(outcome, code: int) -> str:
    assert outcome.code == code and outcome.err.count("\n") == 1 and "error: " in outcome.err, outcome
    return outcome.err


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(kl_cof=1), "--kl_cof: .*--kl_coef"),
        (dict(kl_coef=-0.1), "--kl_coef -0.1: must be at least 0"),
        (dict(kl_estimator="k2"), "--kl_estimator.*'k2'.*k1, k3"),
        (dict(num_ppo_epochs=0), "--num_ppo_epochs 0: must be at least 1"),
        (dict(num_mini_batches=5), "--num_mini_batches 5: must be at most 4, the completions of a generation"),
        (dict(gamma=1.1), "--gamma 1.1: must be from 0 to 1"),
        (dict(lam="nan"), "--lam"),
        (dict(cliprange=0), "--cliprange 0.0: must be above 0"),
        (dict(cliprange_value=-1), "--cliprange_value -1.0: must be above 0"),
        (dict(vf_coef=-1), "--vf_coef -1.0"),
        (dict(missing_eos_penalty=-1), "--missing_eos_penalty -1.0: must be at least 0"),
        (dict(temperature=0), "--temperature 0.0: must be above 0"),
        (dict(num_generations=0), "--num_generations 0"),
        (dict(model=None, dataset=None, max_prompt_length=None, tokens_per_microbatch=1000, value_model="x"),
         "--value_model x: must be left out without --model"),
    ],
)  # fmt: skip
def test_bad_options(tiny, tmp_path, given, words):
    """Said before anything is touched."""
    assert re.search(words, said(run(argv(tiny, tmp_path / "run", **given), ppo), 2))
    assert not (tmp_path / "run").exists()


def test_bad_value_models(tiny, tmp_path):
    def line(folder):
        return said(run(argv(tiny, tmp_path / "run", value_model=folder), ppo), 1)

    assert re.search("/nowhere", line("/nowhere"))
    tokenizer = toy.make_tokenizer()
    checkpoint.save(toy.make_model(0, tokenizer.vocab_size), tokenizer, tmp_path / "other")
    assert re.search("--value_model .*other: must be a model with --model's tokenizer", line(tmp_path / "other"))
    config = json.loads((tiny.folder / "model" / "config.json").read_text())
    for path in (tiny.folder / "model").iterdir():
        (tmp_path / "short").mkdir(exist_ok=True)
        (tmp_path / "short" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    assert re.search("--value_model .*short: must be a model with 28 positions; it has 20", line(tmp_path / "short"))


def test_a_resume_with_another_value_model_is_refused(tiny, tmp_path):
    for seed in (1, 2):
        policy, tokenizer = checkpoint.load(tiny.folder / "model")
        checkpoint.save(with_scalar_head(policy, seed), tokenizer, tmp_path / f"value_{seed}")
    given = dict(value_model=tmp_path / "value", max_steps=4)
    (tmp_path / "value_1").rename(tmp_path / "value")
    ends(argv(tiny, tmp_path / "run", **given))
    (tmp_path / "value").rename(tmp_path / "value_1")
    (tmp_path / "value_2").rename(tmp_path / "value")
    outcome = run([*argv(tiny, tmp_path / "run", **given | {"max_steps": 8}), "--resume"], ppo)
    assert "what is in --value_model" in said(outcome, 1)


def test_not_finite_stops_before_the_update(tiny, tmp_path, monkeypatch):
    original, calls = losses.ppo_loss, itertools.count(1)

    def poisoned(*arguments, **named):
        loss, shares = original(*arguments, **named)
        return loss * (math.nan if next(calls) == 6 else 1), shares

    monkeypatch.setattr(losses, "ppo_loss", poisoned)
    arguments = argv(tiny, tmp_path, tokens_per_microbatch=1000)
    assert re.search("error: step 6: the loss is nan; nothing was updated", said(run(arguments, ppo), 1))
    dump = json.loads((tmp_path / "not_finite_step_6_rank_0.json").read_text())
    assert len(dump["groups"]) == 2 and [row["step"] for row in steps(tmp_path)] == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    assert "going on after step 5" in ends([*arguments, "--resume"]).out


# The embedded default


def test_the_preset_holds_options_of_ppo_only():
    ppo.Config(**toy.PPO_PRESET)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["exact", "random"])
def test_the_embedded_default_learns(tmp_path, reward):
    """`torchrun -m minitrl.ppo`, and its control arm."""
    assert ppo.main(["--output_dir", str(tmp_path), "--seed", "0", "--reward", reward]) == 0
    before, after = (row["eval/accuracy"] for row in rows(tmp_path) if "eval/accuracy" in row)
    assert before <= 0.5
    assert after >= 0.8 if reward == "exact" else after <= before + 0.05


def test_a_value_models_folder_with_other_files_is_refused_before_training(tiny, tmp_path):
    (tmp_path / "value_model").mkdir()
    (tmp_path / "value_model/notes.txt").write_text("mine")
    outcome = run(tiny.argv(tmp_path, num_generations=2), ppo)
    assert outcome.code == 1 and "value_model holds other files (notes.txt)" in outcome.err
    assert not (tmp_path / "metrics.jsonl").exists()
