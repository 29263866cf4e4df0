"""DPO and reward models: the loss of a step is that of its pairs one by one; runs killed, divided, badly fed."""

import dataclasses
import json
import math
import re
import signal
from functools import partial

import pytest
import torch
from faults import plant
from miniature import launch, rows, steps, untimed
from miniature import run as run_here
from test_dpo_losses import formula
from test_resume import at, breaks, die, full_disk

from minitrl import checkpoint, dpo, lora, losses, pairs, reward, rewards
from minitrl.distributed import World
from minitrl.losses import DPO_LOSS_TYPES
from minitrl.model import Model, ModelConfig, with_scalar_head
from minitrl.packing import pack, pack_groups
from minitrl.tokenizer import Tokenizer

ALONE = World(0, 1, torch.device("cpu"))
SCRIPTS = {"dpo": dpo, "reward": reward}
V = 40


# --- the loss of a step ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return make_model(tie_word_embeddings=False).double()


@pytest.fixture(scope="module")
def scorer():
    model = with_scalar_head(make_model().float(), 0).double()
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


def make_model(**options):
    config = ModelConfig.from_hf({
        "model_type": "qwen3", "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **options,
    })  # fmt: skip
    torch.manual_seed(0)
    model = Model(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def some_pairs(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids():
        length = int(torch.randint(1, 8, (), generator=generator))
        return torch.randint(V, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(), "margin": float(i % 3)} for i in range(n)]


def one_by_one(policy, pairs_):
    """(P, 2): each answer's log-prob from its own forward pass, whole logits, its own copy of the prompt."""
    def logprob(prompt, answer):
        logprobs = policy.logits([prompt + answer])[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
        return logprobs.gather(1, torch.tensor(answer)[:, None]).sum()

    return torch.stack([torch.stack([logprob(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids")])
                        for row in pairs_])


def gradients(model):
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def assert_close(got, true):
    for a, b in zip(got, true, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max() + 1e-9


def reference_of(n, seed=1):
    return -20 - 5 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))


def dpo_config(**options):
    return dpo.Config(**{"model": "m", "dataset": "d", "max_length": 16} | options)


def check_dpo(policy, kind, tokens_per_microbatch, state=0.25, smoothing=0.0):
    config = dpo_config(loss_type=(kind,), tokens_per_microbatch=tokens_per_microbatch, label_smoothing=smoothing)
    chosen, reference = some_pairs(), reference_of(9)
    metrics = dpo.learn(policy, chosen, reference, list(range(9)), config, ALONE, {"delta": state}, 2)
    got = gradients(policy)
    logprobs = one_by_one(policy, chosen)
    delta = state + (0.1 * (logprobs.detach() - reference).mean() - state) / 3 if kind == "bco_pair" else 0.0
    true = formula(kind, *logprobs.T, *reference.T, *pairs.lengths(chosen).T, delta=delta, e=smoothing).mean()
    true.backward()
    assert metrics["loss"] == pytest.approx(true.item(), rel=1e-5)
    assert_close(got, gradients(policy))
    assert metrics["tokens"] == pairs.tokens(chosen) and metrics["offending"] == []
    if kind == "bco_pair":
        assert metrics["state"]["delta"] == pytest.approx(delta.item(), rel=1e-5)
    return metrics, logprobs


@pytest.mark.parametrize("tokens_per_microbatch", [32, 4096])
@pytest.mark.parametrize("kind", DPO_LOSS_TYPES)
def test_packed_is_one_by_one_however_it_is_split(policy, kind, tokens_per_microbatch):
    """Shared prompts are repeated prompts; the losses that compare pairs see the whole step."""
    check_dpo(policy, kind, tokens_per_microbatch)


def test_the_metrics_are_those_of_the_pairs(policy):
    metrics, logprobs = check_dpo(policy, "sigmoid", 40)
    rewards_P2 = 0.1 * (logprobs.detach() - reference_of(9))
    margins = rewards_P2[:, 0] - rewards_P2[:, 1]
    expected = {
        "rewards/chosen": rewards_P2[:, 0].mean(), "rewards/rejected": rewards_P2[:, 1].mean(),
        "rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).double().mean(),
        "logps/chosen": logprobs[:, 0].mean(), "logps/rejected": logprobs[:, 1].mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-5), name
    assert 0 < metrics["rewards/accuracies"] < 1 and 0 < metrics["entropy"] < math.log(V)


def test_no_answer_sees_another(policy):
    """The Jacobian of an answer's log-prob with respect to the embeddings of all but its prompt and itself is 0."""
    chosen = some_pairs(4)
    packed = pack_groups([r["prompt_ids"] for r in chosen], [[r["chosen_ids"], r["rejected_ids"]] for r in chosen])
    seen = []
    hook = policy.embed_tokens.register_forward_hook(lambda module, given, made: seen.append(made))
    logprobs_P2, _ = dpo.answer_logprobs(policy, packed)
    hook.remove()
    for p in range(4):
        for k in range(2):
            own = (packed.segments_T == 3 * p) | (packed.segments_T == 3 * p + 1 + k)
            (gradient,) = torch.autograd.grad(logprobs_P2[p, k], seen, retain_graph=True)
            assert (gradient[~own] == 0).all() and (gradient[packed.segments_T == 3 * p].abs().sum(1) > 0).all()


def test_nothing_in_the_step_counts_twice_or_never(policy):
    """Faults in the step, which the tests above must see."""
    for right, wrong, kind in (
        ("sums_B.view(-1, 3)[:, 1:]", "sums_B.view(-1, 3)[:, [2, 1]]", "sigmoid"),
        ('counts = {"pairs": len(rows)', 'counts = {"pairs": None', "sigmoid"),
        ('"chosen_tokens": lengths_P2[:, 0].sum().item()', '"chosen_tokens": None', "sft"),
        ("/ (step + 1)", "/ (step + 2)", "bco_pair"),
        ('options["delta"] += ', "_ = ", "bco_pair"),
        ("(logprobs * pull_P2[members]", "(logprobs * pull_P2[: len(members)]", "aot"),
        ("x[members].to(", "x[: len(logprobs_P2)].to(", "ipo"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            plant(patch, dpo, right, wrong)
            check_dpo(policy, kind, 32)
        policy.zero_grad()


def check_reward(scorer, tokens_per_microbatch, centre=0.05):
    config = reward.Config(model="m", dataset="d", max_length=16, tokens_per_microbatch=tokens_per_microbatch,
                           center_rewards_coefficient=centre)
    chosen = some_pairs()
    metrics = reward.learn(scorer, chosen, list(range(9)), config, ALONE)
    got = gradients(scorer)
    scores = torch.stack([torch.stack([scorer.values(pack([row["prompt_ids"] + row[name]]))[-1]
                                       for name in ("chosen_ids", "rejected_ids")]) for row in chosen]).double()
    margins = torch.tensor([row["margin"] for row in chosen])
    c, r = scores.T
    true = (torch.log1p(torch.exp(-(c - r - margins))) + centre * (c + r) ** 2).mean()
    true.backward()
    assert metrics["loss"] == pytest.approx(true.item(), rel=1e-5)
    assert_close(got, gradients(scorer))
    scores = scores.detach()
    lengths = pairs.lengths(chosen)
    expected = {
        "accuracy": (scores[:, 0] > scores[:, 1]).double().mean(), "margin": (scores[:, 0] - scores[:, 1]).mean(),
        "min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max(),
        "length_correlation": torch.corrcoef(torch.stack([scores.flatten(), lengths.flatten().double()]))[0, 1],
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-5), name
    assert 0 < metrics["accuracy"] < 1 and metrics["tokens"] == pairs.tokens(chosen)


@pytest.mark.parametrize("tokens_per_microbatch", [32, 50, 4096])
def test_a_reward_models_step(scorer, tokens_per_microbatch):
    """The score is the value at the last token of the answer; margins, centring, and the length's correlation."""
    check_reward(scorer, tokens_per_microbatch)


def test_faults_in_the_reward_models_step_are_seen(scorer):
    for right, wrong in (
        ("pack.cu_seqlens[1:] - 1]", "pack.cu_seqlens[1:] - 2]"),  # the token before the end
        ("margins_P[members]", "margins_P[: len(members)]"),
        ("centre, len(rows))", "centre, len(members))"),
        (".view(-1, 3)[:, 1:]", ".view(-1, 3)[:, :2]"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            plant(patch, reward, right, wrong)
            check_reward(scorer, 32)
        scorer.zero_grad()


def test_equal_lengths_have_no_correlation():
    scores = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert "length_correlation" not in reward.statistics(scores, torch.full((2, 2), 5.0))
    assert reward.statistics(scores, scores)["length_correlation"] == pytest.approx(1)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tiny):
    """Sums: the right result over a wrong one, sometimes longer."""
    for name, numbers in (("pairs", range(30)), ("held_out", range(30, 40))):
        found = [{"prompt": f"{i}+{i % 7}=", "chosen": str(i + i % 7), "rejected": str(i + 8) * (1 + (i % 3 == 0)),
                  "margin": i % 2} for i in numbers]  # fmt: skip
        (tiny.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tiny.folder


def argv(files, output_dir, **options):
    """A run of 5 steps of 4 pairs in float32, evaluated every 2; `options` change that."""
    options = {
        "model": files / "model", "dataset": files / "pairs.jsonl", "eval_dataset": files / "held_out.jsonl",
        "output_dir": output_dir, "max_steps": 5, "examples_per_step": 4, "max_length": 14, "tokens_per_microbatch": 28,
        "learning_rate": 1e-2, "dtype": "float32", "eval_steps": 2, "save_steps": 2, "logging_steps": 1, **options,
    }  # fmt: skip
    words = []
    for name, value in options.items():
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


KINDS = {
    "dpo": ("dpo", {}),
    "dpo aot bco_pair": ("dpo", {"loss_type": ("aot", "bco_pair"), "loss_weights": (1.0, 0.5), "dtype": "bfloat16"}),
    "reward": ("reward", {"center_rewards_coefficient": 0.01}),
}
FAULTS = {  # where the process dies: function, the step whose metrics are logged by then, which call
    "backward": ("minitrl.pairs:pack_groups", 3, 2),
    "optimizer": ("minitrl.training:Optimizer._round_masters", 3, 1),
    "rename": ("os:rename", 4, 1),
    "final": ("minitrl.checkpoint:_save_weights", 5, 1),
}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """For each kind of run the folder of one that nothing happened to, in one process and in two."""
    made = {}

    def folder(kind, world=1):
        if (kind, world) not in made:
            made[kind, world] = tmp_path_factory.mktemp("whole") / "run"
            script, options = KINDS[kind]
            outcome = launch(argv(files, made[kind, world], **options), world, main=SCRIPTS[script].main)
            assert outcome.codes == [0] * world, outcome
        return made[kind, world]

    return folder


def assert_same_end(one, other):
    assert untimed(one) == untimed(other)
    for file in ("final/model.safetensors", "checkpoints/step_5/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", FAULTS)
def test_kill_9(files, tmp_path, whole, where, kind):
    script, options = KINDS[kind]
    words = argv(files, tmp_path, **options)
    assert launch(words, hooks={0: partial(at, *FAULTS[where], die)}, main=SCRIPTS[script].main).code == -signal.SIGKILL
    assert len(steps(tmp_path)) in (3, 4, 5) and not (tmp_path / "final").exists()
    outcome = launch([*words, "--resume"], main=SCRIPTS[script].main)
    assert outcome.code == 0 and "--resume: going on after step" in outcome.out, outcome
    assert ("reference: log-probs read from" in outcome.out) == (script == "dpo")
    assert_same_end(whole(kind), tmp_path)


def test_an_error_amid_a_step_leaves_the_running_mean_alone(files, tmp_path, whole):
    """The step's mean is known before its gradients: a checkpoint between the two must not hold it."""
    kind = "dpo aot bco_pair"
    words = argv(files, tmp_path, **KINDS[kind][1])
    hook = partial(at, "minitrl.training:Optimizer.step", 3, 1, breaks)  # after all of the step's passes
    outcome = launch(words, hooks={0: hook}, main=dpo.main)
    assert outcome.code == 1 and "step 3 is saved" in outcome.out, outcome
    assert launch([*words, "--resume"], main=dpo.main).code == 0
    assert_same_end(whole(kind), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(files, whole, kind):
    one, two = whole(kind), whole(kind, 2)
    tolerance = 0.05 if "bco" in kind else 1e-5  # bfloat16 weights round
    for a, b in zip(untimed(one), untimed(two), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    load = partial(checkpoint.load, scalar_head=kind == "reward")
    models = [dict(load(folder / "final")[0].named_parameters()) for folder in (one, two)]
    start = dict(load(files / "model")[0].named_parameters())
    moved = max((p - start[name]).abs().max() for name, p in models[0].items() if name != "score.weight")
    apart = max((p - models[1][name]).abs().max() for name, p in models[0].items())
    assert apart < (0.05 if "bco" in kind else 1e-4) * 10 * moved and moved > 0.01


def test_kill_9_of_one_process_of_two(files, tmp_path, whole):
    kind = "dpo aot bco_pair"
    words = argv(files, tmp_path, **KINDS[kind][1])
    outcome = launch(words, 2, hooks={1: partial(at, *FAULTS["backward"], die)}, main=dpo.main)
    assert outcome.codes[1] == -signal.SIGKILL
    assert launch([*words, "--resume"], 2, main=dpo.main).codes == [0, 0]
    assert_same_end(whole(kind, 2), tmp_path)


def test_dpo_starts_at_ln_2_and_learns(whole):
    first, *_, last = untimed(whole("dpo"))
    assert first["step"] == 0 and abs(first["eval/loss"] - math.log(2)) < 1e-5
    made = steps(whole("dpo"))
    assert abs(made[0]["loss"] - math.log(2)) < 1e-5 and abs(made[0]["rewards/margins"]) < 1e-5
    assert last["loss"] < 0.69 and last["rewards/margins"] > 0
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "entropy", "epoch"} <= last.keys()
    assert {"eval/rewards/accuracies", "eval/rewards/margins", "eval/loss"} <= last.keys()
    assert not any(name.endswith(("state", "offending")) for name in last)


def test_the_reference_is_kept_by_model_and_data(files, tmp_path):
    """Read by the next run on the same model and data, and by no other; a file that is not whole is computed again."""
    def go(name, **options):
        outcome = run_here(argv(files, tmp_path / name, reference_cache=tmp_path / "kept", max_steps=1, **options), dpo)
        assert outcome.code == 0, outcome
        return "reference: log-probs read from" in outcome.out, outcome.out

    def kept():
        return sorted(path.name for path in (tmp_path / "kept").iterdir())

    assert not go("one")[0] and len(kept()) == 1
    assert go("two", learning_rate=1e-3, beta=0.5)[0] and untimed(tmp_path / "two")[0]["eval/rewards/margins"] == 0
    assert not go("three", eval_dataset=None, eval_steps=None)[0] and len(kept()) == 2  # other rows
    changed = tmp_path / "model"
    model, tokenizer = checkpoint.load(files / "model")
    with torch.no_grad():
        model.norm.weight.mul_(1.01)
    checkpoint.save(model, tokenizer, changed)
    assert not go("four", model=changed)[0] and len(kept()) == 3
    for path in (tmp_path / "kept").glob("*/checkpoints/step_0/reference.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    was_read, out = go("five")
    assert not was_read and "reference: computed again, since" in out
    assert untimed(tmp_path / "five") == untimed(tmp_path / "one")
    assert go("six")[0]


def test_adapters(files, tmp_path):
    """The reference is the model without them, and the start; a reward model's adapter has to be merged to reward."""
    options = dict(use_peft=True, lora_r=4, lora_alpha=8, examples_per_step=30)
    for name, script in SCRIPTS.items():
        outcome = run_here(argv(files, tmp_path / name, **options), script)
        assert outcome.code == 0, outcome
    made = steps(tmp_path / "dpo")
    assert abs(made[0]["loss"] - math.log(2)) < 1e-5 and made[-1]["loss"] < made[1]["loss"] - 1e-3
    made = steps(tmp_path / "reward")
    assert made[-1]["loss"] < made[0]["loss"]
    with pytest.raises(ValueError, match="--reward .*: an adapter's folder; merge it into its base"):
        rewards.load_rewards([str(tmp_path / "reward" / "final")])
    merge = ["merge", "--adapter", str(tmp_path / "reward" / "final"), "--output_dir", str(tmp_path / "merged")]
    assert lora.main(merge) == 0
    assert [name for name, _ in rewards.load_rewards([str(tmp_path / "merged")])] == ["merged"]


def test_without_a_reference(files, tmp_path):
    """Rewards are log-probs then, and no pass is spent on a reference."""
    assert run_here(argv(files, tmp_path, reference_free=True, max_steps=1), dpo).code == 0
    assert not (tmp_path / "reference").exists()
    first = steps(tmp_path)[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * first["logps/chosen"])


def test_a_full_disk_costs_the_reference_alone(files, tmp_path):
    """What is computed is used; the run says that it is not kept."""
    outcome = launch(argv(files, tmp_path, max_steps=1, reference_cache=tmp_path / "kept"),
                     hooks={0: partial(at, "minitrl.disk:write_tensors", 0, 1, full_disk)}, main=dpo.main)
    assert outcome.code == 0 and "reference: its log-probs are not kept" in outcome.out, outcome


def test_not_a_number_stops_the_run_and_names_the_rows(files, tmp_path):
    model, tokenizer = checkpoint.load(files / "model")
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.encode("9")[0]] = math.nan
    checkpoint.save(model, tokenizer, tmp_path / "model")
    for name, script in SCRIPTS.items():
        out = tmp_path / name
        outcome = run_here(argv(files, out, model=tmp_path / "model", eval_dataset=None, eval_steps=None), script)
        assert outcome.code == 1 and "the loss is nan; nothing was updated" in outcome.err, outcome
        [file] = out.glob("not_finite_step_1_rank_0.json")
        nine = tokenizer.encode("9")[0]
        found = json.loads(file.read_text())["rows"]
        if name == "reward":  # a tied head makes every log-prob NaN
            assert found and all(nine in sum(row["ids"].values(), []) for row in found)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss_type="sigmod"), "--loss_type: 'sigmod' is none of .*; did you mean sigmoid"),
        (dict(loss_type=("sigmoid", "sft"), loss_weights=1.0), "--loss_weights .*: must be 2 numbers"),
        (dict(beta=0), "--beta 0.0: must be above 0"),
        (dict(label_smoothing=0.5), "--label_smoothing 0.5: must be at least 0 and below 0.5"),
        (dict(label_smoothing=0.1, loss_type="ipo"), "--label_smoothing 0.1: must be 0 but with one of sigmoid"),
        (dict(discopop_tau=0), "--discopop_tau 0.0: must be above 0"),
        (dict(tokens_per_microbatch=27), "--tokens_per_microbatch 27: must be at least 2 . --max_length = 28"),
        (dict(examples_per_step=0), "--examples_per_step 0: must be at least 1"),
        (dict(max_length=1), "--max_length 1: must be at least 2"),
        (dict(max_length=3), "all 30 pairs are longer than --max_length 3"),
        (dict(dataset=None), "--model .*: must be given together with --dataset"),
        (dict(model=None), "--dataset .*: must be given together with --model"),
        (dict(eval_dataset=None), "--eval_steps 2: must be given with --eval_dataset"),
        (dict(per_device_train_batch_size=8), "per_device_train_batch_size: not an option here"),
    ],
)  # fmt: skip
def test_bad_options(files, tmp_path, options, message):
    outcome = run_here(argv(files, tmp_path, **options), dpo)
    assert outcome.code != 0 and outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err


def test_bad_input_to_a_reward_model(files, tmp_path):
    outcome = run_here(argv(files, tmp_path / "a", center_rewards_coefficient=-1), reward)
    assert "--center_rewards_coefficient -1.0: must be at least 0" in outcome.err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n{"prompt": "1+1=", "chosen": "2"}\n')
    outcome = run_here(argv(files, tmp_path / "b", dataset=bad), reward)
    assert outcome.code == 1 and outcome.err.startswith(f"error: {bad}:2: no \"rejected\"")


def test_resume_refuses_what_was_changed(files, tmp_path):
    assert run_here(argv(files, tmp_path, max_steps=1), dpo).code == 0
    outcome = run_here([*argv(files, tmp_path, max_steps=2, beta=0.2), "--resume"], dpo)
    assert outcome.code == 1 and "beta was 0.1, is 0.2" in outcome.err
    data_file, lines = files / "pairs.jsonl", (files / "pairs.jsonl").read_text()
    try:
        data_file.write_text(lines.replace('"chosen": "0"', '"chosen": "1"'))
        outcome = run_here([*argv(files, tmp_path, max_steps=2), "--resume"], dpo)
    finally:
        data_file.write_text(lines)
    assert outcome.code == 1 and "changed since the run began: what is in --dataset" in outcome.err


# --- a reward model as a reward --------------------------------------------------------------------------------------


def test_a_reward_models_folder_is_a_reward(tiny, files, tmp_path, whole):
    """GRPO trains on its scores, which are the values at the sampled completions' last tokens."""
    folder = whole("reward") / "final"
    outcome = run_here(with_reward(tiny, tmp_path, folder))
    assert outcome.code == 0 and "reads texts" not in outcome.out, outcome
    model, tokenizer = checkpoint.load(folder, scalar_head=True)
    for row in rows(tmp_path, "completions"):
        ids = tokenizer.encode(row["prompt"]) + row["completion_ids"]
        with torch.no_grad():
            assert row["reward"] == pytest.approx(model.values(pack([ids]))[-1].item(), abs=1e-5)
    assert f"rewards/{folder.parent.name}/mean" in steps(tmp_path)[0]


def with_reward(tiny, output_dir, folder, **options):
    words = tiny.argv(output_dir, max_steps=2, **options)
    place = words.index("--reward")
    return [*words[: place + 1], str(folder), *words[place + 2 :]]


def test_a_reward_model_with_another_tokenizer_reads_texts(files, tmp_path, whole):
    """The same scores where the texts' ids are the same, and an end token only where the completion came to its end."""
    folder = tmp_path / "other"
    model, tokenizer = checkpoint.load(whole("reward") / "final", scalar_head=True)
    policy_tokenizer = checkpoint.load(files / "model")[1]
    tokenizer.chat_template = "{{ messages }}"
    checkpoint.save(model, tokenizer, folder)
    said, [(name, function)] = [], rewards.load_rewards([str(folder)])
    rewards.open_models([(name, function)], policy_tokenizer, "cpu", said.append)
    assert name == "other" and len(said) == 1 and "it reads texts, not ids" in said[0]
    rewards.open_models([(name, function)], policy_tokenizer, "cpu", said.append)
    assert len(said) == 1
    ended, cut = tokenizer.encode("12") + [0], tokenizer.encode("12")
    scores = function(["5+7=", "5+7=", "1+1="], ["12", "12", "3"], [ended, cut, tokenizer.encode("3") + [0]])
    with torch.no_grad():
        for score, ids in zip(scores, (ended, cut), strict=False):
            true = model.values(pack([tokenizer.encode("5+7=") + ids]))[-1].item()
            assert score == pytest.approx(true, abs=1e-5)


def test_a_reward_model_without_positions_for_a_text_says_so(files, tmp_path, whole):
    model, tokenizer = checkpoint.load(whole("reward") / "final", scalar_head=True)
    short = dataclasses.replace(model.config, source=model.config.source | {"max_position_embeddings": 8})
    model.config = short
    checkpoint.save(model, tokenizer, tmp_path / "short")
    functions = rewards.load_rewards([str(tmp_path / "short")])
    rewards.open_models(functions, tokenizer, "cpu")
    ids = tokenizer.encode("1234")
    assert rewards.score(functions, 60, ["5+7="], ["1234"], [ids], {}, 0).isfinite().all()
    with pytest.raises(ValueError, match="reward 'short' raised .*9 tokens.* 8 positions"):
        rewards.score(functions, 60, ["5+7="], ["12341"], [[*ids, ids[0]]], {}, 0)


def test_scores_come_in_the_order_of_the_samples(files, whole, monkeypatch):
    """Whatever the packs; and a sample's score does not depend on its neighbours."""
    folder = whole("reward") / "final"
    [(name, function)] = rewards.load_rewards([str(folder)])
    _, tokenizer = checkpoint.load(files / "model")
    rewards.open_models([(name, function)], tokenizer, "cpu")
    texts = [str(i) * (1 + i % 4) for i in range(12)]
    prompts = [f"{i // 3}+1=" for i in range(12)]
    ids = [tokenizer.encode(text) + [0] for text in texts]
    expected = [function([p], [t], [i])[0] for p, t, i in zip(prompts, texts, ids)]
    assert torch.tensor(expected).std() > 0.01
    for capacity in (8, 20, 8192):
        monkeypatch.setattr(rewards.RewardModel, "capacity", capacity)
        assert function(prompts, texts, ids) == pytest.approx(expected, abs=1e-5)


def test_folders_that_are_no_reward_are_refused(files, tmp_path):
    for folder, message in ((files / "model", "a language model's folder"), (tmp_path, "config.json: no such file")):
        with pytest.raises(ValueError, match=f"--reward {folder}: .*{message}"):
            rewards.load_rewards([str(folder)])
    with pytest.raises(ValueError, match="neither file.py:function, a reward model's folder, nor one of"):
        rewards.load_rewards(["no_such_folder"])


def test_a_reward_models_digest_is_of_its_files(tmp_path, whole):
    model, tokenizer = checkpoint.load(whole("reward") / "final", scalar_head=True)
    checkpoint.save(model, tokenizer, tmp_path / "rm")
    [(name, before)] = rewards.fingerprints([str(tmp_path / "rm"), "exact"]).items()
    assert name == f"--reward {tmp_path / 'rm'}"
    with torch.no_grad():
        model.score.weight[0, 0] += 1
    checkpoint.save(model, tokenizer, tmp_path / "rm")
    assert rewards.fingerprints([str(tmp_path / "rm")])[name] != before


@pytest.mark.parity
def test_the_final_folder_is_one_of_transformers(files, whole):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        whole("reward") / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.config.num_labels == 1
    model, tokenizer = checkpoint.load(whole("reward") / "final", scalar_head=True)
    for text in ("1+1=2", "12+5=17", "3"):
        ids = tokenizer.encode(text) + [0]
        with torch.no_grad():
            score = theirs.float().eval()(torch.tensor([ids])).logits[0, 0].item()
            assert model.values(pack([ids]))[-1].item() == pytest.approx(score, abs=1e-4)
