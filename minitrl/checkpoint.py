"""Models in and out as Hugging Face folders, and a trainer's state for exact resume.

    load / save               a model and its tokenizer <-> config.json, *.safetensors, tokenizer.json, ...
    save_state / load_state   everything a run needs to go on to the bit <-> checkpoints/step_N/

Nothing here unpickles or executes: weights and state are safetensors and JSON, and files of other kinds are refused by
name. Whatever is written appears whole or not at all: it is written and flushed to disk beside its final place and then
renamed, so a process killed at any moment leaves the older checkpoint untouched.

Weights are mapped, not read: each tensor is copied from the page cache straight into its rows of our fused parameter
and cast on the way, so loading needs the model's own memory and no second copy of it.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .distributed import ALONE, World, divide, gather_json, local
from .layout import Place, boxes, hf_tensors, place_of, same_everywhere
from .model import Model, ModelConfig, fill_scalar_head
from .tokenizer import Tokenizer, read_json, write_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # lora.py's
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
REDUNDANT = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that old checkpoints carry; it follows from config.json
STATE_FORMAT, STATE_VERSION = "minitrl state", 1


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
         max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a Hugging Face folder that transformers, vLLM and `load` read; `dtype` None keeps the model's own.

    A folder that is there already is replaced whole, so no stale shard is left in it; where it holds anything but such
    files, ValueError. OSError names the folder if the disk fails, and an older folder of that name is still there.
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
    with published(Path(os.path.realpath(folder))) as temporary:
        write_json(temporary / "config.json", config)
        tokenizer.save(temporary)
        _save_weights(model, temporary, dtype, max_shard_bytes)


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
    for name, p in model.named_parameters():
        value = local(p).to(dtype or p.dtype)
        sums[name] = int(value.view(integers[value.element_size()]).sum(dtype=torch.int64))
    for part, names in ((world.shard, [*sums]), (world.tensor, [name for name in sums if not same_everywhere(name)])):
        everyone = gather_json(sums, part)
        for name in names:
            sums[name] = (sum(found[name] for found in everyone) + 2**63) % 2**64 - 2**63  # as int64 overflows
    return _digest_of({"config": model.config.to_hf(), "sums": sums})


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
        with opened(path) as tensors:
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


@contextmanager
def opened(path: Path):
    """A safetensors file, mapped; a broken one is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


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
        with opened(path) as tensors:
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
    parameters = {name: local(p) for name, p in model.named_parameters()}
    for path in sorted({path for paths in files.values() for path in paths}):
        with opened(path) as tensors:
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
    theirs, ours = dict(model.named_parameters()), {name: local(p) for name, p in part.named_parameters()}
    whole = {box.tensor: box for box in boxes(model.config)}
    for box in boxes(model.config, place_of(world)):
        data = theirs[box.parameter][whole[box.tensor].at :][slice(*box.rows)]
        ours[box.parameter][box.at : box.at + len(data)] = data[:, slice(*box.columns)] if data.dim() > 1 else data
    return part


def _is_model_file(path: Path) -> bool:
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX_FILE,
             ADAPTER_CONFIG, ADAPTER_FILE)
    return path.name in names or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name) is not None


def _save_weights(model: Model, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """One safetensors file, or numbered shards and their index where it would pass `max_shard_bytes`."""
    places, parameters = hf_tensors(model.config), dict(model.named_parameters())
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
        index = {name: file for file, names in zip(files, shards) for name in names}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    for file, names in zip(files, shards):  # cast shard by shard: at most one is held beside the model
        tensors = {}
        for name in names:
            parameter, rows, _ = places[name]
            tensors[name] = parameters[parameter].detach()[rows or slice(None)].to("cpu", dtype).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})


