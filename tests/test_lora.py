"""Adapters beside a frozen model: the same function as the dense sum, on the right rows; nothing else is trained."""

import copy
import functools
import importlib
import json
import shutil
import signal

import pytest
import torch
from miniature import launch, rows, run, steps, untimed
from test_invariance import MODELS, VOCABULARY
from test_invariance import tiny as model_of
from test_resume import at, die
from torch import Tensor
from torch.func import functional_call

from minitrl import checkpoint, disk, lora, training
from minitrl.distributed import World
from minitrl.kernels import linear as linear_file
from minitrl.layout import hf_tensors
from minitrl.model import Linear
from minitrl.packing import pack, pack_groups
from minitrl.rollout import Engine

ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
WORLD = World(0, 1, torch.device("cpu"))
PROMPTS, ANSWERS = [[1, 2, 3], [4, 5, 6, 7, 8]], [[[9, 10], [11, 12, 13, 14]], [[15, 16, 9], [12]]]


def settings(targets=("all-linear",), r=3, alpha=6) -> dict:
    return {"r": r, "lora_alpha": alpha, "target_modules": list(targets)}


def adapted(name="llama", dtype=torch.float32, zero=False, dropout=0.0, **options):
    model = model_of(name, dtype)
    lora.attach(model, settings(**options), dropout)
    return model if zero else stirred(model)


@torch.no_grad()
def stirred(model, seed=1):
    """The model after training, as it were: no B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.tensors(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return model


def base_of(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".adapter." not in name}


def groups():
    return pack_groups(PROMPTS, ANSWERS)


def objective(model, given=None) -> Tensor:
    """Of every completion token's log-prob and entropy, weighted unequally."""
    packed = given or groups()
    logprobs_T, entropy_T = model.logprobs(packed, packed.completion_T)
    weights_T = (packed.tokens_T * 7 + packed.positions_T * 3) % 5 - 1.7
    return (weights_T * logprobs_T + 0.3 * entropy_T).sum()


def gradients(model, given=None) -> dict[str, Tensor]:
    model.zero_grad()
    objective(model, given).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_zero_b_is_the_base(name, dtype):
    """Before the first update: log-probs, their gradient's way down, and what the engine samples, to the bit."""
    base, model = model_of(name, dtype), adapted(name, dtype, zero=True)
    assert torch.equal(objective(base), objective(model))
    samples = []
    for m in (base, model):
        engine = Engine(m, tokenizer=Silent())
        samples.append([c for group in engine.generate(PROMPTS, n=3, max_tokens=8, seed=3) for c in group])
    assert samples[0] == samples[1]


class Silent:
    """Of a tokenizer, what the engine needs."""

    end_ids = ()

    @staticmethod
    def decode(ids):
        return ""


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"], ["k_proj"], ["up_proj", "o_proj"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_the_dense_sum(name, targets, checkpointing):
    """In float64, against autograd through W + alpha / r B A, each block put into its rows by hf_tensors."""
    model, dense = adapted(name, torch.float64, targets=targets), model_of(name, torch.float64)
    model.gradient_checkpointing = checkpointing
    found = gradients(model)
    leaves = {key: p.detach().clone().requires_grad_() for key, p in lora.tensors(model).items()}
    sums = {key: p.detach().clone() for key, p in dense.named_parameters()}
    for theirs, (ours, place, _) in hf_tensors(model.config).items():
        a, b = (f"base_model.model.{theirs.removesuffix('.weight')}.lora_{k}.weight" for k in "AB")
        if a in leaves:
            sums[ours] = sums[ours].clone()
            sums[ours][place] += 2.0 * leaves[b] @ leaves[a]

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = dense

        def forward(self):
            return objective(self.model)

    expected = functional_call(Loss(), {f"model.{key}": value for key, value in sums.items()}, ())
    assert torch.allclose(objective(model), expected, rtol=1e-12)
    expected.backward()
    wanted = len(targets) if targets != ["all-linear"] else 7
    assert len(found) == len(leaves) == 2 * wanted * model.config.num_hidden_layers
    names = {id(p): key for key, p in lora.tensors(model).items()}
    for ours, p in model.named_parameters():
        if ours in found:
            truth = leaves[names[id(p)]].grad
            assert truth.abs().max() > 1e-3 and (found[ours] - truth).abs().max() < 1e-11 * truth.abs().max(), ours


