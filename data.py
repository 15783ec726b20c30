"""GLUE as token ids in flat numpy arrays: nine tasks, the AX diagnostics, or a task of your own.

- `TASKS` has one row for each task. A row holds everything that this program knows about the task.
- The official files are checked by the sha256 of the sources and by the number of rows.
- A folder of official zips or TSVs is enough to work offline. A read-only folder stays untouched.
- Text is read as the official scripts read it. Tabs and newlines separate, and quotes are text.
- A split is tokenised once. The name of its cache file depends on all that decides the token ids.
- An epoch is a list of index arrays. It depends only on lengths, batch size, seed and epoch.

    python data.py --task mrpc mnli    # download, check and count; training does it by itself too
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import argparse
import hashlib
import http.client
import json
import os
import re
import secrets
import time
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from operator import itemgetter
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tqdm import tqdm

DEMO = Path(__file__).parent / "demo"

# -------------------------------------------------------------------------------------------------
# small tools shared by all files


class UserError(Exception):
    """A mistake of the user, described in one line."""


def require(condition, message):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def program(main):
    """Let `main(argv)` end in one line on stderr, whatever stops it, and return the exit status.

    2: a UserError, or a file that cannot be read or written. 128 + n: signal n, or a closed pipe.
    """

    @wraps(main)
    def reporting(argv=None):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which raises KeyboardInterrupt
        try:
            status = main(argv) or 0
            sys.stdout.flush()
            return status
        except KeyboardInterrupt as error:
            text, status = error.args or ("interrupted", 128 + signal.SIGINT)
        except BrokenPipeError:
            silence(sys.stdout)
            text, status = "stopped: nothing reads the output any more", 141
        except (UserError, OSError) as error:
            text, status = f"error: {error}", 2
        tell(text, sys.stderr)
        return status

    return reporting


def silence(stream):
    """Let a stream lead nowhere. Python would fail once more when it closes the stream at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text, stream=None):
    """Print a line, on a terminal above the live line. It is no error if nothing reads it.

    Without a `stream` it goes to stdout, and of several processes only rank 0 prints it.
    """
    if stream is None and not is_rank_0():
        return
    stream = stream or sys.stdout
    try:
        tqdm.write(text, stream)
        stream.flush()
    except OSError:
        silence(stream)


def is_rank_0():
    """Is this the only process of a run, or the first of several?"""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


class Lines:
    """Takes what a live line shows where stderr is no terminal, and prints it as lines."""

    def write(self, text):
        if text.strip():
            tell(text.strip(), sys.stderr)


def live(what, total, **options):
    """Return a tqdm: one line on stderr, at most 80 columns wide, that says how far the work is.

    A terminal renews it twice a second. Elsewhere, as in a log file, a line is added every 30
    seconds. Of several processes only rank 0 shows it.
    """
    terminal = sys.stderr.isatty()
    seconds = 0.5 if terminal else 30
    return tqdm(
        desc=what,
        total=total,
        file=sys.stderr if terminal else Lines(),
        ncols=79,
        nrows=24,  # where a terminal does not report its height, tqdm would show nothing
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        position=0,
        leave=False,
        mininterval=seconds,
        delay=seconds,
        miniters=1,
        smoothing=0,  # what remains follows from the mean speed
        disable=not is_rank_0(),
        **options,
    )


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for a wrong, abbreviated or empty flag."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            values = value if isinstance(value, list) else [value]
            require("" not in values, f"{name}: the value is empty; give one, or leave it out")
        return args


def lock(file):
    """Lock an open file until it is closed.

    Return "ours", "taken" if another process has locked it, or "unknown" on Windows and where the
    file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "taken"
    except (ImportError, OSError):
        return "unknown"
    return "ours"


def sweep(temporary):
    """Remove the temporary files of killed processes. A living process has locked its own."""
    for path in temporary:
        with suppress(OSError), open(path, "rb+") as file:  # this mode creates no file
            old = time.time() - path.stat().st_mtime > 1  # a new one may not be locked yet
            if old and lock(file) == "ours":
                path.unlink()


def is_stream(path):
    """Is `path` a device, a pipe, or a name of an output that is already open?"""
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/")):
        return True
    return os.path.exists(path) and not os.path.isfile(path)


def atomic_write(path, data):
    """Write bytes or text to `path` so that it is never half-written. A stream is written directly.

    An OSError names the path.
    """
    if isinstance(data, str):
        data = data.encode()
    try:
        if str(path) in ("/dev/stdout", "/dev/fd/1"):
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
        elif is_stream(path):
            with open(path, "ab") as file:
                file.write(data)
        else:
            replace_file(Path(path).resolve(), data)  # a link stays a link
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(path, data):
    """Write bytes to a temporary file, and rename that to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent.glob(f".{path.name}.????????.tmp"))
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # no other writer has it
    try:
        with open(temp, "wb") as file:
            lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.utime(temp)  # so that no other writer takes it for an old one
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path, value):
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Return the object in a JSON file. Raises UserError if it is missing or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON object ({error})") from None
    require(isinstance(value, dict), f"{path}: not a readable JSON object")
    return value


