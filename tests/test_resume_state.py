"""The trainer's state on disk: whole or not there, and a broken one is never resumed in silence."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from minitrl.disk import digest_of
from minitrl.distributed import ALONE
from minitrl.state import VERSION, _verified, load_state, save_state

STATE = {"seed": 2**63 + 1, "loss": 0.1 + 0.2, "names": ["a", "ü"], "nested": {"none": None, "yes": True}, "7": "7"}


def tensors(step):
    """Every kind that a trainer has: weights, moments, counters, and a generator's state as bytes."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(5, 3, generator=generator)
    return {
        "model": {"layers.0.weight": weight, "transposed": weight.t(), "bf16": weight.bfloat16()},
        "optimizer": {"step": torch.tensor(step), "exp_avg": weight * 1e-30, "double": weight.double() / 3,
                      "generator": generator.get_state(), "none": torch.empty(0, 4)},
        "rollouts": {},
    }


def save(folder, *steps, keep=None):
    for step in steps:
        save_state(folder, step, tensors(step), STATE | {"step": step}, keep)


def steps(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_is(loaded, step, notes=0):
    found, named, state, said = loaded
    assert (found, state, len(said)) == (step, STATE | {"step": step}, notes)
    expected = tensors(step)
    assert named.keys() == expected.keys()
    for stem in expected:
        assert named[stem].keys() == expected[stem].keys()
        for name, tensor in expected[stem].items():
            assert named[stem][name].dtype == tensor.dtype and torch.equal(named[stem][name], tensor)


def test_round_trip_to_the_bit(tmp_path):
    assert load_state(tmp_path) is None
    save(tmp_path, 1)
    assert_is(load_state(tmp_path), 1)
    (tmp_path / "checkpoints" / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "checkpoints" / "step_two").mkdir()
    (tmp_path / "checkpoints" / ".step_3.tmp").mkdir()
    assert_is(load_state(tmp_path), 1)


def test_steps_are_numbers(tmp_path):
    save(tmp_path, 9, 10, 8)
    assert load_state(tmp_path)[0] == 10


def test_keep(tmp_path):
    save(tmp_path, 1, 2, 8, 9, 10, keep=2)
    assert steps(tmp_path) == ["step_10", "step_9"]
    save(tmp_path, 11, keep=None)
    assert steps(tmp_path) == ["step_10", "step_11", "step_9"]
    save(tmp_path, 12, keep=1)
    assert steps(tmp_path) == ["step_12"]
    save(tmp_path, 11, keep=1)  # the one just written stays, whatever lies ahead of it
    assert steps(tmp_path) == ["step_11", "step_12"]


def test_same_step_again_replaces(tmp_path):
    save(tmp_path, 3)
    save_state(tmp_path, 3, {"model": {"new": torch.ones(1)}}, {})
    step, named, state, notes = load_state(tmp_path)
    assert (step, list(named), list(named["model"]), state, notes) == (3, ["model"], ["new"], {}, [])


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors has 100 bytes of"),
    "bit in a weight": (lambda f: flip(f / "optimizer.safetensors", -1), "optimizer.safetensors was changed"),
    "bit in a header": (lambda f: flip(f / "model.safetensors", 20), "model.safetensors was changed"),
    "zero bytes": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors has 0 bytes of"),
    "pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(print)), "model.safetensors has"),
    "missing": (lambda f: (f / "rollouts.safetensors").unlink(), "rollouts.safetensors is missing"),
    "a link": (lambda f: (f / "model.safetensors").rename(f / "m") and (f / "model.safetensors").symlink_to("m"),
               "model.safetensors is missing"),
    "no state.json": (lambda f: (f / "state.json").unlink(), "state.json: no such file"),
    "empty state.json": (lambda f: (f / "state.json").write_text(""), "state.json: not valid JSON"),
    "cut state.json": (lambda f: os.truncate(f / "state.json", 50), "state.json: not valid JSON"),
    "list": (lambda f: (f / "state.json").write_text("[]"), "expected a JSON object"),
    "state changed": (lambda f: edit(f / "state.json", state={}), "state.json was changed"),
    "file list changed": (lambda f: edit(f / "state.json", files={}), "state.json was changed"),
    "foreign version": (lambda f: edit(f / "state.json", version=VERSION + 1), f"format 'minitrl state' version {VERSION + 1}"),
    "foreign format": (lambda f: edit(f / "state.json", format="other"), f"format 'other' version {VERSION}"),
    "renamed": (lambda f: f.rename(f.with_name("step_7")), "state.json is of step 6"),
    "a file": (lambda f: f.rename(f.with_name("away")) and f.write_text("x"), "Not a directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_checkpoint_is_passed_over_and_said(damage, tmp_path):
    save(tmp_path, 4, 6)
    break_it, reason = DAMAGE[damage]
    break_it(tmp_path / "checkpoints" / "step_6")
    loaded = load_state(tmp_path)
    assert_is(loaded, 4, notes=1)
    assert "is passed over: " in loaded[3][0] and reason in loaded[3][0] and "/step_" in loaded[3][0]


def test_file_that_does_not_belong_is_said_and_not_read(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "checkpoints" / "step_4" / "extra.safetensors").write_bytes(b"\x80\x04.")
    loaded = load_state(tmp_path)
    assert_is(loaded, 4, notes=1)
    assert "extra.safetensors" in loaded[3][0]


def test_all_broken_is_an_error(tmp_path):
    """Starting over would throw the run away without a word."""
    save(tmp_path, 4, 6)
    for step in (4, 6):
        (tmp_path / "checkpoints" / f"step_{step}" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole.*step_6 is passed over.*step_4 is passed over"):
        load_state(tmp_path)


def test_broken_one_is_replaced_when_the_run_gets_there(tmp_path):
    save(tmp_path, 4, 6)
    (tmp_path / "checkpoints" / "step_6" / "model.safetensors").unlink()
    save(tmp_path, 6, keep=2)
    assert_is(load_state(tmp_path), 6)


def test_forged_file_name_is_not_followed(tmp_path):
    """A state.json with a right digest may still name a file elsewhere."""
    save(tmp_path, 4)
    path = tmp_path / "checkpoints" / "step_4" / "state.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    body["files"]["../../secret.safetensors"] = {"size": 1, "sha256": "0"}
    path.write_text(json.dumps({"sha256": digest_of(body), **body}))
    with pytest.raises(ValueError, match="names '../../secret.safetensors', which is no file of a checkpoint"):
        load_state(tmp_path)


@pytest.mark.parametrize("target", ["minitrl.disk.write_tensors", "pathlib.Path.write_text", "os.fsync", "os.rename",
                                    "pathlib.Path.mkdir"])
@pytest.mark.parametrize("code", [28, 13, 30], ids=["disk full", "no permission", "read-only"])
def test_failed_save_leaves_the_older_ones(target, code, tmp_path, monkeypatch):
    save(tmp_path, 1, 2)

    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match=f"cannot save .*step_3: .*{os.strerror(code)}.*untouched"):
        save(tmp_path, 3, keep=1)
    monkeypatch.undo()
    assert steps(tmp_path) == ["step_1", "step_2"]
    assert_is(load_state(tmp_path), 2)
    save(tmp_path, 3, keep=1)  # and there is room again
    assert_is(load_state(tmp_path), 3)


def test_failed_replacement_restores_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)
    rename, calls = os.rename, []

    def fail_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(*arguments)

    monkeypatch.setattr("os.rename", fail_second)
    with pytest.raises(OSError, match="cannot save .*step_1"):
        save_state(tmp_path, 1, {"model": {"new": torch.ones(1)}}, {})
    assert_is(load_state(tmp_path), 1)
    assert steps(tmp_path) == ["step_1"]


def test_failure_that_is_no_disk_error_leaves_nothing_behind(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_state(tmp_path, 2, tensors(2), {"model": object()})
    assert steps(tmp_path) == ["step_1"]


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="cannot save .*step_1"):
        save(tmp_path, 1)


def run_python(script, *arguments):
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_disk_that_is_really_full(tmp_path):
    """The kernel refuses to let a file grow past 1 MiB: the error is safetensors' own kind, and still an OSError."""
    save(tmp_path, 1)
    result = run_python("""
import resource, signal, sys, torch
from minitrl.state import save_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    save_state(sys.argv[1], 2, {"model": {"w": torch.zeros(2**20)}}, {})
except OSError as error:
    print(error)
""", tmp_path)
    assert result.returncode == 0 and "cannot save" in result.stdout and "step_2" in result.stdout, result.stderr
    assert steps(tmp_path) == ["step_1"]
    assert_is(load_state(tmp_path), 1)


@pytest.mark.parametrize("point", ["minitrl.disk.write_tensors", "os.fsync", "os.rename", "shutil.rmtree",
                                   "os.unlink"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_killed_while_saving(point, call, tmp_path):
    """kill -9 at the n-th write, flush, rename or removal of saving step 3 with keep=1: a whole checkpoint remains."""
    save(tmp_path, 1, 2)
    pid = os.fork()
    if pid == 0:  # a child that shares our imports, and ends here whatever happens
        try:
            module, name = point.rsplit(".", 1)
            module, calls = sys.modules[module], iter(range(1, 100))
            real = getattr(module, name)

            def killed(*arguments, **options):
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(module, name, killed)
            save(tmp_path, 3, keep=1)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    step = load_state(tmp_path)[0]
    assert step in (2, 3)
    assert_is(load_state(tmp_path), step)
    for name in (name for name in steps(tmp_path) if name.startswith("step_")):  # none is half removed either
        _verified(tmp_path / "checkpoints" / name, int(name[5:]), ALONE)
    save(tmp_path, 3, keep=1)
    assert steps(tmp_path) == ["step_3"]
    assert_is(load_state(tmp_path), 3)


def test_files_are_plain(tmp_path):
    """Only safetensors and JSON, readable by others as the umask allows."""
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step_1"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert torch.equal(load_file(folder / "model.safetensors")["transposed"], tensors(1)["model"]["transposed"])
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
