"""Tables of texts: TSV, quoted TSV, CSV and JSON lines; their labels, metrics, cuts and weights."""

import csv
import gzip
import io
import json
import random

import numpy as np
import pytest
import torch
from conftest import word_tokenizer
from test_errors import refused
from test_train import run

import data
import eval as evaluation
from data import Task, get_task, kind_of, load_dataset, read_split
from kinds.classify import IGNORED
from support.terminal import UserError

ROW = {"name": "t", "train": "train.tsv", "dev": "dev.tsv", "columns": ["a", "b"]}
ROW |= {"label": "label", "labels": ["0", "1"], "metric": "accuracy", "words": ["no", "yes"]}


def task_of(folder, **changes):
    path = folder / "task.json"
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    path.write_text(json.dumps(row))
    return get_task(None, path)


def read(task, content, path="FILE.tsv", split="train"):
    content = content if isinstance(content, bytes) else content.encode()
    return read_split(task, split, path, content)


def as_csv(rows, delimiter):
    """What pandas' to_csv writes: quotes where a field needs them."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerows([["a", "b", "label"], *rows])
    return out.getvalue()


def tricky(count):
    """Rows whose texts hold quotes, tabs, commas and line breaks."""
    rng = random.Random(0)
    pieces = ['"', "\t", ",", "\n", "\r\n", "w1", "w2", " ", '"w3"', "''", "é"]
    rows = []
    for i in range(count):
        texts = ["w4 " + "".join(rng.choices(pieces, k=8)) for _ in range(2)]
        rows.append([*texts, str(i % 2)])
    return rows


def test_three_forms_are_equal(tmp_path):
    """100 rows as CSV, as JSON lines and as a quoted TSV have equal texts, labels and tokens."""
    rows = tricky(100)
    lines = [json.dumps({"label": int(c), "b": b, "a": a, "more": None}) for a, b, c in rows]
    forms = {
        "csv": (as_csv(rows, ","), {}),
        "jsonl": ("\n".join(lines) + "\n", {}),
        "tsv": (as_csv(rows, "\t"), {"quoted": True}),
        "csv.gz": (as_csv(rows, ","), {}),
    }
    arrays = []
    for ending, (text, more) in forms.items():
        path = tmp_path / f"train.{ending}"
        packed = gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()
        path.write_bytes(packed)
        task = task_of(tmp_path, train=path.name, **more)
        texts, gold = read_split(task, "train", path, path.read_bytes())
        assert texts == [(a, b) for a, b, _ in rows], ending
        assert gold.tolist() == [int(c) for _, _, c in rows]
        arrays.append(load_dataset(task, "train", word_tokenizer(), 32, tmp_path))
    for other in arrays[1:]:
        for name in ("ids", "lengths", "second", "labels", "cut"):
            assert np.array_equal(getattr(other, name), getattr(arrays[0], name)), name


def test_quotes_of_a_plain_tsv(tmp_path, capsys):
    """A field in quotes gets one warning with its line and the cure; a quote inside gets none."""
    task = task_of(tmp_path)
    text = 'a\tb\tlabel\nw1\t5" disk\t0\n"w2 ""x"""\tw3\t1\n"w4"\tw5\t1\n'
    texts, _ = read(task, text)
    assert texts[1] == ('"w2 ""x"""', "w3")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "FILE.tsv:3" in said and '"quoted": true' in said
    with pytest.raises(UserError, match='FILE.tsv:2: 1 columns.*"quoted": true'):
        read(task, 'a\tb\tlabel\n"w1\nw2"\tw3\t1\n')
    quoted = task_of(tmp_path, quoted=True)
    assert read(quoted, 'a\tb\tlabel\n"w1\nw2"\tw3\t1\n')[0] == [("w1\nw2", "w3")]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "path, text, words",
    [
        ("F.csv", 'a,b,label\nx,"y,1\n', ["F.csv:2", "quotes do not fit"]),
        ("F.csv", 'a,b,label\nx,y,1\n"p\nq",y,2\n', ["F.csv:3", 'unknown label "2"']),
        ("F.csv", "a,b\nx,y\n", ['no column "label"']),
        ("F.csv", "a,a,b,label\nx,y,z,1\n", ['two columns "a"']),
        ("F.jsonl", '{"a": "x", "label": 1}\n', ["F.jsonl:1", "no key 'b'"]),
        ("F.jsonl", '{"a": "x", "b": null, "label": 1}\n', ["F.jsonl:1", "neither a text"]),
        ("F.jsonl", '{"a": "x", "b": ["y"], "label": 1}\n', ["F.jsonl:1", "neither a text"]),
        ("F.jsonl", '{"a": "x", "b": "y", "label": 1}\n{"a"\n', ["F.jsonl:2", "JSON object"]),
        ("F.jsonl", '{"a": "\\ud800", "b": "y", "label": 1}\n', ["F.jsonl:1", "surrogates"]),
        ("F.jsonl", "[1]\n", ["F.jsonl:1", "JSON object"]),
        ("F.tsv.gz", "a\tb\tlabel\n", ["F.tsv.gz", "not a whole gzip file"]),
    ],
)
def test_mistakes(path, text, words, tmp_path):
    """A mistake in a table is named with the line where its row begins."""
    with pytest.raises(UserError) as caught:
        read(task_of(tmp_path), text, path)
    for word in words:
        assert word in str(caught.value)