def sha256_of(*paths):
    """Return the hex digest over the bytes of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds the file to what it is given
    return digest.hexdigest()


def cache_home():
    """Return the folder for what cannot be written beside the data."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NANOPRUNE_CACHE") or user_cache / "nanoprune")


def writable(folder):
    """Is `folder` there, and may we write to it?

    Root may write everywhere. A folder without any write permission is left alone all the same.
    """
    return os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 > 0


# -------------------------------------------------------------------------------------------------
# tasks

SPLITS = ("train", "dev", "test")  # MNLI has "dev_mm" and "test_mm" as well


@dataclass
class Task:
    """What this program knows about a task. The defaults are what most tasks of GLUE share."""

    name: str
    folder: str  # the official name, used for the folder and for the file sent to the leaderboard
    labels: tuple  # the class names in the order of Hugging Face's checkpoints; () for regression
    spelling: tuple = ("0", "1")  # the classes as the files and the leaderboard write them
    words: tuple = ("no", "yes")  # the word of each class; for regression, of `low` and of `high`
    metrics: tuple = ("accuracy",)  # the first one selects the best checkpoint
    columns: tuple = ("sentence1", "sentence2")  # one or two columns of text
    label: str = "label"  # the column of labels
    files: dict | None = None  # split -> file in the data folder; None: the usual three
    rows: dict | tuple = ()  # the number of rows of each of these files; () for your own
    sources: tuple = ()  # (address, sha256) of each file that the TSVs are made from
    header: tuple = ()  # the column names, where labelled files have no header line
    drop_broken: bool = False  # whether to drop rows with missing fields, and not refuse them
    low: float = 0.0  # the lowest value that a label of a regression task can have
    high: float = 5.0  # the highest one

    def __post_init__(self):
        if self.files is None:
            self.files = tsvs(self.folder)
        if isinstance(self.rows, tuple):
            self.rows = dict(zip(self.files, self.rows))

    @property
    def regression(self):
        return not self.labels

    @property
    def eval_splits(self):
        """Return the splits to evaluate, each with the ending of its metrics' names."""
        return {name: name.removeprefix("dev") for name in self.files if name.startswith("dev")}


def tsvs(folder):
    """Return the usual files of a task."""
    return {split: f"{folder}/{split}.tsv" for split in SPLITS}


def glue_file(name, sha256):
    """Return the sources of a task that is made from one file of GLUE."""
    return ((f"glue/data/{name}", sha256),)


NLI = ("entailment", "neutral", "contradiction")
ENTAILED = ("entailment", "not_entailment")