@pytest.mark.parametrize("target", ALL)
def test_an_adapter_changes_its_own_rows_alone(target):
    model = adapted("qwen3, tied", targets=[target])
    layer = model.layers[1]
    x = {n: torch.randn(5, getattr(layer, n).in_features) for n in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    changed = set()
    for theirs, (ours, place, _) in hf_tensors(model.config).items():
        if ours.startswith("layers.1.") and ours.endswith("_proj.weight"):
            linear = getattr(layer, ours.split(".")[2])
            delta = linear(x[ours.split(".")[2]]) - torch.nn.functional.linear(x[ours.split(".")[2]], linear.weight)
            rows_of = delta[:, place]
            if rows_of.abs().max() > 1e-3:
                changed.add(theirs.split(".")[-2])
            else:
                assert not rows_of.any(), theirs
    assert changed == {target}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suits", [False, True])
def test_gates_with_a_residual(dtype, suits):
    """swiglu(x) with something added to its products, in training and with packed weights."""
    shape = (2 * 600, 512) if suits else (2 * 24, 16)
    x, weight, residual = torch.randn(9, shape[1]), torch.randn(shape) / shape[1] ** 0.5, torch.randn(9, shape[0])
    given = [value.to(dtype) for value in (x, weight)]
    gate, up = (given[0].double() @ given[1].double().t() + residual.to(dtype).double()).chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up
    plain = linear_file.swiglu(*given, residual=residual.to(dtype))
    with torch.inference_mode(), linear_file.packed_weights():
        packed = linear_file.swiglu(*given, residual=residual.to(dtype))
    for got in (plain, packed):
        assert (got - truth).abs().max() < (1e-5 if dtype == torch.float32 else 0.05) * truth.abs().max()


def test_the_base_keeps_its_bits_and_gets_no_gradient():
    """After updates and rollouts in turns, in bfloat16, where adding and subtracting a change would leave traces."""
    model = adapted("llama", torch.bfloat16, zero=True, dropout=0.1)
    model.gradient_checkpointing = True
    before, start = base_of(model), {name: p.detach().clone() for name, p in lora.tensors(model).items()}
    optimizer, engine = training.Optimizer(model, WORLD, weight_decay=0.1), Engine(model, Silent())
    for _ in range(5):
        engine.generate(PROMPTS, n=2, max_tokens=6)
        objective(model).backward()
        assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)
        assert optimizer.step(1e-2) > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert not any(torch.equal(p, start[name]) for name, p in lora.tensors(model).items())
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert len(optimizer.state_tensors()) == 1 + len(kinds) * len(start)
    assert all(name == "step" or ".adapter." in name for name in optimizer.state_tensors())


def test_the_reference_is_the_base():
    base, model = model_of("llama", torch.float32), adapted()
    policy = objective(model)
    assert lora.reference_of(model) is model
    with lora.as_reference(model):
        assert torch.equal(objective(model), objective(base))
    assert torch.equal(objective(model), policy) and abs(policy - objective(base)) > 0.1
    with pytest.raises(ZeroDivisionError), lora.as_reference(model):
        1 / 0  # noqa: B018
    assert torch.equal(objective(model), policy)


def test_a_model_without_adapters_has_a_copy_as_its_reference():
    model = model_of("llama", torch.float32)
    reference, before = lora.reference_of(model), objective(model)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    with lora.as_reference(reference):
        assert torch.equal(objective(reference), before) and not torch.equal(objective(model), before)
    assert not any(p.requires_grad for p in reference.parameters())


# Dropout.


