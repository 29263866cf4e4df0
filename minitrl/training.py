"""What the scripts share about training itself: an optimizer with float32 master weights, and the schedules.

A script accumulates gradients of losses that it has already divided by the global count, so gradients are summed, over
micro-batches and over processes, and nothing here divides them again:

    optimizer = Optimizer(model, world, max_grad_norm=1.0)
    for micro_batch in step: loss(micro_batch).backward()
    grad_norm = optimizer.step(lr * schedule("linear", step, warmup_steps, total_steps))

runs.py holds what happens around that: the output folder, the console, Ctrl-C.
"""

import math
import weakref
from functools import partial

import torch
from torch import Tensor, nn

from minitrl.distributed import World, sum_


CACHED = 2**20  # numbers that a processor's cache holds


class NotFinite(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the weights are those of the step before."""


class Optimizer:
    """AdamW on float32 master weights, for a model that may compute in bfloat16.

    A bfloat16 weight cannot take a small update: from 1.0 the next value up is 1.0078. So each such parameter has a
    float32 master, which AdamW updates and which is then rounded into the parameter. The parameters of a float32 or
    float64 model are their own masters. Gradients, too, add up in float32: a hook moves each parameter's bfloat16
    gradient over as soon as backward has made it, so that the bfloat16 gradients never stand in memory together.

    Norms' weights and biases (one dimension) get no weight decay. `max_grad_norm=0` does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
    ):
        self.world, self.max_grad_norm = world, max_grad_norm
        self.whole = True  # whether all weights are of one and the same step: not if an error came amid an update
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters, self._grads, hooks = {}, {}, []
        for name, p in self.parameters.items():
            if p.dtype in (torch.float32, torch.float64):
                self.masters[name] = p
            else:
                self.masters[name] = p.detach().float()
                hooks.append(p.register_post_accumulate_grad_hook(partial(_move_gradient, self._grads, name)))
        # The hooks know the dict of gradients, not this object; when it goes, they go, and another may be made.
        weakref.finalize(self, _remove, hooks)
        masters = self.masters.values()
        groups = [
            {"params": [m for m in masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        fused = world.device.type in ("cpu", "cuda")
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=fused)

    def step(self, lr: float) -> float:
        """Sum the gradients over processes, clip them, update, and forget them. Returns their norm before clipping.

        Every parameter takes part, with a gradient of zero where no backward reached it: AdamW's averages decay, as
        they would had the zero been computed. Raises NotFinite, before any weight has changed, for a NaN or infinite
        norm; all processes see the same sum, so all raise.
        """
        grads = self._take_gradients()
        sum_(grads, self.world)
        norm = nn.utils.get_total_norm(grads)
        if not math.isfinite(norm.item()):
            raise NotFinite(f"the gradient's norm is {norm.item()}")
        scale = self.max_grad_norm / (norm + 1e-6)  # torch.nn.utils.clip_grad_norm_'s own epsilon
        if self.max_grad_norm > 0 and scale < 1:
            torch._foreach_mul_(grads, scale)
        for group in self.adam.param_groups:
            group["lr"] = lr
        for master, grad in zip(self.masters.values(), grads):
            master.grad = grad
        self.whole = False
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._round_masters()
        self.whole = True
        return norm.item()

    def zero_grad(self) -> None:
        """Forget the gradients of the step."""
        self._grads.clear()
        for p in self.parameters.values():
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All that an exact resume needs, by flat names: master.X, exp_avg.X, exp_avg_sq.X and step (int64).

        The tensors are the live ones, which the next step changes.
        """
        tensors = {"step": torch.zeros((), dtype=torch.int64)}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adam.state[master].items():  # nothing before the first step
                if key == "step":
                    tensors["step"] = value.to("cpu", torch.int64)
                else:
                    tensors[f"{key}.{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what state_tensors gave: the next step is the one that would have come. Raises ValueError."""
        step = int(tensors["step"]) if "step" in tensors else 0
        kinds = ("master", "exp_avg", "exp_avg_sq") if step else ("master",)
        expected = {f"{kind}.{name}": master.shape for name, master in self.masters.items() for kind in kinds}
        expected["step"] = torch.Size()
        found = {name: tensor.shape for name, tensor in tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"optimizer state: {name} is {_shape(found.get(name))} in the checkpoint, "
                    f"{_shape(expected.get(name))} in the model"
                )
        self.zero_grad()
        self.adam.state.clear()
        for name, master in self.masters.items():
            with torch.no_grad():
                master.copy_(tensors[f"master.{name}"])
            if step:
                self.adam.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    "exp_avg": torch.empty_like(master).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.empty_like(master).copy_(tensors[f"exp_avg_sq.{name}"]),
                }
        self._round_masters()

    def _take_gradients(self) -> list[Tensor]:
        """The step's gradients in the masters' dtypes and order, handed over: nothing keeps them behind."""
        grads = []
        for name, p in self.parameters.items():
            grad = self._grads.pop(name, None) if self.masters[name] is not p else p.grad
            p.grad = None
            grads.append(torch.zeros_like(self.masters[name]) if grad is None else grad)
        return grads

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Write the masters into the parameters that are not their own."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])


def _move_gradient(grads: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Add a parameter's fresh bfloat16 gradient to its float32 sum."""
    if name in grads:
        flat = grads[name].view(-1), parameter.grad.reshape(-1)
        for total, part in zip(*(x.split(CACHED) for x in flat)) if parameter.device.type == "cpu" else [flat]:
            total.add_(part)  # which makes, on a CPU, a float32 copy of all that it is given
    else:
        grads[name] = parameter.grad.float()
    parameter.grad = None


def _remove(hooks: list) -> None:
    for hook in hooks:
        hook.remove()


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def schedule(name: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """The factor on the learning rate for the update after `step` updates, as transformers' schedulers give it.

    The warm-up rises linearly from 0, so with one the first update moves nothing. `linear` falls to 0 at `total_steps`,
    `cosine` by half a wave; `constant` and `constant_with_warmup` stay at 1.
    """
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if name == "linear":
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"--lr_scheduler_type {name}: linear, cosine, constant or constant_with_warmup")


def total_steps(config, rows: int, rows_per_generation: int, steps_per_generation: int = 1) -> int:
    """Optimizer steps of a run: --max_steps, or what --num_train_epochs passes over `rows` rows take."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * rows / rows_per_generation)) * steps_per_generation


def optimizer_of(model: nn.Module, config, world: World) -> Optimizer:
    """The optimizer that the options ask for."""
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    options = {"weight_decay": config.weight_decay, "betas": betas, "eps": eps, "max_grad_norm": config.max_grad_norm}
    return Optimizer(model, world, **options)
