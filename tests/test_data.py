"""JSONL in: every bad line is named before any compute; the order of rows is a function of (seed, place)."""

import json

import pytest

from minitrl import rewards
from minitrl.data import RESERVED, load_prompts, numbered_rows, order


class Bytes:
    """A tokenizer of one token a byte; conversations are joined by newlines."""

    def prompt_ids(self, prompt):
        return list((prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)).encode())


def rows_of(path) -> list[dict]:
    return [row for _, row in numbered_rows(path)]


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_reads_rows_with_bom_crlf_blank_lines_and_no_last_newline(write):
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b", "n": null}')
    assert rows_of(path) == [{"prompt": "a"}, {"prompt": "b", "n": None}]


def test_lines_end_at_newline_only_and_naughty_text_survives(write):
    """str.splitlines would break at U+2028, U+0085 and the form feed, which may stand in JSON strings as they are."""
    naughty = ["a\u2028b\u0085c", "\u202etxet", "Ω≈ç√∫", "👩‍👩‍👧", "\x00\x0c\x1b", "$(touch x)", "'; DROP TABLE", " "]
    naughty.append("x" * 2_000_000)
    rows = [{"prompt": text} for text in naughty]
    path = write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert rows_of(path) == rows
    assert [row["prompt"] for row in load_prompts(path, Bytes(), None)[0]] == naughty


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "bad JSON at character 15"),
        (b'{"prompt": "a"} {"prompt": "b"}', "Extra data"),
        (b"{'prompt': 'a'}", "bad JSON at character 2"),
        (b'["prompt"]', "not list"),
        (b'"prompt"', "not str"),
        (b"null", "not NoneType"),
        (b'{"prompt": "a", "x": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "x": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "x": 1e999}', "not JSON compliant"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt'"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "'y'"),
        (b'{"prompt": "\\ud800"}', "surrogates not allowed"),
        (b'{"prompt": "\xff"}', "can't decode byte 0xff"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    path = write(b'{"prompt": "fine"}\n\n' + line + b'\n{"prompt": "fine"}\n')
    with pytest.raises(ValueError, match=message) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_files_that_hold_no_rows(write, tmp_path):
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf\n"):
        with pytest.raises(ValueError, match="no rows"):
            rows_of(write(content))
    for missing in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            rows_of(missing)


def test_parquet_is_refused_with_the_way_to_convert_it(write):
    for path in (write(b"PAR1\x15\x04", "a.jsonl"), write(b'{"prompt": "a"}', "a.parquet")):
        with pytest.raises(ValueError, match="from_parquet"):
            rows_of(path)


def test_prompts_of_both_kinds_with_all_other_keys_as_columns(write):
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": talk, "domain": "chat"}]
    loaded, dropped = load_prompts(write("\n".join(map(json.dumps, rows))), Bytes(), None)
    assert dropped == 0
    assert loaded[0] == {"prompt": "2+2=", "prompt_ids": list(b"2+2="), "columns": {"answer": "4", "domain": None}}
    columns = {"answer": None, "domain": "chat"}
    assert loaded[1] == {"prompt": talk, "prompt_ids": list(b"Be short.\nHi"), "columns": columns}


def test_long_prompts_are_left_out_and_counted_never_cut(write):
    path = write('{"prompt": "abc"}\n{"prompt": "abcd"}\n{"prompt": "abcde"}')
    loaded, dropped = load_prompts(path, Bytes(), 4)
    assert [row["prompt"] for row in loaded] == ["abc", "abcd"] and dropped == 1
    with pytest.raises(ValueError, match="all 3 prompts are longer than --max_prompt_length 2"):
        load_prompts(path, Bytes(), 2)


def _messages(*pairs):
    return json.dumps({"prompt": [{"role": role, "content": content} for role, content in pairs]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "a"}', 'no "prompt"; this row has question'),
        ("{}", "no keys"),
        ('{"prompt": null}', "must be text or a list"),
        ('{"prompt": 3}', "must be text or a list"),
        ('{"prompt": []}', "must be text or a list"),
        ('{"prompt": {"role": "user", "content": "a"}}', "must be text or a list"),
        ('{"prompt": ""}', "no tokens"),
        ('{"prompt": ["a"]}', "a message is"),
        ('{"prompt": [{"role": "user"}]}', "a message is"),
        ('{"prompt": [{"role": "user", "content": "a", "tool_calls": []}]}', "no tools"),
        (_messages(("User", "a")), "'User'"),
        (_messages(("tool", "a"), ("user", "a")), "'tool'"),
        (_messages((None, "a")), "None"),
        (_messages(("user", None)), "content must be text"),
        (_messages(("user", [{"type": "image"}])), "no images"),
        (_messages(("user", "a"), ("assistant", "b")), "the last message"),
        *((json.dumps({"prompt": "a", name: 1}), f"may not be called '{name}'") for name in RESERVED),
    ],
)
def test_a_bad_prompt_is_named_with_its_line(write, row, message):
    path = write('{"prompt": "fine"}\n' + row)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(path, Bytes(), None)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_what_the_chat_template_refuses_is_named_with_its_line(write):
    class Refuses:
        def prompt_ids(self, prompt):
            raise ValueError("conversation roles must alternate")

    with pytest.raises(ValueError, match=r"data.jsonl:1: conversation roles must alternate"):
        load_prompts(write(_messages(("user", "a"))), Refuses(), None)


def test_reserved_names_are_what_rewards_get():
    assert RESERVED == rewards.GIVEN


def test_order_visits_every_row_once_an_epoch():
    rows = order(7, 0, 35, seed=3)
    epochs = [rows[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("n", [1, 5, 64])
def test_order_in_pieces_is_order_at_once(n):
    whole = order(n, 0, 200, seed=0)
    assert len(whole) == 200
    for size in (1, 3, n, 64):
        starts = range(0, 200, size)
        assert [row for start in starts for row in order(n, start, min(size, 200 - start), seed=0)] == whole


def test_order_depends_on_the_seed_alone():
    assert order(1000, 0, 50, seed=1) == order(1000, 0, 50, seed=1) != order(1000, 0, 50, seed=2)
    # (seed, epoch) and not seed + epoch, which would give seed 2 the epochs of seed 1 one later.
    assert order(1000, 1000, 1000, seed=1) != order(1000, 0, 1000, seed=2)
    assert order(5, 3, 0, seed=0) == []
    with pytest.raises(ValueError, match="n=0"):
        order(0, 0, 1, seed=0)
