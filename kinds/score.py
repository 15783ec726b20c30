"""The kind "score": a text or a pair of texts has a number, as in STS-B.

The model has one output, or two, which stand for the low end of the range and for the high end.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F

from kinds.classify import Classify
from kinds.metrics import pearson, spearman
from support.machine import send
from support.terminal import UserError, quote, warn


class Score(Classify):
    """A text or a pair of texts has a number from `low` to `high`."""

    name = "score"
    picks_label = False
    metrics = {"pearson": pearson, "spearman": spearman}
    keys = {"columns": (1, 2), "label": (1, 1), "words": (1, 2), "range": None}
    needed = {"columns", "label", "range"}
    options = {"quoted": bool}

    def __init__(self, task, tokenizer=None):
        super().__init__(task, tokenizer)
        self.low, self.high = task.options.get("range", (0.0, 5.0))

    @classmethod
    def describe(cls, values, expect):
        ends = values["range"]
        numbers = {type(end) for end in ends} <= {int, float}
        in_order = numbers and len(ends) == 2 and -1e9 <= ends[0] < ends[1] <= 1e9
        expect(in_order, "range", "two numbers from -1e9 to 1e9, the lower one first")
        (label,) = values["label"]
        expect(label not in values["columns"], "label", "another column than those of the texts")
        fields = {"labels": (), "spelling": (), "columns": tuple(values["columns"])}
        return fields | {"label": label, "options": {"range": (float(ends[0]), float(ends[1]))}}

    @property
    def outputs(self):
        return ("score",)

    def read_label(self, text, place):
        try:
            value = float(text)
            # False for nan; and "1_5" is 15 in Python alone
            if self.low <= value <= self.high and "_" not in text:
                return value
        except ValueError:
            pass  # not a number
        expected = f"expected a number from {self.low} to {self.high}"
        if re.fullmatch(r"\s*[-+]?\d+,\d+\s*", text):
            expected += "; write a point, not a comma"
        raise UserError(f"{place}: unknown {self.task.label} {quote(text)}, {expected}")

    def to_gold(self, labels):
        return np.array(labels, np.float32)

    def losses(self, logits, labels):
        """Return the loss of each value.

        One output: squared error. Two outputs ("no", "yes"): cross-entropy against the soft target
        p(yes) = (value - low) / (high - low) (Gao et al. 2021, section 3.2).
        """
        if logits.size(1) == 1:
            return (logits[:, 0] - labels) ** 2
        yes = (labels - self.low) / (self.high - self.low)
        target = torch.stack([1 - yes, yes], dim=1)  # (B, 2)
        return F.cross_entropy(logits, target, reduction="none")

    def losses_taught(self, decided, table, weigh):
        """Return half the error to the label and half that to the teacher's value.

        A squared error has no entropy by which to weigh the teacher.
        """
        taught = table[send(decided.rows, table.device)]
        return 0.5 * decided.losses + 0.5 * self.losses(decided.logits, taught)

    def teach(self, model, dataset, device, dtype):
        values = self.to_value(self.logits(model, dataset, device, dtype))
        if np.mean((values.numpy() - dataset.labels) ** 2) > np.var(dataset.labels):
            told = "the teacher's values are further from the labels than their mean is"
            warn(f"{told}; expected values from {self.low} to {self.high}")
        return values.to(device)

    def to_value(self, logits):
        """Return the value (B,) that one or two outputs stand for; see `losses`."""
        if logits.size(1) == 1:
            return logits[:, 0]
        return self.low + (self.high - self.low) * logits.softmax(dim=1)[:, 1]

    def predictions(self, logits, dataset):
        return self.to_value(logits).numpy()

    def spell(self, predicted, exact=False):
        if exact:
            return [f"{float(x):.6f}" for x in predicted]
        return [f"{np.clip(float(x), self.low, self.high):.6f}" for x in predicted]
