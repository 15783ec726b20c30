"""What data.py promises about files, texts, batches and mistakes.

Files are whole. Texts are read as they stand in the files. An epoch has every example once. A
mistake is named in one line.

Made-up files and a server on 127.0.0.1 are enough for most tests, which need no network:

    python -m pytest tests/test_data.py

With real files a real GLUE folder and a real BERT are tested too:

    GLUE_DIR=... BERT_DIR=... python -m pytest tests/test_data.py
"""

import hashlib
import io
import json
import os
import shutil
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import data
from data import Dataset, Task, batches, get_task, kind_of, load_dataset
from kinds import classify
from kinds.text import encode
from models.tokenizer import load_tokenizer, word_ids
from support import fetch, files
from support.terminal import UserError

GLUE_DIR = os.environ.get("GLUE_DIR")
BERT_DIR = os.environ.get("BERT_DIR")
real_glue = pytest.mark.skipif(
    not GLUE_DIR, reason="set GLUE_DIR to a folder of official GLUE files"
)
real_bert = pytest.mark.skipif(
    not BERT_DIR, reason="set BERT_DIR to a BERT in Hugging Face's layout"
)

VOCAB = """
    [PAD] [UNK] [CLS] [SEP] [MASK] a b c d e ##a ##b ##c ##d ##e the cat dog sat ran yes no maybe
    , . ' " ! ? - ( ) naive ##ing un ##able 中 文 cafe café The straße ß ##ß 1 ##2 ##3
    caf ##é É
""".split()
TRICKY = [
    "The cat sat.",
    "naïve café, CAFÉ!",
    "中文cat文",
    "unable runing dog",
    "a\u2028b\u00a0c\u3000d",
    "[CLS] the [SEP] cat [MASK]",
    "[cls] the",
    'the "cat" (dog)\'s',
    "",
    "   ",
    "x" * 101,
    "e" * 100,
    "straße ß É 123",
    "a\x00b\ufffdc\u200bd",
    "e\u0301 a\u0300b",
    "cat\tdog\rsat",
    "--the!?",
    "\U0001f600 cat",
    "ＡＢＣ",
    "İ I ı",
]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test reaches the network or the user's cache."""
    monkeypatch.setenv("GLUE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("NANOPRUNE_CACHE", str(tmp_path / "spare"))


@pytest.fixture
def tokenizer(tmp_path):
    """The tokenizer of VOCAB, from the folder tmp_path/bert."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return load_tokenizer(folder, len(VOCAB))


DEV = "label\ttext\n1\tthe dog\n"
TEST = "index\ttext\n0\tthe cat\n"


def toy(train, members=()):
    """An official task like SST-2, and the bytes of its zip.

    `train` is the text of its training file. `members` are more files of the zip: {name: text}.
    """
    splits = {"train": train, "dev": DEV, "test": TEST}
    files = {f"Toy/{split}.tsv": text for split, text in splits.items()}
    files |= dict(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, text in files.items():
            zipped.writestr(name, text)
    content = buffer.getvalue()
    task = Task(
        name="toy",
        folder="Toy",
        labels=("bad", "good"),
        spelling=("0", "1"),
        words=("no", "yes"),
        metrics=("accuracy",),
        columns=("text",),
        label="label",
        rows={split: text.count("\n") - 1 for split, text in splits.items()},  # without the header
        sources=(("glue/data/Toy.zip", hashlib.sha256(content).hexdigest()),),
    )
    return task, content


def training_file():
    """1,000 rows of random texts of the letters a to e, which a zip cannot make very small."""
    letters = np.random.default_rng(0).integers(97, 102, 100_000)
    noise = letters.astype(np.uint8).tobytes().decode()
    lines = ["label\ttext\n"]
    for i in range(1000):
        lines.append(f"{i % 2}\tcat {noise[i * 100 : i * 100 + 50]}\n")
    return "".join(lines)


TRAIN = training_file()


class Server(ThreadingHTTPServer):
    """A server that gives `files`, each by the last part of its address.

    `fault` says how it fails. `seen` lists the names it was asked for.
    """

    def __init__(self, files, fault=None):
        self.files = files
        self.fault = fault
        self.seen = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        name = self.path.rsplit("/", 1)[-1]
        if name not in server.files:
            self.send_error(404)
            return
        content = server.files[name]
        if server.fault == "truncated":
            content = content[: len(content) // 2]
        if server.fault == "corrupted":
            content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.fault == "interrupted":
            content = content[: len(content) // 2]
        server.seen.append(name)
        self.wfile.write(content)


@pytest.fixture
def serve(monkeypatch):
    """serve(files, fault) starts a `Server` and makes it the address of all downloads."""
    servers = []

    def start(files, fault=None):
        server = Server(files, fault)
        servers.append(server)
        monkeypatch.setenv("GLUE_URL", f"http://127.0.0.1:{server.server_port}")
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def tree(folder):
    """{path: size} of all that lies below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.stat().st_size
    return found


def rows_of(prepared):
    """{split: number of rows} of what `data.prepare` returned."""
    return {split: rows for split, (_, rows) in prepared.items()}


# --------------------------------------------------------------------------------------------------
# from an address to TSV files


def check_download(task, files, serve, folder):
    """Check what happens to the first source of a task in each way in which it may arrive.

    `files` are the sources: {name: bytes}. At the end the task is prepared in `folder`.
    """
    name = task.sources[0][0].rsplit("/", 1)[-1]
    half = len(files[name]) // 2
    for fault in ("truncated", "interrupted"):
        serve(files, fault)
        message = f"{name}.*(not the official file: {half} bytes|IncompleteRead).*run again"
        with pytest.raises(UserError, match=message):
            data.prepare(task, folder)
    serve(files, "corrupted")
    with pytest.raises(UserError, match=f"sha256 [0-9a-f]+, expected {task.sources[0][1]}"):
        data.prepare(task, folder)
    assert tree(folder) == {}, "a wrong file is not kept"

    server = serve(files)
    found = data.prepare(task, folder)
    assert rows_of(found) == task.rows
    assert not [path for path in tree(folder) if path.endswith(".tmp")]
    server.seen.clear()
    data.prepare(task, folder)
    assert not server.seen, "what is prepared is not fetched again"


def test_download_whole_truncated_corrupted_interrupted(serve, tmp_path):
    """A download that is truncated, interrupted or corrupted is refused and not kept."""
    task, content = toy(TRAIN)
    check_download(task, {"Toy.zip": content}, serve, tmp_path / "data")
    assert (tmp_path / "data/Toy/train.tsv").read_text() == TRAIN


def test_no_server(tmp_path):
    """Without a network the error says which file to put where, and that there may be a mirror."""
    message = "http://127.0.0.1:9/glue/data/CoLA.zip: .*put CoLA.zip into.*GLUE_URL"
    with pytest.raises(UserError, match=message):
        data.prepare(get_task("cola"), tmp_path / "new")


@pytest.mark.parametrize("member", ["../../x", "/tmp/x", "Toy/../../x", "..\\x", "C:\\x"])
def test_zip_member_outside_of_the_folder(member, serve, tmp_path):
    """A member of a zip that points out of the folder is not unzipped; only the TSVs are."""
    task, content = toy(TRAIN, members={member: "x"})
    serve({"Toy.zip": content})
    data.prepare(task, tmp_path / "a" / "b")
    files = {f"a/b/Toy/{split}.tsv" for split in ("train", "dev", "test")}
    assert set(tree(tmp_path)) == {"a", "a/b", "a/b/Toy.zip", "a/b/Toy"} | files


def test_zip_without_a_file_and_not_a_zip(tmp_path):
    """A zip that lacks a file, or that is no zip, is refused.

    A file that the user put there is never removed, even if it is the wrong one.
    """
    task, content = toy(TRAIN)
    task = replace(task, files=task.files | {"dev_mm": "Toy/other.tsv"})
    archive = tmp_path / "Toy.zip"
    archive.write_bytes(content)
    with pytest.raises(UserError, match="Toy.zip: not a usable zip.*Toy/other.tsv"):
        data.prepare(task, tmp_path)
    wrong = b"not a zip"
    archive.write_bytes(wrong)
    with pytest.raises(UserError, match="Toy.zip: not a usable zip"):
        fetch.unpack(archive, tmp_path, [])
    message = "Toy.zip: not the official file: 9 bytes, sha256 .* expected .*remove it"
    with pytest.raises(UserError, match=message):
        data.prepare(task, tmp_path)
    assert archive.read_bytes() == wrong


@pytest.mark.parametrize("change", [1, -1])
def test_changed_row_count(change, tmp_path):
    """A file with a row more or less than the official one is refused."""
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    task = replace(task, rows=task.rows | {"dev": 1 + change})
    with pytest.raises(UserError, match=rf"dev.tsv: 1 rows, expected {1 + change}:"):
        data.prepare(task, tmp_path)


def test_a_read_only_folder_stays_as_it_is(tokenizer, tmp_path):
    """Nothing is written to a read-only folder; what is made from its files goes to the cache.

    When the zip there is replaced by another of the same name, the other one is read.
    """
    task, content = toy(TRAIN)
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "Toy.zip").write_bytes(content)
    folder.chmod(0o555)
    before = tree(folder)
    first = load_dataset(task, "train", tokenizer, 32, folder)
    again = load_dataset(task, "train", tokenizer, 32, folder)
    assert tree(folder) == before
    assert len(first) == 1000
    assert len(again) == 1000

    other_task, content = toy(TRAIN.replace("cat", "dog"))
    folder.chmod(0o755)
    (folder / "Toy.zip").write_bytes(content)
    folder.chmod(0o555)
    other = load_dataset(other_task, "train", tokenizer, 32, folder)
    assert not np.array_equal(other.ids, first.ids)
    folder.chmod(0o755)


