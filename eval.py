"""Metrics, predictions, and the report of a finished run.

    python eval.py RUN                                       metrics on dev, densities, sizes
    python eval.py RUN --best                                the same of the best checkpoint on dev
    python eval.py RUN --split test --predictions CoLA.tsv   the form of the GLUE leaderboard
    python eval.py MNLI_RUN --task ax --predictions AX.tsv   the diagnostic set, by a run on MNLI
    python eval.py RUN --input FILE                          your own text, labelled on the terminal
    python eval.py --task squad --score FILE                 metrics of any system's predictions

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

import json
import operator
import os
import re
import string
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.stride_tricks import sliding_window_view

from data import EVERY_POSITION, IGNORED, collate, get_task, load_dataset, load_tokenizer
from data import make_dataset, read_conll, read_split, read_tsv, token_sizes, tokenise
from model import decisions, inputs, load_model, send, task_loss, to_value
from prune import METHODS, distill, self_distill
from tools.common import DEVICES, Parser, atomic_write, autocast, is_stream, live, pick_device
from tools.common import program, read_json, require, tell
from tools.fetch import locate
from tools.sizes import kept_weights, print_densities, print_sizes

# -------------------------------------------------------------------------------------------------
# metrics


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


def normalise(text):
    """Return the words of an answer as SQuAD's official script compares them."""
    kept = [letter for letter in text.lower() if letter not in string.punctuation]
    return re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split()


def shared_words(words, right):
    """Return F1 of two bags of words, or of two sets; 0 where both are empty."""
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


def over_answers(compare, predicted, gold):
    """Return the mean over questions of the best `compare` with one of the answers.

    `predicted` are strings, and None where a prediction is missing, which scores 0.
    """
    values = []
    for text, (_, answers) in zip(predicted, gold, strict=True):
        words = normalise(text or "")
        scores = [compare(words, normalise(answer)) for answer, _ in answers]
        values.append(0.0 if text is None else max(scores))
    return float(np.mean(values))


def entities(sentences):
    """Return {(sentence, type, first word, word after the last)} of lists of tags, as conlleval.

    A tag I that continues nothing begins an entity.
    """
    found = set()
    for number, tags in enumerate(sentences):
        inside = ""  # the type of the entity that goes on
        first = 0  # its first word
        for place, tag in enumerate([*tags, "O"]):
            if inside and tag != f"I-{inside}":
                found.add((number, inside, first, place))
                inside = ""
            if not inside and tag != "O":
                inside = tag[2:]
                first = place
    return found


def entity_precision(predicted, gold):
    """Return the fraction of the predicted entities that are right, 0 where there are none."""
    found = entities(predicted)
    return len(found & entities(gold)) / max(1, len(found))


METRICS = {
    "accuracy": lambda predicted, labels: float(np.mean(predicted == labels)),
    "f1": f1,
    "matthews": pearson,  # Matthews' correlation is that of two 0-1 variables
    "pearson": pearson,
    "spearman": lambda x, y: pearson(ranks(x), ranks(y)),
}
# The metrics of answers and of tags. The `gold` of a question is (id, answers).
TEXT_METRICS = {
    "f1": partial(over_answers, shared_words),
    "em": partial(over_answers, operator.eq),
    "entity_f1": lambda predicted, gold: shared_words(entities(predicted), entities(gold)),
    "entity_precision": entity_precision,
    "entity_recall": lambda predicted, gold: entity_precision(gold, predicted),
}

# -------------------------------------------------------------------------------------------------
# running a model over a split

# Tokens in a batch of `predict`, with padding. A CPU wants what its cache holds: it is 1.5 to 2.5
# times as fast as with 1 << 14 (measured). A GPU wants many (not measured).
MAX_TOKENS = {"cpu": 1 << 10, "mps": 1 << 14, "cuda": 1 << 17}


