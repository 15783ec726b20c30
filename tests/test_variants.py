"""The variants in tools/variants.py, run as a user runs them: by a grid."""

import json
import sys

import forks
import pytest
import torch
from safetensors.torch import load_file
from test_grid import main_with_forks

import eval as evaluation
from conftest import GOLDEN
from prune import METHODS
from support.terminal import show
from tools import deploy


def begin(background, fixture):
    """Start a grid with a run of each variant: (its folder, the future of its status)."""
    folder = fixture("tmp_path_factory").mktemp("variants")
    methods = "--method {smp-global,smp-head,smp-words,pins-frozen} --density 0.2"
    (folder / "grid").write_text(f"a 1 {' '.join(fixture('tiny'))} {methods}\n")
    argv = [folder / "grid", "--out", folder, "--program", "tools.variants", "--jobs", "1"]
    argv = ["test_variants:grid_with_variants", *argv]
    return folder, background.call(lambda: forks.start(argv, folder)[0].wait())


def grid_with_variants(argv):
    """Make a grid in a fork, in which train.py is imported after the variants, as by a user."""
    del sys.modules["train"]
    return main_with_forks(argv)


@pytest.fixture(scope="module")
def runs_of_variants(begun):
    """The folder of a run of each variant."""
    folder, status = begun
    assert status.result() == 0, (folder / "stderr").read_text()
    return folder


def test_global_keeps_the_largest_scores_of_the_encoder(runs_of_variants):
    tensors = load_file(runs_of_variants / "a-smp-global" / "scores.safetensors")
    masks = [name for name in tensors if name.endswith(".mask")]
    mask = torch.cat([tensors[name].flatten() for name in masks]).bool()
    scores = torch.cat([tensors[name.replace(".mask", ".scores")].flatten() for name in masks])
    assert int(mask.sum()) == int(0.2 * mask.numel())
    assert scores[mask].min() >= scores[~mask].max()
    kept = {round(tensors[name].float().mean().item(), 3) for name in masks}
    assert len(kept) > 1  # not a ranking per matrix


def trained(run):
    """The names of the tensors of a run's model that are not those of the model it began with."""
    before = load_file(GOLDEN / "tiny-bert" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    changed = {name for name in before if name in after and not same(before[name], after[name])}
    return changed | (after.keys() - before.keys())


def same(one, other):
    return bool(((one == other) | (other == 0)).all())  # 0: what the masks have dropped


@pytest.mark.parametrize("method, inside", [("smp-head", "pooler"), ("smp-words", "cls.")])
def test_only_the_head_is_trained(method, inside, runs_of_variants):
    names = trained(runs_of_variants / f"a-{method}")
    assert any(inside in name for name in names)
    assert not any("encoder" in name or "embeddings" in name for name in names), names


def test_frozen_embeddings_stay(runs_of_variants):
    names = trained(runs_of_variants / "a-pins-frozen")
    assert any("encoder" in name for name in names)
    assert not any("embeddings" in name for name in names), names


CLASSES = {
    "smp-global": "BertForMaskedLM",
    "smp-head": "BertForSequenceClassification",
    "smp-words": "BertForMaskedLM",
    "pins-frozen": "BertForSequenceClassification",
}


@pytest.fixture
def without_variants(monkeypatch):
    """The methods are those of prune.py alone, whatever other tests have imported."""
    for name in CLASSES:
        monkeypatch.delitem(METHODS, name, raising=False)


def metrics_of(run):
    return json.loads((run / "result.json").read_text())["metrics"]


@pytest.mark.parametrize("method", CLASSES)
def test_a_run_is_used_where_its_variant_is_unknown(
    method, runs_of_variants, without_variants, tiny, tmp_path, capsys
):
    """eval.py finds the metrics of the run, and it is exported as the class of its output head."""
    run = runs_of_variants / f"a-{method}"
    assert evaluation.main([str(run), "--data-dir", tiny[5], "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f": {method} on pairs" in out
    for name, value in metrics_of(run).items():
        assert f"  {name:17} {100 * value:.2f}\n" in out
    assert deploy.main(["export", str(run), str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [CLASSES[method]]
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name


def test_the_mask_of_a_variant(runs_of_variants, without_variants, tiny, tmp_path, capsys):
    """The mask of a variant that learns scores alone has the run's metrics; else there is none."""
    path = tmp_path / "global.mask"
    run = runs_of_variants / "a-smp-global"
    assert deploy.main(["save-mask", str(run), str(path)]) == 0
    own = ["--task-file", tiny[3], "--data-dir", tiny[5], "--device", "cpu"]
    capsys.readouterr()
    assert deploy.main(["masks", tiny[1], str(path), *own]) == 0
    assert capsys.readouterr().out.endswith(f": {show(metrics_of(run))}\n")
    run = runs_of_variants / "a-smp-words"
    assert deploy.main(["save-mask", str(run), str(tmp_path / "words.mask")]) == 2
    assert "a smp-words run trains weights" in capsys.readouterr().err
    assert not (tmp_path / "words.mask").exists()
