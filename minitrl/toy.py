"""The embedded default: a tiny model, its tokenizer and a task, so that `python -m minitrl.grpo` learns by itself.

The task is to write five letters backwards: "fadbc>" is to be answered "cbdaf", and then to stop. The reward is built
in, `exact`: 1 for the right answer, else 0. It says whether and never how, so sampling has to hit upon right answers
for there to be anything to learn from. That is what the warm-up is for: supervised steps on other words, as few as make
greedy answers right a quarter of the time. Reinforcement learning takes it from there.

Everything follows from the seed. A word is in one of four sets and no other: the warm-up's, the words that tell when to
end the warm-up, the words of reinforcement learning, and the held-out words, which only `eval/accuracy` sees.
"""

import random

import tokenizers
import torch
from torch import Tensor, nn

from .data import Documents
from .distributed import World
from .model import Model, ModelConfig
from .packing import pack_groups
from .tokenizer import Tokenizer
from .training import Optimizer

LETTERS, LENGTH, END = "abcdef", 5, "<end>"
SIZES = {"warm_up": 2000, "stop": 200, "train": 4000, "held_out": 256}  # words in each set, of 7,776

# Options in place of grpo's defaults, which are for language models of a million times the size.
PRESET = {
    "reward": ("exact",),
    "eval_reward": ("exact",),
    "dtype": "float32",
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "prompts_per_step": 32,
    "max_steps": 500,
    "max_completion_length": 8,
    "rollout_batch_size": 256,
    "logging_steps": 25,
    "log_completions": True,
    "num_completions_to_print": 3,
}

PPO_PRESET = PRESET | {"prompts_per_step": 256, "vf_coef": 0.5, "kl_coef": 0.02, "max_steps": 400}

SFT_PRESET = {
    "dtype": "float32",
    "gradient_checkpointing": False,
    "learning_rate": 2e-3,
    "examples_per_step": 64,
    "max_steps": 300,
    "logging_steps": 25,
    "eval_steps": 100,
}


REWARD_PRESET = SFT_PRESET | {"learning_rate": 1e-3}
DPO_PRESET = SFT_PRESET | {"learning_rate": 1e-4, "max_steps": 150, "eval_steps": 50}


def build(seed: int, device="cpu", log=print) -> tuple[Model, Tokenizer]:
    """The model after its warm-up, float32, and the tokenizer. `log` gets one line of text."""
    tokenizer = make_tokenizer()
    model = make_model(seed, tokenizer.vocab_size).to(device)
    words = split(seed)
    steps, accuracy = warm_up(model, tokenizer, words["warm_up"], words["stop"], seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    log(f"toy: {size:,} parameters, warmed up by {steps} supervised steps: {accuracy:.0%} of words are reversed")
    return model, tokenizer


def datasets(seed: int) -> tuple[list[dict], list[dict]]:
    """(rows to train on, held-out rows), in the form of `data.load_prompts`."""
    tokenizer, words = make_tokenizer(), split(seed)
    train, held_out = ([_row(tokenizer, word) for word in words[name]] for name in ("train", "held_out"))
    return train, held_out


def demonstrations(seed: int) -> tuple[Documents, Documents]:
    """(what sft.py trains on, what it holds out): words and their answers, of which the answers are learnt."""
    tokenizer, words = make_tokenizer(), split(seed)
    pairs = [[(_prompt(tokenizer, word), _answer(tokenizer, word)) for word in words[n]] for n in ("train", "held_out")]
    return tuple(Documents.of([(p + a, [0] * len(p) + [1] * len(a)) for p, a in part]) for part in pairs)


def preferences(seed: int) -> tuple[list[dict], list[dict]]:
    """(pairs to train on, held-out pairs), in the form of `pairs.load_preferences`: right answers over wrong ones.

    A wrong answer has one letter of the right one changed, so that neither length nor form tells them apart.
    """
    tokenizer, words, draw = make_tokenizer(), split(seed), random.Random(seed)

    def pair(word: str) -> dict:
        right, place = word[::-1], draw.randrange(LENGTH)
        other = draw.choice([letter for letter in LETTERS if letter != right[place]])
        chosen, rejected = (_answer(tokenizer, w) for w in (word, (right[:place] + other + right[place + 1 :])[::-1]))
        return {"prompt_ids": _prompt(tokenizer, word), "chosen_ids": chosen, "rejected_ids": rejected, "margin": 0.0}

    return tuple([pair(word) for word in words[name]] for name in ("train", "held_out"))


def split(seed: int) -> dict[str, list[str]]:
    """The four sets of words: drawn together without replacement, hence disjoint."""
    total = sum(SIZES.values())
    numbers = iter(random.Random(seed).sample(range(len(LETTERS) ** LENGTH), total))
    return {name: [_word(next(numbers)) for _ in range(size)] for name, size in SIZES.items()}


def make_tokenizer() -> Tokenizer:
    """One token a character: a byte-pair tokenizer without any pair to merge."""
    vocabulary = [END, ">", *LETTERS]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
    return Tokenizer(backend, (vocabulary.index(END),), special_tokens={"eos_token": END, "pad_token": END})


def make_model(seed: int, vocab_size: int) -> Model:
    """An untrained Llama of two layers, on the CPU."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    model = Model(ModelConfig.from_hf(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # norms' weights are 1 as they are
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def warm_up(model: Model, tokenizer: Tokenizer, words: list[str], stop_words: list[str], seed: int):
    """Supervised steps until a quarter of `stop_words` is reversed right: (how many steps, the share).

    Ended by accuracy and not by a number of steps, so that every seed leaves reinforcement learning the same to do.
    """
    device = model.head_weight.device
    optimizer = Optimizer(model, World(0, 1, device))
    generator = random.Random(seed)
    for step in range(1, 1001):
        batch = generator.sample(words, 64)
        pack = pack_groups([_prompt(tokenizer, w) for w in batch], [[_answer(tokenizer, w)] for w in batch], device)
        answers_T = pack.completion_T
        logprobs_T, _ = model.logprobs(pack, answers_T)
        (-logprobs_T.sum() / answers_T.sum()).backward()
        optimizer.step(lr=2e-3)
        if step % 5 == 0 and (accuracy := greedy_accuracy(model, tokenizer, stop_words)) >= 0.25:
            return step, accuracy
    raise RuntimeError(f"the toy's warm-up did not get there in {step} steps (seed {seed})")


@torch.no_grad()
def greedy_accuracy(model: Model, tokenizer: Tokenizer, words: list[str]) -> float:
    """The share of words whose greedy answer is right. One pass is enough: up to the first error, what greedy decoding
    reads is the right answer."""
    pairs = [(_prompt(tokenizer, word), _answer(tokenizer, word)) for word in words]
    logits = model.logits([prompt + answer for prompt, answer in pairs])
    return sum(_is_greedy(l, prompt, answer) for l, (prompt, answer) in zip(logits, pairs, strict=True)) / len(words)


def _is_greedy(logits: Tensor, prompt: list[int], answer: list[int]) -> bool:
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def _word(number: int) -> str:
    return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(LENGTH))


def _prompt(tokenizer: Tokenizer, word: str) -> list[int]:
    return tokenizer.encode(f"{word}>")


def _answer(tokenizer: Tokenizer, word: str) -> list[int]:
    return [*tokenizer.encode(word[::-1]), *tokenizer.end_ids]


def _row(tokenizer: Tokenizer, word: str) -> dict:
    return {"prompt": f"{word}>", "prompt_ids": _prompt(tokenizer, word), "columns": {"answer": word[::-1]}}
