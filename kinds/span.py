"""The kind "span": the answer to a question is a span of its context, as in SQuAD v1.1."""

import json
import operator
import re
import string
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kinds.classify import Classify
from kinds.metrics import shared_words
from kinds.text import copy_of, decode, flat
from support.files import read_json
from support.terminal import UserError, live, quote, warn

FORBIDDEN = -1e4  # the logit of what cannot be chosen; its probability is exactly 0
LONGEST_ANSWER = 30  # tokens, if the task file says nothing (SMP, released code)
# Two windows of a context share so many tokens (SMP, released code), but at most half of what a
# question leaves of a row. With more, the library panics or makes dozens of windows.
OVERLAP = 128
SQUAD = 'SQuAD v1.1\'s {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'

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
    options = {"longest_answer": int, "skip_misplaced": bool}

    @classmethod
    def describe(cls, values, expect):
        labels = ("start", "end")
        return {"labels": labels, "spelling": labels, "columns": ("question", "context")}

    def read(self, role, path, data):
        texts, gold = read_squad(path, data, role)
        if role != "train":
            return texts, gold
        return well_placed(texts, gold, path, self.task.options.get("skip_misplaced", False))

    def encode(self, texts, gold, tokenizer, max_length):
        return encode_windows(texts, gold, tokenizer, max_length)

    def check(self, dataset, name):
        """Warn where many first answers are too long to be predicted, or wholly in no window."""
        first, last = dataset.labels.T
        tokens = np.zeros(len(dataset.examples), int)
        np.maximum.at(tokens, dataset.owner, np.where(last > 0, last - first + 1, 0))
        tokens = tokens[[bool(answers) for _, answers in dataset.gold]]
        most = self.task.options.get("longest_answer", LONGEST_ANSWER)
        if len(tokens) and np.mean((tokens > most) | (tokens == 0)) > 0.05:
            long = f"{np.mean(tokens > most):.1%} of the answers have more than {most} tokens"
            lost = f"{np.mean(tokens == 0):.1%} are not wholly in a window"
            cure = 'try a larger "longest_answer" in the task file, or a larger --max-length'
            warn(f"{name}: {long}, and {lost}; {cure}")

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

        Ids that are not in the split are ignored. The official script does both, too.
        """
        answers = read_json(path)
        for name, answer in answers.items():
            if not isinstance(answer, str):
                raise UserError(f"{path}: the answer of {quote(name)} is not a string")
        ids = dict(gold)
        lost = [name for name in ids if name not in answers]
        other = [name for name in answers if name not in ids]
        for what, names in (("no answer for", lost), ("not in the split, so ignored:", other)):
            if names:
                what = f"{what} {len(names):,} ids, for example {quote(names[0])}"
                warn(f"{path}: {what}")
        return [answers.get(name) for name in ids]

    def read_input(self, path, data, header=()):
        """Return the pairs in a file of your own: a .json in SQuAD's form, else see `Classify`."""
        if str(path).endswith((".json", ".json.gz")):
            return read_squad(path, data, "test")[0]
        return super().read_input(path, data, header)

    def from_rows(self, rows, path):
        return rows, rows, [(f"number {i}", []) for i in range(1, 1 + len(rows))]


# ---------- files ---------------------------------------------------------------------------------


def read_squad(path, data, role):
    """Return [(question, context)] and [(id, answers)] of a JSON file in the form of SQuAD v1.1."""
    texts = []
    gold = {}
    rows = questions_in(path, decode(path, data))
    for number, (name, question, context, answers) in enumerate(rows, 1):
        if type(name) not in (str, int):
            wrong = f"the id {quote(json.dumps(name))} is neither a string nor a whole number"
            raise UserError(f"{path}: question number {number}: {wrong}")
        name = str(name)
        place = f"{path}: question {quote(name)}"
        if name in gold:
            raise UserError(f"{place}: this id is there twice; give each question its own")
        for what, text in (("question", question), ("context", context)):
            if not isinstance(text, str):
                raise UserError(f"{place}: its {what} is not a string")
        texts.append((question.lstrip(), context))
        gold[name] = read_answers(answers, role, place)
    return texts, list(gold.items())


def questions_in(path, text):
    """Return [(id, question, context, answers)], without a check, from the text of a file."""
    found = []
    try:
        articles = json.loads(text)["data"]
        json.dumps(articles, ensure_ascii=False).encode()  # a ValueError for half a character
        for article in articles:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    one = (row.get("id"), row.get("question"), paragraph["context"])
                    found.append((*one, row.get("answers", [])))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"not in the form of SQuAD v1.1 ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {other_form(text) or reason}; expected {SQUAD}") from None
    return found


def other_form(text):
    """Return the name of the form of a file that is not in SQuAD's, or "" if it is not known."""
    if re.match(r'\s*{\s*"header"', text):
        return "MRQA's form"
    if re.search(r'"answers"\s*:\s*{', text):
        return "the form of the datasets library"
    return "JSON lines" if re.match(r"\s*{.*}\s*\n\s*{", text) else ""


