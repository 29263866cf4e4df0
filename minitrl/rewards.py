"""Rewards are plain functions. What they return is checked, because a wrong reward trains as smoothly as a right one.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

Lists of N, one entry a sample. Prompts and completions are texts; where the prompt is a conversation, its completion is
[{"role": "assistant", "content": text}], as in TRL. The columns of the data set come by name, and `step` and
`first_index` (the place of the first of these samples among all that the step samples, on every rank). A function takes
those it names; with **columns it takes them all. None means that it does not apply to a sample. It may be `async`, and
runs in a thread. A reward model's folder, which reward.py or transformers wrote, is one too: see `RewardModel`.
"""

import asyncio
import copy
import difflib
import faulthandler
import hashlib
import importlib.util
import inspect
import math
import numbers
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, disk, packing, pairs
from .model import ModelConfig, context_length
from .tokenizer import read_json

Reward = Callable[..., Any]
GIVEN = ("prompts", "completions", "completion_ids", "step", "first_index")  # what every reward function may ask for

ALARM = (
    "; rewards run in a thread, where signal.alarm cannot be had: limit the time with --reward_timeout, or run what "
    "may hang in a subprocess with a timeout"
)
FLOAT32_MAX = torch.finfo(torch.float32).max

# A minus is a sign only where no operand stands before it: the last number of "7-3" is 3. Digits come in groups of
# three ("1,234"), plain, or after a bare point. An exponent belongs to the number, or "2e18" would count as 18. [0-9]
# and not \d, which takes the digits of every script.
NUMBER = re.compile(
    r"((?<![\w).])[-\u2212])?\$?"
    r"((?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
)


def number(completions: list, answer: list) -> list[float | None]:
    """1 where the last number in the completion equals the last in the column `answer` ("#### 18", "18", 18), else 0.

    Compared as numbers: 18 = 18.0 = 1.8e1, and 1,234 = 1234. Fractions and units are not read. A row without an answer
    gets None.
    """
    return [_equal_number(_text(c), a) for c, a in zip(completions, answer, strict=True)]


