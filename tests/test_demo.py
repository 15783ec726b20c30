"""The embedded demo: what its language and model must be, and what `python train.py` reaches on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import make_demo  # noqa: E402


def test_the_task_needs_more_than_words():
    """A bag of words stays under 75%, the pretrained model with the label words within 10 points of chance."""
    train, dev = make_demo.read_rows("train.tsv"), make_demo.read_rows("dev.tsv")
    assert not {row[:-1] for row in train} & {row[:-1] for row in dev}
    for per_sentence in (False, True):
        assert make_demo.bag_of_words(train, dev, per_sentence) < 0.75
    assert abs(make_demo.zero_shot(dev) - 0.5) < 0.1


def test_it_is_small():
    assert sum(path.stat().st_size for path in (ROOT / "demo").iterdir() if path.is_file()) < 2_000_000


def test_task_and_tokenizer_are_the_scripts(tmp_path, monkeypatch):
    """The committed files are what the committed script writes (the model, minutes of training, is not made again)."""
    monkeypatch.setattr(make_demo, "HERE", tmp_path)
    make_demo.write_task(make_demo.random.Random(f"task {make_demo.SEED}"))
    make_demo.write_tokenizer()
    for name in ("train.tsv", "dev.tsv", "task.json", "tokenizer.json"):
        assert (tmp_path / name).read_text() == (ROOT / "demo" / name).read_text()


@pytest.fixture(scope="module")
def default_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, str(ROOT / "train.py")], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_mask_alone_comes_within_two_points(default_command):
    """Dense fine-tuning exceeds 95%; SMP-S at 10% of the same pretrained weights is within 2 points of it."""
    folder, out = default_command
    dense, smp = (json.loads((folder / f"runs/demo/{m}/result.json").read_text()) for m in ("dense", "smp-s"))
    assert dense["metrics"]["accuracy"] > 0.95
    assert smp["metrics"]["accuracy"] > dense["metrics"]["accuracy"] - 0.02
    assert 0.0999 < smp["achieved_density"] <= 0.1
    assert "next, a real one: python train.py --model" in out and f"{100 * smp['metrics']['accuracy']:.2f}" in out
