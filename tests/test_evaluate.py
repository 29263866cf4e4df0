"""pass@k against counting, intervals and tests against their definitions, and whole evaluations."""

import itertools
import json
import math

import numpy as np
import pytest

from minitrl import chat, checkpoint, evaluate, lora, runs


def call(main, argv, capsys):
    """(exit status, what was printed) of a script's main."""
    with pytest.raises(SystemExit) as end:
        runs.command(lambda: main([str(word) for word in argv]))
    printed = capsys.readouterr()
    return end.value.code, printed.out + printed.err


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_counts_subsets(n):
    for k in range(1, n + 1):
        for right in range(n + 1):
            subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert evaluate.pass_at_k(n, [right], k)[0] == pytest.approx(expected, abs=1e-12)
    assert evaluate.pass_at_k(2000, [3], 1000)[0] == pytest.approx(
        1 - math.comb(1997, 1000) / math.comb(2000, 1000), rel=1e-9
    )


def test_wilson_interval():
    """Its ends are where the observed share is 1.96 of the hypothesis' own deviations away."""
    for right, P in ((0, 20), (7, 20), (20, 20), (431, 1000)):
        shares = np.array([1.0] * right + [0.0] * (P - right))
        for end in evaluate.interval(shares, 1):
            assert abs(right / P - end) == pytest.approx(evaluate.Z * math.sqrt(end * (1 - end) / P), abs=1e-9)


def test_interval_of_several_completions():
    """As many trials as there are independent ones: all, or one a prompt."""
    generator = np.random.default_rng(0)
    alike, free = generator.random(4000) < 0.4, generator.binomial(8, 0.4, 4000) / 8
    widths = [np.diff(evaluate.interval(x, n))[0] for x, n in ((alike * 1.0, 1), (alike * 1.0, 8), (free, 8))]
    assert widths[1] == pytest.approx(widths[0], rel=0.01) and widths[2] == pytest.approx(widths[0] / 8**0.5, rel=0.05)


def test_coverage():
    """19 of 20 intervals hold the truth where completions of a prompt are alike to a degree."""
    generator, hits = np.random.default_rng(1), 0
    for _ in range(2000):
        shares = generator.binomial(4, generator.beta(1, 2, 200)) / 4
        low, high = evaluate.interval(shares, 4)
        hits += low <= 1 / 3 <= high
    assert 0.935 < hits / 2000 < 0.965


def result(right):
    return {"right": right, "digest": str(len(right))}


@pytest.mark.parametrize("won, lost", [(0, 0), (5, 0), (1, 8), (6, 6), (30, 14)])
def test_mcnemar(won, lost):
    first, other = [0] * won + [1] * lost + [1, 0, 1], [1] * won + [0] * lost + [1, 0, 1]
    found = evaluate.compare(result(first), result(other), 1)
    flips = won + lost
    extreme = sum(math.comb(flips, i) for i in range(flips + 1) if abs(2 * i - flips) >= abs(won - lost))
    assert found["p"] == pytest.approx(extreme / 2**flips) and (found["won"], found["lost"]) == (won, lost)
    assert found["difference"] == pytest.approx((won - lost) / (flips + 3))