def exact(completions: list, answer: list) -> list[float | None]:
    """1 where the completion, without blanks around it, is the column `answer`, else 0. Without answer: None."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(_text(c).strip() == str(a).strip()) for c, a in pairs]


def random(completions: list, step: int, first_index: int) -> list[float]:
    """The control arm: 0 or 1 by a coin that depends on (step, place in the step) and on nothing in the text.

    Whatever rises under this reward was not learnt from the reward ("Spurious Rewards", arXiv 2506.10947).
    """
    places = range(first_index, first_index + len(completions))
    return [float(hashlib.sha256(f"{step} {place}".encode()).digest()[0] & 1) for place in places]


BUILT_IN: dict[str, Reward] = {"number": number, "exact": exact, "random": random}


class RewardModel:
    """A reward model's folder as a reward: the scalar head's value at each completion's last token.

    The ids that are scored are those of the prompt and those that were sampled, where the model has the policy's own
    tokenizer; else the texts, as its own tokenizer and chat template write them.
    """

    capacity = 8192  # tokens in a forward pass; prompts stand once in front of their completions

    def __init__(self, folder: str):
        self.folder, self.model = folder, None
        if (Path(folder) / checkpoint.ADAPTER_CONFIG).is_file():
            raise ValueError("an adapter's folder; merge it into its base: python -m minitrl.lora merge")
        description = read_json(Path(folder) / "config.json")
        if not ModelConfig.from_hf(description).scalar_head:
            raise ValueError("a language model's folder; a reward model's (...ForSequenceClassification) is needed, as "
                             "minitrl.reward writes it")
        self.dtype = description.get("torch_dtype") or description.get("dtype")

    def open(self, policy_tokenizer, device, log=print) -> None:
        """Load the weights onto a device, bfloat16 ones as they are, others in float32."""
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        self.model, self.tokenizer = checkpoint.load(self.folder, dtype, device, scalar_head=True)
        self.policy_tokenizer, self.tokenizer.now = policy_tokenizer, policy_tokenizer.now
        self.same = self.tokenizer.fingerprint() == policy_tokenizer.fingerprint()
        if not self.same:
            log(f"--reward {self.folder}: its tokenizer or chat template is not the policy's; it reads texts, not ids")

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]]) -> list[float]:
        """The completions' scores."""
        device, groups, previous = self.model.embed_tokens.weight.device, [], None
        for i, prompt in enumerate(prompts):
            prompt_ids, ids = self._ids(prompt, completions[i], completion_ids[i])
            if prompt_ids != previous:
                groups.append((prompt_ids, [], []))
                previous = prompt_ids
            groups[-1][1].append(ids)
            groups[-1][2].append(i)
        lengths = [len(prompt_ids) for prompt_ids, _, _ in groups], [[len(ids) for ids in group[1]] for group in groups]
        longest = max(n + max(answers) for n, answers in zip(*lengths))
        if longest > (room := context_length(self.model.config)):
            raise ValueError(f"a prompt and its completion have {longest} tokens, the reward model {room} positions")
        scores = [0.0] * len(prompts)
        for batch in packing.plan_micro_batches(*lengths, self.capacity)[0]:
            answers = [[groups[p][1][g] for g in members] for p, members in batch]
            pack = packing.pack_groups([groups[p][0] for p, _ in batch], answers, device)
            last = pack.cu_seqlens[1:][pack.prefixes_B >= 0] - 1
            places = [groups[p][2][g] for p, members in batch for g in members]
            with torch.cuda.device(device if device.type == "cuda" else -1):  # this is a thread; -1 is no device
                values = self.model.values(pack)[last].tolist()
            for i, value in zip(places, values, strict=True):
                scores[i] = value
        return scores

    def _ids(self, prompt, completion, sampled: list[int]) -> tuple[list[int], list[int]]:
        """A prompt's and a completion's ids; a text that did not come to its end gets no end token here either."""
        if self.same:
            return self.tokenizer.prompt_ids(prompt), sampled
        prompt_ids, ids = pairs.answered(self.tokenizer, prompt, completion)
        return prompt_ids, ids if sampled[-1] in self.policy_tokenizer.end_ids or len(ids) == 1 else ids[:-1]


