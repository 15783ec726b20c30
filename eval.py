"""Metrics, predictions, and the report of a finished run.

    python eval.py RUN                                       metrics on dev, densities, sizes
    python eval.py RUN --best                                the same of the best checkpoint on dev
    python eval.py RUN --split test --predictions CoLA.tsv   the form of the GLUE leaderboard
    python eval.py MNLI_RUN --task ax --predictions AX.tsv   the diagnostic set, by a run on MNLI
    python eval.py RUN --input FILE                          your own text, labelled on the terminal

More reports:

    python -m tools.report runs/*                            one Markdown table over all runs
    python -m tools.report RUN --plot RUN.png                densities and curves, as a picture
    python -m tools.report RUN --density 0.2 0.1 0.05        dev metrics at other densities
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Dataset, Parser, atomic_write, collate, encode, get_task, is_stream, live
from data import load_dataset, load_tokenizer, program, read_json, read_tsv, require, tell
from data import token_sizes
from model import DEVICES, autocast, inputs, load_model, pick_device, send, task_loss, to_value
from prune import METHODS, distill, encoder_matrices, self_distill

# -------------------------------------------------------------------------------------------------
# metrics, by their GLUE names


def f1(predicted, labels):
    """Return F1 of class 1, or 0 where that class is neither predicted nor there."""
    hits = np.sum((predicted == 1) & (labels == 1))
    total = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def pearson(x, y):
    """Return the Pearson correlation in float64, or 0 where one side is constant."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def ranks(x):
    """Return average ranks: equal values share the mean of their places."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": lambda predicted, labels: float(np.mean(predicted == labels)),
    "f1": f1,
    "matthews": pearson,  # Matthews' correlation is that of two 0-1 variables
    "pearson": pearson,
    "spearman": lambda x, y: pearson(ranks(x), ranks(y)),
}

# -------------------------------------------------------------------------------------------------
# running a model over a split

# Tokens in a batch of `predict`, with padding. A CPU wants what its cache holds: it is 1.5 to 2.5
# times as fast as with 1 << 14 (measured). A GPU wants many (not measured).
MAX_TOKENS = {"cpu": 1 << 10, "mps": 1 << 14, "cuda": 1 << 17}


@torch.no_grad()
def predict(model, dataset, device, dtype):
    """Return logits (N, K) float32 on the CPU, in the order of the split, without dropout.

    The batches are the same every time. Under torchrun each rank computes its share of them.
    """
    rank = 0
    world = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()
    was_training = model.training
    model.eval()
    # The longest first: there is little padding, and memory runs out at once or never.
    order = np.argsort(-dataset.lengths, kind="stable")
    sizes = token_sizes(dataset.lengths, MAX_TOKENS[device.type])
    parts = np.split(order, np.cumsum(sizes)[:-1])[rank::world]
    logits = []
    with autocast(device, dtype), live("predict", len(parts)) as bar:
        for part in parts:
            logits.append(model(**inputs(collate(dataset, part), device)))
            bar.update()
    model.train(was_training)
    table = torch.zeros(len(dataset), model.outputs, device=device)
    for part, values in zip(parts, logits):
        table[send(torch.from_numpy(part), device)] = values
    if world > 1:
        dist.all_reduce(table)
    return table.cpu()


def to_predictions(task, logits):
    """Return classes (N,) or, of a regression task, values (N,), as numpy."""
    if task.regression:
        return to_value(logits, task.low, task.high).numpy()
    return logits.argmax(dim=1).numpy()


def measure(task, logits, labels, suffix=""):
    """Return {metric: value} under GLUE's names; `suffix` marks MNLI's mismatched half."""
    predicted = to_predictions(task, logits)
    metrics = {}
    for full_name in task.metrics:
        name = full_name.removesuffix("_mm")
        if name + suffix == full_name:
            metrics[full_name] = METRICS[name](predicted, labels)
    return metrics


def evaluate(model, task, dev_sets, device, dtype):
    """Return the metrics over `dev_sets` {suffix: dataset}; see `load_dev`."""
    metrics = {}
    for suffix, dataset in dev_sets.items():
        logits = predict(model, dataset, device, dtype)
        metrics |= measure(task, logits, dataset.labels, suffix)
    return metrics


def show(metrics):
    """Return the metrics as the terminal shows them, in percent."""
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items())


def load_dev(task, tokenizer, max_length, data_dir):
    """Return {suffix: dataset}: dev, and for MNLI its mismatched half, too."""
    dev_sets = {}
    for split, suffix in task.eval_splits.items():
        dev_sets[suffix] = load_dataset(task, split, tokenizer, max_length, data_dir)
    return dev_sets


# -------------------------------------------------------------------------------------------------
# finished runs


def trained_on(path, about):
    """Return the task that `about` describes by its "task", "task_file" and "labels".

    `about` is what `path` says of its training. Raises UserError where the task file, which may
    have changed since, describes another task or other labels.
    """
    name = None if about["task_file"] else about["task"]
    task = get_task(name, about["task_file"])
    then = f"{about['task']} with labels {about['labels']}"
    now = f"{task.name} with labels {list(task.labels)}"
    require(then == now, f"{path}: trained on {then}; the task file describes {now}")
    return task


def load_run(run, which="model"):
    """Return (model, task, tokenizer, settings) of a run; `which` is "model" or "best".

    "model" is the last step, "best" the best checkpoint on dev.
    Raises UserError where the run is not finished, or where its task has changed since.
    """
    run = Path(run)
    config = read_json(run / "config.json")
    settings = config.get("settings")
    whole = config.keys() >= {"labels", "outputs", "words", "dtype"} and isinstance(settings, dict)
    whole = whole and settings.keys() >= {"method", "task", "task_file", "max_length", "density"}
    valid = whole and settings["method"] in list(METHODS)
    require(valid, f"{run}/config.json: not the settings of a run of train.py")
    settings["dtype"] = config["dtype"]  # what "auto" was
    folder = run / which
    require(folder.is_dir(), f"{run}: has no {which}/ yet; continue the run with --resume")
    task = trained_on(run, settings | config)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json").get("vocab_size", 0))
    output_head = METHODS[settings["method"]].output_head
    model = load_model(folder, output_head, config["outputs"], config["words"], new_head=False)
    return model, task, tokenizer, settings


# -------------------------------------------------------------------------------------------------
# teachers


class Teacher:
    """The model whose predictions the run learns from, besides the labels.

    That is none, a dense run, this run's own best checkpoint so far ("self"), or a dense run until
    a checkpoint is better ("self:RUN").

    `table` is what the teacher says of each training example: logits (N, K) or, of a regression
    task, values (N,). It depends on nothing but teacher and example, and is computed once per
    teacher. None: there is no teacher yet.
    """

    def __init__(self, setting):
        self.is_self = setting.split(":")[0] == "self"
        self.dense_run = "" if setting in ("none", "self") else setting.removeprefix("self:")
        self.table = None

    def load(self, run):
        """Let the dense run teach. Raises UserError where its task, labels or tokenizer differ."""
        name = f"--teacher {self.dense_run}"
        model, task, tokenizer, settings = load_run(self.dense_run)
        method = settings["method"]
        require(method == "dense", f"{name}: a {method} run; expected a dense one")
        theirs, ours = [f"{t.name} with labels {list(t.labels)}" for t in (task, run.task)]
        require(theirs == ours, f"{name}: trained on {theirs}; this run is on {ours}")
        same = tokenizer.to_str() == run.tokenizer.to_str()
        require(same, f"{name}: its tokenizer differs from that of {run.settings.model}")
        metrics = run.measure(model.to(run.device), run.held_out or run.dev_sets)
        tell(f"teacher {self.dense_run}: {show(metrics)}")
        self.take_over(run, model, metrics[task.metrics[0]])

    def consider(self, run, step, metrics):
        """Let the student of this step take over as teacher if it is better than the present one.

        `metrics` are those on dev. With --teacher-split the held-out part of train decides.
        """
        if not self.is_self or step == run.total_steps:
            return
        if run.held_out:
            metrics = run.measure(run.model, run.held_out)
        measured = metrics[run.task.metrics[0]]
        if run.progress.teacher is None or measured > run.progress.teacher:
            self.take_over(run, run.model, measured)
            run.log.row(step=step, teacher=measured)
            tell(f"{run.at(step)}  teaches itself from here")

    def take_over(self, run, model, measured):
        run.progress.teacher = measured
        self.table = teacher_table(model, run.task, run.train_set, run.device, run.dtype)

    def losses(self, losses, logits, examples, task):
        """Return the losses (B,) of the task with the teacher's part, for logits (B, K)."""
        if self.table is None:
            return losses
        taught = self.table[send(torch.from_numpy(examples), self.table.device)]
        if task.regression:  # a squared error has no entropy by which to weigh the teacher
            return 0.5 * losses + 0.5 * task_loss(logits, taught, task.low, task.high)
        mix = self_distill if self.is_self else distill
        return mix(losses, logits, taught)


