"""SFT: the loss of a step is that of its documents one by one; runs that are killed, divided or badly fed."""

import functools
import json
import signal

import numpy as np
import pytest
import torch
from faults import mutant, plant
from miniature import Outcome, apart, rows, steps, untimed
from test_resume import at, die, full_disk, last

from minitrl import data, packing, runs, sft, training
from minitrl.data import Documents
from minitrl.distributed import World
from minitrl.model import Model, ModelConfig

ALONE = World(0, 1, torch.device("cpu"))


# --- the loss of a step ----------------------------------------------------------------------------------------------


def config(**options) -> sft.Config:
    return sft.Config(dtype="float32", **options)


@pytest.fixture(scope="module")
def model():
    shape = ModelConfig.from_hf({
        "model_type": "qwen3", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    })  # fmt: skip
    torch.manual_seed(0)
    model = Model(shape).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def some_documents(n: int = 12, seed: int = 0) -> Documents:
    """Documents of 1 to 20 tokens, a token in three not learnt."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 21, n)
    return Documents.of([(generator.integers(40, size=k), generator.random(k) > 1 / 3) for k in lengths])


def by_hand(model, documents: Documents, chosen) -> torch.Tensor:
    """Each document's own forward pass, whole logits, one division."""
    total, count = 0, 0
    for d in chosen:
        ids, mask = torch.tensor(documents.ids(d)), torch.tensor(documents.mask(d))
        logprobs = model.logits([ids.tolist()])[0].double().log_softmax(-1)
        total = total - logprobs[:-1].gather(1, ids[1:, None].long())[:, 0][mask[1:]].sum()
        count += int(mask.sum())
    return total / count


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("tokens_per_microbatch", [20, 33, 64, 4096])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_one_by_one_however_it_is_split(model, tokens_per_microbatch, checkpointing, monkeypatch):
    monkeypatch.setattr(model, "gradient_checkpointing", checkpointing)
    monkeypatch.setattr("minitrl.kernels.token_logprob.COLUMNS", 16)
    documents, chosen = some_documents(), np.array([7, 2, 2, 11, 0, 5, 9, 1])
    options = {"tokens_per_microbatch": tokens_per_microbatch, "max_length": 20}
    metrics, not_finite = sft.learn(model, documents, chosen, config(**options), ALONE)
    packed = gradients(model)
    loss = by_hand(model, documents, chosen)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)  # the weights 1 / count are float32
    for got, true in zip(packed, gradients(model), strict=True):
        assert (got - true).abs().max() <= 1e-6 * true.abs().max() + 1e-9
    assert metrics["tokens"] == documents.lengths[chosen].sum() and not_finite == []
    assert metrics["trained_tokens"] == sum(documents.mask(d).sum() for d in chosen)


def test_accuracy_and_entropy_are_means_over_learnt_tokens(model):
    documents = some_documents()
    metrics, _ = sft.learn(model, documents, np.arange(12), config(tokens_per_microbatch=40, max_length=20), ALONE)
    model.zero_grad()
    right, entropy, count = 0, 0.0, 0
    for d in range(12):
        ids, mask = torch.tensor(documents.ids(d)).long(), torch.tensor(documents.mask(d))[1:]
        distribution = model.logits([ids.tolist()])[0][:-1].double().softmax(-1)
        right += (distribution.argmax(-1) == ids[1:])[mask].sum().item()
        entropy += torch.special.entr(distribution).sum(-1)[mask].sum().item()
        count += int(mask.sum())
    assert right > 0
    assert metrics["mean_token_accuracy"] == pytest.approx(right / count)
    assert metrics["entropy"] == pytest.approx(entropy / count, rel=1e-6)


def test_no_document_sees_another(model):
    """The Jacobian of a document's loss with respect to every other document's embeddings is exactly 0."""
    documents = some_documents(6, seed=1)
    pack = packing.pack([documents.ids(d) for d in range(6)])
    seen = []
    hook = model.embed_tokens.register_forward_hook(lambda module, given, made: seen.append(made) or made.retain_grad())
    hidden = model(pack)
    hook.remove()
    for d in range(6):
        mine = pack.segments_T == d
        (gradient,) = torch.autograd.grad(hidden[mine].square().sum(), seen, retain_graph=True)
        assert (gradient[~mine] == 0).all() and gradient[mine].abs().sum() > 0