@torch.no_grad()
def predict(model, dataset, device, dtype):
    """Return logits float32 on the CPU, in the order of the split, without dropout.

    They are (N, K): a row per example or, where every position is read, per token. The batches are
    the same every time. Under torchrun each rank computes its share of them.
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
    rows = []
    logits = []
    with autocast(device, dtype), live("predict", len(parts)) as bar:
        for part in parts:
            batch = collate(dataset, part)
            rows.append(batch["rows"])
            logits.append(model(**inputs(batch, device)))
            bar.update()
    model.train(was_training)
    count = len(dataset.ids if dataset.kind in EVERY_POSITION else dataset)
    table = torch.zeros(count + 1, model.outputs, device=device)  # the last row is for padding
    for place, values in zip(rows, logits):
        table[send(place, device)] = values
    if world > 1:
        dist.all_reduce(table)
    return table[:-1].cpu()


def to_predictions(task, logits, dataset):
    """Return what the logits of a split say of each example.

    classify: classes (N,). score: values (N,). span: strings. tag: lists of tags.
    """
    if task.kind == "span":
        return best_answers(logits.numpy(), dataset)
    if task.kind == "tag":
        return tags_of_words(task.labels, logits.argmax(dim=1).numpy(), dataset)
    if task.regression:
        return to_value(logits, task.low, task.high).numpy()
    return logits.argmax(dim=1).numpy()


LONGEST_ANSWER = 30  # tokens (SMP, released code)


def best_answers(logits, dataset):
    """Return for each question the text whose start and end have the largest sum of logits.

    `logits` are (tokens, 2). Start and end are in the context, start <= end < start +
    LONGEST_ANSWER, in any of the question's windows.
    """
    best = {}  # example -> (sum of logits, text)
    for row, example in enumerate(dataset.owner):
        tokens = dataset.tokens(row)
        inside = dataset.places[tokens, 1] > 0  # the context
        if not inside.any():
            continue
        places = dataset.places[tokens][inside]  # (n, 2)
        start, end = logits[tokens][inside].T  # (n, 2) -> twice (n,)
        end = np.pad(end, (0, LONGEST_ANSWER - 1), constant_values=-np.inf)
        sums = start[:, None] + sliding_window_view(end, LONGEST_ANSWER)  # (n, 30)
        first, more = np.unravel_index(sums.argmax(), sums.shape)
        if example not in best or sums[first, more] > best[example][0]:
            (_, context), _ = dataset.examples[example]
            text = context[places[first, 0] : places[first + more, 1]]
            best[example] = (sums[first, more], text)
    return [best.get(i, (0, ""))[1] for i in range(len(dataset.examples))]


def tags_of_words(labels, classes, dataset):
    """Return the tags of each sentence, from `classes` (tokens,). A word without a token is O."""
    predicted = []
    for row, (words, _) in enumerate(dataset.examples):
        tokens = dataset.tokens(row)
        first = dataset.places[tokens] >= 0
        tags = ["O"] * len(words)
        for word, label in zip(dataset.places[tokens][first], classes[tokens][first]):
            tags[word] = labels[label]
        predicted.append(tags)
    return predicted


def measure(task, predicted, gold, suffix=""):
    """Return {metric: value}, the first of which selects; `suffix` marks MNLI's mismatched half.

    `predicted` is from `to_predictions`, and `gold` from `read_split`.
    """
    table = TEXT_METRICS if task.kind in EVERY_POSITION else METRICS
    metrics = {}
    for full_name in task.metrics:
        name = full_name.removesuffix("_mm")
        if name + suffix == full_name:
            metrics[full_name] = table[name](predicted, gold)
    return metrics


def evaluate(model, task, dev_sets, device, dtype):
    """Return the metrics over `dev_sets` {suffix: dataset}; see `load_dev`."""
    metrics = {}
    for suffix, dataset in dev_sets.items():
        predicted = to_predictions(task, predict(model, dataset, device, dtype), dataset)
        metrics |= measure(task, predicted, dataset.gold, suffix)
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
    kind = about.get("kind", task.kind)  # older runs do not say it
    then = f"{about['task']} ({kind}) with labels {about['labels']}"
    now = described(task)
    require(then == now, f"{path}: trained on {then}; the task file describes {now}")
    return task


def described(task):
    return f"{task.name} ({task.kind}) with labels {list(task.labels)}"


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
    settings = config | settings | {"dtype": config["dtype"]}  # what "auto" was
    folder = run / which
    require(folder.is_dir(), f"{run}: has no {which}/ yet; continue the run with --resume")
    task = trained_on(run, settings)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json").get("vocab_size", 0))
    output_head = METHODS[settings["method"]].output_head or config.get("output_head")
    model = load_model(
        folder, output_head, config["outputs"], config["words"], new_head=False, kind=task.kind
    )
    return model, task, tokenizer, settings


# -------------------------------------------------------------------------------------------------
# teachers


class Teacher:
    """The model whose predictions the run learns from, besides the labels.

    That is none, a dense run, this run's own best checkpoint so far ("self"), or a dense run until
    a checkpoint is better ("self:RUN").

    `table` is what the teacher says of the training set: what `predict` returns or, of a regression
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
        same = described(task) == described(run.task)
        require(same, f"{name}: trained on {described(task)}; this run is on {described(run.task)}")
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
        run.progress.teacher_file = None
        self.table = teacher_table(model, run.task, run.train_set, run.device, run.dtype)

    def losses(self, task, losses, logits, most_entropy, data, mask):
        """Return the losses of the decisions of a batch with the teacher's part.

        `losses`: what `task_loss` says. `logits` and `most_entropy`: what `decisions` returns.
        `data`: from `collate`. `mask`: its attention mask on the device, (B, T).
        """
        if self.table is None:
            return losses
        taught = self.table[send(data["rows"], self.table.device)]
        if task.regression:  # a squared error has no entropy by which to weigh the teacher
            return 0.5 * losses + 0.5 * task_loss(logits, taught, task.low, task.high)
        taught, _ = decisions(task.kind, taught, mask)
        if self.is_self:
            losses = self_distill(losses, logits, taught, most_entropy)
        else:
            losses = distill(losses, logits, taught)
        return losses * send(data["labels"] != IGNORED, self.table.device)


