"""Models in and out as Hugging Face folders: config.json, *.safetensors, tokenizer.json, ...

Nothing here unpickles or executes: weights are safetensors, and files of other kinds are refused by name. Whatever is
written appears whole or not at all: it is written and flushed to disk beside its final place and then renamed, so a
process killed at any moment leaves the older folder untouched.

Weights are mapped, not read: each tensor is copied from the page cache straight into its rows of our fused parameter
and cast on the way, so loading needs the model's own memory and no second copy of it.
"""

import os
import re
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import disk
from .distributed import ALONE, World, carry, gather_json, together
from .layout import Place, boxes, hf_tensors, place_of, same_everywhere
from .model import Model, ModelConfig, fill_scalar_head
from .parallel import divide, own_parameters
from .tokenizer import Tokenizer, read_json, write_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # lora.py's
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
REDUNDANT = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that old checkpoints carry; it follows from config.json


def load(source, dtype: torch.dtype = torch.float32, device="cpu", scalar_head: bool = False,
         seed: int = 0, world: World = ALONE, cpu_offload: bool = False) -> tuple[Model, Tokenizer]:
    """The model and tokenizer of a Hugging Face folder, or of a model on the Hub ("owner/name").

    With scalar_head, a reward or value model: XForSequenceClassification of one label as it is, or XForCausalLM with
    its head replaced by a fresh one, which follows from the seed alone. Without, only XForCausalLM is opened.

    Each process of `world` reads its own part alone (world.shard, world.tensor); see `divide` for what FSDP2 makes of
    `dtype` and `cpu_offload`.

    Everything is checked against config.json before memory is taken: ValueError names the file, and each tensor that
    is missing, unknown, misshapen or of a type that is not plain floating point.
    """
    folder = _locate(source)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {source}: holds an adapter alone; give --adapter {source} and its base as --model, "
                         "or merge the two (python -m minitrl.lora merge)")
    description = read_json(folder / "config.json")
    config = ModelConfig.from_hf(description)
    if config.scalar_head and not scalar_head:
        raise ValueError(f"{folder}: a reward or value model ({description['architectures'][0]}), which has no head to "
                         "predict tokens with; a language model (...ForCausalLM) is needed here")
    if "quantization_config" in description:
        raise ValueError(f"{folder / 'config.json'}: quantized weights are not supported; dequantize the model first")
    if "auto_map" in description:
        warnings.warn(f"{folder / 'config.json'}: auto_map asks for Python code from the checkpoint; it is not run, "
                      f"minitrl's own {config.model_type} decoder is used", stacklevel=2)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
                         f"but the model's vocab_size is {config.vocab_size}")
    files = _weight_files(folder)
    _check_tensors(files, config, folder)
    fresh = scalar_head and not config.scalar_head
    if fresh:
        config = replace(config, scalar_head=True)
    model = empty(config, dtype, device, world, cpu_offload)
    _fill(model, files, place_of(world))
    if fresh:
        fill_scalar_head(model, seed)
    return model, tokenizer


def empty(config: ModelConfig, dtype: torch.dtype, device="cpu", world: World = ALONE, cpu_offload=False) -> Model:
    """This process's part of a model, with parameters that nobody has filled yet."""
    with torch.device("meta"), _Uninitialised():
        model = Model(config, world.tensor)
    model.to(torch.promote_types(dtype, torch.float32) if world.shard.size > 1 else dtype)
    divide(model, world, dtype, cpu_offload)
    return model.to_empty(device="cpu" if cpu_offload else device)


def save(model: Model, tokenizer: Tokenizer, folder, dtype: torch.dtype | None = None,
         max_shard_bytes: int = 5 * 10**9, world: World = ALONE) -> None:
    """Write a Hugging Face folder that transformers, vLLM and `load` read; `dtype` None keeps the model's own.

    A folder that is there already is replaced whole, so no stale shard is left in it; where it holds anything but such
    files, ValueError. OSError names the folder if the disk fails, and an older folder of that name is still there.
    world: those who together hold one whole (distributed.keepers), who all call this. Each writes some of the files,
    and holds at most one tensor whole at a time.
    """
    assert model.adapters is None, "only the base would be written: lora.save, or lora.merge_ first"
    dtype = dtype or model.embed_tokens.weight.dtype
    config = model.config.to_hf()
    config.pop("dtype", None)  # transformers 5's name; 4 and vLLM know the old one, and all read it
    config["torch_dtype"] = str(dtype).split(".")[-1]
    if tokenizer.end_ids:
        config.setdefault("eos_token_id", tokenizer.end_ids[0])
    if model.config.scalar_head:  # transformers scores the last token that is not padding
        tokenizer = tokenizer.padded()
        padding = tokenizer.special_tokens.get("pad_token")
        config["pad_token_id"] = tokenizer.backend.token_to_id(padding) if padding else None
    refuse_strangers(folder)
    with disk.published(Path(os.path.realpath(folder)), world) as temporary:
        if world.rank == 0:
            write_json(temporary / "config.json", config)
            tokenizer.save(temporary)
        _save_weights(model, temporary, dtype, max_shard_bytes, world)


