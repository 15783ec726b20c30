"""Files for ONNX Runtime: they compute what the run computes, and say what is wrong with them."""

import json
import sys

import pytest
import torch
from test_errors import refused
from test_train import flags_of

import train
from models.runs import load_run
from support.terminal import UserError
from tools import deploy, onnx_files

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def ort():
    for name in onnx_files.PACKAGES.split():
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def runs(tiny, kinds, tmp_path_factory):
    """{name: folder} of runs that keep few weights or heads, one of each kind of output head."""
    folder = tmp_path_factory.mktemp("onnx")
    plans = {
        "words": {"method": "smp-s"},
        "heads": {"method": "movement", "pattern": "head", "density": 0.5},
        "span": {"method": "magnitude", "task_file": kinds["span"]},
        "tag": {"method": "pins", "teacher": "none", "task_file": kinds["tag"]},
    }
    for name, options in plans.items():
        flags = flags_of(**options, max_steps=26, out=folder / name)
        assert train.main([*tiny, *flags]) == 0
    return {name: folder / name for name in plans}


def rows(count, length):
    """Random rows of tokens, with more padding from row to row, and two token types."""
    generator = torch.Generator().manual_seed(count * length)
    ids = torch.randint(5, 60, (count, length), generator=generator)
    mask = torch.arange(length) < length - torch.arange(count)[:, None]
    types = (torch.arange(length) >= length // 2).long().expand(count, length)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("name", ["words", "heads", "span", "tag"])
def test_a_file_computes_what_the_run_computes(name, runs, tiny, ort, tmp_path, capsys):
    """At any batch and length, with padding; so says the command, which compares them on dev."""
    path = tmp_path / "model.onnx"
    argv = ["onnx", runs[name], path, "--data-dir", tiny[5]]
    assert deploy.main([str(word) for word in argv]) == 0
    out = capsys.readouterr().out
    assert out.count("dense in ONNX Runtime") == out.count("the same in int8") == 3
    model, _, tokenizer, settings = load_run(runs[name])
    file, task, theirs, about = onnx_files.load_onnx(path)
    assert theirs.to_str() == tokenizer.to_str()
    assert about["max_length"] == settings["max_length"]
    with torch.no_grad():
        for size in ((1, 9), (5, 17)):
            batch = rows(*size)
            assert (model.eval()(**batch) - file(**batch)).abs().max() < 1e-4
    assert deploy.main(["evaluate", str(path), "--data-dir", tiny[5]]) == 0
    metrics = capsys.readouterr().out.strip().split("fp32: ")[1]
    assert f"before: {metrics}" in out


def test_int8_is_smaller(runs, tiny, ort, tmp_path):
    sizes = []
    for flags in ([], ["--int8"]):
        path = tmp_path / f"{len(flags)}.onnx"
        argv = ["onnx", str(runs["words"]), str(path), "--no-check", *flags]
        assert deploy.main(argv) == 0
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.8 * sizes[0]  # the embeddings of this model are most of it
    batch = rows(3, 11)
    ours, theirs = [onnx_files.load_onnx(tmp_path / f"{i}.onnx")[0](**batch) for i in (0, 1)]
    assert 0 < (ours - theirs).abs().max() < 0.2 * ours.abs().max()


def test_a_compact_folder(runs, tiny, ort, tmp_path):
    """It gives the file that its run gives, but for the names of what is in it."""
    folder, path = tmp_path / "compact", tmp_path / "model.onnx"
    flags = ["--no-check", "--data-dir", tiny[5]]
    assert deploy.main(["compact", str(runs["heads"]), str(folder), *flags]) == 0
    assert deploy.main(["onnx", str(folder), str(path), *flags]) == 0
    model = load_run(runs["heads"])[0].eval()
    batch = rows(3, 11)
    with torch.no_grad():
        assert (model(**batch) - onnx_files.load_onnx(path)[0](**batch)).abs().max() < 1e-4


def test_mistakes(runs, tiny, ort, texts, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.onnx"
    argv = ["onnx", runs["words"], path, "--no-check"]
    assert deploy.main([str(word) for word in argv]) == 0
    data = path.read_bytes()
    refused(capsys, argv, "exists already", main=deploy.main)
    (tmp_path / "empty").mkdir()
    argv = ["onnx", tmp_path / "empty", tmp_path / "x.onnx"]
    refused(capsys, argv, "config.json", main=deploy.main)
    for wrong in (data[: len(data) // 2], b"", b"text"):
        (tmp_path / "wrong.onnx").write_bytes(wrong)
        refused(capsys, ["evaluate", tmp_path / "wrong.onnx"], "wrong.onnx", main=deploy.main)
    (tmp_path / "other.onnx").write_bytes(onnx_files.with_metadata(data, nanoprune=""))
    refused(capsys, ["evaluate", tmp_path / "other.onnx"], "other.onnx", main=deploy.main)
    refused(capsys, ["evaluate", tmp_path / "no.onnx"], "no.onnx", main=deploy.main)
    flags = ["--method", "dense", "--max-steps", "1", "--out", str(tmp_path / "texts")]
    assert train.main([*texts, *flags]) == 0
    argv = ["onnx", tmp_path / "texts", tmp_path / "x.onnx"]
    refused(capsys, argv, "not offered", main=deploy.main)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(capsys, argv, f"pip install {onnx_files.PACKAGES}", main=deploy.main)
    assert not (tmp_path / "x.onnx").exists()


def test_metadata(runs, ort, tmp_path):
    """The labels and label words can be read by any program."""
    path = tmp_path / "model.onnx"
    assert deploy.main(["onnx", str(runs["words"]), str(path), "--no-check"]) == 0
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["nanoprune"])
    assert about["labels"] == about["label_words"] == ["no", "yes"]
    with pytest.raises(UserError, match="no metadata"):
        (tmp_path / "x.onnx").write_bytes(onnx_files.to_onnx(load_run(runs["words"])[0]))
        onnx_files.load_onnx(tmp_path / "x.onnx")
