"""Metrics, predictions, and the report of a finished run.

    python eval.py RUN                                       metrics on dev, densities, sizes
    python eval.py RUN --best                                the same of the best checkpoint on dev
    python eval.py RUN --split test                          metrics on test, if it has labels
    python eval.py RUN --split test --predictions CoLA.tsv   the form of the GLUE leaderboard
    python eval.py MNLI_RUN --task ax --predictions AX.tsv   the diagnostic set, by a run on MNLI
    python eval.py RUN --input FILE                          your own text, labelled on the terminal
    python eval.py --task squad --score FILE                 metrics of any system's predictions

More reports:

    python -m tools.report runs/*                            one Markdown table over all runs
    python -m tools.report RUN --plot RUN.png                densities and curves, as a picture
    python -m tools.report RUN --density 0.2 0.1 0.05        dev metrics at other densities
"""

from support.terminal import Parser, UserError, program  # first: it says "loading torch"

import math
import os
import re
import sys
from pathlib import Path

import numpy as np

from data import get_task, kind_of, load_dataset, load_dev, make_dataset, read_split
from data import with_settings
from kinds.classify import HEADER
from models.runs import load_run
from support.fetch import locate
from support.files import atomic_write, is_stream
from support.machine import DEVICES, pick_device
from support.matrices import encoder_matrices
from support.terminal import figure, show, tell, warn

# ---------- metrics -------------------------------------------------------------------------------


def evaluate(model, dev_sets, device, dtype, more=False):
    """Return the metrics {name: value} over `dev_sets` {split: Dataset}; see `load_dev`.

    `more`: those that need other programs, too.
    """
    metrics = {}
    for split, dataset in dev_sets.items():
        predicted = dataset.kind.predict(model, dataset, device, dtype)
        metrics |= measure(dataset.kind, predicted, dataset.gold, split, more)
    return metrics


def measure(kind, predicted, gold, split, more):
    """Return the metrics {name: value} of predictions; `more`: see `evaluate`."""
    metrics = kind.measure(predicted, gold, split)
    return metrics | kind.more_metrics(predicted, gold) if more else metrics


def manner(dev_sets):
    """Return in brackets how predictions are made for data sets; "" where there is one way."""
    hows = {dataset.kind.how for dataset in dev_sets.values()} - {""}
    return "".join(f" ({how})" for how in hows)


def warn_of_density(asked, achieved):
    """Say that a run has missed the density asked for, if it has by more than 10%."""
    if asked and abs(achieved / asked - 1) > 0.1:
        warn(f"density {achieved:.3g} was achieved where {asked:.3g} was asked for")


# ---------- the report of a run -------------------------------------------------------------------


def report(run, loaded, which, device, data_dir, split=None, more=False):
    """Print the metrics on dev or another split, the densities and the sizes of one run.

    `loaded`: what `load_run` returns.
    """
    model, task, tokenizer, s = loaded
    dev_sets = load_dev(task, tokenizer, s["max_length"], data_dir, split)
    if not dev_sets:
        raise UserError(f"{task.name}: no split has labels; give --predictions FILE")
    metrics = evaluate(model.to(device), dev_sets, device, s["dtype"], more)
    step = "last step" if which == "model" else "best checkpoint"
    on = f"{task.name} {split}" if split else task.name
    print(f"{run}: {s['method']} on {on}, {step}, {s['dtype']}{manner(dev_sets)}")
    for name, value in metrics.items():
        print(f"  {name:17} {figure(name, value)}")
    kept, sizes = kept_weights(model)
    warn_of_density(s["density"], kept.sum() / sizes.sum())
    print_densities(kept, sizes, list(model.matrices))
    print_sizes(model, int(kept.sum()), int(sizes.sum()))


