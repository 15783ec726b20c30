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
from safetensors.torch import load_file
from test_errors import refused
from test_train import run

import data
import eval as evaluation
from data import Task, get_task, kind_of, load_dataset, read_split
from kinds import metrics
from kinds.classify import IGNORED
from kinds.text import encode
from support.terminal import UserError, program

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
        ("F.jsonl", '{"a": "x", "label": 1}\n', ["F.jsonl:1", "no text and no number"]),
        ("F.jsonl", '{"a": "x", "b": null, "label": 1}\n', ["F.jsonl:1", 'under the key "b"']),
        ("F.jsonl", '{"a": "x", "b": ["y"], "label": 1}\n', ["F.jsonl:1", 'under the key "b"']),
        ("F.jsonl", '{"a": "x", "b": "y", "label": 1}\n{"a"\n', ["F.jsonl:2", "JSON object"]),
        ("F.jsonl", '{"a": "\\ud800", "b": "y", "label": 1}\n', ["F.jsonl:1", "surrogates"]),
        ("F.jsonl", "[1]\n", ["F.jsonl:1", "not an object; expected a JSON object"]),
        ("F.jsonl", '{"a": "x", "b": NaN, "label": 1}\n', ["F.jsonl:1", 'under the key "b"']),
        ("F.jsonl", '{"a": "x", "b": {}, "label": 1}\n', ["F.jsonl:1", 'under the key "b"']),
        ("F.jsonl", '{"a": "", "b": "", "a": "", "label": 1}\n', ["a key is there twice"]),
        ("F.jsonl", '{"a": "x" "b"}\n', ["F.jsonl:1: Expecting", "at character 11"]),
        ("F.jsonl", '\n{"a": "x", "b": "y", "label": 1}\n', ["F.jsonl:1"]),
        ("F.ndjson", "[1]\n", ["F.ndjson:1", "not an object"]),
        ("F.JSONL", "[1]\n", ["F.JSONL:1", "not an object"]),
        ("F.csv", 'a,b,label\nx,"y"z,1\n', ["F.csv:2", "quotes do not fit"]),
        ("F.csv", "a,b,label\nx,y\rz,1\n", ["F.csv:2", "quotes do not fit"]),
        ("F.csv", 'a,b,label\n"x",y,z,1\n', ["F.csv:2: 4 columns", "a comma inside a text?"]),
        ("F.csv", "a,b,label\n\nx,y,1\n", ["F.csv:2: 1 columns", "an empty line; remove it"]),
        ("F.tsv", "a\t b\tlabel\nx\ty\t1\n", ['no column "b"', "remove the spaces around"]),
        ("F.tsv", '"a"\t"b"\t"label"\n', ['no column "a"', '"quoted": true']),
        ("F.tsv", "a\tb\tlabel\nx\ty\t 1\n", ["F.tsv:2", 'label " 1"', "remove the spaces"]),
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
    (tmp_path / "test.tsv").write_text('a\nw1\n\n"w2\n')  # a quote is a character like others
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


def test_many_labels(tmp_path, tiny):
    """10,000 labels are read and train, and a message lists ten of them."""
    task = task_of(tmp_path, labels=[f"L{i}" for i in range(10_000)], words=None)
    rows = "".join(f"x\ty\tL{i}\n" for i in range(10_000))
    assert read(task, f"a\tb\tlabel\n{rows}")[1].tolist() == list(range(10_000))
    with pytest.raises(UserError, match="L9 or one of 9,990 others"):
        read(task, "a\tb\tlabel\nx\ty\tz\n")
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("a\tb\tlabel\nw1\tw2\tL9999\nw2\tw1\tL0\n")
    flags = [*tiny, "--task-file", str(tmp_path / "task.json"), "--max-steps", "2"]
    run(flags, tmp_path / "run", method="dense")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert len(weights["classifier.weight"]) == 10_000


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
    with pytest.raises(UserError, match='f1 with "positive"; f1 of 3 labels needs "positive"'):
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
    with pytest.raises(UserError, match="\"class_weights\": expected 'balanced'"):
        task_of(tmp_path, class_weights="yes")


def test_cut_texts_are_told(tmp_path, capsys):
    """More than 5% of the texts cut at --max-length: one warning with the share, each time."""
    rows = ["w1 " * 20 + "\tw2\t0"] * 2 + ["w1\tw2\t1"] * 18
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb\tlabel", *rows]) + "\n")
    task = task_of(tmp_path)
    for _ in range(2):  # the second time from the cache
        load_dataset(task, "train", word_tokenizer(), 16, tmp_path)
        said = capsys.readouterr().err
        assert said == "warning: 10% of the texts of t train are cut at --max-length 16\n"
    load_dataset(task, "train", word_tokenizer(), 64, tmp_path)
    assert capsys.readouterr().err == ""


