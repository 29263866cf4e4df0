"""minitrl: reinforcement-learning post-training of language models in plain PyTorch.

Reading order, each file whole and from the top:

 1. grpo.py          the algorithm: sample groups of completions, score them, push up what beat its group
 2. experience.py    generate, score, advantages: what an algorithm learns from; ahead.py: what is sampled when
 3. losses.py        the objectives as formulas on packed tensors; kernels/grpo_loss.py holds GRPO's own
 4. packing.py       sequences on one axis without padding; a prompt stands once before its completions
 5. model.py         one decoder for Llama, Mistral, Qwen2 and Qwen3
 6. rollout.py       the generation engine: paged KV cache, continuous batching; sampling.py: from logits to a token
 7. training.py      optimizer with fp32 master weights, schedules; runs.py: the output folder, Ctrl-C; console.py
 8. distributed.py   processes, and the few sums that they share
 9. checkpoint.py    Hugging Face folders in and out, exact resume; tokenizer.py, data.py, rewards.py, config.py
10. kernels/         the operations that PyTorch alone does wastefully, each with its plain reference
ppo.py is grpo.py with a value model in place of the group: a baseline for every token.
sft.py fine-tunes on demonstrations, reward.py and dpo.py train on preferences (pairs.py); training.py has the loop that
these share, who sample nothing.
lora.py trains adapters beside a frozen model, in each of these; evaluate.py and chat.py look at what came out.
server.py puts the engine behind HTTP (web.py), rollout_client.py samples from such servers (remote.py), or from vLLM's
(vllm.py), and transfer.py brings ours the trainer's weights.
toy.py is the model, the tokenizer and the task that `python -m minitrl.grpo` trains when it is given none.

From Python: minitrl.load, minitrl.save, minitrl.Engine, minitrl.losses and minitrl.packing. They are imported when
first used, so `import minitrl` costs nothing.
"""

import importlib

_HOMES = {"load": "checkpoint", "save": "checkpoint", "Engine": "rollout"}
__all__ = ["load", "save", "Engine", "losses", "packing"]


def __getattr__(name: str):
    """Import on first use: `minitrl.load` from checkpoint.py, `minitrl.losses` the module itself."""
    if name not in __all__:
        raise AttributeError(f"module 'minitrl' has no attribute {name!r}; it exposes {', '.join(__all__)}")
    module = importlib.import_module(f"minitrl.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module
