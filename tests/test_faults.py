"""A job of many processes under torchrun against what befalls it, and its way on to another number of processes.

Each fault is real: signals that kill or stop, a disk that is full. What a run must be equal to is the one that nothing
happened to: to the bit on the same processes, to 1e-12 (in float64) on others.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from miniature import launch, rows, steps, untimed
from processes import free_port
from safetensors.torch import load_file
from test_mesh_runs import argv, double, folder  # noqa: F401  (folder: a fixture)
from test_resume import at, breaks, die, full_disk, last

from minitrl import grpo, sft

ROOT = Path(__file__).resolve().parent
WORKER = f"""
import functools, os, signal, sys, time
sys.path[:0] = ["{ROOT}", "{ROOT.parent}"]
import torch
from minitrl import grpo, runs
from test_resume import at

def stop(*_):
    print("stopping", os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def slow(*_):
    os.write(1, b"pid %d\\n" % os.getpid())  # one write: processes share the pipe, print writes word by word
    time.sleep(float(os.environ.get("SLOW", 0)))

if __name__ == "__main__":
    torch.set_num_threads(1)
    fault, rank, step = os.environ.get("FAULT", "none,0,0").split(",")
    at("minitrl.runs:Run.begin", 0, 1, slow)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank and fault != "none":
        at("minitrl.losses:grpo_loss", int(step), 1, {{"kill": die, "stop": stop}}[fault])
    runs.command(functools.partial(grpo.main, sys.argv[1:]))
"""


def torchrun(worker: Path, words: list, *options: str, **environment):
    """torchrun in a session of its own, that whatever it leaves behind can be found."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(worker), *map(str, words)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(words: str) -> list[int]:
    """The live processes whose command line has `words` in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words.encode() in path.read_bytes() and " Z " not in path.with_name("stat").read_text():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


@contextmanager
def none_left(words: str):
    """Whatever happens inside, processes of that name do not outlive it; in good order there are none."""
    try:
        yield
        until(lambda: not processes_of(words), f"processes of {words} are left: {processes_of(words)}", 20)
    finally:
        for pid in processes_of(words):
            os.kill(pid, signal.SIGKILL)


def until(holds, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker_of_this_test.py"
    path.write_text(WORKER)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):  # noqa: F811
    """The end of a run on two processes with --shard 2 that nothing happened to."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert launch(words_of(folder, path), 2).codes == [0, 0]
    return path


def words_of(folder, path, **options) -> list[str]:  # noqa: F811
    return argv(folder, "grpo", path, **{"shard": 2, "max_steps": 4, "save_steps": 1, "eval_steps": 100, **options})


def assert_same_end(one: Path, other: Path) -> None:
    assert untimed(one) == untimed(other)
    names = ["final/model.safetensors", "completions.jsonl"]
    names += [f"checkpoints/step_4/optimizer-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_killed_rank_is_started_again(folder, undisturbed, worker, tmp_path):  # noqa: F811
    """The same command from the first start on: --resume where there is nothing yet, since torchrun may restart."""
    words = [*words_of(folder, tmp_path / "run"), "--resume"]
    with none_left(str(worker)):
        options = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
        job = torchrun(worker, words, *options, FAULT="kill,1,2")
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said
    assert "--resume: no checkpoint yet, starting over" in said, said
    assert re.search("--resume: going on after step [12]\n", said), said  # 2 was being written while 3 computed
    assert_same_end(tmp_path / "run", undisturbed)


def test_without_restarts_a_typo_is_still_said(folder, worker, tmp_path):  # noqa: F811
    job = torchrun(worker, [*words_of(folder, tmp_path / "typo", shard=1), "--resume"], "--nproc_per_node=1",
                   "--standalone")  # fmt: skip
    assert "holds no run" in job.communicate(timeout=120)[0] and job.returncode


def test_workers_end_with_a_killed_torchrun(folder, worker, tmp_path):  # noqa: F811
    """Left alone, they would train on beside those that another machine's torchrun starts."""
    with none_left(str(worker)):
        job = torchrun(worker, words_of(folder, tmp_path / "run"), "--standalone", "--nproc_per_node=2", SLOW="60")
        pids = [int(job.stdout.readline().split()[1]) for _ in range(2)]
        job.send_signal(signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "workers live without torchrun", 10)
        job.stdout.close()
        job.wait()


@pytest.mark.slow
def test_a_stopped_rank(folder, undisturbed, worker, tmp_path):  # noqa: F811
    """SIGSTOP: the other waits --timeout, says for whom and in what, and all start again."""
    words = [*words_of(folder, tmp_path / "run", timeout=10), "--resume"]
    with none_left(str(worker)):
        options = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
        job = torchrun(worker, words, *options, FAULT="stop,1,2")
        said, _ = job.communicate(timeout=500)
        assert job.returncode == 0, said
    assert "error: rank 0 of 2, " in said and "another process is gone or too late" in said, said
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_killed_node(folder, worker, tmp_path):  # noqa: F811
    """Two torchruns as on two machines; one is killed. The other goes on with what is left: two processes, then one."""
    path, port = tmp_path / "run", free_port()
    words = [*words_of(folder, path, shard=None, replicate=1, max_steps=30, max_completion_length=12), "--resume"]
    words = [word for word in words if word not in ("--shard", "None")]
    options = ("--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=faults",
               f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=5")  # fmt: skip
    with none_left(str(worker)):
        first = torchrun(worker, words, *options)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "the first torchrun keeps no store")
        second = torchrun(worker, words, *options)
        until(lambda: (path / "checkpoints/step_2").exists(), "no checkpoint", 200)
        children = [pid for pid in processes_of(str(worker)) if parent(pid) == second.pid]
        assert len(children) == 1
        second.send_signal(signal.SIGKILL)
        until(lambda: not Path(f"/proc/{children[0]}").exists(), "its worker lives", 10)
        said, _ = first.communicate(timeout=400)
        assert first.returncode == 0, said
        second.stdout.close()
        second.wait()
    assert [row["step"] for row in steps(path)] == list(range(1, 31))
    assert len([line for line in said.splitlines() if line.startswith("--resume: going on after step")]) == 1, said


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("script", [
    "sft", pytest.param("grpo", marks=pytest.mark.slow),
])  # fmt: skip
def test_from_4_to_2_to_8_processes(folder, tmp_path, script):  # noqa: F811
    """Killed twice, each time going on elsewhere, in float64: losses, norms and weights of the run that went through."""
    main = {"sft": sft, "grpo": grpo}[script].main
    options = {"save_steps": 1, "max_steps": 5, "eval_steps": 100, "lr_scheduler_type": "constant", "adam_epsilon": 1e-3}
    if script == "grpo":  # the sampler's log-probs are float32: they are left out
        options["vllm_importance_sampling_correction"] = False

    def part(path, size, *, resume=False, fault=None, **mesh):
        words = argv(folder, script, path, **options, **mesh) + ["--resume"] * resume
        hooks = {rank: partial(both, double(script), fault if rank == 1 else None) for rank in range(size)}
        return launch(words, size, hooks, main).codes

    assert part(tmp_path / "through", 4, shard=4) == [0] * 4
    run = tmp_path / "run"
    killer = partial(at, "minitrl.training:Optimizer.step")
    assert -signal.SIGKILL in part(run, 4, shard=4, fault=partial(killer, 1, 1, die))
    assert -signal.SIGKILL in part(run, 2, shard=2, resume=True, fault=partial(killer, 2, 1, die))
    assert part(run, 8, shard=4, tensor=2, resume=True) == [0] * 8
    through, found = steps(tmp_path / "through"), steps(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in through], rel=1e-12, abs=1e-14)
    weights, ours = (load_file(path / "final/model.safetensors") for path in (tmp_path / "through", run))
    assert max((ours[name] - weights[name]).abs().max().item() for name in weights) < 1e-12
    if script == "grpo":
        ids = [[row["completion_ids"] for row in rows(path, "completions")] for path in (tmp_path / "through", run)]
        assert ids[0] == ids[1]


def both(first, second) -> None:
    first()
    if second:
        second()


def test_a_full_disk_on_one_of_two(folder, undisturbed, tmp_path):  # noqa: F811
    """The checkpoint is written beside the next step, which does not end without it: the error comes there."""
    words = words_of(folder, tmp_path / "run")
    outcome = launch(words, 2, {1: partial(at, "minitrl.disk:write_tensors", 3, 1, full_disk)})
    assert outcome.codes == [1, 1], outcome
    assert "error: cannot save" in outcome.err and "No space left on device" in outcome.err, outcome.err
    assert last(tmp_path / "run") == 2 and not (tmp_path / "run/final").exists()
    assert not list((tmp_path / "run/checkpoints").glob(".step*"))
    outcome = launch([*words, "--resume"], 2)
    assert outcome.codes == [0, 0] and "going on after step 2\n" in outcome.out, outcome
    assert_same_end(tmp_path / "run", undisturbed)


def test_an_error_that_all_have_saves_the_last_step(folder, undisturbed, tmp_path):  # noqa: F811
    """Each has a part of the weights: they come together to save them."""
    words = words_of(folder, tmp_path / "run", save_steps=100)
    hook = partial(at, "minitrl.training:update", 3, 1, breaks)
    outcome = launch(words, 2, {0: hook, 1: hook})
    assert outcome.codes == [1, 1] and "step 3 is saved; --resume goes on from there" in outcome.out, outcome
    assert launch([*words, "--resume"], 2).codes == [0, 0]
    assert untimed(tmp_path / "run") == untimed(undisturbed)


def test_ctrl_c_saves_what_is_divided(folder, undisturbed, tmp_path):  # noqa: F811
    words = words_of(folder, tmp_path / "run", save_steps=100)
    outcome = launch(words, 2, {1: partial(at, "minitrl.training:update", 1, 1, interrupt_self)})
    assert outcome.codes == [143, 130] and last(tmp_path / "run") == 2, outcome
    assert launch([*words, "--resume"], 2).codes == [0, 0]
    assert untimed(tmp_path / "run") == untimed(undisturbed)


def interrupt_self(*_) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_sharded_files_are_in_the_checkpoint(undisturbed):
    """Each process's own, of about a half of all numbers."""
    said = json.loads((undisturbed / "checkpoints/step_4/state.json").read_text())["files"]
    sizes = [said[f"optimizer-0000{i}-of-00002.safetensors"]["size"] for i in (1, 2)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25
