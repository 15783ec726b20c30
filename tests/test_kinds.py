"""Question answering ("span") and tagging ("tag"): files, windows, losses, metrics, whole runs."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from test_errors import refused
from test_train import flags_of, interrupted_at, result_of, run, same

import data
import eval as evaluation
import prune
import train
from data import get_task, load_dataset
from kinds import span, tag
from kinds.classify import IGNORED
from models.checkpoint import load_model, save_model
from models.runs import load_run
from models.teacher import Teacher
from models.tokenizer import load_tokenizer, word_ids
from support import fetch
from support.files import atomic_write
from support.terminal import UserError, show
from tools import deploy, report

CPU = torch.device("cpu")
KINDS = ("span", "tag")
METRICS = span.Span.metrics | tag.Tag.metrics
SQUAD_DIR = os.environ.get("SQUAD_DIR", "")
CONLL_DIR = os.environ.get("CONLL_DIR", "")
BERT_DIR = os.environ.get("BERT_DIR", "")

# -------------------------------------------------------------------------------------------------
# metrics

# (prediction, answers, exact match, F1), from the definition of SQuAD's official script
ANSWERS = [
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("the Denver Broncos", ["Denver Broncos"], 1, 1),
    ("a Denver an Broncos the", ["Denver Broncos"], 1, 1),
    ("Denver Broncos", ["Broncos"], 0, 2 / 3),
    ("Broncos Denver", ["Denver Broncos"], 0, 1),
    ("DENVER broncos!", ["Denver, Broncos."], 1, 1),
    ("24-10", ["2410"], 1, 1),
    ("24 10", ["24-10"], 0, 0),
    ("U.S.", ["US"], 1, 1),
    ("theatre", ["atre"], 0, 0),
    ("another", ["nother"], 0, 0),
    ("the", ["a"], 1, 0),
    ("", ["a"], 1, 0),
    ("", ["Denver"], 0, 0),
    (None, ["a"], 0, 0),
    (None, ["Denver"], 0, 0),
    ("Zürich", ["zürich"], 1, 1),
    ("ZÜRICH", ["Zürich"], 1, 1),
    ("Zürich", ["Zurich"], 0, 0),
    ("\u201cyes\u201d", ["yes"], 0, 0),  # only ASCII punctuation goes
    ("10\u00a0000", ["10 000"], 1, 1),  # a no-break space separates words
    ("b b c", ["b c c"], 0, 2 / 3),
    ("b c", ["x", "c", "b c d"], 0, 0.8),
    ("x", ["b c", "x"], 1, 1),
    ("A", ["a b", "b"], 0, 0),
]


def test_exact_match_and_f1():
    """The metrics of each corner case, and their mean over all of them."""
    em = METRICS["em"]
    f1 = METRICS["f1"]
    gold = []
    for number, (text, answers, exact, overlap) in enumerate(ANSWERS):
        right = (str(number), [(answer, 0) for answer in answers])
        assert em([text], [right]) == exact, (text, answers)
        assert f1([text], [right]) == pytest.approx(overlap, abs=1e-12), (text, answers)
        gold.append(right)
    texts, _, exact, overlap = zip(*ANSWERS)
    assert em(texts, gold) == pytest.approx(np.mean(exact))
    assert f1(texts, gold) == pytest.approx(np.mean(overlap))


TAGGED = [
    ("B-A I-A O", {("A", 0, 2)}),
    ("I-A I-A O", {("A", 0, 2)}),  # a stray I opens an entity
    ("B-A B-A", {("A", 0, 1), ("A", 1, 2)}),
    ("B-A I-B", {("A", 0, 1), ("B", 1, 2)}),
    ("O I-B", {("B", 1, 2)}),
    ("O O", set()),
    ("B-A", {("A", 0, 1)}),
]


def test_entities():
    """Where entities begin and end; the end of a sentence ends one."""
    sentences = [tags.split() for tags, _ in TAGGED]
    expected = {(i, *entity) for i, (_, found) in enumerate(TAGGED) for entity in found}
    assert tag.entities(sentences) == expected
    gold = [["B-A", "I-A", "O", "B-B"]]
    predicted = [["B-A", "O", "O", "B-B"]]
    for name, value in (("precision", 0.5), ("recall", 0.5), ("f1", 0.5)):
        assert METRICS[f"entity_{name}"](predicted, gold) == value
    predicted = [["O", "B-A", "O", "B-B"], []]
    assert METRICS["entity_precision"](predicted, [*gold, []]) == 0.5
    for name in ("precision", "recall", "f1"):
        assert METRICS[f"entity_{name}"]([["O"]], [["O"]]) == 0.0


@pytest.mark.real
def test_entity_metrics_are_those_of_seqeval():
    """On 1,000 random tag sequences with strays: precision, recall and F1."""
    seqeval = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
    gold = []
    predicted = []
    for _ in range(1000):
        length = rng.integers(1, 15)
        right = [tags[i] for i in rng.integers(7, size=length)]
        said = [tag if rng.random() < 0.7 else tags[rng.integers(7)] for tag in right]
        gold.append(right)
        predicted.append(said)
    ours = METRICS
    assert ours["entity_f1"](predicted, gold) == pytest.approx(seqeval.f1_score(gold, predicted))
    theirs = seqeval.precision_score(gold, predicted)
    assert ours["entity_precision"](predicted, gold) == pytest.approx(theirs)
    theirs = seqeval.recall_score(gold, predicted)
    assert ours["entity_recall"](predicted, gold) == pytest.approx(theirs)
    for pair in zip(predicted[:200], gold[:200]):
        one = [[tags] for tags in pair]
        theirs = seqeval.f1_score(one[1], one[0], zero_division=0)
        assert ours["entity_f1"](*one) == pytest.approx(theirs)


# -------------------------------------------------------------------------------------------------
# files


def invented(kind, labels=("start", "end")):
    """The kind, as an object, of a task that has no files."""
    return data.kind_of(data.Task(name="t", folder="t", kind=kind, labels=labels))


QUESTION = {"id": "q", "question": "who", "answers": [{"text": "cat", "answer_start": 4}]}


def squad(*questions, context="The cat."):
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]})


def read_squad(text, split="train"):
    return data.read_split(invented("span").task, split, "FILE", text.encode())


def test_squad_file():
    """Questions without their leading spaces, contexts, answers; `answer_start` is in Unicode."""
    texts, gold = read_squad(squad(QUESTION | {"question": "  who? "}))
    assert texts == [("who? ", "The cat.")]
    assert gold == [("q", [("cat", 4)])]
    answers = [{"text": "cat", "answer_start": 2}]
    read_squad(squad(QUESTION | {"answers": answers}, context="\U0001f600 cat"))
    unanswered = {"id": "q", "question": "who"}
    assert read_squad(squad(unanswered), "test")[1] == [("q", [])]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", r"FILE: not in the form of SQuAD v1.1"),
        ("{", "FILE: not in the form of SQuAD v1.1"),
        ('{"data": [{}]}', "FILE: not in the form of SQuAD v1.1 .*paragraphs"),
        ('{"data": []}', "FILE: no row of data"),
        (squad(QUESTION | {"id": 3.0}), 'FILE: question number 1: the id "3.0" is neither'),
        (squad(QUESTION, context=["x"]), 'question "q": its context is not a string'),
        (squad(QUESTION | {"answers": [{"text": "x", "answer_start": "4"}]}), "not a whole number"),
        (squad(QUESTION | {"answers": [{"text": ["x"], "answer_start": 0}]}), "is not a string"),
        (squad(QUESTION, context="\ud800"), "FILE: not in the form .*Unicode"),
        (squad(QUESTION, QUESTION), 'question "q": this id is there twice'),
        (squad(QUESTION | {"answers": []}), 'question "q": no answer; SQuAD v2'),
        (squad(QUESTION, context="A cat."), "FILE: in 1 of 1 questions the answer is not at its"),
        (squad(QUESTION | {"answers": [{"text": "", "answer_start": 4}]}), 'for example "q"'),
        (squad(QUESTION | {"answers": [{"text": "cat", "answer_start": -4}]}), "is not at its"),
    ],
)
def test_mistakes_in_a_squad_file(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_squad(text)
    assert "\n" not in str(caught.value)


def read_conll(text, labels=("O", "B-A", "I-A", "B-B", "I-B")):
    return data.read_split(invented("tag", labels).task, "train", "FILE", text.encode())


def test_conll_file():
    """IOB1 and BIO2 give the same; columns are split by spaces or tabs; documents are skipped."""
    iob1 = "-DOCSTART- -X- O O\n\na X I-A\nb X I-A\nc X B-A\n\n\nd O\r\ne I-B\nf I-A"
    bio2 = "-DOCSTART-\tO\n\na\tB-A\nb\tI-A\nc\tB-A\n\nd\tO\ne\tB-B\nf\tB-A\n\n"
    expected = [["B-A", "I-A", "B-A"], ["O", "B-B", "B-A"]]
    for text in (iob1, bio2):
        words, tags = read_conll(text)
        assert words == [["a", "b", "c"], ["d", "e", "f"]]
        assert tags == expected
    assert read_conll("a\u00a0b O\n")[0] == [["a\u00a0b"]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a O\nb\n", 'FILE:2: no tag in "b"; expected a word in column 1'),
        ("a O\n\nb E-A\n", 'FILE:3: "E-A" is no tag'),
        ("B-A\n", 'FILE:1: no word in "B-A"; expected a word in column 1'),
        ("a I-C\n", 'FILE:1: unknown tag "I-C"; expected O or B-A or'),
        ("\n\n", "FILE: no row of data"),
        ("-DOCSTART- O\n", "FILE: no row of data"),
    ],
)
def test_mistakes_in_a_conll_file(text, message):
    with pytest.raises(UserError, match=message):
        read_conll(text)


def test_where_conll_files_are(tmp_path):
    """The zip without its folder, or the files under either of their names and in two places."""
    task = data.TASKS["conll2003"]
    for folder in (tmp_path / "a", tmp_path / "a" / "CoNLL-2003", tmp_path / "b"):
        folder.mkdir()
    for name in ("a/train.txt", "a/CoNLL-2003/eng.testa", "b/eng.train", "b/eng.testb"):
        (tmp_path / name).write_text("x O\n")
    assert fetch.locate(task, "train", tmp_path / "a").name == "train.txt"
    assert fetch.locate(task, "dev", tmp_path / "a").name == "eng.testa"
    assert fetch.locate(task, "train", tmp_path / "b").name == "eng.train"
    assert fetch.locate(task, "test", tmp_path / "b").name == "eng.testb"
    home = tmp_path / "zip"
    with fetch.zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name in ("train.txt", "valid.txt", "test.txt"):
            archive.writestr(name, name)
    fetch.unpack(tmp_path / "c.zip", home, task.files.values())
    assert (home / "CoNLL-2003" / "valid.txt").read_text() == "valid.txt"


def test_addresses(tmp_path, monkeypatch):
    """SQuAD's two files come from their own addresses, one at a time; GLUE's from the mirror."""
    asked = []

    def refusing(url, timeout):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", refusing)
    monkeypatch.setenv("GLUE_URL", "http://mirror/x")
    monkeypatch.setenv("NANOPRUNE_CACHE", str(tmp_path / "cache"))
    for name, split in (("squad", "dev"), ("conll2003", "train"), ("cola", "train")):
        with pytest.raises(UserError, match="no network; run again, or put"):
            fetch.locate(get_task(name), split, tmp_path)
    assert asked == [
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
        "https://data.deepai.org/conll2003.zip",
        "http://mirror/x/glue/data/CoLA.zip",
    ]


SPAN = {"name": "s", "kind": "span", "train": "t", "dev": "d", "metric": "f1"}
TAG = {"name": "s", "kind": "tag", "train": "t.txt", "dev": "d", "metric": "entity_f1"}


@pytest.mark.parametrize(
    "row, message",
    [
        (SPAN | {"kind": "spans"}, '"kind": expected one of classify, score, span, tag'),
        (SPAN | {"kind": ["span"]}, '"kind": expected one of'),
        (SPAN | {"metric": "accuracy"}, '"metric": expected some of f1, em'),
        (SPAN | {"words": ["yes"]}, '"words": expected 2 different'),
        (SPAN | {"columns": ["a", "b"]}, 'unknown key "columns"; the keys are name, train, dev'),
        (SPAN | {"range": [0, 1]}, 'unknown key "range"'),
        (TAG | {"labels": ["B-A", "I-A"]}, '"labels": expected "O", and "B-X" and "I-X" for'),
        (TAG | {"labels": ["O", "I-A"]}, '"labels": expected "O", and "B-X" and "I-X" for'),
        (TAG | {"labels": ["O", "NOUN"]}, '"labels": expected "O", and "B-X" and "I-X" for'),
        (TAG | {"train": "x.txt"}, '"train": expected a file, because there are no "labels"'),
        (SPAN | {"train": "\0"}, '"train": expected a string, not empty'),
        (TAG | {"words": ["a", "b"]}, '"words": expected 3 different'),
        (TAG | {"metric": "f1"}, '"metric": expected some of entity_f1'),
        ({"name": "s", "kind": "tag", "dev": "d"}, '"train": expected this key'),
    ],
)
def test_mistakes_in_a_task_file(row, message, tmp_path):
    (tmp_path / "t.txt").write_text("a B-A\n")
    (tmp_path / "task.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"task.json: .*{message}"):
        get_task(None, tmp_path / "task.json")


def test_task_files(tmp_path):
    """A task file alone is enough for SQuAD in another language, or CoNLL in German."""
    (tmp_path / "t.txt").write_text("a B-ORG\nb I-LOC\n\nc O\n")
    (tmp_path / "task.json").write_text(json.dumps(TAG))
    task = get_task(None, tmp_path / "task.json")
    assert task.labels == ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
    assert (task.kind, task.words) == ("tag", ())
    (tmp_path / "task.json").write_text(json.dumps(SPAN | {"test": "x"}))
    task = get_task(None, tmp_path / "task.json")
    assert task.labels == ("start", "end")
    assert task.columns == ("question", "context")
    assert list(task.files) == ["train", "dev", "test"]


# -------------------------------------------------------------------------------------------------
# tokens


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny[1], 10_000)


def long_questions(rng, count, words):
    """Questions of 1 to 20 words with contexts of up to `words` words, and where answers stand."""
    texts = []
    gold = []
    for i in range(count):
        question = " ".join(f"w{j}" for j in rng.integers(113, size=rng.integers(1, 21)))
        context = [f"w{j}" for j in rng.integers(113, size=rng.integers(1, words))]
        place = rng.integers(len(context))
        answer = " ".join(context[place : place + rng.integers(1, 5)])
        start = len(" ".join([*context[:place], ""]))
        texts.append((question, " ".join(context)))
        gold.append((str(i), [(answer, start)]))
    return texts, gold


@pytest.mark.parametrize("length", [24, 64, 160, 384])
def test_windows(tokenizer, length):
    """What the windows of a context are.

    - Two neighbours share 128 tokens, or half of the room if that is less, and together they hold
      every token of the context once.
    - The label of a window is its whole answer or, where that is not in it, position 0.
    """
    texts, gold = long_questions(np.random.default_rng(length), 40, 3 * length)
    arrays = span.encode_windows(texts, gold, tokenizer, length)
    dataset = data.Dataset(invented("span"), **arrays, max_length=length)
    assert dataset.lengths.max() <= length
    answered = 0
    for i, ((question, context), (_, [(answer, start)])) in enumerate(zip(texts, gold)):
        asked = len(question.split())
        room = length - 3 - asked
        overlap = min(128, room // 2)
        seen = []
        for row in np.flatnonzero(dataset.owner == i):
            tokens = dataset.tokens(row)
            assert dataset.second[row] == asked + 2
            inside = dataset.places[tokens][asked + 2 : -1]
            assert not dataset.places[tokens][: asked + 2].any()
            assert not dataset.places[tokens][-1].any()
            words = [context[begin:end] for begin, end in inside]
            assert len(words) <= room
            if seen:
                assert words[:overlap] == seen[len(seen) - overlap :]
                assert len(words) > overlap
            seen += words[overlap if seen else 0 :]
            first, last = dataset.labels[row]
            begin, end = inside[0, 0], inside[-1, 1]
            if begin <= start and start + len(answer) <= end:
                answered += 1
                found = context[inside[first - asked - 2, 0] : inside[last - asked - 2, 1]]
                assert found == answer
            else:
                assert first == last == 0
        assert seen == context.split()
    assert answered >= 20
    texts[7] = (" ".join(["w1"] * (length - 3)), "w2")
    with pytest.raises(UserError, match=f'question "7": its {length - 3} tokens leave no room'):
        span.encode_windows(texts, gold, tokenizer, length)


def test_words(tmp_path, tiny, kinds, capsys):
    """The first token of each word has its tag; words that are cut have none, and are counted."""
    vocabulary = Path(tmp_path, "vocab.txt")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "c"]
    vocabulary.write_text("\n".join(pieces))
    tokenizer = load_tokenizer(tmp_path, 100)
    texts = [["abb", "\u200b", "c"], ["c", "ab"], ["c"] * 6, ["c"] * 6, ["c"] * 6]
    gold = [["B-A", "O", "I-A"], ["O", "B-A"], ["O"] * 6, ["O"] * 6, ["O"] * 6]
    arrays = tag.encode_words(texts, gold, ["O", "B-A", "I-A"], tokenizer, 8)
    dropped = -100
    assert arrays["lengths"].tolist() == [6, 5, 8, 8, 8]
    assert arrays["places"].tolist()[:11] == [-1, 0, -1, -1, 2, -1, -1, 0, 1, -1, -1]
    labels = [dropped, 1, dropped, dropped, 2, dropped, dropped, 0, 1, dropped, dropped]
    assert arrays["labels"].tolist()[:11] == labels
    kind = invented("tag", ("O", "B-A", "I-A"))
    dataset = data.make_dataset(kind, (texts, gold), arrays, 8)
    said = capsys.readouterr().err
    assert "warning: t input: 1 of 23 words (4.3%) have no token in --max-length 8; they" in said
    classes = np.array([9, 1, 9, 9, 2, 9, 9, 0, 1, 9, 9] + [0] * 24)
    tags = tag.tags_of_words(kind.task.labels, classes, dataset)
    assert tags[:2] == [["B-A", "O", "I-A"], ["O", "B-A"]]  # the word without a token is O
    assert dataset.decision_counts.tolist() == [2, 2, 6, 6, 6]


def test_best_answers():
    """The best pair over all windows is found exactly: the same as by trying every pair."""
    rng = np.random.default_rng(0)
    words = [f"x{i}" for i in range(70)]
    context = " ".join(words)
    begins = np.cumsum([0, *[len(word) + 1 for word in words[:-1]]])
    spans = np.stack([begins, begins + [len(word) for word in words]], axis=1)
    outside = np.zeros((3, 2), int)
    windows = [spans[:50], spans[20:]]
    places = np.concatenate([np.concatenate([outside, part, outside[:1]]) for part in windows])
    lengths = np.array([54, 54])
    for trial in range(30):
        logits = rng.normal(size=(108, 2)).astype(np.float32)
        logits[[0, 53, 54, 107]] = 99.0  # outside the context
        if trial % 3 == 0:
            logits[3, 0] = logits[52, 1] = 50.0  # too far apart
        dataset = data.Dataset(
            invented("span"),
            np.zeros(108, np.int32),
            lengths,
            np.full(2, 3),
            places=places,
            owner=np.array([1, 1]),
            examples=[(("q", "nothing"), ("a", [])), (("q", context), ("b", []))],
        )
        best = (-np.inf, "")
        for offset, part in ((3, windows[0]), (57, windows[1])):
            for i in range(50):
                for j in range(i, min(i + 30, 50)):
                    total = logits[offset + i, 0] + logits[offset + j, 1]
                    if total > best[0]:
                        best = (total, context[part[i, 0] : part[j, 1]])
        assert span.best_answers(logits, dataset) == ["", best[1]]


# -------------------------------------------------------------------------------------------------
# decisions and losses


def batch_of(kind, kinds, tokenizer, length=24, size=6):
    """The data set of a kind, and the rows of a batch of unequal lengths."""
    task = get_task(None, kinds[kind])
    dataset = load_dataset(task, "train", tokenizer, length, Path(kinds[kind]).parent)
    order = np.argsort(dataset.lengths, kind="stable")
    return dataset, order[:: len(order) // size][:size]


def losses_by_definition(kind, dataset, rows, student, teacher, mode):
    """The mean loss over the decisions of a batch, written out one decision at a time.

    `student` and `teacher` are {row: logits (length, K)}.
    """
    losses = []
    for row in rows:
        said = student[row].double()
        taught = teacher[row].double()
        if kind == "span":
            columns = [(said[:, i], taught[:, i], int(dataset.labels[row][i])) for i in (0, 1)]
        else:
            labels = dataset.labels[dataset.tokens(row)]
            columns = [(said[i], taught[i], int(labels[i])) for i in np.flatnonzero(labels >= 0)]
        for logits, other, label in columns:
            ce = torch.logsumexp(logits, 0) - logits[label]
            log_p = torch.log_softmax(logits / 2, 0)
            p_teacher = torch.softmax(other / 2, 0)
            if mode == "distill":
                kl = (p_teacher * (p_teacher.log() - log_p)).sum()
                ce = 0.5 * ce + 0.5 * 4 * kl
            elif mode == "self":
                p = torch.softmax(logits.detach(), 0)
                a = 1 + (p * p.log()).sum() / np.log(len(p))
                ce = (1 - a) * ce - a * 4 * (p_teacher * log_p).sum()
            losses.append(ce)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mode", ["none", "distill", "self"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind, mode, kinds, tiny, tokenizer):
    """SMP's loss and gradients on a batch are those of the written definition, to 1e-6.

    So they are with 100 more positions of padding, in micro-batches, and as the mean of two ranks.
    """
    dataset, rows = batch_of(kind, kinds, tokenizer)
    form = dataset.kind.form
    words = word_ids(tokenizer, dataset.kind.task.words)
    net = load_model(tiny[1], "words", words=words, dropout=0.0, form=form)
    other = load_model(tiny[1], "classifier", len(words), seed=3, form=form).eval()
    assert dataset.lengths[rows].min() < dataset.lengths[rows].max()
    torch.manual_seed(0)
    positions = net.embeddings.position_embeddings  # room for padding
    positions.weight = torch.nn.Parameter(torch.randn(160, positions.embedding_dim))
    for linears in prune.mask_matrices(net.requires_grad_(False)).values():
        for linear in linears:
            torch.nn.init.normal_(linear.scores)
            linear.mask.copy_(linear.scores > 0)
    scores = [p for p in net.parameters() if p.requires_grad]
    teacher = Teacher({"distill": "RUN", "self": "self", "none": "none"}[mode])
    if mode != "none":
        teacher.table = 5 * dataset.kind.teach(other, dataset, CPU, "fp32")
    taught = {row: (5 * alone(other, dataset, row)).detach() for row in rows}

    student = {row: alone(net, dataset, row) for row in rows}
    loss = losses_by_definition(kind, dataset, rows, student, taught, mode)
    expected = torch.autograd.grad(loss, scores)

    def gradients(parts, padding=0):
        """The loss and gradients of the program, for micro-batches [(rows, factor)]."""
        total = 0.0
        for part, factor in parts:
            batch = pad(dataset.collate(part), padding)
            decided = dataset.kind.decide(net, batch, CPU, "fp32")
            losses = teacher.losses(dataset.kind, decided)
            total = total + losses.sum() * factor
        return float(total.detach()), torch.autograd.grad(total, scores)

    count = dataset.decision_counts[rows].sum()
    ways = {
        "one batch": gradients(data.micro_batches(rows, count, 0, 1, 1)),
        "padded": gradients(data.micro_batches(rows, count, 0, 1, 1), padding=100),
        "micro-batches": gradients(data.micro_batches(rows, count, 0, 1, 4)),
    }
    ranks = [gradients(data.micro_batches(rows, count, rank, 2, 2)) for rank in (0, 1)]
    mean = [(a + b) / 2 for a, b in zip(ranks[0][1], ranks[1][1])]
    ways["ranks"] = ((ranks[0][0] + ranks[1][0]) / 2, mean)
    for name, (value, found) in ways.items():
        assert value == pytest.approx(float(loss.detach()), abs=1e-6, rel=1e-6), name
        for ours, theirs in zip(found, expected):
            assert (ours - theirs).abs().max() < 1e-6, name


def alone(net, dataset, row):
    """The logits (length, K) of one row without padding."""
    ids = torch.from_numpy(dataset.ids[dataset.tokens(row)])[None].long()
    types = (torch.arange(ids.size(1)) >= int(dataset.second[row])).long()[None]
    return net(ids, torch.ones_like(ids, dtype=torch.bool), types)[0]


def pad(batch, more):
    """A batch with `more` positions of padding."""
    batch = dict(batch)
    fills = {"input_ids": 0, "token_type_ids": 0, "attention_mask": False}
    if batch["labels"].shape == batch["rows"].shape:
        fills["labels"] = IGNORED
    fills["rows"] = -1
    for name, fill in fills.items():
        batch[name] = F.pad(batch[name], (0, more), value=fill)
    return batch


# -------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def finished(tiny, kinds, tmp_path_factory):
    """A folder with finished runs KIND-METHOD of the methods dense and smp-s."""
    folder = tmp_path_factory.mktemp("finished")
    of_method = {
        "dense": {"lr": 4e-3, "max_steps": 100},
        "smp-s": {"density": 0.3, "max_steps": 40},
    }
    for kind in KINDS:
        for method, options in of_method.items():
            flags = [*tiny, "--task-file", kinds[kind], "--dropout", "0"]
            result = run(flags, folder / f"{kind}-{method}", method=method, **options)
            main_metric = list(result["metrics"].values())[0]
            assert 0.02 < main_metric < 0.98, result["metrics"]  # so that equal ones mean something
    return folder


@pytest.mark.parametrize("method", prune.CRITERIA)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_runs(kind, method, tiny, kinds, tmp_path):
    """Each method trains on each kind of task, with a teacher, and its loss stays finite."""
    out = tmp_path / "run"
    flags = [*tiny, "--task-file", kinds[kind], "--max-steps", "3"]
    own = {"hold": 0, "ramp": 0.2, "pins_window": 1}
    options = {name: own[name] for name in own.keys() & prune.METHODS[method].uses}
    options |= {"method": method, "eval_every": 2, "teacher": "self"}
    result = run(flags, out, **options)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert [row["step"] for row in log if "teacher" in row] == [2]  # it teaches in the last step
    metrics = {"span": ["f1", "em"], "tag": ["entity_f1", "entity_recall"]}[kind]
    assert list(result["metrics"]) == metrics
    assert evaluation.main([str(out)]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_learns(kind, finished):
    """Dense fine-tuning gets far above chance on the invented task of each kind."""
    metrics = result_of(finished / f"{kind}-dense")["metrics"]
    assert metrics["f1" if kind == "span" else "entity_f1"] > 0.5, metrics


@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_a_teacher(kind, tiny, kinds, tmp_path, capsys):
    """A run with a self-teacher on a held-out part, interrupted and resumed, ends bit for bit so.

    The table is in one file, which the checkpoint names; without it the run is not resumed.
    """
    flags = [*tiny, "--task-file", kinds[kind]]
    options = {"method": "pins", "teacher": "self", "teacher_split": 0.2, "eval_every": 3}
    options |= {"max_steps": 16, "lr": 1e-3, "max_tokens": 300}
    place = flags.index("--batch-size")
    del flags[place : place + 2]
    run(flags, tmp_path / "a", **options)
    again = tmp_path / "b"
    argv = [*flags, *flags_of(**options), "--out", str(again)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune.Pins, "update", interrupted_at(10, prune.Pins.update))
        assert train.main(argv) != 0
    (table,) = again.glob("teacher-*.safetensors")
    whole = table.read_bytes()
    other = to_safetensors({"teacher": 0 * load_file(table)["teacher"]})
    for damaged in (whole[:-1], b"", other):
        table.write_bytes(damaged)
        refused(capsys, [*argv, "--resume"], f"{table}: missing or damaged")
    table.unlink()
    refused(capsys, [*argv, "--resume"], f"{table}: missing or damaged")
    table.write_bytes(whole)
    assert train.main([*argv, "--resume"]) == 0
    same(tmp_path / "a", again)


@pytest.mark.parametrize("method", ["dense", "smp-s"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_predictions(kind, method, finished, tmp_path, capsys):
    """`--score` of a run's predictions prints what the run reported, with the same two decimals."""
    out = finished / f"{kind}-{method}"
    path = tmp_path / "said"
    argv = [str(out), "--predictions", str(path), "--split", "dev"]
    assert evaluation.main(argv) == 0
    task_file = json.loads((out / "config.json").read_text())["settings"]["task_file"]
    capsys.readouterr()
    score = ["--score", str(path), "--task-file", task_file]
    assert evaluation.main(score) == 0
    reported = show(result_of(out)["metrics"])
    assert capsys.readouterr().out == f"{path}: {reported}\n"
    refused(capsys, argv, "is there already", main=evaluation.main)
    text = path.read_text()
    if kind == "span":
        answers = json.loads(text)
        lost = answers.pop("q3")
        path.write_text(json.dumps(answers))
        assert evaluation.main(score) == 0
        assert "no answer for 1 ids, for example" in capsys.readouterr().err
        path.write_text(json.dumps(answers | {"q3": lost, "other": ""}))
        assert evaluation.main(score) == 0
        said = capsys.readouterr()
        assert said.out == f"{path}: {reported}\n"
        assert 'not in the split, so ignored: 1 ids, for example "other"' in said.err
        path.write_text(json.dumps(answers | {"q3": 5}))
        refused(capsys, score, 'the answer of "q3" is not a string', main=evaluation.main)
    else:
        words = [line.split() for line in text.split("\n")]
        assert {len(line) for line in words} == {0, 3}
        path.write_text(text.split("\n", 1)[1])
        right = f'expected "{words[0][0]}"'
        refused(capsys, score, "said: near line 1: found", right, main=evaluation.main)
        path.write_text(text + "\nw1 O O\n")
        message = f'said: near line {len(words) + 1}: found "w1", expected "no line"'
        refused(capsys, score, message, main=evaluation.main)


