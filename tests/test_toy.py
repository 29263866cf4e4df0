"""The embedded default: four disjoint sets of words, a tokenizer and a model, and a warm-up that leaves most to be learnt."""

import json
from dataclasses import fields

import pytest
import torch

import minitrl
from minitrl import grpo, rewards, toy
from minitrl.data import load_prompts


def test_the_sets_of_words_are_disjoint_and_follow_from_the_seed():
    words = toy.split(0)
    assert {name: len(words[name]) for name in words} == toy.SIZES and toy.SIZES["held_out"] >= 200
    together = [word for name in words for word in words[name]]
    assert len(set(together)) == len(together)
    assert {len(word) for word in together} == {toy.LENGTH} and set("".join(together)) == set(toy.LETTERS)
    assert toy.split(0) == words and toy.split(1) != words


def test_rows_are_those_that_load_prompts_would_give(tmp_path):
    train, held_out = toy.datasets(3)
    words = toy.split(3)
    assert (len(train), len(held_out)) == (toy.SIZES["train"], toy.SIZES["held_out"])
    assert [row["prompt"] for row in held_out] == [f"{word}>" for word in words["held_out"]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], **row["columns"]}) + "\n" for row in train[:50]))
    assert load_prompts(path, toy.make_tokenizer(), 512) == (train[:50], 0)


def test_the_task_and_its_verifier():
    row = {"prompt": "abcdef>", "prompt_ids": toy.make_tokenizer().encode("abcdef>"), "columns": {"answer": "fedcba"}}
    assert toy._row(toy.make_tokenizer(), "abcdef") == row
    for text, reward in (("fedcba", 1), ("fedcb", 0), ("fedcbaa", 0), ("abcdef", 0), ("", 0)):
        assert rewards.BUILT_IN["exact"]([text], [row["columns"]["answer"]]) == [reward]


def test_one_token_a_character():
    tokenizer = toy.make_tokenizer()
    ids = tokenizer.encode("fab>")
    assert len(ids) == 4 and tokenizer.decode(ids) == "fab>"
    assert tokenizer.decode([*ids, *tokenizer.end_ids]) == "fab>"
    assert len(tokenizer.end_ids) == 1 and tokenizer.vocab_size == len(toy.LETTERS) + 2


def test_greedy_accuracy_is_that_of_the_engine():
    """One pass over prompt and right answer against decoding token by token, on a model that gets some words right."""
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(0, tokenizer.vocab_size)
    words = toy.split(0)
    toy.warm_up(model, tokenizer, words["warm_up"], words["stop"], 0)
    engine = minitrl.Engine(model, tokenizer)
    groups = engine.generate([f"{word}>" for word in words["stop"]], max_tokens=toy.PRESET["max_completion_length"], temperature=0)
    right = [group[0].text == word[::-1] and group[0].finish_reason == "stop" for group, word in zip(groups, words["stop"])]
    assert 0 < sum(right) < len(right)
    assert sum(right) / len(right) == toy.greedy_accuracy(model, tokenizer, words["stop"])


def test_build_is_warmed_up_and_the_same_every_time():
    lines = []
    model, tokenizer = toy.build(1, log=lines.append)
    again, _ = toy.build(1, log=lines.append)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert len(lines) == 2 and lines[0] == lines[1]
    assert 0.2 <= toy.greedy_accuracy(model, tokenizer, toy.split(1)["held_out"]) <= 0.5


def test_the_preset_holds_options_of_grpo_only():
    names = {field.name for field in fields(grpo.Config)}
    assert set(toy.PRESET) <= names
    grpo.Config(**toy.PRESET)


def test_final_folder_of_the_toy_loads_again(tmp_path):
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(0, tokenizer.vocab_size)
    minitrl.save(model, tokenizer, tmp_path / "final")
    loaded, loaded_tokenizer = minitrl.load(tmp_path / "final")
    ids = loaded_tokenizer.encode("abc>")
    assert ids == tokenizer.encode("abc>") and loaded_tokenizer.end_ids == tokenizer.end_ids
    assert torch.equal(loaded.logits([ids])[0], model.logits([ids])[0])


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["exact", "random"])
def test_learns(tmp_path, reward):
    """The README's first command, and its control arm: what rises under a random reward was not learnt from the reward."""
    assert grpo.main(["--output_dir", str(tmp_path), "--seed", "0", "--reward", reward]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["eval/accuracy"] for row in metrics if "eval/accuracy" in row)
    assert before <= 0.5
    assert after >= 0.9 if reward == "exact" else after <= before + 0.05
