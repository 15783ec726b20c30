"""BLEU and NIST: the figures of the E2E metric, and what their definitions imply."""

import csv
import math
import os
import shutil
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from kinds.bleu import bleu, by_java, check_java, nist, tokens_of
from support.terminal import UserError

E2E = Path(os.environ.get("E2E_DIR") or "missing")


def split(*texts):
    return [tokens_of(text) for text in texts]


def test_tokens():
    """Marks are tokens, but not between digits; entities are letters; case is gone."""
    assert tokens_of('The "Cricketers", £20-25, 4.5 &amp; 1,000.') == (
        'the " cricketers " , £20 - 25 , 4.5 & 1,000 .'.split(" ")
    )
    assert tokens_of("it's  non-\nfamily\nfriendly") == ["it's", "nonfamily", "friendly"]
    assert tokens_of("") == tokens_of("<skipped>") == [""]


@pytest.mark.real
def test_the_figures_of_the_e2e_metric():
    """The example of tuetschek/e2e-metrics has the figures that its own program prints (-p)."""
    folder = E2E / "metric-example"
    if not folder.is_dir():
        pytest.skip("needs E2E_DIR")
    outputs = (folder / "outputs.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    blocks = (folder / "references.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    outputs = split(*outputs)
    references = [split(*block.split("\n")) for block in blocks]
    assert bleu(outputs, references) == pytest.approx(0.7202928494322162, abs=1e-9)
    assert nist(outputs, references) == pytest.approx(7.788887609555574, abs=1e-9)


def test_a_perfect_output():
    """An output that is one of its references has BLEU 1, in whatever order references are."""
    right = split("a b c d e f", "f e d c b a x")
    for references in (right, right[::-1]):
        assert bleu([right[0]], [references]) == pytest.approx(1)


def test_hits_are_clipped():
    """A word counts as often as one reference has it: the example of Papineni et al."""
    output = split("the the the the the the the")
    right = [split("the cat is on the mat", "there is a cat on the mat")]
    logs = [math.log(2 / 7), *[math.log(1e-15 / size) for size in (6, 5, 4)]]
    assert bleu(output, right) == pytest.approx(math.exp(sum(logs) / 4))


def test_short_outputs():
    """An empty output is one empty token. It takes from the n-grams of the others, as published."""
    right = split("a b c d e", "a b c d e")
    references = [[one] for one in right]
    whole = bleu(right, references)
    assert whole == pytest.approx(1)
    outputs = [right[0], *split("")]
    precisions = [5 / 6, 4 / 4, 3 / 2, 2 / 0.000000001]  # lengths 5 + 1, 4 + 0, 3 - 1, 2 - 2
    expected = math.exp(1 - 10 / 6) * math.prod(precisions) ** 0.25
    assert bleu(outputs, references) == pytest.approx(expected)


def test_brevity_goes_by_the_closest_reference():
    """Of two references at the same distance the shorter one counts."""
    output = split("a b c d e f")
    at_one = [split("x x x x x", "a b c d e f g")]
    assert bleu(output, at_one) == pytest.approx(1)
    longer = [split("a b c d e f g h")]
    assert bleu(output, longer) == pytest.approx(math.exp(1 - 8 / 6))


def test_nist_weighs_rare_words():
    """What the references seldom say counts more; words that are always the same count nothing."""
    references = [split("a a a a a a"), split("a a a b c d")]
    common = nist(split("a a a a a a", "a a a a a a"), references)
    rare = nist(split("a a a a a a", "a a a b c d"), references)
    assert rare > common
    same = [split("a b c d e")] * 2
    assert nist([same[0][0]] * 2, same) == pytest.approx(math.log2(5))
    with pytest.raises(ValueError, match="no 4 tokens in a row"):
        nist(split("a b c"), [split("a b c")])


@pytest.mark.real
def test_bleu_is_that_of_sacrebleu():
    """On 200 real texts, each against the other references of its source, in lower case."""
    sacrebleu = pytest.importorskip("sacrebleu")
    if not (E2E / "devset.csv").is_file():
        pytest.skip("needs E2E_DIR")
    texts = {}
    with open(E2E / "devset.csv", encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            texts.setdefault(row["mr"], []).append(row["ref"])
    several = [refs for refs in texts.values() if len(refs) > 1][:200]
    assert len(several) == 200
    outputs = [refs[0] for refs in several]
    references = [refs[1:] for refs in several]
    ours = bleu(split(*outputs), [split(*refs) for refs in references])
    streams = [list(stream) for stream in zip_longest(*references)]
    theirs = sacrebleu.corpus_bleu(outputs, streams, lowercase=True, tokenize="13a").score / 100
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.real
def test_the_other_figures_of_the_e2e_metric():
    """METEOR, ROUGE-L and CIDEr of the example, by the Java programs of pycocoevalcap."""
    pytest.importorskip("pycocoevalcap")
    folder = E2E / "metric-example"
    if not folder.is_dir() or not shutil.which("java"):
        pytest.skip("needs E2E_DIR and Java")
    outputs = (folder / "outputs.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    blocks = (folder / "references.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    found = by_java(outputs, [block.split("\n") for block in blocks])
    expected = {"meteor": 0.480072, "rouge_l": 0.790953, "cider": 2.303943}
    assert found == pytest.approx(expected, abs=1e-6)


def test_what_the_other_figures_need(monkeypatch):
    """Without pycocoevalcap a message names the metrics, and what to install."""
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="METEOR, ROUGE-L and CIDEr need Java and `pip install"):
        check_java()
