"""What train.py needs, in a few kilobytes: a tiny BERT with a tokenizer, and a made-up task."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# One core for these tests, the other one for what runs beside them. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from forks import SERVER
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def word_tokenizer():
    """A tokenizer whose tokens are whole words: "no", "yes" and w0 to w112."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "yes"]
    words += [f"w{i}" for i in range(113)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def pairs(count, rng):
    """The lines of a TSV of examples, which are labelled yes where a word of a occurs in b."""
    lines = ["a\tb\tlabel"]
    for _ in range(count):
        a = rng.integers(20, size=rng.integers(2, 8))
        b = rng.integers(20, size=rng.integers(2, 8))
        text_a = " ".join(f"w{i}" for i in a)
        text_b = " ".join(f"w{i}" for i in b)
        label = "yes" if set(a) & set(b) else "no"
        lines.append(f"{text_a}\t{text_b}\t{label}")
    return lines


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of train.py that choose the golden tiny-bert and a task of pairs of texts.

    The first three are --model, --task-file and --data-dir, so that their values are tiny[1],
    tiny[3] and tiny[5].
    """
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(GOLDEN / "tiny-bert", folder / "model")
    word_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 203), ("dev", 60)):
        lines = pairs(count, rng)
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    task = {
        "name": "pairs",
        "train": "train.tsv",
        "dev": "dev.tsv",
        "columns": ["a", "b"],
        "label": "label",
        "labels": ["no", "yes"],
        "words": ["no", "yes"],
        "metric": ["accuracy", "f1"],
    }
    (folder / "task.json").write_text(json.dumps(task))
    flags = ["--model", str(folder / "model"), "--task-file", str(folder / "task.json")]
    flags += ["--data-dir", str(folder / "data"), "--max-length", "24", "--max-steps", "26"]
    flags += ["--batch-size", "16", "--log-every", "1", "--device", "cpu", "--dtype", "fp32"]
    return flags


def score_task(tiny, folder):
    """A task file of pairs with a value, made of the pairs with a label."""
    row = json.loads(Path(tiny[3]).read_text())
    del row["labels"]
    row |= {"name": "values", "columns": ["b"], "range": [0, 5], "metric": "pearson"}
    for split in ("train", "dev"):
        text = (Path(tiny[3]).parent / f"{split}.tsv").read_text()
        text = text.replace("\tyes\n", "\t4\n").replace("\tno\n", "\t1\n")
        (folder / f"{split}.tsv").write_text(text)
    (folder / "score.json").write_text(json.dumps(row))
    return folder / "score.json"


def squad_file(count, rng):
    """Questions in the form of SQuAD: w70 to w80 are an answer, after the word of the question."""
    paragraphs = []
    for number in range(count):
        words = [f"w{i}" for i in rng.permutation(60)[: rng.integers(8, 41)]]
        place = rng.integers(len(words) - 3)
        answer = [f"w{i}" for i in rng.integers(70, 81, size=rng.integers(1, 3))]
        words[place + 1 : place + 1 + len(answer)] = answer
        answer = " ".join(answer)
        start = len(" ".join(words[: place + 1])) + 1
        answers = [{"text": answer, "answer_start": start}, {"text": "w61", "answer_start": 0}]
        question = {"id": f"q{number}", "question": f" {words[place]} w62", "answers": answers}
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


def conll_file(count, rng, scheme):
    """Sentences in the form of CoNLL-2003; w0 to w9 are persons, w10 to w19 are places."""
    lines = ["-DOCSTART- -X- O O", ""]
    for _ in range(count):
        before = "O"
        for i in rng.integers(24, size=rng.integers(1, 12)):
            kind = {0: "PER", 1: "LOC"}.get(i // 10)
            goes_on = before == kind
            starts = "I" if scheme == "IOB1" else "B"
            tag = f"{'I' if goes_on else starts}-{kind}" if kind else "O"
            lines.append(f"w{i} X X {tag}")
            before = kind
        lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """Task files {kind: path} of a task of each kind that reads every position."""
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(1)
    (folder / "train.json").write_text(squad_file(90, rng))
    (folder / "dev.json").write_text(squad_file(30, rng))
    (folder / "train.txt").write_text(conll_file(150, rng, "IOB1"))
    (folder / "dev.txt").write_text(conll_file(50, rng, "BIO2"))
    span = {"name": "spans", "kind": "span", "train": "train.json", "dev": "dev.json"}
    span |= {"words": ["yes", "no"], "metric": ["f1", "em"]}
    tag = {"name": "tags", "kind": "tag", "train": "train.txt", "dev": "dev.txt"}
    tag |= {"words": ["no", "w1", "w2", "w3", "w4"], "metric": ["entity_f1", "entity_recall"]}
    (folder / "span.json").write_text(json.dumps(span))
    (folder / "tag.json").write_text(json.dumps(tag))
    return {kind: str(folder / f"{kind}.json") for kind in ("span", "tag")}


def meals(count, rng):
    """Rows of a CSV: the source is a meal and a place, and the text says both."""
    foods = ("fish", "soup", "rice", "cake", "bread")
    places = ("The Mill", "Bibi", "Zizzi", "Green Man")
    lines = ["source,text"]
    for _ in range(count):
        food, place = foods[rng.integers(5)], places[rng.integers(4)]
        text = f"{place} has {food}." if rng.integers(2) else f"You get {food} at {place}."
        lines.append(f"name : {place} | food : {food},{text}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Flags of train.py that choose a little random GPT-2 and a task of texts for sources.

    As in `tiny`, the model, the task file and the folder of data are texts[1], [3] and [5].
    """
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(2)
    for split, count in (("train", 200), ("dev", 30), ("test", 12)):
        (folder / f"{split}.csv").write_text(meals(count, rng))
    task = {"name": "meals", "kind": "generate", "metric": ["bleu", "nist"]}
    task |= {split: f"{split}.csv" for split in ("train", "dev", "test")}
    task |= {"source": "source", "text": "text"}
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "model").mkdir()
    bpe = ByteLevelBPETokenizer()
    lines = (folder / "train.csv").read_text().splitlines()
    bpe.train_from_iterator(lines, vocab_size=320, special_tokens=["<|endoftext|>"])
    bpe.save(str(folder / "model" / "tokenizer.json"))
    config = {"model_type": "gpt2", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config |= {"vocab_size": bpe.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    flags = ["--model", str(folder / "model"), "--task-file", str(folder / "task.json")]
    flags += ["--data-dir", str(folder / "data"), "--max-length", "64", "--max-steps", "12"]
    flags += ["--batch-size", "16", "--log-every", "1", "--device", "cpu", "--dtype", "fp32"]
    flags += ["--max-new-tokens", "16", "--beams", "3"]
    return flags


# The sizes of the models of test_llama.py.
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="session")
def llama(texts, tmp_path_factory):
    """The flags of `texts`, with a folder of a little random Llama whose head is its own."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(texts[1], folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = {"model_type": "llama", **SIZES, "vocab_size": vocabulary, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    return ["--model", str(folder), *texts[2:]]


@pytest.fixture(scope="session")
def hf():
    """The package `transformers`; without it the test is skipped."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


# Each of these files has a function `begin`, which starts work that runs beside the other tests, on
# one core. The work begins in this order, the longest first. The tests that wait for it, by the
# fixture `begun`, come last, in the same order.
BESIDE = ("test_demo", "test_cuda", "test_processes", "test_grid", "test_variants", "test_live")


def pytest_collection_modifyitems(config, items):
    """Skip the slow tests if -m does not name them; put those last that wait for work beside."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes a minute; -m slow runs it"))
    items.sort(key=lambda item: 1 + BESIDE.index(name_of(item)) if waits(item) else 0)


def waits(item):
    """Does a test wait for what runs beside the others?"""
    return "begun" in item.fixturenames


def name_of(item):
    return item.module.__name__


class Background:
    """Work that is done piece by piece, in one thread, beside the tests."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.process = None

    def call(self, function, *args):
        """Return a future of what a function returns. It must leave this process as it is."""
        return self.pool.submit(function, *args)

    def start(self, command, **options):
        """Return a future of what a command prints."""
        return self.call(self.run, command, options)

    def run(self, command, options):
        options["env"] = os.environ | options.get("env", {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, **options)
        out, err = self.process.communicate()
        assert self.process.returncode == 0, err
        return out

    def stop(self):
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.process:
            self.process.kill()


@pytest.fixture(scope="session", autouse=True)
def in_background(request):
    """{file of BESIDE: what its function `begin` returned}, of those that a test needs.

    They start before the first test.
    """
    background = Background()
    returned = {}
    needed = [item for item in request.session.items if waits(item) and not is_skipped(item)]
    for name in BESIDE:
        modules = [item.module for item in needed if name_of(item) == name]
        if modules:
            returned[name] = modules[0].begin(background, request.getfixturevalue)
    yield returned
    background.stop()
    SERVER.close()


def is_skipped(item):
    return item.get_closest_marker("skip") is not None


@pytest.fixture(scope="module")
def begun(in_background, request):
    """What the function `begin` of the test's file returned."""
    return in_background[request.module.__name__]
