"""A dataclass becomes the command line: `--num_iterations 4` sets the field `num_iterations`.

The annotation is the parser, the default the default, and the comment behind a field its --help. Dashes may stand for
underscores, `--config FILE` (YAML or JSON, the same names) gives any of the options, and the command line wins over it.
Nothing is guessed: an unknown, abbreviated or repeated option, or a value of the wrong type, ends in one line and exit
status 2.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, Union, get_args, get_origin, get_type_hints

import yaml

# Options of TRL, transformers and accelerate that have another name here, or another place.
REPLACED = {
    "per_device_train_batch_size": "--prompts_per_step or --examples_per_step (in all) and --tokens_per_microbatch",
    "gradient_accumulation_steps": "--tokens_per_microbatch: a step is cut into micro-batches of that many tokens",
    "generation_batch_size": "--prompts_per_step times --num_generations",
    "steps_per_generation": "--num_iterations: every optimizer step trains on the whole generated batch",
    "per_device_eval_batch_size": "nothing: the engine batches by itself",
    "padding_free": "nothing: nothing is ever padded",
    "max_seq_length": "--max_length",
    "auto_find_batch_size": "--tokens_per_microbatch",
    "model_name_or_path": "--model",
    "dataset_name": "--dataset FILE.jsonl",
    "dataset_test_split": "--eval_dataset FILE.jsonl",
    "reward_funcs": "--reward FILE.py:FUNCTION",
    "reward_model_name_or_path": "--reward FOLDER",
    "precompute_ref_log_probs": "nothing: they always are; --reference_cache FOLDER keeps them for other runs",
    "rpo_alpha": "--loss_type sigmoid sft --loss_weights 1 ALPHA",
    "bf16": "--dtype bfloat16 (the default; master weights are float32)",
    "fp16": "--dtype bfloat16",
    "torch_dtype": "--dtype",
    "use_cpu": "--device cpu",
    "use_vllm": "nothing: minitrl generates with its own engine",
    "num_processes": "torchrun --nproc_per_node N -m ...",
    "nproc_per_node": "torchrun --nproc_per_node N -m ..., before the module's name",
    "resume_from_checkpoint": "--resume, with the same --output_dir",
    "overwrite_output_dir": "nothing: choose another --output_dir",
    "warmup_ratio": "--warmup_steps",
    "eval_strategy": "--eval_steps",
    "save_strategy": "--save_steps",
    "logging_strategy": "--logging_steps",
    "optim": "nothing: the optimizer is AdamW",
    "ddp_timeout": "--timeout",
    "deepspeed": "--shard N (as ZeRO-3), --cpu_offload, --replicate",
    "fsdp": "--shard N",
    "fsdp_config": "--shard N, --replicate M, --cpu_offload",
    "tensor_parallel_size": "--tensor N",
    "torch_compile": "nothing: blocks are not compiled; what pays is written by hand (kernels/)",
    "use_rslora": "--lora_alpha times the square root of --lora_r: rank-stabilised scaling itself is not supported",
    "use_dora": "nothing: DoRA is not supported, adapters are plain low-rank ones (--use_peft)",
    "lora_modules_to_save": "nothing: beside the adapters a scalar head is trained and saved, and nothing else",
    "lora_target_parameters": "--lora_target_modules",
    "load_in_4bit": "nothing: quantized weights are not supported",
    "load_in_8bit": "nothing: quantized weights are not supported",
    "no_cuda": "--device cpu",
}


def require(ok: bool, name: str, value, rule: str) -> None:
    """Raise the one ValueError for a bad option: `--epsilon -1: must be at least 0`."""
    if not ok:
        raise ValueError(f"--{name} {value}: must be {rule}")


@dataclass
class CommonOptions:
    """The options that every script shares. Names and defaults are TRL 1.16's where it has the option."""

    model: str | None = None  # folder with a Hugging Face checkpoint, or a Hub id; none: the built-in toy
    dataset: str | None = None  # training data, a .jsonl file; none: the built-in task
    eval_dataset: str | None = None  # held-out data, a .jsonl file
    output_dir: str = "output"  # folder for config, metrics, completions, checkpoints and the final model
    resume: bool = False  # continue the run in --output_dir from its newest whole checkpoint
    seed: int = 42  # of the data order and of every sampled token
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights in forward and backward; master weights: float32
    replicate: int | None = None  # processes that hold the same and divide the data; none: what is left
    shard: int | None = None  # processes that divide parameters, gradients and optimizer state (FSDP2), and the data
    tensor: int = 1  # processes that divide every matrix and compute one part of the data together
    cpu_offload: bool = False  # with shard: parameters, gradients, optimizer state wait in the machine's memory
    use_peft: bool = False  # train low-rank adapters (LoRA) beside the frozen model, and nothing else
    adapter: str | None = None  # folder of an adapter to start from, whose rank, alpha and targets hold; none: fresh
    lora_r: int = 16  # rank of the adapters
    lora_alpha: int = 32  # what they add is multiplied by lora_alpha / lora_r
    lora_dropout: float = 0.05  # share of their inputs that training sets to 0, and sampling never
    lora_target_modules: tuple[str, ...] = ("q_proj", "v_proj")  # projections that get one; all-linear: all seven
    timeout: float = 1800.0  # seconds that a process waits for the others before it gives up
    max_steps: int = -1  # optimizer steps in all; -1: as many as --num_train_epochs takes
    num_train_epochs: float = 3.0  # passes over the data, when --max_steps is -1
    tokens_per_microbatch: int = 4096  # tokens in one forward and backward: bounds memory, changes no result
    gradient_checkpointing: bool = True  # recompute activations in backward: less memory, about a third more time
    learning_rate: float = 1e-6  # AdamW's, at the top of the schedule
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"  # after the warm-up
    warmup_steps: int = 0  # optimizer steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's; norms and biases are spared
    adam_beta1: float = 0.9  # decay of AdamW's mean of gradients
    adam_beta2: float = 0.999  # decay of AdamW's mean of squared gradients
    adam_epsilon: float = 1e-8  # added to the root in AdamW's denominator
    max_grad_norm: float = 1.0  # gradients are scaled down to this global norm; 0: never
    logging_steps: int = 10  # steps between progress lines; metrics.jsonl has every step
    log_completions: bool = False  # print a few prompts, completions and rewards with each progress line
    num_completions_to_print: int = 5  # rows of that table
    report_to: Literal["none", "tensorboard"] = "none"  # tensorboard: event files in --output_dir too
    plot: str | None = None  # draw reward and held-out accuracy into this .png or .svg file at the end
    eval_steps: int | None = None  # steps between evaluations on --eval_dataset; none: before and after training only
    save_steps: int = 500  # steps between checkpoints; one is always written at the end
    save_total_limit: int | None = None  # checkpoints to keep, the newest; none: all

    @property
    def mesh(self) -> tuple[int | None, int | None, int]:
        """What `distributed.start` makes a mesh of."""
        return self.replicate, self.shard, self.tensor

    def __post_init__(self):
        require(self.output_dir != "", "output_dir", "''", "the name of a folder")
        require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")
        require(self.timeout > 0, "timeout", self.timeout, "above 0 seconds")
        require(self.max_steps == -1 or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or -1")
        for name in ("num_train_epochs", "adam_epsilon"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        for name in ("tokens_per_microbatch", "logging_steps", "num_completions_to_print", "save_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_steps", "save_total_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("lora_r", "lora_alpha"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")
        require(bool(self.lora_target_modules), "lora_target_modules", "", "names of projections, or all-linear")
        require(self.use_peft or self.adapter is None, "adapter", self.adapter, "given together with --use_peft")
        based = self.model is not None or not self.use_peft
        require(based, "use_peft", "on", "given together with --model: an adapter names its base")
        drawable = self.plot is None or self.plot.endswith((".png", ".svg"))
        require(drawable, "plot", self.plot, "the name of a .png or .svg file")
        can_draw = self.plot is None or importlib.util.find_spec("matplotlib")
        require(can_draw, "plot", self.plot, "left out until matplotlib is installed (pip install matplotlib)")
        warms_up = self.lr_scheduler_type != "constant" or self.warmup_steps == 0
        require(warms_up, "warmup_steps", self.warmup_steps, "0 with --lr_scheduler_type constant, or choose "
                "constant_with_warmup")  # transformers ignores the warm-up here without a word

    def check_mesh(self, world) -> None:
        """ValueError for what cannot be done on this mesh, once it is known."""
        self.must(not (self.use_peft and world.divides), "use_peft", "off with --shard or --tensor above 1")
        self.must(world.shard.size > 1 or not self.cpu_offload, "cpu_offload", "off without --shard above 1")

    def must(self, hold: bool, name: str, rule: str) -> None:
        """`require` for one of these options."""
        require(hold, name, getattr(self, name), rule)

    def check_data(self) -> None:
        """ValueError unless model and data are given together, or neither: the embedded default has its own."""
        for given, other in (("model", "dataset"), ("dataset", "model")):
            both = getattr(self, given) is None or getattr(self, other) is not None
            self.must(both, given, f"given together with --{other}; without both, the embedded default runs")
        if self.model is None:
            own = "left out without --model: the embedded default has its own"
            self.must(self.eval_dataset is None, "eval_dataset", own)
            self.must(self.dtype == "float32", "dtype", "float32 without --model: the embedded default is")
        evaluates = self.model is None or self.eval_dataset is not None
        self.must(evaluates or not self.eval_steps, "eval_steps", "given with --eval_dataset")


def parse(cls, argv: list[str] | None = None, preset: Callable[[dict], dict] | None = None):
    """Fill the dataclass `cls`: its defaults, under the preset, under --config, under the command line.

    `preset` gets what the user gave (name -> value) and returns defaults to put in place of the dataclass's own: how
    a script starts from other values when, say, no model was named. On bad input prints one line and exits with 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        given = _from_command_line(cls, argv)
        file = given.pop("config", None)
        if file is not None:
            given = {**_from_file(cls, file), **given}
        values = {**(preset(given) if preset else {}), **given}
        for field in dataclasses.fields(cls):
            if field.name not in values and _default(field) is dataclasses.MISSING:
                raise ValueError(f"--{field.name}: required")
        return cls(**values)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # one line, not one from each process
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class _Parser(argparse.ArgumentParser):
    """An argparse that raises instead of printing the whole usage."""

    def error(self, message):
        raise ValueError(re.sub(r"^argument (--\w+).*?: ", r"\1: ", message))


class _Switch(argparse.Action):
    """`--resume` and `--no_resume`."""

    def __init__(self, option_strings, dest, help=None, **_):
        name = option_strings[0][2:]
        super().__init__([f"--{name}", f"--no_{name}"], dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _from_command_line(cls, argv: list[str]) -> dict:
    """What the command line gives, by field name; --help prints and exits."""
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--option value ...]",
        description=inspect.getdoc(cls),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that what comes back is what was given
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these options")
    helps = comments(cls)
    for field in dataclasses.fields(cls):
        kind, optional, many = _kind(cls, field.name)
        default = _default(field)
        default = "required" if default is dataclasses.MISSING else f"default: {_shown(default)}"
        how = {"help": f"{helps.get(field.name, '')} ({default})".replace("%", "%%")}
        if kind is bool:
            how["action"] = _Switch
        else:
            how["type"] = lambda text, name=field.name: _value(cls, name, text, text=True)
            literal = get_origin(kind) is Literal
            how["metavar"] = "|".join(get_args(kind)) if literal else kind.__name__.upper()
        if many:
            how["nargs"] = "+"
        parser.add_argument(f"--{field.name}", **how)

    # Dashes and underscores are the same in an option's name, never in its value.
    argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    options = [word.partition("=")[0] for word in argv if word.startswith("--")]
    actions = {option: action for action in parser._actions for option in action.option_strings if len(option) > 2}
    for word, option in zip((word for word in argv if word.startswith("--")), options):
        if option not in actions:
            raise ValueError(_unknown(option[2:], [name[2:] for name in actions], "--"))
        if isinstance(actions[option], _Switch) and "=" in word:
            raise ValueError(_no_value(option))
    bare = [re.sub("^no_", "", option[2:]) for option in options]
    for name in bare:
        if bare.count(name) > 1:
            raise ValueError(f"--{name}: given {bare.count(name)} times; give it once, a list as --{name} A B")

    values, left = parser.parse_known_args(argv)
    if left:
        before = argv[argv.index(left[0]) - 1] if argv.index(left[0]) else ""
        switch = isinstance(actions.get(before), _Switch)
        raise ValueError(f"{left[0]!r}: unexpected; {_no_value(before) if switch else 'options start with --'}")
    given = vars(values)
    for field in dataclasses.fields(cls):
        if isinstance(given.get(field.name), list):
            given[field.name] = tuple(given[field.name])
    return given


def _from_file(cls, file: str) -> dict:
    """What a YAML or JSON file gives, by field name, checked against the annotations."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        if file.endswith(".json"):
            content = json.loads(text, object_pairs_hook=_no_duplicates)
        else:
            content = yaml.load(text, Loader=_Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {file}: must be a mapping from options to values, not {type(content).__name__}")
    names = [field.name for field in dataclasses.fields(cls)]
    given = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise ValueError(f"--config {file}: {_unknown(name, names, '')}")
        if name in given:
            raise ValueError(f"--config {file}: {name} stands there twice")
        try:
            given[name] = _value(cls, name, value)
        except ValueError as error:
            raise ValueError(f"--config {file}: {name}: {error}") from None
    return given


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice instead of dropping the first."""

    def construct_mapping(self, node, deep=False):
        _no_duplicates([(key.value if isinstance(key.value, str) else key, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _no_duplicates(pairs: list) -> dict:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return seen


def _value(cls, name: str, value, text: bool = False):
    """Turn a command line's text, or a file's value, into the field's type, or raise ValueError.

    A tuple's elements come one by one from the command line, and as a list, or one bare value, from a file.
    """
    kind, optional, many = _kind(cls, name)
    if optional and (value is None or (text and value in ("none", "None"))):
        return None
    if many and not text:
        return tuple(_scalar(kind, item, text) for item in (value if isinstance(value, list) else [value]))
    try:
        return _scalar(kind, value, text)
    except ValueError as error:
        # argparse shows the text of this exception alone, and its own words for a ValueError.
        raise argparse.ArgumentTypeError(str(error)) if text else error


def _scalar(kind, value, text: bool):
    """One value of the type `kind`, from a command line's text or as a file gave it."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is none of {', '.join(get_args(kind))}{_nearest(value, get_args(kind))}")
        return value
    # YAML reads 1e-6 as text (it wants 1.0e-6), so a float may be text in a file; nothing else may.
    accepted = {int: int, float: (str, int, float), str: str, bool: bool}[kind]
    if isinstance(value, str if text else accepted) and (kind is bool) == isinstance(value, bool):
        try:
            result = kind(value)
            if kind is not float or math.isfinite(result):
                return result
        except (ValueError, OverflowError):
            pass
    wanted = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}[kind]
    raise ValueError(f"{value!r} is not {wanted}")


def _kind(cls, name: str) -> tuple[type, bool, bool]:
    """Of a field annotated `int`, `str | None` or `tuple[str, ...]`: (type of one value, may be None, may be many)."""
    kind = get_type_hints(cls)[name]
    optional = get_origin(kind) in (types.UnionType, Union)
    if optional:
        kind = next(part for part in get_args(kind) if part is not type(None))
    many = get_origin(kind) is tuple
    return get_args(kind)[0] if many else kind, optional, many


def comments(cls) -> dict[str, str]:
    """The comment behind each field, from the source of the class and of those that it extends."""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))


def _default(field: dataclasses.Field):
    """The field's default; dataclasses.MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    words = {"None": "none", "True": "on", "False": "off"}
    return words.get(str(value), str(value))


def _no_value(switch: str) -> str:
    name = re.sub("^--(no_)?", "", switch)
    return f"--{name} takes no value: --{name} turns it on, --no_{name} off"


def _unknown(name: str, known: list[str], dashes: str) -> str:
    if name in REPLACED:
        return f"{dashes}{name}: not an option here; instead: {REPLACED[name]}"
    return f"{dashes}{name}: no such option{_nearest(name, known, dashes)}"


def _nearest(name, known, dashes: str = "") -> str:
    """`; did you mean ...?` where something known is close to the name."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {dashes}{close[0]}?" if close else "; see --help" if dashes else ""
