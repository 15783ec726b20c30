"""A task of your own, described in JSON."""

import re

from kinds import KINDS
from support.files import read_json
from support.terminal import UserError, quote

SPLITS = ("train", "dev", "test")
# The keys of every kind, and how many strings each of them holds.
KEYS = {"name": (1, 1), "train": (1, 1), "dev": (1, 1), "metric": (1, 4)}
MAY_LACK = {"test": (1, 1), "kind": (1, 1)}


def read_task_file(path):
    """Return the fields of a Task that a JSON file describes.

        {"name": "mine", "train": "train.tsv", "dev": "dev.tsv", "columns": ["question", "answer"],
         "label": "label", "labels": ["bad", "good"], "words": ["no", "yes"], "metric": "accuracy"}
        {"name": "squad-fr", "kind": "span", "train": "train.json", "dev": "dev.json",
         "words": ["yes", "no"], "metric": ["f1", "em"]}

    Paths are relative to the JSON file. "test" may name a third file. "metric" may be a list, and
    the first one selects the best checkpoint. "words" are the label words, which SMP needs.
    "kind" says what the files are, and which other keys there are:
    - "classify" (default): TSVs with a header line, .csv (RFC 4180) or .jsonl (an object on each
      line). "columns" are one or two columns of text, "label" is the column of labels, and "labels"
      are the strings or whole numbers in it. "quoted": true reads a TSV whose fields are quoted, as
      pandas writes it. The metric "f1" is F1 of the second label, and of another one with
      "positive": LABEL, which more than two labels need. "macro_f1" is the mean of F1 over all
      labels; a label that is neither predicted nor there counts 0. "matthews" is for two labels.
      "class_weights": "balanced" weighs the losses of rare labels more; their mean weight is 1.
    - "score": the same files, with "range": [0, 5] in place of "labels". Its two words are for the
      low end and for the high end.
    - "span": JSON files in the form of SQuAD v1.1. Its two words are for the start and the end.
      "longest_answer": N predicts answers of up to N tokens, not 30. "skip_misplaced": true leaves
      out the questions of the training file whose answer is not at its place.
    - "tag": files in the form of CoNLL-2003. "labels" are "O" and the tags in BIO2. Without this
      key they are those of the training file. "word_column" and "tag_column", counted from 1, are
      the first and the last column if they are not given. "class_weights" is as above.
    A name that ends in .gz is unpacked. Raises UserError with the key that is wrong.
    """
    row = read_json(path)

    def expect(condition, key, expected):
        if not condition:
            raise UserError(f'{path}: "{key}": expected {expected}')

    name = row.get("kind", "score" if "range" in row else "classify")
    expect(name in list(KINDS), "kind", f"one of {', '.join(KINDS)}")
    kind = KINDS[name]
    values = strings_in(row, kind, path, expect)
    (name,) = values["name"]
    expect(re.fullmatch(r"[\w.-]+", name), "name", "letters, digits, dots and dashes")
    folder = path.resolve().parent
    values["files"] = {split: str(folder / values[split][0]) for split in SPLITS if split in values}
    known = set(values["metric"]) <= set(kind.metrics)
    expect(known, "metric", f"some of {', '.join(kind.metrics)}")
    options = options_in(row, kind, expect)
    own = kind.describe(values | options, expect)
    words = tuple(values.get("words", ()))
    count = len(own["labels"]) or 2
    expect(len(words) in (count, 0), "words", f"{count} different strings")
    return {
        "name": name,
        "folder": name,
        "kind": kind.name,
        "words": words,
        "metrics": tuple(values["metric"]),
        "files": values["files"],
        **own,
        "options": options | own.get("options", {}),
    }


def strings_in(row, kind, path, expect):
    """Return {key: list} of a task file, after a check of its keys and of their strings."""
    counts = KEYS | MAY_LACK | kind.keys
    for key in row:
        if key not in counts | kind.options:
            known = ", ".join(counts | kind.options)
            raise UserError(f"{path}: unknown key {quote(key)}; the keys are {known}")
    for key in (*KEYS, *sorted(kind.needed)):
        expect(key in row, key, "this key, but it is missing")
    values = {}
    for key in row:
        if key not in counts:
            continue
        found = row[key] if isinstance(row[key], list) else [row[key]]
        if key == "labels":
            found = [as_text(label) for label in found]
        values[key] = found
        if counts[key] is None:
            continue
        least, most = counts[key]
        distinct = {text for text in found if isinstance(text, str) and text.strip("\0")}
        valid = len(distinct) == len(found) and least <= len(found) <= most
        several = f"{least} to {most:,} different strings"
        expect(valid, key, several if most > 1 else "a string, not empty")
    return values


def as_text(label):
    """Return a label as text; a file may have whole numbers."""
    return str(label) if type(label) is int else label


def options_in(row, kind, expect):
    """Return {key: value} of the further keys of a kind, after a check of their values.

    `kind.options` says for each key what it holds: bool, int (from 1 on), str, or a tuple of the
    values that it can have.
    """
    options = {}
    for key, allowed in kind.options.items():
        if key not in row:
            continue
        value = options[key] = as_text(row[key]) if allowed is str else row[key]
        if isinstance(allowed, tuple):
            expect(value in allowed, key, " or ".join(map(repr, allowed)))
        elif allowed is int:
            expect(type(value) is int and value > 0, key, "a whole number from 1 on")
        else:
            names = {bool: "true or false", str: "a string"}
            expect(type(value) is allowed, key, names[allowed])
    return options
