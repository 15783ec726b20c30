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
import time
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
TINY = ROOT / "tests" / "golden" / "tiny-bert"  # with the bert. prefix, a pooler and an MLM head, without a decoder
BERT_DIR, GLUE_DIR = os.environ.get("BERT_DIR"), os.environ.get("GLUE_DIR")
EMBEDDING, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query.weight"
BIAS, DECODER, POOLER = "cls.predictions.bias", "cls.predictions.decoder", "bert.pooler.dense"


def tensors(without="nothing"):
    return {name: x for name, x in load_file(TINY / "model.safetensors").items() if without not in name}


def rename(state, *pairs):
    for old, new in pairs:
        state = {name.replace(old, new): x for name, x in state.items()}
    return state


def write(folder, state, shards=1, **changes):
    """A checkpoint folder: tiny-bert's config.json with `changes`, and `state` in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | changes))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    weight_map = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({key: x for key, x in state.items() if weight_map[key] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path(folder).iterdir()}


def load(folder, head="words", words=(5, 7, 60), **options):
    return load_model(folder, head, words=words if head == "words" else (), **options).eval()


def inputs(padding=0):
    """Three made-up pairs; padded positions hold arbitrary ids, so that it matters that they are masked."""
    ids = torch.randint(1, 120, (3, 16), generator=torch.Generator().manual_seed(0))[:, : 7 + padding]
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[:, 7:], types[:, 4:] = 0, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def close(mine, theirs):
    """Rounding may differ: kernels go by the alignment of what was loaded."""
    difference = float((mine - theirs).detach().abs().max())
    print(f"max difference {difference:.1e} of {float(theirs.detach().abs().max()):.1f}")
    return mine.shape == theirs.shape and difference < 1e-5


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


# ---------------------------------------------------------------------------------------------------------------------
# loading

LAYOUTS = {
    "as it is": lambda t: t,
    "no prefix": lambda t: rename(t, ("bert.", "")),
    "gamma and beta": lambda t: rename(t, ("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")),
    "position_ids": lambda t: t | {"bert.embeddings.position_ids": torch.arange(32)[None]},
    "tied decoder": lambda t: t | {f"{DECODER}.weight": t[EMBEDDING].clone(), f"{DECODER}.bias": t[BIAS].clone()},
    "decoder.bias only": lambda t: rename(t, (BIAS, f"{DECODER}.bias")),
    "next sentence head": lambda t: t | {f"cls.seq_relationship.{n}": torch.ones(2, 32) for n in ("weight", "bias")},
    "no pooler": lambda t: {name: x for name, x in t.items() if "pooler" not in name},
}


@pytest.mark.parametrize("dtype, shards", [("float32", 1), ("float16", 1), ("bfloat16", 1), ("float32", 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, shards, tmp_path):
    stored = {name: x.to(getattr(torch, dtype)) for name, x in tensors().items()}
    expected = {name: x.float() for name, x in stored.items()}
    model = load(write(tmp_path / "layout", LAYOUTS[layout](stored), shards))
    assert same(model.state_dict(), {name: x for name, x in expected.items() if "pooler" not in name})
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    reference = load(write(tmp_path / "reference", expected))
    assert close(model(**inputs()), reference(**inputs()))
    assert close(model.mlm_logits(**inputs()), reference.mlm_logits(**inputs()))


@pytest.mark.parametrize("layout", ["as it is", "no pooler"])
def test_bare_encoder(layout, tmp_path):
    state = LAYOUTS[layout](tensors(without="cls."))
    assert same(load(write(tmp_path, rename(state, ("bert.", "")))).state_dict(), state)


def put(folder, name, content, shards=1, other="README.md"):
    """tiny-bert with one file put in place of another, or taken away, and another one beside them."""
    path = write(folder, tensors(), shards) / name
    path.unlink() if content is None else path.write_bytes(content)
    (folder / other).write_bytes(b"\x80\x02.")


WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"
CONVERT = ["no model.safetensors", "convert once", "save_pretrained"]
MISMATCHES = {  # what is wrong: (how to write the folder, what the message names besides the folder)
    "missing": (lambda d: write(d, tensors(without=QUERY)), [f"missing {QUERY}"]),
    "part of the MLM head": (lambda d: write(d, tensors(without=BIAS)), [f"missing {BIAS}"]),
    "unknown": (lambda d: write(d, tensors() | {"bert.adapter": torch.ones(2)}), ["unknown bert.adapter"]),
    "layers": (lambda d: write(d, tensors(), num_hidden_layers=2), ["unknown bert.encoder.layer.2."]),
    "shape": (lambda d: write(d, tensors() | {QUERY: torch.ones(32, 16)}), [f"{QUERY} is (32, 16), expected (32, 32)"]),
    "vocab_size": (lambda d: write(d, tensors(), vocab_size=99), [f"{EMBEDDING} is (120, 32), expected (99, 32)"]),
    "untied": (lambda d: write(d, tensors() | {f"{DECODER}.weight": torch.ones(119, 32)}),
               [f"{DECODER}.weight (119, 32) differs from {EMBEDDING} (120, 32)", "tied"]),
    "untied values": (lambda d: write(d, tensors() | {f"{DECODER}.weight": torch.ones(120, 32)}), ["differs", "tied"]),
    "lost shard": (lambda d: put(d, SHARD, None, shards=2), [SHARD, "no such file"]),
    "torn shard": (lambda d: put(d, SHARD, b"", shards=2), [SHARD, "not a whole safetensors file"]),
    "only .bin": (lambda d: put(d, WEIGHTS, None, other="pytorch_model.bin"), CONVERT),
    "only .bin shards": (lambda d: put(d, WEIGHTS, None, other="pytorch_model-00001-of-00002.bin"), CONVERT),
    "no weights": (lambda d: put(d, WEIGHTS, None), ["no model.safetensors"]),
    "no config": (lambda d: put(d, "config.json", None), ["config.json", "No such file"]),
    "no whole head": (lambda d: write(d, tensors(), num_attention_heads=5), ["hidden_size 32", "5 attention heads"]),
}
whole = (TINY / WEIGHTS).read_bytes()
cuts = [whole[:n] for n in (0, 4, 100, 10_000, -1)]
for content in (*cuts, b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64, b"\xff" * 64):
    key = f"weights {len(content)} {content[:9]}"
    MISMATCHES[key] = lambda d, x=content: put(d, WEIGHTS, x), ["not a whole safetensors file"]
for text in ("{}", '["a"]', '{"a": "../x.safetensors"}', '{"a": "/x.safetensors"}', '{"a": 1, "b": "x"}', '{"a": [1]}'):
    content = b'{"weight_map": %s}' % text.encode()
    MISMATCHES[f"index {text}"] = lambda d, x=content: put(d, INDEX, x, shards=2), [INDEX, "files of this folder"]
for content in (b"", b'{"a', b"[]", b"\xff"):
    MISMATCHES[f"config {content}"] = lambda d, x=content: put(d, "config.json", x), ["config.json", "JSON"]
    MISMATCHES[f"index {content}"] = lambda d, x=content: put(d, INDEX, x, shards=2), [INDEX, "JSON"]
for key, value in dict(
    model_type="roberta", hidden_act="gelu_new", position_embedding_type="relative_key", is_decoder=True,
    hidden_size="32", num_hidden_layers=2.5, vocab_size=None, layer_norm_eps="1e-12", num_attention_heads=0,
    intermediate_size=-64, type_vocab_size=True, hidden_dropout_prob=1.5,
).items():
    MISMATCHES[key] = lambda d, key=key, value=value: write(d, tensors(), **{key: value}), ["config.json", key]


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches(case, tmp_path):
    make, named = MISMATCHES[case]
    make(tmp_path / "bert")
    before = contents(tmp_path / "bert")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "bert")
    message = str(caught.value)
    assert all(part in message for part in [str(tmp_path / "bert"), *named]) and "\n" not in message, message
    assert contents(tmp_path / "bert") == before and len(list(tmp_path.iterdir())) == 1  # and nothing is written


# ---------------------------------------------------------------------------------------------------------------------
# heads


def test_new_head_is_a_function_of_the_seed(tmp_path):
    folder, old, heads = write(tmp_path, tensors(without="pooler")), LAYOUTS["no pooler"](tensors(without="cls.")), []
    for global_seed, seed in [(1, 7), (2, 7), (3, 8)]:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        heads.append(load(folder, "classifier", outputs=3, seed=seed).state_dict())
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    one, again, other = heads
    new = {f"{module}.{kind}" for module in (POOLER, "classifier") for kind in ("weight", "bias")}
    assert one.keys() == old.keys() | new and same(one, again) and same(old, {name: one[name] for name in old})
    for name in new:
        assert not one[name].any() if name.endswith("bias") else not torch.equal(one[name], other[name])
    assert abs(float(one[f"{POOLER}.weight"].std()) - 0.02) < 2e-3


def test_own_classifier(tmp_path):
    own = {"classifier.weight": torch.rand(3, 32), "classifier.bias": torch.rand(3)}
    folder, expected = write(tmp_path / "own", tensors() | own), tensors(without="cls.") | own
    for new_head in (True, False):
        assert same(load(folder, "classifier", outputs=3, new_head=new_head).state_dict(), expected)
    with pytest.raises(UserError, match=r"classifier.weight is \(3, 32\), expected \(2, 32\)"):
        load(folder, "classifier", outputs=2)
    with pytest.raises(UserError, match="missing classifier.weight, classifier.bias"):
        load(TINY, "classifier", outputs=3, new_head=False)
    write(tmp_path / "poolerless", tensors(without="pooler") | own)
    with pytest.raises(UserError, match=f"missing {POOLER}.weight, {POOLER}.bias"):
        load(tmp_path / "poolerless", "classifier", outputs=3, new_head=False)


def test_heads_are_their_formulas(tmp_path):
    words, t = [5, 119, 60, 0], tensors()
    unbiased, bias = load(write(tmp_path, t | {BIAS: torch.zeros(120)})).mlm_logits(**inputs()), torch.randn(120)
    model = load(write(tmp_path, t | {BIAS: bias}), words=words)
    assert close(model.mlm_logits(**inputs()), unbiased + bias)
    assert close(model(**inputs()), model.mlm_logits(**inputs())[:, 0, words])
    bare = load(write(tmp_path, tensors(without="cls.")), words=words)
    first = bare.bert(**inputs())[:, 0]
    assert close(bare(**inputs()), first @ t[EMBEDDING][words].T)
    classifier = load(TINY, "classifier", outputs=3)
    pooled = torch.tanh(first @ t[f"{POOLER}.weight"].T + t[f"{POOLER}.bias"])
    assert close(classifier(**inputs()), pooled @ classifier.classifier.weight.T)
    for each in (model, bare):  # no parameter that the file does not hold
        assert {name for name, _ in each.named_parameters()} <= tensors().keys()


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_padding_changes_nothing(head):
    model = load(TINY, head, outputs=3)
    states, padded = model.bert(**inputs()), model.bert(**inputs(padding=9))
    assert close(model(**inputs()), model(**inputs(padding=9)))
    assert close(states, padded[:, :7])
    unmasked = model.bert(**inputs(padding=9) | {"attention_mask": torch.ones(3, 16)})
    assert (states - unmasked[:, :7]).abs().max() > 1e-2  # it is the mask that does it
    first = model.bert(**inputs(padding=9), first_only=True)  # and position 0 alone is position 0 of all
    assert first.shape == (3, 1, 32) and (first - padded[:, :1]).abs().max() < 1e-6


def test_task_loss():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    assert torch.equal(task_loss(logits, labels, 0, 1), F.cross_entropy(logits, labels, reduction="none"))
    output, scores = torch.randn(6, 1), torch.linspace(1, 5, 6)
    assert torch.allclose(task_loss(output, scores, 1, 5), (output[:, 0] - scores).square())
    assert torch.equal(to_score(output, 1, 5), output[:, 0])


@pytest.mark.parametrize("low, high", [(0, 5), (1, 5), (-1, 1)])
def test_two_output_regression(low, high):
    share = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    scores = low + share * (high - low)
    best = torch.stack([torch.full_like(share, 0.3), 0.3 + torch.logit(share)], dim=1).requires_grad_()
    loss = task_loss(best, scores, low, high)
    loss.sum().backward()
    assert best.grad.abs().max() < 1e-12  # p(yes) = (score - low) / (high - low) is stationary ...
    for move in torch.tensor([[0.0, 0.1], [0.1, 0.0], [-2.0, 1.0]], dtype=torch.float64):  # ... and a minimum
        assert (task_loss(best + move, scores, low, high) > loss).all()
    assert torch.allclose(to_score(best, low, high), scores)


# ---------------------------------------------------------------------------------------------------------------------
# saving

NAMES = ("no", "yes", "maybe")
KINDS = [("classifier", "", NAMES, "ForSequenceClassification"), ("words", "", NAMES, "ForMaskedLM"),
         ("words", "cls.", (), "Model"), ("classifier", "", (), "ForSequenceClassification")]


@pytest.mark.parametrize("head, without, labels, kind", KINDS)
def test_save_and_load(head, without, labels, kind, tmp_path):
    source, outputs = write(tmp_path / "source", tensors(without=without or "nothing")), len(labels) or 1
    for name in ("vocab.txt", "tokenizer.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    model = load(source, head, outputs=outputs)
    with torch.no_grad():
        model.get_parameter(QUERY).mul_(torch.rand(32, 32) < 0.5)
    save_model(tmp_path / "saved", model, model.state_dict(), source, labels)
    again = load(tmp_path / "saved", head, outputs=outputs, new_head=False)
    assert same(again.state_dict(), model.state_dict()) and again.config == model.config
    assert close(again(**inputs()), model(**inputs()))
    files = contents(tmp_path / "saved")
    assert files.keys() == {"model.safetensors", "config.json", "vocab.txt", "tokenizer.json"}
    config = json.loads(files["config.json"])
    assert config["architectures"] == [f"Bert{kind}"] and config["model_type"] == "bert"
    labels = labels or (("score",) if head == "classifier" else ())
    assert config.get("id2label", {}) == {str(i): label for i, label in enumerate(labels)}
    assert config.get("label2id", {}) == {label: i for i, label in enumerate(labels)}
    assert config.get("problem_type") == ("regression" if labels == ("score",) else None)
    save_model(tmp_path / "saved", again, again.state_dict(), tmp_path / "saved", ())  # over itself
    assert same(load(tmp_path / "saved", head, outputs=outputs).state_dict(), model.state_dict())


@pytest.mark.parametrize("survive", range(3))
def test_interrupted_save(survive, tmp_path, monkeypatch):
    """At whichever file the process dies, each is the old one or the new one, whole, and there is no litter."""
    source = write(tmp_path / "source", tensors())
    for version, folders in enumerate([("old", "saved"), ("new",)]):
        (source / "vocab.txt").write_text(f"version {version}\n")
        model = load(source, dropout=version / 10)
        with torch.no_grad():
            model.get_parameter(QUERY).add_(version)
        for folder in folders:
            save_model(tmp_path / folder, model, model.state_dict(), source, ())
    replace, left = os.replace, [None] * survive
    monkeypatch.setattr(os, "replace", lambda *paths: (left.pop(), replace(*paths)))  # IndexError where none is left
    with pytest.raises(IndexError):
        save_model(tmp_path / "saved", model, model.state_dict(), source, ())
    old, new, saved = (contents(tmp_path / name) for name in ("old", "new", "saved"))
    assert saved.keys() == old.keys() == new.keys() and all(saved[name] in (old[name], new[name]) for name in saved)
    assert sum(saved[name] == new[name] != old[name] for name in saved) == survive


# ---------------------------------------------------------------------------------------------------------------------
# the Hugging Face hub, imitated; huggingface_hub reads its settings when imported, hence a process that we ask

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in TINY.iterdir()} | {"vocab.txt": b"[PAD]\n"}
LEFT_THERE = {"pytorch_model.bin": b"pickle", "README.md": b"# tiny", "onnx/model.safetensors": b"another"}
REPOS = {"org/tiny": FILES | LEFT_THERE, "org/old": {"config.json": FILES["config.json"]} | LEFT_THERE}
ASK = """
import json, sys
from model import UserError, find_model
for name in sys.stdin:
    try:
        print(json.dumps([str(find_model(name.strip())), None]), flush=True)
    except UserError as error:
        print(json.dumps([None, str(error)]), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """.ask(name): what find_model says; .got: the files asked for; .close(): from now on nobody is there."""
    got, home = [], tmp_path_factory.mktemp("hub")

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            api, path = self.path.startswith("/api/models/"), self.path.split("?")[0].removeprefix("/api/models")
            _, org, repo, *rest = path.split("/")
            name, file = f"{org}/{repo}", "/".join(rest[2:])
            files = REPOS.get(name)
            body = {"id": name, "sha": SHA, "siblings": [{"rfilename": f} for f in files or {}]}
            if files and rest[:1] == ["tree"]:
                body = [{"type": "file", "path": f, "size": len(x), "oid": "0" * 40} for f, x in files.items()]
            body = json.dumps(body).encode()
            if files and not api:
                got.append(f"{name}/{file}")
                body = files[file]
            self.send_response(200 if files else 404)
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{repo}-{file}"'} if files else {"X-Error-Code": "RepoNotFound"}
            for header, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET
        log_message = print

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    env = {name: x for name, x in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ASK], env=env, cwd=home, **pipes) as child:

        def ask(name):
            start = time.time()
            print(name, file=child.stdin, flush=True)
            folder, error = json.loads(child.stdout.readline())
            assert time.time() - start < 20 and "\n" not in (error or "")
            return folder or error

        def leave():
            server.shutdown()
            server.server_close()

        yield SimpleNamespace(ask=ask, got=got, close=leave, port=server.server_port)
        leave()


