"""A run that is killed, stopped, short of disk or continued elsewhere ends as the one that nothing happened to.

"Ends as" is to the bit: final weights, the optimizer's state, every completion, and every metric that no clock decides.
Processes are really killed, at a point that a wrapper around one function picks (`at`).
"""

import fcntl
import functools
import importlib
import os
import signal

import pytest
from miniature import launch, rows, run, steps, untimed

from minitrl import grpo

KINDS = {
    "float32": dict(max_steps=5),
    # Checkpoints fall amid a buffer of rollouts, whose log-probs under policy and reference must outlive it; the
    # reference moves.
    "bfloat16, 3 iterations": dict(
        max_steps=5, num_iterations=3, dtype="bfloat16", beta=0.05, sync_ref_model=True, ref_model_sync_steps=2,
        dynamic_sampling=1,
    ),
}  # fmt: skip
FAULTS = {  # where the process dies: function, the step whose metrics have been given to log_step by then, which call
    "rollout": ("minitrl.sampling:draw", 3, 5),
    "reward": ("minitrl.rewards:_call", 3, 1),
    "backward": ("minitrl.losses:grpo_loss", 3, 2),
    "optimizer": ("minitrl.training:Optimizer._round_masters", 3, 1),
    "rows": ("minitrl.runs:RunFolder.append_metrics", 4, 1),
    "weights": ("minitrl.disk:write_tensors", 4, 1),
    "state": ("minitrl.state:write_json", 4, 1),
    "rename": ("os:rename", 4, 1),
    "renamed": ("shutil:rmtree", 4, 2),
    "final": ("minitrl.checkpoint:_save_weights", 5, 1),
}


def at(target: str, step: int, call: int, what) -> None:
    """Have `what` called before `target`, "module:attribute", at its call number `call` after `step` was logged."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, log_step = getattr(owner, name), grpo.runs.Run.log_step
    counts = {"step": 0, "calls": 0}

    def counting(run, logged, *arguments, **options):
        counts["step"] = logged
        return log_step(run, logged, *arguments, **options)

    def wrapper(*arguments, **options):
        counts["calls"] += counts["step"] >= step
        if counts["calls"] == call and counts["step"] >= step:
            what(*arguments)
        return original(*arguments, **options)

    grpo.runs.Run.log_step = counting
    setattr(owner, name, wrapper)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_amid(path, *_) -> None:
    """Half of a file is on the disk."""
    path.write_bytes(b"\0" * 1000)
    die()


def killed(where: str):
    return functools.partial(at, *FAULTS[where], die_amid if where == "weights" else die)


def signalled(*numbers: int, step: int = 1):
    """The signals come, one after the other, in the middle of the rollouts after `step`."""
    return functools.partial(at, "minitrl.sampling:draw", step, 3, functools.partial(_send, numbers))


def _send(numbers, *_) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def breaks(*_) -> None:
    raise ArithmeticError("broken")


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def last(folder) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def assert_same_end(one, other, step: int = 5) -> None:
    assert untimed(one) == untimed(other)
    for file in ("completions.jsonl", "final/model.safetensors", f"checkpoints/step_{step}/optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert [row["step"] for row in steps(one)] == list(range(1, step + 1))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """For each kind of run (and number of processes) the folder of one that nothing happened to."""

    @functools.cache
    def folder(kind: str, world: int = 1):
        path = tmp_path_factory.mktemp("undisturbed") / "run"
        assert launch(tiny.argv(path, save_steps=2, **KINDS[kind]), world).codes == [0] * world
        return path

    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", FAULTS)
def test_kill_9(tiny, tmp_path, undisturbed, where, kind):
    argv = tiny.argv(tmp_path, save_steps=2, **KINDS[kind])
    assert launch(argv, hooks={0: killed(where)}).code == -signal.SIGKILL
    assert len(steps(tmp_path)) in (3, 4, 5) and not (tmp_path / "final").exists()  # far in, and not at the end
    saved = {"renamed": 4, "final": 5}.get(where, 2)
    outcome = launch([*argv, "--resume"])
    assert outcome.code == 0 and f"--resume: going on after step {saved}\n" in outcome.out, outcome
    assert_same_end(undisturbed(kind), tmp_path)


@pytest.mark.parametrize("rank, where", [(0, "rename"), (1, "backward"), (1, "rollout")])
def test_kill_9_of_one_process_of_two(tiny, tmp_path, undisturbed, rank, where):
    kind = "bfloat16, 3 iterations"
    argv = tiny.argv(tmp_path, save_steps=2, **KINDS[kind])
    assert launch(argv, 2, hooks={rank: killed(where)}).codes[rank] == -signal.SIGKILL
    assert launch([*argv, "--resume"], 2).codes == [0, 0]
    assert_same_end(undisturbed(kind, 2), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where, step", [("reward", 3), ("backward", 4)])
def test_an_error_saves_the_last_step(tiny, tmp_path, undisturbed, where, step, kind):
    """In the next step's rewards, or in its backward pass: then its prompts are drawn again, or its buffer is kept."""
    argv = tiny.argv(tmp_path, save_steps=100, **KINDS[kind])
    outcome = launch(argv, hooks={0: functools.partial(at, FAULTS[where][0], step, 1, breaks)})
    assert outcome.code == 1 and "broken" in outcome.err, outcome
    assert f"step {step} is saved" in outcome.out and last(tmp_path) == step == steps(tmp_path)[-1]["step"]
    outcome = launch([*argv, "--resume"])
    assert outcome.code == 0 and f"--resume: going on after step {step}\n" in outcome.out, outcome
    assert_same_end(undisturbed(kind), tmp_path)