def teacher_table(model, task, dataset, device, dtype):
    """Return what a teacher predicts of each example: logits (N, K), or values (N,)."""
    logits = predict(model, dataset, device, dtype)
    if task.regression:
        logits = to_value(logits, task.low, task.high)
    return logits.to(device)


# -------------------------------------------------------------------------------------------------
# the report of a run


def kept_weights(model):
    """Return (non-zero weights, all weights) of the encoder's matrices: two arrays (L, 6)."""
    matrices = encoder_matrices(model).values()
    kept = [[int(linear.weight.count_nonzero()) for linear in peers] for peers in matrices]
    sizes = [[linear.weight.numel() for linear in peers] for peers in matrices]
    return np.array(kept).T, np.array(sizes).T  # (6, L) -> (L, 6)


def warn_of_density(asked, achieved):
    """Say that a run has missed the density asked for, if it has by more than 10%."""
    if asked and abs(achieved / asked - 1) > 0.1:
        tell(f"warning: density {achieved:.4f} was achieved where {asked:g} was asked for")


def entropy(density):
    """Return the bits per weight that a random mask of this density needs on average."""
    return sum(p * math.log2(1 / p) for p in (density, 1 - density) if p)


def report(run, which, device, data_dir):
    """Print the metrics on dev, the densities and the sizes of one run."""
    model, task, tokenizer, s = load_run(run, which)
    dev_sets = load_dev(task, tokenizer, s["max_length"], data_dir)
    metrics = evaluate(model.to(device), task, dev_sets, device, s["dtype"])
    step = "last step" if which == "model" else "best checkpoint"
    print(f"{run}: {s['method']} on {task.name}, {step}, {s['dtype']}")
    for name, value in metrics.items():
        print(f"  {name:12} {100 * value:.2f}")
    kept, sizes = kept_weights(model)
    warn_of_density(s["density"], kept.sum() / sizes.sum())
    print("density (non-zero weights over all, as saved)")
    print_densities(kept, sizes, list(model.matrices))
    print("size")
    print_sizes(int(kept.sum()), int(sizes.sum()), sum(p.numel() for p in model.parameters()))


