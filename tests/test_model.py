"""What model.py promises about loading, heads and saving.

Every layout of a BERT loads to the same tensors. A mismatch is named in one line. The heads are
the formulas that they claim to be. What is saved can be loaded as any other BERT.

A tiny BERT and a hub on 127.0.0.1 are enough for most tests, which need no network:

    python -m pytest tests/test_model.py

With real files a real BERT is compared with transformers too:

    BERT_DIR=... GLUE_DIR=... python -m pytest tests/test_model.py
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

from data import Task, get_task, kind_of, load_dataset
from model import attend_with_dropout
from models.checkpoint import load_model, save_model
from models.tokenizer import load_tokenizer
from support.terminal import UserError

ROOT = Path(__file__).parent.parent
# tiny-bert has the prefix "bert.", a pooler, and an MLM head without a decoder of its own
TINY = ROOT / "tests" / "golden" / "tiny-bert"
BERT_DIR = os.environ.get("BERT_DIR")
GLUE_DIR = os.environ.get("GLUE_DIR")
EMBEDDING = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
POOLER = "bert.pooler.dense"
BIAS = "cls.predictions.bias"
DECODER = "cls.predictions.decoder"


def tensors(without=None):
    """The tensors of tiny-bert, except those with `without` in their names."""
    state = load_file(TINY / "model.safetensors")
    if without is None:
        return state
    return {name: tensor for name, tensor in state.items() if without not in name}


def rename(state, *pairs):
    """The same tensors with each (old, new) replaced in their names."""
    for old, new in pairs:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def write(folder, state, shards=1, **changes):
    """A checkpoint folder: tiny-bert's config.json with `changes`, and `state` in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((TINY / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    parts = {f"model-{i + 1:05}-of-{shards:05}.safetensors": {} for i in range(shards)}
    weight_map = {}
    for i, name in enumerate(state):
        file = list(parts)[i % shards]
        parts[file][name] = state[name]
        weight_map[name] = file
    for file, part in parts.items():
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(folder):
    """{name: bytes} of what lies in a folder; None in place of the bytes of a subfolder."""
    found = {}
    for path in Path(folder).iterdir():
        found[path.name] = path.read_bytes() if path.is_file() else None
    return found


def load(folder, head="words", words=(5, 7, 60), **options):
    """The model in a folder, in evaluation mode; `words` are used by the head "words" only."""
    if head != "words":
        words = ()
    return load_model(folder, head, words=words, **options).eval()


def inputs(padding=0):
    """Inputs of three made-up pairs of 7 tokens, and `padding` more positions that are masked.

    The padded positions hold arbitrary ids, so that a model that reads them is found out.
    """
    ids = torch.randint(1, 120, (3, 16), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : 7 + padding]
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    types = torch.zeros_like(ids)
    types[:, 4:] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def close(mine, theirs):
    """Are two tensors equal but for rounding, which depends on how loaded memory is aligned?"""
    difference = float((mine - theirs).detach().abs().max())
    print(f"max difference {difference:.1e} of {float(theirs.detach().abs().max()):.1f}")
    return mine.shape == theirs.shape and difference < 1e-5


def same(state, other):
    """Do two state dicts hold the same tensors, bit for bit?"""
    if state.keys() != other.keys():
        return False
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


# --------------------------------------------------------------------------------------------------
# loading

# Each of these functions takes the tensors of a checkpoint and returns them in another layout.


def as_it_is(state):
    return state


def no_prefix(state):
    return rename(state, ("bert.", ""))


def gamma_and_beta(state):
    return rename(state, ("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta"))


def position_ids(state):
    return state | {"bert.embeddings.position_ids": torch.arange(32)[None]}


def tied_decoder(state):
    weight = state[EMBEDDING].clone()
    bias = state[BIAS].clone()
    return state | {f"{DECODER}.weight": weight, f"{DECODER}.bias": bias}


def decoder_bias_only(state):
    return rename(state, (BIAS, f"{DECODER}.bias"))


