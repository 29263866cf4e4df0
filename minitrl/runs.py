"""A run around its training: the output folder and its files, Ctrl-C, seconds and memory.

    output_dir/config.json         every option, resolved; --config takes it back
    output_dir/metrics.jsonl       one object a step, full precision
    output_dir/completions.jsonl   one object a completion
    output_dir/checkpoints, final  checkpoint.py's

A script appends a step's rows before it saves that step's checkpoint. Killed in between, the run resumes from the
checkpoint before, and the rows that came after that one are cut off and written again.
"""

import dataclasses
import fcntl
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

from . import checkpoint
from .console import Progress, table
from .distributed import among_others, barrier, gather_json, keepers, meet, print0, stop
from .state import Pieces, load_state, save_state

# What --resume may change: these have no part in which weights a step gives, or in their rounding alone. (max_steps
# bends a linear or cosine schedule from there on, and is meant to: one asks for more.)
MAY_CHANGE = (
    "output_dir resume device timeout max_steps num_train_epochs logging_steps log_completions "
    "num_completions_to_print report_to plot eval_steps save_steps save_total_limit rollout_server "
    "rollout_timeout reference_cache replicate shard tensor cpu_offload rollout_tensor"
).split()

# What the processes of one run may call by different names: there, it is the contents that have to be the same.
PLACES = ("model", "adapter", "value_model", "dataset", "eval_dataset", "output_dir", "plot")

# What an evaluation shows on the console, of what it writes as eval/...
HELD_OUT = ("accuracy", "reward", "loss", "mean_token_accuracy", "rewards/accuracies")


class RunFolder:
    """One run's output folder, held by a lock so that no second run writes into it; a context manager.

    Raises ValueError when the folder holds another run (and `resume` is off), none (and it is on), or is in use, and
    OSError, with the file and the remedy, when it cannot be written. Only rank 0 makes one.
    """

    def __init__(self, output_dir: str, resume: bool):
        self.path = Path(output_dir)
        self._files, self._board = {}, None
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # never removed: the lock is on the open file, not on its name
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise ValueError(f"--output_dir {output_dir}: another run is writing there; choose another") from None
        try:
            self._check(resume)
        except ValueError:
            self.close()
            raise

    def _check(self, resume: bool) -> None:
        metrics = self.path / "metrics.jsonl"
        began = (metrics.exists() and metrics.stat().st_size > 0) or any(
            (self.path / name).exists() for name in ("checkpoints", "final")
        )
        if began and not resume:
            raise ValueError(
                f"--output_dir {self.path}: holds a run already; continue it with --resume, choose another folder, or "
                "remove this one"
            )
        # torchrun starts all again with the same options: where it may, --resume holds from the first start on
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        if resume and not restarts and not (self.path / "config.json").exists():
            raise ValueError(f"--resume: {self.path} holds no run (no config.json); leave --resume out to start one")

    def saved_config(self) -> dict:
        """The options that the run in this folder was started or last resumed with."""
        path = self.path / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def begin(self, config: dict, step: int | None, report_to: str = "none") -> None:
        """Write config.json and open the row files, cut to the rows of at most `step`; to none where it is None."""
        with _writing(self.path / "config.json"):
            _publish(self.path / "config.json", [json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"])
        for name in ("metrics", "completions"):
            path = self.path / f"{name}.jsonl"
            with _writing(path):
                if path.exists():
                    _publish(path, [] if step is None else _rows_until(path, step))
                self._files[name] = open(path, "a", encoding="utf-8", errors="backslashreplace")
        if report_to == "tensorboard":
            self._board = _tensorboard(self.path, 0 if step is None else step + 1)

    def append_metrics(self, row: dict) -> None:
        """One step's metrics; `row["step"]` counts finished optimizer steps. NaN and infinity become null."""
        self._append("metrics", [row])
        if self._board:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    def append_completions(self, rows: list[dict]) -> None:
        """Completions, each with its `step`."""
        self._append("completions", rows)

    def _append(self, name: str, rows: list[dict]) -> None:
        assert all(isinstance(row["step"], int) for row in rows)
        # JSON has no NaN. A lone surrogate, which UTF-8 has not, is written as the escape that JSON has for it.
        text = "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with _writing(self.path / f"{name}.jsonl"):
            self._files[name].write(text)
            self._files[name].flush()

    def close(self) -> None:
        """Close the files and let the lock go."""
        for file in self._files.values():
            with suppress(OSError):  # each row was flushed: what fails here has failed there, and was told
                file.close()
        if self._board:
            self._board.close()
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_resume(old: dict, new: dict, may_change=MAY_CHANGE) -> None:
    """Raise ValueError naming each option that differs between the run and its continuation, and must not."""
    old, new = (json.loads(json.dumps(config)) for config in (old, new))  # tuples as the file has them
    absent = object()
    changed = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, absent), new.get(name, absent)
        if before != after and name not in may_change:
            before, after = ("absent" if value is absent else json.dumps(value) for value in (before, after))
            changed.append(f"{name} was {before}, is {after}")
    if changed:
        raise ValueError(
            f"--resume: changed since the run began: {'; '.join(changed)}. Give the old values, or start a new run in "
            "another --output_dir"
        )


def draw(output_dir: str, image: str, names: tuple[str, ...]) -> None:
    """Draw metrics of a run over its steps into a .png or .svg file."""
    from matplotlib.figure import Figure  # behind the extra [plot]; pyplot would look for a display

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    rows = [json.loads(line) for line in _whole_lines(Path(output_dir) / "metrics.jsonl")]
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 20 else None)
    axes.set_xlabel("step")
    axes.legend()
    with _writing(Path(image)):
        figure.savefig(image)


