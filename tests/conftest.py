"""What train.py needs, in a few kilobytes: a tiny BERT with a tokenizer, and a made-up task."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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


def pytest_collection_modifyitems(items):
    """Put the tests last that wait for the demo."""
    items.sort(key=lambda item: "default_command" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def demo_in_background(request, tmp_path_factory):
    """A function that returns the folder in which `python train.py` ran, and what it printed.

    It takes most of a minute. It therefore starts before the first test and runs beside the others,
    if a test that needs it was collected.
    """
    needed = [item for item in request.session.items if "default_command" in item.fixturenames]
    if not needed:
        yield None
        return
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "train.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=one_thread, **pipes)

    def wait():
        out, err = process.communicate()
        assert process.returncode == 0, err
        return folder, out

    yield wait
    process.kill()
    process.wait()
