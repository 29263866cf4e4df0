"""Encoding, end tokens, and chat templates: the checkpoint's own, rendered where they can do no harm."""

import json
import sys
import time
from contextlib import suppress
from datetime import datetime

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from minitrl import tokenizer as tokenizer_file
from minitrl.tokenizer import Tokenizer, _Template, read_json

MEMORY_LIMIT = None
with suppress(ImportError):  # not on Windows
    import resource

    MEMORY_LIMIT = resource.getrlimit(resource.RLIMIT_AS)

CHATML = (  # the shape of SmolLM2's: a default system message, one line
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe terse<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_LIKE = """\
{%- if tools %}
    {{- 'tools: ' + tools | tojson }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must come first') }}
    {%- endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{ content | trim }}{% endgeneration %}{{ '<|im_end|>' }}
    {%- if message.name is defined %}{{ {'name': message.name} | tojson }}{% endif %}
    {% if loop.index0 > 5 %}
        {% break %}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "What is 1 + 2?"}],
    [{"role": "system", "content": "Count."}, {"role": "user", "content": "  a <b> & \"c\"\n\nü 日本 🙂 "}],
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>hm</think>\n\ny", "name": "é<&"},
        {"role": "user", "content": "<|im_end|> and <|im_start|>"},
    ],
    [{"role": "user", "content": str(i), "name": None} for i in range(9)],
]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """256 bytes and three special tokens: 256 <|endoftext|>, 257 <|im_start|>, 258 <|im_end|>.

    It would put 257 before every text, as Llama's puts its BOS: nothing here may let it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    return backend


def write_folder(folder, tokenizer_config=None, **files):
    """A folder with the byte tokenizer; `files` are JSON contents by stem."""
    folder.mkdir(exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    default = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": CHATML}
    files["tokenizer_config"] = default if tokenizer_config is None else tokenizer_config
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def test_text_round_trips_and_nothing_is_added(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path))
    for text in ("", " ", "plain", "naïve 日本 🙂\r\n\t\0", "  two  spaces  "):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 259
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    assert tokenizer.encode("a<|im_end|>") == [*tokenizer.encode("a"), 258]
    assert tokenizer.decode([*tokenizer.encode("a"), 258]) == "a"
    assert tokenizer.decode([*tokenizer.encode("a"), 258], skip_special_tokens=False) == "a<|im_end|>"
    assert tokenizer.prompt_ids("ab") == tokenizer.encode("ab")


def test_stored_truncation_and_padding_are_off(tmp_path):
    """A tokenizer.json may carry the truncation of whoever saved it, which would cut prompts in silence."""
    folder = write_folder(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.load(folder).encode("a" * 9)) == 9
    assert len(Tokenizer.load(folder).encode("a")) == 1


def test_lone_surrogate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot encode"):
        Tokenizer.load(write_folder(tmp_path)).encode("a\ud800")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, (258,)),
        ({"generation_config": {"eos_token_id": [258, 256]}}, (258, 256)),
        ({"config": {"eos_token_id": 256}, "generation_config": {"eos_token_id": 257}}, (258, 257, 256)),
        ({"config": {"eos_token_id": None}, "generation_config": {}}, (258,)),
    ],
)
def test_end_ids_are_the_union_of_three_files(tmp_path, files, expected):
    assert Tokenizer.load(write_folder(tmp_path, **files)).end_ids == expected


@pytest.mark.parametrize("bad", ["2", -1, True, 2.0, [258, None]])
def test_bad_end_id_names_the_file(tmp_path, bad):
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id"):
        Tokenizer.load(write_folder(tmp_path, generation_config={"eos_token_id": bad}))


def test_files_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'<nope>' is not in tokenizer.json"):
        Tokenizer.load(write_folder(tmp_path, {"eos_token": "<nope>"}))
    with pytest.raises(ValueError, match="has id 300, but in tokenizer.json it has id 258"):
        Tokenizer.load(write_folder(tmp_path, {"added_tokens_decoder": {"300": {"content": "<|im_end|>"}}}))
    with pytest.raises(ValueError, match="tokenizer_config.json: added_tokens_decoder must be an object, .* not list"):
        Tokenizer.load(write_folder(tmp_path, {"added_tokens_decoder": [{"content": "<|im_end|>"}]}))
    for unknown in (259, 2**32, 10**30):
        with pytest.raises(ValueError, match=f"config.json: eos_token_id {unknown} is not in tokenizer.json"):
            Tokenizer.load(write_folder(tmp_path, {}, config={"eos_token_id": unknown}))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    folder = write_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="tokenizer_config.json: expected a JSON object, found list"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="tokenizer_config.json: not valid JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        Tokenizer.load(folder)


def test_template_sources(tmp_path):
    """chat_template.jinja comes before tokenizer_config.json, where it may also be a list of named ones."""
    message = [{"role": "user", "content": "x"}]
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    folder = write_folder(tmp_path, {"chat_template": named, "bos_token": "<|im_start|>"})
    assert Tokenizer.load(folder).render(message) == "D<|im_start|>"
    (folder / "chat_template.jinja").write_text("J{{ messages[0].content }}")
    assert Tokenizer.load(folder).render(message) == "Jx"
    with pytest.raises(ValueError, match='no chat template is named "default"'):
        Tokenizer.load(write_folder(tmp_path / "other", {"chat_template": named[:1]}))
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer.load(write_folder(tmp_path / "none", {})).prompt_ids(message)