def test_an_existing_file_is_never_written_over(tmp_path):
    """A TSV that is there stays as it is when the other files are unzipped."""
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    mine = tmp_path / "Toy" / "dev.tsv"
    mine.parent.mkdir()
    mine.write_text("label\ttext\n0\tmine\n")
    data.prepare(task, tmp_path)
    assert "mine" in mine.read_text()


def test_atomic_write(tmp_path, monkeypatch):
    """A write that fails half-way leaves the old file as it was, and no other file."""

    class Failed(Exception):
        pass

    def fail(file):
        raise Failed

    path = tmp_path / "new" / "file"
    files.atomic_write(path, b"older")
    files.atomic_write(path, "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Failed):
        files.atomic_write(path, "half")
    assert path.read_text() == "old"
    assert list(tree(path.parent)) == ["file"]


def test_two_writers_of_one_file(tmp_path, monkeypatch):
    """The file is whole when a second writer comes in between.

    The two writers have the same process id, as processes on two machines may have.
    """
    path = tmp_path / "file"
    flush = os.fsync

    def second_writer(file):
        monkeypatch.setattr(os, "fsync", flush)
        files.atomic_write(path, "second")
        assert path.read_text() == "second"
        flush(file)

    monkeypatch.setattr(os, "fsync", second_writer)
    files.atomic_write(path, "first")
    assert path.read_text() == "first"
    assert list(tree(tmp_path)) == ["file"]


# --------------------------------------------------------------------------------------------------
# from a TSV file to texts and labels


def read(content, split="train", **changes):
    """The texts and labels of a file with this content, of the toy task with `changes`."""
    task = replace(toy(TRAIN)[0], rows={}, **changes)
    if isinstance(content, str):
        content = content.encode()
    return data.read_split(task, split, "FILE", content)


def test_text_is_read_as_it_stands():
    """Only tabs and newlines separate; quotes and all other characters are part of the text."""
    expected = [
        '"un"balanced "quote',
        '"',
        "line\u2028sep\x85\x0b\x0c\x1c para\u2029",
        "stray\rreturn",
        " ",
        "",
        "end",
    ]
    lines = [f"{i % 2}\t{text}" for i, text in enumerate(expected)]
    texts, labels = read("\ufefflabel\ttext\n" + "\n".join(lines))
    assert texts == expected
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert labels.dtype == np.int64
    assert read("label\ttext\r\n1\tcat\r\n")[0] == ["cat"]
    assert read("index\ttext\n0\tcat\n", "test")[1] is None


def test_cola_has_no_header_except_in_test():
    """The first line of CoLA's labelled files is an example, that of its test file a header."""
    cola = replace(get_task("cola"), rows={})
    content = b"gj04\t1\t\tThe cat.\ngj04\t0\t*\tCat the.\n"
    texts, labels = data.read_split(cola, "train", "", content)
    assert texts == ["The cat.", "Cat the."]
    assert labels.tolist() == [1, 0]
    content = b"index\tsentence\n0\tThe cat.\n"
    assert data.read_split(cola, "test", "", content)[0] == ["The cat."]


def test_qqp_drops_broken_rows_others_refuse_them():
    """A row that lacks columns is dropped in QQP, as in the official scripts, else refused."""
    qqp = replace(get_task("qqp"), rows={"train": 1})
    header = b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    content = header + b"1\t2\t3\ta\tb\t1\n4\t5\t6\ta\n"
    assert data.read_split(qqp, "train", "", content)[0] == [("a", "b")]
    strict = replace(qqp, drop_broken=False)
    with pytest.raises(UserError, match='^F:3: 4 columns, expected 6: "question2" is missing$'):
        data.read_split(strict, "train", "F", content)


REGRESSION = {"labels": (), "kind": "score"}


@pytest.mark.parametrize(
    "content, changes, message",
    [
        ("label\ttext\n1\tcat\n1\n", {}, 'FILE:3: 1 columns, expected 2: "text" is missing'),
        ("label\ttext\n1\tcat\tdog\n", {}, r"FILE:2: 3 columns, expected 2: a tab inside a text\?"),
        (
            "label\tsentence\n1\tcat\n",
            {},
            'FILE:1: no column "text"; the header line has "label, sentence"',
        ),
        ("label\ttext\n1\tcat\n2\tdog\n", {}, 'FILE:3: unknown label "2", expected 0 or 1'),
        ("label\ttext\n1\tcat\n\tdog\n", {}, 'FILE:3: unknown label "", expected 0 or 1'),
        (
            "label\ttext\n5.1\tcat\n",
            REGRESSION,
            'FILE:2: unknown label "5.1", expected a number from 0.0 to 5.0',
        ),
        (  # the name of a column in files of predictions, which may hold any number
            "prediction\ttext\n5.1\tcat\n",
            REGRESSION | {"label": "prediction"},
            'FILE:2: unknown prediction "5.1", expected a number from 0.0 to 5.0',
        ),
        ("label\ttext\nnan\tcat\n", REGRESSION, 'FILE:2: unknown label "nan"'),
        ("label\ttext\nx\tcat\n", REGRESSION, 'FILE:2: unknown label "x"'),
        ("label\ttext\n", {}, "FILE: no row of data"),
        (b"label\ttext\n1\tcat\n1\tcaf\xe9\n", {}, "FILE:3: byte 0xe9 is not UTF-8"),
    ],
)
def test_mistakes_in_a_file(content, changes, message):
    """A mistake in a file is refused by one line that names the file, its line and the mistake."""
    with pytest.raises(UserError, match=message) as caught:
        read(content, **changes)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# tokens


def tokenizer_json(vocab, **normalizer):
    """A tokenizer.json as Hugging Face writes it for BERT, with padding and truncation left on."""
    special = []
    for i, token in enumerate(vocab):
        if token.startswith("[") and token.endswith("]"):
            about = {"id": i, "content": token, "single_word": False, "lstrip": False}
            about |= {"rstrip": False, "normalized": False, "special": True}
            special.append(about)
    settings = {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
            **normalizer,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", vocab.index("[SEP]")],
            "cls": ["[CLS]", vocab.index("[CLS]")],
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(vocab)},
        },
    }
    return json.dumps(settings)


