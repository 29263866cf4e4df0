"""The command line and --config: every type, every source, who wins, and one line for every mistake."""

import json
from dataclasses import asdict, dataclass, fields

import pytest

from minitrl.config import REPLACED, CommonOptions, comments, parse, require


@dataclass
class Options(CommonOptions):
    """A script's options."""

    reward: tuple[str, ...] = ("exact_match",)  # what scores: 100% of one, or several
    reward_weights: tuple[float, ...] | None = None  # one weight for each
    num_generations: int = 8  # completions a prompt
    learning_rate: float = 2e-5  # this script's own
    min_p: float | None = None  # least probability, of the likeliest token's

    def __post_init__(self):
        super().__post_init__()
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")


@dataclass
class Needy:
    """One option without a default."""

    path: str  # where


def error(capsys, argv, cls=Options, **more) -> str:
    """The one line that parse prints before it exits with 2."""
    with pytest.raises(SystemExit) as left:
        parse(cls, argv.split() if isinstance(argv, str) else argv, **more)
    output = capsys.readouterr()
    assert left.value.code == 2 and output.out == "" and output.err.count("\n") == 1, output
    return output.err


def test_defaults_are_the_dataclass():
    assert parse(Options, []) == Options()


def test_trl_defaults():
    """The table of TRL 1.16, for the names that both have."""
    expected = dict(
        seed=42, max_steps=-1, num_train_epochs=3.0, learning_rate=1e-6, lr_scheduler_type="linear", warmup_steps=0,
        weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0, logging_steps=10,
        save_steps=500, save_total_limit=None, eval_steps=None, gradient_checkpointing=True, report_to="none",
        log_completions=False, timeout=1800,
    )  # fmt: skip
    options = asdict(CommonOptions())
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parity
def test_trl_defaults_are_trls():
    pytest.importorskip("trl")
    from trl import GRPOConfig

    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    ours = asdict(CommonOptions())
    ours["timeout"], theirs["timeout"] = ours["timeout"], theirs["ddp_timeout"]
    # Elsewhere on purpose: a folder is always needed, and the table has as many rows as a terminal likes.
    shared = set(ours) & set(theirs) - {"output_dir", "num_completions_to_print"}
    assert len(shared) >= 19
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize(
    "argv, name, value",
    [
        ("--num_generations 4", "num_generations", 4),
        ("--num-generations 4", "num_generations", 4),
        ("--num-generations=4", "num_generations", 4),
        ("--max-steps -1", "max_steps", -1),
        ("--learning_rate 1e-6", "learning_rate", 1e-6),
        ("--learning_rate 1", "learning_rate", 1.0),
        ("--reward a b-c", "reward", ("a", "b-c")),
        ("--reward-weights 1 0.5", "reward_weights", (1.0, 0.5)),
        ("--model some-folder", "model", "some-folder"),
        ("--model none", "model", None),
        ("--min_p 0.1", "min_p", 0.1),
        ("--resume", "resume", True),
        ("--no-gradient-checkpointing", "gradient_checkpointing", False),
        ("--no_gradient_checkpointing", "gradient_checkpointing", False),
        ("--lr-scheduler-type constant_with_warmup", "lr_scheduler_type", "constant_with_warmup"),
    ],
)
def test_command_line(argv, name, value):
    config = parse(Options, argv.split())
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert {**asdict(config), name: None} == {**asdict(Options()), name: None}


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--num_generation 4", "--num_generation: no such option; did you mean --num_generations?"),
        ("--num-generation 4", "did you mean --num_generations?"),
        ("--num 4", "--num: no such option"),  # an abbreviation is no option
        ("--qqq 4", "--qqq: no such option; see --help"),
        ("--seed", "--seed: expected one argument"),
        ("--seed x", "--seed: 'x' is not a whole number"),
        ("--seed 1.5", "--seed: '1.5' is not a whole number"),
        ("--learning_rate fast", "--learning_rate: 'fast' is not a finite number"),
        ("--learning_rate nan", "--learning_rate: 'nan' is not a finite number"),
        ("--max-grad-norm inf", "--max_grad_norm: 'inf' is not a finite number"),
        ("--dtype float23", "'float23' is none of bfloat16, float32; did you mean float32?"),
        ("--seed 1 --seed 2", "--seed: given 2 times"),
        ("--reward a --reward b", "--reward: given 2 times; give it once, a list as --reward A B"),
        ("--resume --no-resume", "--resume: given 2 times"),
        ("--resume True", "'True': unexpected; --resume takes no value"),
        ("--gradient-checkpointing=False", "--no_gradient_checkpointing off"),
        ("-seed 5", "'-seed': unexpected; options start with --"),
        ("folder", "'folder': unexpected"),
        ("--num_generations 1", "--num_generations 1: must be at least 2"),
    ],
)
def test_command_line_mistakes(capsys, argv, words):
    assert words in error(capsys, argv)


@pytest.mark.parametrize(
    "argv",
    "--max_steps 0;--max_steps -2;--seed -1;--learning_rate -1;--num_train_epochs 0;--warmup_steps -1;--adam_beta1 1;"
    "--adam_beta2 -0.1;--adam_epsilon 0;--max_grad_norm -1;--tokens_per_microbatch 0;--logging_steps 0;--save_steps 0;"
    "--save_total_limit 0;--eval_steps 0;--timeout 0;--weight_decay -1;--num_completions_to_print 0".split(";"),
)
def test_values_out_of_range(capsys, argv):
    name, value = argv.split()
    line = error(capsys, argv)
    assert f"{name} " in line and "must be" in line and value in line