def test_killed_again_and_again(tiny, tmp_path, undisturbed):
    """A kill at each place in turn, in one run, resumed after each."""
    kind = "bfloat16, 3 iterations"
    argv = tiny.argv(tmp_path, save_steps=1, **KINDS[kind])
    for i, where in enumerate(("backward", "rename", "rows", "optimizer")):
        target, *_, call = FAULTS[where]
        hook = functools.partial(at, target, i, call, die)
        assert launch(argv + ["--resume"] * (i > 0), hooks={0: hook}).code == -signal.SIGKILL, where
    assert launch([*argv, "--resume"]).code == 0
    assert_same_end(undisturbed(kind), tmp_path)


def test_only_old_checkpoints_are_removed(tiny, tmp_path, undisturbed):
    """With --save_total_limit 1, killed while the old checkpoint is being removed: the new one is there."""
    argv = tiny.argv(tmp_path, save_steps=2, save_total_limit=1, **KINDS["float32"])
    hook = functools.partial(at, "os:rename", 4, 2, die)
    assert launch(argv, hooks={0: hook}).code == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_4"]
    assert "going on after step 4" in launch([*argv, "--resume"]).out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_5"]
    assert_same_end(undisturbed("float32"), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_and_two_more(tiny, tmp_path, kind):
    """A run that ended may be continued with a higher --max_steps, as if it had been asked for from the start."""
    options = dict(KINDS[kind], lr_scheduler_type="constant")
    assert launch(tiny.argv(tmp_path / "whole", **options | {"max_steps": 4})).code == 0
    assert launch(tiny.argv(tmp_path / "parts", **options | {"max_steps": 2})).code == 0
    assert launch([*tiny.argv(tmp_path / "parts", **options | {"max_steps": 4}), "--resume"]).code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts", 4)
    steps = [(tmp_path / f"parts/checkpoints/step_{step}/optimizer.safetensors").read_bytes() for step in (2, 4)]
    assert steps[0] != steps[1]


def test_the_embedded_default_is_warmed_up_to_the_same_weights(tmp_path):
    """Its model is made anew by each process: it must be the one that the run began with."""
    argv = ["--max_steps", "3", "--save_steps", "2", "--device", "cpu", "--beta", "0.01", "--output_dir"]
    assert launch([*argv, str(tmp_path / "whole")]).code == 0
    hook = functools.partial(at, "minitrl.sampling:draw", 2, 3, die)
    assert launch([*argv, str(tmp_path / "killed")], hooks={0: hook}).code == -signal.SIGKILL
    outcome = launch([*argv, str(tmp_path / "killed"), "--resume"])
    assert outcome.code == 0 and "going on after step 2" in outcome.out
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 3)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_ends_the_step_and_saves(tiny, tmp_path, undisturbed, kind, number, code):
    argv = tiny.argv(tmp_path, save_steps=100, **KINDS[kind])
    step = 3 if "iterations" in kind else 1
    outcome = launch(argv, hooks={0: signalled(number, step=step)})
    assert outcome.code == code and "finishing this step, then saving" in outcome.err and "Traceback" not in outcome.err
    assert last(tmp_path) == steps(tmp_path)[-1]["step"] == step + 1 and not (tmp_path / "final").exists()
    assert launch([*argv, "--resume"]).code == 0
    assert_same_end(undisturbed(kind), tmp_path)


