"""Demonstrations: which ids a row becomes, which of them are learnt, and the cache that keeps them."""

import json

import numpy as np
import pytest
import tokenizers
from test_tokenizer import CHATML, QWEN_LIKE

from minitrl import data
from minitrl.data import Documents, load_demonstrations
from minitrl.tokenizer import Tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHAT = [
    {"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a"},
    {"role": "user", "content": "c"}, {"role": "assistant", "content": "c c"},
]  # fmt: skip


def make(template: str | None = None, ends=("<|im_end|>", "<|endoftext|>"), merges=()) -> Tokenizer:
    """One token a character, and those that `merges` makes."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzB<|>_/! \n"))
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges)))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, [backend.token_to_id(token) for token in ends], chat_template=template)


def load(tmp_path, rows, tokenizer, **options) -> list[str]:
    """Each row's text as learnt: what is not, in brackets."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shown(load_demonstrations(path, tokenizer, **options), tokenizer)


def shown(documents: Documents, tokenizer: Tokenizer) -> list[str]:
    texts = []
    for i in range(len(documents)):
        mask = documents.trained[documents.starts[i] : documents.ends[i]]
        words = [(tokenizer.backend.id_to_token(t), m) for t, m in zip(documents.ids(i).tolist(), mask)]
        text = "".join(word if learnt else f"[{word}]" for word, learnt in words)
        texts.append(text.replace("][", ""))
    return texts


def test_text_is_learnt_whole_and_ended_once(tmp_path):
    """Whichever of the end tokens stands there already; the end token is learnt, and so is one within the text."""
    rows = [{"text": text} for text in ("a b", "a<|im_end|>", "a<|endoftext|>", "a<|im_end|>b", "")]
    expected = ["a b<|im_end|>", "a<|im_end|>", "a<|endoftext|>", "a<|im_end|>b<|im_end|>", "<|im_end|>"]
    assert load(tmp_path, rows, make()) == expected
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the tokenizer has no end token"):
        load(tmp_path, rows, make(ends=()))


def test_a_completion_is_learnt_and_its_prompt_is_not(tmp_path):
    row = {"prompt": "a b ", "completion": "c", "ignored": 3}
    assert load(tmp_path, [row], make()) == ["[a b ]c<|im_end|>"]
    assert load(tmp_path, [row], make(), completion_only=False) == ["a b c<|im_end|>"]
    assert load(tmp_path, [{"prompt": "", "completion": "c"}], make()) == ["c<|im_end|>"]
    assert load(tmp_path, [{"prompt": "c", "completion": ""}], make()) == ["[c]<|im_end|>"]


def test_no_token_reaches_from_the_prompt_into_the_completion(tmp_path):
    """Joined, "b" and "c" would be one token, which the prompt alone never has when it is sampled from."""
    tokenizer = make(merges=[("b", "c")])
    assert load(tmp_path, [{"text": "abc"}], tokenizer) == ["abc<|im_end|>"]
    assert len(tokenizer.encode("abc")) == 2
    path = tmp_path / "pair.jsonl"
    path.write_text('{"prompt": "ab", "completion": "c"}\n')
    documents = load_demonstrations(path, tokenizer)
    assert documents.ids(0).tolist() == [*tokenizer.encode("ab"), *tokenizer.encode("c"), tokenizer.end_ids[0]]
    assert documents.trained.tolist() == [0, 0, 1, 1]


def test_a_tokenizer_that_puts_a_space_in_front_is_asked_once(tmp_path):
    """Encoded alone, a completion would begin with a space that the whole text does not have."""
    tokenizer = make()
    tokenizer.backend.normalizer = tokenizers.normalizers.Prepend(" ")
    assert load(tmp_path, [{"prompt": "a ", "completion": "b"}], tokenizer) == ["[ a ]b<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_the_assistants_turns_are_learnt_up_to_their_end_token(tmp_path, template):
    system = [{"role": "system", "content": "d"}]  # without one, the template would write its own
    text = "<|im_start|>system\nd<|im_end|>\n<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nb a<|im_end|>\n"
    text += "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nc c<|im_end|>\n"
    row = {"messages": system + CHAT}
    assert load(tmp_path, [row], make(template)) == [text]
    learnt = f"[{text}]".replace("b a<|im_end|>", "]b a<|im_end|>[").replace("c c<|im_end|>", "]c c<|im_end|>[")
    assert load(tmp_path, [row], make(template), assistant_only=True) == [learnt]


def test_completions_that_are_messages(tmp_path):
    """All that the template writes behind the prompt is learnt, as in TRL; or the assistant's turns of it alone."""
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    prompt = "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nb a<|im_end|>\n"
    prompt += "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert load(tmp_path, [row], make(MARKED)) == [f"[{prompt}]c c<|im_end|>\n"]
    assert load(tmp_path, [row], make(MARKED), assistant_only=True) == [f"[{prompt}]c c<|im_end|>[\n]"]
    both = load(tmp_path, [row], make(MARKED), assistant_only=True, completion_only=False)
    assert both == [f"[{prompt}]c c<|im_end|>[\n]".replace("b a<|im_end|>", "]b a<|im_end|>[")]


def test_a_template_whose_prefixes_do_not_line_up_is_refused_by_line(tmp_path):
    """It drops what was thought in earlier turns, so these are not what the model was asked to say."""
    chat = [{**m, "content": m["content"].replace("b a", "<think>b</think>a")} for m in CHAT]
    unmarked = QWEN_LIKE.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
    rows = [{"messages": CHAT}, {"messages": chat}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: message 2: the chat template writes"):
        load(tmp_path, rows, make(unmarked), assistant_only=True)
    assert load(tmp_path, rows[:1], make(unmarked), assistant_only=True)[0].count("c c<|im_end|>") == 1
    other = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    with pytest.raises(ValueError, match="rows.jsonl:1: the chat template writes the prompt in another way alone"):
        load(tmp_path, [{"prompt": CHAT[:1], "completion": CHAT[1:2]}], make(other))


def test_a_prompt_for_the_assistant_that_takes_back_an_end_is_refused(tmp_path):
    """Its prefix of the second answer is shorter than the first answer, whose end would be learnt twice."""
    source = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last or not add_generation_prompt %}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    chat = [CHAT[0], CHAT[1], CHAT[3]]
    with pytest.raises(ValueError, match="rows.jsonl:1: message 3: the chat template writes"):
        load(tmp_path, [{"messages": chat}], make(source), assistant_only=True)


def test_marks_are_of_the_template_not_of_the_messages(tmp_path):
    chat = [{"role": "user", "content": "{% generation %}"}, {"role": "assistant", "content": "b"}]
    tokenizer = make(MARKED)
    assert [text for text, learnt in tokenizer.turns(chat) if learnt] == ["b<|im_end|>"]
    assert "".join(text for text, _ in tokenizer.turns(chat)) == tokenizer.render(chat, add_generation_prompt=False)


def some(n: int = 50, seed: int = 0) -> Documents:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 30, n)
    return Documents.of([(generator.integers(99, size=k), generator.random(k) > 0.5) for k in lengths])


