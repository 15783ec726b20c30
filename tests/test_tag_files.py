"""Files of tagged words: columns, line ends, comments, schemes, lost words, and their mistakes.

tests/test_kinds.py has the tokens, metrics and whole runs of the kind "tag".
"""

import gzip
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import word_tokenizer
from test_errors import refused, refused_file
from test_train import run

import data
import eval as evaluation
from data import get_task, load_dataset, make_dataset
from kinds.classify import IGNORED
from kinds.tag import encode_words
from support.terminal import UserError

LABELS = ("O", "B-A", "I-A", "B-B", "I-B")
TASK = {"name": "mine", "kind": "tag", "train": "train.txt", "dev": "dev.txt"}
TASK |= {"metric": "entity_f1"}


def kind_with(options=(), labels=LABELS):
    """The kind, as an object, of a task that has no files."""
    task = data.Task(name="mine", folder="t", kind="tag", labels=labels, options=dict(options))
    return data.kind_of(task)


def read(text, options=(), name="FILE"):
    content = text if isinstance(text, bytes) else text.encode()
    return data.read_split(kind_with(options).task, "dev", name, content)


wrong = partial(refused_file, read)


def task_of(folder, train="a O\nb B-A\n", dev="a O\n", **more):
    """The task that a task file in `folder` describes, whose files hold these texts."""
    (folder / "train.txt").write_text(train)
    (folder / "dev.txt").write_text(dev)
    (folder / "task.json").write_text(json.dumps(TASK | more))
    return get_task(None, folder / "task.json")


# -------------------------------------------------------------------------------------------------
# lines and columns


def test_a_tab_is_the_only_separator_of_its_line():
    """A line with a tab has columns between tabs; other lines of the same file, between spaces."""
    texts, gold = read("New York\tB-A\n in  \t X Y\tO \nof   X   O\nof\u00a0it O\n  c O\n")
    assert texts == [["New York", "in", "of", "of\u00a0it", "c"]]
    assert gold == [["B-A", "O", "O", "O", "O"]]
    assert read("a\t\tO\n")[0] == [["a"]]  # an empty column between the two does not matter


def test_an_empty_word_or_tag_is_refused():
    wrong("a O\n\tO\n", "FILE:2", "no word", "column 1")
    wrong("a\tX\t\n", "FILE:1", "no tag", "last column")
    wrong("a\tb\t\tO\n", "FILE:1", "no tag", "column 3", options={"tag_column": 3})
    wrong("a\t\tO\n", "FILE:1", "no word", "column 2", options={"word_column": 2})


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_line_ends(end):
    """Each of them ends a line, and the line of a mistake is counted with it."""
    lines = ["-DOCSTART- -X- O", "", "a O", "b\tI-A", "", "-DOCSTART-\tO", "c O", ""]
    expected = ([["a", "b"], ["c"]], [["O", "B-A"], ["O"]])
    assert read(end.join(lines)) == expected
    mixed = "".join(line + (end, "\n")[number % 2] for number, line in enumerate(lines))
    assert read(mixed) == expected
    wrong(end.join([*lines, "d"]), f"FILE:{len(lines) + 1}")


@pytest.mark.parametrize("character", "\f\v\x1c\x85\u2028\u2029")
def test_other_breaks_are_text(character):
    assert read(f"a{character}b O\n{character} O\n")[0] == [[f"a{character}b", character]]


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_document_ends_a_sentence(end):
    """An entity of IOB1 does not go on behind -DOCSTART-, even without an empty line."""
    lines = ["a I-A", "-DOCSTART- O", "b I-A", "c I-A"]
    assert read(end.join(lines)) == ([["a"], ["b", "c"]], [["B-A"], ["B-A", "I-A"]])
    lines = ["1\ta\tI-A", "0\t-DOCSTART-\tO", "1\tb\tI-A"]
    assert read(end.join(lines), {"word_column": 2})[1] == [["B-A"], ["B-A"]]