def test_scores_of_glue_predictions(tiny, finished, tmp_path, capsys):
    """The same in the form of the leaderboard; a lost, an extra and a wrong line are named."""
    out = tmp_path / "run"
    run(tiny, out, method="dense", max_steps=4)
    path = tmp_path / "said.tsv"
    assert evaluation.main([str(out), "--predictions", str(path), "--split", "dev"]) == 0
    capsys.readouterr()
    score = ["--score", str(path), "--task-file", tiny[3]]
    assert evaluation.main(score) == 0
    assert capsys.readouterr().out == f"{path}: {show(result_of(out)['metrics'])}\n"
    lines = path.read_text().splitlines(keepends=True)
    for changed, message in (
        (lines[:-1], 'said.tsv: near line 61: found "no line", expected "59"'),
        ([*lines, "60\tyes\n"], 'said.tsv: near line 62: found "60", expected "no line"'),
        ([lines[0], *lines[2:]], 'said.tsv: near line 2: found "1", expected "0"'),
        ([lines[0], "0\tmaybe\n"], 'unknown prediction "maybe", expected no or yes'),
        (lines[1:], 'no column "index"'),
    ):
        path.write_text("".join(changed))
        refused(capsys, score, message, main=evaluation.main)
    refused(capsys, score[:2], "--score takes --task or --task-file", main=evaluation.main)
    refused(capsys, score[2:], "give RUN, or --score FILE", main=evaluation.main)
    refused(capsys, [*score, "--split", "test"], 'has no "test" split', main=evaluation.main)


