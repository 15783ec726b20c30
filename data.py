"""GLUE, SQuAD, CoNLL-2003 or a task of your own, as token ids in flat numpy arrays.

- `TASKS` has one row for each task. A row holds everything that this program knows about the task.
- A task has one of four kinds. The kind says how its files are read, and what is decided.
- The official files are checked by the sha256 of the sources and by the number of rows.
- A folder of official files is enough to work offline. A read-only folder stays untouched.
- Text is read as the official scripts read it. Tabs and newlines separate, and quotes are text.
- A split is tokenised once. The name of its cache file depends on all that decides the token ids.
- An epoch is a list of index arrays. It depends only on lengths, batch size, seed and epoch.

    python data.py --task mrpc mnli    # download, check and count; training does it by itself too
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import RobertaProcessing

from tools.common import Parser, UserError, atomic_write, cache_home, live, program, read_json
from tools.common import require, tell, writable
from tools.fetch import DEMO, locate

# -------------------------------------------------------------------------------------------------
# tasks

# The kinds of task, and what the metrics of each are called.
#
# kind       decisions per example                what the model reads
# classify   one among the labels                 position 0
# score      one number                           position 0
# span       two: where an answer starts, ends    every position
# tag        one per word among the labels        every position
METRICS_OF = {
    "classify": ("accuracy", "f1", "matthews"),
    "score": ("pearson", "spearman"),
    "span": ("f1", "em"),
    "tag": ("entity_f1", "entity_precision", "entity_recall"),
}
EVERY_POSITION = ("span", "tag")

SPLITS = ("train", "dev", "test")  # MNLI has "dev_mm" and "test_mm" as well


@dataclass
class Task:
    """What this program knows about a task. The defaults are what most tasks of GLUE share."""

    name: str
    folder: str  # the official name, used for the folder and for the file sent to the leaderboard
    labels: tuple  # the class names in the order of Hugging Face's checkpoints; () for a score
    kind: str = "classify"  # or "score", "span", "tag"
    spelling: tuple = ("0", "1")  # the classes as the files and the leaderboard write them
    words: tuple = ("no", "yes")  # the word of each class; for regression, of `low` and of `high`
    metrics: tuple = ("accuracy",)  # the first one selects the best checkpoint
    columns: tuple = ("sentence1", "sentence2")  # one or two columns of text
    label: str = "label"  # the column of labels
    files: dict | None = None  # split -> file in the data folder; None: the usual three
    other_names: dict | tuple = ()  # of some splits: split -> other names of this file
    rows: dict | tuple = ()  # the number of rows of each of these files; () for your own
    sources: tuple = ()  # (address, sha256) of each file that the TSVs are made from
    header: tuple = ()  # the column names, where labelled files have no header line
    drop_broken: bool = False  # whether to drop rows with missing fields, and not refuse them
    low: float = 0.0  # the lowest value that a label of a regression task can have
    high: float = 5.0  # the highest one

    def __post_init__(self):
        if self.files is None:
            self.files = tsvs(self.folder)
        if isinstance(self.rows, tuple):
            self.rows = dict(zip(self.files, self.rows))

    @property
    def regression(self):
        return self.kind == "score"

    @property
    def eval_splits(self):
        """Return the splits to evaluate, each with the ending of its metrics' names."""
        return {name: name.removeprefix("dev") for name in self.files if name.startswith("dev")}


def tsvs(folder):
    """Return the usual files of a task."""
    return {split: f"{folder}/{split}.tsv" for split in SPLITS}


def glue_file(name, sha256):
    """Return the sources of a task that is made from one file of GLUE."""
    return ((f"glue/data/{name}", sha256),)


NLI = ("entailment", "neutral", "contradiction")
ENTAILED = ("entailment", "not_entailment")

