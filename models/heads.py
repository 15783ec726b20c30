"""Which rows of a checkpoint's output head are taken: they go by the names of their labels."""

import re
from pathlib import Path

from support.files import read_json
from support.terminal import UserError, quote, tell


def arrange_head(folder, tensors, name, labels, new_head, per_token):
    """Put the rows of the output head `name` into the order of `labels`, or remove the head.

    It stays where config.json names these labels, in whatever order and case. A head that was for
    every token (`per_token`) does not stay. A line says so or, where there may be no new head, a
    UserError.
    """
    found = [n for n in tensors if n in (f"{name}.weight", f"{name}.bias")]
    if not found:
        return
    theirs = label_names(folder, name)
    if len(labels) == 1 and theirs == [] and not new_head:
        theirs = list(labels)  # a single value has no order
    rows = {len(tensors[n]) for n in found}
    if per_token:
        theirs = []
    for spell in (str, str.casefold):
        wanted = [spell(label) for label in labels]
        there = [spell(label) for label in theirs]
        if rows == {len(set(wanted))} and sorted(wanted) == sorted(there):
            order = [there.index(label) for label in wanted]
            for n in found:
                tensors[n] = tensors[n][order]
            return
    whose = quote(", ".join(theirs)) if theirs else f"{max(rows)} labels without names"
    if per_token:
        whose = "every token, without a pooler"
    if not new_head:
        expected = quote(", ".join(labels))
        raise UserError(f"{folder}: its output head is for {whose}; expected {expected}")
    for n in found:
        del tensors[n]
    tell(f"{folder}: its output head is for {whose}; a new one is drawn")


def label_names(folder, name):
    """Return the labels of the rows of the output head `name`; [] where they have no names."""
    names = read_json(Path(folder) / "config.json").get("id2label") or {}
    try:
        names = [str(names[number]) for number in sorted(names, key=int)]
    except (TypeError, ValueError):
        return []
    if all(re.fullmatch(r"LABEL_\d+", text) for text in names):
        return ["start", "end"] if name == "qa_outputs" else []  # which its class says
    return names
