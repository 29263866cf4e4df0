"""The decoder against transformers, by way of folders that each side wrote: what is compared is what a user loads.

Random weights are scaled so that a mistake shows: attention is far from uniform, logits spread over more than one
unit, biases and norms are not the identity, and sequences pass the sliding window and the original context length.
`test_every_feature_matters` checks the scaling itself: switching any one feature off moves some logit by over 0.01.
"""

import json
import os
from functools import partial

import pytest
import torch
from test_tokenizer import write_folder

import minitrl
from minitrl.model import ModelConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # max abs difference of float32 logits
CONTEXT, LENGTHS = 16, (1, 2, 15, 16, 17, 50)  # original_max_position_embeddings; tokens in each test sequence
SIZES = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, eos_token_id=258, bos_token_id=None, pad_token_id=None,
)
DEFAULT = dict(rope_type="default", rope_theta=500.0)
LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=4.0)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=CONTEXT)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=CONTEXT)
WINDOW = dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)

CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-no-gqa": ("llama", dict(num_key_value_heads=4)),
    "llama-mqa": ("llama", dict(num_key_value_heads=1)),
    "llama-head-dim": ("llama", dict(head_dim=32)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": ("llama", dict(rope_parameters=LINEAR)),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-yarn": ("llama", dict(rope_parameters=YARN)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-window": ("mistral", dict(sliding_window=7)),
    "mistral-tied-window-llama3": ("mistral", dict(sliding_window=9, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral-yarn-head-dim": ("mistral", dict(sliding_window=None, head_dim=32, rope_parameters=YARN)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-no-gqa": ("qwen2", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "qwen2-window": ("qwen2", WINDOW),
    "qwen2-window-unused": ("qwen2", dict(use_sliding_window=False, sliding_window=7, max_window_layers=0)),
    "qwen2-layer-types": (
        "qwen2", dict(WINDOW, layer_types=["sliding_attention", *["full_attention"] * 2, "sliding_attention"])
    ),
    "qwen2-linear": ("qwen2", dict(rope_parameters=LINEAR)),
    "qwen2-yarn": ("qwen2", dict(rope_parameters=dict(YARN, beta_fast=8, beta_slow=0.5, truncate=False))),
    "qwen2-llama3": ("qwen2", dict(rope_parameters=LLAMA3)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-tied-head-dim": ("qwen3", dict(head_dim=32, tie_word_embeddings=True)),
    "qwen3-biases-no-gqa": ("qwen3", dict(head_dim=16, attention_bias=True, num_key_value_heads=4)),
    "qwen3-tied-window": ("qwen3", dict(WINDOW, head_dim=32, tie_word_embeddings=True)),
    "qwen3-window": ("qwen3", dict(WINDOW, head_dim=16)),
    "qwen3-yarn-mscale": (
        "qwen3", dict(head_dim=16, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=0.5))
    ),
    "qwen3-yarn-factor": ("qwen3", dict(head_dim=16, rope_parameters=dict(YARN, attention_factor=1.3))),
    "qwen3-linear": ("qwen3", dict(head_dim=16, rope_parameters=LINEAR)),
    "qwen3-llama3": ("qwen3", dict(head_dim=16, rope_parameters=LLAMA3)),
}


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


def build(kind, options):
    """A random transformers model, every parameter drawn so that it takes part in the result."""
    config = transformers.AutoConfig.for_model(kind, **(SIZES | dict(rope_parameters=DEFAULT) | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        scale, centre = (0.3, 1.0) if "norm" in name else (0.5, 0.0) if name.endswith("bias") else (0.2, 0.0)
        torch.nn.init.normal_(parameter, centre, scale)
    return model


@torch.no_grad()
def their_logits(model, batch):
    return [model(torch.tensor([ids])).logits[0].float() for ids in batch]


@torch.no_grad()
def distance(ours, theirs):
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


def edit_config(folder, **changes):
    """Change config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    theirs = build(*CASES[case])
    theirs.save_pretrained(write_folder(tmp_path))
    expected = their_logits(theirs, sequences())
    assert torch.cat(expected).std() >= 1
    model, _ = minitrl.load(tmp_path)
    with torch.no_grad():
        assert distance(model.logits(sequences()), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "case, changes",
    [
        ("llama-linear", dict(rope_parameters=DEFAULT)),
        ("llama-llama3", dict(rope_parameters=DEFAULT)),
        ("llama-yarn", dict(rope_parameters=DEFAULT)),
        ("llama-yarn", dict(rope_parameters=dict(YARN, attention_factor=1.0))),
        ("llama-llama3", dict(rope_parameters=dict(LLAMA3, original_max_position_embeddings=2 * CONTEXT))),
        ("qwen2-yarn", dict(rope_parameters=YARN)),
        ("qwen3-yarn-mscale", dict(rope_parameters=YARN)),
        ("mistral-window", dict(sliding_window=8)),
        ("qwen2-window", dict(max_window_layers=3, layer_types=None)),
        ("qwen2-window", dict(sliding_window=8)),
        ("qwen2-layer-types", dict(layer_types=["full_attention"] * 4)),
        ("qwen3-window", dict(use_sliding_window=False)),
        ("llama", dict(rms_norm_eps=1e-2)),
        ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=600.0))),
    ],
)
def test_every_feature_matters(case, changes, tmp_path):
    """The parity test can fail: a slightly different configuration is seen, far beyond the tolerance."""
    theirs = build(*CASES[case])
    theirs.save_pretrained(write_folder(tmp_path))
    edit_config(tmp_path, **changes)
    model, _ = minitrl.load(tmp_path)
    with torch.no_grad():
        assert distance(model.logits(sequences()), their_logits(theirs, sequences())) > 100 * TOLERANCE


@pytest.mark.parametrize("rope", [DEFAULT, LINEAR, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_spelling_of_config_json(rope, key, tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling (with "type" before 4.43) and torch_dtype."""
    theirs = build("llama", dict(rope_parameters=rope))
    theirs.save_pretrained(write_folder(tmp_path))
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
    scaling = {key: rope["rope_type"], **scaling} if scaling else None
    edit_config(tmp_path, rope_parameters=None, dtype=None,
                rope_theta=500.0, rope_scaling=scaling, torch_dtype="float32")
    model, _ = minitrl.load(tmp_path)
    with torch.no_grad():
        assert distance(model.logits(sequences()), their_logits(theirs, sequences())) <= TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_keys_left_out_have_the_same_defaults(kind, tmp_path):
    """A config.json that leaves optional keys out means what transformers takes it to mean."""
    yarn = dict(rope_type="yarn", factor=4.0)
    config = dict(model_type=kind, vocab_size=300, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
                  num_attention_heads=32, max_position_embeddings=24, rope_scaling=yarn)
    (write_folder(tmp_path) / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="eager").float().eval()
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = minitrl.load(tmp_path)
    with torch.no_grad():
        assert distance(model.logits(sequences()), their_logits(theirs, sequences())) <= TOLERANCE


def test_original_context_beside_the_rope_parameters(tmp_path):
    """Some config.json have original_max_position_embeddings at the top, where it wins over the one inside."""
    (write_folder(tmp_path) / "config.json").write_text("{}")
    theirs = build("llama", dict(rope_parameters=dict(YARN, original_max_position_embeddings=32)))
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, original_max_position_embeddings=CONTEXT)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model, _ = minitrl.load(tmp_path)
    with torch.no_grad():
        ours = model.logits(sequences())
        assert distance(ours, their_logits(again, sequences())) <= TOLERANCE
        assert distance(ours, their_logits(theirs, sequences())) > 100 * TOLERANCE


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_refused_rope_types_are_named(rope_type):
    options = dict(SIZES, model_type="llama", rope_parameters=dict(rope_type=rope_type, rope_theta=500.0, factor=2.0))
    with pytest.raises(ValueError, match=rope_type):
        ModelConfig.from_hf(options)


@pytest.mark.parametrize("case", ["llama-biases", "llama-tied", "mistral-window", "qwen2-window", "qwen3-tied-window"])
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_saved_folder_loads_in_transformers(case, shards, tmp_path):
    """transformers -> ours -> transformers, the weights bit for bit; and ours of ours."""
    limit = 5 * 10**9 if shards == "one file" else 100_000
    theirs = build(*CASES[case])
    theirs.save_pretrained(write_folder(tmp_path / "theirs"), max_shard_size=limit)
    model, tokenizer = minitrl.load(tmp_path / "theirs")
    minitrl.save(model, tokenizer, tmp_path / "final", max_shard_bytes=limit)
    files = list((tmp_path / "final").glob("*.safetensors"))
    assert len(files) == 1 if shards == "one file" else len(files) > 3
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", attn_implementation="eager", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_weights(again, theirs)
    # Not bit for bit: where the weights lie in memory changes how a product is summed
    assert distance(their_logits(again, sequences()), their_logits(theirs, sequences())) <= 1e-5
    assert again.generation_config.eos_token_id == 258
    text = [{"role": "user", "content": "hello"}]
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "final").apply_chat_template(
        text, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt_ids(text) == ids
    ours, _ = minitrl.load(tmp_path / "final")
    assert_same_weights(ours, model)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_dtype(dtype, tmp_path):
    build("llama", {}).save_pretrained(write_folder(tmp_path / "theirs"))
    model, tokenizer = minitrl.load(tmp_path / "theirs")
    minitrl.save(model, tokenizer, tmp_path / "final", dtype=dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(dtype))


# The real model: MINITRL_REAL_MODEL names the folder of SmolLM2-135M-Instruct (benchmarks/real.py makes it).
REAL = os.environ.get("MINITRL_REAL_MODEL")
real = pytest.mark.skipif(not REAL, reason="MINITRL_REAL_MODEL is not set")
QUESTIONS = [
    "What is the capital of France?", "What is 7 + 5?", "Write one sentence about the sea.", "Name three colours.",
    "Why is the sky blue?", "Translate 'good morning' to Spanish.", "Who wrote Hamlet?", "What is gravity?",
    "Give me a recipe for pancakes.", "Count from one to ten.", "What is a prime number?", "Describe a cat.",
    "How do plants grow?", "What day comes after Monday?", "Explain recursion.", "What is DNA?",
    "Tell me a joke.", "What is the largest ocean?", "How many legs has a spider?", "What is photosynthesis?",
]


@real
@pytest.mark.slow
@torch.no_grad()
def test_real_model_continues_alike(tmp_path):
    """20 prompts x 64 greedy tokens. By induction: ours picks each of their tokens, given the ones before it.

    Logits are up to 40 here: what processors round alone may be more than TOLERANCE. Then float64 tells who is off.
    """
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, REAL)
    theirs, exact = load(dtype=torch.float32).eval(), load(dtype=torch.float64).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(REAL)
    model, tokenizer = minitrl.load(REAL)
    assert tokenizer.end_ids == (their_tokenizer.eos_token_id,)
    worst = [0.0] * 3
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.prompt_ids(messages)
        assert prompt == their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                              do_sample=False, max_new_tokens=64, min_new_tokens=64)[0].tolist()
        [expected], [ours] = their_logits(theirs, [ids]), model.logits([ids])
        assert expected.std() >= 1
        [truth] = their_logits(exact, [ids])
        pairs = (ours, expected), (ours, truth), (expected, truth)
        worst = [max(most, distance([one], [other])) for most, (one, other) in zip(worst, pairs)]
        scores = ours[len(prompt) - 1 : -1].index_fill(1, torch.tensor(tokenizer.end_ids), -torch.inf)
        assert scores.argmax(-1).tolist() == ids[len(prompt) :] and len(ids) == len(prompt) + 64
    print("largest difference of a logit: {:.2e}; from float64: ours {:.2e}, transformers {:.2e}".format(*worst))
    assert worst[0] <= TOLERANCE or worst[1] <= 1.5 * worst[2]


@real
@pytest.mark.slow
@torch.no_grad()
def test_real_model_saved_by_us_is_theirs(tmp_path):
    model, tokenizer = minitrl.load(REAL, dtype=torch.bfloat16)
    minitrl.save(model, tokenizer, tmp_path / "final", max_shard_bytes=10**8)
    assert_same_weights(transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype="auto"),
                        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto"))
    ids = [tokenizer.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS[:3]]
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert distance(minitrl.load(REAL)[0].logits(ids), their_logits(final, ids)) <= TOLERANCE