def check_loss(model, documents) -> None:
    metrics, _ = sft.learn(model, documents, np.arange(3), config(tokens_per_microbatch=9, max_length=9), ALONE)
    model.zero_grad()
    masks = (documents.trained[a:b] for a, b in zip(documents.starts, documents.ends))
    truth = Documents.of([(documents.ids(d), mask) for d, mask in enumerate(masks)])
    assert metrics["loss"] == pytest.approx(by_hand(model, truth, np.arange(3)).item(), abs=1e-6)


def test_faults_in_the_loss_are_seen(model, monkeypatch):
    pairs = [([1, 2, 3, 4], [1, 1, 1, 1]), ([5, 6, 7], [1, 1, 1]), ([8] * 9, [1] * 9)]
    check_loss(model, Documents.of(pairs))
    faulty = mutant(data, "mask[:1] = False", "pass")  # a document's first token learnt from the document before it
    with pytest.raises((AssertionError, IndexError)):
        check_loss(model, faulty.Documents.of(pairs))
    for right, wrong in (
        ("mask_T.float() / -count", "mask_T.float() / -max(1, int(mask_T.sum()))"),  # a mean of each micro-batch
        ("packing.pack([documents.ids(chosen[place]) for place in places]",  # one document to the pack
         "packing.pack([np.concatenate([documents.ids(chosen[place]) for place in places])]"),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            plant(patch, sft, right, wrong)
            check_loss(model, Documents.of(pairs))


def test_nothing_to_learn_is_a_loss_of_0(model):
    documents = Documents.of([([1, 2, 3], [0, 0, 0]), ([4], [1])])
    metrics, not_finite = sft.learn(model, documents, np.arange(2), config(), ALONE)
    assert metrics["trained_tokens"] == 0
    assert metrics["loss"] == 0 and not_finite == [] and all((g == 0).all() for g in gradients(model))
    assert len(documents.truncated(None)) == 0


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tiny):
    """Sums with their answers, a few of them long."""
    for name, numbers in (("sums", range(30)), ("held_out", range(30, 40))):
        pairs = [{"prompt": f"{i}+{i % 7}=", "completion": str(i + i % 7) * (1 + 5 * (i % 9 == 0))} for i in numbers]
        (tiny.folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tiny.folder


def argv(files, output_dir, **options) -> list[str]:
    """A run of 5 steps of 4 rows in float32, evaluated every 2; `options` change that."""
    options = {
        "model": files / "model", "dataset": files / "sums.jsonl", "eval_dataset": files / "held_out.jsonl",
        "output_dir": output_dir, "max_steps": 5, "examples_per_step": 4, "max_length": 12, "tokens_per_microbatch": 24,
        "learning_rate": 1e-2, "dtype": "float32", "eval_steps": 2, "save_steps": 2, "logging_steps": 1, **options,
    }  # fmt: skip
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def train(rank: int, words: list[str], hooks: dict) -> None:
    hooks.get(rank, lambda: None)()
    runs.command(functools.partial(sft.main, words))


def launch(words: list[str], world: int = 1, hooks: dict | None = None) -> Outcome:
    return apart(train, world, words, hooks or {})


def assert_same_end(one, other) -> None:
    assert untimed(one) == untimed(other)
    for file in ("final/model.safetensors", "checkpoints/step_5/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = launch(argv(files, folder))
    assert outcome.code == 0, outcome.err
    assert "3 of 30 documents are above --max_length 12 and cut; 0 in which" in outcome.out
    assert "step 4/5  held-out loss" in outcome.out and "step 3/5  held-out" not in outcome.out
    return folder


def test_a_run_leaves_what_it_should(whole, files):
    evaluated = [row["step"] for row in rows(whole) if "eval/loss" in row]
    assert evaluated == [0, 2, 4, 5]
    names = {"loss", "mean_token_accuracy", "entropy", "trained_tokens", "tokens", "grad_norm", "learning_rate", "epoch"}
    assert all(names <= row.keys() for row in steps(whole))
    assert steps(whole)[-1]["num_tokens"] == sum(row["tokens"] for row in steps(whole))
    assert rows(whole)[-1]["eval/loss"] < rows(whole)[0]["eval/loss"] - 0.5
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step_2", "step_4", "step_5"]


@pytest.mark.parametrize("where", [
    ("minitrl.model:Model.logprob_sum", 3, 2), ("minitrl.training:Optimizer._round_masters", 3, 1),
    ("minitrl.runs:RunFolder.append_metrics", 4, 1), ("minitrl.disk:write_tensors", 4, 1), ("os:rename", 4, 1),
    ("minitrl.checkpoint:_save_weights", 5, 1),
], ids=lambda where: where[0].split(":")[1])  # fmt: skip
def test_killed_and_resumed_to_the_bit(files, whole, tmp_path, where):
    outcome = launch(argv(files, tmp_path / "run"), hooks={0: functools.partial(at, *where, die)})
    assert outcome.code == -signal.SIGKILL
    outcome = launch(argv(files, tmp_path / "run", resume=True))
    assert outcome.code == 0, outcome.err
    assert_same_end(tmp_path / "run", whole)


def test_sigterm_saves_and_ends(files, whole, tmp_path):
    stop = functools.partial(at, "minitrl.model:Model.logprob_sum", 3, 1, functools.partial(send, signal.SIGTERM))
    outcome = launch(argv(files, tmp_path / "run"), hooks={0: stop})
    assert outcome.code == 143 and (tmp_path / "run" / "checkpoints" / "step_4").exists()
    assert not (tmp_path / "run" / "final").exists()
    assert launch(argv(files, tmp_path / "run", resume=True)).code == 0
    assert_same_end(tmp_path / "run", whole)


def send(number: int, *_) -> None:
    signal.raise_signal(number)


def test_an_error_costs_no_finished_step(files, tmp_path):
    hook = functools.partial(at, "minitrl.model:Model.logprob_sum", 3, 1, full_disk)
    outcome = launch(argv(files, tmp_path / "run", eval_steps=None, save_steps=100), hooks={0: hook})
    assert outcome.code == 1 and "step 3 is saved; --resume goes on from there" in outcome.out


@pytest.mark.parametrize("options", [{}, {"packing": True}])
def test_two_processes_are_one(files, tmp_path, options):
    for world in (1, 2):
        outcome = launch(argv(files, tmp_path / str(world), **options), world)
        assert set(outcome.codes) == {0}, outcome.err
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for name in ("loss", "mean_token_accuracy", "entropy", "grad_norm", "eval/loss", "trained_tokens", "tokens"):
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), rel=1e-4, abs=1e-5), name