def dropped_inputs(model, given, monkeypatch) -> dict[tuple, Tensor]:
    """{(adapter, ids up to the token): which inputs it loses} of a training pass; each key's rows must agree."""
    found = {}
    masked_fill = Tensor.masked_fill
    ids = {}
    for t in range(len(given.tokens_T)):
        before = int(given.predictors_T[t])
        ids[t] = (*(ids[before] if before >= 0 else ()), int(given.tokens_T[t]))

    def spy(x, mask, value):
        calls.append(mask)
        return masked_fill(x, mask, value)

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "masked_fill", spy)
        model(given)
    calls = [mask for mask in calls if mask.shape[0] == len(ids) and mask.dim() == 2]
    assert len(calls) == len(model.adapters.all)
    for n, mask in enumerate(calls):
        for t in ids:
            assert torch.equal(found.setdefault((n, ids[t]), mask[t]), mask[t])
    return found


def test_a_token_loses_the_same_inputs_wherever_it_stands(monkeypatch):
    """In one pack, in packs of their own, in another order, without a shared prompt; and of other rows, others."""
    model = adapted(dropout=0.25)
    whole = dropped_inputs(model, groups(), monkeypatch)
    packs = [
        pack_groups(PROMPTS[::-1], ANSWERS[::-1]),
        pack_groups([PROMPTS[0]], [ANSWERS[0][1:]]),
        pack([PROMPTS[0] + ANSWERS[0][1], PROMPTS[1] + ANSWERS[1][0]]),
    ]
    for other in packs:
        for key, mask in dropped_inputs(model, other, monkeypatch).items():
            assert torch.equal(mask, whole[key])
    everything = torch.stack([mask for mask in whole.values() if len(mask) == 24])
    assert len(everything.unique(dim=0)) == len(everything)  # no two tokens, no two adapters alike
    model.adapters.updates += 1
    assert not any(torch.equal(mask, whole[key]) for key, mask in dropped_inputs(model, groups(), monkeypatch).items())


def test_dropout_has_its_probability():
    """Over all, for each column and each token, and no two columns or tokens go together."""
    model = adapted(dropout=0.3)
    sequences = torch.randint(VOCABULARY, (40, 50), generator=torch.Generator().manual_seed(0)).tolist()
    model.adapters.prepare(pack(sequences))
    keys, columns = model.adapters.keys_T, torch.randint(-(2**31), 2**31, (400,)).to(torch.int32)
    kept = (keys[:, None] * columns >= int(-(2**31) + 2**32 * 0.3)).double()
    assert len(keys.unique()) == len({tuple(ids[: t + 1]) for ids in sequences for t in range(50)})
    assert abs(kept.mean() - 0.7) < 0.002
    assert (kept.mean(0) - 0.7).abs().max() < 5 * (0.21 / 2000) ** 0.5
    assert (kept.mean(1) - 0.7).abs().max() < 6 * (0.21 / 400) ** 0.5
    tokens = kept[50:450] - 0.7
    assert ((tokens @ tokens.t()) / 400 / 0.21).fill_diagonal_(0).square().mean() < 2 / 400
    assert (((kept - 0.7).t() @ (kept - 0.7)) / 2000 / 0.21).fill_diagonal_(0).square().mean() < 2 / 2000


def test_dropout_keeps_the_expectation_and_is_off_where_nothing_is_trained():
    model, plain = adapted(dropout=0.4), adapted()
    with torch.no_grad():
        assert torch.equal(objective(model), objective(plain))
    adapter, x = model.layers[0].qkv_proj.adapter, torch.ones(20000, 24)
    model.adapters.keys_T = (2 * torch.randint(2**31, (20000,)) + 1).to(torch.int32)
    mean, whole = adapter(x).mean(0), plain.layers[0].qkv_proj.adapter(x[:1])[0]
    assert (mean - whole).abs().max() < 0.02 * whole.abs().max() + 0.02
    model.adapters.keys_T = None
    with pytest.raises(AssertionError, match="by Model.forward"):
        adapter(x)


def test_recomputed_layers_drop_the_same():
    model = adapted(dropout=0.2)
    plain = gradients(model)
    model.gradient_checkpointing = True
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name])
    model.adapters.dropout = 0.0
    assert any(not torch.equal(gradient, plain[name]) for name, gradient in gradients(model).items())


