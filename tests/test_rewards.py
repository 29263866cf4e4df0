"""Rewards: the built-ins against adversarial text, the user's own functions, and all that can be wrong with those."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy
import pytest
import torch

from minitrl.rewards import BUILT_IN, check_columns, load_rewards, overlong_penalty, score


def run(function, completions=("a", "b"), columns=None, prompts=None, timeout_s=10, step=0, **more):
    prompts = prompts or ["p"] * len(completions)
    ids = [[1]] * len(completions)
    return score([("mine", function)], timeout_s, prompts, list(completions), ids, columns or {}, step, **more)[:, 0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("18", "18", 1),
        ("18", 18, 1),
        ("18", 18.0, 1),
        ("The answer is 18.", "18", 1),
        ("1 2 3 18", "18", 1),
        ("18, or 17", "18", 0),  # the last one counts: a list of guesses earns nothing
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", "18", 0),
        ("118", "18", 0),
        ("181", "18", 0),
        ("18.5", "18", 0),
        ("0.18", "18", 0),
        ("2e18", "18", 0),
        ("18e1", "18", 0),
        ("1.8e1", "18", 1),
        ("18.0", "18", 1),
        ("018", "18", 1),
        ("$18", "18", 1),
        ("18%", "18", 1),
        ("**18**", "18", 1),
        ("\\boxed{18}", "18", 1),
        ("x=18", "18", 1),
        ("x=-18", "18", 0),
        ("x=-18", "-18", 1),
        ("-$18", "-18", 1),
        ("\u221218", -18, 1),  # the typographic minus
        ("20-18", "18", 1),  # a subtraction, not a negative number
        ("20 - 18", "18", 1),
        ("(20)-18", "-18", 0),
        ("1,018", "18", 0),
        ("1,018", "1018", 1),
        ("1018", "1,018", 1),
        ("1,01,18", "18", 1),  # a list, not one number
        ("1,0018", "1018", 0),
        ("1,20018", "20018", 1),
        ("12,345,678.90", "12345678.9", 1),
        ("١٨", "18", 0),  # Arabic-Indic digits: \d would take them
        ("²", "2", 0),
        ("eighteen", "18", 0),
        ("", "18", 0),
        ("nan", "18", 0),
        ("inf", "18", 0),
        ("1e99999999999999999999", "18", 0),
        ("9" * 100_000, "18", 0),
        ("9007199254740993", "9007199254740992", 0),  # equal as floats
        ("0.30000000000000004", "0.3", 0),
        ("-0", "0", 1),
        (".5", "0.5", 1),
        ("1/2", "0.5", 0),  # fractions are not read
        ("They pay 9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "She sells 9 eggs.\n#### 18", 1),
        ("18", None, None),
    ],
)
def test_number(completion, answer, expected):
    got = BUILT_IN["number"]([completion], [answer])
    assert got == [expected]
    assert BUILT_IN["number"]([[{"role": "assistant", "content": completion}]], [answer]) == got


def test_number_is_linear_in_the_length_of_hostile_text():
    for text in ("1," * 100_000, "1" * 200_000, "-" * 200_000, "1.1." * 50_000, "$" * 200_000, "1e" * 100_000):
        begin = time.perf_counter()
        BUILT_IN["number"]([text], ["18"])
        assert time.perf_counter() - begin < 5


def test_number_refuses_an_answer_without_a_number():
    with pytest.raises(ValueError, match="'mine' raised ValueError: the column answer holds 'yes'"):
        run(BUILT_IN["number"], columns={"answer": ["1", "yes"]})


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("cba", "cba", 1),
        (" cba\n", "cba", 1),
        ("cba.", "cba", 0),
        ("CBA", "cba", 0),
        ("cba cba", "cba", 0),
        ("", "cba", 0),
        ("", "", 1),
        ("5", 5, 1),
        ("5.0", 5, 0),
        ("c\u0061\u0301", "c\u00e1", 0),  # no Unicode normalisation
        ("x", None, None),
    ],
)
def test_exact(completion, answer, expected):
    assert BUILT_IN["exact"]([completion], [answer]) == [expected]


def test_random_is_a_fair_coin_of_step_and_place_alone():
    tosses = run(BUILT_IN["random"], ["right"] * 4000, step=7)
    assert set(tosses.tolist()) == {0.0, 1.0} and abs(tosses.mean() - 0.5) < 0.04
    assert torch.equal(tosses, run(BUILT_IN["random"], ["wrong"] * 4000, step=7))
    assert not torch.equal(tosses, run(BUILT_IN["random"], ["right"] * 4000, step=8))
    # Two ranks that score one half each toss the coins of one rank that scores all.
    halves = [run(BUILT_IN["random"], ["right"] * 2000, step=7, first_index=first) for first in (0, 2000)]
    assert torch.equal(tosses, torch.cat(halves))


def test_overlong_penalty_is_dapo_eq_13():
    lengths = torch.tensor([0, 80, 81, 85, 90, 95, 100, 101])
    expected = torch.tensor([0, 0, -0.05, -0.25, -0.5, -0.75, -1, -1])
    assert torch.allclose(overlong_penalty(lengths, 100, 20), expected)
    assert overlong_penalty(torch.tensor([[99], [100]]), 100, 100).tolist() == [[pytest.approx(-0.99)], [-1]]
    for cache in (0, -1, 101):
        with pytest.raises(ValueError, match="1..100"):
            overlong_penalty(lengths, 100, cache)


def test_functions_get_texts_or_messages_columns_and_step():
    seen = {}

    def everything(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids)
        return [0, 1]

    talk = [{"role": "user", "content": "Hi"}]
    columns = {"answer": ["x", None]}
    scores = score([("f", everything)], 10, ["p", talk], ["a", "b"], [[1, 2], [3]], columns, step=5, first_index=16)
    assert scores.tolist() == [[0], [1]] and scores.dtype == torch.float32
    assert seen == {
        "prompts": ["p", talk],
        "completions": ["a", [{"role": "assistant", "content": "b"}]],
        "ids": [[1, 2], [3]],
        "answer": ["x", None],
        "step": 5,
        "first_index": 16,
    }


def test_a_function_may_name_only_what_it_needs():
    assert run(lambda completions: [len(c) for c in completions], ["a", "bbb"]).tolist() == [1, 3]
    assert run(lambda answer, completions: answer, columns={"answer": [1, 2], "other": [0, 0]}).tolist() == [1, 2]
    assert run(functools.partial(lambda completions, bonus: [bonus] * 2, bonus=3)).tolist() == [3, 3]

    class Reward:
        def __call__(self, completions, **columns):
            return [1, 2]

    assert run(Reward()).tolist() == [1, 2]


def test_a_function_that_needs_a_column_that_is_not_there_is_named_before_the_first_step():
    def needs(completions, solution, level=0):
        return [0, 0]

    with pytest.raises(ValueError, match="'mine' asks for solution, but the data set's columns are answer"):
        check_columns([("mine", needs)], ["answer"])
    with pytest.raises(ValueError, match="solution"):
        run(needs)
    check_columns([("mine", needs)], ["solution"])


def test_async_functions_are_awaited():
    async def later(completions, **columns):
        import asyncio

        await asyncio.sleep(0.01)
        return [1, None]

    scores = run(later).tolist()
    assert scores[0] == 1 and math.isnan(scores[1])


def test_none_is_nan_and_scalars_of_any_library_count():
    values = [None, True, False, 2, 0.5, numpy.float32(0.25), numpy.bool_(True), numpy.int64(-3), torch.tensor(4.0)]
    scores = run(lambda completions: values, ["x"] * len(values))
    assert torch.equal(scores.isnan(), torch.tensor([True] + [False] * 8))
    assert scores[1:].tolist() == [1, 0, 2, 0.5, 0.25, 1, -3, 4]
    for whole in (torch.tensor([1.0, 2.0]), numpy.array([1, 2]), (1, 2)):
        assert run(lambda completions, whole=whole: whole).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "'mine' returned 1 values for 2 samples"),
        ([1.0, 2.0, 3.0], "returned 3 values"),
        ([], "returned 0 values"),
        ([1.0, math.nan], "sample 1 nan"),
        ([math.inf, 0.0], "sample 0 inf"),
        ([1e39, 0.0], r"sample 0 1e\+39"),
        ([10**400, 0.0], "sample 0 inf"),
        (torch.tensor([0.0, math.nan]), "sample 1 nan"),
        (["1.0", 0.0], "'1.0', which is neither"),
        ([[1.0], [0.0]], "which is neither"),
        ([1j, 0.0], "which is neither"),
        (torch.zeros(2, 2), "which is neither"),
        ("ab", "not str"),
        ({0: 1.0, 1: 2.0}, "not dict"),
        (1.0, "not float"),
        (None, "not NoneType"),
        (iter([1.0, 2.0]), "must return a list of 2 numbers"),
    ],
)
def test_a_bad_return_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        run(lambda completions: value)


def test_what_a_function_raises_is_named_with_its_line():
    def broken(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(ValueError, match=r"'mine' raised ZeroDivisionError: .*\(.*test_rewards.py:\d+\)") as caught:
        run(broken)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ValueError, match="'mine' raised SystemExit"):
        run(lambda completions: sys.exit(0))
    inside = r"'mine' raised JSONDecodeError: .* \(.*test_rewards.py:\d+\) \(.*decoder.py:\d+\)$"
    with pytest.raises(ValueError, match=inside):  # where a library raises, the user's own line comes first
        run(lambda completions: [json.loads(c) for c in completions])


def test_a_function_that_hangs_is_left_behind():
    release = threading.Event()
    begin = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"'mine' did not return within 0.2 s \(--reward_timeout\)"):
        run(lambda completions: release.wait(60), timeout_s=0.2)
    assert time.perf_counter() - begin < 10
    release.set()


def test_a_regular_expression_that_never_lets_go_ends_the_process():
    """`re` keeps the interpreter while it backtracks, so no timeout written in Python can fire; the watchdog does."""
    code = """if True:
        import re
        from minitrl.rewards import score
        def endless(completions):
            return [bool(re.match(r"(a+)+$", c)) for c in completions]
        score([("endless", endless)], 0.5, ["p"], ["a" * 60 + "!"], [[1]], {}, 0)
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "Timeout" in process.stderr and "in endless" in process.stderr


