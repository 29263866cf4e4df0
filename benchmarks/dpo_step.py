"""A step of DPO against TRL on a real model, on a CPU:

    python -m benchmarks.dpo_step --model OUT/SmolLM2-135M-Instruct [--peers PYTHON]

4 pairs a step of random tokens, prompts of 32 to 256 and answers of 16 to 192, the same pairs in the same order on all
sides; sigmoid loss, bfloat16, AdamW's step included, no gradient checkpointing. Each side is a process of its own that
stays alive, and they take turns, one optimizer step each, so that whatever else the machine does falls on all. PYTHON
is an interpreter that has transformers and trl (pip install -e '.[parity]').

    ours          each prompt once before both answers, packs of at most 1,024 tokens, the reference's log-probs computed
                  before the first step; float32 masters
    default       trl.DPOTrainer, 4 pairs a step: prompts twice, padded to the longest, the reference run in each step
    precomputed   the same, precompute_ref_log_probs=True

Parameters, gradients and AdamW of TRL's sides are bfloat16, which is the fastest that it can do here; padding_free is
switched off in TRL 1.16. Writes benchmarks/results/dpo_step.json: medians over the rounds, the rounds, and each side's
peak memory. Passes over the reference before the first step, ours and `precomputed`'s, are not counted.
"""

import sys
import tempfile
import time

from benchmarks.grpo_step import report, versus, wait

PAIRS, STEP = 32, 4
SIDES = {
    "ours": {"examples_per_step": STEP, "tokens_per_microbatch": 1024, "masters and gradients": "float32"},
    "default": {"per_device_train_batch_size": STEP},
    "precomputed": {"per_device_train_batch_size": STEP, "precompute_ref_log_probs": True},
}


def pairs() -> list[dict]:
    import random

    draw = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randint(100, 49000) for _ in range(draw.randint(least, most))]

    return [{"prompt_ids": ids(32, 256), "chosen_ids": [*ids(15, 191), 2], "rejected_ids": [*ids(15, 191), 2]}
            for _ in range(PAIRS)]  # fmt: skip


def ours(model: str) -> None:
    from minitrl import checkpoint, distributed, dpo, training

    policy, _ = checkpoint.load(model, dpo.torch.bfloat16)
    rows = pairs()
    config = dpo.Config(model=model, dataset="-", max_length=512, tokens_per_microbatch=1024)
    world = distributed.start("cpu")
    optimizer = training.optimizer_of(policy, config, world)
    began = time.perf_counter()
    reference = dpo.score(policy, rows, config, world)
    print(f"the reference's log-probs took {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for step in range(1000):
        wait()
        began = time.perf_counter()
        chosen = [i % PAIRS for i in range(STEP * step, STEP * (step + 1))]
        metrics = dpo.learn(policy, [rows[i] for i in chosen], reference[chosen], chosen, config, world, {"delta": 0}, step)
        optimizer.step(1e-6)
        report(time.perf_counter() - began, pairs=STEP)
        assert step or abs(metrics["loss"] - 0.6931) < 0.05, metrics


def theirs(side: str, model: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # ids as they are
            return dataset

        def _get_train_sampler(self, dataset=None):
            return range(PAIRS)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            report(time.perf_counter() - self.began, pairs=STEP)

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1000,
        learning_rate=1e-6, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000, **SIDES[side],
    )  # fmt: skip
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16) for _ in range(2))
    kept = {} if config.precompute_ref_log_probs else {"ref_model": reference}
    data = Dataset.from_list(pairs())
    Trainer(model=policy, args=config, train_dataset=data, callbacks=[TakeTurns()], **kept).train()


if __name__ == "__main__":
    versus(__file__, __doc__, SIDES, ours, theirs, "pairs")
