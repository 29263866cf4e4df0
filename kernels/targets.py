"""Which form of an op runs, and how its Triton kernels are tiled on each kind of GPU.

MINITRL_KERNELS   what runs
not set           Triton kernels for tensors on a GPU, plain PyTorch for all others
triton            Triton kernels, or an error that says what is missing
reference         plain PyTorch everywhere

CONFIGS is the one table of tiles: the launchers read it, and so does the compile report (`python -m
benchmarks.compile_report`), which compiles for every target what the launchers would launch. No row depends on how many
rows of data there are: the same tiles and the same binary serve a batch of one and of a thousand, so that a row's bits
do not depend on its neighbours.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100, H100, B200, MI300X

# Kernel -> target -> its constexpr tile sizes, and Triton's num_warps (of 32 threads, on gfx942 of 64) and num_stages
# (how many steps of a loop are in flight). "/64" and the like behind a name: for heads of that size. "/float32": sums
# that are not rounded to TF32 use no tensor cores, and take smaller tiles, by pointers: these need fewer registers.
CONFIGS: dict[str, dict[str, dict]] = {
    "attention_fwd/64": {
        "sm_80": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=3),
        "sm_90": dict(QUERIES=128, KEYS=64, num_warps=4, num_stages=3),
        "sm_100": dict(QUERIES=128, KEYS=64, num_warps=4, num_stages=3),
        "gfx942": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=1),
    },
    "attention_dq/64": {
        "sm_80": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=2),
        "sm_90": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=2),
        "sm_100": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=2),
        "gfx942": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=1),
    },
    "attention_dkv/64": {
        "sm_80": dict(QUERIES=32, KEYS=128, num_warps=8, num_stages=2),
        "sm_90": dict(QUERIES=64, KEYS=128, num_warps=8, num_stages=2),
        "sm_100": dict(QUERIES=32, KEYS=128, num_warps=8, num_stages=2),
        "gfx942": dict(QUERIES=32, KEYS=64, num_warps=4, num_stages=1),
    },
    "attention_fwd/128": {
        "sm_80": dict(QUERIES=128, KEYS=32, num_warps=8, num_stages=3),
        "sm_90": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=3),
        "sm_100": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=3),
        "gfx942": dict(QUERIES=128, KEYS=32, num_warps=8, num_stages=1),
    },
    "attention_dq/128": {
        "sm_80": dict(QUERIES=64, KEYS=64, num_warps=8, num_stages=2),
        "sm_90": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=2),
        "sm_100": dict(QUERIES=128, KEYS=64, num_warps=8, num_stages=2),
        "gfx942": dict(QUERIES=128, KEYS=32, num_warps=8, num_stages=1),
    },
    "attention_dkv/128": {
        "sm_80": dict(QUERIES=64, KEYS=64, num_warps=8, num_stages=2),
        "sm_90": dict(QUERIES=64, KEYS=64, num_warps=8, num_stages=2),
        "sm_100": dict(QUERIES=64, KEYS=64, num_warps=8, num_stages=1),
        "gfx942": dict(QUERIES=32, KEYS=64, num_warps=4, num_stages=1),
    },
    "attention_fwd/256": {
        "sm_80": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=2),
        "sm_90": dict(QUERIES=64, KEYS=64, num_warps=8, num_stages=2),
        "sm_100": dict(QUERIES=64, KEYS=64, num_warps=8, num_stages=2),
        "gfx942": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=1),
    },
    "attention_dq/256": {
        "sm_80": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=1),
        "sm_90": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=2),
        "sm_100": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=2),
        "gfx942": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=1),
    },
    "attention_dkv/256": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=32, num_warps=8, num_stages=1)),
    "attention_fwd/64/float32": dict.fromkeys(TARGETS, dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=2)),
    "attention_dq/64/float32": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=32, num_warps=8, num_stages=2)),
    "attention_dkv/64/float32": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=32, num_warps=8, num_stages=2)),
    "attention_fwd/128/float32": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=16, num_warps=8, num_stages=2)),
    "attention_dq/128/float32": dict.fromkeys(TARGETS, dict(QUERIES=16, KEYS=32, num_warps=8, num_stages=2)),
    "attention_dkv/128/float32": {
        "sm_80": dict(QUERIES=16, KEYS=32, num_warps=8, num_stages=1),
        "sm_90": dict(QUERIES=16, KEYS=16, num_warps=4, num_stages=2),
        "sm_100": dict(QUERIES=16, KEYS=32, num_warps=8, num_stages=1),
        "gfx942": dict(QUERIES=16, KEYS=32, num_warps=8, num_stages=1),
    },
    "attention_fwd/256/float32": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=16, num_warps=8, num_stages=2)),
    "attention_dq/256/float32": dict.fromkeys(TARGETS, dict(QUERIES=16, KEYS=16, num_warps=8, num_stages=2)),
    "attention_dkv/256/float32": dict.fromkeys(TARGETS, dict(QUERIES=16, KEYS=16, num_warps=8, num_stages=1)),
    "decode_split/64": {
        "sm_80": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=2),
        "sm_90": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=3),
        "sm_100": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=3),
        "gfx942": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=1),
    },
    "decode_split/128": {
        "sm_80": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=2),
        "sm_90": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=3),
        "sm_100": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=3),
        "gfx942": dict(QUERIES=64, KEYS=64, num_warps=4, num_stages=1),
    },
    "decode_split/256": {
        "sm_80": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=2),
        "sm_90": dict(QUERIES=64, KEYS=32, num_warps=4, num_stages=3),
        "sm_100": dict(QUERIES=64, KEYS=32, num_warps=8, num_stages=3),
        "gfx942": dict(QUERIES=64, KEYS=32, num_warps=4, num_stages=1),
    },
    "decode_split/64/float32": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=32, num_warps=8, num_stages=2)),
    "decode_split/128/float32": dict.fromkeys(TARGETS, dict(QUERIES=32, KEYS=32, num_warps=8, num_stages=2)),
    "decode_split/256/float32": dict.fromkeys(TARGETS, dict(QUERIES=16, KEYS=16, num_warps=8, num_stages=2)),
    "decode_fold": dict.fromkeys(TARGETS, dict(PIECES=16, num_warps=2, num_stages=1)),
    "grpo_loss_tiles": dict.fromkeys(TARGETS, dict(TOKENS=256, num_warps=4, num_stages=1, enable_fp_fusion=False)),
    "grpo_loss_sums": dict.fromkeys(TARGETS, dict(TILES=1024, num_warps=4, num_stages=1, enable_fp_fusion=False)),
    "matmul": {
        "sm_80": dict(ROWS=128, COLUMNS=128, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=4),
        "sm_90": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=8, TMA=True, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=8, TMA=True, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=128, COLUMNS=128, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=2),
    },
    "matmul/float32": {
        "sm_80": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "sm_90": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_fwd": {
        "sm_80": dict(ROWS=256, COLUMNS=128, DEPTH=32, GROUP=16, TMA=False, num_warps=8, num_stages=4),
        "sm_90": dict(ROWS=128, COLUMNS=256, DEPTH=64, GROUP=32, TMA=True, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=128, COLUMNS=256, DEPTH=64, GROUP=32, TMA=True, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=128, COLUMNS=256, DEPTH=32, GROUP=32, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_fwd/narrow": {
        "sm_80": dict(ROWS=128, COLUMNS=128, DEPTH=32, GROUP=32, TMA=False, num_warps=4, num_stages=4),
        "sm_90": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=True, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=True, num_warps=4, num_stages=2),
        "gfx942": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_fwd/kept": {
        "sm_80": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=False, num_warps=8, num_stages=3),
        "sm_90": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=True, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=True, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=32, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_fwd/float32": {
        "sm_80": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=32, TMA=False, num_warps=8, num_stages=3),
        "sm_90": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=32, TMA=False, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=32, TMA=False, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=32, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_fold": dict.fromkeys(TARGETS, dict(ROWS=32, SPLITS=32, num_warps=4, num_stages=1)),
    "token_logprob_bwd": {
        "sm_80": dict(ROWS=128, COLUMNS=128, DEPTH=64, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "sm_90": dict(ROWS=128, COLUMNS=256, DEPTH=64, GROUP=8, TMA=True, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=128, COLUMNS=256, DEPTH=64, GROUP=8, TMA=True, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=128, COLUMNS=256, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_bwd/float32": {
        "sm_80": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "sm_90": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "sm_100": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=3),
        "gfx942": dict(ROWS=64, COLUMNS=64, DEPTH=32, GROUP=8, TMA=False, num_warps=8, num_stages=2),
    },
    "token_logprob_kept": dict.fromkeys(TARGETS, dict(BLOCK=2048, num_warps=8, num_stages=1)),
    "logits_logprob_fwd": dict.fromkeys(TARGETS, dict(BLOCK=4096, num_warps=8, num_stages=2)),
    "logits_logprob_bwd": dict.fromkeys(TARGETS, dict(BLOCK=4096, num_warps=8, num_stages=1)),
}

interpreted_as: str | None = None  # tests: the target that the CPU stands in for, while an interpreter runs the kernels


def use_triton(x: Tensor) -> bool:
    """Whether the op that got `x` runs as Triton kernels; see the table above. Never falls back in silence."""
    wanted = os.environ.get("MINITRL_KERNELS", "")
    if wanted not in ("", "triton", "reference"):
        raise ValueError(f"MINITRL_KERNELS={wanted!r}: set it to triton or reference, or leave it unset")
    on_gpu = x.device.type == "cuda"  # what PyTorch calls AMD's devices too
    if wanted == "reference" or not (wanted or on_gpu or interpreted_as):
        return False
    if find_spec("triton") is None:
        raise ValueError("Triton is not installed: pip install triton, or set MINITRL_KERNELS=reference")
    if not on_gpu and not interpreted_as:
        raise ValueError(
            f"MINITRL_KERNELS=triton, but a tensor is on {x.device}: move it to a GPU, or unset the variable"
        )
    return True


def config(name: str) -> dict:
    """The row of CONFIGS for the current device: keyword arguments of the kernel's launch."""
    return CONFIGS[name][interpreted_as or device_target(torch.cuda.current_device())]


@lru_cache
def device_target(device: int) -> str:
    """The target whose configurations a GPU runs."""
    if torch.version.hip:
        return target_of(torch.cuda.get_device_properties(device).gcnArchName)
    return target_of(torch.cuda.get_device_capability(device))


def target_of(architecture: str | tuple[int, int]) -> str:
    """A CUDA capability, (8, 9), takes the nearest target that is not above it; AMD's gfx942 is the one of its kind."""
    if isinstance(architecture, str):
        name = architecture.split(":")[0]  # "gfx942:sramecc+:xnack-"
        found = [target for target in TARGETS if target == name]
    else:
        name = "sm_{}{}".format(*architecture)
        number = 10 * architecture[0] + architecture[1]
        found = [target for target in TARGETS if target.startswith("sm_") and int(target[3:]) <= number]
    if not found:
        raise ValueError(
            f"the Triton kernels run on {', '.join(TARGETS)} and CUDA devices above sm_80, not on {name}: "
            "set MINITRL_KERNELS=reference"
        )
    return found[-1]
