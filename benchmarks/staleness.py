"""The embedded default with a server of its own: sampling and training by turns, and at once.

    python -m benchmarks.staleness

Two pairs of processes, each a `minitrl.server` and a `minitrl.grpo` of one thread, which differ in --max_staleness
alone. They run in alternation, a few seconds each, by SIGSTOP and SIGCONT, so that whatever else the machine does is
shared between them. Seconds per step are medians over the steps that both did while the other was there.
Writes benchmarks/results/staleness.json after each seed.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
TRAINER = "-m minitrl.grpo --seed {seed} --max_steps {steps} --eval_steps 100 --max_staleness {bound}"
SERVER = "-m minitrl.server --port 0 --max_batch 256"


class Pair:
    """A server and its trainer, which can be stopped together."""

    def __init__(self, bound: int, seed: int, steps: int, folder: Path):
        self.folder, self.processes = folder, []
        self.command = TRAINER.format(bound=bound, seed=seed, steps=steps)
        folder.mkdir()
        self.start("server", SERVER)
        while "serving" not in (text := (folder / "server.log").read_text()):
            assert self.processes[0].poll() is None, text
            time.sleep(0.2)
        self.start("trainer", f"{self.command} --output_dir {folder}/run --rollout_server {text.split()[-1]}")

    def start(self, name: str, arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"{name}.log", "w") as log:
            started = subprocess.Popen([sys.executable, *arguments.split()], stdout=log, stderr=log, env=environment)
        self.processes.append(started)

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    @property
    def over(self) -> bool:
        return self.processes[-1].poll() is not None

    def rows(self) -> list[dict]:
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines(True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def alternate(pairs: list[Pair], turn: float) -> int:
    """Let them run by turns until all are over; returns the step that all had reached when the first was."""
    common = None
    while not all(pair.over for pair in pairs):
        for pair in pairs:
            if pair.over:
                continue
            pair.send(signal.SIGCONT)
            end = time.monotonic() + turn
            while time.monotonic() < end and not pair.over:
                time.sleep(0.1)
            pair.send(signal.SIGSTOP)
            if pair.over and common is None:
                common = min(other.rows()[-1]["step"] for other in pairs)
    return common


def measure(seed: int, options) -> list[dict]:
    """A row for each bound."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        try:
            for bound in (0, options.bound):
                pairs.append(Pair(bound, seed, options.steps, Path(folder) / str(bound)))
                pairs[-1].send(signal.SIGSTOP)
            common = alternate(pairs, options.turn)
            return [row_of(bound, seed, pair, common) for bound, pair in zip((0, options.bound), pairs)]
        finally:
            for pair in pairs:
                pair.close()


def row_of(bound: int, seed: int, pair: Pair, common: int) -> dict:
    assert pair.processes[-1].returncode == 0, (pair.folder / "trainer.log").read_text()[-2000:]
    rows = pair.rows()
    timed = [row for row in rows if common // 10 < row["step"] <= common]
    seconds = {name: round(statistics.median(row[name] for row in timed), 4)
               for name in ("step_time", "time/rollout", "time/train")}  # fmt: skip
    accuracies = [[row["step"], row["eval/accuracy"]] for row in rows if "eval/accuracy" in row]
    ages = [row["sampling/staleness/max"] for row in rows if "sampling/staleness/max" in row]
    row = {"max_staleness": bound, "seed": seed, "steps": rows[-1]["step"], "timed_steps": len(timed)} | seconds
    row |= {"accuracy": accuracies[-1][1], "accuracies": accuracies, "oldest": max(ages, default=0)}
    return row | {"command": f"python {pair.command}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--bound", type=int, default=1)
    parser.add_argument("--turn", type=float, default=5.0, help="seconds that a pair runs at a time")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        rows += measure(seed, options)
        for row in rows[-2:]:
            print({name: value for name, value in row.items() if name not in ("accuracies", "command")}, flush=True)
        ratios = [b["step_time"] / a["step_time"] for a, b in zip(rows[::2], rows[1::2])]
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        done = " ".join(str(row["seed"]) for row in rows[::2])
        value = {"command": f"python -m benchmarks.staleness --seeds {done}", "server": f"python {SERVER}",
                 "machine": machine, "step_time_ratio": round(statistics.median(ratios), 3), "rows": rows}  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "staleness.json").write_text(json.dumps(value, indent=1) + "\n")
        print("step time, ahead / by turns:", [round(ratio, 3) for ratio in ratios], flush=True)


if __name__ == "__main__":
    main()
