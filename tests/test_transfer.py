"""Weights over a bridge: to the bit, in any buckets, checked before and after, and nothing half done."""

import os
import threading
import time

import pytest
import torch
from processes import free_port, run_processes

from minitrl import distributed, transfer

SHAPES = {"b": (7, 3), "a.norm": (5,), "c.empty": (0, 4), "z": (1,), "d": (129, 33)}


def tensors(seed=0, dtypes=(torch.float32, torch.bfloat16)):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def meet(*sides, timeout_s=5.0, generations=(1, 1), secrets=("s", "s")):
    """Run sides[0](bridge) as rank 0 and sides[1](bridge) as rank 1; returns what they return or raise."""
    listener = transfer.listen("127.0.0.1")
    port, ends = listener.getsockname()[1], [None, None]

    def side(rank):
        try:
            bridge = transfer.Bridge(
                "127.0.0.1", port, rank, 2, generation=generations[rank], secret=secrets[rank], timeout_s=timeout_s,
                listener=listener if rank == 0 else None,
            )  # fmt: skip
            ends[rank] = sides[rank](bridge)
            bridge.close()
        except Exception as error:
            ends[rank] = error

    threads = [threading.Thread(target=side, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.parametrize("bucket", [16, 48, 1000 * 16, transfer.BUCKET])
def test_every_bit_arrives(bucket):
    new, old = tensors(1), tensors(2)
    new["b"][0, 0], new["d"][0, 0] = torch.nan, -0.0

    def rollout(bridge):
        staged, digest = transfer.receive(bridge, old, bucket=bucket)
        assert all(torch.equal(old[name], t) for name, t in tensors(2).items()), "touched before it was whole"
        transfer.install(staged, old)
        return digest

    sent, received = meet(lambda bridge: transfer.send(bridge, new, bucket), rollout)
    assert sent == received == transfer.digest(new, bucket) == transfer.digest(old, bucket)
    assert all(torch.equal(old[name].view(torch.uint8), t.view(torch.uint8)) for name, t in new.items() if t.numel())


def test_tensors_that_are_views():
    whole = torch.randn(12, 10)
    views = {"t": whole.t(), "rows": whole[3:5], "column": whole[:, 1]}
    copies = {name: view.clone() for name, view in views.items()}
    ends = meet(lambda b: transfer.send(b, views, 64), lambda b: transfer.receive(b, copies, bucket=64))
    assert ends[0] == ends[1][1] == transfer.digest(copies, 64)
    assert all(torch.equal(views[name], ends[1][0][name]) for name in views)


def test_the_digest_knows_every_bit_and_place():
    base, seen = tensors(), set()
    for name, tensor in base.items():
        for i in range(0, tensor.numel() * tensor.element_size(), 37):
            changed = {other: t.clone() for other, t in base.items()}
            changed[name].view(-1).view(torch.uint8)[i] ^= 1 << (i % 8)
            seen.add(transfer.digest(changed))
    swapped = base["d"].clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    seen |= {transfer.digest(base), transfer.digest({**base, "d": swapped})}
    total = sum(-(-t.numel() * t.element_size() // 37) for t in base.values())
    assert len(seen) == total + 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop(), "tensor z is absent there"),
        (lambda d: d.append(["y", "float32", [1]]), "tensor y is float32 .1. there and absent here"),
        (lambda d: d[1].__setitem__(1, "float32"), "tensor b is"),
        (lambda d: d[1].__setitem__(2, [3, 7]), r"tensor b is .*\[3, 7\] there"),
        (lambda d: d[1].__setitem__(2, [-7, -3]), "tensor b is"),
        (lambda d: d[1].__setitem__(2, [2**62, 2**62]), "tensor b is"),
        (lambda d: d[1].__setitem__(2, "7x3"), "tensor b is"),
        (lambda d: d.append(d[0]), "each once"),
        (lambda d: d.append({"name": "b"}), "each once"),
        (lambda d: d.append([1, 2, 3]), "each once"),
    ],
)
def test_a_set_that_does_not_fit(change, message):
    ours = tensors(dtypes=(torch.bfloat16,))
    described = transfer.describe(ours)
    transfer.check(described, ours)
    change(described)
    with pytest.raises(ValueError, match=message):
        transfer.check(described, ours)
    for wrong in (None, "x", {}, 3):
        with pytest.raises(ValueError):
            transfer.check(wrong, ours)


@pytest.mark.parametrize("buckets", [0, 1, 2])
def test_a_sender_that_dies_leaves_the_old(buckets):
    old = tensors(2)

    def dying(bridge):
        for piece in list(transfer._stream(tensors(1), 4096))[:buckets]:
            bridge.finish(bridge.broadcast(piece), "sending")
        bridge.close()

    _, error = meet(dying, lambda bridge: transfer.receive(bridge, old, bucket=4096), timeout_s=20)
    assert isinstance(error, ConnectionError), error
    assert "rank 1 of 2, receiving bucket" in str(error)
    assert all(torch.equal(old[name], t) for name, t in tensors(2).items())


def test_a_sender_that_hangs_ends_in_time():
    old, began, let_go = tensors(2), time.monotonic(), threading.Event()

    def receive(bridge):
        try:
            return transfer.receive(bridge, old)
        finally:
            let_go.set()

    _, error = meet(lambda bridge: let_go.wait(60), receive, timeout_s=1)
    assert isinstance(error, ConnectionError) and "rank 1 of 2, receiving bucket 1" in str(error)
    assert time.monotonic() - began < 30
    assert all(torch.equal(old[name], t) for name, t in tensors(2).items())


def test_a_changed_bit_is_noticed():
    def liar(bridge):
        for piece in transfer._stream(tensors(1), transfer.BUCKET):
            bridge.finish(bridge.broadcast(piece), "sending")
        bridge.finish(bridge.broadcast(torch.zeros(32, dtype=torch.uint8)), "sending")

    error = meet(liar, lambda bridge: transfer.receive(bridge, tensors(2)))[1]
    assert isinstance(error, ConnectionError) and "verifying the weights" in str(error)


@pytest.mark.parametrize("other", [{"generations": (2, 1)}, {"secrets": ("s", "t")}])
def test_another_generation_or_secret_does_not_meet(other):
    ends = meet(lambda bridge: 0, lambda bridge: 0, timeout_s=1, **other)
    assert all(isinstance(end, ConnectionError) for end in ends), ends
    assert "rank 1 of 2, meeting at 127.0.0.1:" in str(ends[1]) and "generation 1" in str(ends[1])


def test_install_is_all_or_nothing():
    old, new = tensors(2), tensors(1)
    del new["z"]
    with pytest.raises(ValueError, match="tensor z"):
        transfer.install(new, old)
    assert all(torch.equal(old[name], t) for name, t in tensors(2).items())


def test_a_store_listens_where_it_is_told_and_nowhere_else():
    listener = transfer.listen("127.0.0.1")
    assert listener.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError):
        transfer.listen("127.0.0.1", listener.getsockname()[1])
    listener.close()
    assert transfer.local_address("127.0.0.1", 1) == "127.0.0.1"


def listening() -> set[str]:
    """Where this process listens, as the system has it: hexadecimal addresses."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return {fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in links}


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads Linux's tables")
def test_store_and_group_listen_on_loopback_alone():
    before = listening()
    ends = meet(lambda bridge: listening(), lambda bridge: listening())
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert all(end and end - before <= loopback for end in ends), ends


def two_worlds(ports):
    """Rank 0 trains in a world of its own, rank 1 rolls out in another: neither world knows of the bridge."""
    rank = int(os.environ["RANK"])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert distributed.start("cpu").size == 1
    for generation, port in enumerate(ports):
        listener = transfer.listen("127.0.0.1", port) if rank == 0 else None
        bridge = transfer.Bridge("127.0.0.1", port, rank, 2, generation=generation, timeout_s=60, listener=listener)
        if rank == 0:
            transfer.send(bridge, tensors(generation))
        else:
            staged, _ = transfer.receive(bridge, tensors(9))
            assert all(torch.equal(staged[name], t) for name, t in tensors(generation).items())
        bridge.close()


def test_between_two_worlds():
    run_processes(two_worlds, 2, [free_port(), free_port()])