def next_sentence_head(state):
    head = "cls.seq_relationship"
    return state | {f"{head}.weight": torch.ones(2, 32), f"{head}.bias": torch.ones(2, 32)}


def no_pooler(state):
    return {name: tensor for name, tensor in state.items() if "pooler" not in name}


LAYOUTS = [
    as_it_is,
    no_prefix,
    gamma_and_beta,
    position_ids,
    tied_decoder,
    decoder_bias_only,
    next_sentence_head,
    no_pooler,
]
STORED = [("float32", 1), ("float16", 1), ("bfloat16", 1), ("float32", 3)]


def attention_inputs():
    """Queries, keys and values (2, 3, 64, 16), and a mask of 64 and 40 tokens."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 64, 16, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    mask[1, ..., 40:] = False
    return tensors, mask


def test_attention_of_the_cpu_is_pytorchs():
    """Without a dropped value, result and gradients are those of F.scaled_dot_product_attention."""
    tensors, mask = attention_inputs()
    expected = F.scaled_dot_product_attention(*tensors, mask, scale=0.25)
    ours = attend_with_dropout(*tensors, mask, dropout=1e-9, scale=0.25)
    assert (ours - expected).abs().max() < 1e-5
    theirs = torch.autograd.grad(expected.square().sum(), tensors)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), tensors), theirs):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.0375])
def test_attention_drops_as_often_as_it_should(dropout):
    """Of 8 million probabilities the right fraction is dropped, and the mean stays.

    All keys are equal, so each probability is 1 / 64, and each value is 1.
    """
    torch.manual_seed(3)
    zeros = torch.zeros(500, 4, 64, 1)
    mask = torch.ones(500, 1, 1, 64, dtype=torch.bool)
    mixed = attend_with_dropout(zeros, zeros, zeros + 1, mask, dropout, scale=1.0)
    kept = mixed.double() * (1 - dropout)  # the fraction of the 64 that is kept
    assert abs(kept.mean() - (1 - dropout)) < 1e-4 + 4 * (dropout / zeros.numel() / 64) ** 0.5
    spread = (dropout * (1 - dropout) / 64) ** 0.5  # the values are independent
    assert abs(kept.std() / spread - 1) < 0.02
    torch.manual_seed(3)
    again = attend_with_dropout(zeros, zeros, zeros + 1, mask, dropout, scale=1.0)
    assert torch.equal(mixed, again)  # a function of the seed


@pytest.mark.parametrize("dtype, shards", STORED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, shards, tmp_path):
    """Every layout and data type, in one file or three, loads to the same float32 tensors.

    The head "words" does not use the pooler, so it is left out.
    """
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors().items()}
    expected = {name: tensor.float() for name, tensor in stored.items()}
    model = load(write(tmp_path / "layout", layout(stored), shards))
    assert same(model.state_dict(), no_pooler(expected))
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
    reference = load(write(tmp_path / "reference", expected))
    assert close(model(**inputs()), reference(**inputs()))
    assert close(model.mlm_logits(**inputs()), reference.mlm_logits(**inputs()))


@pytest.mark.parametrize("layout", [as_it_is, no_pooler])
def test_bare_encoder(layout, tmp_path):
    """A checkpoint without an MLM head and without the prefix "bert." loads, pooler or not.

    Label words do not read its pooler, which is kept and not trained.
    """
    state = layout(tensors(without="cls."))
    folder = write(tmp_path, rename(state, ("bert.", "")))
    model = load(folder)
    assert same(model.state_dict(), state)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("pooler" not in name)


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
CONVERT = ["no model.safetensors", "convert once", "save_pretrained"]


def written(state, **changes):
    """A function that writes a checkpoint of these tensors into a folder."""

    def make(folder):
        write(folder, state, **changes)

    return make


def replaced(file, content, shards=1, other="README.md"):
    """A function that writes tiny-bert into a folder, but with other bytes in one of its files.

    With `content` None there is no such file. `other` is one more file that lies in the folder.
    """

    def make(folder):
        path = write(folder, tensors(), shards) / file
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        (folder / other).write_bytes(b"\x80\x02.")

    return make


def mismatches():
    """{case: (function that makes the folder, what the error names besides the folder)}."""
    cases = {
        "missing": (
            written(tensors(without=QUERY)),
            [f"missing {QUERY}"],
        ),
        "part of the MLM head": (
            written(tensors(without=BIAS)),
            [f"missing {BIAS}"],
        ),
        "unknown": (
            written(tensors() | {"bert.adapter": torch.ones(2)}),
            ["unknown bert.adapter"],
        ),
        "layers": (
            written(tensors(), num_hidden_layers=2),
            ["unknown bert.encoder.layer.2."],
        ),
        "shape": (
            written(tensors() | {QUERY: torch.ones(32, 16)}),
            [f"{QUERY} is (32, 16), expected (32, 32)"],
        ),
        "vocab_size": (
            written(tensors(), vocab_size=99),
            [f"{EMBEDDING} is (120, 32), expected (99, 32)"],
        ),
        "untied": (
            written(tensors() | {f"{DECODER}.weight": torch.ones(119, 32)}),
            [f"{DECODER}.weight differs", "tied"],
        ),
        "untied values": (
            written(tensors() | {f"{DECODER}.weight": torch.ones(120, 32)}),
            ["differs", "tied"],
        ),
        "lost shard": (
            replaced(SHARD, None, shards=2),
            [SHARD, "not a whole safetensors file"],
        ),
        "torn shard": (
            replaced(SHARD, b"", shards=2),
            [SHARD, "not a whole safetensors file"],
        ),
        "only .bin": (
            replaced(WEIGHTS, None, other="pytorch_model.bin"),
            CONVERT,
        ),
        "only .bin shards": (
            replaced(WEIGHTS, None, other="pytorch_model-00001-of-00002.bin"),
            CONVERT,
        ),
        "no weights": (
            replaced(WEIGHTS, None),
            ["no model.safetensors"],
        ),
        "no config": (
            replaced("config.json", None),
            ["config.json", "No such file"],
        ),
        "a head that is not whole": (
            written(tensors(), num_attention_heads=5),
            ["hidden_size 32", "5 attention heads"],
        ),
    }

    whole = (TINY / WEIGHTS).read_bytes()
    damaged = [whole[:length] for length in (0, 4, 100, 10_000, -1)]
    damaged += [b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64, b"\xff" * 64]
    for content in damaged:
        key = f"weights {len(content)} {content[:9]}"
        cases[key] = replaced(WEIGHTS, content), ["not a whole safetensors file"]

    weight_maps = ["{}", '["a"]', '{"a": "../x.safetensors"}', '{"a": "/x.safetensors"}']
    weight_maps += ['{"a": 1, "b": "x"}', '{"a": [1]}']
    for text in weight_maps:
        content = b'{"weight_map": %s}' % text.encode()
        named = [INDEX, "files of this folder"]
        cases[f"index {text}"] = replaced(INDEX, content, shards=2), named

    for content in (b"", b'{"a', b"[]", b"\xff"):
        cases[f"config {content}"] = replaced("config.json", content), ["config.json", "JSON"]
        cases[f"index {content}"] = replaced(INDEX, content, shards=2), [INDEX, "JSON"]

    wrong = {
        "model_type": "electra",
        "hidden_act": "relu",
        "position_embedding_type": "relative_key",
        "is_decoder": True,
        "hidden_size": "32",
        "num_hidden_layers": 2.5,
        "vocab_size": None,
        "layer_norm_eps": "1e-12",
        "num_attention_heads": 0,
        "intermediate_size": -64,
        "type_vocab_size": True,
        "hidden_dropout_prob": 1.5,
    }
    for key, value in wrong.items():
        cases[f"config {key}"] = written(tensors(), **{key: value}), ["config.json", key]
    return cases


MISMATCHES = mismatches()


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches(case, tmp_path):
    """A checkpoint that does not fit is refused in one line that names the folder and the fault.

    Nothing is written, in the folder or beside it.
    """
    make, named = MISMATCHES[case]
    folder = tmp_path / "bert"
    make(folder)
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(folder), *named]:
        assert part in message, message
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


# --------------------------------------------------------------------------------------------------
# heads


def test_new_head_is_a_function_of_the_seed(tmp_path):
    """A new pooler and classifier depend on `seed` only, and the rest is what the file holds.

    The global random state is neither used nor changed. New biases are 0, new weights have the
    standard deviation 0.02.
    """
    folder = write(tmp_path, tensors(without="pooler"))
    states = []
    for global_seed, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        states.append(load(folder, "classifier", outputs=3, seed=seed).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    one, again, other = states
    old = no_pooler(tensors(without="cls."))
    weights = {f"{POOLER}.weight", "classifier.weight"}
    biases = {f"{POOLER}.bias", "classifier.bias"}
    assert one.keys() == old.keys() | weights | biases
    assert same(one, again)
    assert same(old, {name: one[name] for name in old})
    for name in weights:
        assert not torch.equal(one[name], other[name])
    for name in biases:
        assert not one[name].any()
    assert abs(float(one[f"{POOLER}.weight"].std()) - 0.02) < 2e-3


def test_own_classifier(tmp_path):
    """A classifier that the file holds is loaded; one of another size is refused.

    With `new_head=False` a missing classifier or pooler is refused too.
    """
    own = {"classifier.weight": torch.rand(3, 32), "classifier.bias": torch.rand(3)}
    folder = write(tmp_path / "own", tensors() | own)
    expected = tensors(without="cls.") | own
    for new_head in (True, False):
        model = load(folder, "classifier", outputs=3, new_head=new_head)
        assert same(model.state_dict(), expected)
    with pytest.raises(UserError, match=r"classifier.weight is \(3, 32\), expected \(2, 32\)"):
        load(folder, "classifier", outputs=2)
    with pytest.raises(UserError, match="missing classifier.weight, classifier.bias"):
        load(TINY, "classifier", outputs=3, new_head=False)
    poolerless = write(tmp_path / "poolerless", tensors(without="pooler") | own)
    with pytest.raises(UserError, match=f"missing {POOLER}.weight, {POOLER}.bias"):
        load(poolerless, "classifier", outputs=3, new_head=False)


def test_heads_are_their_formulas(tmp_path):
    """Each output head computes its formula from the hidden state of [CLS].

    With an MLM head "words" gives its logits of the label words, without one h_[CLS] . e(word).
    The classifier gives a linear map of the pooled state. The head "words" adds no parameter.
    """
    words = [5, 119, 60, 0]
    state = tensors()
    zero = load(write(tmp_path, state | {BIAS: torch.zeros(120)}))
    unbiased = zero.mlm_logits(**inputs())
    bias = torch.randn(120)
    model = load(write(tmp_path, state | {BIAS: bias}), words=words)
    assert close(model.mlm_logits(**inputs()), unbiased + bias)
    assert close(model(**inputs()), model.mlm_logits(**inputs())[:, 0, words])

    bare = load(write(tmp_path, tensors(without="cls.")), words=words)
    first = bare.bert(**inputs())[:, 0]  # (B, C)
    assert close(bare(**inputs()), first @ state[EMBEDDING][words].T)

    classifier = load(TINY, "classifier", outputs=3)
    pooled = torch.tanh(first @ state[f"{POOLER}.weight"].T + state[f"{POOLER}.bias"])
    assert close(classifier(**inputs()), pooled @ classifier.classifier.weight.T)

    for each in (model, bare):
        names = {name for name, _ in each.named_parameters()}
        assert names <= state.keys()


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_padding_changes_nothing(head):
    """Padded positions do not change the outputs, because they are masked.

    With `first_only` the encoder gives the same state at position 0 as it gives without.
    """
    model = load(TINY, head, outputs=3)
    padding = inputs(padding=9)
    states = model.bert(**inputs())
    padded = model.bert(**padding)
    assert close(model(**inputs()), model(**padding))
    assert close(states, padded[:, :7])
    unmasked = model.bert(**padding | {"attention_mask": torch.ones(3, 16)})
    assert (states - unmasked[:, :7]).abs().max() > 1e-2  # without the mask the states change
    first = model.bert(**padding, first_only=True)
    assert first.shape == (3, 1, 32)
    assert (first - padded[:, :1]).abs().max() < 1e-6


def kind_from(low, high):
    """The kind of a task whose labels are numbers from `low` to `high`."""
    options = {"range": (low, high)}
    return kind_of(Task(name="t", folder="t", labels=(), kind="score", options=options))


def test_losses():
    """The loss is the cross-entropy of classes, and the squared error of a single output."""
    classes = kind_of(Task(name="t", folder="t", labels=("a", "b", "c")))
    numbers = kind_from(1, 5)
    logits = torch.randn(6, 3)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(classes.losses(logits, labels), expected)
    output = torch.randn(6, 1)
    values = torch.linspace(1, 5, 6)
    assert torch.allclose(numbers.losses(output, values), (output[:, 0] - values).square())
    assert torch.equal(numbers.to_value(output), output[:, 0])


@pytest.mark.parametrize("low, high", [(0, 5), (1, 5), (-1, 1)])
def test_two_output_regression(low, high):
    """The loss of two outputs is least where p(yes) = (value - low) / (high - low).

    There its gradient is zero, and the outputs stand for the value itself.
    """
    kind = kind_from(low, high)
    share = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    values = low + share * (high - low)
    no = torch.full_like(share, 0.3)
    yes = 0.3 + torch.logit(share)
    best = torch.stack([no, yes], dim=1).requires_grad_()  # (B, 2)
    loss = kind.losses(best, values)
    loss.sum().backward()
    assert best.grad.abs().max() < 1e-12
    for move in torch.tensor([[0.0, 0.1], [0.1, 0.0], [-2.0, 1.0]], dtype=torch.float64):
        assert (kind.losses(best + move, values) > loss).all()
    assert torch.allclose(kind.to_value(best), values)


# --------------------------------------------------------------------------------------------------
# saving

NAMES = ("no", "yes", "maybe")
KINDS = [
    ("classifier", None, NAMES, "BertForSequenceClassification"),
    ("words", None, NAMES, "BertForMaskedLM"),
    ("words", "cls.", (), "BertModel"),
    ("classifier", None, (), "BertForSequenceClassification"),
]


@pytest.mark.parametrize("head, without, labels, architecture", KINDS)
def test_save_and_load(head, without, labels, architecture, tmp_path):
    """A saved folder loads to the same model, and its config.json says what the model is.

    A folder can be saved over itself.
    """
    source = write(tmp_path / "source", tensors(without))
    outputs = len(labels) or 1
    model = load(source, head, outputs=outputs)
    with torch.no_grad():
        model.get_parameter(QUERY).mul_(torch.rand(32, 32) < 0.5)
    saved = tmp_path / "saved"
    save_model(saved, model, model.state_dict(), labels)
    again = load(saved, head, outputs=outputs, new_head=False)
    assert same(again.state_dict(), model.state_dict())
    assert again.config == model.config
    assert close(again(**inputs()), model(**inputs()))

    files = contents(saved)
    assert files.keys() == {"model.safetensors", "config.json"}
    config = json.loads(files["config.json"])
    assert config["architectures"] == [architecture]
    assert config["model_type"] == "bert"
    regression = head == "classifier" and not labels
    if regression:
        labels = ("score",)
    assert config.get("id2label", {}) == {str(i): label for i, label in enumerate(labels)}
    assert config.get("label2id", {}) == {label: i for i, label in enumerate(labels)}
    assert config.get("problem_type") == ("regression" if regression else None)

    save_model(saved, again, again.state_dict(), ())
    over = load(saved, head, outputs=outputs)
    assert same(over.state_dict(), model.state_dict())


@pytest.mark.parametrize("survive", range(2))
def test_interrupted_save(survive, tmp_path, monkeypatch):
    """If the process dies while it saves, each file is the old one or the new one, and whole.

    No temporary file is left. `survive` is the number of files that were replaced before.
    """

    class Killed(Exception):
        pass

    source = write(tmp_path / "source", tensors())
    for version, folders in ((0, ("old", "saved")), (1, ("new",))):
        model = load(source, dropout=version / 10)
        with torch.no_grad():
            model.get_parameter(QUERY).add_(version)
        for folder in folders:
            save_model(tmp_path / folder, model, model.state_dict(), ())

    replace = os.replace
    done = []

    def replace_some(*paths):
        if len(done) == survive:
            raise Killed
        replace(*paths)
        done.append(paths)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(Killed):
        save_model(tmp_path / "saved", model, model.state_dict(), ())
    old = contents(tmp_path / "old")
    new = contents(tmp_path / "new")
    saved = contents(tmp_path / "saved")
    assert saved.keys() == old.keys()
    assert saved.keys() == new.keys()
    changed = 0
    for name in saved:
        assert saved[name] in (old[name], new[name])
        if saved[name] == new[name] and new[name] != old[name]:
            changed += 1
    assert changed == survive


# --------------------------------------------------------------------------------------------------
# the Hugging Face hub, imitated by a server on 127.0.0.1

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in TINY.iterdir()} | {"vocab.txt": b"[PAD]\n"}
NOT_READ = {
    "pytorch_model.bin": b"pickle",
    "README.md": b"# tiny",
    "onnx/model.safetensors": b"another",
}
REPOS = {
    "org/tiny": FILES | NOT_READ,
    "org/config": FILES | NOT_READ,
    "org/old": {"config.json": FILES["config.json"]} | NOT_READ,
}
# huggingface_hub reads its settings when it is imported, so another process has to import it.
ASK = """
import json, sys
from support.fetch import UserError, find_config, find_model
for name in map(str.strip, sys.stdin):
    try:
        config = name.startswith("config of ")
        found = find_config(name.split()[-1]) if config else str(find_model(name))
        print(json.dumps([found, None]), flush=True)
    except UserError as error:
        print(json.dumps([None, str(error)]), flush=True)
    assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """An imitated hub, and a process that looks for models there.

    `.ask(name)` returns what `find_model` returns, of "config of NAME" what `find_config` does, or
    its error. `.got` lists the files that were asked for, `.port` is the hub's port, and `.close()`
    switches the hub off.
    """
    got = []
    home = tmp_path_factory.mktemp("hub")

    class Hub(BaseHTTPRequestHandler):
        log_message = print

        def do_GET(self):
            # /api/models/ORG/REPO/..., or /ORG/REPO/resolve/SHA/FILE
            api = self.path.startswith("/api/models/")
            path = self.path.split("?")[0].removeprefix("/api/models")
            _, org, repo, *rest = path.split("/")
            name = f"{org}/{repo}"
            file = "/".join(rest[2:])
            if name not in REPOS:
                headers = {"X-Error-Code": "RepoNotFound"}
                self.answer(404, headers, b"{}")
                return
            files = REPOS[name]
            if not api:
                got.append(f"{name}/{file}")
                body = files[file]
            elif rest[:1] == ["tree"]:
                listed = []
                for key, content in files.items():
                    size = len(content)
                    listed.append({"type": "file", "path": key, "size": size, "oid": "0" * 40})
                body = json.dumps(listed).encode()
            else:
                siblings = [{"rfilename": key} for key in files]
                body = json.dumps({"id": name, "sha": SHA, "siblings": siblings}).encode()
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{repo}-{file}"'}
            self.answer(200, headers, body)

        do_HEAD = do_GET

        def answer(self, status, headers, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("HF_") and "proxy" not in name.lower():
            environment[name] = value
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", ASK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=home, **pipes) as child:

        def ask(name):
            start = time.time()
            print(name, file=child.stdin, flush=True)
            folder, error = json.loads(child.stdout.readline())
            assert time.time() - start < 20
            if error is None:
                return folder
            assert "\n" not in error
            return error

        def close_hub():
            server.shutdown()
            server.server_close()

        yield SimpleNamespace(ask=ask, got=got, close=close_hub, port=server.server_port)
        close_hub()


def test_hub_gives_what_is_read(hub):
    """Only the files that are read are downloaded, and an interrupted download is completed."""
    folder = Path(hub.ask("org/tiny"))
    assert contents(folder) == FILES
    asked = {name for name in hub.got if "tiny" in name}
    assert asked == {f"org/tiny/{name}" for name in FILES}
    assert close(load(folder)(**inputs()), load(TINY)(**inputs()))
    (folder / WEIGHTS).unlink()
    assert contents(hub.ask("org/tiny")) == FILES


def test_the_hub_gives_config_alone(hub):
    """The recipe asks for config.json before anything is loaded, and for no other file."""
    assert hub.ask("config of org/config")["model_type"] == "bert"
    assert {name for name in hub.got if "org/config" in name} == {"org/config/config.json"}


def test_hub_has_only_bin(hub):
    """A model with pickled weights only is refused without downloading them.

    The error says how to convert it.
    """
    error = hub.ask("org/old")
    assert error.startswith("--model org/old: ")
    assert "convert once" in error
    assert "m = 'org/old'" in error
    assert "org/old/pytorch_model.bin" not in hub.got


@pytest.mark.parametrize("name", ["org/none", "no/such/folder", "/no/such/folder", "run 1"])
def test_hub_knows_no_such_id(name, hub):
    """A name that is neither a folder nor a model on the hub is refused."""
    expected = f"--model {name}: no such folder, and the Hugging Face hub did not give it"
    assert hub.ask(name).startswith(expected)


def test_hub_out_of_reach(hub):
    """Without the hub a model from its cache is found, and any other is refused with the reason.

    The hub is out of reach when nobody listens at its port, and when somebody never answers.
    """
    folder = hub.ask("org/tiny")
    hub.close()
    for reason in ("ConnectError", "ReadTimeout"):
        port = hub.port if reason == "ReadTimeout" else 0
        listener = socket.create_server(("127.0.0.1", port))
        expected = f"no such folder, and the Hugging Face hub did not give it ({reason}: "
        assert expected in hub.ask("org/other")
        assert hub.ask("org/tiny") == folder
        assert contents(folder) == FILES
        listener.close()


# --------------------------------------------------------------------------------------------------
# against transformers, with a real BERT


@pytest.fixture
def hf():
    """The package `transformers`; without it or without BERT_DIR the test is skipped."""
    if not BERT_DIR:
        pytest.skip("set BERT_DIR to a BERT in Hugging Face's layout")
    return pytest.importorskip("transformers")


@pytest.fixture
def batch(hf, tmp_path):
    """Inputs of sentence pairs of very different lengths, padded to one length.

    They are from RTE's dev set, or without GLUE_DIR made-up ones of growing length.
    """
    folder = tmp_path / "RTE"
    folder.mkdir()
    lines = ["index\tsentence1\tsentence2\tlabel\n"]
    for i in range(277):
        text = "The cat sat on the mat. " * (i + 1)
        lines.append(f"{i}\t{text}\tIt sleeps.\tentailment\n")
    (folder / "dev.tsv").write_text("".join(lines))
    # RTE's zip or folder is copied, because a zip is unzipped where it lies
    for path in Path(GLUE_DIR or "none").glob("RTE*"):
        shutil.rmtree(folder, ignore_errors=True)
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copyfile(path, tmp_path / path.name)
    tokenizer = load_tokenizer(BERT_DIR, 10**6)
    dataset = load_dataset(get_task("rte"), "dev", tokenizer, 256, tmp_path)
    every_18th = dataset.lengths.argsort()[::18]
    data = dataset.collate(every_18th)
    for name in ("labels", "rows"):
        data.pop(name)
    return data


def load_hf(auto, folder):
    """The model that transformers loads from a folder, in which no key is missing or left over."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.real
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_real_hidden_states(hf, batch, attention):
    """The hidden states of a real BERT are those of transformers, wherever there is a token."""
    options = {"attn_implementation": attention, "dtype": torch.float32}
    theirs = hf.BertModel.from_pretrained(BERT_DIR, **options).eval()
    expected = theirs(**batch).last_hidden_state
    bert = load(BERT_DIR, words=[5]).bert
    mask = batch["attention_mask"].bool()
    assert mask.sum(1).min() < mask.sum(1).max() / 4
    assert close(bert(**batch)[mask], expected[mask])
    assert close(bert(**batch, first_only=True)[:, 0], expected[:, 0])


@pytest.mark.real
@torch.no_grad()
def test_real_folder_loads_in_transformers(hf, batch, tmp_path):
    """transformers loads what is saved here, and computes the same logits with it."""
    mine = load(BERT_DIR, "classifier", outputs=3)
    save_model(tmp_path / "classifier", mine, mine.state_dict(), NAMES)
    theirs = load_hf(hf.AutoModelForSequenceClassification, tmp_path / "classifier")
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert close(mine(**batch), theirs(**batch).logits)

    mine = load(BERT_DIR)
    save_model(tmp_path / "words", mine, mine.state_dict(), ())
    if hasattr(mine, "cls"):
        theirs = load_hf(hf.AutoModelForMaskedLM, tmp_path / "words")
        logits = theirs(**batch).logits[:, 0, mine.words]
    else:
        theirs = load_hf(hf.AutoModel, tmp_path / "words")
        first = theirs(**batch).last_hidden_state[:, 0]  # (B, C)
        logits = first @ theirs.get_input_embeddings().weight[mine.words].T  # (B, K)
    assert close(mine(**batch), logits)


@pytest.mark.real
@pytest.mark.parametrize(
    "kind", ["ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "Model"]
)
@torch.no_grad()
def test_real_round_trip_through_transformers(hf, kind, tmp_path):
    """A random BERT that transformers saved has the same outputs here.

    When it is saved here and loaded there again, it still has them.
    """
    torch.manual_seed(0)
    config = json.loads((TINY / "config.json").read_text()) | {"initializer_range": 0.3}
    theirs = getattr(hf, f"Bert{kind}")(hf.BertConfig(**config, num_labels=3)).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:  # biases and LayerNorms, which would be 0 or 1
            parameter.add_(torch.randn_like(parameter) / 10)
    theirs.save_pretrained(tmp_path / "theirs")
    head = "classifier" if "Sequence" in kind else "words"
    mine = load(tmp_path / "theirs", head, outputs=3, new_head=False)
    save_model(tmp_path / "mine", mine, mine.state_dict(), NAMES)
    auto = {"Model": "AutoModel", "ForPreTraining": "AutoModelForMaskedLM"}
    again = load_hf(getattr(hf, auto.get(kind, f"AutoModel{kind}")), tmp_path / "mine")
    padded = inputs(padding=5)
    for other in (theirs, again):
        output = other(**padded)[0]
        if kind == "ForSequenceClassification":
            assert close(mine(**padded), output)
        elif kind == "Model":
            assert close(mine.bert(**padded), output)
        else:
            assert close(mine.mlm_logits(**padded), output)
            assert close(mine(**padded), output[:, 0, mine.words])