def test_sign_flips():
    """Against all 2^10 flips."""
    generator = np.random.default_rng(2)
    first, other = generator.integers(0, 5, 10), generator.integers(1, 7, 10)
    gained = other - first
    sums = np.array([np.dot(signs, gained) for signs in itertools.product((-1, 1), repeat=10)])
    expected = (np.abs(sums) >= abs(gained.sum())).mean()
    assert evaluate.compare(result(first), result(other), 8)["p"] == pytest.approx(expected, abs=0.006)
    assert evaluate.compare(result(first), result(first), 8)["p"] == 1
    with pytest.raises(ValueError, match="leave out different prompts"):
        evaluate.compare(result([1]), result([1, 0]), 1)
    with pytest.raises(ValueError, match="leave out different prompts"):  # as many, but others
        evaluate.compare(result([1]), result([1]) | {"digest": "another"}, 1)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The tiny model with an adapter that was never trained: a second model that is equal to the first."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    named = {"base_model_name_or_path": str(tiny.folder / "model")}
    lora.attach(model, {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | named)
    folder = tmp_path_factory.mktemp("trained") / "final"
    lora.save(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("n", [1, 3])
def test_two_models(tiny, trained, tmp_path, capsys, n):
    argv = ["--model", tiny.folder / "model", trained, "--dataset", tiny.folder / "data.jsonl", "--reward",
            f"{tiny.folder / 'rewards.py'}:tagged", "--num_generations", n, "--max_completion_length", 4,
            "--dtype", "float32", "--output", tmp_path / "out.json"]  # fmt: skip
    code, printed = call(evaluate.main, argv, capsys)
    assert code == 0, printed
    report = json.loads((tmp_path / "out.json").read_text())
    one, two = report["models"]
    assert report["options"]["temperature"] == (0 if n == 1 else 1)
    assert one["right"] == two["right"] and len(one["right"]) == 50 and set(one["right"]) <= set(range(n + 1))
    assert two["against_first"] | {"p": 1, "difference": 0, "won": 0, "lost": 0} == two["against_first"]
    assert one["accuracy"] == sum(one["right"]) / 50 / n and one["interval"][0] < one["accuracy"] <= one["interval"][1]
    assert one["pass@1"] == pytest.approx(one["accuracy"]) and list(k for k in one if "pass@" in k)[-1] == f"pass@{n}"
    assert one["pass@1"] <= one[f"pass@{n}"] and "against_first" not in one and "pass@1: " in printed
    assert 1 <= one["reward"] <= 5.02 and one["frac_reward_none"] == 0


def test_one_prompt_is_reported_in_json(tiny, trained, tmp_path, capsys):
    """Of one number there is no deviation; JSON has neither NaN nor infinity."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}')
    argv = ["--model", tiny.folder / "model", trained, "--dataset", tmp_path / "one.jsonl", "--reward", "exact",
            "--max_completion_length", 4, "--output", tmp_path / "out.json"]  # fmt: skip
    code, printed = call(evaluate.main, argv, capsys)
    assert code == 0, printed
    report = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert report["models"][1]["against_first"]["interval"] == [-1, 1]


def test_a_reward_model_scores(tiny, tmp_path, capsys):
    """Each model's completions by that model's ids, if the tokenizers are the same, else by its texts."""
    checkpoint.save(*checkpoint.load(tiny.folder / "model", scalar_head=True), tmp_path / "judge")
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    tokenizer.chat_template = "{{ messages }}"
    checkpoint.save(model, tokenizer, tmp_path / "other")
    for others in ([], [tmp_path / "other"]):
        argv = ["--model", tiny.folder / "model", *others, "--dataset", tiny.folder / "data.jsonl", "--reward", "exact",
                tmp_path / "judge", "--max_completion_length", 4, "--dtype", "float32"]  # fmt: skip
        code, printed = call(evaluate.main, argv, capsys)
        assert code == 0 and printed.count("rewards/judge/mean: ") == 1 + len(others), printed
        assert printed.count("it reads texts, not ids") == len(others)


@pytest.mark.parametrize("script", [evaluate, chat])
def test_a_reward_models_adapter_does_not_talk(tiny, tmp_path, capsys, script):
    model, tokenizer = checkpoint.load(tiny.folder / "model", scalar_head=True)
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    lora.attach(model, settings | {"base_model_name_or_path": str(tiny.folder / "model")})
    lora.save(model, tokenizer, tmp_path / "judge")
    more = ["--dataset", tiny.folder / "data.jsonl", "--reward", "exact"] if script is evaluate else []
    code, printed = call(script.main, ["--model", tmp_path / "judge", *more], capsys)
    assert code == 1 and "a reward or value model's adapter" in printed
    assert lora.open_model(str(tmp_path / "judge"), scalar_head=True)[0].score is not None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_generations": 0}, "--num_generations 0: must be at least 1"),
        ({"num_generations": 2, "temperature": 0}, "--temperature 0.0: must be above 0 for several completions"),
        ({"dataset": "none.jsonl"}, "none.jsonl: no such file"),
        ({"reward": "nonsense"}, "nonsense"),
        ({"model": "nowhere"}, "--model 'nowhere': no such folder"),
        ({"modle": "x"}, "did you mean --model?"),
    ],
)
def test_bad_input(tiny, capsys, options, message):
    given = {"model": tiny.folder / "model", "dataset": tiny.folder / "data.jsonl", "reward": "number"} | options
    argv = [word for name, value in given.items() for word in (f"--{name}", value)]
    code, printed = call(evaluate.main, argv, capsys)
    assert code in (1, 2) and message in printed and "Traceback" not in printed
