"""Ten losses of a seeded run, which any change to data order, sampling, rewards, objective or optimizer moves.

After a change that is meant to, `python tests/test_golden.py` prints the new ones; say in the commit why they moved.
"""

import json
import tempfile
from pathlib import Path

import pytest
import tokenizers
import torch

from minitrl import checkpoint, grpo
from minitrl.model import Model, ModelConfig
from minitrl.tokenizer import Tokenizer

LOSSES = [0.037929, 0.077331, 0.012088, -0.307993, -0.362535, -0.377233, -0.082509, -0.132901, -0.162724, 0.203906]
VOCABULARY = 24
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
OPTIONS = {
    "prompts_per_step": 3,
    "num_generations": 4,
    "num_iterations": 3,
    "max_prompt_length": 4,
    "max_completion_length": 12,
    "tokens_per_microbatch": 48,
    "temperature": 0.9,
    "beta": 0.1,
    "max_grad_norm": 0.5,
    "learning_rate": 5e-3,
    "adam_epsilon": 1e-3,  # at 1e-8 a gradient that is all rounding moves its weight as far as any other
    "max_steps": 10,
    "dtype": "float32",
    "device": "cpu",
}
REWARD = '''
def even(completion_ids):
    """The share of even tokens, less a little for each token."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) - len(ids) / 50 for ids in completion_ids]
'''


def losses(folder: Path) -> list[float]:
    """Make a model, data and a reward in `folder`, train, and read the losses."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model = Model(ModelConfig.from_hf(SHAPE))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    checkpoint.save(model, Tokenizer(backend, end_ids=[1, 2, 3]), folder / "model")
    prompts = [f"t{i} t{i * 7 % VOCABULARY} t{i * 5 % VOCABULARY}" for i in range(2, 12)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "reward.py").write_text(REWARD)
    places = {"model": "model", "dataset": "data.jsonl", "reward": "reward.py:even", "output_dir": "output"}
    given = OPTIONS | {name: str(folder / place) for name, place in places.items()}
    (folder / "options.json").write_text(json.dumps(given))
    assert grpo.main(["--config", str(folder / "options.json")]) == 0
    rows = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_losses(tmp_path):
    assert losses(tmp_path) == pytest.approx(LOSSES, rel=1e-3, abs=2e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print([round(loss, 6) for loss in losses(Path(folder))])
