"""Records of runs, and differences between methods with their intervals."""

import json

import numpy as np
import pytest

from tools import report
from tools.record import read_record, write_record


def run(name, metric, method="smp-s", density=0.1, seed=0, task="stsb", **more):
    """{name: (result, settings)} of a run, as a record has it."""
    metrics = {"pearson": metric / 100}
    result = {
        "task": task,
        "method": method,
        "density": density,
        "achieved_density": density,
        "metrics": metrics,
        "best": {"metrics": metrics},
        "epochs": 3,
        "train_seconds": 1.5,
    }
    settings = {"method": method, "teacher": "none", "regression": "interpolate", "seed": seed}
    return {name: (result, settings | {"model": "m", "out": f"runs/{name}"} | more)}


@pytest.fixture
def record(tmp_path):
    """Two methods at two densities with two seeds, and dense."""
    runs = {}
    values = {(0.1, 0): (70, 66), (0.1, 1): (72, 70), (0.03, 0): (60, 61), (0.03, 1): (62, 61)}
    for (density, seed), (first, second) in values.items():
        of = {"density": density, "seed": seed}
        runs |= run(f"a-{density:g}-{seed}", first, **of)
        runs |= run(f"b-{density:g}-{seed}", second, method="smp-l", **of)
    for seed in (0, 1):
        runs |= run(f"dense-{seed}", 71, method="dense", density=1.0, seed=seed)
    write_record(tmp_path / "record.jsonl", {"planned": 10}, runs)
    return tmp_path / "record.jsonl"


def compared(capsys, record, *flags):
    assert report.main([str(record), *flags]) == 0
    return capsys.readouterr().out


