"""Text to token ids and back, and the checkpoint's own chat template.

A thin layer over the `tokenizers` library, which reads `tokenizer.json` itself. Three decisions live here:

- No special token is ever added behind the caller's back: neither to plain text nor to a rendered chat. TRL encodes
  its prompts with `add_special_tokens=False` too, so a BOS stands in a prompt only where the template writes one.
- A chat template is a program that came with downloaded weights. It runs in jinja2's immutable sandbox, with a bound
  on the steps it takes, the memory it uses and the text it writes.
- A completion may end with any of the checkpoint's end tokens, and they are named in three files that do not always
  agree (Llama 3 has `<|end_of_text|>` in one and `<|eot_id|>` in another): `end_ids` is their union.
"""

import copy
import hashlib
import json
import re
import secrets
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

# What a template may use up. A real one takes a few steps a message; 100,000 is thousands of messages.
MAX_TEMPLATE_STEPS = 100_000
MAX_TEMPLATE_CHARACTERS = 10_000_000
MAX_TEMPLATE_INTEGER_BITS = 4096
MAX_TEMPLATE_MEMORY = 2**30  # bytes
MAX_TEMPLATE_SECONDS = 5.0  # of this thread on the processor, so that a machine that is busy or asleep costs nothing

# One rendering at a time: it limits the whole process's memory. Who takes a lot of that at once waits for it, too.
RENDERING = threading.Lock()

