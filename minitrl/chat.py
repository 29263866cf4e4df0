"""Talk to a model: a line is a turn, the answer appears as it is sampled, and the conversation goes on.

The checkpoint's own chat template is used; without one each line is continued as plain text, and nothing is remembered.
/reset forgets the conversation, /quit (or the end of input) ends it, Ctrl-C ends an answer, which is then forgotten.

    python -m minitrl.chat --model Qwen/Qwen3-0.6B
    echo "What is 2 + 3?" | python -m minitrl.chat --model OUT/final --temperature 0
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from . import distributed, lora, runs
from .config import parse, require
from .console import printable
from .rollout import Engine, context_length
from .sampling import Sampling


@dataclass
class Config:
    """Chat with a model."""

    model: str  # folder of a Hugging Face checkpoint or of an adapter, or a Hub id
    system: str | None = None  # the system message; none: the template's own
    max_tokens: int = 512  # of an answer
    temperature: float = 0.7  # of sampling; 0: greedy
    top_p: float = 0.95  # sample from the smallest set of tokens that has this probability; 1: off
    top_k: int = 0  # sample from this many of the likeliest tokens; 0: off
    min_p: float = 0.0  # sample from tokens with at least this share of the likeliest one's probability; 0: off
    repetition_penalty: float = 1.0  # divides the logits of tokens that were there already; 1: off
    seed: int = 42  # of every sampled token
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one

    def __post_init__(self):
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        self.sampling = Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty)


def main(argv: list[str] | None = None) -> int:
    """Read lines until there are no more; returns 0."""
    config = parse(Config, argv)
    device = distributed.start(config.device).device
    model, tokenizer = lora.open_model(config.model, None, getattr(torch, config.dtype), device, scalar_head=False)
    engine, templated = Engine(model, tokenizer, max_batch=1), tokenizer.chat_template is not None
    require(templated or config.system is None, "system", config.system, "left out: the model has no chat template")
    typed = sys.stdin.isatty()
    start = [{"role": "system", "content": config.system}] if config.system is not None else []
    messages = list(start)
    while (line := read(typed)) is not None:
        if line == "/reset":
            messages = list(start)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                text = answer(engine, asked if templated else line, len(asked), config)
            except KeyboardInterrupt:
                print("\n(stopped; this turn is forgotten)" if typed else "", flush=True)
                continue
            except ValueError as error:  # the template refuses it, or there is no room
                print(f"error: {error}; /reset begins anew", file=sys.stderr, flush=True)
                continue
            messages = [*asked, {"role": "assistant", "content": text}] if templated else messages
    return 0


def read(typed: bool) -> str | None:
    """The next line; None at the end."""
    try:
        line = input("> " if typed else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line == "/quit" else line


def answer(engine: Engine, prompt, turn: int, config: Config) -> str:
    """Sample an answer and print it token by token. The text is the whole of it."""
    ids = engine.tokenizer.prompt_ids(prompt)
    room = context_length(engine.model.config) - len(ids)
    if room < 1:
        raise ValueError(f"the conversation has {len(ids)} tokens, and the model no position for another")
    sampled, shown = [], 0

    def show(index, token, logprob, ended):
        nonlocal shown
        sampled.append(token)
        text = engine.tokenizer.decode(sampled)
        whole = text if ended else text.rstrip("\ufffd")  # a character whose last bytes are still to come
        print(printable(whole[shown:], "\n\t"), end="", flush=True)
        shown = max(shown, len(whole))

    limits = {"max_tokens": min(config.max_tokens, room), "sampling": config.sampling, "seed": config.seed + turn}
    request = engine.submit(ids, on_token=show, **limits)
    try:
        while not engine.idle:
            engine.step()
    finally:
        engine.abort(request)
    done = request.results[0]
    why = f"--max_tokens {config.max_tokens}" if config.max_tokens < room else "the model's positions are used up"
    print(f" [cut: {why}]" if done.finish_reason == "length" else "", flush=True)
    return done.text


if __name__ == "__main__":
    runs.command(main)