def assert_same_tokens(a, b, texts):
    """Assert that two tokenizers give the same ids for these texts, alone and in pairs."""
    pairs = list(zip(texts, reversed(texts), strict=True))
    texts = texts + pairs
    for x, y in zip(a.encode_batch(texts), b.encode_batch(texts), strict=True):
        assert x.ids == y.ids
        assert x.type_ids == y.type_ids


@pytest.mark.parametrize(
    "lower, accents, chinese",
    [(True, None, True), (False, None, True), (False, True, False), (True, False, True)],
)
def test_vocab_txt_and_tokenizer_json_agree(lower, accents, chinese, tmp_path):
    """vocab.txt and tokenizer.json give the same tokens, without padding and truncation."""
    (tmp_path / "json").mkdir()
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab/vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    config = {
        "do_lower_case": lower,
        "strip_accents": accents,
        "tokenize_chinese_chars": chinese,
    }
    (tmp_path / "vocab/tokenizer_config.json").write_text(json.dumps(config))
    normalizer = {
        "lowercase": lower,
        "strip_accents": accents,
        "handle_chinese_chars": chinese,
    }
    (tmp_path / "json/tokenizer.json").write_text(tokenizer_json(VOCAB, **normalizer))
    (tmp_path / "json/tokenizer_config.json").write_text(json.dumps(config))
    from_vocab = load_tokenizer(tmp_path / "vocab", len(VOCAB))
    from_json = load_tokenizer(tmp_path / "json", len(VOCAB))
    assert from_json.padding is None
    assert from_json.truncation is None
    assert_same_tokens(from_vocab, from_json, TRICKY)


