"""Runs that start from runs: prune further, or fine-tune what is kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_errors import edit_json, refused
from test_train import flags_of, interrupted_at, result_of, rows, run, same

import prune
import train
from models.runs import load_run
from tools import report

METHODS = {"smp-s": {}, "movement": {}, "pins": {"pins_window": 2}}  # and their own options
STEPS = {"max_steps": 13}  # an epoch


@pytest.fixture(scope="module")
def halves(tiny, tmp_path_factory):
    """A folder with a finished run at density 0.5 of each method."""
    folder = tmp_path_factory.mktemp("halves")
    for method, own in METHODS.items():
        options = {"method": method, "density": 0.5, "lr": 1e-3, "dropout": 0, **own, **STEPS}
        run(tiny, folder / method, **options, teacher="none")
    return folder


def zeros(out):
    """{matrix: where its saved weights are 0}."""
    tensors = load_file(out / "model" / "model.safetensors")
    return {name: t == 0 for name, t in tensors.items() if ".layer." in name and t.dim() == 2}


@pytest.mark.parametrize("method", METHODS)
def test_prune_further(method, tiny, halves, tmp_path):
    """The ramp starts at the density of the first run, with its scores, and ends at the new one."""
    out = tmp_path / "run"
    options = {"method": method, "density": 0.3, "hold": 0, "teacher": "none"}
    options |= METHODS[method] | STEPS
    result = run([*tiny, "--from", str(halves / method)], out, **options)
    assert result["achieved_density"] == pytest.approx(0.3, abs=0.005)
    assert rows(out)[0]["density"] == pytest.approx(0.5, abs=0.005)
    densities = [row["density"] for row in rows(out)]
    assert max(densities) < 0.51
    before = zeros(halves / method)
    after = zeros(out)
    if method == "pins":  # what was 0 stays 0
        assert all(after[name][where].all() for name, where in before.items())
    if method == "smp-s":  # the weights are those of the base, also where they were 0 before
        base = load_file(f"{tiny[1]}/model.safetensors")
        saved = load_file(out / "model" / "model.safetensors")
        assert all(torch.equal(saved[name], base[name] * ~where) for name, where in after.items())
    counts = [sum(int(f(where)) for where in after.values()) for f in (torch.sum, torch.numel)]
    assert 1 - counts[0] / counts[1] == pytest.approx(result["achieved_density"], abs=1e-9)
    kept = sum(int((~where & ~after[name]).sum()) for name, where in before.items())
    total = sum(int((~where).sum()) for where in after.values())
    assert kept / total > 0.8  # most of what stays was there before


@pytest.mark.parametrize("method", METHODS)
def test_fixed(method, tiny, halves, tmp_path, capsys):
    """Zeros stay zero, to the last one, and what is kept is trained; a resume changes nothing."""
    out = tmp_path / "run"
    options = {"method": "fixed", "lr": 1e-3, "eval_every": 5} | STEPS
    flags = [*tiny, "--from", str(halves / method)]
    result = run(flags, out, **options)
    before = zeros(halves / method)
    after = zeros(out)
    assert before.keys() == after.keys()
    for name, where in before.items():
        assert after[name][where].all(), name
        assert not after[name][~where].any(), name
    old = load_file(halves / method / "model" / "model.safetensors")
    new = load_file(out / "model" / "model.safetensors")
    changed = [name for name in before if not torch.equal(old[name], new[name])]
    assert len(changed) == len(before)
    capsys.readouterr()
    assert report.main([str(out)]) == 0
    assert "| fixed from a run | as found |" in capsys.readouterr().out
    density = result_of(halves / method)["achieved_density"]
    assert result["achieved_density"] == pytest.approx(density, abs=1e-9)
    again = tmp_path / "again"
    argv = [*flags, *flags_of(**options), "--out", str(again)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune.Fixed, "update", interrupted_at(7, prune.Fixed.update))
        assert train.main(argv) != 0
    assert train.main(["--out", str(again), "--resume"]) == 0
    same(out, again)


def test_an_origin_may_move(tiny, halves, tmp_path, capsys):
    """A resumed run takes its origin from another place, but no other origin."""
    origin = tmp_path / "origin"
    shutil.copytree(halves / "pins", origin)
    options = {"method": "fixed", "lr": 1e-3, "eval_every": 5} | STEPS
    flags = [*tiny, *flags_of(**options), "--from"]
    run([*flags, str(origin)], tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune.Fixed, "update", interrupted_at(7, prune.Fixed.update))
        assert train.main([*flags, str(origin), "--out", str(out)]) != 0
    moved = tmp_path / "moved"
    shutil.move(origin, moved)
    again = ["--out", str(out), "--resume"]
    refused(capsys, [*again, "--from", halves / "movement"], "sha256_of_from")
    assert train.main([*again, "--from", str(moved)]) == 0
    same(tmp_path / "whole", out)
    alone = ["--out", halves / "pins", "--resume", "--from", moved]
    refused(capsys, alone, "was started with None")


@pytest.mark.parametrize("origin", [*METHODS, "pins/model", "movement/model"])
def test_pruning_further_resumes(origin, tiny, halves, tmp_path):
    """A run that prunes further, interrupted after it has zeroed more, ends as an unbroken one.

    So does one that begins with a folder, which may hold other frozen weights than the base.
    """
    method = origin.removesuffix("/model")
    shutil.copytree(halves / origin, tmp_path / "origin")
    if origin == "movement/model":
        path = tmp_path / "origin" / "model.safetensors"
        save_file({name: t * 1.01 for name, t in load_file(path).items()}, path)
    options = {"method": method, "density": 0.3, "hold": 0, "lr": 1e-3, "teacher": "none"}
    options |= {"ramp": 0.8, "eval_every": 5, "dropout": 0} | METHODS[method] | STEPS
    flags = [*tiny, "--from", str(tmp_path / "origin")]
    run(flags, tmp_path / "whole", **options)
    again = tmp_path / "again"
    Method = prune.METHODS[method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "update", interrupted_at(7, Method.update))
        assert train.main([*flags, *flags_of(**options), "--out", str(again)]) != 0
    assert train.main(["--out", str(again), "--resume"]) == 0
    same(tmp_path / "whole", again)
    if prune.METHODS[method].top_k:  # at other densities, too, it has what was frozen
        with torch.no_grad():
            model = report.with_method(tmp_path / "whole", torch.device("cpu"))[0]
        baked = load_run(tmp_path / "whole")[0].state_dict()
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        whole = [name for name in frozen if name not in zeros(tmp_path / "whole")]
        assert all(torch.equal(model.state_dict()[name], baked[name]) for name in whole)


@pytest.mark.parametrize("method, first", [("movement", 1), ("magnitude", 0.5)])
def test_a_folder_with_zeros(method, first, tiny, halves, tmp_path):
    """Scores that begin anew do not know what is 0. Magnitude sees it, and goes on from there."""
    flags = [*tiny, "--from", str(halves / "pins" / "model")]
    run(flags, tmp_path / "run", method=method, density=0.3, hold=0, max_steps=2)
    assert rows(tmp_path / "run")[0]["density"] == pytest.approx(first, abs=0.005)


def test_the_head_comes_along(tiny, kinds, halves, tmp_path):
    """With the same labels the head goes on where it was. With others it is new.

    Others are also the same ones in another order.
    """
    flags = [*tiny, "--from", str(halves / "pins"), "--max-steps", "1", "--lr", "0"]
    old = load_file(halves / "pins" / "model" / "model.safetensors")["classifier.weight"]
    run(flags, tmp_path / "same", method="fixed")
    new = load_file(tmp_path / "same" / "model" / "model.safetensors")["classifier.weight"]
    assert torch.equal(old, new)
    task = json.loads(Path(tiny[3]).read_text())
    turned = Path(tiny[3]).with_name("turned.json")  # beside the files that it names
    turned.write_text(json.dumps(task | {"labels": ["yes", "no"], "words": ["yes", "no"]}))
    run([*flags, "--task-file", str(turned)], tmp_path / "turned", method="fixed")
    new = load_file(tmp_path / "turned" / "model" / "model.safetensors")["classifier.weight"]
    assert new.shape == old.shape
    assert not torch.equal(old, new) and not torch.equal(old.flip(0), new)
    run([*flags, "--task-file", kinds["tag"]], tmp_path / "tag", method="fixed")
    new = load_file(tmp_path / "tag" / "model" / "model.safetensors")["classifier.weight"]
    assert new.shape == (5, old.size(1))


def test_bad_beginnings(tiny, halves, tmp_path, capsys):
    """Another base, another method, an unfinished run, and fixed without a run."""
    begin = [*tiny, "--out", tmp_path / "out", "--from"]
    other = ["--method", "movement"]
    refused(capsys, [*begin, halves / "pins", *other], "a pins run; expected movement, or fixed")
    refused(capsys, [*begin, halves / "nothing", *other], "nothing")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(halves / "movement", unfinished)
    shutil.rmtree(unfinished / "model")
    refused(capsys, [*begin, unfinished, *other], "has no model/ yet")
    config = json.loads((halves / "movement" / "config.json").read_text())
    based = tmp_path / "based"
    shutil.copytree(halves / "movement", based)
    Path(based, "config.json").write_text(json.dumps(config | {"model_sha256": "0"}))
    refused(capsys, [*begin, based, *other], "began with another model")
    base = shutil.copytree(tiny[1], tmp_path / "base")
    edit_json(base / "config.json", layer_norm_eps=0.1)
    again = [*begin, halves / "movement", *other, "--model", base]
    refused(capsys, again, "the config.json of its model differs")
    refused(capsys, [*tiny, "--method", "fixed", "--out", tmp_path / "x"], "give --from RUN")
    assert not (tmp_path / "out").exists()


def test_other_label_words_are_refused(tiny, halves, tmp_path, capsys):
    """On the same task scores were learned for the words of then; a head may have no words."""
    task = json.loads(Path(tiny[3]).read_text())
    other = Path(tiny[3]).with_name("other.json")
    other.write_text(json.dumps(task | {"words": ["yes", "no"]}))
    for method in ("smp-s", "fixed"):
        argv = [*tiny, "--task-file", other, "--method", method, "--from", halves / "smp-s"]
        refused(capsys, [*argv, "--out", tmp_path / method], "with other label words", "--from")
    argv = [*tiny, "--method", "fixed", "--from", halves / "pins", "--regression", "logit"]
    refused(capsys, [*argv, "--out", tmp_path / "x"], "no label word gives a number of pairs")


def test_fixed_keeps_the_way_of_a_regression(tiny, capsys):
    """A run that read the logit of one word can be fine-tuned as it was."""
    argv = ["--model", tiny[1], "--task", "stsb", "--method", "fixed", "--from", "r", "--dry-run"]
    assert train.main([*argv, "--regression", "logit"]) == 0
    assert "--regression logit" in " ".join(capsys.readouterr().out.split())