def test_a_record_holds_what_reports_need(record, capsys):
    """What is written is read again, without folders of this machine; a report prints it."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert lines[0]["common"] == {"teacher": "none", "regression": "interpolate", "model": "m"}
    assert lines[1]["settings"] == {"method": "smp-s", "seed": 0}
    (result, settings) = read_record(record)["b-0.03-1"]
    assert result["metrics"] == {"pearson": 0.61}
    assert settings["method"] == "smp-l" and settings["model"] == "m" and settings["seed"] == 1
    assert report.main([str(record), "--only", "b-*"]) == 0
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    shown = [(row[4], row[6]) for row in rows]  # seeds, last step
    assert shown == [("2", "pearson 68.0 ± 2.8"), ("2", "pearson 61.0 ± 0.0")]


def test_a_pivot_has_a_column_per_density(record, capsys):
    assert report.main([str(record), "--pivot"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| task | method | 1 | 0.1 | 0.03 |",
        "|---|---|---|---|---|",
        "| stsb | dense | 71.0 ± 0.0 |  |  |",
        "| stsb | smp-l |  | 68.0 ± 2.8 | 61.0 ± 0.0 |",
        "| stsb | smp-s |  | 71.0 ± 1.4 | 61.0 ± 1.4 |",
    ]


def test_a_pivot_has_the_achieved_density_where_none_was_asked(tmp_path, capsys):
    (result, settings) = run("l0", 50, method="l0", density=None)["l0"]
    result["achieved_density"] = 0.00234
    write_record(tmp_path / "r", {}, {"l0": (result, settings)})
    assert report.main([str(tmp_path / "r"), "--pivot"]) == 0
    assert "| task | method | 0.0023 |" in capsys.readouterr().out


def test_a_path_in_a_variable_is_recorded_as_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_MODEL", "/home/me/model")
    write_record(tmp_path / "r", {}, run("a", 1, model="/home/me/model"))
    assert "/home" not in (tmp_path / "r").read_text()
    assert read_record(tmp_path / "r")["a"][1]["model"] == "$SOME_MODEL"


def test_a_record_holds_no_absolute_path(tmp_path, monkeypatch):
    """A folder below that of a variable keeps the rest of its path, any other its last name."""
    monkeypatch.setenv("SOME_FOLDER", "/home/me/models/")
    monkeypatch.setenv("SOME_PARENT", "/home/me")  # the longest one that holds the folder counts
    paths = {
        "/home/me/models/tiny": "$SOME_FOLDER/tiny",
        "/home/me/models-2/tiny": "$SOME_PARENT/models-2/tiny",
        "/elsewhere/tiny": "tiny",
        "self:/elsewhere/runs/dense": "self:dense",
        "self:/home/me/models/dense": "self:$SOME_FOLDER/dense",
        "google-bert/bert-base-uncased": "google-bert/bert-base-uncased",  # an id of the hub
        "runs/dense": "runs/dense",
        "self": "self",
    }
    runs = {}
    for i, path in enumerate(paths):
        runs |= run(f"r{i}", 1, seed=i, model=path, teacher=path, task_file=path, from_run=path)
    write_record(tmp_path / "r", {}, runs)
    text = (tmp_path / "r").read_text()
    assert '"/' not in text and ":/" not in text and "/me" not in text
    found = read_record(tmp_path / "r")
    for i, path in enumerate(paths.values()):
        _, settings = found[f"r{i}"]
        assert {settings[name] for name in ("model", "teacher", "task_file", "from_run")} == {path}


WRONG = {
    "no line": ("", "empty; not a record"),
    "not JSON": ("{\n", ":1: not a JSON object"),
    "a log": ('{"step": 1}\n', ":1: no common settings"),
    "no result": ('{"common": {}}\n{"run": "a", "settings": {}}\n', ":2: expected a run"),
    "a result without a metric": (
        '{"common": {}}\n{"run": "a", "settings": {}, "result": {"task": "x"}}\n',
        ":2: method is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_records(case, tmp_path, capsys):
    """A wrong record is left out, with one line that names it and the line."""
    text, expected = WRONG[case]
    (tmp_path / "r").write_text(text)
    assert report.main([str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and expected in error[0] and str(tmp_path / "r") in error[0]


def test_pairs_and_their_interval(record, capsys):
    """By hand: differences 4, 2 and -1, 1: s^2 is 2, the error sqrt(2/2 + 2/2)/2, t(2) 4.30."""
    out = compared(capsys, record, "--first", "a-*", "--second", "b-*")
    assert "| m | stsb | 0.1 | 2 | 71.0 | 68.0 | +3.0 ± 1.4 |" in out
    assert "| m | stsb | 0.03 | 2 | 61.0 | 61.0 | +0.0 ± 1.4 |" in out
    mean = "mean +1.5, 95% interval -1.5 to +4.5: cannot be told apart"
    assert f"all: {mean} (4 pairs, cells: 2, of them above 0: 1)" in out
    one_density = compared(capsys, record, "--first", "a-*", "--second", "b-*", "--density", "0.03")
    assert "all: mean +0.0" in one_density
    assert "(2 pairs, cells: 1, of them above 0: 0)" in one_density


def test_tasks_one_by_one(record, capsys):
    """Runs of two tasks have a mean for each, and one over all cells."""
    runs = read_record(record)
    for seed, first in ((0, 50), (1, 52)):
        runs |= run(f"a-other-{seed}", first, task="other", seed=seed)
        runs |= run(f"b-other-{seed}", 48, task="other", method="smp-l", seed=seed)
    write_record(record, {}, runs)
    out = compared(capsys, record, "--first", "a-*", "--second", "b-*")
    means = [line.split(", 95%")[0] for line in out.splitlines() if "mean" in line]
    assert "(6 pairs, cells: 3, of them above 0: 2)" in out
    assert means == [
        "m, other: mean +3.0",
        "m, stsb: mean +1.5",
        "all: mean +2.0",
    ]


def test_dense_is_a_pair_of_every_density(record, capsys):
    """A variant of dense keeps everything, too."""
    runs = read_record(record)
    for seed in (0, 1):
        runs |= run(f"frozen-{seed}", 71, method="dense-frozen", density=1.0, seed=seed)
    write_record(record, {}, runs)
    for second in ("dense-*", "frozen-*"):
        out = compared(capsys, record, "--first", "a-0.03-*", "--second", second)
        assert "| m | stsb | 0.03 | 2 | 61.0 | 71.0 | -10.0 ± 1.4 |" in out


@pytest.mark.parametrize("first, second", [("dense-*", "a-*"), ("a-*", "dense-*")])
def test_dense_on_either_side(first, second, record, capsys):
    """Dense has a pair at every density of the other side, and --density chooses among them."""
    sign = -1 if first == "a-*" else 1
    out = compared(capsys, record, "--first", first, "--second", second)
    cells = [row.split(" | ") for row in out.splitlines() if row.startswith("| m | stsb")]
    assert [(row[2], row[3], row[6]) for row in cells] == [
        ("0.1", "2", f"{sign * 0:+.1f} ± 1.4 |"),
        ("0.03", "2", f"{sign * 10:+.1f} ± 1.4 |"),
    ]
    one_density = compared(
        capsys, record, "--first", first, "--second", second, "--density", "0.03"
    )
    assert "(2 pairs, cells: 1," in one_density


def test_intervals_of_one_seed_per_cell():
    """They rest on the cells: for 1, 2, 3 the error is 1 / sqrt(3) and t(2) is 4.30."""
    mean, half = report.interval([np.array([1.0]), np.array([2.0]), np.array([3.0])])
    assert (mean, half) == (2.0, pytest.approx(4.30 / 3**0.5))
    assert report.interval([np.array([1.0])]) == (1.0, None)


def test_runs_of_two_models_share_no_line(tmp_path, capsys):
    """Also where their seeds differ. Of two runs that differ in nothing one is to be chosen."""
    runs = run("a", 60) | run("b", 90, seed=1, model="n")
    write_record(tmp_path / "r", {}, runs)
    rows = compared(capsys, tmp_path / "r", "--pivot").splitlines()[2:]
    assert rows == ["| stsb | smp-s --model m | 60.0 |", "| stsb | smp-s --model n | 90.0 |"]
    runs = run("a", 60, max_tokens=0) | run("b", 90, seed=1, max_tokens=2048) | run("c", 62, seed=2)
    write_record(tmp_path / "r", {}, runs)  # the last one is older than this setting
    rows = [line.split(" | ")[4] for line in compared(capsys, tmp_path / "r").splitlines()[2:]]
    assert sorted(rows) == ["1", "2"]
    origins = run("a", 60, from_run="x") | run("b", 90, seed=1, from_run="y")
    write_record(tmp_path / "r", {}, origins)  # each seed goes on from its own run
    assert len(compared(capsys, tmp_path / "r", "--pivot").splitlines()) == 3
    write_record(tmp_path / "r", {}, run("a", 60, teacher="x") | run("b", 90, teacher="y"))
    assert report.main([str(tmp_path / "r"), "--pivot"]) == 2
    assert "two runs of smp-s + teacher on stsb have density" in capsys.readouterr().err


def test_two_runs_for_one_place_are_refused(record, capsys):
    """Which of them is compared would else depend on their order."""
    assert report.main([str(record), "--first", "[ab]-*", "--second", "dense-*"]) == 2
    assert "a-0.1-0 and b-0.1-0 have the same model, task, density" in capsys.readouterr().err


def test_names_of_one_run_are_refused(record, capsys):
    assert report.main([str(record), "--only", "a-*", "--density", "0.1"]) == 2
    assert "--only: chooses among several runs" in capsys.readouterr().err


def test_no_pair(record, capsys):
    assert report.main([str(record), "--first", "a-0.1-*", "--second", "b-0.03-*"]) == 2
    assert "no pair" in capsys.readouterr().err