def test_a_packed_file(tmp_path):
    packed = gzip.compress(b"a O\nb B-B\n")
    assert read(packed, name="x.gz") == ([["a", "b"]], [["O", "B-B"]])
    (tmp_path / "train.gz").write_bytes(packed)
    (tmp_path / "task.json").write_text(json.dumps(TASK | {"train": "train.gz"}))
    task = get_task(None, tmp_path / "task.json")
    assert task.labels == ("O", "B-B", "I-B")


# -------------------------------------------------------------------------------------------------
# comments, and numbers in front of words


def test_comments():
    """Comments are left out; a hashtag is a word, and one with a wrong tag is refused."""
    comments = "# sent_id = 3\n#\thttp://x [2009]\n#begin document (x); part 0\n#id\n#\n"
    assert read(comments + "a O\n# more\nb B-A\n") == ([["a", "b"]], [["O", "B-A"]])
    assert read("# text = Vitamin O\na O\n")[0] == [["a"]]
    assert read("#foo B-A\n# # O\n#\tI-A\n")[0] == [["#foo", "#", "#"]]
    assert read("a I-A\n# x\nb I-A\n")[1] == [["B-A", "I-A"]]  # it ends no entity
    wrong("#foo B-C\n", "FILE:1", 'unknown tag "B-C"')
    wrong("#foo B_A\n", "FILE:1", "B_A")


GERMEVAL = "#\tn-tv.de [2005]\n1\tNew York\tB-A\tO\n2\tist\tO\tO\n\n#\tx [2005]\n1\tda\tO\tO\n"
CONLL_U = (
    "# sent_id = 1\n# text = vámonos al\n"
    "1-2\tvámonos\t_\t_\n1\tvamos\tX\tO\n2\tnos\tX\tO\n2.1\tya\t_\t_\n3\tal\tX\tB-A\n\n"
)


def test_running_numbers_are_no_words():
    """Without "word_column" they are refused with their line, and with the key to give."""
    for text, place in ((GERMEVAL, 2), (CONLL_U, 3), ("0 a O\n1 b O\n\n0 c O\n", 1)):
        wrong(text, f"FILE:{place}", "the first column counts 1, 2, 3", '"word_column"')
    texts, _ = read(GERMEVAL, {"word_column": 2})
    assert texts == [["New York", "ist"], ["da"]]
    texts, gold = read(CONLL_U, {"word_column": 2})
    assert texts == [["vamos", "nos", "al"]]  # without the word of two, and that of none
    assert gold == [["O", "O", "B-A"]]


def test_numbers_that_are_words():
    """A sentence may count, where others do not; "word_column" says that all of them do."""
    assert read("1 O\n2 O\n3 O\n\na O\n")[0] == [["1", "2", "3"], ["a"]]
    assert read("1 O\n\n1 O\n")[0] == [["1"], ["1"]]
    assert read("1 O\n2 O\n\n1 O\n3 O\n")[0] == [["1", "2"], ["1", "3"]]
    assert read("1 O\n2 O\n", {"word_column": 1})[0] == [["1", "2"]]
    assert read("a 3-4 O\n3-4 b O\n", {"word_column": 2})[0] == [["3-4", "b"]]


# -------------------------------------------------------------------------------------------------
# the keys of a task file


def test_columns_of_a_task_file(tmp_path):
    """Both columns count from 1, and the training file is read with them."""
    columns = {"word_column": 2, "tag_column": 3}
    task = task_of(tmp_path, train=GERMEVAL, **columns)
    assert task.labels == ("O", "B-A", "I-A")
    assert data.read_split(task, "dev", "FILE", b"7 b I-A X\n") == ([["b"]], [["B-A"]])
    with pytest.raises(UserError, match='FILE:2: no tag in "8 c"; .* column 2, .* column 3'):
        data.read_split(task, "dev", "FILE", b"7 b I-A\n8 c\n")
    with pytest.raises(UserError, match="FILE:1: no .* column 3, .* last column"):
        read("a X O\n", {"word_column": 3})


@pytest.mark.parametrize(
    "row",
    [
        {"word_column": 0},
        {"word_column": True},
        {"word_column": "2"},
        {"word_column": [1, 2]},
        {"word_column": []},
        {"tag_column": 1.0},
        {"tag_column": 1},
        {"word_column": 3, "tag_column": 3},
        {"class_weights": "equal"},
    ],
)
def test_mistakes_in_the_keys(row, tmp_path):
    (key,) = [*row][-1:]
    with pytest.raises(UserError, match=f'task.json: "{key}": expected'):
        task_of(tmp_path, **row)


