"""Files of questions: public forms, mistakes, misplaced answers, labels of odd answers, your own.

tests/test_kinds.py has the metrics, windows and whole runs of the kind "span".
"""

import gzip
import json
from functools import partial

import numpy as np
import pytest
from test_errors import refused, refused_file
from test_train import run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import data
import eval as evaluation
from data import Dataset, get_task, load_dataset, make_dataset
from kinds.span import best_answers, encode_windows
from support.terminal import UserError

CAT = {"id": "q", "question": "who", "answers": [{"text": "cat", "answer_start": 4}]}
TASK = {"name": "mine", "kind": "span", "train": "train.json", "dev": "dev.json", "metric": "f1"}


def kind_with(**options):
    """The kind, as an object, of a task that has no files."""
    about = {"labels": ("start", "end"), "columns": ("question", "context"), "options": options}
    return data.kind_of(data.Task(name="mine", folder="t", kind="span", **about))


def squad(*questions, context="The cat."):
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]})


def asked(name="q", **changes):
    """A question that is right, but for these changes."""
    return CAT | {"id": name} | changes


def answered(*starts, text="cat"):
    return [{"text": text, "answer_start": start} for start in starts]


def read(text, split="train", name="FILE", **options):
    content = text if isinstance(text, bytes) else text.encode()
    return data.read_split(kind_with(**options).task, split, name, content)


wrong = partial(refused_file, read)


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# -------------------------------------------------------------------------------------------------
# files in the form of SQuAD


def test_whole_numbers_are_ids():
    """They become text, as the keys of a file of predictions are."""
    _, gold = read(squad(asked(7), asked("8")))
    assert [name for name, _ in gold] == ["7", "8"]


@pytest.mark.parametrize("name", [3.0, float("nan"), True, None, ["x"], {"x": 1}])
def test_other_ids(name):
    found = f'question number 2: the id "{json.dumps(name)}" is neither a string nor a whole number'
    wrong(squad(asked("a"), asked(name)), found)


def test_a_question_without_an_id():
    wrong(squad({"question": "who", "answers": answered(4)}), 'number 1: the id "null" is neither')


@pytest.mark.parametrize("names", [("a", "a"), (7, 7), (7, "7")])
def test_an_id_that_is_there_twice(names):
    wrong(squad(*map(asked, names)), f'question "{names[1]}": this id is there twice')


@pytest.mark.parametrize("value", [None, 3, ["x"], {"text": "x"}])
def test_texts_that_are_no_strings(value):
    """The file, the question and what is wrong are named."""
    place = 'FILE: question "q"'
    wrong(squad(asked(question=value)), f"{place}: its question is not a string")
    wrong(squad(CAT, context=value), f"{place}: its context is not a string")
    answers = [{"text": value, "answer_start": 4}]
    wrong(squad(asked(answers=answers)), f"{place}: the text of an answer is not a string")
    wrong(squad(asked(answers=[{"answer_start": 4}])), f"{place}: the text of an answer")


@pytest.mark.parametrize("value", [None, "4", 4.0, float("nan"), True, [4]])
def test_places_that_are_no_whole_numbers(value):
    wrong(squad(asked(answers=answered(value))), 'question "q": an answer_start is not a whole')
    wrong(squad(asked(answers=[{"text": "cat"}])), 'question "q": an answer_start is not a whole')


def test_no_answer():
    """It is refused where there should be one, also without the key; a test split needs none."""
    unanswered = {"id": "q", "question": "who"}
    for row in (unanswered, asked(answers=[])):
        for split in ("train", "dev"):
            expected = 'question "q": no answer; SQuAD v2 is not supported; leave such questions'
            wrong(squad(row), expected, split=split)
        assert read(squad(row), "test") == ([("who", "The cat.")], [("q", [])])


@pytest.mark.parametrize("answers", [{"text": ["cat"], "answer_start": [4]}, "cat", None, ["cat"]])
def test_answers_in_another_form(answers):
    wrong(squad(asked(answers=answers)), 'question "q": answers in another form', "datasets libra")