def refuse_strangers(folder) -> None:
    """ValueError where the folder holds anything but a model's files: `save`, which replaces it, would lose that."""
    folder = Path(folder)
    strangers = sorted(path.name for path in folder.iterdir() if not _is_model_file(path)) if folder.is_dir() else []
    if strangers:
        raise ValueError(f"{folder} holds other files ({', '.join(strangers[:3])}); move them, or give a new folder")


@torch.no_grad()
def fingerprint(model: Model, world: World = ALONE, dtype: torch.dtype | None = None) -> str:
    """A digest of the model's description and weights: sums over their bits, which are exact in any order.

    The same on every mesh, where all of `world` take part, and `dtype`, theirs by default, is the same.
    """
    integers, sums = {2: torch.int16, 4: torch.int32, 8: torch.int64}, {}
    for name, p in own_parameters(model).items():
        value = p.to(dtype or p.dtype)
        sums[name] = int(value.view(integers[value.element_size()]).sum(dtype=torch.int64))
    for part, names in ((world.shard, [*sums]), (world.tensor, [name for name in sums if not same_everywhere(name)])):
        everyone = gather_json(sums, part)
        for name in names:
            sums[name] = (sum(found[name] for found in everyone) + 2**63) % 2**64 - 2**63  # as int64 overflows
    return disk.digest_of({"config": model.config.to_hf(), "sums": sums})


def _locate(source) -> Path:
    """The local folder of `source`; a Hub id is downloaded into huggingface_hub's cache."""
    name = str(source)
    if name and "\0" not in name and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or ".." in name:
        raise ValueError(f"--model {name!r}: no such folder, and not a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # 0.3 s that a local folder does not pay
    try:
        # "*" matches "/" here too: sub-folders (original/, onnx/) and Mistral's second copy of its weights stay away
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                                      ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # HTTP, TLS, file and validation errors of three libraries have no common base
        raise ValueError(f"--model {name!r}: no such folder here, and the download from the Hub failed "
                         f"({type(error).__name__}: {error}); give a local folder, or check the name, the network and "
                         "HF_TOKEN") from error


def _weight_files(folder: Path) -> dict[str, list[Path]]:
    """{tensor name: the files that hold it} by the files' own headers; where there is an index, it must agree."""
    if (folder / SINGLE_FILE).is_file():
        index, paths = None, [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{folder / INDEX_FILE}: no weight_map")
        paths = [_shard(folder, name) for name in sorted(set(index.values()), key=str)]
    else:
        other = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
        hint = f"; {sorted(other)[0]} is not read, convert it to safetensors" if other else ""
        raise ValueError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")
    files: dict[str, list[Path]] = {}
    for path in paths:
        with disk.opened(path) as tensors:
            for name in tensors.keys():
                files.setdefault(name, []).append(path)
    for name, shard in (index or {}).items():
        if folder / shard not in files.get(name, []):
            raise ValueError(f"{folder / INDEX_FILE}: tensor {name} is not in {shard}")
    return files


def _shard(folder: Path, name) -> Path:
    """The path of a shard that index.json names: a plain file name, inside the folder wherever a link leads."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
        raise ValueError(f"{folder / INDEX_FILE}: {name!r} is not the name of a safetensors file in this folder")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {INDEX_FILE} lists it")
    home = folder.resolve()
    # In huggingface_hub's cache, snapshots/<commit>/ holds links into blobs/ beside it
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in homes:
        raise ValueError(f"{path}: a link that leads out of the folder")
    return path


def _check_tensors(files: dict[str, list[Path]], config: ModelConfig, folder: Path) -> None:
    """Compare the tensors with the decoder's by name, shape and type; one ValueError lists the first few."""
    expected = hf_tensors(config)
    redundant = {name for name in files if REDUNDANT.fullmatch(name)}
    if config.tie_word_embeddings:
        redundant.add("lm_head.weight")  # the embedding is the head; a copy is ignored, as transformers does
    problems = [f"missing: {name}" for name in expected if name not in files]
    problems += [f"unknown: {name}" for name in files if name not in expected and name not in redundant]
    problems += [f"in more than one file: {name}" for name, paths in files.items() if len(paths) > 1]
    for path in sorted({path for paths in files.values() for path in paths}):
        with disk.opened(path) as tensors:
            for name in tensors.keys():
                if name not in expected:
                    continue
                header, shape = tensors.get_slice(name), expected[name][2]
                if tuple(header.get_shape()) != shape:
                    problems.append(f"shape {tuple(header.get_shape())}, expected {shape}: {name}")
                if header.get_dtype() not in WEIGHT_DTYPES:
                    problems.append(f"type {header.get_dtype()}, expected one of {', '.join(WEIGHT_DTYPES)}: {name}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:5])}{more}")


class _Uninitialised(TorchFunctionMode):
    """Inside, torch.nn.init does nothing. On meta tensors it would change nothing either, but import for 1.5 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _fill(model: Model, files: dict[str, list[Path]], place: Place) -> None:
    """Copy this process's part of every tensor into its rows of our parameter.

    One file is open at a time so that its pages can go again.
    """
    mine = {box.tensor: box for box in boxes(model.config, place)}
    parameters = own_parameters(model)
    for path in sorted({path for paths in files.values() for path in paths}):
        with disk.opened(path) as tensors:
            for name in set(tensors.keys()) & set(mine):
                box, header = mine[name], tensors.get_slice(name)
                shape = header.get_shape()
                if box.shape == (shape[0], *(shape[1:] or [1])):
                    part = tensors.get_tensor(name)  # mapped: a slice is a copy
                else:
                    part = header[slice(*box.rows), slice(*box.columns)] if len(shape) > 1 else header[slice(*box.rows)]
                parameters[box.parameter][box.at : box.at + len(part)].copy_(part)


@torch.no_grad()
def divided(model: Model, dtype: torch.dtype, world: World, cpu_offload: bool = False) -> Model:
    """This process's part of a model that it holds whole; the model itself where there is nothing to divide."""
    if world.shard.size == world.tensor.size == 1:
        return model
    part = empty(model.config, dtype, world.device, world, cpu_offload)
    theirs, ours = own_parameters(model), own_parameters(part)
    whole = {box.tensor: box for box in boxes(model.config)}
    for box in boxes(model.config, place_of(world)):
        data = theirs[box.parameter][whole[box.tensor].at :][slice(*box.rows)]
        ours[box.parameter][box.at : box.at + len(data)] = data[:, slice(*box.columns)] if data.dim() > 1 else data
    return part


def _is_model_file(path: Path) -> bool:
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX_FILE,
             ADAPTER_CONFIG, ADAPTER_FILE)
    return path.name in names or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name) is not None


