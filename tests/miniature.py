"""What a whole run needs, in miniature: a random checkpoint, data, rewards, and two ways to run a script on them.

`run` is `python -m minitrl.grpo` (or another) within this process; `launch` starts processes of their own, which may be
killed, and which form a world as under torchrun. They are forked off a server that has torch imported, so one
takes a second and not five.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from processes import free_port, take_place

from minitrl import checkpoint, grpo, runs
from minitrl.model import Model, ModelConfig
from minitrl.rewards import BUILT_IN
from minitrl.tokenizer import Tokenizer

CHARACTERS = "0123456789+= abc"
REWARDS = '''
"""Reward functions, good and bad."""
import time

def share_of_a(completions):
    return [c.count("a") / max(1, len(c)) for c in completions]

def tagged(prompts, completions, answer, step):
    """Different for every sample, and a function of the very row and completion that it is given."""
    return [len(c) + int(a) / 100 + len(p) / 1000 for p, c, a in zip(prompts, completions, answer, strict=True)]

def even(completions, answer):
    return [c.count("a") * 1.0 if int(a) % 2 == 0 else None for c, a in zip(completions, answer)]

def odd(completions, answer):
    return [c.count("b") * 1.0 if int(a) % 2 == 1 else None for c, a in zip(completions, answer)]

def never(completions):
    return [None] * len(completions)

def equal(completions):
    return [0.1] * len(completions)

def rare(completions, answer):
    """Signal in the groups of one answer in five alone."""
    return [c.count("a") if int(a) % 5 == 0 else 0.0 for c, a in zip(completions, answer)]

def raises(completions):
    return [{}["no such key"] for _ in completions]

def hangs(completions):
    time.sleep(600)

def too_few(completions):
    return [1.0]

def not_a_number(completions):
    return [float("nan")] * len(completions)

def words(completions):
    return ["good"] * len(completions)

def wants(completions, solution):
    return [1.0] * len(completions)
'''


@dataclass(frozen=True)
class Tiny:
    """The folder `model`, and the files data.jsonl and rewards.py, with which a run can be asked for."""

    folder: Path

    def argv(self, output_dir, reward="share_of_a", **options) -> list[str]:
        """The command line of a run of 4 steps of 2 prompts by 4 completions in float32; `options` change that."""
        options = {
            "model": self.folder / "model",
            "dataset": self.folder / "data.jsonl",
            "output_dir": output_dir,
            "reward": [name if name in BUILT_IN else f"{self.folder / 'rewards.py'}:{name}" for name in reward.split()],
            "max_steps": 4,
            "prompts_per_step": 2,
            "num_generations": 4,
            "max_prompt_length": 16,
            "max_completion_length": 12,
            "tokens_per_microbatch": 32,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "logging_steps": 1,
            **options,
        }
        words = []
        for name, value in options.items():
            if value is True or value is False:
                words.append(f"--{name}" if value else f"--no_{name}")
            elif value is not None:
                words += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
        return words


def backend_of(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """One token a character, or what stands for unknown ones and the end: <eos>."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>"])
    return backend


def make(folder: Path) -> Tiny:
    """Write a random Llama of 17 tokens, 50 sums as prompts, and the rewards."""
    vocabulary = {character: i for i, character in enumerate(["<eos>", *CHARACTERS])}
    backend = backend_of(vocabulary)
    config = ModelConfig.from_hf({
        "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "eos_token_id": 0,
    })  # fmt: skip
    model, generator = Model(config), torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator) if p.dim() > 1 else torch.nn.init.ones_(p)
    checkpoint.save(model, Tokenizer(backend, [0]), folder / "model")
    sums = [{"prompt": f"{i}+{i % 7}=", "answer": str(i + i % 7)} for i in range(50)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "rewards.py").write_text(REWARDS)
    return Tiny(folder)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: each process's exit status (negative: the signal that killed it) and what they printed."""

    codes: list[int]
    out: str
    err: str

    @property
    def code(self) -> int:
        """The exit status of a run in one process."""
        assert len(self.codes) == 1
        return self.codes[0]


def run(argv: list[str], script=grpo) -> Outcome:
    """`python -m minitrl.grpo ARGV` in this process, or another script of ours."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runs.command(functools.partial(script.main, argv))
        except SystemExit as end:
            code = end.code
    return Outcome([code], out.getvalue(), err.getvalue())


def launch(argv: list[str], world: int = 1, hooks: dict | None = None, main=grpo.main) -> Outcome:
    """The same in processes of its own; hooks[rank], where there is one, is called in that process first."""
    return apart(_train, world, argv, hooks or {}, main)


def _train(rank: int, argv: list[str], hooks: dict, main) -> None:
    hooks.get(rank, lambda: None)()
    runs.command(functools.partial(main, argv))


def apart(target, world: int, *arguments) -> Outcome:
    """target(rank, *arguments) in `world` processes. When a signal kills one the others are killed: torchrun would."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    with tempfile.TemporaryDirectory() as logs:
        started = [
            context.Process(target=_enter, args=(rank, world, port, logs, target, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + 120
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            multiprocessing.connection.wait([process.sentinel for process in started if process.is_alive()], timeout=1)
            if any((process.exitcode or 0) < 0 for process in started):
                break
        late = time.monotonic() >= deadline
        for process in started:
            process.kill()
            process.join()
        out, err = (
            "".join(path.read_text() for path in sorted(Path(logs).glob(f"*.{kind}"))) for kind in ("out", "err")
        )
    assert not late, f"still running after two minutes:\n{out}\n{err}"
    return Outcome([process.exitcode for process in started], out, err)


def _enter(rank: int, world: int, port: int, logs: str, target, arguments: tuple) -> None:
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with open(f"{logs}/{rank}.{kind}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    if world > 1:
        take_place(rank, world, port)
    torch.set_num_threads(1)
    target(rank, *arguments)


def rows(output_dir, name: str = "metrics") -> list[dict]:
    """The rows of metrics.jsonl or completions.jsonl."""
    return [json.loads(line) for line in (Path(output_dir) / f"{name}.jsonl").read_text().splitlines()]


def steps(output_dir) -> list[dict]:
    """The metrics of the steps, without an evaluation that came before the first."""
    return [row for row in rows(output_dir) if row["step"]]


def untimed(output_dir) -> list[dict]:
    """The metrics without those that depend on the clock and the machine."""
    clocks = ("time/", "step_time", "tokens_per_second", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows(output_dir)]
