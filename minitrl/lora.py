"""Low-rank adapters (LoRA, arXiv 2106.09685): the base model stands still, small matrices beside it are trained.

    y = x W^T + (alpha / r) dropout(x) A^T B^T        x: (N, I)   W: (O, I)   A: (r, I)   B: (O, r), zero at first

Our model keeps q, k, v as one matrix and gate, up as one; checkpoints, and PEFT's files, have an A and a B for each.
So do we: of a fused matrix the A's are stacked, (3 r, I), and the B's stand on a block diagonal, (O, 3 r), each in its
own projection's rows. The sum is added to x W^T as its residual. Gradients, optimizer state and checkpoints are the
adapters' alone (and a scalar head's, which is new). Rollouts run unmerged: W is never written to.

The reference policy is the same model with its adapters off, or as they were in --adapter:

    reference = lora.reference_of(policy)
    with lora.as_reference(reference): known["reference"] = score(reference, ...)

final/ is a folder that peft loads, and ours loads peft's. To make one Hugging Face folder of a base and an adapter:

    python -m minitrl.lora merge --adapter FOLDER --model FOLDER --output_dir OUT
"""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, disk, runs
from .checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from .config import parse
from .distributed import ALONE, World, print0
from .layout import hf_tensors
from .model import Linear, Model
from .parallel import own_parameters
from .tokenizer import Tokenizer, read_json, write_json

MERSENNE = 2**31 - 1  # a product of two numbers below it fits into int64
# Of adapter_config.json: what is read or changes no result; anything else has to be off, or as it is here.
READ = set("""r lora_alpha lora_dropout target_modules modules_to_save base_model_name_or_path task_type peft_version
    revision inference_mode auto_mapping megatron_core qalora_group_size""".split())
PLAIN = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}  # other initial weights may change the base


@dataclass
class Adapters:
    """What a model's adapters have in common, at `model.adapters`."""

    settings: dict  # adapter_config.json's
    dropout: float
    seed: int = 0
    updates: int = 0  # of the optimizer, which counts them here
    all: list["Adapter"] = field(default_factory=list)
    reference: bool = False  # whether the model is the reference policy now
    keys_T: Tensor | None = None  # int32, odd: of the tokens that are trained on

    def prepare(self, pack) -> None:
        """Take the tokens' keys for dropout: each a hash of the token, what stands before it, the seed and the update.

        So a token loses the same inputs however a step is divided, and when it is computed again.
        """
        if self.dropout and torch.is_grad_enabled():
            stamp = ((self.seed + 1) * 950706376 + self.updates * 742938285) % MERSENNE
            places_T = (pack.positions_T * 69621 + stamp) % MERSENNE
            sums = F.pad(((pack.tokens_T * 48271 + 1) % MERSENNE * places_T % MERSENNE).cumsum(0), (1, 0))
            begins_B, ends_B = sums[pack.cu_seqlens[:-1].long()], sums[pack.cu_seqlens[1:].long()]
            prompts_B = torch.where(pack.prefixes_B >= 0, (ends_B - begins_B)[pack.prefixes_B.long()], 0)
            hashes_T = (sums[1:] + (prompts_B - begins_B)[pack.segments_T]) % MERSENNE * 39373 % MERSENNE
            self.keys_T = (2 * hashes_T + 1).to(torch.int32)


class Adapter(nn.Module):
    """The adapters of one Linear, an A and a B for each of the checkpoint's projections in it that is a target.

    modules: {projection: (its name in a checkpoint, its rows)}, all of the Linear's, in order.
    """

    def __init__(self, shared: Adapters, modules: dict[str, tuple[str, int]], weight: Tensor, generator):
        super().__init__()
        rank, inputs, self.shared, self.projections = shared.settings["r"], weight.shape[1], shared, modules
        self.scale = shared.settings["lora_alpha"] / rank
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, (_, rows) in modules.items():
            if name in shared.settings["target_modules"]:  # A as in peft: kaiming_uniform_(a=sqrt(5))
                a = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
                self.A[name], self.B[name] = nn.Parameter(a.to(weight)), nn.Parameter(weight.new_zeros(rows, rank))
        self.columns = torch.randint(-(2**31), 2**31, (inputs,), generator=generator).to(weight.device, torch.int32)
        self.start = None  # (A, B) as they were in --adapter, stacked: the reference policy's

    def stacked(self) -> tuple[Tensor, Tensor]:
        """(R, I) and (O, R), R the sum of ranks; rows of projections that are no target are 0."""
        like = next(self.parameters())
        blocks = [self.B[n] if n in self.B else like.new_zeros(rows, 0) for n, (_, rows) in self.projections.items()]
        return torch.cat(list(self.A.values())), torch.block_diag(*blocks)

    def forward(self, x: Tensor) -> Tensor | None:
        """(N, O) to add to x W^T; None where that is nothing."""
        shared, scale = self.shared, self.scale
        weights = self.start if shared.reference else self.stacked()
        if weights is None:
            return None
        if shared.dropout and torch.is_grad_enabled():
            assert shared.keys_T is not None and len(shared.keys_T) == len(x), "dropout is for packs: by Model.forward"
            # A key times a number per column, modulo 2^32, is uniform: an input is left out where it is small.
            dropped = shared.keys_T[:, None] * self.columns < int(-(2**31) + 2**32 * shared.dropout)
            x, scale = x.masked_fill(dropped, 0), scale / (1 - shared.dropout)
        return F.linear(F.linear(x, weights[0]) * scale, weights[1])