def test_mistakes_about_tokenizers(tokenizer, tmp_path):
    """A tokenizer that is missing, damaged or larger than the embedding is refused."""
    with pytest.raises(UserError, match="none of tokenizer.json, vocab.txt, vocab.json"):
        load_tokenizer(tmp_path, 100)
    folder = tmp_path / "bert"
    rows = len(VOCAB) - 1
    message = f"vocab.txt: ids up to {rows}, but the embedding has {rows} rows"
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder, rows)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(folder, 100)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[CLS]\n[UNK]\n[PAD]\n[MASK]\ncat\n")
    with pytest.raises(UserError, match=r"vocab.txt: no \[SEP\]"):
        load_tokenizer(folder, 100)


def test_label_words(tokenizer):
    """A label word must be one known token of its own; else the error says what it is."""
    ids = word_ids(tokenizer, ("no", "yes", "Maybe"))
    assert ids == [VOCAB.index(word) for word in ("no", "yes", "maybe")]
    wrong = [
        (("no", "cated"), "cat|UNK"),
        (("yes no",), "'yes', 'no'"),
        (("zebra",), "UNK"),
        (("",), r"\[\]"),
        (("yes", "YES"), "yes"),
    ]
    for words, shown in wrong:
        message = f'label word "{words[-1]}": expected one token.*it is .*({shown})'
        with pytest.raises(UserError, match=message):
            word_ids(tokenizer, words)


