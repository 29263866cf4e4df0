"""Whole runs whose samples come from servers: as if they came from the process itself, also when a server is killed."""

import os
import signal
import threading

import miniature
import pytest
import serving
import torch

from minitrl import grpo, ppo, rollout_client
from minitrl.rollout import Engine

EXACT = {"deterministic": True, "dtype": "float32", "seed": 5}
SMALL = {"num_ppo_epochs": 2, "num_mini_batches": 2, "max_steps": 8, "prompts_per_step": 4, "num_generations": 1}


def a_server(tiny, hook=None):
    return serving.Process(tiny, hook, deterministic=None, dtype="float32")


def same_bits(one, other, *files) -> None:
    for file in ("completions.jsonl", "final/model.safetensors", *files):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert miniature.untimed(one) == miniature.untimed(other)


@pytest.mark.parametrize("world", [1, 2])
def test_ppo_against_a_server_is_ppo(tiny, tmp_path, world):
    """Four rollouts with two epochs of two minibatches each: policy, value model and metrics, to the bit."""
    options = EXACT | SMALL
    here = miniature.launch(tiny.argv(tmp_path / "here", **options), world, main=ppo.main)
    with a_server(tiny) as server:
        there = miniature.launch(tiny.argv(tmp_path / "there", rollout_server=server.url, **options), world, main=ppo.main)
        updates = serving.ask(server.url, "/weights")[1]["version"] % 2**20  # above it, the run
    assert here.codes == there.codes == [0] * world, there.err
    assert updates == 2, "8 steps are 2 rollouts of 4"
    same_bits(tmp_path / "here", tmp_path / "there", "value_model/model.safetensors")


def dies_amid_generation(steps: int = 40):
    """In a server's process: kill -9 while the engine is at work on its 40th step."""
    forward, count = Engine._forward, iter(range(steps))

    def fatal(self, feeding):
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, feeding)

    Engine._forward = fatal


def test_a_run_outlives_one_of_its_two_servers(tiny, tmp_path):
    """kill -9 amid generation, and the server comes back with old weights: not a bit of the run is different.

    Meanwhile the other one stands still, so that the run is not over before: it waits, and goes on with both.
    """
    options = EXACT | {"max_steps": 12}
    assert miniature.launch(tiny.argv(tmp_path / "here", **options)).code == 0
    with a_server(tiny) as first, a_server(tiny, dies_amid_generation) as second:
        ended, urls = [], f"{first.url},{second.url}"
        words = tiny.argv(tmp_path / "there", rollout_server=urls, **options)
        run = threading.Thread(target=lambda: ended.append(miniature.launch(words)))
        run.start()
        second.process.join(60)
        os.kill(first.process.pid, signal.SIGSTOP)
        assert second.process.exitcode == -signal.SIGKILL and not ended
        done = len(miniature.rows(tmp_path / "there"))
        second.hook = None
        second.start()
        os.kill(first.process.pid, signal.SIGCONT)
        run.join(120)
        digests = {serving.ask(server.url, "/weights")[1]["digest"] for server in (first, second)}
        asked_again = serving.ask(second.url, "/weights")[1]["version"] % 2**20
    assert 0 < done < 12 and ended[0].code == 0, (done, ended)
    assert len(digests) == 1 and asked_again == 12, "it came back, and got the last weights"
    same_bits(tmp_path / "here", tmp_path / "there")


def test_the_cache_is_bounded_as_asked(tiny, tmp_path, monkeypatch):
    """--rollout_cache_gib of either script is the engine's, and a quarter of what the load needs changes no bit."""
    bounds = []
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, their size, bytes

    def recorded(*arguments, **options):
        bounds.append(Engine(*arguments, **options))
        return bounds[-1]

    monkeypatch.setattr(rollout_client, "Engine", recorded)
    for script in (grpo, ppo):
        ends = {}
        for name, bound in (("plenty", None), ("little", 2.5 * 16 * token / 2**30)):
            folder = tmp_path / script.__name__ / name
            given = EXACT | {"rollout_cache_gib": bound, "max_steps": 4}
            outcome = miniature.run(tiny.argv(folder, **given), script)
            assert outcome.code == 0, outcome.err
            ends[name] = folder
        assert [engine.pool.max_pages for engine in bounds] == [torch.inf, 2]
        bounds.clear()
        same_bits(ends["plenty"], ends["little"])
