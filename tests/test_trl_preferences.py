"""DPO and reward models against TRL 1.16 run for real, on one model folder and one file of pairs.

`DPOTrainer` computes loss and gradients of a batch under a policy that has moved from its reference, for each of its
losses, and trains three steps; `RewardTrainer` trains three steps. Run with -s to see the largest differences.
"""

import json

import pytest
import torch

for package in ("trl", "transformers", "datasets"):
    pytest.importorskip(package)

import datasets  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from miniature import run, steps  # noqa: E402

from minitrl import checkpoint, dpo, losses, pairs, reward  # noqa: E402
from minitrl.data import order  # noqa: E402
from minitrl.distributed import World  # noqa: E402
from minitrl.layout import hf_tensors  # noqa: E402
from minitrl.model import with_scalar_head  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOLERANCE = 1e-5
ALONE = World(0, 1, torch.device("cpu"))
P = 6
RATE = 1e-3


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Sums, the right result over a wrong one. Each character is a token, so that no token reaches over a boundary."""
    found = [{"prompt": f"{i}+{i % 7}=", "chosen": str(i + i % 7), "rejected": str(i + 8) * (1 + (i % 3 == 0)),
              "margin": i / 10} for i in range(3 * P)]  # fmt: skip
    made = tmp_path_factory.mktemp("world")
    (made / "trl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    tokenizer.special_tokens["pad_token"] = "a"  # TRL would pad with the end token, and score what is before
    checkpoint.save(model, tokenizer, made / "model")
    return made


def common(output_dir, **options):
    return {
        "output_dir": str(output_dir), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"}, "per_device_train_batch_size": P, "max_steps": 3,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "max_length": 30, **options,
    }  # fmt: skip


def ours(folder, output_dir, script, **options):
    """A run on the same rows in TRL's order."""
    words = ["--model", folder / "model", "--dataset", folder / "trl.jsonl", "--output_dir", output_dir,
             "--max_steps", 3, "--examples_per_step", P, "--max_length", 30, "--learning_rate", RATE, "--dtype", "float32",
             "--lr_scheduler_type", "constant", "--logging_steps", 1]  # fmt: skip
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    outcome = run([str(word) for word in words], script)
    assert outcome.code == 0, outcome
    return steps(output_dir)


def in_order(base):
    """The trainer, with the rows in the order that our own run draws."""
    class InOrder(base):
        def _get_train_sampler(self, dataset=None):
            return order(len(self.train_dataset), 0, len(self.train_dataset), 42)

    return InOrder


def dataset(folder, columns):
    rows = [json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()]
    return datasets.Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def dpo_trainer(folder, output_dir, **options):
    columns = ("prompt", "chosen", "rejected")
    made = in_order(trl.DPOTrainer)(model=str(folder / "model"), train_dataset=dataset(folder, columns),
                                   args=trl.DPOConfig(**common(output_dir, **options)))
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.fixture(scope="module")
def moved(folder, tmp_path_factory):
    """TRL's trainer and our model, both with the same weights, not the reference's any more; and the pairs."""
    made = dpo_trainer(folder, tmp_path_factory.mktemp("trl"))
    generator = torch.Generator().manual_seed(0)
    model, tokenizer = checkpoint.load(folder / "model")
    rows, _ = pairs.load_preferences(folder / "trl.jsonl", tokenizer, 30)
    reference = dpo.score(model, rows[:P], dpo.Config(model="m", dataset="d"), ALONE)
    theirs, places, mine = dict(made.model.named_parameters()), hf_tensors(model.config), dict(model.named_parameters())
    with torch.no_grad():
        for name, (parameter, span, shape) in places.items():
            theirs[name].add_(0.05 * torch.randn(shape, generator=generator))
            mine[parameter][span or slice(None)].copy_(theirs[name])
    batch = made.data_collator([made.train_dataset[i] for i in range(P)])
    return made, batch, model, rows[:P], reference


THEIRS = {"aot_pair": "aot_unpaired"}
CASES = [(kind, e) for kind in losses.DPO_LOSS_TYPES for e in (0.0, 0.1)
         if (e == 0 and kind != "exo_pair") or (e and kind in ("robust", "exo_pair", "aot", "aot_pair"))]