def test_class_weights(tmp_path):
    task = task_of(tmp_path, class_weights="balanced")
    assert task.options["class_weights"] == "balanced"


def test_many_labels(tmp_path):
    """2,001 labels are allowed, and each word finds its own; a message does not list them all."""
    types = [f"T{number}" for number in range(1000)]
    labels = ["O", *[f"{mark}-{name}" for name in types for mark in "BI"]]
    task = task_of(tmp_path, labels=labels)
    assert task.labels == tuple(labels)
    tags = [f"B-{name}" for name in types]
    arrays = encode_words([["w1"] * 1000], [tags], labels, word_tokenizer(), 1002)
    assert arrays["labels"].tolist() == [IGNORED, *range(1, 2001, 2), IGNORED]
    with pytest.raises(UserError, match="FILE:1: unknown tag") as caught:
        data.read_split(task, "dev", "FILE", b"a B-X\n")
    assert len(str(caught.value)) < 400


# -------------------------------------------------------------------------------------------------
# tags


def test_an_unknown_tag(tmp_path):
    """The message lists the known tags, and says where they come from."""
    task = task_of(tmp_path, train="a B-LOC\n")
    with pytest.raises(UserError) as caught:
        data.read_split(task, "dev", "FILE", b"a O\nb I-ORG\n")
    for words in ('FILE:2: unknown tag "I-ORG"', "O or B-LOC or I-LOC", "training file"):
        assert words in str(caught.value)
    assert '"labels"' in str(caught.value)
    task = task_of(tmp_path, labels=["O", "B-A", "I-A"])
    with pytest.raises(UserError) as caught:
        data.read_split(task, "dev", "FILE", b"b B-ORG\n")
    assert "O or B-A or I-A" in str(caught.value)


@pytest.mark.parametrize("tag", ["S-A", "E-A", "L-A", "U-A", "A", "NOUN", "_", "B-", "I-", "b-A"])
def test_another_scheme(tag, tmp_path):
    """Tags in BIOES, in BILOU or without a mark are refused, and the message names what is read."""
    wrong(f"a O\nb {tag}\n", f'FILE:2: "{tag}"', "IOB1 and BIO2")
    with pytest.raises(UserError, match="train.txt:1: .* IOB1 and BIO2"):
        task_of(tmp_path, train=f"b {tag}\n")


def test_a_line_of_one_column():
    wrong("a O\nB-A\n", "FILE:2", 'no word in "B-A"')
    wrong("a O\nb\n", "FILE:2", 'no tag in "b"')


def test_quotes_are_short():
    """A file without line ends gives no endless message."""
    wrong("x" * 10_000, "FILE:1", "x" * 200 + "...")
    wrong("x " + "y" * 10_000, "FILE:1", "y" * 200 + "...")
    wrong("x B-" + "y" * 10_000, "FILE:1", "y" * 190)


@pytest.mark.parametrize("text", ["a O\nb O\n", ""])
def test_a_training_file_without_entities(text, tmp_path):
    with pytest.raises(UserError, match='train.txt: .*no tag but O; .*"tag_column"'):
        task_of(tmp_path, train=text)
    with pytest.raises(UserError, match='"labels": expected 2 to'):
        task_of(tmp_path, train=text, labels=["O"])


# -------------------------------------------------------------------------------------------------
# predictions


def test_predictions_come_back(tmp_path):
    """What `as_file` writes, `read_predictions` reads, whatever the columns of the task are."""
    kind = kind_with({"word_column": 2, "tag_column": 4})
    texts = [["New York", "#", "#x", "a\u2028b"], ["1", "2"], ["# y = z", "\u00a0", "a  b"]]
    gold = [["B-A", "O", "O", "O"], ["O", "O"], ["O", "B-B", "I-B"]]
    predicted = [["B-B", "I-B", "O", "O"], ["B-A", "B-A"], ["O", "O", "O"]]
    dataset = SimpleNamespace(examples=list(zip(texts, gold)))
    path = tmp_path / "said"
    path.write_text(kind.as_file(predicted, dataset))
    assert kind.read_predictions(path, texts, gold) == predicted
    lines = path.read_text().split("\n")
    assert lines[:2] == ["New York\tB-A\tB-B", "# O I-B"]