def test_every_row_counts(tmp_path, tiny, capsys):
    """An empty line of a one-column file is an empty text; predictions are as many as rows."""
    task = task_of(tmp_path, columns=["a"])
    texts, _ = read(task, "a\nw1\n\nw2\n\n", split="test")
    assert texts == ["w1", "", "w2", ""]
    assert read(task, "a\nw1\n\nw2", "F.csv", "test")[0] == ["w1", "", "w2"]
    pair = task_of(tmp_path)
    assert len(read(pair, "a\tb\nw1\tw2\n\n\n", split="test")[0]) == 1
    with pytest.raises(UserError, match="FILE.tsv:3: 1 columns"):
        read(pair, "a\tb\nw1\tw2\n\nw3\tw4\n", split="test")
    (tmp_path / "train.tsv").write_text("a\tlabel\nw1\t0\nw2\t1\n" * 1)
    (tmp_path / "dev.tsv").write_text("a\tlabel\nw1\t0\n")
    (tmp_path / "test.tsv").write_text("a\nw1\n\nw2\n")
    task_of(tmp_path, columns=["a"], test="test.tsv")
    out = tmp_path / "run"
    flags = [*tiny, "--task-file", str(tmp_path / "task.json"), "--max-steps", "1"]
    run(flags, out, method="dense")
    assert evaluation.main([str(out), "--predictions", str(tmp_path / "p.tsv")]) == 0
    assert len((tmp_path / "p.tsv").read_text().splitlines()) == 1 + 3
    capsys.readouterr()
    assert evaluation.main([str(out), "--input", str(tmp_path / "test.tsv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3


def test_input_in_other_forms(tmp_path, tiny, capsys):
    """--input reads CSV and JSON lines; a line break in a text does not break the output."""
    (tmp_path / "train.tsv").write_text("a\tlabel\nw1\t0\nw2\t1\n")
    (tmp_path / "dev.tsv").write_text("a\tlabel\nw1\t0\n")
    task_of(tmp_path, columns=["a"])
    out = tmp_path / "run"
    flags = [*tiny, "--task-file", str(tmp_path / "task.json"), "--max-steps", "1"]
    run(flags, out, method="dense")
    (tmp_path / "f.csv").write_text('x,a\n1,"w1\nw2\tw3"\n')
    (tmp_path / "f.jsonl").write_text('{"a": "w1\\nw2\\tw3"}\n')
    said = []
    for name in ("f.csv", "f.jsonl"):
        capsys.readouterr()
        assert evaluation.main([str(out), "--input", str(tmp_path / name)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].splitlines()[1].endswith("\tw1 w2 w3")


def test_old_line_ends(tmp_path):
    """A file with CR line ends is read."""
    texts, gold = read(task_of(tmp_path), "a\tb\tlabel\rw1\tw2\t0\rw3\tw4\t1\r")
    assert texts == [("w1", "w2"), ("w3", "w4")]
    assert gold.tolist() == [0, 1]


def test_messages_are_short(tmp_path):
    """No message quotes more than 200 characters of a file."""
    long = "x" * 100_000
    task = task_of(tmp_path)
    for text in (f"{long}\ta\n", f"a\tb\tlabel\nx\ty\t{long}\n"):
        with pytest.raises(UserError) as caught:
            read(task, text)
        assert len(str(caught.value)) < 400
    (tmp_path / "p.tsv").write_text(f"index\tprediction\n{long}\t0\n")
    with pytest.raises(UserError) as caught:
        kind_of(task).read_predictions(tmp_path / "p.tsv", ["x"], None)
    assert len(str(caught.value)) < 400


# --------------------------------------------------------------------------------------------------
# labels, metrics, weights


def test_whole_numbers_are_labels(tmp_path):
    task = task_of(tmp_path, labels=[3, 7], positive=7)
    assert task.labels == ("3", "7")
    assert read(task, "a\tb\tlabel\nx\ty\t7\n")[1].tolist() == [1]


def test_many_labels(tmp_path):
    """10,000 labels are read, and a message lists ten of them."""
    task = task_of(tmp_path, labels=[f"L{i}" for i in range(10_000)], words=None)
    rows = "".join(f"x\ty\tL{i}\n" for i in range(10_000))
    assert read(task, f"a\tb\tlabel\n{rows}")[1].tolist() == list(range(10_000))
    with pytest.raises(UserError, match="L9 or one of 9,990 others"):
        read(task, "a\tb\tlabel\nx\ty\tz\n")


def test_f1_has_a_positive_label(tmp_path):
    """F1 is that of the second label, or of "positive"; macro_f1 is the mean over all."""
    predicted = np.array([0, 0, 1, 1, 1, 2])
    gold = np.array([0, 1, 1, 1, 0, 0])

    def measured(**row):
        kind = kind_of(task_of(tmp_path, **row))
        few = len(row.get("labels", "ab")) == 2
        return kind.measure(np.minimum(predicted, 1) if few else predicted, gold)

    assert measured(metric="f1")["f1"] == pytest.approx(4 / 7)
    assert measured(metric="f1", positive="0")["f1"] == pytest.approx(2 / 5)
    three = {"labels": ["a", "b", "c"], "words": None}
    assert measured(metric="f1", positive="b", **three)["f1"] == pytest.approx(2 / 3)
    macro = measured(metric="macro_f1", **three)["macro_f1"]
    assert macro == pytest.approx((2 / 5 + 2 / 3 + 0) / 3)
    with pytest.raises(UserError, match='f1 with "positive"'):
        task_of(tmp_path, metric="f1", **three)
    with pytest.raises(UserError, match='"positive": expected one of the labels'):
        task_of(tmp_path, positive="z")


def test_class_weights(tmp_path):
    """With "balanced", a class weighs the less the more often it occurs; the mean weight is 1."""
    task = task_of(tmp_path, class_weights="balanced")
    kind = kind_of(task)
    labels = np.array([0] * 8 + [1] * 2)
    dataset = data.Dataset(kind, *[np.zeros(10, np.int64)] * 3, labels)
    logits = torch.zeros(10, 2)
    plain = kind.losses(logits, torch.from_numpy(labels))
    kind.learn_from(dataset)
    weighed = kind.losses(logits, torch.from_numpy(labels))
    assert weighed.mean() == pytest.approx(float(plain.mean()))
    assert weighed[9] / weighed[0] == pytest.approx(4)
    assert (kind.losses(logits[:1], torch.tensor([IGNORED])) == 0).all()
    with pytest.raises(UserError, match='"class_weights": expected \'balanced\''):
        task_of(tmp_path, class_weights="yes")


def test_cut_texts_are_told(tmp_path, capsys):
    """More than 5% of the texts cut at --max-length: one warning with the share, each time."""
    rows = ["w1 " * 20 + "\tw2\t0"] * 2 + ["w1\tw2\t1"] * 18
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb\tlabel", *rows]) + "\n")
    task = task_of(tmp_path)
    for _ in range(2):  # the second time from the cache
        load_dataset(task, "train", word_tokenizer(), 16, tmp_path)
        said = capsys.readouterr().err
        assert said.count("warning") == 1 and "10.0%" in said and "--max-length 16" in said
    load_dataset(task, "train", word_tokenizer(), 64, tmp_path)
    assert capsys.readouterr().err == ""


def test_a_byte_order_mark_in_a_task_file(tmp_path):
    path = tmp_path / "task.json"
    path.write_text("\ufeff" + json.dumps(ROW), encoding="utf-8")
    assert get_task(None, path).name == "t"


def test_one_example_cannot_be_split(tmp_path, tiny, capsys):
    """A training set too small for --teacher-split is refused in one line."""
    (tmp_path / "train.tsv").write_text("a\tb\tlabel\nw1\tw2\t0\n")
    (tmp_path / "dev.tsv").write_text("a\tb\tlabel\nw1\tw2\t0\n")
    task_of(tmp_path)
    flags = [*tiny, "--task-file", tmp_path / "task.json", "--out", tmp_path / "run"]
    flags += ["--method", "dense", "--teacher", "self", "--teacher-split", "0.1"]
    refused(capsys, flags, "--teacher-split", "one example")
    (tmp_path / "train.tsv").write_text("a\tb\tlabel\nw1\tw2\t0\nw3\tw2\t1\n")
    run([str(flag) for flag in flags[:-2]], tmp_path / "two", teacher_split=0.1)


def test_unknown_tokens_are_told(tmp_path, tiny, capsys):
    """Where the tokenizer does not know the text, a warning has the share and frequent words."""
    lines = ["a\tb\tlabel"] + ["bonjour w1\tmonde w2\t0"] * 8
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    task_of(tmp_path)
    flags = [*tiny, "--task-file", str(tmp_path / "task.json"), "--max-steps", "1"]
    run(flags, tmp_path / "run", method="dense")
    said = capsys.readouterr().err
    assert "28.6% of the training tokens are [UNK]" in said
    assert "bonjour" in said and "monde" in said and "w1" not in said


def test_a_task_describes_itself():
    """A Task has no fields of one kind alone; they are in `options`."""
    assert not {"low", "high", "positive"} & Task.__dataclass_fields__.keys()