def test_an_alarm_is_explained():
    def alarmed(completions):
        signal.signal(signal.SIGALRM, lambda *_: None)

    with pytest.raises(ValueError, match=r"rewards run in a thread, where signal.alarm .* --reward_timeout"):
        run(alarmed)


def test_what_a_function_takes_by_place_alone_is_said_before_the_first_step():
    def by_place(completions, /, **columns):
        return [0, 0]

    def with_default(completions, answer=None, /):
        return [0, 0]

    for function in (by_place, with_default):
        with pytest.raises(ValueError, match="'mine' gets its arguments by name, .*'?completions'?"):
            check_columns([("mine", function)], ["answer"])
    check_columns([("mine", lambda answer=None, /, *, completions: [])], ["answer"])


def test_a_function_cannot_empty_the_data_set():
    """The completions of a prompt share its row: what is taken out for one is there for the next."""
    tests = ["a", "b"]

    def greedy(completions, tests):
        return [float(len([each.pop() for _ in range(len(each))])) for each in tests]

    assert run(greedy, columns={"tests": [tests, tests]}).tolist() == [2, 2] and tests == ["a", "b"]


def test_one_function_cannot_disturb_the_next():
    def greedy(completions, answer):
        answer.clear(), completions.reverse()
        return [0, 0]

    functions = [("greedy", greedy), ("exact", BUILT_IN["exact"])]
    scores = score(functions, 10, ["p", "p"], ["a", "b"], [[1], [2]], {"answer": ["a", "x"]}, 0)
    assert scores.tolist() == [[0, 1], [0, 0]]


