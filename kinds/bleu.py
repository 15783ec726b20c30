"""The metrics of texts: BLEU and NIST as the E2E metric computes them in Python, and others.

That is tuetschek/e2e-metrics with its option -p.
"""

import importlib.util
import math
import re
import shutil
from collections import Counter

from support.terminal import UserError

MARKS = (
    (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),  # punctuation, but for . , - and the apostrophe
    (r"([^0-9])([\.,])", r"\1 \2 "),  # a point or a comma, unless it is between digits
    (r"([\.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),  # a dash after a digit
)
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


def tokens_of(text):
    """Return the tokens of a text in lower case. An empty text has one empty token."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, letter in ENTITIES.items():
        text = text.replace(entity, letter)
    text = f" {text} "
    for pattern, spaced in MARKS:
        text = re.sub(pattern, spaced, text)
    return re.sub(r"\s+", " ", text).strip().lower().split(" ")


def grams(tokens, n):
    """Return how often each n-gram occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def most_in_one(references, n):
    """Return how often each n-gram occurs in the reference that has it most often."""
    most = Counter()
    for tokens in references:
        most |= grams(tokens, n)
    return most


def bleu(outputs, references):
    """Return BLEU-4 of a corpus (Papineni et al. 2002), without smoothing.

    `outputs` are lists of tokens, and `references` have for each a list of lists of tokens. Where
    most outputs are empty, the result can exceed 1, as in the E2E metric.
    """
    hits = [0] * 4
    lengths = [0] * 4
    closest = 0
    for tokens, right in zip(outputs, references, strict=True):
        for n in range(1, 5):
            hits[n - 1] += sum((grams(tokens, n) & most_in_one(right, n)).values())
            lengths[n - 1] += len(tokens) - (n - 1)  # below 0 for a short one, as in the E2E metric
        closest += min((abs(len(one) - len(tokens)), len(one)) for one in right)[1]
    logs = [math.log(max(hit, 1e-15) / max(size, 1e-9)) for hit, size in zip(hits, lengths)]
    brevity = 1 - closest / lengths[0] if lengths[0] <= closest else 0.0
    return math.exp(brevity + sum(logs) / 4)


def nist(outputs, references):
    """Return NIST-5 of a corpus (Doddington 2002). The arguments are as in `bleu`.

    Raises ValueError where all outputs together have no 5-gram.
    """
    counts = Counter()
    for one in [one for right in references for one in right]:
        counts[()] += len(one)
        for n in range(1, 6):
            counts.update(grams(one, n))
    score = 0.0
    for n in range(1, 6):
        gained = 0.0
        size = 0
        for tokens, right in zip(outputs, references, strict=True):
            hits = grams(tokens, n) & most_in_one(right, n)
            gained += sum(math.log2(counts[g[:-1]] / counts[g]) * hit for g, hit in hits.items())
            size += len(tokens) - (n - 1)
        if size <= 0:
            raise ValueError(f"the outputs have no {n} tokens in a row")
        score += gained / size
    length = sum(map(len, outputs))
    average = sum(sum(map(len, right)) / len(right) for right in references)
    beta = math.log(2) / math.log(1.5) ** 2
    return score * math.exp(-beta * math.log(min(1.0, length / average)) ** 2)


def check_java():
    """Raise UserError where pycocoevalcap or Java is missing."""
    if not (shutil.which("java") and importlib.util.find_spec("pycocoevalcap")):
        need = "METEOR, ROUGE-L and CIDEr need Java and `pip install pycocoevalcap`"
        raise UserError(f"--metrics all: {need}")


def by_java(outputs, references):
    """Return METEOR, ROUGE-L and CIDEr as the E2E metric has them.

    `outputs` are texts, and `references` lists of texts. A Java program makes their tokens, and no
    program in Python makes the same. See `check_java`.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer()
    said = tokens.tokenize({i: [{"caption": text}] for i, text in enumerate(outputs)})
    right = {i: [{"caption": text} for text in texts] for i, texts in enumerate(references)}
    right = tokens.tokenize(right)
    scorers = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}
    return {name: float(scorer.compute_score(right, said)[0]) for name, scorer in scorers.items()}