def attach(model: Model, settings: dict, dropout: float = 0.0, seed: int = 0, where="--lora_target_modules") -> None:
    """Freeze the model, but for a scalar head, and put fresh adapters beside it, the same ones for a seed.

    settings: r, lora_alpha and target_modules of an adapter_config.json.  where: target_modules' name in an error.
    """
    assert model.adapters is None, "the model has adapters"
    places = {}  # our Linear -> {projection: (name in a checkpoint, rows)}
    for theirs, (ours, rows, shape) in hf_tensors(model.config).items():
        if rows is not None and theirs.endswith(".weight"):
            theirs = theirs.removesuffix(".weight")
            places.setdefault(ours.removesuffix(".weight"), {})[theirs.rpartition(".")[2]] = (theirs, shape[0])
    known = list(dict.fromkeys(name for modules in places.values() for name in modules))
    targets = list(dict.fromkeys(name.rpartition(".")[2] for name in settings["target_modules"]))
    targets = known if targets == ["all-linear"] else targets
    for name in set(targets) - set(known):
        hint = "".join(f"; did you mean {near}?" for near in get_close_matches(name, known, n=1))
        raise ValueError(f"{where} {name}: is none of {', '.join(known)}, nor all-linear alone{hint}")
    model.requires_grad_(False)
    if model.score is not None:
        model.score.requires_grad_(True)
    model.adapters = Adapters(settings | {"target_modules": targets}, dropout, seed)
    generator = torch.Generator().manual_seed(seed)
    for ours, modules in places.items():
        if modules.keys() & targets:
            linear = model.get_submodule(ours)
            linear.adapter = Adapter(model.adapters, modules, linear.weight.detach(), generator)
            model.adapters.all.append(linear.adapter)


def tensors(model: Model) -> dict[str, nn.Parameter]:
    """What is trained, by its name in PEFT's file."""
    found = {"base_model.model.score.weight": model.score.weight} if model.score is not None else {}
    for adapter in model.adapters.all:
        for name in adapter.A:
            module = f"base_model.model.{adapter.projections[name][0]}"
            found |= {f"{module}.lora_A.weight": adapter.A[name], f"{module}.lora_B.weight": adapter.B[name]}
    return found


def adapt(model: Model, config, world: World) -> None:
    """Give the model the adapters that the options ask for, if any: what every script calls once it has loaded one."""
    if not config.use_peft:
        return
    if config.adapter:
        load(model, config.adapter, config.lora_dropout, config.seed)
    else:
        wanted = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "target_modules": config.lora_target_modules}
        attach(model, wanted, config.lora_dropout, config.seed)
    settings = model.adapters.settings
    settings["base_model_name_or_path"] = os.path.abspath(config.model) if Path(config.model).is_dir() else config.model
    trained, whole = (sum(p.numel() for p in some) for some in (tensors(model).values(), model.parameters()))
    print0(world, f"adapters: rank {settings['r']}, alpha {settings['lora_alpha']}, on "
           f"{', '.join(settings['target_modules'])}: {trained:,} of {whole:,} parameters are trained")


def reference_of(model: Model) -> Model:
    """The reference policy, for use within `as_reference`: the model itself if it has adapters, else a frozen copy."""
    return model if model.adapters else copy.deepcopy(model).requires_grad_(False)


@contextmanager
def as_reference(model: Model):
    """Inside, a model with adapters computes what it did before training."""
    shared = model.adapters or Adapters({}, 0.0)
    shared.reference = True
    try:
        yield
    finally:
        shared.reference = False


