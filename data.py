"""The files of a task, such as those of GLUE, as token ids in flat numpy arrays.

- `TASKS` has one row for each task. A row holds everything that this program knows about the task.
- A task is of a kind: a class in kinds/ that reads its files. Most of GLUE is `Classify`.
- The official files are checked by the sha256 of the sources and by the number of rows.
- A folder of official files is enough to work offline. A read-only one stays untouched.
- A split is tokenised once, into a cache file. An epoch is a list of index arrays.

    python data.py --task mrpc mnli    # download, check and count; training does it by itself too
"""

from support.terminal import Parser, UserError, program, tell  # first: it says "loading torch"

import hashlib
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from kinds import KINDS
from kinds.classify import IGNORED
from kinds.official import OFFICIAL
from kinds.task_file import SPLITS, read_task_file
from support.fetch import DEMO, locate
from support.files import atomic_write, cache_home, make_folder, writable

# ---------- tasks ---------------------------------------------------------------------------------


@dataclass
class Task:
    """What this program knows about a task. The defaults are what most tasks of GLUE share."""

    name: str
    folder: str  # the official name, used for the folder and for the file sent to the leaderboard
    labels: tuple  # the class names in the order of Hugging Face's checkpoints; () without classes
    kind: str = "classify"  # one of KINDS: how its files are read, and what is decided
    spelling: tuple = ("0", "1")  # the classes as the files and the leaderboard write them
    words: tuple = ("no", "yes")  # the word of each class; for regression, of `low` and of `high`
    metrics: tuple = ("accuracy",)  # the first one selects the best checkpoint
    columns: tuple = ("sentence1", "sentence2")  # one or two columns of text
    label: str = "label"  # the column of labels
    files: dict | None = None  # split -> file in the data folder; None: the usual three
    other_names: dict | tuple = ()  # of some splits: split -> other names of this file
    rows: dict | tuple = ()  # the number of rows of each of these files; () for your own
    sources: tuple = ()  # (address, sha256) of each file that the TSVs are made from
    header: tuple = ()  # the column names, where labelled files have no header line
    drop_broken: bool = False  # whether to drop rows with missing fields, and not refuse them
    options: dict = field(default_factory=dict)  # what else a task file says, for its kind
    settings: dict = field(default_factory=dict)  # those of a run that only its kind uses

    def __post_init__(self):
        if self.files is None:
            self.files = {split: f"{self.folder}/{split}.tsv" for split in SPLITS}
        if isinstance(self.rows, tuple):
            self.rows = dict(zip(self.files, self.rows))

    @property
    def eval_splits(self):
        """Return the splits to evaluate."""
        return [name for name in self.files if name.startswith("dev")]


def kind_of(task, tokenizer=None):
    """Return the object of its kind that knows how to read, decide and measure this task."""
    return KINDS[task.kind](task, tokenizer)


def with_settings(task, settings, place):
    """Return a task with what its kind uses of the settings {name: value} of a run.

    `place` says where these are from. Raises UserError where one is not there.
    """
    used = KINDS[task.kind].uses
    if not isinstance(settings or {}, dict) or not set(used) <= set(settings or {}):
        raise UserError(f"{place}: expected the settings {', '.join(used)}")
    return replace(task, settings={name: settings[name] for name in used})


def glue_file(name, sha256):
    """Return the sources of a task that is made from one file of GLUE."""
    return ((f"glue/data/{name}", sha256),)


NLI = ("entailment", "neutral", "contradiction")
ENTAILED = ("entailment", "not_entailment")