# fmt: off
GLUE_TASKS = (
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
         labels=(), spelling=(), metrics=("pearson", "spearman"), label="score",
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
TASKS = {"demo": None} | {task.name: task for task in GLUE_TASKS}


def get_task(name=None, task_file=None):
    """Return the task called `name` (default: the demo), or the one in `task_file`.

    Raises UserError for an unknown name, and where `task_file` describes another task than `name`.
    """
    if name in (None, "demo") and not task_file:
        task_file = DEMO / "task.json"
    if task_file:
        task = read_task_file(Path(task_file))
        same = name in (None, task.name)
        require(same, f"--task {name}: {task_file} describes {task.name}; give one of them")
        return task
    require(name in TASKS, f'unknown task "{name}": expected {", ".join(TASKS)}, or --task-file')
    return TASKS[name]


# -------------------------------------------------------------------------------------------------
# task files


def read_task_file(path):
    """Return a task of your own, described in JSON.

        {"name": "mine", "train": "train.tsv", "dev": "dev.tsv", "columns": ["question", "answer"],
         "label": "label", "labels": ["bad", "good"], "words": ["no", "yes"], "metric": "accuracy"}

    The files are TSVs with a header line. Their paths are relative to the JSON file. "test" may
    name a third file. "columns" are one or two columns of text. "label" is the column of labels.
    "labels" are the strings in it, in the order of the classes, and "words" are their label words.
    "metric" may be a list. The first metric selects the best checkpoint. For regression, give
    "range": [0, 5] in place of "labels", and two words, for the low end and for the high end.
    Raises UserError with the key that is wrong.
    """
    row = read_json(path)
    needed = ("name", "train", "dev", "columns", "label", "words", "metric")

    def expect(condition, key, expected):
        require(condition, f'{path}: "{key}": expected {expected}')

    def strings(key, counts):
        """Return the value of `key`, a string or a list of strings, as a tuple."""
        values = row[key] if isinstance(row[key], list) else [row[key]]
        distinct = {value for value in values if isinstance(value, str) and value}
        least, most = counts[0], counts[-1]
        number = f"{least} to {most}" if most > least else most
        expected = f"{number} different strings" if most > 1 else "a string that is not empty"
        valid = len(distinct) == len(values) and len(values) in counts
        expect(valid, key, expected)
        return tuple(values)

    known = (*needed, "test", "labels", "range")
    for key in row:
        require(key in known, f'{path}: unknown key "{key}"; the keys are {", ".join(known)}')
    for key in needed:
        expect(key in row, key, "this key, but it is missing")
    either = 'either "labels" or, for regression, "range"'
    expect(("labels" in row) != ("range" in row), "labels", either)
    (name,) = strings("name", [1])
    expect(re.fullmatch(r"[\w.-]+", name), "name", "letters, digits, dots and dashes")
    labels = strings("labels", range(2, 1000)) if "labels" in row else ()
    ends = row.get("range", [0, 5])
    numbers = isinstance(ends, list) and {type(end) for end in ends} <= {int, float}
    in_order = numbers and len(ends) == 2 and ends[0] < ends[1]
    expect(in_order, "range", "two numbers, the lower one first")
    metrics = strings("metric", (1, 2, 3))
    known = ("accuracy", "f1", "matthews") if labels else ("pearson", "spearman")
    if len(labels) > 2:
        known = ("accuracy",)  # F1 and Matthews are those of two classes
    expect(set(metrics) <= set(known), "metric", f"some of {', '.join(known)}")
    folder = path.resolve().parent
    return Task(
        name=name,
        folder=name,
        labels=labels,
        spelling=labels,
        words=strings("words", [len(labels) or 2]),
        metrics=metrics,
        columns=strings("columns", (1, 2)),
        label=strings("label", [1])[0],
        files={split: str(folder / strings(split, [1])[0]) for split in row if split in SPLITS},
        low=float(ends[0]),
        high=float(ends[1]),
    )


# -------------------------------------------------------------------------------------------------
# download


def locate(task, split, data_dir):
    """Return the path of the TSV of a split.

    The file is taken from `data_dir` if it is there. If not, it is made from the official sources,
    and sources that are not there are downloaded. What we make goes to `data_dir`. If we may not
    write there, it goes to a folder of its own in `cache_home()`.
    """
    require(split in task.files, f'{task.name} has no "{split}" split but {", ".join(task.files)}')
    name = task.files[split]
    data_dir = Path(data_dir)
    spare = cache_home() / task.sources[0][1][:16] if task.sources else data_dir
    for folder in (data_dir, spare):
        if (folder / name).is_file():
            return folder / name
    require(task.sources, f"{name}: no such file (the {split} split of task {task.name})")
    require(data_dir.is_dir(), f"--data-dir {data_dir}: no such folder")
    home = data_dir if writable(data_dir) else spare
    folders = (data_dir, data_dir / task.folder, spare)
    sources = [fetch(source, folders, home) for source in task.sources]
    if task.name == "mrpc":
        build_mrpc(*sources, home)
    elif sources[0].suffix == ".zip":
        unpack(sources[0], home, task.files.values())
    else:
        return sources[0]  # the source is the TSV itself
    return home / name


def fetch(source, folders, home):
    """Return the path of a checked source, found in one of `folders` or downloaded to `home`."""
    address, sha256 = source
    name = Path(address).name
    for folder in folders:
        path = folder / name
        if path.is_file():
            check_sha256(path.read_bytes(), sha256, path, "remove it, and it is downloaded")
            return path
    download(source, home / name)
    return home / name


def check_sha256(data, sha256, origin, advice):
    found = hashlib.sha256(data).hexdigest()
    wrong = f"{len(data)} bytes, sha256 {found}, expected {sha256}"
    require(found == sha256, f"{origin}: not the official file: {wrong}; {advice}")


def download(source, path):
    """Download a source, check it, and write it to `path`."""
    address, sha256 = source
    mirror = os.environ.get("GLUE_URL", "https://dl.fbaipublicfiles.com/")
    url = f"{mirror.rstrip('/')}/{address}"
    advice = f"run again, or put {path.name} into {path.parent}, or set GLUE_URL to a mirror"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0))
            tell(f"downloading {url}, {size:,} bytes", sys.stderr)
            blocks = []
            with live("download", size or None, unit_scale=True) as bar:
                for block in iter(lambda: response.read1(1 << 18), b""):  # what has arrived
                    blocks.append(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url}: {str(error) or type(error).__name__}; {advice}") from None
    data = b"".join(blocks)
    check_sha256(data, sha256, url, advice)
    atomic_write(path, data)


