"""The kind "tag": each word of a sentence has a tag, as in CoNLL-2003."""

import re
import sys
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from kinds.classify import IGNORED, Classify
from kinds.metrics import shared_words
from kinds.text import check_lines, copy_of, decode, flat
from support.terminal import UserError, tell

# ---------- metrics -------------------------------------------------------------------------------


def entities(sentences):
    """Return {(sentence, type, first word, word after the last)} of lists of tags, as conlleval.

    A tag I that continues nothing begins an entity.
    """
    found = set()
    for number, tags in enumerate(sentences):
        inside = ""  # the type of the entity that goes on
        first = 0  # its first word
        for place, tag in enumerate([*tags, "O"]):
            if inside and tag != f"I-{inside}":
                found.add((number, inside, first, place))
                inside = ""
            if not inside and tag != "O":
                inside = tag[2:]
                first = place
    return found


def entity_f1(predicted, gold):
    return shared_words(entities(predicted), entities(gold))


def entity_precision(predicted, gold):
    """Return the fraction of the predicted entities that are right, 0 where there are none."""
    found = entities(predicted)
    return len(found & entities(gold)) / max(1, len(found))


def entity_recall(predicted, gold):
    return entity_precision(gold, predicted)


# ---------- the kind ------------------------------------------------------------------------------


class Tag(Classify):
    """One decision per word: its tag, read at its first token."""

    name = "tag"
    form = "per token"
    every_position = True
    label_per_token = True
    keeps_text = True
    picks_label = False
    metrics = {
        "entity_f1": entity_f1,
        "entity_precision": entity_precision,
        "entity_recall": entity_recall,
    }
    keys = {"words": (1, 999), "labels": (2, 999)}
    needed = {}

    @classmethod
    def describe(cls, values, expect):
        labels = tuple(values.get("labels", ()))
        path = values["files"]["train"]
        there = labels or Path(path).is_file()
        expect(there, "train", 'a file, because there are no "labels"')
        labels = labels or tags_in(path)
        complete = all_tags(label[2:] for label in labels)
        expect(set(labels) == set(complete), "labels", '"O", and "B-X" and "I-X" for each type X')
        return {"labels": labels, "spelling": labels, "columns": ("sentence",)}

    def read(self, role, path, data):
        return read_conll(path, data, self.task.labels)

    def encode(self, texts, gold, tokenizer, max_length):
        return encode_words(texts, gold, self.task.labels, tokenizer, max_length)

    def check(self, dataset):
        words = sum(len(words) for words, _ in dataset.examples)
        lost = words - np.count_nonzero(dataset.places >= 0)
        if lost:
            where = f"words of {self.task.name} without a token in --max-length"
            text = f"{where} {dataset.max_length}: {lost:,}"
            tell(f"warning: {text}; they count as tagged O", sys.stderr)

    def predictions(self, logits, dataset):
        return tags_of_words(self.task.labels, logits.argmax(dim=1).numpy(), dataset)

    def spell(self, predicted, exact=False):
        return [" ".join(tags) for tags in predicted]

    def as_file(self, predicted, dataset, exact=False):
        sentences = []
        for (words, gold), tags in zip(dataset.examples, predicted):
            sentences.append("".join(f"{' '.join(row)}\n" for row in zip(words, gold, tags)))
        return "\n".join(sentences)

    def read_predictions(self, path, texts, gold):
        found, predicted = read_conll(path, Path(path).read_bytes(), self.task.labels)
        lines = chain(*[(*words, "") for words in texts])  # "" is the empty line after a sentence
        check_lines(path, lines, chain(*[(*words, "") for words in found]))
        return predicted

    def from_rows(self, rows, path):
        """Return what is in sentences with spaces between their words; empty ones are skipped."""
        rows = [row for row in rows if row.split()]
        if not rows:
            raise UserError(f"{path}: no row of data")
        texts = [row.split() for row in rows]
        return rows, texts, [["O"] * len(words) for words in texts]


# ---------- files ---------------------------------------------------------------------------------


def read_conll(path, data, labels):
    """Return [words] and [tags] of the sentences in a file in the form of CoNLL-2003.

    A line has columns between spaces or tabs: first a word, last its tag. An empty line ends a
    sentence. Tags are in IOB1 or BIO2, and become BIO2. Without `labels`, any tag is accepted.
    Raises UserError with the line that is wrong.
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
        known = tag in labels if labels else re.fullmatch("O|B-.+|I-.+", tag)
        if not known or len(fields) < 2:
            expected = f"expected a word first, and last {' or '.join(labels) or 'O, B-X or I-X'}"
            raise UserError(f'{path}:{number}: "{fields[-1]}" is no tag; {expected}')
        words.append(fields[0])
        tags.append(tag)
    return texts, gold


def tags_in(path):
    """Return the tags of a file in the form of CoNLL-2003: "O", and B and I of each type."""
    _, gold = read_conll(path, Path(path).read_bytes(), labels=())
    return all_tags(tag[2:] for tag in chain(*gold))


def all_tags(types):
    """Return "O", and B and I of each type. The type of "O" is "", which does not count."""
    pairs = [(f"B-{name}", f"I-{name}") for name in sorted(set(types) - {""})]
    return ("O", *chain(*pairs))


# ---------- words and tokens ----------------------------------------------------------------------


def encode_words(texts, gold, labels, tokenizer, max_length):
    """Return the arrays of sentences that are lists of words. Of a long one the end is cut.

    Besides `flat`: "places" (tokens,), which word begins at a token, or -1; "labels" (tokens,), a
    class at the first token of a word, else IGNORED.
    """
    tokenizer = copy_of(tokenizer)
    tokenizer.enable_truncation(max_length)
    if isinstance(tokenizer.pre_tokenizer, ByteLevel):
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


def tags_of_words(labels, classes, dataset):
    """Return the tags of each sentence, from `classes` (tokens,). A word without a token is O."""
    predicted = []
    for row, (words, _) in enumerate(dataset.examples):
        tokens = dataset.tokens(row)
        first = dataset.places[tokens] >= 0
        tags = ["O"] * len(words)
        for word, label in zip(dataset.places[tokens][first], classes[tokens][first]):
            tags[word] = labels[label]
        predicted.append(tags)
    return predicted