def test_a_csv_has_no_hint_of_pandas(tmp_path):
    """The cure for quotes in a TSV is named for a plain TSV alone."""
    for path, row in (("F.csv", 'a,b,label\n"""x",y\n'), ("F.tsv", "a\tb\tlabel\nx\ty\n")):
        with pytest.raises(UserError, match='"label" is missing$'):
            read(task_of(tmp_path), row, path)
    quoted = task_of(tmp_path, quoted=True)
    with pytest.raises(UserError, match='FILE.tsv:2: 2 columns, expected 3: "label" is missing$'):
        read(quoted, 'a\tb\tlabel\n"""x"\ty\n')


def test_official_files_have_no_warning_of_quotes(capsys):
    """The texts of GLUE may be in quotes, and no task file could say so."""
    task = get_task("sst2")
    task = Task("sst2", "SST-2", task.labels, columns=("sentence",), rows={"train": 1})
    texts, _ = read(task, 'sentence\tlabel\n"a ""b"""\t1\n')
    assert texts == ['"a ""b"""']
    assert capsys.readouterr().err == ""


def test_values_of_json(tmp_path):
    """Numbers count as they stand in the file, and so do true and false."""
    task = task_of(tmp_path, labels=["1", "true"])
    line = '{"a": %s, "b": "", "label": %s}\n'
    text = line % ("1.50", "true") + line % ("-1e3", "1") + line % ("9" * 5000, '"1"') + "\n\n"
    texts, gold = read(task, text, "F.ndjson")
    assert [a for a, _ in texts] == ["1.50", "-1e3", "9" * 5000]
    assert gold.tolist() == [1, 0, 0]


def test_a_long_text_in_quotes(tmp_path):
    """A text may be longer than the limit of Python's csv module, which is 131,072 characters."""
    csv.field_size_limit(131_072)
    long = "w1 " * 100_000
    texts, _ = read(task_of(tmp_path), f'a,b,label\n"{long}",,1\n', "F.csv")
    assert texts == [(long, "")]


@pytest.mark.parametrize("path", ["F.tsv", "F.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_odd_characters(path, end, tmp_path):
    """LF, CR LF and CR end a line. A byte order mark is no text; a NUL and U+2028 are."""
    rows = [["a", "b", "label"], ["x\0y", "p\u2028q", "1"], ["", "", "0"]]
    delimiter = "," if path == "F.csv" else "\t"
    text = "\ufeff" + "".join(delimiter.join(row) + end for row in rows)
    texts, gold = read(task_of(tmp_path), text, path)
    assert texts == [("x\0y", "p\u2028q"), ("", "")]
    assert gold.tolist() == [1, 0]


def test_nothing_is_no_row(tmp_path):
    """An empty input has no row, and an input of one line end has one, which is empty."""
    kind = kind_of(task_of(tmp_path, columns=["a"]))
    assert kind.read_input("standard input", b"", ("a",)) == []
    assert kind.read_input("standard input", b"\n", ("a",)) == [""]
    assert kind.read_input("standard input", b'"w1"\n\nw2', ("a",)) == ['"w1"', "", "w2"]
    assert kind.read_input("F.jsonl", b"") == []
    for path in ("F.tsv", "F.csv"):
        with pytest.raises(UserError, match=f'{path}:1: no column "a"'):
            kind.read_input(path, b"")


def test_bytes_that_are_not_utf8(tmp_path):
    """The line and the byte are right behind a byte order mark, and where CR ends the lines."""
    for text in (b"\xef\xbb\xbfa\nb\n\xff\n", b"a\rb\r\xff\r"):
        with pytest.raises(UserError, match="FILE.tsv:3: byte 0xff is not UTF-8"):
            read(task_of(tmp_path), text)


def test_predictions_in_other_forms(tmp_path):
    """A file of predictions is read by its ending; a byte order mark does no harm."""
    kind = kind_of(task_of(tmp_path, labels=["no", "yes"], quoted=True))
    forms = {
        "p.tsv": "\ufeffindex\tprediction\n0\tyes\n1\tno\n",
        "p.csv": 'index,prediction\n0,"yes"\n1,no\n',
        "p.jsonl": '{"index": 0, "prediction": "yes"}\n{"index": 1, "prediction": "no"}\n',
    }
    for name, text in forms.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        assert kind.read_predictions(path, ["x", "y"], None).tolist() == [1, 0]
        with pytest.raises(UserError, match=f"{name}: near line 3"):
            kind.read_predictions(path, ["x"], None)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"label": "b"}, '"label": expected another column'),
        ({"labels": ["x", "y\tz"]}, '"labels": expected strings without a tab'),
        ({"labels": ["x", "y"], "positive": True}, '"positive": expected a string'),
        ({"labels": ["x", "y", "z"], "metric": "matthews"}, "matthews is for two labels"),
        ({"quoted": "yes"}, '"quoted": expected true or false'),
        ({"labels": None, "range": [0, float("inf")]}, '"range": expected two numbers'),
        ({"labels": None, "range": [0, 10**400]}, '"range": expected two numbers'),
        ({"labels": None, "range": [0, float("nan")]}, '"range": expected two numbers'),
        ({"labels": None, "range": [0, True]}, '"range": expected two numbers'),
        ({"labels": None, "range": [0, 1], "label": "b"}, '"label": expected another column'),
    ],
)
def test_mistakes_in_the_keys(row, message, tmp_path):
    """A task file that cannot work is refused with its key."""
    if "range" in row:
        row = row | {"metric": "pearson"}
    with pytest.raises(UserError, match=message):
        task_of(tmp_path, words=None, **row)


