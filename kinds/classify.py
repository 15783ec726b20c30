"""The kind "classify": a text, or a pair of texts, has one of K labels.

`Classify` has the functions that the other files call of every kind. train.py, data.py and eval.py
know no kind by its name. An object of a kind belongs to one task.

Axes: N examples, B examples of a batch, T tokens, K outputs of the model, C choices of a decision.
"""

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kinds.metrics import balanced, f1, macro_f1, pearson
from kinds.text import check_lines, encode, read_rows
from support.machine import autocast, inputs, rank_and_world, send
from support.terminal import UserError, live, quote, warn

IGNORED = -100  # the label of a token at which nothing is decided

# Tokens in a batch of `logits`, with padding. A CPU wants what its cache holds: it is 1.5 to 2.5
# times as fast as with 1 << 14 (measured). A GPU wants many (not measured).
MAX_TOKENS = {"cpu": 1 << 10, "mps": 1 << 14, "cuda": 1 << 15}

HEADER = "index\tprediction\n"  # of a file of predictions, as the GLUE leaderboard takes it


@dataclass
class Decided:
    """The decisions of a batch: what the model says of them, and how wrong it is."""

    logits: torch.Tensor  # (..., C)
    most_entropy: float | torch.Tensor  # log(number of choices), of all or of each decision
    losses: torch.Tensor  # (...), one per decision
    labels: torch.Tensor  # (...), or IGNORED
    rows: torch.Tensor  # where the logits stand in a table over the whole split, see `collate`
    mask: torch.Tensor  # (B, T), True where there is a token