def test_template_dialect():
    """Blocks leave no blank lines behind, JSON is not escaped for HTML, and the tags that others know are known."""
    source = ("{% for m in messages %}\n  {% if loop.index0 == 2 %}\n    {% break %}\n  {% endif %}\n{{ m | tojson }}\n"
              "{% endfor %}\n{% generation %}{{ bos_token }}{% endgeneration %}{{ tools is none }}{{ x is defined }}"
              "{{ strftime_now('%%') }}")
    tokenizer = Tokenizer(byte_tokenizer(), [258], chat_template=source, special_tokens={"bos_token": "<s>"})
    messages = [{"a": "<é>"}, {"b": 'x"&', "c": None}, {"d": 1}]
    assert tokenizer.render(messages) == '{"a": "<é>"}\n{"b": "x\\"&"}\n<s>TrueFalse%'
    assert messages[1] == {"b": 'x"&', "c": None}


def test_template_refusal_is_one_clear_error():
    tokenizer = Tokenizer(byte_tokenizer(), [258], chat_template=QWEN_LIKE)
    with pytest.raises(ValueError, match="chat template fails on these messages: .*System message must come first"):
        tokenizer.render([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    with pytest.raises(ValueError, match="does not compile"):
        Tokenizer(byte_tokenizer(), [258], chat_template="{% if %}").render([])
    with pytest.raises(ValueError, match="does not compile"):
        _Template("{% for a in [1] %}" * 30 + "{% endfor %}" * 30)


def test_saved_tokenizer_is_the_same(tmp_path):
    """One made in memory, saved and loaded, encodes, renders and ends alike; auto_map does not survive."""
    made = Tokenizer(byte_tokenizer(), [258, 256], chat_template=QWEN_LIKE,
                     special_tokens={"pad_token": "<|endoftext|>"},
                     config={"auto_map": {"AutoTokenizer": ["evil.Tok", None]}, "tokenizer_class": "Tok"},
                     generation_config={"temperature": 0.6})
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.end_ids == made.end_ids and again.special_tokens["pad_token"] == "<|endoftext|>"
    for conversation in CONVERSATIONS:
        assert again.prompt_ids(conversation) == made.prompt_ids(conversation)
    config = read_json(tmp_path / "tokenizer_config.json")
    assert "auto_map" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = {"temperature": 0.6, "eos_token_id": [258, 256], "pad_token_id": 256}
    assert read_json(tmp_path / "generation_config.json") == generation


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999999999) %}{% endfor %}",
        "{% set s = 'abcdefghij' * 9 %}" + "{% for a in s %}" * 9 + "{% endfor %}" * 9,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ nothing.there }}",
    ],
)
def test_hostile_template_ends_in_one_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="chat template fails on these messages"):
        _Template(source).render(messages=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'x'.center(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'x' | center(10000000000) }}",
        "{% set x = 'x' | center(10000000000) %}",
        "{% if 'x' | center(10000000000) == 'y' %}{% endif %}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_template_cannot_fill_the_memory(source):
    with pytest.raises(ValueError, match="MemoryError"):
        _Template(source).render(messages=[])
    assert resource.getrlimit(resource.RLIMIT_AS) == MEMORY_LIMIT


def test_a_template_has_so_many_seconds(monkeypatch):
    """Few steps and bounded memory, and yet each turn writes hundreds of megabytes."""
    monkeypatch.setattr(tokenizer_file, "MAX_TEMPLATE_SECONDS", 0.05)
    for turn in ("{% set x = 'a' * 400000000 %}", "{% set x = '%400000000d' % 1 %}"):
        before = time.thread_time()
        with pytest.raises(ValueError, match="more than 0.05 seconds"):
            _Template("{% for i in range(60) %}" + turn + "{% endfor %}").render(messages=[])
        assert time.thread_time() - before < 5
    monkeypatch.setattr(tokenizer_file, "MAX_TEMPLATE_SECONDS", 5.0)
    assert _Template("{{ 'a' * 3 }}").render() == "aaa"


def test_the_time_of_a_template_can_be_held():
    source = "{% macro day() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}{{ day() }}"
    tokenizer = Tokenizer(byte_tokenizer(), [258], chat_template=source)
    tokenizer.now = datetime(2024, 7, 26, 23, 59)
    assert tokenizer.render([]) == "26 Jul 2024 23:59"
    tokenizer.now = None
    assert str(datetime.now().year) in tokenizer.render([])


def test_bounds_are_of_one_rendering():
    template = _Template("{% for a in range(60000) %}{% endfor %}{{ 2 ** 2000 > 1 }}")
    assert [template.render(), template.render()] == ["True", "True"]
    with pytest.raises(ValueError, match="more than 4,096 bits"):
        _Template("{{ 2 ** 5000 }}").render()


def test_step_count_cannot_be_rebound():
    loops = "{% for a in range(99999) %}{% for b in [1, 2] %}{% endfor %}{% endfor %}"
    source = "{% set count_step = 1 %}{% set environment = 1 %}" + loops
    with pytest.raises(ValueError, match="loop steps"):
        _Template(source).render(messages=[], count_step=1)


@pytest.mark.parity
@pytest.mark.parametrize("template", [CHATML, QWEN_LIKE], ids=["chatml", "qwen"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_transformers(tmp_path, template, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(byte_tokenizer(), [258], chat_template=template)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 258
    for conversation in CONVERSATIONS:
        text = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert tokenizer.render(conversation, add_generation_prompt) == text
        ids = theirs.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