def test_a_signal_before_the_first_step(tiny, tmp_path, undisturbed):
    """During the evaluation that comes first: there is nothing to save, and the run starts over."""
    argv = [*tiny.argv(tmp_path, **KINDS["float32"]), "--eval_dataset", str(tiny.folder / "data.jsonl")]
    assert launch(argv, hooks={0: signalled(signal.SIGTERM, step=0)}).code == 143
    assert not (tmp_path / "checkpoints").exists()
    outcome = launch([*argv, "--resume"])
    assert outcome.code == 0 and "no checkpoint yet, starting over" in outcome.out
    assert [row["step"] for row in rows(tmp_path)] == list(range(6))
    completions = [(folder / "completions.jsonl").read_bytes() for folder in (tmp_path, undisturbed("float32"))]
    assert completions[0] == completions[1]


def test_a_signal_to_one_process_stops_both(tiny, tmp_path, undisturbed):
    argv = tiny.argv(tmp_path, **KINDS["float32"])
    assert launch(argv, 2, hooks={1: signalled(signal.SIGINT)}).codes == [143, 130]
    assert last(tmp_path) == 2
    assert launch([*argv, "--resume"], 2).codes == [0, 0]
    assert_same_end(undisturbed("float32", 2), tmp_path)


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path):
    outcome = launch(tiny.argv(tmp_path, save_steps=1), hooks={0: signalled(signal.SIGINT, signal.SIGINT, step=2)})
    assert outcome.code == -signal.SIGINT  # which shells report as 130
    assert steps(tmp_path)[-1]["step"] == 2 and last(tmp_path) in (1, 2)  # the second was perhaps still being written


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_broken_checkpoint_is_passed_over_and_named(tiny, tmp_path, undisturbed, damage):
    argv = tiny.argv(tmp_path, save_steps=2, **KINDS["float32"])
    assert run(argv).code == 0
    for path in (tmp_path / "final").iterdir():
        path.unlink()
    (tmp_path / "final").rmdir()
    file = tmp_path / "checkpoints/step_5/optimizer.safetensors"
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    outcome = launch([*argv, "--resume"])
    assert outcome.code == 0 and "going on after step 4" in outcome.out
    assert "step_5 is passed over: optimizer.safetensors " in outcome.out
    assert_same_end(undisturbed("float32"), tmp_path)


def test_step_10_is_newer_than_step_9(tiny, tmp_path):
    options = dict(save_steps=1, lr_scheduler_type="constant", max_completion_length=2)
    assert run(tiny.argv(tmp_path, max_steps=10, **options)).code == 0
    outcome = run([*tiny.argv(tmp_path, max_steps=11, **options), "--resume"])
    assert outcome.code == 0 and "going on after step 10\n" in outcome.out
    assert [row["step"] for row in steps(tmp_path)] == list(range(1, 12))


