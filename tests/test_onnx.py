"""Files for ONNX Runtime: they compute what the run computes, and say what is wrong with them."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT
from test_errors import refused
from test_train import flags_of

import train
from models.roberta import Roberta, RobertaConfig
from models.runs import load_run
from tools import deploy, onnx_files, tradeoff

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def runs(tiny, kinds, tmp_path_factory):
    """{name: folder} of runs that keep few weights or heads, one of each kind of output head."""
    for name in onnx_files.PACKAGES.split():
        pytest.importorskip(name)
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


@pytest.fixture(scope="module")
def files(runs):
    """{name: path} of the ONNX files of the runs."""
    found = {name: folder.parent / f"{name}.onnx" for name, folder in runs.items()}
    for name, path in found.items():
        assert deploy.main(["onnx", str(runs[name]), str(path), "--no-check"]) == 0
    return found


def rows(count, length):
    """Random rows of tokens, with more padding from row to row, and two token types."""
    generator = torch.Generator().manual_seed(count * length)
    ids = torch.randint(5, 60, (count, length), generator=generator)
    mask = torch.arange(length) < length - torch.arange(count)[:, None]
    types = (torch.arange(length) >= length // 2).long().expand(count, length)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types}


@torch.no_grad()
def check_logits(model, file, batch):
    assert (model.eval()(**batch) - file(**batch)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["words", "heads", "span", "tag"])
def test_a_file_computes_what_the_run_computes(name, runs, files, tiny, capsys):
    """At any batch and length, with padding, and on dev."""
    model, task, tokenizer, settings = load_run(runs[name])
    file, its_task, its_tokenizer, its_settings = onnx_files.load_onnx(files[name])
    assert its_tokenizer.to_str() == tokenizer.to_str()
    assert its_settings["max_length"] == settings["max_length"]
    assert its_task == task
    for size in ((1, 9), (5, 17)):
        check_logits(model, file, rows(*size))
    assert deploy.main(["evaluate", str(files[name]), "--data-dir", tiny[5]]) == 0
    metrics = capsys.readouterr().out.split("ONNX Runtime: ")[1].split()[1::2]
    result = json.loads((runs[name] / "result.json").read_text())["metrics"]
    assert metrics == [f"{100 * value:.2f}" for value in result.values()]


def test_roberta(runs):
    """Its positions are counted in the file, so that they fit any length.

    No norm follows the sum with which ONNX Runtime would join it.
    """
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    sizes |= {"vocab_size": 60, "num_hidden_layers": 2, "type_vocab_size": 1}
    sizes |= {"layer_norm_eps": 1e-5}
    torch.manual_seed(0)
    model = Roberta(RobertaConfig(**sizes, max_position_embeddings=34), "classifier", 3)
    data = onnx_files.to_onnx(model)
    onnx, _ = onnx_files.packages()
    nodes = onnx.load_from_string(data).graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert {makers[node.input[0]] for node in norms} == {"Sum"}
    assert "IsNaN" not in makers.values()
    file = onnx_files.OnnxModel(data)
    for size in ((1, 9), (5, 32)):
        check_logits(model, file, rows(*size) | {"token_type_ids": torch.zeros(size).long()})


def test_a_compact_folder_in_int8(runs, tiny, tmp_path, capsys):
    """Its file is smaller, and close to the run; the command compares and times the two."""
    folder, path = tmp_path / "compact", tmp_path / "model.onnx"
    flags = ["--data-dir", tiny[5]]
    assert deploy.main(["compact", str(runs["heads"]), str(folder), "--no-check", *flags]) == 0
    capsys.readouterr()
    assert deploy.main(["onnx", str(folder), str(path), "--int8", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("dense in ONNX Runtime") == 2 * out.count("ONNX Runtime, int8") == 6
    apart = float(re.search(r"differ by (\S+) at most", out)[1])
    model, *_ = load_run(runs["heads"])
    logits = model.eval()(**rows(3, 11)).detach()
    assert 1e-5 < apart < 0.2 * logits.abs().max()
    file = onnx_files.load_onnx(path)[0](**rows(3, 11))
    assert 1e-5 < (logits - file).abs().max() < 0.2 * logits.abs().max()


def test_int8_is_smaller_and_does_not_overflow(files):
    """Logits in int8 are off by less than 5% of the largest."""
    data = files["words"].read_bytes()
    small = onnx_files.in_int8(data)
    assert len(small) < 0.8 * len(data)  # the embeddings of this model are most of it
    logits, in_int8 = [onnx_files.OnnxModel(each)(**rows(9, 17)) for each in (data, small)]
    assert 0 < (logits - in_int8).abs().max() < 0.05 * logits.abs().max()


def test_without_us(runs, files, tmp_path, monkeypatch):
    """The lines in docs/deploy.md label texts as the run does."""
    (lines,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mrpc.onnx").write_bytes(files["words"].read_bytes())
    theirs = {}
    exec(lines, theirs)
    model, _, tokenizer, settings = load_run(runs["words"])
    tokenizer.enable_truncation(settings["max_length"])
    pair = tokenizer.encode("One.", "Two, longer than one.")
    assert theirs["inputs"]["input_ids"][1].tolist() == pair.ids
    assert theirs["inputs"]["token_type_ids"][1].tolist() == pair.type_ids
    assert theirs["inputs"]["attention_mask"].min() == 0
    batch = {name: torch.tensor(values) for name, values in theirs["inputs"].items()}
    check_logits(model, lambda **_: torch.tensor(theirs["logits"]), batch)
    about = json.loads(theirs["texts"]["nanoprune"])
    assert about["labels"] == about["label_words"] == ["no", "yes"]


def test_tradeoff(runs, files, tiny, tmp_path, capsys, monkeypatch):
    """A row for each way to deploy a run, with its metrics, and timed without dropout."""
    data = files["words"].read_bytes()
    monkeypatch.setattr(onnx_files, "to_onnx", lambda model, **_: data)  # which takes seconds
    flags = ["--method", "dense", "--max-steps", "1", "--out", str(tmp_path / "dense")]
    assert train.main([*tiny, *flags]) == 0
    named = ["--data-dir", tiny[5], "--repeat", "1"]
    capsys.readouterr()
    assert tradeoff.main([str(tmp_path / "dense"), str(runs["words"]), *named]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    ways = ["PyTorch", "ONNX Runtime", tradeoff.PLAIN, *2 * [tradeoff.INT8], "sparse"]
    assert [row[3] for row in table] == ways
    assert table[0][5] == "1.00"  # it is what the others are compared with
    metrics = [float(row[4].split()[1]) / 100 for row in table]
    for row, folder in ((0, tmp_path / "dense"), (5, runs["words"])):
        found = list(json.loads((folder / "result.json").read_text())["metrics"].values())[0]
        assert abs(metrics[row] - found) < 1e-4
    ways = tradeoff.ways_of(runs["words"], load_run(runs["words"])[0], "smp-s")
    assert ways[-1].name == "sparse" and not ways[-1].model.training
    refused(capsys, [runs["words"], *named], "shall be a dense one", main=tradeoff.main)
    short = tmp_path / "short"
    assert train.main([*tiny, *flags[:-1], str(short), "--max-length", "8"]) == 0
    argv = [tmp_path / "dense", short, *named]
    refused(capsys, argv, "short: other tokens or --max-length", main=tradeoff.main)


def with_metadata(data, texts):
    """The bytes of an ONNX file with these metadata {name: text} alone."""
    onnx, _ = onnx_files.packages()
    model = onnx.load_from_string(data)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


def test_mistakes(runs, files, texts, tmp_path, capsys, monkeypatch):
    data = files["words"].read_bytes()
    argv = ["onnx", runs["words"], files["words"]]
    refused(capsys, argv, "exists already", main=deploy.main)
    assert files["words"].read_bytes() == data
    refused(capsys, ["onnx", runs["words"], tmp_path / "x.on"], "ends with", main=deploy.main)
    (tmp_path / "empty").mkdir()
    argv = ["onnx", tmp_path / "empty", tmp_path / "x.onnx"]
    refused(capsys, argv, "config.json", main=deploy.main)
    for wrong in (data[: len(data) // 2], b"", b"text"):
        (tmp_path / "wrong.onnx").write_bytes(wrong)
        refused(capsys, ["evaluate", tmp_path / "wrong.onnx"], "wrong.onnx", main=deploy.main)
    for words in ({}, {"nanoprune": "no JSON"}, {"nanoprune": "[]", "tokenizer": "{}"}):
        (tmp_path / "other.onnx").write_bytes(with_metadata(data, words))
        refused(capsys, ["evaluate", tmp_path / "other.onnx"], "other.onnx", main=deploy.main)
    refused(capsys, ["evaluate", tmp_path / "no.onnx"], "no.onnx", main=deploy.main)
    flags = ["--method", "dense", "--max-steps", "1", "--out", str(tmp_path / "texts")]
    assert train.main([*texts, *flags]) == 0
    argv = ["onnx", tmp_path / "texts", tmp_path / "x.onnx"]
    refused(capsys, argv, "not offered", main=deploy.main)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(capsys, argv, f"pip install {onnx_files.PACKAGES}", main=deploy.main)
    assert not (tmp_path / "x.onnx").exists()
