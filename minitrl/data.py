"""Data sets are JSONL: one JSON object a line, checked as it is read, so that a bad line is named before any compute.

    {"prompt": "2 + 3 =", "answer": "5"}                                              text
    {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"}        conversation

Every other key is a column, which the reward functions receive. Demonstrations (`load_demonstrations`) have

    {"prompt": ..., "completion": ...}    {"messages": [...]}    {"text": "..."}

where prompt and completion are both text or both messages, and other keys are passed over. Preferences: pairs.py.
The order of training is a pure function of (seed, position): there is no iterator whose state would have to be saved,
and a resumed run, or one with another number of ranks, reads the same rows in the same order.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

ROLES = ("system", "user", "assistant")
# A column of such a name would collide with what a reward function gets anyway (see rewards.score).
RESERVED = ("prompts", "completions", "completion_ids", "step", "first_index")

# The files of a token cache: one array each, raw.
FLAT = {"tokens": numpy.int32, "trained": numpy.uint8, "ends": numpy.int64, "first": numpy.int64}
CACHE_VERSION = 1

PARQUET = """{path}: parquet is not read. Convert it to JSONL with the `datasets` package:
    python -c "import datasets; datasets.Dataset.from_parquet('{path}').to_json('data.jsonl')\""""


def load_prompts(path: str | Path, tokenizer, max_prompt_length: int | None) -> tuple[list[dict[str, Any]], int]:
    """Rows {"prompt", "prompt_ids", "columns"} for reinforcement learning, and how many prompts were too long.

    A prompt is text or a list of messages, and stays as it was; `prompt_ids` are its token ids, the very ids that are
    sampled from and trained on. Nothing is cut: a prompt of more than max_prompt_length tokens is left out and counted,
    and the caller prints the count (TRL 0.16.0 keeps the last max_prompt_length tokens, for training alone). All rows
    get the same columns: where a row lacks one that another row has, it holds None, and a reward may answer None.
    """
    rows, dropped = [], 0
    for line, row in numbered_rows(Path(path)):
        columns = dict(row)
        try:
            prompt = checked_prompt(columns)
            ids = tokenizer.prompt_ids(prompt)
            if not ids:
                raise ValueError("the prompt has no tokens; the first token needs something to be predicted from")
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            dropped += 1
        else:
            rows.append({"prompt": prompt, "prompt_ids": ids, "columns": columns})
    if not rows:
        limit = f"--max_prompt_length {max_prompt_length}"
        raise ValueError(f"{path}: all {dropped} prompts are longer than {limit}; raise it")
    names = dict.fromkeys(name for row in rows for name in row["columns"])
    for row in rows:
        row["columns"] = {name: row["columns"].get(name) for name in names}
    return rows, dropped


def fingerprint(rows: list[dict[str, Any]]) -> str:
    """A digest of what `load_prompts` or `pairs.load_preferences` gave: all ids and all columns, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([value for name, value in row.items() if name != "prompt"], default=list).encode())
    return digest.hexdigest()


def ended(tokenizer, ids: list[int]) -> list[int]:
    """The ids, with an end token last."""
    if not tokenizer.end_ids:
        raise ValueError("the tokenizer has no end token to end the text with; name one in generation_config.json")
    return ids if ids and ids[-1] in tokenizer.end_ids else [*ids, tokenizer.end_ids[0]]


@dataclass(frozen=True)
class Documents:
    """Token sequences to learn, one after another in two flat arrays, which may lie in files mapped into memory."""

    tokens: numpy.ndarray  # int32
    trained: numpy.ndarray  # uint8, 1 where the token is learnt
    starts: numpy.ndarray  # int64 (N,), where each document begins and ends
    ends: numpy.ndarray
    first: numpy.ndarray  # int64 (N,), where its first token stands that is learnt and has one before it; else its end
    digest: str  # of all that, as it was read

    @classmethod
    def of(cls, pairs) -> "Documents":
        """Of (ids, mask) for each, mask 1 where the token is learnt, held in memory."""
        arrays = array("i"), bytearray(), array("q"), array("q")
        digest = _write(pairs, arrays, lambda: None)
        return cls._from([numpy.frombuffer(part, dtype) for part, dtype in zip(arrays, FLAT.values())], digest)

    @classmethod
    def _from(cls, flat: list[numpy.ndarray], digest: str) -> "Documents":
        tokens, trained, ends, first = flat
        return cls(tokens, trained, numpy.concatenate([[0], ends[:-1]]), ends, first, digest)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens in each document."""
        return self.ends - self.starts

    def ids(self, i: int) -> numpy.ndarray:
        """A document's tokens."""
        return self.tokens[self.starts[i] : self.ends[i]]

    def mask(self, i: int) -> numpy.ndarray:
        """bool: those of its tokens that are learnt. The first is none: nothing stands before it."""
        mask = self.trained[self.starts[i] : self.ends[i]].astype(bool)
        mask[:1] = False
        return mask

    def truncated(self, max_length: int | None) -> "Documents":
        """The first `max_length` tokens of each, without the documents that then have none to learn."""
        ends = self.ends if max_length is None else numpy.minimum(self.ends, self.starts + max_length)
        kept = self.first < ends
        return replace(self, starts=self.starts[kept], ends=ends[kept], first=self.first[kept])

    def wrapped(self, length: int) -> tuple["Documents", numpy.ndarray]:
        """The documents end to end, cut at every `length` tokens: the pieces, and at which of them the rows begin.

        A piece is a document of its own: it sees nothing of what stands before it.
        """
        ends = numpy.cumsum(self.lengths)
        rows = numpy.arange(0, ends[-1], length)
        cuts = numpy.union1d(ends, rows)  # 0 among them, and the end
        begins, shift = cuts[:-1], self.ends - ends  # shift: from the place end to end to the place in the flat arrays
        shift = shift[numpy.searchsorted(ends, begins, side="right")]
        pieces = replace(self, starts=begins + shift, ends=cuts[1:] + shift, first=begins + shift)
        return pieces, numpy.append(numpy.searchsorted(begins, rows), len(begins))