def test_input(finished, tmp_path, capsys):
    """Questions are answered from their contexts; the words of a sentence are tagged."""
    path = tmp_path / "mine.tsv"
    path.write_text("question\tcontext\nw1 w62\tw5 w1 w7 w9\nw9\tw9\n")
    capsys.readouterr()
    assert evaluation.main([str(finished / "span-dense"), "--input", str(path)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header == "prediction\tquestion\tcontext"
    answer, question, context = first.split("\t")
    assert answer in context
    assert second.split("\t") == ["w9", "w9", "w9"]
    path.write_text("sentence\nw1 w2 w30\nw12\n")
    assert evaluation.main([str(finished / "tag-smp-s"), "--input", str(path)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header == "prediction\tsentence"
    tags, sentence = first.split("\t")
    assert len(tags.split()) == 3
    assert sentence == "w1 w2 w30"
    path.write_text("sentence\n")
    refused(capsys, [finished / "tag-smp-s", "--input", path], "no row", main=evaluation.main)
    path.write_text("question\tcontext\n" + "w1 " * 30 + "\tw5\n")
    argv = [finished / "span-dense", "--input", path]
    refused(capsys, argv, 'question "number 1": its 30 tokens', main=evaluation.main)


@pytest.mark.parametrize("kind", KINDS)
def test_shipping(kind, finished, kinds, tiny, tmp_path, capsys):
    """A mask file, a compact folder and CSR have the metrics of the run; an export its logits."""
    for method in ("dense", "smp-s"):
        out = finished / f"{kind}-{method}"
        reported = show(result_of(out)["metrics"])
        folder = tmp_path / f"compact-{method}"
        capsys.readouterr()
        assert deploy.main(["compact", str(out), str(folder)]) == 0
        assert f"after: {reported}" in capsys.readouterr().out
        assert deploy.main(["evaluate", str(folder)]) == 0
        assert reported in capsys.readouterr().out
        assert deploy.main(["sparse", str(out), "--no-check"]) == 0
        assert reported in capsys.readouterr().out
    mask = tmp_path / "mask"
    assert deploy.main(["save-mask", str(finished / f"{kind}-smp-s"), str(mask)]) == 0
    argv = ["masks", tiny[1], str(mask), "--task-file", kinds[kind]]
    assert deploy.main(argv) == 0
    assert reported in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_reports(kind, finished, tiny, kinds, tmp_path, capsys):
    """A run ranked anew at its own density has its own metrics; a run with a pattern has a row."""
    out = finished / f"{kind}-smp-s"
    reported = show(result_of(out)["metrics"])
    assert report.main([str(out), "--density", "0.5", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f": {reported}")
    if kind == "span":  # the small model says the same of every word
        assert not lines[-2].endswith(f": {reported}")
    flags = [*tiny, "--task-file", kinds[kind], "--max-steps", "4", "--density", "0.5"]
    run(flags, tmp_path / "head", method="smp-s", pattern="head")
    assert report.main([str(out), str(tmp_path / "head")]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [f"| {kind}s | smp-s" in row for row in rows] == [True, True]
    assert "(head)" in rows[0]


@pytest.mark.parametrize("mlm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_compute_the_same(kind, mlm, finished, tiny, kinds, tmp_path):
    """An exported folder, loaded as the class it names, has the logits of the run.

    Without an MLM head the rows of its linear layer are the embeddings of the label words.
    """
    net, task, tokenizer, _ = load_run(finished / f"{kind}-smp-s")
    if not mlm:
        shutil.copytree(tiny[1], tmp_path / "base")
        tensors = load_file(tmp_path / "base" / "model.safetensors")
        tensors = {name: t for name, t in tensors.items() if not name.startswith("cls.")}
        atomic_write(tmp_path / "base" / "model.safetensors", to_safetensors(tensors))
        words = net.words.tolist()
        net = load_model(tmp_path / "base", "words", words=words, form=net.form)
    deploy.write_export(tmp_path / "out", net, task, tokenizer, 24)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    trained = {"span": "BertForQuestionAnswering", "tag": "BertForTokenClassification"}[kind]
    assert config["architectures"] == ["BertForMaskedLM" if mlm else trained]
    ids = torch.randint(5, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    if mlm:
        loaded = load_model(tmp_path / "out", "words", words=config["label_word_ids"])
        logits = loaded.eval().mlm_logits(*inputs)[..., config["label_word_ids"]]
    else:
        count = len(task.labels)
        loaded = load_model(tmp_path / "out", "classifier", count, new_head=False, form=net.form)
        logits = loaded.eval()(*inputs)
    assert (logits - net.eval()(*inputs)).abs().max() < 1e-6


def test_without_label_words(tiny, kinds, tmp_path, capsys):
    """Only SMP needs label words."""
    row = json.loads(Path(kinds["tag"]).read_text())
    del row["words"]
    for split in ("train", "dev"):
        row[split] = str(Path(kinds["tag"]).parent / row[split])
    (tmp_path / "task.json").write_text(json.dumps(row))
    flags = [*tiny, "--task-file", str(tmp_path / "task.json"), "--max-steps", "2"]
    refused(capsys, [*flags, "--out", tmp_path / "a"], 'give "words" in the task file')
    run(flags, tmp_path / "b", method="dense")


def test_recipes():
    """The published settings of SQuAD, and those of a task file of the same kind."""

    model = {"model": str(Path(__file__).parent / "golden/tiny-bert")}

    def settings(method, **given):
        return train.settings_from(model | {"task": "squad", "method": method} | given)

    smp = settings("smp-s")
    assert (smp.max_length, smp.batch_size, smp.epochs, smp.ramp) == (384, 32, 10, 0.819)
    assert (smp.score_lr, smp.reg_lambda, smp.temperature_s) == (2e-2, 400.0, 1.0)
    assert settings("smp-s", density=0.03).epochs == 20
    half = settings("smp-s", density=0.5)
    assert (half.temperature_s, half.ramp) == (4.0, 0.181)
    assert settings("smp-s", density=0.5, teacher="x").temperature_s == 1.0
    dense = settings("dense")
    assert (dense.lr, dense.epochs, dense.max_length) == (5e-5, 3, 384)
    pins = settings("pins")
    assert (pins.density, pins.beta2, pins.epochs, pins.batch_size) == (0.1, 0.95, 10, 16)
    assert settings("movement").hold == 0.0975
    tags = train.settings_from(model | {"task": "conll2003", "method": "dense"})
    assert (tags.max_length, tags.lr, tags.batch_size) == (256, 5e-5, 8)


# -------------------------------------------------------------------------------------------------
# real data and transformers


@pytest.fixture(scope="module")
def hf():
    if not BERT_DIR:
        pytest.skip("needs BERT_DIR")
    return pytest.importorskip("transformers")


def real_task(folder, kind, train_file, dev_file):
    """A task over real files; skip where `folder` is not given."""
    if not Path(folder or "missing").is_dir():
        pytest.skip("needs SQUAD_DIR and CONLL_DIR")
    labels = () if kind == "span" else data.TASKS["conll2003"].labels
    files = {"train": str(Path(folder, train_file)), "dev": str(Path(folder, dev_file))}
    return SimpleNamespace(kind=kind, labels=labels or ("start", "end"), files=files)


@pytest.mark.real
def test_real_windows(hf):
    """The windows of 500 real questions are those of a fast tokenizer of transformers.

    The questions that are at hand have 9,806 and 2,373 windows of 384 tokens.
    """
    counts = {}
    for split, name in (("train", "train-part.json"), ("dev", "dev-part.json")):
        task = real_task(SQUAD_DIR, "span", "train-part.json", "dev-part.json")
        text = Path(task.files[split]).read_bytes()
        kind = invented("span")
        texts, gold = data.read_split(kind.task, split, name, text)
        tokenizer = load_tokenizer(BERT_DIR, 30522)
        arrays = span.encode_windows(texts, gold, tokenizer, 384)
        counts[split] = len(arrays["owner"])
        if split == "train":
            chosen = range(0, len(texts), len(texts) // 500)
            dataset = data.Dataset(kind, **arrays)
    assert counts == {"train": 9806, "dev": 2373}
    theirs = hf.AutoTokenizer.from_pretrained(BERT_DIR)
    texts, gold = data.read_split(kind.task, "train", "", Path(task.files["train"]).read_bytes())
    for i in chosen:
        encoded = theirs(
            *texts[i],
            max_length=384,
            stride=128,
            truncation="only_second",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = np.flatnonzero(dataset.owner == i)
        assert len(rows) == len(encoded["input_ids"])
        for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"]):
            assert dataset.ids[dataset.tokens(row)].tolist() == ids
            second = dataset.second[row]
            places = dataset.places[dataset.tokens(row)]
            assert places[second:-1].tolist() == [list(pair) for pair in offsets[second:-1]]


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_real_classes_of_transformers(kind, hf, tmp_path):
    """Logits of random small models, and of a real one, are those of transformers, to 1e-5.

    The folders of either side load on the other without a missing or an unexpected key.
    """
    name = {"span": "BertForQuestionAnswering", "tag": "BertForTokenClassification"}[kind]
    count = {"span": 2, "tag": 9}[kind]
    labels = [f"L{i}" for i in range(count)]
    small = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
    small = hf.BertConfig(**small, num_attention_heads=3, num_labels=count)
    kind_of_model = getattr(hf, name)
    torch.manual_seed(0)
    kind_of_model(small).save_pretrained(tmp_path / "small")
    real = kind_of_model.from_pretrained(BERT_DIR, num_labels=count)
    real.save_pretrained(tmp_path / "real")
    for source in ("small", "real"):
        form = data.KINDS[kind].form
        net = load_model(tmp_path / source, "classifier", count, new_head=False, form=form).eval()
        folder = tmp_path / f"{source}-ours"
        save_model(folder, net, net.state_dict(), labels)
        for path in (tmp_path / source, folder):
            theirs, info = kind_of_model.from_pretrained(path, output_loading_info=True)
            assert not any(info.values()), info
            ids = torch.randint(1, 99, (4, 20), generator=torch.Generator().manual_seed(1))
            mask = torch.arange(20) < torch.tensor([[20], [7], [12], [3]])
            types = (torch.arange(20) > 5).long().expand(4, -1)
            with torch.no_grad():
                ours = net(ids, mask, types)
                said = theirs.eval()(ids, attention_mask=mask, token_type_ids=types)
            if kind == "span":
                logits = torch.stack([said.start_logits, said.end_logits], dim=-1)
            else:
                logits = said.logits
            assert (ours - logits)[mask].abs().max() < 1e-5


@pytest.mark.real
def test_real_conll():
    """The real files have the published numbers of sentences, words and entities."""
    counts = {"eng.train": (14041, 203621, 23499), "eng.testa": (3250, 51362, 5942)}
    for name, expected in counts.items():
        real_task(CONLL_DIR, "tag", name, name)
        task = get_task("conll2003")
        split = "train" if name == "eng.train" else "dev"
        path = fetch.locate(task, split, CONLL_DIR)
        texts, tags = data.read_split(task, split, path, path.read_bytes())
        entities = tag.entities(tags)
        assert (len(texts), sum(map(len, texts)), len(entities)) == expected


def test_the_word_tokenizer_is_not_changed(tokenizer):
    """Encoding leaves the settings of the tokenizer as they were."""
    before = tokenizer.to_str()
    span.encode_windows([("w1", "w2 " * 50)], [("a", [])], tokenizer, 24)
    tag.encode_words([["w1"]], [["O"]], ["O"], tokenizer, 8)
    assert tokenizer.to_str() == before
