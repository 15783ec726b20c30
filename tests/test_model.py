"""
What model.py promises: every layout of a BERT loads to the same tensors, mismatches are named in one line, the heads
are the formulas they claim to be, and what is saved is what any BERT loads.

    python -m pytest tests/test_model.py              # a tiny BERT and a hub on 127.0.0.1, no network
    BERT_DIR=... GLUE_DIR=... python -m pytest tests/test_model.py    # also a real BERT against transformers
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data import UserError, collate, get_task, load_dataset, load_tokenizer
from model import load_model, save_model, task_loss, to_score

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "golden" / "tiny-bert"  # with pooler and MLM head, both prefixes, no decoder
BERT_DIR, GLUE_DIR = os.environ.get("BERT_DIR"), os.environ.get("GLUE_DIR")
EMBEDDING = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def tensors():
    return load_file(TINY / "model.safetensors")


def write(folder, state, shards=1, **changes):
    """A checkpoint folder: tiny-bert's config.json with `changes`, and `state` in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | changes))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: x for key, x in state.items() if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def inputs(batch=3, length=7, padding=0):
    """Made-up sentences; the positions of the padding hold arbitrary ids, so that it matters that they are masked."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 120, (batch, length), generator=generator)
    ids = torch.cat([ids, torch.randint(0, 120, (batch, padding), generator=generator)], dim=1)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[:, length:], types[:, 4:] = 0, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def load(folder, head="words", words=(5, 7, 60), **options):
    return load_model(folder, head, words=words if head == "words" else (), **options).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Loading

DECODER = {"cls.predictions.decoder.weight": EMBEDDING}


def rename(state, *pairs):
    for old, new in pairs:
        state = {name.replace(old, new): x for name, x in state.items()}
    return state


LAYOUTS = {
    "as it is": lambda t: t,
    "no prefix": lambda t: rename(t, ("bert.", "")),
    "gamma and beta": lambda t: rename(t, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    "position_ids": lambda t: t | {"bert.embeddings.position_ids": torch.arange(32)[None]},
    "tied decoder": lambda t: t | {"cls.predictions.decoder.weight": t[EMBEDDING].clone()},
    "decoder.bias only": lambda t: rename(t, ("predictions.bias", "predictions.decoder.bias")),
    "both biases": lambda t: t | {"cls.predictions.decoder.bias": t["cls.predictions.bias"].clone()},
    "next sentence head": lambda t: t | {f"cls.seq_relationship.{n}": torch.ones(2, 32) for n in ("weight", "bias")},
    "no pooler": lambda t: {name: x for name, x in t.items() if "pooler" not in name},
}


@pytest.mark.parametrize("dtype, shards", [(torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 1), (None, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, shards, tmp_path):
    stored = {name: x.to(dtype or torch.float32) for name, x in tensors().items()}
    folder = write(tmp_path, LAYOUTS[layout](stored), shards)
    expected = {name: x.float() for name, x in stored.items()}
    model = load(folder)
    assert model.state_dict().keys() == {name for name in expected if "pooler" not in name}  # an MLM has no pooler
    assert all(x.dtype == torch.float32 and torch.equal(x, expected[n]) for n, x in model.state_dict().items())
    reference = load(write(tmp_path / "reference", expected))
    assert torch.equal(model(**inputs()), reference(**inputs()))
    assert torch.equal(model.mlm_logits(**inputs()), reference.mlm_logits(**inputs()))


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("pooler", [True, False])
def test_bare_encoder(prefix, pooler, tmp_path):
    state = {name: x for name, x in tensors().items() if "cls." not in name and (pooler or "pooler" not in name)}
    model = load(write(tmp_path, rename(state, ("bert.", prefix))))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def without(*names):
    return {name: x for name, x in tensors().items() if name not in names}


def damaged(folder, cut):
    """tiny-bert with a weights file that ends early, or is something else."""
    whole = (TINY / "model.safetensors").read_bytes()
    write(folder, tensors())
    (folder / "model.safetensors").write_bytes(cut if isinstance(cut, bytes) else whole[:cut])


def index(folder, text, *files):
    write(folder, tensors(), shards=2)
    (folder / "model.safetensors.index.json").write_text(text)


def only(folder, *names):
    write(folder, tensors())
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"\x80\x02.")


SHARD = "model-00001-of-00002.safetensors"
MISMATCHES = {  # what is wrong: (how to write the folder, what the message names besides the folder)
    "missing": (lambda d: write(d, without(QUERY)), ["missing", QUERY]),
    "part of the MLM head": (lambda d: write(d, without("cls.predictions.bias")), ["missing cls.predictions.bias"]),
    "unknown": (lambda d: write(d, tensors() | {"bert.adapter.weight": torch.ones(2)}), ["unknown bert.adapter.weight"]),
    "too many layers": (lambda d: write(d, tensors(), num_hidden_layers=2), ["unknown bert.encoder.layer.2."]),
    "shape": (lambda d: write(d, tensors() | {QUERY: torch.ones(32, 16)}), [f"{QUERY} is (32, 16), expected (32, 32)"]),
    "vocab_size": (lambda d: write(d, tensors(), vocab_size=99), [f"{EMBEDDING} is (120, 32), expected (99, 32)"]),
    "untied": (
        lambda d: write(d, tensors() | {"cls.predictions.decoder.weight": torch.ones(119, 32)}),
        ["cls.predictions.decoder.weight (119, 32) differs from", f"{EMBEDDING} (120, 32)", "tied"],
    ),
    "lost shard": (lambda d: (write(d, tensors(), shards=2) / SHARD).unlink(), [SHARD, "no such file"]),
    "index outside": (lambda d: index(d, '{"weight_map": {"a": "../x.safetensors"}}'), ["index.json", "this folder"]),
    "index numbers": (lambda d: index(d, '{"weight_map": {"a": 1, "b": "x"}}'), ["index.json", "this folder"]),
    "index list": (lambda d: index(d, '{"weight_map": ["a"]}'), ["index.json", "this folder"]),
    "index empty": (lambda d: index(d, "{}"), ["index.json", "this folder"]),
    "index torn": (lambda d: index(d, '{"weight_map": {"a'), ["index.json", "not valid JSON"]),
    "only .bin": (lambda d: only(d, "pytorch_model.bin"), ["no model.safetensors", "convert once", "save_pretrained"]),
    "only .bin shards": (lambda d: only(d, "pytorch_model-00001-of-00002.bin"), ["convert once"]),
    "no weights": (lambda d: only(d), ["no model.safetensors"]),
    "no config": (lambda d: (write(d, tensors()) / "config.json").unlink(), ["config.json", "No such file"]),
    "config torn": (lambda d: (write(d, tensors()) / "config.json").write_text('{"a'), ["config.json", "JSON"]),
    "config list": (lambda d: (write(d, tensors()) / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "config binary": (lambda d: (write(d, tensors()) / "config.json").write_bytes(b"\xff"), ["config.json", "JSON"]),
    "no room": (lambda d: write(d, tensors(), num_attention_heads=5), ["hidden_size 32", "5 attention heads"]),
}
for cut in (0, 4, 100, 10_000, -1, b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64, b"\xff" * 64):
    MISMATCHES[f"weights {cut}"] = (lambda d, cut=cut: damaged(d, cut), ["model.safetensors", "not a whole safetensors"])
for key, value in {
    **{"model_type": "roberta", "hidden_act": "gelu_new", "position_embedding_type": "relative_key"},
    **{"is_decoder": True, "hidden_size": "32", "num_hidden_layers": 2.5, "vocab_size": None, "layer_norm_eps": "1e-12"},
    **{"num_attention_heads": 0, "intermediate_size": -64, "hidden_dropout_prob": 1.5, "type_vocab_size": True},
}.items():
    MISMATCHES[f"{key} {value}"] = (lambda d, kv=(key, value): write(d, tensors(), **dict([kv])), ["config.json", key])


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches(case, tmp_path):
    folder = tmp_path / "bert"
    MISMATCHES[case][0](folder)
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert all(part in message for part in [str(folder), *MISMATCHES[case][1]]), message
    assert "\n" not in message
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


# ---------------------------------------------------------------------------------------------------------------------
# Heads


def test_new_classifier_is_a_function_of_the_seed(tmp_path):
    folder = write(tmp_path, LAYOUTS["no pooler"](tensors()))
    heads = []
    for global_seed, seed in [(1, 7), (2, 7), (3, 8)]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        heads.append(load(folder, "classifier", outputs=3, seed=seed).state_dict())
        assert torch.equal(torch.get_rng_state(), state)  # and it leaves the global generator alone
    new = {name for name in heads[0] if name not in tensors() or "pooler" in name}
    assert new == {f"{n}.{kind}" for n in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    for name in heads[0]:
        assert torch.equal(heads[0][name], heads[1][name])
        assert torch.equal(heads[0][name], heads[2][name]) == (name not in new or name.endswith("bias"))
        assert name in new or torch.equal(heads[0][name], tensors()[name])
    assert all(not heads[0][name].any() for name in new if name.endswith("bias"))
    assert abs(float(heads[0]["bert.pooler.dense.weight"].std()) - 0.02) < 2e-3


def test_own_classifier(tmp_path):
    own = {"classifier.weight": torch.rand(3, 32), "classifier.bias": torch.rand(3)}
    folder = write(tmp_path, tensors() | own)
    for new_head in (True, False):
        model = load(folder, "classifier", outputs=3, new_head=new_head)
        assert all(torch.equal(model.state_dict()[name], x) for name, x in (tensors() | own).items() if "cls" not in name)
    with pytest.raises(UserError, match=r"classifier.weight is \(3, 32\), expected \(2, 32\)"):
        load(folder, "classifier", outputs=2)
    with pytest.raises(UserError, match="missing classifier.weight, classifier.bias"):
        load(TINY, "classifier", outputs=3, new_head=False)
    write(tmp_path / "b", LAYOUTS["no pooler"](tensors() | own))
    with pytest.raises(UserError, match="missing bert.pooler.dense.weight, bert.pooler.dense.bias"):
        load(tmp_path / "b", "classifier", outputs=3, new_head=False)


def test_classifier_formula():
    model = load(TINY, "classifier", outputs=3)
    first, t = model.bert(**inputs())[:, 0], model.state_dict()
    pooled = torch.tanh(first @ t["bert.pooler.dense.weight"].T + t["bert.pooler.dense.bias"])
    assert (model(**inputs()) - pooled @ t["classifier.weight"].T - t["classifier.bias"]).abs().max() < 1e-6


def test_words_head(tmp_path):
    words = [5, 119, 60, 0]
    model = load(TINY, words=words)
    assert (model(**inputs()) - model.mlm_logits(**inputs())[:, 0, words]).abs().max() < 1e-6
    bare = load(write(tmp_path, {name: x for name, x in tensors().items() if "cls." not in name}), words=words)
    expected = bare.bert(**inputs())[:, 0] @ tensors()[EMBEDDING][words].T
    assert (bare(**inputs()) - expected).abs().max() < 1e-6
    for each in (model, bare):  # not a parameter that the file does not hold
        assert {name for name, _ in each.named_parameters()} <= tensors().keys()


@pytest.mark.parametrize("padding", [0, 6])
def test_first_only_is_position_0(padding):
    bert = load(TINY).bert
    full = bert(**inputs(padding=padding))
    first = bert(**inputs(padding=padding), first_only=True)
    assert first.shape == (3, 1, 32) and (first - full[:, :1]).abs().max() < 1e-6


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_padding_changes_nothing(head):
    model = load(TINY, head, outputs=3)
    assert (model(**inputs()) - model(**inputs(padding=9))).abs().max() < 1e-5
    states = model.bert(**inputs(padding=9))[:, :7]
    assert (model.bert(**inputs()) - states).abs().max() < 1e-5
    # and it is the mask that does it
    unmasked = inputs(padding=9) | {"attention_mask": torch.ones(3, 16)}
    assert (model.bert(**inputs()) - model.bert(**unmasked)[:, :7]).abs().max() > 1e-2


def test_task_loss():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    assert torch.equal(task_loss(logits, labels, 0, 1), F.cross_entropy(logits, labels, reduction="none"))
    one, scores = torch.randn(6, 1), torch.linspace(1, 5, 6)
    assert torch.allclose(task_loss(one, scores, 1, 5), (one[:, 0] - scores).square())
    assert torch.equal(to_score(one, 1, 5), one[:, 0])


@pytest.mark.parametrize("low, high", [(0, 5), (1, 5), (-1, 1)])
def test_two_output_regression(low, high):
    share = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    scores = low + share * (high - low)
    best = torch.stack([torch.full_like(share, 0.3), 0.3 + torch.logit(share)], dim=1).requires_grad_()
    loss = task_loss(best, scores, low, high)
    loss.sum().backward()
    assert best.grad.abs().max() < 1e-12  # p(yes) = (y - low) / (high - low) is stationary ...
    for move in torch.tensor([[0.0, 0.1], [0.1, 0.0], [-2.0, 1.0]], dtype=torch.float64):  # ... and a minimum
        assert (task_loss(best + move, scores, low, high) > loss).all()
    assert torch.allclose(to_score(best, low, high), scores)
    ends = torch.tensor([[40.0, -40.0], [-40.0, 40.0]])
    assert torch.allclose(to_score(ends, low, high), torch.tensor([low, high]).float())
    assert task_loss(ends, torch.tensor([low, high]).float(), low, high).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize(
    "head, bare, labels, kind",
    [
        ("classifier", False, ("no", "yes", "maybe"), "BertForSequenceClassification"),
        ("words", False, ("no", "yes", "maybe"), "BertForMaskedLM"),
        ("words", True, (), "BertModel"),
    ],
)
def test_save_and_load(head, bare, labels, kind, tmp_path):
    source = write(tmp_path / "source", {name: x for name, x in tensors().items() if not (bare and "cls." in name)})
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    model = load(source, head, outputs=3)
    with torch.no_grad():
        model.get_parameter(QUERY).mul_(torch.rand(32, 32) < 0.5)
    save_model(tmp_path / "saved", model, model.state_dict(), source, labels)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"model.safetensors", "config.json", "vocab.txt"}
    again = load(tmp_path / "saved", head, outputs=3, new_head=False)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    assert again.config == model.config and torch.equal(again(**inputs()), model(**inputs()))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == [kind] and config["model_type"] == "bert"
    assert config.get("id2label", {}) == {str(i): label for i, label in enumerate(labels)}
    assert config.get("label2id", {}) == {label: i for i, label in enumerate(labels)}


def test_save_a_score(tmp_path):
    model = load(TINY, "classifier", outputs=1)
    save_model(tmp_path, model, model.state_dict(), TINY, ())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["id2label"], config["problem_type"]) == ({"0": "score"}, "regression")


@pytest.mark.parametrize("survive", range(3))
def test_interrupted_save(survive, tmp_path, monkeypatch):
    """Each file is the old one or the new one, whole, at whichever file the process dies; no litter."""
    source, folder = write(tmp_path / "source", tensors()), tmp_path / "saved"
    for i, text in enumerate(["old\n", "new\n"]):
        (source / "vocab.txt").write_text(text)
        model = load(source, dropout=i / 10)
        with torch.no_grad():
            model.get_parameter(QUERY).add_(i)
        if i == 0:
            save_model(folder, model, model.state_dict(), source, ())
            old, replace, replaced = contents(folder), os.replace, []
    save_model(tmp_path / "whole", model, model.state_dict(), source, ())
    new = contents(tmp_path / "whole")
    assert all(old[name] != new[name] for name in new) and len(new) == 3

    def dying_replace(*paths):
        if len(replaced) == survive:
            raise KeyboardInterrupt
        replaced.append(paths[1])
        replace(*paths)

    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, model, model.state_dict(), source, ())
    after = contents(folder)
    assert after.keys() == old.keys() and [after[name] == new[name] for name in new].count(True) == survive
    assert all(after[name] in (old[name], new[name]) for name in new)


def test_save_over_the_source(tmp_path):
    folder = write(tmp_path, tensors())
    (folder / "vocab.txt").write_text("[PAD]\n")
    model = load(folder)
    save_model(folder, model, model.state_dict(), folder, ())
    assert (folder / "vocab.txt").read_text() == "[PAD]\n"
    assert torch.equal(load(folder)(**inputs()), model(**inputs()))


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face hub, imitated; huggingface_hub reads its settings when imported, so it is asked in another process

SHA = "0123456789abcdef0123456789abcdef01234567"
TINY_FILES = {path.name: path.read_bytes() for path in TINY.iterdir()} | {"vocab.txt": b"[PAD]\n"}
BIN = {"pytorch_model.bin": b"pickle", "README.md": b"# tiny", "onnx/model.safetensors": b"another"}
REPOS = {
    "org/tiny": TINY_FILES | BIN,
    "org/old": {"config.json": TINY_FILES["config.json"]} | BIN,
}
ASK = """
import json, sys, time
from model import UserError, find_model
for name in sys.stdin:
    start = time.time()
    try:
        answer = {"folder": str(find_model(name.strip()))}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"seconds": time.time() - start}), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """.ask(name) is what find_model answers in another process; .got lists the files asked for; .close() the hub."""
    got, home = [], tmp_path_factory.mktemp("hub")

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            headers = {"Content-Length": len(body), "X-Repo-Commit": SHA} | headers
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            api, path = path.startswith("api/models/"), path.removeprefix("api/models/")
            name, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
            if name not in REPOS:
                return self.answer(404 if api else 401, X_Error_Code="RepoNotFound")
            files = REPOS[name]
            if api and rest[0] == "tree":
                body = [{"type": "file", "path": f, "size": len(x), "oid": "0" * 40} for f, x in files.items()]
            elif api:
                body = {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
            else:
                file = "/".join(rest[2:])
                got.append(f"{name}/{file}")
                return self.answer(200, files[file], ETag=f'"{name.replace("/", "-")}-{file}"')
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", ASK]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, env=env, cwd=home, stdin=pipe, stdout=pipe, text=True)

    def ask(name):
        child.stdin.write(f"{name}\n")
        child.stdin.flush()
        return SimpleNamespace(**{"folder": None, "error": None} | json.loads(child.stdout.readline()))

    def close():
        server.shutdown()
        server.server_close()

    yield SimpleNamespace(ask=ask, got=got, close=close, port=server.server_port)
    child.stdin.close()
    child.wait(10)
    close()


def test_hub_gives_only_what_is_read(hub):
    folder = Path(hub.ask("org/tiny").folder)
    assert contents(folder) == TINY_FILES  # neither the .bin nor what lies in subfolders
    assert {name for name in hub.got if name.startswith("org/tiny/")} == {f"org/tiny/{name}" for name in TINY_FILES}
    assert torch.equal(load(folder)(**inputs()), load(TINY)(**inputs()))
    (folder / "model.safetensors").unlink()  # a download that was interrupted is completed
    assert contents(Path(hub.ask("org/tiny").folder)) == TINY_FILES


def test_hub_has_only_bin(hub):
    error = hub.ask("org/old").error
    assert "org/old" in error and "convert once" in error and "from_pretrained('org/old')" in error
    assert "org/old/pytorch_model.bin" not in hub.got


@pytest.mark.parametrize("name", ["org/none", "no/such/folder", "/no/such/folder", "run 1"])
def test_hub_knows_no_such_id(hub, name):
    answer = hub.ask(name)
    assert answer.error.startswith(f"--model {name}: no such folder, and") and "\n" not in answer.error
    assert answer.seconds < 10


def test_hub_out_of_reach(hub):
    folder = hub.ask("org/tiny").folder
    hub.close()
    count = len(hub.got)
    for silent in (False, True):  # nobody listens; somebody listens, and never answers
        listener = socket.create_server(("127.0.0.1", hub.port)) if silent else None
        answer, cached = hub.ask("org/other"), hub.ask("org/tiny")
        assert answer.error.startswith("--model org/other: no such folder, and") and "\n" not in answer.error
        assert ("Timeout" if silent else "Connect") in answer.error and answer.seconds < 20
        assert cached.folder == folder and cached.seconds < 20 and contents(folder) == TINY_FILES
        if listener:
            listener.close()
    assert len(hub.got) == count


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers, with a real BERT


@pytest.fixture
def hf():
    if not BERT_DIR:
        pytest.skip("set BERT_DIR to a BERT in Hugging Face's layout")
    return pytest.importorskip("transformers")


@pytest.fixture
def batch(tmp_path):
    """16 real sentences (RTE's, if GLUE_DIR has them) of very different lengths in one padded batch."""
    tokenizer = load_tokenizer(BERT_DIR, 10**6)
    task = get_task("rte")
    for name in ("RTE.zip", task.files["dev"]):
        if GLUE_DIR and (Path(GLUE_DIR) / name).is_file():  # copied: nothing may be unzipped there
            (tmp_path / "glue" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(GLUE_DIR) / name, tmp_path / "glue" / name)
    if (tmp_path / "glue").is_dir():
        dataset = load_dataset(task, "dev", tokenizer, 256, tmp_path / "glue")
        return {k: x for k, x in collate(dataset, dataset.lengths.argsort()[::18]).items() if k != "labels"}
    encodings = [tokenizer.encode("The cat sat on the mat. " * n, "It sleeps.") for n in range(1, 17)]
    rows = [(e.ids, e.attention_mask, e.type_ids) for e in encodings]
    padded = (torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in row], True) for row in zip(*rows, strict=True))
    return dict(zip(("input_ids", "attention_mask", "token_type_ids"), padded, strict=True))