# fmt: off
OFFICIAL_TASKS = (
    Task(name="cola", folder="CoLA",
         labels=("unacceptable", "acceptable"), words=("incorrect", "correct"),
         metrics=("matthews",), columns=("sentence",),
         header=("source", "label", "star", "sentence"),
         rows=(8_551, 1_043, 1_063),
         sources=glue_file("CoLA.zip",
                           "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")),
    Task(name="sst2", folder="SST-2",
         labels=("negative", "positive"), words=("terrible", "great"),
         columns=("sentence",),
         rows=(67_349, 872, 1_821),
         sources=glue_file("SST-2.zip",
                           "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")),
    # GLUE may not host MRPC. It is made from the original files and a list of its dev pairs.
    Task(name="mrpc", folder="MRPC",
         labels=("not_equivalent", "equivalent"),
         metrics=("accuracy", "f1"), columns=("#1 String", "#2 String"), label="Quality",
         rows=(3_668, 408, 1_725),
         sources=(
             ("senteval/senteval_data/msr_paraphrase_train.txt",
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             ("senteval/senteval_data/msr_paraphrase_test.txt",
              "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
             ("glue/data/mrpc_dev_ids.tsv",
              "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"))),
    Task(name="stsb", folder="STS-B",
         labels=(), kind="score", spelling=(), metrics=("pearson", "spearman"), label="score",
         rows=(5_749, 1_500, 1_379),
         sources=glue_file("STS-B.zip",
                           "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")),
    # A few rows of QQP have lost their last columns. The official scripts drop these rows.
    Task(name="qqp", folder="QQP",
         labels=("not_duplicate", "duplicate"),
         metrics=("accuracy", "f1"), columns=("question1", "question2"), label="is_duplicate",
         drop_broken=True,
         rows=(363_846, 40_430, 390_965),
         sources=glue_file("QQP-clean.zip",
                           "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")),
    Task(name="mnli", folder="MNLI",
         labels=NLI, spelling=NLI, words=("yes", "maybe", "no"),
         metrics=("accuracy", "accuracy_mm"), label="gold_label",
         files={"train": "MNLI/train.tsv",
                "dev": "MNLI/dev_matched.tsv", "dev_mm": "MNLI/dev_mismatched.tsv",
                "test": "MNLI/test_matched.tsv", "test_mm": "MNLI/test_mismatched.tsv"},
         rows=(392_702, 9_815, 9_832, 9_796, 9_847),
         sources=glue_file("MNLI.zip",
                           "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")),
    Task(name="qnli", folder="QNLI",
         labels=ENTAILED, spelling=ENTAILED, words=("yes", "no"),
         columns=("question", "sentence"),
         rows=(104_743, 5_463, 5_463),
         sources=glue_file("QNLIv2.zip",
                           "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")),
    Task(name="rte", folder="RTE",
         labels=ENTAILED, spelling=ENTAILED, words=("yes", "no"),
         rows=(2_490, 277, 3_000),
         sources=glue_file("RTE.zip",
                           "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")),
    Task(name="wnli", folder="WNLI",
         labels=("not_entailment", "entailment"),
         rows=(635, 71, 146),
         sources=glue_file("WNLI.zip",
                           "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")),
    # The diagnostics come without labels. A model trained on MNLI predicts them.
    Task(name="ax", folder="AX",
         labels=NLI, spelling=NLI, words=("yes", "maybe", "no"),
         metrics=(), label="",
         files={"test": "AX.tsv"}, rows=(1_104,),
         sources=glue_file("AX.tsv",
                           "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")),
    Task(name="squad", folder="SQuAD", kind="span",
         labels=("start", "end"), words=("yes", "no"),
         metrics=("f1", "em"), columns=("question", "context"),
         files={"train": "train-v1.1.json", "dev": "dev-v1.1.json"},
         rows=(87_599, 10_570),
         sources=(
             ("https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json",
              "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
             ("https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
              "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"))),
    Task(name="conll2003", folder="CoNLL-2003", kind="tag",
         labels=("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
         words=("the", "John", "Smith", "company", "Inc", "London", "England", "German", "Cup"),
         metrics=METRICS_OF["tag"],
         files={"train": "CoNLL-2003/train.txt", "dev": "CoNLL-2003/valid.txt",
                "test": "CoNLL-2003/test.txt"},
         other_names={"train": ("train.txt", "eng.train"), "dev": ("valid.txt", "eng.testa"),
                      "test": ("test.txt", "eng.testb")},
         columns=("sentence",),
         rows=(14_041, 3_250, 3_453),
         sources=(
             ("https://data.deepai.org/conll2003.zip",
              "96a104d174ddae7558bab603f19382c5fe02ff1da5c077a7f3ce2ced1578a2c3"),)),
)
# fmt: on

# The demo is described by demo/task.json, which is a task file like yours.
TASKS = {"demo": None} | {task.name: task for task in OFFICIAL_TASKS}


def get_task(name=None, task_file=None):
    """Return the task called `name` (default: the demo), or the one in `task_file`.

    Raises UserError for an unknown name, and where `task_file` describes another task than `name`.
    """
    if name in (None, "demo") and not task_file:
        task_file = DEMO / "task.json"
    if task_file:
        task = read_task_file(Path(task_file))
        same = name in (None, task.name)
        require(same, f"--task {name}: {task_file} describes {task.name}; give one of them")
        return task
    require(name in TASKS, f'unknown task "{name}": expected {", ".join(TASKS)}, or --task-file')
    return TASKS[name]


# -------------------------------------------------------------------------------------------------
# task files


# The keys of a task file, and how many strings each of them holds: those of every kind ...
KEYS = {"name": (1, 1), "train": (1, 1), "dev": (1, 1), "metric": (1, 3)}
MAY_LACK = {"test": (1, 1), "kind": (1, 1)}
# ... and those that a kind has besides them
TSV_KEYS = {"columns": (1, 2), "label": (1, 1), "words": (1, 999)}
KEYS_OF = {
    "classify": TSV_KEYS | {"labels": (2, 999)},
    "score": TSV_KEYS | {"range": (2, 2)},
    "span": {"words": (1, 999)},
    "tag": {"words": (1, 999), "labels": (2, 999)},
}


def read_task_file(path):
    """Return a task of your own, described in JSON.

        {"name": "mine", "train": "train.tsv", "dev": "dev.tsv", "columns": ["question", "answer"],
         "label": "label", "labels": ["bad", "good"], "words": ["no", "yes"], "metric": "accuracy"}
        {"name": "squad-fr", "kind": "span", "train": "train.json", "dev": "dev.json",
         "words": ["yes", "no"], "metric": ["f1", "em"]}

    Paths are relative to the JSON file. "test" may name a third file. "metric" may be a list, and
    the first one selects the best checkpoint. "words" are the label words, which SMP needs.
    "kind" says what the files are, and which other keys there are:
    - "classify" (default): TSVs with a header line. "columns" are one or two columns of text,
      "label" is the column of labels, and "labels" are the strings in it.
    - "score": the same, with "range": [0, 5] in place of "labels". Its two words are for the low
      end and for the high end.
    - "span": JSON files in the form of SQuAD v1.1. Its two words are for the start and the end.
    - "tag": files in the form of CoNLL-2003. "labels" are "O" and the tags in BIO2. Without this
      key they are those of the training file.
    Raises UserError with the key that is wrong.
    """
    row = read_json(path)

    def expect(condition, key, expected):
        require(condition, f'{path}: "{key}": expected {expected}')

    kind = row.get("kind", "score" if "range" in row else "classify")
    expect(kind in list(METRICS_OF), "kind", f"one of {', '.join(METRICS_OF)}")
    counts = KEYS | MAY_LACK | KEYS_OF[kind]
    needed = KEYS if kind in EVERY_POSITION else KEYS | KEYS_OF[kind]
    for key in row:
        require(key in counts, f'{path}: unknown key "{key}"; the keys are {", ".join(counts)}')
    for key in needed:
        expect(key in row, key, "this key, but it is missing")
    ends = row.pop("range", [0, 5])
    numbers = isinstance(ends, list) and {type(end) for end in ends} <= {int, float}
    in_order = numbers and len(ends) == 2 and ends[0] < ends[1]
    expect(in_order, "range", "two numbers, the lower one first")
    values = {}
    for key, value in row.items():
        values[key] = value if isinstance(value, list) else [value]
        distinct = {text for text in values[key] if isinstance(text, str) and text.strip("\0")}
        least, most = counts[key]
        expected = f"{least} to {most} different strings" if most > 1 else "a string, not empty"
        valid = len(distinct) == len(values[key]) and least <= len(distinct) <= most
        expect(valid, key, expected)
    (name,) = values["name"]
    expect(re.fullmatch(r"[\w.-]+", name), "name", "letters, digits, dots and dashes")
    folder = path.resolve().parent
    files = {split: str(folder / values[split][0]) for split in SPLITS if split in values}
    labels = values.get("labels", ())
    columns = values.get("columns", ("sentence",))
    if kind == "span":
        labels = ("start", "end")
        columns = ("question", "context")
    elif kind == "tag":
        there = labels or Path(files["train"]).is_file()
        expect(there, "train", 'a file, because there are no "labels"')
        labels = labels or tags_in(files["train"])
        whole = all_tags(label[2:] for label in labels)
        expect(set(labels) == set(whole), "labels", '"O", and "B-X" and "I-X" for each type X')
    words = values.get("words", ())
    count = len(labels) or 2
    expect(len(words) in (count, 0), "words", f"{count} different strings")
    # F1 and Matthews are those of two classes
    metrics = ("accuracy",) if kind == "classify" and count > 2 else METRICS_OF[kind]
    expect(set(values["metric"]) <= set(metrics), "metric", f"some of {', '.join(metrics)}")
    return Task(
        name=name,
        folder=name,
        kind=kind,
        labels=tuple(labels),
        spelling=tuple(labels),
        words=tuple(words),
        metrics=tuple(values["metric"]),
        columns=tuple(columns),
        label=values.get("label", [""])[0],
        files=files,
        low=float(ends[0]),
        high=float(ends[1]),
    )


def tags_in(path):
    """Return the tags of a file in the form of CoNLL-2003: "O", and B and I of each type."""
    anything = Task(name="", folder="", kind="tag", labels=())
    _, gold = read_conll(anything, "train", path, Path(path).read_bytes())
    return all_tags(tag[2:] for tag in chain(*gold))


def all_tags(types):
    """Return "O", and B and I of each type. The type of "O" is "", which does not count."""
    pairs = [(f"B-{name}", f"I-{name}") for name in sorted(set(types) - {""})]
    return ("O", *chain(*pairs))


# -------------------------------------------------------------------------------------------------
# reading


def read_split(task, split, path, data):
    """Return the texts in the bytes `data` of a file `path`, and what is right for each (`gold`).

    kind              a text                             its gold
    classify, score   a string, or a pair of strings     an int64 class, or a float32 value
    span              a pair (question, context)         (id, [(answer, its first character)])
    tag               a list of words                    a list of tags

    Raises UserError that names the place in the file where something is not as it should be.
    """
    read = {"span": read_squad, "tag": read_conll}.get(task.kind, read_tsv)
    texts, gold = read(task, split, path, data)
    require(texts, f"{path}: no row of data")
    expected = task.rows.get(split, len(texts))
    counts = f"{len(texts)} rows, expected {expected}"
    require(len(texts) == expected, f"{path}: {counts}: not whole, or not the official file")
    return texts, gold


def read_tsv(task, split, path, data):
    """Read a TSV; see `read_split`.

    The gold is None in a test split, and in "lines", which have no header line either.
    """
    labelled = split.startswith(("train", "dev"))
    # not splitlines(), because U+2028 and its like are text
    lines = [line.removesuffix("\r") for line in decode(path, data).split("\n")]
    first = 0 if task.header and (labelled or split == "lines") else 1
    header = lines[0].split("\t") if first else task.header
    wanted = (*task.columns, task.label) if labelled else task.columns
    found = ", ".join(header)
    for name in wanted:
        require(name in header, f'{path}:1: no column "{name}"; the header line has {found}')
    pick = itemgetter(*map(header.index, task.columns))  # from one column a string, from two a pair
    texts = []
    labels = []
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split("\t")
        missing = header[len(fields) :]
        if line == "" or (missing and task.drop_broken):
            continue
        # The official scripts let a row of too many fields pass, and so do we in official files.
        whole = not missing and (len(fields) == len(header) or task.rows)
        hint = f'"{missing[0]}" is missing' if missing else "a tab inside a text?"
        counts = f"{len(fields)} columns, expected {len(header)}"
        require(whole, f"{path}:{number}: {counts}: {hint}")
        texts.append(pick(fields))
        if labelled:
            label = fields[header.index(task.label)]
            labels.append(read_label(task, label, f"{path}:{number}"))
    kind = np.float32 if task.regression else np.int64
    return texts, np.array(labels, kind) if labelled else None


def decode(path, data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise UserError(f"{path}:{number}: {byte} is not UTF-8; convert the file") from None


def read_label(task, text, place):
    """Return the class, or the value of a regression, that `text` at `place` of a file means."""
    try:
        if not task.regression:
            return task.spelling.index(text)
        value = float(text)
        if task.low <= value <= task.high:  # False for nan
            return value
    except ValueError:
        pass  # not one of the classes, or not a number
    expected = " or ".join(task.spelling)
    if task.regression:
        expected = f"a number from {task.low} to {task.high}"
    raise UserError(f'{place}: unknown {task.label} "{text}", expected {expected}')


def read_squad(task, split, path, data):
    """Read a JSON file in the form of SQuAD v1.1; see `read_split`."""
    texts = []
    gold = []
    try:
        articles = json.loads(decode(path, data))["data"]
        json.dumps(articles, ensure_ascii=False).encode()  # a ValueError for half a character
        for article in articles:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    answers = [(a["text"], a["answer_start"]) for a in row.get("answers", [])]
                    texts.append((row["question"].lstrip(), paragraph["context"]))
                    gold.append((row["id"], answers))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not in the form of SQuAD v1.1 ({reason})") from None
    ids = set()
    for (_, context), (name, answers) in zip(texts, gold):
        place = f'{path}: question "{name}"'
        strings = [name, context, *[text for text, _ in answers]]
        valid = all(isinstance(text, str) for text in strings) and name not in ids
        valid = valid and all(type(start) is int for _, start in answers)
        expected = "expected strings, a new id, and answer_start to be whole numbers"
        require(valid, f"{place}: {expected}")
        ids.add(name)
        require(answers or split == "test", f"{place}: no answer; SQuAD v2 is not supported")
        if split == "train":
            text, start = answers[0]
            there = start >= 0 and context.startswith(text or "\0", start)
            found = f'the answer "{text}" is not at character {start} of its context'
            require(there, f"{place}: {found}; answer_start counts Unicode characters")
    return texts, gold


def read_conll(task, split, path, data):
    """Read a file in the form of CoNLL-2003; see `read_split`.

    A line has columns between spaces or tabs: first a word, last its tag. An empty line ends a
    sentence. Tags are in IOB1 or BIO2, and become BIO2. A task without labels accepts any tag.
    """
    texts = []
    gold = []
    words = []
    tags = []
    for number, line in enumerate([*decode(path, data).split("\n"), ""], 1):
        fields = re.split("[ \t]+", line.strip(" \t\r"))
        if fields == [""] or fields[0] == "-DOCSTART-":
            if words:
                texts.append(words)
                gold.append(tags)
            words = []
            tags = []
            continue
        tag = fields[-1]
        before = tags[-1] if tags else "O"
        if tag.startswith("I-") and tag[2:] != before[2:]:
            tag = "B-" + tag[2:]  # in IOB1 the first word of an entity may have I
        known = tag in task.labels if task.labels else re.fullmatch("O|B-.+|I-.+", tag)
        expected = f"expected a word first, and last {' or '.join(task.labels) or 'O, B-X or I-X'}"
        require(known and fields[1:], f'{path}:{number}: "{fields[-1]}" is no tag; {expected}')
        words.append(fields[0])
        tags.append(tag)
    return texts, gold


# -------------------------------------------------------------------------------------------------
# tokens

IGNORED = -100  # the label of a token at which nothing is decided


def load_tokenizer(model_dir, vocab_size):
    """Return the tokenizer of a checkpoint folder, which neither pads nor truncates.

    It is read from tokenizer.json or, without this file, built from BERT's vocab.txt, or from
    RoBERTa's vocab.json and merges.txt. Raises UserError if none is there, or if an id is not below
    `vocab_size`, the rows of the embedding.
    """
    builders = {
        "tokenizer.json": Tokenizer.from_file,
        "vocab.txt": build_tokenizer,
        "vocab.json": build_byte_tokenizer,
    }
    paths = [Path(model_dir, name) for name in builders]
    there = [path for path in paths if path.is_file()]
    require(there, f"{model_dir}: none of {', '.join(builders)}; copy one there")
    path = there[0]
    try:
        tokenizer = builders[path.name](str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer of BERT's kind ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab().values(), default=0)
    fits = largest < vocab_size
    require(fits, f"{path}: ids up to {largest}, but the embedding has {vocab_size} rows")
    return tokenizer


def build_tokenizer(path):
    """Return BERT's tokenizer from vocab.txt, which has one token per line.

    Switches such as "do_lower_case" come from the tokenizer_config.json beside it, if there is one.
    """
    config = Path(path).with_name("tokenizer_config.json")
    config = read_json(config) if config.is_file() else {}
    tokenizer = BertWordPieceTokenizer.from_file(
        path,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: strip them if we lowercase
        lowercase=config.get("do_lower_case", True),
    )
    missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - tokenizer.get_vocab().keys()
    require(not missing, f"no {' '.join(sorted(missing))}")
    return Tokenizer.from_str(tokenizer.to_str())


def build_byte_tokenizer(path):
    """Return RoBERTa's tokenizer from vocab.json and the merges.txt beside it."""
    merges = str(Path(path).with_name("merges.txt"))
    tokenizer = ByteLevelBPETokenizer.from_file(path, merges, trim_offsets=True)
    first, last = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = RobertaProcessing(last, first, add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", mask])
    return Tokenizer.from_str(tokenizer.to_str())


def is_byte_level(tokenizer):
    """Is it RoBERTa's kind, for which a space belongs to the word after it?"""
    return isinstance(tokenizer.pre_tokenizer, ByteLevel)


def word_ids(tokenizer, words):
    """Return the ids of label words. Raises UserError unless each is one token of its own.

    For RoBERTa a word stands after a space, and three have a capital (SMP, released code).
    """
    unknown = tokenizer.token_to_id("[UNK]")
    ids = []
    for word in words:
        if is_byte_level(tokenizer):
            word = " " + (word.capitalize() if word in ("yes", "no", "maybe") else word)
        encoding = tokenizer.encode(word, add_special_tokens=False)
        new = [i for i in encoding.ids if i not in (unknown, *ids)]
        expected = f"expected one token, which no other word has; it is {encoding.tokens}"
        require(len(encoding.ids) == len(new) == 1, f'label word "{word}": {expected}')
        ids += new
    return ids


@dataclass
class Dataset:
    """The n rows of a split. The tokens of row i are ids[starts[i]:starts[i] + lengths[i]].

    A row is an example. Of a "span" task it is a window: as much of a question's context as fits.
    The token type is 0 at first. It is 1 from position second[i] of the row on.
    """

    ids: np.ndarray  # (total number of tokens,) int32
    lengths: np.ndarray  # (n,) int64
    second: np.ndarray  # (n,) int32
    # classify, score: (n,) int64 classes or float32 values; None in a test split
    # span: (n, 2) int64, the positions of the first and the last token of the answer
    # tag: (total,) int64, a class at the first token of a word, else IGNORED
    labels: np.ndarray | None = None
    max_length: int = 512  # no row has more tokens
    kind: str = "classify"
    # span: (total, 2) int32, from which character of the context to which a token reaches, or 0, 0
    # tag: (total,) int32, which word begins at a token, or -1
    places: np.ndarray | None = None
    owner: np.ndarray | None = None  # span: (n,) int64, to which example a window belongs
    examples: list | None = None  # span, tag: [(text, gold)], see `read_split`
    starts: np.ndarray | None = None  # (n,) int64; None: one row follows another

    def __post_init__(self):
        if self.starts is None:
            self.starts = self.lengths.cumsum() - self.lengths

    def __len__(self):
        return len(self.second)

    def tokens(self, row):
        """Return which of `ids` and `places` belong to a row."""
        return slice(self.starts[row], self.starts[row] + self.lengths[row])

    @property
    def gold(self):
        """Return what is right for each example, as the metrics take it."""
        return self.labels if self.examples is None else [gold for _, gold in self.examples]

    @cached_property
    def decision_counts(self):
        """Return the number of labelled decisions of each row, (n,)."""
        if self.kind != "tag":
            return np.full(len(self), self.labels[0].size)
        before = np.append(0, np.cumsum(self.labels != IGNORED))
        return before[self.starts + self.lengths] - before[self.starts]

    def take(self, indices):
        """Return a Dataset of the labelled examples `indices`, which ascend."""
        rows = indices
        if self.owner is not None:
            rows = np.flatnonzero(np.isin(self.owner, indices))
        part = replace(self, **{name: getattr(self, name)[rows] for name in PER_ROW})
        if self.kind != "tag":
            part.labels = self.labels[rows]
        if self.owner is not None:
            part.owner = np.searchsorted(indices, self.owner[rows])
        if self.examples is not None:
            part.examples = [self.examples[i] for i in indices]
        return part

    def split(self, fraction, seed):
        """Return two Datasets, the rest and a random `fraction`. Neither of them is empty."""
        count = len(self.examples or self)
        order = np.random.default_rng(seed).permutation(count)
        cut = np.clip(round(fraction * count), 1, count - 1)
        return [self.take(np.sort(part)) for part in (order[cut:], order[:cut])]


PER_ROW = ("starts", "lengths", "second")


def load_dataset(task, split, tokenizer, max_length, data_dir="data"):
    """Return a split as a Dataset, from the cache if the same text was tokenised before."""
    require(max_length >= 8, f"--max-length {max_length}: expected at least 8")
    data_dir = Path(data_dir)
    path = locate(task, split, data_dir)
    data = path.read_bytes()
    # The key of the cache file is made of all that decides the ids, and of nothing else.
    reading = replace(task, name=split, words=(), metrics=(), files={}, other_names=(), sources=())
    reading.rows = task.rows.get(split)
    described = f"format 2, {max_length}, {reading}, {tokenizer.to_str()}"
    key = hashlib.sha256(hashlib.sha256(data).digest() + described.encode()).hexdigest()[:32]
    folder = data_dir / "cache" if writable(data_dir) else cache_home() / "tokens"
    cached = folder / f"{task.name}-{split}-{key}.safetensors"
    text = None
    if task.kind in EVERY_POSITION:  # the metrics need the text, too
        text = read_split(task, split, path, data)
    try:
        return make_dataset(task, text, safetensors.numpy.load_file(cached), max_length)
    except (OSError, TypeError, SafetensorError):
        pass  # the file is missing or damaged, or it lacks an array, so we tokenise
    text = text or read_split(task, split, path, data)
    arrays = tokenise(task, *text, tokenizer, max_length)
    try:
        atomic_write(cached, safetensors.numpy.save(arrays))
    except OSError as error:
        tell(f"no token cache: {error}", sys.stderr)
    return make_dataset(task, text, arrays, max_length)


def make_dataset(task, text, arrays, max_length):
    """Return the Dataset of these arrays; `text` is from `read_split`."""
    dataset = Dataset(**arrays, max_length=max_length, kind=task.kind)
    if task.kind in EVERY_POSITION:
        dataset.examples = list(zip(*text))
    if task.kind == "tag":
        lost = sum(map(len, text[0])) - np.count_nonzero(dataset.places >= 0)
        text = f"words of {task.name} without a token in --max-length {max_length}: {lost:,}"
        if lost:
            tell(f"warning: {text}; they count as tagged O", sys.stderr)
    return dataset


def tokenise(task, texts, gold, tokenizer, max_length):
    """Return the arrays of a Dataset, by name; `texts` and `gold` are from `read_split`."""
    if task.kind == "span":
        return encode_windows(texts, gold, tokenizer, max_length)
    if task.kind == "tag":
        return encode_words(texts, gold, task.labels, tokenizer, max_length)
    arrays = encode(texts, tokenizer, max_length)
    return arrays if gold is None else arrays | {"labels": gold}


def copy_of(tokenizer):
    """Return a copy, whose settings may be changed."""
    return Tokenizer.from_str(tokenizer.to_str())


def flat(ids, second):
    """Return ids, lengths and second (see Dataset) of the rows `ids`, by name."""
    lengths = np.array([len(row) for row in ids])
    ids = np.concatenate(ids, dtype=np.int32)
    return {"ids": ids, "lengths": lengths, "second": np.array(second, np.int32)}


def encode(texts, tokenizer, max_length):
    """Return the arrays of texts or pairs of texts. Of a pair the longer text is cut first."""
    tokenizer = copy_of(tokenizer)
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids = []
    second = []
    with live("tokenise", len(texts)) as bar:
        for start in range(0, len(texts), 4096):  # in chunks: an Encoding takes much memory
            chunk = tokenizer.encode_batch_fast(texts[start : start + 4096])
            for encoding in chunk:
                ids.append(np.array(encoding.ids, np.int32))
                second.append(len(ids[-1]) - sum(encoding.type_ids))
            bar.update(len(chunk))
    return flat(ids, second)


# Two windows of a context share so many tokens (SMP, released code), but at most half of what a
# question leaves of a row. With more, the library panics or makes dozens of windows.
OVERLAP = 128


def encode_windows(texts, gold, tokenizer, max_length):
    """Return the arrays of questions with the windows of their contexts.

    Raises UserError with the id of a question that leaves no room for its context.
    """
    cutter = copy_of(tokenizer)
    specials = cutter.num_special_tokens_to_add(is_pair=True)
    windows = []
    examples = list(zip(texts, gold))
    for owner, (text, (name, answers)) in enumerate(live("tokenise", None, iterable=examples)):
        size = len(tokenizer.encode(text[0], add_special_tokens=False))
        room = max_length - specials - size
        none = f'question "{name}": its {size} tokens leave no room for the context'
        require(room > 0, f"{none} in --max-length {max_length}")
        cutter.enable_truncation(max_length, stride=min(OVERLAP, room // 2), strategy="only_second")
        first = cutter.encode(*text)
        for window in (first, *first.overflowing):
            windows.append((owner, *read_window(window, answers)))
    owner, ids, second, places, labels = zip(*windows)
    more = {"owner": np.array(owner), "places": np.concatenate(places), "labels": np.array(labels)}
    return flat(ids, second) | more


def read_window(encoding, answers):
    """Return the ids of a window, where its second text begins, its places, and its label.

    The label is the first and the last token of the first answer, or position 0 twice where the
    answer is not wholly in the window (SMP, released code).
    """
    context = np.flatnonzero([text == 1 for text in encoding.sequence_ids])
    places = np.zeros((len(encoding), 2), np.int32)
    places[context] = np.array(encoding.offsets)[context]
    begins, ends = places[context].T
    label = (0, 0)
    if answers and len(context):
        text, start = answers[0]
        end = start + len(text)
        if begins[0] <= start and end <= ends[-1]:
            first = np.searchsorted(begins, start, "right") - 1
            label = (context[first], context[np.searchsorted(ends, end)])
    return encoding.ids, len(encoding) - sum(encoding.type_ids), places, label


def encode_words(texts, gold, labels, tokenizer, max_length):
    """Return the arrays of sentences that are lists of words. Of a long one the end is cut."""
    tokenizer = copy_of(tokenizer)
    tokenizer.enable_truncation(max_length)
    if is_byte_level(tokenizer):
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)  # each word has its space
    rows = []
    for words, tags in zip(texts, gold):
        encoding = tokenizer.encode(words, is_pretokenized=True)
        places = np.array([-1 if word is None else word for word in encoding.word_ids], np.int32)
        places[1:][places[1:] == places[:-1]] = -1  # only the first token of a word counts
        classes = np.array([labels.index(tag) for tag in tags])
        rows.append((encoding.ids, places, np.where(places < 0, IGNORED, classes[places])))
    ids, places, classes = zip(*rows)
    more = {"places": np.concatenate(places), "labels": np.concatenate(classes)}
    return flat(ids, [len(row) for row in ids]) | more


# -------------------------------------------------------------------------------------------------
# batches


def token_sizes(lengths, max_tokens):
    """Return the sizes of batches of examples that are sorted by length, the longest first.

    A batch takes as many examples as fit in `max_tokens` with their padding, and at least one.
    """
    widths = (np.sort(lengths)[::-1] + 7) // 8 * 8  # padded lengths, as in `collate`
    sizes = []
    while len(widths):
        size = max(1, int(max_tokens // widths[0]))
        sizes.append(len(widths[:size]))  # the last batch may be smaller
        widths = widths[size:]
    return sizes


def batches(lengths, batch_size, seed, epoch, max_tokens=0):
    """Return the batches of one epoch, as index arrays. Each example is in one batch.

    The examples are shuffled, sorted by length inside pools of up to 50 batches, and cut. Then the
    batches are shuffled. So padding is rare, and a batch has other examples in every epoch. One
    batch may be short. With `max_tokens`, the batches have up to so many tokens, with padding, in
    place of `batch_size` examples, and their number is the same in every epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if max_tokens:
        order = order[np.argsort(-lengths[order], kind="stable")]
        ends = np.cumsum(token_sizes(lengths, max_tokens))
        cut = np.split(order, ends[:-1])
    else:
        size = batch_size * max(1, min(50, len(lengths) // (4 * batch_size)))  # at least four pools
        pools = np.split(order, range(size, len(order), size))
        pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        cut = np.split(np.concatenate(pools), range(batch_size, len(order), batch_size))
    return [cut[i] for i in rng.permutation(len(cut))]


def micro_batches(batch, count, rank, world, grad_accum):
    """Return this rank's micro-batches of a batch: (rows, factor for the sum of their losses).

    `count` is the number of decisions in the batch. DistributedDataParallel averages over
    ranks. With the factor that average is the mean over the decisions. Every rank must have as many
    micro-batches as the others. Where it has no row left, it takes one with the factor 0.
    """
    most = len(batch[::world])  # examples of rank 0, which has the most
    parts = np.array_split(batch[rank::world], min(grad_accum, most))
    factor = world / max(1, count)
    return [(part, factor) if len(part) else (batch[:1], 0.0) for part in parts]


def collate(dataset, indices, pad_id=0):
    """Return rows as tensors, padded to the longest of them and to a multiple of 8.

    input_ids and token_type_ids are (B, T) int64, and attention_mask is (B, T) bool. If there are
    labels, labels is (B,), int64 classes or float32 values; of "span" (B, 2), of "tag" (B, T).
    rows, (B,) or where every position is read (B, T), says in which row of a table over the whole
    split the logits stand; -1 for padding.
    """
    starts = dataset.starts[indices]  # (B,)
    lengths = dataset.lengths[indices]  # (B,)
    width = min((int(lengths.max()) + 7) // 8 * 8, dataset.max_length)  # T
    position = np.arange(width)  # (T,)
    mask = position < lengths[:, None]  # (T,) < (B, 1) -> (B, T)
    source = starts[:, None] + position  # (B, 1) + (T,) -> (B, T), where each token is in `ids`
    input_ids = np.full(mask.shape, pad_id, np.int64)
    input_ids[mask] = dataset.ids[source[mask]]
    token_type_ids = (mask & (position >= dataset.second[indices][:, None])).astype(np.int64)
    batch = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": mask}
    batch["rows"] = indices
    if dataset.kind in EVERY_POSITION:
        batch["rows"] = np.where(mask, source, -1)
    if dataset.kind == "tag":
        batch["labels"] = np.full(mask.shape, IGNORED)
        batch["labels"][mask] = dataset.labels[source[mask]]
    elif dataset.labels is not None:
        batch["labels"] = dataset.labels[indices]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# -------------------------------------------------------------------------------------------------
# command line


def prepare(task, data_dir="data"):
    """Locate and read every split of a task; return {split: (path, number of rows)}."""
    os.makedirs(data_dir, exist_ok=True)
    found = {}
    for split in task.files:
        path = locate(task, split, data_dir)
        texts, _ = read_split(task, split, path, path.read_bytes())
        found[split] = (path, len(texts))
    return found


@program
def main(argv=None):
    parser = Parser("download, check and count the data of tasks")
    add = parser.add_argument
    add("--task", nargs="+", default=[], metavar="TASK", help=" ".join(TASKS))
    add("--task-file", nargs="+", default=[], metavar="JSON", help="your own task, see README")
    add("--data-dir", default="data", help="where the official files are or go")
    args = parser.parse_args(argv)
    tasks = [get_task(name) for name in args.task]
    tasks += [get_task(None, path) for path in args.task_file]
    require(tasks, "nothing to do: give --task or --task-file")
    for task in tasks:
        for split, (path, rows) in prepare(task, args.data_dir).items():
            print(f"{task.name:8} {split:8} {rows:8,} rows  {path}")


if __name__ == "__main__":
    sys.exit(main())