@pytest.mark.parametrize("step", [2, 4])
def test_a_full_disk_spares_what_is_saved(tiny, tmp_path, undisturbed, step):
    """Status 1 and one line; the older checkpoint is whole, no half of the new one is left, and the run goes on."""
    argv = tiny.argv(tmp_path, save_steps=2, **KINDS["float32"])
    hook = functools.partial(at, "minitrl.disk:write_tensors", step, 1, full_disk)
    outcome = launch(argv, hooks={0: hook})
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert f"step_{step}" in outcome.err and "No space left on device" in outcome.err
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_2"] * (step == 4)
    outcome = launch([*argv, "--resume"])
    assert outcome.code == 0 and ("going on after step 2" if step == 4 else "no checkpoint yet") in outcome.out
    assert_same_end(undisturbed("float32"), tmp_path)


def test_a_full_disk_at_the_very_end(tiny, tmp_path, undisturbed):
    """The final model cannot be written: the last checkpoint is there, and --resume has nothing to do but write it."""
    argv = tiny.argv(tmp_path, save_steps=2, **KINDS["float32"])
    outcome = launch(argv, hooks={0: functools.partial(at, "minitrl.checkpoint:_save_weights", 5, 1, full_disk)})
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and "final" in outcome.err
    assert not (tmp_path / "final").exists()
    outcome = launch([*argv, "--resume"])
    assert outcome.code == 0 and "going on after step 5" in outcome.out
    assert_same_end(undisturbed("float32"), tmp_path)


def test_another_number_of_processes(tiny, tmp_path, undisturbed):
    """Not to the bit, since sums are added up in another order; but the same prompts, random numbers and lengths."""
    argv = tiny.argv(tmp_path, save_steps=2, **KINDS["float32"])
    assert launch(argv, 2, hooks={0: killed("reward")}).codes[0] == -signal.SIGKILL
    assert launch([*argv, "--resume"]).code == 0
    ours, theirs = rows(tmp_path, "completions"), rows(undisturbed("float32"), "completions")
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]
    assert [row["completion_ids"] for row in ours[:16]] == [row["completion_ids"] for row in theirs[:16]]
    assert [row["step"] for row in steps(tmp_path)] == [1, 2, 3, 4, 5]


def test_the_table_of_completions_after_a_resume_amid_a_buffer(tiny, tmp_path):
    """There are no new completions to show until the next generation."""
    options = dict(log_completions=True, num_iterations=3)
    assert run(tiny.argv(tmp_path, max_steps=2, **options)).code == 0
    outcome = run([*tiny.argv(tmp_path, max_steps=4, **options), "--resume"])
    assert outcome.code == 0 and outcome.out.count("reward  prompt") == 1  # after step 4, not after step 3


def test_a_changed_option_is_refused_by_name(tiny, tmp_path):
    assert run(tiny.argv(tmp_path, max_steps=1)).code == 0
    before = (tmp_path / "config.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    outcome = run([*tiny.argv(tmp_path, max_steps=2, seed=7, temperature=0.5), "--resume"])
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "seed was 42, is 7; temperature was 1.0, is 0.5" in outcome.err
    assert "max_steps" not in outcome.err
    assert before == ((tmp_path / "config.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes())
    free = dict(max_steps=2, logging_steps=5, save_steps=1, save_total_limit=1, log_completions=True, timeout=60)
    assert run([*tiny.argv(tmp_path, **free), "--resume"]).code == 0


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, tmp_path):
    assert run(tiny.argv(tmp_path, max_steps=1)).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outcome = run(tiny.argv(tmp_path, max_steps=1, model="nothing here"))  # said before a model is looked for
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "--output_dir" in outcome.err and "holds a run already; continue it with --resume" in outcome.err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_resume_where_nothing_was(tiny, tmp_path):
    outcome = run([*tiny.argv(tmp_path / "typo"), "--resume"])
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and "holds no run" in outcome.err


def test_two_runs_in_one_folder(tiny, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process's run holds it
        outcome = run(tiny.argv(tmp_path))
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "--output_dir" in outcome.err and "another run is writing there" in outcome.err
    assert run(tiny.argv(tmp_path, max_steps=1)).code == 0