ROW = {"id": "a", "title": "t", "context": "The cat.", "question": "who"}
ROW |= {"answers": {"text": ["cat"], "answer_start": [4]}}
MRQA = {"header": {"dataset": "SQuAD", "split": "train"}}
QAS = {"context": "The cat.", "qas": [{"qid": "1", "question": "who", "answers": ["cat"]}]}


@pytest.mark.parametrize(
    "text, name",
    [
        (lines_of(MRQA, QAS, QAS), "FILE: MRQA's form; expected SQuAD v1.1's"),
        (lines_of(MRQA), "FILE: MRQA's form; expected SQuAD v1.1's"),
        (gzip.compress(lines_of(MRQA, QAS).encode()), "FILE.jsonl.gz: MRQA's form; expected"),
        (lines_of(QAS, QAS), "FILE: JSON lines; expected SQuAD v1.1's"),
        (lines_of(QAS, QAS).replace("\n", "\r\n"), "FILE: JSON lines; expected SQuAD v1.1's"),
        (lines_of(ROW, ROW), "FILE: the form of the datasets library; expected SQuAD v1.1's"),
        (lines_of(ROW), "FILE: the form of the datasets library; expected SQuAD v1.1's"),
        (json.dumps([ROW, ROW]), "FILE: the form of the datasets library; expected"),
        (json.dumps({"data": [ROW]}, indent=1), "FILE: the form of the datasets library; expec"),
        (squad(CAT) + "}", "FILE: not in the form of SQuAD v1.1 (JSONDecodeError: Extra data"),
        (squad("x"), "FILE: not in the form of SQuAD v1.1"),
        ('{"data": {}}', "FILE: no row of data"),
        ('{"data": null}', "FILE: not in the form of SQuAD v1.1"),
        ('{"data": "' + "x" * 9999 + '"}', "FILE: not in the form of SQuAD v1.1"),
        ('{"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]}', "(KeyError: 'context'); expect"),
        ("[" * 99_999, "FILE: not in the form of SQuAD v1.1 (RecursionError"),
        ("", "FILE: not in the form of SQuAD v1.1"),
        (b"\xff", "FILE:1: byte 0xff is not UTF-8"),
    ],
)
def test_files_in_another_form(text, name):
    """The form is named, if it is a known one, and the one that is expected."""
    wrong(text, name, name=name.split(":")[0] if name.startswith("FILE.") else "FILE")


@pytest.mark.parametrize("text", ['{"data": []}', '{"data": [{"paragraphs": []}]}', squad()])
def test_a_file_without_a_question(text):
    wrong(text, "FILE: no row of data")


def test_long_ids_are_cut_in_messages():
    wrong(squad(asked("x" * 999, question=3)), 'question "xxx', 'xxx...": its question is not')
    wrong(squad(asked(["x" * 999])), "xxx...")
    wrong(squad(*[asked(f"{i}" * 999, answers=answered(5)) for i in range(9)]), "000...")


def test_a_packed_file():
    assert read(gzip.compress(squad(CAT).encode()), name="FILE.json.gz") == read(squad(CAT))
    wrong(b"x", "FILE.json.gz: not a whole gzip file", name="FILE.json.gz")


# -------------------------------------------------------------------------------------------------
# answers that are not at their place

SEVEN = squad(asked("a"), *[asked(f"m{i}", answers=answered(5)) for i in range(6)], asked("z"))


def test_misplaced_answers():
    """All are counted, and the first five are named, with the cure."""
    wrong(SEVEN, "FILE: in 6 of 8 questions the answer is not at its answer_start")
    wrong(SEVEN, '"m0, m1, m2, m3, m4"', "Unicode characters", '"skip_misplaced": true')
    read(SEVEN, "dev")
    emoji = "\U0001f600 The cat."
    wrong(squad(asked(answers=answered(7)), context=emoji), "in 1 of 1 questions")  # in UTF-16
    read(squad(asked(answers=answered(6)), context=emoji))