def test_hub_gives_what_is_read(hub):
    folder = Path(hub.ask("org/tiny"))
    assert contents(folder) == FILES  # neither the .bin nor what lies in subfolders
    assert {name for name in hub.got if "tiny" in name} == {f"org/tiny/{name}" for name in FILES}
    assert close(load(folder)(**inputs()), load(TINY)(**inputs()))
    (folder / WEIGHTS).unlink()  # a download that was interrupted is completed
    assert contents(hub.ask("org/tiny")) == FILES


def test_hub_has_only_bin(hub):
    error = hub.ask("org/old")
    assert error.startswith("--model org/old: ") and "convert once" in error and "from_pretrained('org/old')" in error
    assert "org/old/pytorch_model.bin" not in hub.got


@pytest.mark.parametrize("name", ["org/none", "no/such/folder", "/no/such/folder", "run 1"])
def test_hub_knows_no_such_id(name, hub):
    assert hub.ask(name).startswith(f"--model {name}: no such folder, and the Hugging Face hub did not give it")


def test_hub_out_of_reach(hub):
    folder = hub.ask("org/tiny")
    hub.close()
    for reason in ("ConnectError", "ReadTimeout"):  # nobody listens; somebody listens and never answers
        listener = socket.create_server(("127.0.0.1", hub.port if reason == "ReadTimeout" else 0))
        assert f"no such folder, and the Hugging Face hub did not give it ({reason}: " in hub.ask("org/other")
        assert hub.ask("org/tiny") == folder and contents(folder) == FILES
        listener.close()