def teacher_table(model, task, dataset, device, dtype):
    """Return what a teacher predicts of a split: logits, see `predict`, or values (N,)."""
    logits = predict(model, dataset, device, dtype)
    if task.regression:
        logits = to_value(logits, task.low, task.high)
    return logits.to(device)


# -------------------------------------------------------------------------------------------------
# the report of a run


def warn_of_density(asked, achieved):
    """Say that a run has missed the density asked for, if it has by more than 10%."""
    if asked and abs(achieved / asked - 1) > 0.1:
        tell(f"warning: density {achieved:.4f} was achieved where {asked:g} was asked for")


def report(run, which, device, data_dir):
    """Print the metrics on dev, the densities and the sizes of one run."""
    model, task, tokenizer, s = load_run(run, which)
    dev_sets = load_dev(task, tokenizer, s["max_length"], data_dir)
    metrics = evaluate(model.to(device), task, dev_sets, device, s["dtype"])
    step = "last step" if which == "model" else "best checkpoint"
    print(f"{run}: {s['method']} on {task.name}, {step}, {s['dtype']}")
    for name, value in metrics.items():
        print(f"  {name:17} {100 * value:.2f}")
    kept, sizes = kept_weights(model)
    warn_of_density(s["density"], kept.sum() / sizes.sum())
    print_densities(kept, sizes, list(model.matrices))
    print_sizes(model, int(kept.sum()), int(sizes.sum()))


# -------------------------------------------------------------------------------------------------
# files of predictions

HEADER = "index\tprediction\n"


