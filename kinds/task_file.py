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
    """Return the fields of a Task that a JSON file describes, see `task_fields`."""
    return task_fields(read_json(path), path)


def task_fields(row, path):
    """Return the fields of a Task that the object of a JSON file describes.

        {"name": "mine", "train": "train.tsv", "dev": "dev.tsv", "columns": ["question", "answer"],
         "label": "label", "labels": ["bad", "good"], "words": ["no", "yes"], "metric": "accuracy"}

    Paths are relative to the JSON file. docs/methods.md explains every key (To add a task). Among
    them are "kind", which says what the files are, and "positive": without it the metric "f1" is F1
    of the second label. Raises UserError with the key that is wrong.
    """

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
