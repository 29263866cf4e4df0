"""A step of SFT against TRL on a real model, on a CPU:

    python -m benchmarks.sft_step --model OUT/SmolLM2-135M-Instruct [--peers PYTHON]

64 documents of 32 to 512 random tokens, all learnt, each with the end token; bfloat16, AdamW's step included, no
gradient checkpointing. Ours and one of TRL's sides at a time (memory holds no more) are processes that stay alive, and
they take turns, one optimizer step each, so that whatever else the machine does falls on both. PYTHON is an interpreter
that has transformers and trl (pip install -e '.[parity]').

    ours          8 documents a step, in packs of at most 1,024 tokens; float32 masters
    padded        trl.SFTTrainer, 8 documents a step, padded to the longest: its default
    padding_free  the same, padding_free=True: one row without padding, attention by transformers' mask from positions
    packed        packing=True, bfd, rows of 512 tokens, 4 a step: about as many tokens

Parameters, gradients and AdamW of TRL's sides are bfloat16, which is the fastest that it can do here. Tokens a second
count documents' tokens, not padding. Writes benchmarks/results/sft_step.json: for each of --sides medians over the
rounds, the rounds, each side's peak memory, and the ratio of ours to it.
"""

import sys
import tempfile
import time

from benchmarks.grpo_step import report, versus, wait

SIDES = {
    "ours": {"examples_per_step": 8, "tokens_per_microbatch": 1024, "masters and gradients": "float32"},
    "padded": {"per_device_train_batch_size": 8, "max_length": 512},
    "padding_free": {"per_device_train_batch_size": 8, "max_length": None, "padding_free": True},
    "packed": {"per_device_train_batch_size": 4, "max_length": 512, "packing": True, "packing_strategy": "bfd"},
}


def documents() -> list[list[int]]:
    import random

    draw = random.Random(0)
    return [[draw.randint(100, 49000) for _ in range(draw.randint(32, 512) - 1)] + [2] for _ in range(64)]


def ours(model: str) -> None:
    import numpy as np

    from minitrl import checkpoint, data, distributed, sft, training

    torch = sft.torch
    policy, _ = checkpoint.load(model, torch.bfloat16)
    rows = data.Documents.of([(ids, [1] * len(ids)) for ids in documents()])
    config = sft.Config(model=model, dataset="-", tokens_per_microbatch=1024)
    world = distributed.start("cpu")
    optimizer = training.optimizer_of(policy, config, world)
    for step in range(1000):
        wait()
        began = time.perf_counter()
        chosen = data.order(len(rows), 8 * step, 8, config.seed)
        metrics, _ = sft.learn(policy, rows, np.array(chosen), config, world)
        optimizer.step(1e-6)
        report(time.perf_counter() - began, tokens=metrics["tokens"])


def theirs(side: str, model: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Trainer(SFTTrainer):
        def training_step(self, module, inputs, *rest):
            self.tokens = int((inputs["labels"] != -100).sum())
            starts = inputs["position_ids"] == 0 if "position_ids" in inputs else None
            # A flattened row gives no label to a document's first token.
            self.tokens += int(starts.sum()) if starts is not None else 0
            return super().training_step(module, inputs, *rest)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            report(time.perf_counter() - self.began, tokens=trainer.tokens)

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1000,
        learning_rate=1e-6, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000, **SIDES[side],
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    rows = Dataset.from_list([{"input_ids": ids} for ids in documents()])
    trainer = Trainer(model=policy, args=config, train_dataset=rows, callbacks=[TakeTurns()])
    trainer.train()


if __name__ == "__main__":
    versus(__file__, __doc__, SIDES, ours, theirs, "tokens")
