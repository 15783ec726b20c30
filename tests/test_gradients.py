"""tools/gradients.py: what the first gradients of the scores hold."""

import re

import numpy as np
import pytest
import torch

import data
from kinds.classify import IGNORED
from tools import gradients


def test_labels_are_dealt_out_anew():
    """Every label stays, elsewhere; a token without a label keeps none."""
    labels = np.array([0, IGNORED, 1, 2, IGNORED, 3, 4, 5])
    lengths = np.array([5, 3])
    second = lengths.astype(np.int32)
    kind = data.kind_of(data.Task(name="t", folder="t", kind="tag", labels=("O", "B-A", "I-A")))
    tags = data.Dataset(kind, np.arange(8, dtype=np.int32), lengths, second, labels)
    dealt = gradients.dealt(tags, seed=0).labels
    assert sorted(dealt) == sorted(labels) and (dealt != labels).any()
    assert ((dealt == IGNORED) == (labels == IGNORED)).all()
    assert (tags.labels == labels).all()


def test_the_part_along_a_direction_is_removed():
    vector, direction = torch.randn(2, 50, dtype=torch.float64)
    rest = gradients.without(vector, direction)
    assert gradients.cosine(rest, direction) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(gradients.without(direction, direction), torch.zeros(50).double())


def cosines(tiny, capsys, *flags):
    assert gradients.main([*tiny, "--method", "smp-s", *flags]) == 0
    out = capsys.readouterr().out.splitlines()[-1]
    found = re.findall(r"([a-z ]+) (-?\d\.\d+)", out)
    return {name.strip(): float(value) for name, value in found}


def test_without_a_task_all_is_the_prior(tiny, monkeypatch, capsys):
    """Where labels that are dealt out anew are the same, the gradient is the prior's."""
    found = cosines(tiny, capsys)
    assert abs(found["is the prior"]) < 0.9999
    monkeypatch.setattr(gradients, "dealt", lambda dataset, seed: dataset)
    assert cosines(tiny, capsys)["is the prior"] == 1.0


def test_a_method_without_scores(tiny, capsys):
    assert gradients.main([*tiny, "--method", "dense"]) == 2
    assert "--method dense: has no scores" in capsys.readouterr().err