@pytest.mark.parametrize(("kind", "e"), CASES)
def test_every_loss_and_its_gradients(moved, kind, e):
    made, batch, model, rows, reference = moved
    made.loss_types, made.loss_weights = [THEIRS.get(kind, kind)], [1.0]
    made.label_smoothing = e
    made.model.zero_grad()
    made.model.train()
    loss = made._compute_loss(made.model, batch, False)
    loss.backward()
    config = dpo.Config(model="m", dataset="d", loss_type=(kind,), label_smoothing=e, max_length=30,
                        tokens_per_microbatch=60)
    state = {"delta": 0.0}
    if kind == "bco_pair":  # 1.16 has left delta out: ours is made 0 by a running mean that cancels this step's
        mean = 0.1 * (dpo.score(model, rows, config, ALONE) - reference).mean().item()
        state["delta"] = -mean
    metrics = dpo.learn(model, rows, reference, list(range(P)), config, ALONE, state, 1)
    assert abs(metrics["loss"] - loss.item()) <= TOLERANCE * max(1, abs(loss.item()))
    theirs = dict(made.model.named_parameters())
    mine = {name: p.grad for name, p in model.named_parameters()}
    largest = max(p.grad.abs().max() for p in theirs.values())
    assert largest > 1e-3
    worst = 0.0
    for name, (parameter, span, _) in hf_tensors(model.config).items():
        worst = max(worst, (mine[parameter][span or slice(None)] - theirs[name].grad).abs().max().item())
    model.zero_grad()
    print(f"\n{kind} {e}: gradients up to {largest:.1e} differ by {worst:.1e}", end="")
    assert worst <= TOLERANCE * max(1, largest)
    logged = made._metrics["train"]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                 "logps/rejected", "entropy"):
        assert metrics[name] == pytest.approx(logged[name][-1], abs=1e-4), name


def test_our_pairs_are_their_ids(moved):
    made, _, _, rows, _ = moved
    for i, row in enumerate(rows):
        assert {name: made.train_dataset[i][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} == {
            name: list(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def compare(mine, log, names):
    """Steps of ours and rows of TRL's log."""
    theirs = [row for row in log if "loss" in row]
    assert len(mine) == len(theirs) == 3
    for a, b in zip(mine, theirs):
        for name in names:
            assert a[name] == pytest.approx(float(b[name]), abs=1e-4, rel=1e-4), name


def same_weights(final, model):
    theirs = model.state_dict()
    mine = dict(checkpoint.load(final, scalar_head="score.weight" in theirs)[0].named_parameters())
    worst = 0.0
    for name, (parameter, span, _) in hf_tensors(checkpoint.ModelConfig.from_hf(
            json.loads((final / "config.json").read_text()))).items():
        worst = max(worst, (mine[parameter][span or slice(None)] - theirs[name]).abs().max().item())
    print(f"\nweights differ by {worst:.1e}", end="")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_trained_for_real(folder, tmp_path, kind):
    made = dpo_trainer(folder, tmp_path / "trl", loss_type=[kind])
    made.train()
    mine = ours(folder, tmp_path / "ours", dpo, loss_type=kind)
    compare(mine, made.state.log_history, ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins",
                                           "rewards/accuracies", "logps/chosen", "logps/rejected"])
    same_weights(tmp_path / "ours" / "final", made.model)


@pytest.mark.parametrize("centre", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_reward_model_trained_for_real(folder, tmp_path, margin, centre):
    model, tokenizer = checkpoint.load(folder / "model")
    with_scalar_head(model, 0)
    with torch.no_grad():
        model.score.weight.mul_(20)
    checkpoint.save(model, tokenizer, tmp_path / "start")
    columns = ("prompt", "chosen", "rejected") + ("margin",) * margin
    lines = [json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()]
    (tmp_path / "trl.jsonl").write_text("".join(json.dumps({n: row[n] for n in columns}) + "\n" for row in lines))
    made = in_order(trl.RewardTrainer)(
        model=str(tmp_path / "start"), train_dataset=dataset(folder, columns),
        args=trl.RewardConfig(**common(tmp_path / "trl", center_rewards_coefficient=centre)))
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    options = {"model": tmp_path / "start", "dataset": tmp_path / "trl.jsonl"}
    options |= {"center_rewards_coefficient": centre} if centre else {}
    words = [str(word) for name, value in (dict(
        output_dir=tmp_path / "ours", max_steps=3, examples_per_step=P, max_length=30, learning_rate=RATE,
        dtype="float32", lr_scheduler_type="constant") | options).items() for word in (f"--{name}", value)]
    outcome = run(words, reward)
    assert outcome.code == 0, outcome
    names = ["loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm"]
    compare(steps(tmp_path / "ours"), made.state.log_history, names)
    same_weights(tmp_path / "ours" / "final", made.model)
