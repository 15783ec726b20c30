"""The embedded demo: what its language and model must be, and what `python train.py` reaches on it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from data import batches, collate, load_dataset
from model import task_loss
from prune import Pins, encoder_matrices

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


@torch.no_grad()
def test_signed_importance_leaves_the_range_of_its_model(default_command, capsys):
    """On the dense run: dropping the 0.1% of lowest signed I is predicted to bring the loss below zero, and harms it
    more than dropping 500 times as many by |I|. README's table: `pytest -k signed_importance`."""
    run = default_command[0] / "runs/demo/dense"
    model, task, tokenizer, s = evaluation.load_run(run)
    model.eval()
    data = load_dataset(task, "train", tokenizer, s["max_length"], s["data_dir"])
    some = [collate(data, part) for part in batches(data.lengths, 64, 0, 0)[:40]]
    places = encoder_matrices(model.bert.encoder["layer"]).values()
    weights = [parent.get_submodule(child).weight for column in places for parent, child in column]
    pins, before = SimpleNamespace(settings=SimpleNamespace(pins_score="signed")), [w.clone() for w in weights]

    def losses():
        for batch in some:
            yield task_loss(model(**evaluation.inputs(batch, torch.device("cpu"))), batch["labels"], 0, 1).mean()

    signed, absolute = torch.zeros(2, sum(w.numel() for w in weights))
    with torch.enable_grad():
        for loss in losses():
            grads = torch.autograd.grad(loss, weights)
            values = [Pins.criterion(pins, w, g, s["lr"]).flatten() for w, g in zip(weights, grads, strict=True)]
            signed += torch.cat(values).detach() / len(some)
            absolute += torch.cat(values).detach().abs() / len(some)
    base, rose = float(sum(losses())) / len(some), {}
    with capsys.disabled():
        print(f"\n{len(signed):,} weights, loss {base:.3f}")
        for name, share in (("I", 0.001), ("I", 0.1), ("|I|", 0.1), ("|I|", 0.5)):
            values = signed if name == "I" else absolute
            drop = values <= values.kthvalue(int(share * len(values))).values
            for w, old, gone in zip(weights, before, drop.split([w.numel() for w in weights]), strict=True):
                w.copy_(old.masked_fill(gone.view_as(w), 0.0))
            change = rose[name, share] = float(sum(losses())) / len(some) - base
            predicted, bound = float(signed[drop].sum()), float(absolute[drop].sum())
            print(f"drop {share:.1%} by {name}: predicted {predicted:+.5f}, bound {bound:.3f}, true {change:+.5f}")
            assert name == "|I|" or predicted < -base  # below zero: a loss that cannot be
    assert rose["I", 0.001] > max(base, rose["|I|", 0.5])
