"""SFT by minitrl and by TRL 1.16's SFTTrainer, run for real on the same files: losses, gradient norms, final weights."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from minitrl import sft

pytestmark = pytest.mark.parity

VOCABULARY, EOS = 40, 1
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} </s>{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
STEPS, RATE = 3, 0.003


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random Llama whose words are its tokens, and a file of each kind of demonstration."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder, draw = tmp_path_factory.mktemp("sft"), random.Random(0)
    words = ["<unk>", "</s>", "[user]", "[assistant]", *(f"t{i}" for i in range(4, VOCABULARY))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )  # pad == eos: where labels are made from ids, the end token would not be learnt
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=EOS,
            bos_token_id=None, tie_word_embeddings=False,
        )
    ).float()  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def text(low: int, high: int) -> str:
        return " ".join(f"t{draw.randint(4, VOCABULARY - 1)}" for _ in range(draw.randint(low, high)))

    def say(role: str) -> dict:
        return {"role": role, "content": text(1, 6)}

    kinds = {
        "text": lambda: {"text": text(2, 20)},
        "pairs": lambda: {"prompt": text(1, 8), "completion": " " + text(1, 12)},
        "chats": lambda: {"messages": [say(role) for role in ("user", "assistant") * draw.randint(1, 2)]},
        "chat_pairs": lambda: {"prompt": [say("user")], "completion": [say("assistant")]},
    }
    for name, make in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(12)))
    return folder


CASES = {
    "text": ("text", {}),
    "prompt and completion": ("pairs", {}),
    "prompt and completion, both learnt": ("pairs", {"completion_only_loss": False}),
    "conversations": ("chats", {}),
    "the assistant's turns": ("chats", {"assistant_only_loss": True}),
    "completions that are messages": ("chat_pairs", {}),
    "completions that are messages, assistant's turns": ("chat_pairs", {"assistant_only_loss": True}),
    "cut": ("text", {"max_length": 9}),
    "cut, with prompts": ("pairs", {"max_length": 9}),
}


def ours(world, folder, kind: str, options: dict) -> tuple[list[dict], dict]:
    given = {
        "model": str(world / "model"), "dataset": str(world / f"{kind}.jsonl"), "output_dir": str(folder),
        "dtype": "float32", "device": "cpu", "max_steps": STEPS, "learning_rate": RATE, "adam_epsilon": 1e-3,
        "max_grad_norm": 0.5, "tokens_per_microbatch": 64, "max_length": 64, "gradient_checkpointing": False, **options,
    }  # fmt: skip
    (folder.parent / "given.json").write_text(json.dumps(given))
    assert sft.main(["--config", str(folder.parent / "given.json")]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "final" / "model.safetensors")


def theirs(world, folder, kind: str, options: dict, rows: int, micro_batches: int) -> tuple[list[dict], dict]:
    datasets, transformers, trl = (pytest.importorskip(name) for name in ("datasets", "transformers", "trl"))
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, max_steps=STEPS, learning_rate=RATE, adam_epsilon=1e-3,
            max_grad_norm=0.5, per_device_train_batch_size=rows // micro_batches,
            gradient_accumulation_steps=micro_batches, gradient_checkpointing=False, logging_steps=1, report_to="none",
            save_strategy="no", **{"max_length": 64, **options},
        ),
        train_dataset=datasets.Dataset.from_json(str(world / f"{kind}.jsonl"), cache_dir=str(folder / "cache")),
        processing_class=transformers.AutoTokenizer.from_pretrained(world / "model"),
    )  # fmt: skip
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    return history, {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()}


def compare(mine, other, metrics=("loss", "grad_norm")) -> None:
    (my_rows, my_weights), (their_rows, their_weights) = mine, other
    assert len(my_rows) == len(their_rows) == STEPS
    for one, two in zip(my_rows, their_rows):
        for name in metrics:
            assert one[name] == pytest.approx(float(two[name]), rel=1e-5, abs=1e-5), name
    for name, tensor in my_weights.items():
        assert (tensor - their_weights[name]).abs().max() <= 1e-5, name


# Every step has all rows, so that the order of rows, of which each has its own, changes nothing.


@pytest.mark.parametrize("kind, options", CASES.values(), ids=CASES)
def test_a_step_is_trls(world, tmp_path, kind, options):
    mine = ours(world, tmp_path / "ours", kind, options | {"examples_per_step": 12})
    other = theirs(world, tmp_path / "theirs", kind, options, 12, 1)
    compare(mine, other, ("loss", "grad_norm", "mean_token_accuracy", "entropy"))


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_accumulated_micro_batches_are_trls(world, tmp_path, kind):
    """Its six micro-batches of two rows, our micro-batches of as many documents as go into 25 tokens."""
    options = {"tokens_per_microbatch": 25, "max_length": 25}
    mine = ours(world, tmp_path / "ours", kind, options | {"examples_per_step": 12})
    compare(mine, theirs(world, tmp_path / "theirs", kind, {"max_length": 25}, 12, 6))


@pytest.mark.parametrize("kind, options", [("text", {}), ("pairs", {}), ("chats", {"assistant_only_loss": True})])
def test_packed_rows_are_trls(world, tmp_path, kind, options):
    """Best-fit decreasing. Which documents share a row differs where several rows are as full: the loss does not."""
    options = {"packing": True, "max_length": 40, **options}
    documents = sft.data.load_demonstrations(
        world / f"{kind}.jsonl", sft.checkpoint.load(world / "model")[1], None, "assistant_only_loss" in options
    )
    count = sft.packing.pack_lengths(documents.lengths, 40)[1]
    assert 1 < count < 12
    mine = ours(world, tmp_path / "ours", kind, options | {"examples_per_step": count})
    other = theirs(world, tmp_path / "theirs", kind, options, count, 1)
    compare(mine, other, ("loss", "grad_norm", "mean_token_accuracy", "entropy"))


@pytest.mark.parametrize("kind, only", [("text", False), ("pairs", False), ("chats", True)])
def test_the_ids_and_the_mask_are_those_of_transformers_cross_entropy(world, kind, only):
    """The mean over learnt tokens of transformers' own loss, document by document."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = sft.checkpoint.load(world / "model")
    documents = sft.data.load_demonstrations(world / f"{kind}.jsonl", tokenizer, None, only)
    config = sft.Config(dtype="float32", tokens_per_microbatch=64, max_length=64)
    metrics, _ = sft.learn(model, documents, sft.np.arange(12), config, sft.distributed.World(0, 1, torch.device("cpu")))
    reference = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    total, count = 0, 0
    for d in range(12):
        ids, mask = torch.tensor(documents.ids(d))[None].long(), torch.tensor(documents.mask(d))[None]
        loss = reference(ids, labels=ids.masked_fill(~mask, -100)).loss
        total, count = total + loss * mask.sum(), count + mask.sum()
    (total / count).backward()
    assert metrics["loss"] == pytest.approx((total / count).item(), abs=1e-5)
    for name, (parameter, rows, _) in sft.checkpoint.hf_tensors(model.config).items():
        gradient = model.get_parameter(parameter).grad
        found = gradient if rows is None else gradient[rows]
        assert (found - reference.get_parameter(name).grad).abs().max() <= 1e-5, name