class Classify:
    """A text or a pair of texts has one of K labels."""

    name = "classify"
    form = "pooled"  # of the output head, see HEADS in model.py
    every_position = False  # are there logits at every position, or at position 0 alone?
    label_per_token = False  # is a label that of a token, or that of a row?
    keeps_text = False  # do predictions and metrics need the texts?
    picks_label = True  # is a prediction one of the labels?
    own_head = None  # the output head that every method has on this kind; None: the method's
    teaches_beside = False  # does a teacher compute beside the student? Else it fills a table
    uses = ()  # the settings that only some kinds use; a task has them as `settings`
    how = ""  # how predictions are made, where there is more than one way
    note = ""  # what to know of the metrics
    metrics = {
        "accuracy": lambda predicted, labels: float(np.mean(predicted == labels)),
        "f1": f1,  # of the positive class, see `metric`
        "macro_f1": macro_f1,
        "matthews": pearson,  # Matthews' correlation is that of two 0-1 variables
    }
    # The further keys of a task file, and how many strings each holds; None: `describe` checks it
    keys = {"columns": (1, 2), "label": (1, 1), "words": (1, 10**6), "labels": (2, 10**6)}
    needed = {"columns", "label", "labels"}  # those of them that must be there
    # Further keys, which may lack: what each may hold, see `options_in`. They are `task.options`.
    options = {"quoted": bool, "positive": str, "class_weights": ("balanced",)}

    def __init__(self, task, tokenizer=None):
        self.task = task
        self.tokenizer_used = tokenizer  # for the data sets of this object
        self.classes = {text: number for number, text in enumerate(task.spelling)}
        self.class_weights = None  # (K,), see `learn_from`

    # files

    @classmethod
    def describe(cls, values, expect):
        """Return what a task file says in `values`, as fields of a Task.

        `expect(condition, key, expected)` raises UserError, which names the key.
        """
        labels = tuple(values["labels"])
        one_line = not set("\t\r\n") & set("".join(labels))
        expect(one_line, "labels", "strings without a tab and without a line break")
        positive = values.get("positive", labels[1])
        expect(positive in labels, "positive", "one of the labels")
        if len(labels) > 2:
            known = {"accuracy", "macro_f1"} | ({"f1"} if "positive" in values else set())
            why = f'f1 of {len(labels):,} labels needs "positive", and matthews is for two labels'
            several = f'accuracy or macro_f1, or f1 with "positive"; {why}'
            expect(set(values["metric"]) <= known, "metric", several)
        (label,) = values["label"]
        columns = tuple(values["columns"])
        expect(label not in columns, "label", "another column than those of the texts")
        return {"labels": labels, "spelling": labels, "columns": columns, "label": label}

    def read(self, role, path, data):
        """Return the texts in the bytes `data` of a file `path`, and what is right for each.

        `role` is what the split is for: "train", "dev" or "test". What is right, `gold`, is None in
        a test split. Raises UserError that names the place in the file where something is wrong.

        kind              a text                             its gold
        classify, score   a string, or a pair of strings     an int64 class, or a float32 value
        span              a pair (question, context)         (id, [(answer, its first character)])
        tag               a list of words                    a list of tags
        generate          a source (training: and its text)  a list of texts
        """
        task = self.task
        quoted = task.options.get("quoted", False)
        options = (bool(task.rows), task.drop_broken, quoted)
        if role == "test":
            rows = read_rows(path, data, task.columns, "", (), *options)
            return [text for text, _, _ in rows], None
        rows = read_rows(path, data, task.columns, task.label, task.header, *options)
        gold = [self.read_label(label, place) for _, label, place in rows]
        return [text for text, _, _ in rows], self.to_gold(gold)

    def read_label(self, text, place):
        """Return the label that `text` means, at `place` of a file."""
        if text in self.classes:
            return self.classes[text]
        expected = textwrap.shorten(" or ".join(self.task.spelling[:10]), 200, placeholder=" ...")
        if len(self.classes) > 10:
            expected += f" or one of {len(self.classes) - 10:,} others"
        if text.strip(' "\r') in self.classes:
            expected += "; remove the spaces or quotes around it"
        raise UserError(f"{place}: unknown {self.task.label} {quote(text)}, expected {expected}")

    def to_gold(self, labels):
        return np.array(labels, np.int64)

    @property
    def outputs(self):
        """Return the names of the outputs of a trained head, in order."""
        return self.task.labels

    # tokens

    def tokenizer(self, tokenizer):
        """Return a tokenizer as the texts of this kind are read with it."""
        return tokenizer

    def encode(self, texts, gold, tokenizer, max_length):
        """Return the arrays of a Dataset, by name; `texts` and `gold` are from `read`."""
        arrays = encode(texts, tokenizer, max_length)
        return arrays if gold is None else arrays | {"labels": gold}

    def check(self, dataset, name):
        """Warn of what a data set has lost; `name` is that of its task and split."""
        share = 0.0 if dataset.cut is None else np.mean(dataset.cut)
        if share > 0.05:
            where = f"the texts of {name} are cut at --max-length {dataset.max_length}"
            warn(f"{share:.0%} of {where}")

    def learn_from(self, dataset):
        """Warn of a training set of one label. Take the weights of the classes, if a task has them.

        IGNORED decisions do not count. Teachers are not weighted.
        """
        labels = dataset.labels[dataset.labels != IGNORED]
        if self.picks_label and len(labels) > 1 and np.all(labels == labels[0]):
            only = quote(self.task.spelling[labels[0]])
            what = f"every training example of {self.task.name} has the label {only}"
            warn(f"{what}, so nothing else can be learned")
        if "class_weights" in self.task.options:
            self.class_weights = torch.tensor(balanced(labels, len(self.task.labels))).float()

    # decisions and their losses

    def decide(self, net, batch, device, dtype):
        """Return what `net` decides for a batch, see `Decided`."""
        on_device = inputs(batch, device)
        labels = send(batch["labels"], device)
        with autocast(device, dtype):
            logits = net(**on_device)  # (B, K) or (B, T, K)
        mask = on_device["attention_mask"]
        logits, most_entropy = self.choices(logits, mask)
        losses = self.losses(logits, labels)
        return Decided(logits, most_entropy, losses, labels, batch["rows"], mask)

    def choices(self, logits, mask):
        """Return the logits of decisions among C choices, (..., C), and their largest entropies.

        kind              logits       decisions    choices
        classify, score   (B, K)       (B, K)       K
        span              (B, T, 2)    (B, 2, T)    the tokens, not the padding
        tag               (B, T, K)    (B, T, K)    K

        `mask` is (B, T). The largest entropy of a decision is log(number of its choices).
        """
        return logits, math.log(logits.size(-1))

    def losses(self, logits, labels):
        """Return the cross-entropy of each decision, shaped as `labels`, from logits (..., C).

        It is 0 where the label is IGNORED.
        """
        flat = logits.flatten(0, -2)  # (..., C) -> (decisions, C)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(flat)  # its device and dtype
        options = {"weight": self.class_weights, "ignore_index": IGNORED, "reduction": "none"}
        return F.cross_entropy(flat, labels.flatten(), **options).view_as(labels)

    def losses_taught(self, decided, table, weigh):
        """Return the losses of decisions with a teacher's part.

        `table` is what `teach` returned. `weigh(losses, logits, taught, most_entropy)` is
        `distill` or `self_distill`.
        """
        taught = table[send(decided.rows, table.device)]
        taught, _ = self.choices(taught, decided.mask)
        losses = weigh(decided.losses, decided.logits, taught, decided.most_entropy)
        return losses * (decided.labels != IGNORED)

    # predictions

    def logits(self, model, dataset, device, dtype):
        """Return logits float32 on the CPU, in the order of the split, without dropout.

        They are (N, K): a row per example or, where every position is read, per token. The batches
        are the same every time. Under torchrun each rank computes its share of them.
        """
        rank, world = rank_and_world()
        parts = dataset.by_tokens(MAX_TOKENS[device.type])[rank::world]
        was_training = model.training
        model.eval()
        rows = []
        logits = []
        with torch.no_grad(), autocast(device, dtype), live("predict", len(parts)) as bar:
            for part in parts:
                batch = dataset.collate(part)
                rows.append(batch["rows"])
                logits.append(model(**inputs(batch, device)))
                bar.update()
        model.train(was_training)
        count = len(dataset.ids) if self.every_position else len(dataset)
        table = torch.zeros(count + 1, model.outputs, device=device)  # the last row is for padding
        for place, values in zip(rows, logits):
            table[send(place, device)] = values
        if world > 1:
            dist.all_reduce(table)
        return table[:-1].cpu()

    def teach(self, model, dataset, device, dtype):
        """Return what a teacher says of the training set: a tensor for `losses_taught`."""
        return self.logits(model, dataset, device, dtype).to(device)

    def quick(self, dataset):
        """Return what is measured of a dev split during training: a part of it, or all."""
        return dataset

    def predict(self, model, dataset, device, dtype):
        """Return the predictions for each example of a split."""
        return self.predictions(self.logits(model, dataset, device, dtype), dataset)

    def predictions(self, logits, dataset):
        """Return what the logits of a split say of each example.

        classify: classes (N,). score: values (N,). span: strings. tag: lists of tags. The kind
        generate has no logits of a split, and its own `predict`, which returns strings.
        """
        return logits.argmax(dim=1).numpy()

    def measure(self, predicted, gold, split="dev"):
        """Return {metric: value}, the first of which selects. MNLI has one for each of its devs."""
        suffix = "_mm" if split.endswith("_mm") else ""
        metrics = {}
        for full_name in self.task.metrics:
            name = full_name.removesuffix("_mm")
            if name + suffix == full_name:
                metrics[full_name] = self.metric(name, predicted, gold)
        return metrics

    def metric(self, name, predicted, gold):
        """Return a metric of `metrics`. The positive class is the second one, if none is named."""
        function = self.metrics[name]
        if function is f1:
            positive = self.task.options.get("positive", self.task.spelling[1])
            return f1(predicted, gold, self.classes[positive])
        if function is macro_f1:
            return macro_f1(predicted, gold, len(self.classes))
        return function(predicted, gold)

    def check_more(self):
        """Raise UserError unless there are `more_metrics`, and what they need."""
        raise UserError(f"--metrics all: a {self.name} task has no further metrics")

    # files of predictions, and the user's own texts

    def spell(self, predicted, exact=False):
        """Return each prediction as a string, as the task's files write it."""
        return [self.task.spelling[i] for i in predicted]

    def as_file(self, predicted, dataset, exact=False):
        """Return the predictions of a split as the text of a file.

        classify, score: TSV with HEADER, as the GLUE leaderboard takes it; `exact`: values as they
        are, also those outside the range of the task.
        span: {id: answer} in JSON, as SQuAD's official script takes it.
        tag: lines of word, gold, predicted, and an empty line after a sentence, as for conlleval.
        generate: a line for each source.
        """
        rows = [f"{i}\t{text}\n" for i, text in enumerate(self.spell(predicted, exact))]
        return HEADER + "".join(rows)

    def label(self, model, dataset, device, dtype):
        """Return the predictions as strings, and the probability of each label, (N, K).

        Only predictions that are labels have probabilities; else they are (N, 0).
        """
        logits = self.logits(model, dataset, device, dtype)
        labels = len(self.task.labels) if self.picks_label else 0
        shares = logits.softmax(dim=1)[:, :labels].numpy()
        return self.spell(self.predictions(logits, dataset)), shares

    def further_files(self, tokenizer):
        """Return {name: value} of the JSON files that a folder for `transformers` has besides."""
        return {}

    def read_predictions(self, path, texts, gold):
        """Return the predictions in a file that has the form of `as_file`, in the order of a split.

        `texts` and `gold` are those of the split. Raises UserError where the file has another form,
        or lacks a row or has one too many.
        """
        rows = read_rows(path, Path(path).read_bytes(), ("index",), "prediction")
        # a predicted number may lie outside the range
        anywhere = self.task.options | {"range": (-1e9, 1e9)}
        reader = type(self)(replace(self.task, label="prediction", options=anywhere))
        predicted = [reader.read_label(text, place) for _, text, place in rows]
        expected = ["index", *[str(i) for i in range(len(texts))]]
        check_lines(path, expected, ["index", *[index for index, _, _ in rows]])
        return self.to_gold(predicted)

    def read_input(self, path, data, header=()):
        """Return the texts in a file of your own, which needs no labels.

        `header` names the columns of a file without a header line.
        """
        quoted = self.task.options.get("quoted", False)
        rows = read_rows(path, data, self.task.columns, header=header, quoted=quoted)
        return [text for text, _, _ in rows]

    def from_rows(self, rows, path):
        """Return (rows, texts, gold) to predict for a user's own `rows` of text, see `read`."""
        return rows, rows, None
