"""The rules of the house, read off the source: who imports whom, how long files are, and what may not stand in them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "minitrl").glob("*.py"), *(ROOT / "kernels").glob("*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Imports run one way. Left: a module; right: what of minitrl it may import. No algorithm imports another.
LIBRARY = set(
    "ahead experience training runs console rollout lockstep sampling rollout_client transfer losses rewards data "
    "packing pairs checkpoint disk state layout parallel lora model tokenizer distributed config kernels web remote "
    "vllm".split()
)
SCRIPTS = set("grpo sft dpo ppo reward server plan chat evaluate".split())
ARROWS = {
    "experience": set(
        "rollout rollout_client sampling rewards packing parallel distributed config data checkpoint state lora training toy".split()
    ),
    "ahead": {"experience", "data", "training"},
    "training": {"parallel", "distributed", "layout", "state", "checkpoint", "packing", "runs", "data", "lora"},
    "runs": {"distributed", "checkpoint", "state", "console"},
    "pairs": {"config", "data", "distributed", "packing"},
    "toy": {"model", "tokenizer", "training", "losses", "packing", "distributed", "data"},
    "rollout": {"sampling", "distributed", "model", "packing", "tokenizer", "kernels"},
    "parallel": {"distributed"},
    "lockstep": {"rollout", "sampling", "distributed", "transfer"},
    "layout": {"model", "distributed", "kernels"},
    "checkpoint": {"parallel", "model", "tokenizer", "layout", "distributed", "disk"},
    "disk": {"distributed"},
    "state": {"disk", "distributed", "layout", "tokenizer"},
    "rewards": {"model", "disk", "checkpoint", "tokenizer", "pairs", "packing"},
    "lora": {"parallel", "model", "layout", "disk", "checkpoint", "tokenizer", "config", "runs", "distributed"},
    "rollout_client": {"remote", "vllm", "rollout", "transfer", "packing", "distributed", "lora", "model"},
    "remote": {"transfer", "data", "distributed", "lora"},
    "vllm": {"remote", "transfer", "layout", "web"},
    "transfer": {"parallel", "distributed", "layout"},
    "web": {"data"},
    "model": {"parallel", "distributed", "kernels", "packing"},
    "losses": {"kernels"},
    **{script: LIBRARY for script in SCRIPTS},
    **{script: LIBRARY | {"toy"} for script in ("grpo", "sft", "reward", "dpo", "ppo", "server")},
    "plan": LIBRARY | {"grpo"},  # whose step it runs
}

# What else may be imported: at the top of a file, or only inside the function that needs it.
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "jinja2", "tqdm", "yaml", "huggingface_hub"}
LATE = PACKAGES | {"triton", "matplotlib"}

KERNELS = {path.stem for path in FILES if path.parent.name == "kernels"}
LONGER = {"attention.py": 700, "attention_triton.py": 700, "rollout.py": 700, "server.py": 700}


def imports(tree: ast.AST):
    """(absolute or relative module path, the names taken from it, the node) of every import in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names], node


def inner(module: str, names: list[str]) -> list[str]:
    """Which of our own modules an import names: `from . import runs` -> runs, `minitrl.kernels.decode` -> kernels."""
    path = module.lstrip(".") if module.startswith(".") else module.removeprefix("minitrl").lstrip(".")
    return [path.split(".")[0]] if path else names


def is_ours(module: str) -> bool:
    return module.startswith(".") or module.split(".")[0] == "minitrl"


def at_import(tree: ast.Module) -> set[ast.AST]:
    """The nodes that run when the module is imported: all but those inside functions."""
    nodes, stack = set(), [tree]
    while stack:
        node = stack.pop()
        nodes.add(node)
        stack += [child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.FunctionDef, ast.Lambda))]
    return nodes


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows(path):
    allowed = ARROWS.get(path.stem, set()) if path.parent.name == "minitrl" else KERNELS  # kernels: each other
    for module, names, node in imports(TREES[path]):
        if is_ours(module):
            for name in inner(module, names):
                assert name in allowed, f"{path.name}:{node.lineno}: {path.stem} -> {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packages(path):
    """Only the run-time packages, and triton never when a module is imported, a Mac has none: but for <op>_triton.py,
    which is itself imported only by a function that is about to run its kernels."""
    early = at_import(TREES[path])
    triton_half = path.stem.endswith("_triton")
    for module, _, node in imports(TREES[path]):
        top = module.split(".")[0]
        if is_ours(module) or top in sys.stdlib_module_names:
            continue
        allowed = PACKAGES if node in early and not triton_half else LATE
        if path.parent.name == "kernels":
            allowed = allowed & {"torch", "triton"}
        assert top in allowed, f"{path.name}:{node.lineno}: imports {module}"