def overlong_penalty(lengths: Tensor, max_completion_length: int, cache: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), float32, shaped as `lengths`, which count tokens.

    0 up to max_completion_length - cache tokens, from there down in a straight line to -1 at max_completion_length.
    """
    if not 0 < cache <= max_completion_length:
        raise ValueError(f"the overlong cache must lie in 1..{max_completion_length} tokens, not {cache}")
    return ((max_completion_length - cache - lengths.float()) / cache).clamp(-1, 0)


def load_rewards(names: Iterable[str], option: str = "--reward") -> list[tuple[str, Reward]]:
    """(name, function) for each of `names`: a built-in's name; `file.py:function`, known by the function's name; or a
    reward model's folder, known by its own name (`final`: by the name of the run), which `open_models` has to load.

    Runs the file, once. ValueError names the option, what is missing, and the nearest name there is.
    """
    loaded: dict[str, Reward] = {}
    for spec in names:
        file, colon, attribute = spec.rpartition(":")
        name = attribute
        function = _from_file(f"{option} {spec}", Path(file), attribute) if colon else BUILT_IN.get(spec)
        if function is None and Path(spec).is_dir():
            path = Path(spec).resolve()
            try:
                function, name = RewardModel(spec), path.parent.name if path.name == "final" else path.name
            except ValueError as error:
                raise ValueError(f"{option} {spec}: {error}") from error
        if function is None:
            near = difflib.get_close_matches(spec, BUILT_IN, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = f"a reward model's folder, nor one of {', '.join(BUILT_IN)}"
            raise ValueError(f"{option} {spec}: neither file.py:function, {known}{hint}")
        if name in loaded:
            raise ValueError(f"{option} {spec}: there is a reward {name!r} already, and metrics go by name; rename one")
        loaded[name] = function
    if not loaded:
        raise ValueError(f"{option} is empty; name a built-in, file.py:function or a folder")
    return list(loaded.items())


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """{"--reward file.py": digest} of the files and folders among `names`."""
    found = {}
    for spec in [spec.rpartition(":")[0] or spec for spec in names if spec not in BUILT_IN]:
        files = sorted(Path(spec).iterdir()) if Path(spec).is_dir() else [Path(spec)]
        found[f"--reward {spec}"] = " ".join(disk.digest(file) for file in files if file.is_file())
    return found


def open_models(functions: list[tuple[str, Reward]], policy_tokenizer, device, log=print) -> None:
    """Load the reward models among the rewards, once."""
    for _, function in functions:
        if isinstance(function, RewardModel) and function.model is None:
            function.open(policy_tokenizer, device, log)


def check_columns(functions: list[tuple[str, Reward]], columns: Iterable[str]) -> None:
    """ValueError if a function cannot be called with what minitrl and the data set have; before the first step."""
    columns = list(columns)
    for name, function in functions:
        accepted, missing = _accepted(function, {*GIVEN, *columns})
        if missing:
            there = ", ".join(columns) or "none"
            raise ValueError(f"reward {name!r} asks for {', '.join(missing)}, but the data set's columns are {there}")
        try:
            inspect.signature(function).bind(**dict.fromkeys(accepted))
        except TypeError as error:
            raise ValueError(f"reward {name!r} gets its arguments by name, and cannot be called so: {error}") from None


def score(
    functions: list[tuple[str, Reward]],
    timeout_s: float,
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    columns: dict[str, list],
    step: int,
    first_index: int = 0,
) -> Tensor:
    """(N, F) float32: what each of the F functions gives each of the N samples, NaN where it answered None.

    `completions` are texts, wrapped as messages here where the prompt is a conversation. Each function has `timeout_s`
    seconds for all N. Errors name it: TimeoutError when it hangs, ValueError when it raises or for what it returns.
    """
    N = len(prompts)
    completions = [
        text if isinstance(prompt, str) or not isinstance(text, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    check_columns(functions, columns)
    given = dict(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
    assert all(len(values) == N for values in given.values()), {name: len(values) for name, values in given.items()}
    scores_NF = torch.empty(N, len(functions))
    for f, (name, function) in enumerate(functions):
        accepted, _ = _accepted(function, {*given, *GIVEN})
        # Each function gets values of its own, and each sample: one that sorts or pops must not disturb the next, nor
        # the data set, whose row all completions of a prompt share.
        arguments = {key: [copy.deepcopy(v) for v in values] for key, values in given.items() if key in accepted}
        arguments |= {key: value for key, value in (("step", step), ("first_index", first_index)) if key in accepted}
        scores_NF[:, f] = _checked(name, _call(name, function, arguments, timeout_s), N)
    return scores_NF


def _from_file(what: str, file: Path, attribute: str) -> Reward:
    if not file.is_file():
        raise ValueError(f"{what}: no such file: {file}")
    module_name = f"reward file {file.resolve()}"  # no import statement can reach or shadow such a name
    if module_name not in sys.modules:
        spec_of_module = importlib.util.spec_from_file_location(module_name, file)
        if spec_of_module is None:
            raise ValueError(f"{what}: {file} is not a .py file")
        module = importlib.util.module_from_spec(spec_of_module)
        sys.modules[module_name] = module  # dataclasses and typing look their module up by name
        try:
            spec_of_module.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(f"{what}: {file} cannot be imported: {_where(error)}") from error
    module = sys.modules[module_name]
    function = getattr(module, attribute, None)
    if not callable(function):
        here = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(attribute, here, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}: {file} has no function {attribute!r}{hint}")
    return function


def _accepted(function: Reward, available: set[str]) -> tuple[set[str], list[str]]:
    """Of the names in `available`, those the function takes; and the names it insists on that are not there."""
    parameters = inspect.signature(function).parameters.values()
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = set(available)
    else:
        accepted = available & {p.name for p in parameters if p.kind in fixed}
    missing = [p.name for p in parameters if p.kind in fixed and p.default is p.empty and p.name not in available]
    return accepted, missing


def _call(name: str, function: Reward, arguments: dict[str, Any], timeout_s: float) -> Any:
    """What the function returns, or what it awaits; in a thread, since a thread can be left behind when it hangs."""
    result: dict[str, Any] = {}

    def work() -> None:
        try:
            value = function(**arguments)
            result["value"] = asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value
        except BaseException as error:  # sys.exit() too: in a thread it would end in silence
            result["error"] = error

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    # A regular expression that backtracks without end never lets go of the interpreter: no Python code runs again, the
    # end of join's wait included. faulthandler's watchdog needs no interpreter: it prints where the function stands and
    # ends the process.
    faulthandler.dump_traceback_later(timeout_s + 5, exit=True, file=sys.__stderr__)
    try:
        thread.start()
        thread.join(timeout_s)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if thread.is_alive():
        raise TimeoutError(f"reward {name!r} did not return within {timeout_s} s (--reward_timeout)")
    if "error" in result:
        hint = ALARM if "signal only works in main thread" in str(result["error"]) else ""
        raise ValueError(f"reward {name!r} raised {_where(result['error'])}{hint}") from result["error"]
    return result["value"]


async def _awaited(value: Any) -> Any:
    return await value


def _checked(name: str, values: Any, N: int) -> Tensor:
    """(N,) float32 with NaN for None, from a list, tuple, array or tensor of N finite numbers or None."""
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise ValueError(f"reward {name!r} must return a list of {N} numbers or None, not {type(values).__name__}")
    if len(values) != N:
        raise ValueError(f"reward {name!r} returned {len(values)} values for {N} samples")
    scores = []
    for i in range(N):
        value = values[i]
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a scalar of numpy or torch
            value = value.item()
        if value is not None and not isinstance(value, numbers.Real):  # bool is one in Python: True counts as 1
            raise ValueError(f"reward {name!r} gave sample {i} {value!r}, which is neither a number nor None")
        try:
            scores.append(math.nan if value is None else float(value))
        except OverflowError:
            scores.append(math.inf)
        if value is not None and not abs(scores[i]) <= FLOAT32_MAX:  # false for NaN too
            raise ValueError(f"reward {name!r} gave sample {i} {scores[i]}; return None where it does not apply")
    return torch.tensor(scores)


def _where(error: BaseException) -> str:
    """The error in one line, with the line of the user's file and, where a library raised it, the library's too."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    places = [f" ({file}:{line})" for file, line in places if file != __file__ and not file.startswith("<")]
    return " ".join(f"{type(error).__name__}: {error}{''.join(dict.fromkeys(places[:1] + places[-1:]))}".split())


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _last_number(text: str) -> Decimal | None:
    """Exact, of any length: no float, whose rounding would make 0.1 + 0.2 wrong and 2**53 + 1 equal to 2**53."""
    found = None
    for found in NUMBER.finditer(text):
        pass
    if found is None:
        return None
    sign, digits = found.groups()
    try:
        return Decimal(("-" if sign else "") + digits.replace(",", ""))
    except InvalidOperation:  # an exponent of twenty digits
        return None


def _equal_number(text: str, answer: Any) -> float | None:
    if answer is None:
        return None
    expected = _last_number(str(answer))
    if expected is None:
        raise ValueError(f"the column answer holds {answer!r}, in which there is no number")
    return float(_last_number(text) == expected)
