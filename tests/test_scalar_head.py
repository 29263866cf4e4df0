"""The scalar head of reward and value models: as transformers' XForSequenceClassification with one label computes it.

What is compared is what a user loads: folders that each side wrote, read by the other.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import CONFIG, edit_weights, tiny
from test_tokenizer import write_folder

import minitrl
from minitrl.layout import hf_tensors
from minitrl.packing import pack, pack_groups

SCALAR = dict(architectures=["LlamaForSequenceClassification"], num_labels=1)
TOLERANCE = 1e-4  # max abs difference of float32 values


def scalar_model(**options):
    """A random tiny model with a scalar head that says something."""
    model, tokenizer = tiny(**SCALAR | options)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model, tokenizer


def values(model, sequences):
    """Per id list the values of all its tokens."""
    packed = pack(sequences)
    with torch.no_grad():
        return list(model.values(packed).split(packed.lengths))


@pytest.fixture
def folder(tmp_path):
    """A saved language model, and room beside it."""
    minitrl.save(*tiny(), tmp_path / "model")
    return tmp_path / "model"


def test_a_fresh_head_on_a_language_model(folder):
    """The trunk is the folder's to the bit; the head follows from the seed, and is small."""
    language, _ = minitrl.load(folder)
    one, again, other = (minitrl.load(folder, scalar_head=True, seed=seed)[0] for seed in (3, 3, 4))
    assert one.lm_head is None and one.score.weight.shape == (1, CONFIG["hidden_size"])
    assert torch.equal(one.score.weight, again.score.weight) and not torch.equal(one.score.weight, other.score.weight)
    assert 0.01 < one.score.weight.std() < 0.04 and one.score.weight.requires_grad
    ours, theirs = dict(one.named_parameters()), dict(language.named_parameters())
    assert ours.keys() - theirs.keys() == {"score.weight"} and theirs.keys() - ours.keys() == {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
    bfloat16, _ = minitrl.load(folder, dtype=torch.bfloat16, scalar_head=True, seed=3)
    assert torch.equal(bfloat16.score.weight, one.score.weight.bfloat16())


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied, tmp_path):
    model, tokenizer = scalar_model(tie_word_embeddings=tied)
    minitrl.save(model, tokenizer, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors.keys() == hf_tensors(model.config).keys() and "lm_head.weight" not in tensors
    assert tensors["score.weight"].shape == (1, CONFIG["hidden_size"])
    again, _ = minitrl.load(tmp_path / "model", scalar_head=True, seed=1)  # no fresh head where there is one
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    assert description["architectures"] == SCALAR["architectures"] and len(description["id2label"]) == 1


def test_a_model_with_one_head_is_not_taken_for_the_other(folder):
    model, tokenizer = scalar_model()
    minitrl.save(model, tokenizer, folder.parent / "scalar")
    with pytest.raises(ValueError, match="a reward or value model .LlamaForSequenceClassification"):
        minitrl.load(folder.parent / "scalar")
    with pytest.raises(AssertionError, match="predicts no tokens"):
        model.logits([[1, 2]])
    with pytest.raises(AssertionError, match="scalar_head=True"):
        minitrl.load(folder)[0].values(pack([[1, 2]]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("score.weight"), "missing: score.weight"),
        (lambda t: t.update({"score.weight": torch.zeros(2, 32)}), r"shape \(2, 32\), expected \(1, 32\): score"),
        (lambda t: t.update({"score.bias": torch.zeros(1)}), "unknown: score.bias"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(300, 32)}), "unknown: lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    minitrl.save(*scalar_model(), tmp_path / "model")
    edit_weights(tmp_path / "model", change)
    with pytest.raises(ValueError, match=f"the weights do not fit config.json: {message}"):
        minitrl.load(tmp_path / "model", scalar_head=True)


def test_a_language_model_is_checked_whole_though_its_head_goes(folder):
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        minitrl.load(folder, scalar_head=True)


@pytest.mark.parametrize("labels", [dict(num_labels=3), dict(id2label={"0": "good", "1": "bad"}), {}])
def test_other_numbers_of_labels_are_refused(labels, tmp_path):
    minitrl.save(*scalar_model(), tmp_path / "model")
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    del description["id2label"], description["num_labels"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(description | labels))
    with pytest.raises(ValueError, match=f"with {labels.get('num_labels', 2)} labels"):
        minitrl.load(tmp_path / "model", scalar_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_float32_and_of_each_sequence_alone(dtype):
    """Beside others in a pack, and behind a shared prompt, a token has the value that it has by itself."""
    model = scalar_model()[0].to(dtype)
    prompt, answers = [1, 2, 3], [[4, 5], [6], [7, 8, 9]]
    with torch.no_grad():
        shared = model.values(pack_groups([prompt], [answers])).split([3, 2, 1, 3])[1:]
    assert shared[0].dtype == torch.float32
    alone = [values(model, [prompt + answer])[0][3:] for answer in answers]
    together = [v[3:] for v in values(model, [prompt + answer for answer in answers])]
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    for a, b, c in zip(shared, alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        torch.testing.assert_close(c, b, rtol=0, atol=tolerance)
    assert torch.cat(alone).std() > 0.2


def test_the_gradient_reaches_trunk_and_head():
    model, _ = scalar_model()
    model.values(pack([[1, 2, 3]]))[-1].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.score.weight.grad.abs().max() > 0.1 and model.layers[0].qkv_proj.weight.grad.abs().max() > 0


def test_the_padding_token_ends_no_text(tmp_path):
    """transformers scores the last token that is not padding: with the end token for padding, the one before it."""
    model, tokenizer = scalar_model()
    tokenizer.special_tokens = {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    minitrl.save(model, tokenizer, tmp_path / "model")
    read = {name: json.loads((tmp_path / "model" / f"{name}.json").read_text()) for name in
            ("config", "tokenizer_config")}
    assert read["config"]["pad_token_id"] == 256 and read["tokenizer_config"]["pad_token"] == "<|endoftext|>"
    assert tokenizer.special_tokens["pad_token"] == "<|im_end|>"  # the one in hand is as it was
    tokenizer.special_tokens = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    minitrl.save(model, tokenizer, tmp_path / "none")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["pad_token_id"] is None
    assert "pad_token" not in json.loads((tmp_path / "none" / "tokenizer_config.json").read_text())


# Against transformers


CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral-window": ("mistral", dict(sliding_window=7)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
}
LENGTHS = (1, 2, 9, 17, 30)


def their_model(kind, options):
    transformers = pytest.importorskip("transformers")
    sizes = {name: size for name, size in CONFIG.items() if name not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(kind, **sizes | dict(num_labels=1, pad_token_id=256) | options)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        scale, centre = (0.3, 1.0) if "norm" in name else (0.5, 0.0) if name.endswith("bias") else (0.2, 0.0)
        torch.nn.init.normal_(parameter, centre, scale)
    return model.float().eval()


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def their_scores(model, batch, pad=None):
    """One by one, or as one batch that is padded on the right."""
    if pad is None:
        return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in batch])
    rows = torch.tensor([ids + [pad] * (max(LENGTHS) - len(ids)) for ids in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (max(LENGTHS) - len(ids)) for ids in batch])
    return model(rows, attention_mask=mask).logits[:, 0]


def last_values(model, batch):
    return torch.stack([value[-1] for value in values(model, batch)])


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_transformers(case, tmp_path):
    """Their folder in ours, and ours in theirs: the score of the last token, padded or not, and the weights' bits."""
    transformers = pytest.importorskip("transformers")
    theirs = their_model(*CASES[case])
    theirs.save_pretrained(write_folder(tmp_path / "theirs"))
    expected = their_scores(theirs, sequences())
    assert expected.std() > 0.5
    model, tokenizer = minitrl.load(tmp_path / "theirs", scalar_head=True)
    assert (last_values(model, sequences()) - expected).abs().max() <= TOLERANCE
    tokenizer.special_tokens["unk_token"] = "<|endoftext|>"
    minitrl.save(model, tokenizer, tmp_path / "ours")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert type(again) is type(theirs) and again.config.num_labels == 1
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values()))
    assert their_scores(again, sequences()).sub(expected).abs().max() <= 1e-5
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert their_tokenizer.pad_token_id == again.config.pad_token_id == 256  # ends no text
    padded = their_scores(again, sequences(), pad=their_tokenizer.pad_token_id)
    assert (padded - expected).abs().max() <= TOLERANCE


@pytest.mark.parity
def test_a_fresh_head_saved_is_one_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = minitrl.load(folder, scalar_head=True)
    with torch.no_grad():
        model.score.weight.mul_(50)
    minitrl.save(model, tokenizer, folder.parent / "reward")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder.parent / "reward")
    assert again.config.num_labels == 1 and type(again).__name__ == "LlamaForSequenceClassification"
    scores = their_scores(again.float().eval(), sequences())
    assert scores.std() > 0.1 and (last_values(model, sequences()) - scores).abs().max() <= TOLERANCE
