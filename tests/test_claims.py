"""The table of claims in docs/results.md says what the committed records say."""

import re
import shlex

import pytest

from conftest import ROOT
from tools import report

TASKS = {"STS-B": "stsb", "CoNLL": "conll2003", "MRPC": "mrpc", "SST-2": "sst2"}
PAGE = (ROOT / "docs" / "results.md").read_text()
# "MODEL, TASK: mean +1.0, 95% interval -2.0 to +4.0: ... (3 pairs, cells: 1, of them above 0: 1)"
SUMMARY = r"mean (\S+?)(?:, 95% interval (\S+) to (\S+))?: .* \((\d+) pairs, cells: (\d+),"


def commands():
    """[(number of the claim, arguments of tools.report)] in the order of the page."""
    block = PAGE[PAGE.index('compare="') : PAGE.index("For one task write")]
    records = shlex.split(re.search(r'compare="(.*)"', block)[1])[3:]
    lines = block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.startswith("$compare"):
            text, number = line.removeprefix("$compare").rsplit("#", 1)
            found.append((int(number), [*records, *shlex.split(text)]))
    return found


def rows_of_page():
    """{number of the claim: [(cell, pairs in cells, difference, verdict)]} of the table.

    A cell is a model and a task: ("$TINY", "sst2").
    """
    table = PAGE[PAGE.index("|---|---|---|---|---|---|---|") :]
    found = {}
    for line in table[: table.index("\n\n")].splitlines()[1:]:
        number, _, _, tested, pairs, difference, verdict = [
            cell.strip() for cell in line.strip("|").split("|")
        ]
        claim = int(number) if number else claim  # noqa: F821  (of the row before)
        model = "$MINILM" if "MiniLM" in tested else "$TINY"
        cell = (model, TASKS[tested.split(",")[0]])
        found.setdefault(claim, []).append((cell, pairs, difference, verdict))
    return found


def rows_of_records(arguments, capsys):
    """{(model, task): (pairs in cells, difference)} as tools.report prints them."""
    capsys.readouterr()
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    cells = re.findall(r"^\| (\S+) \| (\w+) \| [\d.]+ \|", printed, re.MULTILINE)
    found = {}
    for line in printed.splitlines():
        match = re.search(SUMMARY, line)
        if not match or (line.startswith("all: ") and found):
            continue
        mean, low, high, pairs, count = match.groups()
        cell = cells[0] if line.startswith("all: ") else tuple(line.split(":")[0].split(", "))
        width = f" ({low} to {high})" if low else ""
        found[cell] = (f"{pairs} in {count}", f"{mean}{width}")
    return found


@pytest.fixture(scope="module")
def claims():
    """{number: (commands, rows of the page)}."""
    page = rows_of_page()
    found = {number: ([], rows) for number, rows in page.items()}
    for number, arguments in commands():
        found[number][0].append(arguments)
    return found


@pytest.mark.parametrize("number", rows_of_page())
def test_a_claim_is_what_the_records_say(number, claims, capsys):
    """Each row follows from a command of the page, in its order, and each command makes rows."""
    commands, rows = claims[number]
    assert commands
    for arguments in commands:
        found = rows_of_records(arguments, capsys)
        here, rows = rows[: len(found)], rows[len(found) :]
        assert {cell: (pairs, difference) for cell, pairs, difference, _ in here} == found
    assert not rows


@pytest.mark.parametrize("number", rows_of_page())
def test_a_verdict_follows_from_the_interval(number, claims):
    """A claim that an interval neither shows nor refutes cannot be told apart."""
    for _, _, difference, verdict in claims[number][1]:
        bounds = [float(bound) for bound in re.findall(r"[(o] ?([+-][\d.]+)", difference)]
        if not bounds:
            assert verdict == "one pair tells nothing"
        elif bounds[0] <= 0 <= bounds[1]:
            assert verdict == "cannot be told apart"
        else:
            assert re.match(r"\*\*(shown|refuted)\*\*", verdict)
