"""GRPO against TRL: advantages, every token's log-prob and loss, KL, the step's loss, gradients, their norm, weights.

parity.py makes the runs that are compared here. Run with -s to see the largest differences.
"""

import gc
from collections import defaultdict

import pytest
import torch

for package in ("trl", "transformers", "datasets"):
    pytest.importorskip(package)

from minitrl import experience  # noqa: E402
from parity import (  # noqa: E402
    COMMON, ROWS, G, Step, advantages_0_16, make_world, ours, per_token, scores, trainer, trl_0_16, trl_1_16, truncated
)  # fmt: skip

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOLERANCE = 1e-5
WORST = defaultdict(float)  # (loss_type, quantity) -> the largest difference seen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    gc.freeze()  # accelerate collects garbage in each run: with all that was imported, longer than it trains
    yield make_world(tmp_path_factory.mktemp("world"))
    gc.unfreeze()
    for (loss_type, what), difference in sorted(WORST.items()):
        print(f"\n{loss_type:8} {what:12} {difference:.1e}", end="")


def compare(left, right, loss_type: str, names: tuple[str, ...] = ()) -> None:
    """Assert that our run and TRL's are the same, step by step; `names` are metrics to compare too."""
    (steps, weights), (their_steps, their_weights) = left, right

    def equal(what: str, mine, its) -> None:
        difference = (torch.as_tensor(mine) - torch.as_tensor(its)).abs().max().item()
        assert difference <= TOLERANCE, f"{what}: {difference:.2e}"
        WORST[loss_type, what] = max(WORST[loss_type, what], difference)

    for mine, its in zip(steps, their_steps, strict=True):
        assert mine.advantages.keys() == its.advantages.keys()
        assert max(gradient.abs().max() for gradient in its.gradients.values()) > 1e-2  # so that 1e-5 says something
        for key, advantage in its.advantages.items():
            equal("advantage", mine.advantages[key], advantage)
            if key in mine.logprobs:
                equal("log-prob", mine.logprobs[key], its.logprobs[key])
            if key in its.losses:  # what we spent no forward pass on must be nothing
                equal("token loss", mine.losses.get(key, torch.zeros(len(key[1]))), its.losses[key])
        equal("loss", mine.loss, its.loss)
        for name, gradient in its.gradients.items():
            equal("gradient", mine.gradients[name], gradient)
        for name in ("grad_norm", *names):
            equal(name, mine.metrics[name], its.metrics[name])
    for name, weight in their_weights.items():
        equal("weights", weights[name], weight)


def clips(step: Step) -> bool:
    """Whether some tokens of either sign of the advantage are clipped and some are not."""
    low, high, either = (step.metrics[name] for name in CLIP_RATIOS)
    return low > 0 and high > 0 and either < 0.9


def complete(**options) -> dict:
    """The options of a run. cispo's epsilon_high bounds the ratio itself, not its distance from 1."""
    bound = {"epsilon_high": 1.05} if options.get("loss_type") == "cispo" else {}
    return {"loss_type": "dapo", "num_iterations": 1, "beta": 0.0, "reward_weights": [1.0, 0.5]} | bound | options