def test_pairs_and_truncation(tokenizer):
    """A pair is [CLS] a [SEP] b [SEP]; if it is too long, the longer text is cut first.

    `second` is where the second text begins, or the end where there is none. The tokenizer that
    was given stays as it was.
    """
    rng = np.random.default_rng(0)
    counts = [rng.integers(1, 30, 2).tolist() for _ in range(200)]  # words of a and b
    texts = [(" ".join(["cat"] * a), " ".join(["cat"] * b)) for a, b in counts]
    ids, lengths, second, cut = encode(texts, tokenizer, 24).values()
    starts = np.append(0, lengths.cumsum())
    cls, sep, cat = (VOCAB.index(token) for token in ("[CLS]", "[SEP]", "cat"))
    for i, (a, b) in enumerate(counts):
        row = ids[starts[i] : starts[i + 1]].tolist()
        first = int(second[i]) - 2  # words left of a
        rest = len(row) - first - 3  # words left of b
        assert row == [cls] + [cat] * first + [sep] + [cat] * rest + [sep]
        assert len(row) == min(24, a + b + 3)
        whole = (first, rest) == (a, b)
        both_cut = abs(first - rest) <= 1
        b_cut = first == a and a < rest
        a_cut = rest == b and b < first
        assert whole or both_cut or b_cut or a_cut
    assert tokenizer.truncation is None
    ids, lengths, second, cut = encode(["cat " * 50, "", "dog"], tokenizer, 8).values()
    assert cut.tolist() == [True, False, False]
    assert lengths.tolist() == [8, 2, 3]
    assert np.array_equal(second, lengths)
    assert ids.dtype == np.int32
    assert second.dtype == np.int32
    assert lengths.dtype == np.int64


def test_cache(tokenizer, tmp_path, monkeypatch):
    """A split is tokenised once, and again whenever something changes that decides its ids.

    A damaged cache file is made again.
    """
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    first = load_dataset(task, "train", tokenizer, 32, tmp_path)
    encode = classify.encode
    calls = []

    def counted(*args):
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(classify, "encode", counted)

    def same(count, task=task, max_length=32, tokenizer=tokenizer):
        """Load the split, after which there were `count` calls; is it the first one?"""
        dataset = load_dataset(task, "train", tokenizer, max_length, tmp_path)
        assert len(calls) == count
        for name in ("ids", "lengths", "second", "labels"):
            ours = getattr(dataset, name)
            theirs = getattr(first, name)
            if not np.array_equal(ours, theirs) or ours.dtype != theirs.dtype:
                return False
        return True

    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    assert same(0)
    assert not same(1, max_length=8)
    other_labels = replace(task, labels=("good", "bad"), spelling=("1", "0"))
    assert not same(2, task=other_labels)
    swapped = tokenizer.to_str().replace('"dog":', '"tac":').replace('"cat":', '"dog":')
    assert not same(3, tokenizer=Tokenizer.from_str(swapped))
    partial = data.safetensors.numpy.save({"ids": first.ids})
    for count, damaged in ((4, whole[:-10]), (5, b""), (6, b"\xff" * 100), (7, partial)):
        cached.write_bytes(damaged)
        assert same(count)
        assert cached.read_bytes() == whole
    tsv = tmp_path / "Toy" / "train.tsv"
    tsv.write_text(tsv.read_text().replace("cat", "dog", 1))
    assert not same(8)


# --------------------------------------------------------------------------------------------------
# batches