def test_the_arrows_have_no_circle():
    def reach(name, above=()):
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        for other in ARROWS.get(name, ()):
            if name not in SCRIPTS:
                reach(other, (*above, name))

    for name in ARROWS:
        reach(name)
        assert ARROWS[name] & SCRIPTS == ({"grpo"} if name == "plan" else set()), f"{name} imports a script"


def offences(tree: ast.AST):
    """Ways to run what came from a file or the network, or to unpickle it."""
    pickles = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    # torch's object collectives pickle, and so does numpy.load with allow_pickle.
    attributes = {"torch.load", "torch.save", "os.system", "os.popen", "pickle_module", "load_module"}
    collectives = set("all_gather_object gather_object broadcast_object_list scatter_object_list".split())
    for module, names, node in imports(tree):
        if module.split(".")[0] in pickles or (module == "torch" and {"load", "save"} & set(names)):
            yield node, f"imports {module}"
        if collectives & set(names):
            yield node, "object collective"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"eval", "exec", "__import__"}:
                yield node, node.func.id
        if isinstance(node, ast.Attribute):
            if ast.unparse(node) in attributes or node.attr in collectives:
                yield node, ast.unparse(node)
        if isinstance(node, ast.keyword) and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            if node.arg in {"shell", "allow_pickle"}:
                yield node.value, f"{node.arg}="


def test_nothing_is_unpickled_or_executed():
    found = [f"{path.name}:{node.lineno}: {what}" for path, tree in TREES.items() for node, what in offences(tree)]
    assert not found, found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "torch.load(x)", "from torch import load",
        "eval('1')", "exec(x)", "subprocess.run(x, shell=True)", "subprocess.run(x, shell=flag)", "os.system(x)",
        "numpy.load(x, allow_pickle=True)", "dist.all_gather_object(a, b)",
        "from torch.distributed import gather_object", "def f():\n    torch.save(a, b)",
    ],
)  # fmt: skip
def test_the_search_finds(line):
    assert list(offences(ast.parse(line)))


def test_the_search_spares():
    clean = "model.eval()\nsubprocess.run(x, shell=False)\nsafetensors.torch.load_file(x)\nloader.exec_module(m)"
    assert not list(offences(ast.parse(clean)))


def test_sizes():
    """Readable in an afternoon."""
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in FILES}
    long = {path.name: len(text) for path, text in lines.items() if len(text) > LONGER.get(path.name, 500)}
    wide = [f"{path.name}:{i}" for path, text in lines.items() for i, line in enumerate(text, 1) if len(line) > 120]
    assert not long, long
    assert not wide, wide
    assert sum(map(len, lines.values())) <= 14_200


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_the_loop_is_on_the_third_screen(script):
    """The loop over steps, `for step in ...` or `while step < ...`, stands within the first 150 lines."""
    tree = TREES[ROOT / "minitrl" / f"{script}.py"]
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    heads = {node: ast.unparse(node.target if isinstance(node, ast.For) else node.test) for node in loops}
    steps = [node for node, head in heads.items() if "step" in head and len(list(ast.walk(node))) > 100]
    assert steps and min(node.end_lineno for node in steps) <= 150


def test_every_file_says_what_it_is():
    assert [path.name for path, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_importing_everything_needs_no_triton_and_no_peer():
    """Import each module where triton and the peers cannot be had, and `minitrl` itself without even torch."""
    names = [f"minitrl.{path.stem}" for path in FILES if path.parent.name == "minitrl" and path.stem != "__init__"]
    names += [f"minitrl.kernels.{name}" for name in KERNELS if not name.endswith("_triton")]
    script = f"""
import sys, importlib
import minitrl
assert "torch" not in sys.modules and "numpy" not in sys.modules
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "trl", "vllm", "liger_kernel", "matplotlib", "tensorboard"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
for name in {names}:
    importlib.import_module(name)
assert minitrl.losses and minitrl.packing and minitrl.load and minitrl.save and minitrl.Engine
try:
    minitrl.lode
except AttributeError as error:
    assert "load" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_top_level_package_called_kernels():
    """Hugging Face's package of that name must stay visible, so our folder is no package."""
    assert not (ROOT / "kernels" / "__init__.py").exists() and (ROOT / "kernels" / "decode.py").exists()