# ---------------------------------------------------------------------------------------------------------------------
# against transformers, with a real BERT


@pytest.fixture
def hf():
    if not BERT_DIR:
        pytest.skip("set BERT_DIR to a BERT in Hugging Face's layout")
    return pytest.importorskip("transformers")


@pytest.fixture
def batch(hf, tmp_path):
    """Real sentences of very different lengths in one padded batch: RTE's, or without GLUE_DIR one made longer."""
    tokenizer, task, folder = load_tokenizer(BERT_DIR, 10**6), get_task("rte"), tmp_path / "RTE"
    folder.mkdir()
    lines = [f"{i}\t{'The cat sat on the mat. ' * (i + 1)}\tIt sleeps.\tentailment\n" for i in range(277)]
    (folder / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    for path in Path(GLUE_DIR or "none").glob("RTE*"):  # a zip or a folder; copied, since unzipped where it lies
        shutil.rmtree(folder)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    dataset = load_dataset(task, "dev", tokenizer, 256, tmp_path)
    return {name: x for name, x in collate(dataset, dataset.lengths.argsort()[::18]).items() if name != "labels"}


def load_hf(auto, folder):
    """transformers' model of a folder that fits it to the last key."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.real
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_real_hidden_states(hf, batch, attention):
    theirs = hf.BertModel.from_pretrained(BERT_DIR, attn_implementation=attention, dtype=torch.float32).eval()(**batch)
    bert, mask = load(BERT_DIR, words=[5]).bert, batch["attention_mask"].bool()
    assert mask.sum(1).min() < mask.sum(1).max() / 4
    assert close(bert(**batch)[mask], theirs.last_hidden_state[mask])
    assert close(bert(**batch, first_only=True)[:, 0], theirs.last_hidden_state[:, 0])


@pytest.mark.real
@torch.no_grad()
def test_real_folder_loads_in_transformers(hf, batch, tmp_path):
    mine = load(BERT_DIR, "classifier", outputs=3)
    save_model(tmp_path / "classifier", mine, mine.state_dict(), BERT_DIR, NAMES)
    theirs = load_hf(hf.AutoModelForSequenceClassification, tmp_path / "classifier")
    assert theirs.config.id2label == dict(enumerate(NAMES)) and close(mine(**batch), theirs(**batch).logits)
    mine = load(BERT_DIR)
    save_model(tmp_path / "words", mine, mine.state_dict(), BERT_DIR, ())
    if hasattr(mine, "cls"):
        logits = load_hf(hf.AutoModelForMaskedLM, tmp_path / "words")(**batch).logits[:, 0, mine.words]
    else:
        theirs = load_hf(hf.AutoModel, tmp_path / "words")
        logits = theirs(**batch).last_hidden_state[:, 0] @ theirs.get_input_embeddings().weight[mine.words].T
    assert close(mine(**batch), logits)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "Model"])
@torch.no_grad()
def test_real_round_trip_through_transformers(hf, kind, tmp_path):
    """A random BERT that transformers saved has the same outputs here; so has there what is then saved here."""
    torch.manual_seed(0)
    config = json.loads((TINY / "config.json").read_text()) | {"initializer_range": 0.3}
    theirs = getattr(hf, f"Bert{kind}")(hf.BertConfig(**config, num_labels=3)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * (parameter.dim() == 1) / 10)  # biases, LayerNorms
    theirs.save_pretrained(tmp_path / "theirs")
    head, auto = "classifier" if "Sequence" in kind else "words", kind.replace("PreTraining", "MaskedLM")
    mine = load(tmp_path / "theirs", head, outputs=3, new_head=False)
    save_model(tmp_path / "mine", mine, mine.state_dict(), tmp_path / "theirs", NAMES)
    for other in (theirs, load_hf(getattr(hf, f"AutoModel{auto.removeprefix('Model')}"), tmp_path / "mine")):
        output = other(**inputs(padding=5))[0]
        if kind == "ForSequenceClassification":
            assert close(mine(**inputs(padding=5)), output)
        elif kind == "Model":
            assert close(mine.bert(**inputs(padding=5)), output)
        else:
            assert close(mine.mlm_logits(**inputs(padding=5)), output)
            assert close(mine(**inputs(padding=5)), output[:, 0, mine.words])
