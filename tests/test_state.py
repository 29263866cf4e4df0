"""Checkpoints and final/ from any layout of processes into any other, to the bit.

Each number of each tensor of the whole is a function of the tensor's name and kind; whoever holds a box holds that part.
"""

import hashlib
import json
import os
import re
import sys
import threading

import pytest
import tokenizers
import torch
from processes import run_processes
from safetensors import safe_open
from test_layouts import FAMILY, SHAPE, parts_of, whole_model

from minitrl import checkpoint, disk, distributed, layout, parallel, state, training
from minitrl.distributed import ALONE, World
from minitrl.model import ModelConfig
from minitrl.state import Pieces, load_state, save_state
from minitrl.tokenizer import Tokenizer

PATIENCE_S = 300


def number_of(name: str, shape: tuple) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(kind: str, held: layout.Held, config: ModelConfig) -> torch.Tensor:
    """This process's part of a parameter."""
    made, tensors = torch.full(held.shape, torch.nan, dtype=torch.float64), layout.hf_tensors(config)
    for box in held.boxes:
        whole = number_of(kind + box.tensor, tensors[box.tensor][2])
        part = whole.view(len(whole), -1)[slice(*box.rows), slice(*box.columns)]
        made.view(len(made), -1)[box.at : box.at + len(part)] = part
    return made


def tokenizer() -> Tokenizer:
    words = {f"w{i}": i for i in range(20)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")), [0])


def start(mesh: tuple) -> World:
    world = distributed.start("cpu", PATIENCE_S, mesh) if mesh != (1, 1, 1) else World(0, 1, ALONE.device)
    return world


def optimizer_of(family: str, world: World):
    model = checkpoint.divided(whole_model(family), torch.float64, world)
    optimizer = training.Optimizer(model, world)
    optimizer.step(0.0)  # which makes the moments
    return model, optimizer


def pass_on(family: str, mesh: tuple, source: str | None, target: str) -> None:
    """Read `source` in this layout, see that all is right, and write `target`."""
    world = start(mesh)
    model, optimizer = optimizer_of(family, world)
    if source:
        step, tensors, state, notes = load_state(source, world)
        assert (step, state, notes) == (7, {"a": [1, None]}, [])
        assert tensors["rollouts"].keys() == {"ids"} and tensors["rollouts"]["ids"].tolist() == [3, 4]
        optimizer.load_state_tensors(tensors["optimizer"].local(optimizer.held))
    else:
        for name, tensor in optimizer.state_tensors().items():
            kind, _, parameter = name.partition(".")
            tensor.copy_(expected(f"{kind}.", optimizer.held[parameter], model.config) if parameter else tensor)
    found = optimizer.state_tensors()
    assert found.pop("step") == 1 and len(found) == 3 * len(list(model.parameters()))
    for name, tensor in found.items():
        kind, _, parameter = name.partition(".")
        assert torch.equal(tensor, expected(f"{kind}.", optimizer.held[parameter], model.config)), name
    keepers = distributed.keepers(world, PATIENCE_S)
    if keepers:
        mine = {"optimizer": optimizer.state_tensors(), "rollouts": {"ids": torch.tensor([3, 4 + world.rank])}}
        save_state(target, 7, mine, {"a": [1, None]}, None, keepers, optimizer.held)
        checkpoint.save(model, tokenizer(), f"{target}/final", None, 60_000, keepers)
    distributed.barrier(world)
    loaded, _ = checkpoint.load(f"{target}/final", torch.float64, world=world)
    for box, part in parts_of(loaded, world).items():
        shape = layout.hf_tensors(model.config)[box.tensor][2]
        whole = number_of(f"master.{box.tensor}", shape).view(shape[0], -1)
        assert torch.equal(part, whole[slice(*box.rows), slice(*box.columns)]), box
    distributed.stop()


def count_of(mesh: tuple) -> int:
    return mesh[0] * mesh[1] * mesh[2]


CHAINS = {
    "qwen3": [(1, 4, 1), (1, 2, 1), (1, 8, 1), (1, 1, 1)],
    "llama": [(1, 1, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2), (1, 3, 1), (2, 2, 1), (1, 1, 1)],
}


@pytest.mark.parametrize("family", CHAINS)
def test_from_layout_to_layout(family, tmp_path):
    """Each layout reads what the one before it wrote, and writes it on; the last is as if one process had written it."""
    source = None
    for number, mesh in enumerate(CHAINS[family]):
        target = str(tmp_path / str(number))
        run_processes(pass_on, count_of(mesh), family, mesh, source, target)
        files = sorted(path.name for path in (tmp_path / str(number) / "checkpoints" / "step_7").iterdir())
        parts = mesh[1] * mesh[2]
        names = [f"optimizer-{i:05}-of-{parts:05}.safetensors" for i in range(1, parts + 1)]
        assert files == [*(names if parts > 1 else ["optimizer.safetensors"]), "rollouts.safetensors", "state.json"]
        assert len(list((tmp_path / str(number) / "final").glob("model-*"))) > 4, "not in shards"
        source = target
    config = ModelConfig.from_hf(SHAPE | FAMILY[family])
    with safe_open(f"{source}/checkpoints/step_7/optimizer.safetensors", "pt") as file:
        assert len(file.keys()) == 1 + 3 * len(layout.hf_tensors(config))
        for name, (_, _, shape) in layout.hf_tensors(config).items():
            for kind in ("master.", "exp_avg.", "exp_avg_sq."):
                assert torch.equal(file.get_tensor(kind + name), number_of(kind + name, shape))


def sizes_of(mesh: tuple, folder: str) -> None:
    world = start(mesh)
    _, optimizer = optimizer_of("qwen3", world)
    if keepers := distributed.keepers(world, PATIENCE_S):
        save_state(folder, 1, {"optimizer": optimizer.state_tensors()}, {}, None, keepers, optimizer.held)
    distributed.stop()


@pytest.mark.parametrize("mesh", [(1, 2, 2), (2, 2, 1), (1, 1, 4)])
def test_every_number_is_written_once(mesh, tmp_path):
    run_processes(sizes_of, count_of(mesh), mesh, str(tmp_path))
    config, count = ModelConfig.from_hf(SHAPE | FAMILY["qwen3"]), 0
    for path in (tmp_path / "checkpoints" / "step_1").glob("*.safetensors"):
        with disk.opened(path) as file:
            count += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys() if name != "step")
    assert count == 3 * sum(torch.Size(shape).numel() for _, _, shape in layout.hf_tensors(config).values())


