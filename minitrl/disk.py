"""Files that are whole or not there: safetensors, written as a stream, and folders that appear by a rename.

What is written lies beside its final place until all of it is on the disk, so a process killed at any moment leaves the
older folder untouched. A folder may be the work of many processes, one file each: `published` has all of them meet.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .distributed import ALONE, World, together

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@contextmanager
def opened(path: Path):
    """A safetensors file, mapped; a broken one is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def file_order(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The order of tensors in a file: by size of their numbers, that each is aligned, then by name."""
    return sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))


def write_tensors(path: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor],
                  metadata: dict[str, str] | None = None) -> dict:
    """Write a safetensors file and wait until it is on the disk; returns its {"size": bytes, "sha256": ...}.

    shapes: {name: (dtype, shape)}.  tensors: their values in `file_order`, on any device; one is held at a time.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in file_order(shapes):
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sums = hashlib.sha256()
    with open(path, "wb") as file:
        for part in chain([len(text).to_bytes(8, "little"), text], map(_bytes, tensors)):
            file.write(part)
            sums.update(part)
            del part  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
        assert file.tell() == 8 + len(text) + end, f"{path}: the tensors are not those of the header"
        return {"size": file.tell(), "sha256": sums.hexdigest()}


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict:
    """The same of tensors that are all at hand."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, shapes, (tensors[name] for name in file_order(shapes)), metadata)


def _bytes(tensor: Tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


@contextmanager
def published(folder: Path, world: World = ALONE):
    """Yield a temporary folder beside `folder`, which takes its place by a rename once all of it is on the disk.

    All processes of `world` enter and leave, and may write into it; rank 0 makes and renames it. Whatever fails on any
    of them, it is removed and OSError names `folder`, which still holds what it held before.
    """
    temporary, retired = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    lead = world.rank == 0
    try:
        with together(f"making {temporary}", world):
            if lead:
                folder.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)  # what an attempt that was killed left behind
                temporary.mkdir()
        with together(f"writing {temporary}", world):
            yield temporary
        with together(f"publishing {folder}", world):
            if lead:
                _publish(temporary, folder, retired)
    except BaseException as error:
        if lead:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot save {folder}: {error}; what was saved before is untouched") from error
        raise


def _publish(temporary: Path, folder: Path, retired: Path) -> None:
    for path in temporary.iterdir():
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


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk: a rename must not overtake what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    sums = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sums.update(block)
    return sums.hexdigest()


def digest_of(body) -> str:
    """sha256 of what JSON has of a value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
