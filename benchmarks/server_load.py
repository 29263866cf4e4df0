"""A server under load and under attack at once: are all answers right, does /health answer, does memory grow?

    python -m benchmarks.server_load --seconds 300

64 clients for five minutes: 40 ask for completions, some as streams, and compare every token with what an engine in
this process gives; 24 send what is malformed, oversized or unauthorised, trickle bytes, say nothing, or leave amid an
answer. In the middle the weights are changed. Written to results/server_load.json.
"""

import argparse
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import torch

from minitrl import checkpoint, toy
from minitrl.distributed import World
from minitrl.rollout import Engine
from minitrl.rollout_client import RemoteEngine

KEY = "a-key-for-the-load-test-0123456789"
PAGE = os.sysconf("SC_PAGE_SIZE")


def request(url: str, path: str, body=None, key: str | None = KEY, timeout: float = 120) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    asked = urllib.request.Request(url + path, body if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def bodies(count: int) -> list[dict]:
    """Requests of all kinds, each with a seed, so that its answer is known beforehand."""
    draw = random.Random(0)
    return [
        {"prompt": [draw.randrange(2, 8) for _ in range(draw.randrange(1, 20))], "seed": i, "n": draw.choice([1, 1, 2, 4]),
         "max_tokens": draw.randrange(1, 40), "temperature": draw.choice([0.0, 0.7, 1.0]), "ignore_eos": draw.random() < 0.5,
         "top_p": draw.choice([1.0, 0.9]), "return_token_ids": True, "logprobs": 0}
        for i in range(count)
    ]  # fmt: skip


def answers(model, tokenizer, asked: list[dict]) -> list[list[list[int]]]:
    engine, names = Engine(model, tokenizer), ("seed", "n", "max_tokens", "temperature", "ignore_eos", "top_p")
    groups = [engine.generate([body["prompt"]], **{name: body[name] for name in names})[0] for body in asked]
    return [[completion.ids for completion in group] for group in groups]


def good(url: str, asked: list[dict], expected: list, stop: float, seed: int, seen: Counter) -> None:
    """expected: the answers by weight version. An answer that saw two versions is right up to the change."""
    draw = random.Random(seed)
    while time.monotonic() < stop:
        i = draw.randrange(len(asked))
        stream = draw.random() < 0.3
        status, content = request(url, "/v1/completions", asked[i] | {"stream": stream})
        if status == 429:
            seen["429"] += 1
            continue
        if status != 200:
            seen[f"WRONG status {status}"] += 1
            continue
        ids, spans = [[] for _ in range(asked[i]["n"])], {}
        parts = [json.loads(content)] if not stream else [
            json.loads(event[6:]) for event in content.decode().split("\n\n") if event and event != "data: [DONE]"
        ]  # fmt: skip
        for choice in (choice for part in parts for choice in part["choices"]):
            ids[choice["index"]] += choice["token_ids"]
            spans[choice["index"]] = choice.get("weight_versions", spans.get(choice["index"]))
        for g, tokens in enumerate(ids):
            versions = spans[g]
            first = expected[versions[0][0]][i][g]
            whole = len(versions) == 1
            right = tokens == first if whole else tokens[: versions[0][2]] == first[: versions[0][2]]
            right = right and versions[-1][2] == len(tokens)
            seen["right" if right and whole else "right, over a weight update" if right else "WRONG"] += 1
            seen["tokens"] += len(tokens)


def hostile(url: str, stop: float, seed: int, seen: Counter) -> None:
    draw, (host, port) = random.Random(seed), re.search(r"//(.*):(\d+)", url).groups()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
    body = json.dumps({"prompt": [2, 3, 4], "n": 4, "max_tokens": 40, "ignore_eos": True, "stream": True}).encode()
    while time.monotonic() < stop:
        kind = draw.choice(["malformed", "oversized", "unauthorised", "trickle", "silent", "leaves", "noise"])
        seen[kind] += 1
        try:
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                if kind == "malformed":
                    wrong = draw.choice([b"{", b'{"n": NaN}', b"[" * 10_000, b'{"a":1,"a":2}', b'{"prompt": [-1]}', b"\xff"])
                    connection.sendall(f"{head}Content-Length: {len(wrong)}\r\n\r\n".encode() + wrong)
                elif kind == "oversized":
                    connection.sendall(f"{head}Content-Length: 999999999\r\n\r\n".encode() + b"a" * 100_000)
                elif kind == "unauthorised":
                    connection.sendall(b"POST /generate/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
                elif kind == "noise":
                    connection.sendall(draw.randbytes(draw.randrange(1, 3000)) + b"\r\n\r\n")
                elif kind == "leaves":
                    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    connection.recv(draw.choice([1, 500]))
                    continue
                elif kind == "trickle":
                    for byte in head.encode()[: draw.randrange(1, 30)]:
                        connection.sendall(bytes([byte]))
                        time.sleep(0.1)
                    continue
                else:
                    time.sleep(draw.random() * 3)
                    continue
                status = connection.recv(65536)[9:12].decode()
                if not status.startswith("4"):
                    seen[f"WRONG {kind}: {status!r}"] += 1
        except OSError:
            seen["closed by the server"] += 1


def probe(url: str, stop: float, latencies: list[float], seen: Counter) -> None:
    while time.monotonic() < stop:
        began = time.monotonic()
        try:
            status = request(url, "/health", timeout=30)[0]
        except OSError as error:
            status = error
        latencies.append(time.monotonic() - began)
        if status != 200:
            seen[f"WRONG health {status}"] += 1
        time.sleep(0.05)


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "server_load.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MINITRL_API_KEY"] = KEY
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = toy.make_tokenizer()
        model = toy.make_model(0, tokenizer.vocab_size)
        checkpoint.save(model, tokenizer, f"{folder}/model")
        argv = ["--model", f"{folder}/model", "--dtype", "float32", "--port", "0", "--deterministic"]
        model.make_deterministic()
        server = subprocess.Popen([sys.executable, "-m", "minitrl.server", *argv], stdout=subprocess.PIPE, text=True)
        url = next(line for line in server.stdout if line.startswith("serving")).split()[-1]
        asked = bodies(200)
        expected = [answers(model, tokenizer, asked)]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        expected.append(answers(model, tokenizer, asked))
        stop, seen, attacks, latencies, memory = time.monotonic() + args.seconds, Counter(), Counter(), [], []
        hostiles = args.clients * 3 // 8
        threads = [threading.Thread(target=good, args=(url, asked, expected, stop, i, seen))
                   for i in range(args.clients - hostiles)]  # fmt: skip
        threads += [threading.Thread(target=hostile, args=(url, stop, i, attacks)) for i in range(hostiles)]
        threads += [threading.Thread(target=probe, args=(url, stop, latencies, seen))]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        while (left := stop - time.monotonic()) > 0:
            memory.append((round(args.seconds - left, 1), rss(server.pid)))
            time.sleep(min(left, args.seconds / 20))
            if len(memory) == 10:  # the model is the changed one: what is sent is version 1
                RemoteEngine([url], model, tokenizer, World(0, 1, torch.device("cpu"))).generate([])
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        time.sleep(2)
        state = json.loads(request(url, "/weights")[1])
        server.terminate()
        code = server.wait(60)
    latencies.sort()
    early, late = memory[len(memory) // 4][1], memory[-1][1]
    result = {
        "command": " ".join(["python -m benchmarks.server_load", *sys.argv[1:]]), "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "seconds": round(seconds, 1),
        "clients": args.clients, "hostile": hostiles, "completions": dict(seen), "attacks": dict(attacks),
        "tokens_per_second": round(seen["tokens"] / seconds, 1), "weight_version_at_the_end": state["version"],
        "health": {"asked": len(latencies), "p50_ms": round(1e3 * latencies[len(latencies) // 2], 2),
                   "p99_ms": round(1e3 * latencies[int(0.99 * len(latencies))], 2), "max_ms": round(1e3 * latencies[-1], 2)},
        "rss_mib": {"after a quarter": early >> 20, "at the end": late >> 20, "all": [[t, b >> 20] for t, b in memory]},
        "exit_status_after_sigterm": code,
    }  # fmt: skip
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rss_mib"}, indent=1))
    wrong = [name for counts in (seen, attacks) for name in counts if name.startswith("WRONG")]
    assert not wrong and code == 0 and state["version"] == 1, wrong


if __name__ == "__main__":
    main()