def _save_weights(model: Model, folder: Path, dtype: torch.dtype, max_shard_bytes: int, world: World) -> None:
    """One safetensors file, or numbered shards and their index where it would pass `max_shard_bytes`."""
    places = hf_tensors(model.config)
    shards, sizes = [[]], [0]
    for name, (_, _, shape) in places.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) > 1 and world.rank == 0:
        index = {name: file for file, names in zip(files, shards) for name in names}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    for number, (file, names) in enumerate(zip(files, shards)):  # by each process in turn
        shapes, writer = {name: (dtype, places[name][2]) for name in names}, number % world.size
        tensors = _gathered(model, shapes, writer, world)
        with together(f"writing {file}", world):
            try:
                if world.rank == writer:
                    disk.write_tensors(folder / file, shapes, tensors, {"format": "pt"})
            finally:  # not ours to write, or the disk is full: the others must not wait for us
                deque(tensors, maxlen=0)


def _gathered(model: Model, shapes: dict, writer: int, world: World) -> Iterator[Tensor | None]:
    """Tensor after tensor, in a file's order, whole and on the CPU on rank `writer`, which gets the others' boxes."""
    tensors, parameters = world.tensor.size, own_parameters(model)
    holders = {}
    for rank in range(world.size):
        place = Place(rank // tensors, world.size // tensors, rank % tensors, tensors)
        for box in boxes(model.config, place):
            if place.tensor == 0 or not same_everywhere(box.tensor):
                holders.setdefault(box.tensor, []).append((rank, box))
    for name in disk.file_order(shapes):
        dtype, shape = shapes[name]
        whole = torch.empty(shape, dtype=dtype) if world.rank == writer else None
        for rank, box in holders[name]:
            part = None  # the one before goes before this one comes
            if rank != world.rank == writer:
                part = torch.empty(box.shape, dtype=dtype)
            if rank == world.rank:
                part = parameters[box.parameter][box.at : box.at + box.shape[0]].to("cpu", dtype).contiguous()
            if rank != writer and part is not None:
                carry(part, rank, writer, world)
            if whole is not None:
                whole.view(shape[0], -1)[slice(*box.rows), slice(*box.columns)] = part.view(box.shape)
        yield whole
        del whole, part  # before the next one is made