def test_gradient_is_the_same_for_every_division():
    model = adapted("qwen3, tied", torch.float64, dropout=0.2)
    whole = gradients(model)
    parts = [gradients(model, pack_groups([PROMPTS[p]], [[ANSWERS[p][g]]])) for p in (1, 0) for g in (0, 1)]
    for name, gradient in whole.items():
        assert (sum(part[name] for part in parts) - gradient).abs().max() < 1e-12 * gradient.abs().max()


# Files.


@pytest.fixture
def folder(tiny, tmp_path):
    """(a folder with a stirred adapter of the tiny model, its model, the tokenizer)."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    lora.attach(model, settings() | {"base_model_name_or_path": str(tiny.folder / "model")})
    lora.save(stirred(model), tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter", model, tokenizer


def fresh(tiny, dtype=torch.float32):
    return checkpoint.load(tiny.folder / "model", dtype)[0]


def test_saved_and_loaded(tiny, folder):
    path, model, _ = folder
    again = fresh(tiny)
    lora.load(again, path)
    assert torch.equal(objective(again), objective(model)) and again.adapters.settings["r"] == 3
    opened, tokenizer = lora.open_model(str(path))
    assert torch.equal(objective(opened), objective(model)) and tokenizer.end_ids == (0,)
    assert lora.open_model(str(tiny.folder / "model"))[0].adapters is None
    with pytest.raises(AssertionError, match="only the base"):
        checkpoint.save(model, tokenizer, path.parent / "x")


def test_the_reference_of_an_adapter_that_is_trained_on(tiny, folder):
    """DPO after SFT by adapters: the reference is what SFT made, not the base (TRL 1.16: its adapter called "ref")."""
    path, _, _ = folder
    model = fresh(tiny)
    lora.load(model, path)
    before = objective(model)
    stirred(model)
    with lora.as_reference(model):
        assert torch.equal(objective(model), before)
    assert not torch.equal(objective(model), before) and not torch.equal(objective(fresh(tiny)), before)


def test_merge(tiny, folder, tmp_path, capsys):
    path, model, _ = folder
    untouched = (tiny.folder / "model/model.safetensors").read_bytes()
    argv = ["merge", "--adapter", str(path), "--model", str(tiny.folder / "model"), "--output_dir", str(tmp_path / "m")]
    assert lora.main([*argv, "--dtype", "float32"]) == 0 and "Hugging Face folder" in capsys.readouterr().out
    merged, _ = checkpoint.load(tmp_path / "m")
    before = base_of(model)
    assert abs(objective(merged) - objective(model)) < 1e-3 < abs(objective(merged) - objective(fresh(tiny)))
    for (name, value), p in zip(lora.merged(model), merged.parameters(), strict=True):
        assert torch.equal(value, p), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert (tiny.folder / "model/model.safetensors").read_bytes() == untouched
    lora.merge_(model)
    assert model.adapters is None and not any(m.adapter for m in model.modules() if isinstance(m, Linear))
    assert torch.equal(objective(model), objective(merged))
    with pytest.raises(ValueError, match="lora merge"):
        lora.main(["unmerge"])


def edited(path, **changes):
    """The folder with other settings."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_rslora": True}, "use_rslora True is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern .* is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"something_new": {"a": 1}}, "something_new .* is not supported"),
        ({"r": 0}, "must be a rank, a number"),
        ({"r": True}, "must be a rank, a number"),
        ({"lora_alpha": None}, "must be a rank, a number"),
        ({"target_modules": "q.*"}, "must be a rank, a number"),
        ({"r": 4}, "lora_A.weight is .3, 64., with this base it must be .4, 64."),
        ({"target_modules": ALL[:-1]}, "down_proj.lora_A.weight is .3, 64., with this base it must be absent"),
        ({"target_modules": [*ALL, "lm_head"]}, "target_modules lm_head: is none of"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_supported(tiny, folder, changes, message):
    edited(folder[0], **changes)
    with pytest.raises(ValueError, match=message) as error:
        lora.load(fresh(tiny), folder[0])
    assert "adapter_" in str(error.value)


def test_an_adapter_of_another_base(tiny, folder, tmp_path):
    path, model, tokenizer = folder
    other = fresh(tiny)
    with torch.no_grad():
        other.norm.weight[3] += 0.1
    with pytest.raises(ValueError, match="trained on a base with other weights"):
        lora.load(other, path)
    lora.load(fresh(tiny, torch.bfloat16), path)  # the same one
    with pytest.raises(ValueError, match=r"down_proj.lora_A.weight is \(3, 64\), with this base it must be \(3, 32\)"):
        lora.load(model_of("llama", torch.float32), path)
    (path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a whole safetensors file"):
        lora.load(fresh(tiny), path)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="adapter_config.json: no such file"):
        lora.load(fresh(tiny), path)


def test_a_folder_of_an_adapter_is_no_model(folder):
    with pytest.raises(ValueError, match="holds an adapter alone; give --adapter"):
        checkpoint.load(folder[0])


def test_targets():
    model = model_of("llama", torch.float32)
    with pytest.raises(ValueError, match="--lora_target_modules q_porj: is none of .*; did you mean q_proj?"):
        lora.attach(model, settings(["q_porj"]))
    with pytest.raises(ValueError, match="none of"):
        lora.attach(model_of("llama", torch.float32), settings(["all-linear", "q_proj"]))
    one, other = (adapted(zero=True, targets=["q_proj"]) for _ in range(2))
    assert torch.equal(one.layers[1].qkv_proj.adapter.A["q_proj"], other.layers[1].qkv_proj.adapter.A["q_proj"])
    another = model_of("llama", torch.float32)
    lora.attach(another, settings(["q_proj"]), seed=1)
    assert not torch.equal(another.layers[1].qkv_proj.adapter.A["q_proj"], one.layers[1].qkv_proj.adapter.A["q_proj"])
    assert not torch.equal(one.layers[0].qkv_proj.adapter.A["q_proj"], one.layers[1].qkv_proj.adapter.A["q_proj"])


# Whole runs.

OPTIONS = dict(use_peft=True, lora_r=4, lora_dropout=0.1, lora_target_modules=["all-linear"], beta=0.05, max_steps=4)
OPTIONS |= dict(vllm_importance_sampling_correction=False)


def trained(path):
    return disk.opened(path / "final/adapter_model.safetensors")


def test_a_run(tiny, tmp_path):
    """Reward rises from the base's, the reference is the base, final/ holds adapters and so do checkpoints."""
    argv = tiny.argv(tmp_path, learning_rate=0.05, **OPTIONS | {"max_steps": 12, "lora_dropout": 0.0})
    outcome = run(argv)
    assert outcome.code == 0 and "final is a PEFT folder" in outcome.out, outcome
    assert "4,096 of 23,232 parameters are trained" in outcome.out
    first, *_, last = steps(tmp_path)
    assert first["kl"] == 0 and last["kl"] > 0.01 and last["reward"] > first["reward"] + 0.2
    assert max(row["sampling/sampling_logp_difference/max"] for row in steps(tmp_path)) < 1e-3
    model, _ = lora.open_model(str(tmp_path / "final"))
    names = {name for name, _ in model.named_parameters() if ".adapter." in name}
    with disk.opened(tmp_path / "checkpoints/step_12/optimizer.safetensors") as state:
        assert {name.partition(".")[2] for name in state.keys()} == {*names, ""}
    base = fresh(tiny)
    assert all(torch.equal(p, base.get_parameter(name)) for name, p in model.named_parameters() if name not in names)


def test_resumed_to_the_bit(tiny, tmp_path):
    """Killed while step 4 is computed; with dropout, and a buffer of rollouts in use."""
    options = OPTIONS | dict(save_steps=1, num_iterations=2, dtype="bfloat16")
    assert launch(tiny.argv(tmp_path / "whole", **options)).code == 0
    argv = tiny.argv(tmp_path / "killed", **options)
    hook = functools.partial(at, "minitrl.losses:grpo_loss", 3, 2, die)
    assert launch(argv, hooks={0: hook}).code == -signal.SIGKILL
    outcome = launch([*argv, "--resume"])
    known = ("going on after step 2", "going on after step 3")  # the third was being written while the fourth computed
    assert outcome.code == 0 and any(step in outcome.out for step in known), outcome
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "killed")
    for file in ("completions.jsonl", "checkpoints/step_4/optimizer.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file
    with trained(tmp_path / "whole") as one, trained(tmp_path / "killed") as two:
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())