def test_predictions_of_numbers(tmp_path):
    """Words that count are no reason to refuse a file of predictions."""
    kind = kind_with({"word_column": 1})
    (tmp_path / "said").write_text("1 O O\n2 O B-A\n")
    assert kind.read_predictions(tmp_path / "said", [["1", "2"]], None) == [["O", "B-A"]]


def test_a_tag_with_a_space_comes_back(tmp_path):
    kind = kind_with(labels=("O", "B-a b", "I-a b"))
    dataset = SimpleNamespace(examples=[(["x"], ["O"])])
    (tmp_path / "said").write_text(kind.as_file([["B-a b"]], dataset))
    assert kind.read_predictions(tmp_path / "said", [["x"]], None) == [["B-a b"]]


# -------------------------------------------------------------------------------------------------
# words that are lost, and sentences without words


def file_of(sentences):
    return "\n".join("".join(f"w{i % 9} O\n" for i in range(length)) for length in sentences)


def test_lost_words_are_an_error(tmp_path, capsys):
    """More than 5% of the words without a token are an error, up to 5% are a warning."""
    task = task_of(tmp_path, dev=file_of([3000]))
    with pytest.raises(UserError) as caught:
        load_dataset(task, "dev", word_tokenizer(), 32, tmp_path)
    words = ("mine dev: 2,970 of 3,000 words (99.0%)", "longest sentence has 3,000 words")
    for word in (*words, "an empty line ends a sentence", "--max-length"):
        assert word in str(caught.value)
    task = task_of(tmp_path, dev=file_of([31] + [3] * 3))  # 1 of 40 is lost
    load_dataset(task, "dev", word_tokenizer(), 32, tmp_path)
    assert "warning: mine dev: 1 of 40 words (2.5%)" in capsys.readouterr().err


def test_lost_words_of_your_own_text_are_a_warning(capsys):
    kind = kind_with()
    rows, texts, gold = kind.from_rows(["w1 " * 300], "FILE")
    arrays = kind.encode(texts, gold, word_tokenizer(), 32)
    assert set(arrays["labels"]) == {IGNORED}
    make_dataset(kind, (texts, gold), arrays, 32)
    assert "warning: mine input: 270 of 300 words" in capsys.readouterr().err


def test_a_sentence_without_words():
    """It has the two tokens of every sentence, no decision, and no tags."""
    arrays = encode_words([[], ["w1"]], [[], ["B-A"]], LABELS, word_tokenizer(), 32)
    assert arrays["lengths"].tolist() == [2, 3]
    assert arrays["labels"].tolist() == [IGNORED, IGNORED, IGNORED, 1, IGNORED]
    kind = kind_with()
    dataset = make_dataset(kind, ([[], ["w1"]], [[], ["B-A"]]), arrays, 32)
    logits = torch.from_numpy(np.eye(len(LABELS))[[0, 0, 0, 1, 0]])
    assert kind.predictions(logits, dataset) == [[], ["B-A"]]


def test_every_row_of_text_has_a_prediction(tiny, kinds, tmp_path, capsys):
    """A row without a word has an empty one."""
    run([*tiny, "--task-file", kinds["tag"], "--max-steps", "1"], tmp_path / "run", method="dense")
    path = tmp_path / "mine.tsv"
    for rows in (["w1 w2", "  ", "w3"], [" "]):
        path.write_text("\n".join(["sentence", *rows]) + "\n")
        capsys.readouterr()
        assert evaluation.main([str(tmp_path / "run"), "--input", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.split("\t")[1] for line in lines] == rows
        counts = [len(line.split("\t")[0].split()) for line in lines]
        assert counts == [len(row.split()) for row in rows]
    path.write_text("sentence\n")
    refused(capsys, [tmp_path / "run", "--input", path], "no row", main=evaluation.main)