def broken(folder: str, damage: str) -> None:
    """Of the two checkpoints the newer is damaged where one process alone looks: all pass it over."""
    world = start((1, 2, 1))
    _, optimizer = optimizer_of("qwen3", world)
    keepers = distributed.keepers(world, PATIENCE_S)
    for step in (1, 2):
        save_state(folder, step, {"optimizer": optimizer.state_tensors()}, {}, None, keepers, optimizer.held)
    path = f"{folder}/checkpoints/step_2/optimizer-00002-of-00002.safetensors"
    if world.rank == 0:
        if damage == "bit":
            with open(path, "r+b") as file:
                file.seek(-5, os.SEEK_END)
                file.write(bytes([file.read(1)[0] ^ 4]))
        elif damage == "half":
            os.truncate(path, os.path.getsize(path) // 2)
        else:
            os.unlink(path)
    distributed.barrier(world)
    step, tensors, _, notes = load_state(folder, world)
    assert step == 1 and len(notes) == 1 and re.search("step_2 is passed over: optimizer-00002-of-00002.safetensors "
                                                       "(is missing|was changed|has)", notes[0])  # fmt: skip
    optimizer.load_state_tensors(tensors["optimizer"].local(optimizer.held))
    distributed.stop()


@pytest.mark.parametrize("damage", ["bit", "half", "missing"])
def test_a_damaged_part_is_passed_over_by_all(damage, tmp_path):
    run_processes(broken, 2, str(tmp_path), damage)


def full_disk(folder: str, rank: int) -> None:
    """The disk of one process is full: all end, the older checkpoint and final/ stay, and nothing else is left."""
    world = start((1, 2, 1))
    model, optimizer = optimizer_of("qwen3", world)
    keepers = distributed.keepers(world, PATIENCE_S)

    def save(step):
        save_state(folder, step, {"optimizer": optimizer.state_tensors()}, {}, None, keepers, optimizer.held)

    save(1)
    checkpoint.save(model, tokenizer(), f"{folder}/final", None, 60_000, keepers)
    before = {str(path): path.read_bytes() for path in sorted(checkpoint.Path(folder).rglob("*.*")) if path.is_file()}
    real = disk._bytes

    def full(tensor):
        if tensor.numel() > 1000:
            raise OSError(28, "No space left on device")
        return real(tensor)

    if world.rank == rank:
        disk._bytes = full
    why = "No space left on device" if world.rank == rank else "another process failed, and says why"
    save_model = lambda: checkpoint.save(model, tokenizer(), f"{folder}/final", None, 60_000, keepers)  # noqa: E731
    for attempt in (lambda: save(2), save_model):
        with pytest.raises(OSError, match=f"cannot save .*{why}.*; what was saved before is untouched"):
            attempt()
        distributed.barrier(world)
        assert before == {name: checkpoint.Path(name).read_bytes() for name in before}
        assert not list(checkpoint.Path(folder).rglob("*.tmp"))
        distributed.barrier(world)
    disk._bytes = real
    save(2)
    distributed.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_of_two(rank, tmp_path):
    run_processes(full_disk, 2, str(tmp_path), rank)


def test_what_the_files_lack_is_named(tmp_path):
    model, optimizer = optimizer_of("qwen3", ALONE)
    save_state(tmp_path, 1, {"optimizer": optimizer.state_tensors()}, {}, held=optimizer.held)
    pieces = load_state(tmp_path)[1]["optimizer"]
    del pieces.boxes["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match="lacks 1024 numbers of master.model.layers.1.self_attn.k_proj.weight"):
        optimizer.load_state_tensors(pieces.local(optimizer.held))


@pytest.mark.parametrize("version", [2, state.VERSION])
def test_boxes_stand_in_the_files_or_as_before_in_state_json(version, tmp_path, monkeypatch):
    model, optimizer = optimizer_of("qwen3", ALONE)
    optimizer.step(0.1)
    write = disk.write_whole

    def as_before(path, tensors, about=None):
        return write(path, tensors) | {name: json.loads(text) for name, text in (about or {}).items()}

    with monkeypatch.context() as patch:
        if version == 2:
            patch.setattr(state, "VERSION", 2)
            patch.setattr(disk, "write_whole", as_before)
        save_state(tmp_path, 1, {"optimizer": optimizer.state_tensors()}, {}, held=optimizer.held)
    assert ("k_proj" in (tmp_path / "checkpoints/step_1/state.json").read_text()) == (version == 2)
    found = load_state(tmp_path)[1]["optimizer"].local(optimizer.held)
    assert all(torch.equal(state.read(found[name]), x) for name, x in optimizer.state_tensors().items())


@pytest.mark.parametrize("dtype", disk.DTYPES)
def test_files_are_those_of_safetensors(dtype, tmp_path):
    """Byte for byte what its own writer makes, and read back by it."""
    from safetensors.torch import load_file, save_file

    draw = torch.randint(0, 256, (40,), dtype=torch.uint8)
    draw = draw.view(torch.bool).bool() if dtype == torch.bool else draw.view(dtype)
    tensors = {"é b": draw, "a": draw[:4].reshape(2, 2), "scalar": draw[0], "none": draw[:0].reshape(0, 3)}
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor.dim() < 2 or tensor.numel() in (0, 4)}
    for metadata in (None, {"format": "pt"}):
        said = disk.write_whole(tmp_path / "ours", tensors, metadata)
        save_file(tensors, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert said == {"size": (tmp_path / "ours").stat().st_size, "sha256": disk.digest(tmp_path / "ours")}
    assert load_file(tmp_path / "ours").keys() == tensors.keys()
    mixed = tensors | {"wide": torch.ones(3, dtype=torch.float64), "z": torch.ones(3, dtype=torch.bool)}
    disk.write_whole(tmp_path / "mixed", mixed)
    found = load_file(tmp_path / "mixed")
    assert all(disk._bytes(found[name]).tobytes() == disk._bytes(mixed[name]).tobytes() for name in mixed)


def test_pieces_keep_what_is_whole(tmp_path):
    _, optimizer = optimizer_of("qwen3", ALONE)
    named = optimizer.state_tensors() | {"master.adapter": torch.ones(2)}
    save_state(tmp_path, 1, {"optimizer": named}, {}, held=optimizer.held)
    pieces = load_state(tmp_path)[1]["optimizer"]
    assert isinstance(pieces, Pieces) and pieces.whole.keys() == {"step", "master.adapter"}


class PeakMemory:
    """The most anonymous memory (bytes) of this process inside `with`, beyond what it had before; sampled."""

    def __enter__(self):
        self.before, self.most, self.ended = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.most = max(self.most, self.now() - self.before)

    def watch(self):
        while not self.ended.wait(0.0005):
            self.most = max(self.most, self.now() - self.before)

    @staticmethod
    def now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", checkpoint.Path("/proc/self/status").read_text())[1])


BIG = SHAPE | FAMILY["llama"] | {"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 4096}


def load_and_go_on(mesh: tuple, folder: str) -> None:
    distributed._keep_memory = lambda: None  # what is freed is then given back at once, and not counted
    world, slack = start(mesh), 12 * 2**20  # allocator's and Python's own
    largest = 16_000 * 1024 * 4
    with PeakMemory() as loading:
        model, _ = checkpoint.load(folder, torch.float32, world=world)
    mine = sum(p.numel() for p in parallel.own_parameters(model).values()) * 4
    optimizer = training.Optimizer(model, world)
    optimizer.step(0.0)
    keepers = distributed.keepers(world, PATIENCE_S)
    with PeakMemory() as saving:
        save_state(folder, 1, {"optimizer": optimizer.state_tensors()}, {}, None, keepers, optimizer.held)
    distributed.barrier(world)
    with PeakMemory() as resuming:
        pieces = load_state(folder, world)[1]["optimizer"]
        optimizer.load_state_tensors(pieces.local(optimizer.held))
    with PeakMemory() as writing:
        checkpoint.save(model, tokenizer(), f"{folder}/final", None, 10**9, keepers)
    found = {"loading": loading, "saving": saving, "resuming": resuming, "writing final/": writing}
    said = ", ".join(f"{name} {peak.most / 2**20:.0f}" for name, peak in found.items())
    print(f"MiB: rank {world.rank} of {mesh}: slice {mine / 2**20:.0f}, largest tensor {largest / 2**20:.0f}, {said}")
    assert loading.most <= mine + largest + slack
    assert saving.most <= slack
    assert resuming.most <= 2 * mine + largest + slack  # both moments are made anew
    assert writing.most <= largest + largest / world.size + slack
    distributed.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 2, 2)])