def test_by_default_no_token_is_weighed_by_dropouts_noise(tiny, tmp_path):
    """Dropout alone made the trainer's log-probs others than the sampler's: most completions got the weight 0."""
    options = {"use_peft": True, "lora_target_modules": ["all-linear"], "learning_rate": 0.05, "max_steps": 4}
    assert run(tiny.argv(tmp_path, **options)).code == 0
    weights = [row.get("sampling/importance_sampling_ratio/mean", 1) for row in steps(tmp_path)]
    assert weights == pytest.approx([1] * 4, abs=1e-3)


def test_two_processes_are_one(tiny, tmp_path):
    """The same completions, metrics and adapters, with dropout: a step's division changes nothing but rounding."""
    for world in (1, 2):
        assert launch(tiny.argv(tmp_path / str(world), **OPTIONS | {"learning_rate": 1e-3}), world).codes == [0] * world
    assert rows(tmp_path / "1", "completions") == rows(tmp_path / "2", "completions")
    for one, two in zip(steps(tmp_path / "1"), steps(tmp_path / "2"), strict=True):
        assert all(one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6) for name in ("loss", "grad_norm", "kl"))
    with trained(tmp_path / "1") as one, trained(tmp_path / "2") as two:
        for name in one.keys():
            assert (one.get_tensor(name) - two.get_tensor(name)).abs().max() < 1e-5, name