CLIP_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("num_iterations", [1, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_trl_1_16(world, tmp_path, loss_type, num_iterations, beta, micro_batches):
    options = complete(loss_type=loss_type, num_iterations=num_iterations, beta=beta)
    theirs = trl_1_16(world, tmp_path / "trl", options, micro_batches)
    splits = [step.split for step in theirs[0]] if loss_type == "bnpo" else None  # its answer depends on the split
    options["tokens_per_microbatch"] = 4096 if micro_batches == 1 else 64
    mine = ours(world, tmp_path / "ours", options, splits)
    assert all((len(step.split) > 1) == (micro_batches > 1) for step in mine[0])
    names = ["learning_rate"] + ["kl"] * bool(beta)
    if micro_batches == 1 and loss_type != "cispo":
        names += CLIP_RATIOS
    if beta or loss_type == "bnpo":  # else nothing is computed for the group without signal: our mean is of the others
        names += ["entropy"]
    compare(mine, theirs, loss_type, names)
    if num_iterations == 3:
        assert mine[0][2].metrics["clip_ratio/high_mean"] > 0 if loss_type == "cispo" else clips(mine[0][2])


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_trl_0_16(world, tmp_path, num_iterations, beta, micro_batches):
    """0.16.0 has one loss, which is called bnpo today; its penalty is not multiplied by the ratio."""
    options = complete(loss_type="bnpo", num_iterations=num_iterations, beta=beta, use_bias_correction_kl=False)
    theirs = trl_0_16(world, options, micro_batches)
    mine = ours(world, tmp_path / "ours", options, [step.split for step in theirs[0]])
    compare(mine, theirs, "bnpo", ["kl"] if beta else [])
    assert num_iterations == 1 or clips(mine[0][2])


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"reward": ["sparse"], "reward_weights": [1.0]},  # None for some of a group: left out of its mean and deviation
        {"reward": ["sparse"], "reward_weights": [1.0], "scale_rewards": "batch"},
        {"epsilon_high": 0.4},
        {"delta": 1.25},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.5},  # GSPO
        {"importance_sampling_level": "sequence", "beta": 0.04},
        {"importance_sampling_level": "sequence", "loss_type": "cispo"},
        {"top_entropy_quantile": 0.4},
        {"top_entropy_quantile": 0.4, "loss_type": "grpo", "beta": 0.04},  # the penalty is on every token
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "bnpo"},
        {"mask_truncated_completions": True, "loss_type": "cispo", "beta": 0.04},
        {"use_bias_correction_kl": False, "beta": 0.04},
        {"entropy_coef": 0.05},
        {"entropy_coef": 0.05, "loss_type": "grpo"},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "beta": 0.4, "num_iterations": 1},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_options_against_trl_1_16(world, tmp_path, options):
    """Three steps with one option more, in one micro-batch; and without it the gradients are others."""
    without = {name: options[name] for name in ("beta", "loss_type", "num_iterations") if name in options}
    without = complete(**{"num_iterations": 3} | without)
    theirs = trl_1_16(world, tmp_path / "trl", without | options)
    mine = ours(world, tmp_path / "ours", without | options)
    names = ["kl"] * ("beta" in options)
    # where the ratio is a sequence's, TRL counts clipped sequences, and we their tokens
    names += CLIP_RATIOS if per_token(options) and without["loss_type"] != "cispo" else ()
    compare(mine, theirs, without["loss_type"], names)
    assert gap(mine[0][-1], ours(world, tmp_path / "without", without)[0][-1]) > 1e-3


def test_a_second_generation(world, tmp_path):
    """The third step is the first on new completions: it knows nothing of the old ones' log-probs."""
    options = complete(num_iterations=2, beta=0.04)
    compare(ours(world, tmp_path / "ours", options), trl_1_16(world, tmp_path / "trl", options), "dapo", ["kl"])


def gap(left: Step, right: Step) -> float:
    """The largest difference between two steps' gradients."""
    return max((left.gradients[name] - gradient).abs().max().item() for name, gradient in right.gradients.items())


# Where TRL's answer depends on how a step is divided


@pytest.mark.parametrize("option", ["loss_type=bnpo", "top_entropy_quantile=0.4", "entropy_coef=0.5"])
def test_trl_depends_on_the_split(world, tmp_path, option):
    """TRL's mean of the loss (bnpo), quantile of the entropy, and mean of the bonus are each micro-batch's own.

    Ours is TRL's for one micro-batch, in however many it is computed; bnpo is exact under the name dapo.
    """
    name, value = option.split("=")
    options = complete(**{name: value if name == "loss_type" else float(value)})
    whole, halves = (trl_1_16(world, tmp_path / f"trl{n}", options, n)[0][0] for n in (1, 2))
    assert gap(whole, halves) > 1e-3
    options["loss_type"] = "dapo"
    one = ours(world, tmp_path / "one", options)[0][0]
    many = ours(world, tmp_path / "many", options | {"tokens_per_microbatch": 32})[0][0]
    assert len(many.split) >= 4
    assert gap(one, many) < 1e-6 and gap(one, whole) < TOLERANCE


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_trl_depends_on_equal_micro_batches(world, tmp_path, loss_type):
    """TRL divides by the number of micro-batches, right for equal parts; dapo and cispo know the step's tokens."""
    options = complete(loss_type=loss_type)
    made = trainer(world, tmp_path / "trl", options)
    made.model.train()
    inputs = made._generate_and_score_completions([row for row in ROWS for _ in range(G)])
    halves, unequal = ([slice(0, cut), slice(cut, None)] for cut in (8, 5))

    def theirs(split):
        made.current_gradient_accumulation_steps = len(split)
        made.args.steps_per_generation = len(split)
        made.model.zero_grad()
        for rows in split:
            part = {name: value[rows] if value.ndim else value for name, value in inputs.items()}
            made._compute_loss(made.model, part).backward()
        return Step(gradients={name: p.grad.clone() for name, p in made.model.named_parameters()})

    whole = theirs([slice(None)])
    assert (gap(whole, theirs(unequal)) > 1e-3) == (loss_type not in ("dapo", "cispo"))
    assert (gap(whole, theirs(halves)) > 1e-3) == (loss_type == "bnpo")
    if loss_type != "bnpo":
        members = [(prompt, tuple(ids)) for prompt, answers in world.completions.items() for ids in answers]
        splits = [[members[rows] for rows in unequal]] * COMMON["max_steps"]
        mine = ours(world, tmp_path / "ours", options, splits)[0][0]
        assert [len(split) for split in mine.split] == [5, 11] and gap(mine, whole) < TOLERANCE