# The tokens that Hugging Face hands to a template as variables, under these names.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A `tokenizers.Tokenizer` with end tokens and a chat template.

    Args:
        backend: the tokenizer proper. Truncation and padding stored in it are switched off: a prompt's length is
            judged in one place, and never here.
        end_ids: ids that end a completion; the first is the one named `eos_token` where files are written.
        chat_template: jinja2 source, or None where only plain text is used.
        special_tokens: {"bos_token": "<s>", ...}, the variables a template sees.
        config, generation_config: what tokenizer_config.json and generation_config.json held, kept for `save`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_ids, *, chat_template: str | None = None,
                 special_tokens: dict[str, str] | None = None, config: dict | None = None,
                 generation_config: dict | None = None):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.config = dict(config or {})
        self.generation_config = dict(generation_config or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.now: datetime | None = None  # what a template's strftime_now formats; None: the time of each rendering
        self._template = None  # compiled at first use

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face folder. Only files are read; nothing is downloaded or executed.

        Raises ValueError naming the file that is missing, unreadable, or contradicts another.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; minitrl reads fast tokenizers only (write one with transformers: "
                             f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...))")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
        # special_tokens_map.json is the older home of what tokenizer_config.json says
        config = read_json(folder / "special_tokens_map.json", {}) | read_json(folder / "tokenizer_config.json", {})
        special_tokens = {name: _content(config[name]) for name in SPECIAL_TOKEN_NAMES if config.get(name)}
        _check_added_tokens(backend, config, folder)
        generation_config = read_json(folder / "generation_config.json", {})
        return cls(
            backend,
            _end_ids(backend, special_tokens, folder, generation_config),
            chat_template=_chat_template(folder, config),
            special_tokens=special_tokens,
            config=config,
            generation_config=generation_config,
        )

    def save(self, folder) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json as transformers and vLLM read them.

        The template stands inside tokenizer_config.json, where transformers 4 and 5 both look. `auto_map` is left out:
        it names Python files that are not written.
        """
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        if config.pop("auto_map", None) is not None:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.end_ids:
            config["eos_token"] = self.backend.id_to_token(self.end_ids[0])
        config.update(self.special_tokens)
        config.pop("chat_template", None)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", config)

        generation_config = dict(self.generation_config)
        if self.end_ids:
            generation_config["eos_token_id"] = self.end_ids[0] if len(self.end_ids) == 1 else list(self.end_ids)
        for name in ("bos_token", "pad_token"):
            if name in self.special_tokens:
                generation_config.setdefault(f"{name}_id", self.backend.token_to_id(self.special_tokens[name]))
        write_json(folder / "generation_config.json", generation_config)

    def padded(self) -> "Tokenizer":
        """The same with a padding token that ends no text, so that a padded end token is not taken for padding.

        Without one, where there is no other special token to pad with: then transformers refuses to pad.
        """
        other = copy.copy(self)
        other.special_tokens, other.config = dict(self.special_tokens), dict(self.config)
        tokens = [self.special_tokens.get(name) for name in ("pad_token", "unk_token", "bos_token")]
        usable = [token for token in tokens if token and self.backend.token_to_id(token) not in (None, *self.end_ids)]
        for home in (other.special_tokens, other.config):
            home.pop("pad_token", None)
        other.special_tokens |= {"pad_token": token for token in usable[:1]}
        return other

    def fingerprint(self) -> str:
        """A digest of all that decides which ids a text or a conversation gets."""
        special = {name: token for name, token in self.special_tokens.items() if name != "pad_token"}  # never written
        parts = [self.backend.to_str(), self.chat_template, special, self.end_ids]
        if "strftime_now" in (self.chat_template or ""):
            parts.append((self.now or datetime.now()).isoformat())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no special token added; special tokens spelt out in the text become their ids."""
        try:
            if len(text) > 2**14:  # a batch lets other threads go on, and a server's must: a MiB takes seconds
                return self.backend.encode_batch([text], add_special_tokens=False)[0].ids
            return self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"cannot encode {text!r:.80}: not a text of valid Unicode") from error

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of `ids` as the tokenizer's own decoder gives it. No space is tidied away afterwards."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, prompt: str | list[dict]) -> list[int]:
        """Ids of a prompt: plain text as it stands, messages through the chat template up to the assistant's turn."""
        return self.encode(prompt if isinstance(prompt, str) else self.render(prompt))

    def render(self, messages: list[dict], add_generation_prompt: bool = True, mark: str = "") -> str:
        """The text that the checkpoint's chat template makes of `messages` (each {"role": ..., "content": ...}).

        `mark` is written where the template's own {% generation %} marks stand, around what the assistant says.
        Raises ValueError where there is no template, where it refuses the messages, or where it exceeds its bounds.
        """
        if self.chat_template is None:
            raise ValueError("the prompt is a list of messages, but the model's tokenizer has no chat template: "
                             "use plain-text prompts, or a --model whose folder has one (chat_template.jinja)")
        if self._template is None:
            self._template = _Template(self.chat_template)
        # As transformers does: a key whose value is None counts as absent
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return self._template.render(mark, messages=messages, tools=None, documents=None,
                                     add_generation_prompt=add_generation_prompt,
                                     strftime_now=lambda form: (self.now or datetime.now()).strftime(form),
                                     **self.special_tokens)

    def turns(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The text of `messages` in pieces, each with whether the assistant says it: what a demonstration trains.

        Where the template has {% generation %} marks, they tell. Else each assistant's turn is what rendering up to it,
        with the prompt for it, lacks of rendering with it, up to its end token; ValueError where those are no prefixes
        of the whole (a template that writes earlier turns another way than the last one).
        """
        if re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.chat_template or ""):
            mark = secrets.token_hex(16)  # no message can hold it
            return [(text, i % 2 == 1) for i, text in enumerate(self.render(messages, False, mark).split(mark))]
        whole, pieces, at = self.render(messages, False), [], 0
        ends = [self.backend.id_to_token(token_id) for token_id in self.end_ids]
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before, after = self.render(messages[:i], True), self.render(messages[: i + 1], False)
            if not whole.startswith(after) or not after.startswith(before) or len(before) < at:
                raise ValueError(f"message {i + 1}: the chat template writes the messages up to it in another way "
                                 "than within the whole conversation, so where the assistant speaks can't be told; use "
                                 "a template with {% generation %} marks, or one row for each turn")
            spoken = whole[len(before) : len(after)]
            end = max((spoken.rfind(token) + len(token) for token in ends if token in spoken), default=len(spoken))
            pieces += [(whole[at : len(before)], False), (spoken[:end], True)]
            at = len(before) + end
        return [*pieces, (whole[at:], False)]


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in `path`; `default`, where one is given, if there is no such file. ValueError names the file."""
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or nested too deep
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token) -> str:
    """A special token's text: files hold either the text or an object that describes the token."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: a special token must be text, found {token!r}")
    return text


def _check_added_tokens(backend: tokenizers.Tokenizer, config: dict, folder: Path) -> None:
    """Refuse a tokenizer_config.json that gives a token another id than tokenizer.json does, or one it lacks."""
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be an object, from ids to "
                         f"tokens, not {type(added).__name__}")
    for token_id, token in added.items():
        found = backend.token_to_id(_content(token))
        if str(found) != token_id:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: added token {_content(token)!r} has id {token_id}, "
                             f"but in tokenizer.json it has id {found}; save the tokenizer again with transformers")


def _end_ids(backend, special_tokens: dict, folder: Path, generation_config: dict) -> list[int]:
    """The union of the end tokens that tokenizer_config.json, generation_config.json and config.json name."""
    ids = []
    if "eos_token" in special_tokens:
        ids.append(backend.token_to_id(special_tokens["eos_token"]))
        if ids[0] is None:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: eos_token {special_tokens['eos_token']!r} "
                             "is not in tokenizer.json")
    sources = {"generation_config.json": generation_config, "config.json": read_json(folder / "config.json", {})}
    for name, source in sources.items():
        named = source.get("eos_token_id")
        named = named if isinstance(named, list) else [] if named is None else [named]
        for token_id in named:
            if type(token_id) is not int or token_id < 0:
                raise ValueError(f"{folder / name}: eos_token_id {token_id!r} is not a token id")
            if token_id >= 2**32 or backend.id_to_token(token_id) is None:
                raise ValueError(f"{folder / name}: eos_token_id {token_id} is not in tokenizer.json, so nothing would "
                                 "ever end with it")
        ids += named
    return ids


def _chat_template(folder: Path, config: dict) -> str | None:
    """chat_template.jinja, else "chat_template" of tokenizer_config.json: a text, or the one named "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: no chat template is named \"default\" "
                             f"(there are: {', '.join(map(str, named))})")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be text, or a list of named texts")
    return template


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text: `render` writes its `mark` there."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        mark = [jinja2.nodes.Output([jinja2.nodes.EnvironmentAttribute("mark")])]
        return mark + parser.parse_statements(("name:endgeneration",), drop_needle=True) + mark


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox (no underscore attributes, no mutation of what it is given) with bounds on work.

    The sandbox itself limits one range() to 100,000 but not two nested ones, so a step is counted at every turn of
    a loop and every macro call. Numbers are kept short because 10**10**10 takes no step and no memory for hours. What a
    step may take is bounded by memory, and so is its time: the deadline, looked at in each step, bounds all of them.
    """

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self):
        # jinja2 computes constant expressions while it compiles, outside the bounds: in code unless `optimized` is
        # off, and in {{ }} unless a `finalize` needs the context
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_as_it_is,
                         extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _tojson
        self.globals.update(raise_exception=_raise_exception)
        self.steps, self.deadline, self.mark = 0, 0.0, ""

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MAX_TEMPLATE_STEPS:
            raise jinja2.exceptions.SecurityError(f"more than {MAX_TEMPLATE_STEPS:,} loop steps")
        self.check_time()

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise jinja2.exceptions.SecurityError(f"more than {MAX_TEMPLATE_SECONDS} seconds")

    def call_binop(self, context, operator, left, right):
        self.check_time()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_TEMPLATE_INTEGER_BITS:
                raise jinja2.exceptions.SecurityError(f"a number of more than {MAX_TEMPLATE_INTEGER_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


@contextmanager
def _limited_memory():
    """Let the process grow by at most MAX_TEMPLATE_MEMORY inside; beyond it Python raises MemoryError.

    Text can be multiplied in too many ways to check each (padding, formatting, joining, doubling in a loop), so the
    kernel is asked. The limit holds for all threads, which is why it is wide, and why RENDERING is held; a rendering
    takes about 50 us.
    """
    if sys.platform != "linux":  # elsewhere the limit is not enforced, or there is none
        yield
        return
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_TEMPLATE_MEMORY
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Template:
    """One compiled chat template."""

    def __init__(self, source: str):
        self.sandbox = _Sandbox()
        try:
            tree = self.sandbox.parse(source)
            # The call is made through the environment, not through a name, so no template can rebind it
            for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock))):
                count = jinja2.nodes.EnvironmentAttribute("count_step")
                node.body.insert(0, jinja2.nodes.ExprStmt(jinja2.nodes.Call(count, [], [], None, None)))
            code = self.sandbox.compile(tree)
        except Exception as error:  # TemplateError; SyntaxError or RecursionError where it is nested too deep
            raise ValueError(f"the checkpoint's chat template does not compile: {error}") from error
        self.template = jinja2.Template.from_code(self.sandbox, code, self.sandbox.globals)

    def render(self, mark: str = "", **variables) -> str:
        pieces, length = [], 0
        with RENDERING:
            self.sandbox.mark = mark
            self.sandbox.steps, self.sandbox.deadline = 0, time.thread_time() + MAX_TEMPLATE_SECONDS
            try:
                with _limited_memory():
                    for piece in self.template.generate(**variables):
                        pieces.append(piece)
                        length += len(piece)
                        if length > MAX_TEMPLATE_CHARACTERS:
                            raise jinja2.exceptions.SecurityError(f"more than {MAX_TEMPLATE_CHARACTERS:,} characters")
            except Exception as error:  # a template can raise anything: TypeError from an operator, MemoryError, ...
                raise ValueError(f"the checkpoint's chat template fails on these messages: "
                                 f"{type(error).__name__}: {error}") from error
        return "".join(pieces)


@jinja2.pass_context
def _as_it_is(context, value):
    return value


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Plain JSON. jinja2's own filter escapes <, > and & for HTML, which would change what the model reads."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.exceptions.TemplateError(message)