def test_misplaced_answers_are_left_out(capsys):
    """Those of the training file, with one warning; no other mistake is forgiven."""
    texts, gold = read(SEVEN, skip_misplaced=True)
    assert [name for name, _ in gold] == ["a", "z"]
    assert len(texts) == 2
    said = "warning: FILE: in 6 of 8 questions the answer is not at its answer_start; they are left"
    assert capsys.readouterr().err == f"{said} out\n"
    for split in ("dev", "test"):
        assert len(read(SEVEN, split, skip_misplaced=True)[0]) == 8
    read(squad(CAT), skip_misplaced=True)
    assert capsys.readouterr().err == ""
    wrong(squad(asked(answers=answered(5))), "FILE: no row of data", skip_misplaced=True)
    wrong(squad(asked(answers=[])), "no answer", skip_misplaced=True)


@pytest.mark.parametrize("answers", [answered(4, text=""), answered(-4), answered(10**30)])
def test_answers_that_are_nowhere(answers):
    """A training file is refused; a dev file needs no place, and its label is position 0."""
    wrong(squad(asked(answers=answers)), "in 1 of 1 questions")
    texts, gold = read(squad(asked(answers=answers)), "dev")
    arrays = encode_windows(texts, gold, word_piece(), 16)
    assert arrays["labels"].tolist() == [[0, 0]]


def test_task_file(tmp_path):
    """Both options come from it, and have the right type."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps(TASK | {"longest_answer": 50, "skip_misplaced": True}))
    assert get_task(None, path).options == {"longest_answer": 50, "skip_misplaced": True}
    for key, value in (("longest_answer", 0), ("longest_answer", "5"), ("skip_misplaced", 1)):
        path.write_text(json.dumps(TASK | {key: value}))
        with pytest.raises(UserError, match=f'task.json: "{key}": expected'):
            get_task(None, path)


# -------------------------------------------------------------------------------------------------
# labels

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def paired(tokenizer):
    """The tokenizer with [CLS] and [SEP] around one or two texts."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    return tokenizer


