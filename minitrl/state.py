"""A trainer's state on the disk, for exact resume in any layout.

    checkpoints/step_N/state.json                             JSON values; each file's size and digest
                       optimizer-00001-of-00004.safetensors   what one process holds, where weights are divided; boxes
                       rollouts.safetensors                   what is the same on all processes

Files speak of the checkpoint's tensors (model.layers.0.self_attn.q_proj.weight, behind master. or exp_avg.), of which
each holds a rectangle (layout.Box) or nothing. A rectangle that several processes hold is written by one. Whoever
reads takes from all files what they have in common with its own boxes: so a run goes on in another layout than the one
that saved it, and what one process writes is the same thing in one file. Nothing here is unpickled or executed.
"""

import json
import math
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from . import disk
from .distributed import ALONE, World, gather_json, together
from .layout import Box, Held, common, same_everywhere
from .tokenizer import read_json, write_json

FORMAT, VERSION = "minitrl state", 3  # 2 had all files' boxes in state.json: 30 MB for 70B in 512 shards


def save_state(output_dir, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int | None = None,
               world: World = ALONE, held: dict[str, Held] | None = None) -> Path:
    """Publish checkpoints/step_N: safetensors files of each entry of `tensors`, and state.json with their digests.

    Args:
        tensors: {file stem: {name: tensor of any dtype, on any device}}, e.g. {"known": ..., "optimizer": ...}.
        state: JSON values; a key that is not text comes back as text.
        keep: afterwards only this many of the newest checkpoints up to `step` remain; None keeps all.
        world: those who together hold one whole (distributed.keepers); of what is the same on all, rank 0's is written.
        held: what of the parameters this process holds, by name. A tensor with such a name, or with one behind a
            kind ("exp_avg.NAME"), is written in boxes, any other whole.

    Raises OSError naming the folder (disk full, read-only, ...); the older checkpoints are then untouched.
    """
    assert all(re.fullmatch(r"\w+", stem) for stem in tensors), f"not plain file names: {list(tensors)}"
    root = Path(output_dir) / "checkpoints"
    with disk.published(root / f"step_{step}", world) as temporary:
        with together("writing a checkpoint's files", world):
            mine = {}
            for stem, named in tensors.items():
                mine |= _write(temporary, stem, named, held or {}, world)
        files = {name: said for part in gather_json(mine, world) for name, said in part.items()}
        if world.rank == 0:
            body = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "state": state}
            body = json.loads(json.dumps(body))  # as it will be read, so that both sides digest the same text
            write_json(temporary / "state.json", {"sha256": disk.digest_of(body), **body})
    if world.rank == 0:
        if keep is not None:
            for old in [number for number in _steps(root) if number <= step][max(keep, 1):]:
                # Renamed first: killed half-way through its removal, the rest must not look like a checkpoint
                os.rename(root / f"step_{old}", root / f".step_{old}.old")
        for leftover in root.glob(".step_*"):  # these, and what earlier attempts that were killed left behind
            shutil.rmtree(leftover, ignore_errors=True)
    return root / f"step_{step}"


def _write(folder: Path, stem: str, named: dict[str, Tensor], held: dict[str, Held], world: World) -> dict[str, dict]:
    """Write what this process has to of `named`, if anything; what state.json says of the file, by its name."""
    pieces, kinds, places = {}, set(), {}
    for name, tensor in named.items():
        kind, parameter = _split(name, held)
        if parameter is None:
            if world.rank == 0:
                pieces[name] = tensor
            continue
        kinds.add(kind)
        for box in held[parameter].boxes:
            if world.tensor.rank == 0 or not same_everywhere(box.tensor):
                key = parameter.removesuffix(box.parameter) + box.tensor
                pieces[kind + key] = tensor[box.at : box.at + box.shape[0]]
                places[key] = [*box.rows, *box.columns]
    count = world.size if kinds else 1
    if world.rank >= count:
        return {}
    file = f"{stem}.safetensors" if count == 1 else f"{stem}-{world.rank + 1:05}-of-{count:05}.safetensors"
    about = {"kinds": json.dumps(sorted(kinds)), "boxes": json.dumps(places)} if kinds else None
    return {file: disk.write_whole(folder / file, pieces, about)}


def _split(name: str, held: dict[str, Held]) -> tuple[str, str | None]:
    """master.layers.0.norm.weight -> ("master.", "layers.0.norm.weight"); parameter None: not made of boxes."""
    if name in held:
        return "", name
    kind, _, parameter = name.partition(".")
    return f"{kind}.", parameter if parameter in held else None


