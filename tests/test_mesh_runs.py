"""Whole runs of each script on a mesh of processes end as the same run in one process does.

In float64, so that what differs is a mistake: metrics of every step and final weights agree to TOLERANCE, which is what
is left of numbers that are kept in float32 whatever the model is (sampled log-probs, scores of pairs). A vocabulary of
2,100 tokens is more than two of the units in which it is cut; prompts and answers are of unequal length, so that
processes have micro-batches in unequal numbers, and with --shard some empty ones.
"""

import functools
import importlib
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from miniature import launch, rows, steps, untimed
from safetensors.torch import load_file

from minitrl import checkpoint, dpo, experience, grpo, packing, pairs, ppo, reward, sft
from minitrl.model import Model, ModelConfig
from minitrl.tokenizer import Tokenizer

TOLERANCE = 2e-6
VOCABULARY = 2100
SCRIPTS = {"grpo": grpo, "ppo": ppo, "sft": sft, "reward": reward, "dpo": dpo}
MESHES = {
    "shard 2": {"shard": 2},
    "tensor 2": {"tensor": 2},
    "shard 2, tensor 2": {"shard": 2, "tensor": 2},
    "replicate 2, shard 2": {"replicate": 2, "shard": 2},
    "shard 4": {"shard": 4},
    "shard 2, sampling in slices": {"shard": 2, "rollout_tensor": 2},
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
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>"])
    config = ModelConfig.from_hf({
        "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "eos_token_id": 0,
    })  # fmt: skip
    model, generator = Model(config), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(name.endswith("norm.weight")), std=0.3, generator=generator)
    checkpoint.save(model, Tokenizer(backend, [0]), path / "model")

    def text(most: int) -> str:
        return "".join(draw.choices(characters, k=draw.randint(1, most)))

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
        "output_dir": output_dir, "max_steps": 3, "eval_steps": 2, "learning_rate": 1e-3, "dtype": "float32",
        "logging_steps": 1, **(sampling if kind == "prompts" else learning), **options,
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
    ours, theirs = ([{name: value for name, value in row.items() if held_out or not name.startswith("eval/")}
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


def trains_alike(folder, alone, tmp_path, script: str, mesh: str, **options) -> Path:
    """The run on a mesh ends as the one in one process; the folder of the former."""
    sizes = {name: value for name, value in MESHES[mesh].items() if name in ("replicate", "shard", "tensor")}
    world = math.prod(sizes.values())
    words = argv(folder, script, tmp_path / "run", **options, **MESHES[mesh])
    outcome = launch(words, world, dict.fromkeys(range(world), double(script)), SCRIPTS[script].main)
    assert outcome.codes == [0] * world, outcome.err[-3000:]
    assert_same_end(alone(script, **options), tmp_path / "run")
    return tmp_path / "run"


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
        words = argv(folder, script, path, **options, **mesh, max_steps=step, resume=step > 1, lr_scheduler_type="constant")
        outcome = launch(words, world, dict.fromkeys(range(world), double(script)), SCRIPTS[script].main)
        assert outcome.codes == [0] * world, outcome.err[-3000:]
        shutil.rmtree(path / "final") if step < 3 else None
    whole = alone(script, **options, lr_scheduler_type="constant")
    assert_same_end(whole, path, held_out=False)