def test_a_run_from_an_adapter(tiny, tmp_path):
    """Its rank and targets hold, and it is the reference; the evaluation of the start is that of the end before."""
    evaluated = {"eval_dataset": tiny.folder / "data.jsonl", "learning_rate": 0.05, "lora_dropout": 0.0}
    assert run(tiny.argv(tmp_path / "a", **OPTIONS | evaluated)).code == 0
    again = {"use_peft": True, "adapter": tmp_path / "a/final", "beta": 0.05, "max_steps": 1, "lora_r": 9}
    outcome = run(tiny.argv(tmp_path / "b", **evaluated | again))
    assert outcome.code == 0 and "adapters: rank 4, alpha 32, on q_proj, k_proj" in outcome.out, outcome
    before, after = rows(tmp_path / "a")[-1], rows(tmp_path / "b")[0]
    assert all(before[name] == after[name] for name in before if name.startswith("eval/") and "rewards" in name)
    assert steps(tmp_path / "b")[0]["kl"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lora_r=0), "--lora_r 0: must be at least 1"),
        (dict(lora_alpha=0), "--lora_alpha 0: must be at least 1"),
        (dict(lora_dropout=1.0), "--lora_dropout 1.0: must be at least 0 and below 1"),
        (dict(lora_target_modules=["lm_head"]), "--lora_target_modules lm_head: is none of q_proj"),
        (dict(vllm_importance_sampling_correction=True), "correction True: must be off with --lora_dropout"),
        (dict(use_peft=None, adapter="x"), "--adapter x: must be given together with --use_peft"),
        (dict(adapter="nowhere"), "nowhere/adapter_config.json: no such file"),
        (dict(model=None, dataset=None), "--use_peft on: must be given together with --model"),
        (dict(sync_ref_model=True), "--sync_ref_model True: must be off with --use_peft"),
        (dict(use_rslora=True), "--use_rslora: not an option here; instead: --lora_alpha times the square root"),
        (dict(use_dora=True), "--use_dora: not an option here; instead: nothing: DoRA is not supported"),
    ],
)  # fmt: skip
def test_bad_options(tiny, tmp_path, options, message):
    outcome = run(tiny.argv(tmp_path, **OPTIONS | options))
    assert outcome.code in (1, 2) and message in outcome.err and "Traceback" not in outcome.err, outcome