# Where we depart from TRL on purpose


def test_departure_rows_without_reward(world):
    """Where no reward applies, 0.16.0 counts 0, which moves the whole group's mean; we, like TRL 1.16, leave it out."""
    options = {"reward": ["sparse"]}
    rewards_NF = scores(world, options)
    none = rewards_NF.isnan().all(1).view(-1, G)
    assert none.any() and not none.all(1).any()
    mine = experience.advantages(experience.weighted_rewards(rewards_NF, torch.ones(1)).view(-1, G))
    theirs = advantages_0_16(rewards_NF, torch.ones(1)).view(-1, G)
    assert (mine[none] == 0).all() and (theirs[none].abs() > 0.5).any()
    whole = ~none.any(1)
    torch.testing.assert_close(mine[whole], theirs[whole], rtol=0, atol=TOLERANCE)


def test_departure_groups_without_signal(world, tmp_path):
    """The float32 mean of three rewards of 0.43 is not 0.43; TRL divides that rounding by 1e-4. Ours is exactly 0."""
    options = complete(reward=["constant"], reward_weights=[1.0], num_generations=3)
    assert max(map(abs, trl_1_16(world, tmp_path / "trl", options)[0][0].advantages.values())) > 1e-6
    assert set(ours(world, tmp_path / "ours", options)[0][0].advantages.values()) == {0.0}


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_departure_masked_truncated_completions(world, tmp_path, loss_type):
    """TRL divides by the masked rows too, so that truncation shrinks the step; we divide by those that are left."""
    options = complete(loss_type=loss_type, mask_truncated_completions=True)
    its = trl_1_16(world, tmp_path / "trl", options)[0][0]
    mine = ours(world, tmp_path / "ours", options)[0][0]
    rows = sum(world.completions.values(), [])
    share = sum(not truncated(ids) for ids in rows) / len(rows)
    assert 0 < share < 1 and abs(mine.loss * share - its.loss) < TOLERANCE
    for name, gradient in its.gradients.items():
        torch.testing.assert_close(mine.gradients[name] * share, gradient, rtol=0, atol=TOLERANCE)


def test_departure_entropy_bonus_on_a_quantile(world, tmp_path):
    """TRL divides the bonus by the quantile's tokens, the policy term by all; we divide both by all: one balance."""
    options = complete(top_entropy_quantile=0.4)
    its = trl_1_16(world, tmp_path / "trl", options | {"entropy_coef": 0.5})[0][0]
    entropies = torch.cat(list(its.entropies.values()))
    kept = (entropies >= entropies.quantile(1 - 0.4)).double().mean().item()
    mine, rescaled = (
        ours(world, tmp_path / f"ours{c}", options | {"entropy_coef": c})[0][0] for c in (0.5, 0.5 / kept)
    )
    assert gap(mine, its) > 1e-3 and gap(rescaled, its) < TOLERANCE


def test_departure_metrics_of_unequal_micro_batches(world, tmp_path):
    """TRL logs the plain mean of the micro-batches' token means; ours is the step's token mean, whatever the split."""
    options = complete(num_iterations=3, beta=0.04)
    made = trainer(world, tmp_path / "trl", options, 2)
    made.train()
    logged = [row["kl"] for row in made.state.log_history if "kl" in row]
    metrics, kl = made.noted[2].metrics, ours(world, tmp_path / "ours", options)[0][2].metrics["kl"]
    assert abs(metrics["kl"] / metrics["tokens"] - kl) < TOLERANCE < abs(float(logged[2]) - kl)