@torch.no_grad()
def merged(model: Model) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of each parameter of the base, with its adapter added if it has one; the model is left as it is.

    Of a model that is divided, this process's part.
    """
    for name, p in own_parameters(model).items():
        adapter = getattr(model.get_submodule(name.rpartition(".")[0]), "adapter", None)
        if adapter is not None and name.endswith(".weight"):
            wide = torch.promote_types(p.dtype, torch.float32)
            a, b = (part.to(wide) for part in adapter.stacked())
            yield name, (p.to(wide) + adapter.scale * (b @ a)).to(p.dtype)
        elif ".adapter." not in name:
            yield name, p


@torch.no_grad()
def merge_(model: Model) -> None:
    """Add the adapters to the base, and take them away."""
    parameters = dict(model.named_parameters())
    for name, value in merged(model):
        parameters[name].copy_(value)
    for linear in (module for module in model.modules() if isinstance(module, Linear)):
        linear.adapter = None
    model.adapters = None


def save(model: Model, tokenizer: Tokenizer, folder, dtype: torch.dtype | None = None, world: World = ALONE) -> str:
    """Write a Hugging Face folder, or, of a model with adapters, a PEFT one of what was trained; returns which.

    dtype, world: see checkpoint.save. Adapters are the same on all, and keep their dtype.
    """
    if model.adapters is None:
        checkpoint.save(model, tokenizer, folder, dtype, world=world)
        return "Hugging Face"
    head = model.score is not None
    plain = {"peft_type": "LORA", "bias": "none", "lora_dropout": model.adapters.dropout, "inference_mode": True,
             "modules_to_save": ["classifier", "score"] if head else None,
             "task_type": "SEQ_CLS" if head else "CAUSAL_LM"}  # fmt: skip
    checkpoint.refuse_strangers(folder)
    base = digest(model)
    with disk.published(Path(os.path.realpath(folder)), world) as temporary:
        if world.rank:
            return "PEFT"
        write_json(temporary / ADAPTER_CONFIG, model.adapters.settings | plain)
        tokenizer.save(temporary)
        disk.write_whole(temporary / ADAPTER_FILE, tensors(model), {"format": "pt", "base": base})
    return "PEFT"


def digest(model: Model) -> str:
    """Of the base: sums over the bits of its bfloat16 rounding, so that it does not depend on --dtype."""
    base = [p.detach().bfloat16() for n, p in model.named_parameters() if ".adapter." not in n and n != "score.weight"]
    return " ".join(str(int(p.view(torch.int16).sum(dtype=torch.int64))) for p in base)


@torch.no_grad()
def load(model: Model, folder, dropout: float = 0.0, seed: int = 0) -> None:
    """Attach the adapters of a PEFT folder. ValueError names the file, and what is not supported or does not fit."""
    path, file = Path(folder) / ADAPTER_CONFIG, Path(folder) / ADAPTER_FILE
    settings = read_json(path)
    for name, value in settings.items():
        if value and name not in READ and value != PLAIN.get(name):
            raise ValueError(f"{path}: {name} {value!r} is not supported; merge that adapter into its base with peft")
    wanted = {name: settings.get(name) for name in ("r", "lora_alpha", "target_modules")}
    rank, alpha, targets = wanted.values()
    numbers = type(rank) is int and rank >= 1 and type(alpha) in (int, float) and alpha > 0
    if not (numbers and isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)):
        raise ValueError(f"{path}: {wanted} must be a rank, a number above 0 and a list of names")
    attach(model, wanted, dropout, seed, where=f"{path}: target_modules")
    with disk.opened(file) as found:
        expected, there = tensors(model), {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}
        for name in sorted(expected.keys() | there.keys()):
            shape = tuple(expected[name].shape) if name in expected else "absent"
            if shape != there.get(name, "absent"):
                raise ValueError(f"{file}: {name} is {there.get(name, 'absent')}, with this base it must be {shape}")
        if (found.metadata() or {}).get("base", base := digest(model)) != base:
            raise ValueError(f"{file}: this adapter was trained on a base with other weights than --model has")
        for name, parameter in expected.items():
            parameter.copy_(found.get_tensor(name))
    for adapter in model.adapters.all:
        adapter.start = adapter.stacked()  # copies


def open_model(
    folder: str, base: str | None = None, dtype=torch.float32, device="cpu", scalar_head: bool = True
) -> tuple[Model, Tokenizer]:
    """`checkpoint.load`, or, of a folder with an adapter alone, the base (by default the one it names) with it on.

    Without scalar_head, no reward or value model's: ValueError.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return checkpoint.load(folder, dtype, device)
    settings = read_json(path)
    base = base or settings.get("base_model_name_or_path") or "none"
    scalar = settings.get("task_type") == "SEQ_CLS"
    if scalar and not scalar_head:
        raise ValueError(f"{folder}: a reward or value model's adapter; a language model's is needed here")
    model, tokenizer = checkpoint.load(base, dtype, device, scalar_head=scalar)
    load(model, folder)
    return model, tokenizer


@dataclass
class MergeOptions:
    """Write one Hugging Face folder of a base and an adapter."""

    adapter: str  # folder of the adapter
    output_dir: str  # the folder to write
    model: str | None = None  # its base; none: the one that the adapter names
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of what is written; the sum is made in float32


def main(argv: list[str] | None = None) -> int:
    """`merge`: all that can be asked for."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["merge"]:
        raise ValueError("python -m minitrl.lora merge --adapter FOLDER --output_dir OUT [--model FOLDER]")
    options = parse(MergeOptions, argv[1:])
    model, tokenizer = open_model(options.adapter, options.model)
    if model.adapters is None:
        raise ValueError(f"--adapter {options.adapter}: no {ADAPTER_CONFIG} is there")
    merge_(model)
    checkpoint.save(model, tokenizer, options.output_dir, getattr(torch, options.dtype))
    print(f"done: {options.output_dir} is a Hugging Face folder")
    return 0


if __name__ == "__main__":
    runs.command(main)
