"""The output folder against kills, full disks and second runs; the console; signals to real processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch

from minitrl.console import Progress, _columns, table
from minitrl.runs import MAY_CHANGE, Interrupt, RunFolder, Seconds, check_resume, command, draw, peak_memory

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
CPU = torch.device("cpu")


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def fails(error):
    def function(*_, **__):
        raise error

    return function


def a_run(folder, steps, config=None):
    with RunFolder(str(folder), resume=False) as run:
        run.begin(config or {"seed": 1}, None)
        for step in range(steps + 1):
            run.append_metrics({"step": step, "loss": step / 3})
            run.append_completions([{"step": step, "text": f"{step}\u2028{which}"} for which in "ab"])


def test_rows_are_whole_exact_and_there_at_once(tmp_path):
    with RunFolder(str(tmp_path), resume=False) as run:
        run.begin({"seed": 1, "reward": ("a",)}, None)
        run.append_metrics({"step": 1, "loss": 1 / 3, "kl": math.nan, "nested": {"x": [math.inf, 2]}})
        run.append_completions([{"step": 1, "text": "é\n\u2028\x1b"}, {"step": 1, "text": "lone \udc80"}])
        assert rows(tmp_path) == [{"step": 1, "loss": 1 / 3, "kl": None, "nested": {"x": [None, 2]}}]  # before close
        lines = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").split("\n")
        assert [json.loads(line)["text"] for line in lines[:-1]] == ["é\n\u2028\x1b", "lone \udc80"]
        assert run.saved_config() == {"seed": 1, "reward": ["a"]}


@pytest.mark.parametrize("step", [0, 3, 5, None])
def test_resume_cuts_what_came_after(tmp_path, step):
    a_run(tmp_path, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # torn by a kill
    kept = -1 if step is None else step
    with RunFolder(str(tmp_path), resume=True) as run:
        assert run.saved_config() == {"seed": 1}
        run.begin({"seed": 1, "max_steps": 9}, step)
        assert [row["step"] for row in rows(tmp_path)] == list(range(kept + 1))
        run.append_metrics({"step": kept + 1, "loss": 7.0})
    assert rows(tmp_path)[-1] == {"step": kept + 1, "loss": 7.0} and len(rows(tmp_path)) == kept + 2
    texts = [row["text"] for row in rows(tmp_path, "completions")]
    assert texts == [f"{s}\u2028{w}" for s in range(kept + 1) for w in "ab"]
    assert json.loads((tmp_path / "config.json").read_text())["max_steps"] == 9
    assert not list(tmp_path.glob("*.new"))


def test_a_row_torn_inside_a_character(tmp_path):
    a_run(tmp_path, 2)
    torn = '{"step": 2, "text": "é'.encode()[:-1]
    for name in ("metrics", "completions"):
        with open(tmp_path / f"{name}.jsonl", "ab") as file:
            file.write(torn)
    with RunFolder(str(tmp_path), resume=True) as run:
        run.begin({"seed": 1}, 2)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2] and len(rows(tmp_path, "completions")) == 6


def test_cutting_holds_one_row_at_a_time(tmp_path):
    a_run(tmp_path, 1)
    line = json.dumps({"step": 1, "text": "x" * 1000}) + "\n"
    (tmp_path / "completions.jsonl").write_text(line * 10_000)
    with RunFolder(str(tmp_path), resume=True) as run:
        tracemalloc.start()
        run.begin({"seed": 1}, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10**6 and (tmp_path / "completions.jsonl").stat().st_size == 10_000 * len(line)


def test_a_broken_row_inside_is_named(tmp_path):
    a_run(tmp_path, 2)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace('{"step": 1', '{"stop": 1'))
    before = file.read_text()
    with RunFolder(str(tmp_path), resume=True) as run, pytest.raises(ValueError, match=r"metrics.jsonl:2: not a row"):
        run.begin({"seed": 1}, 2)
    assert file.read_text() == before


def test_cutting_survives_a_full_disk(tmp_path, monkeypatch):
    a_run(tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").read_text()
    with RunFolder(str(tmp_path), resume=True) as run:
        monkeypatch.setattr("os.fsync", fails(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="cannot write .*config.json: No space left on device; .*--resume"):
            run.begin({"seed": 2}, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_full_disk_while_appending(tmp_path):
    with RunFolder(str(tmp_path), resume=False) as run:
        run.begin({}, None)
        run._files["metrics"] = open("/dev/full", "a")
        with pytest.raises(OSError, match="cannot write .*metrics.jsonl: No space left on device"):
            run.append_metrics({"step": 1})
    # leaving the block raised nothing more


def test_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/x: .*; mend that, or choose another place"):
        RunFolder(str(tmp_path / "file" / "x"), resume=False)
    monkeypatch.setattr("pathlib.Path.mkdir", fails(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError, match="Permission denied; mend that"):
        RunFolder(str(tmp_path / "y"), resume=False)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step_1/x", "final/x"])
def test_a_fresh_run_spares_an_old_one(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume, choose another"):
        RunFolder(str(tmp_path), resume=False)


def test_a_run_that_failed_before_its_first_step_may_be_started_again(tmp_path):
    for _ in range(2):
        with RunFolder(str(tmp_path), resume=False) as run:
            run.begin({"seed": 1}, None)


def test_resume_where_nothing_is(tmp_path):
    with pytest.raises(ValueError, match="--resume: .* holds no run"):
        RunFolder(str(tmp_path / "typo"), resume=True)


def test_two_runs_one_folder(tmp_path):
    """The lock holds against another process, and goes with kill -9."""
    script = (
        f"import time\nfrom minitrl.runs import RunFolder\nrun = RunFolder({str(tmp_path)!r}, False)\n"
        "print('locked', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="--output_dir .*: another run is writing there; choose another"):
            RunFolder(str(tmp_path), resume=False)
    finally:
        other.kill()
        other.wait()
    RunFolder(str(tmp_path), resume=False).close()
    with RunFolder(str(tmp_path), resume=False), pytest.raises(ValueError, match="another run"):
        RunFolder(str(tmp_path), resume=False)


def test_a_refused_folder_is_not_left_locked(tmp_path):
    a_run(tmp_path, 1)
    with pytest.raises(ValueError) as kept_alive:
        RunFolder(str(tmp_path), resume=False)
    RunFolder(str(tmp_path), resume=True).close()
    assert "holds a run" in str(kept_alive.value)


def test_changed_options_are_named():
    old = {"beta": 0.0, "seed": 1, "reward": ["a"], "max_steps": 5, "gone": None}
    check_resume(old, {**old, "reward": ("a",), "max_steps": 9})
    new = {"beta": 0.04, "seed": 1, "reward": ("a", "b"), "max_steps": 9, "fresh": True}
    with pytest.raises(ValueError) as caught:
        check_resume(old, new)
    text = str(caught.value)
    for change in ("beta was 0.0, is 0.04", 'reward was ["a"], is ["a", "b"]', "fresh was absent, is true"):
        assert change in text
    assert "gone was null, is absent" in text
    assert "max_steps" not in text and "seed was" not in text and "another --output_dir" in text
    check_resume(old, {**old, "beta": 1.0}, may_change=[*MAY_CHANGE, "beta"])


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    with RunFolder(str(tmp_path), resume=False) as run:
        run.begin({}, None, report_to="tensorboard")
        run.append_metrics({"step": 1, "reward": 0.5, "skipped": math.nan, "text": "x"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5)]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunFolder(str(tmp_path), False) as run, pytest.raises(ValueError, match="tensorboard: not installed"):
        run.begin({}, None, report_to="tensorboard")


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_draw(tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    made = [{"step": 0, "eval/accuracy": 0.2}, {"step": 1, "reward": None}, {"step": 2, "reward": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    draw(str(tmp_path), str(tmp_path / f"curve.{suffix}"), ("reward", "eval/accuracy"))
    assert (tmp_path / f"curve.{suffix}").read_bytes().startswith(start)
    with pytest.raises(OSError, match="cannot write .*nowhere"):
        draw(str(tmp_path), str(tmp_path / "nowhere" / f"curve.{suffix}"), ("reward",))


def test_progress_is_the_mean_since_the_line_before(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress, said = Progress(total_steps=7, every=3), []
    for step in range(1, 8):
        clock[0] += 10
        reward = math.nan if step == 5 else step / 10
        row = {"step": step, "reward": reward, "loss": 0.5, "learning_rate": 1e-6, "tokens_per_second": 1234.5}
        said.append(progress.line(row))
    assert [line is None for line in said] == [True, True, False, True, True, False, False]
    assert said[2] == "step 3/7  reward 0.200  loss 0.5000  lr 1.00e-06  1,234 tokens/s  0:30 gone  0:40 left"
    assert "reward 0.500" in said[5] and said[6].startswith("step 7/7  reward 0.700") and "0:00 left" in said[6]


def test_progress_after_a_resume(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress(total_steps=1000, every=1, step=900)
    clock[0] = 60.0
    assert progress.line({"step": 901}) == "step 901/1000  1:00 gone  1:39:00 left"


def test_table_fits_and_cannot_touch_the_terminal():
    text = table(
        ["the question stands at the very end of a prompt: 1+1=", "short\n"],
        ["\x1b[2J\u202e" + "x" * 100, "汉字" * 50],
        [1.0, -0.25],
        width=60,
    )
    lines = text.split("\n")
    assert len(lines) == 3 and all(_columns(line) <= 60 for line in lines)
    assert all(char.isprintable() for line in lines for char in line)
    assert "…" in lines[1] and "prompt: 1+1=" in lines[1] and r"\x1b[2J\u202exxx" in lines[1]
    assert len(lines[2]) + lines[2].count("汉") + lines[2].count("字") <= 60  # each of these takes two columns
    assert r"short\n" in lines[2] and "汉字" in lines[2] and lines[2].startswith("  -0.250")
    assert {line.index("completion") for line in lines[:1]} == {_columns(lines[1].split(r"\x1b")[0])}


LOOP = """
import os, sys, time
from minitrl.distributed import any_true, start, stop
from minitrl.runs import Interrupt
world = start("cpu", 60)
with Interrupt() as interrupt:
    os.write(1, b"ready\\n")  # in one piece: two processes share the pipe
    for step in range(1000):
        for _ in range(4):
            time.sleep(0.1)
        if any_true(interrupt.wanted, world):
            open(f"{sys.argv[1]}/saved.{world.rank}", "w").write(str(step))
            stop()
            raise SystemExit(interrupt.exit_code)