def spell(task, predicted):
    """Return each prediction as a string, classes as the task's files write them."""
    if task.kind == "span":
        return predicted
    if task.kind == "tag":
        return [" ".join(tags) for tags in predicted]
    if task.regression:
        return [f"{np.clip(float(x), task.low, task.high):.6f}" for x in predicted]
    return [task.spelling[i] for i in predicted]


def as_file(task, predicted, dataset):
    """Return the predictions of a split as the text of a file.

    classify, score: TSV with HEADER, as the GLUE leaderboard takes it.
    span: {id: answer} in JSON, as SQuAD's official script takes it.
    tag: lines of word, gold, predicted with an empty line after a sentence, as conlleval takes it.
    """
    if task.kind == "span":
        answers = {name: text for (name, _), text in zip(dataset.gold, predicted)}
        return json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
    if task.kind == "tag":
        sentences = []
        for (words, gold), tags in zip(dataset.examples, predicted):
            sentences.append("".join(f"{' '.join(row)}\n" for row in zip(words, gold, tags)))
        return "\n".join(sentences)
    rows = [f"{i}\t{text}\n" for i, text in enumerate(spell(task, predicted))]
    return HEADER + "".join(rows)


def read_predictions(task, path, texts, gold):
    """Return the predictions in a file that has the form of `as_file`, in the order of a split.

    `texts` and `gold` are those of the split. Raises UserError where the file has another form, or
    lacks a row or has one too many. An answer that is missing is None, as for the official script.
    """
    if task.kind == "span":
        answers = read_json(path)
        ids = dict(gold)
        for name, answer in answers.items():
            require(name in ids, f'{path}: "{name}" is no id of the split; remove it')
            require(isinstance(answer, str), f'{path}: the answer of "{name}" is not a string')
        lost = [name for name in ids if name not in answers]
        if lost:
            what = f"no answer for {len(lost):,} ids, for example {lost[0]!r}"
            tell(f"warning: {path}: {what}", sys.stderr)
        return [answers.get(name) for name in ids]
    data = Path(path).read_bytes()
    if task.kind == "tag":
        found, predicted = read_conll(task, "dev", path, data)
        lines = chain(*[(*words, "") for words in texts])  # "" is the empty line after a sentence
        found = chain(*[(*words, "") for words in found])
    else:
        own = {"columns": ("index",), "label": "prediction"}
        rows = replace(task, **own, header=(), rows={}, low=-1e9, high=1e9)
        found, predicted = read_tsv(rows, "dev", path, data)
        lines = ["index", *[str(i) for i in range(len(texts))]]
        found = ["index", *found]
    together = zip_longest(lines, found, fillvalue="no line")
    for number, (ours, theirs) in enumerate(together, 1):
        require(ours == theirs, f"{path}: near line {number}: found {theirs!r}, expected {ours!r}")
    return predicted


def score(path, task, split, data_dir):
    """Print the metrics of a file of predictions, by whatever system."""
    source = locate(task, split, data_dir)
    texts, gold = read_split(task, split, source, source.read_bytes())
    labelled = gold is not None and all(right[1] for right in gold if task.kind == "span")
    require(labelled, f"--split {split}: {source} has no labels")
    predicted = read_predictions(task, path, texts, gold)
    print(f"{path}: {show(measure(task, predicted, gold, task.eval_splits.get(split, '')))}")


