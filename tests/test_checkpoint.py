"""Model folders: what is written, what is read, and what is refused. test_resume_state.py has the trainer's state."""

import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokenizer import byte_tokenizer

import minitrl
from minitrl import checkpoint
from minitrl.layout import hf_tensors
from minitrl.model import Model, ModelConfig
from minitrl.tokenizer import Tokenizer, read_json

CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=300, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)
HEAD, QUERY = "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


def tiny(**options):
    torch.manual_seed(0)
    return Model(ModelConfig.from_hf(CONFIG | options)), Tokenizer(byte_tokenizer(), [258])


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model, and room beside it."""
    minitrl.save(*tiny(), tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, dict(attention_bias=True, mlp_bias=True), dict(model_type="qwen3", head_dim=16,
                                     architectures=["Qwen3ForCausalLM"])], ids=["plain", "biases", "qwen3"])
@pytest.mark.parametrize("limit", [5 * 10**9, 20_000])
def test_round_trip(options, tied, limit, tmp_path):
    model, tokenizer = tiny(tie_word_embeddings=tied, **options)
    minitrl.save(model, tokenizer, tmp_path / "model", max_shard_bytes=limit)
    again, tokenizer = minitrl.load(tmp_path / "model")
    assert_same(again, model)
    assert tokenizer.end_ids == (258,) and again.config.to_hf()["eos_token_id"] == 258
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in again.parameters())
    files = {path.name: path for path in (tmp_path / "model").glob("*.safetensors")}
    names = [name for path in files.values() for name in load_file(path)]
    assert sorted(names) == sorted(hf_tensors(model.config))
    if limit == 20_000:
        index = read_json(tmp_path / "model" / "model.safetensors.index.json")
        assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
        # a tensor larger than the limit has a shard for itself
        assert all(path.stat().st_size < limit + 4096 or len(load_file(path)) == 1 for path in files.values())
    else:
        assert list(files) == ["model.safetensors"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_cast(stored, wanted, tmp_path):
    model, tokenizer = tiny()
    minitrl.save(model, tokenizer, tmp_path / "model", dtype=stored)
    assert read_json(tmp_path / "model" / "config.json")["torch_dtype"] == str(stored).split(".")[1]
    again, _ = minitrl.load(tmp_path / "model", dtype=wanted)
    assert_same(again, model.to(stored).to(wanted))


def test_fused_rows_are_the_right_tensors(folder):
    """q, k, v and gate, up stand in that order, whatever order the file has."""
    model, _ = minitrl.load(folder)
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.1."
    for ours, parts in {"qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                        "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}.items():
        expected = torch.cat([tensors[f"{layer}{part}.weight"] for part in parts])
        assert torch.equal(getattr(model.layers[1], ours).weight, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_one_copy_of_the_weights(tmp_path):
    """In a fresh process: private memory grows by the parameters (64 MiB here) and not by a second copy of them."""
    model, tokenizer = tiny(vocab_size=16384, hidden_size=1024)
    minitrl.save(model, tokenizer, tmp_path / "model")
    script = """