@contextmanager
def published(folder: Path):
    """Yield a temporary folder beside `folder`, which takes its place by a rename once all of it is on the disk.

    Whatever fails, the temporary folder is removed and OSError names `folder`, which still holds what it held before.
    """
    temporary, retired = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # what an attempt that was killed left behind
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            os.chmod(path, temporary.stat().st_mode & 0o666)  # safetensors makes its files 0600, whatever the umask
            _flush(path)
        _flush(temporary)
        # A folder cannot be renamed onto one that is not empty. Killed between the two renames, the older one is
        # still there as .NAME.old; a step's folder is replaced only where it is written a second time
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
            os.rename(folder, retired)
        try:
            os.rename(temporary, folder)
        except OSError:
            if retired.exists():
                os.rename(retired, folder)
            raise
        _flush(folder.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"cannot save {folder}: {error}; what was saved before is untouched") from error
        raise


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk: a rename must not overtake what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(output_dir, step: int, tensors: dict[str, dict[str, Tensor]], state: dict,
               keep: int | None = None) -> Path:
    """Publish checkpoints/step_N: one safetensors file per entry of `tensors`, and state.json with their digests.

    Args:
        tensors: {file stem: {name: tensor of any dtype, on any device}}, e.g. {"model": ..., "optimizer": ...}.
        state: JSON values; a key that is not text comes back as text.
        keep: afterwards only this many of the newest checkpoints up to `step` remain; None keeps all.

    Raises OSError naming the folder (disk full, read-only, ...); the older checkpoints are then untouched.
    """
    assert all(re.fullmatch(r"\w+", stem) for stem in tensors), f"not plain file names: {list(tensors)}"
    root = Path(output_dir) / "checkpoints"
    with published(root / f"step_{step}") as temporary:
        files = {}
        for stem, named in tensors.items():
            path = temporary / f"{stem}.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, path)
            files[path.name] = {"size": path.stat().st_size, "sha256": digest(path)}
        body = {"format": STATE_FORMAT, "version": STATE_VERSION, "step": step, "files": files, "state": state}
        body = json.loads(json.dumps(body))  # as it will be read, so that both sides digest the same text
        write_json(temporary / "state.json", {"sha256": _digest_of(body), **body})
    if keep is not None:
        for old in [number for number in _steps(root) if number <= step][max(keep, 1):]:
            # Renamed first: killed half-way through its removal, the rest must not look like a checkpoint
            os.rename(root / f"step_{old}", root / f".step_{old}.old")
    for leftover in root.glob(".step_*"):  # these, and what earlier attempts that were killed left behind
        shutil.rmtree(leftover, ignore_errors=True)
    return root / f"step_{step}"


def load_state(output_dir) -> tuple[int, dict[str, dict[str, Tensor]], dict, list[str]] | None:
    """(step, tensors, state, notes) of the newest whole checkpoint, or None where there is no checkpoint at all.

    Every file's size and digest is verified. `notes` has a line for each newer checkpoint that was passed over, with
    the reason, and for files that do not belong to the one chosen. Checkpoints that are all broken are a ValueError:
    a run must not start over in silence.
    """
    root, notes = Path(output_dir) / "checkpoints", []
    for step in _steps(root):
        folder = root / f"step_{step}"
        try:
            body = _verified(folder, step)
        except (ValueError, OSError) as error:
            notes.append(f"{folder} is passed over: {error}")
            continue
        strangers = sorted({path.name for path in folder.iterdir()} - {"state.json", *body["files"]})
        if strangers:
            notes.append(f"{folder} holds files that no checkpoint has, they are not read: {', '.join(strangers)}")
        tensors = {}
        for name in body["files"]:
            with opened(folder / name) as file:
                tensors[name.removesuffix(".safetensors")] = {key: file.get_tensor(key) for key in file.keys()}
        return step, tensors, body["state"], notes
    if notes:
        raise ValueError(f"{root}: no checkpoint is whole. " + "; ".join(notes))
    return None


def _steps(root: Path) -> list[int]:
    """The steps that have a folder, newest first: as numbers, for step_9 is older than step_10."""
    names = [re.fullmatch(r"step_(0|[1-9]\d*)", path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _verified(folder: Path, step: int) -> dict:
    """The contents of state.json once every file is found as it was written; else ValueError or OSError says why."""
    body = read_json(folder / "state.json")
    if body.get("format") != STATE_FORMAT or body.get("version") != STATE_VERSION:
        raise ValueError(f"state.json has format {body.get('format')!r} version {body.get('version')!r}, "
                         f"this is {STATE_FORMAT!r} version {STATE_VERSION}")
    if body.pop("sha256", None) != _digest_of(body):
        raise ValueError("state.json was changed after it was written")
    if body["step"] != step:
        raise ValueError(f"state.json is of step {body['step']}")
    for name, expected in body["files"].items():
        path = folder / name
        if not re.fullmatch(r"\w+\.safetensors", name):
            raise ValueError(f"state.json names {name!r}, which is no file of a checkpoint")
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes of {expected['size']}")
        if digest(path) != expected["sha256"]:
            raise ValueError(f"{name} was changed after it was written")
    return body


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