@pytest.mark.parametrize("script", ["sft", "dpo", "reward", "ppo"])
def test_the_other_scripts(tiny, tmp_path, script):
    """Each trains adapters alone, and leaves what lora.open_model opens; DPO starts at ln 2, PPO's KL at 0."""
    sums = [json.loads(line) for line in (tiny.folder / "data.jsonl").read_text().splitlines()[:16]]
    keys = {"completion": "answer"} if script == "sft" else {"chosen": "answer", "rejected": "prompt"}
    keys |= {"prompt": "prompt"}
    data = sums if script == "ppo" else [{k: row[v] for k, v in keys.items()} for row in sums]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    argv = ["--model", tiny.folder / "model", "--dataset", tmp_path / "data.jsonl", "--output_dir", tmp_path / "out",
            "--use_peft", "--lora_r", 4, "--max_steps", 3, "--dtype", "float32", "--learning_rate", 0.01]  # fmt: skip
    argv += ["--max_length", 24] if script != "ppo" else [
        "--reward", f"{tiny.folder / 'rewards.py'}:share_of_a", "--max_completion_length", 8, "--max_prompt_length", 16
    ]  # fmt: skip
    main = importlib.import_module(f"minitrl.{script}").main
    assert main([str(word) for word in argv]) == 0
    model, _ = lora.open_model(str(tmp_path / "out/final"))
    base = fresh(tiny)
    assert (model.score is not None) == (script == "reward") and len(model.adapters.all) == 2
    trained_ = [p for name, p in lora.tensors(model).items() if "lora_B" in name]
    assert len(trained_) == 4 and all(p.any() for p in trained_)
    same = [name for name, p in model.named_parameters() if ".adapter." not in name and name != "score.weight"]
    assert all(torch.equal(model.get_parameter(name), base.get_parameter(name)) for name in same)
    first = steps(tmp_path / "out")[0]
    if script == "dpo":
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    if script == "ppo":
        assert first["objective/kl"] == 0
        value_model, _ = lora.open_model(str(tmp_path / "out/value_model"))
        assert value_model.score is not None and len(value_model.adapters.all) == 2
    if script == "reward":  # the merged folder scores as the two do
        out = str(tmp_path / "merged")
        merge = ["merge", "--adapter", str(tmp_path / "out/final"), "--output_dir", out, "--dtype", "float32"]
        assert lora.main(merge) == 0
        merged, _ = checkpoint.load(out, scalar_head=True)
        values = [m.values(groups()) for m in (model, merged)]
        assert (values[0] - values[1]).abs().max() < 1e-4


# Against peft itself.


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "qwen3, tied"])
def test_peft_loads_ours_and_we_load_theirs(name, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = model_of(name, torch.float32)
    kind = base.config.model_type
    source = {key: value for key, value in base.config.source.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(kind, **source)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "base")
    with disk.opened(tmp_path / "base/model.safetensors") as found, torch.no_grad():
        for name_, (ours, place, _) in hf_tensors(base.config).items():
            base.get_parameter(ours)[place or slice(None)].copy_(found.get_tensor(name_))
    ids = torch.randint(VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(0))

    def assert_equal_logits(their_model, our_model):
        logits = their_model(ids).logits[0]
        assert (logits - our_model.logits(ids.tolist())[0]).abs().max() < 1e-5
        with their_model.disable_adapter():
            assert (logits - their_model(ids).logits[0]).abs().max() > 1e-2

    ours = copy.deepcopy(base)
    lora.attach(ours, settings(["q_proj", "up_proj", "down_proj"]))
    lora.save(stirred(ours), Writes(), tmp_path / "ours")
    assert_equal_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval(), ours)

    for targets in ("all-linear", ["k_proj", "o_proj"]):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        asked = peft.LoraConfig(r=5, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1)
        theirs = peft.get_peft_model(theirs, asked)
        torch.manual_seed(0)
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.3)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        ours = copy.deepcopy(base)
        lora.load(ours, tmp_path / "theirs")
        assert_equal_logits(theirs, ours)
        merged = theirs.merge_and_unload().state_dict()
        values = dict(lora.merged(ours))
        for key, (name_, place, _) in hf_tensors(ours.config).items():
            assert (values[name_][place or slice(None)] - merged[key]).abs().max() < 1e-6, key


class Writes:
    """Of a tokenizer, what `save` needs."""

    @staticmethod
    def save(folder):
        (folder / "tokenizer.json").write_text("{}")
