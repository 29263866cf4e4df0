"""Weights over a bridge: to the bit, in any buckets, checked before and after, and nothing half done."""

import os
import threading
import time

import pytest
import torch
from processes import free_port, run_processes

from minitrl import distributed, transfer
from minitrl.layout import Box
from minitrl.model import ModelConfig

SHAPES = {"b": (7, 3), "a.norm": (5,), "z": (1,), "d": (129, 33)}


def tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def route(bridge, tensors):
    """From rank 0, which has all of the tensors, to rank 1, which wants them."""
    shapes = {name: (*t.shape, 1)[:2] for name, t in tensors.items()}
    held = [Box(name, (0, rows), (0, columns), name, 0) for name, (rows, columns) in shapes.items()]
    return transfer.Route(bridge, [held], [held])


def send(bridge, tensors, bucket=transfer.BUCKET, dtype=torch.float32):
    transfer.send(route(bridge, tensors), tensors, dtype, bucket)


def receive(bridge, like, bucket=transfer.BUCKET):
    return transfer.receive(route(bridge, like), like, bucket)


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


@pytest.mark.parametrize("bucket", [1, 48, 1000, transfer.BUCKET])
def test_every_bit_arrives(bucket):
    new, old = tensors(1), tensors(2)
    new["b"][0, 0], new["d"][0, 0] = torch.nan, -0.0

    def rollout(bridge):
        staged = receive(bridge, old, bucket)
        assert all(torch.equal(old[name], t) for name, t in tensors(2).items()), "touched before it was whole"
        transfer.install(staged, old)

    ends = meet(lambda bridge: send(bridge, new, bucket), rollout)
    assert ends == [None, None]
    assert transfer.digest(new, bucket=99) != transfer.digest(tensors(2), bucket=99) != transfer.digest(old, bucket=99)
    assert all(torch.equal(old[name].view(torch.uint8), t.view(torch.uint8)) for name, t in new.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sender_casts(dtype):
    """Masters in float32, of which the sampler has its own dtype: exactly what `to` makes of them."""
    ends = meet(lambda b: send(b, tensors(1), 64, dtype), lambda b: receive(b, tensors(2, dtype), 64))
    assert ends[1].keys() == SHAPES.keys()
    assert all(torch.equal(ends[1][name], t.to(dtype)) for name, t in tensors(1).items())


def test_tensors_that_are_views():
    whole = torch.randn(12, 10)
    views = {"t": whole.t(), "rows": whole[3:5], "column": whole[:, 1]}
    copies = {name: view.clone() for name, view in views.items()}
    ends = meet(lambda b: send(b, views, 64), lambda b: receive(b, copies, 64))
    assert transfer.digest(views) == transfer.digest(copies)
    assert all(torch.equal(views[name], ends[1][name]) for name in views)


def test_the_digest_knows_every_bit_and_place():
    base, seen = tensors() | {"half": torch.randn(3, 5).bfloat16(), "empty": torch.empty(0, 4)}, set()
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
    assert transfer.digest(base | {"empty": torch.empty(0, 5)}) not in seen


CONFIG = ModelConfig.from_hf({
    "model_type": "llama", "vocab_size": 30, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 9, "tie_word_embeddings": True,
})  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop(), "tensor model.layers.0.post_attention_layernorm.weight is absent there"),
        (lambda d: d.append(["y", "float32", [1]]), "tensor y is float32 .1. there and absent here"),
        (lambda d: d[0].__setitem__(1, "float32"), f"tensor {EMBEDDING} is float32"),
        (lambda d: d[0].__setitem__(2, [8, 30]), rf"tensor {EMBEDDING} is .*\[8, 30\] there"),
        (lambda d: d[0].__setitem__(2, [-30, -8]), f"tensor {EMBEDDING} is"),
        (lambda d: d[0].__setitem__(2, [2**62, 2**62]), f"tensor {EMBEDDING} is"),
        (lambda d: d[0].__setitem__(2, "30x8"), f"tensor {EMBEDDING} is"),
        (lambda d: d.append(d[0]), "each once"),
        (lambda d: d.append({"name": "b"}), "each once"),
        (lambda d: d.append([1, 2, 3]), "each once"),
    ],
)
def test_a_set_that_does_not_fit(change, message):
    ours, theirs = transfer.describe(CONFIG, torch.bfloat16), transfer.describe(CONFIG, torch.bfloat16)
    transfer.check(theirs, ours)
    change(theirs)
    with pytest.raises(ValueError, match=message):
        transfer.check(theirs, ours)
    for wrong in (None, "x", {}, 3):
        with pytest.raises(ValueError):
            transfer.check(wrong, ours)


def send_some(bridge, new, pieces, change=lambda piece: None):
    """Send the first pieces of a stream, the last of which is the digest, and leave."""
    way = route(bridge, new)
    stream = way._give(way.sends[1], new, torch.float32, 1024, True)
    for piece in [piece for piece in stream if piece is not None][:pieces]:
        change(piece)
        bridge.finish(bridge.exchange([(1, True, piece)]), "sending")
    bridge.close()


@pytest.mark.parametrize("pieces, phase", [(0, "bucket 1 of"), (1, "bucket 2 of"), (5, "bucket 7 of"), (6, "until all have")])
def test_a_sender_that_dies_leaves_the_old(pieces, phase):
    old, new = tensors(2), tensors(1)
    ends = meet(lambda b: send_some(b, new, pieces), lambda b: receive(b, old, 4096), timeout_s=20)
    assert isinstance(ends[1], ConnectionError), ends
    assert "rank 1 of 2" in str(ends[1]) and phase in str(ends[1]), ends[1]
    assert all(torch.equal(old[name], t) for name, t in tensors(2).items())


def test_a_sender_that_hangs_ends_in_time():
    old, began, let_go = tensors(2), time.monotonic(), threading.Event()

    def wait(bridge):
        try:
            return receive(bridge, old)
        finally:
            let_go.set()

    _, error = meet(lambda bridge: let_go.wait(60), wait, timeout_s=1)
    assert isinstance(error, ConnectionError) and "rank 1 of 2, bucket 1 of the weights" in str(error)
    assert time.monotonic() - began < 30
    assert all(torch.equal(old[name], t) for name, t in tensors(2).items())


@pytest.mark.parametrize("byte", [0, 17, 4001])
def test_a_changed_bit_is_noticed(byte):
    def change(piece):
        if piece.dtype == torch.float32 and piece.nbytes > byte:
            piece.view(torch.uint8)[byte] ^= 1 << byte % 8

    ends = meet(lambda b: send_some(b, tensors(1), 9, change), lambda b: receive(b, tensors(2), 4096))
    assert isinstance(ends[1], ConnectionError) and "verifying the weights" in str(ends[1]), ends[1]


def test_a_tensor_of_another_shape_than_was_said():
    """A process whose parameters are not those of the config, at either end."""
    wrong = tensors(1) | {"d": torch.randn(128, 33)}

    def send_wrong(bridge):
        try:
            route(bridge, tensors(1)).carry(wrong, {}, torch.float32)
        finally:
            bridge.close()

    ends = meet(send_wrong, lambda b: receive(b, tensors(2)))
    assert isinstance(ends[0], ValueError) and "d is [128, 33] here" in str(ends[0])
    assert isinstance(ends[1], ConnectionError)


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
            send(bridge, tensors(generation))
        else:
            staged = receive(bridge, tensors(9))
            assert all(torch.equal(staged[name], t) for name, t in tensors(generation).items())
        bridge.close()


def test_between_two_worlds():
    run_processes(two_worlds, 2, [free_port(), free_port()])
