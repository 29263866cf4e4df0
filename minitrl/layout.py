"""Which part of a model a process holds: rectangles of the checkpoint's tensors.

A process holds slices of our parameters: those that `tensor` cuts (matrices: by heads, by rows or by columns), and of
these the rows that `shard` (FSDP2) leaves it. Ours are made of a checkpoint's tensors, several in one (q, k and v). In
terms of the checkpoint a process holds one rectangle, a `Box`, of each tensor, or none, and all that moves weights
speaks of boxes:

    loading              read my boxes from the files
    saving               write my boxes; whoever reads, in whatever layout, puts together what it needs of them
    trainer -> sampler   send each what their boxes have in common (`common`)

    dim cut by `tensor`  rows: q, k, v, gate, up and their biases; embedding and head, at multiples of token_logprob's
                         split. columns: o, down. Norms, other biases and scalar heads are whole on each.
"""

from dataclasses import dataclass

from torch import nn

from .distributed import World
from .kernels.token_logprob import cuts
from .model import Model, ModelConfig

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj")
COLUMNS = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


def hf_tensors(config: ModelConfig) -> dict[str, tuple[str, slice | None, tuple[int, ...]]]:
    """Tensor name in a Hugging Face checkpoint -> (our parameter, its rows or None for all, the tensor's shape)."""
    width, ffn, size = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    tensors = {
        "model.embed_tokens.weight": ("embed_tokens.weight", None, (config.vocab_size, width)),
        "model.norm.weight": ("norm.weight", None, (width,)),
    }
    if config.scalar_head:
        tensors["score.weight"] = ("score.weight", None, (1, width))
    elif not config.tie_word_embeddings:
        tensors["lm_head.weight"] = ("lm_head.weight", None, (config.vocab_size, width))
    projections = [  # theirs, ours, rows from, rows to, columns, bias
        ("self_attn.q_proj", "qkv_proj", 0, q, width, config.qkv_bias),
        ("self_attn.k_proj", "qkv_proj", q, q + kv, width, config.qkv_bias),
        ("self_attn.v_proj", "qkv_proj", q + kv, q + 2 * kv, width, config.qkv_bias),
        ("self_attn.o_proj", "o_proj", 0, width, q, config.o_bias),
        ("mlp.gate_proj", "gate_up_proj", 0, ffn, width, config.mlp_bias),
        ("mlp.up_proj", "gate_up_proj", ffn, 2 * ffn, width, config.mlp_bias),
        ("mlp.down_proj", "down_proj", 0, width, ffn, config.mlp_bias),
    ]
    norms = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
    head_norms = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"} if config.qk_norm else {}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        for name, parameter, start, end, columns, bias in projections:
            tensors[f"{theirs}{name}.weight"] = (f"{ours}{parameter}.weight", slice(start, end), (end - start, columns))
            if bias:
                tensors[f"{theirs}{name}.bias"] = (f"{ours}{parameter}.bias", slice(start, end), (end - start,))
        for name, parameter in (norms | head_norms).items():
            shape = (size if name in head_norms else width,)
            tensors[f"{theirs}{name}.weight"] = (f"{ours}{parameter}.weight", None, shape)
    return tensors


@dataclass(frozen=True)
class Place:
    """Where in the mesh a process stands, as far as it matters to what it holds."""

    shard: int = 0
    shards: int = 1
    tensor: int = 0
    tensors: int = 1


@dataclass(frozen=True)
class Box:
    """Rows and columns of a checkpoint's tensor, and where in this process's own parameter they lie.

    Columns of a tensor of one dimension are 0 to 1. The box fills the parameter's rows from `at` on, in full width.
    """

    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    parameter: str
    at: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class Held:
    """What of a parameter a process holds: the shape of its own tensor, and the boxes that fill it."""

    shape: tuple[int, ...]
    boxes: list[Box]


def place_of(world: World) -> Place:
    """This process's place."""
    return Place(world.shard.rank, world.shard.size, world.tensor.rank, world.tensor.size)


def boxes(config: ModelConfig, place: Place = Place()) -> list[Box]:
    """What a process at `place` holds, in the checkpoint's order; boxes without rows are left out.

    `at` counts the rows of the local parameter: of the process's shard, where there are several.
    """
    sliced, heights = [], {}
    for name, (parameter, _, shape) in hf_tensors(config).items():
        rows, columns = (0, shape[0]), (0, shape[1] if len(shape) > 1 else 1)
        cut = _cut_by(name)
        if cut == "vocabulary":
            ends = cuts(shape[0], place.tensors)
            rows = ends[place.tensor], ends[place.tensor + 1]
        elif cut == "rows":
            rows = _part(shape[0], place.tensor, place.tensors)
        elif cut == "columns":
            columns = _part(shape[1], place.tensor, place.tensors)
        sliced.append(Box(name, rows, columns, parameter, heights.get(parameter, 0)))
        heights[parameter] = heights.get(parameter, 0) + rows[1] - rows[0]
    found = []
    for box in sliced:
        chunk = -(-heights[box.parameter] // place.shards)  # FSDP2's, as torch.chunk has it
        first, last = max(box.at, place.shard * chunk), min(box.at + box.shape[0], (place.shard + 1) * chunk)
        if first < last and box.columns[0] < box.columns[1]:
            rows = box.rows[0] + first - box.at, box.rows[0] + last - box.at
            found.append(Box(box.tensor, rows, box.columns, box.parameter, first - place.shard * chunk))
    return found


def held(module: nn.Module, place: Place, shapes: dict[str, tuple[int, ...]]) -> dict[str, Held]:
    """Of each parameter in `shapes`, all of their own on this process, what it is; without those of no checkpoint.

    module: a model, or what holds several. An adapter's parameters are of no checkpoint.
    """
    found = {}
    for path, model in module.named_modules():
        if isinstance(model, Model):
            prefix = f"{path}." if path else ""
            found |= {prefix + box.parameter: [] for box in boxes(model.config)}
            for box in boxes(model.config, place):
                found[prefix + box.parameter].append(box)
    return {name: Held(tuple(shape), found[name]) for name, shape in shapes.items() if name in found}


def same_everywhere(name: str) -> bool:
    """Whether a tensor, the checkpoint's or ours, is held whole by each process of `tensor`."""
    return _cut_by(name) is None


def common(one: Box, other: Box) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(rows, columns) that two boxes share, or None."""
    if one.tensor != other.tensor:
        return None
    rows = max(one.rows[0], other.rows[0]), min(one.rows[1], other.rows[1])
    columns = max(one.columns[0], other.columns[0]), min(one.columns[1], other.columns[1])
    return (rows, columns) if rows[0] < rows[1] and columns[0] < columns[1] else None


def _cut_by(name: str) -> str | None:
    parent, _, kind = name.rpartition(".")
    module = parent.rpartition(".")[2]
    if module in VOCABULARY:
        return "vocabulary"
    if module in ROWS:
        return "rows"
    return "columns" if module in COLUMNS and kind == "weight" else None


def _part(size: int, part: int, parts: int) -> tuple[int, int]:
    assert size % parts == 0, f"{size} does not divide by {parts}: the model refuses it"
    return size * part // parts, size * (part + 1) // parts