def unpack(archive, home, names):
    """Write the members `names` of a zip below `home`, and nothing else.

    A file that is already there stays as it is.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in names:
                write_new(home / name, zipped.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive}: not a usable zip: {error}; remove it to download it") from None


def build_mrpc(train, test, dev_ids, home):
    """Write MRPC's TSVs. The training rows whose pair of ids `dev_ids` lists become dev."""
    dev_pairs = set(dev_ids.read_text().split("\n"))
    header, *lines = train.read_bytes().decode("utf-8-sig").rstrip("\n").split("\n")
    texts = {"train": [header], "dev": [header]}
    for line in lines:
        pair = "\t".join(line.split("\t")[1:3])  # the ids of its two sentences
        texts["dev" if pair in dev_pairs else "train"].append(line)
    for split, lines in texts.items():
        write_new(home / f"MRPC/{split}.tsv", "\n".join(lines) + "\n")
    write_new(home / "MRPC/test.tsv", test.read_bytes())


def write_new(path, content):
    if not path.exists():
        atomic_write(path, content)


# -------------------------------------------------------------------------------------------------
# reading


def read_tsv(task, split, path, data):
    """Return the texts and the labels in the bytes `data` of the file `path`.

    Texts are a list of strings, or of pairs of strings. Labels are int64 classes or float32
    values. They are None in a test split, and in "lines", which have no header line either. Raises
    UserError with the file and the line for bytes that are not UTF-8, missing columns, unknown
    labels and lost rows.
    """
    labelled = split.startswith(("train", "dev"))
    # not splitlines(), because U+2028 and its like are text
    lines = [line.removesuffix("\r") for line in decode(path, data).split("\n")]
    first = 0 if task.header and (labelled or split == "lines") else 1
    header = lines[0].split("\t") if first else task.header
    wanted = (*task.columns, task.label) if labelled else task.columns
    found = ", ".join(header)
    for name in wanted:
        require(name in header, f'{path}:1: no column "{name}"; the header line has {found}')
    pick = itemgetter(*map(header.index, task.columns))  # from one column a string, from two a pair
    texts = []
    labels = []
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split("\t")
        missing = header[len(fields) :]
        if line == "" or (missing and task.drop_broken):
            continue
        # The official scripts let a row of too many fields pass, and so do we in official files.
        whole = not missing and (len(fields) == len(header) or task.rows)
        hint = f'"{missing[0]}" is missing' if missing else "a tab inside a text?"
        counts = f"{len(fields)} columns, expected {len(header)}"
        require(whole, f"{path}:{number}: {counts}: {hint}")
        texts.append(pick(fields))
        if labelled:
            label = fields[header.index(task.label)]
            labels.append(read_label(task, label, f"{path}:{number}"))
    require(texts, f"{path}: no row of data")
    expected = task.rows.get(split, len(texts))
    counts = f"{len(texts)} rows, expected {expected}"
    require(len(texts) == expected, f"{path}: {counts}: not whole, or not the official file")
    kind = np.float32 if task.regression else np.int64
    return texts, np.array(labels, kind) if labelled else None