def test_plot_needs_a_picture_and_matplotlib(capsys, monkeypatch):
    assert "--plot curve.jpg: must be the name of a .png or .svg file" in error(capsys, "--plot curve.jpg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in error(capsys, "--plot curve.png")


def test_warm_up_that_constant_would_ignore(capsys):
    assert "constant_with_warmup" in error(capsys, "--lr_scheduler_type constant --warmup_steps 5")


@pytest.mark.parametrize("name", sorted(REPLACED))
def test_trl_options_that_moved(capsys, name):
    assert f"--{name}: not an option here; instead: {REPLACED[name]}" in error(capsys, f"--{name} 8")


def test_the_replacements_exist():
    # of the scripts, and the last of torchrun
    later = {"prompts_per_step", "examples_per_step", "num_iterations", "num_generations", "reward", "loss_type",
             "max_length", "loss_weights", "reference_cache", "nproc_per_node"}  # fmt: skip
    for name, remedy in REPLACED.items():
        named = {word.strip("-:,;()") for word in remedy.split() if word.startswith("--")}
        assert named <= {field.name for field in fields(CommonOptions)} | later, (name, named)
        assert name not in {field.name for field in fields(CommonOptions)}


def test_required(capsys):
    assert "--path: required" in error(capsys, "", cls=Needy)
    assert parse(Needy, ["--path", "x"]).path == "x"


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_file(tmp_path, suffix):
    file = tmp_path / f"run.{suffix}"
    wanted = {"num-generations": 4, "learning_rate": 1e-6, "reward": ["a", "b"], "resume": True, "eval_steps": None}
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in wanted.items())
    file.write_text(json.dumps(wanted) if suffix == "json" else text)
    config = parse(Options, ["--config", str(file), "--num_generations", "6"])
    assert config == Options(num_generations=6, learning_rate=1e-6, reward=("a", "b"), resume=True)


def test_file_as_a_run_writes_it(tmp_path):
    config = Options(reward=("a", "b"), reward_weights=(1.0, 2.0), num_generations=3, model="m")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(config)))
    assert parse(Options, ["--config", str(file)]) == config


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("learning_rate: 1e-6", "learning_rate", 1e-6),  # text to YAML, a number to anyone else
        ("learning_rate: 1", "learning_rate", 1.0),
        ("reward: a", "reward", ("a",)),
        ("reward_weights: [1, 1e-3]", "reward_weights", (1.0, 0.001)),
        ("\ufeffseed: 7", "seed", 7),
        ("model: naïve", "model", "naïve"),
        ("resume: yes", "resume", True),
        ("min_p: null", "min_p", None),
    ],
)
def test_yaml_values(tmp_path, text, name, value):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    got = getattr(parse(Options, ["--config", str(file)]), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.yaml", "num_generation: 4", "num_generation: no such option; did you mean num_generations?"),
        ("a.yaml", "bf16: true", "bf16: not an option here; instead: --dtype"),
        ("a.yaml", "num_generations: '4'", "num_generations: '4' is not a whole number"),
        ("a.yaml", "num_generations: 4.0", "num_generations: 4.0 is not a whole number"),
        ("a.yaml", "num_generations: true", "num_generations: True is not a whole number"),
        ("a.yaml", "num_generations: null", "num_generations: None is not a whole number"),
        ("a.yaml", "num_generations: [4]", "num_generations: [4] is not a whole number"),
        ("a.yaml", "learning_rate: .nan", "learning_rate: nan is not a finite number"),
        ("a.yaml", "learning_rate: true", "learning_rate: True is not a finite number"),
        ("a.yaml", "resume: 1", "resume: 1 is not true or false"),
        ("a.yaml", "model: 5", "model: 5 is not text"),
        ("a.yaml", "model: yes", "model: True is not text"),
        ("a.yaml", "reward: [a, 5]", "reward: 5 is not text"),
        ("a.yaml", "dtype: [bfloat16]", "dtype: ['bfloat16'] is none of"),
        ("a.yaml", "seed: 1\nseed: 2", "seed stands there twice"),
        ("a.yaml", "max_steps: 1\nmax-steps: 2", "max_steps stands there twice"),
        ("a.yaml", "- 1", "must be a mapping from options to values, not list"),
        ("a.yaml", "", "must be a mapping from options to values, not NoneType"),
        ("a.yaml", "seed: [1", "line 1"),
        ("a.yaml", "seed: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("a.json", '{"seed": 1, "seed": 2}', "seed stands there twice"),
        ("a.json", '{"seed": ', "line 1 column"),
        ("a.json", '{"learning_rate": NaN}', "nan is not a finite number"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.yaml", b"seed: \xff", "codec can't decode"),
        ("a.yaml", None, "No such file"),
    ],
)
def test_file_mistakes(capsys, tmp_path, name, text, words):
    file = tmp_path / name
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = error(capsys, ["--config", str(file)])
    assert f"--config {file}: " in line and words in line


def test_preset_sees_what_was_given_and_yields_to_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1")
    seen = {}

    def preset(given):
        seen.update(given)
        return {"num_generations": 4, "seed": 9, "max_steps": 30}

    config = parse(Options, ["--config", str(file), "--max-steps", "7"], preset)
    assert seen == {"seed": 1, "max_steps": 7}
    assert (config.num_generations, config.seed, config.max_steps) == (4, 1, 7)


def test_help_tells_default_and_meaning_of_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parse(Options, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and set(comments(Options)) == {field.name for field in fields(Options)}
    for name, comment in comments(Options).items():
        assert f"--{name}" in text and " ".join(comment.split()) in text, name
    assert "what scores: 100% of one, or several (default: exact_match)" in text
    assert "this script's own (default: 2e-05)" in text and "(default: 1e-06)" not in text  # a subclass's comes last


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(Options, ["--sed", "1"])
    assert capsys.readouterr().err == ""