def word_piece():
    """A tokenizer as BERT's: small letters, no accents; its pieces have one or two letters."""
    pairs = [a + b for a in LETTERS for b in "aeiou"]
    pieces = ["[CLS]", "[SEP]", "[UNK]", *LETTERS, *pairs, ".", "-"]
    pieces += [f"##{piece}" for piece in [*LETTERS, *pairs]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return paired(tokenizer)


def byte_level(trim):
    """A tokenizer as GPT-2's, whose tokens are bytes; `trim`: those of spaces have no place."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["[CLS]", "[SEP]", *letters, "Ġa", "nb"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("n", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    tokenizer = paired(tokenizer)
    if trim:
        trimmed = processors.ByteLevel(trim_offsets=True)
        tokenizer.post_processor = processors.Sequence([trimmed, tokenizer.post_processor])
    return tokenizer


TOKENIZERS = {"bert": word_piece(), "bytes": byte_level(False), "trimmed": byte_level(True)}


def plain_label(places, answer, start):
    """The label of an answer in a window: the first and the last token that overlap it."""
    context = np.flatnonzero(places[:, 1])
    begins, ends = places[context].T
    end = start + len(answer)
    if not len(context) or start < begins[0] or end > ends[-1]:
        return [0, 0]
    overlap = context[(begins < end) & (ends > start)]
    return [overlap[0], overlap[-1]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_of_ordinary_answers(name):
    """They are the tokens of the answer, in every window.

    Answers begin and end anywhere but at a space: inside of tokens, too, and in characters of
    several bytes, each of which is a token; they straddle windows.
    """
    rng = np.random.default_rng(0)
    letters = [*"abnxyz", *"  ", "é", "ß", "東", "\U0001f600", "-", "B"]
    texts = []
    gold = []
    while len(texts) < 300:
        context = "".join(rng.choice(letters, size=rng.integers(1, 60)))
        start = int(rng.integers(len(context)))
        answer = context[start : start + rng.integers(1, 9)]
        if answer and answer == answer.strip():
            texts.append(("who", context))
            gold.append((str(len(gold)), [(answer, start)]))
    dataset = Dataset(kind_with(), **encode_windows(texts, gold, TOKENIZERS[name], 20))
    held = 0
    for row, owner in enumerate(dataset.owner):
        ((answer, start),) = gold[owner][1]
        places = dataset.places[dataset.tokens(row)]
        assert dataset.labels[row].tolist() == plain_label(places, answer, start)
        held += dataset.labels[row].any()
    assert 150 < held < len(dataset) - 150


def labelled(context, answer, start, tokenizer, length=64):
    """The text between the ends of the label, one for each window; None for position 0."""
    arrays = encode_windows([("who", context)], [("q", [(answer, start)])], tokenizer, length)
    dataset = Dataset(kind_with(), **arrays)
    found = []
    for row, (first, last) in enumerate(dataset.labels):
        places = dataset.places[dataset.tokens(row)]
        found.append(context[places[first, 0] : places[last, 1]] if last else None)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("answer", ["Ulm", "Ulm ", " Ulm", " Ulm ", "Ulm\u3000", "\tUlm\r\n "])
def test_answers_with_spaces(answer, name):
    """Their label is that of the answer without them, in the middle and at both ends."""
    before = len(answer) - len(answer.lstrip())
    for context in (f"in {answer} now.", f"in {answer}", f"{answer} now", answer):
        start = context.index(answer)
        (found,) = labelled(context, answer, start, TOKENIZERS[name])
        assert found.strip() == "Ulm"
        plain = labelled(context, "Ulm", start + before, TOKENIZERS[name])
        assert [found] == plain


@pytest.mark.parametrize(
    "context, answer, found",
    [
        ("in Ulme\u0301 now", "Ulme\u0301", "Ulme"),  # an accent of its own
        ("in Ulme\u0301", "Ulme\u0301", "Ulme"),
        ("in \u0301Ulm now", "\u0301Ulm", "Ulm"),
        ("\u0301Ulm now", "\u0301Ulm", "Ulm"),
        ("in Ulm\u200b\x00 now", "Ulm\u200b\x00", "Ulm"),  # what BERT drops
        ("\u200bUlm", "\u200bUlm", "Ulm"),
        ("in \ufeffUlm \x00", "\ufeffUlm \x00", "Ulm"),
        ("in a \u200b b now", "\u200b b", "b"),
        ("in \u200b now", "\u200b", None),  # no token at all
        ("in  now", " ", None),
        ("in ", " ", None),
    ],
)
def test_answers_with_ends_that_have_no_token(context, answer, found):
    assert labelled(context, answer, context.index(answer), word_piece()) == [found]


def test_answers_with_spaces_in_windows():
    """A window that does not hold the answer wholly has position 0; another one holds it."""
    context = " ".join("abcdefghijklmnopqrstuvwxyz")
    for width in (1, 2, 3):
        for place in range(1, 25 - width):
            start = 2 * place - 1
            answer = context[start : start + 2 * width + 1]  # with a space on each side
            found = labelled(context, answer, start, word_piece(), 12)
            assert set(found) <= {None, answer.strip()}
            assert found == labelled(context, answer.strip(), start + 1, word_piece(), 12)
            assert answer.strip() in found


@pytest.mark.parametrize("context", ["", " ", "\u200b", "\t\x00 "])
def test_a_context_without_a_token(context):
    """It has one window, whose label is position 0, and the predicted answer is empty."""
    texts, gold = read(squad(CAT, context=context), "dev")
    arrays = encode_windows(texts, gold, word_piece(), 16)
    assert arrays["labels"].tolist() == [[0, 0]]
    dataset = make_dataset(kind_with(), (texts, gold), arrays, 16)
    assert best_answers(np.ones((len(dataset.ids), 2)), dataset) == [""]


# -------------------------------------------------------------------------------------------------
# long answers


def test_longest_answer():
    """Predictions have up to so many tokens: 30 without the option."""
    context = " ".join(50 * "a")
    texts = [("who", context)]
    gold = [("q", [("a", 0)])]
    arrays = encode_windows(texts, gold, word_piece(), 64)
    for options, count in (({}, 30), ({"longest_answer": 3}, 3), ({"longest_answer": 49}, 49)):
        dataset = make_dataset(kind_with(**options), (texts, gold), arrays, 64)
        logits = np.zeros((len(dataset.ids), 2))
        start = int(dataset.second[0])
        logits[start, 0] = 1
        logits[start : start + 50, 1] = np.arange(50)
        logits[start, 0] = 99
        assert best_answers(logits, dataset) == [" ".join(count * "a")]
    dataset.kind = kind_with(longest_answer=10**9)
    assert best_answers(logits, dataset) == [context]


def warning_for(longs, losts, fine, capsys, **options):
    """The warning about so many answers of 31 tokens, in no window, and others."""
    context = " ".join(90 * "a")
    names = "pq" * 60
    answers = {"p": context[:61], "q": context[:-2], "a": "a"}
    kinds_of_answers = longs * ["p"] + losts * ["q"] + fine * ["a"]
    texts = [("who", context)] * len(kinds_of_answers)
    gold = [(f"{names}{i}", [(answers[kind], 0)]) for i, kind in enumerate(kinds_of_answers)]
    arrays = encode_windows(texts, gold, word_piece(), 64)
    make_dataset(kind_with(**options), (texts, gold), arrays, 64)
    return capsys.readouterr().err


def test_warning_of_long_answers(capsys):
    """One line has both shares where more than 5% are lost; 5% are not enough."""
    said = warning_for(6, 1, 13, capsys)
    assert said.startswith("warning: mine input: 30.0% of the answers have more than 30 tokens")
    assert "5.0% are not wholly" in said
    assert '"longest_answer"' in said and "--max-length" in said
    assert said.count("\n") == 1
    assert warning_for(1, 1, 18, capsys)
    assert warning_for(1, 0, 19, capsys) == ""
    assert warning_for(0, 1, 19, capsys) == ""
    assert "0.0% of the answers have more than 31 tokens, and 25.0" in warning_for(
        5, 5, 10, capsys, longest_answer=31
    )


def test_no_warning_without_answers(capsys):
    """Your own text and a test split have none."""
    kind = kind_with()
    rows, texts, gold = kind.from_rows([("who", "The cat.")] * 3, "FILE")
    arrays = kind.encode(texts, gold, word_piece(), 16)
    make_dataset(kind, (texts, gold), arrays, 16)
    assert capsys.readouterr().err == ""


def test_no_warning_of_a_character_of_several_tokens(capsys):
    """Its tokens are bytes at one place, and its label ends before it begins; it is not lost."""
    texts, gold = [("who", "in \u6771 now")], [("q", [("\u6771", 3)])]
    arrays = encode_windows(texts, gold, byte_level(True), 64)
    make_dataset(kind_with(), (texts, gold), arrays, 64)
    assert capsys.readouterr().err == ""
    make_dataset(kind_with(longest_answer=2), (texts, gold), arrays, 64)
    assert "100.0% of the answers have more than 2 tokens, and 0.0%" in capsys.readouterr().err


def test_the_warning_comes_from_the_cache_too(tmp_path, capsys):
    """So it does of train and dev."""
    (tmp_path / "task.json").write_text(json.dumps(TASK | {"longest_answer": 1}))
    long = squad(asked(answers=answered(0, text="The cat")))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text(long)
    task = get_task(None, tmp_path / "task.json")
    for split in ("train", "train", "dev", "dev"):
        load_dataset(task, split, word_piece(), 16, tmp_path)
        assert f"warning: mine {split}: 100.0% of the answers" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# files of predictions, and your own text


def test_predictions_with_other_ids(tmp_path, capsys):
    """They are ignored with one warning; so are missing ones; an answer must be a string."""
    path = tmp_path / "said.json"
    kind = kind_with()
    texts, gold = read(squad(asked(1), asked("b"), asked("c")), "dev")
    path.write_text(json.dumps({"x": "no", "b": "dog", "1": "cat", "y" * 300: "", "c": ""}))
    assert kind.read_predictions(path, texts, gold) == ["cat", "dog", ""]
    said = f'warning: {path}: not in the split, so ignored: 2 ids, for example "x"\n'
    assert capsys.readouterr().err == said
    path.write_text(json.dumps({"b": "dog", "y" * 300: ""}))
    assert kind.read_predictions(path, texts, gold) == [None, "dog", None]
    missing, other = capsys.readouterr().err.splitlines()
    assert missing == f'warning: {path}: no answer for 2 ids, for example "1"'
    assert other.endswith('yyy..."')
    message = "said.json: the answer of .* is not a string"
    for name in ("1", "x", "y" * 300):
        path.write_text(json.dumps({name: ["cat"]}))
        with pytest.raises(UserError, match=message) as caught:
            kind.read_predictions(path, texts, gold)
        assert len(str(caught.value)) < 500


PAIRS = [("who", "The cat."), ("what ", "The cat.")]


def test_your_own_questions():
    """A .json is in SQuAD's form, and needs no answers, nor right ones; other files are tables."""
    kind = kind_with()
    unanswered = {"id": 1, "question": "who"}
    text = squad(unanswered, asked("b", question=" what ", answers=answered(99))).encode()
    assert kind.read_input("own.json", text) == PAIRS
    assert kind.read_input("own.json.gz", gzip.compress(text)) == PAIRS
    rows = [{"context": "The cat.", "question": question} for question, _ in PAIRS]
    assert kind.read_input("own.jsonl", lines_of(*rows).encode()[:-1]) == PAIRS
    table = b"context\tquestion\nThe cat.\twho\nThe cat.\twhat \n"
    assert kind.read_input("own.tsv", table) == PAIRS
    header = ("question", "context")
    assert kind.read_input("standard input", b"who\tThe cat.\n", header) == PAIRS[:1]
    with pytest.raises(UserError, match="own.json: not in the form of SQuAD") as caught:
        kind.read_input("own.json", b"who\tThe cat.\n" * 999)
    assert len(str(caught.value)) < 500


def test_a_run_with_files_of_others(tiny, tmp_path, capsys):
    """Integer ids, .gz, spaces around answers, misplaced ones: train, evaluate, predict, label."""
    context = "w1 w2 w3 w4 w5"
    rows = [asked(i, question="w9", answers=answered(5, text=" w3 ")) for i in range(8)]
    rows.append(asked(99, answers=answered(1, text="w5")))
    packed = gzip.compress(squad(*rows, context=context).encode())
    (tmp_path / "train.json.gz").write_bytes(packed)
    (tmp_path / "dev.json.gz").write_bytes(packed)
    task = TASK | {"train": "train.json.gz", "dev": "dev.json.gz", "words": ["yes", "no"]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    flags = [*tiny, "--task-file", str(tmp_path / "task.json"), "--max-steps", "2"]
    refused(capsys, [*flags, "--out", str(tmp_path / "run")], "in 1 of 9 questions the answer")
    (tmp_path / "task.json").write_text(json.dumps(task | {"skip_misplaced": True}))
    run(flags, tmp_path / "run", method="dense")
    assert "they are left out" in capsys.readouterr().err
    said = tmp_path / "said.json"
    argv = [str(tmp_path / "run"), "--predictions", str(said), "--split", "dev"]
    assert evaluation.main(argv) == 0
    assert list(json.loads(said.read_text())) == [*map(str, range(8)), "99"]
    own = tmp_path / "own.json"
    own.write_text(squad({"id": 1, "question": "w9"}, context=context))
    capsys.readouterr()
    assert evaluation.main([str(tmp_path / "run"), "--input", str(own)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert row.endswith(f"\tw9\t{context}")
