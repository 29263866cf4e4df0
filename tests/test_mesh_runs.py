"""Whole runs of each script on a mesh of processes end as the same run in one process does.

In float64, so that what differs is a mistake: metrics of every step and final weights agree to TOLERANCE, which is what
is left of numbers that are kept in float32 whatever the model is (sampled log-probs, scores of pairs). A vocabulary of
2,100 tokens is more than two of the units in which it is cut; prompts and answers are of unequal length, so that
processes have micro-batches in unequal numbers, and with --shard some empty ones.
"""

import copy
import functools
import importlib
import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from miniature import backend_of, launch, rows, steps, untimed
from processes import run_processes
from safetensors.torch import load_file

from minitrl import checkpoint, data, distributed, dpo, experience, grpo, packing, pairs, ppo, reward, sft
from minitrl.config import parse
from minitrl.distributed import ALONE, World
from minitrl.model import Model, ModelConfig, with_scalar_head
from minitrl.rollout import Completion
from minitrl.rollout_client import OwnEngine
from minitrl.tokenizer import Tokenizer

TOLERANCE = 2e-6
VOCABULARY = 2100
ENDS = list(range(0, VOCABULARY, 8))  # so many tokens end a completion that most end before they are cut
SCRIPTS = {"grpo": grpo, "ppo": ppo, "sft": sft, "reward": reward, "dpo": dpo}
MESHES = {
    "shard 2": {"shard": 2},
    "tensor 2": {"tensor": 2},
    "shard 2, tensor 2": {"shard": 2, "tensor": 2},
    "replicate 2, shard 2": {"replicate": 2, "shard": 2},
    "shard 4": {"shard": 4},
    "shard 2, sampling in slices": {"shard": 2, "rollout_tensor": 2},
    "sampling in slices": {"replicate": 2, "rollout_tensor": 2},
    "tensor 2, sampling whole": {"tensor": 2, "rollout_tensor": 1},
    "shard 2, offloaded": {"shard": 2, "cpu_offload": True},
}
WORDS = '''
def odd(completions, step):
    """Depends on every character."""
    return [sum(map(ord, c)) % 7 / 7 + len(c) / 100 for c in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model of VOCABULARY tokens, prompts, demonstrations and pairs of it, and a reward."""
    path, draw = tmp_path_factory.mktemp("mesh"), random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(VOCABULARY - 1)]
    vocabulary = {character: i for i, character in enumerate(["<eos>", *characters])}
    backend = backend_of(vocabulary)
    config = ModelConfig.from_hf({
        "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "eos_token_id": ENDS,
    })  # fmt: skip
    model, generator = Model(config), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(name.endswith("norm.weight")), std=0.3, generator=generator)
    checkpoint.save(model, Tokenizer(backend, ENDS), path / "model")
    letters = [character for character, i in vocabulary.items() if i not in ENDS]

    def text(most: int) -> str:
        return "".join(draw.choices(letters, k=draw.randint(1, most)))

    rows = {
        "prompts": [{"prompt": text(15)} for _ in range(20)],
        "demonstrations": [{"prompt": text(15), "completion": text(12)} for _ in range(20)],
        "pairs": [{"prompt": text(8), "chosen": text(8), "rejected": text(8)} for _ in range(20)],
    }
    for name, values in rows.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
        (path / f"{name}_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values[:5]))
    (path / "rewards.py").write_text(WORDS)
    return path


def argv(folder: Path, script: str, output_dir, **options) -> list[str]:
    """The command line of a run of 3 steps."""
    kind = {"sft": "demonstrations", "reward": "pairs", "dpo": "pairs"}.get(script, "prompts")
    sampling = {
        "reward": f"{folder}/rewards.py:odd", "prompts_per_step": 3, "num_generations": 3, "max_prompt_length": 16,
        "max_completion_length": 12, "tokens_per_microbatch": 44,
    }  # fmt: skip
    learning = {"examples_per_step": 5, "max_length": 28 if script == "sft" else 20, "tokens_per_microbatch": 40}
    options = {
        "model": folder / "model", "dataset": folder / f"{kind}.jsonl", "eval_dataset": folder / f"{kind}_out.jsonl",
        "output_dir": output_dir, "max_steps": 3, "eval_steps": 2, "learning_rate": 1e-2, "dtype": "float32",
        "logging_steps": 1, "timeout": 60, **(sampling if kind == "prompts" else learning), **options,
    }  # fmt: skip
    words = ((name, f"no_{name}")[value is False] for name, value in options.items())
    return [word for name, value in zip(words, options.values())
            for word in (f"--{name}", *([] if isinstance(value, bool) else [str(value)]))]


def in_float64(script: str) -> None:
    """Have the script's runs compute in float64, which no option asks for."""
    module = importlib.import_module(f"minitrl.{script}")
    parse = module.parse

    def wrapper(*arguments, **given):
        config = parse(*arguments, **given)
        config.dtype = "float64"
        return config

    module.parse = wrapper


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Where the run of a script with such options ended in one process."""

    @functools.cache
    def end(script: str, **options) -> Path:
        path = tmp_path_factory.mktemp("alone") / "run"
        assert launch(argv(folder, script, path, **options), 1, {0: double(script)}, SCRIPTS[script].main).codes == [0]
        return path

    return end


def double(script: str):
    return functools.partial(in_float64, script)


def assert_same_end(one: Path, other: Path, held_out: bool = True) -> None:
    """Every metric that no clock decides, every completion, all weights."""
    unlike = ("val/clipfrac_avg", *([] if held_out else ["eval/"]))  # the first counts ties, which rounding decides
    ours, theirs = ([{name: value for name, value in row.items() if not name.startswith(unlike)}
                     for row in untimed(path)] for path in (one, other))  # fmt: skip
    assert len(ours) == len(theirs) and [row.keys() for row in ours] == [row.keys() for row in theirs]
    if (one / "completions.jsonl").exists():
        said = [[{**row, "advantage": None} for row in rows(path, "completions")] for path in (one, other)]
        assert said[0] == said[1]
    for row, found in zip(ours, theirs):
        assert found == pytest.approx(row, rel=TOLERANCE, abs=TOLERANCE)
    for name in ("final", "value_model"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            weights, got = (load_file(path / name / "model.safetensors") for path in (one, other))
            assert weights.keys() == got.keys()
            for key, value in weights.items():
                torch.testing.assert_close(got[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"{key}: {m}")


def trains_alike(folder, alone, tmp_path, script: str, mesh: str, **options) -> None:
    """The run on a mesh ends as the one in one process."""
    sizes = {name: value for name, value in MESHES[mesh].items() if name in ("replicate", "shard", "tensor")}
    world = math.prod(sizes.values())
    words = argv(folder, script, tmp_path / "run", **options, **MESHES[mesh])
    outcome = launch(words, world, dict.fromkeys(range(world), double(script)), SCRIPTS[script].main)
    assert outcome.codes == [0] * world, outcome.err[-3000:]
    assert "Warning" not in outcome.err, outcome.err[-3000:]
    assert_same_end(alone(script, **options), tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in steps(tmp_path / "run")), "nothing was learnt"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_on_a_mesh(folder, alone, tmp_path, script):
    trains_alike(folder, alone, tmp_path, script, "shard 2, tensor 2")


MOVING = {"beta": 0.1, "num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 1}
RARE = {"top_entropy_quantile": 0.5, "dynamic_sampling": 1, "mask_truncated_completions": True}
MORE = [
    ("grpo", "shard 2", {}),
    ("grpo", "tensor 2", {"loss_type": "bnpo"}),  # whose loss depends on the micro-batches: here they are the same
    ("grpo", "shard 4", MOVING),
    ("grpo", "replicate 2, shard 2", RARE),
    ("grpo", "shard 2, tensor 2", MOVING | RARE),
    ("grpo", "shard 2, sampling in slices", RARE),
    ("grpo", "sampling in slices", {}),
    ("grpo", "tensor 2, sampling whole", {}),
    ("grpo", "shard 2, offloaded", MOVING),
    ("ppo", "shard 2", {"num_mini_batches": 2}),
    ("ppo", "tensor 2", {"num_mini_batches": 2}),
    ("ppo", "shard 4", {"kl_coef": 0.0}),
    ("sft", "tensor 2", {}),
    ("sft", "shard 4", {"packing": True}),
    ("reward", "shard 4", {"center_rewards_coefficient": 0.1}),
    ("dpo", "shard 4", {"loss_type": "aot_pair"}),  # which compares the pairs of a step with each other
    ("dpo", "tensor 2", {"reference_free": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("script, mesh, options", MORE, ids=lambda value: value if isinstance(value, str) else "")
def test_other_runs_on_other_meshes(folder, alone, tmp_path, script, mesh, options):
    trains_alike(folder, alone, tmp_path, script, mesh, **options)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_embedded_default_on_a_mesh(tmp_path, script):
    """Two shards of it; its vocabulary of eight is not cut, and that is said by name."""
    options = ["--max_steps", "2", "--seed", "1", "--learning_rate", "1e-3", "--logging_steps", "1"]
    for name, more in (("alone", []), ("mesh", ["--shard", "2"])):
        words = [*options, "--output_dir", str(tmp_path / name), *more]
        outcome = launch(words, 1 + bool(more), main=SCRIPTS[script].main)
        assert outcome.codes == [0] * (1 + bool(more)), outcome.err[-3000:]
    ours, theirs = (untimed(tmp_path / name) for name in ("alone", "mesh"))
    for row, found in zip(ours, theirs, strict=True):
        row.pop("val/clipfrac_avg", 0), found.pop("val/clipfrac_avg", 0)  # see assert_same_end
        assert found == pytest.approx(row, rel=1e-3, abs=1e-3)  # float32, and AdamW's first steps
    outcome = launch([*options, "--output_dir", str(tmp_path / "cut"), "--tensor", "2"], 2, main=SCRIPTS[script].main)
    assert outcome.codes == [1, 1] and "--tensor 2: the model's vocab_size, 8" in outcome.err, outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_with_shards(folder, tmp_path, dtype):
    """The sampler has the trainer's weights to the bit, and computes what it computes."""
    words = argv(folder, "grpo", tmp_path, deterministic=True, dtype=dtype, shard=2)
    outcome = launch(words, 2)
    assert outcome.codes == [0, 0], outcome.err
    assert all(row["sampling/sampling_logp_difference/max"] == 0 for row in steps(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo", "ppo", "dpo"])
def test_a_run_goes_on_on_another_mesh(folder, alone, tmp_path, script):
    """One step in one process, one on two shards, the last on two slices."""
    path = tmp_path / "run"
    options = {"num_iterations": 3, "beta": 0.1} if script == "grpo" else {}
    for step, mesh in enumerate([{}, {"shard": 2}, {"tensor": 2}], 1):
        world = 1 + bool(mesh)
        now = {"max_steps": step, "resume": step > 1, "lr_scheduler_type": "constant"}
        words = argv(folder, script, path, **options, **mesh, **now)
        outcome = launch(words, world, dict.fromkeys(range(world), double(script)), SCRIPTS[script].main)
        assert outcome.codes == [0] * world, outcome.err[-3000:]
        shutil.rmtree(path / "final") if step < 3 else None
    whole = alone(script, **options, lr_scheduler_type="constant")
    assert_same_end(whole, path, held_out=False)


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_micro_batch_weighs_exactly_nothing(folder, tmp_path, monkeypatch, script):
    """Loss, metrics and every bit of the gradient are the same with empty micro-batches among the others."""
    options = {"loss_type": "bnpo"} if script == "grpo" else {}
    config = parse(SCRIPTS[script].Config, argv(folder, script, tmp_path, **options))
    model, tokenizer = checkpoint.load(folder / "model", torch.float64, scalar_head=script == "reward")
    documents = data.load_demonstrations(folder / "demonstrations.jsonl", tokenizer, None, False, None)
    preferences = pairs.load_preferences(folder / "pairs.jsonl", tokenizer, None)[0][:5]
    run_, rollouts = SimpleNamespace(world=ALONE), some_rollouts()
    value_model = with_scalar_head(copy.deepcopy(model), 0) if script == "ppo" else None

    def learn() -> tuple[dict, list[torch.Tensor]]:
        if script == "grpo":
            metrics = grpo.backward(model, rollouts, {}, grpo.micro_batches(rollouts, config, ALONE), config, run_, 0)
        elif script == "ppo":
            judged, known = ppo.judge(model, None, value_model, rollouts, config, ALONE)
            plan = ppo.minibatch(judged, 0, config, ALONE)
            metrics = ppo.backward(model, value_model, judged, known, plan, config, run_, 0)
        elif script == "sft":
            metrics = sft.learn(model, documents, np.arange(5), config, ALONE)[0]
        elif script == "reward":
            metrics = reward.learn(model, preferences, [], config, ALONE)
        else:
            given = torch.zeros(5, 2), [], config, ALONE, {"delta": 0.0}, 0
            metrics = dpo.learn(model, preferences, *given)
        return metrics, gradients(model) + (gradients(value_model) if value_model else [])

    plain, before = learn()
    for module in (experience, packing, pairs):
        plan = module.plan_micro_batches
        padded = lambda *args, plan=plan: [[[], *batches, [], []] for batches in plan(*args)]  # noqa: E731
        monkeypatch.setattr(module, "plan_micro_batches", padded)
    metrics, after = learn()
    assert metrics == plain and metrics["loss"] != 0
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert any(grad.any() for grad in after)


def some_rollouts() -> experience.Rollouts:
    """Two prompts with three completions each, of unequal length."""
    draw, lengths_PG = torch.Generator().manual_seed(0), torch.tensor([[3, 1, 12], [5, 7, 2]])
    P, G, R = *lengths_PG.shape, int(lengths_PG.sum())
    rewards_PG = torch.rand(P, G, generator=draw)
    return experience.with_advantages(experience.Rollouts(
        prompt_tokens=torch.randint(VOCABULARY, (9,), generator=draw), prompt_lengths_P=torch.tensor([4, 5]),
        tokens_R=torch.randint(VOCABULARY, (R,), generator=draw), lengths_PG=lengths_PG,
        sampler_logprobs_R=-7 - torch.rand(R, generator=draw), truncated_PG=lengths_PG == 12,
        rewards_PGF=rewards_PG[..., None], rewards_PG=rewards_PG, advantages_PG=torch.zeros(P, G),
        versions_PG=torch.zeros(P, G, dtype=torch.int64),
    ), "group")  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_plans_are_even_with_shards(ranks):
    """Each rank has as many micro-batches as the one that has most, empty ones last; what is in them is the same."""
    rollouts = some_rollouts()
    plain = World(0, ranks, ALONE.device)
    sharded = World(0, ranks, ALONE.device, None, {"shard": plain, "data": plain})
    everything = torch.ones(2, 3, dtype=torch.bool)
    plan, even = (rollouts.plan(everything, 16, world) for world in (plain, sharded))
    most = max(map(len, plan))
    assert [len(batches) for batches in even] == [most] * ranks
    assert [[batch for batch in batches if batch] for batches in even] == plan
    assert all(batches == sorted(batches, key=lambda batch: not batch) for batches in even)
    pack, index_C = rollouts.pack([])
    assert pack.lengths == (1,) and not pack.completion_T.any() and len(index_C) == 0


class Teller:
    """An engine of a team of two, whose completions tell whose they are."""

    def __init__(self, rank: int):
        self.tensor = World(rank % 2, 2, ALONE.device)

    def generate(self, prompts, n, seed, **_):
        return [[Completion([p[0], s, g], [-1.0] * 3, f"{p[0]} {s} {g}", "stop") for g in range(n)]
                for p, s in zip(prompts, seed, strict=True)]  # fmt: skip


def teams(folder: str) -> None:
    world = distributed.start("cpu", 60)

    def counted(completions):
        with open(f"{folder}/{world.rank}", "a") as file:
            file.writelines(f"{c}\n" for c in completions)
        return [float(sum(map(int, c.split()))) for c in completions]

    rows_ = [{"prompt": f"p{p}", "prompt_ids": [p], "columns": {}} for p in range(5)]
    given = rows_, [10 + p for p in range(5)], [("counted", counted)], torch.ones(1)
    options = {"num_generations": 2, "step": 0, "timeout_s": 60, "sampling": {}}
    got = experience.generate_and_score(Teller(world.rank), *given, world, **options)
    for p in range(5):
        assert [got.completion(p, g) for g in range(2)] == [[p, 10 + p, g] for g in range(2)]
    assert got.rewards_PG.tolist() == [[10.0 + 2 * p + g for g in range(2)] for p in range(5)]
    distributed.stop()


def test_a_team_samples_together_and_its_first_rewards(tmp_path):
    """Four processes in teams of two: all hold every completion, each of which was rewarded once."""
    run_processes(teams, 4, str(tmp_path))
    asked = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert sorted(asked) == ["0", "2"]
    assert [len(asked[rank]) for rank in "02"] == [4, 6] and len({*asked["0"], *asked["2"]}) == 10


def gathered(folder: str) -> None:
    world = distributed.start("cpu", 60, (None, 2, 1))
    model, _ = checkpoint.load(f"{folder}/model", world=world)
    rollouts, config = some_rollouts(), SimpleNamespace(temperature=1.0)
    plan = rollouts.plan(torch.ones(2, 3, dtype=torch.bool), 40, world)
    experience.score(model, rollouts, plan, config, world)
    assert all(hasattr(p, "to_local") for p in model.parameters()), "parameters are held whole"
    distributed.stop()


def test_a_model_that_has_scored_lets_go_of_what_it_gathered(folder):
    run_processes(gathered, 2, str(folder))


def die_amid_step_2() -> None:
    forward, calls = Model.logprob_sum, []

    def logprob_sum(model, *given):
        calls.append(torch.is_grad_enabled())
        return forward(model, *given) if calls.count(True) < 3 else os._exit(9)

    Model.logprob_sum = logprob_sum


def test_a_process_that_dies_is_one_line_where_pytorch_gathers_too(folder, tmp_path):
    outcome = launch(argv(folder, "sft", tmp_path / "run", shard=2), 2, {1: die_amid_step_2}, sft.main)
    assert outcome.codes == [1, 9]
    assert re.search(r"^error: rank 0 of 2, in a step: another process is gone or too late", outcome.err, re.M)
    assert "Traceback" not in outcome.err, outcome.err


def fail_alone_amid_sampling() -> None:
    """In the third generation, which is step 2's: the first one is the evaluation's."""
    generate, calls = OwnEngine.generate, []

    def counted(engine, *prompts, **options):
        calls.append(1)
        if len(calls) == 3:
            engine._schedule = lambda: [][0]
        return generate(engine, *prompts, **options)

    OwnEngine.generate = counted


def test_a_process_that_fails_alone_in_sampling_keeps_nobody_waiting(folder, tmp_path):
    """Its neighbour, which samples with it, does not wait for --timeout, which here is longer than a test may last."""
    words = argv(folder, "grpo", tmp_path / "run", rollout_tensor=2, timeout=300)
    outcome = launch(words, 2, {1: fail_alone_amid_sampling})
    assert outcome.codes == [1, 1] and "IndexError" in outcome.err, outcome
    assert "another process is gone" in outcome.err and "step 1 is saved; --resume goes on" in outcome.out, outcome


REFUSED = [
    ({"shard": 2, "use_peft": True}, "--use_peft True: must be off with --shard or --tensor above 1"),
    ({"tensor": 2, "use_peft": True}, "--use_peft True: must be off with --shard or --tensor above 1"),
    ({"tensor": 2, "deterministic": True}, "--deterministic: a model cut by --tensor"),
    ({"rollout_tensor": 2, "deterministic": True}, "--rollout_tensor 2: must be 1 with --use_peft or --deterministic"),
    ({"rollout_tensor": 3}, "--rollout_tensor 3: must be a divisor of 2"),
    ({"rollout_tensor": 0}, "--rollout_tensor 0: must be a divisor of 2"),
    ({"cpu_offload": True}, "--cpu_offload True: must be off without --shard above 1"),
    ({"shard": 3}, "--replicate 1 --shard 3 --tensor 1: the product must be the number of processes, 2"),
]


@pytest.mark.parametrize("options, said", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_built_is_refused_by_name(folder, tmp_path, options, said):
    outcome = launch(argv(folder, "grpo", tmp_path, **options), 2)
    assert outcome.codes == [1, 1] and said in outcome.err, outcome.err


def test_a_samplers_slices_are_refused_by_their_own_name(folder, tmp_path):
    outcome = launch(argv(folder, "grpo", tmp_path, rollout_tensor=4), 4)
    message = "error: --rollout_tensor 4: does not divide the model's num_key_value_heads, 2"
    assert outcome.codes == [1] * 4 and message in outcome.err, outcome.err


@pytest.mark.parametrize("name", ["rollout_tensor", "rollout_cache_gib"])
def test_a_server_has_slices_and_a_cache_of_its_own(folder, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        parse(grpo.Config, argv(folder, "grpo", tmp_path, rollout_server="http://127.0.0.1:1", **{name: 2}))
    assert re.search(f"--{name} 2.*: must be left out with --rollout_server", capsys.readouterr().err)