def test_an_epoch_is_every_example_once():
    """The batches of an epoch hold every example once; all but one of them are full."""
    rng = np.random.default_rng(1)
    for n, size in [(1, 1), (1, 32), (7, 3), (96, 32), (1000, 16), (8551, 32)]:
        lengths = rng.integers(3, 60, n)
        cut = batches(lengths, size, seed=0, epoch=0)
        assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(n))
        expected = [size] * (n // size)
        if n % size:
            expected.append(n % size)
        assert sorted(len(batch) for batch in cut) == sorted(expected)


def test_token_budget():
    """With a budget of tokens a batch stays within it, unless it is one long example.

    The batches hold every example once, use most of the budget and have little padding. Each epoch
    has the same number of them.
    """
    lengths = np.random.default_rng(0).integers(3, 120, size=1000)
    budget = 512
    shapes = set()
    for epoch in range(3):
        cut = batches(lengths, 1, 0, epoch, budget)
        assert sorted(np.concatenate(cut).tolist()) == list(range(1000))
        tokens = []
        for batch in cut:
            width = -(-int(lengths[batch].max()) // 8) * 8  # rounded up to a multiple of 8
            tokens.append(len(batch) * width)
        assert max(tokens) <= budget
        assert np.mean(tokens) > 0.9 * budget
        assert lengths.sum() > 0.85 * sum(tokens)
        shapes.add((len(cut), max(len(batch) for batch in cut)))
    assert len(shapes) == 1
    assert [len(batch) for batch in batches(np.array([900, 4]), 1, 0, 0, budget)] == [1, 1]


def test_batches_are_a_pure_function_of_seed_and_epoch():
    """The order depends on seed and epoch and on no global random state.

    No batch comes back in the next epoch.
    """
    lengths = np.random.default_rng(1).integers(3, 60, 1000)

    def order(seed, epoch):
        return tuple(np.concatenate(batches(lengths, 16, seed, epoch)).tolist())

    expected = order(3, 5)
    np.random.seed(0)
    torch.manual_seed(0)
    assert order(3, 5) == expected
    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    first = {frozenset(batch.tolist()) for batch in batches(lengths, 16, 0, 0)}
    second = {frozenset(batch.tolist()) for batch in batches(lengths, 16, 0, 1)}
    assert not first & second


def test_grouping_by_length_saves_padding():
    """Batches of similar lengths need less than 10% padding, random ones more than 100%.

    Short and long batches alternate over an epoch.
    """
    lengths = np.random.default_rng(1).gamma(2, 15, 5000).astype(int) + 3

    def waste(cut):
        """The padding of these batches as a share of their tokens."""
        padded = sum(len(batch) * lengths[batch].max() for batch in cut)
        return padded / lengths.sum() - 1

    grouped = batches(lengths, 32, 0, 0)
    shuffled = np.array_split(np.random.default_rng(0).permutation(5000), len(grouped))
    assert waste(grouped) < 0.1
    assert waste(shuffled) > 1.0
    means = [lengths[batch].mean() for batch in grouped]
    first, last = np.mean(means[:78]), np.mean(means[78:])  # the two halves of the epoch
    assert abs(first - last) < 0.35 * lengths.mean()


def test_collate():
    """A batch holds its examples in order, padded to a multiple of 8 or to the maximal length."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(3, 37, 50)
    starts = np.append(0, lengths.cumsum())
    second = np.array([rng.integers(2, n + 1) for n in lengths], np.int32)
    ids = rng.integers(1, 99, starts[-1]).astype(np.int32)
    labels = rng.integers(0, 2, 50)
    dataset = Dataset(kind_of(toy(TRAIN)[0]), ids, lengths, second, labels, 36)
    whole = np.flatnonzero(lengths == 16)  # no padding
    for indices in ([4, 2, 2, 9], list(range(50)), [int(lengths.argmin())], [49], whole):
        batch = dataset.collate(np.array(indices), pad_id=7)
        width = batch["input_ids"].shape[1]
        assert width == min(-(-lengths[indices].max() // 8) * 8, 36)
        for row, i in enumerate(indices):
            n = lengths[i]
            padding = width - n
            tokens = ids[starts[i] : starts[i + 1]].tolist()
            types = [0] * second[i] + [1] * (n - second[i])
            assert batch["input_ids"][row].tolist() == tokens + [7] * padding
            assert batch["token_type_ids"][row].tolist() == types + [0] * padding
            assert batch["attention_mask"][row].tolist() == [True] * n + [False] * padding
        assert batch["labels"].tolist() == labels[indices].tolist()
        for name in ("input_ids", "token_type_ids", "labels"):
            assert batch[name].dtype == torch.int64
        assert batch["attention_mask"].dtype == torch.bool
    cut = dataset.by_tokens(100)  # what is predicted at once, the longest first
    assert lengths[np.concatenate(cut)].tolist() == sorted(lengths, reverse=True)
    padded = [batch["input_ids"].numel() for batch in map(dataset.collate, cut)]
    assert len(cut) > 10 and max(padded) <= 100
    dataset.labels = None
    assert "labels" not in dataset.collate(np.arange(3))
    dataset.labels = np.zeros(50, np.float32)
    assert dataset.collate(np.arange(3))["labels"].dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# tasks and the command


def test_the_table():
    """Each task's row is consistent, and a task or split that does not exist is refused."""
    for name, task in data.TASKS.items():
        if name == "demo":
            continue
        assert task.name == name
        assert task.kind == "generate" or task.files.keys() == task.rows.keys()
        assert task.kind == "generate" or len(task.words) == (len(task.labels) or 2)
        if task.kind == "classify":
            assert len(task.spelling) == len(task.labels)
        assert (task.kind == "score") == (name == "stsb")
        for _, sha256 in task.sources:
            assert len(sha256) == 64
    assert get_task("mnli").eval_splits == ["dev", "dev_mm"]
    assert get_task("rte").eval_splits == ["dev"]
    message = 'unknown task "nope": expected demo, cola, .*--task-file'
    with pytest.raises(UserError, match=message):
        get_task("nope")
    with pytest.raises(UserError, match='ax has no "train" split but test'):
        fetch.locate(get_task("ax"), "train", ".")


OWN = {
    "name": "mine",
    "train": "train.tsv",
    "dev": "dev.tsv",
    "columns": ["text"],
    "label": "label",
    "labels": ["bad", "good"],
    "words": ["no", "yes"],
    "metric": "accuracy",
}


def without(key):
    """The task file OWN without one of its keys."""
    return {name: value for name, value in OWN.items() if name != key}


def test_task_file(tokenizer, tmp_path):
    """A task file describes a task of one's own, of classes or of a regression."""
    own = tmp_path / "own"
    own.mkdir()
    path = own / "task.json"
    path.write_text(json.dumps(OWN))
    (own / "train.tsv").write_text("label\ttext\ngood\tcat\nbad\tdog\n")
    task = get_task(None, path)
    assert task.name == "mine"
    assert task.labels == ("bad", "good")
    assert task.words == ("no", "yes")
    assert task.metrics == ("accuracy",)
    dataset = load_dataset(task, "train", tokenizer, 16, tmp_path / "data")
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.lengths.tolist() == [3, 3]
    with pytest.raises(UserError, match="own/dev.tsv: no such file.*the dev split of task mine"):
        load_dataset(task, "dev", tokenizer, 16, tmp_path / "data")
    with pytest.raises(UserError, match="--max-length 4: expected at least 8"):
        load_dataset(task, "dev", tokenizer, 4, tmp_path / "data")

    regression = without("labels") | {"range": [-1, 1], "metric": ["spearman"]}
    path.write_text(json.dumps(regression))
    task = get_task(None, path)
    assert task.kind == "score"
    assert task.options == {"range": (-1.0, 1.0)}
    assert task.eval_splits == ["dev"]


THREE = {"labels": ["a", "b", "c"], "words": ["a", "b", "c"]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lables": []}, 'unknown key "lables"; the keys are name'),
        ({"dev": None}, '"dev": '),
        ({"train": 3}, '"train": expected a string, not empty'),
        ({"range": [0, 1]}, 'unknown key "labels"; the keys are .*range'),
        ({"words": ["no"]}, '"words": expected 2 different'),
        ({"labels": ["a", "a"]}, '"labels": '),
        ({"columns": []}, '"columns": expected 1 to 2'),
        ({"metric": "bleu"}, '"metric": expected some of accuracy, f1, macro_f1, matthews'),
        ({"metric": "f1", **THREE}, '"metric": expected accuracy or macro_f1'),
        ({"name": "a/b"}, '"name": expected letters'),
    ],
)
def test_mistakes_in_a_task_file(change, message, tmp_path):
    """A wrong value in a task file is refused by an error that names its key."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps(OWN | change))
    with pytest.raises(UserError, match=f"task.json: .*{message}"):
        get_task(None, path)


def test_incomplete_and_broken_task_files(tmp_path):
    """A task file that lacks a key, is no JSON object or does not exist is refused."""
    path = tmp_path / "task.json"
    for key in OWN.keys() - {"words"}:
        path.write_text(json.dumps(without(key)))
        with pytest.raises(UserError, match=f'task.json: "{key}"'):
            get_task(None, path)
    for text in ("{", "[1, 2]", "3", '"x"'):
        path.write_text(text)
        with pytest.raises(UserError, match="task.json: not a readable JSON object"):
            get_task(None, path)
    with pytest.raises(UserError, match="none.json: not a readable JSON object"):
        get_task(None, tmp_path / "none.json")


def test_command(tmp_path, monkeypatch, capsys):
    """`python data.py` prints the rows of each split; a mistake is one line and status 2."""
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    monkeypatch.setitem(data.TASKS, "toy", task)
    assert not data.main(["--task", "toy", "--data-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["toy", "train", "1,000", "rows"],
        ["toy", "dev", "1", "rows"],
        ["toy", "test", "1", "rows"],
    ]
    for arguments in (["--task", "nope"], [], ["--task", "rte", "--data-dir", str(tmp_path)]):
        assert data.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in error


def test_the_demo(tmp_path):
    """The demo is a task like any other, and each of its splits has rows."""
    demo = Path(data.__file__).parent / "demo"
    if not (demo / "task.json").exists():
        pytest.skip("no demo folder beside data.py")
    task = get_task("demo")
    assert task.name == "demo"
    rows = rows_of(data.prepare(task, tmp_path))
    assert all(count > 0 for count in rows.values())


# --------------------------------------------------------------------------------------------------
# with real files

OFFICIAL = [name for name in data.TASKS if name != "demo"]


def real_files(task):
    """The sources of a task from GLUE_DIR: {name: bytes}. If one is missing the test is skipped."""
    files = {}
    for address, _ in task.sources:
        name = address.rsplit("/", 1)[-1]
        path = Path(GLUE_DIR) / name
        if not path.is_file():
            pytest.skip(f"no {name} in GLUE_DIR")
        files[name] = path.read_bytes()
    return files


@pytest.mark.real
@real_glue
@pytest.mark.parametrize("name", OFFICIAL)
def test_real_downloads(name, serve, tmp_path):
    """The official files of a task are downloaded, checked and counted as the toy ones are."""
    task = get_task(name)
    files = real_files(task)
    check_download(task, files, serve, tmp_path / "data")
    with pytest.raises(UserError, match="rows, expected 9:"):
        data.prepare(replace(task, rows=task.rows | {"test": 9}), tmp_path / "data")


@pytest.mark.real
@real_glue
@pytest.mark.parametrize("name", OFFICIAL)
def test_real_folder_offline(name, tokenizer, tmp_path):
    """Without a network the official zips and the TSVs made from them give the same data.

    The counts of rows are the official ones, and every class occurs. MRPC's dev is not in train.
    """
    task = get_task(name)
    zips = tmp_path / "zips"
    plain = tmp_path / "plain"  # a folder with the TSVs only
    zips.mkdir()
    for file, content in real_files(task).items():
        (zips / file).write_bytes(content)
    assert rows_of(data.prepare(task, zips)) == task.rows
    if name == "ax":
        shutil.copytree(zips, plain)
    else:
        shutil.copytree(zips / task.folder, plain / task.folder)
    for split in task.files:
        a = load_dataset(task, split, tokenizer, 64, zips)
        b = load_dataset(task, split, tokenizer, 64, plain)
        assert np.array_equal(a.ids, b.ids)
        assert len(a) == task.rows[split]
        if split.startswith("test"):
            assert a.labels is None
        elif task.kind == "score":
            assert a.labels.min() >= 0
            assert a.labels.max() <= 5
            assert a.labels.min() < a.labels.max()
        else:
            assert set(a.labels.tolist()) == set(range(len(task.labels)))
    if name == "mrpc":
        pairs = {}
        for split, file in task.files.items():
            lines = (plain / file).read_text(encoding="utf-8-sig").split("\n")[1:-1]
            pairs[split] = {tuple(line.split("\t")[1:3]) for line in lines}
        assert not pairs["train"] & pairs["dev"]
        assert len(pairs["train"]) == 3668
        assert len(pairs["dev"]) == 408
        assert len(pairs["test"]) == 1725


@pytest.mark.real
@real_bert
def test_real_vocab_txt_and_tokenizer_json_agree(tmp_path):
    """The two files of a real BERT's tokenizer give the same tokens, for CoLA's sentences too.

    The label words of every task are one token each.
    """
    from_json = load_tokenizer(BERT_DIR, 30522)
    folder = Path(BERT_DIR)
    if not (folder / "vocab.txt").is_file() or not (folder / "tokenizer.json").is_file():
        pytest.skip("BERT_DIR has only one of vocab.txt and tokenizer.json")
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    from_vocab = load_tokenizer(tmp_path, 30522)
    texts = TRICKY
    if GLUE_DIR and (Path(GLUE_DIR) / "CoLA.zip").is_file():
        with zipfile.ZipFile(Path(GLUE_DIR) / "CoLA.zip") as zipped:
            texts = TRICKY + zipped.read("CoLA/dev.tsv").decode().split("\n")
    assert_same_tokens(from_vocab, from_json, texts)
    for name in OFFICIAL:
        words = get_task(name).words
        assert len(word_ids(from_json, words)) == len(words)