import sys, threading, minitrl.checkpoint, torch
def private():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024
minitrl.load(sys.argv[2])  # what the libraries take once
before, peak, done = private(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, private())
thread = threading.Thread(target=watch); thread.start()
model, _ = minitrl.load(sys.argv[1])
peak = max(peak, private()); done.set(); thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak - before) / size, size)
"""
    minitrl.save(*tiny(), tmp_path / "small")
    ratio, size = map(float, run_python(script, tmp_path / "model", tmp_path / "small").split())
    assert size > 64 * 2**20
    assert 0.9 < ratio < 1.25


def run_python(script, *arguments, **environment):
    result = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                            timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# What is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(QUERY), f"missing: {QUERY}"),
        (lambda t: t.pop(HEAD), f"missing: {HEAD}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}), "unknown: model.layers.2.mlp.up"),
        (lambda t: t.update({QUERY: torch.zeros(32, 31)}), rf"shape \(32, 31\), expected \(32, 32\): {QUERY}"),
        (lambda t: t.update({QUERY: torch.zeros(32 * 32)}), rf"shape \(1024,\), expected \(32, 32\): {QUERY}"),
        (lambda t: t.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)}), f"type I8, expected one of .*: {QUERY}"),
        (lambda t: t.update({QUERY: torch.zeros(32, 32, dtype=torch.float8_e4m3fn)}), f"type F8_E4M3.*: {QUERY}"),
        (lambda t: t.clear(), "missing: .* and 16 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, folder):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=f"the weights do not fit config.json: {message}"):
        minitrl.load(folder)


def test_known_redundant_tensors_are_accepted(tmp_path):
    """rotary inv_freq buffers of old checkpoints, and a tied head written out."""
    model, tokenizer = tiny(tie_word_embeddings=True)
    minitrl.save(model, tokenizer, tmp_path / "model")
    edit_weights(tmp_path / "model", lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), HEAD: torch.zeros(300, 32)}))
    assert_same(minitrl.load(tmp_path / "model")[0], model)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="gemma2", architectures=["Gemma2ForCausalLM"]), "gemma2"),
        (dict(architectures=["LlamaForTokenClassification"]), "LlamaForTokenClassification"),
        (dict(architectures=["LlamaForSequenceClassification"]), "with 2 labels"),
        (dict(architectures=["LlamaForSequenceClassification"], num_labels=1), "a reward or value model"),
        (dict(model_type="qwen3_moe", auto_map={"AutoModelForCausalLM": "evil.Model"}), "qwen3_moe"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantized weights"),
        (dict(vocab_size=258), "the tokenizer has ids up to 258"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(vocab_size="300"), "vocab_size"),
    ],
)
def test_unsupported_config_is_named(changes, message, folder):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        minitrl.load(folder)


def test_auto_map_is_not_run(folder):
    """Code in a checkpoint stays where it is: a warning, and the folder that is saved does not name it."""
    (folder / "evil.py").write_text("open('PWNED', 'w')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.warns(UserWarning, match="auto_map .* is not run"):
        model, tokenizer = minitrl.load(folder)
    assert "evil" not in sys.modules and not os.path.exists("PWNED")
    minitrl.save(model, tokenizer, folder.parent / "final")
    assert "auto_map" not in read_json(folder.parent / "final" / "config.json")


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "pickle", "folder"])
def test_broken_weight_file_is_named(damage, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"truncated": content[:-1], "empty": b"", "header": b"\xff" * 8 + content[8:],
                          "pickle": pickle.dumps(Bomb())}[damage])
    with pytest.raises(ValueError, match="model.safetensors"):
        minitrl.load(folder)
    assert not os.path.exists("PWNED")


class Bomb:
    """A pickle that leaves a file behind if anybody loads it."""

    def __reduce__(self):
        return open, ("PWNED", "w")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 10**5])
def test_broken_json_is_named(name, content, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        minitrl.load(folder)
    assert not os.path.exists("PWNED")


def test_pickled_weights_are_not_read(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pytorch_model.bin is not read, convert it to safetensors"):
        minitrl.load(folder)
    assert not os.path.exists("PWNED")


# Shards


@pytest.fixture
def sharded(tmp_path):
    minitrl.save(*tiny(), tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model"


def test_shard_problems_are_named(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"]
    first, last = min(weight_map.values()), max(weight_map.values())
    edit_json(index, weight_map=weight_map | {QUERY: first if weight_map[QUERY] == last else last})
    with pytest.raises(ValueError, match=f"tensor {QUERY} is not in "):
        minitrl.load(sharded)
    edit_json(index, weight_map=weight_map)
    save_file(load_file(sharded / last) | {QUERY: torch.zeros(32, 32)}, sharded / last)
    with pytest.raises(ValueError, match=f"in more than one file: {QUERY}"):
        minitrl.load(sharded)
    (sharded / last).unlink()
    with pytest.raises(ValueError, match=f"{last}: no such file"):
        minitrl.load(sharded)
    edit_json(index, weight_map=[])
    with pytest.raises(ValueError, match="no weight_map"):
        minitrl.load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "x\0.safetensors",
                                  "https://host/x.safetensors", "pytorch_model.bin", "", 7, None])
def test_shard_paths_stay_in_the_folder(name, sharded):
    shutil.copy(min(sharded.glob("*.safetensors")), sharded.parent / "model.safetensors")  # "../" leads somewhere
    index = sharded / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"]
    edit_json(index, weight_map=weight_map | {QUERY: name})
    with pytest.raises(ValueError, match="is not the name of a safetensors file in this folder"):
        minitrl.load(sharded)


def test_links_stay_in_the_folder(sharded):
    """A link out of the folder is refused; the Hub cache's own layout of links is not."""
    shard = min(sharded.glob("*.safetensors"))
    moved = sharded.parent / "elsewhere.safetensors"
    shard.rename(moved)
    shard.symlink_to(moved)
    with pytest.raises(ValueError, match="a link that leads out of the folder"):
        minitrl.load(sharded)
    cache = sharded.parent / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = sharded.rename(cache / "snapshots" / "0123")
    (snapshot / shard.name).unlink()
    moved.rename(cache / "blobs" / "abcd")
    (snapshot / shard.name).symlink_to("../../blobs/abcd")
    assert_same(minitrl.load(snapshot)[0], tiny()[0])


# Saving


def test_saving_replaces_the_whole_folder(tmp_path):
    model, tokenizer = tiny()
    minitrl.save(model, tokenizer, tmp_path / "final", max_shard_bytes=20_000)
    minitrl.save(model, tokenizer, tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").glob("*safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    os.umask(umask := os.umask(0))
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in (tmp_path / "final").iterdir())