def _whole_lines(path: Path) -> Iterator[bytes]:
    """A row file's lines, one at a time; not the last one where a kill has torn it, maybe amid a character's bytes."""
    with open(path, "rb") as file:  # bytes end at \n alone: text would end at U+2028 too, which JSON strings may hold
        yield from (line for line in file if line.endswith(b"\n"))


def _rows_until(path: Path, step: int) -> Iterator[bytes]:
    """The lines of the rows of at most `step`; each must be a row."""
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            row_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: not a row of this run; mend or remove the file") from None
        if row_step <= step:
            yield line


def _publish(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file in one go: there is the old one or the new one, never half of either."""
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _check_writable(path: Path) -> None:
    """OSError where the file cannot be written. Leaves nothing behind."""
    with _writing(path):
        there = path.exists()
        open(path, "ab").close()
        if not there:
            path.unlink()


@contextmanager
def _writing(path: Path):
    """Turn the system's error into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror}; mend that, or choose another place (--output_dir); a run that has "
            "a checkpoint continues with --resume",
        ) from error


def _finite(value):
    """The value as JSON can have it: numbers that are not finite become None, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(path: Path, purge_step: int):
    """A TensorBoard writer that hides what a resumed run will write again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--report_to tensorboard: not installed; pip install tensorboard") from None
    return SummaryWriter(str(path), purge_step=purge_step)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a wish that the script grants between two steps.

        with Interrupt() as interrupt:
            for step in ...:
                ...
                if any_true(interrupt.wanted, world): save; raise SystemExit(interrupt.exit_code)

    A second Ctrl-C kills at once. torchrun passes the signal on to its processes, and kills them 30 seconds later
    (TORCH_ELASTIC_SHUTDOWN_TIMEOUT, in seconds, gives a longer step more).
    """

    def __init__(self):
        self.signal = None

    @property
    def wanted(self) -> bool:
        """Whether a signal has come to this process."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, as shells count; SIGTERM's where the signal came to another process."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.wanted and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = self.signal or number
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving; Ctrl-C to stop now\n".encode())


