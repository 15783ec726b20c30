"""The kind "span": the answer to a question is a span of its context, as in SQuAD v1.1."""

import json
import operator
import re
import string
import sys
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kinds.classify import Classify
from kinds.metrics import shared_words
from kinds.text import copy_of, decode, flat
from support.files import read_json
from support.terminal import UserError, live, tell

FORBIDDEN = -1e4  # the logit of what cannot be chosen; its probability is exactly 0
LONGEST_ANSWER = 30  # tokens (SMP, released code)
# Two windows of a context share so many tokens (SMP, released code), but at most half of what a
# question leaves of a row. With more, the library panics or makes dozens of windows.
OVERLAP = 128

# ---------- metrics -------------------------------------------------------------------------------


def normalise(text):
    """Return the words of an answer as SQuAD's official script compares them."""
    kept = [letter for letter in text.lower() if letter not in string.punctuation]
    return re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split()


def over_answers(compare, predicted, gold):
    """Return the mean over questions of the best `compare` with one of the answers.

    `predicted` are strings, and None where a prediction is missing, which scores 0.
    """
    values = []
    for text, (_, answers) in zip(predicted, gold, strict=True):
        words = normalise(text or "")
        scores = [compare(words, normalise(answer)) for answer, _ in answers]
        values.append(0.0 if text is None else max(scores))
    return float(np.mean(values))


# ---------- the kind ------------------------------------------------------------------------------


class Span(Classify):
    """Two decisions per question: at which token its answer starts, and at which it ends.

    A row of a data set is a window: as much of a question's context as fits.
    """

    name = "span"
    form = "start and end"
    every_position = True
    keeps_text = True
    picks_label = False
    metrics = {
        "f1": partial(over_answers, shared_words),
        "em": partial(over_answers, operator.eq),
    }
    keys = {"words": (1, 999)}
    needed = {}

    @classmethod
    def describe(cls, values, expect):
        labels = ("start", "end")
        return {"labels": labels, "spelling": labels, "columns": ("question", "context")}

    def read(self, role, path, data):
        texts, gold = read_squad(path, data)
        ids = set()
        for (_, context), (name, answers) in zip(texts, gold):
            check_question(name, context, answers, ids, role, f'{path}: question "{name}"')
            ids.add(name)
        return texts, gold

    def encode(self, texts, gold, tokenizer, max_length):
        return encode_windows(texts, gold, tokenizer, max_length)

    def choices(self, logits, mask):
        table = logits.transpose(1, 2)  # (B, T, 2) -> (B, 2, T)
        table = table.masked_fill(~mask[:, None], FORBIDDEN)
        return table, mask.sum(1, keepdim=True).log()  # (B, 1)

    def predictions(self, logits, dataset):
        return best_answers(logits.numpy(), dataset)

    def spell(self, predicted, exact=False):
        return predicted

    def as_file(self, predicted, dataset, exact=False):
        answers = {name: text for (name, _), text in zip(dataset.gold, predicted)}
        return json.dumps(answers, ensure_ascii=False, indent=1) + "\n"

    def read_predictions(self, path, texts, gold):
        """Return the answers in a file, see `Classify`. One that is missing is None.

        The official script takes it so, too.
        """
        answers = read_json(path)
        ids = dict(gold)
        for name, answer in answers.items():
            if name not in ids:
                raise UserError(f'{path}: "{name}" is no id of the split; remove it')
            if not isinstance(answer, str):
                raise UserError(f'{path}: the answer of "{name}" is not a string')
        lost = [name for name in ids if name not in answers]
        if lost:
            what = f"no answer for {len(lost):,} ids, for example {lost[0]!r}"
            tell(f"warning: {path}: {what}", sys.stderr)
        return [answers.get(name) for name in ids]

    def from_rows(self, rows, path):
        return rows, rows, [(f"number {i}", []) for i in range(1, 1 + len(rows))]


# ---------- files ---------------------------------------------------------------------------------


def read_squad(path, data):
    """Return [(question, context)] and [(id, answers)] of a JSON file in the form of SQuAD v1.1."""
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
    return texts, gold


def check_question(name, context, answers, ids, role, place):
    """Raise UserError unless a question has a new id, and answers where it says that they are."""
    strings = [name, context, *[text for text, _ in answers]]
    starts = [start for _, start in answers]
    right = {type(text) for text in strings} == {str} and {type(start) for start in starts} <= {int}
    if not right or name in ids:
        expected = "expected strings, a new id, and answer_start to be whole numbers"
        raise UserError(f"{place}: {expected}")
    if not answers and role != "test":
        raise UserError(f"{place}: no answer; SQuAD v2 is not supported")
    if role == "train":
        text, start = answers[0]
        if start < 0 or not context.startswith(text or "\0", start):
            found = f'the answer "{text}" is not at character {start} of its context'
            raise UserError(f"{place}: {found}; answer_start counts Unicode characters")


# ---------- windows -------------------------------------------------------------------------------


def encode_windows(texts, gold, tokenizer, max_length):
    """Return the arrays of questions with the windows of their contexts.

    Besides `flat`: "owner" (n,), to which example a window belongs; "places" (tokens, 2), from
    which character of the context to which a token reaches, or 0, 0; "labels" (n, 2), the positions
    of the first and the last token of the answer. Raises UserError with the id of a question that
    leaves no room for its context.
    """
    cutter = copy_of(tokenizer)
    specials = cutter.num_special_tokens_to_add(is_pair=True)
    windows = []
    examples = list(zip(texts, gold))
    for owner, (text, (name, answers)) in enumerate(live("tokenise", None, iterable=examples)):
        size = len(tokenizer.encode(text[0], add_special_tokens=False))
        room = max_length - specials - size
        if room <= 0:
            none = f'question "{name}": its {size} tokens leave no room for the context'
            raise UserError(f"{none} in --max-length {max_length}")
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


def best_answers(logits, dataset):
    """Return for each question the text whose start and end have the largest sum of logits.

    `logits` are (tokens, 2). Start and end are in the context, start <= end < start +
    LONGEST_ANSWER, in any of the question's windows.
    """
    best = {}  # example -> (sum of logits, text)
    for row, example in enumerate(dataset.owner):
        tokens = dataset.tokens(row)
        inside = dataset.places[tokens, 1] > 0  # the context
        if not inside.any():
            continue
        places = dataset.places[tokens][inside]  # (n, 2)
        start, end = logits[tokens][inside].T  # (n, 2) -> twice (n,)
        end = np.pad(end, (0, LONGEST_ANSWER - 1), constant_values=-np.inf)
        sums = start[:, None] + sliding_window_view(end, LONGEST_ANSWER)  # (n, 30)
        first, more = np.unravel_index(sums.argmax(), sums.shape)
        if example not in best or sums[first, more] > best[example][0]:
            (_, context), _ = dataset.examples[example]
            text = context[places[first, 0] : places[first + more, 1]]
            best[example] = (sums[first, more], text)
    return [best.get(i, (0, ""))[1] for i in range(len(dataset.examples))]
