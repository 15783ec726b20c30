"""
What data.py promises: files that are whole, text as it stands in them, every example once, mistakes named in one line.

    python -m pytest tests/test_data.py                    # made-up files and a server on 127.0.0.1, no network
    GLUE_DIR=... BERT_DIR=... python -m pytest tests/test_data.py     # also on a real GLUE folder and a real BERT
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
from data import Dataset, Task, UserError, batches, collate, get_task, load_dataset, load_tokenizer, word_ids

GLUE_DIR, BERT_DIR = os.environ.get("GLUE_DIR"), os.environ.get("BERT_DIR")
real_glue = pytest.mark.skipif(not GLUE_DIR, reason="set GLUE_DIR to a folder of official GLUE files")
real_bert = pytest.mark.skipif(not BERT_DIR, reason="set BERT_DIR to a BERT in Hugging Face's layout")

VOCAB = """[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e ##a ##b ##c ##d ##e the cat dog sat ran yes no maybe , . ' " ! ?
           - ( ) naive ##ing un ##able 中 文 cafe café The straße ß ##ß 1 ##2 ##3 caf ##é É""".split()
TRICKY = ["The cat sat.", "naïve café, CAFÉ!", "中文cat文", "unable runing dog", "a\u2028b\u00a0c\u3000d",
          "[CLS] the [SEP] cat [MASK]", "[cls] the", 'the "cat" (dog)\'s', "", "   ", "x" * 101, "e" * 100,
          "straße ß É 123", "a\x00b\ufffdc\u200bd",
          "e\u0301 a\u0300b", "cat\tdog\rsat", "--the!?", "\U0001f600 cat", "ＡＢＣ", "İ I ı"]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test reaches the network or the user's cache."""
    monkeypatch.setenv("GLUE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("NANOPRUNE_CACHE", str(tmp_path / "spare"))


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return load_tokenizer(tmp_path / "bert", len(VOCAB))


def toy(train, dev="label\ttext\n1\tthe dog\n", test="index\ttext\n0\tthe cat\n", members=(), **changes):
    """An official task like SST-2 and the bytes of its zip, made from the texts of its files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, text in {"Toy/train.tsv": train, "Toy/dev.tsv": dev, "Toy/test.tsv": test, **dict(members)}.items():
            zipped.writestr(name, text)
    content = buffer.getvalue()
    source = ("glue/data/Toy.zip", len(content), hashlib.sha256(content).hexdigest())
    rows = {"train": train.count("\n") - 1, "dev": dev.count("\n") - 1, "test": test.count("\n") - 1}
    task = Task("toy", "Toy", ("bad", "good"), ("0", "1"), ("no", "yes"), ("accuracy",), ("text",), "label",
                data.tsvs("Toy"), rows, (source,))
    return replace(task, **changes), content


NOISE = np.random.default_rng(0).integers(97, 102, 100_000).astype(np.uint8).tobytes().decode()  # letters a to e
TRAIN = "label\ttext\n" + "".join(f"{i % 2}\tcat {NOISE[i * 100 : i * 100 + 50]}\n" for i in range(1000))


class Server(ThreadingHTTPServer):
    """Serves `files` by the last part of their address; `fault` says how it fails; `seen` keeps (range, bytes sent)."""

    def __init__(self, files, fault=None):
        self.files, self.fault, self.seen = files, fault, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        if name not in server.files:
            return self.send_error(404)
        content, asked = server.files[name], self.headers.get("Range")
        if server.fault == "truncated":
            content = content[: len(content) // 2]
        if server.fault == "corrupted":
            content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.fault != "no range" else 0
        if start >= len(content):
            return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: len(body) // 2] if server.fault == "interrupted" else body
        server.seen.append((asked, len(body)))
        self.wfile.write(body)


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(files, fault=None):
        servers.append(Server(files, fault))
        monkeypatch.setenv("GLUE_URL", f"http://127.0.0.1:{servers[-1].server_port}")
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def tree(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


# From an address to TSV files


def check_download(task, files, serve, folder):
    """Every way in which the source `files` may or may not arrive; leaves `task` prepared in `folder`."""
    name = task.sources[0][0].rsplit("/", 1)[-1]
    part = folder / f"{name}.part"
    serve(files, "truncated")
    with pytest.raises(UserError, match=f"{name}.*not the official file: {len(files[name]) // 2} bytes.*run again"):
        data.prepare(task, folder)
    serve(files, "corrupted")
    with pytest.raises(UserError, match=f"sha256 [0-9a-f]+, expected {task.sources[0][2]}"):
        data.prepare(task, folder)
    assert tree(folder) == {}, "a wrong file is not kept"

    half = len(files[name]) // 2
    serve(files, "interrupted")
    with pytest.raises(UserError, match=f"ended after {half} of {len(files[name])} bytes; run again to resume"):
        data.prepare(task, folder)
    assert part.read_bytes() == files[name][:half]
    server = serve(files)
    found = data.prepare(task, folder)
    assert server.seen[0] == (f"bytes={half}-", len(files[name]) - half), "the rest only"
    assert {split: rows for split, (_, rows) in found.items()} == task.rows
    assert not [path for path in tree(folder) if path.endswith((".part", ".tmp"))]
    server.seen.clear()
    data.prepare(task, folder)
    assert not server.seen, "prepared once, nothing is fetched again"


def test_download_whole_truncated_corrupted_interrupted_resumed(serve, tmp_path):
    task, content = toy(TRAIN)
    check_download(task, {"Toy.zip": content}, serve, tmp_path / "data")
    assert (tmp_path / "data/Toy/train.tsv").read_text() == TRAIN


def test_resume_from_a_server_without_ranges_and_from_another_file(serve, tmp_path):
    task, content = toy(TRAIN)
    part = tmp_path / "Toy.zip.part"
    part.write_bytes(content[:1000])
    server = serve({"Toy.zip": content}, "no range")
    data.prepare(task, tmp_path)
    assert server.seen == [("bytes=1000-", len(content))]
    shutil.rmtree(tmp_path / "Toy")
    (tmp_path / "Toy.zip").unlink()
    serve({"Toy.zip": content})
    part.write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match="not the official file"):
        data.prepare(task, tmp_path)
    part.write_bytes(content + b"?")  # longer than the file: start over
    data.prepare(task, tmp_path)
    shutil.rmtree(tmp_path / "Toy")
    (tmp_path / "Toy.zip").unlink()
    serve({"Toy.zip": content[:500]})
    part.write_bytes(content[:1000])  # the server answers 416
    with pytest.raises(UserError, match="416"):
        data.prepare(task, tmp_path)
    assert not part.exists()


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="http://127.0.0.1:9/glue/data/CoLA.zip: .*put CoLA.zip into.*GLUE_URL"):
        data.prepare(get_task("cola"), tmp_path / "new")


@pytest.mark.parametrize("member", ["../../x", "/tmp/x", "Toy/../../x", "..\\x", "C:\\x"])
def test_zip_member_outside_of_the_folder(member, serve, tmp_path):
    task, content = toy(TRAIN, members={member: "x"})
    serve({"Toy.zip": content})
    with pytest.raises(UserError, match="would leave the folder; nothing was unzipped"):
        data.prepare(task, tmp_path / "a" / "b")
    assert set(tree(tmp_path)) == {"a", "a/b", "a/b/Toy.zip"}


def test_zip_without_a_file_and_not_a_zip(tmp_path):
    task, content = toy(TRAIN)
    task = replace(task, files=task.files | {"dev_mm": "Toy/other.tsv"})
    (tmp_path / "Toy.zip").write_bytes(content)
    with pytest.raises(UserError, match="Toy.zip: not a usable zip.*Toy/other.tsv"):
        data.prepare(task, tmp_path)
    wrong = b"not a zip"
    (tmp_path / "Toy.zip").write_bytes(wrong)
    with pytest.raises(UserError, match="Toy.zip: not a usable zip"):
        data.unpack(tmp_path / "Toy.zip", tmp_path, [])
    with pytest.raises(UserError, match="Toy.zip: not the official file: 9 bytes, sha256 .* expected .*remove it"):
        data.prepare(task, tmp_path)
    assert (tmp_path / "Toy.zip").read_bytes() == wrong, "somebody's file is never removed"


@pytest.mark.parametrize("change", [1, -1])
def test_changed_row_count(change, tmp_path):
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    task = replace(task, rows=task.rows | {"dev": 1 + change})
    with pytest.raises(UserError, match=rf"dev.tsv: 1 rows, expected {1 + change}:"):
        data.prepare(task, tmp_path)


def test_a_read_only_folder_stays_as_it_is(tokenizer, tmp_path):
    task, content = toy(TRAIN)
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "Toy.zip").write_bytes(content)
    folder.chmod(0o555)
    before = tree(folder)
    first = load_dataset(task, "train", tokenizer, 32, folder)
    again = load_dataset(task, "train", tokenizer, 32, folder)
    assert tree(folder) == before and len(first) == len(again) == 1000
    other, content = toy(TRAIN.replace("cat", "dog"))  # another source of the same name does not meet the first
    folder.chmod(0o755)
    (folder / "Toy.zip").write_bytes(content)
    folder.chmod(0o555)
    assert not np.array_equal(load_dataset(other, "train", tokenizer, 32, folder).ids, first.ids)
    folder.chmod(0o755)


def test_an_existing_file_is_never_written_over(tmp_path):
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    (tmp_path / "Toy").mkdir()
    (tmp_path / "Toy" / "dev.tsv").write_text("label\ttext\n0\tmine\n")
    data.prepare(task, tmp_path)
    assert "mine" in (tmp_path / "Toy" / "dev.tsv").read_text()


def test_atomic_write(tmp_path, monkeypatch):
    data.atomic_write(tmp_path / "new" / "file", b"older")
    data.atomic_write(tmp_path / "new" / "file", "old")
    monkeypatch.setattr(os, "fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.atomic_write(tmp_path / "new" / "file", "half")
    assert (tmp_path / "new" / "file").read_text() == "old" and len(tree(tmp_path / "new")) == 1


# From a TSV file to texts and labels


def read(content, split="train", **changes):
    task = replace(toy(TRAIN)[0], rows={}, **changes)
    return data.read_tsv(task, split, "FILE", content if isinstance(content, bytes) else content.encode())


def test_text_is_read_as_it_stands():
    expected = ['"un"balanced "quote', '"', "line\u2028sep\x85\x0b\x0c\x1c para\u2029", "stray\rreturn", " ", "", "end"]
    texts, labels = read("\ufefflabel\ttext\n" + "\n".join(f"{i % 2}\t{text}" for i, text in enumerate(expected)))
    assert texts == expected
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and labels.dtype == np.int64
    assert read("label\ttext\r\n1\tcat\r\n")[0] == ["cat"]
    assert read("index\ttext\n0\tcat\n", "test")[1] is None


def test_cola_has_no_header_except_in_test():
    cola = replace(get_task("cola"), rows={})
    texts, labels = data.read_tsv(cola, "train", "", b"gj04\t1\t\tThe cat.\ngj04\t0\t*\tCat the.\n")
    assert texts == ["The cat.", "Cat the."] and labels.tolist() == [1, 0]
    assert data.read_tsv(cola, "test", "", b"index\tsentence\n0\tThe cat.\n")[0] == ["The cat."]


def test_qqp_drops_broken_rows_others_refuse_them():
    qqp = replace(get_task("qqp"), rows={"train": 1})
    content = b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t1\n4\t5\t6\ta\n"
    assert data.read_tsv(qqp, "train", "", content)[0] == [("a", "b")]
    with pytest.raises(UserError, match='^F:3: 4 columns, expected 6: "question2" is missing$'):
        data.read_tsv(replace(qqp, drop_broken=False), "train", "F", content)


@pytest.mark.parametrize(
    "content, changes, message",
    [
        ("label\ttext\n1\tcat\n1\n", {}, 'FILE:3: 1 columns, expected 2: "text" is missing'),
        ("label\ttext\n1\tcat\tdog\n", {}, r"FILE:2: 3 columns, expected 2: a tab inside a text\?"),
        ("label\tsentence\n1\tcat\n", {}, 'FILE:1: no column "text"; the header line has label, sentence'),
        ("label\ttext\n1\tcat\n2\tdog\n", {}, 'FILE:3: unknown label "2", expected 0 or 1'),
        ("label\ttext\n1\tcat\n\tdog\n", {}, 'FILE:3: unknown label "", expected 0 or 1'),
        ("label\ttext\n5.1\tcat\n", {"labels": ()}, 'FILE:2: unknown label "5.1", expected a number from 0.0 to 5.0'),
        ("label\ttext\nnan\tcat\n", {"labels": ()}, 'FILE:2: unknown label "nan"'),
        ("label\ttext\nx\tcat\n", {"labels": ()}, 'FILE:2: unknown label "x"'),
        ("label\ttext\n", {}, "FILE: 0 rows, expected 1"),
        (b"label\ttext\n1\tcat\n1\tcaf\xe9\n", {}, "FILE:3: byte 0xe9 is not UTF-8"),
    ],
)
def test_mistakes_in_a_file(content, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read(content, **changes)
    assert "\n" not in str(caught.value)


# Tokens


def tokenizer_json(vocab, **normalizer):
    """A tokenizer.json as Hugging Face writes it for BERT, padding and truncation left on."""
    special = [(i, token) for i, token in enumerate(vocab) if token.startswith("[") and token.endswith("]")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in special],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True, **normalizer},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", vocab.index("[SEP]")],
                           "cls": ["[CLS]", vocab.index("[CLS]")]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(vocab)}},
    })  # fmt: skip


def assert_same_tokens(a, b, texts):
    texts = texts + list(zip(texts, reversed(texts), strict=True))
    for x, y in zip(a.encode_batch(texts), b.encode_batch(texts), strict=True):
        assert x.ids == y.ids and x.type_ids == y.type_ids


@pytest.mark.parametrize("lower, accents, chinese", [(True, None, True), (False, None, True), (False, True, False),
                                                     (True, False, True)])
def test_vocab_txt_and_tokenizer_json_agree(lower, accents, chinese, tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab/vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    config = {"do_lower_case": lower, "strip_accents": accents, "tokenize_chinese_chars": chinese}
    (tmp_path / "vocab/tokenizer_config.json").write_text(json.dumps(config))
    text = tokenizer_json(VOCAB, lowercase=lower, strip_accents=accents, handle_chinese_chars=chinese)
    (tmp_path / "json/tokenizer.json").write_text(text)
    from_vocab, from_json = (load_tokenizer(tmp_path / name, len(VOCAB)) for name in ("vocab", "json"))
    assert from_json.padding is None and from_json.truncation is None
    assert_same_tokens(from_vocab, from_json, TRICKY)


def test_mistakes_about_tokenizers(tokenizer, tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path, 100)
    rows = len(VOCAB) - 1
    with pytest.raises(UserError, match=f"vocab.txt: ids up to {rows}, the embedding has {rows} rows"):
        load_tokenizer(tmp_path / "bert", rows)
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path / "bert", 100)
    (tmp_path / "bert" / "tokenizer.json").unlink()
    (tmp_path / "bert" / "vocab.txt").write_text("[CLS]\n[UNK]\n[PAD]\n[MASK]\ncat\n")
    with pytest.raises(UserError, match=r"vocab.txt: .*no \[SEP\]"):
        load_tokenizer(tmp_path / "bert", 100)


def test_label_words(tokenizer):
    assert word_ids(tokenizer, ("no", "yes", "Maybe")) == [VOCAB.index(word) for word in ("no", "yes", "maybe")]
    for words, shown in [(("no", "cated"), "cat|UNK"), (("yes no",), "yes no"), (("zebra",), "UNK"), (("",), "empty"),
                         (("yes", "YES"), "yes")]:
        with pytest.raises(UserError, match=f'label word "{words[-1]}": expected one token.*it is .*({shown})'):
            word_ids(tokenizer, words)


def test_pairs_and_truncation(tokenizer):
    rng = np.random.default_rng(0)
    texts = [tuple(" ".join(["cat"] * n) for n in rng.integers(1, 30, 2)) for _ in range(200)]
    ids, starts, second = data.encode(texts, tokenizer, 24)
    cls, sep, cat = (VOCAB.index(token) for token in ("[CLS]", "[SEP]", "cat"))
    for i, (a, b) in enumerate(texts):
        row, first = ids[starts[i] : starts[i + 1]].tolist(), int(second[i]) - 2
        rest = len(row) - first - 3
        assert row == [cls] + [cat] * first + [sep] + [cat] * rest + [sep]
        a, b = len(a.split()), len(b.split())
        assert len(row) == min(24, a + b + 3)
        assert (first, rest) == (a, b) or abs(first - rest) <= 1 or (first == a < rest) or (rest == b < first)
    assert tokenizer.truncation is None, "the caller's tokenizer stays as it was"
    ids, starts, second = data.encode(["cat " * 50, "", "dog"], tokenizer, 8)
    assert np.array_equal(second, np.diff(starts)) and np.diff(starts).tolist() == [8, 2, 3]
    assert ids.dtype == second.dtype == np.int32 and starts.dtype == np.int64


def test_cache(tokenizer, tmp_path, monkeypatch):
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    first = load_dataset(task, "train", tokenizer, 32, tmp_path)
    encode, calls = data.encode, []
    monkeypatch.setattr(data, "encode", lambda *args: calls.append(1) or encode(*args))

    def same(count, task=task, max_length=32, tokenizer=tokenizer):
        dataset = load_dataset(task, "train", tokenizer, max_length, tmp_path)
        assert len(calls) == count
        pairs = [(getattr(dataset, name), getattr(first, name)) for name in ("ids", "starts", "second", "labels")]
        return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)

    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    assert same(0), "from the cache, and nothing was tokenised"
    assert not same(1, max_length=8)
    assert not same(2, task=replace(task, labels=("good", "bad"), spelling=("1", "0")))
    swapped = tokenizer.to_str().replace('"dog":', '"tac":').replace('"cat":', '"dog":')
    assert not same(3, tokenizer=Tokenizer.from_str(swapped))
    partial = data.safetensors.numpy.save({"ids": first.ids})
    for count, damaged in enumerate((whole[:-10], b"", b"\xff" * 100, partial), 4):
        cached.write_bytes(damaged)
        assert same(count), "a damaged cache is made again"
        assert cached.read_bytes() == whole
    tsv = tmp_path / "Toy" / "train.tsv"
    tsv.write_text(tsv.read_text().replace("cat", "dog", 1))
    assert not same(8), "the file has changed"


# Batches


def test_an_epoch_is_every_example_once():
    rng = np.random.default_rng(1)
    for n, size in [(1, 1), (1, 32), (7, 3), (96, 32), (1000, 16), (8551, 32)]:
        lengths = rng.integers(3, 60, n)
        cut = batches(lengths, size, seed=0, epoch=0)
        assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(n))
        assert sorted(map(len, cut)) == sorted([size] * (n // size) + [n % size] * (n % size > 0))


def test_token_budget():
    """Every example once; no batch above the budget unless it is one example; the same number in every epoch; full."""
    lengths, budget = np.random.default_rng(0).integers(3, 120, size=1000), 512
    together = set()
    for epoch in range(3):
        cut = batches(lengths, 1, 0, epoch, budget)
        assert sorted(np.concatenate(cut).tolist()) == list(range(1000))
        tokens = [len(b) * (-(-int(lengths[b].max()) // 8) * 8) for b in cut]
        assert max(tokens) <= budget and np.mean(tokens) > 0.9 * budget
        assert lengths.sum() > 0.85 * sum(tokens)  # little padding
        together.add((len(cut), max(map(len, cut))))
    assert len(together) == 1
    assert [len(b) for b in batches(np.array([900, 4]), 1, 0, 0, budget)] == [1, 1]


def test_batches_are_a_pure_function_of_seed_and_epoch():
    lengths = np.random.default_rng(1).integers(3, 60, 1000)

    def flat(seed, epoch):
        return np.concatenate(batches(lengths, 16, seed, epoch)).tolist()

    expected = flat(3, 5)
    np.random.seed(0), torch.manual_seed(0)
    assert flat(3, 5) == expected
    assert len({tuple(flat(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    together = [{frozenset(batch.tolist()) for batch in batches(lengths, 16, 0, epoch)} for epoch in range(2)]
    assert not together[0] & together[1], "another company in every epoch"


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(1).gamma(2, 15, 5000).astype(int) + 3

    def waste(cut):
        return sum(len(batch) * lengths[batch].max() for batch in cut) / lengths.sum() - 1

    grouped = batches(lengths, 32, 0, 0)
    shuffled = np.array_split(np.random.default_rng(0).permutation(5000), len(grouped))
    assert waste(grouped) < 0.1 < 1.0 < waste(shuffled)
    first, last = (np.mean([lengths[batch].mean() for batch in part]) for part in (grouped[:78], grouped[78:]))
    assert abs(first - last) < 0.35 * lengths.mean(), "short and long batches alternate"


def test_collate():
    rng = np.random.default_rng(2)
    lengths = rng.integers(3, 37, 50)
    starts = np.append(0, lengths.cumsum())
    second = np.array([rng.integers(2, n + 1) for n in lengths], np.int32)
    dataset = Dataset(rng.integers(1, 99, starts[-1]).astype(np.int32), starts, second, rng.integers(0, 2, 50), 36)
    for indices in ([4, 2, 2, 9], list(range(50)), [int(lengths.argmin())], [49]):
        batch = collate(dataset, np.array(indices), pad_id=7)
        width = batch["input_ids"].shape[1]
        assert width == min(-(-lengths[indices].max() // 8) * 8, 36)
        for row, i in enumerate(indices):
            n, ids = lengths[i], dataset.ids[starts[i] : starts[i + 1]]
            assert batch["input_ids"][row].tolist() == ids.tolist() + [7] * (width - n)
            assert batch["token_type_ids"][row].tolist() == [0] * second[i] + [1] * (n - second[i]) + [0] * (width - n)
            assert batch["attention_mask"][row].tolist() == [True] * n + [False] * (width - n)
        assert batch["labels"].tolist() == dataset.labels[indices].tolist()
        assert batch["input_ids"].dtype == batch["token_type_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["attention_mask"].dtype == torch.bool
    dataset.labels = None
    assert "labels" not in collate(dataset, np.arange(3))
    dataset.labels = np.zeros(50, np.float32)
    assert collate(dataset, np.arange(3))["labels"].dtype == torch.float32


# Tasks and the command


def test_the_table():
    for name, task in data.TASKS.items():
        if name == "demo":
            continue
        assert task.name == name and task.files.keys() == task.rows.keys()
        assert len(task.words) == (task.num_classes or 2) and len(task.spelling) == task.num_classes
        assert task.regression == (name == "stsb")
        assert all(len(sha256) == 64 and size > 0 for _, size, sha256 in task.sources)
    assert get_task("mnli").eval_splits == {"dev": "", "dev_mm": "_mm"} and get_task("rte").eval_splits == {"dev": ""}
    with pytest.raises(UserError, match='unknown task "nope": expected one of demo, cola, .*--task-file'):
        get_task("nope")
    with pytest.raises(UserError, match='task ax has no "train" split; it has test'):
        data.locate(get_task("ax"), "train", ".")


OWN = {"name": "mine", "train": "train.tsv", "dev": "dev.tsv", "columns": ["text"], "label": "label",
       "labels": ["bad", "good"], "words": ["no", "yes"], "metric": "accuracy"}  # fmt: skip


def test_task_file(tokenizer, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.json").write_text(json.dumps(OWN))
    (tmp_path / "own" / "train.tsv").write_text("label\ttext\ngood\tcat\nbad\tdog\n")
    task = get_task("whatever", tmp_path / "own" / "task.json")
    assert (task.name, task.labels, task.words, task.metrics) == ("mine", ("bad", "good"), ("no", "yes"), ("accuracy",))
    dataset = load_dataset(task, "train", tokenizer, 16, tmp_path / "data")
    assert dataset.labels.tolist() == [1, 0] and dataset.lengths.tolist() == [3, 3]
    with pytest.raises(UserError, match="own/dev.tsv: no such file.*the dev split of task mine"):
        load_dataset(task, "dev", tokenizer, 16, tmp_path / "data")
    with pytest.raises(UserError, match="--max-length 4: expected at least 8"):
        load_dataset(task, "dev", tokenizer, 4, tmp_path / "data")
    score = {key: value for key, value in OWN.items() if key != "labels"} | {"range": [-1, 1], "metric": ["spearman"]}
    (tmp_path / "own" / "task.json").write_text(json.dumps(score))
    task = get_task(None, tmp_path / "own" / "task.json")
    assert task.regression and (task.low, task.high) == (-1.0, 1.0) and task.eval_splits == {"dev": ""}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lables": []}, '"lables": expected no such key'),
        ({"dev": None}, '"dev": '),
        ({"train": 3}, '"train": expected 1 different strings'),
        ({"range": [0, 1]}, 'either "labels" or'),
        ({"words": ["no"]}, '"words": expected 2 different'),
        ({"labels": ["a", "a"]}, '"labels": '),
        ({"columns": []}, '"columns": expected 1 or 2'),
        ({"metric": "bleu"}, '"metric": expected some of accuracy, f1, matthews'),
        ({"metric": "f1", "labels": list("abc"), "words": list("abc")}, '"metric": expected some of accuracy$'),
        ({"name": "a/b"}, '"name": expected letters'),
    ],
)
def test_mistakes_in_a_task_file(change, message, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps(OWN | change))
    with pytest.raises(UserError, match=f"task.json: .*{message}"):
        get_task(None, tmp_path / "task.json")


def test_incomplete_and_broken_task_files(tmp_path):
    path = tmp_path / "task.json"
    for key in OWN:
        path.write_text(json.dumps({k: v for k, v in OWN.items() if k != key}))
        with pytest.raises(UserError, match=f'task.json: "{key}"'):
            get_task(None, path)
    for text in ("{", "[1, 2]", "3", '"x"'):
        path.write_text(text)
        with pytest.raises(UserError, match="task.json: not a readable JSON object"):
            get_task(None, path)
    with pytest.raises(UserError, match="none.json: not a readable JSON object"):
        get_task(None, tmp_path / "none.json")


def test_command(tmp_path, monkeypatch, capsys):
    task, content = toy(TRAIN)
    (tmp_path / "Toy.zip").write_bytes(content)
    monkeypatch.setitem(data.TASKS, "toy", task)
    assert not data.main(["--task", "toy", "--data-dir", str(tmp_path)])
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines()] == [
        ["toy", "train", "1,000", "rows"], ["toy", "dev", "1", "rows"], ["toy", "test", "1", "rows"]]  # fmt: skip
    for arguments in (["--task", "nope"], [], ["--task", "rte", "--data-dir", str(tmp_path)]):
        assert data.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error


def test_the_demo(tokenizer, tmp_path):
    demo = Path(data.__file__).parent / "demo"
    if not (demo / "task.json").exists():
        pytest.skip("no demo folder beside data.py")
    task = get_task("demo")
    assert task.name == "demo"
    assert all(rows > 0 for _, rows in data.prepare(task, tmp_path).values())


# With real files


def real_files(task):
    """The sources of a task from GLUE_DIR as {name: bytes}; skips where one is missing."""
    names = [address.rsplit("/", 1)[-1] for address, _, _ in task.sources]
    for name in names:
        if not (Path(GLUE_DIR) / name).is_file():
            pytest.skip(f"no {name} in GLUE_DIR")
    return {name: (Path(GLUE_DIR) / name).read_bytes() for name in names}


@pytest.mark.real
@real_glue
@pytest.mark.parametrize("name", [name for name in data.TASKS if name != "demo"])
def test_real_downloads(name, serve, tmp_path):
    task = get_task(name)
    files = real_files(task)
    check_download(task, files, serve, tmp_path / "data")
    with pytest.raises(UserError, match="rows, expected 9:"):
        data.prepare(replace(task, rows=task.rows | {"test": 9}), tmp_path / "data")


@pytest.mark.real
@real_glue
@pytest.mark.parametrize("name", [name for name in data.TASKS if name != "demo"])
def test_real_folder_offline(name, tokenizer, tmp_path):
    """The official zips, without a network: row counts, labels and ids; a second folder holds the TSVs only."""
    task, (zips, plain) = get_task(name), (tmp_path / "zips", tmp_path / "plain")
    zips.mkdir()
    for file, content in real_files(task).items():
        (zips / file).write_bytes(content)
    assert {split: rows for split, (_, rows) in data.prepare(task, zips).items()} == task.rows
    shutil.copytree(zips / task.folder if name != "ax" else zips, plain / task.folder if name != "ax" else plain)
    for split in task.files:
        a, b = (load_dataset(task, split, tokenizer, 64, folder) for folder in (zips, plain))
        assert np.array_equal(a.ids, b.ids) and len(a) == task.rows[split]
        if split.startswith("test"):
            assert a.labels is None
        elif task.regression:
            assert 0 <= a.labels.min() < a.labels.max() <= 5
        else:
            assert set(a.labels.tolist()) == set(range(task.num_classes))
    if name == "mrpc":
        lines = [(plain / path).read_text(encoding="utf-8-sig").split("\n")[1:-1] for path in task.files.values()]
        train, dev, test = ({tuple(line.split("\t")[1:3]) for line in split} for split in lines)
        assert not train & dev and (len(train), len(dev), len(test)) == (3668, 408, 1725)


@pytest.mark.real
@real_bert
def test_real_vocab_txt_and_tokenizer_json_agree(tmp_path):
    from_json = load_tokenizer(BERT_DIR, 30522)
    if not (Path(BERT_DIR) / "vocab.txt").is_file() or not (Path(BERT_DIR) / "tokenizer.json").is_file():
        pytest.skip("BERT_DIR has only one of vocab.txt and tokenizer.json")
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(Path(BERT_DIR) / name, tmp_path)
    texts = TRICKY
    if GLUE_DIR and (Path(GLUE_DIR) / "CoLA.zip").is_file():
        with zipfile.ZipFile(Path(GLUE_DIR) / "CoLA.zip") as zipped:
            texts = TRICKY + zipped.read("CoLA/dev.tsv").decode().split("\n")
    assert_same_tokens(load_tokenizer(tmp_path, 30522), from_json, texts)
    for task in data.TASKS.values():
        if task:
            assert len(word_ids(from_json, task.words)) == len(task.words)
