"""A tiny real checkpoint with a tokenizer, and a made-up task: everything train.py needs, in a few kilobytes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags that choose the golden tiny-bert and a task of word pairs: does a word of A occur in B?"""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(GOLDEN / "tiny-bert", folder / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "yes"] + [f"w{i}" for i in range(113)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for split, rows in (("train", 203), ("dev", 60)):
        lines = ["a\tb\tlabel"]
        for _ in range(rows):
            a, b = (rng.integers(20, size=rng.integers(2, 8)) for _ in range(2))
            texts = [" ".join(f"w{i}" for i in side) for side in (a, b)]
            lines.append("\t".join([*texts, "yes" if set(a) & set(b) else "no"]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    task = {"name": "pairs", "train": "train.tsv", "dev": "dev.tsv", "columns": ["a", "b"], "label": "label"}
    task |= {"labels": ["no", "yes"], "words": ["no", "yes"], "metric": ["accuracy", "f1"]}
    (folder / "task.json").write_text(json.dumps(task))
    flags = {"model": folder / "model", "task-file": folder / "task.json", "data-dir": folder / "data"}
    flags |= {"max-length": 24, "epochs": 2, "batch-size": 16, "log-every": 1, "device": "cpu", "dtype": "fp32"}
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