def decode(path, data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise UserError(f"{path}:{number}: {byte} is not UTF-8; convert the file") from None


def read_label(task, text, place):
    """Return the class, or the value of a regression, that `text` at `place` of a file means."""
    try:
        if not task.regression:
            return task.spelling.index(text)
        value = float(text)
        if task.low <= value <= task.high:  # False for nan
            return value
    except ValueError:
        pass  # not one of the classes, or not a number
    expected = " or ".join(task.spelling)
    if task.regression:
        expected = f"a number from {task.low} to {task.high}"
    raise UserError(f'{place}: unknown {task.label} "{text}", expected {expected}')


# -------------------------------------------------------------------------------------------------
# tokens


def load_tokenizer(model_dir, vocab_size):
    """Return the tokenizer of a checkpoint folder, which neither pads nor truncates.

    It is read from tokenizer.json or, without this file, built from vocab.txt. Raises UserError if
    neither file is there, or if an id is not below `vocab_size`, the rows of the embedding.
    """
    path = Path(model_dir, "tokenizer.json")
    if not path.is_file():
        path = Path(model_dir, "vocab.txt")
    require(path.is_file(), f"{model_dir}: neither tokenizer.json nor vocab.txt; copy one there")
    try:
        if path.suffix == ".txt":
            tokenizer = build_tokenizer(path)
        else:
            tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer of BERT's kind ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab().values(), default=0)
    fits = largest < vocab_size
    require(fits, f"{path}: ids up to {largest}, but the embedding has {vocab_size} rows")
    return tokenizer


def build_tokenizer(path):
    """Return BERT's tokenizer from vocab.txt, which has one token per line.

    Switches such as "do_lower_case" come from the tokenizer_config.json beside it, if there is one.
    """
    config = path.with_name("tokenizer_config.json")
    config = read_json(config) if config.is_file() else {}
    tokenizer = BertWordPieceTokenizer.from_file(
        str(path),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: strip them if we lowercase
        lowercase=config.get("do_lower_case", True),
    )
    missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - tokenizer.get_vocab().keys()
    require(not missing, f"no {' '.join(sorted(missing))}")
    return Tokenizer.from_str(tokenizer.to_str())


def word_ids(tokenizer, words):
    """Return the ids of label words. Raises UserError unless each is one token of its own."""
    unknown = tokenizer.token_to_id("[UNK]")
    ids = []
    for word in words:
        encoding = tokenizer.encode(word, add_special_tokens=False)
        new = [i for i in encoding.ids if i not in (unknown, *ids)]
        expected = f"expected one token, which no other word has; it is {encoding.tokens}"
        require(len(encoding.ids) == len(new) == 1, f'label word "{word}": {expected}')
        ids += new
    return ids


@dataclass
class Dataset:
    """The n examples of a split. The tokens of example i are ids[starts[i]:starts[i + 1]].

    The token type is 0 at first. It is 1 from position second[i] of the example on.
    """

    ids: np.ndarray  # (total number of tokens,) int32
    starts: np.ndarray  # (n + 1,) int64
    second: np.ndarray  # (n,) int32
    labels: np.ndarray | None = None  # (n,) int64 classes or float32 values; None in a test split
    max_length: int = 512  # no example has more tokens

    def __len__(self):
        return len(self.second)

    @property
    def lengths(self):
        """Return the number of tokens of each example, (n,)."""
        return np.diff(self.starts)

    def take(self, indices):
        """Return a Dataset of the labelled examples `indices`, in this order."""
        rows = np.split(self.ids, self.starts[1:-1])
        ids = np.concatenate([rows[i] for i in indices])
        starts = np.append(0, self.lengths[indices].cumsum())
        return Dataset(ids, starts, self.second[indices], self.labels[indices], self.max_length)

    def split(self, fraction, seed):
        """Return two Datasets, the rest and a random `fraction`. Neither of them is empty."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = np.clip(round(fraction * len(self)), 1, len(self) - 1)
        return [self.take(np.sort(part)) for part in (order[cut:], order[:cut])]


def load_dataset(task, split, tokenizer, max_length, data_dir="data"):
    """Return a split as a Dataset, from the cache if the same text was tokenised before."""
    require(max_length >= 8, f"--max-length {max_length}: expected at least 8")
    data_dir = Path(data_dir)
    path = locate(task, split, data_dir)
    data = path.read_bytes()
    # The key of the cache file is made of all that decides the ids, and of nothing else.
    reading = replace(task, name=split, words=(), metrics=(), files={}, sources=())
    reading.rows = task.rows.get(split)
    described = f"format 1, {max_length}, {reading}, {tokenizer.to_str()}"
    key = hashlib.sha256(hashlib.sha256(data).digest() + described.encode()).hexdigest()[:32]
    folder = data_dir / "cache" if writable(data_dir) else cache_home() / "tokens"
    cached = folder / f"{task.name}-{split}-{key}.safetensors"
    try:
        arrays = safetensors.numpy.load_file(cached)
        return Dataset(**arrays, max_length=max_length)
    except (OSError, TypeError, SafetensorError):
        pass  # the file is missing or damaged, or it lacks an array, so we tokenise
    texts, labels = read_tsv(task, split, path, data)
    ids, starts, second = encode(texts, tokenizer, max_length)
    arrays = {"ids": ids, "starts": starts, "second": second}
    if labels is not None:
        arrays["labels"] = labels
    try:
        atomic_write(cached, safetensors.numpy.save(arrays))
    except OSError as error:
        tell(f"no token cache: {error}", sys.stderr)
    return Dataset(**arrays, max_length=max_length)


def encode(texts, tokenizer, max_length):
    """Return ids, starts and second (see Dataset). Of a pair the longer text is cut first."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, because we change its settings
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids = []
    second = []
    with live("tokenise", len(texts)) as bar:
        for start in range(0, len(texts), 4096):  # in chunks: an Encoding takes much memory
            chunk = tokenizer.encode_batch_fast(texts[start : start + 4096])
            for encoding in chunk:
                ids.append(np.array(encoding.ids, np.int32))
                second.append(len(ids[-1]) - sum(encoding.type_ids))
            bar.update(len(chunk))
    starts = np.append(0, np.cumsum([len(row) for row in ids]))
    return np.concatenate(ids), starts, np.array(second, np.int32)


# -------------------------------------------------------------------------------------------------
# batches


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


def micro_batches(batch, rank, world, grad_accum):
    """Return this rank's micro-batches of a batch: (examples, factor for the sum of their losses).

    DistributedDataParallel averages over ranks. With the factor that average is the mean over the
    batch. Every rank must have as many micro-batches as the others. Where it has no example left,
    it takes one with the factor 0.
    """
    most = len(batch[::world])  # examples of rank 0, which has the most
    parts = np.array_split(batch[rank::world], min(grad_accum, most))
    factor = world / len(batch)
    return [(part, factor) if len(part) else (batch[:1], 0.0) for part in parts]


def collate(dataset, indices, pad_id=0):
    """Return examples as tensors, padded to the longest of them and to a multiple of 8.

    input_ids and token_type_ids are (B, T) int64, and attention_mask is (B, T) bool. If there are
    labels, labels is (B,), int64 classes or float32 values.
    """
    starts = dataset.starts[indices]  # (B,)
    lengths = dataset.starts[indices + 1] - starts  # (B,)
    width = min((int(lengths.max()) + 7) // 8 * 8, dataset.max_length)  # T
    position = np.arange(width)  # (T,)
    mask = position < lengths[:, None]  # (T,) < (B, 1) -> (B, T)
    source = starts[:, None] + position  # (B, 1) + (T,) -> (B, T), where each token is in `ids`
    input_ids = np.full(mask.shape, pad_id, np.int64)
    input_ids[mask] = dataset.ids[source[mask]]
    token_type_ids = (mask & (position >= dataset.second[indices][:, None])).astype(np.int64)
    batch = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": mask}
    if dataset.labels is not None:
        batch["labels"] = dataset.labels[indices]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# -------------------------------------------------------------------------------------------------
# command line


def prepare(task, data_dir="data"):
    """Locate and read every split of a task; return {split: (path, number of rows)}."""
    os.makedirs(data_dir, exist_ok=True)
    found = {}
    for split in task.files:
        path = locate(task, split, data_dir)
        texts, _ = read_tsv(task, split, path, path.read_bytes())
        found[split] = (path, len(texts))
    return found


@program
def main(argv=None):
    parser = Parser("download, check and count the data of GLUE tasks")
    add = parser.add_argument
    add("--task", nargs="+", default=[], metavar="TASK", help=" ".join(TASKS))
    add("--task-file", nargs="+", default=[], metavar="JSON", help="your own task, see README")
    add("--data-dir", default="data", help="where the official zips or folders of TSVs are or go")
    args = parser.parse_args(argv)
    tasks = [get_task(name) for name in args.task]
    tasks += [get_task(None, path) for path in args.task_file]
    require(tasks, "nothing to do: give --task or --task-file")
    for task in tasks:
        for split, (path, rows) in prepare(task, args.data_dir).items():
            print(f"{task.name:8} {split:8} {rows:8,} rows  {path}")


if __name__ == "__main__":
    sys.exit(main())
