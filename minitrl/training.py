"""What the scripts share about training itself: an optimizer with float32 master weights, the schedules, and `fit`, the
loop of those that train on a data set as it stands: sft.py, reward.py, dpo.py. (GRPO and PPO make their own data, and
have their own loop.)

A script accumulates gradients of losses that it has already divided by the global count, so gradients are summed, over
micro-batches and over processes, and nothing here divides them again:

    optimizer = Optimizer(model, world, max_grad_norm=1.0)
    for micro_batch in step: loss(micro_batch).backward()
    grad_norm = optimizer.step(lr * schedule("linear", step, warmup_steps, total_steps))

runs.py holds what happens around that: the output folder, the console, Ctrl-C.
"""

import math
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import checkpoint, data, lora, runs
from .distributed import World, any_true, sum_
from .layout import held, place_of, same_everywhere
from .parallel import local
from .state import read


CACHED = 2**20  # numbers that a processor's cache holds


class NotFinite(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the weights are those of the step before."""


class Optimizer:
    """AdamW on float32 master weights, for a model that may compute in bfloat16.

    A bfloat16 weight cannot take a small update: from 1.0 the next value up is 1.0078. So each such parameter has a
    float32 master, which AdamW updates and which is then rounded into the parameter. The parameters of a float32 or
    float64 model are their own masters. Gradients, too, add up in float32: a hook moves each parameter's bfloat16
    gradient over as soon as backward has made it, so that the bfloat16 gradients never stand in memory together.

    Of a model that is divided (parallel.divide, Model's `tensor`) each process has the masters of its own part:
    FSDP2's parameters are float32 then. FSDP2 has summed their gradients over world.data before `step`.

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
        self._counted = [m.adapters for m in model.modules() if getattr(m, "adapters", None)]  # dropout goes by updates
        self._divided = world.shard.size > 1  # by FSDP2
        self._gathering = [m for m in model.modules() if hasattr(m, "reshard")]
        models = [(f"{path}.".lstrip("."), m) for path, m in model.named_modules() if hasattr(m, "shares")]
        self._shares = {path + name for path, m in models for name in m.shares() if world.tensor.size > 1}
        for name, p in self.parameters.items():
            if self._divided:
                self.masters[name] = local(p.detach())
            elif p.dtype in (torch.float32, torch.float64):
                self.masters[name] = p
            else:
                self.masters[name] = p.detach().float()
                hooks.append(p.register_post_accumulate_grad_hook(partial(_move_gradient, self._grads, name)))
        shapes = {name: master.shape for name, master in self.masters.items()}
        self.held = held(model, place_of(world), shapes)  # what of a checkpoint's tensors the masters are
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
        if not self._divided:
            sum_(grads, self.world.data)
        sum_([grad for name, grad in zip(self.masters, grads) if name in self._shares], self.world.tensor)
        norm = self._norm(grads)
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
        for adapters in self._counted:
            adapters.updates += 1
        self.whole = True
        return norm.item()

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of the whole model's gradient."""
        world = self.world
        if world.shard.size == world.tensor.size == 1:
            return nn.utils.get_total_norm(grads)
        once = [world.tensor.rank == 0 or not same_everywhere(name) for name in self.masters]
        squares = [grad.double().square().sum() for grad, counts in zip(grads, once) if counts]
        square = torch.stack(squares).sum()
        sum_([square], world.shard)
        sum_([square], world.tensor)
        return square.sqrt()

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
        """Put back what state_tensors gave: the next step is the one that would have come. Raises ValueError.

        A tensor may still be unread (state.Unread).
        """
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
        for adapters in self._counted:
            adapters.updates = step
        self.adam.state.clear()
        for name, master in self.masters.items():
            with torch.no_grad():
                master.copy_(read(tensors[f"master.{name}"]))
            if step:
                self.adam.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    "exp_avg": torch.empty_like(master).copy_(read(tensors[f"exp_avg.{name}"])),
                    "exp_avg_sq": torch.empty_like(master).copy_(read(tensors[f"exp_avg_sq.{name}"])),
                }
        self._round_masters()

    def _take_gradients(self) -> list[Tensor]:
        """The step's gradients in the masters' dtypes and order, handed over: nothing keeps them behind."""
        grads = []
        for name, p in self.parameters.items():
            if self._divided:
                grad = None if p.grad is None else local(p.grad)
            else:
                grad = self._grads.pop(name, None) if self.masters[name] is not p else p.grad
            p.grad = None
            grads.append(torch.zeros_like(self.masters[name]) if grad is None else grad)
        return grads

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Write the masters into the parameters that are not their own, and have FSDP2 gather the others anew."""
        for module in self._gathering:
            module.reshard()
        for name, p in self.parameters.items():
            if self.masters[name] is not p and not self._divided:
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


def load_model(config, world: World, source: str | None = None, scalar_head: bool = False):
    """(model, tokenizer) of the folder `source`, by default --model, as the options and the mesh want it."""
    options = {"scalar_head": scalar_head, "seed": config.seed, "world": world, "cpu_offload": config.cpu_offload}
    return checkpoint.load(source or config.model, getattr(torch, config.dtype), world.device, **options)


def fingerprint(model: nn.Module, config, world: World) -> str:
    """`checkpoint.fingerprint`, the same on every mesh."""
    return checkpoint.fingerprint(model, world, getattr(torch, config.dtype))


def total(sums: dict[str, float], world: World) -> dict[str, float]:
    """Each number added up over all processes, which pass the same names in the same order."""
    totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=world.device)
    sum_([totals], world)
    return dict(zip(sums, totals.tolist()))


def fit(
    run,
    model: nn.Module,
    tokenizer,
    optimizer: Optimizer,
    rows: int,
    rows_per_step: int,
    *,
    inputs: dict[str, str],
    backward: Callable[[list[int], int], dict],
    evaluate: Callable[[int], dict],
    describe: Callable[[int], object],
    plotted: tuple[str, ...] = ("loss", "eval/loss"),
    state: dict[str, float] | None = None,
) -> int:
    """Train on `rows_per_step` of `rows` rows at a time, as run.config says; returns the exit status, as main() does.

    inputs: a digest of each thing that is trained on or with, by its option's name; see Run.load.
    backward(indices, step): leave this process's share of the gradient of the step's loss in the model, where `indices`
        are the step's rows on all processes, and `step` steps are done. Returns the metrics of the whole step, the
        same on every process: "loss", "tokens" (all that went through the model), and whatever else is to be logged;
        under "offending", which is not logged, those of the rows on this process whose loss is NaN or infinite.
    evaluate(step): the metrics on held-out rows, named "eval/...", or {} where there are none; before the first step,
        after the last, and every --eval_steps.
    describe(index): a row's token ids, as JSON has them, for the file that NaN or infinity leaves behind.
    state: numbers beside the weights that outlive a step; what `backward` returns under "state" replaces them once the
        weights are updated, and a resumed run finds those of its checkpoint.

    Order and schedule are functions of the step alone, so weights, optimizer, step and `state` are all that a
    checkpoint holds. An epoch's first row follows the last of the one before at once: all steps are of one size.
    """
    config, world = run.config, run.world
    steps = total_steps(config, rows, rows_per_step)
    state = {} if state is None else state
    step, tensors, saved = run.load(steps, inputs, optimizer.held) or (0, {}, {"state": state})
    state.update(saved["state"])
    if step:
        optimizer.load_state_tensors(tensors["optimizer"])
    run.begin(fingerprint(model, config, world))

    def checkpoint_now() -> None:
        run.save(step, {"optimizer": optimizer.state_tensors()}, {"state": state}, optimizer.held)

    def described(indices: list[int]) -> dict:
        return {"rows": [{"row": i, "ids": describe(i)} for i in indices]}

    with runs.Interrupt() as interrupt, run.rescued(lambda: step if optimizer.whole else None, checkpoint_now):
        if step == 0 and (before := evaluate(step)):
            run.log_step(step, before)
        while step < steps and not any_true(interrupt.wanted, world):
            with run.timed("train"):
                indices = data.order(rows, step * rows_per_step, rows_per_step, config.seed)
                metrics = backward(indices, step)
                offending = metrics.pop("offending", [])
                if not math.isfinite(metrics["loss"]):  # a sum over all processes: all stop
                    stop_before_update(run, step, f"the loss is {metrics['loss']}", described(offending))
                metrics |= update(optimizer, run, step, lambda: described(indices if world.rank == 0 else []))
            step += 1
            state.update(metrics.pop("state", {}))
            metrics["epoch"] = step * rows_per_step / rows
            run.num_tokens += metrics["tokens"]
            try:
                if step == steps or (config.eval_steps and step % config.eval_steps == 0):
                    with run.timed("evaluation"):
                        metrics |= evaluate(step)
            finally:  # an evaluation that fails costs no step: its row is written, and rescued() saves it
                run.log_step(step, metrics, (), metrics["tokens"])
            if step % config.save_steps == 0:
                checkpoint_now()
        checkpoint_now()
    return interrupt.exit_code if step < steps else finish(run, {"final": model}, tokenizer, plotted)


def finish(run, models: dict, tokenizer, plotted: tuple[str, ...] = ("reward", "eval/accuracy")) -> int:
    """Write each model's folder, "final" among them, and the plot; returns the exit status, 0."""
    output_dir = run.config.output_dir
    dtype = getattr(torch, run.config.dtype) if run.config.model else None  # FSDP2's parameters are float32
    if run.keepers:
        where = {name: f"{output_dir}/{name}" for name in models}
        kinds = {name: lora.save(model, tokenizer, where[name], dtype, run.keepers) for name, model in models.items()}
    if run.world.rank == 0:
        if run.config.plot:
            runs.draw(output_dir, run.config.plot, plotted)
        print(f"done: {output_dir}/final is a {kinds['final']} folder", flush=True)
    return 0


def update(optimizer: Optimizer, run, step: int, ids: Callable[[], dict[str, list]]) -> dict[str, float]:
    """The optimizer's step at the schedule's learning rate; returns that, and the gradient's norm before clipping.

    ids(): by name, what the gradient is made of on this process, for the file that NaN or infinity leaves behind.
    """
    config = run.config
    rate = config.learning_rate * schedule(config.lr_scheduler_type, step, config.warmup_steps, run.total_steps)
    run.saved()  # the step changes what is being saved
    try:
        return {"grad_norm": optimizer.step(rate), "learning_rate": rate}
    except NotFinite as error:
        stop_before_update(run, step, str(error), ids())


def stop_before_update(run, step: int, what: str, ids: dict[str, list]):
    """NaN or infinity: save the ids that it came with and stop all; the weights are still those of the step before."""
    name = f"not_finite_step_{step + 1}_rank_"
    if any(ids.values()):  # other processes may have them
        run.dump(f"{name}{run.world.rank}.json", {"step": step + 1, "error": what} | ids)
    files = f"{run.config.output_dir}/{name}*.json"
    remedy = "lower --learning_rate or --max_grad_norm"
    raise NotFinite(f"step {step + 1}: {what}; nothing was updated, the token ids are in {files}; {remedy}")