def test_no_process_holds_more_than_its_part_and_one_tensor(mesh, tmp_path):
    with torch.device("meta"):
        model = checkpoint.Model(ModelConfig.from_hf(BIG))
    checkpoint.save(model.to_empty(device="cpu"), tokenizer(), tmp_path)
    run_processes(load_and_go_on, count_of(mesh), mesh, str(tmp_path))


@pytest.mark.parity
def test_final_from_a_mesh_loads_in_transformers(tmp_path):
    """Written in shards by four processes of 2 x 2: the weights, and what the model computes."""
    transformers = pytest.importorskip("transformers")
    run_processes(pass_on, 4, "qwen3", (1, 2, 2), None, str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float64)
    assert (tmp_path / "final/model.safetensors.index.json").exists()
    weights = theirs.state_dict()
    for name, (_, _, shape) in layout.hf_tensors(ModelConfig.from_hf(SHAPE | FAMILY["qwen3"])).items():
        assert torch.equal(weights[name], number_of(f"master.{name}", shape)), name
    ours, _ = checkpoint.load(tmp_path / "final", torch.float64)
    ids = [3, 1, 4, 1, 5]
    torch.testing.assert_close(ours.logits([ids])[0].double(), theirs(torch.tensor([ids])).logits[0].double(),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