def print_densities(kept, sizes, letters):
    """Print a row per layer and a row for all; a column per matrix and a column for all."""
    print("  layer " + "".join(f"{letter:>8}" for letter in [*letters, "all"]))
    densities = with_totals(kept) / with_totals(sizes)  # (L + 1, 7)
    for name, row in zip([*range(len(kept)), "all"], densities):
        print(f"  {name:>5} " + "".join(f"{density:8.4f}" for density in row))


def with_totals(table):
    """Return a table (L, 6) with a row and a column of sums, (L + 1, 7)."""
    table = np.vstack([table, table.sum(0)])
    return np.column_stack([table, table.sum(1)])


def print_sizes(kept, total, everything):
    """Print the megabytes of the model, of its matrices, of what is kept, and of the mask."""
    mask_mb = total / 8e6  # a bit per weight
    print(f"  all parameters   {everything:12,}  {4 * everything / 1e6:8.2f} MB in fp32")
    print(f"  encoder matrices {total:12,}  {4 * total / 1e6:8.2f} MB in fp32, zeros stored")
    print(f"  kept of these    {kept:12,}  {2 * kept / 1e6:8.2f} MB in fp16, without their places")
    shortest = f"{mask_mb * entropy(kept / total):.2f} MB at its entropy"
    print(f"  the mask alone                 {mask_mb:8.2f} MB as bits, {shortest}")


