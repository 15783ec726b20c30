"""The kind "tag": each word of a sentence has a tag, as in CoNLL-2003."""

import functools
import re
import textwrap
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from kinds.classify import IGNORED, Classify
from kinds.metrics import shared_words
from kinds.text import check_lines, copy_of, decode, flat
from support.terminal import UserError, quote, warn

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
    keys = {"words": (1, 10**6), "labels": (2, 10**6)}
    needed = set()
    options = {"word_column": int, "tag_column": int, "class_weights": ("balanced",)}

    @classmethod
    def describe(cls, values, expect):
        labels = tuple(values.get("labels", ()))
        path = values["files"]["train"]
        there = labels or Path(path).is_file()
        expect(there, "train", 'a file, because there are no "labels"')
        other = values.get("word_column", 1) != values.get("tag_column")
        expect(other, "tag_column", "another column than that of the words")
        labels = labels or tags_in(path, values)
        complete = all_tags(label[2:] for label in labels)
        expect(set(labels) == set(complete), "labels", '"O", and "B-X" and "I-X" for each type X')
        return {"labels": labels, "spelling": labels, "columns": ("sentence",)}

    def read(self, role, path, data):
        return read_conll(path, data, self.task.labels, self.task.options)

    def tokenizer(self, tokenizer):
        return for_words(tokenizer)

    def encode(self, texts, gold, tokenizer, max_length):
        return encode_words(texts, gold, self.task.labels, tokenizer, max_length)

    def check(self, dataset, name):
        """Warn of words without a token. More than 5% of them are an error, if there are tags."""
        words = sum(len(words) for words, _ in dataset.examples)
        lost = words - np.count_nonzero(dataset.places >= 0)
        if not lost:
            return
        count = f"{lost:,} of {words:,} words ({lost / words:.1%}) have no token"
        text = f"{name}: {count} in --max-length {dataset.max_length}"
        if lost > 0.05 * words and dataset.examples[0][1] is not None:
            longest = max(len(words) for words, _ in dataset.examples)
            cures = "an empty line ends a sentence; or give a larger --max-length"
            raise UserError(f"{text}; the longest sentence has {longest:,} words; {cures}")
        warn(f"{text}; they count as tagged O")

    def predictions(self, logits, dataset):
        return tags_of_words(self.task.labels, logits.argmax(dim=1).numpy(), dataset)

    def spell(self, predicted, exact=False):
        return [" ".join(tags) for tags in predicted]

    def as_file(self, predicted, dataset, exact=False):
        sentences = []
        for (words, gold), tags in zip(dataset.examples, predicted):
            sentences.append("".join(map(line_of, zip(words, gold, tags))))
        return "\n".join(sentences)

    def read_predictions(self, path, texts, gold):
        columns = {"word_column": 1}  # and the tag is last, as in `as_file`
        found, predicted = read_conll(path, Path(path).read_bytes(), self.task.labels, columns)
        lines = chain(*[(*words, "") for words in texts])  # "" is the empty line after a sentence
        check_lines(path, lines, chain(*[(*words, "") for words in found]))
        return predicted

    def from_rows(self, rows, path):
        """Return what is in sentences with spaces between their words. They have no tags: None."""
        texts = [row.split() for row in rows]
        return rows, texts, [None] * len(texts)


# ---------- files ---------------------------------------------------------------------------------


@functools.cache
def is_tag(text):
    return re.fullmatch("O|[BI]-.+", text) is not None


def read_conll(path, data, labels, options):
    """Return [words] and [tags] of the sentences in a file in the form of CoNLL-2003.

    A line has columns between tabs, or between spaces if it holds no tab. The first is a word and
    the last is its tag, if `options` name no "word_column" and "tag_column", counted from 1. An
    empty line and -DOCSTART- end a sentence. LF, CR LF and CR end a line.

    A comment is left out: "# ...", "#begin ...", "#end ...", "#key = value", or "#..." without a
    second column. "#hashtag O" is a word. Left out, too, are CoNLL-U's words that stand for
    several or for none: these lines have a number such as 3-4 or 3.1 before the word, and no tag.

    Tags are in IOB1 or BIO2, and become BIO2. Without `labels`, any type of entity is accepted.
    Raises UserError with the line that is wrong.
    """
    texts = []
    gold = []
    labels = dict.fromkeys(labels)  # fast where they are many
    sentences = sentences_in(path, data, options)
    if "word_column" not in options:
        refuse_numbers(path, sentences)
    for sentence in sentences:
        tags = ["O"]
        for number, _, tag in sentence:
            if tag not in labels:
                check_tag(f"{path}:{number}", tag, labels)
            if tag.startswith("I-") and tag[2:] != tags[-1][2:]:
                tag = "B-" + tag[2:]  # in IOB1 the first word of an entity may have I
            tags.append(tag)
        texts.append([word for _, word, _ in sentence])
        gold.append(tags[1:])
    return texts, gold


def tags_in(path, options):
    """Return the tags of a file in the form of CoNLL-2003: "O", and B and I of each type."""
    _, gold = read_conll(path, Path(path).read_bytes(), (), options)
    labels = all_tags(tag[2:] for tag in chain(*gold))
    if len(labels) == 1:
        hint = 'expected entities; "tag_column" in the task file says where tags are'
        raise UserError(f"{path}: {len(gold):,} sentences, and no tag but O; {hint}")
    return labels