def test_a_loss_that_is_not_finite_stops_before_the_update(files, tmp_path, monkeypatch):
    """What is left behind are the rows of its micro-batch, not of the whole step."""
    read = data.load_demonstrations(files / "sums.jsonl", sft.checkpoint.load(files / "model")[1]).truncated(12)
    bad = data.order(30, 4, 4, 42)[2]  # a row of the second step
    ids, logprob_sum = read.ids(bad).tolist(), Model.logprob_sum

    def broken(model, pack, weights_T):
        total, *rest = logprob_sum(model, pack, weights_T)
        holds = any(part.tolist() == ids for part in pack.tokens_T.split(pack.lengths))
        return total * (torch.nan if holds else 1), *rest

    monkeypatch.setattr(Model, "logprob_sum", broken)
    with pytest.raises(training.NotFinite, match="step 2: the loss is nan; nothing was updated, the token ids are in"):
        sft.main(argv(files, tmp_path / "run", eval_dataset=None, eval_steps=None, tokens_per_microbatch=14))
    report = json.loads((tmp_path / "run" / "not_finite_step_2_rank_0.json").read_text())
    assert bad in [row["row"] for row in report["rows"]] and len(report["rows"]) < 4
    assert all(row["ids"] == [read.ids(row["row"]).tolist()] for row in report["rows"])
    assert last(tmp_path / "run") == 1  # the step before was saved


def test_a_gradient_that_is_not_finite_stops_too_and_names_all_rows(files, tmp_path, monkeypatch):
    def step(optimizer, rate):
        raise training.NotFinite("the gradient's norm is inf")

    monkeypatch.setattr(training.Optimizer, "step", step)
    with pytest.raises(training.NotFinite, match="step 1: the gradient's norm is inf; nothing was updated"):
        sft.main(argv(files, tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "not_finite_step_1_rank_0.json").read_text())
    assert [row["row"] for row in report["rows"]] == data.order(30, 0, 4, 42)


def test_every_epoch_has_every_row_once(files, tmp_path, monkeypatch):
    seen, learn = [], sft.learn

    def watched(model, documents, chosen, *rest):
        seen.append(chosen.tolist())
        return learn(model, documents, chosen, *rest)

    monkeypatch.setattr(sft, "learn", watched)
    assert sft.main(argv(files, tmp_path / "run", max_steps=15, eval_steps=None, save_steps=4)) == 0
    (first, *trained, last), held_out = seen, list(range(10))
    assert first == last == held_out
    rows = sum(trained, [])
    assert sorted(rows[:30]) == sorted(rows[30:]) == list(range(30)) and rows[:30] != rows[30:]