def load_demonstrations(
    path: str | Path,
    tokenizer,
    completion_only: bool | None = None,
    assistant_only: bool = False,
    cache_dir: str | Path | None = None,
) -> Documents:
    """The token ids of every row's text, and which of them are learnt.

    completion_only: learn the completion of a prompt, not the prompt; None: where there are prompts.
    assistant_only: of messages, learn what the assistant says alone; see Tokenizer.turns.
    cache_dir: a folder to keep the tokens in, which are then not held in memory but read from there, now and in later
        runs, as long as file, tokenizer and options are the same.
    Text, and a completion that is text, is ended by the first of the end tokens unless it ends with one.
    Raises ValueError naming file and line: a row of another kind, or one that these options can't be applied to.
    """

    def demonstrations() -> Iterator[tuple[list[int], bytes]]:
        for line, row in numbered_rows(Path(path)):
            try:
                yield _demonstration(row, tokenizer, completion_only, assistant_only)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from error

    if cache_dir is None or not Path(path).is_file():  # where there is no file, this says so
        return Documents.of(demonstrations())
    made_of = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            made_of.update(block)
    options = [CACHE_VERSION, tokenizer.fingerprint(), completion_only, assistant_only]
    made_of.update(json.dumps(options).encode())
    folder = Path(cache_dir) / made_of.hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this run may be writing it
        if not folder.exists():
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)  # what a process that was killed left behind
            fresh.mkdir()
            _write_files(demonstrations(), fresh)
            os.rename(fresh, folder)
    return _mapped(folder)


def _write(pairs, arrays, flush: Callable[[], None]) -> str:
    """Append documents to tokens, mask, ends and first; `flush` after each. Returns a digest of all."""
    tokens, trained, ends, first = arrays
    digest, place = hashlib.sha256(), 0
    for ids, mask in pairs:
        mask, ids = bytes(mask), array("i", ids)
        learnt = mask.find(1, 1)
        first.append(place + (learnt if learnt > 0 else len(ids)))
        place += len(ids)
        ends.append(place)
        tokens.extend(ids)
        trained.extend(mask)
        for part in (ids, mask, len(ids).to_bytes(8, "little")):
            digest.update(part)
        flush()
    return digest.hexdigest()


def _write_files(pairs, folder: Path, at_least: int = 2**20) -> None:
    """The four flat arrays of `pairs` as raw files, and header.json with their sizes; so many tokens at a time."""
    arrays = array("i"), bytearray(), array("q"), array("q")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "wb")) for name in FLAT]

        def flush(least: int = at_least) -> None:
            if len(arrays[0]) >= least:
                for file, part in zip(files, arrays):
                    file.write(part)
                    del part[:]

        digest = _write(pairs, arrays, flush)
        flush(0)
    sizes = {name: (folder / name).stat().st_size for name in FLAT}
    (folder / "header.json").write_text(json.dumps({"version": CACHE_VERSION, "digest": digest, "sizes": sizes}))