def close(mine, theirs):
    difference = float((mine - theirs).abs().max().detach())
    print(f"max difference {difference:.1e} of {float(theirs.abs().max()):.1f}")
    return mine.shape == theirs.shape and difference < 1e-5


def load_hf(auto, folder):
    """transformers' model of a folder, which must fit it to the last key."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.real
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_real_hidden_states(hf, batch, attention):
    theirs = hf.BertModel.from_pretrained(BERT_DIR, attn_implementation=attention, dtype=torch.float32).eval()
    mine, mask = load(BERT_DIR, words=[5]), batch["attention_mask"].bool()
    assert mask.sum(1).min() < mask.sum(1).max() / 4
    hidden = theirs(**batch).last_hidden_state
    assert close(mine.bert(**batch)[mask], hidden[mask])
    assert close(mine.bert(**batch, first_only=True)[:, 0], hidden[:, 0])
    pooled = load(BERT_DIR, "classifier", outputs=2).bert.pooler["dense"](hidden[:, 0]).tanh()
    assert close(pooled, theirs(**batch).pooler_output)


@pytest.mark.real
@torch.no_grad()
def test_real_classifier_loads_in_transformers(hf, batch, tmp_path):
    mine = load(BERT_DIR, "classifier", outputs=3)
    save_model(tmp_path / "saved", mine, mine.state_dict(), BERT_DIR, ("a", "b", "c"))
    theirs = load_hf(hf.AutoModelForSequenceClassification, tmp_path / "saved")
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"} and hf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert close(mine(**batch), theirs(**batch).logits)


@pytest.mark.real
@torch.no_grad()
def test_real_words_without_mlm_load_in_transformers(hf, batch, tmp_path):
    words = [2053, 2748]
    mine = load(BERT_DIR, words=words)
    if hasattr(mine, "cls"):
        pytest.skip("BERT_DIR has an MLM head")
    save_model(tmp_path / "saved", mine, mine.state_dict(), BERT_DIR, ())
    theirs = load_hf(hf.AutoModel, tmp_path / "saved")
    states = theirs(**batch).last_hidden_state
    assert close(mine(**batch), states[:, 0] @ theirs.get_input_embeddings().weight[words].T)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["MaskedLM", "PreTraining", "SequenceClassification", "Model"])
@torch.no_grad()
def test_real_round_trip_through_transformers(hf, kind, tmp_path):
    """A random BERT that transformers saved has the same logits here, and so has there what is saved here."""
    torch.manual_seed(0)
    config = hf.BertConfig(**json.loads((TINY / "config.json").read_text()) | {"initializer_range": 0.3}, num_labels=3)
    theirs = getattr(hf, f"BertFor{kind}" if kind != "Model" else "BertModel")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    head = "classifier" if kind == "SequenceClassification" else "words"
    mine = load(tmp_path / "theirs", head, outputs=3, new_head=False)
    save_model(tmp_path / "mine", mine, mine.state_dict(), tmp_path / "theirs", ())
    auto = {"PreTraining": hf.AutoModelForMaskedLM, "Model": hf.AutoModel}.get(kind) or getattr(hf, f"AutoModelFor{kind}")
    for other in (theirs, load_hf(auto, tmp_path / "mine")):
        output = other(**inputs(padding=3))
        if kind == "SequenceClassification":
            assert close(mine(**inputs(padding=3)), output.logits)
        elif kind == "Model":
            assert close(mine.bert(**inputs(padding=3))[:, :7], output.last_hidden_state[:, :7])
        else:
            logits = output.get("logits", output.get("prediction_logits"))
            assert close(mine.mlm_logits(**inputs(padding=3))[:, :7], logits[:, :7])
            assert close(mine(**inputs(padding=3)), logits[:, 0, [5, 7, 60]])