def test_saving_never_removes_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("five years")
    with pytest.raises(ValueError, match="holds other files .thesis.tex"):
        minitrl.save(*tiny(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "five years"


@pytest.mark.parametrize("where", ["safetensors", "write_text", "fsync", "rename", "mkdir"])
def test_failed_save_leaves_the_old_folder(where, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    target = {"safetensors": "minitrl.disk.write_tensors", "write_text": "pathlib.Path.write_text",
              "fsync": "os.fsync", "rename": "os.rename", "mkdir": "pathlib.Path.mkdir"}[where]
    monkeypatch.setattr(target, full)
    torch.manual_seed(1)
    with pytest.raises(OSError, match="cannot save .*model: .*No space left on device.* is untouched"):
        minitrl.save(tiny(vocab_size=310)[0], tiny()[1], folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# The Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a snapshot download asks for: a model's revision, its tree, and its files."""

    protocol_version = "HTTP/1.1"
    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder, requests, *arguments):
        self.folder, self.requests = folder, requests
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.requests.append(path)
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith("/api/models/owner/name/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "owner/name", "modelId": "owner/name", "sha": self.sha,
                                    "siblings": siblings, "private": False, "tags": [], "downloads": 0}).encode())
        elif path.startswith("/api/models/owner/name/tree/"):
            tree = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{i:040x}"}
                    for i, (name, file) in enumerate(files.items())]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(prefix := f"/owner/name/resolve/{self.sha}/") and path[len(prefix):] in files:
            self.answer(files[path[len(prefix):]].read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(folder):
    requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, requests))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


LOAD = """
import sys, minitrl
for name in sys.argv[1:]:
    try:
        model, tokenizer = minitrl.load(name)
        print(float(sum(p.detach().double().sum() for p in model.parameters())), tokenizer.end_ids)
    except ValueError as error:
        print("ValueError:", str(error).replace(chr(10), " "))
"""


def from_hub(endpoint, home, *names):
    """What loading `names` prints, in a process whose Hub is `endpoint` (which is read at import)."""
    proxies = {key: "" for key in os.environ if key.lower().endswith("_proxy")}
    return run_python(LOAD, *names, HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_OFFLINE="0", HF_TOKEN="",
                      HF_HUB_DISABLE_XET="1", **proxies).splitlines()


def test_model_from_the_hub(hub, folder, tmp_path):
    endpoint, requests = hub
    (folder / "original").mkdir()
    for name in ("original/consolidated.safetensors", "consolidated.safetensors", "pytorch_model.bin", "modeling.py"):
        (folder / name).write_bytes(b"not wanted")
    expected = f"{float(sum(p.detach().double().sum() for p in tiny()[0].parameters()))} (258,)"
    loaded, missing = from_hub(endpoint, tmp_path / "home", "owner/name", "owner/missing")
    assert loaded == expected
    fetched = {path.rsplit("/", 1)[1] for path in requests if "/resolve/" in path}
    assert fetched == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                       "model.safetensors"}
    refusal = "ValueError: --model 'owner/{}': no such folder here, and the download from the Hub failed"
    assert missing.startswith(refusal.format("missing"))
    # Nobody listens on port 1: what was fetched still loads, and what was not is one clear error
    cached, unreachable = from_hub("http://127.0.0.1:1", tmp_path / "home", "owner/name", "owner/missing")
    assert cached == expected
    assert unreachable.startswith(refusal.format("missing")) and unreachable.endswith("the network and HF_TOKEN")


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/x", "models", "a/b/c", "../x", "owner/..", "~/x", "",
                                  "https://huggingface.co/owner/name", "owner/na\0me", "-x/y", "owner/name\n"])
def test_what_is_neither_folder_nor_hub_id(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an attempt to download would be an ImportError
    with pytest.raises(ValueError, match="--model .*: no such folder, and not a Hub id"):
        minitrl.load(name)


QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"])


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(rope_parameters=dict(rope_type="linear")), "'linear' needs a positive factor, not None"),
        (dict(rope_scaling=dict(type="linear", factor=0)), "'linear' needs a positive factor, not 0"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, high_freq_factor=4.0)), "'llama3' .* low_freq_factor"),
        (dict(rope_scaling=dict(rope_type="yarn", factor="4")), "'yarn' needs a positive factor, not '4'"),
        (dict(rope_scaling=[2.0]), "must be an object, not list"),
        (dict(rope_theta="many"), "a positive rope_theta, not 'many'"),
        (dict(num_attention_heads=0), "num_attention_heads must be given as integers of at least 1"),
        (dict(num_hidden_layers=True), "num_hidden_layers must be given"),
        (dict(num_key_value_heads="2"), "num_key_value_heads must be given"),
        (dict(QWEN2, use_sliding_window=True, layer_types=["full_attention"]), "layer_types has 1"),
    ],
)  # fmt: skip
def test_mistakes_in_a_config_are_named(wrong, words):
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        ModelConfig.from_hf(CONFIG | wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_fingerprint_tells_weights_and_descriptions_apart(dtype):
    (model, _), (same, _), (other, _) = tiny(), tiny(), tiny(rms_norm_eps=1e-5)
    of = [checkpoint.fingerprint(m.to(dtype)) for m in (model, same, other)]
    assert of[0] == of[1] != of[2]
    with torch.no_grad():
        model.embed_tokens.weight[3, 4] *= -1
    assert checkpoint.fingerprint(model) != of[0]