def test_a_function_that_prints_without_end_only_prints():
    def chatty(completions):
        for _ in range(2000):
            print("x" * 100_000)  # 200 MB in all; a copy kept of it would show
        return [1, 2]

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        assert run(chatty).tolist() == [1, 2]


def test_functions_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Rule:\n    bonus: float\n"  # dataclasses look their module up in sys.modules
        "loads = []\n"
        "def length(completions): return [len(c) for c in completions]\n"
        "def bonus(completions): return [Rule(2.0).bonus] * len(completions)\n"
    )
    functions = load_rewards((f"{path}:length", f"{path}:bonus", "exact"))
    assert [name for name, _ in functions] == ["length", "bonus", "exact"]
    assert score(functions, 10, ["p"], ["abc"], [[1]], {"answer": ["abc"]}, 0).tolist() == [[3, 2, 1]]


def test_errors_of_loading_name_the_nearest(tmp_path):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("def length(completions): return []\nnumber = 3\n")
    bad.write_text("import math\n\nmath.nothing\n")
    other = tmp_path / "other.py"
    other.write_text("def length(completions): return []\n")
    for names, message in [
        (("numbr",), "numbr: neither .* did you mean 'number'"),
        (("zzz",), "nor one of number, exact, random$"),
        ((f"{tmp_path}/none.py:f",), "no such file"),
        ((f"{good}:lenght",), "no function 'lenght'; did you mean 'length'"),
        ((f"{good}:number",), "no function 'number'"),
        ((f"{bad}:f",), r"cannot be imported: AttributeError: .*bad.py:3\)"),
        ((f"{good}:length", f"{other}:length"), "already"),
        (("exact", "exact"), "already"),
        ((), "is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_rewards(names)
    with pytest.raises(ValueError, match="^--eval_reward numbr: neither"):
        load_rewards(("numbr",), "--eval_reward")
    with pytest.raises(ValueError, match=f"^--eval_reward {good}:number: .* has no function"):
        load_rewards((f"{good}:number",), "--eval_reward")
    text = tmp_path / "notes.txt"
    text.write_text("")
    with pytest.raises(ValueError, match="not a .py file"):
        load_rewards((f"{text}:f",))
