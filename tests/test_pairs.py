"""Preferences: rows become ids, with their end tokens; what is wrong is named; and a step's packs hold whole pairs."""

import json

import pytest
import torch
from test_tokenizer import byte_tokenizer, write_folder

from minitrl import data, pairs
from minitrl.distributed import World
from minitrl.tokenizer import Tokenizer

END = 258


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte; <|im_start|>role newline content <|im_end|> newline."""
    return Tokenizer.load(write_folder(tmp_path_factory.mktemp("bytes")))


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*rows, max_length=1000, tokenizer=tokenizer):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return pairs.load_preferences(path, tokenizer, max_length)

    return load


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def texts(row, tokenizer):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [tokenizer.decode(row[name], skip_special_tokens=False) for name in names]


def test_text(load, tokenizer):
    [row], dropped = load({"prompt": "2+3=", "chosen": "5", "rejected": "6<|im_end|>", "note": 1})
    assert texts(row, tokenizer) == ["2+3=", "5<|im_end|>", "6<|im_end|>"]  # one end token, given or not
    assert row["margin"] == 0.0 and dropped == 0
    assert list(row["prompt_ids"]) == tokenizer.prompt_ids("2+3=")


def test_messages(load, tokenizer):
    """The prompt's ids are those that sampling would begin with; what stands behind the end is no answer."""
    prompt = [{"role": "system", "content": "Be brief."}, user("2+3?")]
    [row], _ = load({"prompt": prompt, "chosen": [assistant("5")], "rejected": [assistant("six")], "margin": 2})
    assert list(row["prompt_ids"]) == tokenizer.prompt_ids(prompt)
    assert texts(row, tokenizer)[1:] == ["5<|im_end|>", "six<|im_end|>"] and row["margin"] == 2.0
    assert tokenizer.render([*prompt, assistant("5")], False) == "".join(texts(row, tokenizer)[:2]) + "\n"


def test_an_answer_of_several_turns(load, tokenizer):
    turns = [assistant("Which sum?"), user("2+3"), assistant("5")]
    [row], _ = load({"prompt": [user("Add.")], "chosen": turns, "rejected": [assistant("No.")]})
    assert texts(row, tokenizer)[1].startswith("Which sum?<|im_end|>\n<|im_start|>user\n2+3")
    assert texts(row, tokenizer)[1].endswith("5<|im_end|>")


def test_whole_conversations(load, tokenizer):
    """Their shared messages are the prompt, but for an answer that is the last thing they share."""
    shared = [user("Hi"), assistant("Hello."), user("2+3?")]
    [row], _ = load({"chosen": [*shared, assistant("5")], "rejected": [*shared, assistant("6")]})
    assert list(row["prompt_ids"]) == tokenizer.prompt_ids(shared) and texts(row, tokenizer)[1] == "5<|im_end|>"
    chosen = [user("2+3?"), assistant("5"), user("Sure?"), assistant("Yes.")]
    [row], _ = load({"chosen": chosen, "rejected": chosen[:2]})
    assert list(row["prompt_ids"]) == tokenizer.prompt_ids(chosen[:1])
    assert texts(row, tokenizer)[2] == "5<|im_end|>" and texts(row, tokenizer)[1].endswith("Yes.<|im_end|>")