def kept_weights(model):
    """Return (non-zero weights, all weights) of the encoder's matrices: two arrays (L, 6)."""
    matrices = encoder_matrices(model).values()
    kept = [[int(linear.weight.count_nonzero()) for linear in peers] for peers in matrices]
    sizes = [[linear.weight.numel() for linear in peers] for peers in matrices]
    return np.array(kept).T, np.array(sizes).T  # (6, L) -> (L, 6)


def print_densities(kept, sizes, letters):
    """Print a row per layer and a row for all; a column per matrix and a column for all."""
    print("density (non-zero weights over all, as saved)")
    print("  layer " + "".join(f"{letter:>8}" for letter in [*letters, "all"]))
    densities = with_totals(kept) / with_totals(sizes)  # (L + 1, 7)
    for name, row in zip([*range(len(kept)), "all"], densities):
        print(f"  {name:>5} " + "".join(f"{density:8.4f}" for density in row))


def with_totals(table):
    """Return a table (L, 6) with a row and a column of sums, (L + 1, 7)."""
    table = np.vstack([table, table.sum(0)])
    return np.column_stack([table, table.sum(1)])


def entropy(density):
    """Return the bits per weight that a random mask of this density needs on average."""
    return sum(p * math.log2(1 / p) for p in (density, 1 - density) if p)


def print_sizes(model, kept, total):
    """Print the megabytes of a model, of its matrices, of what is kept, and of the mask.

    `kept` of the `total` weights of its matrices are not 0.
    """
    everything = sum(p.numel() for p in model.parameters())
    print("size")
    mask_mb = total / 8e6  # a bit per weight
    print(f"  all parameters   {everything:12,}  {4 * everything / 1e6:8.2f} MB in fp32")
    print(f"  encoder matrices {total:12,}  {4 * total / 1e6:8.2f} MB in fp32, zeros stored")
    print(f"  kept of these    {kept:12,}  {2 * kept / 1e6:8.2f} MB in fp16, without their places")
    shortest = f"{mask_mb * entropy(kept / total):.2f} MB at its entropy"
    print(f"  the mask alone                 {mask_mb:8.2f} MB as bits, {shortest}")


# ---------- files of predictions ------------------------------------------------------------------


def score(path, task, split, data_dir, more):
    """Print the metrics of a file of predictions, by whatever system."""
    kind = kind_of(task)
    source = locate(task, split, data_dir)
    texts, gold = read_split(task, split, source, source.read_bytes(), role="dev")
    predicted = kind.read_predictions(path, texts, gold)
    metrics = measure(kind, predicted, gold, split, more)
    print(f"{path}: {show(metrics)}{kind.note}")


def write_predictions(loaded, device, data_dir, split, path):
    """Write a split's predictions; see `as_file` of the task's kind.

    `loaded`: what `load_run` returns.
    """
    model, task, tokenizer, s = loaded
    dataset = load_dataset(task, split, tokenizer, s["max_length"], data_dir)
    if os.path.isfile(path) and not is_stream(path):
        with open(path, "rb") as file:
            ours = file.readline() in (b"", HEADER.encode())
        if not ours:
            only = "only a TSV of predictions is written over; name another file"
            raise UserError(f"{path}: is there already, and {only}")
    predicted = dataset.kind.predict(model.to(device), dataset, device, s["dtype"])
    exact = split in task.eval_splits  # --score shall find what was measured
    atomic_write(path, dataset.kind.as_file(predicted, dataset, exact))
    stream = sys.stderr if is_stream(path) else sys.stdout
    tell(f"{path}: {len(predicted):,} predictions of {task.name} {split}", stream)


def task_of_same_labels(name, task_file, task):
    """Return another task, which a run on `task` can predict; UserError if it cannot."""
    other = get_task(name, task_file)
    theirs, ours = [(t.kind, t.labels, t.options.get("range")) for t in (other, task)]
    if theirs != ours:
        need = f"expected kind, labels and range of {task.name}, on which the run was trained"
        raise UserError(f"{other.name}: {need}")
    return other