def read_answers(found, role, place):
    """Return [(answer, its first character)] of what is `found` at a `place` of a file."""
    if not isinstance(found, list) or not all(isinstance(answer, dict) for answer in found):
        expected = 'expected SQuAD v1.1\'s list of {"text": ..., "answer_start": ...}'
        raise UserError(f"{place}: answers in another form (the datasets library's?); {expected}")
    answers = [(answer.get("text"), answer.get("answer_start")) for answer in found]
    for text, start in answers:
        if not isinstance(text, str):
            raise UserError(f"{place}: the text of an answer is not a string")
        if type(start) is not int:
            raise UserError(f"{place}: an answer_start is not a whole number")
    if not answers and role != "test":
        raise UserError(f"{place}: no answer; SQuAD v2 is not supported; leave such questions out")
    return answers


def well_placed(texts, gold, path, skip):
    """Return questions without those whose first answer is misplaced: UserError unless `skip`."""
    kept = []
    lost = []
    for (question, context), (name, answers) in zip(texts, gold):
        answer, start = answers[0]
        if answer and start >= 0 and context.startswith(answer, start):
            kept.append(((question, context), (name, answers)))
        else:
            lost.append(name)
    if lost:
        what = f"in {len(lost):,} of {len(gold):,} questions the answer is not at its answer_start"
        if not skip:
            what += f", for example {quote(', '.join(lost[:5]))}; answer_start counts Unicode"
            cure = '"skip_misplaced": true in the task file leaves such questions out'
            raise UserError(f"{path}: {what} characters; {cure}")
        warn(f"{path}: {what}; they are left out")
    return [text for text, _ in kept], [right for _, right in kept]


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
            none = f"question {quote(name)}: its {size} tokens leave no room for the context"
            raise UserError(f"{none} in --max-length {max_length}")
        cutter.enable_truncation(max_length, stride=min(OVERLAP, room // 2), strategy="only_second")
        first = cutter.encode(*text)
        parts = [read_window(window) for window in (first, *first.overflowing)]
        answer = shrink(answers, np.concatenate([places for _, _, places in parts]))
        windows += [(owner, *part, label_in(part[2], answer)) for part in parts]
    owner, ids, second, places, labels = zip(*windows)
    more = {"owner": np.array(owner), "places": np.concatenate(places), "labels": np.array(labels)}
    return flat(ids, second) | more


def read_window(encoding):
    """Return the ids of a window, where its second text begins, and its places."""
    places = np.array(encoding.offsets, np.int32)
    places[[text != 1 for text in encoding.sequence_ids]] = 0
    return encoding.ids, len(encoding) - sum(encoding.type_ids), places


def shrink(answers, places):
    """Return from which character to which the tokens of the first answer reach, or None.

    `places` are those of all windows of the question. Spaces at the ends of an answer do not
    count, nor do characters without a token, such as accents. An end may be inside a token.
    """
    text, start = answers[0] if answers else ("", 0)
    start += len(text) - len(text.lstrip())
    end = start + len(text.strip())
    begins, ends = places.T
    inside = (begins < end) & (ends > start) & (ends > begins)
    if start == end or not inside.any():
        return None
    return max(start, begins[inside].min()), min(end, ends[inside].max())


def label_in(places, answer):
    """Return the positions of the first and the last token of an answer that `shrink` returned.

    Both are 0 where the answer is not wholly in the window (SMP, released code).
    """
    context = np.flatnonzero(places[:, 1])
    begins, ends = places[context].T
    if not answer or not len(context) or answer[0] < begins[0] or answer[1] > ends[-1]:
        return 0, 0
    first = np.searchsorted(ends, answer[0], "right")  # that ends after the answer begins
    last = np.searchsorted(begins, answer[1]) - 1  # that begins before it ends
    return context[first], context[last]


def best_answers(logits, dataset):
    """Return for each question the text whose start and end have the largest sum of logits.

    `logits` are (tokens, 2). Start and end are in the context, start <= end < start +
    "longest_answer" of the task file, in any of the question's windows.
    """
    most = dataset.kind.task.options.get("longest_answer", LONGEST_ANSWER)
    best = {}  # example -> (sum of logits, text)
    for row, example in enumerate(dataset.owner):
        tokens = dataset.tokens(row)
        inside = dataset.places[tokens, 1] > 0  # the context
        if not inside.any():
            continue
        places = dataset.places[tokens][inside]  # (n, 2)
        start, end = logits[tokens][inside].T  # (n, 2) -> twice (n,)
        longest = min(most, len(start))  # m
        end = np.pad(end, (0, longest - 1), constant_values=-np.inf)
        sums = start[:, None] + sliding_window_view(end, longest)  # (n, m)
        first, more = np.unravel_index(sums.argmax(), sums.shape)
        if example not in best or sums[first, more] > best[example][0]:
            (_, context), _ = dataset.examples[example]
            text = context[places[first, 0] : places[first + more, 1]]
            best[example] = (sums[first, more], text)
    return [best.get(i, (0, ""))[1] for i in range(len(dataset.examples))]
