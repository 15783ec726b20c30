"""What do the first gradients of the scores say: the task, or only how frequent the labels are?

    python -m tools.gradients --model MODEL --task stsb --method smp-s        flags as of train.py

Nothing is trained. The gradient of the scores at the start of a run, where every weight is kept, is
summed over one epoch: with the labels, and with the same labels dealt out anew among the examples.
What the second sum holds does not depend on which example has which label. It is the *prior*.

- "repeats": the cosine between the sums over two halves of the batches. Near 0, the gradient is
  noise.
- "is the prior": the cosine between the sums with the labels and with the dealt ones. Near 1, the
  gradient says no more than how frequent the labels are.
- "rest repeats": as the first, after the part along the prior is removed. This is what the scores
  can learn about the task from the first gradients.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import UserError, parse_settings, program  # first: it says "loading torch"

import tempfile
from dataclasses import replace

import numpy as np
import torch

from kinds.classify import IGNORED
from support.files import claimed
from train import Run, Settings, settings_from


def dealt(dataset, seed):
    """Return the dataset with its labels dealt out anew; what has no label keeps none."""
    labels = dataset.labels.copy()
    labelled = labels != IGNORED  # always, where labels are those of rows
    values = labels[labelled]
    labels[labelled] = values[np.random.default_rng(seed).permutation(len(values))]
    return replace(dataset, labels=labels)


def gradient(run, dataset, order):
    """Return the gradient of the scores, flat, summed over the batches of `order`."""
    run.optimizer.zero_grad(set_to_none=True)
    for step, batch in enumerate(order):
        torch.manual_seed(step)  # the same dropout with both labels
        decided = run.kind.decide(run.model, dataset.collate(batch), run.device, run.dtype)
        (decided.losses.sum() / dataset.decision_counts[batch].sum()).backward()
    return torch.cat([linear.scores.grad.flatten() for linear in run.method.linears])


def cosine(one, other):
    return float(torch.dot(one, other) / (one.norm() * other.norm()))


def without(vector, direction):
    """Return the part of a vector that is at right angles to `direction`."""
    return vector - torch.dot(vector, direction) / torch.dot(direction, direction) * direction


def measure(run):
    """Return {what: cosine}; see the top of this file."""
    order = run.batches_of(0)
    halves = (order[::2], order[1::2])
    run.model.train()
    first, second = [gradient(run, run.train_set, half) for half in halves]
    others = dealt(run.train_set, run.settings.seed)
    prior = sum(gradient(run, others, half) for half in halves)
    return {
        "repeats": cosine(first, second),
        "is the prior": cosine(first + second, prior),
        "rest repeats": cosine(without(first, prior), without(second, prior)),
    }


@program
def main(argv=None):
    given = parse_settings(Settings, __doc__, sys.argv[1:] if argv is None else argv)
    given.pop("dry_run", None)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_from(given | {"out": f"{folder}/run"})
        with claimed(Path(settings.out), resume=False, is_demo=False):
            run = Run(settings, command="")
    linears = getattr(run.method, "linears", None)
    if not linears or linears[0].scores is None:
        raise UserError(f"--method {run.settings.method}: has no scores; use smp or movement")
    found = measure(run)
    text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    print(f"{run.settings.task}, {run.settings.model}: {text}")


if __name__ == "__main__":
    sys.exit(main())
