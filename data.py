"""
GLUE (nine tasks, the AX diagnostics, or a task of your own) as token ids in flat numpy arrays.

Notable:
- one row per task in TASKS: everything this program knows about GLUE is there
- the official files, checked: sha256 of what is downloaded or unzipped, row counts of what is read
- works offline on a folder of official zips or TSVs; a read-only folder stays untouched (see `cache_home`)
- text is read as the official scripts read it: tabs and newlines separate, quotes are text
- a split is tokenised once and cached under a hash of everything that decides the ids
- an epoch is a list of index arrays, grouped by length: a pure function of (lengths, batch size, seed, epoch)

    python data.py --task mrpc mnli        # download, check and count (the training loop does it by itself too)
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's, in one line: main() prints it as `error: ...` and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """Flags must be written out, and a wrong one is a UserError like any other."""

    def __init__(self, description):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=kind, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def program(main):
    """A main(argv) whose UserError is one line on stderr and exit status 2; else its own status, or 0."""

    @wraps(main)
    def reporting(argv=None):
        try:
            return main(argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return reporting


def atomic_write(path, data):
    """Write bytes or text so that `path` is at any moment either the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def cache_home():
    """The folder for what cannot be written beside the data: $NANOPRUNE_CACHE, or nanoprune in the user's cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NANOPRUNE_CACHE") or user_cache / "nanoprune")


def writable(folder):
    """May we write there? Root may write anywhere, but a folder that nobody may write to is left alone all the same."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder.is_dir() and os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 > 0


@dataclass(frozen=True)
class Task:
    name: str
    folder: str  # the official name: of its folder, and of its file in a leaderboard submission
    labels: tuple  # names in class order, that of Hugging Face's checkpoints; () for regression
    spelling: tuple  # the same as the files and the leaderboard write them
    words: tuple  # the label word of each class; for regression those of the low and the high end
    metrics: tuple  # the first one selects the best checkpoint
    columns: tuple  # one or two text columns
    label: str  # the label column
    files: dict  # split -> file, relative to the data folder
    rows: dict  # split -> number of rows; empty for a task of your own
    sources: tuple = ()  # (address, bytes, sha256) of what the files are made from
    header: tuple = ()  # the column names of labelled files, where these come without a header line
    drop_broken: bool = False  # drop rows with missing fields instead of refusing them
    low: float = 0.0  # the range of a regression's labels
    high: float = 5.0

    @property
    def num_classes(self):
        return len(self.labels)

    @property
    def regression(self):
        return not self.labels

    @property
    def eval_splits(self):
        """The splits to evaluate, each with what it appends to the names of its metrics."""
        return {split: split.removeprefix("dev") for split in self.files if split.startswith("dev")}


def tsvs(folder):
    return {split: f"{folder}/{split}.tsv" for split in ("train", "dev", "test")}


S12, BIT, NLI = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "neutral", "contradiction")
ACC, ACC_F1, ENTAILED = ("accuracy",), ("accuracy", "f1"), ("entailment", "not_entailment")