def test_truncation_cuts_tails_and_leaves_out_what_has_nothing_to_learn():
    whole = some()
    cut = whole.truncated(7)
    kept = [i for i in range(50) if whole.mask(i)[:7].any()]
    assert [cut.ids(j).tolist() for j in range(len(cut))] == [whole.ids(i)[:7].tolist() for i in kept]
    assert [cut.mask(j).tolist() for j in range(len(cut))] == [whole.mask(i)[:7].tolist() for i in kept]
    assert np.shares_memory(cut.tokens, whole.tokens)
    assert len(whole.truncated(None)) == sum(whole.mask(i).any() for i in range(50))


@pytest.mark.parametrize("length", [2, 7, 29, 1000])
def test_wrapped_rows_are_full_and_keep_every_token(length):
    whole = some()
    pieces, starts = whole.wrapped(length)
    assert np.concatenate([pieces.ids(i) for i in range(len(pieces))]).tolist() == whole.tokens.tolist()
    sizes = [int(pieces.lengths[a:b].sum()) for a, b in zip(starts, starts[1:])]
    assert sizes[:-1] == [length] * (len(sizes) - 1) and 0 < sizes[-1] <= length
    ends = set(whole.ends.tolist())  # every document's end is a piece's end
    assert ends - {0} <= set(pieces.ends.tolist()) and (pieces.lengths > 0).all()
    short = whole.truncated(5)
    pieces, _ = short.wrapped(length)  # of documents that do not follow one another
    ids = [short.ids(i) for i in range(len(short))]
    assert np.concatenate([pieces.ids(i) for i in range(len(pieces))]).tolist() == np.concatenate(ids).tolist()


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a" * (i % 9), "completion": "b" * i}) + "\n" for i in range(40)))
    return path


def same(one: Documents, other: Documents) -> bool:
    names = ("tokens", "trained", "starts", "ends", "first")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names) and one.digest == other.digest


def test_the_cache_holds_what_was_read_and_is_read_again(file, tmp_path, monkeypatch):
    plain, cached = load_demonstrations(file, make()), load_demonstrations(file, make(), cache_dir=tmp_path / "cache")
    assert same(plain, cached) and isinstance(cached.tokens, np.memmap) and not isinstance(plain.tokens, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_demonstration", None)
        assert same(plain, load_demonstrations(file, make(), cache_dir=tmp_path / "cache"))
        with pytest.raises(TypeError):  # other options, other tokens
            load_demonstrations(file, make(), completion_only=False, cache_dir=tmp_path / "cache")
        with pytest.raises(TypeError):
            load_demonstrations(file, make(merges=[("b", "b")]), cache_dir=tmp_path / "cache")
        file.write_text('{"text": "a"}\n')
        with pytest.raises(TypeError):
            load_demonstrations(file, make(), cache_dir=tmp_path / "cache")
    assert len(load_demonstrations(file, make(), cache_dir=tmp_path / "cache")) == 1


def test_tokens_go_to_the_disk_as_they_come(file, tmp_path):
    """What is held is flushed at every so many tokens, and the result is the same."""
    plain = load_demonstrations(file, make())
    pairs = ((plain.ids(i), plain.trained[plain.starts[i] : plain.ends[i]]) for i in range(len(plain)))
    (tmp_path / "parts").mkdir()
    data._write_files(pairs, tmp_path / "parts", at_least=50)
    assert same(plain, data._mapped(tmp_path / "parts"))


def test_a_bad_row_leaves_no_cache(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="rows.jsonl:2: text must be text"):
            load_demonstrations(path, make(), cache_dir=tmp_path / "cache")
    path.write_text('{"text": "a"}\n')
    assert len(load_demonstrations(path, make(), cache_dir=tmp_path / "cache")) == 1


@pytest.mark.parametrize("name", [*data.FLAT, "header.json"])
def test_a_cache_that_is_not_whole_is_named(file, tmp_path, name):
    load_demonstrations(file, make(), cache_dir=tmp_path / "cache")
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    path = folder / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="--cache_dir: .* is not whole .*; remove it, and it is made again"):
        load_demonstrations(file, make(), cache_dir=tmp_path / "cache")