# fmt: off
GLUE = (
    Task(name="cola", folder="CoLA",
         labels=("unacceptable", "acceptable"), words=("incorrect", "correct"),
         metrics=("matthews",), columns=("sentence",),
         header=("source", "label", "star", "sentence"),
         rows=(8_551, 1_043, 1_063),
         sources=glue_file("CoLA.zip",
                           "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")),
    Task(name="sst2", folder="SST-2",
         labels=("negative", "positive"), words=("terrible", "great"),
         columns=("sentence",),
         rows=(67_349, 872, 1_821),
         sources=glue_file("SST-2.zip",
                           "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")),
    # GLUE may not host MRPC. It is made from the original files and a list of its dev pairs.
    Task(name="mrpc", folder="MRPC",
         labels=("not_equivalent", "equivalent"),
         metrics=("accuracy", "f1"), columns=("#1 String", "#2 String"), label="Quality",
         rows=(3_668, 408, 1_725),
         sources=(
             ("senteval/senteval_data/msr_paraphrase_train.txt",
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             ("senteval/senteval_data/msr_paraphrase_test.txt",
              "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
             ("glue/data/mrpc_dev_ids.tsv",
              "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"))),
    Task(name="stsb", folder="STS-B",
         labels=(), kind="score", spelling=(), metrics=("pearson", "spearman"), label="score",
         rows=(5_749, 1_500, 1_379),
         sources=glue_file("STS-B.zip",
                           "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")),
    # A few rows of QQP have lost their last columns. The official scripts drop these rows.
    Task(name="qqp", folder="QQP",
         labels=("not_duplicate", "duplicate"),
         metrics=("accuracy", "f1"), columns=("question1", "question2"), label="is_duplicate",
         drop_broken=True,
         rows=(363_846, 40_430, 390_965),
         sources=glue_file("QQP-clean.zip",
                           "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")),
    Task(name="mnli", folder="MNLI",
         labels=NLI, spelling=NLI, words=("yes", "maybe", "no"),
         metrics=("accuracy", "accuracy_mm"), label="gold_label",
         files={"train": "MNLI/train.tsv",
                "dev": "MNLI/dev_matched.tsv", "dev_mm": "MNLI/dev_mismatched.tsv",
                "test": "MNLI/test_matched.tsv", "test_mm": "MNLI/test_mismatched.tsv"},
         rows=(392_702, 9_815, 9_832, 9_796, 9_847),
         sources=glue_file("MNLI.zip",
                           "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")),
    Task(name="qnli", folder="QNLI",
         labels=ENTAILED, spelling=ENTAILED, words=("yes", "no"),
         columns=("question", "sentence"),
         rows=(104_743, 5_463, 5_463),
         sources=glue_file("QNLIv2.zip",
                           "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")),
    Task(name="rte", folder="RTE",
         labels=ENTAILED, spelling=ENTAILED, words=("yes", "no"),
         rows=(2_490, 277, 3_000),
         sources=glue_file("RTE.zip",
                           "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")),
    Task(name="wnli", folder="WNLI",
         labels=("not_entailment", "entailment"),
         rows=(635, 71, 146),
         sources=glue_file("WNLI.zip",
                           "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")),
    # The diagnostics come without labels. A model trained on MNLI predicts them.
    Task(name="ax", folder="AX",
         labels=NLI, spelling=NLI, words=("yes", "maybe", "no"),
         metrics=(), label="",
         files={"test": "AX.tsv"}, rows=(1_104,),
         sources=glue_file("AX.tsv",
                           "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")),
)
# fmt: on

# The demo is described by demo/task.json, which is a task file like yours.
TASKS = {"demo": None} | {task.name: task for task in GLUE}
TASKS |= {name: Task(name, **row) for name, row in OFFICIAL.items()}  # those outside GLUE


def get_task(name=None, task_file=None):
    """Return the task called `name` (default: the demo), or the one in `task_file`.

    Raises UserError for an unknown name, and where `task_file` describes another task.
    """
    if name in (None, "demo") and not task_file:
        task_file = DEMO / "task.json"
    if task_file:
        task = Task(**read_task_file(Path(task_file)))
        if name not in (None, task.name):
            raise UserError(f"--task {name}: {task_file} describes {task.name}; give one of them")
        return task
    if name not in TASKS:
        raise UserError(f'unknown task "{name}": expected {", ".join(TASKS)}, or --task-file')
    return TASKS[name]


def read_split(task, split, path, data, role=None):
    """Return the texts in the bytes `data` of a file `path`, and what is right for each (`gold`).

    `role`, and the errors: see `read` of the task's kind. None: the name of the split says it.
    """
    texts, gold = kind_of(task).read(role or split.split("_")[0], path, data)
    if not texts:
        raise UserError(f"{path}: no row of data")
    expected = task.rows.get(split, len(texts))
    if len(texts) != expected:
        counts = f"{len(texts)} rows, expected {expected}"
        raise UserError(f"{path}: {counts}: not whole, or not the official file")
    return texts, gold


# ---------- a split as arrays ---------------------------------------------------------------------


@dataclass
class Dataset:
    """The n rows of a split. The tokens of row i are ids[starts[i]:starts[i] + lengths[i]].

    A row is an example, or a part of one. The token type is 0, and 1 from position second[i] on.
    """

    kind: object  # of the task, see `kind_of`
    ids: np.ndarray  # (total number of tokens,) int32
    lengths: np.ndarray  # (n,) int64
    second: np.ndarray  # (n,) int32
    # of a row, or of a token (IGNORED where nothing is decided); None in a test split
    labels: np.ndarray | None = None
    max_length: int = 512  # no row has more tokens
    places: np.ndarray | None = None  # where a token stands in its text, if the kind needs it
    owner: np.ndarray | None = None  # (n,) int64, to which example a row belongs; None: its own
    examples: list | None = None  # [(text, gold)], if the kind keeps texts, see `read_split`
    cut: np.ndarray | None = None  # (n,) bool, of which rows the end is lost, if the kind says it
    starts: np.ndarray | None = None  # (n,) int64; None: one row follows another

    def __post_init__(self):
        if self.starts is None:
            self.starts = self.lengths.cumsum() - self.lengths

    def __len__(self):
        return len(self.second)

    def tokens(self, row):
        """Return which of `ids` and `places` belong to a row."""
        return slice(self.starts[row], self.starts[row] + self.lengths[row])

    @property
    def gold(self):
        """Return what is right for each example, as the metrics take it."""
        return self.labels if self.examples is None else [gold for _, gold in self.examples]

    @cached_property
    def decision_counts(self):
        """Return the number of labelled decisions of each row, (n,)."""
        if not self.kind.label_per_token:
            return np.full(len(self), self.labels[0].size)
        before = np.append(0, np.cumsum(self.labels != IGNORED))
        return before[self.starts + self.lengths] - before[self.starts]

    def take(self, indices):
        """Return a Dataset of the labelled examples `indices`, which ascend."""
        rows = indices
        if self.owner is not None:
            rows = np.flatnonzero(np.isin(self.owner, indices))
        per_row = ("starts", "lengths", "second")
        part = replace(self, cut=None, **{name: getattr(self, name)[rows] for name in per_row})
        if not self.kind.label_per_token:
            part.labels = self.labels[rows]
        if self.owner is not None:
            part.owner = np.searchsorted(indices, self.owner[rows])
        if self.examples is not None:
            part.examples = [self.examples[i] for i in indices]
        return part

    def split(self, fraction, seed):
        """Return two Datasets, the rest and a random `fraction`. Neither of them is empty.

        Raises UserError where there is one example alone.
        """
        count = len(self.examples or self)
        if count < 2:
            raise UserError("--teacher-split: the training set has one example; expected two")
        order = np.random.default_rng(seed).permutation(count)
        cut = np.clip(round(fraction * count), 1, count - 1)
        return [self.take(np.sort(part)) for part in (order[cut:], order[:cut])]

    def by_tokens(self, max_tokens):
        """Return batches of up to so many tokens, as index arrays, the longest rows first.

        So there is little padding, and if memory is too small, the first batch shows it.
        """
        order = np.argsort(-self.lengths, kind="stable")
        return np.split(order, np.cumsum(token_sizes(self.lengths, max_tokens))[:-1])

    def collate(self, indices, pad_id=0):
        """Return rows as tensors, padded to the longest of them and to a multiple of 8.

        input_ids and token_type_ids are (B, T) int64, and attention_mask is (B, T) bool. If there
        are labels, labels is (B, ...), or (B, T) where tokens have labels. Then reads, (n,), has
        the places of these, counted through all B * T tokens. rows is (B,), or (B, T) where every
        position is read: the rows of a table over the whole split where the logits stand; -1 for
        padding.
        """
        starts = self.starts[indices]  # (B,)
        lengths = self.lengths[indices]  # (B,)
        width = min((int(lengths.max()) + 7) // 8 * 8, self.max_length)  # T
        position = np.arange(width)  # (T,)
        mask = position < lengths[:, None]  # (T,) < (B, 1) -> (B, T)
        source = starts[:, None] + position  # (B, 1) + (T,) -> (B, T), the place of a token in ids
        input_ids = np.full(mask.shape, pad_id, np.int64)
        input_ids[mask] = self.ids[source[mask]]
        token_type_ids = (mask & (position >= self.second[indices][:, None])).astype(np.int64)
        batch = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": mask}
        batch["rows"] = np.where(mask, source, -1) if self.kind.every_position else indices
        if self.kind.label_per_token:
            batch["labels"] = np.full(mask.shape, IGNORED)
            batch["labels"][mask] = self.labels[source[mask]]
            batch["reads"] = np.flatnonzero(batch["labels"] != IGNORED)
        elif self.labels is not None:
            batch["labels"] = self.labels[indices]
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def load_dataset(task, split, tokenizer, max_length, data_dir="data", role=None):
    """Return a split as a Dataset, if possible from the cache. `role`: see `read_split`."""
    if max_length < 8:
        raise UserError(f"--max-length {max_length}: expected at least 8")
    kind = kind_of(task, tokenizer)
    data_dir = Path(data_dir)
    path = locate(task, split, data_dir)
    data = path.read_bytes()
    # The key of the cache file is made of all that decides the ids, and of nothing else.
    role = role or split.split("_")[0]
    reading = replace(task, name=role, words=(), metrics=(), files={}, other_names=(), sources=())
    reading = replace(reading, settings={}, rows=task.rows.get(split))
    about = f"format 3, {max_length}, {reading}, {tokenizer.to_str()}"
    key = hashlib.sha256(hashlib.sha256(data).digest() + about.encode()).hexdigest()[:32]
    folder = data_dir / "cache" if writable(data_dir) else cache_home() / "tokens"
    cached = folder / f"{task.name}-{split}-{key}.safetensors"
    text = read_split(task, split, path, data, role) if kind.keeps_text else None
    try:
        return make_dataset(kind, text, safetensors.numpy.load_file(cached), max_length, split)
    except (OSError, TypeError, SafetensorError):
        pass  # the file is missing or damaged, or it lacks an array, so we tokenise
    text = text or read_split(task, split, path, data, role)
    arrays = kind.encode(*text, tokenizer, max_length)
    try:
        atomic_write(cached, safetensors.numpy.save(arrays))
    except OSError as error:
        tell(f"no token cache: {error}", sys.stderr)
    return make_dataset(kind, text, arrays, max_length, split)


def make_dataset(kind, text, arrays, max_length, split="input"):
    """Return the Dataset of these arrays; `text` is from `read_split`."""
    dataset = Dataset(kind, **arrays, max_length=max_length)
    if kind.keeps_text:
        dataset.examples = list(zip(*text))
    kind.check(dataset, f"{kind.task.name} {split}")
    return dataset


def load_dev(task, tokenizer, max_length, data_dir, split=None):
    """Return {split: Dataset}: of one `split`, or of all dev splits, of which MNLI has two."""
    options = (tokenizer, max_length, data_dir, "dev")
    names = [split] if split else task.eval_splits
    return {name: load_dataset(task, name, *options) for name in names}


# ---------- batches -------------------------------------------------------------------------------


def token_sizes(lengths, max_tokens):
    """Return the sizes of batches of examples that are sorted by length, the longest first.

    A batch takes as many examples as fit in `max_tokens` with their padding, and at least one.
    """
    widths = (np.sort(lengths)[::-1] + 7) // 8 * 8  # padded lengths, as in `collate`
    sizes = []
    while len(widths):
        size = max(1, int(max_tokens // widths[0]))
        sizes.append(len(widths[:size]))  # the last batch may be smaller
        widths = widths[size:]
    return sizes


def batches(lengths, batch_size, seed, epoch, max_tokens=0):
    """Return the batches of one epoch, as index arrays. Each example is in one batch.

    The examples are shuffled, sorted by length inside pools of up to 50 batches, and cut. Then the
    batches are shuffled. So padding is rare, and a batch has other examples in every epoch. One
    batch may be short. With `max_tokens`, the batches have up to so many tokens, with padding, in
    place of `batch_size` examples, and their number is the same in every epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if max_tokens:
        order = order[np.argsort(-lengths[order], kind="stable")]
        ends = np.cumsum(token_sizes(lengths, max_tokens))
        cut = np.split(order, ends[:-1])
    else:
        size = batch_size * max(1, min(50, len(lengths) // (4 * batch_size)))  # at least four pools
        pools = np.split(order, range(size, len(order), size))
        pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        cut = np.split(np.concatenate(pools), range(batch_size, len(order), batch_size))
    return [cut[i] for i in rng.permutation(len(cut))]


def micro_batches(batch, count, rank, world, grad_accum):
    """Return this rank's micro-batches of a batch: (rows, factor for the sum of their losses).

    `count` is the number of decisions in the batch. DistributedDataParallel averages over
    ranks. With the factor that average is the mean over the decisions. Every rank must have as many
    micro-batches as the others. Where it has no row left, it takes one with the factor 0.
    """
    most = len(batch[::world])  # examples of rank 0, which has the most
    parts = np.array_split(batch[rank::world], min(grad_accum, most))
    factor = world / max(1, count)
    return [(part, factor) if len(part) else (batch[:1], 0.0) for part in parts]


# ---------- command line --------------------------------------------------------------------------


def prepare(task, data_dir="data"):
    """Locate and read every split of a task; return {split: (path, number of rows)}."""
    make_folder(data_dir)
    found = {}
    for split in task.files:
        path = locate(task, split, data_dir)
        texts, _ = read_split(task, split, path, path.read_bytes())
        found[split] = (path, len(texts))
    return found


@program
def main(argv=None):
    parser = Parser("download, check and count the data of tasks")
    add = parser.add_argument
    add("--task", nargs="+", default=[], metavar="TASK", help=" ".join(TASKS))
    add("--task-file", nargs="+", default=[], metavar="JSON", help="your own task, see README")
    add("--data-dir", default="data", help="where the official files are or go")
    args = parser.parse_args(argv)
    tasks = [get_task(name) for name in args.task]
    tasks += [get_task(None, path) for path in args.task_file]
    if not tasks:
        raise UserError("nothing to do: give --task or --task-file")
    for task in tasks:
        for split, (path, rows) in prepare(task, args.data_dir).items():
            print(f"{task.name:8} {split:8} {rows:8,} rows  {path}")


if __name__ == "__main__":
    sys.exit(main())