def load_state(output_dir, world: World = ALONE) -> tuple[int, dict, dict, list[str]] | None:
    """(step, tensors, state, notes) of the newest whole checkpoint, or None where there is no checkpoint at all.

    Every file's size and digest is verified, by one process each; all come to the same end. `tensors` has for each stem
    its tensors by name, or, where they are divided, `Pieces`. `notes` has a line for each newer checkpoint that was
    passed over, with the reason, and for files that do not belong to the one chosen. Checkpoints that are all broken
    are a ValueError: a run must not start over in silence.
    """
    root, notes = Path(output_dir) / "checkpoints", []
    seen = gather_json(_steps(root), world)
    for rank, steps in enumerate(seen):
        if steps != seen[0]:
            newest, other = (max(some, default=None) for some in (seen[0], steps))
            raise ValueError(f"{root}: the newest checkpoint's step is {newest} on rank 0 and {other} on rank {rank}, "
                             f"of {len(seen[0])} and {len(steps)}; give an --output_dir that all machines share")
    for step in seen[0]:
        folder, body, error = root / f"step_{step}", None, None
        try:
            body = _verified(folder, step, world)
        except (ValueError, OSError) as broken:
            error = str(broken)
        if errors := [said for said in gather_json(error, world) if said]:
            notes.append(f"{folder} is passed over: {errors[0]}")
            continue
        strangers = sorted({path.name for path in folder.iterdir()} - {"state.json", *body["files"]})
        if strangers:
            notes.append(f"{folder} holds files that no checkpoint has, they are not read: {', '.join(strangers)}")
        return step, _tensors(folder, body["files"]), body["state"], notes
    if notes:
        raise ValueError(f"{root}: no checkpoint is whole. " + "; ".join(notes))
    return None


def _tensors(folder: Path, files: dict[str, dict]) -> dict:
    found = {}
    for name, said in files.items():
        stem, file = re.match(r"\w+", name)[0], safe_open(folder / name, framework="pt", device="cpu")
        said = said | {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
        if "boxes" in said:
            found.setdefault(stem, Pieces()).add(file, said["kinds"], said["boxes"])
        else:
            found[stem] = {key: file.get_tensor(key) for key in file.keys()}
    return found


class Pieces:
    """Tensors of which each file has a rectangle, or none. The files are mapped, not read."""

    def __init__(self):
        self.files, self.whole, self.kinds, self.boxes = [], {}, [], {}

    def add(self, file, kinds: list[str], places: dict[str, list[int]]) -> None:
        """A file, and which rows and columns of which tensors it has, of each kind; others it has whole."""
        for key, (top, bottom, left, right) in places.items():
            # `at`: which file
            self.boxes.setdefault(key, []).append(Box(key, (top, bottom), (left, right), "", len(self.files)))
        divided = {kind + key for kind in kinds for key in places}
        self.whole |= {name: file.get_tensor(name) for name in file.keys() if name not in divided}
        self.files.append(file)
        self.kinds = kinds

    def local(self, held: dict[str, Held]) -> dict:
        """By this process's own names, what it holds: tensors, and an `Unread` for each of those that are divided."""
        return self.whole | {kind + name: Unread(self, kind, name, held[name]) for kind in self.kinds for name in held}


@dataclass(frozen=True)
class Unread:
    """A parameter's tensor that is put together from files when it is called."""

    pieces: Pieces
    kind: str
    name: str
    held: Held

    @property
    def shape(self) -> torch.Size:
        """What it will have."""
        return self.held.shape

    def __call__(self) -> Tensor:
        """Read it. ValueError where the files do not have all of it."""
        made = None
        for box in self.held.boxes:
            key, lacking = self.name.removesuffix(box.parameter) + box.tensor, math.prod(box.shape)
            for piece in self.pieces.boxes.get(key, ()):
                if not (shared := common(piece, replace(box, tensor=key))):
                    continue
                file = self.pieces.files[piece.at].get_slice(self.kind + key)
                part = file[_within(shared, piece)[: len(file.get_shape())]]
                made = part.new_empty(self.shape) if made is None else made
                target = made.view(len(made), -1)[_within(shared, box, box.at)]
                target.copy_(part.view(target.shape))
                lacking -= part.numel()
            if lacking:
                raise ValueError(f"the checkpoint lacks {lacking} numbers of {self.kind}{key}")
        return torch.empty(self.shape) if made is None else made


def read(tensor: Tensor | Unread) -> Tensor:
    """A tensor of `load_state`, whatever it comes from."""
    return tensor if isinstance(tensor, Tensor) else tensor()


def _within(shared: tuple[tuple[int, int], tuple[int, int]], box: Box, at: int = 0) -> tuple[slice, slice]:
    """Rows and columns of a tensor, as they are counted in the memory of a box whose first row is `at` there."""
    (top, bottom), (left, right) = shared
    first, before = at - box.rows[0], box.columns[0]
    return slice(top + first, bottom + first), slice(left - before, right - before)


def _steps(root: Path) -> list[int]:
    """The steps that have a folder, newest first: as numbers, for step_9 is older than step_10."""
    names = [re.fullmatch(r"step_(0|[1-9]\d*)", path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _verified(folder: Path, step: int, world: World) -> dict:
    """The contents of state.json once this process's part of the files is found as it was written; else ValueError or
    OSError says why."""
    body = read_json(folder / "state.json")
    if body.get("format") != FORMAT or body.get("version") not in (2, VERSION):
        raise ValueError(f"state.json has format {body.get('format')!r} version {body.get('version')!r}, "
                         f"this is {FORMAT!r} version {VERSION}")
    if body.pop("sha256", None) != disk.digest_of(body):
        raise ValueError("state.json was changed after it was written")
    if body["step"] != step:
        raise ValueError(f"state.json is of step {body['step']}")
    for number, (name, expected) in enumerate(body["files"].items()):
        path = folder / name
        if not re.fullmatch(r"\w+(-\d{5}-of-\d{5})?\.safetensors", name):
            raise ValueError(f"state.json names {name!r}, which is no file of a checkpoint")
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes of {expected['size']}")
        if number % world.size == world.rank and disk.digest(path) != expected["sha256"]:
            raise ValueError(f"{name} was changed after it was written")
    return body