def spell(task, logits):
    """Return the predictions as the task's files write them, (N,) strings."""
    predicted = to_predictions(task, logits)
    if task.regression:
        return [f"{np.clip(float(x), task.low, task.high):.3f}" for x in predicted]
    return [task.spelling[i] for i in predicted]


HEADER = "index\tprediction\n"


def write_predictions(loaded, device, data_dir, split, path, name):
    """Write a split's predictions as the GLUE leaderboard takes them: index<TAB>prediction.

    `loaded`: what `load_run` returns. `name`: its task, or another one with the same labels.
    """
    model, task, tokenizer, s = loaded
    if name != task.name:
        other = get_task(name)
        same = other.labels == task.labels and not task.regression
        require(same, f"--task {name}: the run was trained on {task.name}, whose labels differ")
        task = other
    has = f"{task.name} has {', '.join(task.files)}"
    require(split in task.files, f"--split {split}: no such split; {has}")
    dataset = load_dataset(task, split, tokenizer, s["max_length"], data_dir)
    texts = spell(task, predict(model.to(device), dataset, device, s["dtype"]))
    rows = [f"{i}\t{text}\n" for i, text in enumerate(texts)]
    if os.path.isfile(path) and not is_stream(path):
        with open(path, "rb") as file:
            ours = file.readline() in (b"", HEADER.encode())
        require(ours, f"{path}: is there already, and holds no predictions; name another file")
    atomic_write(path, HEADER + "".join(rows))
    stream = sys.stderr if is_stream(path) else sys.stdout
    tell(f"{path}: {len(texts):,} predictions of {task.name} {split}", stream)


def label_texts(loaded, device, path):
    """Print what a run says of texts: its prediction, the probability of each class, the text.

    The file is a TSV with the task's columns. "-" is standard input: each line is a text, or a
    pair of texts with a tab between them. Empty lines are skipped.
    """
    model, task, tokenizer, s = loaded
    own = replace(task, rows={}, header=task.columns, drop_broken=False)
    if path == "-":
        texts, _ = read_tsv(own, "lines", "standard input", sys.stdin.buffer.read())
    else:
        texts, _ = read_tsv(own, "test", path, Path(path).read_bytes())
    dataset = Dataset(*encode(texts, tokenizer, s["max_length"]), max_length=s["max_length"])
    logits = predict(model.to(device), dataset, device, s["dtype"])
    shares = logits.softmax(dim=1)[:, : len(task.labels)].numpy()  # (N, K); regression: (N, 0)
    print("prediction", *task.spelling, *task.columns, sep="\t")
    for said, share, text in zip(spell(task, logits), shares, texts):
        columns = [text] if isinstance(text, str) else text
        print(said, *[f"{p:.4f}" for p in share], *columns, sep="\t")


@program
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    add("--best", action="store_true", help="the best checkpoint on dev, not the last step")
    add("--predictions", metavar="FILE", help="write a split's predictions for the leaderboard")
    add("--split", help="split to predict: dev, dev_mm, test_mm or, by default, test")
    add("--task", help="predict another task of the same labels: ax by a run on mnli")
    add("--input", metavar="FILE", help="label your own text: a TSV, or - for standard input")
    add("--data-dir", default="data", help="folder of the GLUE files (default: data)")
    add("--device", default="auto", choices=DEVICES)
    args = parser.parse_args(argv)
    which = "best" if args.best else "model"
    device = pick_device(args.device)
    both = args.predictions and args.input
    require(not both, "--predictions and --input cannot be used together")
    if not args.predictions:
        require(not (args.split or args.task), "--split and --task need --predictions")
    if not (args.predictions or args.input):
        for run in args.runs:
            report(run, which, device, args.data_dir)
        return
    require(len(args.runs) == 1, "--predictions and --input take one run")
    loaded = load_run(args.runs[0], which)
    if args.input:
        label_texts(loaded, device, args.input)
    else:
        name = args.task or loaded[1].name
        split = args.split or "test"
        write_predictions(loaded, device, args.data_dir, split, args.predictions, name)


if __name__ == "__main__":
    sys.exit(main())