def _mapped(folder: Path) -> Documents:
    """The documents in the files of `_write_files`. ValueError where these are not whole."""
    try:
        header = json.loads((folder / "header.json").read_text())
        flat = [numpy.memmap(folder / name, dtype, "r") for name, dtype in FLAT.items()]
        tokens, trained, ends, first = flat[0], flat[1], *map(numpy.array, flat[2:])  # offsets are held in memory
        digest, sizes = str(header["digest"]), {name: part.nbytes for name, part in zip(FLAT, flat)}
        sound = len(tokens) == len(trained) == ends[-1] and len(ends) == len(first) and ends[0] >= 0
        if sizes != header["sizes"] or not sound or (numpy.diff(ends) < 0).any():
            raise ValueError("its files do not fit together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--cache_dir: {folder} is not whole ({error}); remove it, and it is made again") from None
    return Documents._from([tokens, trained, ends, first], digest)


def _demonstration(row: dict, tokenizer, completion_only: bool | None, assistant_only: bool) -> tuple[list, bytes]:
    """A row's ids, and one byte for each: 1 where it is learnt."""
    kinds = [name for name in ("text", "messages", "prompt") if name in row]
    if len(kinds) != 1 or ("prompt" in row) != ("completion" in row):
        raise ValueError(f'a demonstration has "prompt" and "completion", or "messages", or "text"; this row has '
                         f"{', '.join(row) or 'no keys'}")
    plain, unlearnt = kinds[0] == "text", 0
    if kinds[0] == "prompt":
        prompt, completion = row["prompt"], row["completion"]
        plain = isinstance(prompt, str)
        if not isinstance(completion, str if plain else list):
            raise ValueError("prompt and completion must both be text, or both be lists of messages")
        if plain:
            row, before = {"text": prompt + completion}, prompt
        else:
            check_messages(prompt, "prompt")
            row, before = {"messages": prompt + completion}, tokenizer.render(prompt)
        unlearnt = 0 if completion_only is False else len(before)
    elif completion_only:
        raise ValueError(f'--completion_only_loss: this row has no prompt, but "{kinds[0]}"')
    if plain:
        if assistant_only:
            raise ValueError("--assistant_only_loss: this row is text; only messages say who speaks")
        if not isinstance(row["text"], str):
            raise ValueError(f"text must be text, not {str(row['text'])[:60]!r}")
        pieces = [(row["text"], True)]
    else:
        check_messages(row["messages"], "messages")
        if assistant_only:
            pieces = tokenizer.turns(row["messages"])
        else:
            pieces = [(tokenizer.render(row["messages"], add_generation_prompt=False), True)]
        if unlearnt and not "".join(text for text, _ in pieces).startswith(before):
            raise ValueError("the chat template writes the prompt in another way alone than before its completion, so "
                             "where the completion begins can't be told; use another template, or "
                             "--no_completion_only_loss")
    ids, mask = encode_pieces(tokenizer, _cut(pieces, unlearnt))
    if plain:
        ids = ended(tokenizer, ids)
        mask = mask.ljust(len(ids), b"\1")
    return ids, mask


def _cut(pieces: list[tuple[str, bool]], unlearnt: int) -> list[tuple[str, bool]]:
    """The pieces, of which the first `unlearnt` characters are not learnt, with neighbours of one kind joined."""
    joined, at = [], 0
    for text, learnt in pieces:
        k = min(max(unlearnt - at, 0), len(text))
        at += len(text)
        for part, flag in ((text[:k], False), (text[k:], learnt)):
            if part and joined and joined[-1][1] == flag:
                joined[-1] = joined[-1][0] + part, flag
            elif part:
                joined.append((part, flag))
    return joined