class Seconds:
    """Seconds per phase of a step: `with seconds("generate"): ...`, then `seconds.take()`. One within counts once."""

    def __init__(self, device: torch.device):
        self.device, self.phases = device, {}

    @contextmanager
    def __call__(self, phase: str):
        began = time.perf_counter() - sum(self.phases.values())
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # kernels run on after the call that started them
            own = time.perf_counter() - began - sum(self.phases.values())
            self.phases[phase] = self.phases.get(phase, 0.0) + own

    def take(self) -> dict[str, float]:
        """The phases since the last take, and start over."""
        phases, self.phases = self.phases, {}
        return phases


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory where there is one, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Run:
    """A script's run: its folder, console, clock and checkpoints, of which rank 0 writes and all ranks read.

    run = Run(config, world)            before anything is loaded: a folder in use, or a changed option, is said at once
    loaded = run.load(total_steps, inputs)
    run.begin(weights)
    and in each step, within run.rescued(...): with run.timed(phase), run.log_step(...), run.save(...)
    """

    def __init__(self, config, world):
        config.check_mesh(world)
        self.config, self.world = config, world
        self.folder = RunFolder(config.output_dir, config.resume) if world.rank == 0 else None
        if self.folder:  # what would fail at the very end is better said now
            checkpoint.refuse_strangers(f"{config.output_dir}/final")
            if config.plot:
                _check_writable(Path(config.plot))
            if config.resume and (self.folder.path / "config.json").exists():
                check_resume(self.folder.saved_config(), dataclasses.asdict(config))
        self.timed = Seconds(world.device)
        self.num_tokens, self.logged_step, self.saved_step = 0, 0, 0
        self._rows, self._warned, self._streaks = [], set(), Counter()
        self.keepers, self._pool, self._saving = keepers(world, config.timeout), ThreadPoolExecutor(1), None
        self._loaded = load_state(config.output_dir, world) if config.resume else None
        for note in self._loaded[3] if self._loaded else ():
            print0(world, f"--resume: {note}")
        # What a chat template takes for now: the same on all ranks and, since it may stand in prompts, after a resume.
        began = gather_json(datetime.now().isoformat(timespec="seconds"), world)[0]
        self.began = datetime.fromisoformat(self._loaded[2].get("began", began) if self._loaded else began)

    def load(self, total_steps: int, inputs: dict[str, str], held: dict) -> tuple[int, dict, dict] | None:
        """With --resume, (step, tensors, state) of the newest whole checkpoint, where there is one.

        inputs: a digest of each thing that is trained on or with, by its name in an error. They must be those of the
        checkpoint; of a reward's file a change is only said, for a reward that failed has to be mended.
        held: what of the trained parameters is to be on this process: Optimizer.held.
        """
        self.total_steps, self._inputs = total_steps, inputs
        if self._loaded is None:
            if self.config.resume:
                print0(self.world, "--resume: no checkpoint yet, starting over")
            return None
        step, tensors, state, _ = self._loaded
        if step > total_steps:
            raise ValueError(f"--resume: the checkpoint is of step {step}, but --max_steps or --num_train_epochs ask "
                             f"for {total_steps} steps in all; ask for at least {step}")
        changed = [name for name, digest in inputs.items() if state.get("inputs", {}).get(name, digest) != digest]
        for name in [name for name in changed if name.startswith("--reward")]:
            changed.remove(name)
            print0(self.world, f"--resume: {name} was changed since step {step}; it is used as it is now")
        if changed:
            raise ValueError(f"--resume: changed since the run began: what is in {', '.join(changed)}. Put the old "
                             "contents back, or start a new run in another --output_dir")
        self.num_tokens, self.logged_step, self.saved_step, self._loaded = state["num_tokens"], step, step, None
        print0(self.world, f"--resume: going on after step {step}")
        return step, {k: v.local(held) if isinstance(v, Pieces) else v for k, v in tensors.items()}, state

    def begin(self, weights: str) -> None:
        """Open the files, once all ranks are found to be one run. `weights`: a digest of the model as it is now."""
        step, options = self.saved_step or None, dataclasses.asdict(self.config)
        mine = {f"--{name}": value for name, value in options.items() if name not in PLACES}
        mine |= self._inputs | {"the newest checkpoint's step": step, "a digest of the weights": weights}
        everyone = gather_json(mine, self.world)
        differing = [
            f"{name} is {everyone[0].get(name)} on rank 0 and {other.get(name)} on rank {rank}"
            for rank, other in enumerate(everyone) for name in other if other[name] != everyone[0].get(name)
        ]  # fmt: skip
        if differing:
            raise ValueError(f"the processes are not of one run: {'; '.join(differing[:5])}. Start all with the same "
                             "options and files, and with an --output_dir that all machines share")
        if self.folder:
            self.folder.begin(options, step, self.config.report_to)
        self.progress = Progress(self.total_steps, self.config.logging_steps, self.saved_step)
        barrier(self.world, "while rank 0 opens its files")

    def log_step(self, step: int, metrics: dict, rows: list[dict] = (), tokens: int = 0) -> None:
        """One step's metrics, its completions where they are new, and the tokens of all that it was trained on."""
        seconds = self.timed.take()
        self.num_tokens += tokens if rows else 0
        self._rows = rows or self._rows
        metrics = {"step": step} | metrics | {f"time/{phase}": value for phase, value in seconds.items()}
        if step_time := sum(seconds.values()):
            metrics |= {"step_time": step_time, "tokens_per_second": tokens / step_time}
        metrics |= {"num_tokens": self.num_tokens, "memory/peak_gib": peak_memory(self.world.device) / 2**30}
        self.logged_step = step
        if not self.folder:
            return
        self.folder.append_completions([{"step": step} | row for row in rows])
        self.folder.append_metrics(metrics)
        line = self.progress.line(metrics) if step else None
        if line:
            print(line, flush=True)
            shown = self._rows[: self.config.num_completions_to_print]
            if self.config.log_completions and shown:  # none yet where --resume goes on with rollouts of the run before
                print(table(*zip(*((row["prompt"], row["completion"], row["reward"]) for row in shown))), flush=True)
        scores = [f"{name} {metrics[f'eval/{name}']:.3f}" for name in HELD_OUT if f"eval/{name}" in metrics]
        if scores:
            print(f"step {step}/{self.total_steps}  held-out {'  '.join(scores)}", flush=True)

    def save(self, step: int, tensors: dict, state: dict, held: dict) -> None:
        """Write the checkpoint of `step`, unless it is there; before the first step there is nothing to save.

        It is written beside the training: `saved` waits for it, before anything in `tensors` is changed.
        """
        if step == self.saved_step:
            return
        self.saved()
        self.saved_step = step
        if self.keepers:
            began = self.began.isoformat(timespec="seconds")
            state = state | {"num_tokens": self.num_tokens, "began": began, "inputs": self._inputs}
            tensors = {stem: dict(named) for stem, named in tensors.items()}
            keep = self.config.save_total_limit
            self._saving = self._pool.submit(
                save_state, self.config.output_dir, step, tensors, state, keep, self.keepers, held
            )

    def saved(self) -> None:
        """Wait for the checkpoint that is being written, if any; raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving:
            with self.timed("saving"):
                saving.result()

    @contextmanager
    def rescued(self, finished: Callable[[], int | None], save: Callable[[], None]):
        """An error inside costs no finished step: it is saved first, where `finished()` is the step last logged.

        Where weights are divided, that takes all who hold a part; else rank 0 saves alone, and waits for nobody, since
        the others may be gone. finished: the number of steps done, or None where the weights are not whole.
        """
        try:
            with among_others("in a step", self.world):
                yield
            self.saved()
        except Exception:
            try:
                if self.keepers and finished() == self.logged_step > self.saved_step:
                    meet(self.keepers, "to save what is done")
                    save()
                    self.saved()
                    print0(self.world, f"step {self.logged_step} is saved; --resume goes on from there")
                else:
                    self.saved()
            except Exception as error:  # the first one is what the user has to see
                print0(self.world, f"step {self.logged_step} could not be saved: {error}")
            raise

    def dump(self, name: str, value) -> None:
        """Write a JSON file for a post-mortem, on whichever rank found the trouble."""
        _publish(Path(self.config.output_dir) / name, [json.dumps(value).encode()])

    def streak(self, name: str, holds: bool) -> int:
        """How many calls in a row, this one counted, `holds` was true."""
        self._streaks[name] = self._streaks[name] + 1 if holds else 0
        return self._streaks[name]

    def warn_once(self, name: str, text: str) -> None:
        """Print a warning the first time that it has cause."""
        if name not in self._warned:
            self._warned.add(name)
            print0(self.world, f"warning: {text}")


def command(main) -> None:
    """Run a script's `main` and exit with its status. What the user can mend is one line, without a traceback."""
    try:
        sys.exit(main())
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:  # before or after the loop, in which Interrupt takes it
        sys.exit(128 + signal.SIGINT)
    finally:
        stop()  # a process that exits within a group whose connections broke is now and then aborted by gloo's threads
