"""Chat, its lines piped in: the answers are the engine's own, and the conversation is what the model is given."""

import io
import sys

import pytest
from test_evaluate import call

from minitrl import chat, checkpoint
from minitrl.console import printable
from minitrl.rollout import Engine

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}={% endfor %}"
GREEDY = ["--temperature", 0, "--top_p", 1, "--dtype", "float32", "--max_tokens", 6]


@pytest.fixture(scope="module")
def talker(tiny, tmp_path_factory):
    """The tiny model with a chat template."""
    model, tokenizer = checkpoint.load(tiny.folder / "model")
    tokenizer.chat_template = TEMPLATE
    checkpoint.save(model, tokenizer, folder := tmp_path_factory.mktemp("talker") / "model")
    return folder


def talk(folder, lines, capsys, monkeypatch, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return call(chat.main, ["--model", folder, *GREEDY, *options], capsys)


def said(folder, messages, max_tokens=6):
    model, tokenizer = checkpoint.load(folder)
    return Engine(model, tokenizer).generate([messages], max_tokens=max_tokens, temperature=0)[0][0]


def line_of(completion, max_tokens=6):
    cut = f" [cut: --max_tokens {max_tokens}]" if completion.finish_reason == "length" else ""
    return completion.text + cut + "\n"


def test_a_conversation(talker, capsys, monkeypatch):
    """The second turn sees the first and its answer; /reset forgets them; after /quit nothing is read."""
    user = [{"role": "user", "content": text} for text in ("1+2", "b", "c")]
    one = said(talker, user[:1])
    two = said(talker, [user[0], {"role": "assistant", "content": one.text}, user[1]])
    code, printed = talk(talker, ["1+2", "", "b", "/reset", "c", "/quit", "a"], capsys, monkeypatch)
    assert code == 0 and printed == line_of(one) + line_of(two) + line_of(said(talker, user[2:]))


def test_the_system_message(talker, capsys, monkeypatch):
    messages = [{"role": "system", "content": "abc"}, {"role": "user", "content": "1+2"}]
    _, printed = talk(talker, ["a", "/reset", "1+2"], capsys, monkeypatch, "--system", "abc")
    assert printed.endswith(line_of(said(talker, messages)))


def test_without_a_template_each_line_is_continued(tiny, capsys, monkeypatch):
    folder = tiny.folder / "model"
    code, printed = talk(folder, ["1+2=", "3"], capsys, monkeypatch)
    assert code == 0 and printed == line_of(said(folder, "1+2=")) + line_of(said(folder, "3"))
    code, printed = talk(folder, ["1"], capsys, monkeypatch, "--system", "x")
    assert code == 1 and "--system x: must be left out" in printed


def test_no_room(talker, capsys, monkeypatch):
    """A long answer is cut where the positions end, and says so; a conversation beyond them is an error."""
    code, printed = talk(talker, ["1" * 70, "1" * 58], capsys, monkeypatch)
    assert code == 0 and "error: the conversation has 72 tokens" in printed and "Traceback" not in printed
    four = said(talker, [{"role": "user", "content": "1" * 58}], 4)
    cut = " [cut: the model's positions are used up]" if four.finish_reason == "length" else ""
    assert printed.startswith(four.text + cut + "\n")


def test_every_token_is_shown_as_it_comes(talker, monkeypatch):
    """One write a token, and characters of several tokens when they are whole."""
    shown = []
    monkeypatch.setattr("builtins.print", lambda *parts, end="\n", **_: shown.append("".join(parts) + end))
    model, tokenizer = checkpoint.load(talker)
    decode = tokenizer.decode
    halves = lambda ids, **_: decode(ids, **_)[:-1] + "\ufffd" if len(ids) == 3 else decode(ids, **_)  # noqa: E731
    monkeypatch.setattr(tokenizer, "decode", halves)
    options = [str(word) for word in ["--model", talker, *GREEDY]]
    engine = Engine(model, tokenizer)
    prompts = [[i, j] for i in range(1, 17) for j in range(1, 17)]
    prompt = next(tokenizer.backend.decode(p) for p in prompts if len(said(talker, p).text) == 6)
    text = chat.answer(engine, prompt, 1, chat.parse(chat.Config, options))
    *parts, _ = shown
    assert "".join(parts) == text and len(parts) == 6 and [len(part) for part in parts] == [1, 1, 0, 2, 1, 1]


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\nb\t\u202e", "\n\t") == "a\\x1b[2J\nb\t\\u202e"


def test_an_interrupted_answer_is_forgotten(talker, capsys, monkeypatch):
    """Ctrl-C amid the second answer: the third turn knows the first alone."""
    user = [{"role": "user", "content": text} for text in ("1+2", "b", "c")]
    one = said(talker, user[:1])
    three = said(talker, [user[0], {"role": "assistant", "content": one.text}, user[2]])
    step, calls = Engine.step, []

    def interrupted(engine):
        calls.append(engine)
        if len(calls) == len(one.ids) + 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, printed = talk(talker, ["1+2", "b", "c"], capsys, monkeypatch)
    assert code == 0 and printed.startswith(line_of(one)) and printed.endswith("\n" + line_of(three))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max_tokens", 0], "--max_tokens 0: must be at least 1"),
        (["--temperature", -1], "temperature must be 0"),
        (["--model", "nowhere"], "--model"),
    ],
)
def test_bad_options(talker, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    given = ["--model", talker] if "--model" not in options else []
    code, printed = call(chat.main, [*given, *options], capsys)
    assert code in (1, 2) and message in printed and "Traceback" not in printed