def encode_pieces(tokenizer, pieces: list[tuple[str, bool]]) -> tuple[list[int], bytes]:
    """The ids of the joined text and their mask, where every piece begins with a token of its own.

    Where a token would reach over such a boundary the pieces are encoded one by one: a prompt then has the ids that it
    has when it is sampled from. (TRL learns the token that reaches over, and whatever of the prompt it took with it.)
    """
    parts = [tokenizer.encode(text) for text, _ in pieces]
    ids = [token for part in parts for token in part]
    if len(pieces) > 1:
        whole = tokenizer.encode("".join(text for text, _ in pieces))
        if whole != ids:  # perhaps only because a tokenizer puts a space in front of whatever it is given
            cuts = itertools.accumulate(text for text, _ in pieces)
            heads = [tokenizer.encode(text) for text in cuts]
            if all(whole[: len(head)] == head for head in heads):
                bounds = [0, *map(len, heads)]
                parts, ids = [whole[a:b] for a, b in itertools.pairwise(bounds)], whole
    return ids, b"".join((b"\1" if learnt else b"\0") * len(part) for part, (_, learnt) in zip(parts, pieces))


def order(n: int, start: int, count: int, seed: int) -> list[int]:
    """Row numbers at places start .. start+count of an endless sequence: every epoch is a fresh permutation of n rows.

    Epoch e is shuffled by (seed, e) alone. Nothing is dropped at the end of an epoch: the next one follows at once.
    """
    if n < 1 or start < 0 or count < 0 or seed < 0:
        raise ValueError(f"order needs n >= 1, the rest >= 0, not n={n}, start={start}, count={count}, seed={seed}")
    rows = []
    for epoch in range(start // n, -(-(start + count) // n)):
        rows += _permutation(n, seed, epoch)[max(start - epoch * n, 0) : start + count - epoch * n].tolist()
    return rows


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> numpy.ndarray:
    return numpy.random.default_rng((seed, epoch)).permutation(n)


def seed_of(seed: int, place: int) -> int:
    """The seed of the completions of the prompt at `place` of the endless sequence; below 2^63."""
    return int(numpy.random.SeedSequence((seed, place)).generate_state(1, numpy.uint64)[0] >> 1)


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of every line that is not blank; a byte-order mark and CRLF line ends are fine.

    Lines end at \\n only: U+2028 may stand in a JSON string. Raises ValueError naming the file, and the line where one
    is at fault: no such file, parquet, no rows, or what `strict_json` refuses.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a data set is a JSONL file with one object a line")
    empty = True
    with open(path, "rb") as file:
        if path.suffix == ".parquet" or file.read(4) == b"PAR1":
            raise ValueError(PARQUET.format(path=path))
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                empty = False
                try:
                    yield number, strict_json(line)
                except (ValueError, RecursionError) as error:  # RecursionError: a line nested thousands deep
                    raise ValueError(f"{path}:{number}: {error}") from error
    if empty:
        raise ValueError(f"{path}: no rows; the file is empty")


def strict_json(line: bytes) -> dict[str, Any]:
    """One object. Python's json accepts more than JSON, and what it lets through fails far from here: a ValueError for
    bytes that are not UTF-8, bad JSON, anything but an object, a key given twice, NaN or infinity, half of a pair."""
    try:
        row = json.loads(line.rstrip().decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:  # its own text says "line 1", which is the line within this line
        raise ValueError(f"bad JSON at character {error.pos + 1}: {error.msg}") from error
    if not isinstance(row, dict):
        raise ValueError(f"one JSON object a line is needed, not {type(row).__name__}: {str(row)[:60]}")
    # 1e999 reads as infinity, and "\ud800" as half of a pair that no tokenizer encodes: both fail on the way back.
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"a key stands twice: {next(key for key in keys if keys.count(key) > 1)!r}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; leave the key out or write null")


def checked_prompt(columns: dict[str, Any]) -> str | list[dict[str, str]]:
    """Takes the prompt out of a row's columns; ValueError if it, or a column's name, is not what rewards expect."""
    if "prompt" not in columns:
        raise ValueError(f'no "prompt"; this row has {", ".join(columns) or "no keys"}')
    for name in columns:
        if name in RESERVED:
            raise ValueError(f"a column may not be called {name!r}: rewards get something else by that name")
    prompt = columns.pop("prompt")
    if isinstance(prompt, str):
        return prompt
    check_messages(prompt, "prompt")
    if prompt[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's, but the completion is to be a new one")
    return prompt


def check_messages(messages: Any, name: str) -> None:
    """ValueError unless it is a list of messages."""
    if not isinstance(messages, list) or not messages:
        either = "text or " if name == "prompt" else ""
        raise ValueError(f"{name} must be {either}a list of messages, not {str(messages)[:60]!r}")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f'a message is {{"role": ..., "content": ...}} alone (no tools), not {message!r}')
        if message["role"] not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"content must be text (no images), not {str(message['content'])[:60]!r}")
