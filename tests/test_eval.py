"""What eval.py itself does: metrics over several dev sets, and the warning of a missed density."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from conftest import score_task
from data import Dataset, Task, get_task, kind_of
from kinds.classify import Classify
from support.terminal import UserError


def test_each_dev_set_has_its_own_metric(monkeypatch):
    """Of a task like MNLI, accuracy is that of dev, and accuracy_mm that of its mismatched half."""
    files = {"train": "t", "dev": "d", "dev_mm": "m"}
    task = Task("m", "m", ("no", "yes"), metrics=("accuracy", "accuracy_mm"), files=files)
    assert task.eval_splits == ["dev", "dev_mm"]
    ids = np.zeros(4, np.int32)
    ones = np.ones(4, np.int64)
    dev_sets = {}
    for split, labels in (("dev", [0, 0, 0, 1]), ("dev_mm", [1, 1, 0, 0])):
        dev_sets[split] = Dataset(kind_of(task), ids, ones, ones, np.array(labels))
    monkeypatch.setattr(Classify, "predict", lambda *args: np.zeros(4, np.int64))
    metrics = evaluation.evaluate(None, dev_sets, torch.device("cpu"), "fp32")
    assert metrics == {"accuracy": 0.75, "accuracy_mm": 0.5}


@pytest.mark.parametrize("achieved, warns", [(0.109, False), (0.091, False), (0.112, True)])
def test_a_missed_density_is_told(achieved, warns, capsys):
    """A run that misses the density by more than a tenth says so."""
    evaluation.warn_of_density(0.1, achieved)
    said = "was achieved where 0.1 was asked for" in capsys.readouterr().err
    assert said == warns
    evaluation.warn_of_density(None, achieved)
    assert capsys.readouterr().err == ""


def test_small_densities_differ_in_the_warning(capsys):
    """The warning shows so many digits that the two densities differ."""
    evaluation.warn_of_density(0.0001, 0.000134)
    assert "density 0.000134 was achieved where 0.0001 was asked for" in capsys.readouterr().err


def test_another_range_is_refused(tiny, tmp_path):
    path = score_task(tiny, tmp_path)
    task = get_task(None, path)
    assert evaluation.task_of_same_labels(None, path, task) == task
    path.write_text(path.read_text().replace("[0, 5]", "[0, 1]"))
    with pytest.raises(UserError, match="values: expected kind, labels and range of values"):
        evaluation.task_of_same_labels(None, path, task)


def test_totals_of_a_table():
    """A table of counts gets sums, not means, at its end."""
    table = evaluation.with_totals(np.array([[1, 2], [3, 4]]))
    assert table.tolist() == [[1, 2, 3], [3, 4, 7], [4, 6, 10]]


def test_entropy():
    assert evaluation.entropy(0.5) == 1
    assert evaluation.entropy(0) == evaluation.entropy(1) == 0
    assert evaluation.entropy(0.1) == pytest.approx(0.469, abs=1e-3)


def test_best_reports_the_best_checkpoint(monkeypatch):
    """`eval.py RUN` reports the folder model/, and with --best the folder best/."""
    asked = []
    monkeypatch.setattr(evaluation, "load_run", lambda run, which: [asked.append(which)] * 4)
    monkeypatch.setattr(evaluation, "report", lambda *args: None)
    assert evaluation.main(["RUN", "--device", "cpu"]) == 0
    assert evaluation.main(["RUN", "--best", "--device", "cpu"]) == 0
    assert asked == ["model", "best"]


def steps_of_the_best(monkeypatch, values, settled, total_steps=9):
    """The step of the best evaluation so far, after evaluations at the steps 1, 2, ..."""
    monkeypatch.setattr(train, "write_model", lambda run, name: None)
    monkeypatch.setattr(train, "write_scores", lambda run, folder: None)
    values = dict(enumerate(values, 1))
    run = SimpleNamespace(
        loss_sum=torch.tensor(1.0),
        norm=0.0,
        world=1,
        dtype="fp32",
        scaler=SimpleNamespace(get_scale=lambda: 1.0),
        method=SimpleNamespace(wrong=False, achieved=lambda: 1.0, settled=settled),
        progress=train.Progress(),
        task=SimpleNamespace(metrics=("accuracy",)),
        model=None,
        dev_sets={},
        log=SimpleNamespace(row=lambda **row: None),
        at=lambda step: "",
        out=train.Path("unused"),
        total_steps=total_steps,
        teacher=SimpleNamespace(consider=lambda *args: None),
    )
    best = []
    for step, value in values.items():
        run.measure = lambda model, dev_sets, value=value: {"accuracy": value}
        train.evaluate_step(run, step)
        best.append(run.progress.best and run.progress.best["step"])
    return best


def test_of_equal_evaluations_the_first_is_the_best(monkeypatch):
    """A later checkpoint becomes the best only if it is better."""
    steps = steps_of_the_best(monkeypatch, [0.5, 0.5, 0.6], settled=lambda step: True)
    assert steps == [1, 1, 3]


def test_the_best_has_the_final_density(monkeypatch):
    """Before the density has settled nothing is the best; without another the last step is."""
    steps = steps_of_the_best(monkeypatch, [0.9, 0.5, 0.6], settled=lambda step: step > 1)
    assert steps == [None, 2, 3]
    steps = steps_of_the_best(monkeypatch, [0.9, 0.5], lambda step: False, total_steps=2)
    assert steps == [None, 2]