def test_the_embedded_default_learns(tmp_path):
    outcome = launch(["--output_dir", str(tmp_path / "run"), "--max_steps", "120", "--device", "cpu"])
    assert outcome.code == 0, outcome.err
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert first["eval/mean_token_accuracy"] < 0.3 and last["eval/mean_token_accuracy"] > 0.9


# --- what is learnt, row by row --------------------------------------------------------------------------------------


def test_packing_makes_rows_that_are_full(files, tmp_path):
    documents = some_documents(200)
    for strategy in ("bfd", "wrapped"):
        options = {"packing_strategy": strategy, "max_length": 20, "tokens_per_microbatch": 20}
        made, members, starts = sft.rows(documents, config(packing=True, **options))
        lengths = [made.lengths[members[a:b]].sum() for a, b in zip(starts, starts[1:])]
        assert sorted(members) == list(range(len(made))) and max(lengths) <= 20 and sum(lengths) == documents.ends[-1]
        if strategy == "wrapped":
            assert lengths[:-1] == [20] * (len(lengths) - 1)
            assert np.concatenate([made.ids(d) for d in members]).tolist() == documents.tokens.tolist()
        else:
            assert made is documents


BAD = {
    "a row of another kind": ('{"question": "1+1="}', {}, 'a demonstration has "prompt" and "completion"'),
    "two kinds": ('{"text": "1", "prompt": "1", "completion": "2"}', {}, "this row has text, prompt, completion"),
    "no completion": ('{"prompt": "1"}', {}, "this row has prompt"),
    "half messages": ('{"prompt": "1", "completion": []}', {}, "must both be text"),
    "a number": ('{"text": 3}', {}, "text must be text, not '3'"),
    "messages of nothing": ('{"messages": []}', {}, "messages must be a list of messages"),
    "no template": ('{"messages": [{"role": "user", "content": "1"}]}', {}, "no chat template"),
    "a prompt is wanted": ('{"text": "1+1=2"}', {"completion_only_loss": True}, "--completion_only_loss: this row has no"),
    "turns are wanted": ('{"text": "1+1=2"}', {"assistant_only_loss": True}, "--assistant_only_loss: this row is text"),
    "not JSON": ('{"text": "1"', {}, "bad JSON"),
}


@pytest.mark.parametrize("line, options, message", BAD.values(), ids=BAD)
def test_bad_rows_are_named_by_file_and_line(files, tmp_path, line, options, message, capsys):
    (tmp_path / "bad.jsonl").write_text(('{"text": "1+1=2"}\n' if not options else "\n") + line + "\n")
    words = argv(files, tmp_path / "run", dataset=tmp_path / "bad.jsonl", **options)
    with pytest.raises(ValueError) as error:
        sft.main(words)
    assert str(error.value).startswith(f"{tmp_path / 'bad.jsonl'}:2: ") and message in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(max_length=100, tokens_per_microbatch=100), "--max_length 100: must be at most 64"),
    (dict(max_length="none", tokens_per_microbatch=9), "--max_length None: must be given, at most 9"),
    (dict(max_length=2), "a file with something to learn before --max_length"),
    (dict(dataset="nothing.jsonl", packing=True, packing_strategy="wrapped"), "a file with something to learn"),
])  # fmt: skip
def test_lengths_that_cannot_be(files, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.jsonl").write_text('{"text": ""}')  # an end token, before which nothing stands
    with pytest.raises(ValueError, match=message):
        sft.main(argv(files, tmp_path / "run", **options))


@pytest.mark.parametrize("words, message", [
    ("--max_length 1", "--max_length 1: must be at least 2"),
    ("--max_length none --packing", "--max_length None: must be given with --packing"),
    ("--max_length 50 --tokens_per_microbatch 49", "--tokens_per_microbatch 49: must be at least --max_length, 50"),
    ("--examples_per_step 0", "--examples_per_step 0"), ("--model x", "--model x: must be given together with --dataset"),
    ("--packing_strategy ffd", "ffd"), ("--per_device_train_batch_size 8", "--examples_per_step"),
    ("--model x --dataset y --eval_steps 3", "--eval_steps 3: must be given with --eval_dataset"),
])  # fmt: skip
def test_bad_options(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sft.main([*words.split(), "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 2 and message in capsys.readouterr().err