TASKS = (  # name, folder, labels, spelling, words, metrics, columns, label column, files, rows, sources, ...
    Task("cola", "CoLA", ("unacceptable", "acceptable"), BIT, ("incorrect", "correct"), ("matthews",),
         ("sentence",), "label", tsvs("CoLA"), dict(train=8_551, dev=1_043, test=1_063),
         (("glue/data/CoLA.zip", 376_971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),),
         header=("source", "label", "star", "sentence")),
    Task("sst2", "SST-2", ("negative", "positive"), BIT, ("terrible", "great"), ACC,
         ("sentence",), "label", tsvs("SST-2"), dict(train=67_349, dev=872, test=1_821),
         (("glue/data/SST-2.zip", 7_439_277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),)),
    # GLUE may not host MRPC: it is made from the original files, and a list of the pairs that are its dev split
    Task("mrpc", "MRPC", ("not_equivalent", "equivalent"), BIT, ("no", "yes"), ACC_F1,
         ("#1 String", "#2 String"), "Quality", tsvs("MRPC"), dict(train=3_668, dev=408, test=1_725),
         (("senteval/senteval_data/msr_paraphrase_train.txt", 1_047_044,
           "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
          ("senteval/senteval_data/msr_paraphrase_test.txt", 441_275,
           "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
          ("glue/data/mrpc_dev_ids.tsv", 6_222,
           "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"))),
    Task("stsb", "STS-B", (), (), ("no", "yes"), ("pearson", "spearman"),
         S12, "score", tsvs("STS-B"), dict(train=5_749, dev=1_500, test=1_379),
         (("glue/data/STS-B.zip", 802_872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),)),
    # a few rows of QQP have lost their last columns; the official scripts drop them
    Task("qqp", "QQP", ("not_duplicate", "duplicate"), BIT, ("no", "yes"), ACC_F1,
         ("question1", "question2"), "is_duplicate", tsvs("QQP"), dict(train=363_846, dev=40_430, test=390_965),
         (("glue/data/QQP-clean.zip", 41_696_084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),),
         drop_broken=True),
    Task("mnli", "MNLI", NLI, NLI, ("yes", "maybe", "no"), ("accuracy", "accuracy_mm"), S12, "gold_label",
         {"train": "MNLI/train.tsv", "dev": "MNLI/dev_matched.tsv", "dev_mm": "MNLI/dev_mismatched.tsv",
          "test": "MNLI/test_matched.tsv", "test_mm": "MNLI/test_mismatched.tsv"},
         dict(train=392_702, dev=9_815, dev_mm=9_832, test=9_796, test_mm=9_847),
         (("glue/data/MNLI.zip", 312_783_507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),)),
    Task("qnli", "QNLI", ENTAILED, ENTAILED, ("yes", "no"), ACC,
         ("question", "sentence"), "label", tsvs("QNLI"), dict(train=104_743, dev=5_463, test=5_463),
         (("glue/data/QNLIv2.zip", 10_627_589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),)),
    Task("rte", "RTE", ENTAILED, ENTAILED, ("yes", "no"), ACC,
         S12, "label", tsvs("RTE"), dict(train=2_490, dev=277, test=3_000),
         (("glue/data/RTE.zip", 697_150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),)),
    Task("wnli", "WNLI", ("not_entailment", "entailment"), BIT, ("no", "yes"), ACC,
         S12, "label", tsvs("WNLI"), dict(train=635, dev=71, test=146),
         (("glue/data/WNLI.zip", 28_999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),)),
    # the diagnostics have no labels of their own: an MNLI model predicts them
    Task("ax", "AX", NLI, NLI, ("yes", "maybe", "no"), (), S12, "", {"test": "AX.tsv"}, {"test": 1_104},
         (("glue/data/AX.tsv", 222_257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),)),
)  # fmt: skip
TASKS = {"demo": None} | {task.name: task for task in TASKS}  # the demo is demo/task.json, a task file like yours


def get_task(name, task_file=None):
    """The task called `name`, or the one described in `task_file`. Raises UserError for an unknown name or key."""
    if task_file or name == "demo":
        return read_task_file(Path(task_file or Path(__file__).parent / "demo" / "task.json"))
    if name not in TASKS:
        raise UserError(f'unknown task "{name}": expected one of {", ".join(TASKS)}, or --task-file')
    return TASKS[name]


def read_task_file(path):
    """
    Your own task, as JSON; the files are TSVs with a header line, their paths relative to the JSON:
        {"name": "mine", "train": "train.tsv", "dev": "dev.tsv", "columns": ["question", "answer"],
         "label": "label", "labels": ["bad", "good"], "words": ["no", "yes"], "metric": "accuracy"}
    "labels" are the strings in the label column, in class order; for regression give "range": [0, 5] in their place,
    and two words, for the low and the high end. "test" is optional. "metric" may be a list: the first one selects.
    """
    try:
        row = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a readable JSON object ({error})") from None

    def need(ok, key, expected):
        if not ok:
            raise UserError(f'{path}: "{key}": expected {expected}')

    def strings(key, counts):
        values = row[key] if isinstance(row[key], list) else [row[key]]
        distinct = all(isinstance(value, str) and value for value in values) and len(set(values)) == len(values)
        need(distinct and len(values) in counts, key, f"{' or '.join(map(str, counts[:3]))} different strings")
        return tuple(values)

    required = ("name", "train", "dev", "columns", "label", "words", "metric")
    for key in row:
        need(key in (*required, "test", "labels", "range"), key, "no such key")
    for key in required:
        need(key in row, key, "this key, but it is missing")
    need(("labels" in row) != ("range" in row), "labels", 'either "labels" or, for regression, "range"')
    need(re.fullmatch(r"[\w.-]+", str(row["name"])), "name", "letters, digits, dots and dashes")
    labels, ends = strings("labels", range(2, 1000)) if "labels" in row else (), row.get("range", [0, 5])
    need(isinstance(ends, list) and [type(end) in (int, float) for end in ends] == [True, True] and ends[0] < ends[1],
         "range", "two numbers, the lower one first")
    metrics, known = strings("metric", (1, 2, 3)), ("accuracy", "f1", "matthews") if labels else ("pearson", "spearman")
    known = known[:1] if len(labels) > 2 else known  # F1 and Matthews are those of two classes
    need(set(metrics) <= set(known), "metric", f"some of {', '.join(known)}")
    files = {split: str(path.resolve().parent / strings(split, [1])[0]) for split in row if split in tsvs("")}
    return Task(row["name"], row["name"], labels, labels, strings("words", [len(labels) or 2]), metrics,
                strings("columns", [1, 2]), *strings("label", [1]), files, {}, low=float(ends[0]), high=float(ends[1]))


def check_sha256(path, sha256, advice):
    data = path.read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(f"{path}: not the official file: {len(data)} bytes, sha256 {got}, expected {sha256}; {advice}")


def download(source, path):
    """Fetch one source to `path`, by way of `path`.part, which the next call resumes if this one is interrupted."""
    address, size, sha256 = source
    url = os.environ.get("GLUE_URL", "https://dl.fbaipublicfiles.com/").rstrip("/") + "/" + address
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if not sys.stderr.isatty():
        print(f"downloading {url} ({size / 1e6:.1f} MB)", file=sys.stderr)  # otherwise there is a progress bar
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if 0 < have < size else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # nothing to resume, or a server that ignores the range and sends everything
            end = min(size, have + int(response.headers.get("Content-Length", size)))
            with (open(part, "ab" if have else "wb") as file,
                  tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name, disable=None) as bar):
                while have < end and (block := response.read(min(1 << 18, end - have))):
                    have += file.write(block)
                    bar.update(len(block))
        if have < end:
            raise ConnectionError(f"the connection ended after {have} of {size} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "code", None) == 416:  # range not satisfiable: what we have is part of another file
            part.unlink()
        raise UserError(f"{url}: {str(error) or type(error).__name__}; run again to resume, or put {path.name} into "
                        f"{path.parent} yourself, or set GLUE_URL to a mirror") from None
    try:
        check_sha256(part, sha256, f"it came from {url} and is deleted; run again, or set GLUE_URL to a mirror")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fetch(source, folders, home):
    """The path of one source, verified: found in one of `folders`, else downloaded to `home`."""
    name = source[0].rsplit("/", 1)[-1]
    for folder in folders:
        if (folder / name).is_file():
            check_sha256(folder / name, source[2], "remove it, and it is downloaded")
            return folder / name
    download(source, home / name)
    return home / name


def unpack(archive, home, names):
    """
    Write the members `names` of a zip below `home`, each atomically, none over a file that is there. Nothing else is
    ever written; a zip with a member that points out of the folder is refused as a whole all the same.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in zipped.namelist():
                if re.match(r"[/\\]|\w:", member) or ".." in re.split(r"[/\\]", member):
                    raise UserError(f'{archive}: the member "{member}" would leave the folder; nothing was unzipped')
            for name in names:
                if not (home / name).exists():
                    atomic_write(home / name, zipped.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive}: not a usable zip: {error}; remove it, and it is downloaded") from None


def build_mrpc(train, test, dev_ids, home):
    """MRPC's three TSVs: the listed pairs of the original training file are dev, its other rows are train."""
    ids = set(dev_ids.read_text(encoding="utf-8").split("\n"))
    header, *lines = train.read_bytes().decode("utf-8-sig").rstrip("\n").split("\n")
    splits = {"train": [header], "dev": [header]}
    for line in lines:
        splits["dev" if "\t".join(line.split("\t")[1:3]) in ids else "train"].append(line)
    texts = {split: "\n".join(lines) + "\n" for split, lines in splits.items()} | {"test": test.read_bytes()}
    for split, text in texts.items():
        if not (home / f"MRPC/{split}.tsv").exists():
            atomic_write(home / f"MRPC/{split}.tsv", text)


def locate(task, split, data_dir):
    """
    The TSV of a split: in `data_dir` if it is there, else made from the sources there, else downloaded.
    What is made goes to `data_dir`, or, where that may not be written, to a folder of its own in `cache_home()`.
    """
    if split not in task.files:
        raise UserError(f'task {task.name} has no "{split}" split; it has {", ".join(task.files)}')
    data_dir, name = Path(data_dir), task.files[split]
    if (data_dir / name).is_file():
        return data_dir / name
    if not task.sources:
        raise UserError(f"{name}: no such file (the {split} split of task {task.name})")
    spare = cache_home() / task.sources[0][2][:16]
    if (spare / name).is_file():
        return spare / name
    home = data_dir if writable(data_dir) else spare
    sources = [fetch(source, (data_dir, data_dir / task.folder, spare), home) for source in task.sources]
    if task.name == "mrpc":
        build_mrpc(*sources, home)
    elif sources[0].suffix == ".zip":
        unpack(sources[0], home, task.files.values())
    else:
        return sources[0]
    return home / name


def read_tsv(task, split, path, data):
    """
    Texts (a list of strings, or of pairs) and labels (int64, float32, or None in a test split) from a file's bytes.
    Raises UserError, with file and line, for bytes that are not UTF-8, missing columns, unknown labels, lost rows.
    """
    try:
        lines = data.decode("utf-8-sig").split("\n")  # not splitlines(): U+2028 and its like are text
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file") from None
    labelled = not split.startswith("test")
    lines = [line.removesuffix("\r").split("\t") for line in lines]
    header, first = (task.header, 0) if labelled and task.header else (lines[0], 1)
    wanted = [*task.columns, task.label] if labelled else task.columns
    for name in wanted:
        if name not in header:
            raise UserError(f'{path}:1: no column "{name}"; the header line has {", ".join(header)}')
    where = [header.index(name) for name in wanted]
    classes = {spelling: i for i, spelling in enumerate(task.spelling)}
    expected = f"a number from {task.low} to {task.high}" if task.regression else " or ".join(task.spelling)

    texts, labels = [], []
    for number, fields in enumerate(lines[first:], first + 1):
        if fields == [""] or (len(fields) < len(header) and task.drop_broken):
            continue
        # a field too many: the official scripts let it pass in the official files, so do we; in yours it is a mistake
        if len(fields) < len(header) or (len(fields) > len(header) and not task.rows):
            hint = f'"{header[len(fields)]}" is missing' if len(fields) < len(header) else "a tab inside a text?"
            raise UserError(f"{path}:{number}: {len(fields)} columns, expected {len(header)}: {hint}")
        picked = [fields[i] for i in where]
        if labelled:
            value = picked.pop()
            try:
                labels.append(float(value) if task.regression else classes[value])
                if task.regression and not task.low <= labels[-1] <= task.high:
                    raise ValueError
            except (KeyError, ValueError):
                raise UserError(f'{path}:{number}: unknown {task.label} "{value}", expected {expected}') from None
        texts.append(picked[0] if len(picked) == 1 else tuple(picked))
    rows = task.rows.get(split, max(1, len(texts)))
    if len(texts) != rows:
        raise UserError(f"{path}: {len(texts)} rows, expected {rows}: the file is not whole, or not the official one")
    return texts, np.array(labels, np.float32 if task.regression else np.int64) if labelled else None


def load_tokenizer(model_dir, vocab_size):
    """
    The tokenizer of a checkpoint folder: its tokenizer.json, or BERT's built from its vocab.txt. No padding, no
    truncation. Raises UserError without either file, or if it knows more tokens than the embedding has rows.
    """
    path = Path(model_dir) / "tokenizer.json"
    path = path if path.is_file() else path.with_name("vocab.txt")
    if not path.is_file():
        raise UserError(f"{model_dir}: neither tokenizer.json nor vocab.txt; copy it there from the model's origin")
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else build_tokenizer(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer of BERT's kind ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: ids up to {largest}, the embedding has {vocab_size} rows: not this model's tokenizer")
    return tokenizer


def build_tokenizer(path):
    """BERT's tokenizer from vocab.txt (one token per line) and the switches in tokenizer_config.json, if any."""
    with open(path, encoding="utf-8") as file:
        vocab = {line.rstrip("\n"): i for i, line in enumerate(file)}
    if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - vocab.keys():
        raise ValueError(f"no {' '.join(sorted(missing))}")
    config = path.with_name("tokenizer_config.json")
    config = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    tokenizer = BertWordPieceTokenizer(
        vocab, handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"), lowercase=config.get("do_lower_case", True))  # None: as lowercase
    return Tokenizer.from_str(tokenizer.to_str())


def word_ids(tokenizer, words):
    """The vocabulary ids of label words. Raises UserError unless they are one known token each, all different."""
    ids = []
    for word in words:
        encoding = tokenizer.encode(word, add_special_tokens=False)
        if len(encoding.ids) != 1 or encoding.ids[0] in (*ids, tokenizer.token_to_id("[UNK]")):
            raise UserError(f'label word "{word}": expected one token of the vocabulary, a different one for each; '
                            f"it is {' '.join(encoding.tokens) or 'empty'}; choose another word")
        ids += encoding.ids
    return ids


@dataclass
class Dataset:
    """A split: example i is ids[starts[i]:starts[i + 1]], with token type 1 from its position second[i] on."""

    ids: np.ndarray  # (total,) int32
    starts: np.ndarray  # (n + 1,) int64
    second: np.ndarray  # (n,) int32
    labels: np.ndarray | None  # (n,) int64 classes, float32 for regression, None in a test split
    max_length: int

    def __len__(self):
        return len(self.second)

    @property
    def lengths(self):
        return np.diff(self.starts)

    def take(self, indices):
        """The examples `indices`, in that order, as a Dataset."""
        lengths = self.lengths[indices]
        ids = [self.ids[self.starts[i] : self.starts[i + 1]] for i in indices]
        labels = None if self.labels is None else self.labels[indices]
        starts = np.append(0, lengths.cumsum())
        return Dataset(np.concatenate(ids), starts, self.second[indices], labels, self.max_length)

    def split(self, fraction, seed):
        """(the rest, a random `fraction`): two Datasets, neither empty, drawn with `seed`."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = min(max(1, round(fraction * len(self))), len(self) - 1)
        return self.take(np.sort(order[cut:])), self.take(np.sort(order[:cut]))


def encode(texts, tokenizer, max_length):
    """ids, starts and second (see Dataset) of strings or pairs, the longer text of a pair truncated first."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, to leave the caller's without truncation
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids, lengths, ones = [], [], []
    for start in range(0, len(texts), 8192):  # in chunks: an Encoding takes far more memory than its ids
        encodings = tokenizer.encode_batch_fast(texts[start : start + 8192])
        chunk = [encoding.ids for encoding in encodings]
        ids.append(np.fromiter(chain.from_iterable(chunk), np.int32))
        lengths += map(len, chunk)
        ones += [sum(encoding.type_ids) for encoding in encodings] if isinstance(texts[0], tuple) else [0] * len(chunk)
    lengths = np.array(lengths, np.int64)
    return np.concatenate(ids), np.append(0, lengths.cumsum()), (lengths - ones).astype(np.int32)


def load_dataset(task, split, tokenizer, max_length, data_dir="data"):
    """A split as a Dataset, from the cache if the same text was tokenised in the same way before."""
    if max_length < 8:
        raise UserError(f"--max-length {max_length}: expected at least 8, for [CLS], [SEP] and some text")
    path = locate(task, split, data_dir)
    data = path.read_bytes()
    reading = replace(task, name=split, words=(), metrics=(), files={}, rows=task.rows.get(split), sources=())
    recipe = f"format 1, {max_length}, {reading}, {tokenizer.to_str()}"  # all that decides the arrays, with the text
    key = hashlib.sha256(hashlib.sha256(data).digest() + recipe.encode())
    folder = Path(data_dir) / "cache" if writable(Path(data_dir)) else cache_home() / "tokens"
    cached = folder / f"{task.name}-{split}-{key.hexdigest()[:32]}.safetensors"
    try:
        arrays = safetensors.numpy.load_file(cached)
        return Dataset(arrays["ids"], arrays["starts"], arrays["second"], arrays.get("labels"), max_length)
    except (OSError, KeyError, SafetensorError):
        pass  # not there, or damaged: tokenise
    texts, labels = read_tsv(task, split, path, data)
    ids, starts, second = encode(texts, tokenizer, max_length)
    arrays = {"ids": ids, "starts": starts, "second": second} | ({} if labels is None else {"labels": labels})
    try:
        atomic_write(cached, safetensors.numpy.save(arrays))
    except OSError as error:
        print(f"no token cache: {error}", file=sys.stderr)
    return Dataset(ids, starts, second, labels, max_length)


def token_sizes(lengths, max_tokens):
    """Sizes of batches of examples sorted longest first: as many as fit in `max_tokens` with padding, at least one."""
    widths, sizes, start = -(-np.sort(lengths)[::-1] // 8) * 8, [], 0
    while start < len(widths):
        sizes.append(min(max(1, int(max_tokens // widths[start])), len(widths) - start))
        start += sizes[-1]
    return sizes


def batches(lengths, batch_size, seed, epoch, max_tokens=0):
    """
    The batches of one epoch of training, as index arrays: a pure function of its arguments. Every example comes once;
    one batch may be short. Shuffle, sort by length inside pools of up to 50 batches, cut, shuffle the batches:
    padding is rare, and who meets whom still changes from epoch to epoch. With `max_tokens`, batches of so many tokens,
    padding included, in place of `batch_size` examples; their number is the same in every epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    if max_tokens:
        order = order[np.argsort(-lengths[order], kind="stable")]
        cut = np.split(order, np.cumsum(token_sizes(lengths, max_tokens))[:-1])
        return [cut[i] for i in rng.permutation(len(cut))]
    pool = batch_size * max(1, min(50, len(lengths) // (4 * batch_size)))  # at least four pools in a small task
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    cut = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def collate(dataset, indices, pad_id=0):
    """
    The examples `indices` as tensors, padded to the longest of them rounded up to a multiple of 8: input_ids and
    token_type_ids (B, T) int64, attention_mask (B, T) bool, and, where there are labels, labels (B,).
    """
    starts = dataset.starts[indices]  # (B,)
    lengths = dataset.starts[indices + 1] - starts
    width = min(-(-int(lengths.max()) // 8) * 8, dataset.max_length)
    position = np.arange(width)
    mask = position < lengths[:, None]  # (B, T)
    input_ids = np.full(mask.shape, pad_id, np.int64)
    input_ids[mask] = dataset.ids[(starts[:, None] + position)[mask]]
    token_type_ids = (mask & (position >= dataset.second[indices][:, None])).astype(np.int64)
    batch = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": mask}
    if dataset.labels is not None:
        batch["labels"] = dataset.labels[indices]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def prepare(task, data_dir="data"):
    """Fetch and check every split of a task; returns {split: (path, rows)}."""
    paths = {split: locate(task, split, data_dir) for split in task.files}
    return {split: (path, len(read_tsv(task, split, path, path.read_bytes())[0])) for split, path in paths.items()}


@program
def main(argv=None):
    parser = Parser("download, check and count the data of GLUE tasks")
    parser.add_argument("--task", nargs="+", default=[], metavar="TASK", help=" ".join(TASKS))
    parser.add_argument("--task-file", nargs="+", default=[], metavar="JSON", help="your own task, see read_task_file")
    parser.add_argument("--data-dir", default="data", help="where the official zips or folders of TSVs are or go")
    args = parser.parse_args(argv)
    tasks = [get_task(name) for name in args.task] + [get_task(None, file) for file in args.task_file]
    if not tasks:
        raise UserError("nothing to do: give --task or --task-file")
    for task in tasks:
        for split, (path, rows) in prepare(task, args.data_dir).items():
            print(f"{task.name:8} {split:8} {rows:8,} rows  {path}")


if __name__ == "__main__":
    sys.exit(main())