def label_texts(loaded, device, path):
    """Print what a run says of texts: its prediction, the probability of each class, the text.

    The file has the task's columns, see `read_input` of its kind. "-" is standard input: each line
    is a text, or a pair of texts with a tab between them. Only a kind whose prediction is one of
    the labels has probabilities.
    """
    model, task, tokenizer, s = loaded
    kind = kind_of(task, tokenizer)
    if path == "-":
        path = "standard input"
        found = kind.read_input(path, sys.stdin.buffer.read(), task.columns)
    else:
        found = kind.read_input(path, Path(path).read_bytes())
    if not found:
        raise UserError(f"{path}: no row of data")
    rows, texts, gold = kind.from_rows(found, path)
    arrays = kind.encode(texts, gold, tokenizer, s["max_length"])
    dataset = make_dataset(kind, (texts, gold), arrays, s["max_length"])
    predicted, shares = kind.label(model.to(device), dataset, device, s["dtype"])
    classes = task.spelling if kind.picks_label else ()
    print("prediction", *classes, *task.columns, sep="\t")
    for prediction, share, row in zip(predicted, shares, rows):
        columns = [row] if isinstance(row, str) else row
        fields = [prediction, *[f"{p:.4f}" for p in share], *columns]
        print(*[" ".join(re.split("[\t\r\n]", field)) for field in fields], sep="\t")


# ---------- the command line ----------------------------------------------------------------------


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folder of train.py")
    add("--best", action="store_true", help="the best checkpoint on dev, not the last step")
    add("--predictions", metavar="FILE", help="write a split's predictions")
    add("--score", metavar="FILE", help="metrics of predictions on --task; no RUN is needed")
    add("--split", help="dev, dev_mm, test or test_mm; default: dev, or test with --predictions")
    add("--metrics", choices=["all"], help="texts: METEOR, ROUGE-L and CIDEr, too; needs Java")
    add("--task", help="task of --score; or another task of the same labels: ax for a run on mnli")
    add("--task-file", metavar="JSON", help="the same, if the task is your own or has moved")
    add("--input", metavar="FILE", help="label your own text: a file, or - for standard input")
    add("--data-dir", default="data", help="folder of the data (default: data)")
    add("--device", default="auto", choices=DEVICES)
    args = parser.parse_args(argv)
    asked = [flag for flag in (args.predictions, args.input, args.score) if flag]
    if len(asked) > 1:
        raise UserError("--predictions, --input and --score cannot be used together")
    if args.score:
        if args.runs or args.best or not (args.task or args.task_file):
            raise UserError("--score takes --task or --task-file, and no RUN")
        return args
    if not args.runs:
        raise UserError("give RUN, or --score FILE with --task")
    if args.input and (args.split or args.task or args.task_file):
        raise UserError("--split, --task and --task-file do not go with --input")
    if asked and args.metrics:
        raise UserError("--metrics does not go with --predictions and --input")
    if asked and len(args.runs) > 1:
        raise UserError("--predictions and --input take one run")
    return args


@program
def main(argv=None):
    args = parse(argv)
    if args.score:
        task = get_task(args.task, args.task_file)
        if args.metrics:
            kind_of(task).check_more()
        score(args.score, task, args.split or "dev", args.data_dir, bool(args.metrics))
        return
    device = pick_device(args.device)
    which = "best" if args.best else "model"
    for run in args.runs:
        model, task, tokenizer, settings = load_run(run, which)
        if args.task or args.task_file:
            task = task_of_same_labels(args.task, args.task_file, task)
            task = with_settings(task, settings, run)
        if args.metrics:
            kind_of(task).check_more()
        loaded = (model, task, tokenizer, settings)
        if args.input:
            label_texts(loaded, device, args.input)
        elif args.predictions:
            split = args.split or "test"
            write_predictions(loaded, device, args.data_dir, split, args.predictions)
        else:
            report(run, loaded, which, device, args.data_dir, args.split, bool(args.metrics))


if __name__ == "__main__":
    sys.exit(main())