def test_whole_texts(load, tokenizer):
    """The tokens that both begin with are the prompt; each answer keeps one at least."""
    [row], _ = load({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert texts(row, tokenizer) == ["The sky is bl", "ue.<|im_end|>", "ack.<|im_end|>"]
    [row], _ = load({"chosen": "Yes", "rejected": "Yes, no"})
    assert texts(row, tokenizer) == ["Yes", "<|im_end|>", ", no<|im_end|>"]


def test_long_pairs_are_left_out_and_counted(load):
    short, long = ({"prompt": "ab", "chosen": "c", "rejected": "d" * n} for n in (2, 3))
    rows, dropped = load(short, long, short, max_length=5)
    assert (len(rows), dropped) == (2, 1) and len(rows[0]["rejected_ids"]) == 3
    assert load(short, long, max_length=None)[1] == 0
    with pytest.raises(ValueError, match="all 1 pairs are longer than --max_length 5"):
        load(long, max_length=5)


CHAT = [user("Hi")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "b"}, 'no "rejected"; this row has prompt, chosen'),
        ({}, 'no "chosen"; this row has no keys'),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "must be text too"),
        ({"prompt": CHAT, "chosen": "b", "rejected": "c"}, "a list of messages, not 'b'"),
        ({"prompt": CHAT, "chosen": [], "rejected": [assistant("c")]}, "a list of messages, not"),
        ({"prompt": CHAT, "chosen": [{"role": "bot", "content": "b"}], "rejected": [assistant("c")]}, "role must be"),
        ({"prompt": [assistant("b")], "chosen": [assistant("c")], "rejected": [assistant("d")]}, "the last message"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "prompt must be text or a list of messages"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "have no prompt"),
        ({"chosen": "b", "rejected": "c"}, "nor a beginning in common"),
        ({"chosen": [user("b"), assistant("x")], "rejected": [user("c"), assistant("x")]}, "nor a beginning in common"),
        ({"chosen": [assistant("x")], "rejected": [assistant("x")]}, "nor a beginning in common"),
        ({"chosen": "b", "rejected": [assistant("c")]}, "chosen must be a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin must be a number, not '1'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin must be a number, not True"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": None}, "margin must be a number, not None"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin must be a number, not 1000"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e39}, "margin must be a number, not 1e"),
    ],
)
def test_bad_rows_are_named(load, row, message):
    with pytest.raises(ValueError, match=rf"pairs.jsonl:2: .*{message}"):
        load({"prompt": "a", "chosen": "b", "rejected": "c"}, row)


def test_a_tokenizer_without_an_end_token_is_refused(load):
    with pytest.raises(ValueError, match="pairs.jsonl:1: the tokenizer has no end token"):
        load({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer=Tokenizer(byte_tokenizer(), []))


def test_a_template_that_writes_the_prompt_in_two_ways_is_refused(load, tmp_path):
    """Where the answer begins could only be guessed."""
    template = "{% if add_generation_prompt %}P{% else %}Q{% endif %}{{ messages[-1].content }}"
    odd = Tokenizer(byte_tokenizer(), [END], chat_template=template)
    with pytest.raises(ValueError, match="where the answer begins can't be told"):
        load({"prompt": CHAT, "chosen": [assistant("b")], "rejected": [assistant("c")]}, tokenizer=odd)


def test_the_digest_is_of_every_id_and_margin(load):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    changes = [{}, {"prompt": "x"}, {"chosen": "x"}, {"rejected": "x"}, {"margin": 1.0}]
    changes.append({"chosen": "c", "rejected": "b"})
    digests = {data.fingerprint(load(row | change)[0]) for change in changes}
    assert len(digests) == 6 and data.fingerprint(load(row | {"note": 1})[0]) in digests


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_micro_batches_hold_whole_pairs(ranks):
    """Each pair once, in one micro-batch, its prompt once; no micro-batch above its tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(1, 9, (), generator=generator).item()  # noqa: E731
    rows = [{"prompt_ids": [i] * draw(), "chosen_ids": [i] * draw(), "rejected_ids": [i] * draw()} for i in range(40)]
    config = pairs.PairOptions(model="m", dataset="d", max_length=16, tokens_per_microbatch=48)
    seen = []
    for rank in range(ranks):
        for members, pack in pairs.batches(rows, config, World(rank, ranks, torch.device("cpu"))):
            assert len(pack.tokens_T) == pairs.tokens([rows[i] for i in members]) <= 48
            assert all(pack.prefixes[3 * p : 3 * p + 3] == (-1, 3 * p, 3 * p) for p in range(len(members)))
            lengths = [n for i in members for n in (len(rows[i]["prompt_ids"]), *pairs.answers(rows[i]))]
            assert pack.lengths == tuple(lengths)
            assert pack.tokens_T.tolist() == [i for i in members for _ in range(pairs.tokens([rows[i]]))]
            seen += members
    assert sorted(seen) == list(range(40))