"""


def start_loop(folder, **more):
    command = [sys.executable, "-c", LOOP, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, **more)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_so(tmp_path, number, code):
    process = start_loop(tmp_path, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and (tmp_path / "saved.0").exists(), said
    assert f"{signal.Signals(number).name}: finishing this step, then saving" in said


def test_a_second_ctrl_c_kills_at_once(tmp_path):
    process = start_loop(tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT and not (tmp_path / "saved.0").exists()


def test_a_signal_to_torchrun_reaches_all(tmp_path):
    """torchrun hands the signal on; every process saves after the same step."""
    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "loop.py"), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert (tmp_path / "saved.0").read_text() == (tmp_path / "saved.1").read_text()


def test_interrupt_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGTERM) == interrupt._handle and not interrupt.wanted
        assert interrupt.exit_code == 143  # another process got the signal
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_before_the_loop(capsys):
    with pytest.raises(SystemExit) as end:
        command(fails(KeyboardInterrupt()))
    assert end.value.code == 130 and capsys.readouterr().err == ""


def test_seconds_add_up_by_phase():
    seconds = Seconds(CPU)
    for _ in range(2):
        with seconds("sleep"):
            time.sleep(0.02)
    with pytest.raises(KeyError), seconds("fail"):
        raise KeyError
    taken = seconds.take()
    assert taken.keys() == {"sleep", "fail"} and 0.04 <= taken["sleep"] < 2 and seconds.take() == {}


def test_seconds_within_others_count_once(monkeypatch):
    clock = iter((10.0, 11.0, 14.0, 15.0, 18.0, 20.0))  # train: 1 + 1 + 2, saving: 3 + 3
    monkeypatch.setattr("minitrl.runs.time.perf_counter", lambda: next(clock))
    seconds = Seconds(CPU)
    with seconds("train"):
        for _ in range(2):
            with seconds("saving"):
                pass
    assert seconds.take() == {"train": 4.0, "saving": 6.0}


def test_peak_memory_is_in_bytes_and_stays():
    before = peak_memory(CPU)
    block = torch.ones(2**25)  # 128 MiB
    after = peak_memory(CPU)
    del block
    status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else f"VmHWM: {after // 1024} kB"
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    assert before <= after and after == pytest.approx(peak, rel=0.05) and peak_memory(CPU) >= after