def all_tags(types):
    """Return "O", and B and I of each type. The type of "O" is "", which does not count."""
    pairs = [(f"B-{name}", f"I-{name}") for name in sorted(set(types) - {""})]
    return ("O", *chain(*pairs))


def split_line(line):
    """Return the columns of a line: between tabs if it holds one, else between spaces."""
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field] or [""]


def line_of(columns):
    """Return a line of which `split_line` gives these columns."""
    separator = "\t" if " " in "".join(columns) else " "
    return separator.join(columns) + "\n"


def is_word(fields, tag, word_column):
    """Does a line hold a word? See `read_conll` for those that do not."""
    if is_tag(tag):
        return fields[0] != "#" or fields[2:3] != ["="]  # "# text = Vitamin O", as in CoNLL-U
    if fields[0].startswith("#"):
        known = fields[0] in ("#", "#begin", "#end") or fields[1:2] == ["="]
        return len(fields) > 1 and not known  # "#hashtag B_X" is a word, whose tag is wrong
    return not (word_column > 1 and re.fullmatch(r"\d+[-.]\d+", fields[0]))


def sentences_in(path, data, options):
    """Return the sentences of a file: lists of (number of the line, word, tag)."""
    sentences = [[]]
    word_column = options.get("word_column", 1)
    where = f"column {options['tag_column']}" if "tag_column" in options else "the last column"
    expected = f"expected a word in column {word_column}, and its tag in {where}"
    # not splitlines(), because a form feed and U+2028 are text
    for number, line in enumerate(re.split("\r{0,2}\n|\r", decode(path, data)), 1):
        fields = split_line(line)
        tag_column = options.get("tag_column", len(fields))
        word = fields[word_column - 1] if word_column <= len(fields) else ""
        tag = fields[tag_column - 1] if tag_column <= len(fields) else ""
        if word_column == tag_column:
            word, tag = ("", tag) if is_tag(tag) else (word, "")  # it cannot be both
        if not any(fields) or "-DOCSTART-" in fields[:word_column]:
            sentences.append([])
        elif is_word(fields, tag, word_column):
            if not word or not tag:
                lacks = "tag" if word else "word"
                raise UserError(f"{path}:{number}: no {lacks} in {quote(line)}; {expected}")
            sentences[-1].append((number, word, tag))
    return [sentence for sentence in sentences if sentence]


def refuse_numbers(path, sentences):
    """Raise UserError if the words of each sentence are 1, 2, 3 and so on, or 0, 1, 2."""
    for sentence in sentences:
        words = [word for _, word, _ in sentence if not re.fullmatch(r"\d+[-.]\d+", word)]
        numbers = [str(number) for number in range(len(words) + 1)]
        if words not in (numbers[1:], numbers[:-1]):
            return
    if any(len(sentence) > 1 for sentence in sentences):
        place = f"{path}:{sentences[0][0][0]}"
        hint = 'give "word_column" in the task file (1, if these are the words)'
        raise UserError(f"{place}: the first column counts 1, 2, 3 in each sentence; {hint}")


def check_tag(place, tag, labels):
    """Raise UserError for a tag in another scheme and, if there are `labels`, for any other tag."""
    if not is_tag(tag):
        schemes = "IOB1 and BIO2, which have O, B-X and I-X"
        hint = 'change the tags, or give "tag_column" in the task file'
        raise UserError(f"{place}: {quote(tag)} is no tag of {schemes}; {hint}")
    if labels:
        known = textwrap.shorten(" or ".join(labels), 200, placeholder=" ...")
        source = 'those of "labels" in the task file, or without it of the training file'
        raise UserError(f"{place}: unknown tag {quote(tag)}; expected {known}, {source}")


# ---------- words and tokens ----------------------------------------------------------------------


def for_words(tokenizer):
    """Return a copy of a tokenizer that reads single words as it reads them in a text."""
    tokenizer = copy_of(tokenizer)
    if isinstance(tokenizer.pre_tokenizer, ByteLevel):
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)  # a space belongs to its word
    return tokenizer


def encode_words(texts, gold, labels, tokenizer, max_length):
    """Return the arrays of sentences that are lists of words. Of a long one the end is cut.

    Besides `flat`: "places" (tokens,), which word begins at a token, or -1; "labels" (tokens,), a
    class at the first token of a word, else IGNORED. It is IGNORED, too, if the tags are None.
    """
    tokenizer = for_words(tokenizer)
    tokenizer.enable_truncation(max_length)
    class_of = {label: number for number, label in enumerate(labels)} | {None: IGNORED}
    rows = []
    for words, tags in zip(texts, gold):
        encoding = tokenizer.encode(words, is_pretokenized=True)
        places = np.array([-1 if word is None else word for word in encoding.word_ids], np.int32)
        places[1:][places[1:] == places[:-1]] = -1  # only the first token of a word counts
        classes = [class_of[tag] for tag in tags or [None] * len(words)]
        classes.append(IGNORED)  # of the place -1
        rows.append((encoding.ids, places, np.array(classes)[places]))
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