@pytest.mark.parametrize("label, hint", [("1,5", "; write a point"), ("1_5", ""), ("nan", "")])
def test_numbers_that_are_none(label, hint, tmp_path):
    """A decimal comma is refused with its cure, and so is what is a number in Python alone."""
    task = task_of(tmp_path, labels=None, range=[0, 20], metric="pearson")
    with pytest.raises(UserError, match=f'FILE.tsv:2: unknown label "{label}".* 20.0{hint}'):
        read(task, f"a\tb\tlabel\nx\ty\t{label}\n")


def test_messages_shorten_labels(tmp_path):
    """Long labels and long names of columns are not shown in full."""
    task = task_of(tmp_path, labels=["l" * 9_000, "m" * 9_000])
    for text in ("a\tb\tlabel\nx\ty\tz\n", "a\tb\tlabel\t" + "n" * 9_000 + "\nx\ty\t1\n"):
        with pytest.raises(UserError) as caught:
            read(task, text)
        assert len(str(caught.value)) < 500


def test_macro_f1_is_a_mean_over_all_labels(tmp_path):
    """A label that is neither predicted nor there counts 0, as in sklearn with all labels given."""
    rng = np.random.default_rng(0)
    predicted, gold = rng.integers(0, 4, (2, 50))
    found = metrics.macro_f1(predicted, gold, 6)
    each = [metrics.f1(predicted, gold, positive) for positive in range(6)]
    assert each[4:] == [0.0, 0.0]
    assert found == pytest.approx(np.mean(each))
    kind = kind_of(task_of(tmp_path, metric=["macro_f1", "f1", "matthews", "accuracy"]))
    assert kind.measure(gold % 2, gold % 2) == dict.fromkeys(kind.task.metrics, pytest.approx(1))


def test_a_label_without_example_weighs_nothing(tmp_path):
    """IGNORED labels do not count, and the mean weight over the others is 1."""
    row = {"labels": ["a", "b", "c"], "words": None, "class_weights": "balanced"}
    kind = kind_of(task_of(tmp_path, **row))
    labels = np.array([0, 0, 0, 2, IGNORED])
    kind.learn_from(data.Dataset(kind, *[np.zeros(5, np.int64)] * 3, labels))
    assert kind.class_weights.tolist() == pytest.approx([4 / 6, 0, 2])
    assert kind.class_weights[labels[:4]].mean() == 1
    assert kind.losses(torch.zeros(5, 3).double(), torch.from_numpy(labels))[4] == 0


def test_a_training_set_of_one_label(tmp_path, capsys):
    """It gets one warning, which names the label."""
    kind = kind_of(task_of(tmp_path, labels=["no", "yes"]))
    zeros = [np.zeros(3, np.int64)] * 3
    kind.learn_from(data.Dataset(kind, *zeros, np.array([1, 1, 1])))
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and 'has the label "yes"' in said
    kind.learn_from(data.Dataset(kind, *zeros, np.array([1, 0, 1])))
    assert capsys.readouterr().err == ""


def test_what_counts_as_cut():
    """A row that fits exactly is not cut; of a pair one text or both may be cut."""
    texts = [("w1 w1", "w2 w2 w2"), ("w1 w1 w1", "w2 w2 w2"), ("", ""), ("w1 " * 9, "w2 " * 9)]
    arrays = encode(texts, word_tokenizer(), 8)
    assert arrays["cut"].tolist() == [False, True, False, True]
    assert arrays["cut"].dtype == bool
    assert arrays["lengths"].tolist() == [8, 8, 3, 8]
    assert encode(["w1 " * 6, "w1 " * 7, ""], word_tokenizer(), 8)["cut"].tolist() == [0, 1, 0]


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


@pytest.mark.parametrize("rank, said", [("0", 1), ("1", 0)])
def test_one_process_warns(rank, said, tmp_path, monkeypatch, capsys):
    """Of several processes only the first one warns."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    read(task_of(tmp_path), 'a\tb\tlabel\n"w1"\tw2\t0\nw3\tw2\t1\n')
    assert capsys.readouterr().err.count("warning") == said


def test_an_error_is_never_long(capsys):
    """Whatever a message quotes, a command ends with a line that can be read."""

    @program
    def main(argv):
        raise UserError("x" * 1_000_000)

    assert main([]) == 2
    assert len(capsys.readouterr().err) < 2_100
