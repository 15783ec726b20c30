"""Metrics, predictions and reports of finished runs.

    python eval.py RUN                                     metrics on dev, density per layer and matrix type, size
    python eval.py RUN --split test --predictions FILE     the GLUE leaderboard's form (MNLI: also --task ax)
    python eval.py runs/*                                  one Markdown table over all runs
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import UserError, collate, get_task, load_dataset, load_tokenizer
from model import load_model, read_json, to_score
from prune import METHODS

# ---------------------------------------------------------------------------------------------------------------------
# metrics, by their GLUE names


def matthews(predicted, labels):
    """Matthews correlation of two classes, 0 where it is undefined (one class only)."""
    tp, tn = np.sum((predicted == 1) & (labels == 1)), np.sum((predicted == 0) & (labels == 0))
    fp, fn = np.sum((predicted == 1) & (labels == 0)), np.sum((predicted == 0) & (labels == 1))
    bottom = math.sqrt(float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn))
    return float(tp * tn - fp * fn) / bottom if bottom else 0.0


def f1(predicted, labels):
    """F1 of class 1, 0 where nothing is predicted and nothing is there."""
    hits = np.sum((predicted == 1) & (labels == 1))
    total = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def pearson(x, y):
    """Pearson correlation in float64, 0 where one side is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(), y - y.mean()
    bottom = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / bottom if bottom else 0.0


def ranks(x):
    """Average ranks: equal values share the mean of their places."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": lambda predicted, labels: float(np.mean(predicted == labels)),
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": lambda x, y: pearson(ranks(x), ranks(y)),
}


# ---------------------------------------------------------------------------------------------------------------------
# running a model over a split


def autocast(device, dtype):
    """The autocast context of a run; `dtype` is "fp32", "bf16" or "fp16"."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if dtype == "bf16" else torch.float16)


def inputs(batch, device):
    """The model's three inputs, (B, T) each, on the device."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: batch[name].to(device, non_blocking=True) for name in names}


@torch.no_grad()
def predict(model, dataset, device, dtype, batch_size=128):
    """Logits (N, K) float32 on the CPU, in the split's order; dropout off. Under torchrun each rank does its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    order = np.argsort(-dataset.lengths, kind="stable")  # longest first: little padding, and memory runs out at once
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]
    with autocast(device, dtype):
        logits = [model(**inputs(collate(dataset, part), device)) for part in parts]
    model.train(was_training)
    table = torch.zeros(len(dataset), model.outputs, device=device)
    for part, values in zip(parts, logits, strict=True):
        table[torch.from_numpy(part).to(device)] = values
    if world > 1:
        dist.all_reduce(table)
    return table.cpu()


def to_predictions(task, logits):
    """Classes (N,) or, of a regression task, scores (N,), as numpy."""
    return (to_score(logits, task.low, task.high) if task.regression else logits.argmax(dim=1)).numpy()


def score(task, logits, labels, suffix=""):
    """{metric: value} under GLUE's names; `suffix` marks MNLI's mismatched half."""
    predicted = to_predictions(task, logits)
    names = [name.removesuffix("_mm") for name in task.metrics if name.endswith("_mm") == bool(suffix)]
    return {name + suffix: METRICS[name](predicted, labels) for name in names}


def evaluate(model, task, dev_sets, device, dtype):
    """Metrics over `dev_sets` {suffix: dataset}; see `load_dev`."""
    metrics = {}
    for suffix, dataset in dev_sets.items():
        metrics |= score(task, predict(model, dataset, device, dtype), dataset.labels, suffix)
    return metrics


def load_dev(task, tokenizer, max_length, data_dir):
    """{suffix: dataset}: dev, and for MNLI also its mismatched half."""
    return {
        suffix: load_dataset(task, split, tokenizer, max_length, data_dir) for split, suffix in task.eval_splits.items()
    }


def pick_device(name):
    """torch.device for "auto", "cpu", "cuda" or "mps"; UserError where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# finished runs


def load_run(run, which="model"):
    """(model, task, tokenizer, settings) of a finished run folder; `which`: "model" (last step) or "best"."""
    run = Path(run)
    config = read_json(run / "config.json")
    settings = config.get("settings")
    if not isinstance(settings, dict) or settings.get("method") not in METHODS:
        raise UserError(f"{run}/config.json: not the settings of a run of train.py")
    folder = run / which
    if not folder.is_dir():
        raise UserError(f"{run}: has no {which}/ yet; the run is not finished (continue it with --resume)")
    task = get_task(settings["task"], settings["task_file"])
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json").get("vocab_size", 0))
    if list(task.labels) != config["labels"]:
        raise UserError(f"{run}: trained on labels {config['labels']}, but {task.name} has {list(task.labels)}")
    head = METHODS[settings["method"]].head
    model = load_model(folder, head, config["outputs"], config["words"], new_head=False)
    return model, task, tokenizer, settings