def write_predictions(loaded, device, data_dir, split, path, name):
    """Write a split's predictions; see `as_file`.

    `loaded`: what `load_run` returns. `name`: its task, or another one with the same labels.
    """
    model, task, tokenizer, s = loaded
    if name != task.name:
        other = get_task(name)
        same = other.labels == task.labels and other.kind == task.kind == "classify"
        need = f"expected classes, and the labels of {task.name}, on which the run was trained"
        require(same, f"--task {name}: {need}")
        task = other
    dataset = load_dataset(task, split, tokenizer, s["max_length"], data_dir)
    if os.path.isfile(path) and not is_stream(path):
        with open(path, "rb") as file:
            ours = file.readline() in (b"", HEADER.encode())
        only = "only a TSV of predictions is written over; name another file"
        require(ours, f"{path}: is there already, and {only}")
    logits = predict(model.to(device), dataset, device, s["dtype"])
    predicted = to_predictions(task, logits, dataset)
    if split in task.eval_splits:  # --score shall find what was measured; the leaderboard clips
        task = replace(task, low=-1e9, high=1e9)
    atomic_write(path, as_file(task, predicted, dataset))
    stream = sys.stderr if is_stream(path) else sys.stdout
    tell(f"{path}: {len(predicted):,} predictions of {task.name} {split}", stream)


def label_texts(loaded, device, path):
    """Print what a run says of texts: its prediction, the probability of each class, the text.

    The file is a TSV with the task's columns. "-" is standard input: each line is a text, or a
    pair of texts with a tab between them. Empty lines are skipped. A text of a "tag" task is a
    sentence with spaces between its words. Only "classify" has probabilities.
    """
    model, task, tokenizer, s = loaded
    own = replace(task, kind="classify", rows={}, header=task.columns, drop_broken=False)
    if path == "-":
        texts, gold = read_split(own, "lines", "standard input", sys.stdin.buffer.read())
    else:
        texts, gold = read_split(own, "test", path, Path(path).read_bytes())
    rows = [[text] if isinstance(text, str) else text for text in texts]
    if task.kind == "tag":
        rows = [row for row in rows if row[0].split()]
        require(rows, f"{path}: no row of data")
        texts = [row[0].split() for row in rows]
        gold = [["O"] * len(words) for words in texts]
    elif task.kind == "span":
        gold = [(f"number {i}", []) for i in range(1, 1 + len(texts))]
    arrays = tokenise(task, texts, gold, tokenizer, s["max_length"])
    dataset = make_dataset(task, (texts, gold), arrays, s["max_length"])
    logits = predict(model.to(device), dataset, device, s["dtype"])
    classes = task.spelling if task.kind == "classify" else ()
    shares = logits.softmax(dim=1)[:, : len(classes)].numpy()  # (N, K), or (N, 0)
    print("prediction", *classes, *task.columns, sep="\t")
    said = spell(task, to_predictions(task, logits, dataset))
    for prediction, share, columns in zip(said, shares, rows):
        print(prediction, *[f"{p:.4f}" for p in share], *columns, sep="\t")


@program
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folder of train.py")
    add("--best", action="store_true", help="the best checkpoint on dev, not the last step")
    add("--predictions", metavar="FILE", help="write a split's predictions")
    add("--score", metavar="FILE", help="metrics of predictions on --task; no RUN is needed")
    add("--split", help="dev, dev_mm, test or test_mm; default: test, with --score: dev")
    add("--task", help="task of --score; or predict another task of the same labels: ax by mnli")
    add("--task-file", metavar="JSON", help="task of --score, if it is your own")
    add("--input", metavar="FILE", help="label your own text: a TSV, or - for standard input")
    add("--data-dir", default="data", help="folder of the data (default: data)")
    add("--device", default="auto", choices=DEVICES)
    args = parser.parse_args(argv)
    which = "best" if args.best else "model"
    asked = [flag for flag in (args.predictions, args.input, args.score) if flag]
    require(len(asked) < 2, "--predictions, --input and --score cannot be used together")
    if args.score:
        named = (args.task or args.task_file) and not (args.runs or args.best)
        require(named, "--score takes --task or --task-file, and no RUN")
        task = get_task(args.task, args.task_file)
        score(args.score, task, args.split or "dev", args.data_dir)
        return
    require(args.runs, "give RUN, or --score FILE with --task")
    require(not args.task_file, "--task-file: only with --score")
    if not args.predictions:
        require(not (args.split or args.task), "--split and --task need --predictions or --score")
    device = pick_device(args.device)
    if not asked:
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
